//! Tests of the uplink's selection.

use super::*;
use crate::kernel::{HostRoute, Link, LinkKind};
use crate::testing::samples::dual;

const V4: &[Family] = &[Family::V4];

/// lo, eth0 (uplink by default route), eth1; eth0 and eth1 have both families.
fn facts() -> HostFacts {
    let mut facts = HostFacts::default();
    for (index, name) in [(1, "lo"), (2, "eth0"), (3, "eth1")] {
        let link = Link::new(LinkName::new(name).unwrap(), LinkKind::Other("".into()), 1500);
        facts.links.insert(index, link.into());
    }
    for (link, addr) in [
        (1, "127.0.0.1"),
        (2, "fe80::2"),
        (2, "192.0.2.2"),
        (2, "2001:db8::2"),
        (3, "198.51.100.3"),
        (3, "2001:db8:1::3"),
    ] {
        facts.addresses.push(address(link, addr));
    }
    facts.defaults = vec![default_route("0.0.0.0/0", Some(2)), default_route("::/0", Some(2))];
    facts
}

fn address(link: u32, addr: &str) -> HostAddress {
    HostAddress::new(link, addr.parse().unwrap(), 24)
}

fn default_route(prefix: &str, link: Option<u32>) -> HostRoute {
    HostRoute::new(prefix.parse().unwrap(), link, None)
}

fn ip(addr: &str) -> Select {
    Select::Ip(addr.parse().unwrap())
}

fn none() -> Dual<IpAddr> {
    Dual::default()
}

/// For a node that uses nothing yet.
fn select(
    wanted: &Select,
    facts: &HostFacts,
    families: &[Family],
    public: &Dual<IpAddr>,
) -> Result<Choice, UplinkError> {
    super::select(Request { wanted, families, public }, facts, InUse::NOTHING)
}

/// For a node that uses the interface and addresses of `choice`.
fn again(wanted: &Select, facts: &HostFacts, choice: &Choice) -> Result<Choice, UplinkError> {
    beside(wanted, facts, choice, &[])
}

/// The same, with `others` published by other nodes.
fn beside(wanted: &Select, facts: &HostFacts, choice: &Choice, others: &[&str]) -> Result<Choice, UplinkError> {
    let others = others.iter().map(|addr| addr.parse().unwrap()).collect();
    let in_use = InUse { link: Some(choice.uplink.index), addrs: choice.uplink.addrs, others: &others };
    let families: Vec<Family> = choice.uplink.addrs.families().collect();
    super::select(Request { wanted, families: &families, public: &none() }, facts, in_use)
}

#[track_caller]
fn problem(wanted: &Select, facts: &HostFacts, families: &[Family], public: &Dual<IpAddr>) -> Problem {
    let error = select(wanted, facts, families, public).unwrap_err();
    let text = error.to_string();
    for link in facts.links.values() {
        assert!(text.contains(link.name.as_str()), "{text}");
    }
    error.problem
}

#[test]
fn the_default_route_gives_interface_and_addresses_of_both_families() {
    let choice = select(&Select::DefaultRoute, &facts(), &Family::BOTH, &none()).unwrap();
    assert_eq!((choice.uplink.index, choice.uplink.name.as_str(), choice.uplink.mtu), (2, "eth0", Mtu(1500)));
    assert_eq!(choice.uplink.addrs, dual("192.0.2.2", "2001:db8::2"));
    assert_eq!(choice.public, choice.uplink.addrs);
    assert_eq!(
        choice.rationale.to_string(),
        "selected eth0 [192.0.2.2, 2001:db8::2, fe80::2] (the interface of the default route); \
         not selected lo [] (no default route uses it); \
         not selected eth1 [198.51.100.3, 2001:db8:1::3] (no default route uses it)"
    );
}

