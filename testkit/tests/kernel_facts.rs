//! What the code leans on in the kernel, so that a new kernel tells us. They are described in docs/kernel-facts.md.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use flannel_backend_udp::path::{OpenMode, Tun, TunError};
use flannel_core::net::{Dual, Family, MacAddr, Prefix};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::route::RouteMessage;
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use testkit::probe::{self, Flow};
use testkit::sabotage::{Act, Overlay, Plane};
use testkit::{Families, Fdb, Namespace, Neighbour, Node, Route, Underlay, VxlanLink, wait_until};

const PEERS: usize = 200;
const DEV: &str = "flannel.1";

fn lab(families: Families) -> Underlay {
    Underlay::new(2, families).expect("the lab needs root, or a user namespace: unshare -Urn cargo test -p testkit")
}

fn prefix(text: &str) -> Prefix {
    text.parse().unwrap()
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mac(nth: usize) -> MacAddr {
    MacAddr([0x02, 0, 0, 0, (nth >> 8) as u8, nth as u8])
}

fn subnet(nth: usize) -> Prefix {
    prefix(&format!("10.244.{nth}.0/24"))
}

/// A VXLAN device with its address, up.
fn device(node: &Node) {
    let ns = &node.ns;
    let vxlan = VxlanLink { vni: 1, local: node.v4().ok(), lower: Some("eth0".to_owned()), ..VxlanLink::default() };
    ns.add_vxlan(DEV, &vxlan, None).unwrap();
    ns.add_address(DEV, ip("10.244.0.0"), 32).unwrap();
    ns.set_up(DEV).unwrap();
}

/// Two nodes, of which the first has the device.
fn with_device(families: Families) -> Underlay {
    let underlay = lab(families);
    device(&underlay.nodes()[0]);
    underlay
}

/// The routes to a prefix.
fn routes_to(ns: &Namespace, to: Prefix) -> Vec<Route> {
    ns.routes(Family::of(to.addr())).unwrap().into_iter().filter(|route| route.to == to).collect()
}

fn overlay_route(nth: usize) -> Route {
    let to = subnet(nth);
    Route::to(to).via(to.addr()).dev(DEV).onlink().protocol(200 + (nth % 32) as u8)
}

/// As an agent programs 200 peers, and as many routes through the underlay.
fn program(node: &Node) {
    device(node);
    let ns = &node.ns;
    let (mut fdb, mut neighbours, mut routes) = (Vec::new(), Vec::new(), Vec::new());
    for nth in 1..=PEERS {
        fdb.push(Fdb::permanent(DEV, mac(nth), Ipv4Addr::from(0x0a59_0100 + nth as u32).into()));
        neighbours.push(Neighbour::permanent(DEV, subnet(nth).addr(), mac(nth)));
        routes.push(overlay_route(nth));
        let direct = Route::to(prefix(&format!("10.245.{nth}.0/24"))).protocol(200);
        routes.push(direct.via(Ipv4Addr::from(0x0a59_0100 + nth as u32).into()).dev("eth0"));
    }
    ns.put_fdb(&fdb).unwrap();
    ns.put_neighbours(&neighbours).unwrap();
    ns.add_routes(&routes).unwrap();
}

/// Overlay routes, permanent neighbours, FDB entries, routes through the underlay.
fn survivors(ns: &Namespace) -> [usize; 4] {
    let routes = ns.routes(Family::V4).unwrap();
    let to =
        |network: &str| routes.iter().filter(|route| prefix(network).covers(&route.to) && route.via.is_some()).count();
    let permanent = ns.neighbours().unwrap().iter().filter(|it| it.is_permanent()).count();
    let fdb = ns.fdb().unwrap().iter().filter(|it| it.dst.is_some()).count();
    [to("10.244.0.0/16"), permanent, fdb, to("10.245.0.0/16")]
}

#[test]
fn what_survives_which_act() {
    const ALL: usize = PEERS;
    let overlay =
        Overlay { devices: vec![DEV.to_owned()], networks: Dual { v4: Some(prefix("10.244.0.0/16")), v6: None } };
    for act in Act::all(Plane::Vxlan) {
        let expected = match act {
            Act::OverlayDownUp | Act::OverlayAddresses => [0, 0, ALL, ALL],
            Act::OverlayMac | Act::NeighboursFlushed | Act::ArpOffOn => [ALL, 0, ALL, ALL],
            Act::OverlayMtu
            | Act::OverlayRenamed
            | Act::OverlayUngrouped
            | Act::OverlayRegrouped
            | Act::OverlayAliasRemoved
            | Act::OverlayUnmarked
            | Act::UnderlayConnected
            | Act::UnderlayCarrier => [ALL, ALL, ALL, ALL],
            Act::UnderlayDownUp | Act::UnderlayAddresses | Act::UnderlayRenamed => [ALL, ALL, ALL, 0],
            Act::UnderlayDeleted | Act::Everything => [0, 0, 0, 0],
            Act::OverlayDeleted => [0, 0, 0, ALL],
            Act::RoutesFlushed => [0, ALL, ALL, 0],
            Act::FdbFlushed => [ALL, ALL, 0, ALL],
            Act::RouteDeleted => [ALL - 1, ALL, ALL, ALL],
            Act::NeighbourDeleted => [ALL, ALL - 1, ALL, ALL],
            Act::FdbDeleted => [ALL, ALL, ALL - 1, ALL],
            Act::SocketsDestroyed => [ALL; 4],
        };
        let underlay = lab(Families::V4);
        let [node, other] = underlay.nodes() else { panic!("two nodes") };
        program(node);
        assert_eq!(survivors(&node.ns), [ALL; 4], "before: {}", act.name());
        act.apply(node, &overlay).unwrap();
        // What the lines say of addresses and carrier is done by workers; nothing more may happen after it is true.
        probe::until_reply(&node.ns, other.v4().unwrap(), Duration::from_secs(5)).unwrap();
        assert_eq!(survivors(&node.ns), expected, "{}", act.name());
        act.restore(node).unwrap();
        probe::until_reply(&node.ns, ip("10.89.0.1"), Duration::from_secs(5)).unwrap();
    }
}

/// Go flannel's delete: protocol 0, scope 0, type 0 (docs/compatibility.md, "Messages").
fn go_delete(ns: &Namespace, nth: usize) -> Result<(), testkit::Error> {
    let to = subnet(nth);
    // Without a type, `ip route del` sends type 0.
    ns.ip(&format!("route del {to} via {} dev {DEV} onlink proto 0 scope 0", to.addr())).map(drop)
}

#[test]
fn go_flannel_replaces_and_deletes_a_route_of_any_protocol() {
    let underlay = with_device(Families::V4);
    let ns = &underlay.nodes()[0].ns;
    ns.add_route(&overlay_route(7)).unwrap();
    ns.replace_route(&overlay_route(7).protocol(Route::BOOT)).unwrap();
    let protocols = |nth| -> Vec<u8> { routes_to(ns, subnet(nth)).iter().map(|it| it.protocol).collect() };
    assert_eq!(protocols(7), [Route::BOOT]);

    ns.add_route(&overlay_route(8)).unwrap();
    go_delete(ns, 8).unwrap();
    assert!(protocols(8).is_empty());
}

/// A socket that hears of links, routes, neighbours and addresses.
struct Ear(Socket);

impl Ear {
    fn open(ns: &Namespace) -> Self {
        const LINK_NEIGH_V4ADDR_V4ROUTE_V6ADDR_V6ROUTE: u32 = 1 | 4 | 0x10 | 0x40 | 0x100 | 0x400;
        let opened = ns.run(|| {
            let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
            socket.bind(&SocketAddr::new(0, LINK_NEIGH_V4ADDR_V4ROUTE_V6ADDR_V6ROUTE)).unwrap();
            socket
        });
        Self(opened.unwrap())
    }

    /// What is heard until `last` is, and a little longer.
    fn until(&self, last: impl Fn(&RouteNetlinkMessage) -> bool) -> Vec<RouteNetlinkMessage> {
        let (mut heard, mut done) = (Vec::new(), false);
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(10) {
            let mut fds = [PollFd::new(self.0.as_fd(), PollFlags::POLLIN)];
            let wait = if done { 200_u16 } else { 1000 };
            if poll(&mut fds, PollTimeout::from(wait)).unwrap() == 0 {
                if done {
                    return heard;
                }
                continue;
            }
            let (bytes, _) = self.0.recv_from_full().unwrap();
            let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes).unwrap();
            if let NetlinkPayload::InnerMessage(message) = message.payload {
                done |= last(&message);
                heard.push(message);
            }
        }
        panic!("never heard: {heard:?}");
    }
}

