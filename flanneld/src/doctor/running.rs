//! The running agent, and other ones.

use flannel_core::config::{Allocation, NetworkConfig};
use serde_json::Value;

use super::host::Agents;
use super::{Finding, Severity};
use crate::client::{self, ClientError};
use crate::options::Options;
use crate::{chain, processes};

/// How many other agents are named.
const NAMED: usize = 8;

/// What the agent at the metrics address says about itself.
pub(super) struct Running {
    pid: Option<u64>,
    /// The document of the configuration in force, once there is one.
    pub(super) in_force: Option<Value>,
    is_contended: bool,
}

/// Asks the running agent.
pub(super) async fn ask(options: &Options) -> (Option<Running>, Finding) {
    let Some(metrics) = options.metrics else {
        return (None, Finding::ok("agent", "not asked: -metrics-port is 0"));
    };
    let answer = match client::ask(metrics.addr, "/status", client::JSON).await {
        Ok(text) => serde_json::from_str::<Value>(&text).map_err(|_| ClientError::NotOurs(metrics.addr)),
        Err(error) => Err(error),
    };
    let status = match answer {
        Ok(status) => status,
        Err(error @ ClientError::Unreachable { .. }) => {
            let fix =
                "if it should be running: systemctl start flanneld; if it runs with another -metrics-port: give that";
            return (None, Finding::new("agent", Severity::Note, chain(&error), fix));
        }
        Err(error) => {
            let fix = format!("find that program: ss -ltnp 'sport = :{}'", metrics.addr.port());
            return (None, Finding::new("agent", Severity::Warning, chain(&error), fix));
        }
    };
    if let Some(overlay) = status["overlay"].as_str().filter(|overlay| *overlay != options.overlay.as_str()) {
        let found = format!("the agent of overlay {overlay} answers at {}", metrics.addr);
        let fix = "give the -metrics-port of the agent of this overlay";
        return (None, Finding::new("agent", Severity::Note, found, fix));
    }
    let pid = status["pid"].as_u64();
    let process = pid.map(|pid| format!(" (pid {pid})")).unwrap_or_default();
    let finding = if status["ready"] == Value::Bool(true) {
        Finding::ok("agent", format!("running and ready{process}"))
    } else {
        let waits = status["status"]["waits_for"].as_array().into_iter().flatten();
        let reasons: Vec<_> = waits.filter_map(|wait| wait["text"].as_str()).collect();
        let reasons = if reasons.is_empty() { String::new() } else { format!(": waits for {}", reasons.join(", ")) };
        let found = format!("running, but not ready{process}{reasons}");
        Finding::new("agent", Severity::Warning, found, "flanneld status shows the reasons and remedies")
    };
    let in_force = Some(status["status"]["network"]["document"].clone()).filter(Value::is_object);
    let is_contended = !status["status"]["contended"].is_null();
    (Some(Running { pid, in_force, is_contended }), finding)
}

/// Returns the finding about other agents with this node's identity, which the running agent notices.
pub(super) fn identity(running: &Running) -> Finding {
    if !running.is_contended {
        return Finding::ok("identity", "no other agent writes this node's lease");
    }
    let found = "another agent writes this node's lease: it has the same node name or public address, and traffic to one of \
                 the two is lost";
    let fix = "find the host that was copied or has the same -public-ip or -node-name, and stop its agent";
    Finding::new("identity", Severity::Error, found, fix)
}

/// Returns which agents of the overlay run in this network namespace, as far as this user may see them.
pub(super) fn agents(options: &Options, running: Option<&Running>) -> Agents {
    let mut agents = processes::agents();
    agents.retain(|agent| agent.overlay == options.overlay.as_str());
    if running.is_some() || agents.iter().any(|agent| agent.is_this_program) {
        Agents::Ours
    } else if agents.is_empty() {
        Agents::None
    } else {
        Agents::Another
    }
}

/// Looks for other agents that manage the same overlay in this network namespace.
pub(super) fn others(options: &Options, running: Option<&Running>) -> Vec<Finding> {
    let mut others = processes::agents();
    others.retain(|agent| agent.overlay == options.overlay.as_str());
    // The agent that answers knows only its process ID in its own container.
    let answers = |agent: &processes::Agent| running.and_then(|running| running.pid) == Some(agent.inner_pid.into());
    if let Some(own) = others.iter().position(answers) {
        others.remove(own);
    }
    // Before a change from Go flannel to this agent, one runs; two at once undo each other's changes.
    let severity = if running.is_some() || others.len() > 1 { Severity::Error } else { Severity::Warning };
    let finding = |agent: &processes::Agent| {
        let pid = agent.pid;
        let found = format!(
            "another flannel runs here: {} (pid {pid}); two agents overwrite each other's lease, device and routes",
            agent.program.display()
        );
        let fix =
            format!("before this agent runs, stop that one: systemctl status {pid} names its service, or kill {pid}");
        Finding::new("processes", severity, found, fix)
    };
    if others.is_empty() {
        return vec![Finding::ok("processes", "no other flannel of this overlay runs here")];
    }
    others.iter().take(NAMED).map(finding).collect()
}

