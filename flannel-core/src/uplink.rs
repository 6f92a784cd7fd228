//! Choosing the interface that carries the overlay (contract 4).

use std::fmt;
use std::net::IpAddr;

use crate::backend::Uplink;
use crate::kernel::{HostAddress, HostFacts, HostLink};
use crate::net::{Dual, Family, Mtu, is_public_unicast};
use crate::state::LinkName;

/// How to find the interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Select {
    /// That of the first default route. With both families enabled, both must have the same.
    #[default]
    DefaultRoute,
    /// The one of this name.
    Name(LinkName),
    /// The one that has this address, which then is the local address of its family.
    Ip(IpAddr),
}

impl Select {
    /// What flannel does where nothing is selected: the public address given, IPv4 before IPv6, has to be a local
    /// one and finds the interface; without any the default route does.
    pub fn implied_by(public: &Dual<IpAddr>) -> Self {
        public.v4.or(public.v6).map_or(Self::DefaultRoute, Self::Ip)
    }
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DefaultRoute => f.write_str("the interface of the default route"),
            Self::Name(name) => write!(f, "the interface named {name}"),
            Self::Ip(addr) => write!(f, "the interface with address {addr}"),
        }
    }
}

/// The interface chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Choice {
    /// The interface and its own addresses.
    pub uplink: Uplink,
    /// What peers are told to send to: the addresses given, else the interface's own.
    pub public: Dual<IpAddr>,
    /// Why this one.
    pub explanation: Explanation,
}

/// Every interface, the one chosen first, with the reason it was or was not taken.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Explanation {
    /// The interfaces.
    pub candidates: Vec<Candidate>,
}

/// One interface as it was judged.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Candidate {
    /// Its name.
    pub name: LinkName,
    /// Its addresses that could be a local address, best first.
    pub addresses: Vec<IpAddr>,
    /// Whether it was taken.
    pub taken: bool,
    /// Why.
    pub why: String,
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.candidates.is_empty() {
            return f.write_str("there are no interfaces");
        }
        for (nth, candidate) in self.candidates.iter().enumerate() {
            let separator = if nth == 0 { "" } else { "; " };
            let verdict = if candidate.taken { "taken" } else { "not taken" };
            write!(f, "{separator}{} {:?} {verdict}: {}", candidate.name, candidate.addresses, candidate.why)?;
        }
        Ok(())
    }
}

/// No interface could be chosen. Final until the host or the selection changes; worth another look when the host's
/// links, addresses or routes change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use {wanted}: {problem} (interfaces: {explanation})")]
#[non_exhaustive]
pub struct UplinkError {
    /// What was looked for.
    pub wanted: Select,
    /// What is wrong, and what to do.
    pub problem: Problem,
    /// What there is.
    pub explanation: Explanation,
}

/// What keeps an interface from being the uplink.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Problem {
    /// There is no default route.
    #[error("there is no {0} default route; add one, or select an interface by name or address")]
    NoDefaultRoute(Family),
    /// The default route has several next hops.
    #[error("the {0} default route has several next hops; select an interface by name or address")]
    Multipath(Family),
    /// The two families' default routes use different interfaces.
    #[error("IPv4 goes out of {v4}, IPv6 out of {v6}; select an interface by name or address")]
    Split {
        /// The IPv4 default route's.
        v4: String,
        /// The IPv6 default route's.
        v6: String,
    },
    /// No interface fits.
    #[error("there is none; correct the selection, or create it first")]
    NoSuchInterface,
    /// The interface has no address that can be used.
    #[error("{link} has no usable {family} address; give it one, or turn {family} off in the network config")]
    NoAddress {
        /// The interface.
        link: LinkName,
        /// The family that is enabled.
        family: Family,
    },
    /// The public address of the other family has to be the interface's, too.
    #[error("{link} does not have the public address {addr}; give it to the interface, or select by name")]
    OtherFamilyElsewhere {
        /// The interface.
        link: LinkName,
        /// The address.
        addr: IpAddr,
    },
    /// Nobody could send to the address.
    #[error("peers cannot send to {addr}; give {link} a routable address, or set the public {family} address")]
    NotPublic {
        /// The interface.
        link: LinkName,
        /// Of which family.
        family: Family,
        /// The address.
        addr: IpAddr,
    },
    /// A public address is not of the family it was given for.
    #[error("the public address {addr} is not an {family} address; correct it")]
    WrongFamily {
        /// The family it was given for.
        family: Family,
        /// The address.
        addr: IpAddr,
    },
    /// An MTU of zero.
    #[error("{0} has MTU 0; set its MTU")]
    NoMtu(LinkName),
}

