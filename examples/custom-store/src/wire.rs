//! The JSON messages of the protocol.

use std::str::FromStr;
use std::time::Duration;

use flannelkit::lease::{BadRecord, Fence, Lease, LeaseAttrs, LeaseKey, Record};
use flannelkit::net::{Dual, Family, Prefix};
use flannelkit::spi::clock::BootTime;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The maximum size of a request, response or line, in bytes: that of a network configuration.
pub(crate) const MAX_BODY: usize = 64 * 1024;

/// A node's lease on the hub.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) node: String,
    /// The revision that assigned these subnets to the node.
    pub(crate) created: u64,
    /// The revision of the last write.
    pub(crate) revision: u64,
    /// The time until the lease expires, in milliseconds.
    pub(crate) left_ms: u64,
    pub(crate) claim: Claim,
}

/// The subnets and attributes of a node.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub(crate) subnet: Option<String>,
    pub(crate) subnet_v6: Option<String>,
    /// flannel's lease attributes, which the hub does not parse: their content depends on the backend.
    pub(crate) attrs: Box<RawValue>,
}

/// A request to write a lease.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Write {
    /// The revision to replace, or 0 if there is no lease.
    pub(crate) revision: u64,
    /// The duration of the lease, in milliseconds.
    pub(crate) ttl_ms: u64,
    pub(crate) claim: Claim,
}

/// The query of a request to delete a lease.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Delete {
    /// The revision to delete. `None`, for operators: any revision.
    pub(crate) revision: Option<u64>,
}

/// A line of a watch.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Line {
    /// A lease was listed, created or changed.
    Put(Entry),
    /// A node's lease was deleted or expired.
    Gone(String),
    /// The list of leases is complete.
    Listed,
    /// A heartbeat: nothing has changed.
    Beat,
}

impl Claim {
    /// Returns a claim of `subnets` that publishes `attrs`.
    pub(crate) fn new(subnets: &Dual<Prefix>, attrs: &LeaseAttrs) -> Result<Self, serde_json::Error> {
        let text = |family| subnets.get(family).map(Prefix::to_string);
        let attrs = RawValue::from_string(attrs.to_json())?;
        Ok(Self { subnet: text(Family::V4), subnet_v6: text(Family::V6), attrs })
    }

    /// Parses the subnets. Returns the reason if one is invalid or there is none.
    pub(crate) fn subnets(&self) -> Result<Dual<Prefix>, String> {
        let mut subnets = Dual::default();
        for (family, text) in [(Family::V4, &self.subnet), (Family::V6, &self.subnet_v6)] {
            let Some(text) = text else { continue };
            let subnet = Prefix::from_str(text).map_err(|error| error.to_string())?;
            if subnet.family() != family {
                return Err(format!("{subnet} is not {family}"));
            }
            *subnets.slot(family) = Some(subnet);
        }
        if subnets.is_empty() { Err("the claim has no subnet".to_owned()) } else { Ok(subnets) }
    }
}

impl Entry {
    /// Converts the entry, received at `now`, to a lease. The error has the reason, and the subnets if they are valid.
    pub(crate) fn lease(&self, now: BootTime) -> Result<Lease, BadRecord> {
        let subnets = self.claim.subnets().map_err(|reason| BadRecord::new(reason, Dual::default()))?;
        let attrs = LeaseAttrs::from_json(self.claim.attrs.get().as_bytes());
        let attrs = attrs.map_err(|error| BadRecord::new(error, subnets))?;
        let expires = now.after(Duration::from_millis(self.left_ms));
        Ok(Lease::new(self.key(), subnets, attrs).expiring(Some(expires)).fenced(self.fence()))
    }

    /// Returns the record for other nodes.
    pub(crate) fn record(&self, now: BootTime) -> Record {
        match self.lease(now) {
            Ok(lease) => Record::of(lease, self.created),
            Err(bad) => Record::bad(self.key(), self.created, bad),
        }
    }

    /// Returns whether this is `lease` or a renewal of it: a renewal whose response was lost may be repeated.
    pub(crate) fn is_of(&self, lease: &Lease) -> bool {
        self.fence() == lease.fence && self.claim.subnets().as_ref() == Ok(&lease.subnets)
    }

    fn fence(&self) -> Fence {
        Fence::new(&self.created.to_string())
    }

    fn key(&self) -> LeaseKey {
        LeaseKey::of_bytes(self.node.as_bytes())
    }
}
