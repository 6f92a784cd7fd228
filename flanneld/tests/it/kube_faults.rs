//! Agents with a proxy between them and the API server.

use std::cell::Cell;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use flannel_core::net::Family;
use nix::sys::signal::Signal;
use serde_json::json;
use testkit::kubernetes::{Fault, rules, rules_without};
use testkit::{Families, wait_until};

use crate::harness::{Agent, PATIENCE, routes};
use crate::kube::{Way, name};
use crate::kubernetes::Cluster;
use crate::store::{assert_no_loss, flow, status};

/// What stands in the requests of each kind.
const WATCH: &str = "watch=true";
const LIST: &str = "resourceVersionMatch=NotOlderThan";
const CHECK: &str = "resourceVersionMatch=Exact";
const CONDITION: &str = "NetworkUnavailable";

/// An agent whose way to the server leads through a proxy, with an account of its own.
fn start(cluster: &Cluster, nth: usize) -> (Way, Agent) {
    let way = cluster.kubernetes.way(&cluster.site, &account(nth));
    let agent = restart(cluster, nth, &way);
    (way, agent)
}

fn restart(cluster: &Cluster, nth: usize, way: &Way) -> Agent {
    cluster.launch(nth, cluster.kubernetes.args_by(way), &[("NODE_NAME", &name(nth))])
}

fn account(nth: usize) -> String {
    format!("agent-{nth}")
}

