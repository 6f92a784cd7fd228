//! Agents over a real Kubernetes API server.

use std::net::IpAddr;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use flannel_core::net::Family;
use nix::sys::signal::Signal;
use serde_json::json;
use testkit::kubernetes::{ApiServer, rules_without};
use testkit::probe::{Flow, FlowReport};
use testkit::{Families, Pod, wait_until};

use crate::harness::{Agent, CommandOutput, PATIENCE, Site, bare, command, on_switch, owned, read, routes, run};
use crate::kube::{Kubernetes, name};
use crate::store::{reaches, status};

const VXLAN: &str = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
const PREFIX: &str = "flannel.alpha.coreos.com/";

const DUAL: &str =
    r#"{"Network":"10.244.0.0/16","EnableIPv6":true,"IPv6Network":"fd00:244::/48","Backend":{"Type":"vxlan"}}"#;

/// Nodes, and the server that they share. Node N has the podCIDR 10.244.N.0/24, and fd00:244:0:N::/64 where there is IPv6.
pub(crate) struct Cluster {
    pub(crate) kubernetes: Kubernetes,
    pub(crate) site: Site,
    families: Families,
}

impl Cluster {
    pub(crate) fn new(nodes: usize) -> Self {
        Self::with(nodes, Families::V4)
    }

    pub(crate) fn with(nodes: usize, families: Families) -> Self {
        let site = Site::with(nodes, families, "{}");
        let kubernetes = Kubernetes::start(&site, if families == Families::Dual { DUAL } else { VXLAN });
        Self { kubernetes, site, families }
    }

    pub(crate) fn register(&self, nth: usize) {
        self.kubernetes.register(&self.site, nth, self.families);
    }

    pub(crate) fn start(&self, nth: usize) -> Agent {
        self.launch(nth, self.kubernetes.args(), &[("NODE_NAME", &name(nth))])
    }

    /// Starts an agent with these arguments about the store, and these variables.
    pub(crate) fn launch(&self, nth: usize, store: Vec<String>, variables: &[(&str, &str)]) -> Agent {
        let mut ours = command(&[self.fixed(nth), store].concat());
        ours.envs(variables.iter().copied());
        Agent::start_in(self.site.ns(nth), &mut ours, self.site.path(&format!("log{nth}")))
    }

    /// Starts an agent as kubelet starts the container of a Pod: with the service account's files in their place, and the
    /// variables that lead to the server. It says nothing of either by its arguments.
    fn start_in_pod(&self, nth: usize) -> Agent {
        const FILES: &str = "mount -t tmpfs none /run && \
             cd $(mkdir -p /run/secrets/kubernetes.io/serviceaccount && echo /run/secrets/kubernetes.io/serviceaccount) && \
             cp \"$TOKEN\" token && cp \"$AUTHORITY\" ca.crt && printf kube-system >namespace && exec \"$0\" \"$@\"";
        let ours = command(&[self.fixed(nth), self.kubernetes.args_in_pod()].concat());
        let mut inside = bare(Command::new("unshare"));
        inside.args(["--mount", "sh", "-c", FILES]).arg(ours.get_program()).args(ours.get_args());
        let (server, port) = (&self.kubernetes.server, self.kubernetes.server.port().to_string());
        inside.env("TOKEN", server.token_file("flannel")).env("AUTHORITY", server.authority_file());
        inside.envs([("KUBERNETES_SERVICE_HOST", "10.89.0.1"), ("KUBERNETES_SERVICE_PORT", &port)]);
        inside.envs([("POD_NAME", "agent"), ("POD_NAMESPACE", "kube-system")]);
        Agent::start_in(self.site.ns(nth), &mut inside, self.site.path(&format!("log{nth}")))
    }

    /// The arguments of node `nth`'s agent that are not about the store.
    fn fixed(&self, nth: usize) -> Vec<String> {
        let file = format!("-subnet-file={}", self.site.subnet_file(nth).display());
        let state = format!("-state-file={}", self.state_file(nth).display());
        owned(&[&file, &state, "--healthz-port=8081", "--healthz-ip=127.0.0.1"])
    }

    pub(crate) fn state_file(&self, nth: usize) -> PathBuf {
        self.site.path(&format!("state{nth}"))
    }

    /// Runs a command of the binary on node `nth`.
    fn run(&self, nth: usize, more: &[&str]) -> CommandOutput {
        let node = format!("-node-name={}", name(nth));
        run(self.site.ns(nth), &[self.kubernetes.args(), self.fixed(nth), vec![node], owned(more)].concat())
    }

