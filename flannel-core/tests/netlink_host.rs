//! Facts, claims and namespaces of the real kernel.
#![cfg(all(target_os = "linux", feature = "netlink"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod lab;

use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::AsFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};

use flannel_core::kernel::{HostFacts, HostRoute, Kernel, KernelError, LinkId, LinkKind, OverlayName, Residence};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::testing::samples::dual;
use futures_util::StreamExt;
use lab::{DUAL, Overlay, PATIENCE, V4, in_lab, in_overlay, index_of, ip};
use testkit::Namespace;

fn name(text: &str) -> OverlayName {
    OverlayName::new(text).unwrap()
}

#[test]
fn many_who_ask_the_kernel_at_once_wait_their_turn_and_are_all_answered() {
    in_lab(|lab| async move {
        // More than there are places in the queue of the thread.
        let asked = (0..200).map(|_| lab.kernel.host_facts(&[]));
        let answers = futures_util::future::join_all(asked).await;
        let links: Vec<usize> = answers.into_iter().map(|facts| facts.unwrap().links.len()).collect();
        assert!(links[0] > 0 && links.iter().all(|count| *count == links[0]), "{links:?}");
    });
}

#[test]
fn facts_are_those_of_the_host_without_our_routes() {
    in_overlay(DUAL, 20, |lab, _overlay| async move {
        ip("route add default via 192.0.2.254 metric 7");
        ip("route add 198.51.100.0/24 via 192.0.2.253");
        ip("route add 192.0.2.128/25 via 192.0.2.252");
        ip("route add 203.0.113.0/24 nexthop via 192.0.2.8 nexthop via 192.0.2.9");
        ip("-6 route add default via 2001:db8::fe");
        // As Go flannel leaves it.
        ip("route add 10.0.99.0/24 via 10.0.99.0 dev flannel.1 onlink");
        let up0 = index_of("up0");
        let far = "198.51.100.1".parse().unwrap();
        let facts = lab.kernel.host_facts(&[far]).await.unwrap();
        let uplink = &facts.links[&up0];
        assert_eq!((uplink.name.as_str(), uplink.mtu, uplink.up), ("up0", 1500, true));
        assert_eq!(uplink.kind, LinkKind::Other("veth".into()));
        let LinkKind::Vxlan(vxlan) = &facts.links[&index_of("flannel.1")].kind else { panic!("{facts:?}") };
        assert_eq!((vxlan.port, vxlan.lower), (Some(8472), Some(LinkId::Other(up0))));
        assert!(facts.addresses.iter().any(|address| {
            address.link == up0 && address.addr.to_string() == "192.0.2.1" && address.len == 24 && address.permanent
        }));
        let gateway = Some("192.0.2.254".parse().unwrap());
        let mut default = HostRoute::new("0.0.0.0/0".parse().unwrap(), Some(up0), gateway);
        default.metric = 7;
        assert_eq!(facts.defaults[0], default);
        assert_eq!(facts.defaults.len(), 2);
        assert_eq!(facts.on_link("192.0.2.77".parse().unwrap()), Some(up0));
        assert_eq!(facts.on_link("192.0.2.200".parse().unwrap()), None);
        assert_eq!(facts.on_link("198.51.100.1".parse().unwrap()), None);
        assert_eq!(facts.route_to(far).map(|route| route.prefix), "198.51.100.0/24".parse().ok());
        let without = lab.kernel.host_facts(&[]).await.unwrap();
        assert!(without.far.to(far).is_none(), "a route that nobody asked for is not kept");
        assert!(facts.connected(Family::V4).any(|prefix| prefix == "192.0.2.0/24".parse().unwrap()));
        let hops: Vec<String> = facts.next_hops.iter().map(|hop| hop.addr.to_string()).collect();
        assert_eq!(hops, ["192.0.2.8", "192.0.2.9", "192.0.2.252", "192.0.2.253", "192.0.2.254", "2001:db8::fe"]);
    });
}

