//! What nodes publish: `BackendData` and `BackendV6Data`.

use flannel_core::backend::Skip;
use flannel_core::config::Object;
use flannel_core::lease::{Json, LeaseAttrs, Scalar};
use flannel_core::net::{Family, MacAddr, Vni};

/// A VTEP's data, byte for byte as flannel writes it.
pub(crate) fn encode(vni: Vni, mac: MacAddr) -> Json {
    let mac = mac.to_string();
    Json::object(&[("VNI", Scalar::Number(vni.value().into())), ("VtepMAC", Scalar::Text(&mac))])
}

/// The MAC address in what flannel or we wrote. Keys match in any case; the VNI is for people: no reader uses it.
pub(crate) fn decode(attrs: &LeaseAttrs, family: Family) -> Result<MacAddr, Skip> {
    let field = match family {
        Family::V4 => "BackendData",
        Family::V6 => "BackendV6Data",
    };
    let json = attrs.backend_data.get(family).ok_or_else(|| Skip::BadData(format!("no {field}")))?;
    let bad = |problem: String| Skip::BadData(format!("{field}: {problem}"));
    let object = Object::parse(json.as_str().as_bytes()).map_err(|error| bad(error.problem))?;
    let mac = object.string("VtepMAC").map_err(|error| bad(format!("VtepMAC: {}", error.problem)))?;
    let mac = mac.ok_or_else(|| bad("no VtepMAC".to_owned()))?;
    mac.parse().map_err(|error| bad(format!("VtepMAC: {error}")))
}
