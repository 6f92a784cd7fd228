//! A cluster whose nodes run either program.

use std::collections::BTreeMap;
use std::os::unix::fs::symlink;
use std::process::Command;
use std::time::Duration;

use flannel_core::kernel::OverlayName;
use flannel_core::lease::{Lease, LeaseKey};
use flannel_core::net::{Dual, Family, Mtu, Prefix};
use flannel_core::subnet::SubnetManager;
use flannel_core::subnet_env::SubnetEnv;
use flannel_subnet_etcd::{Config, EtcdSubnets};
use nix::sys::signal::Signal;
use testkit::probe::{Flow, until_reply};
use testkit::{Families, Pod, PodNet, Process, wait_until};

use crate::harness::{Agent, CommandOutput, PATIENCE, Site, command, on_switch, owned, read, run};
use crate::kube::{self, Kubernetes};
use crate::store::{ENDPOINT, RATE, etcd, flow};

/// How long a program may take to get ready. Go flannel runs iptables dozens of times for it, each of which takes long
/// on a busy machine.
const START: Duration = Duration::from_secs(90);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Program {
    Go,
    Ours,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Plane {
    Vxlan,
    HostGw,
    Udp,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Filter {
    Iptables,
    Nftables,
}

/// Where leases are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Store {
    Etcd,
    Kubernetes,
}

/// What is the same on all nodes.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Network {
    pub(crate) store: Store,
    pub(crate) plane: Plane,
    pub(crate) families: Families,
    pub(crate) filter: Filter,
}

impl Network {
    fn config(self) -> String {
        let kind = match self.plane {
            Plane::Vxlan => "vxlan",
            Plane::HostGw => "host-gw",
            Plane::Udp => "udp",
        };
        let v6 = match self.families.has(Family::V6) {
            true => r#""EnableIPv6":true,"IPv6Network":"fd00:244::/48","IPv6SubnetLen":64,"#,
            false => "",
        };
        let nftables = self.filter == Filter::Nftables;
        format!(
            r#"{{"EnableNFTables":{nftables},"Network":"10.244.0.0/16","SubnetLen":24,{v6}"Backend":{{"Type":"{kind}"}}}}"#
        )
    }

    pub(crate) fn families(self) -> impl Iterator<Item = Family> {
        Family::BOTH.into_iter().filter(move |family| self.families.has(*family))
    }
}

/// The store that runs on the switch.
enum Backing {
    Etcd { _process: Process },
    Kubernetes(Box<Kubernetes>),
}

/// Nodes, numbered from 1, and the store that they share.
pub(crate) struct Cluster {
    pub(crate) site: Site,
    pub(crate) network: Network,
    agents: BTreeMap<usize, Agent>,
    pub(super) pods: BTreeMap<usize, Pod>,
    backing: Backing,
}

impl Cluster {
    pub(crate) fn new(nodes: usize, network: Network) -> Self {
        let site = Site::with(nodes, network.families, "{}");
        let config = network.config();
        let backing = match network.store {
            Store::Etcd => {
                Backing::Etcd { _process: etcd(&site, &["--listen-client-urls=http://0.0.0.0:2379".to_owned()]) }
            }
            Store::Kubernetes => Backing::Kubernetes(Box::new(Kubernetes::start(&site, &config))),
        };
        let cluster = Self { site, network, agents: BTreeMap::new(), pods: BTreeMap::new(), backing };
        if network.store == Store::Etcd {
            let configure = || Ok(cluster.etcd(async |store| store.put_config_json(&config).await.is_ok()));
            wait_until("etcd", PATIENCE, configure).unwrap();
        }
        cluster
    }

    /// Two nodes with a pod each, which reach each other.
    pub(crate) fn connected(network: Network, programs: [Program; 2]) -> Self {
        let mut cluster = Self::new(2, network);
        for (nth, program) in [1, 2].into_iter().zip(programs) {
            cluster.start(nth, program);
        }
        [1, 2].into_iter().for_each(|nth| cluster.attach(nth));
        cluster.all_reach_all();
        cluster
    }

