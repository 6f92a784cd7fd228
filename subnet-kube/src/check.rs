//! Checks of what an agent needs from the cluster, without writing anything.

use flannel_core::lease::LeaseAttrs;
use flannel_core::subnet::{NodeIdentity, SubnetError};
use flannel_core::text::chain;
use jiff::Timestamp;

use crate::NodeName;
use crate::annotations::{Annotations, attrs};
use crate::api::Review;
use crate::error::{Fault, Kind, Rule};
use crate::keys::Key;
use crate::node::Node;
use crate::protobuf::object;
use crate::store::{Store, assigned, no_node};

/// One result of [`KubeSubnets::check`](crate::KubeSubnets::check).
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Check {
    /// What was checked.
    pub subject: Subject,
    /// The result.
    pub verdict: Verdict,
    /// What was found. Text from the cluster is included unchanged.
    pub found: String,
    /// How to fix it, if the result is not good.
    pub remedy: Option<String>,
}

/// The subject of a [`Check`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Subject {
    /// Whether the API server answers. If it does not, nothing else is checked.
    Server,
    /// Whether this account has the rights that an agent needs.
    Rights,
    /// The difference between this machine's clock and the server's.
    Clock,
    /// Whether the own Node exists and has podCIDRs inside the network.
    Node,
    /// Whether the own Node's annotations are as this program writes and reads them.
    Annotations,
}

/// The result of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verdict {
    /// As it should be.
    Good,
    /// Likely to cause problems.
    Doubtful,
    /// An agent gets no lease until this is fixed.
    Bad,
}

/// The largest tolerated difference of two clocks, in seconds.
const MAX_SKEW: u64 = 60;

impl Check {
    fn good(subject: Subject, found: String) -> Self {
        Self { subject, verdict: Verdict::Good, found, remedy: None }
    }

    fn new(subject: Subject, verdict: Verdict, found: String, remedy: impl Into<String>) -> Self {
        Self { subject, verdict, found, remedy: Some(remedy.into()) }
    }

    fn failed(subject: Subject, verdict: Verdict, fault: Fault) -> Self {
        Self::new(subject, verdict, fault.error.problem, fault.error.remedy)
    }

    fn waits(subject: Subject, error: &SubnetError) -> Self {
        Self::new(
            subject,
            Verdict::Bad,
            chain(error),
            "correct what it names; a waiting agent then continues by itself",
        )
    }
}

impl Store {
    pub(crate) async fn check(&self) -> Vec<Check> {
        let name = self.name().await;
        let (rights, clock) = match self.rights(name.as_ref().ok().copied()).await {
            Ok(found) => found,
            // An account that may not ask may nevertheless have the rights.
            Err(fault) if fault.kind == Kind::Denied => {
                (Check::failed(Subject::Rights, Verdict::Doubtful, fault), None)
            }
            Err(fault) => return vec![Check::failed(Subject::Server, Verdict::Bad, fault)],
        };
        let mut checks = vec![Check::good(Subject::Server, "the API server answers".to_owned()), rights];
        checks.extend(clock);
        match name {
            Ok(name) => checks.extend(self.own(name.as_str()).await),
            Err(error) => checks.push(Check::waits(Subject::Node, &error)),
        }
        checks
    }

    /// Checks each right separately. Also returns the clock check, if the server sends its time.
    async fn rights(&self, name: Option<&NodeIdentity>) -> Result<(Check, Option<Check>), Fault> {
        let mut missing = Vec::new();
        let mut clock = None;
        for rule in [Rule::GetNode, Rule::ListNodes, Rule::WatchNodes, Rule::PatchNodeStatus, Rule::GetPod] {
            let (namespace, object) = match (rule, &self.node) {
                (Rule::GetPod, NodeName::Named(_)) => continue,
                (Rule::GetPod, NodeName::OfPod { namespace, pod }) => (Some(namespace.as_str()), Some(pod.as_str())),
                (Rule::GetNode | Rule::PatchNodeStatus, _) => (None, name.map(NodeIdentity::as_str)),
                (Rule::ListNodes | Rule::WatchNodes | Rule::CreateEvent | Rule::Review, _) => (None, None),
            };
            let Review { is_allowed, date } = self.api.review(rule, namespace, object).await?;
            if !is_allowed {
                missing.push(rule);
            }
            clock = date.map(|server| clocks(server, Timestamp::now()));
        }
        if missing.is_empty() {
            let found = "this account has all permissions of an agent".to_owned();
            return Ok((Check::good(Subject::Rights, found), clock));
        }
        let verbs: Vec<_> = missing.iter().map(|rule| format!("{} {}", rule.verb(), rule.resource())).collect();
        let rules: Vec<_> = missing.iter().map(|rule| rule.yaml()).collect();
        let found = format!("this account may not {}", verbs.join(", "));
        let remedy = format!("add to the rules of this program's role: {}", rules.join(", "));
        Ok((Check::new(Subject::Rights, Verdict::Bad, found, remedy), clock))
    }

