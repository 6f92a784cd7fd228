//! Plans against the real kernel.
#![cfg(all(target_os = "linux", feature = "netlink"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

#[path = "../lab/mod.rs"]
mod lab;
mod routes;

use flannel_core::kernel::{
    EEXIST, Kernel, KernelError, LinkId, LinkKind, Op, Route, RouteKey, RouteKind, RouteSlot, State,
};
use flannel_core::net::{Family, MacAddr, Prefix};
use lab::{DUAL, Overlay, V4, V6, bridge, in_lab, in_overlay, index_of, ip, peer, subnet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use testkit::Namespace;

const OWN: LinkId = LinkId::Own(0);

#[test]
fn what_was_applied_is_seen_again_for_each_choice_of_families() {
    for families in [V4, V6, DUAL] {
        in_overlay(families, 200, move |lab, overlay| async move {
            let seen = lab.kernel.observe(&overlay.scope).await.unwrap();
            assert_eq!(seen.fdb, overlay.wanted.fdb);
            assert_eq!(seen.neighbours, overlay.wanted.neighbours);
            assert_eq!(seen.routes, overlay.wanted.routes);
            assert_eq!(seen.addresses, overlay.wanted.addresses);
        });
    }
}

#[test]
fn a_fresh_process_sees_what_an_earlier_one_wrote() {
    in_overlay(DUAL, 20, |lab, overlay| async move {
        drop(lab);
        let lab = lab::Lab { kernel: flannel_core::netlink::NetlinkKernel::new().unwrap() };
        lab.assert_converged(&overlay).await;
    });
}

#[test]
fn a_device_is_what_flannel_makes_and_carries_the_mark() {
    in_overlay(V4, 1, |_lab, overlay| async move {
        let text = ip("-d link show dev flannel.1");
        let group = format!("group {}", overlay.scope.overlay.mark());
        for part in ["mtu 1450", "vxlan id 1 local 192.0.2.1 dev up0", "dstport 8472", "nolearning", &group] {
            assert!(text.contains(part), "{part} in {text}");
        }
        assert!(text.contains("alias flannelkit:flannel") && text.contains("02:00:00:00:00:04"), "{text}");
        let accept_ra = std::fs::read_to_string("/proc/sys/net/ipv6/conf/flannel.1/accept_ra").unwrap();
        assert_eq!(accept_ra.trim(), "0");
        let prefix = subnet(Family::V4, 1);
        let route = ip(&format!("route show {prefix}"));
        assert!(route.contains("via 10.0.1.0 dev flannel.1 proto 2") && route.contains("onlink"), "{route}");
        assert!(ip("neigh show dev flannel.1").contains("10.0.1.0 lladdr 02:04:00:00:00:01 PERMANENT"));
        assert!(bridge("fdb show dev flannel.1").contains("02:04:00:00:00:01 dst 172.16.0.1 self permanent"));
    });
}

#[test]
fn peers_go_and_come_and_the_device_goes_last() {
    in_lab(|lab| async move {
        let full = Overlay::vxlan(DUAL, 30);
        let bare = full.without_peers();
        lab.converge(&full).await;
        lab.converge(&bare).await;
        let seen = lab.kernel.observe(&full.scope).await.unwrap();
        assert!(seen.routes.is_empty() && seen.neighbours.is_empty() && seen.fdb.is_empty());
        lab.converge(&full).await;
        let mut nothing = bare.clone();
        nothing.wanted = Default::default();
        lab.converge(&nothing).await;
        assert!(lab.kernel.observe(&full.scope).await.unwrap().is_empty());
        assert!(!ip("link").contains("flannel"));
    });
}

#[test]
fn a_changed_peer_is_replaced_in_place() {
    in_overlay(V4, 3, |lab, mut overlay| async move {
        let new_mac = MacAddr([2, 9, 9, 9, 9, 9]);
        let (key, _) = peer(Family::V4, OWN, 2).neighbour.unwrap();
        let (fdb, dst) = peer(Family::V4, OWN, 2).fdb.unwrap();
        overlay.wanted.neighbours.insert(key, new_mac);
        overlay.wanted.fdb.remove(&fdb);
        overlay.wanted.fdb.insert(flannel_core::kernel::FdbKey { mac: new_mac, ..fdb }, dst);
        let (moved, _) = peer(Family::V4, OWN, 3).fdb.unwrap();
        overlay.wanted.fdb.insert(moved, "172.31.0.1".parse().unwrap());
        lab.converge(&overlay).await;
    });
}

#[test]
fn a_device_is_renamed_readdressed_resized_marked_and_set_up_again() {
    in_overlay(V4, 5, |lab, overlay| async move {
        for damage in [
            "link set flannel.1 mtu 1300",
            "link set flannel.1 address 02:00:00:00:00:99",
            "link set flannel.1 alias else",
            "link set flannel.1 down",
            "link set flannel.1 type vxlan learning",
            "link set flannel.1 type vxlan id 1 remote 192.0.2.9",
        ] {
            ip(damage);
            lab.audit(&overlay).await;
            lab.converge(&overlay).await;
        }
        assert!(!ip("-d link show dev flannel.1").contains("remote"));
        assert!(!bridge("fdb show dev flannel.1").contains("00:00:00:00:00:00"));
        ip("link set flannel.1 down");
        ip("link set flannel.1 name other0");
        lab.audit(&overlay).await;
        lab.converge(&overlay).await;
        assert!(ip("link").contains("flannel.1"));
    });
}

/// Makes the device that Go flannel makes, but for `settings`.
fn make_as_go_flannel(settings: &str) {
    let kind = "type vxlan id 1 dev up0 local 192.0.2.1 nolearning";
    ip(&format!("link add flannel.1 address 02:00:00:00:00:04 mtu 1450 txqueuelen 0 {kind} {settings}"));
}

#[test]
fn the_device_that_go_flannel_makes_is_adopted_as_it_is() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(V4, 2);
        make_as_go_flannel("dstport 8472");
        let index = index_of("flannel.1");
        lab.converge(&overlay).await;
        assert_eq!(index_of("flannel.1"), index);
    });
}

