//! Routes: several to a prefix, blackholes, others' routes, and scopes.

use super::*;

#[test]
fn a_route_of_another_owner_survives_our_delete() {
    in_overlay(V4, 1, |lab, overlay| async move {
        let (prefix, route) = peer(Family::V4, OWN, 1).routes.remove(0);
        let ops = Arc::new(vec![Op::DeleteRoute { prefix, route }]);
        ip("route del 10.0.1.0/24");
        // To another gateway; and one that differs from ours in its protocol and metric alone.
        for theirs in ["via 192.0.2.9 proto static", "via 10.0.1.0 dev flannel.1 onlink metric 50 proto static"] {
            let theirs = format!("10.0.1.0/24 {theirs}");
            ip(&format!("route add {theirs}"));
            let report = lab.kernel.apply(&overlay.scope, Arc::clone(&ops)).await;
            assert!(matches!(report.refused.as_slice(), [(0, KernelError::Refused { .. })]), "{report:?}");
            assert_eq!(ip("route show 10.0.1.0/24").lines().count(), 1);
            ip(&format!("route del {theirs}"));
        }
    });
}

#[test]
fn a_blackhole_reads_back_in_both_families_and_goes() {
    in_lab(|lab| async move {
        let mut overlay = Overlay::vxlan(DUAL, 0);
        let bare = overlay.clone();
        for family in Family::BOTH {
            let prefix = subnet(family, 9);
            let route = Route::blackhole(prefix);
            overlay.wanted.routes.insert(RouteKey { prefix, nth: 0 }, route);
        }
        lab.converge(&overlay).await;
        lab.converge(&bare).await;
    });
}

#[test]
fn a_blackhole_makes_way_for_the_bridge_that_comes_later_and_is_back_without_it() {
    in_lab(|lab| async move {
        let mut overlay = Overlay::vxlan(V4, 0);
        let prefix = subnet(Family::V4, 9);
        let route = Route::blackhole(prefix);
        overlay.wanted.routes.insert(RouteKey { prefix, nth: 0 }, route);
        lab.converge(&overlay).await;
        ip("link add cni0 type bridge");
        ip("addr add 10.0.9.1/24 dev cni0");
        ip("link set cni0 up");
        assert!(ip("route show 10.0.9.0/24").contains("blackhole"), "{}", ip("route"));
        lab.converge(&overlay).await;
        assert!(ip("route get 10.0.9.7").contains("dev cni0"));
        ip("link delete cni0");
        lab.converge(&overlay).await;
        assert!(ip("route show 10.0.9.0/24").contains("blackhole"), "{}", ip("route"));
    });
}

#[test]
fn routes_through_the_uplink_come_and_go() {
    in_lab(|lab| async move {
        let mut overlay = Overlay::vxlan(V4, 0);
        let bare = overlay.clone();
        let prefix = subnet(Family::V4, 9);
        let route = Route::direct(prefix, "192.0.2.9".parse().unwrap(), LinkId::Uplink);
        overlay.wanted.routes.insert(RouteKey { prefix, nth: 0 }, route);
        lab.converge(&overlay).await;
        assert!(ip("route").contains("10.0.9.0/24 via 192.0.2.9 dev up0"));
        lab.converge(&bare).await;
    });
}

/// Another table, another metric, and both; one beyond what the header of a route has room for.
const SLOTS: [RouteSlot; 4] =
    [RouteSlot::new(100, 0), RouteSlot::new(254, 50), RouteSlot::new(100, 7), RouteSlot::new(1000, 4)];