fn deleted_routes(heard: &[RouteNetlinkMessage], family: Family) -> Vec<&RouteMessage> {
    let routes = heard.iter().filter_map(|message| match message {
        RouteNetlinkMessage::DelRoute(route) => Some(route),
        _ => None,
    });
    let family = match family {
        Family::V4 => AddressFamily::Inet,
        Family::V6 => AddressFamily::Inet6,
    };
    routes.filter(|route| route.header.table == 254 && route.header.address_family == family).collect()
}

#[test]
fn link_down_removes_ipv4_routes_silently_and_announces_ipv6_ones() {
    let underlay = with_device(Families::Dual);
    let ns = &underlay.nodes()[0].ns;
    ns.add_address(DEV, ip("fd00:244::"), 128).unwrap();
    ns.add_route(&overlay_route(1)).unwrap();
    let v6 = prefix("fd00:244:0:1::/64");
    ns.add_route(&Route::to(v6).via(v6.addr()).dev(DEV).onlink()).unwrap();
    ns.put_neighbours(&[Neighbour::permanent(DEV, subnet(1).addr(), mac(1))]).unwrap();
    ns.put_fdb(&[Fdb::permanent(DEV, mac(1), ip("10.89.1.1"))]).unwrap();
    let ear = Ear::open(ns);
    ns.set_down(DEV).unwrap();
    let heard = ear.until(|message| matches!(message, RouteNetlinkMessage::DelRoute(route) if route.header.destination_prefix_length == 64));
    assert!(deleted_routes(&heard, Family::V4).is_empty(), "{heard:?}");
    assert!(heard.iter().any(|message| matches!(message, RouteNetlinkMessage::NewLink(_))));
    let addresses = ns.addresses().unwrap();
    let on_device = |family| addresses.iter().any(|it| it.dev == DEV && Family::of(it.addr) == family);
    assert!(on_device(Family::V4) && !on_device(Family::V6));
    assert_eq!(survivors(ns), [0, 0, 1, 0]);
}

