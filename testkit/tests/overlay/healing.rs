//! Whatever somebody does to a node heals: kernel state and traffic are back, and foreign objects are as they were.

use std::collections::BTreeMap;
use std::panic::resume_unwind;
use std::time::{Duration, Instant};

use testkit::canary::{Canaries, Place, Where};
use testkit::sabotage::{Act, Plane};
use testkit::{Families, cases, wait_until};

use crate::support::{Cluster, PATIENCE};

/// Peers without a node, so that there is more to heal than one.
const PAPER_PEERS: u8 = 12;

cases! {
    fn every_act_of_sabotage_on_vxlan_heals_in_ipv4() = every_act_heals(Plane::Vxlan, Families::V4);
    fn every_act_of_sabotage_on_vxlan_heals_in_ipv6() = every_act_heals(Plane::Vxlan, Families::V6);
    fn every_act_of_sabotage_on_vxlan_heals_in_both_families() = every_act_heals(Plane::Vxlan, Families::Dual);
    fn every_act_of_sabotage_on_host_gw_heals_in_ipv4() = every_act_heals(Plane::HostGw, Families::V4);
    fn every_act_of_sabotage_on_host_gw_heals_in_ipv6() = every_act_heals(Plane::HostGw, Families::V6);
    fn every_act_of_sabotage_on_host_gw_heals_in_both_families() = every_act_heals(Plane::HostGw, Families::Dual);
    fn every_act_of_sabotage_on_udp_heals_in_ipv4() = every_act_heals(Plane::Udp, Families::V4);
    fn every_act_of_sabotage_on_udp_heals_in_ipv6() = every_act_heals(Plane::Udp, Families::V6);
    fn every_act_of_sabotage_on_udp_heals_in_both_families() = every_act_heals(Plane::Udp, Families::Dual);
}

/// What became of one act: from its end until the kernel was as before, and until pods talked.
struct Healed {
    act: Act,
    state: Duration,
    traffic: Duration,
}

fn every_act_heals(plane: Plane, families: Families) {
    let mut groups: BTreeMap<Vec<Place>, Vec<Act>> = BTreeMap::new();
    for act in Act::all(plane) {
        let places = [Place::Apart, Place::Main, Place::Uplink, Place::Device].into_iter();
        groups.entry(places.filter(|place| place.survives(act)).collect()).or_default().push(act);
    }
    let healed: Vec<Healed> = std::thread::scope(|scope| {
        let groups: Vec<_> =
            groups.iter().map(|(places, acts)| scope.spawn(|| acts_heal(plane, families, places, acts))).collect();
        groups.into_iter().flat_map(|group| group.join().unwrap_or_else(|panic| resume_unwind(panic))).collect()
    });
    let mut times: Vec<Duration> = healed.iter().map(|it| it.state.max(it.traffic)).collect();
    times.sort();
    for Healed { act, state, traffic } in &healed {
        eprintln!("{plane:?} {families:?}: {:<40} state {:>7.1?} traffic {:>7.1?}", act.name(), state, traffic);
    }
    eprintln!("{plane:?} {families:?}: p50 {:.1?}, max {:.1?}", times[times.len() / 2], times[times.len() - 1]);
}

/// Does the acts one after the other beside canaries that outlive them all.
fn acts_heal(plane: Plane, families: Families, places: &[Place], acts: &[Act]) -> Vec<Healed> {
    let cluster = Cluster::start(2, plane, families);
    cluster.store.insert((1..=PAPER_PEERS).map(|n| cluster.paper_peer(100 + n)));
    cluster.settle();
    let (node, target) = (cluster.node(0), cluster.target());
    let beside = cluster.paper_peer(101).subnets;
    // In IPv6 a foreign route to a peer, of whatever metric, keeps ours from being written anew.
    let peers: Vec<_> = beside.v4.into_iter().collect();
    let canaries = Canaries::place(node, &Where { places, overlay: &target, peers: &peers }).unwrap();
    let (before, wanted) = (canaries.snapshot().unwrap(), cluster.objects(0));
    let mut healed = Vec::new();
    for act in acts {
        act.apply(node, &target).unwrap();
        let ended = Instant::now();
        let state = wait_until(act.name(), PATIENCE, || Ok(cluster.objects(0) == wanted)).unwrap_or_else(|error| {
            let now = cluster.objects(0);
            let missing: Vec<_> = wanted.0.difference(&now.0).collect();
            let extra: Vec<_> = now.0.difference(&wanted.0).collect();
            panic!("{error}: missing {missing:#?}\nunwanted {extra:#?}\n{:#?}", cluster.status(0));
        });
        cluster.assert_traffic(0, 1);
        cluster.assert_traffic(1, 0);
        healed.push(Healed { act: *act, state, traffic: ended.elapsed() });
        cluster.converged(0);
        let changes = canaries.snapshot().unwrap().changes_since(&before);
        assert_eq!(changes, Vec::<String>::new(), "{} beside {places:?}", act.name());
    }
    assert_eq!(cluster.objects(0), wanted);
    assert_eq!(*cluster.status(0).flapping, []);
    healed
}
