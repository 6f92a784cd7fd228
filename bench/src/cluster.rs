//! An etcd with as many leases as wanted, in the caller's network namespace.

use std::net::Ipv4Addr;

use etcd_client::{Client, DeleteOptions, PutOptions, Txn, TxnOp};
use testkit::etcd::{Etcd, Options, Version};

use crate::Error;
use crate::peers::{Backend, LEN, config, lease, subnet};

/// Operations in one transaction: the server's own limit is 128.
const CHUNK: usize = 100;
/// Seconds that a lease lasts, as flannel's do.
const TTL: i64 = 86_400;
/// Requests under way while the store is filled.
const ABREAST: usize = 64;
/// Where clients find it that are in another namespace.
const PORT: u16 = 2379;

/// The store, and a client of it.
pub struct Cluster {
    _etcd: Etcd,
    client: Client,
    endpoint: String,
    backend: Backend,
}

impl Cluster {
    /// An etcd that does not wait for the disk, with the network's configuration, node 0's lease and that of every
    /// peer from 1 to `n`, each with an etcd lease of its own. With `listen`, clients find it at that address and not on
    /// the loopback.
    ///
    /// # Errors
    /// When etcd is missing or refuses something.
    pub async fn with_peers(backend: Backend, n: u32, listen: Option<Ipv4Addr>) -> Result<Self, Error> {
        let mut flags = vec!["--unsafe-no-fsync".to_owned()];
        let endpoint = listen.map(|addr| format!("http://{addr}:{PORT}"));
        // Of a flag that is given twice the last one counts.
        flags.extend(endpoint.iter().map(|endpoint| format!("--listen-client-urls={endpoint}")));
        let etcd = Etcd::start(Options { flags, ..Options::single(Version::Current) })?;
        let endpoint = endpoint.unwrap_or_else(|| etcd.endpoint(0));
        let mut client = Client::connect([&endpoint], None).await?;
        client.put("/coreos.com/network/config", config(backend), None).await?;
        let cluster = Self { _etcd: etcd, client, endpoint, backend };
        let numbers: Vec<u32> = (0..=n).collect();
        cluster.put(&cluster.prepare(&numbers).await?).await?;
        Ok(cluster)
    }

    /// How agents are told where it is.
    pub fn args(&self) -> [String; 1] {
        [format!("-etcd-endpoints={}", self.endpoint)]
    }

    /// The records of some peers, with etcd leases granted, but not yet put.
    pub async fn prepare(&self, peers: &[u32]) -> Result<Vec<Put>, Error> {
        let mut puts = Vec::with_capacity(peers.len());
        for some in peers.chunks(ABREAST) {
            let grant = |n: u32| {
                let (backend, mut client) = (self.backend, self.client.clone());
                async move { client.lease_grant(TTL, None).await.map(|granted| Put { backend, n, lease: granted.id() }) }
            };
            puts.extend(futures_util::future::try_join_all(some.iter().map(|&n| grant(n))).await?);
        }
        Ok(puts)
    }

    /// Puts records, many in one transaction.
    pub async fn put(&self, puts: &[Put]) -> Result<(), Error> {
        for some in puts.chunks(CHUNK) {
            let ops: Vec<_> = some.iter().map(Put::op).collect();
            self.client.clone().txn(Txn::new().and_then(ops)).await?;
        }
        Ok(())
    }

    /// Removes the records of peers.
    pub async fn remove(&self, peers: impl Iterator<Item = u32>) -> Result<(), Error> {
        let peers: Vec<_> = peers.collect();
        for some in peers.chunks(CHUNK) {
            let ops: Vec<_> = some.iter().map(|&n| TxnOp::delete(key(n), None::<DeleteOptions>)).collect();
            self.client.clone().txn(Txn::new().and_then(ops)).await?;
        }
        Ok(())
    }
}

/// A record to be put.
pub struct Put {
    backend: Backend,
    n: u32,
    lease: i64,
}

impl Put {
    /// Whose.
    pub fn n(&self) -> u32 {
        self.n
    }

    fn op(&self) -> TxnOp {
        TxnOp::put(
            key(self.n),
            lease(self.backend, self.n).attrs.to_json(),
            Some(PutOptions::new().with_lease(self.lease)),
        )
    }
}

fn key(n: u32) -> String {
    format!("/coreos.com/network/subnets/{}-{LEN}", subnet(n))
}
