//! A scripted API server behind the client: it does at once what a real server cannot be made to do at a given moment.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{LeaseEvent, LeaseKey, Record};
use flannel_core::subnet::{NodeIdentity, SubnetError, SubnetManager};
use futures_util::stream::{self, BoxStream, StreamExt};
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Frame;
use kube::client::Body;
use proptest::prelude::*;
use tokio::sync::watch;
use tokio::time::{Instant, timeout_at};

use crate::nodes::locked;
use crate::nodes::tests::{Model, fold, model};
use crate::protobuf::TYPE;
use crate::protobuf::testing::{event, list, member, number, object};
use crate::{ConfigSource, KubeSubnets, NodeName, Options};

pub(crate) type Answer = Response<UnsyncBoxBody<Bytes, io::Error>>;

/// The events of a test, in order.
#[derive(Debug, Clone)]
enum Act {
    Put(u8, Model),
    /// The same again except for irrelevant fields.
    Heartbeat(u8, u8),
    Delete(u8),
    Bookmark,
    /// All open watches end this way and drop what they have not sent.
    End(End),
    /// A request of this kind is answered this way.
    Refuse(Asked, Refusal),
    /// The server discards its history.
    Compact,
    BackUp,
    /// The server's store is restored from the last backup, and the server was unavailable meanwhile.
    Restore,
    /// This many seconds pass.
    Wait(u8),
}

/// How a watch ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    InOrder,
    Cut,
    HalfAnEvent,
    /// With an event `ERROR` of code 410.
    Gone,
    /// It stays open and sends nothing more, even after the server comes back with an older store.
    Silence,
}

/// The kind of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    Probe,
    List,
    Check,
    Watch,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Refusal {
    Status(u16),
    /// A list that ends in the middle; for a watch, its first event does.
    Half,
    /// There is no answer.
    Silence,
}

/// What the server says when it is asked for a version that its store has not reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
enum Behind {
    #[default]
    TooLarge,
    /// The words of etcd, which servers from 1.30 to 1.33 ask.
    Future,
    /// Words that are not known.
    Unknown,
}

impl Behind {
    fn answer(self) -> Answer {
        match self {
            Self::TooLarge => status(504, "Timeout: Too large resource version"),
            Self::Future => status(500, "etcdserver: mvcc: required revision is a future revision"),
            Self::Unknown => status(500, "no"),
        }
    }
}

/// The server's store.
#[derive(Debug, Clone, Default)]
struct Stored {
    version: u64,
    /// Each Node with the version of its last change.
    nodes: BTreeMap<u8, (Model, u64)>,
    history: Vec<Past>,
    /// The history before this version is discarded.
    compacted: u64,
}

/// A change. For a deletion `is_put` is false, and the Node is the former one.
#[derive(Debug, Clone)]
struct Past {
    version: u64,
    name: u8,
    model: Model,
    is_put: bool,
    is_new: bool,
}

#[derive(Debug, Default)]
struct State {
    stored: Stored,
    backup: Stored,
    /// How often the store was restored.
    restored: u64,
    /// The highest version of the store so far.
    highest: u64,
    refusals: VecDeque<(Asked, Refusal)>,
    behind: Behind,
    /// How often all watches ended, and how they ended last.
    ended: (u64, Option<End>),
    /// How many bookmarks were requested.
    bookmarks: u64,
}

#[derive(Clone, Default)]
struct Server {
    state: Arc<Mutex<State>>,
    /// Notifies of any change.
    news: watch::Sender<()>,
}

impl Stored {
    fn change(&mut self, epoch: u64, name: u8, model: Option<Model>) {
        // No version repeats, not even in the history of a restored store: a client could not detect that.
        self.version = (self.version / 16 + 1) * 16 + epoch;
        let version = self.version;
        let before = self.nodes.remove(&name);
        let is_new = before.is_none();
        let Some(past) = model.clone().or(before.map(|(model, _)| model)) else { return };
        self.history.push(Past { version, name, model: past, is_put: model.is_some(), is_new });
        if let Some(model) = model {
            self.nodes.insert(name, (model, version));
        }
    }

    fn items(&self) -> impl Iterator<Item = Vec<u8>> {
        self.nodes.iter().map(|(name, (model, version))| model.message(*name, *version))
    }

    /// Returns a Node as of a version.
    fn at(&self, name: u8, version: u64) -> Option<&Past> {
        let past = self.history.iter().rev().find(|past| past.name == name && past.version <= version);
        past.filter(|past| past.is_put)
    }
}