#[test]
fn a_device_with_more_addresses_than_are_kept_hides_no_other() {
    in_lab(|lab| async move {
        ip("link add ipvs0 type veth peer name unused0");
        ip("link add later0 type veth peer name unused1");
        let services: String =
            (0..10_000_u32).map(|n| format!("addr add {}/32 dev ipvs0\n", Ipv4Addr::from(0x0a60_0000 + n))).collect();
        let others = ["198.51.100.7", "2001:db8:7::7"];
        let batch = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(&batch, services).unwrap();
        ip(&format!("-batch {}", batch.path().display()));
        others.into_iter().for_each(|addr| drop(ip(&format!("addr add {addr} dev later0"))));
        let facts = lab.kernel.host_facts(&[]).await.unwrap();
        for addr in others.into_iter().chain(["192.0.2.1", "2001:db8::1"]) {
            assert!(facts.addresses.iter().any(|found| found.addr.to_string() == addr), "{addr}");
        }
        assert_eq!(facts.left_out, 10_000 - HostFacts::MOST_OF_A_LINK);
    });
}

#[test]
fn a_name_and_an_overlapping_network_are_claimed_once_until_released() {
    in_lab(|lab| async move {
        let networks = dual("10.5.0.0/16", "fd00::/48");
        let claim = lab.kernel.claim(&name("flannel"), &networks, Residence::Present).await.unwrap();
        let other = NetlinkKernel::new().unwrap();
        for (rival, theirs) in [
            ("flannel", networks),
            ("flannel", dual("10.9.0.0/16", "")),
            ("second", dual("10.5.7.0/24", "")),
            ("second", dual("10.0.0.0/8", "")),
            ("second", dual("", "fd00:0:0:7::/64")),
        ] {
            let error = other.claim(&name(rival), &theirs, Residence::Present).await.unwrap_err();
            let KernelError::Conflict { other, hint } = &error else { panic!("{error}") };
            assert_eq!((other.as_str(), hint.is_empty()), ("flannel/10.5.0.0-16/fd00::-48", false));
        }
        let former = async |kernel: &NetlinkKernel| {
            kernel.claim(&name("flannel"), &dual("10.7.0.0/16", ""), Residence::Former).await.unwrap()
        };
        let left = [former(&lab.kernel).await, former(&other).await];
        let third = other.claim(&name("third"), &dual("10.7.9.0/24", ""), Residence::Present).await;
        assert!(matches!(third, Err(KernelError::Conflict { .. })));
        drop(left);
        let second = other.claim(&name("second"), &dual("10.6.0.0/16", "fd01::/48"), Residence::Present).await.unwrap();
        drop(claim);
        // A program that another test is starting has a copy of the socket until it runs.
        eventually_claimed(&other, &networks).await;
        drop(second);
    });
}

#[test]
fn of_two_that_claim_at_the_same_time_exactly_one_goes_on() {
    in_lab(|lab| async move {
        let (networks, other) = (dual("10.5.0.0/16", ""), NetlinkKernel::new().unwrap());
        let (one, another) = (name("one"), name("another"));
        for round in 0..200 {
            let claims = tokio::join!(
                lab.kernel.claim(&one, &networks, Residence::Present),
                other.claim(&another, &networks, Residence::Present),
            );
            let held = usize::from(claims.0.is_ok()) + usize::from(claims.1.is_ok());
            assert_eq!(held, 1, "round {round}: {claims:?}");
            drop(claims);
            // A program that another test is starting has a copy of the sockets until it runs.
            drop(testkit::hold_commands());
        }
    });
}

#[test]
fn a_kernel_looks_at_and_claims_in_the_namespace_it_was_given() {
    in_lab(|lab| async move {
        let here = File::open("/proc/thread-self/ns/net").unwrap();
        let up0 = index_of("up0");
        let claim = lab.kernel.claim(&name("flannel"), &dual("10.5.0.0/16", ""), Residence::Present).await.unwrap();
        // A thread elsewhere gets a kernel for here.
        let elsewhere = Namespace::new("elsewhere").unwrap().run(move || {
            let given = NetlinkKernel::in_namespace(here.into()).unwrap();
            (given, NetlinkKernel::new().unwrap())
        });
        let (given, own) = elsewhere.unwrap();
        assert!(given.host_facts(&[]).await.unwrap().links.contains_key(&up0));
        assert!(!own.host_facts(&[]).await.unwrap().links.values().any(|link| link.name.as_str() == "up0"));
        let networks = dual("10.5.0.0/16", "");
        assert!(matches!(
            given.claim(&name("flannel"), &networks, Residence::Present).await,
            Err(KernelError::Conflict { .. })
        ));
        own.claim(&name("flannel"), &networks, Residence::Present).await.unwrap();
        drop(claim);
    });
}

