//! What a node knows of the hub: a store of leases.

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
use crate::watch;
use crate::wire::{Claim, Entry, Line, Write};

const CONFIG: &str = "/v1/config";

/// How often a write is tried again that others were faster than. Each time one of them has got what it wanted.
const TRIES: usize = 64;
/// How long the list of all leases may take.
const LIST: Duration = Duration::from_secs(10);

/// A node's handle on the hub.
#[derive(Clone)]
pub struct Hub {
    addr: SocketAddr,
    node: NodeIdentity,
    ttl: Duration,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Hub {
    /// Returns a handle on the hub at this address for a node of this name, which is one node's alone. Its leases last an hour.
    pub fn new(addr: SocketAddr, node: NodeIdentity) -> Self {
        Self { addr, node, ttl: Duration::from_secs(3600), clock: Arc::new(SystemClock::default()) }
    }

    /// Returns the same with leases that last so long: up to a year.
    #[must_use]
    pub fn with_ttl(self, ttl: Duration) -> Self {
        Self { ttl, ..self }
    }

    /// Opens the list of all leases and of what changes.
    pub(crate) async fn open(&self, doing: &'static str) -> Result<Watching, SubnetError> {
        http::lines(self.addr, "/v1/watch").await.map_err(|fault| self.error(doing, fault))
    }

    /// What a fault is to the agent.
    pub(crate) fn error(&self, doing: &'static str, fault: Fault) -> SubnetError {
        match fault {
            Fault::Refused(StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN, _) => {
                SubnetError::Denied { doing, source: fault.into() }
            }
            // Of what is asked for while this is an error, a configuration alone can be missing.
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

    /// Writes a lease in the place of this revision. Returns none if somebody else was first.
    async fn put(&self, node: &str, write: &Write, doing: &'static str) -> Result<Option<Lease>, SubnetError> {
        // Before the hub is asked: the time that the answer takes is not the holder's to use.
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
        // A record of ours that is bad is as good as none: acquire mends it.
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
                // Of the node's own lease what it publishes may be bad, and of another's too.
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
        let node = NodeIdentity::new(lease.key.as_str()).map_err(|_| lost("is no node of the hub's"))?;
        let found = self.entry(node.as_str(), DOING).await?.ok_or_else(|| lost("has no lease"))?;
        if !found.is_of(lease) {
            return Err(lost("has another lease"));
        }
        let write = self.write(found.revision, &lease.subnets, &lease.attrs)?;
        // Where somebody wrote it meanwhile, the agent asks again, and sees whether it is still its own.
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
        // An agent that waits for a configuration asks by itself.
        std::future::pending().await
    }

    fn watch(&self) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
        watch::watch(self.clone())
    }
}

/// A node's identity needs no escaping in a path.
fn path(node: &str) -> String {
    format!("/v1/leases/{node}")
}

fn beaten(doing: &'static str) -> SubnetError {
    SubnetError::Unavailable { doing, source: "others keep writing first".into() }
}