    /// The same command line for either program.
    fn args(&self, nth: usize) -> Vec<String> {
        let file = self.site.subnet_file(nth).display().to_string();
        let fixed = ["--healthz-port=8081", "--healthz-ip=127.0.0.1", "-ip-masq", "-subnet-file", &file];
        let store = match &self.backing {
            Backing::Etcd { .. } => owned(&["--etcd-endpoints", ENDPOINT]),
            Backing::Kubernetes(kubernetes) => kubernetes.args(),
        };
        [owned(&fixed), store].concat()
    }

    /// Starts a program on a node and waits until it says that it is ready.
    pub(crate) fn start(&mut self, nth: usize, program: Program) {
        if let Backing::Kubernetes(kubernetes) = &self.backing {
            kubernetes.register(&self.site, nth, self.network.families);
        }
        let args = self.args(nth);
        let (mut command, log) = match program {
            Program::Ours => {
                let mut ours = command(&args);
                ours.env("FLANNELD_STATE_FILE", self.site.path(&format!("state{nth}")));
                (ours, format!("log{nth}-ours"))
            }
            Program::Go => {
                // Under the name that it has on hosts.
                let place = self.site.path("flanneld");
                if !place.exists() {
                    symlink(testkit::go_flannel::program().unwrap(), &place).unwrap();
                }
                let mut go = Command::new(place);
                go.args(&args).env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
                (go, format!("log{nth}-go"))
            }
        };
        command.env("NODE_NAME", kube::name(nth));
        let agent = Agent::start_in(self.site.ns(nth), &mut command, self.site.path(&log));
        let is_ready = || Ok(agent.get(8081, "/readyz").is_some_and(|(code, _)| code == 200));
        let ready = wait_until("ready", START, is_ready);
        ready.unwrap_or_else(|error| panic!("{program:?} on node {nth}: {error}\n{}", agent.log()));
        self.agents.insert(nth, agent);
    }

    pub(crate) fn stop(&mut self, nth: usize) {
        let agent = self.agents.remove(&nth).unwrap();
        assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
    }

    /// Exchanges what runs on a node, as an upgrade does.
    pub(crate) fn swap(&mut self, nth: usize, program: Program) {
        self.stop(nth);
        self.start(nth, program);
    }

    pub(crate) fn log(&self, nth: usize) -> String {
        self.agents[&nth].log()
    }

    /// What `flanneld doctor` says on a node.
    pub(crate) fn doctor(&self, nth: usize) -> String {
        self.run(nth, &["doctor"]).out
    }

    /// Runs a command of ours on a node, with the flags of its agent.
    pub(crate) fn run(&self, nth: usize, words: &[&str]) -> CommandOutput {
        let name = format!("-node-name={}", kube::name(nth));
        let state = format!("-state-file={}", self.site.path(&format!("state{nth}")).display());
        run(self.site.ns(nth), &[self.args(nth), vec![name, state], owned(words)].concat())
    }

    pub(crate) fn env(&self, nth: usize) -> String {
        read(&self.site.subnet_file(nth))
    }

    /// Attaches a pod as the CNI plug-in does, from `subnet.env`.
    pub(crate) fn attach(&mut self, nth: usize) {
        let env = SubnetEnv::read(&self.site.subnet_file(nth)).unwrap().unwrap();
        let net = PodNet { subnets: env.subnets, mtu: Mtu(env.mtu.unwrap().0) };
        let pod = self.site.underlay.nodes()[nth - 1].attach_pod(&net).unwrap();
        self.pods.insert(nth, pod);
    }

    pub(crate) fn detach(&mut self, nth: usize) {
        // The pod's own namespace last: its end of the link would take the other with it, some time.
        self.site.underlay.nodes()[nth - 1].detach_pods().unwrap();
        self.pods.remove(&nth);
    }

    /// Waits until every pod reaches every other in each family.
    pub(crate) fn all_reach_all(&self) {
        for (from, here) in &self.pods {
            for (_, there) in self.pods.iter().filter(|(to, _)| *to != from) {
                for (_, addr) in there.addrs.iter() {
                    let reply = until_reply(&here.ns, *addr, PATIENCE);
                    reply.unwrap_or_else(|error| panic!("{error}\n{}", self.state(*from).join("\n")));
                }
            }
        }
    }

