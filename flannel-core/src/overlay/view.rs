//! What the agent makes of host and settings: pure.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;

use crate::admit::{Admission, HostView, Own, Rules};
use crate::backend::{Backend, Local, Situation};
use crate::config::NetworkConfig;
use crate::kernel::HostFacts;
use crate::net::{Dual, Family, Mtu, Prefix};
use crate::overlay::{Identity, Masquerade, Settings, places};
use crate::subnet::NodeIdentity;
use crate::subnet_env::SubnetEnv;
use crate::uplink::{self, Choice, UplinkError};

/// The situation at start.
pub(crate) fn first_situation(
    settings: &Settings,
    config: Arc<NetworkConfig>,
    host: Arc<HostFacts>,
) -> Result<Situation, UplinkError> {
    let Choice { uplink, public, explanation } = choose(settings, &config, &host)?;
    tracing::info!(uplink = uplink.name.as_str(), %explanation, "uplink chosen");
    let node = identity(settings, &public);
    Ok(Situation { overlay: settings.name.clone(), config, node, uplink, public, host, previous: None })
}

/// Who this node is to the store.
pub(crate) fn identity(settings: &Settings, public: &Dual<IpAddr>) -> NodeIdentity {
    match &settings.identity {
        Identity::Named(node) => node.clone(),
        // `select` gives an address to each family in use, of which there is at least one.
        Identity::PublicIp => NodeIdentity::of_address(public.v4.or(public.v6).unwrap_or(Ipv4Addr::UNSPECIFIED.into())),
    }
}

/// The situation on a host that has changed.
pub(crate) fn situation(settings: &Settings, old: &Situation, host: Arc<HostFacts>) -> Result<Situation, UplinkError> {
    let Choice { uplink, public, .. } = choose(settings, &old.config, &host)?;
    // A store that knows us by our address has to be asked by the one that we publish.
    let node = identity(settings, &public);
    Ok(Situation { node, uplink, public, host, ..old.clone() })
}

pub(crate) fn choose(settings: &Settings, config: &NetworkConfig, host: &HostFacts) -> Result<Choice, UplinkError> {
    let families: Vec<Family> = config.networks.families().collect();
    uplink::select(&settings.uplink, host, &families, &settings.public)
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
