//! All Nodes as last seen, to find what is new in a list or a watch.

use std::collections::HashMap;
use std::collections::hash_map::RandomState;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use flannel_core::lease::{LeaseEvent, LeaseKey, OldestRecords};
use flannel_core::net::Dual;
use flannel_core::subnet::NodeIdentity;

use crate::annotations::{AddrError, Published};
use crate::list_watch::{Mark, is_before};
use crate::node::Node;

/// The kind of a watch event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    Put,
    Deleted,
}

/// The managed Nodes, each with a fingerprint of its relevant fields: a heartbeat has the same one.
#[derive(Default)]
pub(crate) struct Nodes {
    published: Arc<Mutex<Published>>,
    hasher: RandomState,
    fingerprints: HashMap<Box<str>, u64>,
    /// Whether there were more than are kept. Then nothing is known about a Node that is missing.
    is_incomplete: bool,
    /// The records of the list that is being read.
    records: OldestRecords,
    /// The last change in that list.
    mark: Option<Mark>,
    own: Own,
}

/// The settings of the own Node that others made for this node.
#[derive(Default)]
struct Own {
    name: Option<NodeIdentity>,
    fingerprint: Option<u64>,
    /// The addresses to publish, if they changed and are not reported yet.
    news: Option<Result<Dual<IpAddr>, AddrError>>,
}

impl Nodes {
    pub(crate) fn new(published: Arc<Mutex<Published>>) -> Self {
        Self { published, ..Self::default() }
    }

    /// Starts a list and discards what was known.
    pub(crate) fn begin_list(&mut self, own: Option<&NodeIdentity>) {
        self.own = Own { name: own.cloned(), ..Own::default() };
        self.fingerprints.clear();
        self.is_incomplete = false;
        (self.records, self.mark) = (OldestRecords::default(), None);
    }

    /// Adds a Node of a list.
    pub(crate) fn list(&mut self, node: &Node<'_>) {
        let mark = || Mark { node: node.name.to_string(), version: node.resource_version.to_string() };
        match &mut self.mark {
            None => self.mark = Some(mark()),
            Some(last) if is_before(&last.version, &node.resource_version) => *last = mark(),
            Some(_) => {}
        }
        self.look_at_own(node);
        if !node.annotations.is_managed() {
            return;
        }
        let fingerprint = node.fingerprint(&self.hasher);
        self.remember(&node.name, fingerprint);
        self.records.push(node.record(&locked(&self.published)));
    }

    /// Ends the list. Returns it with the last change in it.
    pub(crate) fn end_list(&mut self) -> (LeaseEvent, Option<Mark>) {
        (LeaseEvent::Reset(std::mem::take(&mut self.records).finish()), self.mark.take())
    }

    /// Handles a changed Node. Returns the event to report, if any.
    pub(crate) fn change(&mut self, change: Change, node: &Node<'_>) -> Option<LeaseEvent> {
        if change == Change::Put {
            self.look_at_own(node);
        }
        let name = &*node.name;
        if change == Change::Deleted || !node.annotations.is_managed() {
            let was_known = self.fingerprints.remove(name).is_some() || self.is_incomplete;
            return was_known.then(|| LeaseEvent::Remove(LeaseKey::of_bytes(name.as_bytes())));
        }
        let fingerprint = node.fingerprint(&self.hasher);
        if !self.remember(name, fingerprint) {
            return None;
        }
        Some(LeaseEvent::Upsert(node.record(&locked(&self.published))))
    }

    /// Takes the addresses that this node is to publish, if others changed them since.
    pub(crate) fn take_own_news(&mut self) -> Option<Result<Dual<IpAddr>, AddrError>> {
        self.own.news.take()
    }

    fn look_at_own(&mut self, node: &Node<'_>) {
        if self.own.name.as_ref().is_none_or(|name| name.as_str() != node.name) {
            return;
        }
        let fingerprint = Some(node.settings_fingerprint(&self.hasher));
        if self.own.fingerprint != fingerprint {
            self.own.fingerprint = fingerprint;
            self.own.news = Some(node.annotations.public());
        }
    }

    /// Stores the fingerprint of a Node. Returns whether it changed.
    fn remember(&mut self, name: &str, fingerprint: u64) -> bool {
        if let Some(known) = self.fingerprints.get_mut(name) {
            return std::mem::replace(known, fingerprint) != fingerprint;
        }
        if self.fingerprints.len() < OldestRecords::LIMIT {
            self.fingerprints.insert(name.into(), fingerprint);
        } else {
            self.is_incomplete = true;
        }
        true
    }
}

