//! Selection of the interface that carries the overlay (docs/compatibility.md, "Interface selection").

mod pattern;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

pub use pattern::{Pattern, PatternError};

use crate::backend::Uplink;
use crate::kernel::{HostAddress, HostFacts, HostLink, LinkName};
use crate::net::{Dual, Family, Mtu, Prefix, is_link_local, is_public_unicast};

/// How to select the interface.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Select {
    /// The interface of the first default route. If both families are enabled, both must use the same interface.
    #[default]
    DefaultRoute,
    /// The interface with this name.
    Name(LinkName),
    /// The interface with this address, which becomes the local address of its family.
    Ip(IpAddr),
    /// The first interface whose addresses match: one in each family in use, which become its local addresses. If there
    /// is none, the first interface whose name matches.
    Regex(Pattern),
    /// The interface through which packets to this address leave, according to the main table: the longest prefix, then
    /// the lowest metric. Rules and other tables are ignored. An address of the interface on the prefix that contains
    /// this address, if any, becomes the local address.
    CanReach(IpAddr),
    /// The first of these that gives a usable interface; the [`Rationale`] says why the others do not.
    FirstOf(Vec<Select>),
}

impl Select {
    /// Returns flannel's selection when none is configured: the given public address, IPv4 before IPv6, selects the
    /// interface that has it; without one, the default route does.
    pub fn implied_by(public: &Dual<IpAddr>) -> Self {
        public.v4.or(public.v6).map_or(Self::DefaultRoute, Self::Ip)
    }

    /// Returns the addresses whose routes the selection needs: pass them to
    /// [`Kernel::host_facts`](crate::kernel::Kernel::host_facts).
    pub fn reaches(&self) -> Vec<IpAddr> {
        match self {
            Self::CanReach(addr) => vec![*addr],
            Self::FirstOf(choices) => choices.iter().flat_map(Self::reaches).collect(),
            Self::DefaultRoute | Self::Name(_) | Self::Ip(_) | Self::Regex(_) => Vec::new(),
        }
    }
}

impl fmt::Display for Select {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DefaultRoute => f.write_str("the interface of the default route"),
            Self::Name(name) => write!(f, "the interface named {name}"),
            Self::Ip(addr) => write!(f, "the interface with address {addr}"),
            Self::Regex(pattern) => write!(f, "the interface whose address or name matches {pattern}"),
            Self::CanReach(addr) => write!(f, "the interface that reaches {addr}"),
            Self::FirstOf(choices) => {
                for (nth, choice) in choices.iter().enumerate() {
                    write!(f, "{}{choice}", if nth == 0 { "" } else { ", else " })?;
                }
                Ok(())
            }
        }
    }
}

/// The requirements for an uplink.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Request<'a> {
    /// How to select the interface.
    pub wanted: &'a Select,
    /// The address families of the overlay.
    pub families: &'a [Family],
    /// Addresses to publish instead of the interface's own.
    pub public: &'a Dual<IpAddr>,
}

/// The interface and addresses in use, and addresses to avoid.
///
/// Other nodes send to a node's address, and in etcd it is also the node's identity. So a further address that appears
/// beside the one in use, such as a virtual IP address, changes nothing.
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct InUse<'a> {
    /// The interface, by index. Kept as long as the request allows it.
    pub link: Option<u32>,
    /// The local addresses. Each is kept as long as the selected interface has it and it is not deprecated.
    pub addrs: Dual<IpAddr>,
    /// Addresses that other nodes publish. An interface's address in this set is only selected if it is in use.
    pub others: &'a BTreeSet<IpAddr>,
}

impl InUse<'static> {
    /// Nothing is in use, as on the first start of a node.
    pub const NOTHING: Self = Self { link: None, addrs: Dual { v4: None, v6: None }, others: &BTreeSet::new() };
}

impl<'a> Request<'a> {
    /// Creates a request for these families, with the addresses of `public` published where given.
    pub fn new(wanted: &'a Select, families: &'a [Family], public: &'a Dual<IpAddr>) -> Self {
        Self { wanted, families, public }
    }
}

