use crate::kernel::{Device, EEXIST, LinkName, LinkPart, Residence};
use crate::plan::Plan;
use futures_util::FutureExt;

use super::*;
use crate::net::{Family, Vni};

fn kernel() -> (FakeKernel, u32) {
    let kernel = FakeKernel::new();
    let uplink = kernel.add_uplink("eth0", "192.168.0.1/24".parse().unwrap()).unwrap();
    kernel.add_link(vxlan("flannel.1", 1, uplink)).unwrap();
    kernel.add_address("flannel.1", "10.5.1.0/32".parse().unwrap()).unwrap();
    kernel.add_address("flannel.1", "fd05::/128".parse().unwrap()).unwrap();
    kernel.add_route(overlay_route(&kernel, "10.5.2.0/24", "10.5.2.0"), Placement::Exclusive).unwrap();
    kernel.add_route(overlay_route(&kernel, "fd05:0:0:2::/64", "fd05:0:0:2::"), Placement::Exclusive).unwrap();
    let mac = MacAddr([2, 0, 0, 0, 0, 2]);
    kernel.put_neighbour("flannel.1", ip("10.5.2.0"), mac, Nud::Permanent).unwrap();
    kernel.put_fdb("flannel.1", mac, ip("192.168.0.2"), Nud::Permanent).unwrap();
    let hop = FakeRoute::via("10.9.0.0/24".parse().unwrap(), ip("192.168.0.3"), uplink);
    kernel.add_route(hop, Placement::Exclusive).unwrap();
    (kernel, uplink)
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn overlay_route(kernel: &FakeKernel, prefix: &str, gateway: &str) -> FakeRoute {
    let link = kernel.link_index("flannel.1").unwrap();
    FakeRoute { onlink: true, protocol: 200, ..FakeRoute::via(prefix.parse().unwrap(), ip(gateway), link) }
}

fn vxlan(name: &str, vni: u32, lower: u32) -> Link {
    Link {
        name: LinkName::new(name).unwrap(),
        kind: LinkKind::Vxlan(Vxlan {
            port: None,
            local: Some(ip("192.168.0.1")),
            lower: Some(LinkId::Other(lower)),
            ..Vxlan::new(Vni::new(vni).unwrap())
        }),
        mac: None,
        mtu: 1500,
        up: true,
        group: 0,
        alias: None,
    }
}

fn scope(kernel: &FakeKernel) -> Scope {
    let kind = vxlan("flannel.1", 1, kernel.link_index("eth0").unwrap_or(1)).kind;
    let devices = vec![Device { name: LinkName::new("flannel.1").unwrap(), kind }];
    let networks = Dual { v4: Some("10.5.0.0/16".parse().unwrap()), v6: Some("fd05::/48".parse().unwrap()) };
    Scope { devices, uplink: kernel.link_index("eth0"), ..Scope::new(OverlayName::default(), networks) }
}

/// Counts IPv4 routes, IPv6 routes, neighbours and entries on the overlay device, and routes through the underlay.
fn left(kernel: &FakeKernel) -> [usize; 5] {
    let snapshot = kernel.snapshot();
    let count = |start: &str| {
        let on_device = |line: &&&str| line.contains("dev flannel.1") || line.contains("dev renamed");
        snapshot.matching(start).iter().filter(on_device).count()
    };
    let v6 = count("route fd05");
    [count("route 10.5"), v6, count("neigh "), count("fdb "), snapshot.matching("route 10.9").len()]
}

fn errno<T>(outcome: Result<T, KernelError>) -> i32 {
    match outcome {
        Err(KernelError::Refused { errno, .. }) => errno,
        Err(other) => panic!("{other}"),
        Ok(_) => 0,
    }
}

#[test]
fn what_survives_which_act_is_what_kernel_facts_say() {
    let mac = MacAddr([2, 0, 0, 0, 0, 9]);
    type Act<'a> = &'a dyn Fn(&FakeKernel) -> Result<(), KernelError>;
    let acts: [(&str, Act<'_>, [usize; 5]); 14] = [
        ("vxlan down", &|k| k.link_down("flannel.1"), [0, 0, 0, 1, 1]),
        ("vxlan MAC", &|k| k.set_mac("flannel.1", mac), [1, 1, 0, 1, 1]),
        ("vxlan MTU", &|k| k.set_mtu("flannel.1", crate::net::Mtu(1300)), [1, 1, 1, 1, 1]),
        ("last v4 address", &|k| k.remove_address("flannel.1", "10.5.1.0/32".parse().unwrap()), [0, 1, 0, 1, 1]),
        ("underlay down", &|k| k.link_down("eth0").and_then(|()| k.link_up("eth0")), [1, 1, 1, 1, 0]),
        ("underlay address", &|k| k.remove_address("eth0", "192.168.0.1/24".parse().unwrap()), [1, 1, 1, 1, 0]),
        ("carrier", &|k| k.carrier_change("eth0"), [1, 1, 1, 1, 1]),
        ("underlay deleted", &|k| k.delete_link("eth0"), [0, 0, 0, 0, 0]),
        (
            "v4 flush",
            &|k| {
                k.flush_routes(Family::V4);
                Ok(())
            },
            [0, 1, 1, 1, 0],
        ),
        (
            "v6 flush",
            &|k| {
                k.flush_routes(Family::V6);
                Ok(())
            },
            [1, 0, 1, 1, 1],
        ),
        ("neigh flush", &|k| k.flush_neighbours("flannel.1"), [1, 1, 0, 1, 1]),
        ("arp off, on", &|k| k.arp_off_on("flannel.1"), [1, 1, 0, 1, 1]),
        ("fdb flush", &|k| k.flush_fdb("flannel.1"), [1, 1, 1, 0, 1]),
        ("rename", &|k| k.rename_link("flannel.1", "renamed"), [1, 1, 1, 1, 1]),
    ];
    for (name, act, expected) in acts {
        let (kernel, _) = kernel();
        act(&kernel).unwrap();
        assert_eq!(left(&kernel), expected, "{name}\n{}", kernel.snapshot());
    }
}

#[tokio::test]
async fn a_carrier_that_is_lost_is_a_fact_until_it_is_back_and_nothing_else_goes() {
    let (kernel, uplink) = kernel();
    let before = kernel.snapshot();
    let carrier = async || kernel.host_facts(&[]).await.unwrap().links[&uplink].carrier;
    assert!(carrier().await);
    kernel.carrier_lost("eth0").unwrap();
    assert!(!carrier().await);
    assert_eq!(kernel.snapshot(), before);
    kernel.carrier_back("eth0").unwrap();
    assert!(carrier().await);
    kernel.link_down("eth0").unwrap();
    assert!(!carrier().await);
}

#[test]
fn an_ipv6_onlink_gateway_behind_another_device_is_refused() {
    let (kernel, uplink) = kernel();
    for (theirs, ours, refused) in [
        ("fd05:0:0:3::/64", ("fd05:0:0:3::/64", "fd05:0:0:3::"), tables::EINVAL),
        ("fd05:0:0:8::/61", ("fd05:0:0:9::/64", "fd05:0:0:9::"), tables::EINVAL),
        ("10.5.3.0/24", ("10.5.3.0/24", "10.5.3.0"), 0),
    ] {
        let other = FakeRoute { metric: 7, ..FakeRoute::via(theirs.parse().unwrap(), ip("192.168.0.3"), uplink) };
        kernel.add_route(FakeRoute { gateway: None, ..other }, Placement::Exclusive).unwrap();
        let route = overlay_route(&kernel, ours.0, ours.1);
        assert_eq!(errno(kernel.add_route(route, Placement::Exclusive)), refused, "{theirs}");
    }
}

#[test]
fn the_kernel_refuses_with_its_own_numbers() {
    let (kernel, uplink) = kernel();
    let route = overlay_route(&kernel, "10.5.2.0/24", "10.5.2.0");
    assert_eq!(errno(kernel.add_route(route.clone(), Placement::Exclusive)), EEXIST);
    assert_eq!(errno(kernel.delete_route(&FakeRoute { protocol: 201, ..route.clone() })), tables::ESRCH);
    assert_eq!(errno(kernel.add_route(FakeRoute { link: Some(77), ..route.clone() }, Placement::Append)), ENODEV);
    let other = FakeRoute { prefix: "10.5.3.0/24".parse().unwrap(), ..route };
    assert_eq!(errno(kernel.add_route(other.clone(), Placement::Replace)), tables::ENOENT);
    assert_eq!(
        errno(kernel.add_route(FakeRoute { onlink: false, ..other.clone() }, Placement::Append)),
        tables::ENETUNREACH
    );
    assert_eq!(errno(kernel.add_link(vxlan("other", 1, uplink))), EEXIST);
    assert_eq!(errno(kernel.add_link(vxlan("flannel.1", 2, uplink))), EEXIST);
    assert_eq!(errno(kernel.add_address("flannel.1", "fd05::/64".parse().unwrap())), EEXIST);
    assert_eq!(errno(kernel.set_mtu("flannel.1", crate::net::Mtu(1500))), tables::EINVAL);
    kernel.link_down("flannel.1").unwrap();
    assert_eq!(errno(kernel.add_route(other, Placement::Exclusive)), tables::ENETDOWN);
}

#[test]
fn a_vxlan_device_is_clamped_to_its_lower_device_at_creation() {
    let (kernel, _) = kernel();
    assert_eq!(kernel.snapshot().matching("flannel.1 up mtu 1450").len(), 1, "{}", kernel.snapshot());
}

#[test]
fn prepended_routes_come_first_and_a_replace_hits_them() {
    let (kernel, uplink) = kernel();
    let theirs = FakeRoute::via("10.5.2.0/24".parse().unwrap(), ip("192.168.0.9"), uplink);
    kernel.add_route(theirs, Placement::Prepend).unwrap();
    kernel.add_route(overlay_route(&kernel, "10.5.2.0/24", "10.5.2.1"), Placement::Replace).unwrap();
    let snapshot = kernel.snapshot();
    let routes = snapshot.matching("route 10.5.2.0/24");
    assert!(routes[0].contains("via 10.5.2.1") && routes[1].contains("via 10.5.2.0") && routes.len() == 2);
}

#[test]
fn an_appended_ipv6_route_becomes_a_next_hop_of_ours() {
    let (kernel, _) = kernel();
    kernel.add_route(overlay_route(&kernel, "fd05:0:0:2::/64", "fd05:0:0:2::9"), Placement::Append).unwrap();
    let state = kernel.observe(&scope(&kernel)).now_or_never().unwrap().unwrap();
    let kinds: Vec<_> = state.routes_to("fd05:0:0:2::/64".parse().unwrap()).map(|(_, route)| route.kind).collect();
    assert_eq!(kinds, [RouteKind::Foreign]);
}

type Act<'a> = &'a dyn Fn() -> Result<(), KernelError>;

/// Same as the test `netlink_hints` of the real kernel.
#[test]
fn the_host_has_changed_for_any_link_but_the_cables_of_pods_and_for_near_routes() {
    let (kernel, uplink) = kernel();
    let mut hints = kernel.hints(&scope(&kernel));
    let link = |name: &str, kind: &str| Link { kind: LinkKind::Other(kind.into()), ..vxlan(name, 1, uplink) };
    let address = || "198.51.100.1/24".parse().unwrap();
    let via = |prefix: &str| FakeRoute::via(prefix.parse().unwrap(), ip("192.168.0.9"), uplink);
    let add = |route: FakeRoute| kernel.add_route(route, Placement::Exclusive);
    let acts: [(&str, Act<'_>, bool); 13] = [
        ("a bridge comes", &|| kernel.add_link(link("br0", "bridge")).map(drop), true),
        ("a bridge goes down", &|| kernel.link_down("br0"), true),
        ("a bridge gets another name", &|| kernel.rename_link("br0", "br1"), true),
        ("a bridge goes", &|| kernel.delete_link("br1"), true),
        ("a cable comes", &|| kernel.add_link(link("pod0", "veth")).map(drop), false),
        ("a cable goes down", &|| kernel.link_down("pod0"), false),
        ("a cable gets an address", &|| kernel.add_address("pod0", address()), true),
        ("a cable with an address comes up", &|| kernel.link_up("pod0"), true),
        ("a cable with an address goes", &|| kernel.delete_link("pod0"), true),
        ("a route far away", &|| add(via("203.0.113.0/24")), false),
        ("a route inside a connected prefix", &|| add(via("192.168.0.128/25")), true),
        ("a route without a gateway", &|| add(FakeRoute { gateway: None, ..via("203.0.114.0/24") }), true),
        ("a default route", &|| add(via("0.0.0.0/0")), true),
    ];
    for (what, act, due) in acts {
        act().unwrap();
        let expected = due.then_some(Some(Hint::FactsChanged));
        assert_eq!(hints.next().now_or_never(), expected, "{what}");
        assert_eq!(hints.next().now_or_never(), None, "{what}");
    }
}

/// Both kernels use [`Hint::of_address`].
#[test]
fn link_local_addresses_make_no_hints_and_deleted_ones_of_any_link_make_both() {
    let (kernel, _) = kernel();
    let mut hints = kernel.hints(&scope(&kernel));
    let mut heard = || std::iter::from_fn(|| hints.next().now_or_never().flatten()).collect::<Vec<_>>();
    let (local, global) = ("fe80::9/64".parse().unwrap(), "192.168.9.1/24".parse().unwrap());
    kernel.add_address("eth0", local).unwrap();
    kernel.remove_address("eth0", local).unwrap();
    assert_eq!(heard(), []);
    kernel.add_address("eth0", global).unwrap();
    assert_eq!(heard(), [Hint::FactsChanged]);
    kernel.remove_address("eth0", global).unwrap();
    let heard = heard();
    assert!(heard.contains(&Hint::FactsChanged) && heard.contains(&Hint::Changed), "{heard:?}");
}

#[test]
fn others_acts_make_hints_and_own_writes_none() {
    let (kernel, _) = kernel();
    let scope = scope(&kernel);
    let mut hints = kernel.hints(&scope);
    let seen = kernel.observe(&scope).now_or_never().unwrap().unwrap();
    let plan = crate::plan::plan(&State::default(), &seen, &scope, &|_| None);
    assert!(!plan.is_empty());
    kernel.apply(&scope, Arc::new(plan.ops.clone())).now_or_never().unwrap();
    assert_eq!(hints.next().now_or_never(), None);
    kernel.flush_neighbours("flannel.1").unwrap();
    assert_eq!(hints.next().now_or_never(), Some(Some(Hint::Changed)));
    assert_eq!(hints.next().now_or_never(), None);
    kernel.add_address("eth0", "192.168.9.1/24".parse().unwrap()).unwrap();
    assert_eq!(hints.next().now_or_never(), Some(Some(Hint::FactsChanged)));
    kernel.overrun_monitor();
    assert_eq!(hints.next().now_or_never(), Some(Some(Hint::Lost)));
    kernel.limit_monitor(1);
    kernel.link_down("flannel.1").unwrap();
    assert_eq!(hints.next().now_or_never(), Some(Some(Hint::Lost)));
}

#[test]
fn two_overlays_with_one_name_or_overlapping_networks_conflict_until_the_first_is_gone() {
    let (kernel, other) = (FakeKernel::new(), OverlayName::new("other").unwrap());
    let networks = |text: &str| Dual { v4: Some(text.parse().unwrap()), v6: None };
    let claim = |name: &OverlayName, text: &str| {
        kernel.claim(name, &networks(text), Residence::Present).now_or_never().unwrap()
    };
    let first = claim(&OverlayName::default(), "10.5.0.0/16").unwrap();
    assert!(matches!(claim(&OverlayName::default(), "10.6.0.0/16"), Err(KernelError::Conflict { .. })));
    assert!(matches!(claim(&other, "10.5.4.0/22"), Err(KernelError::Conflict { .. })));
    let second = claim(&other, "10.6.0.0/16").unwrap();
    let former =
        |text: &str| kernel.claim(&OverlayName::default(), &networks(text), Residence::Former).now_or_never().unwrap();
    assert!(matches!(former("10.6.0.0/16"), Err(KernelError::Conflict { .. })));
    let left = former("10.7.0.0/16").unwrap();
    drop(former("10.7.0.0/16").unwrap());
    assert!(matches!(claim(&OverlayName::new("third").unwrap(), "10.7.9.0/24"), Err(KernelError::Conflict { .. })));
    drop(left);
    drop(first);
    claim(&OverlayName::default(), "10.5.0.0/16").unwrap();
    drop(second);
}

#[test]
fn contact_lost_midway_leaves_what_came_before() {
    let (kernel, _) = kernel();
    let scope = scope(&kernel);
    let seen = kernel.observe(&scope).now_or_never().unwrap().unwrap();
    let link = &seen.links[&LinkId::Own(0)];
    let to = Link { group: 5, ..link.clone() };
    let update =
        Op::UpdateLink { id: LinkId::Own(0), part: LinkPart::Mark, from: Box::new(link.clone()), to: Box::new(to) };
    let plan = Plan {
        ops: vec![update, Op::DeleteLink { id: LinkId::Own(0), link: Box::new(link.clone()) }],
        conflicts: Vec::new(),
    };
    kernel.lose_contact_after(1);
    let report = kernel.apply(&scope, Arc::new(plan.ops.clone())).now_or_never().unwrap();
    assert!(report.lost.is_some() && report.applied == 1);
    assert_eq!(kernel.snapshot().matching("group 0x5").len(), 1);
    kernel.refuse_nth(0, 1);
    let report = kernel.apply(&scope, Arc::new(plan.ops.clone())).now_or_never().unwrap();
    assert_eq!((report.refused.len(), report.applied), (1, 1));
}
