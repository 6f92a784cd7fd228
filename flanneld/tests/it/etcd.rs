//! Agents that share a real etcd: its absence, and what becomes of leases.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use flannel_core::net::Family;
use nix::sys::signal::Signal;

use crate::harness::{Agent, PATIENCE, VXLAN, read, routes};
use crate::records::put_peers;
use crate::store::{Cluster, ENDPOINT, SUBNETS, assert_no_loss, flow, reaches, status};

#[test]
fn agents_share_etcd_survive_its_death_and_keep_their_leases() {
    let mut cluster = Cluster::new(2, VXLAN);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])].map(Agent::ready);
    let env = [1, 2].map(|nth| read(&cluster.site.subnet_file(nth)));
    assert_ne!(env[0], env[1]);
    agents[0].until("told of its peer", || cluster.has_route(1, &cluster.subnet(2)));
    let before = routes(cluster.ns(1));

    cluster.stop_etcd();
    agents[0].until("told that etcd is away", || status(&agents[0])["status"]["store"]["kind"] == "lost");
    assert_eq!(status(&agents[0])["store"]["stale"], false, "nothing was read from the state file");
    assert_eq!(agents[0].get(8081, "/readyz").map(|(code, _)| code), Some(200));
    assert_eq!(routes(cluster.ns(1)), before);
    let doctor = cluster.run(1, &["doctor"]);
    assert!(doctor.out.contains("ERROR    store"), "{}", doctor.out);
    let [one, two] = agents;
    assert_eq!(one.end(Signal::SIGTERM).0, Some(0));
    two.end(Signal::SIGKILL);
    assert_eq!(routes(cluster.ns(1)), before);

    let waiting = cluster.start(1, &["-state-file="]);
    waiting.until("waiting for etcd", || waiting.log().contains("lease store unreachable"));
    cluster.start_etcd();
    waiting.until_ready();
    let _two = cluster.start(2, &[]).ready();
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
    let keys = [1, 2, 3].map(|nth| cluster.keys_of(nth).remove(0));
    one.until("all written down", || keys.iter().all(|key| read(&cluster.state_file(1)).contains(key)));

    one.end(Signal::SIGTERM);
    cluster.ns(1).delete_link("flannel.1").unwrap();
    std::fs::remove_file(cluster.site.subnet_file(1)).unwrap();
    three.end(Signal::SIGTERM);
    let [key] = cluster.keys_of(3).try_into().unwrap();
    cluster.delete(&format!("{SUBNETS}/{key}"));
    cluster.stop_etcd();

    let one = cluster.start(1, &[]).ready();
    assert_eq!(cluster.subnet(1), subnets[0]);
    reaches(&pods[0], &pods[1]);
    assert!(cluster.has_route(1, &subnets[2]), "who left since is not known yet");
    let shown = status(&one);
    assert_eq!(
        (&shown["status"]["store"]["kind"], &shown["store"]["stale"]),
        (&"lost".into(), &true.into()),
        "{shown}"
    );
    assert!(cluster.run(1, &["status"]).out.contains("STALE"), "{}", cluster.run(1, &["status"]).out);
    assert_eq!(one.metric("flannel_stale"), Some(1.0));

    cluster.start_etcd();
    one.until("rid of who left", || !cluster.has_route(1, &subnets[2]));
    one.until("told that etcd is back", || status(&one)["store"]["stale"] == false);
    assert_eq!(cluster.keys_of(1), [subnets[0].to_string().replace('/', "-")]);
    let _three = cluster.start(3, &[]).ready();
    one.until("told of the newcomer", || cluster.has_route(1, &cluster.subnet(3)));
}

#[test]
fn a_state_file_that_cannot_be_used_is_named_and_harms_nobody() {
    let cluster = Cluster::new(1, VXLAN);
    std::fs::write(cluster.site.path("file"), "").unwrap();
    let under_file = cluster.site.path("file/state").display().to_string();
    let told = cluster.run(1, &["-state-file", &under_file]);
    assert_eq!(told.code, Some(1), "{told:?}");
    assert!(told.err.contains("-state-file: ") && told.err.contains("is not a directory"), "{}", told.err);
    assert!(cluster.ns(1).link("flannel.1").is_err() && cluster.records().is_empty());

    std::fs::write(cluster.state_file(1), "{\"version\":1,\"ori").unwrap();
    std::fs::set_permissions(cluster.state_file(1), PermissionsExt::from_mode(0o600)).unwrap();
    let doctor = cluster.run(1, &["doctor"]).out;
    let said = doctor.lines().any(|line| line.starts_with("WARNING  state file") && line.contains("it is corrupt"));
    assert!(said && doctor.contains("fix: rm "), "{doctor}");
    let agent = cluster.start(1, &[]).ready();
    agent.until("written down", || read(&cluster.state_file(1)).contains(ENDPOINT));
    agent.end(Signal::SIGTERM);
    let doctor = cluster.run(1, &["doctor"]);
    assert!(doctor.out.lines().any(|line| line.starts_with("ok") && line.contains("state file")), "{}", doctor.out);
    let cleaned = cluster.run(1, &["cleanup"]);
    assert_eq!((cleaned.code, cluster.state_file(1).exists()), (Some(0), false), "{cleaned:?}");
}

