use flannel_backend_udp::path::{Counters, Reason as Dropped};
use flannel_core::admit::Reason;
use flannel_core::backend::Uplink;
use flannel_core::backend::alloc::Alloc;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::kernel::LinkName;
use flannel_core::lease::{Lease, LeaseAttrs, LeaseKey};
use flannel_core::net::{Dual, Mtu};
use flannel_core::overlay::{End, EnvFile, Overlay, UplinkState};
use flannel_core::testing::{FakeKernel, MemorySubnets};
use futures_util::FutureExt;
use serde_json::json;

use super::*;

fn info() -> ProgramInfo {
    ProgramInfo {
        overlay: "flannel".into(),
        store: "directory /d".into(),
        subnet_file: "/run/s".into(),
        kept: None,
        carried: Observer::default(),
    }
}

#[test]
fn a_document_holds_the_librarys_status_and_a_table_says_what_is_waited_for() {
    let mut status = Status::default();
    status.starting = Some(Wait::Lease { error: Some("no route".to_owned()) });
    let info = info();
    let document = Document::new(&status, &RulesState::Pending, &info, BootTime::default(), 0);
    let json = serde_json::to_value(&document).unwrap();
    assert_eq!((&json["ready"], &json["firewall"]), (&json!(false), &json!({"kind": "pending"})));
    assert_eq!(json["status"], serde_json::to_value(&status).unwrap());
    let table = document.to_string();
    assert!(table.contains("state        not ready\n") && table.contains("directory /d, no answer yet"), "{table}");
    assert!(table.contains("waits for    a lease (no route): provide what the lease store reports"), "{table}");
}