    /// Does something to the server as the administrator.
    pub(crate) fn ask<T: Send>(&self, work: impl AsyncFnOnce(&ApiServer) -> T + Send) -> T {
        on_switch(&self.site, async || work(&self.kubernetes.server).await)
    }

    pub(crate) fn get(&self, path: &str) -> serde_json::Value {
        self.ask(async |server| server.get(path).await).unwrap()
    }

    /// An annotation of flannel's.
    pub(crate) fn annotation(&self, nth: usize, suffix: &str) -> Option<String> {
        let node = self.get(&format!("/api/v1/nodes/{}", name(nth)));
        node["metadata"]["annotations"][format!("{PREFIX}{suffix}")].as_str().map(str::to_owned)
    }

    pub(crate) fn annotate(&self, nth: usize, suffix: &str, value: serde_json::Value) {
        self.annotate_all(nth, &json!({ suffix: value }));
    }

    /// Sets annotations of flannel's.
    fn annotate_all(&self, nth: usize, annotations: &serde_json::Value) {
        let named = annotations.as_object().unwrap().iter();
        let named = named.map(|(suffix, value)| (format!("{PREFIX}{suffix}"), value.clone())).collect();
        self.ask(async |server| server.annotate(&name(nth), named).await).unwrap();
    }

    /// Makes a Node, and publishes what an agent on it would.
    pub(crate) fn join(&self, nth: usize) {
        self.register(nth);
        let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:07:{nth:02x}"}}"#);
        let public = format!("10.89.7.{nth}");
        let mut all = json!({
            "backend-type": "vxlan", "kube-subnet-manager": "true", "backend-data": data, "public-ip": public,
        });
        if self.families.has(Family::V6) {
            all["backend-v6-data"] = json!(data);
            all["public-ipv6"] = json!(format!("fd00:89::7:{nth}"));
        }
        self.annotate_all(nth, &all);
    }

    pub(crate) fn restart(&mut self) {
        let (server, site) = (&mut self.kubernetes.server, &self.site);
        on_switch(site, async || server.restart().await).unwrap();
    }

    pub(crate) fn has_route(&self, nth: usize, to: usize) -> bool {
        routes(self.site.ns(nth)).contains(&format!("10.244.{to}.0/24 "))
    }

    /// Whether node `nth` sends packets for a peer to this address.
    pub(crate) fn sends_to(&self, nth: usize, public: IpAddr) -> bool {
        self.site.ns(nth).fdb().unwrap().iter().any(|entry| entry.dst == Some(public))
    }

    pub(crate) fn pods(&self) -> [Pod; 2] {
        [self.site.pod(1), self.site.pod(2)]
    }

    /// The condition that tells whether a node's network is up.
    pub(crate) fn network_unavailable(&self, nth: usize) -> Option<String> {
        let node = self.get(&format!("/api/v1/nodes/{}", name(nth)));
        let conditions = node["status"]["conditions"].as_array()?.clone();
        let found = conditions.into_iter().find(|condition| condition["type"] == "NetworkUnavailable")?;
        found["status"].as_str().map(str::to_owned)
    }
}

#[test]
fn an_agent_in_a_pod_finds_server_account_and_node_by_itself() {
    let cluster = Cluster::new(2);
    cluster.register(1);
    cluster.join(2);
    cluster.ask(async |server| server.create_pod("agent", "flannel", Some(&name(1))).await).unwrap();
    let agent = cluster.start_in_pod(1).ready();
    assert_eq!(cluster.annotation(1, "kube-subnet-manager").as_deref(), Some("true"));
    agent.until("told of the other node", || cluster.has_route(1, 2));
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
}

