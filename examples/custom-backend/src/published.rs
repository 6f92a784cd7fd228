//! The backend data of a lease, per family: `{"Address":"198.51.100.7"}`.

use std::net::IpAddr;

use flannelkit::config::Object;
use flannelkit::lease::{Json, LeaseAttrs, Scalar};
use flannelkit::net::{Family, is_public_unicast};
use flannelkit::spi::backend::Skip;

const ADDRESS: &str = "Address";

/// Returns the backend data for a node's address on the device.
pub(crate) fn data(addr: IpAddr) -> Json {
    Json::object(&[(ADDRESS, Scalar::Text(&addr.to_string()))])
}

/// Returns the address that a peer published. The data is untrusted: the reason of a skip quotes none of it.
pub(crate) fn address(attrs: &LeaseAttrs, family: Family) -> Result<IpAddr, Skip> {
    let bad = |what: &str| Skip::BadData(format!("{family} {ADDRESS} {what}"));
    let data = attrs.backend_data.get(family).ok_or_else(|| bad("is missing"))?;
    let object = Object::parse(data.as_str().as_bytes()).map_err(|_| bad("is not in a JSON object"))?;
    let text = object.string(ADDRESS).map_err(|_| bad("is not a string"))?.ok_or_else(|| bad("is missing"))?;
    let addr = text.parse().map_err(|_| bad("is not an IP address"))?;
    if Family::of(addr) != family {
        return Err(bad("belongs to the other family"));
    }
    if is_public_unicast(addr) { Ok(addr) } else { Err(bad("is not a usable unicast address")) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flannelkit::net::Dual;

    fn read(data: Option<&str>, family: Family) -> Result<IpAddr, Skip> {
        let mut all = Dual::default();
        *all.slot(family) = data.map(|text| Json::parse(text).unwrap());
        address(&LeaseAttrs::default().with_backend("lan", all), family)
    }

    #[test]
    fn published_addresses_round_trip() {
        for (text, family) in [("198.51.100.7", Family::V4), ("2001:db8:1::7", Family::V6)] {
            let addr = text.parse().unwrap();
            assert_eq!(read(Some(data(addr).as_str()), family), Ok(addr));
        }
    }

    #[test]
    fn hostile_data_is_refused_with_a_short_ascii_reason() {
        let long = format!(r#"{{"Address":"{}"}}"#, "9".repeat(4000));
        let deep = format!(r#"{{"Address":{}1{}}}"#, "[".repeat(100), "]".repeat(100));
        let texts = [
            "null",
            "7",
            "[]",
            "{}",
            r#""198.51.100.7""#,
            r#"{"Address":7}"#,
            r#"{"Address":null}"#,
            r#"{"Address":""}"#,
            r#"{"Address":"198.51.100.7/24"}"#,
            r#"{"Address":" 198.51.100.7"}"#,
            r#"{"Address":"0.0.0.0"}"#,
            r#"{"Address":"127.0.0.1"}"#,
            r#"{"Address":"224.0.0.1"}"#,
            r#"{"Address":"255.255.255.255"}"#,
            r#"{"Address":"169.254.1.1"}"#,
            r#"{"Address":"2001:db8::1"}"#,
            r#"{"Address":"\u0000\u202e"}"#,
            &long,
            &deep,
        ];
        for text in texts.map(Some).into_iter().chain([None]) {
            match read(text, Family::V4) {
                Err(Skip::BadData(reason)) => assert!(reason.len() < 64 && reason.is_ascii(), "{text:?}: {reason}"),
                other => panic!("{text:?}: {other:?}"),
            }
        }
        for text in ["::", "::1", "ff02::1", "fe80::1", "::ffff:198.51.100.7", "198.51.100.7"] {
            let data = format!(r#"{{"Address":"{text}"}}"#);
            assert!(matches!(read(Some(&data), Family::V6), Err(Skip::BadData(_))), "{text}");
        }
    }
}
