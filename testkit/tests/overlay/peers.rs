//! What the store says, true or not.

use std::time::{Duration, Instant};

use flannel_core::lease::{BadRecord, Json, Lease, LeaseKey, Scalar};
use flannel_core::net::{Dual, Prefix};
use flannel_core::overlay::{Contact, Phase, Refusal, Status, WithheldBecause};
use flannel_core::testing::Fault;
use testkit::sabotage::Plane;
use testkit::{Families, Route, UNDERLAY_LINK, cases, wait_until};

use crate::support::{Cluster, PATIENCE, assert_no_loss};

/// Where the kernel keeps the host's own addresses and broadcast ones.
const LOCAL_TABLE: u32 = 255;

/// A lie, by the label of the rule it breaks.
fn lies(cluster: &Cluster) -> Vec<(&'static str, Lease)> {
    let own = cluster.lease(0);
    let peer = cluster.lease(1);
    let mut n = 199;
    let mut lie = |label: &'static str, change: &dyn Fn(&mut Lease)| {
        n += 1;
        let mut lease = cluster.paper_peer(n);
        lease.key = LeaseKey::new(&format!("lie-{n}-{label}"));
        change(&mut lease);
        (label, lease)
    };
    let v4 = |text: &str| Some(text.parse::<Prefix>().unwrap());
    let ip = |text: &str| Some(text.parse().unwrap());
    let mut found = vec![
        lie("outside-network", &|it| it.subnets.v4 = v4("10.89.0.0/24")),
        lie("outside-network", &|it| it.subnets.v4 = v4("0.0.0.0/0")),
        lie("whole-network", &|it| it.subnets.v4 = v4("10.244.0.0/16")),
        lie("overlap", &|it| it.subnets.v4 = own.subnets.v4),
        lie("overlap", &|it| it.subnets.v4 = peer.subnets.v4),
        lie("covers-address", &|it| it.subnets.v4 = v4("10.244.250.0/24")),
        lie("no-public-address", &|it| it.attrs.public_ip.v4 = None),
        lie("own-address", &|it| it.attrs.public_ip.v4 = own.attrs.public_ip.v4),
        lie("not-unicast", &|it| it.attrs.public_ip.v4 = ip("127.0.0.1")),
        lie("not-unicast", &|it| it.attrs.public_ip.v4 = ip("224.0.0.9")),
        lie("not-unicast", &|it| it.attrs.public_ip.v4 = ip("255.255.255.255")),
        lie("no-host", &|it| it.attrs.public_ip.v4 = ip("10.89.255.255")),
        lie("no-host", &|it| it.attrs.public_ip.v4 = ip("10.89.0.0")),
        lie("public-inside-network", &|it| it.attrs.public_ip.v4 = ip("10.244.3.3")),
        lie("wrong-type", &|it| it.attrs.backend_type = "udp".into()),
        lie("no-subnet", &|it| it.subnets = Dual::default()),
        lie("too-large", &|it| {
            it.attrs.backend_data.v4 = Some(Json::object(&[("x", Scalar::Text(&"x".repeat(5000)))]))
        }),
    ];
    if cluster.plane == Plane::Vxlan {
        let mac = |text: &str| Some(Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text(text))]));
        found.extend([
            lie("backend-data", &|it| it.attrs.backend_data.v4 = None),
            lie("backend-data", &|it| it.attrs.backend_data.v4 = mac("02:00:00:00:00:01:02:03")),
            lie("bad-mac", &|it| it.attrs.backend_data.v4 = mac("00:00:00:00:00:00")),
            lie("bad-mac", &|it| it.attrs.backend_data.v4 = mac("ff:ff:ff:ff:ff:ff")),
            lie("same-mac", &|it| it.attrs.backend_data = peer.attrs.backend_data.clone()),
        ]);
        let mut own_mac = lie("own-mac", &|it| it.attrs.backend_data = own.attrs.backend_data.clone()).1;
        // Which of two nodes of one address came first is the same everywhere; the first of them is we.
        own_mac.key = LeaseKey::new("lie-own-mac");
        found.push(("same-mac", own_mac));
    }
    found
}

cases! {
    fn hostile_records_are_quarantined_by_name_and_harm_nobody_on_vxlan() =
        hostile_records_harm_nobody(Plane::Vxlan, Families::V4);
    fn hostile_records_are_quarantined_by_name_and_harm_nobody_on_host_gw() =
        hostile_records_harm_nobody(Plane::HostGw, Families::V4);
}

