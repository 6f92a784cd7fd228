//! What the agent tells: its events, and its answers about single peers.

use std::time::Duration;

use flannel_core::backend::{Backend, BackendError};
use flannel_core::lease::{BadRecord, Json};
use flannel_core::net::{Dual, Family};
use flannel_core::overlay::{
    Contact, End, Ended, Event, Explanation, Phase, Status, SubscriptionState, Teardown, Verdict,
};
use flannel_core::testing::Fault;

use crate::altered::Altered;
use crate::node::{Node, add_defaults, eventually, pass, peer, public, subnet};
use crate::tunnel::Tunnel;

/// The backend data of IPv6 in the held lease.
fn published(status: &Status) -> Option<String> {
    let data = status.lease.as_ref()?.attrs.backend_data.v6.as_ref()?;
    Some(data.as_str().to_owned())
}

fn peers_of(events: &[Event]) -> Vec<String> {
    let text = |event: &Event| match event {
        Event::PeerAdded(lease) => Some(format!("+{}", lease.key)),
        Event::PeerChanged(lease) => Some(format!("~{}", lease.key)),
        Event::PeerRemoved(lease) => Some(format!("-{}", lease.key)),
        _ => None,
    };
    events.iter().filter_map(text).collect()
}

#[tokio::test(start_paused = true)]
async fn a_later_snapshot_tells_of_each_peer_that_is_not_what_it_was() {
    let (node, mut agent) = Node::ready_beside([1, 2, 3]).await;
    assert!(peers_of(&agent.drain()).is_empty(), "the first snapshot is told as a whole");
    node.store.cut_watches();
    let mut moved = peer(2);
    moved.attrs.public_ip.v4 = Some(public(Family::V4, 92));
    node.store.insert([moved, peer(4)]);
    node.leave([3]);
    eventually("the snapshot is worked off", || node.has_route(subnet(4)) && !node.has_route(subnet(3))).await;
    let mut told = peers_of(&agent.drain());
    told.sort();
    assert_eq!(told, ["+peer-4", "-peer-3", "~peer-2"]);
}

