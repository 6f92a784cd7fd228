//! Foreign objects in a kernel: similar to the overlay's, in the same places, and on other devices.

use flannel_core::kernel::{Link, LinkKind, LinkName, OverlayName, RouteKind, Vxlan};
use flannel_core::net::{Family, MacAddr, Prefix, Vni};
use flannel_core::testing::FakeKernel;
use flannel_core::testing::fake_kernel::{FakeRoute, Nud, Placement, Snapshot};

use crate::network::{address, device, subnet};

/// Subnets to which there are foreign routes as well.
const PEERS: [u8; 3] = [2, 3, 101];

/// Returns everything in a kernel except the overlay's devices and what is on them.
pub(crate) fn strange_lines(snapshot: &Snapshot) -> Vec<String> {
    let is_ours = |line: &String| Family::BOTH.into_iter().any(|family| names(line, device(family)));
    snapshot.lines().iter().filter(|line| !is_ours(line)).cloned().collect()
}

fn names(line: &str, device: &str) -> bool {
    line.split(' ').any(|word| word == device)
}

pub(crate) fn put_foreign(kernel: &FakeKernel, families: &[Family]) {
    let dummy = add_link(kernel, "dum0", LinkKind::Other("dummy".into()), 0, None);
    // Another overlay of flannelkit with the same mark, and one of Go flannel.
    let (mark, other) = (OverlayName::default().mark(), "flannelkit:other");
    let vx7 = add_link(kernel, "vx7", vxlan(7), mark, Some(other));
    let go = add_link(kernel, "flannel.9", vxlan(9), 0, None);
    kernel.add_address("flannel.9", "10.99.1.0/32".parse().unwrap()).unwrap();
    let elsewhere =
        FakeRoute { onlink: true, ..FakeRoute::via("10.99.2.0/24".parse().unwrap(), "10.99.2.0".parse().unwrap(), go) };
    kernel.add_route(elsewhere, Placement::Exclusive).unwrap();
    for name in ["vx7", "flannel.9"] {
        for n in [1, 2] {
            let mac = MacAddr([2, 0xaa, 0, 7, 0, n]);
            kernel.put_fdb(name, mac, address(Family::V4, n), Nud::Permanent).unwrap();
        }
    }
    for family in families {
        let (on, gateway, outside, inside): (_, _, _, [&str; 3]) = match family {
            Family::V4 => (
                "198.51.100.1/24",
                "198.51.100.7",
                "198.18.0.0/24",
                ["10.42.0.32/28", "10.42.0.64/28", "10.42.0.96/28"],
            ),
            Family::V6 => (
                "2001:db8:7::1/64",
                "2001:db8:7::7",
                "2001:db8:8::/64",
                ["fd00:42:0:0:1::/80", "fd00:42:0:0:2::/80", "fd00:42:0:0:3::/80"],
            ),
        };
        kernel.add_address("dum0", on.parse().unwrap()).unwrap();
        let to = |prefix: Prefix| FakeRoute::via(prefix, gateway.parse().unwrap(), dummy);
        let [first, second, third] = inside.map(|prefix| prefix.parse().unwrap());
        let blackhole = FakeRoute { kind: RouteKind::Blackhole, gateway: None, link: None, ..to(third) };
        // With the overlay's protocol, a route outside of the network is foreign; inside, one without the protocol is.
        let mut routes = vec![
            FakeRoute { protocol: 210, ..to(outside.parse().unwrap()) },
            FakeRoute { protocol: 4, ..to(first) },
            to(second),
            FakeRoute { protocol: 4, ..blackhole },
        ];
        for n in PEERS {
            let peer = subnet(*family, n);
            routes.push(FakeRoute { table: 100, metric: 7, protocol: 210, ..to(peer) });
            routes.push(FakeRoute { table: 101, onlink: true, ..FakeRoute::via(peer, peer.addr(), vx7) });
            if *family == Family::V4 {
                // With this route, the kernel would refuse the overlay's own route in IPv6.
                routes.push(FakeRoute { metric: 50, protocol: 210, ..to(peer) });
            }
            kernel.put_neighbour("dum0", peer.addr(), MacAddr([2, 0xaa, 0, 0, 1, n]), Nud::Permanent).unwrap();
        }
        for route in routes {
            kernel.add_route(route, Placement::Exclusive).unwrap();
        }
    }
}

fn vxlan(vni: u32) -> LinkKind {
    let vni = Vni::new(vni).unwrap();
    LinkKind::Vxlan(Vxlan::new(vni))
}

fn add_link(kernel: &FakeKernel, name: &str, kind: LinkKind, group: u32, alias: Option<&str>) -> u32 {
    let (name, alias) = (LinkName::new(name).unwrap(), alias.map(Into::into));
    let mac = Some(MacAddr([2, 0xaa, 0, 0, 0, name.as_str().len() as u8]));
    let mut link = Link::new(name, kind, 1450);
    (link.mac, link.group, link.alias) = (mac, group, alias);
    kernel.add_link(link).unwrap()
}
