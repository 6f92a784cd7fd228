//! Keys and values, byte for byte as in flannel (docs/compatibility.md, "Keys", "Lease attributes").

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::Arc;

use etcd_client::KeyValue;
use flannel_core::lease::{BadRecord, Fence, Lease, LeaseAttrs, LeaseKey, Record};
use flannel_core::net::{Dual, Family, Prefix};

/// Returns the key of subnets, after `<prefix>/subnets/`, or `None` if there is no subnet or flannel could not read it.
pub(crate) fn key_text(subnets: &Dual<Prefix>) -> Option<String> {
    let part = |prefix: &Prefix| format!("{}-{}", prefix.addr(), prefix.len());
    let text = match (&subnets.v4, &subnets.v6) {
        (Some(v4), None) => part(v4),
        (Some(v4), Some(v6)) => format!("{}&{}", part(v4), part(v6)),
        (None, Some(v6)) => format!("0.0.0.0-0&{}", part(v6)),
        (None, None) => return None,
    };
    // flannel's parser accepts neither /32 and /128, which exceed the bits of a length, nor dots in an IPv6 part.
    let fits = subnets.iter().all(|(family, prefix)| (1..family.bits()).contains(&prefix.len()));
    let has_dots = subnets.v6.is_some_and(|v6| v6.addr().to_string().contains('.'));
    (fits && !has_dots).then_some(text)
}

/// Returns the subnets of a key, if [`key_text`] returns the same key for them.
pub(crate) fn parse_key(text: &str) -> Result<Dual<Prefix>, BadRecord> {
    if let Some(subnet) = exact_v4(text) {
        return Ok(Dual { v4: Some(subnet), v6: None });
    }
    let subnets = named(text);
    if key_text(&subnets).as_deref() == Some(text) {
        return Ok(subnets);
    }
    let meant = key_text(&subnets).map(|key| format!("; {key} was probably meant")).unwrap_or_default();
    Err(BadRecord::new(format_args!("the key is not that of a subnet{meant}"), subnets))
}

/// Returns the subnet of a key exactly as [`key_text`] writes it for IPv4 alone: nearly every key, read without writing
/// it again.
fn exact_v4(text: &str) -> Option<Prefix> {
    let (addr, len) = text.split_once('-')?;
    let (addr, len) = (addr.parse::<Ipv4Addr>().ok()?, two_digits(len)?);
    Prefix::new(addr.into(), len).ok().filter(|prefix| (1..Family::V4.bits()).contains(&prefix.len()))
}

/// Reads a number of at most two digits, without zeros before it.
fn two_digits(text: &str) -> Option<u8> {
    match *text.as_bytes() {
        [ones @ b'0'..=b'9'] => Some(ones - b'0'),
        [tens @ b'1'..=b'9', ones @ b'0'..=b'9'] => Some((tens - b'0') * 10 + (ones - b'0')),
        _ => None,
    }
}

/// Returns what flannel would read from a key: its regular expression is anchored at the end only.
fn named(text: &str) -> Dual<Prefix> {
    let mut subnets = Dual::default();
    let v4_text = match text.split_once('&') {
        None => text,
        Some((v4_text, v6_text)) => {
            subnets.v6 = v6_text.split_once('-').and_then(|(addr, len)| {
                let addr: Ipv6Addr = addr.parse().ok()?;
                lenient(addr.into(), len)
            });
            v4_text
        }
    };
    if let Some((addr, len)) = v4_text.rsplit_once('-') {
        let addr = addr.rsplit(|c: char| !(c.is_ascii_digit() || c == '.')).next().unwrap_or_default();
        subnets.v4 = v4(addr).and_then(|addr| lenient(addr.into(), len)).filter(|prefix| prefix.len() > 0);
    }
    subnets
}

/// Also accepts leading zeros.
fn v4(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0u8; 4];
    let mut parts = text.split('.');
    for octet in &mut octets {
        *octet = parts.next()?.parse().ok()?;
    }
    parts.next().is_none().then(|| octets.into())
}

fn lenient(addr: IpAddr, len: &str) -> Option<Prefix> {
    let digits = len.bytes().take_while(u8::is_ascii_digit).count();
    Prefix::masked(addr, len.get(..digits)?.parse().ok()?).ok()
}

/// Returns the value of a record if it reads back unchanged: no other value is ever written.
pub(crate) fn value(attrs: &LeaseAttrs) -> Result<String, String> {
    let text = attrs.to_json();
    match LeaseAttrs::from_json(text.as_bytes()) {
        Ok(read) if read.public_ip == attrs.public_ip && read.backend_type == attrs.backend_type => Ok(text),
        Ok(_) => Err("the attributes do not read back as they are".to_owned()),
        Err(error) => Err(error.to_string()),
    }
}

