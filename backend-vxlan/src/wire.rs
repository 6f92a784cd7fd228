//! `BackendData`: what nodes tell one another.

use flannel_core::backend::Skip;
use flannel_core::config::Object;
use flannel_core::lease::{Json, LeaseAttrs};
use flannel_core::net::{Family, MacAddr, Vni};

/// What to publish: exactly the text Go flannel writes, since a restarting one cuts the MAC out of it by hand (contract
/// 7.4).
pub(crate) fn encode(vni: Vni, mac: MacAddr) -> Json {
    Json::object([("VNI", Json::number(vni.value().into())), ("VtepMAC", Json::string(&mac.to_string()))])
}

/// The Ethernet address a node published for a family. Its VNI is not looked at (contract 8.2).
pub(crate) fn mac_of(attrs: &LeaseAttrs, family: Family) -> Result<MacAddr, Skip> {
    let field = match family {
        Family::V4 => "BackendData",
        Family::V6 => "BackendV6Data",
    };
    let bad = |reason: String| Skip::BadData(format!("{field}: {reason}"));
    let data = attrs.backend_data.get(family).ok_or_else(|| bad("missing".to_owned()))?;
    let object = Object::parse(data.as_str().as_bytes()).map_err(|error| bad(error.to_string()))?;
    let mac = object.string("VtepMAC").map_err(|error| bad(error.to_string()))?;
    let mac = mac.ok_or_else(|| bad("VtepMAC is missing".to_owned()))?;
    mac.parse().map_err(|error| bad(format!("VtepMAC: {error}")))
}