#[test]
fn a_configuration_that_is_absent_is_waited_for_and_a_bad_one_ends_the_agent() {
    let cluster = Cluster::new(1, "{}");
    cluster.delete("/coreos.com/network/config");
    let agent = cluster.start(1, &[]);
    agent.until("waiting for a configuration", || agent.log().contains("no network configuration"));
    assert_eq!(agent.get(8081, "/readyz").map(|(code, _)| code), Some(503));
    cluster.configure(VXLAN);
    agent.until_ready();
    // What is written later is nothing to an agent that runs.
    cluster.configure(r#"{"Network":"10.244.0.0/16","SubnetLen":31,"Backend":{"Type":"vxlan"}}"#);
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
    let told = cluster.run(1, &[]);
    assert_eq!((told.code, told.err.contains("SubnetLen")), (Some(1), true), "{}", told.err);
    assert!(cluster.ns(1).link("flannel.1").unwrap().is_up(), "the data plane stays as it was");
}

#[test]
fn a_lease_lost_after_the_network_changed_is_not_taken_in_the_other_network() {
    let cluster = Cluster::new(2, VXLAN);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])].map(Agent::ready);
    agents[0].until("told of its peer", || cluster.has_route(1, &cluster.subnet(2)));
    let before = (routes(cluster.ns(1)), read(&cluster.site.subnet_file(1)));
    cluster.configure(&VXLAN.replace("10.244", "10.245"));
    let [key] = cluster.keys_of(1).try_into().unwrap();
    cluster.delete(&format!("{SUBNETS}/{key}"));
    let told = || {
        let error = status(&agents[0])["status"]["lease_refused"].as_str().unwrap_or_default().to_owned();
        error.contains("network configuration changed") && error.contains("restart")
    };
    agents[0].until("told why it takes none", told);
    assert_eq!(status(&agents[0])["status"]["store"]["kind"], "live");
    let metric = |name: &str| agents[0].metric(name);
    assert_eq!((metric("flannel_store_up"), metric("flannel_lease_refused")), (Some(1.0), Some(1.0)));
    assert_eq!((routes(cluster.ns(1)), read(&cluster.site.subnet_file(1))), before);
    assert!(cluster.keys_of(1).is_empty(), "{:?}", cluster.records());
    let doctor = cluster.run(1, &["doctor"]).out;
    assert!(doctor.lines().any(|line| line.starts_with("WARNING  configuration")), "{doctor}");

    let [one, _two] = agents;
    one.end(Signal::SIGTERM);
    let _one = cluster.start(1, &[]).ready();
    assert!(cluster.subnet(1).to_string().starts_with("10.245."), "{}", cluster.subnet(1));
    cluster.assert_lawful();
}

#[test]
fn an_agent_of_a_state_file_ends_when_etcd_comes_back_with_another_configuration() {
    let mut cluster = Cluster::new(1, VXLAN);
    let agent = cluster.start(1, &[]).ready();
    let [key] = cluster.keys_of(1).try_into().unwrap();
    agent.end(Signal::SIGTERM);
    assert!(read(&cluster.state_file(1)).contains(&key));
    cluster.configure(&VXLAN.replace("10.244", "10.245"));
    cluster.stop_etcd();
    let mut agent = cluster.start(1, &[]).ready();
    let before = routes(cluster.ns(1));
    cluster.start_etcd();
    assert_eq!(agent.wait(), Some(4), "{}", agent.log());
    let log = agent.log();
    let said = log.lines().find(|line| line.starts_with("flanneld: ")).unwrap_or(&log);
    assert!(said.contains("network configuration changed"), "{said}");
    assert_eq!(routes(cluster.ns(1)), before, "the data plane stays");
    let _agent = cluster.start(1, &[]).ready();
    assert!(cluster.subnet(1).to_string().starts_with("10.245."), "{}", cluster.subnet(1));
}

/// How long etcd is away; operators know it to be a minute and more.
const OUTAGE: Duration = Duration::from_secs(8);
/// Lines an agent may say of it.
const MOST_LINES: usize = 10;

