//! Two agents with one identity, and what must not be mistaken for that.

use nix::sys::signal::Signal;

use crate::harness::{Agent, VXLAN};
use crate::store::{Cluster, SUBNETS, status};

fn is_contended(agent: &Agent) -> bool {
    !status(agent)["status"]["contended"].is_null()
}

#[test]
fn two_hosts_with_the_same_public_address_say_so() {
    let cluster = Cluster::new(2, VXLAN);
    let one = cluster.start(1, &[]).ready();
    let two = cluster.start(2, &["-iface", "eth0", "-public-ip", "10.89.0.11"]).ready();
    for (nth, agent) in [(1, &one), (2, &two)] {
        agent.until("told of the other", || is_contended(agent));
        agent.until("warned", || agent.log().contains("another agent is writing this node's lease"));
        let table = cluster.run(nth, &["status"]).out;
        assert!(table.lines().any(|line| line.starts_with("contended")), "{table}");
        let doctor = cluster.run(nth, &["doctor"]);
        assert!(doctor.code == Some(1) && doctor.out.contains("another agent writes this node's lease"), "{doctor:?}");
        assert_eq!(agent.metric("flannel_lease_contended"), Some(1.0));
        assert_eq!(agent.metric("flannel_events_total{kind=\"lease_contended\"}"), Some(1.0));
    }
    assert_eq!(cluster.records().len(), 1);
    // The other one is gone: the lease is this node's alone.
    two.end(Signal::SIGTERM);
    one.until("quiet again", || !is_contended(&one));
    one.until("told so", || one.log().contains("no other agent is writing this node's lease any more"));
}

#[test]
fn a_deleted_record_and_an_emptied_store_are_no_other_agent() {
    let cluster = Cluster::new(2, VXLAN);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])].map(Agent::ready);
    let keys = [1, 2].map(|nth| cluster.keys_of(nth));
    let back = |nth: usize| cluster.keys_of(nth) == keys[nth - 1];
    cluster.delete(&format!("{SUBNETS}/{}", keys[0][0]));
    agents[0].until("in the store again", || back(1));
    cluster
        .ask(async |client| {
            let all = etcd_client::DeleteOptions::new().with_prefix();
            client.delete(format!("{SUBNETS}/"), Some(all)).await.unwrap();
        })
        .unwrap();
    agents.iter().for_each(|agent| agent.until("in the store again", || back(1) && back(2)));
    for agent in &agents {
        agent.until_ready();
        assert!(agent.metric("flannel_events_total{kind=\"lease_lost\"}") > Some(0.0));
        assert_eq!(agent.metric("flannel_events_total{kind=\"lease_contended\"}"), Some(0.0));
        assert!(!is_contended(agent) && !agent.log().contains("another agent"), "{}", agent.log());
    }
    // A restart takes over what the former run wrote.
    let [one, _two] = agents;
    one.end(Signal::SIGTERM);
    let one = cluster.start(1, &[]).ready();
    assert!(!is_contended(&one) && back(1), "{}", one.log());
}
