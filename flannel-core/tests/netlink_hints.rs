//! Notifications of the real kernel.
#![cfg(all(target_os = "linux", feature = "netlink"))]
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

mod lab;

use std::sync::Arc;
use std::time::Instant;

use flannel_core::kernel::{Device, FdbKey, Hint, Kernel, LinkId, LinkKind, LinkName, OverlayName, State};
use flannel_core::net::{Family, MacAddr};
use futures_util::stream::BoxStream;
use futures_util::{FutureExt, StreamExt};
use lab::{DUAL, Lab, Overlay, PATIENCE, V4, bridge, in_lab, in_overlay, index_of, ip, peer};

/// The hints due to all that has happened so far.
async fn hints_so_far(lab: &Lab, hints: &mut BoxStream<'static, Hint>) -> Vec<Hint> {
    // The thread reads notifications before each command; the first may have come after it had done so.
    for _ in 0..2 {
        lab.kernel.host_facts(&[]).await.unwrap();
    }
    let mut found = Vec::new();
    while let Some(Some(hint)) = hints.next().now_or_never() {
        found.push(hint);
    }
    found
}

#[test]
fn own_writes_make_no_hint() {
    in_lab(|lab| async move {
        let mut overlay = Overlay::vxlan(DUAL, 300);
        let mut hints = lab.kernel.hints(&overlay.scope);
        lab.converge(&overlay).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, [], "creation");
        // Our IPv6 address is announced when duplicate address detection is through.
        let begun = Instant::now();
        while ip("-6 addr show tentative").contains("flannel") {
            assert!(begun.elapsed() < PATIENCE, "duplicate address detection takes too long");
            tokio::task::yield_now().await;
        }
        assert_eq!(hints_so_far(&lab, &mut hints).await, [], "duplicate address detection");
        let full = overlay.clone();
        let (fdb, _) = peer(Family::V4, LinkId::Own(0), 3).fdb.unwrap();
        let (neighbour, _) = peer(Family::V4, LinkId::Own(0), 3).neighbour.unwrap();
        let mac = MacAddr([2, 9, 9, 9, 9, 9]);
        overlay.wanted.fdb.remove(&fdb);
        overlay.wanted.fdb.insert(FdbKey { mac, ..fdb }, "172.31.0.1".parse().unwrap());
        overlay.wanted.neighbours.insert(neighbour, mac);
        lab.converge(&overlay).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, [], "a changed peer");
        lab.converge(&overlay.without_peers()).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, [], "peers gone");
        lab.converge(&full).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, [], "peers back");
        let mut nothing = full.clone();
        nothing.wanted = Default::default();
        lab.converge(&nothing).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, [], "devices gone");
    });
}

#[test]
fn a_foreign_change_in_the_scope_makes_a_hint_whatever_its_class() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(DUAL, 3);
        let mut hints = lab.kernel.hints(&overlay.scope);
        lab.converge(&overlay).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, []);
        for (program, damage) in [
            ("ip", "route del 10.0.1.0/24"),
            ("ip", "route replace 10.0.1.0/24 via 192.0.2.9"),
            ("ip", "route add 10.0.99.0/24 via 192.0.2.9"),
            ("ip", "-6 route del fd00:0:0:1::/64"),
            ("ip", "neigh del 10.0.2.0 dev flannel.1"),
            ("ip", "neigh replace 10.0.2.0 lladdr 02:00:00:00:00:77 dev flannel.1 nud permanent"),
            ("ip", "neigh replace 10.0.2.0 lladdr 02:00:00:00:00:77 dev flannel.1 nud reachable"),
            ("ip", "-6 neigh del fd00:0:0:2:: dev flannel-v6.1"),
            ("bridge", "fdb del 02:04:00:00:00:03 dev flannel.1 dst 172.16.0.3 self"),
            ("bridge", "fdb replace 02:04:00:00:00:03 dev flannel.1 dst 172.16.0.9 self permanent"),
            ("bridge", "fdb replace 02:04:00:00:00:03 dev flannel.1 dst 172.16.0.3 self dynamic"),
            ("bridge", "fdb add 02:04:00:00:00:55 dev flannel.1 dst 172.16.0.9 self permanent"),
            ("ip", "addr add 10.0.0.9/32 dev flannel.1"),
            ("ip", "link set flannel.1 mtu 1300"),
            ("ip", "link set flannel.1 address 02:00:00:00:00:99"),
            ("ip", "link set flannel.1 group 5"),
            ("ip", "link set flannel.1 alias else"),
            ("ip", "link set flannel.1 down"),
            ("ip", "addr del 10.0.0.0/32 dev flannel.1"),
            ("ip", "link del flannel.1"),
        ] {
            if program == "ip" {
                ip(damage)
            } else {
                bridge(damage)
            };
            let found = hints_so_far(&lab, &mut hints).await;
            assert!(found.contains(&Hint::Changed), "{damage}: {found:?}");
            // What only its owner may undo.
            ip("route flush root 10.0.0.0/8 proto boot");
            if ip("link").contains("flannel.1:") {
                ip(&format!("link set flannel.1 group {}", overlay.scope.overlay.mark()));
            }
            hints_so_far(&lab, &mut hints).await;
            // A device that was down or got another address lost what the first audit could still see.
            lab.audit(&overlay).await;
            lab.converge(&overlay).await;
            assert_eq!(hints_so_far(&lab, &mut hints).await, [], "healing after {damage}");
        }
    });
}