#[test]
fn losing_the_uplinks_address_removes_its_routes_silently() {
    let underlay = lab(Families::V4);
    let ns = &underlay.nodes()[0].ns;
    ns.add_route(&Route::to(prefix("10.245.1.0/24")).via(ip("10.89.1.1")).dev("eth0")).unwrap();
    let ear = Ear::open(ns);
    ns.delete_address("eth0", underlay.nodes()[0].v4().unwrap(), 16).unwrap();
    let heard = ear.until(|message| matches!(message, RouteNetlinkMessage::DelAddress(_)));
    let pods = deleted_routes(&heard, Family::V4).into_iter().filter(|it| it.header.destination_prefix_length == 24);
    assert_eq!(pods.count(), 0, "{heard:?}");
    assert_eq!(survivors(ns)[3], 0);
}

#[test]
fn a_route_goes_with_its_source_or_loses_it() {
    let underlay = lab(Families::Dual);
    let ns = &underlay.nodes()[0].ns;
    for (to, via, source, len) in [
        ("10.245.1.0/24", "10.89.1.1", "10.245.9.1", 32),
        ("fd00:245:0:1::/64", "fd00:89::1:1", "fd00:245:0:9::1", 128),
    ] {
        let (to, source) = (prefix(to), ip(source));
        let routes = [254, 100].map(|table| Route::to(to).via(ip(via)).dev("eth0").source(source).table(table));
        let refused = ns.add_route(&routes[0]).unwrap_err();
        assert!(refused.is(Errno::EINVAL), "{refused:?}");
        ns.add_address("eth0", source, len).unwrap();
        routes.iter().for_each(|route| ns.add_route(route).unwrap());
        let ear = Ear::open(ns);
        ns.delete_address("eth0", source, len).unwrap();
        let heard = ear.until(|message| matches!(message, RouteNetlinkMessage::DelAddress(_)));
        let told = deleted_routes(&heard, to.family()).into_iter();
        let told = told.filter(|route| route.header.destination_prefix_length == to.len()).count();
        assert_eq!(told, usize::from(to.family() == Family::V4), "{heard:?}");
        let found = ns.routes(to.family()).unwrap().into_iter().filter(|route| route.to == to);
        let mut left: Vec<_> = found.map(|route| (route.table, route.source)).collect();
        left.sort_unstable();
        match to.family() {
            Family::V4 => assert_eq!(left, [(100, Some(source))]),
            Family::V6 => assert_eq!(left, [(100, None), (254, None)]),
        }
    }
}

