use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use async_trait::async_trait;
use tokio::sync::watch;

use super::admitted::{Kept, READS, kept_by_bad_records};
use super::*;
use crate::backend::alloc::Alloc;
use crate::clock::BootTime;
use crate::firewall::Drift;
use crate::kernel::{FdbKey, LinkId, NeighbourKey, Op, OverlayName};
use crate::net::{Family, MacAddr};
use crate::overlay::{Held, HeldBecause, Overlay, Running, Teardown, WithheldBecause};
use crate::testing::fake_kernel::{FakeRoute, Placement};
use crate::testing::{FakeFirewall, FakeKernel, MemorySubnets, samples};

fn failed() -> FirewallError {
    FirewallError::Failed { doing: "nft list".to_owned(), reason: "no answer".to_owned() }
}

fn addresses(last: &[u8]) -> BTreeSet<IpAddr> {
    last.iter().map(|last| IpAddr::from([192, 0, 2, *last])).collect()
}

/// Starts an overlay with three peers.
fn overlay() -> (MemorySubnets, Running) {
    let store = MemorySubnets::new(samples::config(&[Family::V4], r#"{"Type":"alloc"}"#));
    store.insert((2..5).map(|n| samples::lease(n, &[Family::V4], "")));
    let kernel = FakeKernel::new();
    let eth0 = kernel.add_uplink("eth0", "192.0.2.1/24".parse().unwrap()).unwrap();
    let default = FakeRoute::via("0.0.0.0/0".parse().unwrap(), samples::node_address(Family::V4, 254), eth0);
    kernel.add_route(default, Placement::Exclusive).unwrap();
    let overlay = Overlay::builder().backend(Alloc::TYPE, |_| Ok(Alloc));
    let overlay = overlay.build(Arc::new(store.clone()), Arc::new(kernel)).unwrap();
    (store, overlay.spawn().unwrap())
}

/// Runs an overlay with its rules in `firewall`, calls `act` with each reported state until it returns false, and
/// returns when the rules end.
async fn kept(
    firewall: &FakeFirewall,
    options: KeepOptions,
    mut act: impl FnMut(&RulesState) -> bool,
) -> Result<(), FirewallError> {
    let (_store, running) = overlay();
    let handle = running.handle().clone();
    let (state, mut states) = watch::channel(RulesState::Pending);
    let options = KeepOptions { on_state: Arc::new(move |new| drop(state.send_replace(new))), ..options };
    let told = async {
        while states.changed().await.is_ok() {
            let state = states.borrow_and_update().clone();
            if !act(&state) {
                return;
            }
        }
    };
    let keeping = keep(&handle, firewall, options);
    tokio::pin!(keeping);
    tokio::select! {
        ended = &mut keeping => return ended,
        () = told => {}
    }
    running.shutdown(Teardown::Keep).await.unwrap();
    keeping.await
}

#[tokio::test(start_paused = true)]
async fn rules_are_written_with_the_lease_and_again_when_somebody_deletes_them() {
    let (firewall, former, name) = (FakeFirewall::new(), FakeFirewall::new(), OverlayName::default());
    let leftover = Rules::new(name.clone(), &Default::default(), &Default::default());
    former.apply(&leftover).await.unwrap();
    let options =
        KeepOptions { guarded_port: Some(8472), former: Some(Arc::new(former.clone())), ..KeepOptions::default() };
    let mut written = Vec::new();
    let ended = kept(&firewall, options, |state| {
        assert_eq!(*state, RulesState::InPlace);
        written.extend(firewall.rules(&name));
        firewall.delete(&name);
        written.len() < 3
    });
    assert_eq!(ended.await, Ok(()));
    let guard = written[0].guard.clone().unwrap();
    let peers = (2..5).map(|n| samples::node_address(Family::V4, n)).collect();
    assert_eq!((written.len(), guard.port, guard.peers), (3, 8472, peers));
    assert!(written.iter().all(|rules| rules == &written[0]) && written[0].masquerade.is_some());
    assert_eq!(former.rules(&name), None);
    assert_eq!(firewall.rules(&name), None, "nothing is written after the end");
}

#[tokio::test(start_paused = true)]
async fn what_passes_is_retried_and_what_cannot_pass_ends_it_where_the_rules_are_needed() {
    let name = OverlayName::default();
    let denied = FirewallError::Denied { doing: "nft".to_owned(), hint: "CAP_NET_ADMIN is needed".to_owned() };
    let forward_only = || KeepOptions { masquerade: None, ..KeepOptions::default() };
    for (failure, options, ends) in [
        (failed(), KeepOptions::default(), false),
        (denied.clone(), forward_only(), false),
        (denied.clone(), KeepOptions::default(), true),
    ] {
        let (firewall, states) = (FakeFirewall::new(), Mutex::new(Vec::new()));
        firewall.fail_with(Some(failure.clone()));
        let ended = kept(&firewall, options, |state| {
            firewall.fail_with(None);
            states.lock().unwrap().push(state.clone());
            *state != RulesState::InPlace
        });
        let ended = ended.await;
        let states = states.into_inner().unwrap();
        if ends {
            assert_eq!((ended, states), (Err(failure), vec![]));
            continue;
        }
        let text = chain(&failure);
        let first = if failure == denied { RulesState::WithoutForward(text) } else { RulesState::Failed(text) };
        assert_eq!((ended, states), (Ok(()), vec![first, RulesState::InPlace]));
        assert!(firewall.rules(&name).is_some());
    }
}

/// A firewall that counts calls.
#[derive(Default)]
struct Counted {
    firewall: FakeFirewall,
    writes: AtomicU32,
    checks: AtomicU32,
}

#[async_trait]
impl Firewall for Counted {
    async fn apply(&self, rules: &Rules) -> Result<(), FirewallError> {
        self.writes.fetch_add(1, Ordering::Relaxed);
        self.firewall.apply(rules).await
    }

    async fn check(&self, rules: &Rules) -> Result<Vec<Drift>, FirewallError> {
        self.checks.fetch_add(1, Ordering::Relaxed);
        self.firewall.check(rules).await
    }

    async fn let_in(&self, overlay: &OverlayName) -> Result<BTreeSet<IpAddr>, FirewallError> {
        self.firewall.let_in(overlay).await
    }

    async fn remove(&self, overlay: &OverlayName) -> Result<(), FirewallError> {
        self.firewall.remove(overlay).await
    }
}

#[tokio::test(start_paused = true)]
async fn peers_that_come_and_go_neither_repeat_a_failed_write_nor_delay_a_check() {
    for (failure, writes, checks) in [(Some(failed()), 3..=4, 0..=0), (None, 1..=1, 2..=3)] {
        let counted = Counted::default();
        counted.firewall.fail_with(failure);
        let (store, running) = overlay();
        let handle = running.handle().clone();
        let changes = async {
            let peer = samples::lease(9, &[Family::V4], "");
            for nth in 0_u32.. {
                match nth % 2 {
                    0 => store.insert([peer.clone()]),
                    _ => assert!(store.delete(&peer.key)),
                }
                sleep(GATHER / 4).await;
            }
        };
        tokio::select! {
            ended = keep(&handle, &counted, KeepOptions::default()) => panic!("{ended:?}"),
            () = changes => {}
            () = sleep(3 * RETRY) => {}
        }
        running.shutdown(Teardown::Keep).await.unwrap();
        let (written, checked) = (counted.writes.into_inner(), counted.checks.into_inner());
        assert!(writes.contains(&written) && checks.contains(&checked), "{written} writes, {checked} checks");
    }
}

/// A firewall that cannot be read the first `failures` times.
struct Unreadable {
    failures: u32,
    reads: AtomicU32,
}

#[async_trait]
impl Firewall for Unreadable {
    async fn apply(&self, _: &Rules) -> Result<(), FirewallError> {
        Err(failed())
    }

    async fn check(&self, _: &Rules) -> Result<Vec<Drift>, FirewallError> {
        Err(failed())
    }

    async fn let_in(&self, _: &OverlayName) -> Result<BTreeSet<IpAddr>, FirewallError> {
        match self.reads.fetch_add(1, Ordering::Relaxed) {
            nth if nth < self.failures => Err(failed()),
            _ => Ok(addresses(&[1])),
        }
    }

    async fn remove(&self, _: &OverlayName) -> Result<(), FirewallError> {
        Err(failed())
    }
}

#[tokio::test(start_paused = true)]
async fn a_former_guard_that_cannot_be_read_is_shown_and_delays_the_rules_for_some_tries_only() {
    for (failures, found, reads) in [(0, 1, 1), (2, 1, 3), (u32::MAX, 0, READS)] {
        let tool = Unreadable { failures, reads: AtomicU32::default() };
        let (state, states) = watch::channel(RulesState::Pending);
        let options =
            KeepOptions { on_state: Arc::new(move |new| drop(state.send_replace(new))), ..Default::default() };
        let name = OverlayName::default();
        let reading = Admitted::by_former_run(&tool, &name, &options);
        let admitted = tokio::time::timeout(Duration::from_secs(60), reading).await.unwrap();
        assert_eq!((admitted.formerly.len(), tool.reads.into_inner()), (found, reads));
        let shown = if failures == 0 { RulesState::Pending } else { RulesState::Failed(chain(&failed())) };
        assert_eq!(*states.borrow(), shown);
    }
}

#[test]
fn drift_that_goes_on_is_logged_once_a_minute() {
    let (mut drifts, start) = (Drifts::default(), Instant::now());
    let logged: Vec<_> = (0..30).filter_map(|nth| drifts.found(start + nth * Duration::from_secs(5))).collect();
    assert_eq!(logged, [0, 11, 11]);
}

#[test]
fn peers_that_were_let_in_stay_so_while_their_removal_waits() {
    let kept = Kept { prefixes: BTreeSet::new(), addresses: addresses(&[8, 9]) };
    let mut admitted = Admitted { formerly: addresses(&[1, 9]), so_far: addresses(&[1, 2]), kept: None };
    let with = |admitted: &Admitted, withheld: &[WithheldBecause]| admitted.with(addresses(&[3]), withheld.iter());
    assert_eq!(with(&admitted, &[WithheldBecause::MassRemoval(BootTime::default())]), addresses(&[1, 2, 3]));
    assert_eq!(with(&admitted, &[WithheldBecause::Unconfirmed]), addresses(&[1, 2, 3]));
    assert_eq!(with(&admitted, &[WithheldBecause::BadRecord]), addresses(&[3]));
    assert_eq!(with(&admitted, &[]), addresses(&[3]));
    admitted.kept = Some(kept);
    assert_eq!(with(&admitted, &[WithheldBecause::BadRecord]), addresses(&[3, 9]));
}

#[test]
fn a_bad_record_keeps_the_address_of_its_own_prefix_alone() {
    let held = |n: u8, because| {
        let (link, mac) = (LinkId::Own(0), MacAddr([2, 0, 0, 0, 0, n]));
        let addr = IpAddr::from([10, 5, n, 0]);
        let neighbour = Op::DeleteNeighbour { key: NeighbourKey { link, addr }, mac };
        let entry = Op::DeleteFdb { key: FdbKey { link, mac, nth: 0 }, dst: IpAddr::from([192, 0, 2, n]) };
        [Held { op: neighbour, because }, Held { op: entry, because: HeldBecause::StandsOnHeld }]
    };
    let bad = held(1, HeldBecause::Withheld(WithheldBecause::BadRecord));
    let others = [held(2, HeldBecause::Withheld(WithheldBecause::Unconfirmed)), held(3, HeldBecause::StandsOnHeld)];
    assert_eq!(kept_by_bad_records(&[bad.as_slice(), others.as_flattened()].concat()), addresses(&[1]));
}