impl Past {
    fn event(&self) -> Vec<u8> {
        let kind = match (self.is_put, self.is_new) {
            (false, _) => "DELETED",
            (true, true) => "ADDED",
            (true, false) => "MODIFIED",
        };
        event(kind, &self.model.message(self.name, self.version))
    }
}

impl Server {
    fn new(behind: Behind) -> Self {
        let server = Self::default();
        locked(&server.state).behind = behind;
        server
    }

    fn client(&self) -> kube::Client {
        let server = self.clone();
        let serve = move |request: Request<Body>| {
            let answer = server.answer(request.uri().query().unwrap_or_default());
            async {
                match answer {
                    Some(answer) => Ok::<_, io::Error>(answer),
                    None => std::future::pending().await,
                }
            }
        };
        kube::Client::new(tower::service_fn(serve), "default")
    }

    fn act(&self, act: &Act) {
        let mut state = locked(&self.state);
        let epoch = state.restored;
        match act {
            Act::Put(name, model) => state.stored.change(epoch, *name, Some(model.clone())),
            Act::Heartbeat(name, noise) => {
                let Some((model, _)) = state.stored.nodes.get(name) else { return };
                let mut model = model.clone();
                model.noise = *noise;
                state.stored.change(epoch, *name, Some(model));
            }
            Act::Delete(name) if state.stored.nodes.contains_key(name) => state.stored.change(epoch, *name, None),
            Act::Delete(_) | Act::Wait(_) => {}
            Act::Bookmark => state.bookmarks += 1,
            Act::End(end) => state.ended = (state.ended.0 + 1, Some(*end)),
            Act::Refuse(asked, refusal) => state.refusals.push_back((*asked, *refusal)),
            Act::Compact => state.stored.compacted = state.stored.version,
            Act::BackUp => state.backup = state.stored.clone(),
            Act::Restore if epoch < 15 => {
                state.stored = state.backup.clone();
                state.restored += 1;
            }
            Act::Restore => {}
        }
        state.highest = state.highest.max(state.stored.version);
        self.news.send_replace(());
    }

    /// Whether a Node did not change after the store reached this version.
    fn is_behind(&self, version: u64) -> bool {
        locked(&self.state).stored.nodes.values().any(|(_, last)| *last <= version)
    }

    /// Returns the answer to a request, if there is one.
    fn answer(&self, query: &str) -> Option<Answer> {
        let query: BTreeMap<_, _> = query.split('&').filter_map(|pair| pair.split_once('=')).collect();
        let version = query.get("resourceVersion").and_then(|version| version.parse::<u64>().ok());
        let asked = match (query.get("watch"), query.get("resourceVersionMatch"), version) {
            (Some(_), ..) => Asked::Watch,
            (None, Some(&"Exact"), Some(_)) => Asked::Check,
            (None, Some(&"NotOlderThan"), Some(_)) => Asked::List,
            (None, None, None) => Asked::Probe,
            other => panic!("{query:?}: {other:?}"),
        };
        let version = version.unwrap_or_default();
        let refusal = {
            let mut state = locked(&self.state);
            let at = state.refusals.iter().position(|(which, _)| *which == asked);
            at.and_then(|at| state.refusals.remove(at)).map(|(_, refusal)| refusal)
        };
        match refusal {
            Some(Refusal::Status(code)) => return Some(status(code, "no")),
            Some(Refusal::Silence) => return None,
            Some(Refusal::Half) | None => {}
        }
        let state = locked(&self.state);
        let now = state.stored.version;
        let whole = match asked {
            Asked::Watch | Asked::Check if version < state.stored.compacted => return Some(status(410, "too old")),
            // A list is answered from the server's cache, in any version.
            Asked::List if version > now => return Some(Behind::TooLarge.answer()),
            Asked::Check if version > now => return Some(state.behind.answer()),
            Asked::Watch => {
                drop(state);
                let open = Open::new(self, version, refusal);
                let events = stream::unfold(open, async |mut open| Some((open.next().await?, open)));
                return Some(sent(StreamBody::new(events.map(|bytes| bytes.map(Frame::data))).boxed_unsync()));
            }
            Asked::Probe | Asked::List => list(&now.to_string(), &state.stored.items().collect::<Vec<_>>()),
            Asked::Check => {
                let name = query["fieldSelector"].strip_prefix("metadata.name%3Dnode-").unwrap().parse().unwrap();
                let found = state.stored.at(name, version);
                let found = found.map(|past| past.model.message(name, past.version));
                list(&version.to_string(), &found.into_iter().collect::<Vec<_>>())
            }
        };
        drop(state);
        let length = if refusal == Some(Refusal::Half) { whole.len() / 2 } else { whole.len() };
        Some(sent(full(whole[..length].to_vec())))
    }
}