#[test]
fn entries_that_a_device_learns_make_no_hint_when_they_come_or_age_out() {
    in_lab(|lab| async move {
        let mut overlay = Overlay::vxlan(V4, 3);
        for link in overlay.wanted.links.values_mut() {
            if let LinkKind::Vxlan(vxlan) = &mut link.kind {
                vxlan.learning = true;
            }
        }
        overlay.scope.devices = overlay.wanted.links.values().map(Device::of).collect();
        let mut hints = lab.kernel.hints(&overlay.scope);
        lab.converge(&overlay).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, []);
        bridge("fdb add 02:04:00:00:00:66 dev flannel.1 dst 172.16.0.9 self dynamic");
        bridge("fdb del 02:04:00:00:00:66 dev flannel.1 dst 172.16.0.9 self");
        assert_eq!(hints_so_far(&lab, &mut hints).await, []);
        bridge("fdb del 02:04:00:00:00:03 dev flannel.1 dst 172.16.0.3 self");
        assert_eq!(hints_so_far(&lab, &mut hints).await, [Hint::Changed]);
    });
}

#[test]
fn a_foreign_change_amid_our_writes_is_not_lost() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(V4, 200);
        let mut hints = lab.kernel.hints(&overlay.scope);
        lab.converge(&overlay.without_peers()).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, []);
        // Ours and the foreign one wait in the same queue when the first send is matched.
        bridge("fdb add 02:04:00:00:00:01 dev flannel.1 dst 172.16.0.77 self permanent");
        let plan =
            flannel_core::plan::plan(&overlay.wanted, &overlay.without_peers().wanted, &overlay.scope, &|_| None);
        lab.kernel.apply(&overlay.scope, Arc::new(plan.ops)).await;
        assert!(hints_so_far(&lab, &mut hints).await.contains(&Hint::Changed));
    });
}

/// Another overlay, which a device and the routes of `overlay` are in the way of, and the other way round.
fn sibling_of(overlay: &Overlay) -> Overlay {
    let mut sibling = overlay.clone();
    let name = OverlayName::new("sibling").unwrap();
    let device = LinkName::new("sibling.1").unwrap();
    for link in sibling.wanted.links.values_mut() {
        (link.name, link.group, link.alias) = (device.clone(), name.mark(), Some(name.alias().into()));
    }
    sibling.scope.devices[0].name = device;
    sibling.scope.overlay = name;
    sibling
}

#[test]
fn what_one_overlay_writes_is_hinted_at_once_to_another_on_the_same_kernel_and_not_to_itself() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(V4, 3);
        let sibling = sibling_of(&overlay);
        let mut own = lab.kernel.hints(&sibling.scope);
        let mut hints = lab.kernel.hints(&overlay.scope);
        let nothing = Overlay { wanted: State::default(), ..sibling.clone() };
        for (wanted, what) in [
            (&sibling, "a device, an address and routes appear"),
            (&sibling.without_peers(), "routes go"),
            (&sibling, "routes come back"),
            (&nothing, "the device goes"),
        ] {
            lab.converge(wanted).await;
            assert!(hints_so_far(&lab, &mut hints).await.contains(&Hint::Changed), "{what}");
            assert_eq!(hints_so_far(&lab, &mut own).await, [], "{what}");
        }
        lab.converge(&overlay).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, []);
    });
}

