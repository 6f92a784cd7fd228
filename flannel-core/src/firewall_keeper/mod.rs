//! Firewall rules that last: written once the lease is known, checked every few seconds, changed with lease and peers.
//!
//! [`keep`] runs beside an overlay. It spawns no task, and writes through the [`Firewall`] that it is given.

mod admitted;
mod leftovers;
#[cfg(test)]
mod tests;

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::{Instant, sleep, timeout_at};

use crate::config::NetworkConfig;
use crate::firewall::{Firewall, FirewallError, Forward, Masquerade, Rules, VxlanGuard};
use crate::kernel::OverlayName;
use crate::lease::Lease;
use crate::overlay::Handle;
use crate::text::chain;

use admitted::Admitted;
use leftovers::Leftovers;

/// Peers that come within this time make one change of the guard.
const GATHER: Duration = Duration::from_millis(100);
/// The longest wait between two tries.
const RETRY: Duration = Duration::from_secs(5);
/// How often drift is logged at most.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Whether the rules are as wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RulesState {
    /// They were not written yet: there is no lease.
    Pending,
    /// They are in place, or none are wanted.
    InPlace,
    /// They could not be written, in words why, and masquerading or the guard needs them. Tried again every few seconds.
    Failed(String),
    /// The forward rules alone could not be written, in words why. Few hosts need them, so pods may be attached. Tried
    /// again every few seconds.
    WithoutForward(String),
}

impl RulesState {
    /// Whether pods may be attached as far as the rules go.
    pub fn is_ready(&self) -> bool {
        match self {
            Self::InPlace | Self::WithoutForward(_) => true,
            Self::Pending | Self::Failed(_) => false,
        }
    }

    /// Why the rules could not be written, in words.
    pub fn error(&self) -> Option<&str> {
        match self {
            Self::Failed(error) | Self::WithoutForward(error) => Some(error),
            Self::Pending | Self::InPlace => None,
        }
    }
}

/// Which rules to keep, and how.
#[derive(Clone)]
#[non_exhaustive]
pub struct KeepOptions {
    /// Whose rules. Has to be the overlay's name. Default: `flannel`.
    pub overlay: OverlayName,
    /// How to masquerade. `None`: not at all. Default: as flannel does.
    pub masquerade: Option<Masquerade>,
    /// Whether forwarded packets of pods are accepted. Default: they are.
    pub forward: Forward,
    /// A UDP port that only the peers' addresses may send to, such as that of VXLAN. Default: `None`.
    pub guarded_port: Option<u16>,
    /// How often the rules are checked, from 1 s. A rule that somebody deletes is missing that long at most. Default: 5 s.
    pub check_every: Duration,
    /// The other packet filter, whose rules of a former run are removed once these are in place. Default: `None`.
    pub former: Option<Arc<dyn Firewall>>,
    /// Called with each change of the state. Must not block. Default: nothing.
    pub on_state: Arc<dyn Fn(RulesState) + Send + Sync>,
}

impl Default for KeepOptions {
    fn default() -> Self {
        Self {
            overlay: OverlayName::default(),
            masquerade: Some(Masquerade::default()),
            forward: Forward::default(),
            guarded_port: None,
            check_every: Duration::from_secs(5),
            former: None,
            on_state: Arc::new(|_| {}),
        }
    }
}

impl fmt::Debug for KeepOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { overlay, masquerade, forward, guarded_port, check_every, .. } = self;
        f.debug_struct("KeepOptions")
            .field("overlay", overlay)
            .field("masquerade", masquerade)
            .field("forward", forward)
            .field("guarded_port", guarded_port)
            .field("check_every", check_every)
            .finish_non_exhaustive()
    }
}

impl KeepOptions {
    /// Whether nodes and pods depend on the rules: pods may not be attached without them.
    fn are_needed(&self) -> bool {
        self.masquerade.is_some() || self.guarded_port.is_some()
    }
}

/// Keeps an overlay's rules in the firewall as wanted until its run has ended. The rules stay then:
/// [`Firewall::remove`] removes them.
///
/// While the lease is lost the rules stay as they are. With a [guarded port](KeepOptions::guarded_port) they wait for the
/// first list of peers, and let in peers whose removal waits ([`Status::withheld`](crate::overlay::Status::withheld)) for
/// as long as their routes stay.
///
/// # Errors
/// [`FirewallError::Unsupported`], [`FirewallError::Denied`] and [`FirewallError::Stopped`] at the first write, where
/// masquerading or the guard needs it: no retry helps. All other errors are retried and shown as [`RulesState`].
///
/// # Cancel safety
/// May be dropped at any await. The rules stay as they are, and another call takes over from them.
pub async fn keep(handle: &Handle, firewall: &dyn Firewall, options: KeepOptions) -> Result<(), FirewallError> {
    let mut handle = handle.clone();
    // Nothing is known of the network before there is a lease.
    let Ok(status) = handle.wait_for(|status| status.network.is_some()).await else { return Ok(()) };
    let Some(config) = status.network.clone() else { return Ok(()) };
    let mut keeper = Keeper::new(firewall, options);
    if keeper.options.guarded_port.is_some() {
        keeper.admitted = Admitted::by_former_run(firewall, &keeper.options).await;
    }
    loop {
        let wait = keeper.write(&handle, &config).await?;
        let due = Instant::now() + wait;
        // The status changes with every round, so with every change of lease or peers.
        while let Ok(changed) = timeout_at(due, handle.changed()).await {
            if changed.is_err() {
                return Ok(());
            }
            // The very first rules are not delayed; what was refused is not tried at every change.
            if keeper.applied.is_some() || keeper.logged.is_some() {
                sleep(GATHER).await;
            }
            if keeper.is_outdated(&handle, &config).await {
                break;
            }
        }
    }
}