#[tokio::test(start_paused = true)]
async fn a_host_that_changes_tells_of_the_peers_that_come_and_go_by_it() {
    let (node, mut agent) = Node::ready_beside([1, 2]).await;
    agent.drain();
    // An address of the host inside a peer's subnet: that subnet would draw it away.
    node.kernel.add_address("eth0", "10.42.1.9/32".parse().unwrap()).unwrap();
    agent.event(|event| matches!(event, Event::PeerRemoved(lease) if lease.key == peer(1).key)).await;
    agent.until(|status| status.quarantined.contains_key(&peer(1).key)).await;
    node.kernel.remove_address("eth0", "10.42.1.9/32".parse().unwrap()).unwrap();
    agent.event(|event| matches!(event, Event::PeerAdded(lease) if lease.key == peer(1).key)).await;
    agent.until(|status| status.quarantined.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn an_uplink_that_returns_is_told_of() {
    let (node, mut agent) = Node::ready_beside([]).await;
    node.kernel.link_down("eth0").unwrap();
    agent.event(|event| matches!(event, Event::UplinkLost(_))).await;
    agent.until(|status| status.uplink.up().is_none()).await;
    node.kernel.link_up("eth0").unwrap();
    add_defaults(&node.kernel, node.kernel.link_index("eth0").unwrap());
    let back = agent.event(|event| matches!(event, Event::UplinkBack(_))).await;
    assert!(matches!(back, Event::UplinkBack(uplink) if uplink.name.as_str() == "eth0"));
    agent.until(|status| status.uplink.up().is_some()).await;
    agent.audited().await;
    assert!(!agent.drain().iter().any(|event| matches!(event, Event::UplinkBack(_))), "once");
}

#[tokio::test(start_paused = true)]
async fn notifications_that_cannot_be_heard_show_in_the_status_until_they_can() {
    let node = Node::alone();
    let mut agent = node.run();
    assert_eq!(agent.ready().await.notifications, SubscriptionState::Active);
    node.kernel.break_monitor();
    agent.event(|event| *event == Event::NotificationsLost).await;
    agent.until(|status| status.notifications == SubscriptionState::Broken).await;
    agent.audited().await;
    assert_eq!(agent.status().notifications, SubscriptionState::Broken, "an audit hears nothing");
    node.kernel.overrun_monitor();
    agent.event(|event| *event == Event::NotificationsBack).await;
    agent.until(|status| status.notifications == SubscriptionState::Active).await;
}

#[tokio::test(start_paused = true)]
async fn what_cannot_be_published_is_no_trouble_of_the_kernel() {
    let node = Node::alone();
    let wary = Altered {
        advertise: |tunnel: &Tunnel, context| match context.public.v4 {
            Some(addr) if addr.to_string().starts_with("198.51.100.") => {
                Err(BackendError::Host { what: "198.51.100.0/24".to_owned(), remedy: "move".to_owned() })
            }
            _ => tunnel.advertise(context),
        },
        ..Altered::of(Tunnel)
    };
    let mut agent = node.run_as(node.builder_with(wary)).once_ready().await;
    node.kernel.add_address("eth0", "198.51.100.7/24".parse().unwrap()).unwrap();
    node.kernel.remove_address("eth0", "192.0.2.200/24".parse().unwrap()).unwrap();
    let told = agent.event(|event| matches!(event, Event::AdvertiseFailed(_) | Event::KernelTrouble(_))).await;
    assert!(matches!(&told, Event::AdvertiseFailed(error) if error.contains("move")), "{told:?}");
}

#[tokio::test(start_paused = true)]
async fn what_follows_from_another_link_is_published_when_that_changes() {
    let node = Node::alone();
    // Publishes the MTU of a second link, where no peer reads it.
    let watchful = Altered {
        advertise: |tunnel: &Tunnel, context| {
            let second = context.host.links.values().find(|link| link.name.as_str() == "eth1");
            let mut attrs = tunnel.advertise(context)?;
            attrs.backend_data.v6 = second.map(|link| Json::parse(&link.mtu.to_string()).unwrap());
            Ok(attrs)
        },
        ..Altered::of(Tunnel)
    };
    let mut agent = node.run_as(node.builder_with(watchful)).once_ready().await;
    node.kernel.add_uplink("eth1", "198.51.100.1/24".parse().unwrap()).unwrap();
    agent.until(|status| published(status).as_deref() == Some("1500")).await;
    let renewed = agent.drain().iter().filter(|event| matches!(event, Event::LeaseRenewed(_))).count();
    assert_eq!(renewed, 1);
    // What changes nothing of it is not written.
    node.kernel.add_address("eth1", "198.51.100.2/24".parse().unwrap()).unwrap();
    agent.audited().await;
    assert!(!agent.drain().iter().any(|event| matches!(event, Event::LeaseRenewed(_))));
}

#[tokio::test(start_paused = true)]
async fn what_follows_from_the_previous_lease_is_no_change_of_the_host() {
    let node = Node::alone();
    let wary = Altered {
        advertise: |tunnel: &Tunnel, context| {
            let mut attrs = tunnel.advertise(context)?;
            attrs.backend_data.v6 = context.previous.as_ref().map(|_| Json::parse("1").unwrap());
            Ok(attrs)
        },
        ..Altered::of(Tunnel)
    };
    let mut agent = node.run_as(node.builder_with(wary)).once_ready().await;
    agent.drain();
    node.kernel.add_uplink("eth1", "198.51.100.1/24".parse().unwrap()).unwrap();
    agent.audited().await;
    assert!(!agent.drain().iter().any(|event| matches!(event, Event::LeaseRenewed(_))));
}

#[tokio::test(start_paused = true)]
async fn renewals_that_are_denied_beside_a_watch_that_lives_are_one_loss_of_contact() {
    let node = Node::with_ttl(Duration::from_secs(120));
    let mut agent = node.run_ready().await;
    agent.drain();
    node.store.fail_next([Fault::Denied; 8]);
    agent.event(|event| matches!(event, Event::StoreLost(_))).await;
    // The watch goes on telling.
    for n in 1..=20 {
        node.join([n]);
        pass(0.5).await;
        let Contact::Lost { error, .. } = agent.status().store else { panic!("{n}: {:?}", agent.status().store) };
        assert!(error.contains("denied"), "{error}");
    }
    assert!((1..=20).all(|n| node.has_route(subnet(n))));
    agent.event(|event| matches!(event, Event::LeaseRenewed(_))).await;
    agent.until(|status| status.store == Contact::Live).await;
    let events = agent.drain();
    assert!(!events.iter().any(|event| matches!(event, Event::StoreLost(_))), "{events:?}");
}

#[tokio::test(start_paused = true)]
async fn a_record_is_explained_by_whatever_it_says_of_itself() {
    let node = Node::alone();
    node.join([1]);
    let mut alien = peer(7);
    alien.attrs.backend_type = "other".into();
    alien.key = flannel_core::lease::LeaseKey::new("peer-7.json");
    node.store.insert([alien]);
    let named = BadRecord::new("torn", Dual { v4: Some(subnet(8)), v6: None });
    node.store.insert_bad(&peer(8).key, named);
    let agent = node.run();
    agent.until(|status| status.quarantined.len() == 2).await;
    for query in ["peer-7.json", "peer-7", "10.42.7.0/24", "10.42.7.9", "192.0.2.7", " 192.0.2.7\n"] {
        let found = agent.handle.explain(query).await.unwrap();
        let found = found.first().unwrap_or_else(|| panic!("{query:?} means nothing"));
        assert!(matches!(found.verdict, Verdict::Quarantined(_)) && found.key.as_str() == "peer-7.json", "{query:?}");
    }
    for query in ["peer-8", "10.42.8.0/24", "10.42.8.1"] {
        let found = agent.handle.explain(query).await.unwrap();
        let found = found.first().unwrap_or_else(|| panic!("{query:?} means nothing"));
        assert!(found.key == peer(8).key && found.to_string().contains("torn"), "{query:?}");
    }
    for (query, verdict) in [("10.42.1.0/24", Verdict::Accepted), ("192.0.2.200", Verdict::Own)] {
        assert_eq!(agent.handle.explain(query).await.unwrap()[0].verdict, verdict, "{query}");
    }
    for query in ["peer", "", "10.42.9.9", "10.42.7.0/25"] {
        assert_eq!(agent.handle.explain(query).await.unwrap(), [], "{query:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn every_record_with_an_address_is_explained_and_accepted_ones_come_first() {
    let node = Node::alone();
    let (first, mut second) = (peer(1), peer(2));
    second.attrs.public_ip = first.attrs.public_ip;
    let mut bad = peer(3);
    bad.attrs.public_ip = first.attrs.public_ip;
    bad.attrs.backend_type = "other".into();
    bad.key = flannel_core::lease::LeaseKey::new("a-bad-one");
    node.store.insert([first, second, bad]);
    let agent = node.run();
    agent.until(|status| status.quarantined.len() == 1).await;
    let found = agent.handle.explain("192.0.2.1").await.unwrap();
    let keys: Vec<_> = found.iter().map(|found| found.key.as_str()).collect();
    assert_eq!(keys, [peer(1).key.as_str(), peer(2).key.as_str(), "a-bad-one"]);
}

#[tokio::test(start_paused = true)]
async fn of_many_records_with_one_address_the_first_are_explained() {
    let node = Node::alone();
    let shared = peer(1).attrs.public_ip;
    node.store.insert((1..=150).map(|n| {
        let mut peer = peer(n);
        peer.attrs.public_ip = shared;
        peer
    }));
    let agent = node.run();
    agent.until(|status| status.peers.accepted == 150).await;
    assert_eq!(agent.handle.explain("192.0.2.1").await.unwrap().len(), Explanation::MOST);
}

#[tokio::test(start_paused = true)]
async fn the_list_of_records_says_of_each_what_became_of_it() {
    let node = Node::alone();
    node.join([1, 2]);
    let mut alien = peer(7);
    alien.attrs.backend_type = "other".into();
    node.store.insert([alien]);
    let agent = node.run_ready().await;
    agent.until(|status| status.quarantined.len() == 1).await;
    let standings = async || {
        let list = agent.handle.records().await.unwrap();
        let rows = list.rows().map(|row| (row.key.map(|key| key.to_string()), row.standing.kind()));
        rows.collect::<Vec<_>>()
    };
    let key = |n| Some(peer(n).key.to_string());
    let expected = [(key(1), "programmed"), (key(2), "programmed"), (key(7), "quarantined")];
    assert_eq!(standings().await, expected);
    let row = agent.handle.records().await.unwrap().row(2).unwrap();
    assert_eq!((row.subnets.v4, row.lease.is_none()), (Some(subnet(7)), true));
    assert!(row.standing.to_string().contains("other"), "{}", row.standing);

    // The last good version of a record that turns bad stays in force.
    let mut torn = peer(2);
    torn.attrs.backend_type = "other".into();
    node.store.insert([torn]);
    agent.until(|status| status.quarantined.len() == 2).await;
    let row = agent.handle.records().await.unwrap().row(1).unwrap();
    assert_eq!((row.key, row.standing.kind(), row.lease.is_some()), (Some(peer(2).key), "quarantined", true));
}

/// Whoever reads the status may keep what it read.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_status_that_is_kept_holds_up_neither_the_work_nor_the_end() {
    let node = Node::alone();
    let agent = node.run();
    let kept = agent.handle.reached(Phase::Ready).await.unwrap();
    node.join([1]);
    eventually("the peer is programmed", || node.has_route(subnet(1))).await;
    let handle = agent.handle.clone();
    agent.cancelled().await.unwrap();
    assert_eq!((kept.phase, kept.peers.accepted), (Phase::Ready, 0));
    assert_eq!((handle.status().phase, handle.status().peers.accepted), (Phase::Stopped, 1));
}

#[tokio::test(start_paused = true)]
async fn whoever_waits_for_what_does_not_come_is_told_of_the_end() {
    let agent = Node::alone().run().once_ready().await;
    let handle = agent.handle.clone();
    let never = tokio::spawn(async move { handle.wait_for(|status| status.peers.accepted == 7).await });
    agent.cancelled().await.unwrap();
    assert_eq!(never.await.unwrap(), Err(Ended(End::Stopped)));
    // One that was cut off says so too.
    let agent = Node::alone().run().once_ready().await;
    let (handle, mut follower) = (agent.handle.clone(), agent.handle.clone());
    let over = tokio::spawn(async move { handle.reached(Phase::Stopped).await });
    let follower = tokio::spawn(async move { while follower.changed().await.is_ok() {} });
    agent.killed().await;
    assert!(over.await.unwrap().is_ok());
    follower.await.unwrap();
}

/// As the programs in the documentation do.
#[tokio::test(start_paused = true)]
async fn a_reader_that_was_too_slow_learns_how_much_it_missed_and_reads_on_to_the_end() {
    let (node, mut agent) = Node::ready_beside([]).await;
    agent.drain();
    for round in 1..=60_u8 {
        let moved = (1..=20).map(|n| {
            let mut moved = peer(n);
            moved.attrs.public_ip.v4 = Some(std::net::Ipv4Addr::new(198, 51, round, n).into());
            moved
        });
        node.store.insert(moved);
        pass(0.1).await;
    }
    agent.stop(Teardown::Keep);
    let mut events = Vec::new();
    while !matches!(events.last(), Some(Event::Stopped(_))) {
        events.extend(agent.events.next().await);
    }
    assert!(matches!(events[0], Event::Missed(missed) if missed > 100), "{:?}", events[0]);
    assert!(events.len() > 1024, "{}", events.len());
    assert_eq!(events.last(), Some(&Event::Stopped(End::Stopped)));
}
