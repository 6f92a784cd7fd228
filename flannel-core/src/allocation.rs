//! Selection of a free subnet from the pool (docs/compatibility.md, "Acquiring a lease").

use crate::config::pool::{address, number};
use crate::config::{Network, NetworkConfig, Pool};
use crate::net::{Dual, Family, Prefix};

/// A source of random numbers: any closure that returns 64 uniform bits. Tests use a seeded one.
pub trait Random {
    /// Returns 64 uniform bits.
    fn bits(&mut self) -> u64;
}

impl<F: FnMut() -> u64> Random for F {
    fn bits(&mut self) -> u64 {
        self()
    }
}

/// No subnet of the pool is free.
///
/// Retry once a lease may have ended, at most once a second, or widen the pool.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "all {total} subnets of length {} from {} to {} are taken; release leases or widen SubnetMin and SubnetMax",
    pool.len, pool.min, pool.max
)]
#[non_exhaustive]
pub struct Exhausted {
    /// The pool.
    pub pool: Pool,
    /// The total number of subnets in the pool.
    pub total: u128,
}

/// Chooses uniformly among all subnets of `pool` that overlap none of `taken`.
///
/// The cost depends on the size of `taken`, not of the pool. `taken` may contain prefixes of any length, duplicates,
/// and prefixes outside the pool. flannel chooses only among the first 100 free subnets, so nodes that start together
/// often collide.
///
/// # Errors
/// [`Exhausted`] when every subnet is taken.
pub fn choose(
    pool: &Pool,
    taken: impl IntoIterator<Item = Prefix>,
    random: &mut impl Random,
) -> Result<Prefix, Exhausted> {
    let slots = Slots::of(pool);
    let exhausted = || Exhausted { pool: pool.clone(), total: slots.total };
    let taken = slots.taken(taken);
    let used: u128 = taken.iter().map(|(first, last)| last - first + 1).sum();
    let free = slots.total.saturating_sub(used);
    if free == 0 {
        return Err(exhausted());
    }
    // Convert the index among the free subnets to an index among all subnets, by skipping the taken ones before it.
    let mut slot = below(free, random);
    for (first, last) in taken {
        if slot < first {
            break;
        }
        slot += last - first + 1;
    }
    slots.prefix(slot).ok_or_else(exhausted)
}

/// The maximum number of records in [`Taken`]. At 48 bytes each, they use a third of an agent's memory limit.
pub const MAX_TAKEN: usize = 1 << 19;

/// The subnets of other nodes' records in a network, each with data of the store's choice. Bounded, because any client
/// of the store can write any number of records.
#[derive(Debug, Clone)]
pub struct Taken<T = ()> {
    networks: Dual<Network>,
    records: Vec<(Dual<Prefix>, T)>,
    /// Whether records were left out.
    more: bool,
}

/// No subnets could be chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ChooseError {
    /// No subnet is free.
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    /// Too many records to determine a free subnet. Retry once records are deleted.
    #[error("others have more than {MAX_TAKEN} records in the network; delete those that no node holds")]
    TooMany,
    /// The network has no pool. Final for this configuration.
    #[error("an {0} network without a pool; use Kubernetes or give it a SubnetLen")]
    NoPool(Family),
}

impl<T> Taken<T> {
    /// Creates an empty set for the networks of `config`.
    pub fn of(config: &NetworkConfig) -> Self {
        Self { networks: config.networks.clone(), records: Vec::new(), more: false }
    }

    /// Adds a record with these subnets, if one is in a network. A record that covers a whole network is not a lease of
    /// it and is ignored.
    pub fn add(&mut self, subnets: &Dual<Prefix>, about: T) {
        let mut networks = self.networks.iter();
        if !networks.any(|(family, network)| subnets.get(family).is_some_and(|subnet| is_part(subnet, network))) {
            return;
        }
        if self.records.len() < MAX_TAKEN {
            self.records.push((*subnets, about));
        } else {
            self.more = true;
        }
    }

    /// Returns the records that overlap `own`, except those that the pools could not have allocated: peers prefer a
    /// record that fits the pool over such a record, regardless of age.
    pub fn rivals(&self, own: &Dual<Prefix>) -> impl Iterator<Item = &(Dual<Prefix>, T)> {
        let overlaps = |other: &Dual<Prefix>| {
            own.iter().any(|(family, own)| other.get(family).is_some_and(|other| other.overlaps(own)))
        };
        self.records.iter().filter(move |(other, _)| overlaps(other) && fits_pools(&self.networks, other))
    }

