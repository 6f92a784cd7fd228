//! The published data for IPv6: `BackendV6Data`. flannel's udp backend supports only IPv4, for which nothing is
//! published.

use flannel_core::config::Object;
use flannel_core::lease::{Json, LeaseAttrs, Scalar};
use flannel_core::net::Family;

const PORT: &str = "Port";

pub(crate) fn encode(port: u16) -> Json {
    Json::object(&[(PORT, Scalar::Number(port.into()))])
}

/// Returns the port that a peer publishes. `None` means the configured port of all nodes, as for IPv4.
pub(crate) fn port(attrs: &LeaseAttrs, family: Family) -> Option<u16> {
    let data = attrs.backend_data.get(family).filter(|_| family == Family::V6)?;
    let object = Object::parse(data.as_str().as_bytes()).ok()?;
    u16::try_from(object.u64(PORT).ok()??).ok().filter(|port| *port > 0)
}
