//! The store as a host sees it, with checks of its agent's requests.

use std::any::Any;
use std::sync::{Arc, Mutex, OnceLock};

use flannel_core::allocation;
use flannel_core::clock::Clock;
use flannel_core::config::NetworkConfig;
use flannel_core::lease::{Lease, Record};
use flannel_core::net::{Dual, Prefix};
use flannel_core::overlay::Handle;
use flannel_core::subnet::SubnetError;
use flannel_core::testing::{Call, MemorySubnets, StoreDouble};

use crate::clock::HostClock;
use crate::network::Setting;

/// The state that all agents share.
#[derive(Default)]
pub(crate) struct Shared {
    /// The running agents, by host.
    running: Mutex<Vec<Option<Handle>>>,
    /// A request that an agent should not have made.
    trouble: Mutex<Option<String>>,
    /// The configuration in the store.
    setting: Mutex<Option<Setting>>,
}

impl Shared {
    pub(crate) fn set(&self, setting: &Setting) {
        *self.setting.lock().unwrap() = Some(setting.clone());
    }

    pub(crate) fn runs(&self, host: usize, handle: Option<Handle>) {
        let mut running = self.running.lock().unwrap();
        let count = running.len().max(host + 1);
        running.resize(count, None);
        running[host] = handle;
    }

    pub(crate) fn take_trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap().take()
    }

    fn blame(&self, trouble: String) {
        self.trouble.lock().unwrap().get_or_insert(trouble);
    }

    /// Returns the host, other than `host`, whose running agent holds the record. A sleeping agent may mistake a record
    /// that was created again for its own.
    fn holder(&self, record: &Record, host: usize) -> Option<usize> {
        let Ok(record) = &record.lease else { return None };
        let running = self.running.lock().unwrap();
        let is_it = |lease: &Arc<Lease>| (&lease.key, &lease.fence) == (&record.key, &record.fence);
        let holds = |handle: &Handle| handle.status().lease.as_ref().is_some_and(is_it);
        running
            .iter()
            .enumerate()
            .find_map(|(other, handle)| (other != host && handle.as_ref().is_some_and(holds)).then_some(other))
    }
}

/// The store as seen by one run of an agent.
pub(crate) struct Witness {
    pub(crate) store: MemorySubnets,
    pub(crate) host: usize,
    pub(crate) clock: Arc<HostClock>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) handle: OnceLock<Handle>,
    /// The networks that the agent read before it had a lease.
    pub(crate) networks: Arc<Mutex<Dual<Prefix>>>,
}

impl Witness {
    fn holds(&self) -> bool {
        self.handle.get().is_some_and(|handle| handle.status().lease.is_some())
    }

    /// I3: a lost or expired lease is not extended.
    fn renewing(&self, lease: &Lease) {
        let (host, now) = (self.host, self.clock.now());
        if let Some(expires) = lease.expires.filter(|expires| *expires <= now) {
            self.shared.blame(format!("host {host} renews at {now:?} what ran out at {expires:?}: {lease:?}"));
        }
        if !self.holds() {
            self.shared.blame(format!("host {host} renews what it knows to be lost: {lease:?}"));
        }
    }

    /// Reports the agent if its request changed a record that another agent holds.
    fn compare(&self, before: Vec<Record>) {
        let after = self.store.records();
        for record in before.iter().filter(|record| !after.contains(record)) {
            if let Some(holder) = self.shared.holder(record, self.host) {
                let after = after.iter().find(|after| after.key == record.key);
                let text = format!("host {} changes the record of host {holder}: {record:?} to {after:?}", self.host);
                self.shared.blame(text);
            }
        }
    }

    fn acquired(&self, lease: &Lease) {
        if let Some(setting) = &*self.shared.setting.lock().unwrap()
            && !allocation::all_compatible(&setting.config(), &lease.subnets)
        {
            self.shared.blame(format!("host {} takes {:?} of another pool than {setting:?}", self.host, lease.subnets));
        }
    }

    fn configured(&self, config: &NetworkConfig) {
        if self.handle.get().is_none_or(|handle| handle.status().audits == 0) && !self.holds() {
            *self.networks.lock().unwrap() = config.networks.map(|_, network| network.prefix);
        }
    }
}

impl StoreDouble for Witness {
    type Store = MemorySubnets;

    fn store(&self) -> &MemorySubnets {
        &self.store
    }

    async fn call<A: Any + Send>(
        &self,
        call: Call<'_>,
        answer: impl Future<Output = Result<A, SubnetError>> + Send,
    ) -> Result<A, SubnetError> {
        if let Call::Renew(lease) = call {
            self.renewing(lease);
        }
        let before = self.store.records();
        let answer = answer.await;
        self.compare(before);
        match (call, answer.as_ref().map(|answer| answer as &dyn Any)) {
            (Call::Acquire(_), Ok(lease)) => self.acquired(lease.downcast_ref().unwrap()),
            (Call::NetworkConfig, Ok(config)) => self.configured(config.downcast_ref().unwrap()),
            _ => {}
        }
        answer
    }
}