    /// Chooses, per family, the first of `wished` that is free and fits the pool, or else any free subnet of the pool.
    ///
    /// # Errors
    /// [`ChooseError`] when no subnet can be chosen.
    pub fn choose(&self, wished: &[&Dual<Prefix>], random: &mut impl Random) -> Result<Dual<Prefix>, ChooseError> {
        if self.more {
            return Err(ChooseError::TooMany);
        }
        let mut subnets = Dual::default();
        for (family, network) in self.networks.iter() {
            let taken = || {
                let subnets = self.records.iter().filter_map(|(subnets, _)| subnets.get(family));
                subnets.filter(|subnet| is_part(subnet, network)).copied()
            };
            let is_free = |subnet: &Prefix| compatible(network, subnet) && !taken().any(|other| other.overlaps(subnet));
            let subnet = match wished.iter().filter_map(|wished| wished.get(family)).find(|subnet| is_free(subnet)) {
                Some(subnet) => *subnet,
                None => choose(network.pool.as_ref().ok_or(ChooseError::NoPool(family))?, taken(), random)?,
            };
            *subnets.slot(family) = Some(subnet);
        }
        Ok(subnets)
    }
}

/// Returns whether a subnet overlaps a network without covering all of it.
fn is_part(subnet: &Prefix, network: &Network) -> bool {
    subnet.overlaps(&network.prefix) && !subnet.covers(&network.prefix)
}

/// Returns whether the pool of `network` can allocate `subnet`: it has the pool's length and is in its range. Without a
/// pool, it only has to be inside the network. Peers may have other subnets: see [`Rules`](crate::admit::Rules).
pub fn compatible(network: &Network, subnet: &Prefix) -> bool {
    let inside = network.prefix.covers(subnet);
    inside
        && network
            .pool
            .as_ref()
            .is_none_or(|pool| subnet.len() == pool.len && (pool.min..=pool.max).contains(&subnet.addr()))
}

/// Returns whether a lease's subnets fit the configuration: one in each enabled family, none in a disabled one
/// (docs/compatibility.md, "Acquiring a lease", step 2).
pub fn all_compatible(config: &NetworkConfig, subnets: &Dual<Prefix>) -> bool {
    fits_pools(&config.networks, subnets)
}

/// [`all_compatible`] for the networks of a configuration.
pub(crate) fn fits_pools(networks: &Dual<Network>, subnets: &Dual<Prefix>) -> bool {
    Family::BOTH.into_iter().all(|family| match (networks.get(family), subnets.get(family)) {
        (Some(network), Some(subnet)) => compatible(network, subnet),
        (None, None) => true,
        (Some(_), None) | (None, Some(_)) => false,
    })
}

/// A pool as subnets indexed from zero.
struct Slots {
    family: Family,
    len: u8,
    /// Address of the first subnet.
    base: u128,
    /// How far a subnet's index is shifted left in its address.
    shift: u8,
    total: u128,
}

impl Slots {
    fn of(pool: &Pool) -> Self {
        let family = Family::of(pool.min);
        let (min, max) = (number(pool.min), number(pool.max));
        let nothing = Self { family, len: pool.len, base: min, shift: 0, total: 0 };
        if Family::of(pool.max) != family || min > max || pool.len == 0 || pool.len > family.bits() {
            return nothing;
        }
        let shift = family.bits() - pool.len;
        Self { shift, total: ((max - min) >> shift).saturating_add(1), ..nothing }
    }

    /// Returns the taken indexes: disjoint ranges, both ends included, in ascending order.
    fn taken(&self, taken: impl IntoIterator<Item = Prefix>) -> Vec<(u128, u128)> {
        let mut ranges: Vec<_> = taken.into_iter().filter_map(|prefix| self.range(&prefix)).collect();
        ranges.sort_unstable();
        ranges.dedup_by(|next, kept| {
            let joined = next.0 <= kept.1;
            if joined {
                kept.1 = kept.1.max(next.1);
            }
            joined
        });
        ranges
    }

    fn range(&self, prefix: &Prefix) -> Option<(u128, u128)> {
        let last_place = self.total.checked_sub(1)?;
        if prefix.family() != self.family {
            return None;
        }
        let first = number(prefix.addr()).saturating_sub(self.base) >> self.shift;
        let last = number(prefix.last()).checked_sub(self.base)? >> self.shift;
        (first <= last_place).then_some((first, last.min(last_place)))
    }

    fn prefix(&self, slot: u128) -> Option<Prefix> {
        Prefix::masked(address(self.base + (slot << self.shift), self.family), self.len).ok()
    }
}