/// Locks a mutex. A panic of another thread leaves the data consistent.
pub(crate) fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use flannel_core::lease::Record;

    use super::*;
    use crate::keys::{AnnotationPrefix, Keys};
    use crate::protobuf::testing::{member, number};
    use proptest::prelude::*;

    /// A Node in which each field has a few values.
    #[derive(Debug, Clone, PartialEq, Eq)]
    pub(crate) struct Model {
        uid: u8,
        pub(crate) cidr: u8,
        public: u8,
        pub(crate) managed: bool,
        /// Irrelevant fields: heartbeats, images, others' annotations.
        pub(crate) noise: u8,
    }

    impl Model {
        pub(crate) fn plain() -> Self {
            Self { uid: 0, cidr: 0, public: 0, managed: true, noise: 0 }
        }

        pub(crate) fn message(&self, name: u8, version: u64) -> Vec<u8> {
            let Self { uid, cidr, public, managed, noise } = self;
            // The last of these is not an address.
            let public = ["192.0.2.1", "192.0.2.2", "192.0.2"][usize::from(public % 3)];
            let annotations = [
                ("example.com/noise", &*noise.to_string()),
                ("flannel.alpha.coreos.com/kube-subnet-manager", &managed.to_string()),
                ("flannel.alpha.coreos.com/backend-type", "vxlan"),
                ("flannel.alpha.coreos.com/backend-data", "{\"VNI\":1}"),
                ("flannel.alpha.coreos.com/public-ip", public),
            ];
            let metadata = [
                member(1, format!("node-{name}")),
                member(5, format!("u{}", uid % 2)),
                member(6, version.to_string()),
                member(8, number(1, 1_700_000_000)),
                annotations
                    .iter()
                    .flat_map(|(name, text)| member(12, [member(1, name), member(2, text)].concat()))
                    .collect(),
            ];
            let spec = member(1, format!("10.244.{}.0/24", cidr % 3));
            [member(1, metadata.concat()), member(2, spec), member(3, [*noise; 9])].concat()
        }
    }

    pub(crate) fn model() -> impl Strategy<Value = Model> {
        (any::<u8>(), any::<u8>(), any::<u8>(), prop::bool::weighted(0.8), any::<u8>())
            .prop_map(|(uid, cidr, public, managed, noise)| Model { uid, cidr, public, managed, noise })
    }

    #[test]
    fn a_node_that_is_deleted_is_told_of_however_many_there_are() {
        let keys = Keys::new(AnnotationPrefix::default());
        let mut nodes = Nodes::default();
        let one = Model::plain();
        nodes.fingerprints = (0..OldestRecords::LIMIT as u64).map(|n| (n.to_string().into(), n)).collect();
        let message = one.message(1, 1);
        let node = Node::parse(&message, &keys).unwrap();
        assert!(nodes.change(Change::Deleted, &node).is_none(), "it was never there");
        assert!(nodes.change(Change::Put, &node).is_some());
        assert!(nodes.change(Change::Deleted, &node).is_some());
    }

    #[derive(Debug, Clone)]
    enum Act {
        Put(u8, Model),
        /// The same again except for irrelevant fields.
        Heartbeat(u8, u8),
        Delete(u8),
        /// Following acts are not seen until a list.
        Gap,
        List,
    }

    fn act() -> impl Strategy<Value = Act> {
        prop_oneof![
            4 => (0..4_u8, model()).prop_map(|(name, model)| Act::Put(name, model)),
            2 => (0..4_u8, any::<u8>()).prop_map(|(name, noise)| Act::Heartbeat(name, noise)),
            2 => (0..4_u8).prop_map(Act::Delete),
            1 => Just(Act::Gap),
            1 => Just(Act::List),
        ]
    }

    fn parse(message: &[u8]) -> Node<'_> {
        Node::parse(message, &Keys::new(AnnotationPrefix::default())).unwrap()
    }

    fn list(nodes: &mut Nodes, state: &BTreeMap<u8, Model>) -> LeaseEvent {
        nodes.begin_list(None);
        for (name, model) in state {
            nodes.list(&parse(&model.message(*name, model.noise.into())));
        }
        nodes.end_list().0
    }

    pub(crate) fn fold(records: &mut BTreeMap<LeaseKey, Record>, event: LeaseEvent) {
        match event {
            LeaseEvent::Reset(all) => {
                *records = all.into_iter().map(|record| (record.key.clone(), record)).collect();
            }
            LeaseEvent::Upsert(record) => drop(records.insert(record.key.clone(), record)),
            LeaseEvent::Remove(key) => assert!(records.remove(&key).is_some(), "{key} goes and was not there"),
            LeaseEvent::Resumed | LeaseEvent::ThisNode(_) | LeaseEvent::ConfigChanged => {}
        }
    }

    proptest! {
        /// Whatever happens, seen or not: the reported events add up to what a fresh list would return. Irrelevant
        /// changes are not reported.
        #[test]
        fn any_sequence_of_lists_events_and_gaps_adds_up_to_a_fresh_list(acts in prop::collection::vec(act(), 1..40)) {
            let (mut nodes_seen, mut state, mut records) = (Nodes::default(), BTreeMap::new(), BTreeMap::new());
            let mut is_seen = true;
            fold(&mut records, list(&mut nodes_seen, &state));
            for act in acts {
                let before = state.clone();
                let mut change = |change, name: u8, model: &Model| {
                    let message = model.message(name, model.noise.into());
                    let event = is_seen.then(|| nodes_seen.change(change, &parse(&message))).flatten();
                    let is_news = event.is_some();
                    event.into_iter().for_each(|event| fold(&mut records, event));
                    is_news
                };
                match act {
                    Act::Put(name, model) => {
                        change(Change::Put, name, &model);
                        state.insert(name, model);
                    }
                    Act::Heartbeat(name, noise) => {
                        let Some(model) = state.get_mut(&name) else { continue };
                        model.noise = noise;
                        prop_assert!(!change(Change::Put, name, model), "a heartbeat is no news");
                    }
                    Act::Delete(name) => {
                        let Some(model) = state.remove(&name) else { continue };
                        change(Change::Deleted, name, &model);
                    }
                    Act::Gap => is_seen = false,
                    Act::List => {
                        is_seen = true;
                        fold(&mut records, list(&mut nodes_seen, &state));
                    }
                }
                if is_seen {
                    let mut fresh = BTreeMap::new();
                    fold(&mut fresh, list(&mut Nodes::default(), &state));
                    prop_assert_eq!(&records, &fresh, "after {:?}", before);
                }
            }
        }
    }
}
