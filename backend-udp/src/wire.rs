//! The published data for IPv6: `BackendV6Data`. flannel's udp backend supports only IPv4, for which nothing is
//! published.

use flannel_core::backend::Skip;
use flannel_core::config::Object;
use flannel_core::lease::{Json, LeaseAttrs, Scalar};
use flannel_core::net::Family;

const PORT: &str = "Port";

pub(crate) fn encode(port: u16) -> Json {
    Json::object(&[(PORT, Scalar::Number(port.into()))])
}

/// Returns the port that a peer publishes. `None` means the configured port of all nodes, as for IPv4.
pub(crate) fn port(attrs: &LeaseAttrs, family: Family) -> Result<Option<u16>, Skip> {
    let Some(data) = attrs.backend_data.get(family).filter(|_| family == Family::V6) else { return Ok(None) };
    let bad = |problem: String| Skip::BadData(format!("BackendV6Data: {problem}"));
    let port = Object::parse(data.as_str().as_bytes()).and_then(|object| object.u64(PORT));
    let port = port.map_err(|error| match error.path.strip_prefix("$.") {
        Some(key) => bad(format!("{key}: {}", error.problem)),
        None => bad(error.problem),
    })?;
    let valid = |port| u16::try_from(port).ok().filter(|port| *port > 0);
    port.map(|port| valid(port).ok_or_else(|| bad(format!("{PORT}: {port} is no UDP port")))).transpose()
}
