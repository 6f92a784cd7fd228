//! An etcd with as many leases as wanted, in the caller's network namespace.

use etcd_client::{Client, DeleteOptions, PutOptions, Txn, TxnOp};
use testkit::etcd::{Etcd, Options, Version};

use bench::Error;
use bench::peers::{LEN, config, peer, subnet};

/// Operations in one transaction: the server's own limit is 128.
const CHUNK: usize = 100;
/// Seconds that a lease lasts, as flannel's do.
const TTL: i64 = 86_400;
/// Requests under way while the store is filled.
const ABREAST: usize = 64;

/// The store, and a client of it.
pub(crate) struct Cluster {
    etcd: Etcd,
    client: Client,
}

impl Cluster {
    /// An etcd that does not wait for the disk, with the network's configuration, node 0's lease and that of every
    /// peer from 1 to `n`, each with an etcd lease of its own.
    pub(crate) async fn with_peers(n: u32) -> Result<Self, Error> {
        let options = Options { flags: vec!["--unsafe-no-fsync".to_owned()], ..Options::single(Version::Current) };
        let etcd = Etcd::start(options)?;
        let mut client = Client::connect(etcd.endpoints(), None).await?;
        client.put("/coreos.com/network/config", config(), None).await?;
        let cluster = Self { etcd, client };
        let numbers: Vec<u32> = (0..=n).collect();
        cluster.put(&cluster.prepare(&numbers).await?).await?;
        Ok(cluster)
    }

    /// How agents are told where it is.
    pub(crate) fn args(&self) -> [String; 1] {
        [format!("-etcd-endpoints={}", self.etcd.endpoint(0))]
    }

    /// The records of some peers, with etcd leases granted, but not yet put.
    pub(crate) async fn prepare(&self, peers: &[u32]) -> Result<Vec<Put>, Error> {
        let mut puts = Vec::with_capacity(peers.len());
        for some in peers.chunks(ABREAST) {
            let grant = |n: u32| {
                let mut client = self.client.clone();
                async move { client.lease_grant(TTL, None).await.map(|granted| Put { n, lease: granted.id() }) }
            };
            puts.extend(futures_util::future::try_join_all(some.iter().map(|&n| grant(n))).await?);
        }
        Ok(puts)
    }

    /// Puts records, many in one transaction.
    pub(crate) async fn put(&self, puts: &[Put]) -> Result<(), Error> {
        for some in puts.chunks(CHUNK) {
            let ops: Vec<_> = some.iter().map(Put::op).collect();
            self.client.clone().txn(Txn::new().and_then(ops)).await?;
        }
        Ok(())
    }

    /// Removes the records of peers.
    pub(crate) async fn remove(&self, peers: impl Iterator<Item = u32>) -> Result<(), Error> {
        let peers: Vec<_> = peers.collect();
        for some in peers.chunks(CHUNK) {
            let ops: Vec<_> = some.iter().map(|&n| TxnOp::delete(key(n), None::<DeleteOptions>)).collect();
            self.client.clone().txn(Txn::new().and_then(ops)).await?;
        }
        Ok(())
    }
}

/// A record to be put.
pub(crate) struct Put {
    n: u32,
    lease: i64,
}

impl Put {
    /// Whose.
    pub(crate) fn n(&self) -> u32 {
        self.n
    }

    fn op(&self) -> TxnOp {
        TxnOp::put(key(self.n), peer(self.n).attrs.to_json(), Some(PutOptions::new().with_lease(self.lease)))
    }
}

fn key(n: u32) -> String {
    format!("/coreos.com/network/subnets/{}-{LEN}", subnet(n))
}
