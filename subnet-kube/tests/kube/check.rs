//! The problems that are found with rights, Node and annotations, on a real API server.

use std::time::{Duration, Instant};

use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::subnet::NodeIdentity;
use flannel_subnet_kube::{Access, Check, ConfigSource, KubeSubnets, NodeName, Options, Subject, Verdict};
use serde_json::{Value, json};
use testkit::etcd::Version;
use testkit::kubernetes::{self, ApiServer};

const NODE: &str = "this-node";

/// How long the server may take to apply a new role.
const PATIENCE: Duration = Duration::from_secs(20);

async fn server() -> ApiServer {
    ApiServer::start(Version::Current).await.unwrap_or_else(|error| panic!("{error}"))
}

fn named(node: &str) -> NodeName {
    NodeName::Named(NodeIdentity::new(node).unwrap())
}

/// Returns the store of the account `name`, which has these rules.
async fn store(server: &ApiServer, name: &str, rules: Value, node: NodeName) -> KubeSubnets {
    let token = server.service_account(name, rules).await.unwrap();
    store_of(server, name, &token, node).await
}

/// Returns the store of the account with this token.
async fn store_of(server: &ApiServer, name: &str, token: &str, node: NodeName) -> KubeSubnets {
    let kubeconfig = server.kubeconfig(name, token, &server.url()).unwrap();
    let client = Access::kubeconfig(kubeconfig).client().await.unwrap();
    let config = br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
    let config = ConfigSource::Fixed(NetworkConfig::parse(config, Allocation::External).unwrap());
    KubeSubnets::new(client, Options::new(node, config))
}

/// Returns the check of `subject` once the server applies the role, as determined by `settled`.
async fn found(store: &KubeSubnets, subject: Subject, settled: impl Fn(&Check) -> bool) -> Check {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let checks = store.check().await;
        let check = checks.iter().find(|check| check.subject == subject).cloned();
        match check {
            Some(check) if settled(&check) => return check,
            _ if Instant::now() > deadline => panic!("{subject:?}: {checks:#?}"),
            _ => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_right_that_is_missing_is_named_with_its_rule() {
    let server = server().await;
    server.create_node(NODE, &["10.244.7.0/24".to_owned()]).await.unwrap();
    let all = store(&server, "all", kubernetes::rules().unwrap(), named(NODE)).await;
    found(&all, Subject::Rights, |check| check.verdict == Verdict::Good).await;
    let checks = all.check().await;
    let subjects: Vec<_> = checks.iter().map(|check| check.subject).collect();
    let every = [Subject::Server, Subject::Rights, Subject::Clock, Subject::Node, Subject::Annotations];
    assert_eq!(subjects, every);
    for check in checks {
        assert_eq!((check.verdict, check.remedy.as_ref()), (Verdict::Good, None), "{check:?}");
    }
    // Each right is checked separately: the others are granted.
    for (nth, (verb, resource)) in
        [("get", "nodes"), ("list", "nodes"), ("watch", "nodes"), ("patch", "nodes/status")].into_iter().enumerate()
    {
        let store =
            store(&server, &format!("without-{nth}"), kubernetes::rules_without(verb, resource).unwrap(), named(NODE))
                .await;
        let wanted = format!("this account may not {verb} {resource}");
        let check = found(&store, Subject::Rights, |check| check.found == wanted).await;
        assert_eq!(check.verdict, Verdict::Bad);
        let rule = format!("{{apiGroups: [\"\"], resources: [{resource}], verbs: [{verb}]}}");
        assert!(check.remedy.as_ref().unwrap().ends_with(&format!("role: {rule}")), "{check:?}");
    }
    // A Pod is only read if the node is identified by it.
    let rules = kubernetes::rules_without("get", "pods").unwrap();
    let by_name = store(&server, "podless", rules.clone(), named(NODE)).await;
    found(&by_name, Subject::Rights, |check| check.verdict == Verdict::Good).await;
    let pod = NodeName::OfPod { namespace: "kube-system".to_owned(), pod: "agent-1".to_owned() };
    let by_pod = store(&server, "podless-too", rules, pod.clone()).await;
    found(&by_pod, Subject::Rights, |check| check.found == "this account may not get pods").await;
    let by_pod = store(&server, "with-pods", kubernetes::rules().unwrap(), pod).await;
    found(&by_pod, Subject::Rights, |check| check.verdict == Verdict::Good).await;
    found(&by_pod, Subject::Node, |check| check.found.contains("there is no such Pod")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_own_node_and_its_annotations_are_judged() {
    let mut server = server().await;
    let store = store(&server, "agent", kubernetes::rules().unwrap(), named(NODE)).await;
    let node = async |verdict, part: &str| {
        let check = found(&store, Subject::Node, |check| check.found.contains(part)).await;
        assert_eq!(check.verdict, verdict, "{check:?}");
    };
    node(Verdict::Bad, "there is no such Node").await;
    for (cidrs, verdict, part) in [
        (vec![], Verdict::Bad, "--allocate-node-cidrs"),
        (vec!["10.99.1.0/24".to_owned()], Verdict::Bad, "10.99.1.0/24 is not inside Network 10.244.0.0/16"),
        (vec!["10.244.7.0/24".to_owned()], Verdict::Good, "10.244.7.0/24"),
    ] {
        let _ = server.delete(&format!("/api/v1/nodes/{NODE}")).await;
        server.create_node(NODE, &cidrs).await.unwrap();
        node(verdict, part).await;
    }
    let name = |key| format!("flannel.alpha.coreos.com/{key}");
    for (key, value, verdict, part) in [
        ("backend-type", "vxlan", Verdict::Doubtful, "kube-subnet-manager is not \"true\""),
        ("kube-subnet-manager", "true", Verdict::Doubtful, "damaged: it has no public IP"),
        ("public-ip", "192.0.2.999", Verdict::Doubtful, "damaged: annotation public-ip is not IPv4"),
        ("public-ip", "192.0.2.1", Verdict::Good, "all annotations that peers read"),
        ("backend-data", "{", Verdict::Doubtful, "damaged: annotation backend-data"),
        ("backend-data", "null", Verdict::Good, "all annotations that peers read"),
        ("backend-type", "host-gw", Verdict::Doubtful, "backend-type is \"host-gw\""),
        ("public-ip-overwrite", "here", Verdict::Bad, "\"here\" is not an IPv4 address"),
    ] {
        server.annotate(NODE, json!({ name(key): value })).await.unwrap();
        let check = found(&store, Subject::Annotations, |check| check.found.contains(part)).await;
        assert_eq!((check.verdict, check.remedy.is_some()), (verdict, verdict != Verdict::Good), "{check:?}");
    }
    let stranger = store_of(&server, "stranger", "none-of-these", named(NODE)).await;
    let check = found(&stranger, Subject::Node, |check| check.found.contains("401")).await;
    assert_eq!(check.verdict, Verdict::Bad);
    assert!(check.remedy.as_ref().unwrap().starts_with("check the token"), "{check:?}");
    server.kill();
    let checks = store.check().await;
    assert_eq!((checks.len(), checks[0].subject, checks[0].verdict), (1, Subject::Server, Verdict::Bad), "{checks:?}");
}