fn config() -> NetworkConfig {
    NetworkConfig::parse(br#"{"Network":"10.5.0.0/16"}"#, Allocation::Pool).unwrap()
}

#[test]
fn what_hurts_without_keeping_from_readiness_is_shown() {
    let mut status = Status::default();
    status.phase = Phase::Ready;
    status.own_trouble = Some(Reason::NoSubnet);
    let rules = RulesState::WithoutForward("no iptables".to_owned());
    let line = summary(&status, &rules);
    assert!(line.contains("other nodes do not accept this node's record: has no subnet"), "{line}");
    assert!(!waits_for(&status, &rules, Wait::to_string).iter().any(|reason| reason.contains("iptables")));
    let info = info();
    let shown = |status: &Status| Document::new(status, &rules, &info, BootTime::default(), 0).to_string();
    let table = shown(&status);
    assert!(!table.contains("restart this agent"), "{table}");
    status.reconfigured = Some(Arc::new(config()));
    let table = shown(&status);
    assert!(table.contains("network      the configuration in the store has changed: restart this agent"), "{table}");
    assert!(table.contains("own record   not accepted by other nodes: has no subnet"), "{table}");
    assert!(table.contains("firewall     no forward rules: no iptables"), "{table}");
}

#[test]
fn text_of_others_is_shown_plain_in_rows_of_its_own() {
    let (mut status, hostile) = (Status::default(), "\u{1b}[2J\nphase ready\u{202e}\u{9b}".repeat(10));
    let info = info();
    let shown =
        |status: &Status| Document::new(status, &RulesState::Pending, &info, BootTime::default(), 0).to_string();
    status.last_error = Some(hostile.clone());
    status.own_trouble = Some(Reason::Unreadable(hostile.clone()));
    let empty = shown(&status);
    for nth in 0..2 * Status::MAX_LISTED {
        let key = LeaseKey::new(&format!("{nth}{hostile}"));
        Arc::make_mut(&mut status.quarantined).insert(key, Reason::Unreadable(hostile.clone()));
    }
    let table = shown(&status);
    assert_eq!(table.lines().count(), empty.lines().count() + Status::MAX_LISTED);
    assert!(table.lines().all(|line| line.chars().all(flannel_core::text::is_plain)), "{table:?}");
}

/// Returns the status of an agent that is ready.
fn ready() -> Status {
    let attrs = LeaseAttrs::new(Dual { v4: Some("192.0.2.1".parse().unwrap()), v6: None });
    let subnets = Dual { v4: Some("10.5.1.0/24".parse().unwrap()), v6: None };
    let addrs = Dual { v4: Some("192.0.2.1".parse().unwrap()), v6: None };
    let uplink = Uplink::new(2, LinkName::new("eth0").unwrap(), Mtu(1500), addrs);
    let mut status = Status::default();
    status.lease = Some(Arc::new(Lease::new(LeaseKey::new("node-1"), subnets, attrs)));
    (status.phase, status.starting, status.listed) = (Phase::Ready, None, true);
    status.uplink = UplinkState::Up(uplink);
    status
}

#[test]
fn readiness_needs_phase_lease_and_file() {
    let lacks = |change: fn(&mut Status)| {
        let mut status = ready();
        change(&mut status);
        assert!(!is_ready(&status, &RulesState::InPlace), "{status:?}");
        waits_for(&status, &RulesState::InPlace, Wait::to_string)
    };
    assert!(is_ready(&ready(), &RulesState::InPlace) && !is_ready(&ready(), &RulesState::Pending));
    lacks(|status| status.phase = Phase::LeaseHeld);
    assert_eq!(lacks(|status| status.lease = None), ["a lease"]);
    let pending = |status: &mut Status| status.subnet_env = EnvFile::Pending { error: Some("disk full".to_owned()) };
    assert_eq!(lacks(pending), ["subnet.env (disk full)"]);
    let mut status = ready();
    pending(&mut status);
    status.lease = None;
    assert_eq!(waits_for(&status, &RulesState::InPlace, Wait::to_string).len(), 2);
    assert_eq!(waits_for(&status, &RulesState::Failed("no nft".to_owned()), Wait::to_string).len(), 3);
}

#[test]
fn an_uplink_that_is_lost_is_no_readiness_and_is_shown_with_its_reason() {
    let (mut status, at) = (ready(), BootTime(std::time::Duration::from_secs(7)));
    let last = status.uplink.up().cloned();
    let info = info();
    let shown = |status: &Status| Document::new(status, &RulesState::InPlace, &info, at, 0).to_string();
    assert!(
        shown(&status).contains("state        ready\n")
            && shown(&status).contains("uplink       eth0 (192.0.2.1), MTU 1500")
    );
    status.uplink = UplinkState::Lost { last, since: BootTime::default(), error: "eth0 has no carrier".to_owned() };
    let table = shown(&status);
    assert!(
        table.contains("not ready\n") && table.contains("uplink       lost for 7s: eth0 has no carrier"),
        "{table}"
    );
    assert!(table.contains("waits for    an uplink (eth0 has no carrier)"), "{table}");
}

#[test]
fn what_is_done_without_is_shown_of_a_node_that_is_ready() {
    let mut status = ready();
    (status.peers.quarantined, status.failed_writes) = (2, 3);
    let info = info();
    let document = Document::new(&status, &RulesState::InPlace, &info, BootTime::default(), 0);
    assert!(
        document.ready && document.to_string().contains("degraded     2 invalid records, 3 failed writes"),
        "{document}"
    );
}

#[test]
fn an_end_is_summed_up_by_its_reason() {
    let mut status = ready();
    (status.phase, status.ended) = (Phase::Stopped, Some(End::Failed("the lease was lost".to_owned())));
    assert_eq!(summary(&status, &RulesState::InPlace), "stopped: the lease was lost");
}

#[tokio::test]
async fn rules_that_are_no_longer_kept_are_neither_a_change_nor_the_end_of_the_agent() {
    let config = br#"{"Network":"10.5.0.0/16","Backend":{"Type":"alloc"}}"#;
    let store = MemorySubnets::new(NetworkConfig::parse(config, Allocation::Pool).unwrap());
    let overlay = Overlay::builder().backend(Alloc::TYPE, |_| Ok(Alloc));
    let overlay = overlay.build(Arc::new(store), Arc::new(FakeKernel::new())).unwrap();
    let (mut handle, (state, mut rules)) = (overlay.handle(), watch::channel(RulesState::Pending));
    state.send_replace(RulesState::InPlace);
    assert_eq!(changed(&mut handle, &mut rules).now_or_never(), Some(true));
    drop(state);
    assert_eq!(changed(&mut handle, &mut rules).now_or_never(), None);
}

#[test]
fn the_documents_explain_every_reason_for_a_dropped_packet() {
    let page = include_str!("../../../docs/operations.md");
    let (_, table) = page.split_once("| `reason` | packets | what to do |").unwrap();
    let (table, _) = table.split_once("\n\n").unwrap();
    for name in Dropped::ALL.map(Dropped::name).into_iter().chain([Counters::OVERFLOWED]) {
        assert!(table.contains(&format!("`{name}`")), "{name}");
    }
}
