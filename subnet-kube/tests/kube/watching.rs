//! The watch of the Nodes under all kinds of faults.

use std::time::Duration;

use flannel_core::lease::Json;
use flannel_core::subnet::{SubnetError, SubnetManager, Want};
use flannel_subnet_kube::{Access, KubeSubnets, Timeouts};
use serde_json::json;
use testkit::etcd::Version;
use testkit::kubernetes::{ApiServer, Fault};
use tokio::time::Instant;

use crate::common::{LIST, Lab, WATCH, WITHIN, attrs, cidrs, id, key, name, options, path, silent_after, watch};

const PROTOBUF: &str = "application/vnd.kubernetes.protobuf;stream=watch";

/// docs/faults.md, K1.
#[tokio::test(flavor = "multi_thread")]
async fn a_version_that_is_gone_is_listed_anew_however_the_server_says_so() {
    let lab = Lab::new().await;
    let (nth, store, lease) = lab.leased().await;
    for gone in [Fault::status(410, "too old resource version"), Fault::gone()] {
        let mut watcher = watch(&store).await;
        let other = lab.number();
        lab.proxy.expect(WATCH, gone.clone(), 1);
        lab.proxy.cut();
        // The list contains what changed meanwhile.
        lab.node(other).await;
        lab.store(other).await.acquire(&id(other), Want::new(attrs(other))).await.unwrap();
        let resets = watcher.resets;
        watcher.until(WITHIN, "a list", |seen| seen.resets > resets).await;
        watcher.until(WITHIN, "both", |seen| seen.good(&key(other)).is_some() && seen.holds(&lease)).await;
        lab.delete(other).await;
        watcher.until(WITHIN, "one alone", |seen| seen.good(&key(other)).is_none() && seen.holds(&lease)).await;
    }
    lab.delete(nth).await;
}

/// docs/faults.md, K2: dropped, half an event, stuck open.
#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_is_cut_or_stuck_goes_on_where_it_was() {
    let lab = Lab::new().await;
    let (nth, _, lease) = lab.leased().await;
    let store = lab.store_with(nth, silent_after(Duration::from_secs(2))).await;
    let mut watcher = watch(&store).await;
    let other = lab.number();
    lab.node(other).await;
    let theirs = lab.store(other).await;
    let mut held = theirs.acquire(&id(other), Want::new(attrs(other))).await.unwrap();
    watcher.until(WITHIN, "a peer", |seen| seen.holds(&held)).await;
    for (n, fault) in [
        None,
        Some(Fault::CutAfter(0)),
        Some(Fault::CutAfter(300)),
        Some(Fault::FreezeAfter(0)),
        Some(Fault::FreezeAfter(700)),
        Some(Fault::status(500, "")),
        Some(Fault::half_an_event()),
        Some(Fault::sent(PROTOBUF, b"no protobuf")),
        Some(Fault::sent("application/json", b"{\"type\":\"MODIFIED\"}\n")),
    ]
    .into_iter()
    .enumerate()
    {
        if let Some(fault) = fault.clone() {
            lab.proxy.expect(WATCH, fault, 1);
        }
        lab.proxy.cut();
        held.attrs.public_ip.v4 = Some([203, 0, 113, u8::try_from(n).unwrap() + 1].into());
        theirs.renew(&held).await.unwrap();
        watcher
            .until(WITHIN, &format!("a change over {fault:?}"), |seen| seen.holds(&held) && seen.holds(&lease))
            .await;
    }
    assert_eq!(watcher.resets, 1, "nothing was listed again: {:?}", watcher.errors);
}