#[test]
fn changes_of_the_host_are_told_from_changes_of_the_scope() {
    in_overlay(V4, 3, |lab, overlay| async move {
        let mut hints = lab.kernel.hints(&overlay.scope);
        assert_eq!(hints_so_far(&lab, &mut hints).await, []);
        for (act, due) in [
            ("addr add 198.51.100.1/24 dev up0", vec![Hint::FactsChanged]),
            ("addr del 198.51.100.1/24 dev up0", vec![Hint::FactsChanged, Hint::Changed]),
            ("route add default via 192.0.2.9", vec![Hint::FactsChanged]),
            ("route add 203.0.113.0/24 dev up0", vec![Hint::FactsChanged]),
            ("route add 192.0.2.128/25 via 192.0.2.9", vec![Hint::FactsChanged]),
            ("link add br0 type bridge", vec![Hint::FactsChanged]),
            ("link set br0 up", vec![Hint::FactsChanged]),
            ("link set br0 mtu 1400", vec![Hint::FactsChanged]),
            ("link set br0 down", vec![Hint::FactsChanged]),
            ("link set br0 name br1", vec![Hint::FactsChanged]),
            ("link del br1", vec![Hint::FactsChanged]),
            ("link add second0 type veth peer name second1", vec![]),
            ("link set second1 up", vec![]),
            ("link set second0 up", vec![]),
            ("addr add 198.51.100.1/24 dev second0", vec![Hint::FactsChanged]),
            ("link set second0 down", vec![Hint::FactsChanged]),
            ("link set second0 up", vec![Hint::FactsChanged]),
            ("link set up0 mtu 1400", vec![Hint::FactsChanged]),
            ("link set up0 down", vec![Hint::FactsChanged, Hint::Changed]),
            ("link set up0 up", vec![Hint::FactsChanged]),
            ("link del up0", vec![Hint::FactsChanged, Hint::Changed]),
        ] {
            ip(act);
            let found = hints_so_far(&lab, &mut hints).await;
            assert_eq!(found, due, "{act}");
        }
    });
}

#[test]
fn the_carrier_of_the_uplink_is_a_fact_whose_change_is_hinted() {
    in_overlay(V4, 3, |lab, overlay| async move {
        let mut hints = lab.kernel.hints(&overlay.scope);
        let up0 = index_of("up0");
        let carrier = async || lab.kernel.host_facts(&[]).await.unwrap().links[&up0].carrier;
        let begun = Instant::now();
        while !carrier().await {
            assert!(begun.elapsed() < PATIENCE, "a carrier takes too long");
        }
        hints_so_far(&lab, &mut hints).await;
        for (act, has_carrier) in [("link set up0-far down", false), ("link set up0-far up", true)] {
            ip(act);
            // The kernel's worker tells of it later.
            let hint = tokio::time::timeout(PATIENCE, hints.next()).await.expect("a hint in time");
            assert_eq!((hint, carrier().await), (Some(Hint::FactsChanged), has_carrier), "{act}");
        }
        assert!(lab.kernel.host_facts(&[]).await.unwrap().links[&up0].up);
    });
}

#[test]
fn what_is_nobodys_business_makes_no_hint() {
    in_overlay(DUAL, 3, |lab, overlay| async move {
        let mut hints = lab.kernel.hints(&overlay.scope);
        for act in [
            "link add pod0 type veth peer name pod1",
            "link set pod0 up",
            "link set pod1 up",
            "link del pod0",
            "route add 203.0.113.0/24 via 192.0.2.9",
            "route add 10.0.1.0/24 via 192.0.2.9 table 99",
            "route add 10.0.1.0/24 via 192.0.2.9 metric 7",
            "neigh add 192.0.2.9 lladdr 02:00:00:00:01:01 dev up0 nud permanent",
            "link set up0 txqueuelen 77",
        ] {
            ip(act);
            assert_eq!(hints_so_far(&lab, &mut hints).await, [], "{act}");
        }
    });
}