/// docs/faults.md, K1, K2, K4, K6, K7, K13 and K14: none of them costs a packet, or keeps news from an agent for longer than
/// it takes to try again.
#[test]
fn no_fault_of_the_api_server_costs_a_packet_or_keeps_news_from_an_agent() {
    const PEER: usize = 4;
    let cluster = Cluster::with(3, Families::Dual);
    (1..=3).for_each(|nth| cluster.register(nth));
    cluster.join(PEER);
    // The condition of the first is refused at first, and once its answer is lost.
    let way = cluster.kubernetes.way(&cluster.site, &account(1));
    way.proxy.expect(CONDITION, Fault::status(500, "etcdserver: request timed out"), 1);
    way.proxy.expect(CONDITION, Fault::status(403, "admission webhook \"x\" denied the request"), 1);
    way.proxy.expect(CONDITION, Fault::Lose, 1);
    let one = restart(&cluster, 1, &way);
    let (stuck, two) = start(&cluster, 2);
    let (rotated, three) = start(&cluster, 3);
    let agents = [one, two, three].map(Agent::ready);
    let of_peer = |n: u8| IpAddr::from([10, 89, 7, n]);
    let pods = cluster.pods();
    for (nth, agent) in (1..).zip(&agents) {
        agent.until("told of the peers", || cluster.sends_to(nth, of_peer(4)));
        let others = (1..=3).filter(|other| *other != nth).collect::<Vec<_>>();
        agent.until("told of the others", || others.iter().all(|other| cluster.has_route(nth, *other)));
    }
    let ways = [(0, 1, Family::V4), (1, 0, Family::V6)];
    for (from, to, family) in ways {
        testkit::probe::until_reply(&pods[from].ns, pods[to].addr(family).unwrap(), PATIENCE).unwrap();
    }
    let flows = ways.map(|(from, to, family)| flow(&pods[from], &pods[to], family));

    // The second's watch goes silent, and the third's token is not taken any more: it has another one on disk.
    stuck.proxy.expect(WATCH, Fault::FreezeAfter(0), 1);
    stuck.proxy.cut();
    let token = cluster.ask(async |server| server.service_account("agent-3-new", rules().unwrap()).await).unwrap();
    std::fs::write(&rotated.token_file, &token).unwrap();
    let old = format!("/api/v1/namespaces/kube-system/serviceaccounts/{}", account(3));
    cluster.ask(async |server| server.delete(&old).await).unwrap();
    rotated.proxy.expect(WATCH, Fault::CutAfter(0), usize::MAX);
    rotated.proxy.cut();

    let last = Cell::new(10);
    let change = || {
        last.set(last.get() + 1);
        cluster.annotate(PEER, "public-ip", json!(of_peer(last.get())));
    };
    let told = |what: &str| {
        let begun = Instant::now();
        agents[0].until(&format!("told over {what}"), || cluster.sends_to(1, of_peer(last.get())));
        println!("{what}: told after {:?}", begun.elapsed());
    };
    let gone = || Fault::status(410, "too old resource version");
    let second = Duration::from_secs(1);
    for (what, faults) in [
        ("a cut", vec![]),
        ("410", vec![(WATCH, gone())]),
        ("an event 410", vec![(WATCH, Fault::gone())]),
        ("half a list", vec![(WATCH, gone()), (LIST, Fault::CutAfter(700))]),
        ("a watch that is cut", vec![(WATCH, Fault::CutAfter(300))]),
        ("half an event", vec![(WATCH, Fault::half_an_event())]),
        ("429 and 503", vec![(WATCH, Fault::busy(429, 1)), (CHECK, Fault::busy(503, 1))]),
        ("500 and 502", vec![(CHECK, Fault::status(500, "no")), (WATCH, Fault::status(502, "no"))]),
        ("delay", vec![(CHECK, Fault::Delay(second)), (WATCH, Fault::Delay(second))]),
    ] {
        for (part, fault) in faults {
            way.proxy.expect(part, fault, 1);
        }
        way.proxy.cut();
        change();
        told(what);
        // It goes on as before.
        change();
        told("as before");
    }

    // An event that is lost on the way is made up for by the next of that Node.
    let opened = || way.proxy.seen(WATCH).len();
    let before = opened();
    way.proxy.expect(WATCH, Fault::Drop(name(PEER)), 1);
    way.proxy.cut();
    agents[0].until("watching again", || opened() > before);
    change();
    cluster.join(5);
    agents[0].until("told of another", || cluster.sends_to(1, of_peer(5)));
    assert!(!cluster.sends_to(1, of_peer(last.get())), "the event was not lost");
    way.proxy.cut();
    cluster.ask(async |server| server.annotate(&name(PEER), json!({ "example.com/any": "1" })).await).unwrap();
    told("a lost event");

    // One family alone.
    let v6: IpAddr = "fd00:89::9:4".parse().unwrap();
    cluster.annotate(PEER, "public-ipv6", json!(v6));
    agents[0].until("told of one family", || cluster.sends_to(1, v6));
    assert!(cluster.sends_to(1, of_peer(last.get())));

    // Made again in a gap, with other podCIDRs and the same annotations.
    for (fault, subnet) in [(None, 6), (Some(gone()), 7)] {
        let annotations = cluster.get(&format!("/api/v1/nodes/{}", name(PEER)))["metadata"]["annotations"].clone();
        if let Some(fault) = fault {
            way.proxy.expect(WATCH, fault, 1);
        }
        way.proxy.cut();
        cluster.kubernetes.delete(&cluster.site, PEER);
        let cidrs = [format!("10.244.{subnet}.0/24"), format!("fd00:244:0:{subnet}::/64")];
        cluster.ask(async |server| {
            server.create_node(&name(PEER), &cidrs).await.unwrap();
            server.annotate(&name(PEER), annotations).await.unwrap();
        });
        agents[0].until("told of another subnet", || cluster.has_route(1, subnet) && !cluster.has_route(1, PEER));
    }

    change();
    told("all");
    agents[2].until("in use of its new token", || {
        rotated.proxy.seen(WATCH).iter().any(|seen| seen.token.as_ref() == Some(&token))
    });
    rotated.proxy.mend();
    for (nth, agent) in (1..).zip(&agents) {
        agent.until("told all", || cluster.sends_to(nth, of_peer(last.get())));
        assert!(agent.is_ready(), "{}", agent.log());
    }
    wait_until("the condition", PATIENCE, || Ok(cluster.network_unavailable(1).as_deref() == Some("False"))).unwrap();
    assert!(way.proxy.seen(CONDITION).len() >= 4);
    for flow in flows {
        assert_no_loss(flow);
    }
}

