//! What other programs do to a host before and between plans.

use super::*;

/// An action of another program.
#[derive(Debug, Clone)]
pub(super) enum Act {
    Down(u8),
    Bounce(u8),
    Mac(u8),
    Mtu(u8),
    Remote(u8),
    RemoveAddress(u8),
    OtherAddress(u8, u8),
    Rename(u8),
    SwapNames,
    Delete(u8),
    Unmark(u8),
    LoseGroup(u8),
    MarkAsOther(u8),
    FlushRoutes(bool),
    FlushNeighbours(u8),
    FlushFdb(u8),
    Learnt(u8, u8),
    StaleNeighbour(u8, u8),
    StaleFdb(u8, u8),
    /// Peer, family v6, protocol, gateway, through which link, on-link, placement.
    Route(u8, bool, u8, u8, u8, bool, RouteSlot, Placement),
    StrangerNamed(u8),
    StrangerWithVni(u32),
    GoDevice(u32),
    /// The pods' bridge is created or deleted.
    Bridge,
}

pub(super) fn act() -> impl Strategy<Value = Act> {
    let placement = prop_oneof![
        2 => Just(Placement::Exclusive),
        1 => Just(Placement::Replace),
        1 => Just(Placement::Append),
        1 => Just(Placement::Prepend)
    ];
    let protocol = prop_oneof![Just(4u8), Just(Route::BOOT), Just(210u8), Just(99u8)];
    let slot = prop_oneof![3 => Just(RouteSlot::MAIN), 1 => Just(SLOTS[0]), 1 => Just(SLOTS[1])];
    let route = (0..PEERS, any::<bool>(), protocol, 0..3u8, 0..3u8, any::<bool>(), slot, placement).prop_map(
        |(peer, v6, protocol, gateway, link, onlink, slot, placement)| {
            Act::Route(peer, v6, protocol, gateway, link, onlink, slot, placement)
        },
    );
    let other = prop_oneof![
        (0..2u8).prop_map(Act::Down),
        (0..2u8).prop_map(Act::Bounce),
        (0..2u8).prop_map(Act::Mac),
        (0..2u8).prop_map(Act::Mtu),
        (0..2u8).prop_map(Act::Remote),
        (0..2u8).prop_map(Act::RemoveAddress),
        (0..2u8, 0..3u8).prop_map(|(device, n)| Act::OtherAddress(device, n)),
        (0..2u8).prop_map(Act::Rename),
        Just(Act::SwapNames),
        (0..2u8).prop_map(Act::Delete),
        (0..2u8).prop_map(Act::Unmark),
        (0..2u8).prop_map(Act::MarkAsOther),
        any::<bool>().prop_map(Act::FlushRoutes),
        (0..2u8).prop_map(Act::FlushNeighbours),
        (0..2u8).prop_map(Act::FlushFdb),
        (0..2u8, 0..PEERS).prop_map(|(device, n)| Act::Learnt(device, n)),
        (0..2u8, 0..PEERS).prop_map(|(device, n)| Act::StaleNeighbour(device, n)),
        (0..2u8, 0..PEERS).prop_map(|(device, n)| Act::StaleFdb(device, n)),
        (0..2u8).prop_map(Act::StrangerNamed),
        (1..3u32).prop_map(Act::StrangerWithVni),
        (1..3u32).prop_map(Act::GoDevice),
        Just(Act::Bridge),
        (0..2u8).prop_map(Act::LoseGroup),
    ];
    prop_oneof![2 => other, 1 => route]
}

pub(super) fn text(address: &str) -> Address {
    address.parse().unwrap()
}

