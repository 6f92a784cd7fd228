//! A node that had another network before.

use std::sync::Arc;

use flannel_core::kernel::{Claim, Kernel, KernelError, Link, LinkKind, LinkName, Op, OverlayName, Residence};
use flannel_core::net::{Dual, Prefix};
use flannel_core::overlay::{EnvFile, Masquerade, Overlay, Phase, Status, SubnetEnvFile};
use flannel_core::subnet_env::SubnetEnv;
use flannel_core::testing::fake_kernel::{FakeRoute, Placement};

use crate::node::{Agent, Node, parse, pass};

const OTHER: &str = r#"{"Network":"10.43.0.0/16","Backend":{"Type":"tunnel"}}"#;

/// A node that ran in 10.42.0.0/16 with twenty peers, ended without warning, and finds 10.43.0.0/16 in the store. Beside
/// its own routes there is a foreign one in the former network.
struct Moved {
    node: Node,
    file: SubnetEnvFile,
    dir: tempfile::TempDir,
}

impl Moved {
    async fn new() -> Self {
        let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
        let file = SubnetEnvFile::new(dir.path().join("subnet.env"), Masquerade::Agent);
        let moved = Self { node, file, dir };
        moved.node.join(1..=20);
        let agent = moved.run();
        agent.until(|status| status.subnet_env == EnvFile::Settled).await;
        agent.ready().await;
        agent.killed().await;
        moved.add_route("10.42.99.0/24", |route| route);
        moved.node.leave(1..=20);
        moved.node.store.set_config(parse(OTHER));
        assert!(moved.dir.path().exists());
        moved
    }

    fn run(&self) -> Agent {
        self.node.run_as(self.node.builder().subnet_env(self.file.clone()))
    }

    /// A route through the uplink, foreign but for `change`.
    fn add_route(&self, prefix: &str, change: fn(FakeRoute) -> FakeRoute) {
        let eth0 = self.node.kernel.link_index("eth0").unwrap();
        let route = FakeRoute::via(prefix.parse().unwrap(), "192.0.2.77".parse().unwrap(), eth0);
        self.node.kernel.add_route(change(route), Placement::Exclusive).unwrap();
    }

    /// A route of ours where host-gw would have left it: it does not go with a device.
    fn add_direct(&self, prefix: &str) {
        self.add_route(prefix, |route| FakeRoute { protocol: 205, ..route });
    }

    /// An agent that does not run.
    fn overlay(&self) -> Overlay {
        let builder = self.node.builder().subnet_env(self.file.clone());
        builder.build(Arc::new(self.node.store.clone()), Arc::new(self.node.kernel.clone())).unwrap()
    }

    /// Another overlay in the former network.
    async fn claim(&self, network: &str) -> Result<Claim, KernelError> {
        let networks = Dual { v4: network.parse().ok(), v6: None };
        self.node.kernel.claim(&OverlayName::new("other").unwrap(), &networks, Residence::Present).await
    }

    /// The routes left in the former network, the foreign one apart.
    fn left(&self) -> usize {
        let snapshot = self.node.kernel.snapshot();
        snapshot.matching("route 10.42.").iter().filter(|route| !route.contains("10.42.99.0/24")).count()
    }

    /// The files beside each other: subnet.env, and what is remembered.
    fn files(&self) -> usize {
        std::fs::read_dir(self.dir.path()).unwrap().count()
    }

    fn network_in_file(&self) -> Option<Prefix> {
        SubnetEnv::read(&self.file.path).unwrap()?.networks.v4
    }
}

/// Nothing is pending any more.
fn settled(status: &Status) -> bool {
    status.subnet_env == EnvFile::Settled && status.former.is_empty() && status.phase == Phase::Ready
}