/// docs/faults.md, K9.
#[test]
fn an_agent_without_a_right_says_which_once_waits_and_goes_on_with_it() {
    const LACKING: [(&str, &str); 5] =
        [("get", "nodes"), ("list", "nodes"), ("watch", "nodes"), ("patch", "nodes/status"), ("get", "pods")];
    let cluster = Cluster::new(LACKING.len());
    let nodes = 1..=LACKING.len();
    nodes.clone().for_each(|nth| cluster.register(nth));
    let ways: Vec<_> = nodes.clone().map(|nth| cluster.kubernetes.way(&cluster.site, &account(nth))).collect();
    // The last agent knows its node by its Pod.
    let last = LACKING.len();
    cluster.ask(async |server| server.create_pod("agent", &account(last), Some(&name(last))).await).unwrap();
    let start = |nth: usize| {
        let by_pod = [("POD_NAME", "agent"), ("POD_NAMESPACE", "kube-system")];
        let node = name(nth);
        let by_name = [("NODE_NAME", &*node)];
        let variables = if LACKING[nth - 1].1 == "pods" { &by_pod[..] } else { &by_name[..] };
        cluster.launch(nth, cluster.kubernetes.args_by(&ways[nth - 1]), variables)
    };
    let agents: Vec<_> = nodes.clone().map(start).map(Agent::ready).collect();
    let is_told_all = |nth: usize| nodes.clone().filter(|peer| *peer != nth).all(|peer| cluster.has_route(nth, peer));
    nodes.clone().zip(&agents).for_each(|(nth, agent)| agent.until("told of all", || is_told_all(nth)));
    agents
        .iter()
        .for_each(|agent| agent.until("quiet", || agent.log().contains("NetworkUnavailable of the Node set to False")));
    let pods: Vec<_> = nodes.clone().map(|nth| cluster.site.pod(nth)).collect();
    let ways_of_flows = nodes.clone().map(|nth| (&pods[nth - 1], &pods[nth % LACKING.len()]));
    let flows: Vec<_> = ways_of_flows
        .map(|(from, to)| {
            crate::store::reaches(from, to);
            flow(from, to, Family::V4)
        })
        .collect();
    let kernel = |nth: usize| (routes(cluster.site.ns(nth)), cluster.site.ns(nth).fdb().unwrap());
    let before: Vec<_> = nodes.clone().map(kernel).collect();

    let set_rules = |nth: usize, rules: serde_json::Value| {
        let (verb, resource) = LACKING[nth - 1];
        cluster.ask(async |server| server.set_rules(&account(nth), rules, verb, resource).await).unwrap();
    };
    for (nth, agent) in nodes.clone().zip(agents) {
        let (verb, resource) = LACKING[nth - 1];
        set_rules(nth, rules_without(verb, resource).unwrap());
        assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
        // Without it there is nothing to go by instead.
        std::fs::remove_file(cluster.state_file(nth)).unwrap();
    }
    let agents: Vec<_> = nodes.clone().map(start).collect();
    let said = |nth: usize| {
        let (verb, resource) = LACKING[nth - 1];
        let rule = format!("resources: [{resource}], verbs: [{verb}]}}");
        agents[nth - 1].log().lines().filter(|line| line.contains(&rule)).count()
    };
    nodes.clone().for_each(|nth| agents[nth - 1].until("told what it lacks", || said(nth) > 0));
    let tries = |nth: usize| ways[nth - 1].proxy.seen("").len();
    let first: Vec<_> = nodes.clone().map(tries).collect();
    for nth in nodes.clone() {
        // It is tried again, and not said again.
        agents[nth - 1].until("at it again", || tries(nth) >= first[nth - 1] + 3);
        assert_eq!(said(nth), 1, "{}", agents[nth - 1].log());
        assert_eq!(kernel(nth), before[nth - 1], "{}", agents[nth - 1].log());
    }
    for nth in nodes.clone() {
        set_rules(nth, rules().unwrap());
    }
    for agent in &agents {
        agent.until_ready();
        agent.until("in contact", || status(agent)["status"]["store"]["kind"] == "live");
    }
    cluster.join(6);
    nodes.clone().zip(&agents).for_each(|(nth, agent)| agent.until("told of another", || cluster.has_route(nth, 6)));
    for flow in flows {
        assert_no_loss(flow);
    }
}

/// docs/faults.md, K3.
#[test]
fn a_restored_backup_of_the_api_servers_store_is_followed_and_costs_no_packet() {
    let mut cluster = Cluster::new(2);
    [1, 2].into_iter().for_each(|nth| cluster.register(nth));
    let agents = [1, 2].map(|nth| cluster.start(nth)).map(Agent::ready);
    agents
        .iter()
        .for_each(|agent| agent.until("quiet", || agent.log().contains("NetworkUnavailable of the Node set to False")));
    let pods = cluster.pods();
    crate::store::reaches(&pods[0], &pods[1]);
    let flow = flow(&pods[0], &pods[1], Family::V4);
    let switch = cluster.site.underlay.switch().clone();
    switch.run(|| cluster.kubernetes.server.etcd().back_up()).unwrap().unwrap();
    cluster.join(3);
    for (nth, agent) in [1, 2].into_iter().zip(&agents) {
        agent.until("told of a peer", || cluster.has_route(nth, 3));
    }
    cluster.kubernetes.server.kill();
    switch.run(|| cluster.kubernetes.server.etcd().restore()).unwrap().unwrap();
    cluster.restart();
    for (nth, agent) in [1, 2].into_iter().zip(&agents) {
        agent.until("rid of the peer", || !cluster.has_route(nth, 3));
        assert!(agent.is_ready(), "{}", agent.log());
    }
    cluster.join(4);
    for (nth, agent) in [1, 2].into_iter().zip(&agents) {
        agent.until("told of another", || cluster.has_route(nth, 4));
    }
    assert_no_loss(flow);
}