/// As `kubectl describe node` shows them.
#[test]
fn a_node_has_events_of_what_its_agent_waits_for_and_that_it_is_ready() {
    // An Event a minute at most.
    const NEXT: Duration = Duration::from_secs(180);
    let cluster = Cluster::new(3);
    cluster.register(1);
    cluster.register(3);
    cluster.ask(async |server| server.create_node(&name(2), &[]).await).unwrap();
    let way = cluster.kubernetes.way(&cluster.site, "without-events");
    let rules = rules_without("create", "events").unwrap();
    cluster.ask(async |server| server.set_rules("without-events", rules, "create", "events").await).unwrap();
    // Events do not depend on the condition.
    let variables = [("NODE_NAME", &*name(1)), ("FLANNELD_SET_NODE_NETWORK_UNAVAILABLE", "false")];
    let _one = cluster.launch(1, cluster.kubernetes.args(), &variables);
    let two = cluster.start(2);
    let node = name(3);
    let three = cluster.launch(3, cluster.kubernetes.args_by(&way), &[("NODE_NAME", &*node)]).ready();
    let events = |nth: usize| {
        let path = format!("/api/v1/namespaces/default/events?fieldSelector=involvedObject.name={}", name(nth));
        let found = cluster.get(&path)["items"].as_array().unwrap().clone();
        let texts = |event: serde_json::Value| ["reason", "message"].map(|key| event[key].as_str().unwrap().to_owned());
        found.into_iter().map(texts).collect::<Vec<_>>()
    };
    let count = |nth: usize, reason: &str, part: &str| {
        events(nth).iter().filter(|[found, message]| found == reason && message.contains(part)).count()
    };
    let ready = |nth: usize| count(nth, "FlannelReady", "ready");
    let waits = || count(2, "FlannelWaits", "it has no IPv4 entry");
    // A start of more than three seconds has an Event of its own, and the next one comes a minute later.
    wait_until("the Event of the first", NEXT, || Ok(ready(1) > 0)).unwrap();
    wait_until("the Event of the second", NEXT, || Ok(waits() > 0)).unwrap();
    assert_eq!((ready(1), waits()), (1, 1), "{:?} {:?}", events(1), events(2));
    // A right that only Events need: the agent works without.
    let told = || Ok(three.log().contains("no permission to create Events"));
    wait_until("the reason in its log", NEXT, told).unwrap();
    assert_eq!(events(3), [] as [[String; 2]; 0]);
    assert!(three.is_ready(), "{}", three.log());

    let spec = json!({ "spec": { "podCIDR": "10.244.2.0/24", "podCIDRs": ["10.244.2.0/24"] } });
    cluster.ask(async |server| server.patch("/api/v1/nodes/node-2", &spec).await).unwrap();
    two.until_ready();
    wait_until("the next Event", NEXT, || Ok(ready(2) > 0)).unwrap();
    assert_eq!((ready(1), waits(), ready(2), events(3).len()), (1, 1, 1, 0), "{:?} {:?}", events(1), events(2));
    let all = [events(1), events(2)].concat();
    assert!(all.iter().all(|[reason, _]| ["FlannelReady", "FlannelWaits"].contains(&&**reason)), "{all:?}");
    assert_eq!(three.log().matches("no permission to create Events").count(), 1, "{}", three.log());
}

/// docs/faults.md, K5, K8 and K10: the data plane stays as it is whatever is done to the own Node.
#[test]
fn an_agent_keeps_its_lease_whatever_is_done_to_its_node() {
    let cluster = Cluster::new(2);
    let two = {
        cluster.register(2);
        cluster.start(2).ready()
    };
    // Not registered yet, then without podCIDR.
    let one = cluster.start(1);
    one.until("told what it waits for", || one.log().contains("there is no such Node"));
    cluster.ask(async |server| server.create_node(&name(1), &[]).await).unwrap();
    one.until("told what it waits for", || one.log().contains("it has no IPv4 entry"));
    let spec = json!({ "spec": { "podCIDR": "10.244.1.0/24", "podCIDRs": ["10.244.1.0/24"] } });
    cluster.ask(async |server| server.patch("/api/v1/nodes/node-1", &spec).await).unwrap();
    one.until_ready();
    wait_until("the condition", PATIENCE, || Ok(cluster.network_unavailable(1).as_deref() == Some("False"))).unwrap();
    one.until("told of its peer", || cluster.has_route(1, 2));
    two.until("told of its peer", || cluster.has_route(2, 1));
    let pods = cluster.pods();
    reaches(&pods[0], &pods[1]);
    let flow = Flow::start(&pods[0].ns, &pods[1].ns, pods[1].addrs.v4.unwrap(), 500).unwrap();
    let before = routes(cluster.site.ns(1));

    let written = cluster.annotation(1, "backend-data");
    for (suffix, damage) in
        [("kube-subnet-manager", json!(null)), ("backend-data", json!("no JSON")), ("public-ip", json!("203.0.113.1"))]
    {
        let was = cluster.annotation(1, suffix);
        cluster.annotate(1, suffix, damage);
        one.until("its annotation written again", || cluster.annotation(1, suffix) == was);
    }
    assert_eq!(cluster.annotation(1, "backend-data"), written);
    two.until("told of its peer again", || cluster.has_route(2, 1));

    // What an operator sets is followed.
    let own = cluster.annotation(1, "public-ip");
    for suffix in ["public-ip-overwrite", "node-public-ip"] {
        cluster.annotate(1, suffix, json!("203.0.113.9"));
        one.until("published what is set", || cluster.annotation(1, "public-ip").as_deref() == Some("203.0.113.9"));
        cluster.annotate(1, suffix, json!(null));
        one.until("published its own again", || cluster.annotation(1, "public-ip") == own);
    }

    // Made again by its kubelet, with the same podCIDR.
    cluster.kubernetes.delete(&cluster.site, 1);
    cluster.register(1);
    one.until("its annotations written into the new Node", || cluster.annotation(1, "backend-data") == written);
    one.until("the new Node's condition written", || cluster.network_unavailable(1).as_deref() == Some("False"));
    assert_eq!(routes(cluster.site.ns(1)), before, "{}", one.log());
    two.until("told of its peer again", || cluster.has_route(2, 1));
    reaches(&pods[0], &pods[1]);
    // The other node has no way there while the Node is gone.
    let report = flow.stop().unwrap();
    assert_eq!(report.refused, 0, "its own data plane stays as it is: {report:?}");
    assert!(one.is_ready(), "{}", one.log());

    // And with another podCIDR: the lease is another one.
    cluster.kubernetes.delete(&cluster.site, 1);
    cluster.ask(async |server| server.create_node(&name(1), &["10.244.9.0/24".to_owned()]).await).unwrap();
    two.until("told of the new subnet", || cluster.has_route(2, 9) && !cluster.has_route(2, 1));
    one.until("a lease of the new subnet", || status(&one)["status"]["lease"]["subnets"]["v4"] == "10.244.9.0/24");
    one.until_ready();
}