#[test]
fn a_device_that_go_flannel_never_makes_is_left_alone() {
    for settings in ["l2miss", "l3miss", "l2miss l3miss", "remote 192.0.2.9"] {
        in_lab(move |lab| async move {
            let overlay = Overlay::vxlan(V4, 2);
            make_as_go_flannel(&format!("dstport 8472 {settings}"));
            let plan = lab.plan(&overlay).await;
            let found = plan.conflicts.first().map(|conflict| conflict.found.clone()).unwrap_or_default();
            let shown = if settings.starts_with("remote") { settings } else { "l2miss or l3miss" };
            assert!(plan.is_empty() && found.contains(shown), "{settings}: {plan:?}");
        });
    }
}

#[test]
fn a_device_of_ours_that_reports_misses_is_made_anew() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(V4, 2);
        make_as_go_flannel("l3miss");
        ip(&format!("link set flannel.1 group {}", overlay.scope.overlay.mark()));
        lab.converge(&overlay).await;
        assert!(!ip("-d link show dev flannel.1").contains("l3miss"));
    });
}

#[test]
fn a_renamed_device_is_renamed_back_while_it_is_up() {
    in_overlay(V4, 2, |lab, overlay| async move {
        ip("link set flannel.1 down");
        ip("link set flannel.1 name other0");
        ip("link set other0 up");
        lab.audit(&overlay).await;
        lab.converge(&overlay).await;
    });
}

#[test]
fn a_device_with_another_vni_under_our_mark_is_made_anew() {
    in_overlay(V4, 2, |lab, overlay| async move {
        let mut other = overlay.clone();
        for device in &mut other.scope.devices {
            let LinkKind::Vxlan(vxlan) = &mut device.kind else { unreachable!() };
            vxlan.vni = flannel_core::net::Vni::new(7).unwrap();
        }
        other.wanted.links.get_mut(&OWN).unwrap().kind = other.scope.devices[0].kind.clone();
        lab.converge(&other).await;
        assert!(ip("-d link show dev flannel.1").contains("vxlan id 7"));
    });
}

