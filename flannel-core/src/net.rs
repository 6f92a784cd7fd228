//! Addresses, prefixes and other small value types that the whole workspace uses.

use std::cmp::Ordering;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use ipnetwork::IpNetwork;

/// An IP family.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both families, IPv4 first.
    pub const BOTH: [Self; 2] = [Self::V4, Self::V6];

    /// Returns the family of an address.
    pub fn of(addr: IpAddr) -> Self {
        match addr {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }

    /// Returns the address length in bits: 32 or 128.
    pub const fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// One optional value per family, so that IPv4, IPv6 and dual stack share one code path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dual<T> {
    /// The IPv4 value.
    pub v4: Option<T>,
    /// The IPv6 value.
    pub v6: Option<T>,
}

impl<T> Default for Dual<T> {
    fn default() -> Self {
        Self { v4: None, v6: None }
    }
}

/// The values, IPv4 first, with a comma between them.
impl<T: fmt::Display> fmt::Display for Dual<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.v4, &self.v6) {
            (Some(v4), Some(v6)) => write!(f, "{v4},{v6}"),
            (Some(one), None) | (None, Some(one)) => one.fmt(f),
            (None, None) => Ok(()),
        }
    }
}

impl<T> Dual<T> {
    /// Returns the value of one family.
    pub fn get(&self, family: Family) -> Option<&T> {
        match family {
            Family::V4 => self.v4.as_ref(),
            Family::V6 => self.v6.as_ref(),
        }
    }

    /// Returns the slot of one family for writing.
    pub fn slot(&mut self, family: Family) -> &mut Option<T> {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// Iterates over the values present, with their family, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &T)> {
        Family::BOTH.into_iter().filter_map(|family| self.get(family).map(|value| (family, value)))
    }

    /// Iterates over the families that have a value.
    pub fn families(&self) -> impl Iterator<Item = Family> + '_ {
        self.iter().map(|(family, _)| family)
    }

    /// Applies `f` to each value present.
    pub fn map<U>(&self, mut f: impl FnMut(Family, &T) -> U) -> Dual<U> {
        Dual {
            v4: self.v4.as_ref().map(|value| f(Family::V4, value)),
            v6: self.v6.as_ref().map(|value| f(Family::V6, value)),
        }
    }

    /// Returns whether neither family has a value.
    pub fn is_empty(&self) -> bool {
        self.v4.is_none() && self.v6.is_none()
    }
}

/// An IP prefix in canonical form: its host bits are always zero.
///
/// Subnets, networks and route destinations all have this type, so that equal prefixes compare equal (`ipnetwork` alone
/// keeps host bits and compares them).
///
/// In the order of family, address, length: a prefix comes before those inside it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Prefix(IpNetwork);

/// Why a text, or a pair of address and length, is not a [`Prefix`].
///
/// Retrying does not help; the input has to change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PrefixError {
    /// Not `address/length`.
    #[error("{0:?} is not a prefix of the form ADDRESS/LENGTH")]
    Syntax(String),
    /// The length is larger than the family allows.
    #[error("prefix length {len} of {addr} is larger than {max}")]
    TooLong {
        /// The address given.
        addr: IpAddr,
        /// The length given, in bits.
        len: u8,
        /// The largest length that the family allows, in bits.
        max: u8,
    },
    /// Bits beyond the length are set.
    #[error("{addr}/{len} has host bits set; the prefix is {prefix}")]
    HostBits {
        /// The address given.
        addr: IpAddr,
        /// The length given, in bits.
        len: u8,
        /// The prefix that was probably meant.
        prefix: Prefix,
    },
}

impl Ord for Prefix {
    // Ordered maps of peers compare prefixes all the time: numbers take less time than octets.
    fn cmp(&self, other: &Self) -> Ordering {
        match (self.0, other.0) {
            (IpNetwork::V4(a), IpNetwork::V4(b)) => (a.ip().to_bits(), a.prefix()).cmp(&(b.ip().to_bits(), b.prefix())),
            (IpNetwork::V6(a), IpNetwork::V6(b)) => (a.ip().to_bits(), a.prefix()).cmp(&(b.ip().to_bits(), b.prefix())),
            (IpNetwork::V4(_), IpNetwork::V6(_)) => Ordering::Less,
            (IpNetwork::V6(_), IpNetwork::V4(_)) => Ordering::Greater,
        }
    }
}

impl PartialOrd for Prefix {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Prefix {
    /// Creates a prefix from an address whose host bits are already zero.
    ///
    /// # Errors
    /// [`PrefixError`] when the length is too large or host bits are set. Final for this input.
    pub fn new(addr: IpAddr, len: u8) -> Result<Self, PrefixError> {
        let prefix = Self::masked(addr, len)?;
        if prefix.addr() == addr { Ok(prefix) } else { Err(PrefixError::HostBits { addr, len, prefix }) }
    }

