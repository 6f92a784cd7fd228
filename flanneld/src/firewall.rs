//! The firewall's rules: applied once the lease is known, looked at every few seconds, changed with lease and peers.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use flannel_backend_vxlan::Vxlan;
use flannel_core::backoff::Backoff;
use flannel_core::config::NetworkConfig;
use flannel_core::firewall::{Firewall, FirewallError, Rules, VxlanGuard};
use flannel_core::kernel::{Op, OverlayName};
use flannel_core::lease::Lease;
use flannel_core::net::Prefix;
use flannel_core::overlay::{Handle, Held, HeldBecause, WithheldBecause};
use flannel_firewall_iptables::Iptables;
use flannel_firewall_nft::Nft;
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout_at};

use crate::chain;
use crate::options::{FirewallOptions, PortGuard};

/// The kernel's VXLAN port where none is configured.
const VXLAN_PORT: u16 = 8472;
/// Peers that come within this time make one change of the guard.
const GATHER: Duration = Duration::from_millis(100);
/// The longest wait between two tries.
const PATIENCE: Duration = Duration::from_secs(5);
/// How often reading the guard of a former run is tried: within about 16 s, then the rules are written without it.
const READS: u32 = 5;
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
    pub(crate) state: watch::Sender<Rulebook>,
}

impl Keeper {
    /// Keeps the rules as wanted until the agent ends.
    ///
    /// Returns an error only where a retry cannot help: the tool or the privilege is missing, and pods would be without
    /// masquerading or guard.
    pub(crate) async fn keep(self) -> Result<(), FirewallError> {
        let mut handle = self.handle.clone();
        // Nothing is known of the network before there is a lease.
        let Ok(status) = handle.wait_for(|status| status.network.is_some()).await else { return Ok(()) };
        let Some(config) = status.network.clone() else { return Ok(()) };
        let [nft, iptables] = all()?;
        let (tool, other) = if config.enable_nftables { (nft, iptables) } else { (iptables, nft) };
        let formerly = match self.options.guard {
            PortGuard::Peers => formerly_admitted(&*tool, &self.overlay, &self.state).await,
            _ => BTreeSet::new(),
        };
        let mut admitted = Admitted { so_far: formerly.clone(), formerly, kept: None };
        let mut leftovers = Leftovers::default();
        let mut applied: Option<Rules> = None;
        let mut told = None;
        let mut drifts = Drifts::default();
        loop {
            // Lost: what is there stays until there is another lease.
            let lease = handle.status().lease.clone();
            let wanted = match lease {
                Some(lease) => self.rules(&config, &lease, &mut admitted).await,
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
                    let needed = self.options.masquerade.is_some() || self.options.guard == PortGuard::Peers;
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
                let wanted = self.rules(&config, &lease, &mut admitted).await;
                if wanted.is_some() && wanted != applied {
                    break;
                }
            }
        }
    }

    /// The rules for this lease. `None`: what is there stays, since a guard needs the peers and nobody knows them yet,
    /// nor whose routes stay although they are none.
    async fn rules(&self, config: &NetworkConfig, lease: &Lease, admitted: &mut Admitted) -> Option<Rules> {
        let networks = config.networks.map(|_, network| network.prefix);
        let mut rules = Rules::new(self.overlay.clone(), &networks, &lease.subnets);
        rules.masquerade = self.options.masquerade;
        rules.forward = self.options.forward;
        rules.guard = match (self.options.guard, Vxlan::new(config)) {
            (PortGuard::Peers, Ok(vxlan)) if config.backend.kind == Vxlan::TYPE => {
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
                admitted.update_kept(&status.withheld, &self.handle).await;
                let peers = admitted.with(peers, status.withheld.values());
                Some(VxlanGuard { port: vxlan.config().port.unwrap_or(VXLAN_PORT), peers })
            }
            _ => None,
        };
        Some(rules)
    }
}

