//! The network's configuration that the agent goes by.

use std::future::pending;
use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::backoff::Backoff;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::net::Family;
use flannel_core::overlay::{Contact, Handle};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want};
use flannel_subnet_cached::CachedSubnets;
use futures_util::stream::BoxStream;
use tokio::sync::OnceCell;
use tokio::time::sleep;

use crate::chain;
use crate::options::Guard;

/// A store whose configuration stays what it was when first read: agent and firewall have to go by one, whatever is
/// written meanwhile. It takes no lease of another one: half an agent in another network reaches nobody.
pub(crate) struct InForce {
    inner: Arc<dyn SubnetManager>,
    /// What may stand in for the store.
    kept: Option<Arc<CachedSubnets>>,
    guard: Guard,
    pinned: OnceCell<Pinned>,
}

struct Pinned {
    config: NetworkConfig,
    said_by: SaidBy,
}

/// Who answered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum SaidBy {
    Store,
    StateFile,
}

impl InForce {
    pub(crate) fn new(inner: Arc<dyn SubnetManager>, kept: Option<Arc<CachedSubnets>>, guard: Guard) -> Self {
        Self { inner, kept, guard, pinned: OnceCell::new() }
    }

    /// Ends when the store says that a configuration of the state file is not its own any more: written while both agent
    /// and store were away, or while only the agent was.
    pub(crate) async fn outdated(&self, handle: Handle) {
        if handle.wait_for(|status| status.lease.is_some()).await.is_err() {
            return pending().await;
        }
        let Some(Pinned { config, said_by: SaidBy::StateFile }) = self.pinned.get() else { return pending().await };
        // A store that is said to be back may not be so yet for this question.
        let mut backoff = Backoff::default();
        loop {
            if handle.wait_for(|status| status.store == Contact::Live).await.is_err() {
                return pending().await;
            }
            match self.ask().await {
                Ok(Pinned { config: live, said_by: SaidBy::Store }) if differs(&live, config) => return,
                Ok(Pinned { said_by: SaidBy::Store, .. }) => return pending().await,
                Ok(Pinned { said_by: SaidBy::StateFile, .. }) | Err(_) => sleep(backoff.wait()).await,
            }
        }
    }

    /// The configuration as it is now.
    async fn ask(&self) -> Result<Pinned, SubnetError> {
        let config = self.inner.network_config().await?;
        // Told by the same call, with nothing in between.
        Ok(Pinned { config, said_by: if self.stands_in() { SaidBy::StateFile } else { SaidBy::Store } })
    }

    /// Whether the state file had to answer last.
    fn stands_in(&self) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.stands_in())
    }

    /// Refuses what cannot be kept, before there is a lease or a device.
    async fn pin(&self) -> Result<Pinned, SubnetError> {
        let pinned = self.ask().await?;
        if self.guard.lacks_its_tool(&pinned.config) {
            return Err(SubnetError::Invalid {
                at: "network configuration".to_owned(),
                reason: "-vxlan-guard needs nftables: set \"EnableNFTables\": true in it, or leave -vxlan-guard out"
                    .to_owned(),
            });
        }
        Ok(pinned)
    }
}

/// Whether the agent would have to do otherwise. Pools do not count: they govern what the store gives out from now on,
/// so that a node which waits for a subnet gets one as soon as an operator widens the pool.
fn differs(a: &NetworkConfig, b: &NetworkConfig) -> bool {
    let prefixes = |config: &NetworkConfig| config.networks.map(|_, network| network.prefix);
    prefixes(a) != prefixes(b)
        || a.enable_nftables != b.enable_nftables
        || a.backend.kind != b.backend.kind
        || !a.backend.settings.means(&b.backend.settings)
}

/// Whether a lease is of these networks, whatever the pools.
fn is_of(config: &NetworkConfig, lease: &Lease) -> bool {
    Family::BOTH.into_iter().all(|family| match (config.networks.get(family), lease.subnets.get(family)) {
        (Some(network), Some(subnet)) => network.prefix.covers(subnet),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    })
}

fn changed() -> SubnetError {
    SubnetError::Invalid {
        at: "network configuration changed since this agent started".to_owned(),
        reason: "restart it; until then it keeps devices and routes, and takes no lease".to_owned(),
    }
}