/// Returns a uniform number below `bound`, which must not be zero.
fn below(bound: u128, random: &mut impl Random) -> u128 {
    let mask = u128::MAX.checked_shr((bound - 1).leading_zeros()).unwrap_or(0);
    let draw = |random: &mut dyn FnMut() -> u64| ((u128::from(random()) << 64) | u128::from(random())) & mask;
    // Each draw is below `bound` with a probability of at least one half. The number of draws is limited, so that a
    // broken source still gives a result.
    for _ in 0..128 {
        let number = draw(&mut || random.bits());
        if number < bound {
            return number;
        }
    }
    draw(&mut || random.bits()) % bound
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::net::IpAddr;

    /// SplitMix64.
    fn seeded(mut state: u64) -> impl FnMut() -> u64 {
        move || {
            state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
            let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        }
    }

    fn pool(len: u8, min: &str, max: &str) -> Pool {
        Pool { len, min: min.parse().unwrap(), max: max.parse().unwrap() }
    }

    fn prefixes(texts: &[&str]) -> Vec<Prefix> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    #[test]
    fn the_last_free_subnet_is_found_and_then_there_is_none() {
        let pool = pool(24, "10.3.1.0", "10.3.255.0");
        let mut taken: Vec<Prefix> =
            (1..=255).filter(|n| *n != 77).map(|n| Prefix::new(IpAddr::from([10, 3, n, 0]), 24).unwrap()).collect();
        assert_eq!(choose(&pool, taken.clone(), &mut seeded(1)).unwrap().to_string(), "10.3.77.0/24");
        taken.push("10.3.77.128/32".parse().unwrap());
        assert_eq!(choose(&pool, taken, &mut seeded(1)), Err(Exhausted { total: 255, pool }));
    }

    #[test]
    fn a_pool_of_2_to_the_40_costs_no_more_than_what_is_taken() {
        let pool = pool(88, "fd00:0:0:0:0:100::", "fd00:0:0:ff:ffff:ff00::");
        let taken = prefixes(&["fd00:0:0:0::/65", "fd00:0:0:80::/57"]);
        let mut random = seeded(7);
        for _ in 0..1000 {
            let subnet = choose(&pool, taken.clone(), &mut random).unwrap();
            assert!(subnet.len() == 88 && taken.iter().all(|taken| !taken.overlaps(&subnet)), "{subnet}");
        }
    }

    #[test]
    fn the_choice_is_uniform_over_all_free_subnets() {
        let pool = pool(28, "10.0.0.16", "10.0.7.240");
        let taken = prefixes(&["10.0.0.16/28", "10.0.1.0/24", "10.0.4.3/32", "10.0.4.0/27"]);
        let mut counts = std::collections::BTreeMap::<Prefix, u32>::new();
        let mut random = seeded(3);
        let free = 127 - 1 - 16 - 2;
        let draws = 200 * free;
        for _ in 0..draws {
            *counts.entry(choose(&pool, taken.clone(), &mut random).unwrap()).or_default() += 1;
        }
        assert_eq!(counts.len(), free as usize);
        let chi: f64 = counts.values().map(|count| (f64::from(*count) - 200.0).powi(2) / 200.0).sum();
        // 107 degrees of freedom: 99.99 % lie below 169.
        assert!(chi < 169.0, "{chi}");
    }

    fn dual(text: &str) -> Dual<Prefix> {
        Dual { v4: Some(text.parse().unwrap()), v6: None }
    }

    #[test]
    fn the_first_wish_that_is_free_is_granted_and_a_record_of_everything_keeps_nobody_out() {
        let config = NetworkConfig::parse(br#"{"Network":"10.3.0.0/16"}"#, crate::config::Allocation::Pool).unwrap();
        let mut taken = Taken::of(&config);
        for subnet in ["10.3.7.128/25", "10.0.0.0/8", "10.3.0.0/16"] {
            taken.add(&dual(subnet), subnet);
        }
        let wished = ["10.3.7.0/24", "10.3.8.0/25", "10.3.9.0/24", "10.3.10.0/24"].map(dual);
        let wished: Vec<_> = wished.iter().collect();
        assert_eq!(taken.choose(&wished, &mut seeded(1)), Ok(dual("10.3.9.0/24")));
        let chosen = taken.choose(&wished[..2], &mut seeded(1)).unwrap();
        assert!(all_compatible(&config, &chosen) && chosen != dual("10.3.7.0/24"), "{chosen:?}");
        taken.add(&dual("10.3.7.0/24"), "fits");
        let rivals: Vec<_> = taken.rivals(&dual("10.3.7.0/24")).map(|(_, subnet)| *subnet).collect();
        assert_eq!(rivals, ["fits"]);
        let config = NetworkConfig::parse(br#"{"Network":"10.3.0.0/16"}"#, crate::config::Allocation::External);
        let taken: Taken = Taken::of(&config.unwrap());
        assert_eq!(taken.choose(&[], &mut seeded(1)), Err(ChooseError::NoPool(Family::V4)));
    }

    #[test]
    fn of_others_records_in_the_network_so_many_are_held_and_with_more_nothing_is_chosen() {
        let text = br#"{"EnableIPv6":true,"EnableIPv4":false,"IPv6Network":"fd00::/32","Backend":{"Type":"vxlan"}}"#;
        let mut taken = Taken::of(&NetworkConfig::parse(text, crate::config::Allocation::Pool).unwrap());
        let subnets = |high: u16, low: u32| {
            let addr = std::net::Ipv6Addr::new(0xfd00, high, (low >> 16) as u16, low as u16, 0, 0, 0, 0);
            Dual { v4: None, v6: Some(Prefix::new(addr.into(), 64).unwrap()) }
        };
        for n in 0..MAX_TAKEN as u32 {
            // A record outside the network is not counted.
            taken.add(&subnets(1, n), n);
            taken.add(&subnets(0, n), n);
        }
        assert!(taken.choose(&[], &mut seeded(1)).is_ok());
        taken.add(&subnets(0, 1 << 30), 0);
        assert_eq!(taken.records.len(), MAX_TAKEN);
        let full = taken.choose(&[&subnets(0, 1 << 29)], &mut seeded(1));
        assert!(full.is_err_and(|full| full.to_string().contains("more than 524288")));
    }

    #[test]
    fn a_broken_source_of_numbers_still_gets_a_subnet() {
        let pool = pool(24, "10.3.1.0", "10.3.5.0");
        assert!(choose(&pool, [], &mut || u64::MAX).is_ok() && choose(&pool, [], &mut || 0).is_ok());
    }

    #[test]
    fn a_pool_that_makes_no_sense_is_exhausted() {
        for pool in [pool(24, "10.3.9.0", "10.3.1.0"), pool(24, "10.3.1.0", "fc00::"), pool(60, "10.3.1.0", "10.3.2.0")]
        {
            assert!(choose(&pool, [], &mut seeded(1)).is_err(), "{pool:?}");
        }
    }

    #[test]
    fn compatible_means_length_and_range() {
        let config = NetworkConfig::parse(br#"{"Network":"10.3.0.0/16"}"#, crate::config::Allocation::Pool).unwrap();
        let network = config.networks.v4.clone().unwrap();
        for (subnet, expected) in [
            ("10.3.1.0/24", true),
            ("10.3.255.0/24", true),
            ("10.3.0.0/24", false),
            ("10.3.1.0/25", false),
            ("10.4.1.0/24", false),
        ] {
            assert_eq!(compatible(&network, &subnet.parse().unwrap()), expected, "{subnet}");
        }
        let v4 = Some("10.3.1.0/24".parse().unwrap());
        let v6 = Some("fc00::/64".parse().unwrap());
        assert!(all_compatible(&config, &Dual { v4, v6: None }));
        assert!(!all_compatible(&config, &Dual { v4, v6 }) && !all_compatible(&config, &Dual::default()));
    }

    proptest! {
        #[test]
        fn a_chosen_subnet_overlaps_nothing_and_lies_in_the_pool(
            len in 20u8..=30, span in 0u32..200, start in 0u32..100, seed: u64,
            taken in proptest::collection::vec((0u32..1 << 18, 14u8..=32), 0..60),
        ) {
            let size = 1u32 << (32 - len);
            let base = 0x0a00_0000 + start * size;
            let top = base + span * size;
            let pool = Pool { len, min: IpAddr::V4(base.into()), max: IpAddr::V4(top.into()) };
            let taken: Vec<Prefix> = taken.iter()
                .map(|(addr, len)| Prefix::masked(IpAddr::V4((0x0a00_0000 + addr).into()), *len).unwrap())
                .collect();
            let free = (0..=span)
                .map(|n| Prefix::new(IpAddr::V4((base + n * size).into()), len).unwrap())
                .filter(|subnet| taken.iter().all(|taken| !taken.overlaps(subnet)));
            let free: Vec<_> = free.collect();
            match choose(&pool, taken, &mut seeded(seed)) {
                Ok(subnet) => prop_assert!(free.contains(&subnet)),
                Err(_) => prop_assert!(free.is_empty()),
            }
        }
    }
}
