//! The table of peers' subnets.

use std::collections::HashMap;
use std::hash::{BuildHasher, Hash, Hasher, RandomState};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use arc_swap::ArcSwap;
use flannel_core::net::{Dual, Prefix};

/// The subnets of all peers, each with the address and port that the peer receives at, and this node's own subnets.
/// Immutable: a change creates a new table.
#[derive(Debug, Clone)]
pub struct Table {
    own: Dual<Prefix>,
    v4: Lengths<u32>,
    v6: Lengths<u128>,
    /// The number of subnets of each endpoint.
    endpoints: HashMap<SocketAddr, usize, Mixing>,
}

impl Table {
    /// Creates a table without peers. `own` are the subnets that packets are accepted for.
    pub fn new(own: Dual<Prefix>) -> Self {
        let mixing = Mixing::random();
        Self { own, v4: Lengths::new(mixing), v6: Lengths::new(mixing), endpoints: HashMap::with_hasher(mixing) }
    }

    /// Returns this table with changes: each is a subnet and its new endpoint, or `None` to remove it. Later changes
    /// override earlier ones.
    #[must_use]
    pub fn with(&self, changes: &[(Prefix, Option<SocketAddr>)]) -> Self {
        let mut table = self.clone();
        for (prefix, endpoint) in changes {
            table.change(*prefix, endpoint.map(plain));
        }
        table
    }

    /// Returns this table with other subnets of this node.
    #[must_use]
    pub fn with_own(&self, own: Dual<Prefix>) -> Self {
        Self { own, ..self.clone() }
    }

    /// Returns this node's subnets.
    pub fn own(&self) -> Dual<Prefix> {
        self.own
    }

    /// Returns the endpoint of the longest subnet that contains an address.
    pub fn lookup(&self, address: IpAddr) -> Option<SocketAddr> {
        match address {
            IpAddr::V4(address) => self.v4.lookup(address.to_bits()),
            IpAddr::V6(address) => self.v6.lookup(address.to_bits()),
        }
    }

    /// Returns all subnets with their endpoints, in no particular order.
    pub fn iter(&self) -> impl Iterator<Item = (Prefix, SocketAddr)> + '_ {
        let v4 = self.v4.iter().map(|(bits, len, endpoint)| (IpAddr::from(bits.to_be_bytes()), len, endpoint));
        let v6 = self.v6.iter().map(|(bits, len, endpoint)| (IpAddr::from(bits.to_be_bytes()), len, endpoint));
        v4.chain(v6).filter_map(|(address, len, endpoint)| Some((Prefix::new(address, len).ok()?, endpoint)))
    }

    /// Returns the number of subnets.
    pub fn len(&self) -> usize {
        self.v4.len() + self.v6.len()
    }

    /// Whether there are no subnets.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a peer has this address and port.
    pub(crate) fn knows(&self, endpoint: SocketAddr) -> bool {
        self.endpoints.contains_key(&endpoint)
    }

    /// Whether the address is in a subnet of this node.
    pub(crate) fn is_own(&self, address: IpAddr) -> bool {
        let own = match address {
            IpAddr::V4(_) => self.own.v4,
            IpAddr::V6(_) => self.own.v6,
        };
        own.is_some_and(|own| own.contains(address))
    }

    fn change(&mut self, prefix: Prefix, endpoint: Option<SocketAddr>) {
        let former = match prefix.addr() {
            IpAddr::V4(address) => self.v4.change(address.to_bits(), prefix.len(), endpoint),
            IpAddr::V6(address) => self.v6.change(address.to_bits(), prefix.len(), endpoint),
        };
        if let Some(endpoint) = endpoint {
            *self.endpoints.entry(endpoint).or_insert(0) += 1;
        }
        let Some(former) = former else { return };
        if let Some(count) = self.endpoints.get_mut(&former) {
            *count -= 1;
            if *count == 0 {
                self.endpoints.remove(&former);
            }
        }
    }
}

/// Returns an endpoint in the kernel's form: without flow information and scope.
pub(crate) fn plain(endpoint: SocketAddr) -> SocketAddr {
    SocketAddr::new(endpoint.ip(), endpoint.port())
}