#[test]
fn a_replace_takes_over_a_foreign_route_and_an_exclusive_create_does_not() {
    let underlay = lab(Families::V4);
    let ns = &underlay.nodes()[0].ns;
    let to = prefix("10.245.1.0/24");
    let foreign = Route::to(to).via(ip("10.89.1.1")).dev("eth0").protocol(Route::STATIC);
    ns.add_route(&foreign).unwrap();
    let ours = Route::to(to).via(ip("10.89.1.2")).dev("eth0").protocol(213);
    assert!(ns.add_route(&ours).unwrap_err().is(Errno::EEXIST));
    assert!(ns.delete_route(&foreign.clone().protocol(213)).unwrap_err().is(Errno::ESRCH));
    ns.replace_route(&ours).unwrap();
    assert_eq!(routes_to(ns, to), [ours]);
}

#[test]
fn ipv6_metric_reads_back_as_1024_and_fdb_entries_drop_their_protocol() {
    let underlay = with_device(Families::Dual);
    let ns = &underlay.nodes()[0].ns;
    let to = prefix("fd00:245:0:1::/64");
    ns.add_route(&Route::to(to).via(ip("fd00:89::ff")).dev("eth0")).unwrap();
    assert_eq!(routes_to(ns, to)[0].metric, 1024);
    ns.put_neighbours(&[Neighbour { protocol: 213, ..Neighbour::permanent(DEV, ip("10.244.1.0"), mac(1)) }]).unwrap();
    assert_eq!(ns.neighbours().unwrap().iter().find(|it| it.dev == DEV).unwrap().protocol, 213);
    ns.put_fdb(&[Fdb::permanent(DEV, mac(1), ip("10.89.1.1"))]).unwrap();
    assert_eq!(ns.fdb().unwrap().iter().find(|it| it.dev == DEV).unwrap().dst, Some(ip("10.89.1.1")));
}

#[test]
fn a_strict_fdb_dump_filters_by_interface() {
    use rtnetlink::packet_route::neighbour::NeighbourMessage;

    let underlay = with_device(Families::V4);
    let ns = &underlay.nodes()[0].ns;
    ns.add_vxlan("other", &VxlanLink { vni: 2, port: Some(4789), ..VxlanLink::default() }, None).unwrap();
    ns.put_fdb(&[Fdb::permanent(DEV, mac(1), ip("10.89.1.1")), Fdb::permanent("other", mac(2), ip("10.89.1.2"))])
        .unwrap();
    let index = ns.index_of(DEV).unwrap();
    let dump = |strict: bool| -> Vec<u32> {
        let opened = ns.run(|| {
            let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
            socket.bind_auto().unwrap();
            if strict {
                socket.set_netlink_get_strict_chk(true).unwrap();
            }
            socket
        });
        let socket = opened.unwrap();
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index;
        let mut request = NetlinkMessage::from(RouteNetlinkMessage::GetNeighbour(message));
        request.header.flags = 0x301;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        socket.send_to(&bytes, &SocketAddr::new(0, 0), 0).unwrap();
        let mut seen = Vec::new();
        loop {
            let (bytes, _) = socket.recv_from_full().unwrap();
            let mut rest = &bytes[..];
            while !rest.is_empty() {
                let message = NetlinkMessage::<RouteNetlinkMessage>::deserialize(rest).unwrap();
                match message.payload {
                    NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewNeighbour(entry)) => {
                        seen.push(entry.header.ifindex);
                    }
                    NetlinkPayload::Done(_) => return seen,
                    other => panic!("{other:?}"),
                }
                rest = &rest[(message.header.length as usize).next_multiple_of(4).min(rest.len())..];
            }
        }
    };
    let strict = dump(true);
    assert!(!strict.is_empty() && strict.iter().all(|it| *it == index), "{strict:?}");
    assert!(dump(false).iter().any(|it| *it != index));
}

#[test]
fn a_vxlan_mtu_is_clamped_at_creation_only() {
    for (families, family, overhead) in [(Families::V4, Family::V4, 50), (Families::V6, Family::V6, 70)] {
        let underlay = lab(families);
        let node = &underlay.nodes()[0];
        let ns = &node.ns;
        let vxlan =
            VxlanLink { vni: 1, local: node.addr(family).ok(), lower: Some("eth0".to_owned()), ..VxlanLink::default() };
        ns.add_vxlan(DEV, &vxlan, Some(1500)).unwrap();
        assert_eq!(ns.link(DEV).unwrap().mtu, 1500 - overhead);
        ns.set_mtu("eth0", 1400).unwrap();
        assert_eq!(ns.link(DEV).unwrap().mtu, 1500 - overhead);
    }
}