/// How long the server is away.
const OUTAGE: Duration = Duration::from_secs(60);
/// The requests that an agent may try in that time.
const MOST_REQUESTS: usize = 15;
/// The lines of log that it may cost an agent.
const MOST_LINES: usize = 3;

/// docs/faults.md, K3.
#[test]
fn an_outage_of_the_api_server_costs_no_packet_few_lines_and_is_over_within_seconds() {
    let mut cluster = Cluster::new(2);
    [1, 2].into_iter().for_each(|nth| cluster.register(nth));
    let way = cluster.kubernetes.way(&cluster.site, "agent-1");
    let one = cluster.launch(1, cluster.kubernetes.args_by(&way), &[("NODE_NAME", &name(1))]);
    let agents = [one, cluster.start(2)].map(Agent::ready);
    let pods = cluster.pods();
    reaches(&pods[0], &pods[1]);
    wait_until("the conditions", PATIENCE, || {
        Ok([1, 2].iter().all(|nth| cluster.network_unavailable(*nth).as_deref() == Some("False")))
    })
    .unwrap();
    agents[0].until("quiet", || agents[0].log().contains("NetworkUnavailable of the Node set to False"));
    agents[1].until("quiet", || agents[1].log().contains("NetworkUnavailable of the Node set to False"));
    let quiet = agents.each_ref().map(|agent| agent.log().lines().count());
    let flow = Flow::start(&pods[0].ns, &pods[1].ns, pods[1].addrs.v4.unwrap(), 1000).unwrap();

    let asked = || way.proxy.seen("").len();
    let before = asked();
    cluster.kubernetes.server.kill();
    let away = Instant::now();
    agents[0].until("told that the server is away", || status(&agents[0])["status"]["store"]["kind"] == "lost");
    std::thread::sleep(OUTAGE.saturating_sub(away.elapsed()));
    let tries = asked() - before;
    assert!(tries <= MOST_REQUESTS, "{tries} requests in {OUTAGE:?}: {:#?}", way.proxy.seen(""));
    cluster.restart();
    let back = Instant::now();
    agents[0].until("told that the server is back", || status(&agents[0])["status"]["store"]["kind"] == "live");
    let took = back.elapsed();
    cluster.join(3);
    let told = || Ok([1, 2].iter().all(|nth| cluster.has_route(*nth, 3)));
    wait_until("converged", PATIENCE, told).unwrap_or_else(|error| panic!("{error}"));
    let report = flow.stop().unwrap();
    assert_eq!(FlowReport { lost: 0, refused: 0, ..report.clone() }, report);
    for (agent, before) in agents.iter().zip(quiet) {
        let said: Vec<_> = agent.log().lines().skip(before).map(str::to_owned).collect();
        let troubles: Vec<_> =
            said.iter().filter(|line| !line.contains("10.244.3.0") && !line.contains("node-3")).collect();
        assert!(troubles.len() <= MOST_LINES, "{said:#?}");
    }
    println!("{tries} requests while it was away; converged after {took:?}; {report:?}");
}

