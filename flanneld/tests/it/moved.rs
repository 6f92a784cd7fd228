//! Restarts under another address: by another interface, or by another public address.

use std::net::IpAddr;

use nix::sys::signal::Signal;

use crate::harness::{Agent, Site, VXLAN, side_by_side};
use crate::store::{Cluster, SUBNETS, reaches};

/// Other flags, the last byte of the address that they have published, and how the run before them ends.
const MOVES: [(&[&str], u8, Signal); 2] =
    [(&["-iface=eth1"], 21, Signal::SIGKILL), (&["-iface=eth0", "-public-ip=10.89.0.31"], 31, Signal::SIGTERM)];

/// Gives node 1 a second interface on the switch, and a second address on the first one.
fn more_addresses(site: &Site) {
    let (ns, switch) = (site.ns(1), site.underlay.switch());
    ns.add_veth("eth1", switch, "second").unwrap();
    switch.set_link("second", "master br0").unwrap();
    switch.set_up("second").unwrap();
    ns.set_up("eth1").unwrap();
    ns.add_address("eth1", addr(21), 16).unwrap();
    ns.add_address("eth0", addr(31), 16).unwrap();
}

fn addr(last: u8) -> IpAddr {
    [10, 89, 0, last].into()
}

/// The records of all addresses but these: keys, values and the revisions of their last change.
fn of_others(cluster: &Cluster, own: &[u8]) -> Vec<(String, String, i64)> {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let all = cluster.ask(async |client| {
        let options = etcd_client::GetOptions::new().with_prefix();
        let found = client.get(SUBNETS, Some(options)).await.unwrap();
        found.kvs().iter().map(|kv| (text(kv.key()), text(kv.value()), kv.mod_revision())).collect::<Vec<_>>()
    });
    let is_own = |value: &str| own.iter().any(|last| value.contains(&format!("\"{}\"", addr(*last))));
    all.unwrap().into_iter().filter(|(_, value, _)| !is_own(value)).collect()
}

/// In etcd an address is a node: the former one's lease is left to its time, as Go flannel leaves it.
#[test]
fn where_the_store_knows_nodes_by_address_another_one_takes_a_lease_of_its_own_and_is_reached_there() {
    side_by_side(MOVES, |(flags, last, signal)| {
        let cluster = Cluster::new(2, VXLAN);
        more_addresses(&cluster.site);
        let (one, two) = (cluster.start(1, &[]), cluster.start(2, &[]));
        [&one, &two].into_iter().for_each(Agent::until_ready);
        let (former, others) = (cluster.subnet(1), of_others(&cluster, &[11]));
        let pods = [cluster.pod(1), cluster.pod(2)];
        reaches(&pods[1], &pods[0]);
        one.end(signal);

        let one = cluster.start(1, flags).ready();
        assert_ne!(cluster.subnet(1), former, "{flags:?}");
        assert_eq!(cluster.keys_of(1), [former.to_string().replace('/', "-")], "{flags:?}");
        let published = format!("\"{}\"", addr(last));
        let records = cluster.records().into_iter().filter(|(_, value)| value.contains(&published));
        let keys: Vec<_> = records.map(|(key, _)| key).collect();
        assert_eq!(keys, [cluster.subnet(1).to_string().replace('/', "-")], "{flags:?}");
        assert_eq!(of_others(&cluster, &[11, last]), others, "{flags:?}");
        let pod = cluster.pod(1);
        reaches(&pods[1], &pod);
        reaches(&pod, &pods[1]);
        assert_eq!(one.get(9472, "/plan"), Some((200, "nothing to do\n".to_owned())), "{flags:?}");
        cluster.assert_lawful();
    });
}

#[test]
fn where_the_store_knows_nodes_by_name_the_subnet_stays_and_so_do_the_pods() {
    side_by_side(MOVES, |(flags, last, signal)| {
        let site = Site::new(2, VXLAN);
        more_addresses(&site);
        let (one, two) = (site.start(1, &[]), site.start(2, &[]));
        [&one, &two].into_iter().for_each(Agent::until_ready);
        let record = |nth: usize| std::fs::read_to_string(site.path(&format!("store/leases/node{nth}.json"))).unwrap();
        let (former, other) = (site.subnet(1), record(2));
        let pods = [site.pod(1), site.pod(2)];
        reaches(&pods[1], &pods[0]);
        one.end(signal);

        let one = site.start(1, flags).ready();
        assert_eq!((site.subnet(1), record(2)), (former, other), "{flags:?}");
        assert!(record(1).contains(&format!("\"{}\"", addr(last))), "{flags:?}: {}", record(1));
        reaches(&pods[1], &pods[0]);
        reaches(&pods[0], &pods[1]);
        assert_eq!(one.get(9472, "/plan"), Some((200, "nothing to do\n".to_owned())), "{flags:?}");
    });
}

/// The published address is translated on the way, and the host does not have it.
#[test]
fn a_node_behind_a_nat_is_reached_at_its_public_address() {
    let site = Site::new(2, VXLAN);
    let nat = "add table ip nat; add chain ip nat out { type nat hook output priority -100; }; \
               add rule ip nat out ip daddr 203.0.113.9 dnat to 10.89.0.11";
    for words in [&["nft", nat][..], &["ip", "route", "add", "203.0.113.9", "via", "10.89.0.11"]] {
        assert_eq!(site.tool(2, words).code, Some(0), "{words:?}");
    }
    let one = site.start(1, &["-iface=eth0", "-public-ip=203.0.113.9"]).ready();
    let two = site.start(2, &[]).ready();
    two.until("told of its peer's public address", || site.run(2, &["explain", "203.0.113.9"]).code == Some(0));
    one.until("told of its peer", || site.run(1, &["explain", "10.89.0.12"]).code == Some(0));
    let pods = [site.pod(1), site.pod(2)];
    reaches(&pods[0], &pods[1]);
    reaches(&pods[1], &pods[0]);
    assert_eq!(one.get(9472, "/plan"), Some((200, "nothing to do\n".to_owned())));
}
