//! Keeps firewall rules in place: writes them once the lease is known, checks them every few seconds, and changes them
//! with the lease and the peers.
//!
//! [`keep`] runs beside an overlay. It spawns no task, and writes through the [`Firewall`] passed to it.

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
use crate::lease::Lease;
use crate::overlay::Handle;
use crate::text::chain;

use admitted::Admitted;
use leftovers::Leftovers;

/// Peers that appear within this time cause one change of the guard.
const GATHER: Duration = Duration::from_millis(100);
/// The longest wait between two attempts.
const RETRY: Duration = Duration::from_secs(5);
/// The shortest time between two log lines about drift.
const LOG_EVERY: Duration = Duration::from_secs(60);

/// Whether the rules are as wanted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RulesState {
    /// Not written yet: there is no lease.
    Pending,
    /// They are in place, or none are wanted.
    InPlace,
    /// The rules could not be written, with the reason, and masquerading or the guard needs them. Retried every few
    /// seconds.
    Failed(String),
    /// The rules could not be written, with the reason, but only forward rules were requested. Few hosts need them, so
    /// pods may be attached. Retried every few seconds.
    WithoutForward(String),
}

impl RulesState {
    /// Returns whether the state of the rules allows attaching pods.
    pub fn is_ready(&self) -> bool {
        match self {
            Self::InPlace | Self::WithoutForward(_) => true,
            Self::Pending | Self::Failed(_) => false,
        }
    }

    /// Returns the reason why the rules could not be written.
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
    /// How to masquerade; `None` disables it. Default: as flannel does.
    pub masquerade: Option<Masquerade>,
    /// Whether forwarded packets of pods are accepted. Default: they are.
    pub forward: Forward,
    /// A UDP port that only the peers' addresses may send to, such as that of VXLAN. Default: `None`.
    pub guarded_port: Option<u16>,
    /// How often the rules are checked. Less than 1 s counts as 1 s. A rule that another program deletes is missing for at most this long.
    /// Default: 5 s.
    pub check_every: Duration,
    /// The other packet filter. Its rules from a former run are removed once the new ones are in place. Default:
    /// `None`.
    pub former: Option<Arc<dyn Firewall>>,
    /// Called with the state after each check and each attempt to write. Must not block. Default: does nothing.
    pub on_state: Arc<dyn Fn(RulesState) + Send + Sync>,
}

impl Default for KeepOptions {
    fn default() -> Self {
        Self {
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
        let Self { masquerade, forward, guarded_port, check_every, .. } = self;
        f.debug_struct("KeepOptions")
            .field("masquerade", masquerade)
            .field("forward", forward)
            .field("guarded_port", guarded_port)
            .field("check_every", check_every)
            .finish_non_exhaustive()
    }
}

impl KeepOptions {
    /// Returns whether nodes and pods depend on the rules, so that pods may not be attached without them.
    fn are_needed(&self) -> bool {
        self.masquerade.is_some() || self.guarded_port.is_some()
    }
}

/// Keeps an overlay's rules in the firewall until the overlay's run ends. The rules then stay; [`Firewall::remove`]
/// removes them.
///
/// While the lease is lost, the rules do not change. With a [guarded port](KeepOptions::guarded_port), they are written
/// only after the first list of peers. They also admit peers whose removal is withheld
/// ([`Status::withheld`](crate::overlay::Status::withheld)) for as long as the routes to them stay.
///
/// # Errors
/// [`FirewallError::Unsupported`], [`FirewallError::Denied`] and [`FirewallError::Stopped`] at the first write, if
/// masquerading or the guard needs it: a retry does not help. All other errors are retried and reported as
/// [`RulesState`].
///
/// # Cancel safety
/// May be dropped at any await. The rules stay, and a later call continues with them.
pub async fn keep(handle: &Handle, firewall: &dyn Firewall, options: KeepOptions) -> Result<(), FirewallError> {
    let mut handle = handle.clone();
    // The network is not known before there is a lease.
    let Ok(status) = handle.wait_for(|status| status.network.is_some()).await else { return Ok(()) };
    let Some(config) = status.network.clone() else { return Ok(()) };
    let mut keeper = Keeper::new(firewall, options);
    if keeper.options.guarded_port.is_some() {
        keeper.admitted = Admitted::by_former_run(firewall, handle.name(), &keeper.options).await;
    }
    loop {
        let wait = keeper.write(&handle, &config).await?;
        let due = Instant::now() + wait;
        // The status changes with every round, and so with every change of the lease or the peers.
        while let Ok(changed) = timeout_at(due, handle.changed()).await {
            if changed.is_err() {
                return Ok(());
            }
            // The first rules are written without delay; a failed write is not repeated at every change.
            if keeper.applied.is_some() || keeper.logged.is_some() {
                sleep(GATHER).await;
            }
            // A status that changes all the time must not delay the check.
            if Instant::now() >= due || keeper.is_outdated(&handle, &config).await {
                break;
            }
        }
    }
}

/// The wanted rules, and what has been written.
struct Keeper<'a> {
    firewall: &'a dyn Firewall,
    options: KeepOptions,
    admitted: Admitted,
    leftovers: Leftovers,
    applied: Option<Rules>,
    /// The rules that could not be written, until a write succeeds.
    failed: Option<Rules>,
    /// The error that was logged last, until a write succeeds.
    logged: Option<String>,
    drifts: Drifts,
}

