//! What the agent makes of host and settings: pure.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use crate::admit::{Admission, HostView, Own, Rules};
use crate::backend::{Backend, Local, Situation};
use crate::config::NetworkConfig;
use crate::kernel::{Device, HostFacts, HostLink, OverlayName};
use crate::lease::{Fence, Lease, LeaseKey};
use crate::net::{Dual, Family, Mtu, Prefix};
use crate::overlay::{Identity, Masquerade, Settings, places};
use crate::state::LinkKind;
use crate::subnet::{NodeIdentity, Want};
use crate::subnet_env::SubnetEnv;
use crate::uplink::{self, Choice, Explanation, InUse, Request, UplinkError};

/// The situation at start, and why its uplink was chosen. Of several addresses of the uplink the one that the last run
/// used is used again: it is what other nodes send to, and where the store goes by addresses it is this node's lease.
pub(crate) fn first_situation(
    settings: &Settings,
    config: Arc<NetworkConfig>,
    host: Arc<HostFacts>,
    backend: &dyn Backend,
) -> Result<(Situation, Explanation), UplinkError> {
    let with = |choice: Choice| {
        let node = identity(settings, &choice.public);
        let (overlay, config, host) = (settings.name.clone(), Arc::clone(&config), Arc::clone(&host));
        let Choice { uplink, public, explanation } = choice;
        (Situation { overlay, config, node, uplink, public, host, previous: None, taken: BTreeSet::new() }, explanation)
    };
    let (situation, explanation) = with(choose(settings, &config, &host, InUse::NOTHING)?);
    let devices = devices(backend, &situation);
    let addrs = last_addresses(&settings.name, &host, &devices);
    if addrs == Dual::default() {
        return Ok((situation, explanation));
    }
    Ok(with(choose(settings, &config, &host, InUse { addrs, ..InUse::NOTHING })?))
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

/// The local addresses of the devices that the last run left: those with our mark, and those under the name of one of
/// `devices`, which another agent made.
pub(crate) fn last_addresses(overlay: &OverlayName, host: &HostFacts, devices: &[Device]) -> Dual<IpAddr> {
    let left = |link: &&HostLink| {
        overlay.owns(link.group, link.alias.as_deref()) || devices.iter().any(|device| device.name == link.name)
    };
    let local = |link: &HostLink| match &link.kind {
        LinkKind::Vxlan(vxlan) => vxlan.local,
        LinkKind::DataPlane | LinkKind::Other(_) => None,
    };
    let mut addrs = Dual::default();
    for addr in host.links.values().filter(left).filter_map(local) {
        *addrs.slot(Family::of(addr)) = Some(addr);
    }
    addrs
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
