//! The published data for IPv6: `BackendV6Data`. flannel's udp backend supports only IPv4, for which nothing is
//! published.

use flannel_core::backend::Skip;
use flannel_core::config::Object;
use flannel_core::lease::{Json, LeaseAttrs, Scalar};
use flannel_core::net::Family;

const FIELD: &str = "BackendV6Data";
const PORT: &str = "Port";

pub(crate) fn encode(port: u16) -> Json {
    Json::object(&[(PORT, Scalar::Number(port.into()))])
}

/// Returns the port that a peer publishes. `None` means the configured port of all nodes, as for IPv4.
pub(crate) fn port(attrs: &LeaseAttrs, family: Family) -> Result<Option<u16>, Skip> {
    let Some(data) = attrs.backend_data.get(family).filter(|_| family == Family::V6) else { return Ok(None) };
    let port = Object::parse(data.as_str().as_bytes()).and_then(|object| object.u64(PORT));
    let port = port.map_err(|error| Skip::bad_data(FIELD, &error))?;
    let valid = |port| u16::try_from(port).ok().filter(|port| *port > 0);
    let bad = |port| Skip::BadData(format!("{FIELD}: {PORT}: {port} is not a UDP port"));
    port.map(|port| valid(port).ok_or_else(|| bad(port))).transpose()
}