#[test]
fn what_go_flannel_leaves_is_adopted() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(V4, 1);
        ip(
            "link add flannel.1 mtu 1450 address 02:00:00:00:00:04 type vxlan id 1 dev up0 local 192.0.2.1 nolearning dstport 8472",
        );
        ip("addr add 10.0.0.0/32 dev flannel.1");
        ip("link set flannel.1 up");
        ip("route add 10.0.1.0/24 via 10.0.1.0 dev flannel.1 onlink");
        let plan = lab.plan(&overlay).await;
        assert!(plan.ops.iter().any(|op| matches!(op, Op::ReplaceRoute { .. })), "{plan:?}");
        assert!(!plan.ops.iter().any(|op| matches!(op, Op::CreateLink { .. } | Op::DeleteLink { .. })), "{plan:?}");
        lab.converge(&overlay).await;
    });
}

#[test]
fn the_kernels_own_words_reach_the_error() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(V4, 1);
        // It comes after the look: a look would have shown it, and the plan would have been a conflict.
        let plan = lab.plan(&overlay).await;
        ip("link add blocker type vxlan id 1 dev up0 local 192.0.2.1 dstport 8472");
        let report = lab.kernel.apply(&overlay.scope, Arc::new(plan.ops.clone())).await;
        let (place, KernelError::Refused { errno, message, doing }) = &report.refused[0] else {
            panic!("{report:?}");
        };
        assert_eq!((*place, *errno), (0, EEXIST));
        assert!(message.contains("VNI"), "{message}");
        assert!(doing.contains("link add flannel.1"), "{doing}");
        // Address, forwarding entry, neighbour and route stand on the device.
        assert_eq!((report.applied, report.skipped), (0, vec![1, 2, 3, 4]));
        assert!(ip("link").contains("blocker") && !ip("link").contains("flannel.1"));
    });
}

#[test]
fn a_refused_forwarding_entry_skips_its_own_neighbour_and_route_alone() {
    in_lab(|lab| async move {
        let mut overlay = Overlay::vxlan(V4, 300);
        // The kernel takes no IPv6 destination on a device with an IPv4 underlay.
        let (key, _) = peer(Family::V4, OWN, 150).fdb.unwrap();
        overlay.wanted.fdb.insert(key, "2001:db8::7".parse().unwrap());
        let plan = lab.plan(&overlay).await;
        let report = lab.kernel.apply(&overlay.scope, Arc::new(plan.ops.clone())).await;
        let [(refused, _)] = report.refused.as_slice() else { panic!("{report:?}") };
        assert!(matches!(&plan.ops[*refused], Op::PutFdb { key: found, .. } if *found == key), "{report:?}");
        let [neighbour, route] = report.skipped.as_slice() else { panic!("{report:?}") };
        let prefix = subnet(Family::V4, 150);
        assert!(matches!(&plan.ops[*neighbour], Op::PutNeighbour { key, .. } if key.addr == prefix.addr()));
        assert!(matches!(&plan.ops[*route], Op::CreateRoute { prefix: found, .. } if *found == prefix));
        assert_eq!(report.applied, plan.ops.len() - 3);
        assert_eq!(ip("route show dev flannel.1").lines().count(), 299);
    });
}

#[test]
fn a_device_that_was_not_made_is_refused_and_what_is_on_it_is_skipped() {
    in_lab(|lab| async move {
        let mut overlay = Overlay::vxlan(DUAL, 2);
        // The second device's VNI belongs to somebody else.
        let plan = lab.plan(&overlay).await;
        ip("link add blocker type vxlan id 1 dev up0 local 2001:db8::1 dstport 8472");
        let report = lab.kernel.apply(&overlay.scope, Arc::new(plan.ops.clone())).await;
        assert_eq!(report.refused.len(), 1, "{report:?}");
        assert_eq!(report.skipped.len(), 7, "{report:?}");
        assert_eq!(report.applied, plan.ops.len() - 8);
        overlay.wanted.links.remove(&LinkId::Own(1));
        overlay.wanted.addresses.retain(|key, ()| key.link == OWN);
        overlay.wanted.fdb.retain(|key, _| key.link == OWN);
        overlay.wanted.neighbours.retain(|key, _| key.link == OWN);
        overlay.wanted.routes.retain(|_, route| route.link == Some(OWN));
        lab.assert_converged(&overlay).await;
    });
}