/// A thread's copy of the table, with the last results cached.
#[derive(Debug)]
pub(crate) struct Lookup {
    published: Arc<ArcSwap<Table>>,
    table: Arc<Table>,
    last: Option<(IpAddr, Option<SocketAddr>)>,
    sender: Option<(SocketAddr, bool)>,
}

impl Lookup {
    pub(crate) fn new(published: Arc<ArcSwap<Table>>) -> Self {
        let table = published.load_full();
        Self { published, table, last: None, sender: None }
    }

    /// Switches to the table in effect. Called once for each batch.
    pub(crate) fn refresh(&mut self) {
        let published = self.published.load();
        if !Arc::ptr_eq(&published, &self.table) {
            self.table = Arc::clone(&published);
            self.last = None;
            self.sender = None;
        }
    }

    /// As [`Table::lookup`].
    pub(crate) fn peer(&mut self, address: IpAddr) -> Option<SocketAddr> {
        match self.last {
            Some((last, endpoint)) if last == address => endpoint,
            _ => {
                let endpoint = self.table.lookup(address);
                self.last = Some((address, endpoint));
                endpoint
            }
        }
    }

    /// As [`Table::knows`].
    pub(crate) fn knows(&mut self, endpoint: SocketAddr) -> bool {
        match self.sender {
            Some((last, known)) if last == endpoint => known,
            _ => {
                let known = self.table.knows(endpoint);
                self.sender = Some((endpoint, known));
                known
            }
        }
    }

    pub(crate) fn table(&self) -> &Table {
        &self.table
    }
}

/// An address as a number.
trait Bits: Copy + Eq + Hash {
    /// Returns the first `len` bits, with the others zero.
    fn first(self, len: u8) -> Self;
}

impl Bits for u32 {
    fn first(self, len: u8) -> Self {
        self & !Self::MAX.checked_shr(len.into()).unwrap_or(0)
    }
}

impl Bits for u128 {
    fn first(self, len: u8) -> Self {
        self & !Self::MAX.checked_shr(len.into()).unwrap_or(0)
    }
}

/// One map for each prefix length in use, the longest first. All of flannel's subnets have the same length.
#[derive(Debug, Clone)]
struct Lengths<B> {
    mixing: Mixing,
    maps: Vec<(u8, HashMap<B, SocketAddr, Mixing>)>,
}

impl<B: Bits> Lengths<B> {
    fn new(mixing: Mixing) -> Self {
        Self { mixing, maps: Vec::new() }
    }

    fn lookup(&self, address: B) -> Option<SocketAddr> {
        self.maps.iter().find_map(|(len, map)| map.get(&address.first(*len)).copied())
    }

    /// Returns the former endpoint.
    fn change(&mut self, address: B, len: u8, endpoint: Option<SocketAddr>) -> Option<SocketAddr> {
        let place = self.maps.binary_search_by(|(of, _)| len.cmp(of));
        let Some(endpoint) = endpoint else {
            let (_, map) = self.maps.get_mut(place.ok()?)?;
            let former = map.remove(&address);
            self.maps.retain(|(_, map)| !map.is_empty());
            return former;
        };
        match place {
            Ok(found) => self.maps.get_mut(found)?.1.insert(address, endpoint),
            Err(place) => {
                let mut map = HashMap::with_hasher(self.mixing);
                map.insert(address, endpoint);
                self.maps.insert(place, (len, map));
                None
            }
        }
    }

    fn iter(&self) -> impl Iterator<Item = (B, u8, SocketAddr)> + '_ {
        self.maps.iter().flat_map(|(len, map)| map.iter().map(|(bits, endpoint)| (*bits, *len, *endpoint)))
    }

    fn len(&self) -> usize {
        self.maps.iter().map(|(_, map)| map.len()).sum()
    }
}

/// A cheap hash with a secret, so that an attacker cannot choose subnets that collide.
#[derive(Debug, Clone, Copy)]
struct Mixing(u64);

impl Mixing {
    fn random() -> Self {
        Self(RandomState::new().hash_one(0))
    }
}

impl BuildHasher for Mixing {
    type Hasher = Self;

    fn build_hasher(&self) -> Self {
        *self
    }
}

impl Hasher for Mixing {
    fn write(&mut self, bytes: &[u8]) {
        for chunk in bytes.chunks(8) {
            let mut word = [0; 8];
            word.iter_mut().zip(chunk).for_each(|(to, from)| *to = *from);
            self.write_u64(u64::from_ne_bytes(word));
        }
    }