#[async_trait]
impl SubnetManager for InForce {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        self.inner.this_node().await
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        Ok(self.pinned.get_or_try_init(|| self.pin()).await?.config.clone())
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        self.inner.previous(node).await
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        let pinned = self.pinned.get_or_try_init(|| self.pin()).await?;
        let config = &pinned.config;
        // A store that was away from the start would take its time to say nothing; once it is back, `outdated` asks it.
        if pinned.said_by == SaidBy::Store || !self.stands_in() {
            match self.inner.network_config().await {
                Ok(live) if differs(&live, config) => return Err(changed()),
                // While the store is away, the state file may stand in for it.
                Ok(_) | Err(SubnetError::Unavailable { .. } | SubnetError::Denied { .. }) => {}
                Err(error) => return Err(error),
            }
        }
        let lease = self.inner.acquire(node, want).await?;
        if is_of(config, &lease) {
            return Ok(lease);
        }
        // Written between the two calls.
        if let Err(error) = self.inner.release(lease).await {
            tracing::warn!(error = chain(&error), "a lease of another network was not given back");
        }
        Err(changed())
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        self.inner.renew(lease).await
    }

    async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
        self.inner.release(lease).await
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        self.inner.watch()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;
    use std::path::Path;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
    use std::time::Duration;

    use flannel_backend_vxlan::Vxlan;
    use flannel_core::clock::TokioClock;
    use flannel_core::config::Allocation;
    use flannel_core::lease::{Fence, LeaseAttrs, LeaseKey};
    use flannel_core::net::Dual;
    use flannel_core::overlay::{Overlay, Phase};
    use flannel_core::subnet::MockSubnetManager;
    use flannel_core::testing::fake_kernel::{FakeRoute, Placement};
    use flannel_core::testing::{FakeKernel, MemorySubnets};
    use tokio::time::timeout;
    use tokio_util::sync::CancellationToken;

    use super::*;

    fn config(network: &str) -> NetworkConfig {
        let json = format!(r#"{{"Network":"{network}","Backend":{{"Type":"vxlan"}}}}"#);
        NetworkConfig::parse(json.as_bytes(), Allocation::Pool).unwrap()
    }

    /// A store that says these networks in turn, and then the last one for ever.
    fn store(networks: &[&str]) -> MockSubnetManager {
        let mut store = MockSubnetManager::new();
        let said: Mutex<VecDeque<_>> = Mutex::new(networks.iter().map(|network| config(network)).collect());
        store.expect_network_config().returning(move || {
            let mut said = said.lock().unwrap();
            Ok(if said.len() > 1 { said.pop_front().unwrap() } else { said[0].clone() })
        });
        store
    }

    async fn acquired(store: MockSubnetManager) -> Result<Lease, SubnetError> {
        let in_force = InForce::new(Arc::new(store), None, Guard::None);
        let want = Want::new(LeaseAttrs::default());
        in_force.network_config().await.unwrap();
        in_force.acquire(&NodeIdentity::new("node").unwrap(), want).await
    }

    fn lease(subnet: &str) -> Lease {
        let subnets = Dual { v4: Some(subnet.parse().unwrap()), v6: None };
        let (attrs, fence) = (LeaseAttrs::default(), Fence::default());
        Lease { key: LeaseKey::new(subnet), subnets, attrs, expires: None, fence }
    }

    #[tokio::test]
    async fn a_lease_of_the_network_that_was_pinned_is_taken() {
        let mut store = store(&["10.5.0.0/16"]);
        store.expect_acquire().returning(|_, _| Ok(lease("10.5.1.0/24")));
        assert_eq!(acquired(store).await.unwrap(), lease("10.5.1.0/24"));
    }

    #[tokio::test]
    async fn a_lease_of_a_pool_that_was_widened_since_is_taken() {
        let narrow = r#"10.5.0.0/16","SubnetMax":"10.5.1.0"#;
        let mut store = store(&[narrow, "10.5.0.0/16"]);
        store.expect_acquire().returning(|_, _| Ok(lease("10.5.2.0/24")));
        assert_eq!(acquired(store).await.unwrap(), lease("10.5.2.0/24"));
    }

    #[tokio::test]
    async fn nothing_is_taken_once_another_configuration_is_there() {
        let error = acquired(store(&["10.5.0.0/16", "10.6.0.0/16"])).await.unwrap_err();
        assert!(error.to_string().contains("changed since this agent started"), "{error}");
    }

    #[tokio::test]
    async fn a_lease_that_does_not_fit_is_given_back() {
        let mut store = store(&["10.5.0.0/16"]);
        store.expect_acquire().returning(|_, _| Ok(lease("10.6.1.0/24")));
        store.expect_release().times(1).withf(|given| *given == lease("10.6.1.0/24")).returning(|_| Ok(()));
        let error = acquired(store).await.unwrap_err();
        assert!(error.to_string().contains("changed since this agent started"), "{error}");
    }

    /// A store whose watch may live while nobody may read its configuration.
    struct Mute {
        store: MemorySubnets,
        is_mute: AtomicBool,
        asked: AtomicU64,
    }

    #[async_trait]
    impl SubnetManager for Mute {
        async fn this_node(&self) -> Result<ThisNode, SubnetError> {
            self.store.this_node().await
        }

        async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
            // On a clock that stands still who spins would do so for ever.
            assert!(self.asked.fetch_add(1, Ordering::Relaxed) < 10_000, "somebody spins");
            if self.is_mute.load(Ordering::Relaxed) {
                return Err(SubnetError::Unavailable { doing: "reading", source: "mute".into() });
            }
            self.store.network_config().await
        }

        async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
            self.store.previous(node).await
        }

        async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
            self.store.acquire(node, want).await
        }

        async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
            self.store.renew(lease).await
        }

        async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
            self.store.release(lease).await
        }

        fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
            self.store.watch()
        }
    }

    /// Starts an agent on the store or, where that is away, on the state file.
    fn started(store: &Arc<Mute>, file: &Path, clock: &Arc<TokioClock>) -> (Arc<InForce>, Handle, CancellationToken) {
        let inner = Arc::clone(store) as Arc<dyn SubnetManager>;
        let kept = Arc::new(CachedSubnets::new(inner, file, "store", Arc::clone(clock) as _));
        let in_force = Arc::new(InForce::new(Arc::clone(&kept) as _, Some(kept), Guard::None));
        let kernel = FakeKernel::new();
        let eth0 = kernel.add_uplink("eth0", "192.0.2.1/24".parse().unwrap()).unwrap();
        let default = FakeRoute::via("0.0.0.0/0".parse().unwrap(), "192.0.2.254".parse().unwrap(), eth0);
        kernel.add_route(default, Placement::Exclusive).unwrap();
        let builder = Overlay::builder().backend(Vxlan::TYPE, Vxlan::new).clock(Arc::clone(clock) as _);
        let overlay = builder.build(Arc::clone(&in_force) as _, Arc::new(kernel)).unwrap();
        let (handle, cancel) = (overlay.handle(), CancellationToken::new());
        tokio::spawn(overlay.run(cancel.clone()));
        (in_force, handle, cancel)
    }

    #[tokio::test(start_paused = true)]
    async fn a_configuration_that_cannot_be_read_is_asked_for_with_back_off_and_noticed_within_five_seconds() {
        let dir = tempfile::tempdir().unwrap();
        let (file, clock) = (dir.path().join("state.json"), Arc::new(TokioClock::new()));
        let node = ThisNode::named(NodeIdentity::new("node").unwrap());
        let memory = MemorySubnets::new(config("10.5.0.0/16")).for_node(node);
        let (is_mute, asked) = (AtomicBool::new(false), AtomicU64::new(0));
        let store = Arc::new(Mute { store: memory.clone(), is_mute, asked });
        let (first, handle, cancel) = started(&store, &file, &clock);
        handle.wait_for(|status| status.phase == Phase::Ready).await.unwrap();
        first.kept.as_ref().unwrap().flush().await.unwrap();
        cancel.cancel();
        assert!(handle.wait_for(|status| status.phase == Phase::Stopped).await.is_ok());

        memory.outage();
        store.is_mute.store(true, Ordering::Relaxed);
        let (in_force, handle, _running) = started(&store, &file, &clock);
        handle.wait_for(|status| status.lease.is_some()).await.unwrap();
        memory.recover();
        handle.wait_for(|status| status.store == Contact::Live).await.unwrap();
        let mut outdated = std::pin::pin!(in_force.outdated(handle));
        let before = store.asked.load(Ordering::Relaxed);
        assert!(timeout(Duration::from_secs(600), &mut outdated).await.is_err());
        let asked = store.asked.load(Ordering::Relaxed) - before;
        assert!((120..=155).contains(&asked), "asked {asked} times in ten minutes");
        memory.set_config(config("10.6.0.0/16"));
        store.is_mute.store(false, Ordering::Relaxed);
        timeout(Duration::from_secs(5), outdated).await.expect("not noticed in time");
    }
}
