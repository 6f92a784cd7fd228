//! The annotations of a Node that flannel reads and writes.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use flannel_core::lease::{Json, LeaseAttrs};
use flannel_core::net::{Dual, Family};

use crate::keys::{Key, Keys};
use crate::protobuf::{Malformed, find, text};

/// The stored annotations with flannel's names.
#[derive(Debug, Default, Hash)]
pub(crate) struct Annotations<'a>([Option<&'a [u8]>; Key::ALL.len()]);

impl<'a> Annotations<'a> {
    /// Takes an entry of a Node's annotations if it has one of these names.
    pub(crate) fn take(&mut self, entry: &'a [u8], keys: &Keys) -> Result<(), Malformed> {
        let name = find(entry, &[1])?;
        let key = std::str::from_utf8(name).ok().and_then(|name| keys.find(name));
        if let Some(slot) = key.and_then(|key| self.0.get_mut(key as usize)) {
            *slot = Some(find(entry, &[2])?);
        }
        Ok(())
    }

    /// Returns the text of an annotation.
    pub(crate) fn text(&self, key: Key) -> Option<Cow<'a, str>> {
        self.0.get(key as usize).copied().flatten().map(text)
    }

    /// Whether flannel has set up the node: peers ignore other nodes.
    pub(crate) fn is_managed(&self) -> bool {
        self.text(Key::Managed).is_some_and(|text| text == "true")
    }

    /// Returns the address in an operator's annotation.
    pub(crate) fn addr(&self, key: Key, family: Family) -> Result<Option<IpAddr>, AddrError> {
        let Some(text) = self.text(key).filter(|text| !text.is_empty()) else { return Ok(None) };
        match parse_addr(&text, family) {
            Some(addr) if !addr.is_unspecified() => Ok(Some(addr)),
            _ => Err(AddrError { key, found: text.chars().take(64).collect(), family }),
        }
    }

    /// Returns the addresses that are published in place of the public IPs.
    pub(crate) fn overwrite(&self) -> Result<Dual<IpAddr>, AddrError> {
        self.addrs(Key::overwrite)
    }

    /// Returns the public IPs that an operator set.
    pub(crate) fn public(&self) -> Result<Dual<IpAddr>, AddrError> {
        self.addrs(Key::node_public_ip)
    }

    fn addrs(&self, key: impl Fn(Family) -> Key) -> Result<Dual<IpAddr>, AddrError> {
        let mut addrs = Dual::default();
        for family in Family::BOTH {
            *addrs.slot(family) = self.addr(key(family), family)?;
        }
        Ok(addrs)
    }
}

/// An operator's annotation is not an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct AddrError {
    pub(crate) key: Key,
    pub(crate) found: String,
    pub(crate) family: Family,
}

/// Reads what a node published. Missing annotations are handled as in flannel: no data, no type.
pub(crate) fn attrs(annotations: &Annotations<'_>) -> Result<LeaseAttrs, String> {
    let kind = annotations.text(Key::BackendType).unwrap_or_default();
    if kind.len() > LeaseAttrs::MAX_BYTES {
        return Err(too_large(Key::BackendType, &kind));
    }
    let mut attrs = LeaseAttrs::default().with_backend(LeaseAttrs::backend_name(&kind), Dual::default());
    for family in Family::BOTH {
        let key = Key::public_ip(family);
        if let Some(text) = annotations.text(key).filter(|text| !text.is_empty()) {
            let addr =
                parse_addr(&text, family).ok_or_else(|| format!("annotation {key} is not {family}: {text:?}"))?;
            *attrs.public_ip.slot(family) = Some(addr).filter(|addr| !addr.is_unspecified());
        }
        let key = Key::backend_data(family);
        let Some(text) = annotations.text(key).filter(|text| !text.is_empty()) else { continue };
        if text.len() > LeaseAttrs::MAX_BYTES {
            return Err(too_large(key, &text));
        }
        let data = Json::parse(&text).map_err(|error| format!("annotation {key} is {error}"))?;
        *attrs.backend_data.slot(family) = Some(data).filter(|data| !data.is_null());
    }
    if attrs.public_ip.is_empty() {
        return Err("it has no public IP".to_owned());
    }
    Ok(attrs)
}

fn too_large(key: Key, text: &str) -> String {
    format!("annotation {key} of {} bytes is larger than {}", text.len(), LeaseAttrs::MAX_BYTES)
}

fn parse_addr(text: &str, family: Family) -> Option<IpAddr> {
    match family {
        Family::V4 => text.parse::<Ipv4Addr>().ok().map(IpAddr::V4),
        Family::V6 => text.parse::<Ipv6Addr>().ok().map(IpAddr::V6),
    }
}

/// Returns the annotations of a node with these attributes: exactly those that Go flannel would write, in the order of
/// [`Key::WRITTEN`]. `overwrite` replaces the public IPs.
pub(crate) fn written(attrs: &LeaseAttrs, overwrite: &Dual<IpAddr>) -> Vec<(Key, String)> {
    let mut texts = vec![(Key::Managed, "true".to_owned()), (Key::BackendType, attrs.backend_type.to_string())];
    for family in Family::BOTH {
        if !writes_family(attrs, family) {
            continue;
        }
        let data = attrs.backend_data.get(family).map_or("null", |data| data.as_str());
        let addr = overwrite.get(family).or(attrs.public_ip.get(family));
        let addr = addr.map_or_else(|| Ipv4Addr::UNSPECIFIED.to_string(), IpAddr::to_string);
        texts.push((Key::backend_data(family), data.to_owned()));
        texts.push((Key::public_ip(family), addr));
    }
    texts
}