#[test]
fn a_default_route_that_does_not_decide_is_an_error() {
    let mut split = facts();
    split.defaults[1].link = Some(3);
    let found = problem(&Select::DefaultRoute, &split, &Family::BOTH, &none());
    assert_eq!(found, Problem::Split { v4: "eth0".into(), v6: "eth1".into() });
    assert!(select(&Select::DefaultRoute, &split, V4, &none()).is_ok());
    split.defaults[0].link = None;
    assert_eq!(problem(&Select::DefaultRoute, &split, V4, &none()), Problem::Multipath(Family::V4));
    split.defaults.clear();
    assert_eq!(problem(&Select::DefaultRoute, &split, V4, &none()), Problem::NoDefaultRoute(Family::V4));
}

#[test]
fn a_name_is_exact() {
    let named = |name: &str| Select::Name(LinkName::new(name).unwrap());
    assert_eq!(select(&named("eth1"), &facts(), V4, &none()).unwrap().uplink.index, 3);
    assert_eq!(problem(&named("eth"), &facts(), V4, &none()), Problem::NoSuchInterface);
}

#[test]
fn an_address_selects_its_interface_and_is_the_local_address() {
    let mut facts = facts();
    facts.addresses.push(address(3, "198.51.100.33"));
    let choice = select(&ip("198.51.100.33"), &facts, &Family::BOTH, &none()).unwrap();
    assert_eq!(choice.uplink.addrs, dual("198.51.100.33", "2001:db8:1::3"));
    assert_eq!(problem(&ip("203.0.113.1"), &facts, V4, &none()), Problem::NoSuchInterface);
    let elsewhere = problem(&ip("198.51.100.3"), &facts, &Family::BOTH, &dual("", "2001:db8::2"));
    assert!(matches!(elsewhere, Problem::OtherFamilyElsewhere { .. }), "{elsewhere}");
}

#[test]
fn a_public_address_overrides_what_is_advertised_only() {
    let public = dual("203.0.113.7", "");
    let choice = select(&Select::DefaultRoute, &facts(), &Family::BOTH, &public).unwrap();
    assert_eq!(choice.uplink.addrs, dual("192.0.2.2", "2001:db8::2"));
    assert_eq!(choice.public, dual("203.0.113.7", "2001:db8::2"));
    assert_eq!(Select::implied_by(&public), ip("203.0.113.7"));
    assert_eq!(Select::implied_by(&none()), Select::DefaultRoute);
}

#[test]
fn local_addresses_are_ordered_and_filtered() {
    let mut facts = facts();
    let temporary = HostAddress { temporary: true, ..address(2, "2001:db8::a") };
    let dynamic = HostAddress { permanent: false, ..address(2, "2001:db8::b") };
    let deprecated = HostAddress { deprecated: true, ..address(2, "2001:db8::c") };
    facts.addresses.splice(0..0, [deprecated, dynamic, temporary]);
    let texts: Vec<_> = usable_addresses(&facts, 2).iter().map(|addr| addr.to_string()).collect();
    assert_eq!(texts, ["192.0.2.2", "2001:db8::2", "2001:db8::a", "2001:db8::b", "fe80::2"]);
}

#[test]
fn a_virtual_address_is_not_the_first_choice() {
    let mut facts = facts();
    facts.addresses.clear();
    let dynamic = |addr| HostAddress { permanent: false, ..address(2, addr) };
    facts.addresses.extend([dynamic("192.0.2.2"), address(2, "192.0.2.250")]);
    // IPv6 lists the newest first.
    facts.addresses.extend([address(2, "2001:db8::fa"), address(2, "2001:db8::2")]);
    let chosen = |facts: &HostFacts| select(&Select::DefaultRoute, facts, &Family::BOTH, &none()).unwrap().public;
    assert_eq!(chosen(&facts), dual("192.0.2.2", "2001:db8::2"));
    let virtual4 = HostAddress { len: 32, ..address(2, "192.0.2.251") };
    let virtual6 = HostAddress { len: 128, ..address(2, "2001:db8::fb") };
    facts.addresses.insert(0, virtual4);
    facts.addresses.push(virtual6);
    assert_eq!(chosen(&facts), dual("192.0.2.2", "2001:db8::2"));
    facts.addresses.retain(|address| address.len != 24);
    assert_eq!(chosen(&facts), dual("192.0.2.251", "2001:db8::fb"), "better than none");
}