/// The selected interface.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Choice {
    /// The interface and its own addresses.
    pub uplink: Uplink,
    /// The addresses published for peers to send to: the given ones, else the interface's own.
    pub public: Dual<IpAddr>,
    /// Why this interface was selected.
    pub rationale: Rationale,
}

/// The interfaces, the selected one first, each with the reason why it was or was not selected.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Rationale {
    /// The first [`MOST`](Self::MOST) interfaces.
    pub candidates: Vec<Candidate>,
    /// How many further interfaces there are.
    pub more: usize,
    /// The entries of [`Select::FirstOf`] that were tried before without success.
    pub passed_over: Vec<PassedOver>,
}

/// A selection that did not give a usable interface.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PassedOver {
    /// The selection.
    pub wanted: Select,
    /// What is wrong, and what to do.
    pub problem: Problem,
}

/// An interface and the verdict on it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Candidate {
    /// The interface name.
    pub name: LinkName,
    /// Its addresses that could be a local address, best first.
    pub addresses: Vec<IpAddr>,
    /// Whether it was selected.
    pub taken: bool,
    /// The reason.
    pub why: String,
}

impl Rationale {
    /// The maximum number of listed interfaces.
    pub const MOST: usize = 32;
}

impl fmt::Display for Rationale {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.candidates.is_empty() {
            return f.write_str("there are no interfaces");
        }
        for (nth, candidate) in self.candidates.iter().enumerate() {
            let separator = if nth == 0 { "" } else { "; " };
            let verdict = if candidate.taken { "selected" } else { "not selected" };
            write!(f, "{separator}{verdict} {} {:?} ({})", candidate.name, candidate.addresses, candidate.why)?;
        }
        if self.more > 0 {
            write!(f, "; and {} more", self.more)?;
        }
        for PassedOver { wanted, problem } in &self.passed_over {
            write!(f, "; {wanted} was tried before: {problem}")?;
        }
        Ok(())
    }
}

/// No interface could be selected. Final until the host or the selection changes; retry when the host's links,
/// addresses or routes change.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot use {wanted}: {problem} (interfaces: {rationale})")]
#[non_exhaustive]
pub struct UplinkError {
    /// The selection.
    pub wanted: Box<Select>,
    /// What is wrong, and what to do.
    pub problem: Problem,
    /// The interfaces of the host.
    pub rationale: Box<Rationale>,
}

/// Why an interface cannot be the uplink.
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
        /// The interface of the IPv4 default route.
        v4: String,
        /// The interface of the IPv6 default route.
        v6: String,
    },
    /// No route leads to the address.
    #[error("no route of the main table leads to {0}; add one, or select an interface by name or address")]
    Unreachable(IpAddr),
    /// The best route to the address has several next hops.
    #[error("the route to {0} has several next hops; select an interface by name or address")]
    MultipathTo(IpAddr),
    /// The list of selections is empty.
    #[error("the list of selections is empty; give at least one")]
    NothingAsked,
    /// No interface matches.
    #[error("no such interface; correct the selection, or create it first")]
    NoSuchInterface,
    /// The interface has no usable address.
    #[error("{link} has no usable {family} address; give it one, or turn {family} off in the network config")]
    NoAddress {
        /// The interface.
        link: LinkName,
        /// The enabled family.
        family: Family,
    },
    /// The interface has only addresses that other nodes publish.
    #[error(
        "another node publishes {addr}, the {family} address of {link}; \
         remove that node's record from the lease store if the node is gone, or give {link} an address of its own"
    )]
    PublishedByOther {
        /// The interface.
        link: LinkName,
        /// The family.
        family: Family,
        /// The address.
        addr: IpAddr,
    },
    /// The interface must also have the public address of the other family.
    #[error("{link} does not have the public address {addr}; give it to the interface, or select by name")]
    OtherFamilyElsewhere {
        /// The interface.
        link: LinkName,
        /// The address.
        addr: IpAddr,
    },
    /// Peers cannot send to the address.
    #[error("peers cannot send to {addr}; give {link} a routable address, or set the public {family} address")]
    NotPublic {
        /// The interface.
        link: LinkName,
        /// The family.
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
    /// The interface has an MTU of zero.
    #[error("{0} has MTU 0; set its MTU")]
    NoMtu(LinkName),
}