/// Returns the peers that the guard of a former run admitted.
///
/// Without them a peer whose removal waits is shut out until its record is good again. That is better than a node
/// without any rules, so after [`READS`] failures the rules are written without them.
async fn formerly_admitted(
    tool: &dyn Firewall,
    overlay: &OverlayName,
    state: &watch::Sender<Rulebook>,
) -> BTreeSet<IpAddr> {
    let mut backoff = Backoff::default();
    for nth in 1..=READS {
        let error = match tool.let_in(overlay).await {
            Ok(peers) => return peers,
            // Writing fails as well, and reports it.
            Err(error) if is_final(&error) => break,
            Err(error) => chain(&error),
        };
        if nth == 1 {
            tracing::warn!(error, "the guard of a former run cannot be read: after {READS} tries a new one is written");
        }
        state.send_replace(Rulebook::Failed(error));
        sleep(backoff.wait()).await;
    }
    BTreeSet::new()
}

/// Whom the guard has let in.
#[derive(Debug, Default)]
struct Admitted {
    /// By a former run, as the kernel had it at the start.
    formerly: BTreeSet<IpAddr>,
    /// Up to now.
    so_far: BTreeSet<IpAddr>,
    /// What bad records keep; `None`: none does, or it could not be read yet.
    kept: Option<Kept>,
}

/// Former peers whose entries in the kernel stay, because a record that cannot be read names their subnet.
#[derive(Debug)]
struct Kept {
    prefixes: BTreeSet<Prefix>,
    addresses: BTreeSet<IpAddr>,
}

impl Admitted {
    /// Finds out which former peers bad records keep. Reads the kernel only when other prefixes are withheld than before:
    /// a record that goes bad later belongs to a peer of this run, which is admitted by its last good record.
    async fn update_kept(&mut self, withheld: &BTreeMap<Prefix, WithheldBecause>, handle: &Handle) {
        let bad = withheld.iter().filter(|(_, because)| **because == WithheldBecause::BadRecord);
        let prefixes: BTreeSet<_> = bad.map(|(prefix, _)| *prefix).collect();
        if prefixes.is_empty() || self.formerly.is_empty() {
            self.kept = None;
        } else if self.kept.as_ref().is_none_or(|kept| kept.prefixes != prefixes) {
            match handle.plan().await {
                Ok(preview) => self.kept = Some(Kept { prefixes, addresses: kept_by_bad_records(&preview.held) }),
                Err(error) => tracing::debug!(error = chain(&error), "what bad records keep cannot be read yet"),
            }
        }
    }

    /// Returns the addresses to admit. While the agent keeps routes to former peers, these peers are admitted too:
    /// otherwise the routes would be of no use.
    fn with<'a>(
        &self,
        mut peers: BTreeSet<IpAddr>,
        mut withheld: impl Iterator<Item = &'a WithheldBecause>,
    ) -> BTreeSet<IpAddr> {
        if withheld.any(|because| matches!(because, WithheldBecause::MassRemoval(_) | WithheldBecause::Unconfirmed)) {
            peers.extend(&self.so_far);
        }
        // A bad record may stay for ever, so it keeps nobody else.
        if let Some(kept) = &self.kept {
            peers.extend(kept.addresses.intersection(&self.formerly));
        }
        peers
    }
}

