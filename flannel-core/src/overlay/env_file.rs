//! Keeps `subnet.env` up to date: writes it when its content has to change, and checks it periodically.

use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::{BoxFuture, pending};

use crate::agent::{EnvFile, Settings, SubnetEnvFile};
use crate::backoff::{Backoff, Jitter};
use crate::clock::BootTime;
use crate::net::{Dual, Prefix};
use crate::overlay::former_networks::{self, Retention};
use crate::overlay::host_files::Access;
use crate::subnet_env::{Kept, SubnetEnv};
use crate::text::chain;

/// The longest interval of checks: without the file no pod can be attached.
const LONGEST: Duration = Duration::from_secs(30);

/// The result of a check of the file.
pub(crate) type Outcome = Result<Looked, String>;

pub(crate) struct Looked {
    env: SubnetEnv,
    retention: Retention,
    kept: Kept,
    /// The subnets that the file named before the check.
    former: Dual<Prefix>,
}

pub(crate) struct EnvKeeper {
    file: Option<SubnetEnvFile>,
    /// The interval of checks: any program may change or delete the file.
    every: Duration,
    under_way: Option<BoxFuture<'static, Outcome>>,
    /// The content at the last check, if it was as wanted.
    said: Option<(SubnetEnv, Retention)>,
    /// When the next check is due.
    due: Option<BootTime>,
    /// Why the file is not as wanted.
    error: Option<String>,
    backoff: Backoff,
    /// `None` once writes have ended.
    access: Option<Access>,
}

impl EnvKeeper {
    pub(crate) fn new(settings: &Settings, jitter: Jitter, access: Access) -> Self {
        Self {
            file: settings.subnet_env.clone(),
            every: settings.audit_every.min(LONGEST),
            under_way: None,
            said: None,
            due: None,
            error: None,
            backoff: Backoff::new(jitter),
            access: Some(access),
        }
    }

    pub(crate) fn file(&self) -> Option<&SubnetEnvFile> {
        self.file.as_ref()
    }

    pub(crate) fn is_busy(&self) -> bool {
        self.under_way.is_some()
    }

    /// Ends all writes: one under way is not waited for, and finishes before any work with another access.
    pub(crate) fn cut(&mut self) {
        (self.under_way, self.access) = (None, None);
    }

    /// When to call [`keep`](Self::keep) if nothing else happens.
    pub(crate) fn deadline(&self) -> Option<BootTime> {
        self.due.filter(|_| !self.is_busy())
    }

    /// Postpones the next check, because the content is not known yet.
    pub(crate) fn wait(&mut self) {
        if !self.is_busy() {
            self.due = None;
        }
    }

    /// Checks the file and the record of former networks, and writes them if they are not as wanted. Does nothing if
    /// the same content was checked less than one interval ago. After a failure it waits for the back-off, even if the
    /// content has changed since.
    pub(crate) fn keep(&mut self, now: BootTime, wanted: SubnetEnv, retention: Retention) {
        let Some(file) = self.file.as_ref().filter(|_| self.under_way.is_none()) else { return };
        let waits = self.due.is_some_and(|due| due > now);
        if waits && (self.error.is_some() || self.said == Some((wanted, retention))) {
            return;
        }
        let Some(access) = &self.access else { return };
        let path = file.path.clone();
        let work = access.run(move || {
            let former = SubnetEnv::read(&path).ok().flatten().map(|env| env.subnets).unwrap_or_default();
            let kept = wanted.keep(&path).map_err(|error| chain(&error))?;
            if retention == Retention::Delete {
                former_networks::forget(&path).map_err(|error| format!("forgetting former networks: {error}"))?;
            }
            Ok(Looked { env: wanted, retention, kept, former })
        });
        self.under_way = Some(async move { work.await.unwrap_or_else(|error| Err(chain(&error))) }.boxed());
    }

    /// Waits for the check under way. No result is lost if the future is dropped.
    pub(crate) async fn finished(&mut self) -> Outcome {
        match &mut self.under_way {
            Some(future) => {
                let outcome = future.await;
                self.under_way = None;
                outcome
            }
            None => pending().await,
        }
    }

    /// Handles the result of [`finished`](Self::finished), and returns the state of the file.
    pub(crate) fn ended(&mut self, now: BootTime, outcome: Outcome) -> EnvFile {
        match outcome {
            Ok(Looked { env, retention, kept, former }) => {
                if kept == Kept::Written {
                    warn_of_moved_pods(&former, &env.subnets);
                    let again = self.said.is_some_and(|(said, _)| said == env);
                    tracing::info!(target: "flannel::subnet_env", subnets = %env.subnets, again, "subnet.env written");
                }
                self.backoff.reset();
                (self.said, self.error, self.due) = (Some((env, retention)), None, Some(now.after(self.every)));
                EnvFile::Settled
            }
            Err(error) => {
                if self.error.as_ref() != Some(&error) {
                    tracing::warn!(target: "flannel::subnet_env", error, "cannot write subnet.env; retrying");
                }
                self.due = Some(now.after(self.backoff.wait()));
                self.error = Some(error.clone());
                EnvFile::Pending { error: Some(error) }
            }
        }
    }
}

/// Warns that this node's subnet changed: pods with addresses of the former subnet cannot be reached (docs/faults.md,
/// L17).
fn warn_of_moved_pods(former: &Dual<Prefix>, present: &Dual<Prefix>) {
    for (family, from) in former.iter() {
        if let Some(to) = present.get(family).filter(|to| *to != from) {
            tracing::warn!(
                target: "flannel::subnet_env",
                %from,
                %to,
                "this node has another subnet: restart its pods, which have addresses of the former one"
            );
        }
    }
}
