//! The firewall's rules: applied once the lease is known, looked at every few seconds, changed with lease and peers.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use flannel_backend_vxlan::Vxlan;
use flannel_core::config::NetworkConfig;
use flannel_core::firewall::{Firewall, FirewallError, Rules, VxlanGuard};
use flannel_core::kernel::OverlayName;
use flannel_core::lease::Lease;
use flannel_core::overlay::{Handle, WithheldBecause};
use flannel_core::subnet::SubnetManager;
use flannel_firewall_iptables::Iptables;
use flannel_firewall_nft::Nft;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::backoff::Backoff;
use crate::chain;
use crate::options::{FirewallOptions, Guard};

/// The kernel's VXLAN port where none is configured.
const VXLAN_PORT: u16 = 8472;
/// Peers that come within this time make one change of the guard.
const GATHER: Duration = Duration::from_millis(100);
/// The longest wait between two tries.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often drift is told at most.
const TELL_EVERY: Duration = Duration::from_secs(60);

/// Whether the rules are as wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Rulebook {
    /// Not yet.
    Pending,
    /// They are, or none are wanted.
    InPlace,
    /// They could not be written, and masquerading or the guard needs them.
    Failed(String),
    /// The forward rules, which few hosts need, could not be written: no reason to keep pods away.
    Lacking(String),
}

impl Rulebook {
    /// Whether pods may be attached as far as the rules go.
    pub(crate) fn lets_be_ready(&self) -> bool {
        match self {
            Self::InPlace | Self::Lacking(_) => true,
            Self::Pending | Self::Failed(_) => false,
        }
    }
}

/// What the rules are made from.
pub(crate) struct Keeper {
    pub(crate) overlay: OverlayName,
    pub(crate) options: FirewallOptions,
    pub(crate) handle: Handle,
    pub(crate) subnets: Arc<dyn SubnetManager>,
    pub(crate) state: watch::Sender<Rulebook>,
}

impl Keeper {
    /// Keeps the rules as wanted until the agent ends.
    ///
    /// Returns an error only for what cannot pass: no tool or no privilege, where pods would be without masquerade or
    /// guard.
    pub(crate) async fn keep(self) -> Result<(), FirewallError> {
        let mut handle = self.handle.clone();
        // Nothing is known of the network before there is a lease; afterwards the store has it for sure.
        if handle.wait_for(|status| status.lease.is_some()).await.is_err() {
            return Ok(());
        }
        let config = self.config().await;
        let [nft, iptables] = all()?;
        let (tool, other) = if config.enable_nftables { (nft, iptables) } else { (iptables, nft) };
        let formerly = self.formerly_admitted(&*tool).await;
        let mut admitted = Admitted { so_far: formerly.clone(), formerly };
        let mut leftovers = Leftovers::default();
        let mut applied: Option<Rules> = None;
        let mut told = None;
        let mut drifts = Drifts::default();
        loop {
            // Lost: what is there stays until there is another lease.
            let lease = handle.status().lease.clone();
            let wanted = match lease {
                Some(lease) => self.rules(&config, &lease, &admitted).await,
                None => applied.clone(),
            };
            let first = applied.is_none();
            let outcome = match wanted {
                Some(rules) => assure(&*tool, rules, &mut applied, &mut drifts).await,
                None => Ok(()),
            };
            let wait = match outcome {
                Ok(()) => {
                    told = None;
                    if let Some(guard) = applied.as_ref().and_then(|rules| rules.guard.as_ref()) {
                        admitted.so_far.clone_from(&guard.peers);
                    }
                    if applied.is_some() {
                        leftovers.clear(&*other, &self.overlay).await;
                        self.state.send_replace(Rulebook::InPlace);
                    }
                    self.options.resync
                }
                Err(error) => {
                    let text = chain(&error);
                    if told.as_ref() != Some(&text) {
                        tracing::warn!(error = text, "the firewall's rules are not as wanted");
                        told = Some(text.clone());
                    }
                    let needed = self.options.masquerade.is_some() || self.options.guard == Guard::Peers;
                    if needed && first && is_final(&error) {
                        return Err(error);
                    }
                    self.state.send_replace(if needed { Rulebook::Failed(text) } else { Rulebook::Lacking(text) });
                    self.options.resync.min(PATIENCE)
                }
            };
            let resync = Instant::now() + wait;
            // The status changes with every round, so with every change of lease or peers.
            while let Ok(changed) = timeout_at(resync, handle.changed()).await {
                if changed.is_err() {
                    return Ok(());
                }
                // The very first rules are waited for; what was refused is not tried at every change.
                if applied.is_some() || told.is_some() {
                    sleep(GATHER).await;
                }
                let lease = handle.status().lease.clone();
                let Some(lease) = lease else { continue };
                let wanted = self.rules(&config, &lease, &admitted).await;
                if wanted.is_some() && wanted != applied {
                    break;
                }
            }
        }
    }