/// An open watch.
struct Open {
    server: Server,
    news: watch::Receiver<()>,
    /// The last version sent.
    version: u64,
    ended: u64,
    restored: u64,
    bookmarks: u64,
    is_half: bool,
    is_silent: bool,
    is_over: bool,
}

impl Open {
    fn new(server: &Server, version: u64, refusal: Option<Refusal>) -> Self {
        let news = server.news.subscribe();
        let state = locked(&server.state);
        Self {
            server: server.clone(),
            news,
            version,
            ended: state.ended.0,
            restored: state.restored,
            bookmarks: state.bookmarks,
            is_half: refusal == Some(Refusal::Half),
            is_silent: false,
            is_over: false,
        }
    }

    async fn next(&mut self) -> Option<io::Result<Bytes>> {
        while !self.is_over {
            if let Some(sent) = self.step() {
                return Some(sent);
            }
            if !self.is_over {
                self.news.changed().await.ok()?;
            }
        }
        None
    }

    /// Returns what is sent now, if anything.
    fn step(&mut self) -> Option<io::Result<Bytes>> {
        let state = locked(&self.server.state);
        if state.restored != self.restored && !self.is_silent {
            self.is_over = true;
            return Some(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if state.ended.0 != self.ended {
            self.ended = state.ended.0;
            self.is_silent = state.ended.1 == Some(End::Silence);
            self.is_over = !self.is_silent;
            return match state.ended.1? {
                End::InOrder | End::Silence => None,
                End::Cut => Some(Err(io::ErrorKind::ConnectionReset.into())),
                End::HalfAnEvent => Some(Ok(half(&bookmark(self.version)))),
                End::Gone => Some(Ok(event("ERROR", &[member(3, "too old"), number(6, 410)].concat()).into())),
            };
        }
        if self.is_silent {
            return None;
        }
        let sent = if let Some(past) = state.stored.history.iter().find(|past| past.version > self.version) {
            self.version = past.version;
            past.event()
        } else if state.bookmarks > self.bookmarks {
            self.bookmarks = state.bookmarks;
            self.version = self.version.max(state.stored.version);
            bookmark(self.version)
        } else {
            return None;
        };
        self.is_over = self.is_half;
        Some(Ok(if self.is_half { half(&sent) } else { sent.into() }))
    }
}

fn bookmark(version: u64) -> Vec<u8> {
    event("BOOKMARK", &member(1, member(6, version.to_string())))
}

fn half(bytes: &[u8]) -> Bytes {
    Bytes::copy_from_slice(&bytes[..bytes.len() / 2])
}

pub(crate) fn sent(body: UnsyncBoxBody<Bytes, io::Error>) -> Answer {
    Response::builder().header(CONTENT_TYPE, TYPE).body(body).unwrap()
}

pub(crate) fn full(bytes: impl Into<Bytes>) -> UnsyncBoxBody<Bytes, io::Error> {
    Full::from(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// Returns a refusal with a Status object, as the API server sends it.
pub(crate) fn status(code: u16, message: &str) -> Answer {
    let reason = match code {
        404 => "NotFound",
        409 => "Conflict",
        410 => "Expired",
        422 => "Invalid",
        429 => "TooManyRequests",
        504 => "Timeout",
        _ => "InternalError",
    };
    let status = [member(3, message), member(4, reason), number(6, code.into())].concat();
    Response::builder().status(code).header(RETRY_AFTER, 1).body(full(object(&status))).unwrap()
}

fn act() -> impl Strategy<Value = Act> {
    let end =
        prop_oneof![Just(End::InOrder), Just(End::Cut), Just(End::HalfAnEvent), Just(End::Gone), Just(End::Silence)];
    let asked = prop_oneof![Just(Asked::Probe), Just(Asked::List), Just(Asked::Check), Just(Asked::Watch)];
    let refusal = prop_oneof![
        4 => prop_oneof![Just(410), Just(429), Just(500), Just(504)].prop_map(Refusal::Status),
        2 => Just(Refusal::Half),
        1 => Just(Refusal::Silence),
    ];
    prop_oneof![
        6 => (0..4_u8, model()).prop_map(|(name, model)| Act::Put(name, model)),
        3 => (0..4_u8, any::<u8>()).prop_map(|(name, noise)| Act::Heartbeat(name, noise)),
        3 => (0..4_u8).prop_map(Act::Delete),
        1 => Just(Act::Bookmark),
        3 => end.prop_map(Act::End),
        3 => (asked, refusal).prop_map(|(asked, refusal)| Act::Refuse(asked, refusal)),
        1 => Just(Act::Compact),
        1 => Just(Act::BackUp),
        1 => Just(Act::Restore),
        6 => (0..20_u8).prop_map(Act::Wait),
    ]
}

/// How long a watch may take to be up to date without further faults. A silent watch is detected within a minute.
const SETTLED: Duration = Duration::from_secs(100);

/// The records that a watch shows.
struct Seen {
    watch: BoxStream<'static, Result<LeaseEvent, SubnetError>>,
    records: BTreeMap<LeaseKey, Record>,
    /// How many errors it reported.
    errors: usize,
}

impl Seen {
    fn open(server: &Server) -> Self {
        let network = br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
        let config = ConfigSource::Fixed(NetworkConfig::parse(network, Allocation::External).unwrap());
        let options = Options::new(NodeName::Named(NodeIdentity::new("node-0").unwrap()), config);
        Self { watch: KubeSubnets::new(server.client(), options).watch(), records: BTreeMap::new(), errors: 0 }
    }

    /// Handles the events of this time span.
    async fn pass(&mut self, time: Duration) {
        let end = Instant::now() + time;
        while let Ok(item) = timeout_at(end, self.watch.next()).await {
            match item.unwrap() {
                Ok(event) => fold(&mut self.records, event),
                Err(_) => self.errors += 1,
            }
        }
    }
}

/// docs/faults.md, K3: the error of the watch that was cut is the only one if the words are known.
#[tokio::test(start_paused = true)]
async fn a_restored_store_is_listed_anew_whatever_words_the_server_has_for_it() {
    for (behind, errors) in [(Behind::TooLarge, 1), (Behind::Future, 1), (Behind::Unknown, 5)] {
        let server = Server::new(behind);
        let mut seen = Seen::open(&server);
        server.act(&Act::Put(1, Model::plain()));
        server.act(&Act::BackUp);
        server.act(&Act::Put(2, Model::plain()));
        seen.pass(Duration::from_secs(1)).await;
        assert_eq!(seen.records.len(), 2, "{behind:?}");
        server.act(&Act::Restore);
        seen.pass(SETTLED).await;
        assert_eq!((seen.records.len(), seen.errors), (1, errors), "{behind:?}");
    }
}

proptest! {
    /// Whatever a server sends, refuses or leaves out, and wherever its watches and lists end: in the end the reported
    /// events add up to a fresh list.
    #[test]
    fn any_sequence_of_lists_events_bookmarks_cuts_and_gaps_folds_to_the_records_of_a_fresh_list(
        acts in prop::collection::vec(act(), 1..60),
        behind in prop_oneof![Just(Behind::TooLarge), Just(Behind::Future), Just(Behind::Unknown)],
    ) {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let server = Server::new(behind);
            let mut seen = Seen::open(&server);
            for act in acts {
                server.act(&act);
                let time = if let Act::Wait(seconds) = act { seconds.into() } else { 0 };
                seen.pass(Duration::from_secs(time)).await;
            }
            locked(&server.state).refusals.clear();
            seen.pass(SETTLED).await;
            // A Node of a restored older store is known again with its next heartbeat at the latest.
            let highest = locked(&server.state).highest;
            while server.is_behind(highest) {
                (0..4).for_each(|name| server.act(&Act::Heartbeat(name, 0)));
            }
            seen.pass(SETTLED).await;
            let mut fresh = Seen::open(&server);
            fresh.pass(Duration::from_secs(1)).await;
            prop_assert_eq!(&seen.records, &fresh.records);
            let managed = locked(&server.state).stored.nodes.values().filter(|(model, _)| model.managed).count();
            prop_assert_eq!(fresh.records.len(), managed);
            // And the watch continues as before.
            server.act(&Act::Delete(0));
            server.act(&Act::Delete(1));
            server.act(&Act::Put(2, Model::plain()));
            seen.pass(SETTLED).await;
            fresh.pass(SETTLED).await;
            prop_assert_eq!(&seen.records, &fresh.records);
            Ok(())
        })?;
    }
}
