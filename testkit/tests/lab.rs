//! The lab itself: what it builds carries traffic, and is printed as people know it.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]
use std::time::Duration;

use flannel_core::net::{Dual, Family, MacAddr, Mtu, Prefix};
use testkit::probe::{self, Flow};
use testkit::{Families, Fdb, Listing, Neighbour, Node, Pod, PodNet, Route, Underlay, VxlanLink};

const SECOND: Duration = Duration::from_secs(1);

fn lab(families: Families) -> Underlay {
    Underlay::new(2, families).expect("the lab needs root, or a user namespace: unshare -Urn cargo test -p testkit")
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn subnet(family: Family, nth: usize) -> Prefix {
    match family {
        Family::V4 => prefix(&format!("10.244.{nth}.0/24")),
        Family::V6 => prefix(&format!("fd00:244:0:{nth}::/64")),
    }
}

fn mac(nth: usize) -> MacAddr {
    MacAddr([0x02, 0, 0, 0, 0, nth as u8])
}

/// What an overlay agent does, by hand.
fn join_overlay(node: &Node, nth: usize, peer: &Node, peer_nth: usize, family: Family) {
    let (ns, dev) = (&node.ns, format!("vx{family}"));
    let vxlan = VxlanLink {
        vni: 1,
        local: Some(node.addr(family).unwrap()),
        lower: Some("eth0".to_owned()),
        ..VxlanLink::default()
    };
    ns.add_vxlan(&dev, &vxlan, None).unwrap();
    ns.set_mac(&dev, mac(nth)).unwrap();
    let (ours, theirs) = (subnet(family, nth), subnet(family, peer_nth));
    ns.add_address(&dev, ours.addr(), family.bits()).unwrap();
    ns.set_up(&dev).unwrap();
    ns.put_fdb(&[Fdb::permanent(&dev, mac(peer_nth), peer.addr(family).unwrap())]).unwrap();
    ns.put_neighbours(&[Neighbour::permanent(&dev, theirs.addr(), mac(peer_nth))]).unwrap();
    ns.add_route(&Route::to(theirs).via(theirs.addr()).dev(&dev).onlink().protocol(213)).unwrap();
}

fn pods_over_vxlan(underlay: &Underlay, family: Family) -> [Pod; 2] {
    let [one, two] = underlay.nodes() else { panic!("two nodes") };
    join_overlay(one, 1, two, 2, family);
    join_overlay(two, 2, one, 1, family);
    [(one, 1), (two, 2)].map(|(node, nth)| {
        let mut subnets = Dual::default();
        *subnets.slot(family) = Some(subnet(family, nth));
        node.attach_pod(&PodNet { subnets, mtu: Mtu(1430) }).unwrap()
    })
}

#[test]
fn nodes_reach_one_another_and_the_switch() {
    let underlay = lab(Families::Dual);
    let [one, two] = underlay.nodes() else { panic!("two nodes") };
    for family in Family::BOTH {
        // The first neighbour solicitation may be lost, and is repeated after a second.
        probe::until_reply(&one.ns, two.addr(family).unwrap(), 5 * SECOND).unwrap();
    }
    probe::until_reply(&one.ns, "10.89.0.1".parse().unwrap(), 5 * SECOND).unwrap();
    assert!(probe::ping(&one.ns, "10.89.7.7".parse().unwrap(), Duration::from_millis(50)).is_err());
}

#[test]
fn pods_talk_over_a_hand_made_vxlan_in_either_family() {
    for (families, family) in [(Families::V4, Family::V4), (Families::V6, Family::V6)] {
        let underlay = lab(families);
        let pods = pods_over_vxlan(&underlay, family);
        probe::until_reply(&pods[0].ns, pods[1].addr(family).unwrap(), 3 * SECOND).unwrap();
        let carried = probe::throughput(&pods[0].ns, &pods[1].ns, pods[1].addr(family).unwrap(), SECOND / 5).unwrap();
        assert!(carried.gbit_per_second() > 0.01, "{carried:?}");
    }
}

#[test]
fn a_flow_counts_what_is_lost_and_nothing_else() {
    let underlay = lab(Families::V4);
    let [one, two] = underlay.nodes() else { panic!("two nodes") };
    probe::until_reply(&one.ns, two.v4().unwrap(), SECOND).unwrap();
    let until = |flow: &Flow, sent| testkit::wait_until("datagrams", 5 * SECOND, || Ok(flow.sent() > sent)).unwrap();

    let flow = Flow::start(&one.ns, &two.ns, two.v4().unwrap(), 2000).unwrap();
    until(&flow, 400);
    let whole = flow.stop().unwrap();
    assert_eq!((whole.lost, whole.duplicated, whole.reordered), (0, 0, 0), "{whole:?}");
    assert_eq!(whole.received + whole.overrun, whole.sent);

    let flow = Flow::start(&one.ns, &two.ns, two.v4().unwrap(), 2000).unwrap();
    until(&flow, 100);
    one.ns.set_down("eth0").unwrap();
    let before = flow.sent();
    until(&flow, before + 1000);
    one.restore_underlay().unwrap();
    let before = flow.received();
    testkit::wait_until("datagrams again", 5 * SECOND, || Ok(flow.received() > before + 100)).unwrap();
    let broken = flow.stop().unwrap();
    assert!(broken.lost >= 950 && broken.lost < broken.sent, "{broken:?}");
    assert!(broken.longest_gap >= Duration::from_millis(90), "{broken:?}");
}

#[test]
fn the_first_reply_after_an_outage_is_timed() {
    let underlay = lab(Families::V6);
    let [one, two] = underlay.nodes() else { panic!("two nodes") };
    one.ns.set_down("eth0").unwrap();
    assert!(probe::until_reply(&one.ns, two.v6().unwrap(), Duration::from_millis(50)).is_err());
    one.restore_underlay().unwrap();
    assert!(probe::until_reply(&one.ns, two.v6().unwrap(), 5 * SECOND).unwrap() < 5 * SECOND);
}

#[test]
fn objects_are_printed_as_iproute2_prints_them() {
    let underlay = lab(Families::V4);
    let _pods = pods_over_vxlan(&underlay, Family::V4);
    let ns = &underlay.nodes()[0].ns;
    let has = |listing, line: &str| {
        let text = ns.show(listing).unwrap();
        assert!(text.lines().any(|shown| shown == line), "{line:?} is not in:\n{text}");
    };
    has(Listing::Links, "vxIPv4           UNKNOWN        02:00:00:00:00:01 <BROADCAST,MULTICAST,UP,LOWER_UP>");
    has(Listing::Addresses, "    inet 10.244.1.0/32 scope global vxIPv4");
    has(Listing::Addresses, "    inet 10.89.0.11/16 brd 10.89.255.255 scope global eth0");
    has(Listing::Routes(Family::V4), "default via 10.89.0.1 dev eth0");
    has(Listing::Routes(Family::V4), "10.89.0.0/16 dev eth0 proto kernel scope link src 10.89.0.11");
    has(Listing::Routes(Family::V4), "10.244.2.0/24 via 10.244.2.0 dev vxIPv4 proto 213 onlink");
    has(Listing::Neighbours, "10.244.2.0 dev vxIPv4 lladdr 02:00:00:00:00:02 PERMANENT");
    has(Listing::Fdb, "02:00:00:00:00:02 dev vxIPv4 dst 10.89.0.12 self permanent");
}

#[test]
fn nothing_is_left_of_a_dropped_lab() {
    let underlay = lab(Families::V4);
    let node = underlay.nodes()[0].ns.clone();
    drop(underlay);
    // The namespaces die in the kernel's own time, and their ends of the links with them.
    testkit::wait_until("links to the switch", 60 * SECOND, || Ok(node.links()?.len() == 1)).unwrap();
}
