//! The hub's client: a lease store.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use flannelkit::config::{Allocation, NetworkConfig};
use flannelkit::lease::{Lease, LeaseAttrs, LeaseEvent};
use flannelkit::net::{Dual, Prefix};
use flannelkit::spi::allocation::{Taken, all_compatible};
use flannelkit::spi::backoff::Jitter;
use flannelkit::spi::clock::{Clock, SystemClock};
use flannelkit::spi::subnet::{NodeIdentity, SubnetError, SubnetManager, ThisNode, Want};
use futures_util::stream::BoxStream;
use hyper::{Method, StatusCode};
use tokio::time::timeout;

use crate::http::{self, Fault, Watching};
use crate::watch::{self, LIST};
use crate::wire::{Claim, Entry, Line, Write};

const CONFIG: &str = "/v1/config";

/// The maximum number of attempts to acquire a lease. A conflict means that another write succeeded.
const TRIES: usize = 64;

/// A node's client of the hub.
#[derive(Clone)]
pub struct Hub {
    addr: SocketAddr,
    node: NodeIdentity,
    ttl: Duration,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Hub {
    /// Returns a client of the hub at `addr` for `node`, whose name must be unique. Leases last one hour.
    pub fn new(addr: SocketAddr, node: NodeIdentity) -> Self {
        Self { addr, node, ttl: Duration::from_secs(3600), clock: Arc::new(SystemClock::default()) }
    }

    /// Sets the duration of leases: at most one year.
    #[must_use]
    pub fn with_ttl(self, ttl: Duration) -> Self {
        Self { ttl, ..self }
    }

    /// Opens a watch: all leases, then the changes.
    pub(crate) async fn open(&self, doing: &'static str) -> Result<Watching, SubnetError> {
        http::lines(self.addr, "/v1/watch").await.map_err(|fault| self.error(doing, fault))
    }

    /// Converts a fault to the agent's error type.
    pub(crate) fn error(&self, doing: &'static str, fault: Fault) -> SubnetError {
        match fault {
            Fault::Refused(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                SubnetError::Denied { doing, source: fault.into() }
            }
            // Callers treat a missing lease separately: here only the configuration can be missing.
            Fault::Refused(StatusCode::NOT_FOUND, reason) => SubnetError::Unconfigured { at: self.config_at(), reason },
            Fault::Refused(StatusCode::BAD_REQUEST, reason) => {
                SubnetError::Invalid { at: self.addr.to_string(), reason }
            }
            fault => SubnetError::Unavailable { doing, source: fault.into() },
        }
    }

    fn config_at(&self) -> String {
        format!("http://{}{CONFIG}", self.addr)
    }

    async fn entry(&self, node: &str, doing: &'static str) -> Result<Option<Entry>, SubnetError> {
        match http::call(self.addr, Method::GET, &path(node), String::new()).await {
            Ok(body) => serde_json::from_slice(&body).map(Some).map_err(|error| self.error(doing, error.into())),
            Err(Fault::Refused(StatusCode::NOT_FOUND, _)) => Ok(None),
            Err(fault) => Err(self.error(doing, fault)),
        }
    }

    async fn entries(&self, doing: &'static str) -> Result<Vec<Entry>, SubnetError> {
        let mut watching = self.open(doing).await?;
        let list = async {
            let mut entries = Vec::new();
            loop {
                match watching.lines.next().await? {
                    Some(Line::Put(entry)) if entries.len() < watch::MAX_LISTED => entries.push(entry),
                    Some(Line::Listed) => return Ok(entries),
                    Some(Line::Beat) => {}
                    Some(Line::Put(_) | Line::Gone(_)) | None => return Err(Fault::Unlisted),
                }
            }
        };
        let list = timeout(LIST, list).await.unwrap_or(Err(Fault::Late(LIST)));
        list.map_err(|fault| self.error(doing, fault))
    }

    /// Writes a lease if its revision is `write.revision`. Returns `None` on a conflict.
    async fn put(&self, node: &str, write: &Write, doing: &'static str) -> Result<Option<Lease>, SubnetError> {
        // Read before the request: the lease must not end later here than on the hub.
        let now = self.clock.now();
        let body = serde_json::to_string(write).map_err(|error| self.error(doing, error.into()))?;
        let said = match http::call(self.addr, Method::PUT, &path(node), body).await {
            Ok(said) => said,
            Err(Fault::Refused(StatusCode::CONFLICT, _)) => return Ok(None),
            Err(fault) => return Err(self.error(doing, fault)),
        };
        let entry: Entry = serde_json::from_slice(&said).map_err(|error| self.error(doing, error.into()))?;
        let lease = entry.lease(now);
        lease.map(Some).map_err(|bad| SubnetError::Invalid { at: path(node), reason: bad.reason })
    }

    fn write(&self, revision: u64, subnets: &Dual<Prefix>, attrs: &LeaseAttrs) -> Result<Write, SubnetError> {
        let claim = Claim::new(subnets, attrs);
        let claim =
            claim.map_err(|error| SubnetError::Invalid { at: "attrs".to_owned(), reason: error.to_string() })?;
        Ok(Write { revision, ttl_ms: u64::try_from(self.ttl.as_millis()).unwrap_or(u64::MAX), claim })
    }
}

#[async_trait]
impl SubnetManager for Hub {
    async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        Ok(ThisNode::named(self.node.clone()))
    }