/// The rules, and what was done about them.
struct Keeper<'a> {
    firewall: &'a dyn Firewall,
    options: KeepOptions,
    admitted: Admitted,
    leftovers: Leftovers,
    applied: Option<Rules>,
    /// The error that was logged last, while it lasts.
    logged: Option<String>,
    drifts: Drifts,
}

impl<'a> Keeper<'a> {
    fn new(firewall: &'a dyn Firewall, options: KeepOptions) -> Self {
        let leftovers = Leftovers::of(options.former.clone());
        let (admitted, drifts) = (Admitted::default(), Drifts::default());
        Self { firewall, options, admitted, leftovers, applied: None, logged: None, drifts }
    }

    /// Writes the rules where they are not as wanted. Returns how long to wait until the next look.
    async fn write(&mut self, handle: &Handle, config: &NetworkConfig) -> Result<Duration, FirewallError> {
        let lease = handle.status().lease.clone();
        let wanted = match lease {
            Some(lease) => self.rules(handle, config, &lease).await,
            // Lost: what is there stays until there is another lease.
            None => self.applied.clone(),
        };
        let first = self.applied.is_none();
        let outcome = match wanted {
            Some(rules) => self.assure(rules).await,
            None => Ok(()),
        };
        let Err(error) = outcome else {
            self.logged = None;
            if let Some(rules) = &self.applied {
                self.admitted.wrote(rules);
                self.leftovers.clear(&self.options.overlay).await;
                (self.options.on_state)(RulesState::InPlace);
            }
            return Ok(self.options.check_every);
        };
        let text = chain(&error);
        if self.logged.as_ref() != Some(&text) {
            tracing::warn!(error = text, "the firewall's rules could not be written: trying again");
            self.logged = Some(text.clone());
        }
        let needed = self.options.are_needed();
        if needed && first && is_final(&error) {
            return Err(error);
        }
        (self.options.on_state)(if needed { RulesState::Failed(text) } else { RulesState::WithoutForward(text) });
        Ok(self.options.check_every.min(RETRY))
    }

    /// Whether lease and peers ask for other rules than those in place.
    async fn is_outdated(&mut self, handle: &Handle, config: &NetworkConfig) -> bool {
        let Some(lease) = handle.status().lease.clone() else { return false };
        let wanted = self.rules(handle, config, &lease).await;
        wanted.is_some() && wanted != self.applied
    }

    /// Returns the rules for this lease. `None`: what is there stays, since a guard needs the peers, and they or the
    /// routes that a former run left are not known yet.
    async fn rules(&mut self, handle: &Handle, config: &NetworkConfig, lease: &Lease) -> Option<Rules> {
        let networks = config.networks.map(|_, network| network.prefix);
        let mut rules = Rules::new(self.options.overlay.clone(), &networks, &lease.subnets);
        rules.masquerade = self.options.masquerade;
        rules.forward = self.options.forward;
        if let Some(port) = self.options.guarded_port {
            rules.guard = Some(VxlanGuard { port, peers: self.admitted.now(handle).await? });
        }
        Some(rules)
    }

    /// Writes the rules if they differ from those written before, or from what the kernel has.
    async fn assure(&mut self, rules: Rules) -> Result<(), FirewallError> {
        if self.applied.as_ref() == Some(&rules) {
            let drift = self.firewall.check(&rules).await?;
            if drift.is_empty() {
                return Ok(());
            }
            let drift: Vec<_> = drift.iter().map(ToString::to_string).collect();
            if let Some(unlogged) = self.drifts.found(Instant::now()) {
                tracing::info!(
                    drift = drift.join(", "),
                    unlogged,
                    "rules were changed by somebody: writing them again"
                );
            }
        }
        self.firewall.apply(&rules).await?;
        self.applied = Some(rules);
        Ok(())
    }
}

/// How often others changed the rules. A program that fights over them does so every few seconds, for ever.
#[derive(Debug, Default)]
struct Drifts {
    logged: Option<Instant>,
    unlogged: u64,
}

impl Drifts {
    /// Counts one. Returns how many were not logged, when this one is to be.
    fn found(&mut self, now: Instant) -> Option<u64> {
        if self.logged.is_some_and(|logged| now < logged + LOG_EVERY) {
            self.unlogged += 1;
            return None;
        }
        self.logged = Some(now);
        Some(std::mem::take(&mut self.unlogged))
    }
}

fn is_final(error: &FirewallError) -> bool {
    matches!(error, FirewallError::Unsupported { .. } | FirewallError::Denied { .. } | FirewallError::Stopped)
}