/// Whether the annotations of a family are written. Go flannel's rules differ between backends.
fn writes_family(attrs: &LeaseAttrs, family: Family) -> bool {
    let has_data = attrs.backend_data.get(family).is_some_and(|data| !data.is_null());
    let has_addr = attrs.public_ip.get(family).is_some();
    match (&*attrs.backend_type, family) {
        ("vxlan", _) => has_data,
        (_, Family::V4) => true,
        // udp and alloc have no type. Go flannel's never have IPv6 data; this crate's udp has.
        ("wireguard" | "", Family::V6) => has_data && has_addr,
        ("ipip" | "ipsec", Family::V6) => false,
        (_, Family::V6) => has_addr,
    }
}

/// The attributes that nodes of this process published, by node name. If an operator overrides the public IPs, the
/// annotations differ from the node's lease; the node's own record is then shown as published.
#[derive(Debug, Default)]
pub(crate) struct Published(BTreeMap<String, LeaseAttrs>);

impl Published {
    pub(crate) fn set(&mut self, node: &str, attrs: LeaseAttrs) {
        self.0.insert(node.to_owned(), attrs);
    }

    pub(crate) fn forget(&mut self, node: &str) {
        self.0.remove(node);
    }

    /// Returns the attributes of `node`, if its annotations are exactly what it wrote for them.
    pub(crate) fn shown(&self, node: &str, annotations: &Annotations<'_>) -> Option<LeaseAttrs> {
        let attrs = self.0.get(node)?;
        let wanted = written(attrs, &annotations.overwrite().ok()?);
        let is_written = wanted.iter().all(|(key, text)| annotations.text(*key).is_some_and(|found| found == **text));
        is_written.then(|| attrs.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use flannel_core::lease::Scalar;

    fn attrs(kind: &str, data: [bool; 2], addrs: [bool; 2]) -> LeaseAttrs {
        let data_of = |there: bool| there.then(|| Json::object(&[("VNI", Scalar::Number(1))]));
        let attrs = LeaseAttrs::new(Dual {
            v4: addrs[0].then(|| "192.0.2.1".parse().unwrap()),
            v6: addrs[1].then(|| "2001:db8::1".parse().unwrap()),
        });
        attrs.with_backend(kind, Dual { v4: data_of(data[0]), v6: data_of(data[1]) })
    }

    /// docs/compatibility.md, "Kubernetes": the groups of annotations that each backend writes.
    #[test]
    fn each_backend_writes_what_go_flannel_writes() {
        let (yes, no) = ([true; 2], [false; 2]);
        for (kind, data, addrs, wanted) in [
            ("vxlan", yes, yes, "type data v6data ip ipv6"),
            ("vxlan", [false, true], [false, true], "type v6data ipv6"),
            ("vxlan", [true, false], [true, false], "type data ip"),
            ("host-gw", no, yes, "type data v6data ip ipv6"),
            ("host-gw", no, [false, true], "type data v6data ip ipv6"),
            ("host-gw", no, [true, false], "type data ip"),
            ("wireguard", [true, false], yes, "type data ip"),
            ("wireguard", yes, yes, "type data v6data ip ipv6"),
            ("", no, yes, "type data ip"),
            ("", [false, true], yes, "type data v6data ip ipv6"),
            ("ipip", no, yes, "type data ip"),
        ] {
            let texts = written(&attrs(kind, data, addrs), &Dual::default());
            let has = |key| texts.iter().any(|(found, _)| *found == key);
            let names = [
                (Key::BackendType, "type"),
                (Key::BackendData, "data"),
                (Key::BackendV6Data, "v6data"),
                (Key::PublicIp, "ip"),
                (Key::PublicIpv6, "ipv6"),
            ];
            let found: Vec<_> = names.into_iter().filter(|(key, _)| has(*key)).map(|(_, name)| name).collect();
            assert_eq!(found.join(" "), wanted, "{kind} {data:?} {addrs:?}");
            assert!(has(Key::Managed));
        }
    }

    #[test]
    fn what_is_absent_is_written_as_go_flannel_spells_it() {
        let texts = written(&attrs("host-gw", [false; 2], [false, true]), &Dual::default());
        let text = |key| texts.iter().find(|(found, _)| *found == key).map(|(_, text)| &**text);
        assert_eq!((text(Key::BackendData), text(Key::PublicIp)), (Some("null"), Some("0.0.0.0")));
        let overwrite = Dual { v4: None, v6: Some("2001:db8::2".parse().unwrap()) };
        let texts = written(&attrs("host-gw", [false; 2], [true; 2]), &overwrite);
        let text = |key| texts.iter().find(|(found, _)| *found == key).map(|(_, text)| &**text);
        assert_eq!((text(Key::PublicIp), text(Key::PublicIpv6)), (Some("192.0.2.1"), Some("2001:db8::2")));
    }
}
