//! What the real kernel costs, whatever happens. Alone in its process: it measures the process.
#![cfg(all(target_os = "linux", feature = "netlink"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod lab;

use std::net::{IpAddr, Ipv4Addr};
use std::sync::{Mutex, PoisonError};

use flannel_core::kernel::{Hint, Kernel, Residence};
use flannel_core::netlink::NetlinkKernel;
use futures_util::{FutureExt, StreamExt};
use lab::{Overlay, V4, in_lab, in_overlay, index_of, ip};
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{Socket, SocketAddr};

const FOREIGN: u32 = 500_000;
/// What an agent may take of a router's table while it reads it.
const MOST_BYTES: usize = 4 << 20;

/// One test at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// Requests for routes to single addresses by way of 192.0.2.9, as `ip route add` and `del` send them, in sends of as many
/// as a socket takes: half a million of them through `ip` would take a minute.
fn requests(verb: u16, dsts: impl Iterator<Item = Ipv4Addr>) -> Vec<Vec<u8>> {
    // include/uapi/linux/rtnetlink.h: header, `rtmsg` of IPv4 /32 in the main table by `boot`, `RTA_DST`, `RTA_GATEWAY`.
    let flags: u16 = if verb == RTM_NEWROUTE { 0x401 } else { 1 };
    let request = |dst: Ipv4Addr| {
        let head = [&44_u32.to_ne_bytes()[..], &verb.to_ne_bytes(), &flags.to_ne_bytes(), &[0; 8]].concat();
        let body = [2, 32, 0, 0, 254, 3, 0, 1, 0, 0, 0, 0];
        let attribute =
            |kind: u16, addr: Ipv4Addr| [&8_u16.to_ne_bytes()[..], &kind.to_ne_bytes(), &addr.octets()].concat();
        [head, body.to_vec(), attribute(1, dst), attribute(5, Ipv4Addr::new(192, 0, 2, 9))].concat()
    };
    let requests: Vec<_> = dsts.map(request).collect();
    requests.chunks(1000).map(<[_]>::concat).collect()
}

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;

fn send_all(socket: &Socket, sends: &[Vec<u8>]) {
    for send in sends {
        assert_eq!(socket.send(send, 0).unwrap(), send.len());
    }
}

/// A socket of somebody else's in this network namespace.
fn others_socket() -> Socket {
    let mut socket = Socket::new(NETLINK_ROUTE).unwrap();
    socket.bind_auto().unwrap();
    socket.connect(&SocketAddr::new(0, 0)).unwrap();
    socket
}

/// The `n`-th route of a router's table.
fn foreign(n: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x6440_0000 + n)
}

#[test]
fn a_routers_table_is_filtered_while_it_is_read() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    in_overlay(V4, 10, |lab, overlay| async move {
        send_all(&others_socket(), &requests(RTM_NEWROUTE, (0..FOREIGN).map(foreign)));
        // Without a gateway, and inside a connected prefix: both matter, wherever they stand in the table.
        ip("route add 203.0.113.0/24 dev up0");
        ip("route add 192.0.2.0/25 via 192.0.2.8");
        ip("route add 192.0.2.128/25 via 192.0.2.8");

        let before = reset_peak();
        let asked = IpAddr::V4(foreign(FOREIGN / 2));
        let facts = lab.kernel.host_facts(&[asked]).await.unwrap();
        lab.assert_converged(&overlay).await;
        let used = peak().saturating_sub(before);
        println!("{FOREIGN} routes of others: {} KiB", used / 1024);
        assert!(used < MOST_BYTES, "{} KiB", used / 1024);

        let up0 = Some(index_of("up0"));
        assert_eq!(facts.route_to(asked).map(|route| (route.prefix.addr(), route.prefix.len())), Some((asked, 32)));
        assert!(facts.far.to(foreign(1).into()).is_none(), "nobody asked for it");
        assert_eq!(facts.on_link("203.0.113.5".parse().unwrap()), up0);
        for inside in ["192.0.2.5", "192.0.2.200"] {
            assert_eq!(facts.on_link(inside.parse().unwrap()), None, "{inside}");
        }
        let hops: Vec<String> = facts.next_hops.iter().map(|hop| hop.addr.to_string()).collect();
        assert_eq!(hops, ["192.0.2.8", "192.0.2.9"]);
    });
}

#[test]
fn a_million_events_become_one_hint_and_take_no_memory() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    in_lab(|lab| async move {
        const ROUNDS: u32 = 100;
        let overlay = Overlay::vxlan(V4, 10);
        lab.converge(&overlay).await;
        let mut hints = lab.kernel.hints(&overlay.scope);
        let dsts = || (0..500_000 / ROUNDS).map(|n| Ipv4Addr::from(0x0a80_0000 + n));
        let storm = [requests(RTM_NEWROUTE, dsts()), requests(RTM_DELROUTE, dsts())].concat();
        let socket = others_socket();
        send_all(&socket, &storm);
        lab.kernel.host_facts(&[]).await.unwrap();
        while hints.next().now_or_never().is_some() {}
        let before = reset_peak();
        for _ in 0..ROUNDS {
            // Nobody polls.
            send_all(&socket, &storm);
        }
        for _ in 0..2 {
            lab.kernel.host_facts(&[]).await.unwrap();
        }
        let used = peak().saturating_sub(before);
        assert!(used < 1 << 20, "{} KiB", used / 1024);
        let heard = hints.next().now_or_never().flatten();
        assert!(matches!(heard, Some(Hint::Changed | Hint::Lost)), "{heard:?}");
        assert_eq!(hints.next().now_or_never(), None);
        lab.assert_converged(&overlay).await;
    });
}

#[test]
fn descriptors_do_not_add_up() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    in_overlay(V4, 1, |lab, overlay| async move {
        let open = || std::fs::read_dir("/proc/self/fd").expect("this test needs /proc").count();
        let _hints = lab.kernel.hints(&overlay.scope);
        lab.kernel.host_facts(&[]).await.unwrap();
        let before = open();
        for _ in 0..100 {
            let _listener = lab.kernel.hints(&overlay.scope);
            let other = NetlinkKernel::new().unwrap();
            let _others = other.hints(&overlay.scope);
            let claimed = other.claim(&overlay.scope.overlay, &overlay.scope.networks, Residence::Present).await;
            drop(claimed.unwrap());
            other.observe(&overlay.scope).await.unwrap();
            // Given up midway.
            let _ = lab.kernel.observe(&overlay.scope).now_or_never();
        }
        lab.converge(&overlay).await;
        assert!(open() <= before, "{} descriptors, {before} before", open());
    });
}

/// Makes the peak of resident memory what is resident now (proc(5), `clear_refs`), and says how much that is.
fn reset_peak() -> usize {
    std::fs::write("/proc/self/clear_refs", "5").expect("this test needs /proc/self/clear_refs");
    peak()
}

/// The peak of resident memory in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("this test needs /proc");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("VmHWM");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number of kB");
    kib * 1024
}
