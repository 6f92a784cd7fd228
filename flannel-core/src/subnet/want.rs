//! A node's request for a lease, and which leases are its own.

use std::collections::BTreeSet;

use crate::lease::{Lease, LeaseAttrs, LeaseKey};
use crate::net::{Dual, Prefix};

/// A node's request for a lease.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Want {
    /// The attributes to publish.
    pub attrs: LeaseAttrs,
    /// The subnets to use if they are free: those of the last run.
    pub preferred: Dual<Prefix>,
    /// Which leases under the node's identity are its own.
    pub own: OwnLeases,
    /// Leases under the node's identity that belong to other nodes, whatever they publish. Two nodes with one address
    /// may publish equal attributes: with host-gw a lease contains nothing else, and a VXLAN MAC address may be derived
    /// from the address. The lease named by [`OwnLeases::Key`] counts as the node's own even if it is listed here.
    pub foreign: BTreeSet<LeaseKey>,
}

/// Which of the leases under a node's identity are the node's own.
///
/// A store that identifies nodes by name can ignore this: a name belongs to one node. If nodes are identified by
/// published address (etcd), several may publish the same one, for example a virtual address that has moved. A lease
/// without expiry that names only addresses is an operator's reservation for the node that has the address, and always
/// counts as the node's own.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum OwnLeases {
    /// All except [`Want::foreign`], like Go flannel. Only those with the wanted backend data are ever deleted.
    #[default]
    Every,
    /// The lease with this key, and leases that already publish exactly [`Want::attrs`] and are not [`Want::foreign`]:
    /// an earlier call wrote them and its answer was lost. Any other lease belongs to another node: it is not taken,
    /// rewritten or deleted, and its subnets are in use.
    Key(LeaseKey),
    /// Only leases that already publish exactly [`Want::attrs`] and are not [`Want::foreign`]. Any other lease belongs
    /// to another node, as with [`Key`](Self::Key).
    Unheld,
}

impl Want {
    /// Requests any free subnets, and treats every lease under the node's identity as its own.
    pub fn new(attrs: LeaseAttrs) -> Self {
        Self { attrs, preferred: Dual::default(), own: OwnLeases::default(), foreign: BTreeSet::new() }
    }

    /// Sets the subnets to use if they are free.
    #[must_use]
    pub fn preferring(self, preferred: Dual<Prefix>) -> Self {
        Self { preferred, ..self }
    }

    /// Sets which leases are the node's own.
    #[must_use]
    pub fn owning(self, own: OwnLeases) -> Self {
        Self { own, ..self }
    }

    /// Sets which leases belong to other nodes ([`foreign`](Self::foreign)).
    #[must_use]
    pub fn leaving_alone(self, foreign: BTreeSet<LeaseKey>) -> Self {
        Self { foreign, ..self }
    }

    /// Returns whether `lease`, which is under the node's identity, is the node's own. For lease store implementations.
    pub fn is_own(&self, lease: &Lease) -> bool {
        let is_written = lease.attrs == self.attrs;
        let may_be = !self.foreign.contains(&lease.key);
        match &self.own {
            OwnLeases::Every => may_be,
            OwnLeases::Key(key) => lease.key == *key || (may_be && is_written),
            OwnLeases::Unheld => may_be && is_written,
        }
    }

    /// Returns whether the store should delete `lease`, if it is the node's own and the node does not take it again.
    /// For lease store implementations.
    ///
    /// If every lease under an address counts as the node's own, one may belong to a node that had the address before.
    /// The backend data identifies the device, and so the node.
    pub fn gives_up(&self, lease: &Lease) -> bool {
        let is_of_device = match self.own {
            OwnLeases::Every => lease.attrs.backend_data == self.attrs.backend_data,
            OwnLeases::Key(_) | OwnLeases::Unheld => true,
        };
        is_of_device && self.is_own(lease)
    }

    /// Returns the index of the lease to take again among the node's own leases that satisfy `fits`: the named one,
    /// else the one with the preferred subnets, else one with the wanted backend data, else the first, as Go flannel
    /// does. For lease store implementations.
    pub fn kept<L: AsRef<Lease>>(&self, own: &[L], fits: impl Fn(&Lease) -> bool) -> Option<usize> {
        let rank = |lease: &Lease| match &self.own {
            OwnLeases::Key(key) if *key == lease.key => 0,
            _ if lease.subnets == self.preferred => 1,
            _ if lease.attrs.backend_data == self.attrs.backend_data => 2,
            _ => 3,
        };
        let mut places: Vec<usize> = (0..own.len()).collect();
        // The sort is stable, so the first of equals wins. `fits` may be expensive, so it is called last.
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