fn refused_in(part: &'static str) -> impl FnMut(&Op) -> Option<i32> + Send + 'static {
    move |op| matches!(op, Op::DeleteRoute { prefix, .. } if prefix.to_string().starts_with(part)).then_some(16)
}

#[tokio::test(start_paused = true)]
async fn routes_of_a_former_network_go_and_a_foreign_one_stays() {
    let moved = Moved::new().await;
    assert_eq!(moved.left(), 20);
    let agent = moved.run();
    agent.until(settled).await;
    assert_eq!((moved.left(), moved.network_in_file()), (0, Some("10.43.0.0/16".parse().unwrap())));
    assert_eq!(moved.node.kernel.snapshot().matching("route 10.42.99.0/24").len(), 1);
    let writes = moved.node.kernel.writes();
    agent.audited().await;
    assert_eq!((moved.node.kernel.writes(), moved.files()), (writes, 1));
}

#[tokio::test(start_paused = true)]
async fn a_former_network_is_remembered_until_nothing_is_left_there() {
    let moved = Moved::new().await;
    moved.node.kernel.refuse_if(refused_in("10.42.7."));
    let agent = moved.run();
    agent.until(|status| status.subnet_env == EnvFile::Settled).await;
    pass(20.0).await;
    // Pods get addresses of the present network all the same.
    assert_eq!((moved.left(), moved.network_in_file()), (1, Some("10.43.0.0/16".parse().unwrap())));
    let status = agent.status();
    assert_eq!((&**status.former, status.phase), (&["10.42.0.0/16".parse().unwrap()][..], Phase::Ready));
    agent.killed().await;
    moved.node.kernel.obey();
    let agent = moved.run();
    agent.until(settled).await;
    assert_eq!((moved.left(), moved.network_in_file()), (0, Some("10.43.0.0/16".parse().unwrap())));
}

#[tokio::test(start_paused = true)]
async fn two_changes_of_network_with_a_kill_between_leave_nothing() {
    let moved = Moved::new().await;
    moved.add_direct("10.42.77.0/24");
    moved.node.kernel.refuse_if(refused_in("10.42."));
    let agent = moved.run();
    agent.ready().await;
    moved.add_direct("10.43.77.0/24");
    agent.killed().await;
    moved.node.kernel.obey();
    moved.node.store.set_config(parse(r#"{"Network":"10.44.0.0/16","Backend":{"Type":"tunnel"}}"#));
    let agent = moved.run();
    agent.until(settled).await;
    let snapshot = moved.node.kernel.snapshot();
    assert!(snapshot.matching("route 10.42.77").is_empty() && snapshot.matching("route 10.43.77").is_empty());
    agent.audited().await;
    assert_eq!((moved.files(), moved.network_in_file()), (1, Some("10.44.0.0/16".parse().unwrap())));
}

#[tokio::test(start_paused = true)]
async fn a_removal_clears_the_former_network_too_or_keeps_its_memory() {
    let moved = Moved::new().await;
    moved.add_direct("10.42.77.0/24");
    for (refusing, left, files) in [(true, 1, 1), (false, 0, 0)] {
        moved.node.kernel.refuse_if(refused_in("10.42.77."));
        let builder = moved.node.builder().subnet_env(moved.file.clone());
        let agent = moved.node.run_as(builder);
        agent.until(|status| !status.former.is_empty() && status.subnet_env == EnvFile::Settled).await;
        pass(5.0).await;
        if !refusing {
            moved.node.kernel.obey();
        }
        let outcome = agent.removed().await;
        assert_eq!((outcome.is_err(), moved.left(), moved.files()), (refusing, left, files), "{outcome:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_former_network_that_another_overlay_has_now_is_left_alone() {
    let moved = Moved::new().await;
    let _other = moved.claim("10.42.0.0/17").await.unwrap();
    let agent = moved.run();
    agent.until(|status| status.subnet_env == EnvFile::Settled).await;
    assert_eq!((moved.left(), moved.network_in_file()), (20, Some("10.43.0.0/16".parse().unwrap())));
}

/// The other overlay is stopped, so that it claims nothing.
#[tokio::test(start_paused = true)]
async fn routes_through_the_device_of_another_overlay_stay_in_a_former_network() {
    for run in [true, false] {
        let moved = Moved::new().await;
        let other = OverlayName::new("other").unwrap();
        let (name, kind) = (LinkName::new("other.1").unwrap(), LinkKind::Other("dummy".into()));
        let mut device = Link::new(name, kind, 1450);
        (device.group, device.alias) = (other.mark(), Some(other.alias().into()));
        let device = moved.node.kernel.add_link(device).unwrap();
        let subnet: Prefix = "10.42.88.0/24".parse().unwrap();
        let route = FakeRoute { protocol: 205, onlink: true, ..FakeRoute::via(subnet, subnet.addr(), device) };
        moved.node.kernel.add_route(route, Placement::Exclusive).unwrap();
        if run {
            let agent = moved.run();
            agent.until(settled).await;
            agent.cancelled().await.unwrap();
        } else {
            moved.overlay().remove().await.unwrap();
        }
        let left = moved.node.kernel.snapshot();
        assert_eq!((moved.left(), left.matching("route 10.42.88.0/24").len()), (1, 1), "{run}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_removal_that_fails_remembers_where_the_next_one_has_to_look() {
    let moved = Moved::new().await;
    let builder = moved.node.builder().subnet_env(moved.file.clone());
    let agent = moved.node.run_as(builder);
    agent.until(settled).await;
    moved.node.kernel.refuse_if(refused_in("10.43.77."));
    moved.add_direct("10.43.77.0/24");
    assert!(agent.removed().await.is_err());
    assert!(!moved.file.path.exists());
    moved.node.kernel.obey();
    moved.node.store.outage();
    moved.overlay().remove().await.unwrap();
    assert!(moved.node.kernel.snapshot().matching("route 10.43.77.0/24").is_empty());
    assert_eq!(moved.files(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_removal_is_not_kept_from_the_present_network_by_who_has_the_former_one() {
    let moved = Moved::new().await;
    let agent = moved.run();
    agent.until(settled).await;
    agent.killed().await;
    std::fs::write(&moved.file.path, "FLANNEL_NETWORK=10.42.0.0/16\n").unwrap();
    let _other = moved.claim("10.42.0.0/17").await.unwrap();
    let removed = moved.overlay().remove().await.unwrap();
    assert!(removed.objects > 0 && moved.node.kernel.link_index("tun4.1").is_none(), "{removed:?}");
}

#[tokio::test(start_paused = true)]
async fn nobody_moves_into_a_former_network_before_it_is_clear() {
    let moved = Moved::new().await;
    moved.node.kernel.refuse_if(refused_in("10.42.7."));
    let agent = moved.run().once_ready().await;
    assert!(matches!(moved.claim("10.42.0.0/16").await, Err(KernelError::Conflict { .. })));
    moved.node.kernel.obey();
    agent.until(settled).await;
    let _other = moved.claim("10.42.0.0/16").await.unwrap();
    agent.cancelled().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_old_state_file_clears_no_network_while_the_store_is_away() {
    use flannel_core::subnet::SubnetManager;
    use flannel_subnet_cached::CachedSubnets;
    let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
    let file = SubnetEnvFile::new(dir.path().join("subnet.env"), Masquerade::Agent);
    let run = || {
        let clock = Arc::clone(&node.clock) as _;
        let cached =
            Arc::new(CachedSubnets::new(Arc::new(node.store.clone()), dir.path().join("state.json"), "m", clock));
        let store: Arc<dyn SubnetManager> = cached.clone();
        (node.run_on(node.builder().subnet_env(file.clone()), Arc::new(node.kernel.clone()), store), cached)
    };
    let first = node.store.network_config().await.unwrap();
    node.store.set_config(parse(OTHER));
    let (agent, cached) = run();
    agent.until(|status| status.subnet_env == EnvFile::Settled).await;
    agent.cancelled().await.unwrap();
    cached.flush().await.unwrap();
    node.store.set_config(first);
    node.join(1..=5);
    let (agent, _c) = run();
    agent.until(|status| status.subnet_env == EnvFile::Settled).await;
    agent.ready().await;
    agent.killed().await;
    let count = || node.kernel.snapshot().matching("route 10.42.").len();
    let before = count();
    node.store.outage();
    let (agent, _c) = run();
    pass(60.0).await;
    assert_eq!((count(), before), (before, 5), "{:?}", agent.status());
}
