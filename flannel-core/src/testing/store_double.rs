//! A store that forwards to another one, with calls and watches that a test can change.

use std::any::Any;
use std::future::Future;

use async_trait::async_trait;
use futures_util::stream::BoxStream;

use crate::config::NetworkConfig;
use crate::lease::{Lease, LeaseEvent};
use crate::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want};

/// A test double of a store: forwards every call to another store. An implementation can count, delay, answer or
/// inspect calls in [`call`](Self::call), and change the events of watches in [`watch_with`](Self::watch_with).
///
/// Every `StoreDouble` is a [`SubnetManager`].
///
/// ```
/// use std::sync::atomic::{AtomicU32, Ordering};
/// use flannel_core::subnet::SubnetError;
/// use flannel_core::testing::{Call, MemorySubnets, StoreDouble};
///
/// /// Counts renewals.
/// struct Counted(MemorySubnets, AtomicU32);
///
/// impl StoreDouble for Counted {
///     type Store = MemorySubnets;
///
///     fn store(&self) -> &MemorySubnets {
///         &self.0
///     }
///
///     async fn call<A: Send>(
///         &self,
///         call: Call<'_>,
///         answer: impl Future<Output = Result<A, SubnetError>> + Send,
///     ) -> Result<A, SubnetError> {
///         if let Call::Renew(_) = call {
///             self.1.fetch_add(1, Ordering::Relaxed);
///         }
///         answer.await
///     }
/// }
/// ```
pub trait StoreDouble: Send + Sync + 'static {
    /// The store that calls are forwarded to.
    type Store: SubnetManager;

    /// Returns that store.
    fn store(&self) -> &Self::Store;

    /// Handles one call. `answer` calls the store when it is awaited.
    fn call<A: Any + Send>(
        &self,
        call: Call<'_>,
        answer: impl Future<Output = Result<A, SubnetError>> + Send,
    ) -> impl Future<Output = Result<A, SubnetError>> + Send {
        let _ = call;
        answer
    }

    /// Opens a watch.
    fn watch_with(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        self.store().watch()
    }
}

/// A call of a [`SubnetManager`], with its argument.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub enum Call<'a> {
    /// [`SubnetManager::this_node`].
    ThisNode,
    /// [`SubnetManager::network_config`].
    NetworkConfig,
    /// [`SubnetManager::previous`].
    Previous(&'a NodeIdentity),
    /// [`SubnetManager::acquire`].
    Acquire(&'a NodeIdentity),
    /// [`SubnetManager::renew`].
    Renew(&'a Lease),
    /// [`SubnetManager::release`].
    Release,
}

#[async_trait]
impl<D: StoreDouble> SubnetManager for D {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        self.call(Call::ThisNode, self.store().this_node()).await
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        self.call(Call::NetworkConfig, self.store().network_config()).await
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        self.call(Call::Previous(node), self.store().previous(node)).await
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        self.call(Call::Acquire(node), self.store().acquire(node, want)).await
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        self.call(Call::Renew(lease), self.store().renew(lease)).await
    }

    async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
        self.call(Call::Release, self.store().release(lease)).await
    }

    async fn changed(&self) {
        self.store().changed().await;
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        self.watch_with()
    }
}