    /// Creates a prefix from any address inside it; host bits are cleared.
    ///
    /// # Errors
    /// [`PrefixError::TooLong`] when the length is too large. Final for this input.
    pub fn masked(addr: IpAddr, len: u8) -> Result<Self, PrefixError> {
        let max = Family::of(addr).bits();
        let network = match IpNetwork::new(addr, len) {
            Ok(network) => network.network(),
            Err(_) => return Err(PrefixError::TooLong { addr, len, max }),
        };
        match IpNetwork::new(network, len) {
            Ok(network) => Ok(Self(network)),
            Err(_) => Err(PrefixError::TooLong { addr, len, max }),
        }
    }

    /// Returns the prefix that contains only this address: /32 or /128.
    pub fn host(addr: IpAddr) -> Self {
        Self(IpNetwork::from(addr))
    }

    /// Returns the network address.
    pub fn addr(&self) -> IpAddr {
        self.0.ip()
    }

    /// Returns the length in bits.
    #[expect(clippy::len_without_is_empty, reason = "a prefix length is not a count of items")]
    pub fn len(&self) -> u8 {
        self.0.prefix()
    }

    /// Returns the family.
    pub fn family(&self) -> Family {
        Family::of(self.addr())
    }

    /// Returns whether `addr` is inside this prefix.
    pub fn contains(&self, addr: IpAddr) -> bool {
        self.0.contains(addr)
    }

    /// Returns whether `other` is inside this prefix or equal to it.
    pub fn covers(&self, other: &Self) -> bool {
        self.family() == other.family() && self.len() <= other.len() && self.contains(other.addr())
    }

    /// Returns whether the two have an address in common, which means that one covers the other.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.covers(other) || other.covers(self)
    }

    /// Returns the last address; for an IPv4 subnet, the broadcast address.
    pub fn last(&self) -> IpAddr {
        self.0.broadcast()
    }

    /// Converts to the `ipnetwork` type.
    pub fn to_ipnetwork(self) -> IpNetwork {
        self.0
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.addr(), self.len())
    }
}

impl fmt::Debug for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for Prefix {
    type Err = PrefixError;

    /// Parses strictly: only digits in the length, no netmask form, host bits zero.
    fn from_str(text: &str) -> Result<Self, PrefixError> {
        let (addr, len) = split_cidr(text)?;
        Self::new(addr, len)
    }
}

/// Splits `ADDRESS/LENGTH`, whose host bits may be set: [`Prefix::masked`] clears them, and checks the length. Only digits
/// are accepted in the length.
///
/// # Errors
/// [`PrefixError::Syntax`]. Final for this text.
pub fn split_cidr(text: &str) -> Result<(IpAddr, u8), PrefixError> {
    let syntax = || PrefixError::Syntax(text.to_owned());
    let (addr, len) = text.split_once('/').ok_or_else(syntax)?;
    if len.is_empty() || !len.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(syntax());
    }
    Ok((addr.parse().map_err(|_| syntax())?, len.parse().map_err(|_| syntax())?))
}

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MacAddr(pub [u8; 6]);

/// The text is not a MAC address. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a MAC address of six bytes, as 02:00:5e:10:00:01")]
pub struct MacError(String);

impl MacAddr {
    /// Returns whether the group bit is set: a multicast or broadcast address, never a device's own.
    pub fn is_multicast(&self) -> bool {
        self.0[0] & 1 == 1
    }

    /// Returns whether all bytes are zero.
    pub fn is_zero(&self) -> bool {
        self.0 == [0; 6]
    }

    /// Returns the same address with the bits of a locally administered unicast address.
    pub fn locally_administered(self) -> Self {
        let mut bytes = self.0;
        bytes[0] = bytes[0] & 0xfe | 0x02;
        Self(bytes)
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = MacError;

    fn from_str(text: &str) -> Result<Self, MacError> {
        let parse = || {
            let mut bytes = [0; 6];
            if text.len() != 17 {
                return None;
            }
            for (byte, part) in bytes.iter_mut().zip(text.as_bytes().chunks(3)) {
                let ([high, low] | [high, low, b':']) = part else { return None };
                let digit = |digit: &u8| char::from(*digit).to_digit(16);
                *byte = u8::try_from(16 * digit(high)? + digit(low)?).ok()?;
            }
            Some(Self(bytes))
        };
        parse().ok_or_else(|| MacError(text.chars().take(40).collect()))
    }
}

/// A VXLAN network identifier: 24 bits (RFC 7348, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Vni(u32);

impl Vni {
    /// The largest identifier.
    pub const MAX: u32 = (1 << 24) - 1;

    /// Flannel's default.
    pub const ONE: Self = Self(1);

    /// Returns `None` if `value` needs more than 24 bits.
    pub fn new(value: u32) -> Option<Self> {
        (value <= Self::MAX).then_some(Self(value))
    }

    /// Returns the number.
    pub fn value(self) -> u32 {
        self.0
    }
}

/// The text is not a VXLAN network identifier or an MTU. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{found:?} is not {expected}")]
pub struct NumberError {
    found: String,
    expected: &'static str,
}

impl NumberError {
    fn new(found: &str, expected: &'static str) -> Self {
        Self { found: found.chars().take(64).collect(), expected }
    }
}

impl FromStr for Vni {
    type Err = NumberError;

