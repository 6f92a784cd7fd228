//! The machine by itself: no runtime, no kernel, no store.

use crate::kernel::{
    ApplyReport, Device, Hint, HostFacts, Link, LinkId, LinkKind, LinkName, Op, OverlayName, PeerState, Route,
    RouteKey, State, Vxlan,
};
use std::sync::Arc;
use std::time::Duration;

use super::{Input, KernelCall, Machine};
use crate::admit::Reason;
use crate::agent::{ConfigPolicy, Event};
use crate::agent::{Phase, Settings, Status, StoreCall};
use crate::backend::{LocalNode, MockBackend, NodeContext, Peer};
use crate::backoff::Jitter;
use crate::clock::BootTime;
use crate::config::{Allocation, NetworkConfig};
use crate::lease::{BadRecord, Json, Lease, LeaseAttrs, LeaseEvent, LeaseKey, MAX_RECORDS, RECORD_BYTES, Record};
use crate::net::{Dual, Family, MacAddr, Prefix, Vni};
use crate::subnet::SubnetError;
use crate::testing::samples::{self, at_millis as at};

mod former_networks;
mod limitations;

const V4: &[Family] = &[Family::V4];

fn device() -> Link {
    let kind = Vxlan {
        port: Some(8472),
        local: Some(samples::node_address(Family::V4, 1)),
        lower: Some(LinkId::Uplink),
        ..Vxlan::new(Vni::new(1).unwrap())
    };
    Link {
        name: LinkName::new("tun4.1").unwrap(),
        kind: LinkKind::Vxlan(kind),
        mac: Some(MacAddr([2, 0, 0, 0, 0, 1])),
        mtu: 1450,
        up: true,
        group: OverlayName::default().mark(),
        alias: Some(OverlayName::default().alias().into()),
    }
}

/// A backend with one device and nothing for peers.
fn backend() -> MockBackend {
    backend_with(|_| PeerState::default())
}

/// A backend with one device and this for peers.
fn backend_with(state: impl Fn(&Peer) -> PeerState + Send + 'static) -> MockBackend {
    backend_on(device(), state)
}

/// A backend that wants this one device, and this for peers.
fn backend_on(link: Link, state: impl Fn(&Peer) -> PeerState + Send + 'static) -> MockBackend {
    let mut backend = MockBackend::new();
    backend.expect_wire_type().return_const("tunnel");
    backend.expect_slots().returning(Vec::new);
    backend.expect_mtu().returning(|_| None);
    backend.expect_hardware_address().returning(|_, _| Ok(None));
    backend.expect_advertise().returning(|_| Ok(LeaseAttrs::default()));
    backend.expect_devices().returning(|_| vec![Device { name: device().name, kind: device().kind }]);
    let base = move |_: &_| State { links: [(LinkId::Own(0), link.clone())].into(), ..State::default() };
    backend.expect_base().returning(base);
    backend.expect_peer().returning(move |_, peer, _| Ok(state(peer)));
    backend
}

fn settings() -> Settings {
    Settings::new()
}