/// Returns where the forwarding entries lead that stay with a neighbour whose prefix a bad record names.
fn kept_by_bad_records(held: &[Held]) -> BTreeSet<IpAddr> {
    let neighbours: BTreeSet<_> = held
        .iter()
        .filter(|held| held.because == HeldBecause::Withheld(WithheldBecause::BadRecord))
        .filter_map(|held| match held.op {
            Op::DeleteNeighbour { key, mac } => Some((key.link, mac)),
            _ => None,
        })
        .collect();
    let entries = held.iter().filter_map(|held| match held.op {
        Op::DeleteFdb { key, dst } => neighbours.contains(&(key.link, key.mac)).then_some(dst),
        _ => None,
    });
    entries.collect()
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
    use std::sync::atomic::{AtomicU32, Ordering};

    use async_trait::async_trait;
    use flannel_core::clock::BootTime;
    use flannel_core::firewall::Drift;
    use flannel_core::kernel::{FdbKey, LinkId, NeighbourKey};
    use flannel_core::net::MacAddr;

    use super::*;

    fn failed() -> FirewallError {
        FirewallError::Failed { doing: "nft list".to_owned(), reason: "no answer".to_owned() }
    }

    /// A tool that cannot read the first `failures` times.
    struct Unreadable {
        failures: u32,
        reads: AtomicU32,
    }

    #[async_trait]
    impl Firewall for Unreadable {
        async fn apply(&self, _: &Rules) -> Result<(), FirewallError> {
            Err(failed())
        }

        async fn check(&self, _: &Rules) -> Result<Vec<Drift>, FirewallError> {
            Err(failed())
        }

        async fn let_in(&self, _: &OverlayName) -> Result<BTreeSet<IpAddr>, FirewallError> {
            match self.reads.fetch_add(1, Ordering::Relaxed) {
                nth if nth < self.failures => Err(failed()),
                _ => Ok([IpAddr::from([192, 0, 2, 1])].into()),
            }
        }

        async fn remove(&self, _: &OverlayName) -> Result<(), FirewallError> {
            Err(failed())
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_former_guard_that_cannot_be_read_is_shown_and_holds_up_the_rules_for_some_tries_only() {
        for (failures, found, reads) in [(0, 1, 1), (2, 1, 3), (u32::MAX, 0, READS)] {
            let tool = Unreadable { failures, reads: AtomicU32::default() };
            let state = watch::Sender::new(Rulebook::Pending);
            let overlay = OverlayName::default();
            let reading = formerly_admitted(&tool, &overlay, &state);
            let formerly = tokio::time::timeout(Duration::from_secs(60), reading).await.unwrap();
            assert_eq!((formerly.len(), tool.reads.into_inner()), (found, reads));
            let shown = if failures == 0 { Rulebook::Pending } else { Rulebook::Failed(chain(&failed())) };
            assert_eq!(*state.borrow(), shown);
        }
    }

    #[test]
    fn drift_that_goes_on_is_told_once_a_minute() {
        let (mut drifts, start) = (Drifts::default(), Instant::now());
        let told: Vec<_> = (0..30).filter_map(|nth| drifts.met(start + nth * Duration::from_secs(5))).collect();
        assert_eq!(told, [0, 11, 11]);
    }

    fn addresses(last: &[u8]) -> BTreeSet<IpAddr> {
        last.iter().map(|last| IpAddr::from([192, 0, 2, *last])).collect()
    }

    #[test]
    fn peers_that_were_let_in_stay_so_while_their_going_waits_for_a_second_look() {
        let kept = Kept { prefixes: BTreeSet::new(), addresses: addresses(&[8, 9]) };
        let mut admitted = Admitted { formerly: addresses(&[1, 9]), so_far: addresses(&[1, 2]), kept: None };
        let with = |admitted: &Admitted, withheld: &[WithheldBecause]| admitted.with(addresses(&[3]), withheld.iter());
        assert_eq!(with(&admitted, &[WithheldBecause::MassRemoval(BootTime::default())]), addresses(&[1, 2, 3]));
        assert_eq!(with(&admitted, &[WithheldBecause::Unconfirmed]), addresses(&[1, 2, 3]));
        assert_eq!(with(&admitted, &[WithheldBecause::BadRecord]), addresses(&[3]));
        assert_eq!(with(&admitted, &[]), addresses(&[3]));
        admitted.kept = Some(kept);
        assert_eq!(with(&admitted, &[WithheldBecause::BadRecord]), addresses(&[3, 9]));
    }

    #[test]
    fn a_bad_record_keeps_the_address_of_its_own_prefix_alone() {
        let held = |n: u8, because| {
            let (link, mac) = (LinkId::Own(0), MacAddr([2, 0, 0, 0, 0, n]));
            let addr = IpAddr::from([10, 5, n, 0]);
            let neighbour = Op::DeleteNeighbour { key: NeighbourKey { link, addr }, mac };
            let entry = Op::DeleteFdb { key: FdbKey { link, mac, nth: 0 }, dst: IpAddr::from([192, 0, 2, n]) };
            [Held { op: neighbour, because }, Held { op: entry, because: HeldBecause::StandsOnHeld }]
        };
        let bad = held(1, HeldBecause::Withheld(WithheldBecause::BadRecord));
        let others = [held(2, HeldBecause::Withheld(WithheldBecause::Unconfirmed)), held(3, HeldBecause::StandsOnHeld)];
        assert_eq!(kept_by_bad_records(&[bad.as_slice(), others.as_flattened()].concat()), addresses(&[1]));
    }
}
