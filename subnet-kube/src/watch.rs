//! The watch of the Nodes: carries out the steps of `list_watch`.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use flannel_core::backoff::Jitter;
use flannel_core::lease::LeaseEvent;
use flannel_core::subnet::SubnetError;
use futures_util::StreamExt;
use futures_util::stream::{self, BoxStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use crate::api::{Arriving, Extent, failure, percent_encoded};
use crate::error::{Fault, Kind};
use crate::keys::Keys;
use crate::list_watch::{ListWatch, Mark, Step};
use crate::node::{Node, VERSION};
use crate::nodes::{Change, Nodes};
use crate::protobuf::{Event, Events, Items, Malformed, find, text};
use crate::store::Store;

/// How long a server holds a watch open, in seconds. Up to half of it is added, so that a thousand watches do not end
/// at once.
const WATCH: u64 = 600;

/// Returns all records, then the changes.
pub(crate) fn watch(store: Arc<Store>) -> BoxStream<'static, Item> {
    let nodes = Nodes::new(Arc::clone(&store.published));
    let watch = Watch {
        store,
        list_watch: ListWatch::new(Jitter::random()),
        nodes,
        source: None,
        pause: None,
        ready: VecDeque::new(),
        jitter: Jitter::random(),
    };
    let (sender, mut items) = mpsc::channel(AHEAD);
    let mut run = Some(watch.run(sender));
    // The task ends with the stream.
    let mut task = JoinSet::new();
    stream::poll_fn(move |context| {
        // Not earlier: a watch may be created outside of a runtime.
        if let Some(run) = run.take() {
            task.spawn(run);
        }
        items.poll_recv(context)
    })
    .boxed()
}

type Item = Result<LeaseEvent, SubnetError>;

/// How many items are read ahead.
const AHEAD: usize = 16;

struct Watch {
    store: Arc<Store>,
    list_watch: ListWatch,
    nodes: Nodes,
    source: Option<Source>,
    /// How long to wait before the next step.
    pause: Option<Duration>,
    /// Events and errors that are not reported yet.
    ready: VecDeque<Item>,
    jitter: Jitter,
}

/// An open watch.
struct Source {
    arriving: Arriving,
    events: Events,
    /// How long the server was asked to hold it open.
    asked: Duration,
}

/// Why a watch is not read any further.
enum Stop {
    Fault(Fault),
    /// The requested version is gone, or the server has another history: everything is listed after this wait.
    List(Option<Duration>),
}

impl From<Malformed> for Stop {
    fn from(error: Malformed) -> Self {
        Self::Fault(Fault::malformed(error))
    }
}

impl Watch {
    /// Reads on its own task: the many heartbeats wake this small task instead of the stream's consumer.
    async fn run(mut self, sender: mpsc::Sender<Item>) {
        while let Ok(place) = sender.reserve().await {
            place.send(self.next().await);
        }
    }

    async fn next(&mut self) -> Item {
        loop {
            if let Some(event) = self.ready.pop_front() {
                return event;
            }
            if let Some(pause) = self.pause {
                tokio::time::sleep(pause).await;
                self.pause = None;
            }
            if let Err(fault) = self.step().await {
                let lived = self.source.take().map(|source| source.arriving.since.elapsed());
                self.pause = Some(match fault.kind {
                    Kind::Refused => self.list_watch.refused(lived),
                    Kind::NoAnswer | Kind::Denied | Kind::Missing | Kind::Replaced | Kind::Gone | Kind::Busy(_) => {
                        self.list_watch.failed(lived)
                    }
                });
                // After the events that came before it.
                self.ready.push_back(Err(fault.into_subnet_error("watching the nodes")));
            }
        }
    }

    async fn step(&mut self) -> Result<(), Fault> {
        match self.list_watch.step() {
            Step::Probe => {
                self.source = None;
                let version = self.list(Extent::One, "limit=1", |_, _| ()).await?;
                self.list_watch.probed(version);
            }
            Step::List(from) => {
                self.nodes.begin_list(self.store.known_name());
                // Without a limit: a list with a limit is not answered from the cache.
                let query = format!("resourceVersion={}&resourceVersionMatch=NotOlderThan", percent_encoded(&from));
                let version = self.list(Extent::All, &query, Nodes::list).await?;
                let (event, mark) = self.nodes.end_list();
                self.list_watch.listed(version, mark);
                self.ready.push_back(Ok(event));
                self.report_own();
            }
            Step::Check(mark, at) => {
                self.source = None;
                let has_it = self.has(&mark, &at).await?;
                self.list_watch.checked(has_it);
            }
            Step::Open(from) => match self.open(&from).await {
                Ok(source) => {
                    self.source = Some(source);
                    if self.list_watch.opened() {
                        self.ready.push_back(Ok(LeaseEvent::Resumed));
                    }
                }
                Err(fault) if fault.kind == Kind::Gone => self.pause = self.list_watch.gone(),
                Err(fault) => return Err(fault),
            },
            Step::Read => self.read().await?,
        }
        Ok(())
    }