#[test]
fn an_interface_that_cannot_carry_the_overlay_says_why() {
    let mut facts = facts();
    facts.addresses.retain(|address| address.addr.is_ipv6());
    assert!(matches!(problem(&Select::DefaultRoute, &facts, V4, &none()), Problem::NoAddress { .. }));
    facts.addresses.retain(|address| is_link_local(address.addr));
    let v6 = [Family::V6];
    assert!(matches!(problem(&Select::DefaultRoute, &facts, &v6, &none()), Problem::NotPublic { .. }));
    assert!(select(&Select::DefaultRoute, &facts, &v6, &dual("", "2001:db8::9")).is_ok());
    let wrong = Dual { v4: None, v6: "192.0.2.9".parse().ok() };
    assert!(matches!(problem(&Select::DefaultRoute, &facts, &v6, &wrong), Problem::WrongFamily { .. }));
    facts.links.get_mut(&2).unwrap().mtu = 0;
    assert!(matches!(problem(&Select::DefaultRoute, &facts, &v6, &none()), Problem::NoMtu(_)));
}

fn regex(text: &str) -> Select {
    Select::Regex(Pattern::new(text).unwrap())
}

#[test]
fn a_regex_matches_addresses_of_all_families_first_and_names_after() {
    let choice = select(&regex("^198"), &facts(), V4, &none()).unwrap();
    assert_eq!((choice.uplink.index, choice.uplink.addrs), (3, dual("198.51.100.3", "")));
    let both = select(&regex("^198|2001:db8"), &facts(), &Family::BOTH, &none()).unwrap();
    assert_eq!((both.uplink.index, both.uplink.addrs), (3, dual("198.51.100.3", "2001:db8:1::3")));
    assert_eq!(select(&regex("h1"), &facts(), V4, &none()).unwrap().uplink.name.as_str(), "eth1");
    assert_eq!(problem(&regex("^th"), &facts(), V4, &none()), Problem::NoSuchInterface);
    let error = Pattern::new("eth(").unwrap_err().to_string();
    assert!(error.contains("\"eth(\"") && error.contains("unclosed group"), "{error}");
}

#[test]
fn reachability_goes_by_the_longest_prefix_then_the_lowest_metric() {
    let to = |addr: &str| Select::CanReach(addr.parse().unwrap());
    let mut facts = facts();
    let route = |prefix: &str, link, metric| HostRoute { metric, ..default_route(prefix, Some(link)) };
    facts.on_link.insert(route("198.51.100.0/24", 3, 0));
    facts.far.extend([route("10.0.0.0/8", 2, 0), route("10.7.0.0/16", 2, 50), route("10.7.0.0/16", 3, 10)]);
    let chosen = |addr: &str, facts: &HostFacts| select(&to(addr), facts, V4, &none()).unwrap().uplink.index;
    assert_eq!((chosen("10.7.1.1", &facts), chosen("10.8.1.1", &facts), chosen("8.8.8.8", &facts)), (3, 2, 2));
    facts.addresses.insert(0, HostAddress { len: 16, ..address(3, "172.16.0.3") });
    let near = select(&to("198.51.100.77"), &facts, V4, &none()).unwrap();
    assert_eq!(near.uplink.addrs, dual("198.51.100.3", ""));
    facts.defaults.clear();
    assert_eq!(problem(&to("8.8.8.8"), &facts, V4, &none()), Problem::Unreachable("8.8.8.8".parse().unwrap()));
}

#[test]
fn of_several_selections_the_first_usable_one_counts_and_the_others_are_told() {
    let list = |choices: &[Select]| Select::FirstOf(choices.to_vec());
    let wanted = list(&[ip("203.0.113.1"), regex("^nothing"), regex("eth1"), Select::DefaultRoute]);
    let choice = select(&wanted, &facts(), V4, &none()).unwrap();
    assert_eq!((choice.uplink.index, choice.rationale.passed_over.len()), (3, 2));
    let text = choice.rationale.to_string();
    assert!(text.contains("the interface with address 203.0.113.1 was tried before"), "{text}");
    let none_fits = list(&[ip("203.0.113.1"), regex("^nothing")]);
    let error = select(&none_fits, &facts(), V4, &none()).unwrap_err();
    assert_eq!((error.problem, error.rationale.passed_over.len()), (Problem::NoSuchInterface, 1));
    assert_eq!(problem(&list(&[]), &HostFacts::default(), V4, &none()), Problem::NothingAsked);
}

