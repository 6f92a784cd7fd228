//! The network's configuration that the agent goes by.

use std::future::pending;
use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::net::Family;
use flannel_core::overlay::{Contact, Handle};
use flannel_core::subnet::{CachedSubnets, NodeIdentity, SubnetError, SubnetManager, Want};
use futures_util::stream::BoxStream;
use tokio::sync::OnceCell;
use tokio::time::sleep;

use crate::backoff::Backoff;
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
    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        Ok(self.pinned.get_or_try_init(|| self.pin()).await?.config.clone())
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Option<Lease>, SubnetError> {
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
    use std::sync::Mutex;

    use flannel_core::config::Allocation;
    use flannel_core::lease::{Fence, LeaseAttrs, LeaseKey};
    use flannel_core::net::Dual;
    use flannel_core::subnet::MockSubnetManager;

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
        let want = Want { attrs: LeaseAttrs::default(), preferred: Dual::default() };
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
}