    /// Checks the own Node and its annotations.
    async fn own(&self, name: &str) -> Vec<Check> {
        let answer = match self.api.node(name).await {
            Ok(answer) => answer,
            Err(fault) if fault.kind == Kind::Missing => return vec![Check::waits(Subject::Node, &no_node(name))],
            Err(fault) => return vec![Check::failed(Subject::Node, Verdict::Bad, fault)],
        };
        let node = match object(&answer).and_then(|message| Node::parse(message, &self.keys)) {
            Ok(node) => node,
            Err(error) => return vec![Check::failed(Subject::Node, Verdict::Bad, error.into())],
        };
        let config = self.config().await;
        let subnets = match &config {
            Ok(config) => assigned(name, &node, config),
            // The required families are not known.
            Err(_) => Ok(node.subnets().unwrap_or_default()),
        };
        let subnets = match subnets {
            Ok(subnets) => {
                let texts: Vec<_> = subnets.iter().map(|(_, subnet)| subnet.to_string()).collect();
                let found = match texts.is_empty() {
                    false => format!("Node {name} has podCIDRs {}", texts.join(" and ")),
                    true => format!("Node {name} exists"),
                };
                Check::good(Subject::Node, found)
            }
            Err(error) => Check::waits(Subject::Node, &error),
        };
        let backend = config.ok().map(|config| config.backend.kind);
        vec![subnets, self.annotations(name, &node.annotations, backend.as_deref())]
    }

    /// Checks the annotations; `backend` is the network configuration's.
    fn annotations(&self, name: &str, annotations: &Annotations<'_>, backend: Option<&str>) -> Check {
        let doubtful = |found: String, remedy: &str| {
            Check::new(Subject::Annotations, Verdict::Doubtful, format!("Node {name}: {found}"), remedy)
        };
        if let Err(error) = annotations.overwrite().and(annotations.public()) {
            return Check::waits(Subject::Annotations, &self.not_an_address(&error));
        }
        let there = Key::WRITTEN.into_iter().filter(|key| annotations.text(*key).is_some()).count();
        if there == 0 {
            let found = format!("Node {name} has none yet: an agent writes them with its lease");
            return Check::good(Subject::Annotations, found);
        }
        if !annotations.is_managed() {
            let found =
                format!("{} is not \"true\", so that other nodes do not see this one", self.keys.name(Key::Managed));
            return doubtful(found, "an agent writes it when it starts; if one is running, look at its log");
        }
        let attrs = match attrs(annotations) {
            Ok(attrs) => attrs,
            Err(reason) => {
                return doubtful(
                    format!("its annotations are damaged: {reason}"),
                    "an agent writes them again when it starts; if one is running, find the other program that writes them",
                );
            }
        };
        match backend {
            Some(backend) if LeaseAttrs::backend_name(backend) != attrs.backend_type => doubtful(
                format!(
                    "{} is {:?}, and the network configuration says {backend:?}",
                    self.keys.name(Key::BackendType),
                    &*attrs.backend_type
                ),
                "another program wrote it, or an agent with another configuration: run one agent a node, and restart it",
            ),
            _ => Check::good(Subject::Annotations, format!("Node {name} has all annotations that peers read")),
        }
    }
}

/// Compares the server's clock with this machine's.
fn clocks(server: Timestamp, here: Timestamp) -> Check {
    let ahead = here.as_second() - server.as_second();
    let seconds = ahead.unsigned_abs();
    let found = match ahead {
        0 => "this machine's clock agrees with the API server's".to_owned(),
        1.. => format!("this machine's clock is {seconds} s ahead of the API server's"),
        _ => format!("this machine's clock is {seconds} s behind the API server's"),
    };
    if seconds <= MAX_SKEW {
        return Check::good(Subject::Clock, found);
    }
    let remedy = "set both by NTP: certificates and tokens are checked against these clocks";
    Check::new(Subject::Clock, Verdict::Doubtful, found, remedy)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clocks_that_differ_by_more_than_a_minute_are_doubtful() {
        let server = Timestamp::from_second(1_800_000_000).unwrap();
        for (seconds, verdict, part) in [
            (0, Verdict::Good, "agrees with"),
            (60, Verdict::Good, "60 s ahead"),
            (61, Verdict::Doubtful, "61 s ahead"),
            (-60, Verdict::Good, "60 s behind"),
            (-3600, Verdict::Doubtful, "3600 s behind"),
        ] {
            let here = Timestamp::from_second(server.as_second() + seconds).unwrap();
            let check = clocks(server, here);
            assert_eq!((check.verdict, check.remedy.is_some()), (verdict, verdict != Verdict::Good), "{seconds}");
            assert!(check.found.contains(part), "{}", check.found);
        }
    }
}