#[test]
fn an_outage_of_etcd_costs_no_packet_few_lines_and_is_over_within_seconds() {
    let mut cluster = Cluster::placed(3, VXLAN);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])].map(Agent::ready);
    let pods = [cluster.pod(1), cluster.pod(2)];
    reaches(&pods[0], &pods[1]);
    let keys = [1, 2].map(|nth| cluster.keys_of(nth));
    let lines = || agents.each_ref().map(|agent| agent.log().lines().count());
    let flow = flow(&pods[0], &pods[1], Family::V4);

    // Slow at first: nothing answers for a while, and nothing is cut.
    cluster.signal_etcd(Signal::SIGSTOP);
    std::thread::sleep(Duration::from_secs(1));
    cluster.signal_etcd(Signal::SIGCONT);
    let quiet = lines();
    cluster.stop_etcd();
    let away = Instant::now();
    agents[0].until("told that etcd is away", || status(&agents[0])["status"]["store"]["kind"] == "lost");
    std::thread::sleep(OUTAGE.saturating_sub(away.elapsed()));
    cluster.start_etcd();
    put_peers(&cluster, 200..201);
    let told = || Ok([1, 2].iter().all(|nth| routes(cluster.ns(*nth)).contains("10.244.200.0/24 ")));
    let took = testkit::wait_until("converged", PATIENCE, told).unwrap_or_else(|error| panic!("{error}"));
    agents[0].until("told that etcd is back", || status(&agents[0])["status"]["store"]["kind"] == "live");
    let report = assert_no_loss(flow);
    for (agent, before) in agents.iter().zip(quiet) {
        let said = agent.log().lines().count() - before;
        assert!(said <= MOST_LINES, "{said} lines:\n{}", agent.log());
    }
    assert_eq!([1, 2].map(|nth| cluster.keys_of(nth)), keys);
    println!("converged after {took:?}; {report:?}; lines {quiet:?} to {:?}", lines());
    cluster.assert_lawful();
}

#[test]
fn a_node_that_was_cut_off_until_another_had_its_subnet_gives_it_up_and_takes_another() {
    let cut = "add table ip cut; add chain ip cut out { type filter hook output priority 0; }; \
               add rule ip cut out ip daddr 10.89.0.1 drop";
    let nft = |cluster: &Cluster, words: &[&str]| {
        assert_eq!(cluster.site.tool(1, &[&["nft"], words].concat()).code, Some(0));
    };
    outlived_by_its_subnet(
        |cluster, _| nft(cluster, &[cut]),
        |cluster, _| nft(cluster, &["delete", "table", "ip", "cut"]),
    );
}

#[test]
fn a_node_that_was_frozen_until_another_had_its_subnet_gives_it_up_and_takes_another() {
    outlived_by_its_subnet(|_, agent| agent.signal(Signal::SIGSTOP), |_, agent| agent.signal(Signal::SIGCONT));
}

/// Node 1 is out of reach for longer than its lease lasts.
fn outlived_by_its_subnet(leave: impl Fn(&Cluster, &Agent), come_back: impl Fn(&Cluster, &Agent)) {
    let cluster = Cluster::new(3, VXLAN);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])].map(Agent::ready);
    let former = cluster.subnet(1);
    agents[0].until("told of its peer", || cluster.has_route(1, &cluster.subnet(2)));
    let before = routes(cluster.ns(1));
    leave(&cluster, &agents[0]);
    // Its time runs out, and a node that had the subnet long ago takes it again.
    let [key] = cluster.keys_of(1).try_into().unwrap();
    cluster.expire(&key);
    let file = cluster.site.subnet_file(3);
    std::fs::write(&file, read(&cluster.site.subnet_file(1))).unwrap();
    let _three = cluster.start(3, &[]).ready();
    assert_eq!(cluster.subnet(3), former);
    assert_eq!(routes(cluster.ns(1)), before, "who is cut off keeps what it has");

    come_back(&cluster, &agents[0]);
    agents[0].until("in another subnet", || cluster.subnet(1) != former && cluster.keys_of(1).len() == 1);
    agents[0].until_ready();
    assert_eq!(cluster.keys_of(3), [key]);
    agents[0].until("told of the new owner", || cluster.has_route(1, &former));
    agents[1].until("told of both", || cluster.has_route(2, &former) && cluster.has_route(2, &cluster.subnet(1)));
    assert_eq!(agents[0].metric("flannel_events_total{kind=\"lease_lost\"}"), Some(1.0));
    cluster.assert_lawful();
}

#[test]
fn a_lease_that_is_deleted_by_hand_is_dealt_with_as_the_policy_says() {
    let cluster = Cluster::new(3, VXLAN);
    let policies = ["reacquire", "keep", "stop"];
    let mut agents = [1, 2, 3].map(|nth| cluster.start(nth, &["-on-lease-loss", policies[nth - 1]]));
    agents.iter().for_each(Agent::until_ready);
    let keys = [1, 2, 3].map(|nth| cluster.keys_of(nth));
    for key in keys.iter().flatten() {
        cluster.delete(&format!("{SUBNETS}/{key}"));
    }
    agents[0].until("in the store again", || cluster.keys_of(1) == keys[0]);
    agents[0].until_ready();
    assert_eq!(agents[2].wait(), Some(3), "{}", agents[2].log());
    assert!(agents[2].log().contains("the lease was lost"), "{}", agents[2].log());
    agents[1].until("without a lease", || status(&agents[1])["status"]["lease"].is_null());
    assert_eq!(agents[1].get(8081, "/readyz").map(|(code, _)| code), Some(503));
    let [_, keeper, _] = &agents;
    assert!(cluster.ns(2).link("flannel.1").unwrap().is_up() && cluster.ns(3).link("flannel.1").unwrap().is_up());
    assert_eq!((cluster.keys_of(2).len(), keeper.log().contains("panicked")), (0, false));
    cluster.assert_lawful();
}