fn config() -> NetworkConfig {
    samples::config(V4, r#"{"Type":"tunnel"}"#)
}

fn machine() -> Machine {
    machine_on(samples::host(), backend())
}

/// A machine whose store never returns its configuration.
fn machine_on(host: HostFacts, backend: MockBackend) -> Machine {
    let context = NodeContext { host: Arc::new(host), ..samples::context(config()) };
    let local: LocalNode = samples::local(context, samples::lease(1, V4, "tunnel").attrs);
    let status = Status::default();
    let mut machine = Machine::new(Arc::new(settings()), Arc::new(backend), local, status, at(0), Jitter::seeded(1));
    machine.reconfiguration.ask();
    assert!(machine.config_call(at(0)));
    machine
}

fn own_record() -> LeaseEvent {
    LeaseEvent::Reset(vec![Record::of(samples::lease(1, V4, "tunnel"), 1)])
}

/// Answers kernel calls from `seen`, refusing every write, until nothing is due at `now`.
fn serve(machine: &mut Machine, now: BootTime, seen: &State) -> usize {
    let mut calls = 0;
    while let Some(call) = machine.kernel_call(now) {
        calls += 1;
        assert!(calls < 100, "the machine never comes to rest");
        let answer = match call {
            KernelCall::Facts(_) => Input::Facts(Ok(samples::host())),
            KernelCall::Observe(_) => Input::Seen(Ok(seen.clone())),
            KernelCall::Apply(_, ops) => Input::Applied(refuse(ops.len())),
        };
        machine.handle(now, answer);
    }
    calls
}

fn refuse(ops: usize) -> ApplyReport {
    let error = || crate::kernel::KernelError::Refused { doing: "writing".into(), errno: 16, message: String::new() };
    ApplyReport { refused: (0..ops).map(|place| (place, error())).collect(), ..ApplyReport::default() }
}

/// A list of this many bad records, without this node's own.
fn bad_records(count: usize) -> LeaseEvent {
    let bad =
        |n: usize| Record::bad(LeaseKey::new(&n.to_string()), n as u64, BadRecord::new("no JSON", Dual::default()));
    LeaseEvent::Reset((0..count).map(bad).collect())
}

#[test]
fn a_list_of_more_than_is_held_does_not_say_that_the_own_record_is_gone() {
    let mut machine = machine();
    machine.handle(at(0), Input::Store(Ok(own_record())));
    machine.handle(at(1), Input::Store(Ok(bad_records(MAX_RECORDS + 1))));
    assert!(machine.held_lease().is_some() && machine.store_call(at(1)).is_none());
    let trouble = machine.status.own_trouble.clone();
    assert!(matches!(trouble, Some(Reason::TooMany)), "the youngest are left out, and so by other nodes: {trouble:?}");
    machine.handle(at(2), Input::Store(Ok(bad_records(MAX_RECORDS))));
    assert!(machine.held_lease().is_none());
}

#[test]
fn a_lease_that_has_run_out_is_not_renewed_though_no_wake_has_said_so() {
    let context = NodeContext { host: Arc::new(samples::host()), ..samples::context(config()) };
    let mut local = samples::local(context, samples::lease(1, V4, "tunnel").attrs);
    local.lease = Arc::new(Lease { expires: Some(at(60_000)), ..(*local.lease).clone() });
    let status = Status::default();
    let mut machine = Machine::new(Arc::new(settings()), Arc::new(backend()), local, status, at(0), Jitter::seeded(1));
    // The host was suspended, and a question wakes the agent.
    assert!(matches!(machine.store_call(at(60_000)), Some(StoreCall::Acquire(_))));
    assert!(machine.held_lease().is_none());
}

/// Makes the machine read this host once.
fn read(machine: &mut Machine, now: BootTime, host: &HostFacts) {
    machine.handle(now, Input::Hint(Hint::FactsChanged));
    loop {
        let answer = match machine.kernel_call(now).unwrap() {
            KernelCall::Facts(_) => return machine.handle(now, Input::Facts(Ok(host.clone()))),
            KernelCall::Observe(_) => Input::Seen(Ok(State::default())),
            KernelCall::Apply(_, ops) => Input::Applied(refuse(ops.len())),
        };
        machine.handle(now, answer);
    }
}

fn without(family: Family) -> HostFacts {
    let mut host = samples::host();
    host.addresses.retain(|address| Family::of(address.addr) != family);
    host
}

fn gone() -> Input {
    Input::Store(Ok(LeaseEvent::Reset(Vec::new())))
}

#[test]
fn no_lease_is_taken_by_an_address_that_the_host_has_lost() {
    let mut machine = machine();
    machine.handle(at(0), Input::Store(Ok(own_record())));
    serve(&mut machine, at(0), &State::default());
    read(&mut machine, at(1_000), &without(Family::V4));
    machine.handle(at(2_000), gone());
    assert!(machine.held_lease().is_none());
    assert!(machine.store_call(at(9_000)).is_none(), "another node may have the address by now, and its record");
    read(&mut machine, at(9_000), &without(Family::V4));
    assert_eq!(machine.renewal.deadline(), None, "nothing wakes the agent for a call that is not made");
    read(&mut machine, at(10_000), &samples::host());
    assert!(matches!(machine.store_call(at(10_000)), Some(StoreCall::Acquire(_))));
}

#[test]
fn a_lease_is_taken_again_though_an_address_that_does_not_identify_the_node_is_gone() {
    const BOTH: &[Family] = &Family::BOTH;
    let context = samples::context(samples::config(BOTH, r#"{"Type":"tunnel"}"#));
    let local = samples::local(context, samples::lease(1, BOTH, "tunnel").attrs);
    let status = Status::default();
    let mut machine = Machine::new(Arc::new(settings()), Arc::new(backend()), local, status, at(0), Jitter::seeded(1));
    let own = Record::of(samples::lease(1, BOTH, "tunnel"), 1);
    machine.handle(at(0), Input::Store(Ok(LeaseEvent::Reset(vec![own]))));
    serve(&mut machine, at(0), &State::default());
    read(&mut machine, at(1_000), &without(Family::V6));
    machine.handle(at(2_000), gone());
    read(&mut machine, at(9_000), &without(Family::V6));
    assert!(matches!(machine.store_call(at(9_000)), Some(StoreCall::Acquire(_))));
}

#[test]
fn the_host_is_read_before_a_lost_lease_is_acquired_again() {
    let mut machine = machine();
    machine.handle(at(0), Input::Store(Ok(own_record())));
    serve(&mut machine, at(0), &State::default());
    machine.handle(at(9_000), gone());
    assert!(machine.store_call(at(9_000)).is_none(), "the host may have slept, and the address be another's");
    assert!(matches!(machine.kernel_call(at(9_000)), Some(KernelCall::Facts(_))));
    assert!(machine.store_call(at(9_000)).is_none());
    machine.handle(at(9_000), Input::Facts(Ok(samples::host())));
    assert!(matches!(machine.store_call(at(9_000)), Some(StoreCall::Acquire(_))));
}

#[test]
fn a_record_that_another_node_writes_under_a_lost_address_is_that_nodes() {
    let edited = || {
        let mut lease = samples::lease(1, V4, "tunnel");
        lease.attrs.backend_data.v4 = Some(Json::object(&[("other", crate::lease::Scalar::Number(1))]));
        Input::Store(Ok(LeaseEvent::Upsert(Record::of(lease, 1))))
    };
    for (host, is_held) in [(samples::host(), true), (without(Family::V4), false)] {
        let mut machine = machine();
        machine.handle(at(0), Input::Store(Ok(own_record())));
        serve(&mut machine, at(0), &State::default());
        read(&mut machine, at(1_000), &host);
        machine.handle(at(2_000), edited());
        assert_eq!(machine.held_lease().is_some(), is_held);
        let call = machine.store_call(at(9_000));
        assert_eq!(matches!(call, Some(StoreCall::Renew(_))), is_held, "{call:?}");
    }
}

#[test]
fn a_list_that_drops_records_and_leaves_room_is_asked_for_again_with_growing_pauses() {
    let mut machine = machine();
    let own = Record::of(samples::lease(1, V4, "tunnel"), 1);
    let mut lease = samples::lease(2, V4, "tunnel");
    lease.attrs.backend_data.v4 = Json::parse(&format!("\"{}\"", "x".repeat(MAX_RECORDS * RECORD_BYTES))).ok();
    let huge = Record::of(lease, 2);
    let list = || Input::Store(Ok(LeaseEvent::Reset(vec![own.clone(), huge.clone()])));
    let (mut now, mut lists) = (at(0), 0);
    machine.handle(now, list());
    while now < at(60_000) {
        serve(&mut machine, now, &State::default());
        if machine.take_relist(now) {
            lists += 1;
            assert!(!machine.take_relist(now), "one is under way");
            machine.handle(now, list());
            assert!(!machine.take_relist(now), "asked for again without a pause");
        }
        let deadline = machine.deadline().unwrap();
        assert!(deadline > now, "due at {deadline:?} and not served at {now:?}");
        now = deadline;
        machine.handle(now, Input::Timer);
    }
    assert!((5..10).contains(&lists), "{lists} lists in a minute");
}

#[test]
fn after_all_that_is_due_was_served_the_next_deadline_lies_ahead() {
    let mut machine = machine();
    let former: Prefix = "10.99.0.0/16".parse().unwrap();
    machine.look_after(vec![former]);
    machine.handle(at(0), Input::Store(Ok(own_record())));
    // The device is missing, a route is left in the former network, and every write is refused.
    let left: Prefix = "10.99.1.0/24".parse().unwrap();
    let route = Route::overlay(left, left.addr(), LinkId::Own(0));
    let seen = State { routes: [(RouteKey { prefix: left, nth: 0 }, route)].into(), ..State::default() };
    let mut now = at(0);
    for step in 0..2000 {
        if step % 7 == 0 {
            let peer = Record::of(samples::lease(2 + (step % 5) as u8, V4, "tunnel"), 2 + step);
            machine.handle(now, Input::Store(Ok(LeaseEvent::Upsert(peer))));
        }
        serve(&mut machine, now, &seen);
        assert!(machine.store_call(now).is_none());
        let deadline = machine.deadline().unwrap();
        assert!(deadline > now, "step {step}: due at {deadline:?} and not served at {now:?}");
        now = deadline;
        machine.handle(now, Input::Timer);
    }
}

/// A state with the device, its peer's route and nothing else.
fn with_route(prefix: Prefix, route: Route) -> State {
    let routes = [(RouteKey { prefix, nth: 0 }, route)].into();
    State { links: [(LinkId::Own(0), device())].into(), routes, ..State::default() }
}

/// Serves the calls that are due at `now`, with every write done. Returns the writes.
fn written(machine: &mut Machine, now: BootTime, host: &HostFacts, seen: &State) -> Vec<Op> {
    let mut ops = Vec::new();
    while let Some(call) = machine.kernel_call(now) {
        let answer = match call {
            KernelCall::Facts(_) => Input::Facts(Ok(host.clone())),
            KernelCall::Observe(_) => Input::Seen(Ok(seen.clone())),
            KernelCall::Apply(_, due) => {
                ops.extend(due.iter().cloned());
                Input::Applied(ApplyReport { applied: due.len(), ..ApplyReport::default() })
            }
        };
        machine.handle(now, answer);
    }
    ops
}

/// The host of the samples, whose addresses have no connected routes.
fn unconnected() -> HostFacts {
    HostFacts { on_link: Default::default(), ..samples::host() }
}

#[test]
fn a_direct_route_without_its_connected_route_is_replaced_after_a_while_and_shown_until_then() {
    let prefix = samples::node_subnet(Family::V4, 2);
    let tunnel = Route::overlay(prefix, prefix.addr(), LinkId::Own(0));
    let direct = Route::direct(prefix, samples::node_address(Family::V4, 2), LinkId::Uplink);
    let its_route = tunnel.clone();
    let wanted = move |_: &Peer| PeerState::default().with_route(prefix, its_route.clone());
    let mut machine = machine_on(unconnected(), backend_with(wanted));
    let peer = Record::of(samples::lease(2, V4, "tunnel"), 2);
    machine.handle(at(0), Input::Store(Ok(own_record())));
    machine.handle(at(0), Input::Store(Ok(LeaseEvent::Upsert(peer))));
    let seen = with_route(prefix, direct.clone());
    assert_eq!(written(&mut machine, at(0), &unconnected(), &seen), []);
    let status = machine.status.clone();
    assert_eq!((status.phase, status.withheld.contains_key(&prefix)), (Phase::Ready, true));
    let (mut now, mut ops) = (at(0), Vec::new());
    while ops.is_empty() && now < at(60_000) {
        now = machine.deadline().unwrap();
        machine.handle(now, Input::Timer);
        ops = written(&mut machine, now, &unconnected(), &seen);
    }
    assert_eq!(ops, [Op::ReplaceRoute { prefix, change: Box::new((direct, tunnel.clone())) }]);
    assert_eq!(now, at(10_000));
    let status = machine.status.clone();
    assert_eq!((status.phase, status.withheld.len()), (Phase::Ready, 0));
    // Served: the timer sleeps until something else is due.
    written(&mut machine, now, &unconnected(), &with_route(prefix, tunnel));
    assert!(machine.deadline().unwrap() > now);
}

#[test]
fn a_shared_mac_address_sets_no_deadline_that_waits_for_the_kernel() {
    let mac = MacAddr([2, 0, 0, 0, 0, 1]);
    let mut backend = MockBackend::new();
    backend.expect_wire_type().return_const("tunnel");
    backend.expect_slots().returning(Vec::new);
    backend.expect_mtu().returning(|_| None);
    backend.expect_hardware_address().returning(move |_, _| Ok(Some(mac)));
    backend.expect_devices().returning(|_| Vec::new());
    let attrs = samples::lease(1, V4, "tunnel").attrs;
    backend.expect_advertise().returning(move |_| Ok(attrs.clone()));
    let local = samples::local(samples::context(config()), samples::lease(1, V4, "tunnel").attrs);
    let status = Status::default();
    let mut machine = Machine::new(Arc::new(settings()), Arc::new(backend), local, status, at(0), Jitter::seeded(1));
    let older = Record::of(samples::lease(2, V4, "tunnel"), 1);
    let own = Record::of(samples::lease(1, V4, "tunnel"), 2);
    machine.handle(at(0), Input::Store(Ok(LeaseEvent::Reset(vec![older, own]))));
    // Neither kernel nor store answers.
    assert!(machine.kernel_call(at(0)).is_some() && machine.config_call(at(0)));
    let mut now = at(0);
    for _ in 0..5 {
        machine.handle(now, Input::Timer);
        let deadline = machine.deadline().unwrap();
        assert!(deadline > now, "due at {deadline:?} and not served at {now:?}");
        now = deadline;
    }
}

/// A node with `peers` programmed peers, and the state of its kernel.
fn with_peers(peers: u8) -> (Machine, State) {
    let route =
        |peer: &Peer| peer.subnets.v4.map(|prefix| (prefix, Route::overlay(prefix, prefix.addr(), LinkId::Own(0))));
    let mut machine = machine_on(
        samples::host(),
        backend_with(move |peer| PeerState { routes: route(peer).into_iter().collect(), ..PeerState::default() }),
    );
    let records = (1..=peers + 1).map(|n| Record::of(samples::lease(n, V4, "tunnel"), n.into()));
    machine.handle(at(0), Input::Store(Ok(LeaseEvent::Reset(records.collect()))));
    let mut seen = State { links: [(LinkId::Own(0), device())].into(), ..State::default() };
    for op in written(&mut machine, at(0), &samples::host(), &seen.clone()) {
        let Op::CreateRoute { prefix, route } = op else { panic!("{op:?}") };
        seen.routes.insert(RouteKey { prefix, nth: 0 }, route);
    }
    assert_eq!(seen.routes.len(), usize::from(peers));
    (machine, seen)
}

/// Peers 2 to `last + 1` leave, one every `pace`. Returns how many routes were deleted until the last had left.
fn leave_one_by_one(machine: &mut Machine, seen: &mut State, last: u8, pace: Duration) -> usize {
    let mut deleted = 0;
    for n in 2..=last + 1 {
        let now = at(1000).after(pace * u32::from(n));
        machine.handle(now, Input::Store(Ok(LeaseEvent::Remove(samples::lease(n, V4, "tunnel").key))));
        if pace > Duration::ZERO || n == last + 1 {
            deleted += delete(machine, now, seen);
        }
    }
    deleted
}

fn delete(machine: &mut Machine, now: BootTime, seen: &mut State) -> usize {
    let ops = written(machine, now, &samples::host(), &seen.clone());
    for op in &ops {
        let Op::DeleteRoute { prefix, .. } = op else { panic!("{op:?}") };
        seen.routes.remove(&RouteKey { prefix: *prefix, nth: 0 });
    }
    ops.len()
}

#[test]
fn most_peers_that_leave_at_once_one_by_one_are_deleted_after_a_minute() {
    let (mut machine, mut seen) = with_peers(20);
    assert_eq!(leave_one_by_one(&mut machine, &mut seen, 20, Duration::ZERO), 0);
    assert_eq!((machine.status.withheld.len(), seen.routes.len()), (20, 20));
    assert_eq!(machine.guard.protected.judged, 1, "a burst is judged as one");
    // A peer that returns is in use, and none of its objects wait.
    let back = Record::of(samples::lease(2, V4, "tunnel"), 30);
    machine.handle(at(5000), Input::Store(Ok(LeaseEvent::Upsert(back))));
    assert_eq!(delete(&mut machine, at(5000), &mut seen), 0);
    assert_eq!(machine.status.withheld.len(), 19);
    let (mut now, mut deleted) = (at(5000), 0);
    while deleted == 0 {
        now = machine.deadline().unwrap();
        machine.handle(now, Input::Timer);
        deleted = delete(&mut machine, now, &mut seen);
    }
    assert_eq!((deleted, seen.routes.len(), machine.status.withheld.len()), (19, 1, 0));
    assert!(now >= at(61_000), "{now:?}");
}

#[test]
fn of_a_stream_of_removals_the_last_quarter_waits_and_a_slow_one_is_carried_out() {
    let (mut machine, mut seen) = with_peers(20);
    // The 16th is more than three quarters.
    assert_eq!(leave_one_by_one(&mut machine, &mut seen, 20, Duration::from_millis(200)), 15);
    assert_eq!((machine.status.withheld.len(), seen.routes.len()), (5, 5));
    let (mut machine, mut seen) = with_peers(20);
    assert_eq!(leave_one_by_one(&mut machine, &mut seen, 20, Duration::from_secs(1)), 20);
    assert_eq!((machine.status.withheld.len(), seen.routes.len()), (0, 0));
}

#[test]
fn deletions_that_wait_are_told_once_and_again_when_twice_as_many_do() {
    let told = |machine: &mut Machine| -> Vec<usize> {
        let number = |event| if let Event::DeletionsWithheld(number) = event { Some(number) } else { None };
        machine.take_events().into_iter().filter_map(number).collect()
    };
    let join = |machine: &mut Machine, seen: &mut State, n: u8, now: BootTime| {
        let record = Record::of(samples::lease(n, V4, "tunnel"), 30);
        machine.handle(now, Input::Store(Ok(LeaseEvent::Upsert(record))));
        assert_eq!(delete(machine, now, seen), 0);
    };
    let (mut machine, mut seen) = with_peers(20);
    leave_one_by_one(&mut machine, &mut seen, 20, Duration::from_millis(200));
    assert_eq!((told(&mut machine), machine.status.withheld.len()), (vec![1, 2, 4], 5));
    let (mut machine, mut seen) = with_peers(20);
    leave_one_by_one(&mut machine, &mut seen, 20, Duration::ZERO);
    assert_eq!(told(&mut machine), [20]);
    for n in 2..=20 {
        join(&mut machine, &mut seen, n, at(5000 + u64::from(n)));
    }
    assert_eq!((told(&mut machine), machine.status.withheld.len()), (vec![], 1));
    // Once no deletion waits, the next removal counts as a new one.
    join(&mut machine, &mut seen, 21, at(6000));
    leave_one_by_one(&mut machine, &mut seen, 20, Duration::ZERO);
    assert_eq!(told(&mut machine), [20]);
}

#[test]
fn peers_that_join_and_leave_one_after_the_other_make_no_mass_deletion() {
    let (mut machine, mut seen) = with_peers(1);
    for n in 0..40_u8 {
        let now = at(1000 + 100 * u64::from(n));
        let lease = samples::lease(n + 10, V4, "tunnel");
        let prefix = lease.subnets.v4.unwrap();
        machine.handle(now, Input::Store(Ok(LeaseEvent::Upsert(Record::of(lease.clone(), 100)))));
        let added = written(&mut machine, now, &samples::host(), &seen.clone());
        assert!(matches!(added[..], [Op::CreateRoute { .. }]), "{added:?}");
        seen.routes.insert(RouteKey { prefix, nth: 0 }, Route::overlay(prefix, prefix.addr(), LinkId::Own(0)));
        machine.handle(now, Input::Store(Ok(LeaseEvent::Remove(lease.key))));
        assert_eq!(delete(&mut machine, now, &mut seen), 1);
    }
    assert!(machine.status.withheld.is_empty());
}

#[test]
fn peers_that_leave_during_an_audit_are_not_deleted_by_it() {
    let (mut machine, seen) = with_peers(20);
    machine.handle(at(5000), Input::Hint(Hint::Changed));
    let Some(KernelCall::Observe(_)) = machine.kernel_call(at(5000)) else { panic!("no audit") };
    for n in 2..=21 {
        machine.handle(at(5000), Input::Store(Ok(LeaseEvent::Remove(samples::lease(n, V4, "tunnel").key))));
    }
    machine.handle(at(5001), Input::Seen(Ok(seen.clone())));
    assert_eq!(written(&mut machine, at(5001), &samples::host(), &seen), []);
    assert_eq!(machine.status.withheld.len(), 20);
}

#[test]
fn the_device_of_a_backend_that_marks_nothing_bears_the_overlays_mark() {
    let backend = backend_on(Link { group: 0, alias: None, ..device() }, |_| PeerState::default());
    let mut machine = machine_on(samples::host(), backend);
    machine.handle(at(0), Input::Store(Ok(own_record())));
    let ops = written(&mut machine, at(0), &samples::host(), &State::default());
    let [Op::CreateLink { link, .. }] = &ops[..] else { panic!("{ops:?}") };
    assert_eq!((link.group, link.alias.as_deref()), (OverlayName::default().mark(), Some("flannelkit:flannel")));
}

#[test]
fn an_unusable_configuration_is_shown_unless_contact_was_lost_meanwhile() {
    let invalid = || SubnetError::Invalid { at: "config".into(), reason: "not JSON".into() };
    let unavailable = || SubnetError::Unavailable { doing: "asking", source: "cut".into() };
    let mut machine = machine();
    machine.handle(at(0), Input::Store(Ok(own_record())));
    machine.handle(at(1), Input::Store(Err(unavailable())));
    machine.handle(at(1), Input::Config(Err(invalid())));
    assert_eq!(machine.status.config_rejected, None, "a state file may have answered");
    machine.handle(at(2), Input::Store(Ok(own_record())));
    assert!(machine.config_call(at(2)));
    machine.handle(at(2), Input::Config(Err(invalid())));
    assert!(machine.status.config_rejected.as_ref().is_some_and(|reason| reason.contains("not JSON")));
}

#[test]
fn another_configuration_in_the_store_is_told_and_ends_the_agent_as_the_policy_says() {
    let unavailable = || SubnetError::Unavailable { doing: "asking", source: "cut".into() };
    let other = || {
        let text = br#"{"Network":"10.99.0.0/16","Backend":{"Type":"tunnel"}}"#;
        NetworkConfig::parse(text, Allocation::Pool).map_err(|_| unavailable())
    };
    for (policy, at_first, later) in [
        (ConfigPolicy::Keep, false, false),
        (ConfigPolicy::KeepOnceConfirmed, true, false),
        (ConfigPolicy::Stop, true, true),
    ] {
        let settings = Arc::new(Settings { on_reconfiguration: policy, ..settings() });
        let context = NodeContext { host: Arc::new(samples::host()), ..samples::context(config()) };
        let local = samples::local(context, samples::lease(1, V4, "tunnel").attrs);
        let same = NetworkConfig::clone(&local.context.config);
        let begun = || {
            let (settings, backend, status) = (Arc::clone(&settings), Arc::new(backend()), Status::default());
            let mut machine = Machine::new(settings, backend, local.clone(), status, at(0), Jitter::seeded(1));
            machine.handle(at(0), Input::Store(Ok(own_record())));
            assert!(machine.config_call(at(0)) && !machine.config_call(at(0)), "once");
            machine
        };
        let mut machine = begun();
        machine.handle(at(1), Input::Config(other()));
        assert_eq!((machine.is_outdated(), machine.status.reconfigured.is_some()), (at_first, true), "{policy:?}");

        let mut machine = begun();
        machine.handle(at(1), Input::Config(Ok(same.clone())));
        assert!(!machine.is_outdated() && !machine.config_call(at(600_000)), "{policy:?}");
        machine.handle(at(600_000), Input::Store(Err(unavailable())));
        assert!(!machine.config_call(at(600_000)), "a store that is away is not asked");
        machine.handle(at(700_000), Input::Store(Ok(own_record())));
        assert!(machine.config_call(at(700_000)));
        machine.handle(at(700_000), Input::Store(Err(unavailable())));
        machine.handle(at(700_000), Input::Config(other()));
        assert!(machine.status.reconfigured.is_none(), "contact was lost meanwhile: a state file may have answered");
        machine.handle(at(700_000), Input::Store(Ok(own_record())));
        assert!(machine.config_call(at(700_000)));
        machine.handle(at(700_000), Input::Config(Err(unavailable())));
        assert!(!machine.config_call(at(700_000)) && machine.deadline().is_some_and(|due| due <= at(710_000)));
        assert!(machine.config_call(at(710_000)), "no answer is no answer");
        machine.handle(at(710_000), Input::Config(other()));
        assert_eq!(machine.is_outdated(), later, "{policy:?}");
        let told = machine.take_events().into_iter().filter(|event| matches!(event, Event::ConfigChanged(_)));
        assert_eq!(told.collect::<Vec<_>>(), [Event::ConfigChanged(Arc::new(other().unwrap()))]);
        machine.handle(at(711_000), Input::Store(Ok(LeaseEvent::ConfigChanged)));
        assert!(machine.config_call(at(711_000)));
        machine.handle(at(711_000), Input::Config(Ok(same)));
        assert!(machine.status.reconfigured.is_none() && !machine.is_outdated());
    }
}