/// The version of a record when it was read: the content of a [`Fence`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Version {
    /// The create revision.
    pub(crate) created: i64,
    /// The mod revision.
    pub(crate) modified: i64,
    /// The etcd lease; 0 if there is none, so the record is a reservation.
    pub(crate) lease: i64,
}

impl Version {
    pub(crate) fn of(kv: &KeyValue) -> Self {
        Self { created: kv.create_revision(), modified: kv.mod_revision(), lease: kv.lease() }
    }

    pub(crate) fn fence(self) -> Fence {
        Fence::of_numbers([self.created, self.modified, self.lease])
    }

    pub(crate) fn from_fence(fence: &Fence) -> Option<Self> {
        let [created, modified, lease] = fence.numbers()?;
        Some(Self { created, modified, lease })
    }

    pub(crate) fn is_reservation(self) -> bool {
        self.lease == 0
    }
}

/// Returns the name of a record: its key after `<prefix>/subnets/`. Short, and different for each record, whatever the
/// key contains.
pub(crate) fn lease_key(base: &str, key: &[u8]) -> LeaseKey {
    LeaseKey::of_bytes(name(base, key))
}

fn name<'a>(base: &str, key: &'a [u8]) -> &'a [u8] {
    key.get(base.len()..).unwrap_or_default()
}

/// Returns the record of a key and value. Its expiry is not queried: that would take one request per record.
pub(crate) fn record(base: &str, kv: &KeyValue) -> Record {
    record_of(name(base, kv.key()), Some(kv.value()), Version::of(kv))
}

/// Returns a record whose value was too large to read.
pub(crate) fn record_too_large(base: &str, kv: &KeyValue) -> Record {
    record_of(name(base, kv.key()), None, Version::of(kv))
}

/// Returns the record that a write made.
pub(crate) fn record_written(key: &LeaseKey, value: &str, version: Version) -> Record {
    record_of(key.as_str().as_bytes(), Some(value.as_bytes()), version)
}

fn record_of(name: &[u8], value: Option<&[u8]>, version: Version) -> Record {
    let key = LeaseKey::of_bytes(name);
    let lease = subnets_of(name, &key).and_then(|subnets| {
        let too_large = || BadRecord::new(format_args!("larger than {} bytes", LeaseAttrs::MAX_BYTES), subnets);
        let attrs = LeaseAttrs::from_json(value.ok_or_else(too_large)?);
        let attrs = attrs.map_err(|error| BadRecord::new(error, subnets))?;
        Ok(Arc::new(Lease::new(key.clone(), subnets, attrs).fenced(version.fence())))
    });
    Record { key, created: version.created.unsigned_abs(), lease: lease.map_err(Box::new) }
}