impl<'a> Keeper<'a> {
    fn new(firewall: &'a dyn Firewall, mut options: KeepOptions) -> Self {
        options.check_every = options.check_every.max(Duration::from_secs(1));
        let leftovers = Leftovers::of(options.former.clone());
        let (admitted, drifts) = (Admitted::default(), Drifts::default());
        Self { firewall, options, admitted, leftovers, applied: None, failed: None, logged: None, drifts }
    }

    /// Writes the rules if they differ from the wanted ones. Returns how long to wait until the next check.
    async fn write(&mut self, handle: &Handle, config: &NetworkConfig) -> Result<Duration, FirewallError> {
        let lease = handle.status().lease.clone();
        let wanted = match lease {
            Some(lease) => self.rules(handle, config, &lease).await,
            // The lease is lost: the rules stay until there is another lease.
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
                self.leftovers.clear(handle.name()).await;
                (self.options.on_state)(RulesState::InPlace);
            }
            return Ok(self.options.check_every);
        };
        let text = chain(&error);
        if self.logged.as_ref() != Some(&text) {
            tracing::warn!(target: "flannel::firewall", error = text, "cannot write the firewall rules; retrying");
            self.logged = Some(text.clone());
        }
        let needed = self.options.are_needed();
        if needed && first && is_final(&error) {
            return Err(error);
        }
        (self.options.on_state)(if needed { RulesState::Failed(text) } else { RulesState::WithoutForward(text) });
        Ok(self.options.check_every.min(RETRY))
    }

    /// Returns whether the lease and the peers require rules other than those in place and those that could not be
    /// written.
    async fn is_outdated(&mut self, handle: &Handle, config: &NetworkConfig) -> bool {
        let Some(lease) = handle.status().lease.clone() else { return false };
        let wanted = self.rules(handle, config, &lease).await;
        wanted.is_some() && wanted != self.applied && wanted != self.failed
    }

    /// Returns the rules for this lease. `None` means that the rules must not change yet: a guard needs the peers, and
    /// the peers or the routes of a former run are not known yet.
    async fn rules(&mut self, handle: &Handle, config: &NetworkConfig, lease: &Lease) -> Option<Rules> {
        let networks = config.networks.map(|_, network| network.prefix);
        let mut rules = Rules::new(handle.name().clone(), &networks, &lease.subnets);
        rules.masquerade = self.options.masquerade;
        rules.forward = self.options.forward;
        if let Some(port) = self.options.guarded_port {
            rules.guard = Some(VxlanGuard { port, peers: self.admitted.now(handle).await? });
        }
        Some(rules)
    }

    /// Writes the rules if they differ from those last written or from those in the kernel.
    async fn assure(&mut self, rules: Rules) -> Result<(), FirewallError> {
        if self.applied.as_ref() == Some(&rules) {
            let drift = self.firewall.check(&rules).await?;
            if drift.is_empty() {
                return Ok(());
            }
            let drift: Vec<_> = drift.iter().map(ToString::to_string).collect();
            if let Some(unlogged) = self.drifts.found(Instant::now()) {
                tracing::info!(
                    target: "flannel::firewall",
                    drift = drift.join(", "),
                    suppressed = unlogged,
                    "restored firewall rules that another program had changed"
                );
            }
        }
        let written = self.firewall.apply(&rules).await;
        match written {
            Ok(()) => (self.applied, self.failed) = (Some(rules), None),
            Err(_) => self.failed = Some(rules),
        }
        written
    }
}

/// How often other programs changed the rules. A program that competes for them changes them every few seconds, without
/// end.
#[derive(Debug, Default)]
struct Drifts {
    logged: Option<Instant>,
    unlogged: u64,
}

impl Drifts {
    /// Counts one change. If it should be logged, returns how many were not logged since the last one.
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
