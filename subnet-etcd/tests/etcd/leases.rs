//! What each node writes, and what happens to it under faults.

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use etcd_client::{LeaseGrantOptions, PutOptions, Txn, TxnOp};
use flannel_core::clock::{BootTime, Clock, SystemClock};
use flannel_core::lease::{Json, Lease, LeaseAttrs, MAX_RECORDS, RECORD_BYTES, Record, Scalar, is_complete};
use flannel_core::net::Dual;
use flannel_core::subnet::{NodeIdentity, OwnLeases, SubnetError, SubnetManager, Want};
use flannel_subnet_etcd::{Config, EtcdSubnets, KeyPrefix, Ttl};
use testkit::etcd::{Etcd, Options, Version};
use tokio::task::JoinSet;

use crate::common::{self, BASE, chain, dump, leases, node, raw, single, v4};
use crate::proxy::Proxy;

const DUAL: &str = r#"{"Network":"10.5.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:5::/48","SubnetMax":"10.5.64.0","IPv6SubnetMax":"fd00:5:0:40::","Backend":{"Type":"vxlan"}}"#;

#[tokio::test(flavor = "multi_thread")]
async fn what_is_written_is_flannels_to_the_byte() {
    for version in Version::ALL {
        let (etcd, store) = single(version).await;
        let mut client = raw(&etcd).await;
        let lease = store.acquire(&node(3).id, node(3).preferring("10.5.34.0/24")).await.unwrap();
        let all = dump(&mut client).await;
        let (value, id) = &all[&format!("{BASE}/subnets/10.5.34.0-24")];
        assert_eq!(
            value,
            r#"{"PublicIP":"192.168.0.3","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"c6:d2:32:6f:8f:44"}}"#
        );
        assert_eq!(all.len(), 2, "nothing but the configuration and one record: {all:?}");
        let left = client.lease_time_to_live(*id, None).await.unwrap();
        assert_eq!(left.granted_ttl(), 86_400);
        let left = lease.expires.unwrap().since(SystemClock::default().now());
        assert!((86_300..=86_400).contains(&left.as_secs()), "{left:?}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn dual_stack_and_ipv6_keys_are_flannels() {
    let (etcd, store) = single(Version::Debian).await;
    let mut client = raw(&etcd).await;
    let mut attrs = node(1).attrs;
    attrs.public_ip.v6 = Some("2001:db8::1".parse().unwrap());
    store.put_config_json(DUAL).await.unwrap();
    let preferred = Dual { v6: Some("fd00:5:0:12::/64".parse().unwrap()), ..v4("10.5.34.0/24") };
    store.acquire(&node(1).id, Want::new(attrs).preferring(preferred)).await.unwrap();
    assert!(dump(&mut client).await.contains_key(&format!("{BASE}/subnets/10.5.34.0-24&fd00:5:0:12::-64")));

    store
        .put_config_json(
            r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fd00:6::/48","Backend":{"Type":"vxlan"}}"#,
        )
        .await
        .unwrap();
    let attrs = LeaseAttrs::new(Dual { v4: None, v6: Some("2001:db8::2".parse().unwrap()) });
    let id = NodeIdentity::new("2001:db8::2").unwrap();
    let preferred = Dual { v4: None, v6: Some("fd00:6:0:7::/64".parse().unwrap()) };
    store.acquire(&id, Want::new(attrs).preferring(preferred)).await.unwrap();
    let all = dump(&mut client).await;
    let (value, _) = &all[&format!("{BASE}/subnets/0.0.0.0-0&fd00:6:0:7::-64")];
    assert_eq!(value, r#"{"PublicIP":"0.0.0.0","PublicIPv6":"2001:db8::2"}"#);
}

#[tokio::test(flavor = "multi_thread")]
async fn records_of_go_flannel_are_read_and_its_lease_is_taken_over() {
    let (etcd, store) = single(Version::Current).await;
    let mut client = raw(&etcd).await;
    client.lease_grant(86_400, Some(LeaseGrantOptions::new().with_id(77))).await.unwrap();
    let leased = || Some(PutOptions::new().with_lease(77));
    let vxlan = r#"{"PublicIP":"192.168.0.1","PublicIPv6":null,"BackendType":"vxlan","BackendData":{"VNI":1,"VtepMAC":"02:00:00:00:00:01"}}"#;
    let hostgw = r#"{"PublicIP":"192.168.0.2","PublicIPv6":null,"BackendType":"host-gw","BackendData":null}"#;
    let udp = r#"{"PublicIP":"192.168.0.3","PublicIPv6":null}"#;
    for (key, value) in [("10.5.1.0-24", vxlan), ("10.5.2.0-24", hostgw), ("10.5.3.0-24", udp)] {
        client.put(format!("{BASE}/subnets/{key}"), value, leased()).await.unwrap();
    }
    let records = store.list().await.unwrap();
    let kinds: Vec<_> =
        records.iter().map(|record| record.lease.as_ref().unwrap().attrs.backend_type.to_string()).collect();
    assert_eq!(kinds, ["vxlan", "host-gw", ""]);
    let previous = store.previous(&node(1).id).await.unwrap().remove(0);
    assert_eq!(previous.subnets, v4("10.5.1.0/24"));
    assert!(previous.expires.is_some());
    let lease = node(1).acquire(&store).await;
    assert_eq!((&lease.key, lease.attrs), (&previous.key, node(1).attrs));
    assert_eq!(leases(&mut client).await, 2, "others' records hang on the old etcd lease: it stays");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reservation_is_used_renewed_and_stays_one() {
    for version in Version::ALL {
        let (etcd, store) = single(version).await;
        let mut client = raw(&etcd).await;
        let key = format!("{BASE}/subnets/10.5.77.0-24");
        client.put(key.clone(), r#"{"PublicIP":"192.168.0.9"}"#, None).await.unwrap();
        for n in 0..20 {
            assert_ne!(node(100 + n).acquire(&store).await.subnets, v4("10.5.77.0/24"));
        }
        // It names the node's address and no device, so it belongs to no other node.
        let want = node(9).preferring("10.5.78.0/24").owning(OwnLeases::Unheld);
        let lease = store.acquire(&node(9).id, want).await.unwrap();
        assert_eq!((lease.subnets, lease.expires), (v4("10.5.77.0/24"), None));
        let lease = store.renew(&lease).await.unwrap();
        assert_eq!(store.previous(&node(9).id).await.unwrap(), std::slice::from_ref(&lease));
        let written = dump(&mut client).await[&key].clone();
        assert_eq!(written, (node(9).attrs.to_json(), 0));
        store.release(lease).await.unwrap();
        assert_eq!(dump(&mut client).await[&key], written, "what an operator reserved is not ours to delete");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn renewals_leave_no_etcd_lease_behind() {
    let (etcd, store) = single(Version::Current).await;
    let mut client = raw(&etcd).await;
    let first = node(1).acquire(&store).await;
    let mut lease = first.clone();
    for _ in 0..3 {
        lease = store.renew(&lease).await.unwrap();
    }
    store.renew(&first).await.expect("a renewal whose answers were lost");
    node(1).acquire(&store).await;
    assert_eq!(leases(&mut client).await, 1);
    let lease = store.previous(&node(1).id).await.unwrap().remove(0);
    store.release(lease).await.unwrap();
    assert_eq!(leases(&mut client).await, 0);
    let other = Config::new(etcd.endpoints()).with_ttl(Ttl::new(Duration::from_secs(120)).unwrap());
    node(2).acquire(&EtcdSubnets::new(other).unwrap()).await;
    let id = client.leases().await.unwrap().leases()[0].id();
    assert_eq!(client.lease_time_to_live(id, None).await.unwrap().granted_ttl(), 120);
}

/// A clock on which leases of a year have ended.
struct Later;

#[async_trait::async_trait]
impl Clock for Later {
    fn now(&self) -> BootTime {
        SystemClock::default().now().after(Duration::from_secs(400 * 86_400))
    }

    async fn sleep_until(&self, _: BootTime) {}
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_whose_time_is_over_is_not_renewed_though_its_record_stands() {
    let (etcd, store) = single(Version::Debian).await;
    let mut client = raw(&etcd).await;
    let lease = node(1).acquire(&store).await;
    let before = dump(&mut client).await;
    let late = store.clone().with_clock(Arc::new(Later));
    assert!(matches!(late.renew(&lease).await, Err(SubnetError::Lost(_))));
    assert_eq!(dump(&mut client).await, before);
    assert_eq!(node(1).acquire(&late).await.key, lease.key, "to acquire is the way back");
}

async fn race(version: Version, config: &str) -> Duration {
    let (etcd, store) = single(version).await;
    store.put_config_json(config).await.unwrap();
    let start = Instant::now();
    let mut racing = JoinSet::new();
    for n in 0..50 {
        // One connection each, as with that many hosts.
        let store = common::open(&etcd);
        let want = node(n).preferring("10.5.20.0/24");
        racing.spawn(async move { store.acquire(&node(n).id, want).await });
    }
    let won: Vec<Lease> = racing
        .join_all()
        .await
        .into_iter()
        .map(|lease| lease.unwrap_or_else(|error| panic!("{}", chain(&error))))
        .collect();
    let took = start.elapsed();
    for (n, one) in won.iter().enumerate() {
        for two in &won[n + 1..] {
            assert!(
                !one.subnets.iter().any(|(_, a)| two.subnets.iter().any(|(_, b)| a.overlaps(b))),
                "{one:?} {two:?}"
            );
        }
    }
    assert_eq!(store.list().await.unwrap().len(), 50);
    assert_eq!(leases(&mut raw(&etcd).await).await, 50, "no etcd lease is left by a lost race");
    took
}

#[tokio::test(flavor = "multi_thread")]
async fn fifty_agents_race_for_64_subnets() {
    for version in Version::ALL {
        let small = r#"{"Network":"10.5.0.0/16","SubnetMax":"10.5.64.0","Backend":{"Type":"vxlan"}}"#;
        for config in [small, DUAL] {
            let took = race(version, config).await;
            println!("50 agents, 64 subnets, {version:?}, dual {}: {took:?}", config == DUAL);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lease_of_ours_that_overlaps_an_older_one_is_replaced() {
    let (etcd, store) = single(Version::Current).await;
    let mut client = raw(&etcd).await;
    store.put_config_json(DUAL).await.unwrap();
    // Two Go flannels choose each half independently: the IPv4 halves are equal, the keys are not.
    for (key, n) in [("10.5.7.0-24&fd00:5:0:9::-64", 1), ("10.5.7.0-24&fd00:5:0:8::-64", 2)] {
        client.lease_grant(86_400, Some(LeaseGrantOptions::new().with_id(n))).await.unwrap();
        let value = node(u16::try_from(n).unwrap()).attrs.to_json();
        client.put(format!("{BASE}/subnets/{key}"), value, Some(PutOptions::new().with_lease(n))).await.unwrap();
    }
    let older = node(1).acquire(&store).await;
    assert_eq!(older.key.as_str(), "10.5.7.0-24&fd00:5:0:9::-64", "the older one stays");
    let younger = node(2).acquire(&store).await;
    assert_ne!(younger.subnets.v4, older.subnets.v4);
    assert_eq!(store.list().await.unwrap().len(), 2);
}

/// Creates a store behind a proxy.
fn behind(proxy: &Proxy, prefix: &str) -> EtcdSubnets {
    let prefix = KeyPrefix::new(prefix).unwrap();
    EtcdSubnets::new(Config::new([proxy.endpoint()]).with_prefix(prefix)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_lost_at_any_point_leaves_one_lease_ours() {
    let (etcd, _) = single(Version::Current).await;
    let mut client = raw(&etcd).await;
    let mut points = 0;
    for point in 0..60 {
        let proxy = Proxy::start(&etcd.endpoint(0)).await;
        let store = behind(&proxy, &format!("/lost/{point}"));
        store.put_config_json(common::CONFIG).await.unwrap();
        proxy.lose_after(point);
        let mut lease = None;
        for _ in 0..4 {
            lease = store.acquire(&node(1).id, node(1).want()).await.ok();
            if lease.is_some() {
                break;
            }
        }
        let mut lease = lease.expect("the loss is over");
        for _ in 0..3 {
            match store.renew(&lease).await {
                Ok(renewed) => lease = renewed,
                Err(SubnetError::Unavailable { .. }) => {}
                Err(error) => panic!("at {point}: {}", chain(&error)),
            }
        }
        let records = store.list().await.unwrap();
        assert_eq!(records.len(), 1, "at {point}: {records:?}");
        assert_eq!(records[0].key, lease.key);
        let mut released = store.release(lease.clone()).await;
        if released.is_err() {
            released = store.release(lease).await;
        }
        released.unwrap();
        assert!(store.list().await.unwrap().is_empty());
        if !proxy.has_lost() {
            points = point;
            break;
        }
    }
    assert!(points > 10, "the loss reached every answer of acquire, renew and release: {points}");
    let left = leases(&mut client).await;
    println!("an answer lost at each of {points} points: {left} etcd leases left to end by themselves");
    assert!(left <= 6, "{left} etcd leases leaked");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_whose_fate_is_unknown_is_ours_and_is_tried_again_with_the_same_etcd_lease() {
    let (etcd, _) = single(Version::Current).await;
    let mut client = raw(&etcd).await;
    let mut unknown = 0;
    // On a busy machine answers are merged: then no cut may fall between the write and its answer.
    for sweep in 0..8 {
        for point in 0..30 {
            let proxy = Proxy::start(&etcd.endpoint(0)).await;
            let store = behind(&proxy, &format!("/fate/{sweep}/{point}"));
            store.put_config_json(common::CONFIG).await.unwrap();
            let lease = node(1).acquire(&store).await;
            let renew = async |point| {
                // Over an existing connection.
                store.network_config().await.unwrap();
                proxy.shut_after(point);
                let renewed = store.renew(&lease).await;
                proxy.open();
                renewed
            };
            if renew(point).await.is_ok() {
                break;
            }
            let record = store.list().await.unwrap().remove(0);
            if record.lease.unwrap().fence == lease.fence {
                continue;
            }
            unknown += 1;
            let before = leases(&mut client).await;
            for _ in 0..3 {
                renew(0).await.unwrap_err();
            }
            assert_eq!(leases(&mut client).await, before, "at {point}");
            proxy.lose_after(-1);
            // The node's address has changed meanwhile.
            let moved = store.renew(&lease.publishing(node(2).attrs)).await;
            let moved = moved.unwrap_or_else(|error| panic!("at {point}: {}", chain(&error)));
            assert_eq!(store.list().await.unwrap()[0].lease.as_ref().unwrap().attrs, node(2).attrs);
            assert_eq!(leases(&mut client).await, before - 1, "that of the lease before is ended");
            store.release(moved).await.unwrap();
        }
        if unknown > 0 {
            return;
        }
    }
    panic!("no renewal was written without our hearing of it");
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_are_no_subnets_are_bad_and_keep_nobody_out() {
    let (etcd, store) = single(Version::Debian).await;
    let mut client = raw(&etcd).await;
    // None of those that are written below.
    let good = store.acquire(&node(1).id, node(1).preferring("10.5.200.0/24")).await.unwrap();
    let value = node(2).attrs.to_json();
    // The whole network, half a key, a subnet with host bits, a key in a directory, and invalid keys.
    for key in ["10.5.0.0-16", "10.5.99.0", "10.5.7.1-24", "old/10.5.8.0-24", "0.0.0.0-0", "garbage", "", "\u{7f}"] {
        client.put(format!("{BASE}/subnets/{key}"), value.clone(), None).await.unwrap();
    }
    client.put(format!("{BASE}/subnets/10.5.9.0-24"), "{".repeat(1_400_000), None).await.unwrap();
    client.put([BASE.as_bytes(), b"/subnets/\xff\xfe-24"].concat(), value, None).await.unwrap();
    let records = store.list().await.unwrap();
    assert_eq!(records.len(), 11);
    let is_good: Vec<_> =
        records.iter().filter(|record| record.lease.is_ok()).map(|record| record.key.as_str()).collect();
    assert_eq!(
        is_good,
        ["10.5.0.0-16", good.key.as_str()]
            .into_iter()
            .collect::<std::collections::BTreeSet<_>>()
            .into_iter()
            .collect::<Vec<_>>()
    );
    let mut taken = vec![good.subnets];
    for n in 10..60 {
        taken.push(node(n).acquire(&store).await.subnets);
    }
    for bad in ["10.5.7.0/24", "10.5.8.0/24", "10.5.9.0/24"] {
        assert!(!taken.contains(&v4(bad)), "{bad} is named by a bad record");
    }
    assert_eq!(dump(&mut client).await.len(), 1 + 11 + 50, "nobody deletes what is another's");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_values_do_not_hide_the_records_beside_them() {
    let (etcd, store) = single(Version::Debian).await;
    let mut client = raw(&etcd).await;
    for n in 1..=8 {
        client.put(format!("{BASE}/subnets/10.5.{n}.0-24"), "x".repeat(1_000_000), None).await.unwrap();
    }
    let good = node(1).acquire(&store).await;
    let mut watcher = common::watch(&store).await;
    assert_eq!((watcher.seen.len(), watcher.good(&good.key).is_some()), (9, true));
    let late = node(2).acquire(&store).await;
    watcher.until(20, "a new lease beside large values", |watcher| watcher.good(&late.key).is_some()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_store_is_unavailable_with_its_remedy() {
    let options =
        Options { flags: vec!["--quota-backend-bytes=4000000".to_owned()], ..Options::single(Version::Current) };
    let etcd = Etcd::start(options).unwrap();
    let store = common::open(&etcd);
    store.put_config_json(common::CONFIG).await.unwrap();
    let lease = node(1).acquire(&store).await;
    let mut client = raw(&etcd).await;
    while client.put("/filler", "x".repeat(1_000_000), None).await.is_ok() {}
    let error = store.renew(&lease).await.unwrap_err();
    assert!(matches!(error, SubnetError::Unavailable { .. }), "{error:?}");
    assert!(
        chain(&error).contains("etcdctl alarm disarm") && chain(&error).contains(&etcd.endpoint(0)),
        "{}",
        chain(&error)
    );
    assert!(store.acquire(&node(2).id, node(2).want()).await.is_err());
    assert_eq!(store.list().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_took_our_revision_after_a_restore_is_not_ours() {
    let (mut etcd, store) = single(Version::Current).await;
    etcd.back_up().unwrap();
    let ours = store.acquire(&node(1).id, node(1).preferring("10.5.5.0/24")).await.unwrap();
    etcd.restore().unwrap();
    let store = common::open(&etcd);
    let theirs = store.acquire(&node(2).id, node(2).preferring("10.5.5.0/24")).await.unwrap();
    assert_eq!(theirs.key, ours.key);
    let error = store.renew(&ours).await.unwrap_err();
    assert!(matches!(error, SubnetError::Lost(_)), "{error:?}");
    store.release(ours).await.unwrap();
    assert_eq!(store.list().await.unwrap()[0].lease.as_ref().unwrap().attrs, node(2).attrs);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_or_wrong_is_named() {
    let (etcd, store) = single(Version::Debian).await;
    let config = |prefix: &str| Config::new(etcd.endpoints()).with_prefix(KeyPrefix::new(prefix).unwrap());
    let error = EtcdSubnets::new(config("/elsewhere")).unwrap().network_config().await.unwrap_err();
    assert!(error.to_string().contains("/elsewhere/config"), "{error}");
    let error = store.put_config_json(r#"{"Network":"10.5.0.0/16","SubnetLen":31}"#).await.unwrap_err();
    assert!(error.to_string().contains("$.SubnetLen"), "{error}");
    assert!(store.network_config().await.is_ok(), "what does not parse is not written");
    let error = store.previous(&NodeIdentity::new("node-1").unwrap()).await.unwrap_err();
    assert!(error.to_string().contains("public IP"), "{error}");
    let error = store.acquire(&node(1).id, node(2).want()).await.unwrap_err();
    assert!(matches!(error, SubnetError::Invalid { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_finds_its_record_among_more_than_a_list_holds() {
    let (etcd, store) = single(Version::Current).await;
    let mut client = raw(&etcd).await;
    // Each counts as 16 records: together they leave no room for a newer one.
    let mut attrs = node(9).attrs;
    attrs.backend_data.v6 = Json::parse(&format!("\"{}\"", "x".repeat(15 * RECORD_BYTES))).ok();
    let value = attrs.to_json();
    let count = (MAX_RECORDS + MAX_RECORDS / 8) / 16 + 1;
    for chunk in (0..count as u32).collect::<Vec<_>>().chunks(100) {
        let put = |n: &u32| {
            let addr = Ipv4Addr::from(0x0a40_0000 + (n << 2));
            TxnOp::put(format!("{BASE}/subnets/{addr}-30"), value.clone(), None)
        };
        client.txn(Txn::new().and_then(chunk.iter().map(put).collect::<Vec<_>>())).await.unwrap();
    }
    let lease = node(3).acquire(&store).await;
    let is_listed = |records: &[Record]| records.iter().any(|record| record.key == lease.key);
    let records = store.list().await.unwrap();
    assert!(!is_listed(&records) && !is_complete(&records));
    let previous = store.previous(&node(3).id).await.unwrap();
    assert_eq!(previous.iter().map(|lease| &lease.key).collect::<Vec<_>>(), [&lease.key]);
    assert_eq!(node(3).acquire(&store).await.key, lease.key);
    // A record that is not listed is taken nevertheless.
    let other = store.acquire(&node(4).id, node(4).want().preferring(lease.subnets)).await.unwrap();
    assert_ne!(other.subnets, lease.subnets);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_whose_lease_ran_out_does_not_take_that_of_another_node_at_its_address() {
    for version in Version::ALL {
        let (etcd, store) = single(version).await;
        let mut client = raw(&etcd).await;
        // A node of Go flannel published a virtual address that this node has now.
        client.lease_grant(86_400, Some(LeaseGrantOptions::new().with_id(77))).await.unwrap();
        let mac = |mac: &str| Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text(mac))]);
        let mut theirs = node(1).attrs;
        theirs.backend_data.v4 = Some(mac("02:00:00:00:00:77"));
        let key = format!("{BASE}/subnets/10.5.1.0-24");
        client.put(key.clone(), theirs.to_json(), Some(PutOptions::new().with_lease(77))).await.unwrap();
        let before = dump(&mut client).await[&key].clone();

        let own =
            store.acquire(&node(1).id, node(1).preferring("10.5.9.0/24").owning(OwnLeases::Unheld)).await.unwrap();
        assert_eq!(own.subnets, v4("10.5.9.0/24"));
        let previous = store.previous(&node(1).id).await.unwrap();
        assert_eq!(previous.iter().map(|lease| lease.key.as_str()).collect::<Vec<_>>(), ["10.5.1.0-24", "10.5.9.0-24"]);
        assert!(previous.iter().all(|lease| lease.expires.is_some()));
        // The lease expires.
        let id = dump(&mut client).await[&format!("{BASE}/subnets/10.5.9.0-24")].1;
        client.lease_revoke(id).await.unwrap();
        for (n, preferred) in ["10.5.9.0/24", "10.5.1.0/24"].into_iter().enumerate() {
            let mut want = node(1).preferring(preferred).owning(OwnLeases::Key(own.key.clone()));
            want.attrs.backend_data.v4 = Some(mac(&format!("02:00:00:00:01:0{n}")));
            let lease = store.acquire(&node(1).id, want).await.unwrap();
            assert_ne!(lease.subnets, v4("10.5.1.0/24"), "it is another node's");
            assert_eq!(dump(&mut client).await[&key], before, "the other's record is as it was");
            store.release(lease).await.unwrap();
        }
        assert_eq!(leases(&mut client).await, 1, "only the other's etcd lease is left");
    }
}
