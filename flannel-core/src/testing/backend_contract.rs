//! Checks a [`Backend`]: the requirements on every data plane that the agent runs.
//!
//! Write a [`Harness`] for your backend, or use [`Made`], and call [`all`] in a test, or call each check in its own
//! test. A failed check panics with the method, the rule that it broke, and the cause. The checks run in memory only:
//! the kernel is a [`FakeKernel`](crate::testing::FakeKernel).
//!
//! The network is that of [`samples`](crate::testing::samples). Peers are on the uplink of the checked node, on another
//! of its links, and behind a router. Peers publish what the same backend advertises on their hosts. Devices that
//! another program creates ([`LinkKind::External`](crate::kernel::LinkKind::External)) exist and are marked.
//!
//! ```
//! use flannel_core::backend::alloc::Alloc;
//! use flannel_core::testing::backend_contract::{self, Made};
//!
//! backend_contract::all(&Made::new(r#"{"Type":"alloc"}"#, |_| Ok(Alloc)));
//! ```
#![expect(clippy::panic, reason = "test support: a check fails as an assertion does")]

mod hostile;
mod inside;
mod kernel;
mod peers;
mod publishing;
#[cfg(test)]
mod tests;
mod world;

use crate::backend::{Backend, BackendError};
use crate::config::NetworkConfig;
use crate::kernel::RouteSlot;

pub use crate::testing::store_contract::Families;
pub use hostile::{no_host_or_lease_of_ones_own_makes_it_panic, no_peers_data_makes_it_panic};
pub use inside::everything_wanted_is_inside_the_scope;
pub use kernel::{one_round_converges_and_removal_leaves_nothing, the_order_of_peers_makes_no_difference};
pub use peers::{
    a_family_that_one_side_lacks_is_skipped, a_peer_that_leaves_takes_its_objects_alone,
    base_and_peer_are_functions_of_what_they_are_given, devices_stay_what_they_are, no_two_want_one_object,
};
pub use publishing::{
    a_public_address_is_published_or_refused, mac_addresses_are_of_one_node_alone,
    names_agree_with_configuration_and_lease, what_is_published_is_read_back, writes_says_whether_anything_is_wanted,
};

/// A backend under test.
pub trait Harness {
    /// Returns the `Backend` object of the network's configuration, as JSON, with the `Type`.
    fn settings(&self) -> &str;

    /// Returns a new instance for node `node`. Node 1 is the one whose kernel is checked.
    fn backend(&self, config: &NetworkConfig, node: u8) -> Box<dyn Backend>;

    /// Returns the slots for [`Builder::route_slots`](crate::overlay::Builder::route_slots). Default: none.
    fn slots(&self) -> Vec<RouteSlot> {
        Vec::new()
    }

    /// Returns the combinations of families that the backend supports. Default: all.
    fn families(&self) -> &[Families] {
        &Families::ALL
    }
}

/// A backend that is created from the configuration alone, like those passed to
/// [`Builder::backend`](crate::overlay::Builder::backend).
#[derive(Debug, Clone, Copy)]
pub struct Made<F> {
    settings: &'static str,
    slots: &'static [RouteSlot],
    make: F,
}

impl<F, B> Made<F>
where
    F: Fn(&NetworkConfig) -> Result<B, BackendError>,
    B: Backend,
{
    /// Creates the harness from a `Backend` object and a constructor of the backend.
    pub fn new(settings: &'static str, make: F) -> Self {
        Self { settings, slots: &[], make }
    }

    /// Sets further slots for the backend's routes.
    pub fn with_slots(self, slots: &'static [RouteSlot]) -> Self {
        Self { slots, ..self }
    }
}

impl<F, B> Harness for Made<F>
where
    F: Fn(&NetworkConfig) -> Result<B, BackendError>,
    B: Backend,
{
    fn settings(&self) -> &str {
        self.settings
    }

    fn slots(&self) -> Vec<RouteSlot> {
        self.slots.to_vec()
    }

    fn backend(&self, config: &NetworkConfig, _: u8) -> Box<dyn Backend> {
        match (self.make)(config) {
            Ok(backend) => Box::new(backend),
            Err(error) => panic!("new: refuses the settings of the harness: {error}"),
        }
    }
}

/// Runs every check, for networks of each combination of families that the harness lists.
pub fn all(harness: &dyn Harness) {
    for families in harness.families() {
        names_agree_with_configuration_and_lease(harness, *families);
        what_is_published_is_read_back(harness, *families);
        a_public_address_is_published_or_refused(harness, *families);
        mac_addresses_are_of_one_node_alone(harness, *families);
        writes_says_whether_anything_is_wanted(harness, *families);
        base_and_peer_are_functions_of_what_they_are_given(harness, *families);
        devices_stay_what_they_are(harness, *families);
        everything_wanted_is_inside_the_scope(harness, *families);
        a_family_that_one_side_lacks_is_skipped(harness, *families);
        no_two_want_one_object(harness, *families);
        a_peer_that_leaves_takes_its_objects_alone(harness, *families);
        no_peers_data_makes_it_panic(harness, *families);
        no_host_or_lease_of_ones_own_makes_it_panic(harness, *families);
        the_order_of_peers_makes_no_difference(harness, *families);
        one_round_converges_and_removal_leaves_nothing(harness, *families);
    }
}