#[test]
fn a_full_send_of_refusals_is_reported_one_by_one() {
    in_overlay(V4, 300, |lab, overlay| async move {
        let ops = overlay
            .wanted
            .routes
            .iter()
            .map(|(key, route)| Op::CreateRoute { prefix: key.prefix, route: route.clone() })
            .collect();
        let report = lab.kernel.apply(&overlay.scope, Arc::new(ops)).await;
        assert_eq!(report.refused.iter().map(|(place, _)| *place).collect::<Vec<_>>(), (0..300).collect::<Vec<_>>());
        assert!(report.refused.iter().all(|(_, error)| matches!(error, KernelError::Refused { errno: EEXIST, .. })));
        assert_eq!(report.applied, 0);
        lab.assert_converged(&overlay).await;
    });
}

#[test]
fn foreign_objects_are_seen_as_what_they_are_and_left_alone() {
    in_overlay(DUAL, 4, |lab, overlay| async move {
        ip("route add 10.0.2.0/24 via 192.0.2.9 metric 50");
        ip("route add 10.0.77.0/24 via 192.0.2.9");
        ip("route add 10.0.78.0/24 nexthop via 192.0.2.9 nexthop via 192.0.2.10");
        ip("route add unreachable 10.0.79.0/24");
        ip("route add 10.0.80.0/24 via 192.0.2.9 src 192.0.2.1");
        ip("route append 10.0.3.0/24 via 192.0.2.9 proto static");
        ip("route add 10.0.3.0/24 via 192.0.2.9 table 99");
        ip("-6 route add fd00:0:0:77::/64 via 2001:db8::9");
        ip("-6 route add fd00:0:0:78::/64 nexthop via 2001:db8::9 nexthop via 2001:db8::a");
        ip("neigh add 192.0.2.9 lladdr 02:00:00:00:01:01 dev up0 nud permanent");
        ip("link add br7 type bridge");
        let before = (ip("route show table all"), ip("-6 route show table all"), ip("neigh show nud permanent"));
        let seen = lab.kernel.observe(&overlay.scope).await.unwrap();
        let kind = |prefix: &str, nth| seen.routes[&RouteKey { prefix: prefix.parse::<Prefix>().unwrap(), nth }].kind;
        assert_eq!(kind("10.0.77.0/24", 0), RouteKind::Unicast);
        let with_source = seen.routes_to("10.0.80.0/24".parse().unwrap()).next().unwrap().1;
        assert_eq!((with_source.kind, with_source.source()), (RouteKind::Unicast, Some("192.0.2.1".parse().unwrap())));
        for foreign in ["10.0.78.0/24", "10.0.79.0/24", "fd00:0:0:78::/64"] {
            assert_eq!(kind(foreign, 0), RouteKind::Foreign, "{foreign}");
        }
        assert_eq!(seen.routes_to(subnet(Family::V4, 3)).count(), 2);
        assert_eq!(seen.routes_to(subnet(Family::V4, 2)).count(), 1, "another metric is another key");
        lab.assert_converged(&overlay).await;
        let after = (ip("route show table all"), ip("-6 route show table all"), ip("neigh show nud permanent"));
        assert_eq!(before, after);
    });
}

#[test]
fn a_forwarding_entry_with_its_own_port_is_made_right() {
    in_overlay(V4, 1, |lab, overlay| async move {
        bridge("fdb replace 02:04:00:00:00:01 dev flannel.1 dst 172.16.0.1 port 9 self permanent");
        assert!(!lab.plan(&overlay).await.is_empty());
        lab.converge(&overlay).await;
        assert!(!bridge("fdb show dev flannel.1").contains("port 9"));
    });
}