#[test]
fn a_second_vxlan_of_this_vni_port_and_family_is_eexist() {
    let underlay = lab(Families::V4);
    let node = &underlay.nodes()[0];
    device(node);
    let same = VxlanLink { vni: 1, local: node.v4().ok(), ..VxlanLink::default() };
    let refused = node.ns.add_vxlan("other", &same, None).unwrap_err();
    assert!(refused.is(Errno::EEXIST), "{refused:?}");
    node.ns.add_vxlan("other", &VxlanLink { port: Some(4789), ..same }, None).unwrap();
}

#[test]
fn what_is_not_permanent_counts_as_absent() {
    let underlay = with_device(Families::V4);
    let ns = &underlay.nodes()[0].ns;
    let hop = Neighbour::permanent(DEV, subnet(1).addr(), mac(1));
    ns.put_neighbours(std::slice::from_ref(&hop)).unwrap();
    ns.put_fdb(&[Fdb::permanent(DEV, mac(1), ip("10.89.1.1"))]).unwrap();
    ns.add_route(&overlay_route(1)).unwrap();
    // With the entry gone, traffic asks for the address and leaves an entry that is not permanent.
    ns.delete_neighbour(&hop).unwrap();
    assert!(probe::ping(ns, ip("10.244.1.2"), Duration::from_millis(50)).is_err());
    let left = ns.neighbours().unwrap().into_iter().find(|it| it.dev == DEV).unwrap();
    assert!(["incomplete", "failed"].contains(&left.state.as_str()), "{left:?}");
    assert!(ns.ip(&format!("neigh add {hop}")).unwrap_err().is(Errno::EEXIST));
    ns.put_neighbours(&[hop]).unwrap();
    assert_eq!(survivors(ns), [1, 1, 1, 0]);
    // Deleting the forwarding entry leaves route and neighbour; its event is that of a neighbour.
    let ear = Ear::open(ns);
    ns.delete_fdb(&Fdb::permanent(DEV, mac(1), ip("10.89.1.1"))).unwrap();
    ear.until(
        |message| matches!(message, RouteNetlinkMessage::DelNeighbour(it) if it.header.family == AddressFamily::Bridge),
    );
    assert_eq!(survivors(ns), [1, 1, 0, 0]);
}

#[test]
fn replace_ignores_protocol_kind_and_owner_and_loses_nothing() {
    let underlay = lab(Families::V4);
    let [one, two] = underlay.nodes() else { panic!("two nodes") };
    let (to, target) = (prefix("10.245.1.0/24"), ip("10.245.1.1"));
    two.ns.add_address("eth0", target, 32).unwrap();
    let direct = Route::to(to).via(two.v4().unwrap()).dev("eth0").protocol(213);
    let form = direct.clone().onlink().protocol(Route::BOOT);
    one.ns.add_route(&direct).unwrap();
    probe::until_reply(&one.ns, target, Duration::from_secs(5)).unwrap();
    let flow = Flow::start(&one.ns, &two.ns, target, 2000).unwrap();
    // Swapped as an upgrade does it, in the middle of traffic. Replacing as fast as the socket takes it, ten thousands
    // of times a second, loses about one datagram of a thousand in every third run.
    for swap in 1..=20 {
        wait_until("fifty more datagrams", Duration::from_secs(10), || Ok(flow.sent() >= swap * 50)).unwrap();
        one.ns.replace_route(if swap % 2 == 0 { &direct } else { &form }).unwrap();
    }
    let report = flow.stop().unwrap();
    assert_eq!((report.lost, report.refused), (0, 0), "{report:?}");
    let wrong = [direct.clone().protocol(214), direct.clone().via(ip("10.89.9.9"))];
    assert!(wrong.iter().all(|route| one.ns.delete_route(route).unwrap_err().is(Errno::ESRCH)));
    one.ns.replace_route(&Route::to(to).kind("blackhole").protocol(Route::BOOT)).unwrap();
    let kinds: Vec<String> = routes_to(&one.ns, to).into_iter().map(|it| it.kind).collect();
    assert_eq!(kinds, ["blackhole"]);
}