    fn write_u32(&mut self, word: u32) {
        self.write_u64(word.into());
    }

    fn write_u64(&mut self, word: u64) {
        // Both halves of the product depend on every bit.
        let product = u128::from(self.0 ^ word) * 0x9e37_79b9_7f4a_7c15;
        self.0 = (product >> 64) as u64 ^ product as u64;
    }

    fn write_u128(&mut self, word: u128) {
        self.write_u64((word >> 64) as u64);
        self.write_u64(word as u64);
    }

    fn finish(&self) -> u64 {
        self.0
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{Ipv4Addr, Ipv6Addr};

    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    /// Generates addresses that often share a prefix.
    fn address() -> impl Strategy<Value = IpAddr> {
        let v4 = (0_u32..4, any::<u8>()).prop_map(|(a, b)| Ipv4Addr::from(a << 30 | 0x0a05_0000 | u32::from(b)).into());
        let v6 =
            (0_u128..4, any::<u8>()).prop_map(|(a, b)| Ipv6Addr::from(a << 126 | 0xfd00 << 64 | u128::from(b)).into());
        prop_oneof![v4, v6]
    }

    fn prefix() -> impl Strategy<Value = Prefix> {
        (address(), 0_u8..=128).prop_map(|(address, len)| {
            let len = if address.is_ipv4() { len % 33 } else { len };
            Prefix::masked(address, len).unwrap()
        })
    }

    fn endpoint() -> impl Strategy<Value = SocketAddr> {
        (0_u8..4, 0_u16..2).prop_map(|(host, port)| SocketAddr::from(([192, 0, 2, host], 8285 + port)))
    }

    proptest! {
        #[test]
        fn it_answers_as_a_walk_over_all_prefixes_does(
            batches in vec(vec((prefix(), proptest::option::of(endpoint())), 0..12), 0..6),
            asked in vec(address(), 20),
        ) {
            let mut naive = BTreeMap::new();
            let mut table = Table::new(Dual::default());
            for batch in &batches {
                table = table.with(batch);
                for (prefix, endpoint) in batch {
                    match endpoint {
                        Some(endpoint) => naive.insert(*prefix, *endpoint),
                        None => naive.remove(prefix),
                    };
                }
            }
            for address in asked.iter().copied().chain(naive.keys().map(Prefix::addr)) {
                let holding = naive.iter().filter(|(prefix, _)| prefix.contains(address));
                let expected = holding.max_by_key(|(prefix, _)| prefix.len()).map(|(_, endpoint)| *endpoint);
                prop_assert_eq!(table.lookup(address), expected);
            }
            prop_assert_eq!(table.len(), naive.len());
            prop_assert_eq!(table.iter().collect::<BTreeMap<_, _>>(), naive.clone());
            for endpoint in naive.values() {
                prop_assert!(table.knows(*endpoint));
            }
            for port in 8285..8287 {
                for host in 0..4 {
                    let endpoint = SocketAddr::from(([192, 0, 2, host], port));
                    prop_assert_eq!(table.knows(endpoint), naive.values().any(|known| *known == endpoint));
                }
            }
        }
    }

    #[test]
    fn a_thread_sees_a_new_table_when_it_looks_again_and_no_old_answer_is_left() {
        let [a, b] = [1, 2].map(|host| SocketAddr::from(([192, 0, 2, host], 8285)));
        let subnet: Prefix = "10.5.1.0/24".parse().unwrap();
        let table = Table::new(Dual::default()).with(&[(subnet, Some(a))]);
        let published = Arc::new(ArcSwap::from_pointee(table.clone()));
        let mut lookup = Lookup::new(Arc::clone(&published));
        let address = "10.5.1.7".parse().unwrap();
        assert_eq!((lookup.peer(address), lookup.knows(a)), (Some(a), true));
        published.store(Arc::new(table.with(&[(subnet, Some(b))])));
        assert_eq!((lookup.peer(address), lookup.knows(a)), (Some(a), true));
        lookup.refresh();
        assert_eq!((lookup.peer(address), lookup.knows(a), lookup.knows(b)), (Some(b), false, true));
    }
}