    async fn config(&self) -> NetworkConfig {
        let mut backoff = Backoff::default();
        loop {
            match self.subnets.network_config().await {
                Ok(config) => return config,
                Err(error) => {
                    tracing::debug!(error = chain(&error), "the firewall waits for the network's configuration");
                    sleep(backoff.wait()).await;
                }
            }
        }
    }

    async fn formerly_admitted(&self, tool: &dyn Firewall) -> BTreeSet<IpAddr> {
        if self.options.guard != Guard::Peers {
            return BTreeSet::new();
        }
        loop {
            match tool.let_in(&self.overlay).await {
                Ok(peers) => return peers,
                // Writing fails as well, and says so.
                Err(error) if is_final(&error) => return BTreeSet::new(),
                Err(error) => {
                    tracing::debug!(error = chain(&error), "the guard's peers cannot be read yet");
                    sleep(Duration::from_secs(1)).await;
                }
            }
        }
    }

    /// The rules for this lease. `None`: what is there stays, since a guard needs the peers and nobody knows them yet,
    /// nor whose routes stay although they are none.
    async fn rules(&self, config: &NetworkConfig, lease: &Lease, admitted: &Admitted) -> Option<Rules> {
        let networks = config.networks.map(|_, network| network.prefix);
        let mut rules = Rules::new(self.overlay.clone(), &networks, &lease.subnets);
        rules.masquerade = self.options.masquerade;
        rules.forward = self.options.forward;
        rules.guard = match (self.options.guard, Vxlan::new(config)) {
            (Guard::Peers, Ok(vxlan)) if config.backend.kind == Vxlan::TYPE => {
                let peers = match self.handle.peers().await {
                    Ok(peers) => peers,
                    Err(error) => {
                        tracing::debug!(error = chain(&error), "the guard waits for the peers");
                        return None;
                    }
                };
                let peers = peers.iter().flat_map(|peer| peer.attrs.public_ip.iter().map(|(_, addr)| *addr)).collect();
                // Read after the peers: whoever is missing among them is withheld by then.
                let status = self.handle.status();
                if status.audits == 0 {
                    // The first look at the kernel tells whose routes a former run left.
                    return None;
                }
                let withheld = status.withheld.values().copied().collect::<Vec<_>>();
                let peers = admitted.with(peers, &withheld);
                Some(VxlanGuard { port: vxlan.config().port.unwrap_or(VXLAN_PORT), peers })
            }
            _ => None,
        };
        Some(rules)
    }
}

/// Whom the guard has let in.
#[derive(Debug, Default)]
struct Admitted {
    /// By a former run, as the kernel had it at the start.
    formerly: BTreeSet<IpAddr>,
    /// Up to now.
    so_far: BTreeSet<IpAddr>,
}

impl Admitted {
    /// Whom it lets in from now on. Where the agent keeps the routes to peers that are none any more, they are let in
    /// too: their routes are of no use otherwise.
    fn with(&self, mut peers: BTreeSet<IpAddr>, withheld: &[WithheldBecause]) -> BTreeSet<IpAddr> {
        let waits = |because: &WithheldBecause| {
            matches!(because, WithheldBecause::MassRemoval(_) | WithheldBecause::Unconfirmed)
        };
        if withheld.iter().any(waits) {
            peers.extend(&self.so_far);
        } else if withheld.contains(&WithheldBecause::BadRecord) {
            // May last for ever. Whoever went bad during this run is a peer by its last good record.
            peers.extend(&self.formerly);
        }
        peers
    }
}