fn hostile_records_harm_nobody(plane: Plane, families: Families) {
    let cluster = Cluster::start(2, plane, families);
    // Something of the host's own that lies inside the pod network.
    cluster.ns(0).add_address("eth0", "10.244.250.9".parse().unwrap(), 32).unwrap();
    cluster.store.insert((1..=5).map(|n| cluster.paper_peer(100 + n)));
    cluster.settle();
    let before = cluster.objects(0);
    let flow = cluster.flow(0, 1);
    let lies = lies(&cluster);
    cluster.store.insert(lies.iter().map(|(_, lease)| lease.clone()));
    let unreadable = BadRecord { reason: "not JSON".to_owned(), subnets: Dual::default() };
    cluster.store.insert_bad(&LeaseKey::new("lie-unreadable"), unreadable);
    let count = lies.len() + 1;
    let status = cluster.until(0, "wary of all lies", |status| status.quarantined.len() == count);
    for (label, lease) in &lies {
        let reason = status.quarantined.get(&lease.key).map(|reason| reason.label());
        assert_eq!(reason, Some(*label), "{}: {:?}", lease.key, status.quarantined.get(&lease.key));
    }
    cluster.converged(0);
    assert_eq!(cluster.objects(0), before);

    // A known peer that turns bad keeps its last good state; a healthy one joins as if nothing were.
    let mut turned = cluster.paper_peer(101);
    turned.attrs.backend_type = "udp".into();
    cluster.store.insert([turned]);
    let new = cluster.paper_peer(150);
    let started = Instant::now();
    cluster.store.insert([new.clone()]);
    let route = format!("route {} ", new.subnets.v4.unwrap());
    wait_until("the healthy peer", PATIENCE, || Ok(cluster.objects(0).0.iter().any(|it| it.starts_with(&route))))
        .unwrap();
    eprintln!("{plane:?}: a healthy peer joins among lies in {:.1?}", started.elapsed());
    cluster.converged(0);
    assert!(cluster.objects(0).0.is_superset(&before.0));
    cluster.run_on(&flow);
    assert_no_loss(flow);
}

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
            && status.undone == 0
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
fn a_store_that_is_away_changes_nothing_in_the_kernel() {
    for plane in [Plane::Vxlan, Plane::HostGw] {
        let cluster = Cluster::start(2, plane, Families::Dual);
        cluster.store.insert((1..=5).map(|n| cluster.paper_peer(100 + n)));
        cluster.settle();
        let before = cluster.objects(0);
        let flow = cluster.flow(0, 1);
        let mut events = cluster.agents[0].handle.events();
        cluster.store.fail_next([Fault::Unavailable, Fault::Denied, Fault::LostReply]);
        cluster.store.cut_watches();
        let away = |event: &_| matches!(event, flannel_core::overlay::Event::StoreLost(_));
        cluster.block_on(async {
            tokio::time::timeout(PATIENCE, async { while !away(&events.next().await.unwrap()) {} }).await.unwrap();
        });
        cluster.until(0, "in contact again", |status| status.store == Contact::Live);
        cluster.settle();
        assert_eq!(cluster.objects(0), before);
        cluster.run_on(&flow);
        assert_no_loss(flow);
    }
}

#[test]
fn a_snapshot_without_most_peers_deletes_nothing_at_once() {
    let mut cluster = Cluster::start(2, Plane::Vxlan, Families::V4);
    let papers: Vec<_> = (1..=20).map(|n| cluster.paper_peer(100 + n)).collect();
    cluster.store.insert(papers.clone());
    cluster.settle();
    let before = cluster.objects(0);
    let store = cluster.store.clone();
    let keys: Vec<_> = papers.iter().map(|lease| lease.key.clone()).collect();
    // On the one worker of the agents' runtime: no agent reads between the cut and the deletions.
    cluster
        .block_on(cluster.runtime().spawn(async move {
            store.cut_watches();
            store.delete_all(&keys);
        }))
        .unwrap();
    let status = cluster.until(0, "withholding deletions", |status| status.withheld.len() == papers.len());
    assert!(status.withheld.values().all(|why| matches!(why, WithheldBecause::MassRemoval(_))), "{status:?}");
    assert_eq!(status.withheld.len(), papers.len());
    // Pods and devices that are new may yet have a look to come.
    quiet(&|| cluster.status(0).audits);
    let audits = cluster.status(0).audits;
    cluster.assert_converged(0);
    assert_eq!(cluster.objects(0), before);

    // Additions go ahead, single removals too, and who comes back waits no longer.
    cluster.store.insert([cluster.paper_peer(150), papers[0].clone()]);
    let status = cluster.until(0, "additions", |status| status.withheld.len() == papers.len() - 1);
    assert_eq!(status.audits, audits);
    cluster.store.delete(&papers[0].key);
    let gone = format!("route {} ", papers[0].subnets.v4.unwrap());
    wait_until("a single removal", PATIENCE, || Ok(!cluster.objects(0).0.iter().any(|it| it.starts_with(&gone))))
        .unwrap();

    // A restart looks at what is in the kernel: the guard holds then, too.
    cluster.crash(0);
    cluster.restart(0);
    let status = cluster.until(0, "withholding deletions", |status| !status.withheld.is_empty());
    assert_eq!(status.withheld.len(), papers.len() - 1);
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
