//! What the agent makes of host and settings: pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;

use crate::admit::{Admission, HostView, Own, Rules};
use crate::backend::{Backend, Local, Situation, Uplink};
use crate::clock::BootTime;
use crate::config::NetworkConfig;
use crate::kernel::{Device, HostFacts, HostLink, OverlayName};
use crate::lease::{Fence, Lease, LeaseKey};
use crate::net::{Dual, Family, MacAddr, Mtu, Prefix};
use crate::overlay::{Identity, Masquerade, Settings, places};
use crate::state::LinkKind;
use crate::subnet::{NodeIdentity, Want};
use crate::subnet_env::SubnetEnv;
use crate::uplink::{self, Choice, Explanation, InUse, Request, UplinkError};

/// How long another interface or address has to be the one to choose before it is used: longer than a network manager or
/// a DHCP client takes to put back what it removed.
pub(crate) const SETTLE: Duration = Duration::from_secs(3);

/// A change of addresses that waits until it has stood for [`SETTLE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Settling {
    to: Dual<IpAddr>,
    pub(crate) until: BootTime,
}

impl Settling {
    /// What becomes of `waiting` now that `to` is found in the place of `from`; `None`: it may be used.
    pub(crate) fn of(waiting: Option<Self>, from: &Dual<IpAddr>, to: &Dual<IpAddr>, now: BootTime) -> Option<Self> {
        let settling = match waiting {
            Some(waiting) if waiting.to == *to => waiting,
            _ => Self { to: *to, until: now.after(SETTLE) },
        };
        Some(settling).filter(|settling| from != to && settling.until > now)
    }
}

/// The situation at start, and why its uplink was chosen. What this start used before counts first, then what the last
/// run used: it is what other nodes send to, and where the store goes by addresses it is this node's lease.
pub(crate) fn first_situation(
    settings: &Settings,
    config: Arc<NetworkConfig>,
    host: Arc<HostFacts>,
    backend: &dyn Backend,
    before: Option<&Uplink>,
    others: &BTreeSet<IpAddr>,
) -> Result<First, UplinkError> {
    let with = |choice: Choice| {
        let node = identity(settings, &choice.public);
        let (overlay, config, host) = (settings.name.clone(), Arc::clone(&config), Arc::clone(&host));
        let Choice { uplink, public, explanation } = choice;
        let taken = BTreeSet::new();
        (Situation { overlay, config, node, uplink, public, host, previous: None, taken }, explanation)
    };
    let (situation, _) = with(choose(settings, &config, &host, InUse::NOTHING)?);
    let devices = devices(backend, &situation);
    let left: Vec<&HostLink> = left(&settings.name, &host, &devices).collect();
    let (link, addrs) = match before {
        Some(before) => (Some(before.index), before.addrs),
        None => (None, local_addresses(&left)),
    };
    let macs = left.iter().filter_map(|link| link.mac).collect();
    let (situation, explanation) = with(choose(settings, &config, &host, InUse { link, addrs, others })?);
    let before = situation.uplink.addrs.map(|family, addr| addrs.get(family).copied().unwrap_or(*addr));
    Ok(First { situation, explanation, before, macs })
}

/// What a start finds.
#[derive(Debug, Clone)]
pub(crate) struct First {
    pub(crate) situation: Situation,
    pub(crate) explanation: Explanation,
    /// The local addresses that were used before, as far as that can be told, else those found.
    pub(crate) before: Dual<IpAddr>,
    /// The Ethernet addresses of the devices that the last run left.
    macs: Vec<MacAddr>,
}

impl First {
    /// Whether a lease that was found by this node's address is another node's: the address is new here, and the lease
    /// names no device of ours.
    pub(crate) fn is_others(&self, backend: &dyn Backend, lease: &Lease) -> bool {
        let mut macs =
            lease.subnets.families().filter_map(|family| backend.hardware_address(&lease.attrs, family).ok()?);
        self.before != self.situation.uplink.addrs && !macs.any(|mac| self.macs.contains(&mac))
    }
}

/// The devices that the backend would want, as far as they are known before there is a lease.
fn devices(backend: &dyn Backend, situation: &Situation) -> Vec<Device> {
    let Ok(attrs) = backend.advertise(situation) else { return Vec::new() };
    backend.scope(&expected(situation, &Want { attrs, preferred: Dual::default() })).devices
}

/// The lease as far as it is known before it is taken: enough to tell which devices there will be.
pub(crate) fn expected(situation: &Situation, want: &Want) -> Local {
    let lease = Lease {
        key: LeaseKey::new(situation.node.as_str()),
        subnets: want.preferred,
        attrs: want.attrs.clone(),
        expires: None,
        fence: Fence::default(),
    };
    Local { lease: Arc::new(lease), situation: situation.clone() }
}

