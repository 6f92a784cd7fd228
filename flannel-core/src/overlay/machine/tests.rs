//! The machine by itself: no runtime, no kernel, no store.

use std::sync::Arc;
use std::time::Duration;

use super::{KernelCall, Machine, Wake};
use crate::backend::{Local, MockBackend};
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::kernel::{ApplyReport, Device, Scope};
use crate::lease::LeaseEvent;
use crate::net::{Dual, Family, MacAddr, Prefix, Vni};
use crate::overlay::backoff::Jitter;
use crate::overlay::builder::Builder;
use crate::overlay::published::Published;
use crate::overlay::status::Status;
use crate::overlay::{Identity, Settings};
use crate::state::{Link, LinkId, LinkKind, LinkName, PeerState, Route, RouteKey, State, Vxlan};
use crate::testing::arbitrary;

const V4: &[Family] = &[Family::V4];

fn at(millis: u64) -> BootTime {
    BootTime(Duration::from_millis(millis))
}

fn device() -> Link {
    let kind = Vxlan {
        vni: Vni::new(1).unwrap(),
        port: Some(8472),
        local: Some(arbitrary::node_address(Family::V4, 1)),
        lower: Some(LinkId::Uplink),
        learning: false,
        gbp: false,
    };
    Link {
        name: LinkName::new("tun4.1").unwrap(),
        kind: LinkKind::Vxlan(kind),
        mac: Some(MacAddr([2, 0, 0, 0, 0, 1])),
        mtu: 1450,
        up: true,
        group: crate::kernel::OverlayName::default().mark(),
        alias: None,
    }
}

/// A backend with one device and nothing for peers.
fn backend() -> MockBackend {
    let mut backend = MockBackend::new();
    backend.expect_wire_type().return_const("tunnel");
    backend.expect_mtu().returning(|_| None);
    backend.expect_hardware_address().returning(|_, _| Ok(None));
    backend.expect_scope().returning(|local| Scope {
        overlay: local.situation.overlay.clone(),
        networks: local.situation.networks(),
        devices: vec![Device { name: device().name, kind: device().kind }],
        uplink: Some(local.situation.uplink.index),
    });
    backend.expect_base().returning(|_| State { links: [(LinkId::Own(0), device())].into(), ..State::default() });
    backend.expect_peer().returning(|_, _, _| Ok(PeerState::default()));
    backend
}

fn settings() -> Settings {
    Builder::new(Identity::PublicIp).into_settings()
}

fn config() -> NetworkConfig {
    arbitrary::config(V4, r#"{"Type":"tunnel"}"#)
}

fn machine() -> Machine {
    let local: Local = arbitrary::local(arbitrary::situation(config()), arbitrary::lease(1, V4, "tunnel").attrs);
    let status = Published::new(Status::default());
    Machine::new(Arc::new(settings()), Arc::new(backend()), local, status, at(0), Jitter::seeded(1))
}

fn own_record() -> LeaseEvent {
    LeaseEvent::Reset(vec![arbitrary::record(arbitrary::lease(1, V4, "tunnel"), 1)])
}

/// Answers kernel calls from `seen`, refusing every write, until nothing is due at `now`.
fn serve(machine: &mut Machine, now: BootTime, seen: &State) -> usize {
    let mut calls = 0;
    while let Some(call) = machine.kernel_call(now) {
        calls += 1;
        assert!(calls < 100, "the machine never comes to rest");
        let answer = match call {
            KernelCall::Facts(_) => Wake::Facts(Ok(arbitrary::host())),
            KernelCall::Observe(_) => Wake::Seen(Ok(seen.clone())),
            KernelCall::Apply(_, plan) => Wake::Applied(refuse(plan.ops.len())),
        };
        machine.handle(now, answer);
    }
    calls
}

fn refuse(ops: usize) -> ApplyReport {
    let error = || crate::kernel::KernelError::Refused { doing: "writing".into(), errno: 16, message: String::new() };
    ApplyReport { refused: (0..ops).map(|place| (place, error())).collect(), ..ApplyReport::default() }
}

#[test]
fn after_all_that_is_due_was_served_the_next_deadline_lies_ahead() {
    let mut machine = machine();
    let former: Prefix = "10.99.0.0/16".parse().unwrap();
    machine.look_after(vec![Dual { v4: Some(former), v6: None }], at(0));
    machine.handle(at(0), Wake::Store(Ok(own_record())));
    // The device is not there, a route is left in the former network, and every write is refused.
    let left: Prefix = "10.99.1.0/24".parse().unwrap();
    let route = Route::overlay(left, left.addr(), LinkId::Own(0));
    let seen = State { routes: [(RouteKey { prefix: left, nth: 0 }, route)].into(), ..State::default() };
    let mut now = at(0);
    for step in 0..2000 {
        if step % 7 == 0 {
            let peer = arbitrary::record(arbitrary::lease(2 + (step % 5) as u8, V4, "tunnel"), 2 + step);
            machine.handle(now, Wake::Store(Ok(LeaseEvent::Upsert(peer))));
        }
        serve(&mut machine, now, &seen);
        assert!(machine.store_call(now).is_none());
        let deadline = machine.deadline().unwrap();
        assert!(deadline > now, "step {step}: due at {deadline:?} and not served at {now:?}");
        now = deadline;
        machine.handle(now, Wake::Timer);
    }
}