#[test]
fn an_address_that_comes_up_beside_the_one_in_use_changes_nothing() {
    let selections = [Select::DefaultRoute, regex("^eth0$"), regex("192|2001"), Select::FirstOf(vec![regex("eth0")])];
    for wanted in selections {
        let mut facts = facts();
        for address in &mut facts.addresses {
            address.permanent = false;
        }
        let before = select(&wanted, &facts, &Family::BOTH, &none()).unwrap();
        facts.addresses.splice(0..0, [address(2, "192.0.2.250"), address(2, "2001:db8::fa")]);
        // As when a host restarts its network: the interface in use comes last.
        facts.addresses.reverse();
        assert_eq!(again(&wanted, &facts, &before).unwrap().public, before.public, "{wanted}");
        facts.addresses.retain(|address| !before.public.iter().any(|(_, addr)| *addr == address.addr));
        assert_eq!(again(&wanted, &facts, &before).unwrap().public, dual("192.0.2.250", "2001:db8::fa"), "{wanted}");
    }
}

#[test]
fn an_interface_in_use_is_kept_as_long_as_the_request_allows_it() {
    let mut facts = facts();
    let before = select(&Select::DefaultRoute, &facts, V4, &none()).unwrap();
    facts.defaults.insert(0, default_route("0.0.0.0/0", Some(3)));
    assert_eq!(select(&Select::DefaultRoute, &facts, V4, &none()).unwrap().uplink.index, 3);
    assert_eq!(again(&Select::DefaultRoute, &facts, &before).unwrap().uplink, before.uplink);
    facts.defaults.retain(|route| route.link == Some(3));
    assert_eq!(again(&Select::DefaultRoute, &facts, &before).unwrap().uplink.index, 3);
    let list = Select::FirstOf(vec![regex("eth1"), regex("eth0")]);
    assert_eq!(select(&list, &facts, V4, &none()).unwrap().uplink.index, 3);
    assert_eq!(again(&list, &facts, &before).unwrap().uplink, before.uplink);
}

#[test]
fn an_address_that_another_node_publishes_is_not_taken_into_use() {
    let mut facts = facts();
    let wanted = Select::DefaultRoute;
    let before = select(&wanted, &facts, V4, &none()).unwrap();
    facts.addresses.retain(|address| address.addr != before.public.v4.unwrap());
    facts.addresses.extend([address(2, "192.0.2.250"), address(2, "192.0.2.7")]);
    assert_eq!(beside(&wanted, &facts, &before, &["192.0.2.250"]).unwrap().public, dual("192.0.2.7", ""));
    let error = beside(&wanted, &facts, &before, &["192.0.2.250", "192.0.2.7"]).unwrap_err();
    assert!(matches!(error.problem, Problem::PublishedByOther { .. }), "{error}");
    facts.addresses.push(address(2, "192.0.2.2"));
    assert_eq!(beside(&wanted, &facts, &before, &["192.0.2.2"]).unwrap().public, before.public, "it is in use");
}

#[test]
fn of_many_interfaces_the_first_are_explained() {
    let mut facts = facts();
    let link = facts.links[&3].clone();
    facts.links.extend((10..10 + HostFacts::MOST_LINKS as u32).map(|index| (index, link.clone())));
    let rationale = select(&Select::DefaultRoute, &facts, V4, &none()).unwrap().rationale;
    assert_eq!(rationale.candidates.len(), Rationale::MOST);
    assert!(rationale.candidates[0].taken);
    let more = facts.links.len() - Rationale::MOST;
    assert!(rationale.to_string().ends_with(&format!("; and {more} more")), "{rationale}");
}
