//! Restarts with another configuration: nothing of the former one stays (docs/faults.md, P5).

use std::collections::BTreeSet;

use nix::sys::signal::Signal;

use crate::harness::{Agent, HOST_GW, VXLAN, routes};
use crate::store::Cluster;

/// A configuration, and how to tell what it leaves.
struct Change<'a> {
    from: &'a str,
    to: &'a str,
    flags: &'a [&'a str],
    /// The devices afterwards.
    devices: &'a [&'a str],
}

impl Change<'_> {
    /// Two nodes go from one to the other. Node 1 is killed without warning before, and again as soon as it has begun.
    fn leaves_nothing_of_the_former(&self) -> Cluster {
        let cluster = Cluster::new(2, self.from);
        let base = lines(&cluster, 1);
        let start = |nth| cluster.start(nth, self.flags);
        let agents = [start(1), start(2)];
        agents.iter().for_each(Agent::until_ready);
        agents[0].until("told of its peer", || cluster.has_route(1, &cluster.subnet(2)));
        let former = lines(&cluster, 1);
        for agent in agents {
            agent.end(Signal::SIGKILL);
        }
        cluster.configure(self.to);

        let two = start(2);
        two.until_ready();
        let one = start(1);
        one.until("at work", || lines(&cluster, 1) != former);
        one.end(Signal::SIGKILL);
        let one = start(1);
        one.until_ready();
        let wanted = format!("{} ", cluster.subnet(2));
        one.until("as wanted and nothing more", || {
            let ours = &lines(&cluster, 1) - &base;
            let ours: Vec<_> = ours.iter().filter(|line| !line.starts_with("blackhole 10.245")).collect();
            matches!(ours.as_slice(), [only] if only.starts_with(&wanted)) && devices(&cluster, 1) == self.devices
        });
        for nth in [1, 2] {
            assert_eq!(cluster.keys_of(nth).len(), 1, "{:?}", cluster.records());
        }
        one.end(Signal::SIGTERM);
        cluster.assert_lawful();
        cluster
    }
}

fn lines(cluster: &Cluster, nth: usize) -> BTreeSet<String> {
    routes(cluster.ns(nth)).lines().map(str::to_owned).collect()
}

fn devices(cluster: &Cluster, nth: usize) -> Vec<String> {
    let links = cluster.ns(nth).links().unwrap().into_iter().map(|link| link.name);
    links.filter(|name| name.starts_with("flannel")).collect()
}

#[test]
fn another_backend_leaves_no_device_and_no_route_of_the_former() {
    let flags = &["-ip-masq=false"];
    Change { from: VXLAN, to: HOST_GW, flags, devices: &[] }.leaves_nothing_of_the_former();
    Change { from: HOST_GW, to: VXLAN, flags, devices: &["flannel.1"] }.leaves_nothing_of_the_former();
}

#[test]
fn another_network_leaves_no_route_and_no_rule_of_the_former() {
    let renumber = |config: &str| config.replace("10.244", "10.245").replacen('{', r#"{"EnableNFTables":true,"#, 1);
    for (from, devices) in [(VXLAN, &["flannel.1"][..]), (HOST_GW, &[])] {
        let change = Change { from, to: &renumber(from), flags: &["-ip-masq", "-ip-blackhole-route"], devices };
        let cluster = change.leaves_nothing_of_the_former();
        let rules = |words: &[&str]| cluster.site.tool(1, words).out;
        assert!(!rules(&["iptables-save"]).contains("10.244"), "{}", rules(&["iptables-save"]));
        let nft = rules(&["nft", "list", "ruleset"]);
        assert!(nft.contains("10.245") && !nft.contains("10.244"), "{nft}");
    }
}
