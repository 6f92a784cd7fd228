//! A real etcd on the switch, for agents on the nodes.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use etcd_client::{Client, ConnectOptions, Event, EventType, GetOptions, WatchOptions};
use flannel_core::net::{Family, Prefix};
use nix::sys::signal::Signal;
use testkit::probe::{self, Flow, FlowReport};
use testkit::{Namespace, Pod, Process};

use crate::harness::{Agent, CommandOutput, PATIENCE, Site, owned, routes, run};

/// What agents connect to.
pub(crate) const ENDPOINT: &str = "http://10.89.0.1:2379";
pub(crate) const SUBNETS: &str = "/coreos.com/network/subnets";
/// Of streams that must not lose anything, in packets a second.
pub(crate) const RATE: u32 = 1000;
const CONFIG: &str = "/coreos.com/network/config";

/// Nodes, and the etcd they share.
pub(crate) struct Cluster {
    // Before the site: its data is there.
    etcd: Option<Process>,
    pub(crate) site: Site,
    flags: Vec<String>,
}

impl Cluster {
    /// Nodes and an etcd that holds `config`.
    pub(crate) fn new(nodes: usize, config: &str) -> Self {
        let urls = "http://0.0.0.0:2379,http://127.0.0.1:2381";
        Self::with_flags(Site::new(nodes, "{}"), config, vec![format!("--listen-client-urls={urls}")])
    }

    /// The same with subnets that are known beforehand: node N serves 10.244.N.0/24.
    pub(crate) fn placed(nodes: usize, config: &str) -> Self {
        let cluster = Self::new(nodes, config);
        for nth in 1..=nodes {
            let file = cluster.site.subnet_file(nth);
            fs::write(file, format!("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET=10.244.{nth}.1/24\n")).unwrap();
        }
        cluster
    }

    /// The same with an etcd that agents reach in another way. Tests reach it at `http://127.0.0.1:2381`.
    pub(crate) fn with_flags(site: Site, config: &str, flags: Vec<String>) -> Self {
        let mut cluster = Self { etcd: None, site, flags };
        cluster.start_etcd();
        cluster.configure(config);
        cluster
    }

    /// Starts etcd, on its old data if it has any, and waits until it serves.
    pub(crate) fn start_etcd(&mut self) {
        self.etcd = Some(etcd(&self.site, &self.flags));
        let serves = || Ok(self.ask(async |client| client.get(CONFIG, None).await.is_ok()).unwrap_or_default());
        testkit::wait_until("etcd", PATIENCE, serves).unwrap();
    }

    /// Kills etcd at once.
    pub(crate) fn stop_etcd(&mut self) {
        drop(self.etcd.take().unwrap());
    }

    /// Freezes etcd or lets it go on.
    pub(crate) fn signal_etcd(&self, signal: Signal) {
        self.etcd.as_ref().unwrap().signal(signal).unwrap();
    }

    pub(crate) fn configure(&self, config: &str) {
        self.put(CONFIG, config);
    }

    pub(crate) fn put(&self, key: &str, value: &str) {
        self.ask(async |client| client.put(key, value, None).await.map(drop)).unwrap().unwrap();
    }

    pub(crate) fn delete(&self, key: &str) {
        self.ask(async |client| client.delete(key, None).await.map(drop)).unwrap().unwrap();
    }

    /// Ends the etcd lease of a record, as its time does.
    pub(crate) fn expire(&self, key: &str) {
        let key = format!("{SUBNETS}/{key}");
        self.ask(async |client| {
            let found = client.get(key, None).await.unwrap();
            client.lease_revoke(found.kvs()[0].lease()).await.unwrap();
        })
        .unwrap();
    }

    /// Asks etcd something, as an operator on the switch; `None` where it is not reached.
    pub(crate) fn ask<T: Send>(&self, question: impl AsyncFnOnce(&mut Client) -> T + Send) -> Option<T> {
        ask(self.switch(), question)
    }

    pub(crate) fn switch(&self) -> &Namespace {
        self.site.underlay.switch()
    }

    pub(crate) fn ns(&self, nth: usize) -> &Namespace {
        self.site.ns(nth)
    }

    pub(crate) fn state_file(&self, nth: usize) -> PathBuf {
        self.site.path(&format!("state{nth}"))
    }

    /// The arguments of node `nth`'s agent.
    pub(crate) fn args(&self, nth: usize) -> Vec<String> {
        let (file, state) = (self.site.subnet_file(nth), self.state_file(nth));
        vec![
            "--etcd-endpoints".to_owned(),
            ENDPOINT.to_owned(),
            format!("-subnet-file={}", file.display()),
            format!("-state-file={}", state.display()),
            "--healthz-port=8081".to_owned(),
        ]
    }

    pub(crate) fn start(&self, nth: usize, more: &[&str]) -> Agent {
        let args = [self.args(nth), owned(more)].concat();
        Agent::start(self.ns(nth), &args, self.site.path(&format!("log{nth}")))
    }

    /// Runs a command of the binary in a node's namespace.
    pub(crate) fn run(&self, nth: usize, more: &[&str]) -> CommandOutput {
        run(self.ns(nth), &[self.args(nth), owned(more)].concat())
    }
}

/// Starts an etcd on the switch, on its old data if it has any.
pub(crate) fn etcd(site: &Site, flags: &[String]) -> Process {
    let mut command = Command::new("/usr/bin/etcd");
    command.arg("--data-dir").arg(site.path("etcd"));
    command.args(["--advertise-client-urls", ENDPOINT, "--listen-peer-urls", "http://127.0.0.1:2380"]);
    command.args(flags).env_clear().stdout(Stdio::null());
    let started = site.underlay.switch().run(|| Process::start(&mut command, &site.path("etcd.log"))).unwrap();
    started.expect("this test needs etcd: apt-get install etcd-server")
}