#[test]
fn creating_a_link_takes_the_group_and_ignores_the_alias() {
    let ns = Namespace::new("group").expect("root, or unshare -Urn");
    let group = 0x666b_0001;
    ns.ip(&format!("link add dev {DEV} group {group} alias flannelkit:flannel type vxlan id 1 dstport 8472")).unwrap();
    let link = ns.link(DEV).unwrap();
    assert_eq!((link.group, link.alias), (group, None));
}

#[test]
fn a_route_key_is_not_unique() {
    let underlay = lab(Families::Dual);
    let ns = &underlay.nodes()[0].ns;
    let to = prefix("10.245.1.0/24");
    let route = |protocol, last: u8| Route::to(to).via(ip(&format!("10.89.1.{last}"))).dev("eth0").protocol(protocol);
    ns.add_route(&route(213, 1)).unwrap();
    ns.put_route("prepend", &route(Route::STATIC, 2)).unwrap();
    ns.replace_route(&route(213, 3)).unwrap();
    assert_eq!(routes_to(ns, to), [route(213, 3), route(213, 1)]);

    let to = prefix("fd00:245:0:1::/64");
    let route =
        |protocol, last: u8| Route::to(to).via(ip(&format!("fd00:89::1:{last}"))).dev("eth0").protocol(protocol);
    ns.add_route(&route(213, 1)).unwrap();
    ns.put_route("append", &route(Route::STATIC, 2)).unwrap();
    let both = routes_to(ns, to);
    assert_eq!(both.iter().map(|it| it.hops.len()).collect::<Vec<_>>(), [2], "{both:?}");
    ns.replace_route(&route(213, 3)).unwrap();
    let one = routes_to(ns, to);
    assert_eq!(one.iter().map(|it| it.via).collect::<Vec<_>>(), [Some(ip("fd00:89::1:3"))], "{one:?}");
}

#[test]
fn an_ipv6_onlink_gateway_behind_another_device_is_refused() {
    let underlay = lab(Families::Dual);
    let ns = &underlay.nodes()[0].ns;
    ns.add_veth("other0", ns, "other1").unwrap();
    ns.set_up("other0").unwrap();
    ns.set_up("other1").unwrap();
    for (to, wide, refused) in [("fd00:245:0:1::/64", "fd00:245::/48", true), ("10.245.1.0/24", "10.245.0.0/16", false)]
    {
        let (to, wide) = (prefix(to), prefix(wide));
        let ours = Route::to(to).via(to.addr()).dev("other0").onlink().protocol(213);
        for theirs in [Route::to(wide).dev("eth0").metric(7), Route::to(to).dev("eth0")] {
            // What is there stays.
            ns.add_route(&ours).unwrap();
            if theirs.to == wide {
                ns.add_route(&theirs).unwrap();
                ns.delete_route(&ours).unwrap();
            } else {
                ns.replace_route(&theirs).unwrap();
            }
            let written = ns.replace_route(&ours);
            assert_eq!(written.as_ref().is_err_and(|error| error.is(Errno::EINVAL)), refused, "{theirs}: {written:?}");
            for route in [&ours, &theirs] {
                // Whichever of the two is left.
                let _ = ns.delete_route(route);
            }
        }
    }
}

#[test]
fn the_scope_of_a_route_with_a_gateway_matters_to_a_delete_alone() {
    let underlay = lab(Families::V4);
    let [one, two] = underlay.nodes() else { panic!("two nodes") };
    let ns = &one.ns;
    device(one);
    let found = |to| -> Vec<(u8, u8)> { routes_to(ns, to).iter().map(|it| (it.protocol, it.scope)).collect() };

    // Traffic takes it, from the usual source address, and so it does where the next hop has to be looked up.
    let target = ip("10.245.1.1");
    two.ns.add_address("eth0", target, 32).unwrap();
    let direct = Route::to(prefix("10.245.1.0/24")).via(two.v4().unwrap()).dev("eth0").protocol(213);
    for scope in [0, 1, 63, 252] {
        ns.replace_route(&direct.clone().scope(scope)).unwrap();
        assert_eq!(found(direct.to), [(213, scope)]);
        probe::until_reply(ns, target, Duration::from_secs(5)).unwrap();
    }
    let link = direct.scope(Route::LINK);
    let refused = ns.replace_route(&link).unwrap_err();
    assert!(refused.is(Errno::ENETUNREACH), "a gateway has to be nearer than what it leads to: {refused:?}");

    // A create asks for no scope, nor does a replace, so that Go flannel takes such a route over.
    ns.add_route(&overlay_route(7).scope(17)).unwrap();
    assert!(ns.add_route(&overlay_route(7).scope(18)).unwrap_err().is(Errno::EEXIST));
    assert!(go_delete(ns, 7).unwrap_err().is(Errno::ESRCH), "a delete of scope 0 is one of another route");
    ns.replace_route(&overlay_route(7).protocol(Route::BOOT)).unwrap();
    assert_eq!(found(subnet(7)), [(Route::BOOT, 0)]);
    ns.replace_route(&overlay_route(7).scope(17)).unwrap();
    assert_eq!(found(subnet(7)), [(overlay_route(7).protocol, 17)]);
    // A delete of scope "nowhere" is one of any.
    ns.delete_route(&overlay_route(7)).unwrap();
    assert_eq!(found(subnet(7)), []);
}