    async fn network_config(&self) -> Result<NetworkConfig, SubnetError> {
        let text = http::call(self.addr, Method::GET, CONFIG, String::new()).await;
        let text = text.map_err(|fault| self.error("reading the network configuration", fault))?;
        NetworkConfig::parse(&text, Allocation::Pool).map_err(|error| SubnetError::Invalid {
            at: format!("{} {}", self.config_at(), error.path),
            reason: format!("{}; {}", error.problem, error.remedy),
        })
    }

    async fn previous(&self, node: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        let config = self.network_config().await?;
        let now = self.clock.now();
        let entry = self.entry(node.as_str(), "reading the previous lease").await?;
        // An invalid record counts as missing: `acquire` replaces it.
        let lease = entry.and_then(|entry| entry.lease(now).ok());
        Ok(lease.filter(|lease| all_compatible(&config, &lease.subnets)).into_iter().collect())
    }

    async fn acquire(&self, node: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        const DOING: &str = "acquiring a lease";
        let mut jitter = Jitter::random();
        for _ in 0..TRIES {
            let config = self.network_config().await?;
            let mut own = None;
            let mut taken = Taken::of(&config);
            for entry in self.entries(DOING).await? {
                // Only the subnets matter: invalid attributes are accepted.
                let subnets = entry.claim.subnets().unwrap_or_default();
                if entry.node == node.as_str() {
                    own = Some((entry.revision, subnets));
                } else {
                    taken.add(&subnets, ());
                }
            }
            let (revision, held) = own.unwrap_or_default();
            let subnets = match all_compatible(&config, &held) {
                true => held,
                false => taken.choose(&[&held, &want.preferred], &mut || jitter.number())?,
            };
            let write = self.write(revision, &subnets, &want.attrs)?;
            if let Some(lease) = self.put(node.as_str(), &write, DOING).await? {
                return Ok(lease);
            }
        }
        Err(beaten(DOING))
    }

    async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        const DOING: &str = "renewing a lease";
        let lost = |why: &str| SubnetError::Lost(format!("{} {why}", lease.key));
        let node = NodeIdentity::new(lease.key.as_str()).map_err(|_| lost("is not a valid node name"))?;
        let found = self.entry(node.as_str(), DOING).await?.ok_or_else(|| lost("has no lease on the hub"))?;
        if !found.is_of(lease) {
            return Err(lost("has a different lease on the hub"));
        }
        let write = self.write(found.revision, &lease.subnets, &lease.attrs)?;
        // After a conflict the agent retries, and checks again whether the lease is its own.
        self.put(node.as_str(), &write, DOING).await?.ok_or_else(|| beaten(DOING))
    }

    async fn release(&self, lease: Lease) -> Result<(), SubnetError> {
        const DOING: &str = "releasing a lease";
        let Ok(node) = NodeIdentity::new(lease.key.as_str()) else { return Ok(()) };
        let Some(found) = self.entry(node.as_str(), DOING).await?.filter(|found| found.is_of(&lease)) else {
            return Ok(());
        };
        let path = format!("{}?revision={}", path(node.as_str()), found.revision);
        match http::call(self.addr, Method::DELETE, &path, String::new()).await {
            Ok(_) | Err(Fault::Refused(StatusCode::NOT_FOUND, _)) => Ok(()),
            Err(Fault::Refused(StatusCode::CONFLICT, _)) => Err(beaten(DOING)),
            Err(fault) => Err(self.error(DOING, fault)),
        }
    }

    async fn changed(&self) {
        // The agent polls for a configuration.
        std::future::pending().await
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        watch::watch(self.clone())
    }
}

/// Returns the path of a node's lease. A [`NodeIdentity`] needs no escaping.
fn path(node: &str) -> String {
    format!("/v1/leases/{node}")
}

fn beaten(doing: &'static str) -> SubnetError {
    SubnetError::Unavailable { doing, source: "another client wrote to the hub first".into() }
}