/// docs/faults.md, K2.
#[tokio::test(flavor = "multi_thread")]
async fn a_list_that_is_cut_or_stuck_in_the_middle_is_never_taken_for_a_whole_one() {
    let lab = Lab::new().await;
    let (nth, _, lease) = lab.leased().await;
    let (_, _, other) = lab.leased().await;
    let hasty = silent_after(Duration::from_secs(30)).with_request(Duration::from_secs(1));
    let store = lab.store_with(nth, hasty).await;
    let mut watcher = watch(&store).await;
    for (n, fault) in [Fault::CutAfter(0), Fault::CutAfter(700), Fault::FreezeAfter(700)].into_iter().enumerate() {
        lab.proxy.expect(WATCH, Fault::gone(), 1);
        lab.proxy.expect(LIST, fault.clone(), 1);
        lab.proxy.cut();
        watcher.until(WITHIN, &format!("a list after {fault:?}"), |seen| seen.resets == n + 2).await;
        assert!(watcher.holds(&lease) && watcher.holds(&other), "{:?}", watcher.seen);
    }
    assert!(watcher.errors.len() >= 3, "{:?}", watcher.errors);
}

/// docs/faults.md, K3.
#[tokio::test(flavor = "multi_thread")]
async fn an_api_server_whose_store_was_restored_from_a_backup_is_listed_anew() {
    let mut server = ApiServer::start(Version::Current).await.unwrap_or_else(|error| panic!("{error}"));
    let client = Access::kubeconfig(server.admin_kubeconfig().unwrap()).client().await.unwrap();
    let store = KubeSubnets::new(client, options(1));
    let lease = async |server: &ApiServer, nth: u16| {
        server.create_node(&name(nth), &cidrs(nth)).await.unwrap();
        store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap()
    };
    let kept = lease(&server, 1).await;
    let mut watcher = watch(&store).await;
    server.etcd().back_up().unwrap();
    let lost = lease(&server, 2).await;
    watcher.until(WITHIN, "both", |seen| seen.holds(&kept) && seen.holds(&lost)).await;
    server.kill();
    server.etcd().restore().unwrap();
    server.restart().await.unwrap();
    watcher.until(60, "a list", |seen| seen.resets > 1).await;
    assert!(watcher.holds(&kept) && !watcher.seen.contains_key(&lost.key), "{:?}", watcher.seen);
}

/// docs/faults.md, K4.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_asks_to_be_left_alone_is() {
    let lab = Lab::new().await;
    let (nth, store, lease) = lab.leased().await;
    for status in [429, 503] {
        lab.proxy.expect("GET", Fault::busy(status, 2), 1);
        let before = lab.proxy.seen("").len();
        store.renew(&lease).await.unwrap_err();
        let begun = Instant::now();
        store.renew(&lease).await.unwrap();
        assert!(begun.elapsed() >= Duration::from_millis(1900), "{:?}", begun.elapsed());
        assert_eq!(lab.proxy.seen("").len() - before, 2, "one request a try");
    }
    // Longer than an answer may take.
    let hasty = lab.store_with(nth, Timeouts::default().with_request(Duration::from_secs(1))).await;
    lab.proxy.expect("GET", Fault::busy(429, 2), 1);
    hasty.renew(&lease).await.unwrap_err();
    hasty.renew(&lease).await.unwrap();
    // A refused watch continues where it was, and so does one whose history cannot be checked.
    lab.proxy.expect(WATCH, Fault::status(502, "bad gateway"), 2);
    for code in [500, 502, 504] {
        lab.proxy.expect("resourceVersionMatch=Exact", Fault::status(code, "bad gateway"), 1);
    }
    let mut watcher = watch(&store).await;
    watcher.until(WITHIN, "each of them", |seen| seen.errors.len() >= 5).await;
    lab.annotate(nth, json!({ "public-ip": "203.0.113.77" })).await;
    watcher.until(WITHIN, "a change", |seen| !seen.holds(&lease)).await;
    assert_eq!(watcher.resets, 1);
}

/// docs/faults.md, K6.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_made_again_in_a_gap_with_another_pod_cidr_is_a_change() {
    let lab = Lab::new().await;
    let (nth, store, lease) = lab.leased().await;
    let mut watcher = watch(&store).await;
    for gone in [false, true] {
        if gone {
            lab.proxy.expect(WATCH, Fault::status(410, "too old resource version"), 1);
        }
        lab.proxy.cut();
        let annotations = lab.annotations(nth).await;
        lab.delete(nth).await;
        let elsewhere = lab.number();
        lab.server.create_node(&name(nth), &cidrs(elsewhere)).await.unwrap();
        lab.annotate(nth, annotations).await;
        let moved = |seen: &flannel_core::testing::store_contract::Watcher| {
            seen.good(&key(nth)).is_some_and(|found| {
                found.subnets.v4.unwrap().to_string() == cidrs(elsewhere)[0] && found.attrs == lease.attrs
            })
        };
        watcher.until(WITHIN, "another subnet", moved).await;
    }
}

