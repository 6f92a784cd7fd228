//! Routes.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;

use flannel_core::net::{Family, Prefix};
use rtnetlink::packet_core::{NLM_F_APPEND, NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteNextHop, RouteNextHopFlags, RouteScope,
    RouteType,
};

use super::{address_family, name_of, protocol_name};
use crate::netlink::Raw;
use crate::{Error, Namespace};

/// A route, to be made or as listed.
///
/// A new one is unicast, in the main table, of protocol `boot`, without metric: what `ip route add` makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    /// Destination.
    pub to: Prefix,
    /// What it does.
    pub kind: RouteType,
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Output link.
    pub dev: Option<String>,
    /// Table.
    pub table: u32,
    /// `rtm_protocol`.
    pub protocol: u8,
    /// Scope; IPv6 knows only the widest.
    pub scope: RouteScope,
    /// Preferred source.
    pub source: Option<IpAddr>,
    /// Metric; 0 is none, and reads back as 1024 in IPv6.
    pub metric: u32,
    /// `RTNH_F_ONLINK`, `RTNH_F_LINKDOWN` and the like.
    pub flags: RouteFlags,
    /// The next hops of a multipath route as listed, beside `via` and `dev`, which it has not.
    pub hops: Vec<Hop>,
}

/// One next hop of several.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Hop {
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Output link.
    pub dev: String,
    /// Its share.
    pub weight: u16,
    /// `RTNH_F_ONLINK` and the like.
    pub flags: RouteNextHopFlags,
}

impl Route {
    /// The main table.
    pub const MAIN: u32 = 254;
    /// `RTPROT_KERNEL`
    pub const KERNEL: u8 = 2;
    /// `RTPROT_BOOT`
    pub const BOOT: u8 = 3;
    /// `RTPROT_STATIC`
    pub const STATIC: u8 = 4;

    /// A route to `prefix`.
    pub fn to(prefix: Prefix) -> Self {
        Self {
            to: prefix,
            kind: RouteType::Unicast,
            via: None,
            dev: None,
            table: Self::MAIN,
            protocol: Self::BOOT,
            scope: RouteScope::Universe,
            source: None,
            metric: 0,
            flags: RouteFlags::empty(),
            hops: Vec::new(),
        }
    }

    /// With this next hop.
    pub fn via(self, gateway: IpAddr) -> Self {
        Self { via: Some(gateway), ..self }
    }

    /// Through this link.
    pub fn dev(self, name: &str) -> Self {
        Self { dev: Some(name.to_owned()), ..self }
    }

    /// In this table.
    pub fn table(self, table: u32) -> Self {
        Self { table, ..self }
    }

    /// Of this protocol.
    pub fn protocol(self, protocol: u8) -> Self {
        Self { protocol, ..self }
    }

    /// With this metric.
    pub fn metric(self, metric: u32) -> Self {
        Self { metric, ..self }
    }

    /// With this preferred source.
    pub fn source(self, source: IpAddr) -> Self {
        Self { source: Some(source), ..self }
    }

    /// Of this kind.
    pub fn kind(self, kind: RouteType) -> Self {
        Self { kind, ..self }
    }

    /// Its next hop is on-link, whatever the addresses say.
    pub fn onlink(self) -> Self {
        Self { flags: self.flags | RouteFlags::Onlink, ..self }
    }

    /// Whether the next hop is taken as on-link.
    pub fn is_onlink(&self) -> bool {
        self.flags.contains(RouteFlags::Onlink)
    }
}