#[test]
fn hints_merge_and_every_listener_gets_them() {
    in_overlay(V4, 3, |lab, overlay| async move {
        let mut one = lab.kernel.hints(&overlay.scope);
        let mut other = lab.kernel.hints(&overlay.scope);
        hints_so_far(&lab, &mut one).await;
        for n in 0..100 {
            ip(&format!("route add 10.0.200.{n}/32 via 192.0.2.9"));
        }
        assert_eq!(hints_so_far(&lab, &mut one).await, [Hint::Changed]);
        assert_eq!(hints_so_far(&lab, &mut other).await, [Hint::Changed]);
    });
}

#[test]
fn a_listener_that_waits_is_woken_and_ends_with_the_kernel() {
    in_overlay(V4, 1, |lab, overlay| async move {
        let mut hints = lab.kernel.hints(&overlay.scope);
        hints_so_far(&lab, &mut hints).await;
        let waiting = tokio::spawn(async move {
            let first = tokio::time::timeout(PATIENCE, hints.next()).await.expect("a hint in time");
            (first, hints)
        });
        tokio::task::yield_now().await;
        ip("route del 10.0.1.0/24");
        let (first, hints) = waiting.await.unwrap();
        assert_eq!(first, Some(Hint::Changed));
        drop(lab);
        let last = tokio::time::timeout(PATIENCE, hints.collect::<Vec<_>>()).await.expect("an end in time");
        assert_eq!(last, []);
    });
}

#[test]
fn what_changed_after_a_look_is_hinted_and_a_write_of_that_look_harms_nobody() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(V4, 4);
        let mut hints = lab.kernel.hints(&overlay.scope);
        lab.converge(&overlay.without_peers()).await;
        assert_eq!(hints_so_far(&lab, &mut hints).await, []);
        let plan = lab.plan(&overlay).await;
        // A foreign route where ours is about to be, and one that goes before we could delete it.
        ip("route add 10.0.1.0/24 via 192.0.2.9");
        let report = lab.kernel.apply(&overlay.scope, Arc::new(plan.ops)).await;
        assert_eq!((report.refused.len(), report.applied), (1, 3 * 4 - 1), "{report:?}");
        assert!(hints_so_far(&lab, &mut hints).await.contains(&Hint::Changed));
        let plan = lab.plan(&overlay.without_peers()).await;
        ip("route del 10.0.2.0/24");
        let report = lab.kernel.apply(&overlay.scope, Arc::new(plan.ops)).await;
        assert_eq!(report.refused.len(), 1, "{report:?}");
        assert!(hints_so_far(&lab, &mut hints).await.contains(&Hint::Changed));
        lab.converge(&overlay.without_peers()).await;
        assert!(ip("route").contains("10.0.1.0/24 via 192.0.2.9"), "the foreign one stays");
    });
}

#[test]
fn a_mac_address_that_somebody_sets_as_soon_as_there_is_a_device_is_hinted_and_set_back() {
    in_lab(|lab| async move {
        let overlay = Overlay::vxlan(V4, 3);
        let theirs = "02:00:00:00:00:99";
        let mut hints = lab.kernel.hints(&overlay.scope);
        // As udev does: at once, in the middle of our own writes, or after them.
        let udev = std::thread::spawn(move || {
            let set = || {
                let set =
                    std::process::Command::new("ip").args(["link", "set", "flannel.1", "address", theirs]).output();
                set.unwrap().status.success()
            };
            let begun = Instant::now();
            while !set() {
                assert!(begun.elapsed() < PATIENCE, "there is no device");
            }
        });
        lab.audit(&overlay).await;
        udev.join().unwrap();
        assert!(hints_so_far(&lab, &mut hints).await.contains(&Hint::Changed));
        lab.audit(&overlay).await;
        // The neighbours that went with the address were seen before it was set back.
        lab.converge(&overlay).await;
        let mac = overlay.wanted.links[&LinkId::Own(0)].mac.unwrap();
        assert!(ip("link show flannel.1").contains(&mac.to_string()), "what is published is what the kernel has");
    });
}