/// docs/faults.md, K7.
#[tokio::test(flavor = "multi_thread")]
async fn a_peer_that_changes_one_family_alone_is_a_change() {
    let lab = Lab::new().await;
    let (nth, store, lease) = lab.leased().await;
    let mut watcher = watch(&store).await;
    for (change, v4, v6) in [
        (json!({ "public-ipv6": "2001:db8:9::9" }), lease.attrs.public_ip.v4, "2001:db8:9::9".parse().ok()),
        (json!({ "public-ip": "203.0.113.99" }), "203.0.113.99".parse().ok(), "2001:db8:9::9".parse().ok()),
    ] {
        lab.annotate(nth, change).await;
        let public = flannel_core::net::Dual { v4, v6 };
        let changed = |found: &flannel_core::lease::Lease| found.attrs.public_ip == public;
        watcher.until(WITHIN, "one family", |seen| seen.good(&key(nth)).is_some_and(changed)).await;
    }
    // One family may be damaged; then the record is bad, not gone.
    lab.annotate(nth, json!({ "public-ipv6": "2001:db8::x" })).await;
    watcher.until(WITHIN, "damage", |seen| seen.seen.get(&key(nth)).is_some_and(|record| record.lease.is_err())).await;
    let bad = watcher.seen[&key(nth)].lease.as_ref().unwrap_err();
    assert_eq!(bad.subnets, lease.subnets, "its routes are not deleted on its account");
    assert!(bad.reason.contains("public-ipv6"), "{}", bad.reason);
}