impl fmt::Display for Route {
    /// As `ip route`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.kind {
            RouteType::Unicast => {}
            RouteType::BlackHole => f.write_str("blackhole ")?,
            RouteType::Unreachable => f.write_str("unreachable ")?,
            RouteType::Prohibit => f.write_str("prohibit ")?,
            RouteType::Throw => f.write_str("throw ")?,
            RouteType::Local => f.write_str("local ")?,
            RouteType::Broadcast => f.write_str("broadcast ")?,
            RouteType::Anycast => f.write_str("anycast ")?,
            RouteType::Multicast => f.write_str("multicast ")?,
            kind => write!(f, "{} ", u8::from(kind))?,
        }
        match (self.to.len(), self.to.len() == self.to.family().bits()) {
            (0, _) => f.write_str("default")?,
            (_, true) => write!(f, "{}", self.to.addr())?,
            (_, false) => write!(f, "{}", self.to)?,
        }
        if let Some(via) = self.via {
            write!(f, " via {via}")?;
        }
        if let Some(dev) = &self.dev {
            write!(f, " dev {dev}")?;
        }
        match self.table {
            Self::MAIN => {}
            255 => f.write_str(" table local")?,
            table => write!(f, " table {table}")?,
        }
        if self.protocol != Self::BOOT {
            write!(f, " proto {}", protocol_name(self.protocol))?;
        }
        match self.scope {
            RouteScope::Universe => {}
            RouteScope::Link => f.write_str(" scope link")?,
            RouteScope::Host => f.write_str(" scope host")?,
            RouteScope::NoWhere => f.write_str(" scope nowhere")?,
            scope => write!(f, " scope {}", u8::from(scope))?,
        }
        if let Some(source) = self.source {
            write!(f, " src {source}")?;
        }
        if self.metric != 0 {
            write!(f, " metric {}", self.metric)?;
        }
        for hop in &self.hops {
            write!(f, " nexthop")?;
            if let Some(via) = hop.via {
                write!(f, " via {via}")?;
            }
            write!(f, " dev {} weight {}", hop.dev, hop.weight)?;
            flag_text(u32::from(hop.flags.bits()), f)?;
        }
        flag_text(self.flags.bits(), f)?;
        if self.to.family() == Family::V6 { f.write_str(" pref medium") } else { Ok(()) }
    }
}

fn flag_text(flags: u32, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    const NAMES: [(RouteFlags, &str); 4] = [
        (RouteFlags::Dead, "dead"),
        (RouteFlags::Onlink, "onlink"),
        (RouteFlags::Pervasive, "pervasive"),
        (RouteFlags::Linkdown, "linkdown"),
    ];
    let flags = RouteFlags::from_bits_retain(flags);
    NAMES.iter().filter(|(flag, _)| flags.contains(*flag)).try_for_each(|(_, name)| write!(f, " {name}"))
}

impl Namespace {
    /// The routes of one family, of every table, in the order of the dump.
    ///
    /// # Errors
    /// When the kernel refuses the dump.
    pub fn routes(&self, family: Family) -> Result<Vec<Route>, Error> {
        Ok(self.routes_raw(family)?.into_iter().map(|(route, _)| route).collect())
    }

    pub(crate) fn routes_raw(&self, family: Family) -> Result<Vec<(Route, Raw)>, Error> {
        let mut message = RouteMessage::default();
        message.header.address_family = address_family(family);
        let mut routes = Vec::new();
        let dump = self.dump(RouteNetlinkMessage::GetRoute(message), "routes")?;
        // After the routes: the devices of those that were there a moment ago are there by now.
        let names = self.link_names()?;
        for raw in dump {
            if let RouteNetlinkMessage::NewRoute(message) = raw.decode()? {
                routes.push((parse(message, family, &names)?, raw));
            }
        }
        Ok(routes)
    }

