//! Canaries notice what happens to them, and outlive what they are said to outlive.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use flannel_core::net::{Dual, MacAddr, Prefix};
use testkit::canary::{Canaries, Place, Where};
use testkit::sabotage::{Act, Overlay, Plane};
use testkit::{Families, Fdb, Neighbour, Node, Route, Underlay, VxlanLink};

const DEV: &str = "flannel.1";

fn lab() -> Underlay {
    Underlay::new(1, Families::Dual)
        .expect("the lab needs root, or a user namespace: unshare -Urn cargo test -p testkit")
}

fn peers() -> [Prefix; 2] {
    ["10.244.1.0/24", "10.244.2.0/24"].map(|text| text.parse().unwrap())
}

fn overlay(node: &Node) -> Overlay {
    let ns = &node.ns;
    let vxlan = VxlanLink { vni: 1, local: node.v4().ok(), lower: Some("eth0".to_owned()), ..VxlanLink::default() };
    ns.add_vxlan(DEV, &vxlan, None).unwrap();
    ns.add_address(DEV, "10.244.0.0".parse().unwrap(), 32).unwrap();
    ns.set_up(DEV).unwrap();
    for (nth, peer) in peers().into_iter().enumerate() {
        let mac = MacAddr([2, 0, 0, 0, 0, nth as u8]);
        ns.put_fdb(&[Fdb::permanent(DEV, mac, "10.89.1.1".parse().unwrap())]).unwrap();
        ns.put_neighbours(&[Neighbour::permanent(DEV, peer.addr(), mac)]).unwrap();
        ns.add_route(&Route::to(peer).via(peer.addr()).dev(DEV).onlink().protocol(213)).unwrap();
    }
    Overlay { devices: vec![DEV.to_owned()], networks: Dual { v4: "10.244.0.0/16".parse().ok(), v6: None } }
}

#[test]
fn canaries_outlive_the_acts_that_their_place_survives_and_no_others() {
    for (act, place) in Act::all(Plane::Vxlan).flat_map(|act| Place::ALL.map(|place| (act, place))) {
        let underlay = lab();
        let node = &underlay.nodes()[0];
        let overlay = overlay(node);
        let canaries = Canaries::place(node, &Where { places: &[place], overlay: &overlay, peers: &peers() }).unwrap();
        let before = canaries.snapshot().unwrap();
        assert_eq!(before.missing().count(), 0, "{place:?}: {:?}", before.missing().collect::<Vec<_>>());
        act.apply(node, &overlay).unwrap();
        // A renamed device is found again under its name only.
        if act == Act::OverlayRenamed {
            node.ns.set_link("xflannel.1", &format!("name {DEV}")).unwrap();
        }
        let changes = canaries.snapshot().unwrap().changes_since(&before);
        assert_eq!(changes.is_empty(), place.survives(act), "{} on {place:?}: {changes:?}", act.name());
    }
}

#[test]
fn fifty_canaries_sit_apart() {
    let underlay = lab();
    let node = &underlay.nodes()[0];
    let overlay = overlay(node);
    let canaries = Canaries::place(node, &Where { places: &[Place::Apart], overlay: &overlay, peers: &[] }).unwrap();
    assert!(canaries.len() >= 50, "{}", canaries.len());
}

#[test]
fn the_smallest_change_is_seen() {
    let underlay = lab();
    let node = &underlay.nodes()[0];
    let overlay = overlay(node);
    let canaries = Canaries::place(node, &Where { places: &Place::ALL, overlay: &overlay, peers: &peers() }).unwrap();
    let before = canaries.snapshot().unwrap();
    assert_eq!(canaries.snapshot().unwrap(), before);

    let neighbour = Neighbour::permanent("canary0", "192.0.2.2".parse().unwrap(), MacAddr([2, 9, 9, 9, 9, 9]));
    node.ns.put_neighbours(&[neighbour]).unwrap();
    assert_eq!(canaries.snapshot().unwrap().changes_since(&before), ["neighbour 192.0.2.2 dev canary0: changed"]);

    let before = canaries.snapshot().unwrap();
    let route = Route::to(peers()[0]).via("192.0.2.3".parse().unwrap()).dev("canary0").onlink();
    node.ns.delete_route(&route).unwrap();
    let gone = ["route 10.244.1.0/24 via 192.0.2.3 dev canary0 onlink: gone"];
    assert_eq!(canaries.snapshot().unwrap().changes_since(&before), gone);
    node.ns.put_route("append", &route).unwrap();
    assert_eq!(canaries.snapshot().unwrap().changes_since(&before), ["the routes are in another order"]);

    // Made anew it is another, though every command prints the same of it.
    let before = canaries.snapshot().unwrap();
    let (addr, len) = ("2001:db8:0:2a::1".parse().unwrap(), 64);
    node.ns.delete_address("canary0", addr, len).unwrap();
    node.ns.add_address("canary0", addr, len).unwrap();
    let changes = canaries.snapshot().unwrap().changes_since(&before);
    assert!(changes.contains(&"address 2001:db8:0:2a::1 dev canary0: changed".to_owned()), "{changes:?}");
}