/// Removes the rules of both tools; a tool that is not there has none.
pub(crate) async fn remove(overlay: &OverlayName) -> Result<(), FirewallError> {
    let mut outcome = Ok(());
    for tool in all()? {
        match tool.remove(overlay).await {
            Ok(()) | Err(FirewallError::Unsupported { .. }) => {}
            Err(error) => outcome = Err(error),
        }
    }
    outcome
}

/// Writes the rules if they differ from those written before, or from what the kernel has.
async fn assure(
    tool: &dyn Firewall,
    rules: Rules,
    applied: &mut Option<Rules>,
    drifts: &mut Drifts,
) -> Result<(), FirewallError> {
    if applied.as_ref() == Some(&rules) {
        let drift = tool.check(&rules).await?;
        if drift.is_empty() {
            return Ok(());
        }
        let drift: Vec<_> = drift.iter().map(ToString::to_string).collect();
        if let Some(unsaid) = drifts.met(Instant::now()) {
            tracing::info!(drift = drift.join(", "), unsaid, "writing the firewall's rules again");
        }
    }
    tool.apply(&rules).await?;
    *applied = Some(rules);
    Ok(())
}

/// How often others changed the rules. Who fights over them does so every few seconds, for ever.
#[derive(Debug, Default)]
struct Drifts {
    told: Option<Instant>,
    unsaid: u64,
}

impl Drifts {
    /// Takes one in. When it is to be told, how many were not.
    fn met(&mut self, now: Instant) -> Option<u64> {
        if self.told.is_some_and(|told| now < told + TELL_EVERY) {
            self.unsaid += 1;
            return None;
        }
        self.told = Some(now);
        Some(std::mem::take(&mut self.unsaid))
    }
}

/// nftables and iptables of this network namespace.
fn all() -> Result<[Box<dyn Firewall>; 2], FirewallError> {
    Ok([Box::new(Nft::new()?), Box::new(Iptables::new()?)])
}

/// What the other tool left of a former run. It goes once ours is in place; what could not be removed is tried again
/// with every look at the rules.
#[derive(Debug, Default)]
struct Leftovers {
    cleared: bool,
    told: Option<String>,
}

impl Leftovers {
    async fn clear(&mut self, other: &dyn Firewall, overlay: &OverlayName) {
        if self.cleared {
            return;
        }
        match other.remove(overlay).await {
            Ok(()) | Err(FirewallError::Unsupported { .. }) => self.cleared = true,
            Err(error) => {
                let text = chain(&error);
                if self.told.as_ref() != Some(&text) {
                    tracing::warn!(error = text, "rules of the other packet filter were not removed: trying again");
                    self.told = Some(text);
                }
            }
        }
    }
}

fn is_final(error: &FirewallError) -> bool {
    matches!(error, FirewallError::Unsupported { .. } | FirewallError::Denied { .. } | FirewallError::Stopped)
}

#[cfg(test)]
mod tests {
    use flannel_core::clock::BootTime;

    use super::*;

    #[test]
    fn drift_that_goes_on_is_told_once_a_minute() {
        let (mut drifts, start) = (Drifts::default(), Instant::now());
        let told: Vec<_> = (0..30).filter_map(|nth| drifts.met(start + nth * Duration::from_secs(5))).collect();
        assert_eq!(told, [0, 11, 11]);
    }

    #[test]
    fn peers_that_were_let_in_stay_so_while_their_going_waits_for_a_second_look() {
        let set = |last: &[u8]| last.iter().map(|last| IpAddr::from([192, 0, 2, *last])).collect::<BTreeSet<_>>();
        let admitted = Admitted { formerly: set(&[1, 9]), so_far: set(&[1, 2]) };
        let with = |withheld: &[WithheldBecause]| admitted.with(set(&[3]), withheld);
        assert_eq!(with(&[WithheldBecause::MassRemoval(BootTime::default())]), set(&[1, 2, 3]));
        assert_eq!(with(&[WithheldBecause::Unconfirmed]), set(&[1, 2, 3]));
        assert_eq!(with(&[WithheldBecause::BadRecord]), set(&[1, 3, 9]));
        assert_eq!(with(&[]), set(&[3]));
    }
}
