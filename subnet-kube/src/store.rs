//! The operations of a [`SubnetManager`](flannel_core::subnet::SubnetManager) on the own Node.

use std::collections::BTreeMap;
use std::collections::hash_map::RandomState;
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};

use flannel_core::allocation::compatible;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::files::{self, Trust};
use flannel_core::lease::{Lease, LeaseAttrs, LeaseKey};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::subnet::{NodeIdentity, SubnetError, ThisNode, Want};
use flannel_core::text::cut;
use serde_json::{Map, Value, json};
use tokio::sync::OnceCell;

use crate::annotations::{AddrError, Annotations, Published, written};
use crate::api::{Api, percent_encoded};
use crate::error::{Fault, Kind};
use crate::keys::{Key, Keys};
use crate::node::Node;
use crate::nodes::locked;
use crate::protobuf::{Events, object};
use crate::{ConfigSource, EventKind, NodeName};

/// The longest message of an Event, in bytes: as many as the API server takes of newer kinds of Events.
const MAX_MESSAGE: usize = 1000;

pub(crate) struct Store {
    pub(crate) api: Api,
    pub(crate) keys: Keys,
    pub(crate) published: Arc<Mutex<Published>>,
    pub(crate) node: NodeName,
    /// The node's name, once it is known.
    pub(crate) name: OnceCell<NodeIdentity>,
    pub(crate) config: ConfigSource,
    /// Addresses to publish if the Node has no annotation for them.
    pub(crate) public: Dual<IpAddr>,
    pub(crate) last_read: Mutex<LastRead>,
    pub(crate) hasher: RandomState,
}

/// The own Node as last read.
#[derive(Debug, Clone, Default)]
pub(crate) struct LastRead {
    /// Empty if there is none.
    version: String,
    fingerprint: Option<u64>,
}

const READING: &str = "reading the own node";

