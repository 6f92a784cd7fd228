//! What is read from and written to the own Node.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use flannel_core::net::Dual;
use flannel_core::subnet::{SubnetError, SubnetManager, Want};
use flannel_subnet_kube::{Access, AnnotationPrefix, EventKind, KubeSubnets, NodeName};
use serde_json::{Value, json};
use testkit::etcd::Version;
use testkit::kubernetes::{ApiServer, Fault};

use crate::common::{Lab, WITHIN, attrs, cidrs, id, key, name, options, path, waits, watch};

/// docs/faults.md, K12.
#[tokio::test(flavor = "multi_thread")]
async fn one_patch_writes_our_keys_alone_byte_for_byte_as_go_flannel_does() {
    let lab = Lab::new().await;
    let nth = lab.number();
    lab.node(nth).await;
    lab.server.annotate(&name(nth), json!({ "example.com/other": "theirs" })).await.unwrap();
    let store = lab.store(nth).await;
    let lease = store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap();
    let data = format!(r#"{{"VNI":1,"VtepMAC":"02:00:5e:00:00:{nth:02x}"}}"#);
    let wanted = json!({
        "kube-subnet-manager": "true",
        "backend-type": "vxlan",
        "backend-data": data,
        "backend-v6-data": data,
        "public-ip": format!("192.0.2.{nth}"),
        "public-ipv6": format!("2001:db8::{nth:x}"),
    });
    assert_eq!(lab.annotations(nth).await, wanted);
    let patches = lab.proxy.seen("PATCH");
    let [patch] = &patches[..] else { panic!("{patches:?}") };
    assert_eq!(patch.line, format!("PATCH {}/status", path(nth)));
    let node = lab.server.get(&path(nth)).await.unwrap();
    assert_eq!(node["metadata"]["annotations"]["example.com/other"], "theirs");
    let body: Value = serde_json::from_str(&patch.body).unwrap();
    assert_eq!(body["metadata"]["uid"], node["metadata"]["uid"]);
    assert_eq!(body["metadata"]["annotations"].as_object().unwrap().len(), 6);

    // If nothing differs, nothing is written; if one annotation differs, only that one is.
    store.renew(&lease).await.unwrap();
    store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap();
    assert_eq!(lab.proxy.seen("PATCH").len(), 1);
    lab.annotate(nth, json!({ "public-ip": "203.0.113.9" })).await;
    store.renew(&lease).await.unwrap();
    let body: Value = serde_json::from_str(&lab.proxy.seen("PATCH")[1].body).unwrap();
    let address = format!("192.0.2.{nth}");
    assert_eq!(body["metadata"]["annotations"], json!({ "flannel.alpha.coreos.com/public-ip": address }));

    store.release(lease).await.unwrap();
    assert_eq!(lab.annotations(nth).await, json!({}));
    let node = lab.server.get(&path(nth)).await.unwrap();
    assert_eq!(node["metadata"]["annotations"], json!({ "example.com/other": "theirs" }));
}

/// docs/faults.md, K10.
#[tokio::test(flavor = "multi_thread")]
async fn pod_cidrs_are_waited_for_until_they_are_there_and_in_the_network() {
    let lab = Lab::new().await;
    let nth = lab.number();
    let store = lab.store(nth).await;
    let own = id(nth);
    let take = || store.acquire(&own, Want::new(attrs(nth)));
    let said = waits(take().await);
    assert!(said.contains(&name(nth)) && said.contains("kubelet"), "{said}");
    assert!(waits(store.this_node().await).contains("kubelet"));
    let both = cidrs(nth);
    for (cidrs, says) in [
        (vec![], "no IPv4 entry"),
        (vec![both[0].clone()], "no IPv6 entry"),
        (vec![both[1].clone()], "no IPv4 entry"),
        (vec!["10.9.0.0/24".to_owned(), both[1].clone()], "10.9.0.0/24 is not inside Network 10.244.0.0/16"),
        (vec![both[0].clone(), "fd00:9::/64".to_owned()], "fd00:9::/64 is not inside IPv6Network"),
    ] {
        lab.server.create_node(&name(nth), &cidrs).await.unwrap();
        let said = waits(take().await);
        assert!(said.contains("spec.podCIDRs") && said.contains(says), "{cidrs:?}: {said}");
        assert_eq!(store.previous(&id(nth)).await.unwrap(), []);
        assert_eq!(lab.annotations(nth).await, json!({}), "nothing is published without a subnet");
        lab.delete(nth).await;
    }
    // The controller starts late, and writes to the Node that the kubelet registered.
    lab.server.create_node(&name(nth), &[]).await.unwrap();
    waits(take().await);
    let spec = json!({ "spec": { "podCIDR": both[0], "podCIDRs": both } });
    lab.server.patch(&path(nth), &spec).await.unwrap();
    let lease = take().await.unwrap();
    let subnets: Vec<_> = lease.subnets.iter().map(|(_, subnet)| subnet.to_string()).collect();
    assert_eq!(subnets, both);
}

/// docs/faults.md, K10, with the controller of Kubernetes itself.
#[tokio::test(flavor = "multi_thread")]
async fn the_pod_cidrs_that_kubernetes_assigns_are_the_lease() {
    let server = ApiServer::start(Version::Current).await.unwrap_or_else(|error| panic!("{error}"));
    let client = Access::kubeconfig(server.admin_kubeconfig().unwrap()).client().await.unwrap();
    let (store, own) = (KubeSubnets::new(client, options(1)), id(1));
    server.create_node(&name(1), &[]).await.unwrap();
    waits(store.acquire(&own, Want::new(attrs(1))).await);
    let controllers = server.assign_pod_cidrs("10.244.0.0/16,fd00:244::/48").unwrap();
    let begun = Instant::now();
    let lease = loop {
        match store.acquire(&own, Want::new(attrs(1))).await {
            Ok(lease) => break lease,
            Err(SubnetError::Unconfigured { .. }) if begun.elapsed().as_secs() < WITHIN => {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            Err(error) => panic!("{error}\n{}", controllers.last_words()),
        }
    };
    let lens: Vec<_> = lease.subnets.iter().map(|(_, subnet)| subnet.len()).collect();
    assert_eq!(lens, [24, 64]);
}

/// docs/faults.md, K13.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_is_rotated_on_disk_comes_into_use_by_itself() {
    let lab = Lab::new().await;
    let nth = lab.number();
    lab.node(nth).await;
    let rules = || json!([{ "apiGroups": [""], "resources": ["nodes", "nodes/status"], "verbs": ["get", "patch"] }]);
    let [old, new] = ["before", "after"].map(|when| format!("{when}-{nth}"));
    let token = lab.server.service_account(&old, rules()).await.unwrap();
    let kubeconfig = lab.server.kubeconfig(&old, &token, &lab.server.url()).unwrap();
    let client = Access::kubeconfig(kubeconfig).client().await.unwrap();
    let store = KubeSubnets::new(client, options(nth));
    let lease = store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap();
    let token = lab.server.service_account(&new, rules()).await.unwrap();
    std::fs::write(lab.server.token_file(&old), token).unwrap();
    lab.server.delete(&format!("/api/v1/namespaces/kube-system/serviceaccounts/{old}")).await.unwrap();
    // The server caches a token for ten seconds, the client for a minute.
    for wants_denial in [true, false] {
        let begun = Instant::now();
        loop {
            match store.renew(&lease).await {
                Ok(_) if !wants_denial => break,
                Err(SubnetError::Denied { .. }) if wants_denial => break,
                Ok(_) | Err(SubnetError::Denied { .. }) => {}
                Err(error) => panic!("{error:?}"),
            }
            assert!(begun.elapsed() < Duration::from_secs(70), "denied: {}", !wants_denial);
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
    }
}

/// docs/faults.md, K5.
#[tokio::test(flavor = "multi_thread")]
async fn a_lease_of_a_node_that_was_deleted_and_made_again_is_lost_and_had_again() {
    let lab = Lab::new().await;
    let (nth, store, lease) = lab.leased().await;
    lab.delete(nth).await;
    assert!(matches!(store.renew(&lease).await, Err(SubnetError::Lost(_))));
    lab.node(nth).await;
    match store.renew(&lease).await {
        Err(SubnetError::Lost(why)) => assert!(why.contains("created again"), "{why}"),
        other => panic!("{other:?}"),
    }
    assert_eq!(lab.annotations(nth).await, json!({}), "nothing is written to a Node that is another one");
    store.release(lease.clone()).await.unwrap();
    let again = store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap();
    assert_eq!(again.subnets, lease.subnets);
    assert_ne!(again.fence, lease.fence);
}

/// docs/faults.md, K8.
#[tokio::test(flavor = "multi_thread")]
async fn own_annotations_that_are_removed_or_edited_are_seen_and_written_again() {
    let lab = Lab::new().await;
    let (nth, store, lease) = lab.leased().await;
    let mut watcher = watch(&store).await;
    assert!(watcher.holds(&lease));
    for damage in [
        json!({ "kube-subnet-manager": null }),
        json!({ "kube-subnet-manager": "false" }),
        json!({ "public-ip": "203.0.113.9", "backend-type": "host-gw" }),
        json!({ "backend-data": "no JSON" }),
        json!({ "backend-v6-data": null, "public-ip": null }),
    ] {
        lab.annotate(nth, damage.clone()).await;
        watcher.until(WITHIN, &format!("{damage}"), |seen| !seen.holds(&lease)).await;
        store.renew(&lease).await.unwrap();
        watcher.until(WITHIN, &format!("written again after {damage}"), |seen| seen.holds(&lease)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_operator_overwrites_is_published_and_leaves_the_own_lease_as_it_is() {
    let lab = Lab::new().await;
    let nth = lab.number();
    lab.node(nth).await;
    let overwrite = json!({ "public-ip-overwrite": "203.0.113.7", "public-ipv6-overwrite": "2001:db8:7::1" });
    lab.annotate(nth, overwrite).await;
    let store = lab.store(nth).await;
    let lease = store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap();
    assert_eq!(lease.attrs, attrs(nth), "own devices keep the node's own addresses");
    let annotations = lab.annotations(nth).await;
    assert_eq!(
        (&annotations["public-ip"], &annotations["public-ipv6"]),
        (&json!("203.0.113.7"), &json!("2001:db8:7::1"))
    );
    let peer = lab.store(lab.number()).await;
    let mut overwritten = attrs(nth);
    overwritten.public_ip = Dual { v4: "203.0.113.7".parse().ok(), v6: "2001:db8:7::1".parse().ok() };
    let published = lease.clone().publishing(overwritten);
    let (mut own, theirs) = (watch(&store).await, watch(&peer).await);
    assert!(own.holds(&lease), "{:?}", own.seen.get(&key(nth)));
    assert!(theirs.holds(&published), "{:?}", theirs.seen.get(&key(nth)));
    // An edit of what was written is detected too.
    lab.annotate(nth, json!({ "public-ip": "203.0.113.8" })).await;
    own.until(WITHIN, "an edit", |seen| !seen.holds(&lease)).await;
    store.renew(&lease).await.unwrap();
    own.until(WITHIN, "the record is as written", |seen| seen.holds(&lease)).await;

    // A change is reported, and written with the next renewal.
    for overwrite in [json!("203.0.113.9"), json!(null)] {
        own.public = None;
        lab.annotate(nth, json!({ "public-ip-overwrite": overwrite })).await;
        own.until(WITHIN, "told of it", |seen| seen.public.is_some()).await;
        store.renew(&lease).await.unwrap();
        let written = lab.annotations(nth).await["public-ip"].clone();
        assert_eq!(written, if overwrite.is_null() { json!(attrs(nth).public_ip.v4) } else { overwrite });
    }

    lab.annotate(nth, json!({ "public-ip-overwrite": "203.0.113" })).await;
    let said = waits(store.renew(&lease).await);
    assert!(said.contains("public-ip-overwrite") && said.contains("203.0.113"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_addresses_that_an_operator_sets_are_the_nodes() {
    let lab = Lab::new().await;
    let nth = lab.number();
    lab.node(nth).await;
    let store = lab.store(nth).await;
    assert_eq!(store.this_node().await.unwrap().public, Dual::default());
    lab.annotate(nth, json!({ "node-public-ip": "203.0.113.5", "node-public-ipv6": "2001:db8:5::1" })).await;
    let public = Dual { v4: "203.0.113.5".parse().ok(), v6: "2001:db8:5::1".parse().ok() };
    assert_eq!(store.this_node().await.unwrap().public, public);
    // They take precedence over the program's addresses.
    let client = lab.client().await;
    let given = Dual { v4: "203.0.113.6".parse().ok(), v6: "2001:db8:6::1".parse().ok() };
    let other = KubeSubnets::new(client, options(nth).with_public(given));
    assert_eq!(other.this_node().await.unwrap().public, public);
    lab.annotate(nth, json!({ "node-public-ip": null })).await;
    assert_eq!(other.this_node().await.unwrap().public, Dual { v4: given.v4, v6: public.v6 });
    lab.annotate(nth, json!({ "node-public-ip": "2001:db8::1" })).await;
    let said = waits(store.this_node().await);
    assert!(said.contains("flannel.alpha.coreos.com/node-public-ip") && said.contains("IPv4"), "{said}");
    // A running agent gets the error too, and the watch continues.
    let mut watcher = watch(&store).await;
    watcher.until(WITHIN, "the error", |seen| !seen.errors.is_empty()).await;
    assert!(watcher.errors[0].contains("node-public-ip") && watcher.public.is_none(), "{:?}", watcher.errors);
    lab.annotate(nth, json!({ "node-public-ip": "203.0.113.9" })).await;
    let public = Dual { v4: "203.0.113.9".parse().ok(), v6: public.v6 };
    watcher.until(WITHIN, "the address", |seen| seen.public == Some(public)).await;
    assert_eq!((watcher.resets, watcher.errors.len()), (1, 1));
}

/// docs/faults.md, K14: the caller has to retry failures.
#[tokio::test(flavor = "multi_thread")]
async fn the_condition_of_the_network_is_written_as_go_flannel_does_and_may_be_tried_again() {
    let lab = Lab::new().await;
    let (nth, store, _) = lab.leased().await;
    lab.proxy.expect("PATCH", Fault::status(500, "etcdserver: request timed out"), 1);
    let error = store.set_network_unavailable(false).await.unwrap_err();
    assert!(matches!(error, SubnetError::Unavailable { .. }), "{error:?}");
    store.set_network_unavailable(false).await.unwrap();
    let node = lab.server.get(&path(nth)).await.unwrap();
    let found = node["status"]["conditions"].as_array().unwrap().iter();
    let condition = found.clone().find(|condition| condition["type"] == "NetworkUnavailable").unwrap();
    let texts = ["status", "reason", "message"].map(|field| condition[field].as_str().unwrap_or_default());
    assert_eq!(texts, ["False", "FlannelIsUp", "Flannel is running on this node"]);
    assert!(condition["lastTransitionTime"].as_str().unwrap().ends_with('Z'));
}

/// docs/faults.md, K12.
#[tokio::test(flavor = "multi_thread")]
async fn the_conditions_of_others_stay_as_they_are_and_ours_survives_theirs() {
    let lab = Lab::new().await;
    let (nth, store, _) = lab.leased().await;
    let pressure = json!({ "type": "MemoryPressure", "status": "False", "reason": "KubeletHasSufficientMemory" });
    lab.server.set_condition(&name(nth), &pressure).await.unwrap();
    lab.heartbeat(nth, 1).await;
    let conditions = async || {
        let node = lab.server.get(&path(nth)).await.unwrap();
        let all = node["status"]["conditions"].as_array().unwrap().clone();
        let named = |condition: &Value| (condition["type"].as_str().unwrap().to_owned(), condition.clone());
        all.iter().map(named).collect::<BTreeMap<_, _>>()
    };
    let before = conditions().await;
    let mut shown = before.clone();
    for unavailable in [true, false] {
        store.set_network_unavailable(unavailable).await.unwrap();
        let mut after = conditions().await;
        let ours = after.remove("NetworkUnavailable").unwrap();
        assert_eq!(ours["status"], if unavailable { "True" } else { "False" });
        assert_eq!(after, before);
        shown.insert("NetworkUnavailable".to_owned(), ours);
    }
    lab.heartbeat(nth, 2).await;
    let after = conditions().await;
    assert_ne!(after["Ready"], shown["Ready"]);
    shown.insert("Ready".to_owned(), after["Ready"].clone());
    assert_eq!(after, shown);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_is_shown_with_the_node_and_a_long_message_is_cut() {
    let lab = Lab::new().await;
    let (nth, store, _) = lab.leased().await;
    let long = "é".repeat(1000);
    store.record_event(EventKind::Warning, "FlannelWaits", &long).await.unwrap();
    store.record_event(EventKind::Normal, "FlannelReady", "ready").await.unwrap();
    // As `kubectl describe node` asks.
    let selector = format!("involvedObject.kind=Node,involvedObject.name={0},involvedObject.uid={0}", name(nth));
    let events = lab.server.get(&format!("/api/v1/namespaces/default/events?fieldSelector={selector}")).await.unwrap();
    let mut found: Vec<_> = events["items"].as_array().unwrap().iter().collect();
    found.sort_by_key(|event| event["type"].to_string());
    let texts = |event: &Value| ["type", "reason"].map(|field| event[field].as_str().unwrap_or_default().to_owned());
    assert_eq!(
        found.iter().map(|event| texts(event)).collect::<Vec<_>>(),
        [["Normal", "FlannelReady"], ["Warning", "FlannelWaits"]]
    );
    assert_eq!(found[0]["message"], "ready");
    let message = found[1]["message"].as_str().unwrap();
    assert!(message.starts_with("éé") && message.len() < 1100, "{message}");
    assert!(found.iter().all(|event| event["lastTimestamp"].as_str().unwrap().ends_with('Z')), "{found:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_tells_which_node_this_is_as_soon_as_it_has_one() {
    let lab = Lab::new().await;
    let nth = lab.number();
    lab.node(nth).await;
    let pod = format!("agent-{nth}");
    lab.server.service_account(&pod, json!([])).await.unwrap();
    let mut options = options(nth);
    options.node = NodeName::OfPod { namespace: "kube-system".to_owned(), pod: pod.clone() };
    let store = KubeSubnets::new(lab.client().await, options.clone());
    assert!(waits(store.this_node().await).contains("there is no such Pod"));
    lab.server.create_pod(&pod, &pod, None).await.unwrap();
    assert!(waits(store.this_node().await).contains("it has no spec.nodeName yet"));
    lab.server.bind_pod(&pod, &name(nth)).await.unwrap();
    assert_eq!(store.this_node().await.unwrap().name, Some(id(nth)));
    // The name is read once; after that everything is as with a given name.
    let asked = lab.proxy.seen("/pods/").len();
    let lease = store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap();
    assert!(watch(&store).await.holds(&lease));
    store.set_network_unavailable(false).await.unwrap();
    assert_eq!(lab.proxy.seen("/pods/").len(), asked);
    let other = KubeSubnets::new(lab.client().await, options);
    assert_eq!(other.this_node().await.unwrap().name, Some(id(nth)));
}

#[tokio::test(flavor = "multi_thread")]
async fn annotations_under_another_prefix_are_another_network() {
    let lab = Lab::new().await;
    let nth = lab.number();
    lab.node(nth).await;
    let prefix = AnnotationPrefix::new("net.example.com/blue").unwrap();
    let blue = async |nth| KubeSubnets::new(lab.client().await, options(nth).with_prefix(prefix.clone()));
    let store = blue(nth).await;
    let lease = store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap();
    assert_eq!(lab.annotations(nth).await, json!({}));
    let node = lab.server.get(&path(nth)).await.unwrap();
    let names: Vec<_> = node["metadata"]["annotations"].as_object().unwrap().keys().cloned().collect();
    let keys = ["backend-data", "backend-type", "backend-v6-data", "kube-subnet-manager", "public-ip", "public-ipv6"];
    assert_eq!(names, keys.map(|key| format!("net.example.com/blue-{key}")));
    let peer = lab.number();
    assert!(watch(&blue(peer).await).await.holds(&lease));
    let mut plain = watch(&lab.store(peer).await).await;
    assert!(!plain.seen.contains_key(&key(nth)));
    // A Node may be of both.
    let other = lab.store(nth).await;
    let both = other.acquire(&id(nth), Want::new(attrs(peer))).await.unwrap();
    plain.until(WITHIN, "the other", |seen| seen.holds(&both)).await;
    store.release(lease.clone()).await.unwrap();
    assert!(watch(&other).await.holds(&both) && !watch(&store).await.holds(&lease));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_in_clear_text_behind_https_is_named_with_the_remedy() {
    let lab = Lab::new().await;
    let url = lab.proxy.url().replace("http://", "https://");
    let client = Access::in_cluster().at(&url).client().await.unwrap();
    let store = KubeSubnets::new(client, options(lab.number()).with_server(url.clone()));
    let error = store.this_node().await.unwrap_err();
    assert!(matches!(error, SubnetError::Unavailable { .. }), "{error:?}");
    let said = flannel_core::text::chain(&error);
    assert!(said.contains(&url) && said.contains("the server serves no TLS"), "{said}");
}

/// The answer to a patch for a Node that was replaced by another: docs/compatibility.md, "Writing".
#[tokio::test(flavor = "multi_thread")]
async fn a_patch_for_another_uid_is_refused_as_the_server_words_it() {
    let lab = Lab::new().await;
    let (nth, _, _) = lab.leased().await;
    let patch = json!({ "metadata": { "uid": "another", "annotations": { "example.com/a": "b" } } });
    let error = lab.server.patch(&format!("{}/status", path(nth)), &patch).await.unwrap_err().to_string();
    assert!(error.contains("code: 422") && error.contains("metadata.uid: "), "{error}");
}

/// The answer to a write is lost: the next try finds it done.
#[tokio::test(flavor = "multi_thread")]
async fn a_write_whose_answer_is_lost_is_ours() {
    let lab = Lab::new().await;
    let nth = lab.number();
    lab.node(nth).await;
    let store = lab.store(nth).await;
    lab.proxy.expect("PATCH", Fault::Lose, 1);
    let lost = store.acquire(&id(nth), Want::new(attrs(nth))).await;
    assert!(matches!(lost, Err(SubnetError::Unavailable { .. })), "{lost:?}");
    let lease = store.acquire(&id(nth), Want::new(attrs(nth))).await.unwrap();
    assert_eq!(lab.proxy.seen("PATCH").len(), 1);
    store.renew(&lease).await.unwrap();
}