    /// `ip route add`
    ///
    /// # Errors
    /// As the kernel says; `EEXIST` when destination and metric are taken, by whomever.
    pub fn add_route(&self, route: &Route) -> Result<(), Error> {
        self.put_route("add", route, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// `ip route append`
    ///
    /// # Errors
    /// As the kernel says.
    pub fn append_route(&self, route: &Route) -> Result<(), Error> {
        self.put_route("append", route, NLM_F_CREATE | NLM_F_APPEND)
    }

    /// `ip route prepend`
    ///
    /// # Errors
    /// As the kernel says.
    pub fn prepend_route(&self, route: &Route) -> Result<(), Error> {
        self.put_route("prepend", route, NLM_F_CREATE)
    }

    /// `ip route replace`
    ///
    /// # Errors
    /// As the kernel says.
    pub fn replace_route(&self, route: &Route) -> Result<(), Error> {
        self.put_route("replace", route, NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn put_route(&self, verb: &str, route: &Route, flags: u16) -> Result<(), Error> {
        let message = self.route_message(route)?;
        self.request(RouteNetlinkMessage::NewRoute(message), flags, &format!("ip route {verb} {route}"))
    }

    /// `ip route add`, each, several to a send.
    ///
    /// # Errors
    /// The first refusal.
    pub fn add_routes(&self, routes: &[Route]) -> Result<(), Error> {
        let mut indices = BTreeMap::new();
        let mut requests = Vec::with_capacity(routes.len());
        for route in routes {
            let mut message = route_message(route);
            if let Some(dev) = route.dev.as_deref() {
                if !indices.contains_key(dev) {
                    indices.insert(dev, self.index_of(dev)?);
                }
                message.attributes.extend(indices.get(dev).map(|index| RouteAttribute::Oif(*index)));
            }
            requests.push((RouteNetlinkMessage::NewRoute(message), NLM_F_CREATE | NLM_F_EXCL));
        }
        self.request_all(requests, "ip route add")
    }

    /// `ip route del` of exactly this route: protocol 0 matches any, and so does the lack of a link or next hop.
    ///
    /// # Errors
    /// As the kernel says; `ESRCH` when there is none such.
    pub fn delete_route(&self, route: &Route) -> Result<(), Error> {
        let mut message = self.route_message(route)?;
        if route.kind == RouteType::Unicast {
            message.header.kind = RouteType::Unspec;
        }
        if route.to.family() == Family::V4 {
            message.header.scope = RouteScope::NoWhere;
        }
        self.request(RouteNetlinkMessage::DelRoute(message), 0, &format!("ip route del {route}"))
    }

    /// `ip route flush table main`, both families. Several next hops go one by one with their route.
    ///
    /// # Errors
    /// As the kernel says.
    pub fn flush_main_routes(&self) -> Result<(), Error> {
        for family in Family::BOTH {
            let mut requests = Vec::new();
            for (route, raw) in self.routes_raw(family)? {
                if route.table != Route::MAIN {
                    continue;
                }
                if let RouteNetlinkMessage::NewRoute(message) = raw.decode()? {
                    requests.push((RouteNetlinkMessage::DelRoute(message), 0));
                }
            }
            self.request_all(requests, "ip route flush table main")?;
        }
        Ok(())
    }

    fn route_message(&self, route: &Route) -> Result<RouteMessage, Error> {
        let mut message = route_message(route);
        if let Some(dev) = &route.dev {
            message.attributes.push(RouteAttribute::Oif(self.index_of(dev)?));
        }
        Ok(message)
    }
}

/// The message without its link.
fn route_message(route: &Route) -> RouteMessage {
    let mut message = RouteMessage::default();
    message.header = RouteHeader {
        address_family: address_family(route.to.family()),
        destination_prefix_length: route.to.len(),
        source_prefix_length: 0,
        tos: 0,
        table: u8::try_from(route.table).unwrap_or_default(),
        protocol: route.protocol.into(),
        scope: route.scope,
        kind: route.kind,
        flags: route.flags & RouteFlags::Onlink,
    };
    let attributes = &mut message.attributes;
    if route.to.len() > 0 {
        attributes.push(RouteAttribute::Destination(route.to.addr().into()));
    }
    if message.header.table == 0 {
        attributes.push(RouteAttribute::Table(route.table));
    }
    attributes.extend(route.via.map(|via| RouteAttribute::Gateway(via.into())));
    attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    if route.metric != 0 {
        attributes.push(RouteAttribute::Priority(route.metric));
    }
    message
}

fn parse(message: RouteMessage, family: Family, names: &BTreeMap<u32, String>) -> Result<Route, Error> {
    let unspecified: IpAddr = match family {
        Family::V4 => std::net::Ipv4Addr::UNSPECIFIED.into(),
        Family::V6 => std::net::Ipv6Addr::UNSPECIFIED.into(),
    };
    let len = message.header.destination_prefix_length;
    let prefix = |addr| Prefix::masked(addr, len).map_err(|error| Error::new(format!("a route's prefix: {error}")));
    let mut route = Route::to(prefix(unspecified)?);
    route.kind = message.header.kind;
    route.table = message.header.table.into();
    route.protocol = message.header.protocol.into();
    route.scope = message.header.scope;
    route.flags = message.header.flags;
    for attribute in message.attributes {
        match attribute {
            RouteAttribute::Destination(addr) => route.to = prefix(ip_of(&addr).unwrap_or(unspecified))?,
            RouteAttribute::Gateway(addr) => route.via = ip_of(&addr),
            RouteAttribute::Oif(index) => route.dev = Some(name_of(names, index)),
            RouteAttribute::Table(table) => route.table = table,
            RouteAttribute::Priority(metric) => route.metric = metric,
            RouteAttribute::PrefSource(addr) => route.source = ip_of(&addr),
            RouteAttribute::MultiPath(hops) => route.hops = hops.iter().map(|hop| parse_hop(hop, names)).collect(),
            _ => {}
        }
    }
    Ok(route)
}

fn parse_hop(hop: &RouteNextHop, names: &BTreeMap<u32, String>) -> Hop {
    let via = hop.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Gateway(addr) => ip_of(addr),
        _ => None,
    });
    Hop { via, dev: name_of(names, hop.interface_index), weight: u16::from(hop.hops) + 1, flags: hop.flags }
}

fn ip_of(addr: &RouteAddress) -> Option<IpAddr> {
    match addr {
        RouteAddress::Inet(addr) => Some((*addr).into()),
        RouteAddress::Inet6(addr) => Some((*addr).into()),
        _ => None,
    }
}