    fn from_str(text: &str) -> Result<Self, NumberError> {
        let value = text.parse().ok().and_then(Self::new);
        value.ok_or_else(|| NumberError::new(text, "a VXLAN network identifier: write 0 to 16777215"))
    }
}

impl FromStr for Mtu {
    type Err = NumberError;

    fn from_str(text: &str) -> Result<Self, NumberError> {
        text.parse().map(Self).map_err(|_| NumberError::new(text, "an MTU: write a number of bytes"))
    }
}

impl fmt::Display for Vni {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// A maximum transmission unit in bytes, including the IP header.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mtu(pub u32);

impl fmt::Display for Mtu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Returns whether peers can send to `addr` as a node's public address: unicast, specified, not loopback, link-local,
/// multicast or broadcast (docs/design.md, "Hostile records").
pub fn is_public_unicast(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(v4) => is_public_unicast_v4(v4),
        IpAddr::V6(v6) => is_public_unicast_v6(v6),
    }
}

/// Returns whether `addr` is valid only on its link (169.254.0.0/16, fe80::/10).
pub fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    }
}

/// Returns whether `addr` is of the kind that the kernel assigns to every device.
pub(crate) fn is_automatic(addr: IpAddr) -> bool {
    addr.is_ipv6() && is_link_local(addr)
}

fn is_public_unicast_v4(addr: Ipv4Addr) -> bool {
    !(addr.is_unspecified()
        || addr.is_loopback()
        || addr.is_link_local()
        || addr.is_multicast()
        || addr.octets()[0] == 0
        || addr.octets()[0] >= 240)
}

fn is_public_unicast_v6(addr: Ipv6Addr) -> bool {
    !(addr.is_unspecified()
        || addr.is_loopback()
        || addr.is_multicast()
        || addr.is_unicast_link_local()
        || addr.to_ipv4_mapped().is_some())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_read_as_they_are_written() {
        for vni in [0, 1, Vni::MAX] {
            assert_eq!(vni.to_string().parse(), Ok(Vni::new(vni).unwrap()));
        }
        assert_eq!("1450".parse(), Ok(Mtu(1450)));
        for bad in ["", "-1", "16777216", "0x10", "seven"] {
            assert!(bad.parse::<Vni>().unwrap_err().to_string().contains("0 to 16777215"), "{bad}");
        }
        assert!("4294967296".parse::<Mtu>().is_err());
    }

    #[test]
    fn prefix_text_is_strict() {
        assert_eq!("10.5.0.0/16".parse::<Prefix>().unwrap().to_string(), "10.5.0.0/16");
        for bad in ["10.5.0.0", "10.5.0.0/+8", "10.5.0.0/255.255.0.0", "10.5.0.1/16", "10.5.0.0/33", "/8", ""] {
            assert!(bad.parse::<Prefix>().is_err(), "{bad}");
        }
    }

    #[test]
    fn prefix_overlap_is_containment() {
        let wide: Prefix = "10.0.0.0/8".parse().unwrap();
        let narrow: Prefix = "10.5.3.0/24".parse().unwrap();
        let v6: Prefix = "::/0".parse().unwrap();
        assert!(wide.covers(&narrow) && !narrow.covers(&wide) && wide.overlaps(&narrow) && narrow.overlaps(&wide));
        assert!(!v6.overlaps(&wide));
    }

    #[test]
    fn prefixes_are_in_the_order_of_family_address_and_length() {
        let texts =
            ["9.0.0.0/8", "10.0.0.0/8", "10.0.0.0/16", "10.0.1.0/24", "200.0.0.0/8", "::/0", "2::/64", "10::/16"];
        let prefixes = texts.map(|text| text.parse::<Prefix>().unwrap());
        assert!(prefixes.is_sorted_by(|a, b| a < b), "{prefixes:?}");
    }

    #[test]
    fn mac_text_is_strict() {
        assert_eq!("02:0a:0B:ff:00:01".parse::<MacAddr>().unwrap().to_string(), "02:0a:0b:ff:00:01");
        for bad in
            ["", "02:0a:0b:ff:00", "02:0a:0b:ff:00:01:02", "2:a:b:f:0:1", "02-0a-0b-ff-00-01", "+2:0a:0b:ff:00:01"]
        {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_public_address_is_unicast_and_routable() {
        for bad in [
            "0.0.0.0",
            "0.1.2.3",
            "127.0.0.1",
            "169.254.1.1",
            "224.0.0.1",
            "240.0.0.1",
            "255.255.255.255",
            "::",
            "::1",
            "fe80::1",
            "ff02::1",
            "::ffff:10.0.0.1",
        ] {
            assert!(!is_public_unicast(bad.parse().unwrap()), "{bad}");
        }
        for good in ["10.0.0.1", "192.0.2.1", "2001:db8::1", "fd00::1"] {
            assert!(is_public_unicast(good.parse().unwrap()), "{good}");
        }
    }
}