/// Performs the action, as far as the kernel allows it.
pub(super) fn commit(kernel: &FakeKernel, act: &Act) {
    let name = |device: &u8| NAMES[usize::from(*device)];
    let family = |v6: bool| if v6 { Family::V6 } else { Family::V4 };
    let vxlan = |name: &str, vni: u32, lower: Option<u32>| Link {
        name: LinkName::new(name).unwrap(),
        kind: LinkKind::Vxlan(Vxlan {
            port: None,
            local: Some(public(1)),
            lower: lower.map(LinkId::Other),
            ..Vxlan::new(Vni::new(vni).unwrap())
        }),
        mac: None,
        mtu: 1450,
        up: true,
        group: 0,
        alias: None,
    };
    let _ = match act {
        Act::Down(device) => kernel.link_down(name(device)),
        Act::Bounce(device) => kernel.link_down(name(device)).and_then(|()| kernel.link_up(name(device))),
        Act::Mac(device) => kernel.set_mac(name(device), MacAddr([2, 9, 9, 9, 9, 9])),
        Act::Mtu(device) => kernel.set_mtu(name(device), Mtu(1280)),
        Act::Remote(device) => kernel.set_remote(name(device), Some(public(9))),
        Act::RemoveAddress(0) => kernel.remove_address(NAMES[0], text("10.5.101.0/32")),
        Act::RemoveAddress(_) => kernel.remove_address(NAMES[1], text("fd05:0:0:65::/128")),
        Act::OtherAddress(0, n) => {
            kernel.add_address(NAMES[0], text(["10.5.101.0/24", "10.5.150.0/32", "169.254.1.1/16"][usize::from(*n)]))
        }
        Act::OtherAddress(_, n) => {
            let taken = text("fd05:0:0:65::/128");
            let _ = if *n == 0 { kernel.remove_address(NAMES[1], taken) } else { Ok(()) };
            kernel.add_address(NAMES[1], text(["fd05:0:0:65::/64", "fd05:0:0:99::/128", "fe80::9/64"][usize::from(*n)]))
        }
        Act::Rename(device) => kernel.rename_link(name(device), ["old0", "old1"][usize::from(*device)]),
        Act::SwapNames => kernel
            .rename_link(NAMES[0], "swap0")
            .and_then(|()| kernel.rename_link(NAMES[1], NAMES[0]))
            .and_then(|()| kernel.rename_link("swap0", NAMES[1])),
        Act::Delete(device) => kernel.delete_link(name(device)),
        Act::Unmark(device) => kernel.mark_link(name(device), 0, None),
        // A foreign device does not get the overlay's alias this way.
        Act::LoseGroup(device) if kernel.snapshot().matching(&format!(": {} ", name(device))).iter().all(has_mark) => {
            kernel.mark_link(name(device), 0, Some(&OverlayName::default().alias()))
        }
        Act::LoseGroup(_) => Ok(()),
        Act::MarkAsOther(device) => {
            kernel.mark_link(name(device), OverlayName::default().mark(), Some("flannelkit:other"))
        }
        Act::FlushRoutes(v6) => {
            // The connected routes return with the addresses; here they are needed at once.
            kernel.flush_routes(family(*v6));
            let _ = kernel.link_down("wg0");
            let _ = kernel.link_up("wg0");
            kernel
                .link_down("eth0")
                .and_then(|()| kernel.link_up("eth0"))
                .and_then(|()| kernel.add_address("eth0", text("fd99::1/64")))
        }
        Act::FlushNeighbours(device) => kernel.flush_neighbours(name(device)),
        Act::FlushFdb(device) => kernel.flush_fdb(name(device)),
        Act::Learnt(device, n) => {
            let addr = subnet(family(*device == 1), *n).addr();
            kernel.put_neighbour(name(device), addr, MacAddr([2, 7, 7, 7, 7, 7]), Nud::Learnt)
        }
        Act::StaleNeighbour(device, n) => {
            let addr = subnet(family(*device == 1), *n).addr();
            kernel.put_neighbour(name(device), addr, MacAddr([2, 0, 0, 0, *n, 1]), Nud::Permanent)
        }
        Act::StaleFdb(device, n) => {
            let _ = kernel.append_fdb(name(device), MacAddr([0; 6]), public(70));
            let _ = kernel.append_fdb(name(device), MacAddr([0; 6]), public(71));
            kernel.put_fdb(name(device), MacAddr([2, 0, 0, 0, *n, 0]), public(77), Nud::Permanent)
        }
        Act::Route(peer, v6, protocol, gateway, link, onlink, slot, placement) => {
            let prefix = subnet(family(*v6), *peer);
            let gateway = match (v6, gateway) {
                (_, 0) => prefix.addr(),
                (false, n) => public(10 + peer * 2 + n - 1),
                (true, n) => public_v6(10 + peer * 2 + n - 1),
            };
            let name = ["eth0", "wg0", NAMES[usize::from(*v6)]][usize::from(*link)];
            let Some(link) = kernel.link_index(name) else { return };
            if *v6 && *slot == SLOTS[1] && *protocol != 210 {
                // A foreign route there may keep the overlay's route out. It is not checked here: the kernel's error
                // reports it.
                return;
            }
            let RouteSlot { table, metric } = *slot;
            let via = FakeRoute::via(prefix, gateway, link);
            let route = FakeRoute { onlink: *onlink, protocol: *protocol, table, metric, ..via };
            kernel.add_route(route, *placement)
        }
        Act::StrangerNamed(device) => {
            kernel.add_link(Link { kind: LinkKind::Other("veth".into()), ..vxlan(name(device), 900, None) }).map(drop)
        }
        Act::StrangerWithVni(vni) => kernel.add_link(vxlan("theirs", *vni, None)).map(drop),
        Act::Bridge if kernel.link_index("cni0").is_some() => kernel.delete_link("cni0"),
        Act::Bridge => kernel
            .add_link(Link { kind: LinkKind::Other("bridge".into()), ..vxlan("cni0", 900, None) })
            .and_then(|_| kernel.add_address("cni0", text("10.5.101.1/24"))),
        Act::GoDevice(vni) => kernel.add_link(vxlan(NAMES[0], *vni, kernel.link_index("eth0"))).map(drop),
    };
}
