//! What the agent derives from the host and the settings, as pure functions.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use crate::admit::{Admission, HostView, Own, Rules};
use crate::agent::{Masquerade, Settings};
use crate::allocation::all_compatible;
use crate::backend::{Backend, LocalNode, NodeContext, Uplink};
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::kernel::{Device, HostFacts, HostLink, LinkKind, OverlayName, Scope};
use crate::lease::{Lease, LeaseAttrs, LeaseKey};
use crate::net::{Dual, Family, MacAddr, Mtu, Prefix};
use crate::subnet::{NodeIdentity, Want};
use crate::subnet_env::SubnetEnv;
use crate::uplink::{self, Choice, InUse, Rationale, Request, Select, UplinkError};

/// How long another interface or address has to be the chosen one before it is used: longer than a network manager or a
/// DHCP client takes to restore what it removed.
pub(crate) const SETTLE: Duration = Duration::from_secs(3);

/// A change of addresses that waits until it has been stable for [`SETTLE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settling {
    to: Dual<IpAddr>,
    pub(crate) until: BootTime,
}

impl Settling {
    /// Returns the new wait after `to` was found in place of `from`. `None`: `to` may be used.
    pub(crate) fn of(waiting: Option<Self>, from: &Dual<IpAddr>, to: &Dual<IpAddr>, now: BootTime) -> Option<Self> {
        let settling = match waiting {
            Some(waiting) if waiting.to == *to => waiting,
            _ => Self { to: *to, until: now.after(SETTLE) },
        };
        Some(settling).filter(|settling| from != to && settling.until > now)
    }
}

/// The inputs of a start, besides the host.
pub(crate) struct Known<'a> {
    pub(crate) settings: &'a Settings,
    pub(crate) config: &'a Arc<NetworkConfig>,
    pub(crate) backend: &'a dyn Backend,
    /// The uplink that this start used before.
    pub(crate) uplink: Option<&'a Uplink>,
}

impl Known<'_> {
    /// Returns the context on `host`, and why its uplink was chosen. The interface and addresses that this start used
    /// before are preferred, else the addresses of the last run: other nodes send to them, and etcd identifies this
    /// node's lease by them. Addresses in `others` belong to other nodes.
    pub(crate) fn first_context(&self, host: &Arc<HostFacts>, others: &BTreeSet<IpAddr>) -> Result<First, UplinkError> {
        let Self { settings, config, backend, uplink } = *self;
        let with = |choice: Choice| {
            let node = identity(settings, &choice.public);
            let (overlay, config, host) = (settings.name.clone(), Arc::clone(config), Arc::clone(host));
            let Choice { uplink, public, rationale } = choice;
            let taken = BTreeSet::new();
            (NodeContext { overlay, config, node, uplink, public, host, previous: None, taken }, rationale)
        };
        // An address that another node publishes is not preferred, even if it is in use.
        let kept = |addrs: &Dual<IpAddr>| Dual {
            v4: addrs.v4.filter(|addr| !others.contains(addr)),
            v6: addrs.v6.filter(|addr| !others.contains(addr)),
        };
        let in_use = match uplink {
            Some(uplink) => InUse { link: Some(uplink.index), addrs: kept(&uplink.addrs), others },
            None => InUse { others, ..InUse::NOTHING },
        };
        let mut found = choose(settings, config, host, in_use).map(with)?;
        let devices = devices(backend, &found.0);
        let left = Left::find(&settings.name, host, &devices);
        let mut addrs = uplink.map_or(left.local, |uplink| uplink.addrs);
        if uplink.is_none() {
            // The devices' local address may be the published one, which need not be the interface's.
            for (family, _) in settings.public_override().iter() {
                *addrs.slot(family) = None;
            }
            found = choose(settings, config, host, InUse { addrs: kept(&addrs), ..in_use }).map(with)?;
        }
        let (context, rationale) = found;
        let before = context.uplink.addrs.map(|family, addr| addrs.get(family).copied().unwrap_or(*addr));
        Ok(First { context, rationale, before, left })
    }
}

/// The result of reading the host at a start.
#[derive(Debug, Clone)]
pub(crate) struct First {
    pub(crate) context: NodeContext,
    pub(crate) rationale: Rationale,
    /// The local addresses that were used before, as far as known, else those found.
    pub(crate) before: Dual<IpAddr>,
    left: Left,
}

/// The owner of a lease that was found by this node's address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Owner {
    Us,
    /// Another node, which had this address before or has it too.
    Another,
    /// Another node, which may have the address now.
    Holder,
}

/// The evidence for which lease is this node's, besides the host.
pub(crate) struct Evidence<'a> {
    /// The context with which this start last asked for a lease, and the request.
    pub(crate) so_far: Option<(&'a NodeContext, &'a Want)>,
    /// The subnets that `subnet.env` names.
    pub(crate) former: Dual<Prefix>,
}

