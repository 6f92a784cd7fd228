//! The network's configuration that the agent goes by.

use std::sync::Arc;

use async_trait::async_trait;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, LeaseEvent};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager, Want};
use futures_util::stream::BoxStream;
use tokio::sync::OnceCell;

/// A store whose configuration stays what it was when first read: agent and firewall have to go by one, whatever is
/// written meanwhile.
pub(crate) struct InForce {
    inner: Arc<dyn SubnetManager>,
    config: OnceCell<NetworkConfig>,
}

impl InForce {
    pub(crate) fn new(inner: Arc<dyn SubnetManager>) -> Self {
        Self { inner, config: OnceCell::new() }
    }
}

#[async_trait]
impl SubnetManager for InForce {
    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        self.config.get_or_try_init(|| self.inner.network_config()).await.cloned()
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