/// Selects the uplink. The interface and addresses in use are kept as long as they fit the request.
///
/// Pure: the same arguments give the same choice.
///
/// # Errors
/// [`UplinkError`] has the selection, what is wrong, what to do, and the host's interfaces.
pub fn select(request: Request<'_>, facts: &HostFacts, in_use: InUse<'_>) -> Result<Choice, UplinkError> {
    let Select::FirstOf(choices) = request.wanted else { return select_one(request, facts, in_use) };
    let mut first = None;
    let mut passed_over = Vec::new();
    let mut last = None;
    for wanted in choices {
        match select(Request { wanted, ..request }, facts, in_use) {
            Ok(found) if found.uplink.is(&in_use) => return Ok(found),
            Ok(found) if first.is_none() => {
                first = Some(Choice {
                    rationale: Rationale { passed_over: passed_over.clone(), ..found.rationale },
                    ..found
                });
            }
            Ok(_) => {}
            Err(error) => {
                passed_over.push(PassedOver { wanted: (*error.wanted).clone(), problem: error.problem.clone() });
                last = Some(error);
            }
        }
    }
    if let Some(first) = first {
        return Ok(first);
    }
    let error = last.unwrap_or(UplinkError {
        wanted: Box::new(request.wanted.clone()),
        problem: Problem::NothingAsked,
        rationale: Box::default(),
    });
    // The error already contains the last problem.
    passed_over.pop();
    Err(UplinkError { rationale: Box::new(Rationale { passed_over, ..*error.rationale }), ..error })
}

fn select_one(request: Request<'_>, facts: &HostFacts, in_use: InUse<'_>) -> Result<Choice, UplinkError> {
    let Request { wanted, families, public } = request;
    let search = Search { wanted, facts, families, public, in_use };
    let found = search.find();
    let choice = found.clone().and_then(|found| search.judge(&found));
    let rationale = search.explain(found.ok().map(|found| found.index), choice.as_ref().err());
    match choice {
        Ok((uplink, public)) => Ok(Choice { uplink, public, rationale }),
        Err(problem) => Err(UplinkError { wanted: Box::new(wanted.clone()), problem, rationale: Box::new(rationale) }),
    }
}

impl Uplink {
    /// Returns whether this is the interface in use, with the same addresses.
    fn is(&self, in_use: &InUse<'_>) -> bool {
        in_use.link == Some(self.index) && in_use.addrs == self.addrs
    }
}

/// An interface, and the local addresses that the search determined.
#[derive(Debug, Clone)]
struct Found {
    index: u32,
    local: Dual<IpAddr>,
}

impl From<u32> for Found {
    fn from(index: u32) -> Self {
        Self { index, local: Dual::default() }
    }
}

struct Search<'a> {
    wanted: &'a Select,
    facts: &'a HostFacts,
    families: &'a [Family],
    public: &'a Dual<IpAddr>,
    in_use: InUse<'a>,
}