fn ask<T: Send>(ns: &Namespace, question: impl AsyncFnOnce(&mut Client) -> T + Send) -> Option<T> {
    let asked = ns.run(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let options = ConnectOptions::new().with_timeout(PATIENCE);
            let mut client = Client::connect(["http://127.0.0.1:2381"], Some(options)).await.ok()?;
            Some(question(&mut client).await)
        })
    });
    asked.unwrap()
}

/// Counts and finds things on nodes and in the store.
impl Cluster {
    /// All lease records: key below the prefix, and value.
    pub(crate) fn records(&self) -> Vec<(String, String)> {
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        self.ask(async |client| {
            let found = client.get(SUBNETS, Some(GetOptions::new().with_prefix())).await.unwrap();
            found
                .kvs()
                .iter()
                .map(|kv| (text(kv.key()).replace(&format!("{SUBNETS}/"), ""), text(kv.value())))
                .collect()
        })
        .unwrap()
    }

    /// The keys of the records of node `nth`.
    pub(crate) fn keys_of(&self, nth: usize) -> Vec<String> {
        let public = format!("\"PublicIP\":\"10.89.0.{}\"", 10 + nth);
        let records = self.records().into_iter().filter(|(_, value)| value.contains(&public));
        records.map(|(key, _)| key).collect()
    }

    /// The subnet that node `nth` serves, by its `subnet.env`.
    pub(crate) fn subnet(&self, nth: usize) -> Prefix {
        self.site.subnet(nth)
    }

    /// Attaches a pod to node `nth`, as a CNI plug-in would.
    pub(crate) fn pod(&self, nth: usize) -> Pod {
        self.site.pod(nth)
    }

    /// Whether node `nth` has a route to `subnet`.
    pub(crate) fn has_route(&self, nth: usize, subnet: &Prefix) -> bool {
        routes(self.ns(nth)).contains(&format!("{subnet} "))
    }
}

/// One change of a lease record.
#[derive(Debug)]
struct Revision {
    number: i64,
    key: String,
    /// Whose it became; `None`: deleted, or run out.
    owner: Option<String>,
}

impl Cluster {
    /// Goes through all that was ever written and asserts that no two live leases overlapped, that none changed its owner
    /// without being deleted first, and that each node had one at a time (docs/faults.md, I1 and I2).
    pub(crate) fn assert_lawful(&self) {
        let mut live: BTreeMap<String, (Prefix, String)> = BTreeMap::new();
        let history = self.history();
        assert!(!history.is_empty(), "nothing was ever written");
        for Revision { number, key, owner } in history {
            let Some(owner) = owner else {
                live.remove(&key);
                continue;
            };
            let subnet: Prefix = key.replace('-', "/").parse().unwrap();
            if let Some((_, before)) = live.get(&key) {
                assert_eq!(*before, owner, "at revision {number} {key} changed its owner");
            }
            for (other, (prefix, of)) in live.iter().filter(|(other, _)| **other != key) {
                assert!(!prefix.overlaps(&subnet), "at revision {number} {key} and {other} overlap");
                assert_ne!(*of, owner, "at revision {number} {owner} has {key} and {other}");
            }
            live.insert(key, (subnet, owner));
        }
    }

    /// Every change of a lease record since etcd was made.
    fn history(&self) -> Vec<Revision> {
        const BASE: &str = "/coreos.com/network/";
        const END: &str = "/coreos.com/network/end";
        self.ask(async |client| {
            // What a watch shows last is what was written last.
            let end = client.put(END, "", None).await.unwrap().header().unwrap().revision();
            let options = WatchOptions::new().with_prefix().with_start_revision(1);
            let mut watch = client.watch(BASE, Some(options)).await.unwrap();
            let mut events = Vec::new();
            while events.last().and_then(Event::kv).is_none_or(|kv| kv.mod_revision() < end) {
                let response = watch.message().await.unwrap().unwrap();
                assert_eq!(response.compact_revision(), 0, "the history is not whole");
                events.extend_from_slice(response.events());
            }
            let of_leases = |event: &&Event| event.kv().is_some_and(|kv| kv.key().starts_with(SUBNETS.as_bytes()));
            events.iter().filter(of_leases).map(revision).collect()
        })
        .unwrap()
    }
}

fn revision(event: &Event) -> Revision {
    let kv = event.kv().unwrap();
    let owner = || {
        let value: serde_json::Value = serde_json::from_slice(kv.value()).unwrap();
        value["PublicIP"].as_str().unwrap().to_owned()
    };
    Revision {
        number: kv.mod_revision(),
        key: kv.key_str().unwrap().replace(&format!("{SUBNETS}/"), ""),
        owner: (event.event_type() == EventType::Put).then(owner),
    }
}

/// The status document of an agent.
pub(crate) fn status(agent: &Agent) -> serde_json::Value {
    let (_, body) = agent.get(9472, "/status").expect("no status");
    serde_json::from_str(&body).unwrap()
}

/// A pod reaches another within the time a test waits.
pub(crate) fn reaches(from: &Pod, to: &Pod) {
    let addr = to.addr(Family::V4).unwrap();
    probe::until_reply(&from.ns, addr, PATIENCE).unwrap();
}

/// A stream from a pod to another.
pub(crate) fn flow(from: &Pod, to: &Pod, family: Family) -> Flow {
    Flow::start(&from.ns, &to.ns, to.addr(family).unwrap(), RATE).unwrap()
}

/// Ends a stream of which every packet has to have arrived.
pub(crate) fn assert_no_loss(flow: Flow) -> FlowReport {
    let report = flow.stop().unwrap();
    assert_eq!((report.lost, report.refused), (0, 0), "{report:?}");
    report
}