#[test]
fn several_routes_to_a_prefix_come_and_go_by_table_metric_and_source() {
    in_lab(|lab| async move {
        let mut overlay = Overlay::vxlan(DUAL, 2);
        overlay.scope.slots = SLOTS.to_vec();
        for (nth, slot) in (1..).zip(SLOTS) {
            for (device, family) in (0u8..).zip(Family::BOTH) {
                let (prefix, route) = peer(family, LinkId::Own(device), 1).routes.remove(0);
                let source = match family {
                    Family::V4 => "192.0.2.1",
                    Family::V6 => "2001:db8::1",
                };
                let route = route.in_slot(slot).with_source(Some(source.parse().unwrap()));
                overlay.wanted.routes.insert(RouteKey { prefix, nth }, route);
            }
        }
        lab.converge(&overlay).await;
        assert!(ip("route show table 1000").contains("10.0.1.0/24 via 10.0.1.0 dev flannel.1"));
        assert!(ip("-6 route show table 100").contains("metric 7"));
        // Somebody's in slots of ours and in others: those of our protocol are ours in ours alone.
        ip("route add 10.0.2.0/24 via 192.0.2.9 table 101 proto 210");
        ip("route add 10.0.2.0/24 via 192.0.2.9 metric 51 proto 210");
        ip("route add 10.0.2.0/24 via 192.0.2.9 table 1000 metric 4 proto static");
        ip("route add 10.0.2.0/24 via 192.0.2.9 table 100 proto 210");
        let found = lab.plan(&overlay).await.ops;
        assert!(matches!(&found[..], [Op::DeleteRoute { route, .. }] if route.slot() == SLOTS[0]), "{found:?}");
        lab.converge(&overlay).await;
        // One goes, and the others to the same prefix stay.
        for slot in [SLOTS[1], RouteSlot::MAIN] {
            overlay
                .wanted
                .routes
                .retain(|key, route| key.nth == 0 && key.prefix == subnet(Family::V4, 2) || route.slot() != slot);
            lab.converge(&overlay).await;
        }
        for change in [
            "10.0.1.0/24 dev flannel.1 via 10.0.1.0 onlink table 100 proto 205",
            "fd00:0:0:1::/64 dev up0 table 100 metric 7 proto 205",
        ] {
            let family = if change.starts_with("fd") { "-6" } else { "-4" };
            ip(&format!("{family} route replace {change}"));
            assert!(!lab.plan(&overlay).await.is_empty(), "{change}");
            lab.converge(&overlay).await;
        }
        overlay.wanted = overlay.without_peers().wanted;
        lab.converge(&overlay).await;
        let left = ["-4 route show table all 10.0.2.0/24", "-4 route show table all 10.0.1.0/24"].map(ip);
        assert_eq!((left[0].lines().count(), left[1].lines().count()), (3, 0), "{left:?}");
    });
}

/// As many peers as are not yet many.
const FEW: u32 = 16_384;

/// The scopes of the routes to some peers.
fn scopes(peers: impl IntoIterator<Item = u32>) -> Vec<u8> {
    peers
        .into_iter()
        .map(|n| {
            let line = ip(&format!("route show {}", subnet(Family::V4, n)));
            assert_eq!(line.lines().count(), 1, "{line}");
            let scope = line.split(" scope ").nth(1).map(|rest| rest.split(' ').next().unwrap().parse().unwrap());
            scope.unwrap_or(0)
        })
        .collect()
}

#[test]
fn routes_have_scopes_only_where_there_are_many_and_keep_the_ones_they_have() {
    in_lab(|lab| async move {
        let few = Overlay::vxlan(V4, FEW);
        lab.converge(&few).await;
        assert!(!ip("route show table main").contains("scope 1"), "no more than {FEW} are few");
        // Peers that join one by one: nothing else is rewritten.
        let mut many = few.clone();
        for n in FEW + 1..=FEW + 3 {
            let joining = peer(Family::V4, OWN, n);
            let mut round = State::default();
            round.add(&joining);
            let plan = flannel_core::plan::plan(&round, &State::default(), &few.scope, &|_| None);
            assert_eq!(plan.ops.len(), 3);
            assert!(lab.kernel.apply(&few.scope, Arc::new(plan.ops)).await.is_complete());
            many.wanted.add(&joining);
        }
        let expected = |n| Route::scope_for(&subnet(Family::V4, n));
        let joined = FEW + 1..=FEW + 3;
        assert_eq!(scopes(joined.clone()), joined.clone().map(expected).collect::<Vec<_>>());
        assert_eq!(scopes(1..=3), [0; 3]);
        // An audit that finds many is content with either form, and writes what is missing or Go flannel's with scopes.
        lab.assert_converged(&many).await;
        ip("route del 10.0.1.0/24");
        ip("route replace 10.0.2.0/24 via 10.0.2.0 dev flannel.1 onlink");
        lab.converge(&many).await;
        assert_eq!(scopes(1..=3), [expected(1), expected(2), 0]);
        assert!(
            ip("route show 10.0.2.0/24").contains(&format!("proto {}", Route::protocol_for(&subnet(Family::V4, 2))))
        );
        // A delete takes either form, and once they are few again so is what is written.
        lab.converge(&few.without_peers()).await;
        assert!(!ip("route show table main").contains("flannel.1"));
        lab.converge(&Overlay::vxlan(V4, 3)).await;
        assert_eq!(scopes(1..=3), [0; 3]);
    });
}

#[test]
fn a_start_with_many_peers_spreads_all_routes_and_go_flannel_takes_them_over() {
    in_overlay(V4, FEW + 1, |lab, overlay| async move {
        let some = [1, 2, 3, FEW];
        assert_eq!(scopes(some), some.map(|n| Route::scope_for(&subnet(Family::V4, n))));
        // As Go flannel does when it starts.
        ip("route replace 10.0.1.0/24 via 10.0.1.0 dev flannel.1 onlink");
        assert_eq!(scopes([1]), [0]);
        // And back: what it has rewritten is taken over, what it has not is as wanted.
        let plan = lab.plan(&overlay).await;
        assert!(matches!(plan.ops.as_slice(), [Op::ReplaceRoute { .. }]), "{plan:?}");
        lab.converge(&overlay).await;
    });
}
