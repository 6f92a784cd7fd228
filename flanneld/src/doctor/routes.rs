//! Routes through the uplink to a subnet that no node has.
//!
//! Go flannel with host-gw or direct routing never removes routes of nodes that left while it was not running. They
//! cannot be told from foreign routes, so the agent leaves them alone, and a node that later gets such a subnet cannot
//! be reached.

use std::collections::{BTreeMap, BTreeSet};

use flannel_core::backend::Uplink;
use flannel_core::config::NetworkConfig;
use flannel_core::kernel::{LinkId, LinkName, Route, RouteKey, RouteKind};
use flannel_core::net::Prefix;

use super::{Finding, Severity};

/// Checks the routes in the pods' network, `seen` in the kernel. `leased` lists the leased subnets, which takes long on a
/// large cluster; it is awaited only if there is a route to compare with them.
pub(super) async fn judge(
    config: &NetworkConfig,
    uplink: &Uplink,
    seen: &BTreeMap<RouteKey, Route>,
    leased: impl Future<Output = Option<BTreeSet<Prefix>>>,
) -> Vec<Finding> {
    let mut routes: Vec<_> = by_hand(config, |link| (link == LinkId::Uplink).then_some(&uplink.name), seen).collect();
    if !routes.is_empty() {
        let Some(leased) = leased.await else {
            let found = "the lease store did not list the leases in time, so routes through the uplink are not checked";
            return vec![Finding::new("routes", Severity::Note, found, "run doctor again")];
        };
        routes.retain(|(prefix, _)| !leased.contains(prefix));
    }
    if routes.is_empty() {
        return vec![Finding::ok("routes", "no route through the uplink leads to a subnet that no node has")];
    }
    let finding = |(_, way): (_, String)| {
        let found = format!(
            "{way} leads to a subnet that no node has; Go flannel leaves such routes, and a later node with it is unreachable"
        );
        let fix = format!("unless another program needs it: ip route delete {way}");
        Finding::new("routes", Severity::Warning, found, fix)
    };
    routes.into_iter().map(finding).collect()
}

/// Returns the routes to a subnet of a node that no routing daemon made, as Go flannel's, each as `ip route delete` takes
/// it, through links that have a `name`.
pub(crate) fn by_hand<'a>(
    config: &'a NetworkConfig,
    name: impl Fn(LinkId) -> Option<&'a LinkName> + 'a,
    seen: &'a BTreeMap<RouteKey, Route>,
) -> impl Iterator<Item = (Prefix, String)> + 'a {
    let is_subnet = |prefix: &Prefix| {
        let network = config.networks.get(prefix.family()).filter(|network| network.prefix != *prefix);
        // In Kubernetes there is no pool: the cluster decides how long subnets are.
        network.is_some_and(|network| network.pool.as_ref().is_none_or(|pool| prefix.len() == pool.len))
    };
    seen.iter().filter_map(move |(RouteKey { prefix, .. }, route)| {
        let by_hand = route.kind == RouteKind::Unicast && route.protocol == Route::BOOT;
        let gateway = route.gateway.filter(|_| by_hand)?;
        let device = name(route.link?)?;
        is_subnet(prefix).then(|| (*prefix, format!("{prefix} via {gateway} dev {device}")))
    })
}

#[cfg(test)]
mod tests {
    use flannel_core::config::Allocation;
    use flannel_core::net::{Dual, Mtu};

    use super::*;

    #[tokio::test]
    async fn only_routes_through_the_uplink_to_subnets_without_a_lease_are_reported() {
        let text = br#"{"Network":"10.5.0.0/16","Backend":{"Type":"host-gw"}}"#;
        let config = NetworkConfig::parse(text, Allocation::Pool).unwrap();
        let route = |prefix: &str, link, protocol| {
            let gateway = "192.168.0.9".parse().unwrap();
            let prefix = prefix.parse().unwrap();
            let mut route = Route::direct(prefix, gateway, link);
            route.protocol = protocol;
            (RouteKey { prefix, nth: 0 }, route)
        };
        let mut seen = BTreeMap::from([
            route("10.5.1.0/24", LinkId::Uplink, Route::BOOT),
            route("10.5.2.0/24", LinkId::Uplink, Route::BOOT),
            route("10.5.3.0/24", LinkId::Other(7), Route::BOOT),
            route("10.5.4.0/25", LinkId::Uplink, Route::BOOT),
            route("10.5.5.0/24", LinkId::Uplink, Route::FIRST_PROTOCOL),
        ]);
        let uplink = Uplink::new(2, LinkName::new("eth0").unwrap(), Mtu(1500), Dual::default());
        let leased = BTreeSet::from(["10.5.2.0/24".parse().unwrap()]);
        let fixes = async |seen: &BTreeMap<RouteKey, Route>| {
            let findings = judge(&config, &uplink, seen, async { Some(leased.clone()) }).await;
            findings.into_iter().filter_map(|finding| finding.fix).collect::<Vec<_>>()
        };
        let wanted = "unless another program needs it: ip route delete 10.5.1.0/24 via 192.168.0.9 dev eth0";
        assert_eq!(fixes(&seen).await, [wanted]);
        let unlisted = judge(&config, &uplink, &seen, std::future::ready(None)).await;
        assert!(matches!(&unlisted[..], [note] if note.severity == Severity::Note), "{unlisted:?}");
        // In Kubernetes subnets have any length.
        let any_length = NetworkConfig::parse(text, Allocation::External).unwrap();
        let findings = judge(&any_length, &uplink, &seen, async { Some(leased.clone()) }).await;
        assert_eq!(findings.len(), 2, "{findings:?}");
        seen.pop_first();
        assert!(fixes(&seen).await.is_empty());
        seen.pop_first();
        let unread = judge(&config, &uplink, &seen, std::future::pending()).await;
        assert!(unread.iter().all(|finding| finding.severity == Severity::Ok), "{unread:?}");
    }
}