/// Compares the configuration in the store with the one that the running agent uses.
pub(super) fn change(in_force: &Value, stored: &NetworkConfig) -> Finding {
    let document: Value = serde_json::from_str(&stored.to_json()).unwrap_or_default();
    let differences = differences(in_force, &document);
    if differences.is_empty() {
        return Finding::ok("configuration", "the agent uses the one in the store");
    }
    let listed = differences.join(", ");
    let former = NetworkConfig::parse(in_force.to_string().as_bytes(), Allocation::External);
    let is_same =
        |former: NetworkConfig| former.is_same_overlay(stored) && former.enable_nftables == stored.enable_nftables;
    if former.is_ok_and(is_same) {
        let found = format!("the one in the store has changed: {listed}");
        return Finding::new("configuration", Severity::Note, found, "nothing: new leases use it without a restart");
    }
    let found = format!("the one in the store has changed, and the running agent uses the former one: {listed}");
    let fix = "restart the agent on every node (systemctl restart flanneld), or write the old configuration again";
    Finding::new("configuration", Severity::Warning, found, fix)
}

/// Returns each field that differs, as `PATH: OLD → NEW`. Keys are compared in any case, as they are read.
fn differences(old: &Value, new: &Value) -> Vec<String> {
    fn compare(path: &str, old: &Value, new: &Value, into: &mut Vec<String>) {
        if let (Value::Object(before), Value::Object(after)) = (old, new) {
            let mut keys: Vec<&String> = before.keys().chain(after.keys()).collect();
            keys.sort_by_key(|key| key.to_ascii_lowercase());
            keys.dedup_by(|a, b| a.eq_ignore_ascii_case(b));
            for key in keys {
                let of = |map: &serde_json::Map<String, Value>| {
                    let found = map.iter().find(|(name, _)| name.eq_ignore_ascii_case(key));
                    found.map(|(_, value)| value.clone()).unwrap_or_default()
                };
                let below = if path.is_empty() { key.clone() } else { format!("{path}.{key}") };
                compare(&below, &of(before), &of(after), into);
            }
        } else if old != new {
            let shown = |value: &Value| if value.is_null() { "not set".to_owned() } else { value.to_string() };
            into.push(format!("{path}: {} → {}", shown(old), shown(new)));
        }
    }
    let mut found = Vec::new();
    compare("", old, new, &mut found);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn change_of(old: &str, new: &str) -> Finding {
        let parse = |text: &str| NetworkConfig::parse(text.as_bytes(), Allocation::Pool).unwrap();
        change(&serde_json::from_str(&parse(old).to_json()).unwrap(), &parse(new))
    }

    #[test]
    fn every_field_that_differs_is_named() {
        let old = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan","VNI":1,"Port":8472}}"#;
        assert_eq!(change_of(old, &old.replace("VNI", "vni")).severity, Severity::Ok);
        for (new, severity, parts) in [
            (old.replace(":1,", ":7,"), Severity::Warning, &["Backend.VNI: 1 → 7"][..]),
            (old.replace(",\"Port\":8472", ""), Severity::Warning, &["Backend.Port: 8472 → not set"]),
            (
                old.replace("10.5.", "10.6."),
                Severity::Warning,
                &["Network: \"10.5.0.0/16\" → \"10.6.0.0/16\"", "SubnetMin"],
            ),
            (old.replace("{\"Network", "{\"SubnetLen\":25,\"Network"), Severity::Note, &["SubnetLen: 24 → 25"]),
            (
                old.replace("{\"Network", "{\"EnableNFTables\":true,\"Network"),
                Severity::Warning,
                &["EnableNFTables: not set → true"],
            ),
        ] {
            let finding = change_of(old, &new);
            assert_eq!(finding.severity, severity, "{finding:?}");
            assert!(parts.iter().all(|part| finding.found.contains(part)), "{finding:?}");
        }
    }
}
