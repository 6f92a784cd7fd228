//! Removing flannel from a host.

use nix::sys::signal::Signal;
use testkit::VxlanLink;

use crate::harness::{Agent, Site, VXLAN, read, routes};
use crate::store::{Cluster, SUBNETS};

#[test]
fn cleanup_removes_what_is_ours_and_nothing_else_and_may_be_repeated() {
    let site = Site::new(2, VXLAN);
    let ns = site.ns(1);
    let before = routes(ns);
    ns.add_vxlan("foreign", &VxlanLink { vni: 9, ..VxlanLink::default() }, None).unwrap();
    let agents = [site.start(1, &["-ip-masq"]), site.start(2, &[])].map(Agent::ready);
    agents[0].until("told of its peer", || routes(ns).contains("10.244."));

    let pid = format!("(pid {}); stop it first", agents[0].pid());
    for (words, part) in [
        (&["cleanup"][..], pid.as_str()),
        (&["cleanup", "-dry-run"], &pid),
        (&["cleanup", "-force"], "already running"),
    ] {
        let refused = site.run(1, words);
        assert_eq!(refused.code, Some(1), "{refused:?}");
        assert!(refused.err.contains(part), "{}", refused.err);
    }
    assert!(routes(ns).contains("10.244.") && site.subnet_file(1).exists());

    let [one, _two] = agents;
    one.end(Signal::SIGTERM);
    let (objects, lease) = (routes(ns), read(&site.path("store/leases/node1.json")));
    let planned = site.run(1, &["cleanup", "-dry-run"]);
    assert_eq!(planned.code, Some(0), "{planned:?}");
    for part in [
        "would remove: link delete flannel.1",
        "would remove: the overlay's firewall rules",
        "would release: lease node1.json",
    ] {
        assert!(planned.out.contains(part), "{part} is not in:\n{}", planned.out);
    }
    assert_eq!((routes(ns), read(&site.path("store/leases/node1.json"))), (objects, lease));
    assert!(site.subnet_file(1).exists() && site.tool(1, &["iptables", "-t", "nat", "-S"]).out.contains("FLANNEL"));

    let cleaned = site.run(1, &["cleanup"]);
    assert_eq!(cleaned.code, Some(0), "{cleaned:?}");
    assert_eq!(cleaned.out, planned.out.replace("would remove", "removed").replace("would release", "released"));
    assert!(ns.link("flannel.1").is_err() && ns.link("foreign").is_ok());
    assert_eq!((routes(ns), read(&site.subnet_file(1))), (before, String::new()));
    assert!(!site.tool(1, &["iptables", "-t", "nat", "-S"]).out.contains("FLANNEL"));
    let again = site.run(1, &["cleanup"]);
    assert_eq!((again.code, again.out.as_str()), (Some(0), "nothing to remove\n"), "{again:?}");
}

#[test]
fn cleanup_works_without_the_store() {
    let site = Site::new(1, VXLAN);
    let agent = site.start(1, &["-ip-blackhole-route"]).ready();
    agent.end(Signal::SIGTERM);
    std::fs::write(site.path("store/config.json"), "{").unwrap();
    let cleaned = site.run(1, &["cleanup"]);
    assert_eq!(cleaned.code, Some(0), "{cleaned:?}");
    assert!(cleaned.out.contains("lease not released: "), "{}", cleaned.out);
    assert!(site.ns(1).link("flannel.1").is_err() && !routes(site.ns(1)).contains("10.244."));
}

#[test]
fn a_lease_of_a_network_that_was_changed_since_is_released_too() {
    let dual =
        r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;
    let cluster = Cluster::with_flags(
        Site::with(1, testkit::Families::Dual, "{}"),
        dual,
        vec!["--listen-client-urls=http://0.0.0.0:2379,http://127.0.0.1:2381".to_owned()],
    );
    let agent = cluster.start(1, &[]).ready();
    agent.end(Signal::SIGTERM);
    assert_eq!(cluster.records().len(), 1);
    // A record of another node at another address stays.
    let other =
        r#"{"PublicIP":"10.89.0.99","BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#;
    cluster.put(&format!("{SUBNETS}/10.244.99.0-24"), other);
    cluster.configure(VXLAN);
    let cleaned = cluster.run(1, &["cleanup"]);
    assert!(cleaned.code == Some(0) && cleaned.out.contains("released: lease"), "{cleaned:?}");
    let keys: Vec<_> = cluster.records().into_iter().map(|(key, _)| key).collect();
    assert_eq!(keys, ["10.244.99.0-24"]);
}
