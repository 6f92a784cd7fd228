//! The names of kernel objects' attributes, so that a test suite that covers all of them fails to compile when one is
//! added.

use crate::kernel::{Link, Route, Vxlan};

/// The attributes of a [`Link`].
pub const LINK: [&str; 7] = ["name", "kind", "mac", "mtu", "up", "group", "alias"];
const _: fn(&Link) = |Link { name: _, kind: _, mac: _, mtu: _, up: _, group: _, alias: _ }| {};

/// The attributes of a [`Vxlan`].
pub const VXLAN: [&str; 8] = ["vni", "port", "local", "lower", "learning", "gbp", "remote", "misses"];
const _: fn(&Vxlan) = |Vxlan { vni: _, port: _, local: _, lower: _, learning: _, gbp: _, remote: _, misses: _ }| {};

/// The attributes of a [`Route`].
pub const ROUTE: [&str; 7] = ["kind", "gateway", "link", "onlink", "protocol", "slot", "source"];
// Slot and source are in `extra`.
const _: fn(Route) = |Route { kind: _, gateway: _, link: _, onlink: _, protocol: _, extra: _ }| {};
