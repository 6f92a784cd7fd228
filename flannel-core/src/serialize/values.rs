//! Addresses, names, leases and configurations.

use std::net::IpAddr;

use serde::ser::{SerializeMap, SerializeStruct};
use serde::{Serialize, Serializer};
use serde_json::Value;

use crate::admit::Reason;
use crate::backend::{Skip, Uplink};
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::kernel::{LinkName, Object, OverlayName};
use crate::lease::{Json, Lease, LeaseKey};
use crate::net::{Dual, Family, MacAddr, Mtu, Prefix, Vni};

use super::as_text;

as_text!(Prefix, MacAddr, LinkName, OverlayName, LeaseKey, Object);

impl Serialize for Family {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(match self {
            Self::V4 => "v4",
            Self::V6 => "v6",
        })
    }
}

impl Serialize for Vni {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.value())
    }
}

impl Serialize for Mtu {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(self.0)
    }
}

impl Serialize for BootTime {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_f64(self.0.as_secs_f64())
    }
}

impl<T: Serialize> Serialize for Dual<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.iter().count()))?;
        for (family, value) in self.iter() {
            map.serialize_entry(&family, value)?;
        }
        map.end()
    }
}

impl Serialize for Json {
    /// The text of the value: what a peer publishes stays one string.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.as_str())
    }
}

impl Serialize for Lease {
    /// Without the fence, which has no meaning outside the store.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { key, subnets, attrs, expires, fence: _ } = self;
        let mut lease = serializer.serialize_struct("Lease", 6)?;
        lease.serialize_field("key", key)?;
        lease.serialize_field("subnets", subnets)?;
        lease.serialize_field::<Dual<IpAddr>>("public_ip", &attrs.public_ip)?;
        lease.serialize_field("backend_type", &*attrs.backend_type)?;
        lease.serialize_field("backend_data", &attrs.backend_data)?;
        lease.serialize_field("expires", expires)?;
        lease.end()
    }
}

impl Serialize for NetworkConfig {
    /// The main values, and flannel's whole document as an object with derived values.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let networks = self.networks.map(|_, network| network.prefix);
        let document: Value = serde_json::from_str(&self.to_json()).unwrap_or_default();
        let mut config = serializer.serialize_struct("NetworkConfig", 4)?;
        config.serialize_field("networks", &networks)?;
        config.serialize_field("backend", &self.backend.kind)?;
        config.serialize_field("enable_nftables", &self.enable_nftables)?;
        config.serialize_field("document", &document)?;
        config.end()
    }
}

impl Serialize for Uplink {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut uplink = serializer.serialize_struct("Uplink", 4)?;
        uplink.serialize_field("name", &self.name)?;
        uplink.serialize_field("index", &self.index)?;
        uplink.serialize_field("mtu", &self.mtu)?;
        uplink.serialize_field("addresses", &self.addrs)?;
        uplink.end()
    }
}

impl Serialize for Reason {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut reason = serializer.serialize_struct("Reason", 3)?;
        reason.serialize_field("kind", self.kind())?;
        reason.serialize_field("text", &self.to_string())?;
        reason.serialize_field("remedy", &self.remedy())?;
        reason.end()
    }
}

impl Serialize for Skip {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut skip = serializer.serialize_struct("Skip", 2)?;
        skip.serialize_field("kind", self.kind())?;
        skip.serialize_field("text", &self.to_string())?;
        skip.end()
    }
}