#[test]
fn a_persistent_tun_device_outlives_its_process_and_drops_packets() {
    let underlay = lab(Families::V4);
    let ns = &underlay.nodes()[0].ns;
    let network = prefix("10.244.0.0/16");
    let open = |mode, queues| ns.run(|| Tun::open("flannel0", mode, queues)).unwrap();
    // A child that another test forks holds all descriptors of this process until it executes its program, so a device can
    // outlive its last owner for a moment.
    let wait = |what: &str, condition: &dyn Fn() -> bool| {
        wait_until(what, Duration::from_secs(10), || Ok(condition())).unwrap();
    };
    // One that is not persistent goes with its process.
    drop(open(OpenMode::Create, 1).unwrap());
    wait("the device is gone", &|| ns.link("flannel0").is_err());
    for queues in [1, 2] {
        let tun = open(OpenMode::Create, queues).unwrap();
        tun.keep().unwrap();
        ns.set_link("flannel0", "group 7").unwrap();
        ns.set_alias("flannel0", "theirs").unwrap();
        ns.add_address("flannel0", ip("10.244.1.0"), 32).unwrap();
        ns.set_up("flannel0").unwrap();
        ns.add_route(&Route::to(network).dev("flannel0").protocol(200)).unwrap();
        let index = ns.index_of("flannel0").unwrap();
        drop(tun);
        wait("without a carrier", &|| !ns.link("flannel0").unwrap().has_carrier());
        let link = ns.link("flannel0").unwrap();
        assert_eq!((link.group, link.alias.as_deref(), link.is_up()), (7, Some("theirs"), true));
        assert_eq!((ns.index_of("flannel0").unwrap(), routes_to(ns, network).len()), (index, 1));
        assert!(ns.addresses().unwrap().iter().any(|it| it.dev == "flannel0" && it.addr == ip("10.244.1.0")));
        let way = ns.ip("-o route get 10.244.9.9").unwrap();
        assert!(way.contains("dev flannel0"), "no other way is taken: {way}");
        // Only who asks for the same kind of queue can open it.
        let other = open(OpenMode::Attach, 3 - queues).unwrap_err();
        assert!(matches!(other, TunError::Mismatch { .. }), "{other:?}");
        drop(open(OpenMode::Attach, queues).unwrap());
        ns.delete_link("flannel0").unwrap();
    }
}

#[test]
fn routes_are_told_apart_by_their_metric_and_not_by_their_device() {
    let underlay = lab(Families::V4);
    let ns = &underlay.nodes()[0].ns;
    let network = prefix("10.244.0.0/16");
    let tuns = ["flannel0", "flannel1"].map(|name| ns.run(|| Tun::open(name, OpenMode::Create, 1)).unwrap().unwrap());
    for tun in &tuns {
        ns.set_up(tun.name()).unwrap();
    }
    ns.add_route(&Route::to(network).dev("flannel0").protocol(200)).unwrap();
    let go = Route::to(network).dev("flannel1").protocol(Route::BOOT);
    assert!(ns.add_route(&go).unwrap_err().is(Errno::EEXIST));
    ns.delete_route(&Route::to(network).dev("flannel0").protocol(200)).unwrap();
    ns.add_route(&Route::to(network).dev("flannel0").protocol(200).metric(8285)).unwrap();
    ns.add_route(&go).unwrap();
    let way = ns.ip("-o route get 10.244.9.9").unwrap();
    assert!(way.contains("dev flannel1"), "the least metric is taken: {way}");
}