    /// A stream from one node's pod to another's.
    pub(crate) fn flow(&self, from: usize, to: usize, family: Family) -> Flow {
        flow(&self.pods[&from], &self.pods[&to], family)
    }

    /// Lets streams go on for a fifth of a second.
    pub(crate) fn run_on(&self, flows: &[Flow]) {
        for flow in flows {
            let sent = flow.sent();
            wait_until("datagrams", PATIENCE, || Ok(flow.sent() >= sent + u64::from(RATE) / 5)).unwrap();
        }
    }

    /// The leases as our store reads them: whatever program wrote them.
    pub(crate) fn leases(&self) -> BTreeMap<LeaseKey, Lease> {
        let records = match &self.backing {
            Backing::Etcd { .. } => self.etcd(async |store| store.list().await.unwrap()),
            Backing::Kubernetes(kubernetes) => kubernetes.records(&self.site),
        };
        let lease = |record: flannel_core::lease::Record| (record.key, Lease::clone(&record.lease.unwrap()));
        records.into_iter().map(lease).collect()
    }

    /// The lease of a node.
    pub(crate) fn lease(&self, nth: usize) -> Lease {
        let public = self.site.underlay.nodes()[nth - 1].addrs;
        let own = self.leases().into_values().find(|lease| lease.attrs.public_ip == public);
        own.unwrap_or_else(|| panic!("no lease of {public:?} in {:#?}", self.leases()))
    }

    /// Ends a node's lease, as an operator does who takes the node out.
    pub(crate) fn end_lease(&self, nth: usize) {
        let lease = self.lease(nth);
        match &self.backing {
            Backing::Etcd { .. } => self.etcd(async move |store| store.release(lease).await.unwrap()),
            Backing::Kubernetes(kubernetes) => kubernetes.delete(&self.site, nth),
        }
    }

    fn etcd<T: Send>(&self, ask: impl AsyncFnOnce(EtcdSubnets) -> T + Send) -> T {
        on_switch(&self.site, async || ask(EtcdSubnets::new(Config::new([ENDPOINT])).unwrap()).await)
    }

    /// All that flannel has to do with on a node's kernel, a line each, sorted within each kind.
    pub(crate) fn state(&self, nth: usize) -> Vec<String> {
        let ns = self.site.ns(nth);
        let links = ns.links().unwrap().into_iter().filter(|link| link.name.starts_with("flannel"));
        let links: Vec<_> = links.collect();
        let on_it = |dev: &String| links.iter().any(|link| link.name == *dev);
        let mut lines = Vec::new();
        let mut add = |kind: &str, found: Vec<String>| {
            let mut found = found;
            found.sort();
            lines.extend(found.into_iter().map(|text| format!("{kind} {text}")));
        };
        let device = |link: &testkit::Link| {
            format!(
                "{} mac {} mtu {} queue {} up {} {:?} group {:x} alias {}",
                link.name,
                link.mac.map_or_else(|| "none".to_owned(), |mac| mac.to_string()),
                link.mtu,
                link.queue,
                link.is_up(),
                link.vxlan,
                link.group,
                link.alias.as_deref().unwrap_or("none")
            )
        };
        add("link", links.iter().map(device).collect());
        let addresses = ns.addresses().unwrap().into_iter().filter(|it| on_it(&it.dev) && !it.is_link_local());
        add("address", addresses.map(|it| format!("{}/{} dev {}", it.addr, it.len, it.dev)).collect());
        let neighbours = ns.neighbours().unwrap().into_iter().filter(|it| on_it(&it.dev) && it.is_permanent());
        add("neighbour", neighbours.map(|it| it.to_string()).collect());
        add("fdb", ns.fdb().unwrap().into_iter().filter(|it| on_it(&it.dev)).map(|it| it.to_string()).collect());
        let pods: Dual<Prefix> = Dual { v4: "10.244.0.0/16".parse().ok(), v6: "fd00:244::/48".parse().ok() };
        for (family, pods) in pods.iter() {
            let routes = ns.routes(family).unwrap().into_iter();
            let routes = routes.filter(|it| it.table == testkit::Route::MAIN && pods.covers(&it.to));
            let routes = routes.filter(|it| it.protocol != testkit::Route::KERNEL);
            add("route", routes.map(|it| it.to_string()).collect());
        }
        for tool in ["iptables-save", "ip6tables-save"] {
            let saved = self.site.tool(nth, &[tool]).out;
            // Order matters in there.
            let rules = saved.lines().filter(|line| !line.starts_with('#'));
            let rules = rules.map(|line| line.split(" [").next().unwrap_or(line));
            lines.extend(rules.map(|line| format!("{tool}: {line}")));
        }
        for table in ["ip flannel-ipv4", "ip6 flannel-ipv6"] {
            let words: Vec<_> = ["nft", "list", "table"].into_iter().chain(table.split(' ')).collect();
            let listed = self.site.tool(nth, &words).out;
            lines.extend(listed.lines().map(|line| format!("nft: {line}")));
        }
        lines
    }

