//! A thousand nodes that join within seconds.

use nix::sys::signal::Signal;

use crate::harness::{Agent, routes};
use crate::store::{Cluster, SUBNETS};

const CONFIG: &str =
    r#"{"Network":"172.16.0.0/12","SubnetLen":24,"SubnetMin":"172.24.0.0","Backend":{"Type":"vxlan"}}"#;
const JOINS: u16 = 1000;
/// Lines that an agent may say of them all: one for each of the first few, and one for the rest of a second.
const MOST_LINES: usize = 150;

/// Key and value of a joining node's record.
fn joining(n: u16) -> (String, String) {
    let [high, low] = n.to_be_bytes();
    let value = format!(
        r#"{{"PublicIP":"10.89.{}.{low}","BackendType":"vxlan","BackendData":{{"VNI":1,"VtepMAC":"02:00:00:09:{high:02x}:{low:02x}"}}}}"#,
        100 + high
    );
    (format!("{SUBNETS}/172.{}.{low}.0-24", 16 + high), value)
}

#[test]
fn a_thousand_nodes_that_join_are_routed_everywhere_with_few_words_and_without_looking_at_the_whole_kernel_again() {
    let cluster = Cluster::new(2, CONFIG);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])].map(Agent::ready);
    let audits = agents.each_ref().map(|agent| agent.metric("flannel_audits_total").unwrap());
    let lines = agents.each_ref().map(|agent| agent.log().lines().count());
    cluster.ask(async |client| {
        for n in 0..JOINS {
            let (key, value) = joining(n);
            client.put(key, value, None).await.unwrap();
        }
    });
    for ((nth, agent), (audits, lines)) in (1..).zip(&agents).zip(audits.into_iter().zip(lines)) {
        let peers = usize::from(JOINS) + 1;
        agent
            .until("told of all", || agent.metric("flannel_peers{state=\"accepted\"}") == Some(f64::from(JOINS) + 1.0));
        let programmed = || routes(cluster.ns(nth)).lines().filter(|line| line.contains("dev flannel.1")).count();
        agent.until("programmed", || programmed() == peers);
        let audits = agent.metric("flannel_audits_total").unwrap() - audits;
        assert!(audits <= 3.0, "{audits} audits");
        let said = agent.log().lines().count() - lines;
        assert!(said <= MOST_LINES, "{said} lines:\n{}", agent.log());
        assert_eq!(agent.get(9472, "/plan"), Some((200, "nothing to do\n".to_owned())));
    }
    for agent in agents {
        assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
    }
    cluster.assert_lawful();
}