impl Search<'_> {
    /// Returns the requested interface.
    fn find(&self) -> Result<Found, Problem> {
        match self.wanted {
            Select::DefaultRoute => self.default_route().map(Found::from),
            Select::Name(name) => {
                let named = self.facts.links.iter().find(|(_, link)| link.name == *name);
                named.map(|(index, _)| Found::from(*index)).ok_or(Problem::NoSuchInterface)
            }
            Select::Ip(addr) => {
                let owner = self.facts.addresses.iter().find(|address| address.addr == *addr);
                let mut found = Found::from(owner.ok_or(Problem::NoSuchInterface)?.link);
                *found.local.slot(Family::of(*addr)) = Some(*addr);
                Ok(found)
            }
            Select::Regex(pattern) => self.matching(pattern).ok_or(Problem::NoSuchInterface),
            Select::CanReach(addr) => self.reaching(*addr),
            // `select` handles lists before this is called.
            Select::FirstOf(_) => Err(Problem::NothingAsked),
        }
    }

    fn matching(&self, pattern: &Pattern) -> Option<Found> {
        let by_address = self.indices().find_map(|index| {
            let addresses = self.addresses(index);
            let mut local = Dual::default();
            for family in self.families {
                let matches = |addr: &&IpAddr| Family::of(**addr) == *family && pattern.matches(&addr.to_string());
                *local.slot(*family) = Some(*addresses.iter().find(matches)?);
            }
            Some(Found { index, local })
        });
        let named = |index: &u32| self.facts.links.get(index).is_some_and(|link| pattern.matches(link.name.as_str()));
        by_address.or_else(|| self.indices().find(named).map(Found::from))
    }

    fn reaching(&self, addr: IpAddr) -> Result<Found, Problem> {
        let route = self.facts.route_to(addr).ok_or(Problem::Unreachable(addr))?;
        let mut found = Found::from(route.link.ok_or(Problem::MultipathTo(addr))?);
        let beside = |address: &&HostAddress| {
            let prefix = Prefix::masked(address.addr, address.len);
            address.link == found.index && !address.deprecated && prefix.is_ok_and(|prefix| prefix.contains(addr))
        };
        let beside: Vec<_> = self.facts.addresses.iter().filter(beside).map(|address| address.addr).collect();
        let in_use = beside.iter().find(|addr| self.is_in_use(**addr));
        *found.local.slot(Family::of(addr)) = in_use.or(beside.first()).copied();
        Ok(found)
    }

    fn default_route(&self) -> Result<u32, Problem> {
        let through = |family: Family| self.facts.defaults.iter().filter(move |route| route.prefix.family() == family);
        let stays =
            |index: &u32| self.families.iter().all(|family| through(*family).any(|route| route.link == Some(*index)));
        if let Some(index) = self.in_use.link.filter(stays) {
            return Ok(index);
        }
        let mut found = Vec::new();
        for family in self.families {
            let first = through(*family).next().ok_or(Problem::NoDefaultRoute(*family))?;
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

    /// Returns the interfaces, the one in use first.
    fn indices(&self) -> impl Iterator<Item = u32> {
        let in_use = self.in_use.link.filter(|index| self.facts.links.contains_key(index));
        in_use.into_iter().chain(self.facts.links.keys().copied().filter(move |index| Some(*index) != in_use))
    }

    /// Returns the usable local addresses of an interface, best first: the one in use before all others.
    fn addresses(&self, index: u32) -> Vec<IpAddr> {
        let mut addresses = usable_addresses(self.facts, index);
        addresses.sort_by_key(|addr| !self.is_in_use(*addr));
        addresses
    }

    fn is_in_use(&self, addr: IpAddr) -> bool {
        self.in_use.addrs.get(Family::of(addr)) == Some(&addr)
    }

    /// Returns whether another node publishes the address and this node does not use it.
    fn is_others(&self, addr: IpAddr) -> bool {
        self.in_use.others.contains(&addr) && !self.is_in_use(addr)
    }

    fn judge(&self, found: &Found) -> Result<(Uplink, Dual<IpAddr>), Problem> {
        let index = found.index;
        let link = self.facts.links.get(&index).ok_or(Problem::NoSuchInterface)?;
        if link.mtu == 0 {
            return Err(Problem::NoMtu(link.name.clone()));
        }
        let mut addrs = Dual::default();
        let mut public = Dual::default();
        for family in self.families {
            let local = self.local_address(found, link, *family)?;
            *addrs.slot(*family) = Some(local);
            *public.slot(*family) = Some(self.public_address(link, *family, local)?);
        }
        Ok((Uplink { index, name: link.name.clone(), mtu: Mtu(link.mtu), addrs }, public))
    }

    fn local_address(&self, found: &Found, link: &HostLink, family: Family) -> Result<IpAddr, Problem> {
        if let Some(addr) = found.local.get(family) {
            return Ok(*addr);
        }
        if let (Select::Ip(_), Some(other)) = (self.wanted, self.public.get(family)) {
            let here = |address: &HostAddress| address.link == found.index && address.addr == *other;
            let elsewhere = || Problem::OtherFamilyElsewhere { link: link.name.clone(), addr: *other };
            return self.facts.addresses.iter().any(here).then_some(*other).ok_or_else(elsewhere);
        }
        let addresses = self.addresses(found.index);
        let mut addresses = addresses.into_iter().filter(|addr| Family::of(*addr) == family).peekable();
        let first = addresses.peek().copied();
        let best = addresses.find(|addr| !self.is_others(*addr)).or(first);
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
        if addr == local && self.is_others(addr) {
            return Err(Problem::PublishedByOther { link: link.name.clone(), family, addr });
        }
        Ok(addr)
    }

    fn explain(&self, found: Option<u32>, problem: Option<&Problem>) -> Rationale {
        let candidate = |(index, link): (&u32, &HostLink)| {
            let asked_for = found == Some(*index);
            let why = match problem {
                Some(problem) if asked_for => problem.to_string(),
                None if asked_for => self.wanted.to_string(),
                _ => self.why_not(*index),
            };
            Candidate {
                name: link.name.clone(),
                addresses: self.addresses(*index),
                taken: asked_for && problem.is_none(),
                why,
            }
        };
        let (mut chosen, others): (Vec<_>, Vec<_>) =
            self.facts.links.iter().partition(|(index, _)| found == Some(**index));
        chosen.extend(others);
        Rationale {
            candidates: chosen.iter().take(Rationale::MOST).copied().map(candidate).collect(),
            more: chosen.len().saturating_sub(Rationale::MOST),
            passed_over: Vec::new(),
        }
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
            Select::Regex(pattern) if self.matches(index, pattern) => {
                format!("matches {pattern}, but is not the first")
            }
            Select::Regex(pattern) => format!("does not match {pattern}"),
            Select::CanReach(addr) => format!("the best route to {addr} does not use it"),
            Select::FirstOf(_) => "nothing was asked for".to_owned(),
        }
    }

    fn matches(&self, index: u32, pattern: &Pattern) -> bool {
        let by_name = self.facts.links.get(&index).is_some_and(|link| pattern.matches(link.name.as_str()));
        by_name || self.addresses(index).iter().any(|addr| pattern.matches(&addr.to_string()))
    }

    fn name_of(&self, index: u32) -> String {
        self.facts.links.get(&index).map_or_else(|| format!("if{index}"), |link| link.name.to_string())
    }
}