/// Chooses the uplink of an overlay with these `families`. `public` overrides what peers are told to send to.
///
/// Pure: the same facts give the same choice.
///
/// # Errors
/// [`UplinkError`] says what was looked for, what is wrong, what to do, and lists what there is.
pub fn select(
    wanted: &Select,
    facts: &HostFacts,
    families: &[Family],
    public: &Dual<IpAddr>,
) -> Result<Choice, UplinkError> {
    let search = Search { wanted, facts, families, public };
    let found = search.find();
    let choice = found.clone().and_then(|index| search.judge(index));
    let explanation = search.explain(found.ok(), choice.as_ref().err());
    match choice {
        Ok((uplink, public)) => Ok(Choice { uplink, public, explanation }),
        Err(problem) => Err(UplinkError { wanted: wanted.clone(), problem, explanation }),
    }
}

struct Search<'a> {
    wanted: &'a Select,
    facts: &'a HostFacts,
    families: &'a [Family],
    public: &'a Dual<IpAddr>,
}

impl Search<'_> {
    /// The interface that was asked for.
    fn find(&self) -> Result<u32, Problem> {
        match self.wanted {
            Select::DefaultRoute => self.default_route(),
            Select::Name(name) => {
                let named = self.facts.links.iter().find(|(_, link)| link.name == *name);
                named.map(|(index, _)| *index).ok_or(Problem::NoSuchInterface)
            }
            Select::Ip(addr) => {
                let owner = self.facts.addresses.iter().find(|address| address.addr == *addr);
                owner.map(|address| address.link).ok_or(Problem::NoSuchInterface)
            }
        }
    }

    fn default_route(&self) -> Result<u32, Problem> {
        let mut found = Vec::new();
        for family in self.families {
            let first = self.facts.defaults.iter().find(|route| route.prefix.family() == *family);
            let first = first.ok_or(Problem::NoDefaultRoute(*family))?;
            found.push(first.link.ok_or(Problem::Multipath(*family))?);
        }
        match found.as_slice() {
            [] => Err(Problem::NoSuchInterface),
            [first, rest @ ..] => match rest.iter().find(|other| *other != first) {
                None => Ok(*first),
                Some(other) => Err(Problem::Split { v4: self.name_of(*first), v6: self.name_of(*other) }),
            },
        }
    }

    fn judge(&self, index: u32) -> Result<(Uplink, Dual<IpAddr>), Problem> {
        let link = self.facts.links.get(&index).ok_or(Problem::NoSuchInterface)?;
        if link.mtu == 0 {
            return Err(Problem::NoMtu(link.name.clone()));
        }
        let mut addrs = Dual::default();
        let mut public = Dual::default();
        for family in self.families {
            let local = self.local_address(index, link, *family)?;
            *addrs.slot(*family) = Some(local);
            *public.slot(*family) = Some(self.public_address(link, *family, local)?);
        }
        Ok((Uplink { index, name: link.name.clone(), mtu: Mtu(link.mtu), addrs }, public))
    }

    fn local_address(&self, index: u32, link: &HostLink, family: Family) -> Result<IpAddr, Problem> {
        if let Select::Ip(addr) = self.wanted {
            if Family::of(*addr) == family {
                return Ok(*addr);
            }
            if let Some(other) = self.public.get(family) {
                let here = |address: &HostAddress| address.link == index && address.addr == *other;
                let elsewhere = || Problem::OtherFamilyElsewhere { link: link.name.clone(), addr: *other };
                return self.facts.addresses.iter().any(here).then_some(*other).ok_or_else(elsewhere);
            }
        }
        let best = usable_addresses(self.facts, index).into_iter().find(|addr| Family::of(*addr) == family);
        best.ok_or_else(|| Problem::NoAddress { link: link.name.clone(), family })
    }

    fn public_address(&self, link: &HostLink, family: Family, local: IpAddr) -> Result<IpAddr, Problem> {
        let addr = self.public.get(family).copied().unwrap_or(local);
        if Family::of(addr) != family {
            return Err(Problem::WrongFamily { family, addr });
        }
        if !is_public_unicast(addr) {
            return Err(Problem::NotPublic { link: link.name.clone(), family, addr });
        }
        Ok(addr)
    }

    fn explain(&self, found: Option<u32>, problem: Option<&Problem>) -> Explanation {
        let candidate = |(index, link): (&u32, &HostLink)| {
            let asked_for = found == Some(*index);
            let why = match problem {
                Some(problem) if asked_for => problem.to_string(),
                None if asked_for => format!("is {}", self.wanted),
                _ => self.why_not(*index),
            };
            Candidate {
                name: link.name.clone(),
                addresses: usable_addresses(self.facts, *index),
                taken: asked_for && problem.is_none(),
                why,
            }
        };
        let (mut chosen, others): (Vec<_>, Vec<_>) =
            self.facts.links.iter().partition(|(index, _)| found == Some(**index));
        chosen.extend(others);
        Explanation { candidates: chosen.into_iter().map(candidate).collect() }
    }

    fn why_not(&self, index: u32) -> String {
        match self.wanted {
            Select::DefaultRoute => {
                let through = self.facts.defaults.iter().find(|route| route.link == Some(index));
                match through {
                    Some(route) => {
                        format!("its {} default route is not the first, or not enough", route.prefix.family())
                    }
                    None => "no default route uses it".to_owned(),
                }
            }
            Select::Name(_) => "has another name".to_owned(),
            Select::Ip(addr) => format!("does not have {addr}"),
        }
    }

    fn name_of(&self, index: u32) -> String {
        self.facts.links.get(&index).map_or_else(|| format!("if{index}"), |link| link.name.to_string())
    }
}

