//! What a node asks the store for, and which leases are its own.

use std::collections::BTreeSet;

use crate::lease::{Lease, LeaseAttrs, LeaseKey};
use crate::net::{Dual, Prefix};

/// What a node asks the store for.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Want {
    /// What to publish.
    pub attrs: LeaseAttrs,
    /// The subnets to have if they are free: those of the last run.
    pub preferred: Dual<Prefix>,
    /// Which leases under the node's identity are its own.
    pub own: OwnLeases,
    /// Leases under the node's identity that are other nodes', whatever they publish. Two nodes under one address may
    /// publish the same: with host-gw there is nothing else in a lease, and a VXLAN MAC address may be derived from the
    /// address. The lease that [`OwnLeases::Key`] names is an own one all the same.
    pub foreign: BTreeSet<LeaseKey>,
}

/// Which of the leases that a store finds under a node's identity are the node's own.
///
/// A store that knows nodes by their name need not look at this: a name is one node's. Where nodes are known by the
/// address they publish (etcd), several may publish the same one, as a virtual address that has moved. A lease without end
/// that names an address and nothing else is an operator's reservation for whoever has the address, and always an own one.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OwnLeases {
    /// All but [`Want::foreign`], as Go flannel sees it. Only those with the wanted backend data are ever deleted.
    #[default]
    Every,
    /// The one with this key, and those that already publish exactly [`Want::attrs`] and are not [`Want::foreign`]: an
    /// earlier call wrote them, and its answer was lost. Any other is another node's: it is not taken, rewritten or
    /// deleted, and its subnets are in use.
    Key(LeaseKey),
    /// Only those that already publish exactly [`Want::attrs`] and are not [`Want::foreign`]. Any other is another
    /// node's, as with [`Key`](Self::Key).
    Unheld,
}

impl Want {
    /// Asks for any free subnets, and takes every lease under the node's identity for its own.
    pub fn new(attrs: LeaseAttrs) -> Self {
        Self { attrs, preferred: Dual::default(), own: OwnLeases::default(), foreign: BTreeSet::new() }
    }

    /// The same, with these subnets if they are free.
    #[must_use]
    pub fn preferring(self, preferred: Dual<Prefix>) -> Self {
        Self { preferred, ..self }
    }

    /// The same, where these leases are the node's own.
    #[must_use]
    pub fn owning(self, own: OwnLeases) -> Self {
        Self { own, ..self }
    }

    /// The same, where these leases are other nodes' ([`foreign`](Self::foreign)).
    #[must_use]
    pub fn leaving_alone(self, foreign: BTreeSet<LeaseKey>) -> Self {
        Self { foreign, ..self }
    }

    /// Whether `lease`, which is under the node's identity, is its own: for implementations of stores.
    pub fn is_own(&self, lease: &Lease) -> bool {
        let is_written = lease.attrs == self.attrs;
        let may_be = !self.foreign.contains(&lease.key);
        match &self.own {
            OwnLeases::Every => may_be,
            OwnLeases::Key(key) => lease.key == *key || (may_be && is_written),
            OwnLeases::Unheld => may_be && is_written,
        }
    }

    /// Whether a lease of its own that the node does not take again is to be deleted: for implementations of stores.
    ///
    /// Where every lease under an address counts as the node's own, one may be that of a node which had the address before.
    /// What a backend publishes beside the address is of one device.
    pub fn gives_up(&self, lease: &Lease) -> bool {
        let is_of_device = match self.own {
            OwnLeases::Every => lease.attrs.backend_data == self.attrs.backend_data,
            OwnLeases::Key(_) | OwnLeases::Unheld => true,
        };
        is_of_device && self.is_own(lease)
    }

    /// The place of the lease to take again among those that are the node's own and `fit`: the one that is named, else the
    /// one of the preferred subnets, else one with the wanted backend data, else the first, as Go flannel does. For
    /// implementations of stores.
    pub fn kept<L: AsRef<Lease>>(&self, own: &[L], fits: impl Fn(&Lease) -> bool) -> Option<usize> {
        let rank = |lease: &Lease| match &self.own {
            OwnLeases::Key(key) if *key == lease.key => 0,
            _ if lease.subnets == self.preferred => 1,
            _ if lease.attrs.backend_data == self.attrs.backend_data => 2,
            _ => 3,
        };
        let mut places: Vec<usize> = (0..own.len()).collect();
        // Stable: among equals the first. Whether one fits may be dear to tell, and is asked last.
        places.sort_by_key(|place| rank(own[*place].as_ref()));
        places.into_iter().find(|place| fits(own[*place].as_ref()))
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;
    use std::sync::Arc;

    use super::*;
    use crate::lease::Json;

    fn lease(key: &str) -> Lease {
        Lease::new(LeaseKey::new(key), Dual::default(), LeaseAttrs::default())
    }

    #[test]
    fn the_lease_to_keep_is_found_with_one_look_at_whether_each_fits() {
        let subnet = |text: &str| Dual { v4: text.parse().ok(), v6: None };
        let mut own = ["first", "data", "preferred", "named"].map(lease);
        own[1].attrs.backend_data.v4 = Some(Json::object(&[]));
        own[2].subnets = subnet("10.5.1.0/24");
        for other in [0, 2, 3] {
            own[other].attrs.backend_type = "other".into();
        }
        let want = Want::new(own[1].attrs.clone()).preferring(own[2].subnets);
        let want = want.owning(OwnLeases::Key(own[3].key.clone()));
        let own = own.map(Arc::new);
        let order = ["named", "preferred", "data", "first"];
        for nth in 0..=order.len() {
            let looked_at = RefCell::new(Vec::new());
            let fits = |lease: &Lease| {
                looked_at.borrow_mut().push(lease.key.to_string());
                order[nth..].contains(&lease.key.as_str())
            };
            let kept = want.kept(&own, fits).map(|place| own[place].key.as_str());
            assert_eq!(kept, order.get(nth).copied());
            assert_eq!(looked_at.into_inner(), order[..order.len().min(nth + 1)]);
        }
    }
}
