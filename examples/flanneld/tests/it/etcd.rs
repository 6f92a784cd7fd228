//! Agents that share a real etcd: its absence, and what becomes of leases.

use nix::sys::signal::Signal;

use crate::harness::{Agent, read, routes};
use crate::store::{Cluster, ENDPOINT, SUBNETS, reaches, status};

pub(crate) const VXLAN: &str = r#"{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;

#[test]
fn agents_share_etcd_survive_its_death_and_keep_their_leases() {
    let mut cluster = Cluster::new(2, VXLAN);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])];
    agents.iter().for_each(Agent::until_ready);
    let env = [1, 2].map(|nth| read(&cluster.site.subnet_file(nth)));
    assert_ne!(env[0], env[1]);
    agents[0].until("told of its peer", || cluster.has_route(1, &cluster.subnet(2)));
    let before = routes(cluster.ns(1));

    cluster.stop_etcd();
    agents[0].until("told that etcd is away", || status(&agents[0])["store"]["contact"] == "lost");
    assert_eq!(status(&agents[0])["store"]["stale"], false, "nothing was read from the state file");
    assert_eq!(agents[0].get(8081, "/readyz").map(|(code, _)| code), Some(200));
    assert_eq!(routes(cluster.ns(1)), before);
    let doctor = cluster.run(1, &["doctor"]);
    assert!(doctor.out.contains("ERROR    store"), "{}", doctor.out);
    let [one, two] = agents;
    let (code, took) = one.end(Signal::SIGTERM);
    assert_eq!((code, took.as_secs() < 2), (Some(0), true), "{took:?}");
    two.end(Signal::SIGKILL);
    assert_eq!(routes(cluster.ns(1)), before);

    let waiting = cluster.start(1, &["-state-file="]);
    waiting.until("waiting for etcd", || waiting.log().contains("waiting for the lease store"));
    cluster.start_etcd();
    waiting.until_ready();
    let two = cluster.start(2, &[]);
    two.until_ready();
    assert_eq!([1, 2].map(|nth| read(&cluster.site.subnet_file(nth))), env);
    assert_eq!(routes(cluster.ns(1)), before);
}

#[test]
fn a_node_boots_from_its_state_file_while_etcd_is_away_and_converges_when_it_is_back() {
    let mut cluster = Cluster::new(3, VXLAN);
    let [one, two, three] = [1, 2, 3].map(|nth| cluster.start(nth, &[]));
    [&one, &two, &three].into_iter().for_each(Agent::until_ready);
    let subnets = [1, 2, 3].map(|nth| cluster.subnet(nth));
    one.until("told of its peers", || subnets[1..].iter().all(|subnet| cluster.has_route(1, subnet)));
    let pods = [cluster.pod(1), cluster.pod(2)];

    one.end(Signal::SIGTERM);
    cluster.ns(1).delete_link("flannel.1").unwrap();
    std::fs::remove_file(cluster.site.subnet_file(1)).unwrap();
    three.end(Signal::SIGTERM);
    let [key] = cluster.keys_of(3).try_into().unwrap();
    cluster.delete(&format!("{SUBNETS}/{key}"));
    cluster.stop_etcd();

    let one = cluster.start(1, &[]);
    one.until_ready();
    assert_eq!(cluster.subnet(1), subnets[0]);
    reaches(&pods[0], &pods[1]);
    assert!(cluster.has_route(1, &subnets[2]), "who left since is not known yet");
    let shown = status(&one);
    assert_eq!((&shown["store"]["contact"], &shown["store"]["stale"]), (&"lost".into(), &true.into()), "{shown}");
    assert!(cluster.run(1, &["status"]).out.contains("STALE"), "{}", cluster.run(1, &["status"]).out);
    let (_, metrics) = one.get(9472, "/metrics").unwrap();
    assert!(metrics.contains("flannel_stale 1\n"), "{metrics}");

    cluster.start_etcd();
    one.until("rid of who left", || !cluster.has_route(1, &subnets[2]));
    one.until("told that etcd is back", || status(&one)["store"]["stale"] == false);
    assert_eq!(cluster.keys_of(1), [subnets[0].to_string().replace('/', "-")]);
    let three = cluster.start(3, &[]);
    three.until_ready();
    one.until("told of the newcomer", || cluster.has_route(1, &cluster.subnet(3)));
}

#[test]
fn a_state_file_that_cannot_be_used_is_named_and_harms_nobody() {
    let cluster = Cluster::new(1, VXLAN);
    std::fs::write(cluster.site.path("file"), "").unwrap();
    let under_file = cluster.site.path("file/state").display().to_string();
    let told = cluster.run(1, &["-state-file", &under_file]);
    assert_eq!(told.code, Some(1), "{told:?}");
    assert!(told.err.contains("choose another -state-file"), "{}", told.err);
    assert!(cluster.ns(1).link("flannel.1").is_err() && cluster.records().is_empty());

    std::fs::write(cluster.state_file(1), "{\"version\":1,\"ori").unwrap();
    let agent = cluster.start(1, &[]);
    agent.until_ready();
    agent.end(Signal::SIGTERM);
    assert!(read(&cluster.state_file(1)).contains(ENDPOINT), "{}", read(&cluster.state_file(1)));
    let doctor = cluster.run(1, &["doctor"]);
    assert!(doctor.out.lines().any(|line| line.starts_with("ok") && line.contains("state file")), "{}", doctor.out);
    let cleaned = cluster.run(1, &["cleanup"]);
    assert_eq!((cleaned.code, cluster.state_file(1).exists()), (Some(0), false), "{cleaned:?}");
}

#[test]
fn a_configuration_that_is_absent_or_bad_is_waited_for_and_told_once() {
    let cluster = Cluster::new(1, "{}");
    cluster.delete("/coreos.com/network/config");
    let agent = cluster.start(1, &[]);
    let told = |part: &str| agent.log().lines().filter(|line| line.contains("WARN") && line.contains(part)).count();
    agent.until("waiting for a configuration", || told("waiting for a usable network configuration") == 1);
    cluster.configure("{");
    agent.until("told of bad JSON", || told("waiting for a usable network configuration") == 2);
    cluster.configure(r#"{"Network":"10.244.0.0/16","SubnetLen":31,"Backend":{"Type":"vxlan"}}"#);
    agent.until("told of a bad length", || told("SubnetLen") == 1);
    let shown = status(&agent);
    assert!(shown["waits_for"][0].as_str().unwrap().contains("SubnetLen"), "{shown}");
    assert_eq!(agent.get(8081, "/readyz").map(|(code, _)| code), Some(503));
    cluster.configure(VXLAN);
    agent.until_ready();
    assert_eq!(status(&agent)["waits_for"], serde_json::json!([]));
    // What is written later is nothing to an agent that runs.
    cluster.configure("{");
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
    let agent = cluster.start(1, &[]);
    agent.until("waiting again", || agent.log().contains("waiting for a usable network configuration"));
    assert!(cluster.ns(1).link("flannel.1").unwrap().is_up());
    let (code, took) = agent.end(Signal::SIGTERM);
    assert_eq!((code, took.as_secs() < 2), (Some(0), true));
}
