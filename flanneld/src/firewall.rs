//! The firewall's rules: which tool writes them, and which port is guarded.

use std::sync::Arc;

use flannel_backend_vxlan::Vxlan;
use flannel_core::config::NetworkConfig;
use flannel_core::firewall::{Firewall, FirewallError, Rules};
use flannel_core::firewall_keeper::{KeepOptions, RulesState, keep};
use flannel_core::kernel::OverlayName;
use flannel_core::net::Dual;
use flannel_core::overlay::Handle;
use flannel_firewall_iptables::Iptables;
use flannel_firewall_nft::Nft;
use tokio::sync::watch;

use crate::assemble::vxlan;
use crate::options::{FirewallOptions, Options, PortGuard};

/// Maintains the firewall's rules.
pub(crate) struct Keeper {
    pub(crate) options: FirewallOptions,
    pub(crate) handle: Handle,
    pub(crate) state: watch::Sender<RulesState>,
}

impl Keeper {
    /// Keeps the rules as wanted until the agent ends, with the tool that the network configuration selects. Removes
    /// rules that a former run made with the other tool.
    ///
    /// Returns an error only if a retry cannot help: the tool or the privilege is missing, and pods would be without
    /// masquerading or guard.
    pub(crate) async fn keep(self) -> Result<(), FirewallError> {
        let Self { options, handle, state } = self;
        let Ok(status) = handle.wait_for(|status| status.network.is_some()).await else { return Ok(()) };
        let Some(config) = status.network.clone() else { return Ok(()) };
        let [nft, iptables] = all()?;
        let (tool, other) = if config.enable_nftables { (nft, iptables) } else { (iptables, nft) };
        let mut keeping = KeepOptions::default();
        keeping.masquerade = options.masquerade;
        keeping.forward = options.forward;
        keeping.guarded_port = guarded_port(options.guard, &config);
        keeping.check_every = options.resync;
        keeping.former = Some(other);
        keeping.on_state = Arc::new(move |new| drop(state.send_replace(new)));
        keep(&handle, &*tool, keeping).await
    }
}

/// Checks that the tool of this configuration is installed.
pub(crate) fn check_tool(config: &NetworkConfig) -> Result<(), FirewallError> {
    if config.enable_nftables { Nft::check_program() } else { Iptables::check_programs(config.networks.families()) }
}

/// Runs the tool of this configuration, which only reads.
pub(crate) async fn try_tool(options: &Options, config: &NetworkConfig) -> Result<(), FirewallError> {
    check_tool(config)?;
    let networks = config.networks.map(|_, network| network.prefix);
    // The rules themselves do not matter; the own subnet may be unknown.
    let mut rules = Rules::new(options.overlay.clone(), &networks, &networks);
    rules.masquerade = options.firewall.masquerade;
    rules.forward = options.firewall.forward;
    let [nft, iptables] = all()?;
    let tool = if config.enable_nftables { nft } else { iptables };
    tool.check(&rules).await.map(drop)
}

/// Returns the port that only peers may send to, if this configuration has one.
fn guarded_port(guard: PortGuard, config: &NetworkConfig) -> Option<u16> {
    if guard != PortGuard::Peers || config.backend.kind != Vxlan::TYPE {
        return None;
    }
    vxlan(config, guard).ok()?.config().port
}

/// Removes the rules of both tools. A tool that is not installed has none.
pub(crate) async fn remove(overlay: &OverlayName) -> Result<(), FirewallError> {
    let mut first = Ok(());
    for tool in all()? {
        match tool.remove(overlay).await {
            Ok(()) | Err(FirewallError::Unsupported { .. }) => {}
            Err(error) => first = first.and(Err(error)),
        }
    }
    first
}

/// Returns the number of rules of both tools. A tool that is not installed has none.
pub(crate) async fn present(overlay: &OverlayName) -> Result<usize, FirewallError> {
    let none = Rules::new(overlay.clone(), &Dual::default(), &Dual::default());
    let mut count = 0;
    for tool in all()? {
        count += match tool.check(&none).await {
            Ok(drift) => drift.len(),
            Err(FirewallError::Unsupported { .. }) => 0,
            Err(error) => return Err(error),
        };
    }
    Ok(count)
}

/// Returns nftables and iptables of this network namespace.
fn all() -> Result<[Arc<dyn Firewall>; 2], FirewallError> {
    Ok([Arc::new(Nft::new()?), Arc::new(Iptables::new()?)])
}
