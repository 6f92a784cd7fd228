//! Checks of private parsers, for fuzz targets and property tests. Each panics if a property fails.

use flannel_core::firewall::{Masquerade, Rules, SourcePorts, VxlanGuard};
use flannel_core::kernel::OverlayName;
use flannel_core::net::{Dual, Prefix};

use crate::wanted::{CHAINS, Table, tables};
use crate::wire::{compare, lists};

/// Checks that the JSON of `nft list table` and `nft list tables` is read or refused, and each chain and set is
/// reported at most once.
pub fn listing(text: &str) {
    for table in wanted().iter().filter_map(|tables| tables.v4.as_ref()) {
        let listed = lists(text, table.family, &table.name);
        match compare(text, table) {
            Ok(drift) => {
                assert!(drift.len() <= CHAINS.len() + 1 && listed.is_ok());
                assert!(
                    drift.iter().enumerate().all(|(n, one)| drift[..n].iter().all(|other| other.place != one.place))
                );
            }
            // The error contains the position in the JSON, but not its contents.
            Err(error) => assert!(error.len() < 256 && listed.is_err(), "{error}"),
        }
    }
}

/// Returns tables without rules, with some, and with all of them.
fn wanted() -> [Dual<Table>; 3] {
    let networks: Dual<Prefix> = Dual { v4: "10.42.0.0/16".parse().ok(), v6: None };
    let subnets: Dual<Prefix> = Dual { v4: "10.42.7.0/24".parse().ok(), v6: None };
    let plain = Rules::new(OverlayName::default(), &networks, &subnets);
    let masquerade = plain.clone().masquerading(Masquerade::default());
    let peers = ["192.0.2.1", "192.0.2.2"].iter().filter_map(|addr| addr.parse().ok()).collect();
    let guarded = masquerade.clone().guarded(VxlanGuard { port: 8472, peers });
    [plain, masquerade, guarded].map(|rules| tables(&rules, SourcePorts::FullyRandom))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const OBJECT: &str = r#"\{"(table|chain|set|rule|x)":(\{("(name|chain|family|expr|elem|prio)":("(ip|forward|peers|\PC{0,5})"|\[[0-9,]{0,3}\]|7),?){0,4}\}|null|7)\}"#;

    proptest! {
        #[test]
        fn any_listing_is_read_or_refused(objects in proptest::collection::vec(OBJECT, 0..6), text in "\\PC{0,40}") {
            listing(&format!("{{\"nftables\":[{}]}}", objects.join(",")));
            listing(&text);
        }
    }
}