impl First {
    /// Returns the MAC addresses in `attrs`.
    pub(crate) fn macs(backend: &dyn Backend, attrs: &LeaseAttrs) -> Vec<MacAddr> {
        let mac = |family| backend.hardware_address(attrs, family).ok().flatten();
        Family::BOTH.into_iter().filter_map(mac).collect()
    }

    /// Returns the owner of `lease`.
    ///
    /// It is this node's if it names a device that the last run left (by its MAC address, or by the subnet's address on
    /// it), if its subnets are those in `subnet.env`, if this start used it as its own when it last asked for a lease
    /// (the request need not match the lease), or if it is reserved for this address.
    ///
    /// Otherwise it is another node's if this start decided so before it first asked by this address, if a left device
    /// has this very address, if the address is new on this node, if it differs from what this start asked for, or if a
    /// left device or `subnet.env` names other subnets.
    pub(crate) fn owner(&self, backend: &dyn Backend, lease: &Lease, evidence: &Evidence<'_>) -> Owner {
        let macs = |attrs: &LeaseAttrs| Self::macs(backend, attrs);
        let found = macs(&lease.attrs);
        let NodeContext { config, node, uplink, public, .. } = &self.context;
        let Left { local, macs: ours, addrs } = &self.left;
        let is_on_device = || lease.subnets.iter().any(|(_, subnet)| addrs.contains(&subnet.addr()));
        let is_reserved = lease.expires.is_none() && lease.attrs.are_addresses_alone();
        let is_asked_for = evidence
            .so_far
            .is_some_and(|(so_far, _)| so_far.previous.as_ref().is_some_and(|previous| previous.key == lease.key));
        let is_named = is_asked_for || evidence.former == lease.subnets;
        if found.iter().any(|mac| ours.contains(mac)) || is_on_device() || is_named || is_reserved {
            return Owner::Us;
        }
        let is_judged =
            evidence.so_far.is_some_and(|(so_far, asked)| so_far.node == *node && asked.foreign.contains(&lease.key));
        let address = public.v4.or(public.v6);
        if is_judged || local.iter().any(|(_, local)| Some(*local) == address) {
            return Owner::Another;
        }
        if self.before != uplink.addrs || evidence.so_far.is_some_and(|(_, asked)| macs(&asked.attrs) != found) {
            return Owner::Holder;
        }
        let is_known = !ours.is_empty() || all_compatible(config, &evidence.former);
        if is_known { Owner::Another } else { Owner::Us }
    }

    /// Returns the one of `ours` to keep: one with the subnets that `subnet.env` names or that the devices have, else
    /// one whose attributes are those that this node would publish, else the first, as Go flannel does. If the devices
    /// are gone, the others may belong to nodes that publish the same address.
    pub(crate) fn likeliest(&self, backend: &dyn Backend, ours: Vec<Lease>, evidence: &Evidence<'_>) -> Option<Lease> {
        if ours.len() < 2 {
            return ours.into_iter().next();
        }
        let left = self.left_subnets();
        let published = backend.advertise(&self.context).ok();
        let place = ours
            .iter()
            .position(|lease| lease.subnets == evidence.former || lease.subnets == left)
            .or_else(|| ours.iter().position(|lease| published.as_ref() == Some(&lease.attrs)));
        ours.into_iter().nth(place.unwrap_or(0))
    }

    /// Returns the subnets whose addresses are on the devices that the last run left.
    pub(crate) fn left_subnets(&self) -> Dual<Prefix> {
        let mut subnets = Dual::default();
        for (family, network) in self.context.config.networks.iter() {
            let Some(pool) = &network.pool else { continue };
            let inside = |addr: &&IpAddr| network.prefix.contains(**addr);
            let addr = self.left.addrs.iter().find(inside);
            *subnets.slot(family) = addr.and_then(|addr| Prefix::masked(*addr, pool.len).ok());
        }
        subnets
    }
}

/// The devices that the backend will want, as far as known before there is a lease.
fn devices(backend: &dyn Backend, context: &NodeContext) -> Vec<Device> {
    let Ok(attrs) = backend.advertise(context) else { return Vec::new() };
    backend.devices(&expected(context, &Want::new(attrs)))
}

/// The node with its lease as far as known before it is acquired: enough to determine the devices.
pub(crate) fn expected(context: &NodeContext, want: &Want) -> LocalNode {
    let lease = Lease::new(LeaseKey::new(context.node.as_str()), want.preferred, want.attrs.clone());
    LocalNode { lease: Arc::new(lease), context: context.clone() }
}

/// What the devices of the last run show.
#[derive(Debug, Clone, Default)]
pub(crate) struct Left {
    /// Their local addresses: those that were published, or the interface's behind a NAT.
    pub(crate) local: Dual<IpAddr>,
    macs: Vec<MacAddr>,
    /// The addresses on them: the first of each subnet.
    addrs: Vec<IpAddr>,
}