/// Returns the subnets of a record's name. A name that is too long has none.
fn subnets_of(name: &[u8], key: &LeaseKey) -> Result<Dual<Prefix>, BadRecord> {
    if name.len() > LeaseKey::MAX_BYTES {
        let reason = format_args!("its key of {} bytes is longer than {}", name.len(), LeaseKey::MAX_BYTES);
        return Err(BadRecord::new(reason, Dual::default()));
    }
    parse_key(key.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn dual(v4: Option<&str>, v6: Option<&str>) -> Dual<Prefix> {
        Dual { v4: v4.map(|text| text.parse().unwrap()), v6: v6.map(|text| text.parse().unwrap()) }
    }

    #[test]
    fn keys_are_flannels_byte_for_byte() {
        for (subnets, text) in [
            (dual(Some("10.5.34.0/24"), None), "10.5.34.0-24"),
            (dual(Some("10.5.34.0/24"), Some("fd00:12:13::/56")), "10.5.34.0-24&fd00:12:13::-56"),
            (dual(None, Some("fd00:5:1::/64")), "0.0.0.0-0&fd00:5:1::-64"),
        ] {
            assert_eq!(key_text(&subnets).as_deref(), Some(text));
            assert_eq!(parse_key(text), Ok(subnets));
        }
        for none in [dual(None, None), dual(Some("10.0.0.1/32"), None), dual(None, Some("fd00::1/128"))] {
            assert_eq!(key_text(&none), None);
        }
    }

    #[test]
    fn keys_that_are_not_canonical_are_bad_and_name_what_flannel_would_read() {
        let v4 = Some("10.5.34.0/24");
        let v6 = Some("fd00::/64");
        for (text, v4, v6) in [
            ("", None, None),
            ("garbage", None, None),
            ("10.5.34.0", None, None),
            ("10.5.34.0/24", None, None),
            ("10.5.300.0-24", None, None),
            ("10.5.34.0-33", None, None),
            ("10.5.34.0-", None, None),
            ("0.0.0.0-0", None, None),
            ("10.5.34.0-024", v4, None),
            ("10.5.34.7-24", v4, None),
            ("010.5.34.0-24", v4, None),
            ("x10.5.34.0-24", v4, None),
            ("é10.5.34.0-24", v4, None),
            ("old/10.5.34.0-24", v4, None),
            ("10.5.34.0-24 ", v4, None),
            ("10.5.34.1-32", Some("10.5.34.1/32"), None),
            ("10.5.34.0-24&", v4, None),
            ("10.5.34.0-24&fd00::", v4, None),
            ("10.5.34.0-24&fd00::-64x", v4, v6),
            ("10.5.34.0-24&FD00::-64", v4, v6),
            ("10.5.34.0-24&fd00:0::-64", v4, v6),
            ("10.5.34.0-24&fd00::1-64", v4, v6),
            ("&fd00::-64", None, v6),
            ("fd00::-64", None, None),
        ] {
            let bad = parse_key(text).unwrap_err();
            assert_eq!(bad.subnets, dual(v4, v6), "{text}");
        }
    }

    #[test]
    fn a_key_or_value_of_any_size_makes_a_small_record() {
        let huge = "x".repeat(1 << 20);
        let quoted = format!(r#"{{"PublicIP":"1.2.3.4","BackendType":["{}"]}}"#, &huge[..4000]);
        for (name, value, says) in [
            (format!("{huge}10.5.34.0-24"), Some("{}"), "1048588 bytes"),
            ("10.5.34.0-24".to_owned(), Some(&*huge), "1048576 bytes"),
            ("10.5.34.0-24".to_owned(), Some(&*quoted), "BackendType"),
            ("10.5.34.0-24".to_owned(), None, "larger"),
        ] {
            let version = Version { created: 3, modified: 4, lease: 0 };
            let record = record_of(name.as_bytes(), value.map(str::as_bytes), version);
            let bad = record.lease.unwrap_err();
            assert!(record.key.as_str().len() <= LeaseKey::MAX_BYTES, "{:?}", record.key);
            assert!(bad.reason.contains(says) && bad.reason.len() <= BadRecord::MAX_BYTES, "{}", bad.reason);
            assert_eq!(bad.subnets.v4.is_some(), name.len() < 20);
        }
    }

    #[test]
    fn what_does_not_read_back_is_never_written() {
        let public_ip = Dual { v4: Some("1.2.3.4".parse().unwrap()), v6: None };
        let attrs = |kind: &str| LeaseAttrs::new(public_ip).with_backend(kind, Dual::default());
        assert_eq!(value(&attrs("")).unwrap(), r#"{"PublicIP":"1.2.3.4","PublicIPv6":null}"#);
        assert!(value(&attrs(&"x".repeat(5000))).is_err());
    }

    #[test]
    fn a_fence_round_trips() {
        let version = Version { created: 3, modified: i64::MAX, lease: 0 };
        assert_eq!(Version::from_fence(&version.fence()), Some(version));
        for bad in ["", "1.2", "1.2.3.4", "a.b.c", "1.2.+3"] {
            assert_eq!(Version::from_fence(&Fence::new(bad)), None);
        }
        assert_eq!(Version::from_fence(&Fence::default()), None);
    }

    proptest! {
        #[test]
        fn a_key_is_read_if_it_would_be_written_for_what_it_names(
            text in "0{0,1}[0-9]{1,3}(\\.[0-9]{1,3}){2}\\.(0|128|192|7)-[+0]?[0-9]{1,3}|[0-9a-f:.&/-]{0,40}|\\PC{0,20}",
        ) {
            let subnets = named(&text);
            let is_exact = key_text(&subnets).is_some_and(|key| key == text);
            prop_assert_eq!(parse_key(&text).ok(), is_exact.then_some(subnets), "{}", text);
        }

        #[test]
        fn every_subnet_round_trips(
            v4 in proptest::option::of((any::<u32>(), 1u8..32)),
            v6 in proptest::option::of((any::<u128>(), 1u8..128)),
        ) {
            let subnets = Dual {
                v4: v4.map(|(addr, len)| Prefix::masked(IpAddr::V4(addr.into()), len).unwrap()),
                v6: v6.map(|(addr, len)| Prefix::masked(IpAddr::V6(addr.into()), len).unwrap()),
            };
            match key_text(&subnets) {
                Some(text) => prop_assert_eq!(parse_key(&text), Ok(subnets)),
                None => {
                    let has_dots = subnets.v6.is_some_and(|v6| v6.addr().to_string().contains('.'));
                    prop_assert!(subnets.is_empty() || has_dots)
                }
            }
        }
    }
}
