//! Checks of what an agent needs in a Kubernetes cluster: permissions, clocks, the own Node and its annotations.

use std::time::Duration;

use flannel_subnet_kube::{Check, Subject, Verdict};
use tokio::time::timeout;

use super::{Finding, Severity};
use crate::options::{StoreLocation, StoreOptions};
use crate::stores;

/// How long the API server may take for all answers in total.
const PATIENCE: Duration = Duration::from_secs(10);

/// Returns the findings about the cluster; none with another store.
pub(super) async fn ask(options: &StoreOptions) -> Vec<Finding> {
    let StoreLocation::Kube(kube) = &options.location else { return Vec::new() };
    // The finding about the store gives the reason.
    let Ok((store, _)) = stores::kubernetes(kube).await else { return Vec::new() };
    match timeout(PATIENCE, store.check()).await {
        Ok(checks) => checks.into_iter().map(finding).collect(),
        Err(_) => {
            let found = format!("the API server did not answer all requests within {PATIENCE:?}");
            vec![Finding::new(
                "api server",
                Severity::Error,
                found,
                "check that it is running and reachable: kubectl get --raw /readyz",
            )]
        }
    }
}

fn finding(check: Check) -> Finding {
    let Check { subject, verdict, found, remedy, .. } = check;
    let name = match subject {
        Subject::Server => "api server",
        Subject::Rights => "rbac",
        Subject::Clock => "server clock",
        Subject::Node => "node",
        Subject::Annotations => "annotations",
        _ => "kubernetes",
    };
    let severity = match verdict {
        Verdict::Good => Severity::Ok,
        Verdict::Doubtful => Severity::Warning,
        Verdict::Bad => Severity::Error,
    };
    Finding { check: name, severity, found, fix: remedy }
}