#[test]
fn requests_work_after_futures_were_dropped() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(V4, 500);
        let plan = lab.plan(&overlay).await;
        for _ in 0..20 {
            let apply = lab.kernel.apply(&overlay.scope, Arc::new(plan.ops.clone()));
            let observe = lab.kernel.observe(&overlay.scope);
            tokio::select! {
                biased;
                _ = apply => {}
                _ = observe => {}
                () = tokio::task::yield_now() => {}
            }
        }
        lab.audit(&overlay).await;
        lab.assert_converged(&overlay).await;
    });
}

#[test]
fn all_of_it_works_in_an_unprivileged_user_namespace() {
    let program = std::env::current_exe().unwrap();
    for test in
        ["what_was_applied_is_seen_again_for_each_choice_of_families", "a_full_send_of_refusals_is_reported_one_by_one"]
    {
        let output = std::process::Command::new("unshare")
            .args(["--user", "--map-root-user", "--net"])
            .arg(&program)
            .args(["--exact", test])
            .output()
            .expect("util-linux is installed");
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && text.contains("1 passed"), "{text}");
    }
}

#[test]
fn what_is_seen_while_links_come_and_go_is_complete() {
    in_overlay(DUAL, 100, |lab, overlay| async move {
        let churn = std::thread::spawn(|| {
            for _ in 0..60 {
                ip("link add pod0 type veth peer name pod1");
                ip("addr add 198.51.100.1/24 dev pod0");
                ip("link del pod0");
            }
        });
        let mut looked = 0;
        while !churn.is_finished() {
            match lab.kernel.observe(&overlay.scope).await {
                Ok(seen) => {
                    assert_eq!((&seen.routes, &seen.fdb), (&overlay.wanted.routes, &overlay.wanted.fdb));
                    assert_eq!(seen.addresses, overlay.wanted.addresses);
                    looked += 1;
                }
                Err(error) => assert!(matches!(error, KernelError::Lost { .. }), "{error}"),
            }
        }
        churn.join().unwrap();
        assert!(looked > 0);
    });
}

#[test]
fn the_kernels_lock_in_others_hands_delays_writes_and_loses_none() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(DUAL, 200);
        let nothing = Overlay { wanted: State::default(), ..overlay.clone() };
        let busy = Arc::new(AtomicBool::new(true));
        let others: Vec<_> = (0..4)
            .map(|_| {
                let busy = Arc::clone(&busy);
                let other = Namespace::new("other").unwrap();
                std::thread::spawn(move || {
                    while busy.load(Ordering::Relaxed) {
                        other.ip("link add veth0 type veth peer name veth1").unwrap();
                        other.ip("link del veth0").unwrap();
                    }
                })
            })
            .collect();
        for _ in 0..3 {
            lab.converge(&overlay).await;
            lab.converge(&nothing).await;
        }
        busy.store(false, Ordering::Relaxed);
        others.into_iter().for_each(|other| other.join().unwrap());
    });
}

#[test]
fn a_device_that_somebody_took_out_of_its_group_or_gave_another_alias_is_still_seen_as_the_overlays_device() {
    in_overlay(V4, 1, |lab, overlay| async move {
        let wanted = &overlay.wanted.links[&OWN];
        for (act, undo) in [
            ("group 0".to_owned(), format!("group {}", wanted.group)),
            ("alias nobody".to_owned(), format!("alias {}", wanted.alias.as_deref().unwrap())),
        ] {
            ip(&format!("link set flannel.1 {act}"));
            let seen = lab.kernel.observe(&overlay.scope).await.unwrap();
            assert_eq!(seen.links.keys().collect::<Vec<_>>(), [&OWN], "{act}");
            assert_eq!(seen.routes[&RouteKey { prefix: subnet(Family::V4, 1), nth: 0 }].link, Some(OWN), "{act}");
            assert_eq!((seen.fdb.len(), seen.neighbours.len()), (1, 1), "{act}");
            ip(&format!("link set flannel.1 {undo}"));
            lab.assert_converged(&overlay).await;
        }
    });
}
