//! A network configuration that changes while agents run.

use crate::harness::VXLAN;
use crate::store::{Cluster, status};

const OTHER: &str = r#"{"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan","VNI":7}}"#;

#[test]
fn a_changed_configuration_is_shown_at_once_and_kept_or_taken_up_as_asked() {
    let cluster = Cluster::new(2, VXLAN);
    let keeper = cluster.start(1, &[]).ready();
    let mut follower = cluster.start(2, &["-on-config-change=restart"]).ready();
    cluster.configure(OTHER);
    assert_eq!(follower.wait(), Some(4), "{}", follower.log());
    keeper.until("told", || !status(&keeper)["status"]["reconfigured"].is_null());
    keeper.until("warned", || keeper.log().contains("the network configuration in the lease store changed"));
    assert_eq!(keeper.metric("flannel_config_changed"), Some(1.0));
    assert_eq!(keeper.metric("flannel_events_total{kind=\"config_changed\"}"), Some(1.0));
    assert_eq!(keeper.get(8081, "/readyz").map(|(code, _)| code), Some(200));
    let follower = cluster.start(2, &["-on-config-change=restart"]).ready();
    assert!(cluster.ns(2).link("flannel.7").is_ok() && cluster.ns(1).link("flannel.1").is_ok());

    cluster.configure("{");
    for agent in [&keeper, &follower] {
        agent.until("warned", || agent.log().contains("is unusable; this agent keeps the former one"));
        assert_eq!(agent.metric("flannel_config_rejected"), Some(1.0));
        agent.until_ready();
    }
    // One that no backend here can run ends no agent either.
    cluster.configure(&OTHER.replace("vxlan", "vxlna"));
    follower.until("told", || status(&follower)["status"]["config_rejected"].to_string().contains("vxlna"));
    cluster.configure(VXLAN);
    keeper.until("as before", || status(&keeper)["status"]["reconfigured"].is_null());
}
