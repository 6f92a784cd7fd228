//! Other settings of the network.

use std::path::Path;

use testkit::Families;
use testkit::cluster::{images, manifests};

use crate::bed::{Bed, OURS, reaches};

/// The network's settings in our manifest.
const NETWORK: &str = r#""Network": "10.244.0.0/16","#;
const VXLAN: &str = r#""Type": "vxlan""#;

pub(crate) fn iptables_and_host_gw(dir: &Path) {
    let bed = Bed::new(dir);
    let manifest = manifests::ours().unwrap();
    assert!(manifest.contains(VXLAN) && manifest.contains("\"EnableNFTables\": true"));
    bed.apply(&manifest);
    bed.until_agents_are_ready(&OURS);
    let pods = bed.pods();
    for (kind, nftables) in [("host-gw", "false"), ("vxlan", "false"), ("host-gw", "true")] {
        let manifest = manifest
            .replace(VXLAN, &format!(r#""Type": "{kind}""#))
            .replace("\"EnableNFTables\": true", &format!("\"EnableNFTables\": {nftables}"));
        bed.apply(&manifest);
        bed.restart(&OURS);
        reaches(&pods[0], &pods[1]);
        reaches(&pods[1], &pods[0]);
        for node in bed.cluster.nodes() {
            let routes = node.ns().ip("route show").unwrap();
            assert_eq!(routes.contains("flannel.1"), kind == "vxlan", "{routes}");
            let rules = node.run(&["nft", "list", "ruleset"]).unwrap();
            assert_eq!(rules.contains("table ip flannel-ipv4"), nftables == "true", "{rules}");
            let chains = node.run(&["iptables-save"]).unwrap();
            assert_eq!(chains.contains("FLANNEL-POSTRTG"), nftables == "false", "{chains}");
        }
    }
}

pub(crate) fn dual_stack(dir: &Path) {
    let bed = Bed::with(dir, Families::Dual, vec![images::ours().unwrap()]);
    let dual = format!(r#"{NETWORK} "EnableIPv6": true, "IPv6Network": "fd00:244::/48","#);
    let manifest = manifests::ours().unwrap();
    assert!(manifest.contains(NETWORK));
    bed.apply(&manifest.replace(NETWORK, &dual));
    bed.until_agents_are_ready(&OURS);
    let pods = bed.pods();
    for pod in &pods {
        assert!(pod.addrs.v4.is_some() && pod.addrs.v6.is_some(), "{pod:?}");
    }
    reaches(&pods[1], &pods[0]);
}
