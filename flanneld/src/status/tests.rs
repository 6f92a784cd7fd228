use flannel_core::config::{Allocation, NetworkConfig};

use super::*;

fn around() -> Surroundings {
    Surroundings {
        overlay: "flannel".into(),
        store: "directory /d".into(),
        subnet_file: "/run/s".into(),
        kept: None,
        carried: Observer::default(),
    }
}

#[test]
fn a_document_survives_json_and_says_what_it_waits_for() {
    let mut status = Status::default();
    status.last_error = Some("no route".to_owned());
    let document = Document::new(&status, &RulesState::Pending, &around(), BootTime::default(), 0);
    let json = serde_json::to_string(&document).unwrap();
    assert_eq!(serde_json::from_str::<Document>(&json).unwrap(), document);
    assert_eq!((document.ready, document.waits_for.as_slice()), (false, &["a lease (no route)".to_owned()][..]));
    let table = document.to_string();
    assert!(table.contains("NOT ready") && table.contains("directory /d (never)"), "{table}");
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
    assert!(line.contains("no peer to others (has no subnet"), "{line}");
    assert!(!waits_for(&status, &rules).iter().any(|reason| reason.contains("iptables")));
    let document = Document::new(&status, &rules, &around(), BootTime::default(), 0);
    assert_eq!(document.firewall.as_deref(), Some("no iptables"));
    let table = document.to_string();
    assert!(!table.contains("restart this agent"), "{table}");
    status.reconfigured = Some(Arc::new(config()));
    let table = Document::new(&status, &rules, &around(), BootTime::default(), 0).to_string();
    assert!(table.contains("network      its configuration in the store has changed: restart this agent"), "{table}");
    assert!(table.contains("own record   not taken for a peer: has no subnet"), "{table}");
    assert!(table.contains("firewall     no iptables"), "{table}");
}

#[test]
fn text_of_others_is_shown_plain_in_rows_of_its_own_and_cut() {
    let (mut status, hostile) = (Status::default(), "\u{1b}[2J\nphase ready\u{202e}\u{9b}".repeat(1000));
    status.last_error = Some(hostile.clone());
    status.own_trouble = Some(Reason::Unreadable(hostile.clone()));
    let empty = Document::new(&status, &RulesState::Pending, &around(), BootTime::default(), 0).to_string();
    for nth in 0..2 * LISTED {
        let key = flannel_core::lease::LeaseKey::new(&format!("{nth}{hostile}"));
        Arc::make_mut(&mut status.quarantined).insert(key, Reason::Unreadable(hostile.clone()));
    }
    let document = Document::new(&status, &RulesState::Pending, &around(), BootTime::default(), 0);
    let table = document.to_string();
    assert_eq!(table.lines().count(), empty.lines().count() + LISTED);
    assert!(table.lines().all(|line| line.chars().all(flannel_core::text::is_plain)), "{table:?}");
    assert!(document.quarantined.iter().all(|named| named.name.chars().count() <= MOST_TEXT + 1));
}

#[test]
fn readiness_needs_phase_lease_and_file() {
    let mut status = Status::default();
    status.phase = Phase::Ready;
    status.subnet_env = EnvFile::Pending { error: Some("disk full".to_owned()) };
    assert!(!is_ready(&status, &RulesState::InPlace));
    assert_eq!(waits_for(&status, &RulesState::InPlace).len(), 2);
    assert!(waits_for(&status, &RulesState::InPlace).iter().any(|reason| reason.contains("disk full")));
    assert_eq!(waits_for(&status, &RulesState::Failed("no nft".to_owned())).len(), 3);
}
