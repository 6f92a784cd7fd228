//! What a watch reports when connections, members and histories are lost.

use std::time::{Duration, Instant};

use etcd_client::{Client, CompactionOptions, ConnectOptions, StatusResponse};
use flannel_core::lease::{Lease, LeaseKey};
use flannel_core::subnet::{SubnetError, SubnetManager};
use flannel_subnet_etcd::{ClearText, Config, Credentials, EtcdSubnets, Password, Timeouts};
use testkit::etcd::{Etcd, Options, Version};

use crate::common::{self, chain, established, node, open, raw, single, v4, watch, watching};
use crate::proxy::Proxy;

fn through(proxy: &Proxy) -> EtcdSubnets {
    EtcdSubnets::new(Config::new([proxy.endpoint()])).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cut_connection_costs_no_event_and_no_listing() {
    for version in Version::ALL {
        let (etcd, store) = single(version).await;
        let proxy = Proxy::start(&etcd.endpoint(0)).await;
        let (stays, goes) = (node(1).acquire(&store).await, node(2).acquire(&store).await);
        let mut watcher = watching(&through(&proxy), &store).await;
        proxy.shut();
        let comes = node(4).acquire(&store).await;
        store.release(goes.clone()).await.unwrap();
        watcher.until(20, "trouble is shown", |watcher| !watcher.errors.is_empty()).await;
        proxy.open();
        let took = watcher
            .until(30, "what was missed", |watcher| {
                watcher.good(&comes.key).is_some() && !watcher.seen.contains_key(&goes.key)
            })
            .await;
        println!("{version:?}: caught up {took:?} after the way was open again");
        assert_eq!(watcher.resets, 1, "it resumes");
        assert!(watcher.good(&stays.key).is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn compaction_past_the_cut_shows_adds_removes_and_changes() {
    for version in Version::ALL {
        let (etcd, store) = single(version).await;
        let proxy = Proxy::start(&etcd.endpoint(0)).await;
        let (changes, goes) = (node(1).acquire(&store).await, node(2).acquire(&store).await);
        let mut watcher = watching(&through(&proxy), &store).await;
        proxy.shut();
        let mut attrs = changes.attrs.clone();
        attrs.backend_type = "host-gw".into();
        let changed = store.renew(&changes.publishing(attrs)).await.unwrap();
        store.release(goes.clone()).await.unwrap();
        let comes = node(3).acquire(&store).await;
        let mut client = raw(&etcd).await;
        let revision = client.get("x", None).await.unwrap().header().unwrap().revision();
        client.compact(revision, Some(CompactionOptions::new().with_physical())).await.unwrap();
        proxy.open();
        watcher.until(30, "a second snapshot", |watcher| watcher.resets == 2).await;
        assert_eq!(watcher.good(&changed.key).unwrap().attrs, changed.attrs);
        assert!(watcher.good(&comes.key).is_some() && !watcher.seen.contains_key(&goes.key));
        let late = node(4).acquire(&store).await;
        watcher.until(20, "events after it", |watcher| watcher.good(&late.key).is_some()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_restored_from_a_backup_is_listed_anew() {
    for (version, is_established) in [(Version::Debian, false), (Version::Debian, true), (Version::Current, true)] {
        let (mut etcd, store) = single(version).await;
        let kept = node(1).acquire(&store).await;
        etcd.back_up().unwrap();
        let store = open(&etcd);
        let lost = node(2).acquire(&store).await;
        let mut watcher = watch(&store).await;
        assert!(watcher.good(&lost.key).is_some());
        if is_established {
            established(&mut watcher, &store).await;
        }
        etcd.restore().unwrap();
        watcher.until(30, "a snapshot of the restored store", |watcher| watcher.resets == 2).await;
        assert!(watcher.good(&kept.key).is_some() && !watcher.seen.contains_key(&lost.key));
        let late = node(3).acquire(&open(&etcd)).await;
        watcher.until(20, "events after it", |watcher| watcher.good(&late.key).is_some()).await;
    }
}

async fn three(version: Version) -> (Etcd, EtcdSubnets) {
    let etcd =
        Etcd::start(Options { members: 3, ..Options::single(version) }).unwrap_or_else(|error| panic!("{error}"));
    let store = open(&etcd);
    store.put_config_json(common::CONFIG).await.unwrap();
    (etcd, store)
}

/// Returns a member's status, once it answers.
async fn status(etcd: &Etcd, n: usize) -> StatusResponse {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        let asked = match Client::connect([etcd.endpoint(n)], None).await {
            Ok(mut client) => client.status().await,
            Err(error) => Err(error),
        };
        match asked {
            Ok(status) => return status,
            Err(error) => assert!(Instant::now() < end, "{error}"),
        }
    }
}

async fn leader(etcd: &Etcd) -> usize {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        for n in 0..3 {
            let status = status(etcd, n).await;
            if status.leader() == status.header().unwrap().member_id() {
                return n;
            }
        }
        // An election may be in progress.
        assert!(Instant::now() < end, "no leader");
    }
}

/// Returns a store that contacts member `n` first.
fn beginning_with(etcd: &Etcd, n: usize) -> EtcdSubnets {
    let mut endpoints = etcd.endpoints();
    endpoints.rotate_left(n);
    EtcdSubnets::new(Config::new(endpoints)).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_leader_is_left_for_another_member() {
    let (mut etcd, _) = three(Version::Current).await;
    let n = leader(&etcd).await;
    let store = beginning_with(&etcd, n);
    let mut watcher = watching(&store, &store).await;
    let lease = node(1).acquire(&store).await;
    etcd.kill(n);
    let others = beginning_with(&etcd, (n + 1) % 3);
    // Until the two others have a leader.
    let late = answered(async || others.acquire(&node(2).id, node(2).want()).await).await;
    let took = watcher.until(30, "a lease after the leader's death", |watcher| watcher.good(&late.key).is_some()).await;
    println!("leader killed: the watch showed the next lease {took:?} after it was written");
    assert_eq!(watcher.resets, 1);
    answered(async || store.renew(&lease).await).await;
}

/// Retries until there is an answer: a call in progress when a member fails may not get one.
async fn answered(ask: impl AsyncFn() -> Result<Lease, SubnetError>) -> Lease {
    let end = Instant::now() + Duration::from_secs(30);
    loop {
        match ask().await {
            Ok(lease) => return lease,
            Err(SubnetError::Unavailable { .. }) if Instant::now() < end => {}
            Err(error) => panic!("{}", chain(&error)),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_restart_one_after_the_other_cost_no_event_and_no_listing() {
    restarted_in_turn(Version::Current).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn members_that_are_upgraded_one_after_the_other_cost_no_event_and_no_listing() {
    restarted_in_turn(Version::Previous).await;
}

/// Upgrades three members of a version to the current one.
async fn restarted_in_turn(version: Version) {
    let (mut etcd, store) = three(version).await;
    let mut watcher = watching(&store, &store).await;
    let mut lease = node(1).acquire(&store).await;
    for n in 0..3 {
        // Upgrades the next member only once this one is healthy again.
        etcd.restart_as(n, Version::Current).unwrap();
        let other = node(10 + u16::try_from(n).unwrap());
        let joined = answered(async || store.acquire(&other.id, other.want()).await).await;
        watcher.until(30, "who joined meanwhile", |watcher| watcher.good(&joined.key).is_some()).await;
        lease = answered(async || store.renew(&lease).await).await;
        let status = status(&etcd, n).await;
        assert!(status.version().starts_with("3.7."), "{}", status.version());
    }
    assert_eq!(watcher.resets, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_frozen_member_is_noticed_and_left_for_another() {
    for n_is_leader in [false, true] {
        let (etcd, _) = three(Version::Debian).await;
        let leader = leader(&etcd).await;
        let n = if n_is_leader { leader } else { (leader + 1) % 3 };
        let store = beginning_with(&etcd, n);
        let mut watcher = watching(&store, &store).await;
        etcd.pause(n).unwrap();
        let others = beginning_with(&etcd, (n + 1) % 3);
        let late = answered(async || others.acquire(&node(1).id, node(1).want()).await).await;
        // Keep-alive takes 10 s and 4 s; further delay comes from the machine. The member that was slow to connect to
        // is not the watched one.
        let shown = watcher.until(60, "a lease of meanwhile", |watcher| watcher.good(&late.key).is_some()).await;
        println!("frozen (leader: {n_is_leader}): caught up after {shown:?}, {:?}", watcher.errors);
        assert_eq!(watcher.resets, 1);
        etcd.resume(n).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_endpoint_is_passed_over() {
    let (etcd, _) = single(Version::Debian).await;
    let store = EtcdSubnets::new(Config::new(["http://127.0.0.1:9".to_owned(), etcd.endpoint(0)])).unwrap();
    let start = Instant::now();
    store.network_config().await.unwrap();
    node(1).acquire(&store).await;
    println!("beside a dead endpoint: {:?}", start.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_is_silent_is_not_waited_for() {
    let (etcd, _) = single(Version::Current).await;
    // Accepts connections and sends nothing.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let endpoints = [silent.local_addr().unwrap().to_string(), etcd.endpoint(0)];
    let never = Duration::from_secs(3600);
    let mut config = Config::new(endpoints);
    (config.timeouts.connect, config.timeouts.keep_alive) = (never, never);
    let store = EtcdSubnets::new(config).unwrap();
    let answer = tokio::time::timeout(Duration::from_secs(30), store.network_config()).await;
    answer.expect("it asks the other one").unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn etcd_may_come_after_the_agent() {
    let (mut etcd, store) = single(Version::Debian).await;
    let lease = node(1).acquire(&store).await;
    etcd.kill(0);
    let store = open(&etcd);
    let error = store.network_config().await.unwrap_err();
    assert!(matches!(error, SubnetError::Unavailable { .. }) && chain(&error).contains(&etcd.endpoint(0)), "{error:?}");
    let mut stream = store.watch();
    let first = futures_util::StreamExt::next(&mut stream).await;
    assert!(matches!(first, Some(Err(SubnetError::Unavailable { .. }))), "{first:?}");
    etcd.restart(0).unwrap();
    let mut watcher = watch(&store).await;
    watcher.until(1, "the lease of before", |watcher| watcher.good(&lease.key).is_some()).await;
    store.renew(&lease).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn an_injected_client_serves_too() {
    let (etcd, _) = single(Version::Current).await;
    let options = ConnectOptions::new().with_keep_alive(Duration::from_secs(10), Duration::from_secs(5));
    let client = Client::connect(etcd.endpoints(), Some(options)).await.unwrap();
    let prefix = flannel_subnet_etcd::KeyPrefix::default();
    let store = EtcdSubnets::with_client(client, &prefix, Default::default(), Timeouts::default());
    let mut watcher = watch(&store).await;
    let lease = store.acquire(&node(1).id, node(1).preferring("10.5.9.0/24")).await.unwrap();
    assert_eq!(lease.subnets, v4("10.5.9.0/24"));
    watcher.until(20, "its lease", |watcher| watcher.good(&lease.key).is_some()).await;
}

/// Creates users `root` and `flannel`, who may use only the prefix.
async fn with_authentication(etcd: &Etcd) -> Client {
    with_users(etcd).await.auth_enable().await.unwrap();
    let options = ConnectOptions::new().with_user("root", "toor").with_auto_token_refresh(true);
    Client::connect(etcd.endpoints(), Some(options)).await.unwrap()
}

/// Creates the same users before authentication is enabled.
async fn with_users(etcd: &Etcd) -> Client {
    use etcd_client::{Permission, PermissionType};
    let mut client = raw(etcd).await;
    client.user_add("root", "toor", None).await.unwrap();
    client.user_grant_role("root", "root").await.unwrap();
    client.user_add("flannel", "first", None).await.unwrap();
    client.role_add("flannel").await.unwrap();
    let all = Permission::new(PermissionType::Readwrite, "/coreos.com/network/").with_prefix();
    client.role_grant_permission("flannel", all).await.unwrap();
    client.user_grant_role("flannel", "flannel").await.unwrap();
    client
}

fn logged_in(etcd: &Etcd, password: Password) -> EtcdSubnets {
    let mut config = Config::new(etcd.endpoints());
    config.credentials = Some(Credentials { user: "flannel".to_owned(), password });
    config.clear_text = ClearText::AllowCredentials;
    EtcdSubnets::new(config).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_log_in_that_ends_and_a_rotated_password_are_survived() {
    for version in Version::ALL {
        let (mut etcd, _) = single(version).await;
        let mut root = with_authentication(&etcd).await;
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "first\n").unwrap();
        let store = logged_in(&etcd, Password::File(file.path().to_owned()));
        let lease = node(1).acquire(&store).await;
        let mut watcher = watching(&store, &store).await;

        // Log-ins are in the server's memory: a restart ends all of them.
        etcd.restart(0).unwrap();
        let lease = loop {
            match store.renew(&lease).await {
                Ok(lease) => break lease,
                Err(SubnetError::Unavailable { .. }) => {}
                Err(error) => panic!("{}", chain(&error)),
            }
        };
        let late = node(2).acquire(&store).await;
        watcher.until(30, "a lease after the log-in ended", |watcher| watcher.good(&late.key).is_some()).await;

        std::fs::write(file.path(), "second\n").unwrap();
        root.user_change_password("flannel", "second").await.unwrap();
        store.renew(&lease).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        let late = node(3).acquire(&store).await;
        watcher.until(30, "a lease after the password changed", |watcher| watcher.good(&late.key).is_some()).await;
        assert_eq!(watcher.resets, 1, "{:?}", watcher.errors);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_came_before_authentication_logs_in_once_it_is_enabled() {
    for version in Version::ALL {
        let (etcd, _) = single(version).await;
        let mut client = with_users(&etcd).await;
        let store = logged_in(&etcd, Password::Text(flannel_subnet_etcd::Secret::new("first")));
        let lease = node(1).acquire(&store).await;
        let without = open(&etcd);
        without.network_config().await.unwrap();
        client.auth_enable().await.unwrap();
        answered(async || store.renew(&lease).await).await;
        let error = without.network_config().await.unwrap_err();
        assert!(matches!(error, SubnetError::Denied { .. }), "{}", chain(&error));
        assert!(chain(&error).contains("give user and password"), "{}", chain(&error));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn who_may_not_is_denied_and_no_secret_is_shown() {
    let (etcd, _) = single(Version::Current).await;
    let mut root = with_authentication(&etcd).await;
    let secret = flannel_subnet_etcd::Secret::new("swordfish");
    let error = logged_in(&etcd, Password::Text(secret)).network_config().await.unwrap_err();
    assert!(matches!(error, SubnetError::Denied { .. }), "{}", chain(&error));
    assert!(!format!("{} {error:?}", chain(&error)).contains("swordfish"), "{error:?}");
    let error = open(&etcd).network_config().await.unwrap_err();
    assert!(matches!(error, SubnetError::Denied { .. }), "without a log-in: {}", chain(&error));
    root.user_revoke_role("flannel", "flannel").await.unwrap();
    let store = logged_in(&etcd, Password::Text(flannel_subnet_etcd::Secret::new("first")));
    let error = store.network_config().await.unwrap_err();
    assert!(matches!(error, SubnetError::Denied { .. }) && chain(&error).contains("role"), "{}", chain(&error));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_missing_permission_is_found_without_a_write() {
    use etcd_client::{Permission, PermissionType};
    for version in Version::ALL {
        let (etcd, _) = single(version).await;
        let mut root = with_authentication(&etcd).await;
        let store = logged_in(&etcd, Password::Text(flannel_subnet_etcd::Secret::new("first")));
        let before = root.get("x", None).await.unwrap().header().unwrap().revision();
        store.check_access().await.unwrap_or_else(|error| panic!("{}", chain(&error)));
        assert_eq!(root.get("x", None).await.unwrap().header().unwrap().revision(), before, "something was written");
        assert_eq!(store.roles_of("flannel").await.unwrap(), ["flannel"]);
        let keys = |kind| Permission::new(kind, "/coreos.com/network/").with_prefix();
        for (kind, denied) in [(PermissionType::Read, "writing a lease"), (PermissionType::Write, "reading the leases")]
        {
            root.role_grant_permission("flannel", keys(kind)).await.unwrap();
            let error = store.check_access().await.unwrap_err();
            assert!(matches!(&error, SubnetError::Denied { doing, .. } if *doing == denied), "{}", chain(&error));
            assert!(chain(&error).contains("etcdctl role grant-permission"), "{}", chain(&error));
        }
    }
}

/// etcd accepts larger values than a client reads if its operator raised `--max-request-bytes`.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_too_large_to_be_read_costs_a_listing_and_not_the_watch() {
    for version in [Version::Debian, Version::Current] {
        let flags = vec![format!("--max-request-bytes={}", 16 << 20)];
        let options = Options { flags, ..Options::single(version) };
        let etcd = Etcd::start(options).unwrap_or_else(|error| panic!("{error}"));
        let store = open(&etcd);
        store.put_config_json(common::CONFIG).await.unwrap();
        let mut watcher = watching(&store, &store).await;
        let large = format!("{}/subnets/10.5.7.0-24", common::BASE);
        raw(&etcd).await.put(&*large, vec![b'x'; 8 << 20], None).await.unwrap();
        let late = node(4).acquire(&store).await;
        watcher.until(20, "what came after it", |watcher| watcher.good(&late.key).is_some()).await;
        assert!(watcher.seen[&LeaseKey::new("10.5.7.0-24")].lease.is_err());
        assert_eq!(watcher.resets, 2);
        let later = node(5).acquire(&store).await;
        watcher.until(20, "events after it", |watcher| watcher.good(&later.key).is_some()).await;
        assert_eq!(watcher.resets, 2, "it is not met again");
    }
}
