//! The network's configuration that the agent goes by.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use futures_util::stream::BoxStream;

use crate::chain;

/// How often a configuration that cannot be used is read again (contract 3.1, step 5).
const AGAIN: Duration = Duration::from_secs(1);

/// A store whose configuration is waited for until it can be used, and is the same from then on: agent and firewall
/// have to go by one, whatever is written meanwhile.
pub(crate) struct InForce {
    inner: Arc<dyn SubnetManager>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    config: Option<NetworkConfig>,
    trouble: Option<String>,
}

impl InForce {
    pub(crate) fn new(inner: Arc<dyn SubnetManager>) -> Self {
        Self { inner, state: Mutex::default() }
    }

    /// Why what the store holds cannot be used, in words.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.state().trouble.clone()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Every change is one assignment.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[async_trait]
impl SubnetManager for InForce {
    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        if let Some(config) = self.state().config.clone() {
            return Ok(config);
        }
        loop {
            let problem = match self.inner.network_config().await {
                Ok(config) => {
                    let mut state = self.state();
                    if state.trouble.take().is_some() {
                        tracing::info!("the network's configuration can be used now");
                    }
                    state.config = Some(config.clone());
                    return Ok(config);
                }
                Err(error @ SubnetError::Invalid { .. }) => chain(&error),
                Err(error) => return Err(error),
            };
            let fresh = self.state().trouble.replace(problem.clone()).as_ref() != Some(&problem);
            if fresh {
                tracing::warn!(problem, "waiting for a usable network configuration; mend it in the lease store");
            }
            tokio::time::sleep(AGAIN).await;
        }
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Option<Lease>, SubnetError> {
        self.inner.previous(node).await
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        self.inner.acquire(node, want).await
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
