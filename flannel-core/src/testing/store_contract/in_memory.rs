//! A harness for stores in front of the store in memory.

use std::net::IpAddr;
use std::sync::Arc;

use async_trait::async_trait;

use super::{Harness, Outage};
use crate::clock::SystemClock;
use crate::config::NetworkConfig;
use crate::lease::{BadRecord, LeaseKey};
use crate::net::{Dual, Prefix};
use crate::subnet::{NodeIdentity, SubnetManager, ThisNode};
use crate::testing::MemorySubnets;

/// A [`Harness`] over [`MemorySubnets`], for stores in front of another store.
pub struct InMemory {
    store: Option<MemorySubnets>,
    nodes: Nodes,
    front: Box<dyn Fn(MemorySubnets) -> Arc<dyn SubnetManager> + Send + Sync>,
    outages: bool,
}

/// How a store in memory identifies nodes, and how they get their subnets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nodes {
    /// By name.
    Named,
    /// By the address they publish, as in etcd.
    ByAddress,
    /// By name; [`MemorySubnets::assign`] assigns their subnets.
    Assigned,
}

impl InMemory {
    /// Creates a harness. `front` creates the store under test from a handle on the store in memory.
    pub fn new(nodes: Nodes, front: impl Fn(MemorySubnets) -> Arc<dyn SubnetManager> + Send + Sync + 'static) -> Self {
        Self { store: None, nodes, front: Box::new(front), outages: true }
    }

    /// Disables the checks of outages. For stores that answer while the store behind them is unavailable.
    #[must_use]
    pub fn without_outages(self) -> Self {
        Self { outages: false, ..self }
    }

    fn store(&self) -> &MemorySubnets {
        match &self.store {
            Some(store) => store,
            None => panic!("Harness::fresh comes first"),
        }
    }
}

#[async_trait]
impl Harness for InMemory {
    async fn fresh(&mut self, config: &NetworkConfig) {
        let (config, clock) = (config.clone(), Arc::new(SystemClock::default()));
        let store = match self.nodes {
            Nodes::Named => MemorySubnets::new(config),
            Nodes::ByAddress => MemorySubnets::by_address(config, None, clock),
            Nodes::Assigned => MemorySubnets::assigned(config, None, clock),
        };
        self.store = NodeIdentity::new("a").ok().map(|name| store.for_node(ThisNode::named(name)));
    }

    async fn open(&self) -> Arc<dyn SubnetManager> {
        (self.front)(self.store().clone())
    }

    async fn put_config(&self, config: &NetworkConfig) {
        self.store().set_config(config.clone());
    }

    async fn delete(&self, key: &LeaseKey) {
        self.store().delete(key);
    }

    async fn put_raw_bad(&self, key: &LeaseKey) -> bool {
        self.store().insert_bad(key, BadRecord { reason: "no JSON".to_owned(), subnets: Dual::default() });
        true
    }

    async fn expire(&self, key: &LeaseKey) -> bool {
        self.store().delete(key)
    }

    fn is_by_address(&self) -> bool {
        self.nodes == Nodes::ByAddress
    }

    fn allocates(&self) -> bool {
        self.nodes != Nodes::Assigned
    }

    async fn assign(&self, node: &NodeIdentity, subnets: &Dual<Prefix>) {
        self.store().assign(node, *subnets);
    }

    async fn set_public(&self, node: &NodeIdentity, public: Dual<IpAddr>) -> bool {
        self.store().set_public(node, public);
        true
    }

    async fn outage(&mut self, outage: Outage) -> bool {
        match outage {
            _ if !self.outages => return false,
            Outage::Begins => self.store().outage(),
            Outage::Ends => self.store().recover(),
        }
        true
    }
}