/// Returns the time as Kubernetes writes it.
fn now() -> String {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

impl Store {
    pub(crate) async fn config(&self) -> Result<NetworkConfig, SubnetError> {
        match &self.config {
            ConfigSource::Fixed(config) => Ok(config.clone()),
            ConfigSource::File(path) => {
                let path = path.clone();
                let read = tokio::task::spawn_blocking(move || read_config(&path)).await;
                read.unwrap_or_else(|source| {
                    Err(SubnetError::Unavailable { doing: "reading the network configuration", source: source.into() })
                })
            }
        }
    }

    /// Returns the node's name, if it is known without a request.
    pub(crate) fn known_name(&self) -> Option<&NodeIdentity> {
        match &self.node {
            NodeName::Named(name) => Some(name),
            NodeName::OfPod { .. } => self.name.get(),
        }
    }

    /// Returns the node's name.
    pub(crate) async fn name(&self) -> Result<&NodeIdentity, SubnetError> {
        self.name.get_or_try_init(|| self.find_name()).await
    }

    async fn find_name(&self) -> Result<NodeIdentity, SubnetError> {
        let (namespace, pod) = match &self.node {
            NodeName::Named(name) => return Ok(name.clone()),
            NodeName::OfPod { namespace, pod } => (namespace, pod),
        };
        let at = || format!("Pod {namespace}/{pod}");
        let name = match self.api.node_of_pod(namespace, pod).await {
            Err(fault) if fault.kind == Kind::Missing => {
                let reason =
                    "there is no such Pod; give the node's name, or the name and namespace of this program's Pod";
                return Err(SubnetError::Unconfigured { at: at(), reason: reason.to_owned() });
            }
            result => result.map_err(|fault| fault.into_subnet_error("asking for the Pod's node"))?,
        };
        if name.is_empty() {
            let reason = "it has no spec.nodeName yet; the scheduler sets it".to_owned();
            return Err(SubnetError::Unconfigured { at: at(), reason });
        }
        NodeIdentity::new(&name)
            .map_err(|error| SubnetError::Invalid { at: at(), reason: format!("spec.nodeName: {error}") })
    }

    pub(crate) async fn this_node(&self) -> Result<ThisNode, SubnetError> {
        let name = self.name().await?.clone();
        let answer = self.own_node(name.as_str(), READING).await?;
        let node = self.parse_own(&answer, READING)?;
        let public = node.annotations.public();
        let public = public.map_err(|error| self.not_an_address(&error))?;
        Ok(ThisNode::named(name).publishing(self.with_given(public)))
    }

    /// Returns these addresses, with the program's addresses for missing ones.
    pub(crate) fn with_given(&self, public: Dual<IpAddr>) -> Dual<IpAddr> {
        Dual { v4: public.v4.or(self.public.v4), v6: public.v6.or(self.public.v6) }
    }

    /// Waits until the own Node differs from what a call last read. Never returns if that cannot be detected.
    pub(crate) async fn changed(&self) {
        if self.until_changed().await.is_err() {
            // The next call returns the error.
            std::future::pending().await
        }
    }

    async fn until_changed(&self) -> Result<(), Fault> {
        let Some(name) = self.known_name() else { return Err(Fault::no_answer("the node's name is not known")) };
        let LastRead { version, fingerprint } = locked(&self.last_read).clone();
        // Without a version, the watch begins with the present state.
        let (name, version) = (percent_encoded(name.as_str()), percent_encoded(&version));
        let query = format!("fieldSelector=metadata.name%3D{name}&resourceVersion={version}");
        let mut arriving = self.api.watch_nodes(&query).await?;
        let mut events = Events::default();
        while let Some(bytes) = arriving.next().await? {
            events.feed(&bytes);
            while let Some(event) = events.next()? {
                match &*event.kind {
                    "ADDED" | "MODIFIED" => {
                        let node = Node::parse(event.object, &self.keys)?;
                        if Some(node.settings_fingerprint(&self.hasher)) != fingerprint {
                            return Ok(());
                        }
                    }
                    "DELETED" => return Ok(()),
                    _ => return Err(Fault::no_answer("the version asked for is gone")),
                }
            }
        }
        Err(Fault::no_answer("the watch of the own node ended"))
    }

    pub(crate) async fn previous(&self, name: &NodeIdentity) -> Result<Vec<Lease>, SubnetError> {
        const DOING: &str = "reading the previous lease";
        let answer = match self.api.node(name.as_str()).await {
            Err(fault) if fault.kind == Kind::Missing => return Ok(Vec::new()),
            result => result.map_err(|fault| fault.into_subnet_error(DOING))?,
        };
        let node = self.parse(&answer, DOING)?;
        if !node.annotations.is_managed() {
            return Ok(Vec::new());
        }
        // After the Node, as in acquire.
        let config = self.config().await?;
        let Ok(subnets) = assigned(name.as_str(), &node, &config) else { return Ok(Vec::new()) };
        // A bad record of this node counts as none: acquire overwrites it.
        let lease = node.record(&locked(&self.published)).lease.ok();
        let shown =
            |lease: Arc<Lease>| Lease::new(lease.key.clone(), subnets, lease.attrs.clone()).fenced(lease.fence.clone());
        Ok(lease.map(shown).into_iter().collect())
    }

    pub(crate) async fn acquire(&self, name: &NodeIdentity, want: Want) -> Result<Lease, SubnetError> {
        const DOING: &str = "acquiring a lease";
        // Before the configuration: an error about that is returned only if the API server answers.
        let answer = self.own_node(name.as_str(), DOING).await?;
        let node = self.parse_own(&answer, DOING)?;
        let config = self.config().await?;
        let subnets = assigned(name.as_str(), &node, &config)?;
        let overwrite = self.overwrite(&node)?;
        self.publish(name.as_str(), &node, &want.attrs, &overwrite).await.map_err(|fault| match fault.kind {
            Kind::Missing => no_node(name.as_str()),
            _ => fault.into_subnet_error(DOING),
        })?;
        let key = LeaseKey::of_bytes(name.as_str().as_bytes());
        Ok(Lease::new(key, subnets, want.attrs).fenced(node.fence()))
    }

    pub(crate) async fn renew(&self, lease: &Lease) -> Result<Lease, SubnetError> {
        const DOING: &str = "writing the lease";
        let name = lease.key.as_str();
        let answer = match self.api.node(name).await {
            Err(fault) if fault.kind == Kind::Missing => {
                return Err(SubnetError::Lost(format!("Node {name} is gone")));
            }
            result => result.map_err(|fault| fault.into_subnet_error(READING))?,
        };
        let node = self.parse(&answer, READING)?;
        if node.fence() != lease.fence {
            return Err(SubnetError::Lost(format!("Node {name} was deleted and created again")));
        }
        // Not compared with the network: its configuration may have changed, and the lease is still this node's.
        let assigned = node.subnets().unwrap_or_default();
        if lease.subnets.iter().any(|(family, subnet)| assigned.get(family) != Some(subnet)) {
            return Err(SubnetError::Lost(format!("Node {name} has other podCIDRs")));
        }
        let overwrite = self.overwrite(&node)?;
        self.publish(name, &node, &lease.attrs, &overwrite).await.map_err(|fault| match fault.kind {
            Kind::Missing | Kind::Replaced => SubnetError::Lost(format!("Node {name} was deleted meanwhile")),
            _ => fault.into_subnet_error(DOING),
        })?;
        Ok(lease.clone())
    }

    pub(crate) async fn release(&self, lease: &Lease) -> Result<(), SubnetError> {
        const DOING: &str = "releasing the lease";
        let name = lease.key.as_str();
        let answer = match self.api.node(name).await {
            Err(fault) if fault.kind == Kind::Missing => return Ok(()),
            result => result.map_err(|fault| fault.into_subnet_error(DOING))?,
        };
        let node = self.parse(&answer, DOING)?;
        if node.fence() != lease.fence {
            return Ok(());
        }
        locked(&self.published).forget(name);
        let there = Key::WRITTEN.into_iter().filter(|key| node.annotations.text(*key).is_some());
        match self.patch(name, &node, there.map(|key| (key, Value::Null)).collect()).await {
            // It no longer belongs to this node.
            Err(fault) if matches!(fault.kind, Kind::Missing | Kind::Replaced) => Ok(()),
            result => result.map_err(|fault| fault.into_subnet_error(DOING)),
        }
    }

    /// Writes the condition `NetworkUnavailable` and replaces the old one.
    pub(crate) async fn set_network_unavailable(&self, is_unavailable: bool) -> Result<(), SubnetError> {
        const DOING: &str = "writing the node's condition NetworkUnavailable";
        let name = self.name().await?;
        let now = now();
        let (status, reason, message) = match is_unavailable {
            false => ("False", "FlannelIsUp", "Flannel is running on this node"),
            true => ("True", "FlannelIsDown", "Flannel is not running on this node"),
        };
        let condition = json!({
            "type": "NetworkUnavailable",
            "status": status,
            "reason": reason,
            "message": message,
            "lastTransitionTime": now,
            "lastHeartbeatTime": now,
        });
        let patch = json!({ "status": { "conditions": [condition] } }).to_string();
        match self.api.patch_node_status(name.as_str(), patch.into()).await {
            Err(fault) if fault.kind == Kind::Missing => Err(no_node(name.as_str())),
            result => result.map_err(|fault| fault.into_subnet_error(DOING)),
        }
    }

    /// Creates an Event about the Node, as kubelets do: with the Node's name in place of its uid.
    pub(crate) async fn record_event(&self, kind: EventKind, reason: &str, message: &str) -> Result<(), SubnetError> {
        let name = self.name().await?.as_str();
        let now = now();
        let mut message = message.to_owned();
        cut(&mut message, MAX_MESSAGE);
        let event = json!({
            "metadata": { "generateName": format!("{name}."), "namespace": "default" },
            "involvedObject": { "kind": "Node", "name": name, "uid": name },
            "type": kind.as_str(),
            "reason": reason,
            "message": message,
            "source": { "component": "flanneld", "host": name },
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        });
        let created = self.api.create_event(event.to_string().into()).await;
        created.map_err(|fault| fault.into_subnet_error("creating an Event of the Node"))
    }

    /// Returns the addresses that an operator wants to be published in place of the public IPs.
    fn overwrite(&self, node: &Node<'_>) -> Result<Dual<IpAddr>, SubnetError> {
        node.annotations.overwrite().map_err(|error| self.not_an_address(&error))
    }

    /// Writes the annotations that differ. If none differ, nothing is written.
    async fn publish(
        &self,
        name: &str,
        node: &Node<'_>,
        attrs: &LeaseAttrs,
        overwrite: &Dual<IpAddr>,
    ) -> Result<(), Fault> {
        // Before the watch can show what is written.
        locked(&self.published).set(name, attrs.clone());
        self.patch(name, node, differing(&node.annotations, attrs, overwrite)).await
    }

    /// Writes these annotations into the Node that was read, but not into a Node that replaced it.
    async fn patch(&self, name: &str, node: &Node<'_>, changed: BTreeMap<Key, Value>) -> Result<(), Fault> {
        if changed.is_empty() {
            return Ok(());
        }
        let texts: Map<_, _> = changed.into_iter().map(|(key, value)| (self.keys.name(key), value)).collect();
        let patch = json!({ "metadata": { "uid": node.uid, "annotations": texts } });
        self.api.patch_node_status(name, patch.to_string().into()).await
    }

    async fn own_node(&self, name: &str, doing: &'static str) -> Result<Vec<u8>, SubnetError> {
        match self.api.node(name).await {
            Err(fault) if fault.kind == Kind::Missing => {
                *locked(&self.last_read) = LastRead::default();
                Err(no_node(name))
            }
            result => result.map_err(|fault| fault.into_subnet_error(doing)),
        }
    }

    /// Parses the own Node in an answer, and stores its version for [`changed`](Self::changed).
    fn parse_own<'a>(&self, answer: &'a [u8], doing: &'static str) -> Result<Node<'a>, SubnetError> {
        let node = self.parse(answer, doing)?;
        let fingerprint = Some(node.settings_fingerprint(&self.hasher));
        *locked(&self.last_read) = LastRead { version: node.resource_version.to_string(), fingerprint };
        Ok(node)
    }

    /// Parses the Node in an answer.
    fn parse<'a>(&self, answer: &'a [u8], doing: &'static str) -> Result<Node<'a>, SubnetError> {
        let node = object(answer).and_then(|message| Node::parse(message, &self.keys));
        node.map_err(|error| Fault::from(error).into_subnet_error(doing))
    }

    pub(crate) fn not_an_address(&self, error: &AddrError) -> SubnetError {
        let AddrError { key, found, family } = error;
        let name = self.known_name().map_or("", NodeIdentity::as_str);
        SubnetError::Unconfigured {
            at: format!("Node {name}, annotation {}", self.keys.name(*key)),
            reason: format!("{found:?} is not an {family} address; correct or remove it"),
        }
    }
}

fn differing(annotations: &Annotations<'_>, attrs: &LeaseAttrs, overwrite: &Dual<IpAddr>) -> BTreeMap<Key, Value> {
    let wanted = written(attrs, overwrite).into_iter();
    let changed = wanted.filter(|(key, text)| annotations.text(*key).as_deref() != Some(&**text));
    changed.map(|(key, text)| (key, Value::from(text))).collect()
}

pub(crate) fn no_node(name: &str) -> SubnetError {
    SubnetError::Unconfigured {
        at: format!("Node {name}"),
        reason: "there is no such Node; its kubelet registers it".to_owned(),
    }
}

/// Returns the subnet assigned to the node in each family of the network.
pub(crate) fn assigned(name: &str, node: &Node<'_>, config: &NetworkConfig) -> Result<Dual<Prefix>, SubnetError> {
    let waiting = |reason: String| SubnetError::Unconfigured { at: format!("Node {name}, spec.podCIDRs"), reason };
    let subnets = node.subnets().map_err(|error| waiting(error.to_string()))?;
    let mut taken = Dual::default();
    for (family, network) in config.networks.iter() {
        let Some(subnet) = subnets.get(family) else {
            return Err(waiting(format!(
                "it has no {family} entry; kube-controller-manager assigns one if it runs with --allocate-node-cidrs \
                 and an {family} range in --cluster-cidr"
            )));
        };
        if !compatible(network, subnet) {
            let key = match family {
                Family::V4 => "Network",
                Family::V6 => "IPv6Network",
            };
            return Err(waiting(format!(
                "{subnet} is not inside {key} {}; make {key} of the network configuration and --cluster-cidr of \
                 kube-controller-manager the same",
                network.prefix
            )));
        }
        *taken.slot(family) = Some(*subnet);
    }
    Ok(taken)
}

fn read_config(path: &Path) -> Result<NetworkConfig, SubnetError> {
    let at = path.display().to_string();
    let text = match files::read(path, Trust::Owners, NetworkConfig::MAX_BYTES as u64) {
        Ok(Some(text)) => text,
        Ok(None) => {
            return Err(SubnetError::Unconfigured {
                at,
                reason: "there is no such file; write flannel's JSON document there, such as \
                         {\"Network\":\"10.244.0.0/16\",\"Backend\":{\"Type\":\"vxlan\"}}"
                    .to_owned(),
            });
        }
        Err(error) => return Err(SubnetError::Unconfigured { at, reason: format!("cannot read it: {error}") }),
    };
    NetworkConfig::parse(&text, Allocation::External).map_err(|error| SubnetError::Invalid {
        at: format!("{at} {}", error.path),
        reason: format!("{}; {}", error.problem, error.remedy),
    })
}
