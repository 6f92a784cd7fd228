//! The published data: `BackendData` and `BackendV6Data`.

use flannel_core::backend::Skip;
use flannel_core::config::Object;
use flannel_core::lease::{Json, LeaseAttrs, Scalar};
use flannel_core::net::{Family, MacAddr, Vni};

/// Encodes a VTEP's data, byte for byte as flannel writes it.
pub(crate) fn encode(vni: Vni, mac: MacAddr) -> Json {
    let mac = mac.to_string();
    Json::object(&[("VNI", Scalar::Number(vni.value().into())), ("VtepMAC", Scalar::Text(&mac))])
}

/// Decodes the MAC address from data that flannel or flannelkit wrote. Keys match case-insensitively. The VNI is
/// informational and is not read.
pub(crate) fn decode(attrs: &LeaseAttrs, family: Family) -> Result<MacAddr, Skip> {
    let field = match family {
        Family::V4 => "BackendData",
        Family::V6 => "BackendV6Data",
    };
    let json = attrs.backend_data.get(family).ok_or_else(|| Skip::BadData(format!("no {field}")))?;
    let mac = Object::string_of(json.as_str(), "VtepMAC").map_err(|error| Skip::bad_data(field, &error))?;
    let mac = mac.ok_or_else(|| Skip::BadData(format!("{field}: no VtepMAC")))?;
    mac.parse().map_err(|error| Skip::BadData(format!("{field}: VtepMAC: {error}")))
}