/// The devices that the last run left: those with our mark, and those under the name of one of `devices`, which another
/// agent made.
fn left<'a>(
    overlay: &'a OverlayName,
    host: &'a HostFacts,
    devices: &'a [Device],
) -> impl Iterator<Item = &'a HostLink> {
    host.links.values().filter(|link| {
        overlay.owns(link.group, link.alias.as_deref()) || devices.iter().any(|device| device.name == link.name)
    })
}

/// The local addresses of devices.
fn local_addresses(links: &[&HostLink]) -> Dual<IpAddr> {
    let local = |link: &&HostLink| match &link.kind {
        LinkKind::Vxlan(vxlan) => vxlan.local,
        LinkKind::DataPlane | LinkKind::Other(_) => None,
    };
    let mut addrs = Dual::default();
    for addr in links.iter().filter_map(local) {
        *addrs.slot(Family::of(addr)) = Some(addr);
    }
    addrs
}

/// The local addresses of the devices of ours that the last run left.
pub(crate) fn last_addresses(overlay: &OverlayName, host: &HostFacts) -> Dual<IpAddr> {
    local_addresses(&left(overlay, host, &[]).collect::<Vec<_>>())
}

/// Who this node is to the store.
pub(crate) fn identity(settings: &Settings, public: &Dual<IpAddr>) -> NodeIdentity {
    match &settings.identity {
        Identity::Named(node) => node.clone(),
        // `select` gives an address to each family in use, of which there is at least one.
        Identity::PublicIp => NodeIdentity::of_address(public.v4.or(public.v6).unwrap_or(Ipv4Addr::UNSPECIFIED.into())),
    }
}

/// The situation on a host that has changed, where other nodes publish `others`.
pub(crate) fn situation(
    settings: &Settings,
    old: &Situation,
    host: Arc<HostFacts>,
    others: &BTreeSet<IpAddr>,
) -> Result<Situation, UplinkError> {
    let in_use = InUse { link: Some(old.uplink.index), addrs: old.uplink.addrs, others };
    let Choice { uplink, public, .. } = choose(settings, &old.config, &host, in_use)?;
    // A store that knows us by our address has to be asked by the one that we publish.
    let node = identity(settings, &public);
    Ok(Situation { node, uplink, public, host, ..old.clone() })
}

pub(crate) fn choose(
    settings: &Settings,
    config: &NetworkConfig,
    host: &HostFacts,
    in_use: InUse<'_>,
) -> Result<Choice, UplinkError> {
    let families: Vec<Family> = config.networks.families().collect();
    let request = Request { wanted: &settings.uplink, families: &families, public: &settings.public };
    uplink::select(request, host, in_use)
}

/// The MTU for pods.
pub(crate) fn pod_mtu(backend: &dyn Backend, situation: &Situation) -> Mtu {
    backend.mtu(situation).unwrap_or(situation.uplink.mtu)
}

/// An admission without records.
pub(crate) fn admission(backend: Arc<dyn Backend>, settings: &Settings, local: &Local) -> Admission {
    let rules = Rules::new(&local.situation.config, backend);
    let host = host(settings, local, &rules);
    Admission::new(rules, host)
}

/// What admission has to know of this node.
pub(crate) fn host(settings: &Settings, local: &Local, rules: &Rules) -> HostView {
    let Situation { host, overlay, public, .. } = &local.situation;
    let mut own = Own::new(&local.lease, rules);
    own.public = *public;
    HostView::new(host, overlay, settings.store_addresses.iter().copied().collect(), own)
}

/// The subnets that `subnet.env` names: pods on this host still use them.
pub(crate) fn former_subnets(settings: &Settings) -> Dual<Prefix> {
    let file = settings.subnet_env.as_ref().and_then(|file| SubnetEnv::read(&file.path).ok().flatten());
    file.map(|env| env.subnets).unwrap_or_default()
}

/// The networks of former runs, of this agent or another, as far as `subnet.env` and what is beside it tell.
pub(crate) fn former_networks(settings: &Settings) -> Vec<Dual<Prefix>> {
    settings.subnet_env.as_ref().map(|file| places::known(&file.path)).unwrap_or_default()
}

/// What `subnet.env` has to say.
pub(crate) fn subnet_env(backend: &dyn Backend, local: &Local, masquerade: Masquerade) -> SubnetEnv {
    SubnetEnv {
        networks: local.situation.networks(),
        subnets: local.lease.subnets,
        mtu: Some(pod_mtu(backend, &local.situation)),
        ip_masq: Some(match masquerade {
            Masquerade::Agent => true,
            Masquerade::Plugin => false,
        }),
    }
}