#[test]
fn what_is_no_namespace_is_refused() {
    let error = NetlinkKernel::in_namespace(File::open("/dev/null").unwrap().into()).unwrap_err();
    assert!(matches!(error, KernelError::Refused { .. }), "{error}");
}

#[test]
fn a_kernel_whose_namespace_has_lost_its_uplink_says_so_by_refusal() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(DUAL, 1);
        ip("link del up0");
        let report = lab.audit(&overlay).await;
        assert_eq!(report.refused.len(), 2, "{report:?}");
        assert_eq!(report.applied, 0);
        assert!(report.lost.is_none());
    });
}

#[test]
fn a_namespace_that_everybody_else_has_left_lives_as_long_as_the_kernel_in_it() {
    in_lab(|lab| async move {
        let namespace = Namespace::new("left").unwrap();
        let kernel = NetlinkKernel::in_namespace(namespace.as_fd().try_clone_to_owned().unwrap()).unwrap();
        Namespace::current("lab").unwrap().add_veth("here0", &namespace, "there0").unwrap();
        // Nobody is in it, and nothing names it.
        drop(namespace);
        let overlay = Overlay::vxlan(V4, 3);
        let mut scope = overlay.scope.clone();
        scope.uplink = None;
        let hints = kernel.hints(&scope);
        for _ in 0..3 {
            let facts = kernel.host_facts(&[]).await.unwrap();
            assert!(facts.links.values().any(|link| link.name.as_str() == "there0"));
            assert!(kernel.observe(&scope).await.unwrap().is_empty());
        }
        drop(kernel);
        let last = tokio::time::timeout(PATIENCE, hints.collect::<Vec<_>>()).await.expect("an end in time");
        assert_eq!(last, []);
        // It goes with the kernel, and the other end of its cable with it, both in the kernel's own time.
        let end = std::time::Instant::now() + 5 * PATIENCE;
        while lab.kernel.host_facts(&[]).await.unwrap().links.values().any(|link| link.name.as_str() == "here0") {
            assert!(std::time::Instant::now() < end, "the namespace stays");
            tokio::task::yield_now().await;
        }
    });
}

/// Anybody may bind an abstract socket, so a name alone must not count.
#[test]
fn a_name_that_was_bound_without_privilege_is_no_claim_and_keeps_nobody_out() {
    in_lab(|lab| async move {
        let networks = dual("10.5.0.0/16", "");
        let squat = |text: &str| {
            UnixListener::bind_addr(&SocketAddr::from_abstract_name(text).expect("short enough")).expect("a free name")
        };
        let forged = "x\n0000000000000000: 00000002 00000000 00010000 0001 01 1 @flannelkit/flannel/-/-";
        let squatters = ["flannelkit/flannel/10.5.0.0-16/-", "flannelkit/any/0.0.0.0-0/-", "flannelkit/?", forged];
        let squatters: Vec<_> = squatters.iter().map(|text| squat(text)).collect();
        let claim = lab.kernel.claim(&name("flannel"), &networks, Residence::Present).await.unwrap();
        // The claim counts all the same, under whatever name it was bound, and after the squatters have gone.
        let other = NetlinkKernel::new().unwrap();
        let flannel = name("flannel");
        let error = other.claim(&flannel, &networks, Residence::Present).await.unwrap_err();
        assert!(matches!(&error, KernelError::Conflict { other, .. } if other == "flannel/10.5.0.0-16/-"), "{error}");
        drop(squatters);
        let error = other.claim(&flannel, &networks, Residence::Present).await.unwrap_err();
        assert!(matches!(&error, KernelError::Conflict { .. }), "{error}");
        drop(claim);
        // A program that another test is starting has copies of the sockets until it runs.
        eventually_claimed(&other, &networks).await;
    });
}

async fn eventually_claimed(kernel: &NetlinkKernel, networks: &Dual<Prefix>) {
    let end = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while let Err(error) = kernel.claim(&name("flannel"), networks, Residence::Present).await {
        assert!(std::time::Instant::now() < end, "{error}");
    }
}