/// Returns the usable local addresses of an interface, best first. In addition to flannel's order
/// (docs/compatibility.md, "Interface selection"), a virtual IP address, which moves from host to host, comes after the
/// interface's own addresses. Most virtual IP addresses have a full-length prefix. The kernel lists them after the
/// host's IPv4 address but before its IPv6 address, because it lists IPv6 addresses newest first.
fn usable_addresses(facts: &HostFacts, index: u32) -> Vec<IpAddr> {
    let usable = |address: &&HostAddress| {
        address.link == index && !address.deprecated && (is_global(address.addr) || is_link_local(address.addr))
    };
    let (v4, mut v6): (Vec<_>, Vec<_>) =
        facts.addresses.iter().filter(usable).partition(|address| address.addr.is_ipv4());
    v6.reverse();
    let mut found: Vec<_> = v4.into_iter().chain(v6).collect();
    found.sort_by_key(|address| {
        let family = Family::of(address.addr);
        let lifetime = family == Family::V6 && !address.permanent;
        (is_link_local(address.addr), address.len == family.bits(), lifetime, address.temporary)
    });
    found.into_iter().map(|address| address.addr).collect()
}

/// Returns whether an address is unicast beyond its link, private ranges included (Go's `IsGlobalUnicast`).
fn is_global(addr: IpAddr) -> bool {
    let broadcast = matches!(addr, IpAddr::V4(addr) if addr.is_broadcast());
    !(broadcast || addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || is_link_local(addr))
}

#[cfg(test)]
mod tests;
