//! A firewall in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;

use crate::firewall::{Drift, Firewall, FirewallError, Problem, Rules};
use crate::kernel::OverlayName;

/// A firewall in memory: applied rules stay until they are [deleted](Self::delete) or removed. Clones share one
/// firewall.
#[derive(Debug, Clone, Default)]
pub struct FakeFirewall(Arc<Mutex<Tables>>);

#[derive(Debug, Default)]
struct Tables {
    rules: BTreeMap<OverlayName, Rules>,
    failure: Option<FirewallError>,
}

impl FakeFirewall {
    /// Creates a firewall without rules.
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the rules of an overlay.
    pub fn rules(&self, overlay: &OverlayName) -> Option<Rules> {
        self.tables().rules.get(overlay).cloned()
    }

    /// Deletes the rules of an overlay, as another program would.
    pub fn delete(&self, overlay: &OverlayName) {
        self.tables().rules.remove(overlay);
    }

    /// Makes every further call fail with this error, or succeed again with `None`.
    pub fn fail_with(&self, failure: Option<FirewallError>) {
        self.tables().failure = failure;
    }

    fn tables(&self) -> MutexGuard<'_, Tables> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn working(&self) -> Result<MutexGuard<'_, Tables>, FirewallError> {
        let tables = self.tables();
        match &tables.failure {
            Some(failure) => Err(failure.clone()),
            None => Ok(tables),
        }
    }
}

#[async_trait]
impl Firewall for FakeFirewall {
    async fn apply(&self, rules: &Rules) -> Result<(), FirewallError> {
        self.working()?.rules.insert(rules.overlay.clone(), rules.clone());
        Ok(())
    }

    async fn check(&self, rules: &Rules) -> Result<Vec<Drift>, FirewallError> {
        let problem = match self.working()?.rules.get(&rules.overlay) {
            None => Some(Problem::Missing),
            Some(found) if found != rules => Some(Problem::Changed),
            Some(_) => None,
        };
        Ok(problem.into_iter().map(|problem| Drift::new("fake".to_owned(), problem)).collect())
    }

    async fn let_in(&self, overlay: &OverlayName) -> Result<BTreeSet<IpAddr>, FirewallError> {
        let guard = self.working()?.rules.get(overlay).and_then(|rules| rules.guard.clone());
        Ok(guard.map(|guard| guard.peers).unwrap_or_default())
    }

    async fn remove(&self, overlay: &OverlayName) -> Result<(), FirewallError> {
        self.working()?.rules.remove(overlay);
        Ok(())
    }
}