impl Left {
    /// Reads the devices with the overlay's mark, and those of another agent under the name of one of `devices`.
    pub(crate) fn find(overlay: &OverlayName, host: &HostFacts, devices: &[Device]) -> Self {
        let is_left = |link: &HostLink| {
            overlay.owns(link.group, link.alias.as_deref()) || devices.iter().any(|device| device.name == link.name)
        };
        let mut left = Self::default();
        for (index, link) in host.links.iter().filter(|(_, link)| is_left(link)) {
            let LinkKind::Vxlan(vxlan) = &link.kind else { continue };
            if let Some(addr) = vxlan.local {
                *left.local.slot(Family::of(addr)) = Some(addr);
            }
            left.macs.extend(link.mac);
            left.addrs.extend(host.addresses.iter().filter(|it| it.link == *index).map(|it| it.addr));
        }
        left
    }
}

/// This node's identity in the store.
pub(crate) fn identity(settings: &Settings, public: &Dual<IpAddr>) -> NodeIdentity {
    settings.node.clone().unwrap_or_else(|| {
        // `select` gives an address to each family in use, of which there is at least one.
        NodeIdentity::of_address(public.v4.or(public.v6).unwrap_or(Ipv4Addr::UNSPECIFIED.into()))
    })
}

/// The context on a changed host, where other nodes publish `others`.
pub(crate) fn context(
    settings: &Settings,
    old: &NodeContext,
    host: Arc<HostFacts>,
    others: &BTreeSet<IpAddr>,
) -> Result<NodeContext, UplinkError> {
    let in_use = InUse { link: Some(old.uplink.index), addrs: old.uplink.addrs, others };
    let Choice { uplink, public, .. } = choose(settings, &old.config, &host, in_use)?;
    // A store that identifies nodes by address has to be asked by the published address.
    let node = identity(settings, &public);
    Ok(NodeContext { node, uplink, public, host, ..old.clone() })
}

pub(crate) fn choose(
    settings: &Settings,
    config: &NetworkConfig,
    host: &HostFacts,
    in_use: InUse<'_>,
) -> Result<Choice, UplinkError> {
    let families: Vec<Family> = config.networks.families().collect();
    let public = settings.public_override();
    let find = |wanted| uplink::select(Request { wanted, families: &families, public: &public }, host, in_use);
    // If the program selects nothing, an address that an operator set in the store selects the interface that has it,
    // if there is one.
    let set = settings.store_public.v4.or(settings.store_public.v6).map(Select::Ip);
    match set.filter(|_| settings.uplink == Select::DefaultRoute) {
        Some(wanted) => find(&wanted).or_else(|_| find(&settings.uplink)),
        None => find(&settings.uplink),
    }
}

/// Why the uplink cannot carry packets now, if it cannot.
pub(crate) fn uplink_trouble(NodeContext { uplink, host, .. }: &NodeContext) -> Option<String> {
    let link = host.links.get(&uplink.index)?;
    match (link.up, link.carrier) {
        (false, _) => Some(format!("{0} is down: ip link set {0} up", uplink.name)),
        (true, false) => Some(format!("{} has no carrier: check its cable or its lower device", uplink.name)),
        (true, true) => None,
    }
}

/// The part of the kernel state that is read and written.
pub(crate) fn scope(settings: &Settings, backend: &dyn Backend, local: &LocalNode) -> Scope {
    local.scope(backend, &settings.slots)
}

/// The MTU for pods.
pub(crate) fn pod_mtu(backend: &dyn Backend, context: &NodeContext) -> Mtu {
    backend.mtu(context).unwrap_or(context.uplink.mtu)
}

/// An admission without records.
pub(crate) fn admission(backend: Arc<dyn Backend>, settings: &Settings, local: &LocalNode) -> Admission {
    let rules = Rules::new(&local.context.config, backend);
    let host = host(settings, local, &rules);
    Admission::new(rules, host)
}

/// This node, as the rules of admission need it.
pub(crate) fn host(settings: &Settings, local: &LocalNode, rules: &Rules) -> HostView {
    let NodeContext { host, overlay, public, .. } = &local.context;
    let mut own = Own::new(&local.lease, rules);
    own.public = *public;
    HostView::new(host, overlay, settings.store_addresses.iter().copied().collect(), own)
}

/// The content of `subnet.env`.
pub(crate) fn subnet_env(backend: &dyn Backend, local: &LocalNode, masquerade: Masquerade) -> SubnetEnv {
    SubnetEnv {
        networks: local.context.networks(),
        subnets: local.lease.subnets,
        mtu: Some(pod_mtu(backend, &local.context)),
        ip_masq: Some(match masquerade {
            Masquerade::Agent => true,
            Masquerade::Plugin => false,
        }),
    }
}
