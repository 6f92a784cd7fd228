//! The builder of an overlay.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use crate::agent::{ConfigPolicy, LossPolicy, MissingUplink, Settings, SubnetEnvFile};
use crate::backend::{Backend, BackendError};
use crate::backoff::Jitter;
use crate::clock::{Clock, SystemClock};
use crate::config::NetworkConfig;
use crate::kernel::{Kernel, OverlayName, RouteSlot};
use crate::net::Dual;
use crate::overlay::run::Overlay;
use crate::subnet::SubnetManager;
use crate::uplink::Select;

/// Creates a backend once the network's configuration is known.
pub(crate) type Factory = Box<dyn Fn(&NetworkConfig) -> Result<Arc<dyn Backend>, BackendError> + Send + Sync>;

/// Builds an [`Overlay`]. Created by [`Overlay::builder`].
#[must_use = "a builder does nothing until built"]
pub struct Builder {
    settings: Settings,
    backends: Vec<(&'static str, Factory)>,
    clock: Arc<dyn Clock>,
    jitter: Jitter,
}

/// A setting is out of range. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The audit interval is out of range.
    #[error("audit interval {0:?} is not between 1 s and 10 min")]
    AuditInterval(Duration),
    /// A route slot has table 0, which is not a routing table.
    #[error("a route slot has table 0: tables are numbered from 1, the main table is {}", RouteSlot::MAIN.table)]
    RouteTable,
    /// A list of selections of the uplink is empty.
    #[error("a list of uplink selections is empty: give at least one")]
    NoUplink,
    /// No backend was given.
    #[error("no backend was given: call Builder::backend at least once")]
    NoBackend,
    /// A backend's kind is not in lower case, so that no configuration selects it.
    #[error("the backend kind {0:?} is not in lower case: a configuration's Backend.Type is compared in lower case")]
    BackendKind(&'static str),
    /// Two backends were given for one kind.
    #[error("two backends were given for the kind {0:?}: give one")]
    TwoBackends(&'static str),
}

impl Builder {
    pub(crate) fn new() -> Self {
        Self {
            settings: Settings::new(),
            backends: Vec::new(),
            clock: Arc::new(SystemClock::default()),
            jitter: Jitter::random(),
        }
    }

    /// Sets the overlay's name, by which it finds its own objects again. Default: `flannel`.
    pub fn name(mut self, name: OverlayName) -> Self {
        self.settings.name = name;
        self
    }

    /// Adds a backend for configurations whose `Backend.Type` is `kind`, in lower case. Add each backend that this
    /// program can run; the network's configuration selects one. A kind that
    /// was not added ends a run with [`OverlayError::Backend`](crate::overlay::OverlayError::Backend), which lists the others.
    pub fn backend<B: Backend>(
        mut self,
        kind: &'static str,
        make: impl Fn(&NetworkConfig) -> Result<B, BackendError> + Send + Sync + 'static,
    ) -> Self {
        let factory: Factory = Box::new(move |config| Ok(Arc::new(make(config)?) as Arc<dyn Backend>));
        self.backends.push((kind, factory));
        self
    }

    /// Sets how the uplink is chosen. [`Handle::set_uplink`](crate::overlay::Handle::set_uplink) changes it later.
    /// Default: by the default route.
    pub fn uplink(mut self, select: Select) -> Self {
        self.settings.uplink = select;
        self
    }

    /// Sets what to do when there is no uplink at start. Default: [`MissingUplink::Fail`].
    pub fn missing_uplink(mut self, policy: MissingUplink) -> Self {
        self.settings.missing_uplink = policy;
        self
    }

    /// Sets the addresses that are published for peers to send to. Default: those that an operator set for this node in
    /// the store ([`ThisNode::public`](crate::subnet::ThisNode::public)), else the uplink's own.
    pub fn public(mut self, addrs: Dual<IpAddr>) -> Self {
        self.settings.public = addrs;
        self
    }

    /// Sets the addresses of the lease store: a record with a subnet that covers one is not accepted. Default: none.
    pub fn store_addresses(mut self, addrs: Vec<IpAddr>) -> Self {
        self.settings.store_addresses = addrs;
        self
    }

    /// Sets further tables and metrics for backends' routes, in addition to [`RouteSlot::MAIN`] and [`Backend::slots`].
    /// A backend that wants a route in another slot causes a conflict in the status. Default: none.
    ///
    /// Every audit reads each of these tables in full. Routes there belong to the overlay if they are in its network
    /// and have one of this library's protocol numbers. Keep a slot in the list after its last use for as long as a
    /// former run may have left routes there.
    pub fn route_slots(mut self, slots: Vec<RouteSlot>) -> Self {
        self.settings.slots = slots;
        self
    }

    /// Sets what to do when the lease is lost. Default: [`LossPolicy::Reacquire`].
    pub fn on_loss(mut self, policy: LossPolicy) -> Self {
        self.settings.on_loss = policy;
        self
    }

    /// Sets what to do when the configuration in the store differs from the one in force. Default:
    /// [`ConfigPolicy::KeepOnceConfirmed`].
    pub fn on_reconfiguration(mut self, policy: ConfigPolicy) -> Self {
        self.settings.on_reconfiguration = policy;
        self
    }

    /// Sets the interval of audits without a cause: 1 s to 10 min, ± 10 % so that nodes do not run in step. Default: 30
    /// s.
    pub fn audit_every(mut self, interval: Duration) -> Self {
        self.settings.audit_every = interval;
        self
    }

    /// Sets a `subnet.env` that is written once the devices exist, and again when its content changes. Default: not
    /// written.
    ///
    /// A second file beside it records networks in which routes of the overlay may be left after a change of network.
    /// Without `subnet_env` such routes of host-gw and DirectRouting are not removed.
    pub fn subnet_env(mut self, file: SubnetEnvFile) -> Self {
        self.settings.subnet_env = Some(file);
        self
    }

    /// Makes the variation of waits (± 10 %) reproducible, for simulations. Nodes of one network need different seeds;
    /// with equal ones they run in step. Default: random for each process.
    pub fn jitter_seed(mut self, seed: u64) -> Self {
        self.jitter = Jitter::seeded(seed);
        self
    }

    /// Sets the clock. Default: [`SystemClock`].
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    /// Builds the overlay. Nothing is read or written before [`Overlay::run`].
    ///
    /// # Errors
    /// [`BuildError`] names the setting. Final for this input.
    pub fn build(self, subnets: Arc<dyn SubnetManager>, kernel: Arc<dyn Kernel>) -> Result<Overlay, BuildError> {
        let interval = self.settings.audit_every;
        if interval < Duration::from_secs(1) || interval > Duration::from_secs(600) {
            return Err(BuildError::AuditInterval(interval));
        }
        if self.settings.slots.iter().any(|slot| slot.table == 0) {
            return Err(BuildError::RouteTable);
        }
        check_uplink(&self.settings.uplink)?;
        if self.backends.is_empty() {
            return Err(BuildError::NoBackend);
        }
        let mut kinds = BTreeSet::new();
        for (kind, _) in &self.backends {
            if kind.to_ascii_lowercase() != *kind {
                return Err(BuildError::BackendKind(kind));
            }
            if !kinds.insert(kind) {
                return Err(BuildError::TwoBackends(kind));
            }
        }
        Ok(Overlay::new(self.settings, self.backends, self.clock, self.jitter, subnets, kernel))
    }
}

/// Checks that a selection can choose an uplink on some host.
pub(crate) fn check_uplink(select: &Select) -> Result<(), BuildError> {
    match select {
        Select::FirstOf(choices) if choices.is_empty() => Err(BuildError::NoUplink),
        Select::FirstOf(choices) => choices.iter().try_for_each(check_uplink),
        Select::DefaultRoute | Select::Name(_) | Select::Ip(_) | Select::Regex(_) | Select::CanReach(_) => Ok(()),
    }
}
