//! The rows of a list of peers.

use serde::ser::SerializeStruct;
use serde::{Serialize, Serializer};

use crate::overlay::{PeerRow, Standing};

use super::Text;

impl Serialize for PeerRow {
    /// The fields of the lease in force, with the state.
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let Self { key, subnets, public_ip, lease, standing } = self;
        let lease = lease.as_deref();
        let reason = (!matches!(standing, Standing::Programmed)).then_some(Text(standing));
        let mut row = serializer.serialize_struct("PeerRow", 8)?;
        row.serialize_field("key", key)?;
        row.serialize_field("subnets", subnets)?;
        row.serialize_field("public_ip", public_ip)?;
        row.serialize_field("backend_type", &lease.map(|lease| &*lease.attrs.backend_type))?;
        row.serialize_field("backend_data", &lease.map(|lease| &lease.attrs.backend_data))?;
        row.serialize_field("expires", &lease.and_then(|lease| lease.expires))?;
        row.serialize_field("state", standing.kind())?;
        row.serialize_field("reason", &reason)?;
        row.end()
    }
}