    /// Reads a list of Nodes. Returns the version of the list.
    async fn list(
        &mut self,
        extent: Extent,
        query: &str,
        mut take: impl FnMut(&mut Nodes, &Node<'_>),
    ) -> Result<String, Fault> {
        let mut arriving = self.store.api.list_nodes(extent, query).await?;
        let mut items = Items::default();
        while let Some(bytes) = arriving.next_in_time().await? {
            items.feed(&bytes);
            while let Some(item) = items.next()? {
                take(&mut self.nodes, &Node::parse(item, &self.store.keys)?);
            }
        }
        Ok(items.finish()?)
    }

    /// Whether the server still has this change: at a version that was seen later, the Node has the version of the
    /// change. A restored server has not reached such a version, or has another change there.
    async fn has(&mut self, mark: &Mark, at: &str) -> Result<bool, Fault> {
        let (node, version) = (percent_encoded(&mark.node), percent_encoded(at));
        let query = format!(
            "fieldSelector=metadata.name%3D{node}&limit=1&resourceVersion={version}&resourceVersionMatch=Exact"
        );
        let mut has_it = false;
        let found = self.list(Extent::One, &query, |_, node| has_it |= node.resource_version == mark.version).await;
        match found {
            Ok(_) => Ok(has_it),
            // The change is too old, or the server is behind.
            Err(fault) if fault.kind == Kind::Gone || is_behind(&fault.error.problem) => Ok(false),
            Err(fault) => Err(fault),
        }
    }

    async fn open(&mut self, from: &str) -> Result<Source, Fault> {
        let seconds = WATCH + self.jitter.number() % (WATCH / 2);
        let query =
            format!("allowWatchBookmarks=true&resourceVersion={}&timeoutSeconds={seconds}", percent_encoded(from));
        let arriving = self.store.api.watch_nodes(&query).await?;
        Ok(Source { arriving, events: Events::default(), asked: Duration::from_secs(seconds) })
    }

    /// Reads what the watch sends next.
    async fn read(&mut self) -> Result<(), Fault> {
        let Some(source) = &mut self.source else { return Err(Fault::no_answer("no watch is open")) };
        let Ok(arrived) = timeout(self.store.api.timeouts.silence, source.arriving.next()).await else {
            tracing::debug!("the watch of the Nodes was silent; opening it again");
            self.source = None;
            self.list_watch.silent();
            return Ok(());
        };
        let Some(bytes) = arrived? else {
            self.pause = self.list_watch.ended(source.arriving.since.elapsed(), source.asked);
            self.source = None;
            return Ok(());
        };
        source.events.feed(&bytes);
        let taken = self.take_events();
        self.report_own();
        match taken {
            Ok(()) => Ok(()),
            Err(Stop::Fault(fault)) => Err(fault),
            Err(Stop::List(pause)) => {
                self.source = None;
                self.pause = pause;
                Ok(())
            }
        }
    }

    /// Handles the events that were received whole.
    fn take_events(&mut self) -> Result<(), Stop> {
        let Some(source) = &mut self.source else { return Ok(()) };
        while let Some(event) = source.events.next()? {
            self.ready.extend(take(&event, &self.store.keys, &mut self.list_watch, &mut self.nodes)?.map(Ok));
        }
        Ok(())
    }

    /// Reports what others set for this node, if it changed.
    fn report_own(&mut self) {
        match self.nodes.take_own_news() {
            None => {}
            Some(Ok(public)) => self.ready.push_back(Ok(LeaseEvent::ThisNode(self.store.with_given(public)))),
            // The former addresses stay in effect, and the watch continues.
            Some(Err(error)) => self.ready.extend([Err(self.store.not_an_address(&error)), Ok(LeaseEvent::Resumed)]),
        }
    }
}

/// Whether a server says that it has not reached a version: "Too large resource version", or, from 1.30 to 1.33, in
/// etcd's words "required revision is a future revision".
fn is_behind(problem: &str) -> bool {
    problem.contains("resource version") || problem.contains("future revision")
}

/// Handles an event of a watch. Returns the event to report, if any.
fn take(
    event: &Event<'_>,
    keys: &Keys,
    list_watch: &mut ListWatch,
    nodes: &mut Nodes,
) -> Result<Option<LeaseEvent>, Stop> {
    let change = match &*event.kind {
        "ADDED" | "MODIFIED" => Change::Put,
        "DELETED" => Change::Deleted,
        "BOOKMARK" => {
            list_watch.seen(&text(find(event.object, VERSION)?), None).map_err(Stop::List)?;
            return Ok(None);
        }
        "ERROR" => {
            let fault = failure(event.object)?;
            return Err(match fault.kind {
                Kind::Gone => Stop::List(list_watch.gone()),
                _ => Stop::Fault(fault),
            });
        }
        other => {
            let kind: String = other.chars().take(32).collect();
            return Err(Stop::Fault(Fault::malformed(format!("an event of type {kind:?}"))));
        }
    };
    let node = Node::parse(event.object, keys)?;
    let seen = match change {
        Change::Put => list_watch.seen(&node.resource_version, Some(&node.name)),
        Change::Deleted => list_watch.deleted(&node.resource_version),
    };
    seen.map_err(Stop::List)?;
    Ok(nodes.change(change, &node))
}
