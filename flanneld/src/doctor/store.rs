//! The lease store: whether it answers, and whether this node may read and write there.

use std::collections::BTreeSet;
use std::error::Error;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::config::NetworkConfig;
use flannel_core::lease::{LeaseEvent, Record};
use flannel_core::net::Prefix;
use flannel_core::subnet::{SubnetError, SubnetManager};
use flannel_subnet_etcd::{EtcdError, EtcdSubnets};
use flannel_subnet_file::FileError;
use futures_util::StreamExt;
use tokio::time::timeout;

use super::{Finding, Severity, files};
use crate::options::{Options, StoreLocation};
use crate::stores::{Opened, StoreError};
use crate::{chain, credentials, stores};

/// How long the store may take for one answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// A store that answers, and its configuration.
pub(super) struct AnsweringStore {
    pub(super) config: NetworkConfig,
    subnets: Arc<dyn SubnetManager>,
}

/// Reads the store, and checks the certificates and permissions for it.
pub(super) async fn examine(options: &Options) -> (Option<AnsweringStore>, Vec<Finding>) {
    let mut findings = Vec::new();
    if let StoreLocation::Etcd(config) = &options.store.location {
        let finding = |warning: credentials::CredentialError| {
            let severity = if warning.prevents { Severity::Error } else { Severity::Warning };
            Finding::new("certificates", severity, warning.problem(), warning.remedy)
        };
        findings.extend(credentials::warnings(config).into_iter().map(finding));
    }
    let opened = match stores::open(&options.store).await {
        Ok(opened) => opened,
        Err(error) => {
            findings.push(cannot_open(error));
            return (None, findings);
        }
    };
    let config = match timeout(PATIENCE, opened.subnets.network_config()).await {
        Ok(Ok(config)) => config,
        Ok(Err(error)) => {
            findings.push(failed(options, &opened, &error).await);
            return (None, findings);
        }
        Err(_) => {
            findings.push(silent(&opened.name));
            return (None, findings);
        }
    };
    let networks: Vec<_> = config.networks.iter().map(|(_, network)| network.prefix.to_string()).collect();
    let found = format!("{}: {} over {}", opened.name, networks.join(" and "), config.backend.kind);
    findings.push(Finding::ok("store", found));
    findings.extend(permissions(options, &opened).await);
    (Some(AnsweringStore { config, subnets: opened.subnets }), findings)
}

fn silent(name: &str) -> Finding {
    let found = format!("{name} did not answer within {PATIENCE:?}: a start waits for it");
    Finding::new("store", Severity::Error, found, "check that it is running, its address, and firewalls in between")
}

fn cannot_open(error: StoreError) -> Finding {
    match error {
        StoreError::Credential(error) => Finding::new("certificates", Severity::Error, error.problem(), error.remedy),
        error => Finding::alone("store", Severity::Error, chain(&error)),
    }
}

/// Checks whether leases may be written. The Kubernetes store has checks of its own.
async fn permissions(options: &Options, opened: &Opened) -> Option<Finding> {
    match (&options.store.location, &opened.etcd) {
        (StoreLocation::Dir { dir, .. }, _) => {
            Some(files::writable("subnet-dir", dir, Severity::Error, options.capabilities))
        }
        (_, Some(etcd)) => match timeout(PATIENCE, etcd.check_access()).await {
            Ok(Ok(())) => Some(Finding::ok("permissions", "leases may be read and written")),
            Ok(Err(error)) => Some(failed(options, opened, &error).await),
            Err(_) => Some(silent(&opened.name)),
        },
        _ => None,
    }
}

async fn failed(options: &Options, opened: &Opened, error: &SubnetError) -> Finding {
    if let (SubnetError::Denied { doing, .. }, StoreLocation::Etcd(config), Some(etcd)) =
        (error, &options.store.location, &opened.etcd)
        && let Some(credentials) = &config.credentials
        && is_of_role(error)
    {
        let (user, prefix) = (&credentials.user, config.prefix.as_str());
        let found = format!("etcd denies user {user} {doing} under {prefix}/, so no lease can be acquired");
        return Finding::new("permissions", Severity::Error, found, grant(user, prefix, etcd).await);
    }
    let source = error.source();
    if let Some(EtcdError { endpoint, problem, remedy, .. }) = source.and_then(|source| source.downcast_ref()) {
        return Finding::new("store", Severity::Error, format!("{error}: {endpoint}: {problem}"), *remedy);
    }
    if let Some(FileError { path, remedy, source, .. }) = source.and_then(|source| source.downcast_ref()) {
        let found = format!("{error}: {}: {source}", path.display());
        return Finding::new("store", Severity::Error, found, *remedy);
    }
    // The text contains the remedy.
    Finding::alone("store", Severity::Error, format!("{}: {}", opened.name, chain(error)))
}

/// Whether a role lacks a permission; otherwise user or password are wrong.
fn is_of_role(error: &SubnetError) -> bool {
    let source = error.source().and_then(|source| source.downcast_ref::<EtcdError>());
    source.is_some_and(|error| error.problem.contains("permission denied"))
}

/// Returns the commands that give a user the permissions.
async fn grant(user: &str, prefix: &str, etcd: &EtcdSubnets) -> String {
    let grant = |role: &str| format!("etcdctl role grant-permission {role} readwrite --prefix=true {prefix}/");
    match timeout(PATIENCE, etcd.roles_of(user)).await {
        Ok(Ok(roles)) if !roles.is_empty() => grant(&roles[0]),
        // The store's connections need the permission to read.
        _ => format!("{} (ROLE: a role of {user}, as etcdctl user get {user} shows)", grant("ROLE")),
    }
}

impl AnsweringStore {
    /// Returns the subnets of all records, good or bad; `None` if the store does not list them in time.
    pub(super) async fn leased(&self) -> Option<BTreeSet<Prefix>> {
        let list = async {
            let mut watch = self.subnets.watch();
            while let Some(event) = watch.next().await {
                if let Ok(LeaseEvent::Reset(records)) = event {
                    return Some(records.iter().flat_map(subnets).collect());
                }
            }
            None
        };
        timeout(PATIENCE, list).await.ok().flatten()
    }
}

fn subnets(record: &Record) -> impl Iterator<Item = Prefix> + use<> {
    let subnets = match &record.lease {
        Ok(lease) => lease.subnets,
        Err(bad) => bad.subnets,
    };
    [subnets.v4, subnets.v6].into_iter().flatten()
}
