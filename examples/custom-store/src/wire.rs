//! What goes over the wire, as JSON.

use std::str::FromStr;
use std::time::Duration;

use flannelkit::lease::{BadRecord, Fence, Lease, LeaseAttrs, LeaseKey, Record};
use flannelkit::net::{Dual, Family, Prefix};
use flannelkit::spi::clock::BootTime;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

/// The largest body of a request, answer or line, in bytes: a network's configuration may have 64 KiB.
pub(crate) const MAX_BODY: usize = 64 * 1024;

/// One node's lease, as the hub keeps it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Entry {
    pub(crate) node: String,
    /// The revision in which the node took these subnets.
    pub(crate) created: u64,
    /// The revision in which it was written last.
    pub(crate) revision: u64,
    /// When it ends, in milliseconds from now.
    pub(crate) left_ms: u64,
    pub(crate) claim: Claim,
}

/// What a node claims.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub(crate) subnet: Option<String>,
    pub(crate) subnet_v6: Option<String>,
    /// flannel's lease attributes, of which the hub reads nothing: what a backend publishes is its own affair.
    pub(crate) attrs: Box<RawValue>,
}

/// A request to write a lease.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Write {
    /// The revision that is to be replaced; 0: there is none.
    pub(crate) revision: u64,
    /// How long the lease is to last, in milliseconds.
    pub(crate) ttl_ms: u64,
    pub(crate) claim: Claim,
}

/// The query of a request to delete a lease.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Delete {
    /// The revision that is to be deleted; none: whichever is there, as operators want it.
    pub(crate) revision: Option<u64>,
}

/// A line of a watch.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Line {
    /// A lease is there, or has changed.
    Put(Entry),
    /// A node's lease is gone.
    Gone(String),
    /// Every lease there is came before this line.
    Listed,
    /// Nothing has changed, and the hub is there.
    Beat,
}

impl Claim {
    /// Returns the claim of these subnets by a node that publishes `attrs`.
    pub(crate) fn new(subnets: &Dual<Prefix>, attrs: &LeaseAttrs) -> Result<Self, serde_json::Error> {
        let text = |family| subnets.get(family).map(Prefix::to_string);
        let attrs = RawValue::from_string(attrs.to_json())?;
        Ok(Self { subnet: text(Family::V4), subnet_v6: text(Family::V6), attrs })
    }

    /// Returns the subnets. The error names the first that is none.
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
        if subnets.is_empty() { Err("there is no subnet".to_owned()) } else { Ok(subnets) }
    }
}

impl Entry {
    /// Returns the lease, as it was told at `now`, or why it is none, with the subnets all the same if they can be read.
    pub(crate) fn lease(&self, now: BootTime) -> Result<Lease, BadRecord> {
        let subnets = self.claim.subnets().map_err(|reason| BadRecord::new(reason, Dual::default()))?;
        let attrs = LeaseAttrs::from_json(self.claim.attrs.get().as_bytes());
        let attrs = attrs.map_err(|error| BadRecord::new(error, subnets))?;
        let expires = now.after(Duration::from_millis(self.left_ms));
        Ok(Lease::new(self.key(), subnets, attrs).expiring(Some(expires)).fenced(self.fence()))
    }

    /// Returns the record that others see.
    pub(crate) fn record(&self, now: BootTime) -> Record {
        match self.lease(now) {
            Ok(lease) => Record::of(lease, self.created),
            Err(bad) => Record::bad(self.key(), self.created, bad),
        }
    }

    /// Returns whether this is the lease that `lease` was, also if its holder has renewed it since: a renewal whose answer
    /// was lost may be repeated.
    pub(crate) fn is_of(&self, lease: &Lease) -> bool {
        self.fence() == lease.fence && self.claim.subnets().as_ref() == Ok(&lease.subnets)
    }

    fn fence(&self) -> Fence {
        Fence(Some(self.created.to_string().into()))
    }

    fn key(&self) -> LeaseKey {
        LeaseKey::of_bytes(self.node.as_bytes())
    }
}