#[test]
fn a_node_boots_from_its_state_file_while_the_api_server_is_away() {
    let mut cluster = Cluster::new(2);
    [1, 2].into_iter().for_each(|nth| cluster.register(nth));
    let one = cluster.start(1).ready();
    let two = cluster.start(2).ready();
    one.until("told of its peer", || cluster.has_route(1, 2));
    let state = cluster.state_file(1);
    one.until("all written down", || ["node-1", "node-2"].iter().all(|node| read(&state).contains(node)));
    one.end(Signal::SIGTERM);
    cluster.site.ns(1).delete_link("flannel.1").unwrap();
    std::fs::remove_file(cluster.site.subnet_file(1)).unwrap();
    cluster.kubernetes.server.kill();

    let one = cluster.start(1).ready();
    let pods = cluster.pods();
    reaches(&pods[0], &pods[1]);
    assert_eq!(status(&one)["status"]["store"]["kind"], "lost");
    let said = |text: &str| one.log().lines().filter(|line| line.contains(text)).count();
    one.until("told what it goes by", || said("using the lease and peers of the state file") > 0);
    assert_eq!(
        (said("using the lease and peers of the state file"), said("no longer using the state file")),
        (1, 0),
        "{}",
        one.log()
    );
    cluster.restart();
    one.until("told that the server is back", || status(&one)["store"]["stale"] == false);
    one.until("told what it goes by", || said("no longer using the state file") > 0);
    assert_eq!(
        (said("using the lease and peers of the state file"), said("no longer using the state file")),
        (1, 1),
        "{}",
        one.log()
    );
    wait_until("the condition", PATIENCE, || Ok(cluster.network_unavailable(1).as_deref() == Some("False"))).unwrap();
    drop(two);
}

#[test]
fn an_agent_waits_for_a_credential_plug_in_that_fails_or_starts_from_its_state_file() {
    let cluster = Cluster::new(1);
    cluster.register(1);
    let broken = cluster.site.path("broken");
    let token = cluster.kubernetes.server.token_file("flannel");
    let script = format!(
        r#"test ! -e '{}' && printf '{{"kind":"ExecCredential","status":{{"token":"%s"}}}}' "$(cat '{}')""#,
        broken.display(),
        token.display()
    );
    let start = || cluster.launch(1, cluster.kubernetes.args_by_plug_in(&script), &[("NODE_NAME", "node-1")]);
    let problem = "the credential plug-in sh of the kubeconfig failed with exit status: 1";

    std::fs::write(&broken, "").unwrap();
    let agent = start();
    agent.until("told what it waits for", || agent.log().contains(problem));
    assert_eq!(agent.get(8081, "/readyz").map(|(code, _)| code), Some(503));
    std::fs::remove_file(&broken).unwrap();
    let agent = agent.ready();
    agent.until("all written down", || read(&cluster.state_file(1)).contains("node-1"));
    agent.end(Signal::SIGTERM);

    cluster.site.ns(1).delete_link("flannel.1").unwrap();
    std::fs::remove_file(cluster.site.subnet_file(1)).unwrap();
    std::fs::write(&broken, "").unwrap();
    let agent = start().ready();
    agent.until("told what it waits for", || agent.log().contains(problem));
    assert_eq!(status(&agent)["status"]["store"]["kind"], "lost");
    std::fs::remove_file(&broken).unwrap();
    agent.until("in contact", || status(&agent)["status"]["store"]["kind"] == "live");
}

