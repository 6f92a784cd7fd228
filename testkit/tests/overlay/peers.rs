//! Peers that come and go, and such as no route can lead to.

use std::time::{Duration, Instant};

use flannel_core::net::Prefix;
use flannel_core::overlay::{Phase, Refusal, Status};
use testkit::sabotage::Plane;
use testkit::{Families, Route, UNDERLAY_LINK, wait_until};

use crate::support::{Cluster, PATIENCE};

/// Where the kernel keeps the host's own addresses and broadcast ones.
const LOCAL_TABLE: u32 = 255;

#[test]
fn peers_that_no_route_can_lead_to_keep_no_host_gw_node_from_being_ready() {
    let mut cluster = Cluster::start(2, Plane::HostGw, Families::V4);
    cluster.store.insert((1..=5).map(|n| cluster.paper_peer(100 + n)));
    cluster.settle();
    let before = cluster.objects(0);
    // No look at the main table tells that the kernel refuses this gateway.
    let refused = cluster.paper_peer(150);
    let gateway = refused.attrs.public_ip.v4.unwrap();
    let route = Route::to(Prefix::host(gateway)).dev(UNDERLAY_LINK).table(LOCAL_TABLE).kind("broadcast");
    cluster.ns(0).add_route(&route.scope(Route::LINK)).unwrap();
    let at = |n, addr: &str| {
        let mut lease = cluster.paper_peer(n);
        lease.attrs.public_ip.v4 = Some(addr.parse().unwrap());
        lease
    };
    let far = at(151, "198.51.100.9");
    let bad = [at(152, "10.89.255.255"), at(153, "10.89.0.0"), at(154, "10.89.0.11")];
    cluster.store.insert([&[refused.clone(), far.clone()][..], &bad].concat());
    let is_well = |status: &Status| {
        let of_refused = |refusal: &Refusal| refusal.peer.as_ref() == Some(&refused.key);
        status.phase == Phase::Ready
            && status.failed_writes == 0
            && status.refused.values().any(of_refused)
            && status.skipped.keys().any(|(key, _)| *key == far.key)
            && bad.iter().all(|lease| status.quarantined.contains_key(&lease.key))
    };
    cluster.until(0, "ready, with the trouble of each shown", is_well);
    assert_eq!(cluster.objects(0), before);
    // Others come and go, without a look at everything.
    quiet(&|| cluster.status(0).audits);
    let good = cluster.paper_peer(160);
    let route = format!("route {} ", good.subnets.v4.unwrap());
    let has_route = || cluster.objects(0).0.iter().any(|it| it.starts_with(&route));
    cluster.store.insert([good.clone()]);
    wait_until("a join", PATIENCE, || Ok(has_route())).unwrap();
    cluster.store.delete(&good.key);
    wait_until("a leave", PATIENCE, || Ok(!has_route())).unwrap();
    cluster.assert_traffic(0, 1);
    // One that starts with them is ready as well.
    cluster.crash(0);
    cluster.restart(0);
    cluster.until(0, "ready, with the trouble of each shown", is_well);
    assert_eq!(cluster.objects(0), before);
    cluster.assert_traffic(0, 1);
}

#[test]
fn a_peer_that_is_gone_before_anybody_looked_is_nobody() {
    let cluster = Cluster::start(2, Plane::Vxlan, Families::V4);
    let before = cluster.objects(0);
    let (store, paper) = (cluster.store.clone(), cluster.paper_peer(101));
    cluster
        .block_on(cluster.runtime().spawn(async move {
            store.insert([paper.clone()]);
            store.delete(&paper.key);
        }))
        .unwrap();
    cluster.store.insert([cluster.paper_peer(102)]);
    cluster.settle();
    assert_eq!(cluster.objects(0).0.difference(&before.0).count(), 3);
}

#[test]
fn joins_and_leaves_cause_no_audits() {
    for plane in [Plane::Vxlan, Plane::HostGw] {
        let cluster = Cluster::start(2, plane, Families::Dual);
        let audits = || cluster.status(0).audits;
        quiet(&audits);
        let before = (audits(), cluster.objects(0));
        let has = |text: &str| cluster.objects(0).0.iter().any(|it| it.starts_with(text));
        for n in 1..=50 {
            let lease = cluster.paper_peer(100 + n);
            let routes: Vec<_> = lease.subnets.iter().map(|(_, prefix)| format!("route {prefix} ")).collect();
            cluster.store.insert([lease.clone()]);
            wait_until("a join", PATIENCE, || Ok(routes.iter().all(|route| has(route)))).unwrap();
            cluster.store.delete(&lease.key);
            wait_until("a leave", PATIENCE, || Ok(!routes.iter().any(|route| has(route)))).unwrap();
        }
        // All at once, too.
        cluster.store.insert((1..=50).map(|n| cluster.paper_peer(100 + n)));
        cluster.settle();
        cluster.store.delete_all((1..=50).map(|n| cluster.paper_peer(100 + n).key).collect::<Vec<_>>().iter());
        cluster.settle();
        quiet(&audits);
        assert_eq!((audits(), cluster.objects(0)), before, "{plane:?}");
        assert_eq!(cluster.status(0).drift_repaired, 0);
    }
}

/// Waits until no audit has happened for a while.
fn quiet(audits: &dyn Fn() -> u64) {
    let mut last = (audits(), Instant::now());
    wait_until("no more audits", PATIENCE, || {
        if audits() != last.0 {
            last = (audits(), Instant::now());
        }
        Ok(last.1.elapsed() > Duration::from_millis(500))
    })
    .unwrap();
}