/// A record contains what was written, whatever else the Node contains.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_the_same_in_a_list_and_in_a_watch() {
    let lab = Lab::new().await;
    let (_, store, _) = lab.leased().await;
    let mut watcher = watch(&store).await;
    let other = lab.number();
    lab.node(other).await;
    let noise = json!({
        "metadata": {
            "labels": { "example.com/label": "x" },
            "annotations": { "example.com/noise": "\u{0}\n\"\\]} \u{1f980}", "example.com/empty": "" },
        },
        "spec": { "providerID": "ü", "unschedulable": true, "taints": [{ "key": "a", "effect": "NoSchedule" }] },
    });
    lab.server.patch(&path(other), &noise).await.unwrap();
    let theirs = lab.store(other).await;
    let mut wanted = attrs(other);
    let data = Json::parse(r#"{"VNI":1,"text":"\"ü\u2028\\\n"}"#).unwrap();
    wanted.backend_data = flannel_core::net::Dual { v4: Some(data.clone()), v6: Some(data) };
    let lease = theirs.acquire(&id(other), Want::new(wanted)).await.unwrap();
    watcher.until(WITHIN, "the watch", |seen| seen.holds(&lease)).await;
    let listed = watch(&store).await;
    assert_eq!(listed.seen[&key(other)], watcher.seen[&key(other)]);
    assert_eq!(theirs.previous(&id(other)).await.unwrap(), [lease]);
    let created = lab.server.get(&path(other)).await.unwrap()["metadata"]["creationTimestamp"].clone();
    let created: jiff::Timestamp = created.as_str().unwrap().parse().unwrap();
    assert_eq!(listed.seen[&key(other)].created, u64::try_from(created.as_second()).unwrap());
    lab.delete(other).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_watch_that_nobody_reads_waits_and_loses_nothing() {
    let lab = Lab::new().await;
    let (nth, store, _) = lab.leased().await;
    let mut watcher = watch(&store).await;
    let ip = |n: u8| std::net::IpAddr::from([203, 0, 113, n]);
    for n in 1..=50 {
        lab.annotate(nth, json!({ "public-ip": ip(n) })).await;
    }
    for n in 1..=50 {
        let has = |lease: &flannel_core::lease::Lease| lease.attrs.public_ip.v4 == Some(ip(n));
        watcher.until(WITHIN, "each change in turn", |seen| seen.good(&key(nth)).is_some_and(has)).await;
    }
}

/// docs/faults.md, K11 and K15.
#[tokio::test(flavor = "multi_thread")]
async fn heartbeats_are_no_events_and_a_node_that_flaps_costs_the_others_nothing() {
    let lab = Lab::new().await;
    let (nth, store, lease) = lab.leased().await;
    let mut watcher = watch(&store).await;
    let before = watcher.seen[&key(nth)].clone();
    for time in 0..50 {
        lab.heartbeat(nth, time).await;
    }
    let flapping = lab.number();
    lab.node(flapping).await;
    let theirs = lab.store(flapping).await;
    let mut held = theirs.acquire(&id(flapping), Want::new(attrs(flapping))).await.unwrap();
    for n in 0..50 {
        held.attrs.public_ip.v4 = Some([203, 0, 113, n + 1].into());
        theirs.renew(&held).await.unwrap();
    }
    watcher.until(WITHIN, "the last change", |seen| seen.holds(&held)).await;
    assert_eq!(watcher.seen[&key(nth)], before);
    assert!(watcher.holds(&lease) && watcher.errors.is_empty() && watcher.resets == 1);
    // A Node without flannel's annotations is not a record.
    let plain = lab.number();
    lab.node(plain).await;
    lab.heartbeat(plain, 1).await;
    lab.annotate(nth, json!({ "public-ip": "203.0.113.200" })).await;
    watcher.until(WITHIN, "a later change", |seen| !seen.holds(&lease)).await;
    assert!(!watcher.seen.contains_key(&key(plain)));
}

/// docs/faults.md, K9: each right in turn, and the error names the missing rule.
#[tokio::test(flavor = "multi_thread")]
async fn a_right_that_is_missing_is_denied_with_the_rule_that_gives_it() {
    let lab = Lab::new().await;
    let (_, store, lease) = lab.leased().await;
    let denied = |verb: &str| {
        let said = format!(
            r#"nodes "a" is forbidden: User "b" cannot {verb} resource "nodes" in API group "" at the cluster scope"#
        );
        Fault::status(403, &said)
    };
    lab.proxy.expect("GET", denied("get"), 1);
    let said = flannel_core::text::chain(&store.renew(&lease).await.unwrap_err());
    assert!(said.contains(r#"{apiGroups: [""], resources: [nodes], verbs: [get]}"#), "{said}");
    lab.proxy.expect("PATCH", denied("patch"), 1);
    let changed = lease.clone().publishing(attrs(lab.number()));
    let said = flannel_core::text::chain(&store.renew(&changed).await.unwrap_err());
    assert!(said.contains(r#"{apiGroups: [""], resources: [nodes/status], verbs: [patch]}"#), "{said}");
    lab.proxy.expect("limit=1", denied("list"), 1);
    lab.proxy.expect(WATCH, denied("watch"), 1);
    let mut watcher = watch(&store).await;
    watcher.until(WITHIN, "both denials", |seen| seen.errors.len() >= 2).await;
    for (error, verb) in watcher.errors.iter().zip(["list", "watch"]) {
        assert!(error.contains(&format!("resources: [nodes], verbs: [{verb}]")), "{error}");
    }
    // A refusal by an admission policy is neither a missing right nor a replaced Node.
    for code in [403, 422] {
        lab.proxy.expect("PATCH", Fault::status(code, "ValidatingAdmissionPolicy 'p' denied request: no"), 2);
        let error = store.renew(&changed).await.unwrap_err();
        assert!(matches!(error, SubnetError::Denied { .. }), "{error:?}");
        assert!(flannel_core::text::chain(&error).contains("admission policy"), "{error:?}");
        let error = store.release(lease.clone()).await.unwrap_err();
        assert!(matches!(error, SubnetError::Denied { .. }), "{error:?}");
    }
    lab.proxy.expect("GET", Fault::status(401, "Unauthorized"), 1);
    let said = flannel_core::text::chain(&store.renew(&lease).await.unwrap_err());
    assert!(said.contains("expired"), "{said}");
}