#[test]
fn status_explain_plan_and_cleanup_work_with_kubernetes() {
    let cluster = Cluster::new(2);
    [1, 2].into_iter().for_each(|nth| cluster.register(nth));
    let fresh = cluster.run(1, &["plan"]);
    assert!(fresh.code == Some(0) && fresh.out.contains("no lease yet"), "{fresh:?}");
    let [one, _two] = [1, 2].map(|nth| cluster.start(nth)).map(Agent::ready);
    one.until("told of its peer", || cluster.run(1, &["explain", "node-2"]).code == Some(0));
    cluster.register(3);
    cluster.annotate_all(3, &json!({ "kube-subnet-manager": "true", "backend-data": "no JSON" }));
    one.until("told of the bad record", || cluster.run(1, &["status"]).out.contains("1 records quarantined"));

    let table = cluster.run(1, &["status"]);
    assert_eq!(table.code, Some(0), "{table:?}");
    for part in ["state        ready\n", "10.244.1.0/24", "eth0 (10.89.0.11)", "1 accepted", "node-3: "] {
        assert!(table.out.contains(part), "{part} is not in:\n{}", table.out);
    }
    let json: serde_json::Value = serde_json::from_str(&cluster.run(1, &["status", "-json"]).out).unwrap();
    assert_eq!((&json["ready"], &json["status"]["peers"]["accepted"]), (&true.into(), &1.into()));
    for meant in ["node-2", "10.89.0.12", "10.244.2.0/24"] {
        let peer = cluster.run(1, &["explain", meant]);
        for part in ["node-2: accepted as a peer", "fdb ", "neighbour ", "route 10.244.2.0/24"] {
            assert!(peer.out.contains(part), "{meant}: {part} is not in:\n{}", peer.out);
        }
    }
    let bad = cluster.run(1, &["explain", "node-3"]);
    assert!(bad.out.contains("node-3: quarantined: "), "{bad:?}");
    assert_eq!(one.get(9472, "/plan"), Some((200, "nothing to do\n".to_owned())));

    one.end(Signal::SIGTERM);
    assert_eq!(cluster.run(1, &["plan"]).out, "nothing to do\n");
    cluster.site.ns(1).delete_link("flannel.1").unwrap();
    let plan = cluster.run(1, &["plan"]);
    assert!(plan.code == Some(0) && plan.out.contains("flannel.1"), "{plan:?}");
    assert!(cluster.site.ns(1).link("flannel.1").is_err(), "a plan writes nothing");

    cluster.start(1).ready().end(Signal::SIGTERM);
    let cleaned = cluster.run(1, &["cleanup"]);
    assert_eq!(cleaned.code, Some(0), "{cleaned:?}");
    assert!(cleaned.out.contains("released: lease node-1 "), "{cleaned:?}");
    assert!(cluster.site.ns(1).link("flannel.1").is_err() && !routes(cluster.site.ns(1)).contains("10.244."));
    let left = cluster.get("/api/v1/nodes/node-1")["metadata"]["annotations"].clone();
    assert_eq!(left, json!({ "example.com/any": "" }), "what is not flannel's stays");
    let again = cluster.run(1, &["cleanup"]);
    assert_eq!((again.code, again.out.as_str()), (Some(0), "nothing to remove\n"), "{again:?}");
}

/// An operator assigned a podCIDR twice: peers go by the Node that was there first.
#[test]
fn of_two_nodes_with_one_pod_cidr_the_older_has_it_and_neither_agent_ends() {
    let cluster = Cluster::new(3);
    let created = || cluster.get("/api/v1/nodes/node-1")["metadata"]["creationTimestamp"].clone();
    cluster.register(1);
    cluster.register(3);
    // The API server's times are whole seconds.
    let twice = ["10.244.1.0/24".to_owned()];
    wait_until("a younger Node", PATIENCE, || {
        let other = cluster.ask(async |server| server.create_node(&name(2), &twice).await).unwrap();
        let is_younger = other["metadata"]["creationTimestamp"] != created();
        if !is_younger {
            cluster.kubernetes.delete(&cluster.site, 2);
        }
        Ok(is_younger)
    })
    .unwrap();
    let younger = cluster.start(2).ready();
    let three = cluster.start(3).ready();
    three.until("told of the younger", || cluster.sends_to(3, [10, 89, 0, 12].into()));
    let older = cluster.start(1).ready();
    let is_the_olders = || cluster.sends_to(3, [10, 89, 0, 11].into()) && !cluster.sends_to(3, [10, 89, 0, 12].into());
    three.until("going by the older", is_the_olders);
    for (agent, own) in [(&older, 1), (&younger, 2)] {
        assert!(agent.is_ready(), "{}", agent.log());
        assert_eq!(status(agent)["status"]["lease"]["key"], name(own));
    }
    // Mended by the operator.
    cluster.kubernetes.delete(&cluster.site, 2);
    cluster.register(2);
    three.until("told of both", || cluster.has_route(3, 1) && cluster.has_route(3, 2));
    younger.until("a lease of its own", || status(&younger)["status"]["lease"]["subnets"]["v4"] == "10.244.2.0/24");
    younger.until_ready();
    assert!(older.is_ready(), "{}", older.log());
}