/// The addresses of an interface that can be its local address, best first: global ones before link-local ones, then
/// permanent ones, then those that are no privacy addresses; else in the kernel's order.
fn usable_addresses(facts: &HostFacts, index: u32) -> Vec<IpAddr> {
    let usable = |address: &&HostAddress| {
        address.link == index && !address.deprecated && (is_global(address.addr) || is_link_local(address.addr))
    };
    let mut found: Vec<_> = facts.addresses.iter().filter(usable).collect();
    found.sort_by_key(|address| (is_link_local(address.addr), !address.permanent, address.temporary));
    found.into_iter().map(|address| address.addr).collect()
}

/// Unicast beyond the link, private ranges included (Go's `IsGlobalUnicast`).
fn is_global(addr: IpAddr) -> bool {
    let broadcast = matches!(addr, IpAddr::V4(addr) if addr.is_broadcast());
    !(broadcast || addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || is_link_local(addr))
}

fn is_link_local(addr: IpAddr) -> bool {
    match addr {
        IpAddr::V4(addr) => addr.is_link_local(),
        IpAddr::V6(addr) => addr.is_unicast_link_local(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernel::HostRoute;
    use crate::state::LinkKind;

    const V4: &[Family] = &[Family::V4];

    /// lo, eth0 (uplink by default route), eth1; eth0 and eth1 have both families.
    fn facts() -> HostFacts {
        let mut facts = HostFacts::default();
        for (index, name) in [(1, "lo"), (2, "eth0"), (3, "eth1")] {
            let name = LinkName::new(name).unwrap();
            let kind = LinkKind::Other("".into());
            let link = HostLink { name, kind, mac: None, mtu: 1500, up: true, group: 0, alias: None };
            facts.links.insert(index, link);
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
        HostAddress { link, addr: addr.parse().unwrap(), len: 24, permanent: true, temporary: false, deprecated: false }
    }

    fn default_route(prefix: &str, link: Option<u32>) -> HostRoute {
        HostRoute { prefix: prefix.parse().unwrap(), link, gateway: None, metric: 0 }
    }

    fn ip(addr: &str) -> Select {
        Select::Ip(addr.parse().unwrap())
    }

    fn dual(v4: &str, v6: &str) -> Dual<IpAddr> {
        Dual { v4: v4.parse().ok(), v6: v6.parse().ok() }
    }

    fn none() -> Dual<IpAddr> {
        Dual::default()
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
            choice.explanation.to_string(),
            "eth0 [192.0.2.2, 2001:db8::2, fe80::2] taken: is the interface of the default route; \
             lo [] not taken: no default route uses it; \
             eth1 [198.51.100.3, 2001:db8:1::3] not taken: no default route uses it"
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
}
