//! Events: `{"kind": …}` plus the fields of the kind.

use serde::ser::SerializeMap;
use serde::{Serialize, Serializer};

use crate::agent::{Event, LossReason};

impl Serialize for Event {
    /// The kind is [`Event::kind`].
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut event = serializer.serialize_map(None)?;
        event.serialize_entry("kind", self.kind())?;
        match self {
            Self::LeaseAcquired(lease)
            | Self::LeaseRenewed(lease)
            | Self::PeerAdded(lease)
            | Self::PeerChanged(lease)
            | Self::PeerRemoved(lease) => event.serialize_entry("lease", &**lease)?,
            Self::LeaseLost(reason) => event.serialize_entry("reason", reason)?,
            Self::LeaseContended(contended) => event.serialize_entry("contended", contended)?,
            Self::ConfigChanged(config) => event.serialize_entry("network", &**config)?,
            Self::Snapshot(peers) => event.serialize_entry("peers", peers)?,
            Self::PeerQuarantined(key, reason) => {
                event.serialize_entry("key", key)?;
                event.serialize_entry("reason", reason)?;
            }
            Self::PeerSkipped(key, family, skip) => {
                event.serialize_entry("key", key)?;
                event.serialize_entry("family", family)?;
                event.serialize_entry("skip", skip)?;
            }
            Self::OwnTrouble(reason) => event.serialize_entry("reason", reason)?,
            Self::RecordsDropped(count) => event.serialize_entry("count", count)?,
            Self::DriftRepaired { writes, took } => {
                event.serialize_entry("writes", writes)?;
                event.serialize_entry("seconds", &took.as_secs_f64())?;
            }
            Self::ConflictFound(conflict) => event.serialize_entry("conflict", conflict)?,
            Self::Flapping(object) => event.serialize_entry("object", object)?,
            Self::Limited(device, limitation) | Self::LimitationGone(device, limitation) => {
                event.serialize_entry("device", device)?;
                event.serialize_entry("limitation", limitation)?;
            }
            Self::Refused(object, refusal) => {
                event.serialize_entry("object", object)?;
                event.serialize_entry("refusal", refusal)?;
            }
            Self::DeletionsWithheld(prefixes) => event.serialize_entry("prefixes", prefixes)?,
            Self::StoreLost(error)
            | Self::LeaseRefused(error)
            | Self::ConfigRejected(error)
            | Self::KernelTrouble(error)
            | Self::UplinkLost(error)
            | Self::AdvertiseFailed(error) => event.serialize_entry("error", error)?,
            Self::UplinkChanged { before, uplink } => {
                event.serialize_entry("before", before)?;
                event.serialize_entry("uplink", uplink)?;
            }
            Self::UplinkBack(uplink) => event.serialize_entry("uplink", uplink)?,
            Self::Missed(events) => event.serialize_entry("events", events)?,
            Self::Stopped(end) => event.serialize_entry("end", end)?,
            Self::LeaseUncontended
            | Self::StoreBack
            | Self::NotificationsLost
            | Self::NotificationsBack
            | Self::Ready => {}
        }
        event.end()
    }
}

impl Serialize for LossReason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let kind = match self {
            Self::Deleted => "deleted",
            Self::Taken => "taken",
            Self::Expired => "expired",
            Self::Refused(_) => "refused",
        };
        let mut reason = serializer.serialize_map(Some(2))?;
        reason.serialize_entry("kind", kind)?;
        reason.serialize_entry("text", &self.to_string())?;
        reason.end()
    }
}