    /// Waits for a state of a node's kernel.
    #[track_caller]
    pub(crate) fn until(&self, nth: usize, what: &str, reached: impl Fn(&[String]) -> bool) {
        let mut state = Vec::new();
        let waited = wait_until(what, PATIENCE, || {
            state = self.state(nth);
            Ok(reached(&state))
        });
        waited.unwrap_or_else(|error| panic!("node {nth}: {error}\n{}\n{}", state.join("\n"), self.log(nth)));
    }

    /// What the host does with packets that no rule accepts, where flannel's rules are iptables'. (An `accept` of nft
    /// does not outweigh another table's policy.)
    pub(crate) fn set_forward_policy(&self, nth: usize, policy: &str) {
        if self.network.filter == Filter::Nftables {
            return;
        }
        for family in self.network.families() {
            let tool = match family {
                Family::V4 => "iptables",
                Family::V6 => "ip6tables",
            };
            assert_eq!(self.site.tool(nth, &[tool, "-P", "FORWARD", policy]).code, Some(0));
        }
    }

    /// What our program writes where Go flannel wrote `env`: the same, but for the MTU that a pod of both families
    /// can really have (docs/compatibility.md, "Device").
    pub(crate) fn our_env(&self, env: &str) -> String {
        match (self.network.plane, self.network.families) {
            (Plane::Vxlan, Families::Dual) => env.replace("MTU=1450", "MTU=1430"),
            _ => env.to_owned(),
        }
    }

    /// A state without what tells our objects from Go flannel's: it takes a device over as it is, and a route through
    /// the uplink whatever its protocol.
    pub(crate) fn without_marks(&self, state: &[String]) -> Vec<String> {
        let marked = OverlayName::default();
        let marks = format!("group {:x} alias {}", marked.mark(), marked.alias());
        let plain = |line: &String| match (line.split_once(" proto "), self.network.plane) {
            (Some((route, rest)), Plane::HostGw) if line.starts_with("route ") => {
                let (protocol, rest) = rest.split_once(' ').unwrap_or((rest, ""));
                assert!((200..232).contains(&protocol.parse::<u8>().unwrap()), "{line}");
                format!("{route} {rest}").trim_end().to_owned()
            }
            _ => line.replace(&marks, "group 0 alias none"),
        };
        state.iter().map(plain).collect()
    }

    /// Takes from a node all that [`state`](Self::state) lists, so that the next start is the first.
    pub(crate) fn wipe(&self, nth: usize) {
        let ns = self.site.ns(nth);
        for link in ns.links().unwrap().iter().filter(|link| link.name.starts_with("flannel")) {
            ns.delete_link(&link.name).unwrap();
        }
        for family in self.network.families() {
            for route in ns.routes(family).unwrap() {
                if route.via.is_some() && route.to.len() > 0 {
                    ns.delete_route(&route).unwrap();
                }
            }
        }
        assert_eq!(self.site.tool(nth, &["nft", "flush", "ruleset"]).code, Some(0));
    }
}
