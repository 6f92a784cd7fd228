//! The store's operations, with answers that a real server cannot be made to give.

use std::io;

use bytes::Bytes;
use flannel_core::config::Allocation;
use flannel_core::lease::LeaseAttrs;
use flannel_core::subnet::SubnetManager;
use futures_util::{FutureExt, StreamExt, stream};
use http::header::{CONTENT_TYPE, RETRY_AFTER};
use http::{Method, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use kube::client::Body;
use tokio::time::{Instant, sleep, sleep_until};

use super::*;
use crate::api::{Extent, failure};
use crate::error::Kind;
use crate::nodes::locked;
use crate::nodes::tests::Model;
use crate::protobuf::testing::{event, list, member, number, object};
use crate::scripted::{Answer, full, sent, status};

/// Returns a client whose requests are answered by this function.
fn client<F>(mut answer: impl FnMut(Request<Body>) -> F + Send + 'static) -> kube::Client
where
    F: Future<Output = Answer> + Send + 'static,
{
    let serve = move |request: Request<Body>| answer(request).map(Ok::<_, io::Error>);
    kube::Client::new(tower::service_fn(serve), "default")
}

fn options() -> Options {
    let network = br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;
    let config = ConfigSource::Fixed(NetworkConfig::parse(network, Allocation::External).unwrap());
    Options::new(NodeName::Named(NodeIdentity::new("node-0").unwrap()), config)
}

#[test]
fn files_are_not_read_on_the_callers_task() {
    let options = Options { config: ConfigSource::File("/nowhere/net-conf.json".into()), ..options() };
    let access = Access::kubeconfig("/nowhere/kubeconfig");
    // With its only other thread occupied, a runtime reads no file.
    let runtime = tokio::runtime::Builder::new_current_thread().max_blocking_threads(1).build().unwrap();
    let (release, held) = std::sync::mpsc::channel::<()>();
    runtime.block_on(async {
        let store = KubeSubnets::new(client(|_| std::future::pending()), options);
        tokio::task::spawn_blocking(move || held.recv());
        assert!(store.network_config().now_or_never().is_none());
        assert!(access.connect().now_or_never().is_none());
        drop(release);
        let error = store.network_config().await.unwrap_err().to_string();
        assert!(error.contains("/nowhere/net-conf.json"), "{error}");
        let error = access.connect().await.map(drop).unwrap_err().to_string();
        assert!(error.contains("/nowhere/kubeconfig"), "{error}");
    });
}

#[tokio::test(start_paused = true)]
async fn events_before_a_broken_one_are_reported_before_the_error() {
    let answer = |request: Request<Body>| {
        let is_watch = request.uri().query().unwrap_or_default().contains("watch=true");
        let bytes = match is_watch {
            true => [event("ADDED", &Model::plain().message(1, 2)), event("UNKNOWN", b"")].concat(),
            false => list("1", &[]),
        };
        std::future::ready(sent(full(bytes)))
    };
    let mut watch = KubeSubnets::new(client(answer), options()).watch();
    let mut next = async || watch.next().await.unwrap();
    assert!(matches!(next().await, Ok(LeaseEvent::Reset(records)) if records.is_empty()));
    assert!(matches!(next().await, Ok(LeaseEvent::Upsert(_))));
    assert!(next().await.is_err());
}

#[tokio::test]
async fn only_a_replaced_node_ends_a_lease() {
    const REPLACED: (u16, &str) = (422, "metadata.uid: Invalid value: field is immutable");
    let node = || sent(full(object(&Model::plain().message(0, 1))));
    let refusal = Arc::new(Mutex::new(None));
    let refused = Arc::clone(&refusal);
    let answer = move |request: Request<Body>| {
        let refusal = locked(&refused).filter(|_| request.method() == Method::PATCH);
        std::future::ready(refusal.map_or_else(node, |(code, message)| status(code, message)))
    };
    let store = KubeSubnets::new(client(answer), options());
    let lease = store.acquire(&NodeIdentity::new("node-0").unwrap(), want()).await.unwrap();
    *locked(&refusal) = Some((409, "the object has been modified"));
    assert!(matches!(store.renew(&lease).await, Err(SubnetError::Unavailable { .. })));
    assert!(matches!(store.release(lease.clone()).await, Err(SubnetError::Unavailable { .. })));
    *locked(&refusal) = Some(REPLACED);
    assert!(matches!(store.renew(&lease).await, Err(SubnetError::Lost(_))));
    store.release(lease).await.unwrap();
}

/// Returns what a node wants to publish.
fn want() -> Want {
    Want::new(LeaseAttrs::new(Dual { v4: Some([192, 0, 2, 9].into()), v6: None }))
}

/// A page of a proxy says nothing about a Node.
#[tokio::test]
async fn a_node_is_missing_only_if_the_api_server_itself_says_so() {
    const STATUS: &str =
        r#"{"kind":"Status","apiVersion":"v1","status":"Failure","message":"gone","reason":"NotFound","code":404}"#;
    let page = Arc::new(Mutex::new(None::<Vec<u8>>));
    let shown = Arc::clone(&page);
    let answer = move |_| {
        let page = locked(&shown).clone();
        std::future::ready(match page {
            Some(page) => Response::builder().status(404).body(full(page)).unwrap(),
            None => sent(full(object(&Model::plain().message(0, 1)))),
        })
    };
    let store = KubeSubnets::new(client(answer), options());
    let lease = store.acquire(&NodeIdentity::new("node-0").unwrap(), want()).await.unwrap();
    let not_found = [member(3, "not found"), member(4, "NotFound"), number(6, 404)].concat();
    for status in [object(&not_found), STATUS.into()] {
        *locked(&page) = Some(status);
        assert!(matches!(store.renew(&lease).await, Err(SubnetError::Lost(_))));
        store.release(lease.clone()).await.unwrap();
    }
    for other in [
        Vec::new(),
        b"404 page not found".to_vec(),
        b"<html>\nNot Found".to_vec(),
        br#"{"kind":"Answer","message":"not found","reason":"NotFound"}"#.to_vec(),
        STATUS.replace("NotFound", "Unknown").into(),
        object(&member(3, "not found")),
    ] {
        *locked(&page) = Some(other);
        let error = store.renew(&lease).await.unwrap_err();
        let said = flannel_core::text::chain(&error);
        assert!(matches!(error, SubnetError::Unavailable { .. }), "{said}");
        assert!(said.contains("404") && said.contains("check the URL of the API server"), "{said}");
        assert!(matches!(store.release(lease.clone()).await, Err(SubnetError::Unavailable { .. })), "{said}");
    }
    assert_eq!(failure(&not_found).unwrap().kind, Kind::Missing);
    assert_eq!(failure(&number(6, 404)).unwrap().kind, Kind::Refused);
}

#[tokio::test]
async fn a_renewal_compares_the_pod_cidrs_and_does_not_read_the_configuration() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("net-conf.json");
    std::fs::write(&file, r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#).unwrap();
    let node = Arc::new(Mutex::new(Model::plain()));
    let shown = Arc::clone(&node);
    let answer = move |_| std::future::ready(sent(full(object(&locked(&shown).message(0, 1)))));
    let options = Options { config: ConfigSource::File(file.clone()), ..options() };
    let store = KubeSubnets::new(client(answer), options);
    let lease = store.acquire(&NodeIdentity::new("node-0").unwrap(), want()).await.unwrap();
    for text in [r#"{"Network":"10.99.0.0/16","Backend":{"Type":"vxlan"}}"#, "{"] {
        std::fs::write(&file, text).unwrap();
        assert_eq!(store.renew(&lease).await.unwrap(), lease, "{text}");
    }
    std::fs::remove_file(&file).unwrap();
    assert_eq!(store.renew(&lease).await.unwrap(), lease);
    let mut dual = lease.clone();
    dual.subnets.v6 = "fd00:244::/64".parse().ok();
    for (other, cidr) in [(dual, 0), (lease, 1)] {
        locked(&node).cidr = cidr;
        match store.renew(&other).await {
            Err(SubnetError::Lost(why)) => assert!(why.contains("other podCIDRs"), "{why}"),
            renewed => panic!("{renewed:?}"),
        }
    }
}

#[tokio::test]
async fn an_error_about_the_configuration_means_that_the_api_server_answers() {
    let errors = async |client: kube::Client| {
        let options = Options { config: ConfigSource::File("/nowhere/net-conf.json".into()), ..options() };
        let (store, node) = (KubeSubnets::new(client, options), NodeIdentity::new("node-0").unwrap());
        [store.acquire(&node, want()).await.unwrap_err(), store.previous(&node).await.unwrap_err()]
    };
    for error in errors(client(|_| std::future::ready(status(500, "etcdserver: request timed out")))).await {
        assert!(!error.is_answer(), "{error}");
    }
    let node = || sent(full(object(&Model::plain().message(0, 1))));
    for error in errors(client(move |_| std::future::ready(node()))).await {
        assert!(error.is_answer() && error.to_string().contains("/nowhere/net-conf.json"), "{error}");
    }
}

/// The server counts from the request on, and its answer may start later.
#[tokio::test(start_paused = true)]
async fn a_watch_that_lasted_as_long_as_asked_is_reopened_without_a_check() {
    let mut watches = 0;
    let answer = move |request: Request<Body>| {
        let query = request.uri().query().unwrap_or_default().to_owned();
        let asked = query.split('&').find_map(|pair| pair.strip_prefix("timeoutSeconds=")?.parse::<u64>().ok());
        watches += u32::from(asked.is_some());
        let (is_first, begun) = (watches == 1, Instant::now());
        async move {
            match asked {
                None if query.contains("Exact") => status(500, "there is nothing to check"),
                None => sent(full(list("1", &[Model::plain().message(1, 1)]))),
                Some(seconds) if is_first => {
                    sleep(Duration::from_secs(1)).await;
                    let end = stream::once(async move {
                        sleep_until(begun + Duration::from_secs(seconds)).await;
                        Ok(Frame::data(Bytes::new()))
                    });
                    sent(StreamBody::new(end).boxed_unsync())
                }
                Some(_) => sent(full(event("ADDED", &Model::plain().message(2, 3)))),
            }
        }
    };
    let options = options().with_timeouts(Timeouts::default().with_silence(Duration::from_secs(3600)));
    let mut watch = KubeSubnets::new(client(answer), options).watch();
    let mut next = async || watch.next().await.unwrap();
    assert!(matches!(next().await, Ok(LeaseEvent::Reset(records)) if records.len() == 1));
    let reopened = next().await;
    assert!(matches!(reopened, Ok(LeaseEvent::Upsert(_))), "{reopened:?}");
}

#[tokio::test(start_paused = true)]
async fn the_longest_of_several_requested_waits_counts() {
    let answer = |request: Request<Body>| async move {
        let busy = |seconds| Response::builder().status(429).header(RETRY_AFTER, seconds).body(full("")).unwrap();
        match request.uri().path() {
            "/api/v1/nodes/a" => busy(30),
            "/api/v1/nodes/b" => {
                sleep(Duration::from_secs(1)).await;
                busy(1)
            }
            _ => sent(full(object(b""))),
        }
    };
    let api = Api::new(client(answer), Timeouts::default(), String::new());
    let begun = Instant::now();
    let (first, second) = tokio::join!(api.node("a"), api.node("b"));
    assert!(first.is_err() && second.is_err());
    api.node("c").await.unwrap();
    assert!(begun.elapsed() >= Duration::from_secs(30), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn an_answer_has_one_deadline_and_its_errors_name_the_server() {
    const STEP: Duration = Duration::from_secs(6);
    let slow = stream::once(async {
        sleep(STEP).await;
        Ok(Frame::data(object(b"").into()))
    });
    let cut = stream::once(std::future::ready(Err(io::ErrorKind::ConnectionReset.into())));
    let html = Response::builder().header(CONTENT_TYPE, "text/html").body(full("")).unwrap();
    for (answer, delay, problem) in [
        (sent(StreamBody::new(slow).boxed_unsync()), STEP, "no answer within 10s"),
        (sent(StreamBody::new(cut).boxed_unsync()), Duration::ZERO, "connection reset"),
        (html, Duration::ZERO, "an answer in text/html"),
    ] {
        let mut answer = Some(answer);
        let answer = move |_| {
            let answer = answer.take();
            async move {
                sleep(delay).await;
                answer.unwrap()
            }
        };
        let api = Api::new(client(answer), Timeouts::default(), "https://192.0.2.1".to_owned());
        let error = api.node("a").await.unwrap_err().error.to_string();
        assert!(error.contains("https://192.0.2.1: ") && error.contains(problem), "{error}");
    }
}

/// A busy server queues a list of all Nodes before it refuses it.
#[tokio::test(start_paused = true)]
async fn only_a_list_of_all_nodes_may_begin_late() {
    let busy = || status(429, "too many requests, please try again later");
    for (extent, delay, answer, problem) in [
        (Extent::All, 29, None, None),
        (Extent::All, 31, None, Some("no answer within 30s")),
        (Extent::All, 15, Some(busy()), Some("too many requests")),
        (Extent::One, 9, None, None),
        (Extent::One, 11, None, Some("no answer within 10s")),
    ] {
        let mut answer = Some(answer.unwrap_or_else(|| sent(full(list("1", &[])))));
        let answer = move |_| {
            let answer = answer.take();
            async move {
                sleep(Duration::from_secs(delay)).await;
                answer.unwrap()
            }
        };
        let api = Api::new(client(answer), Timeouts::default(), String::new());
        let said = api.list_nodes(extent, "").await.err().map(|fault| fault.error.problem);
        match problem {
            Some(part) => assert!(said.as_ref().is_some_and(|said| said.contains(part)), "{said:?}"),
            None => assert_eq!(said, None),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_list_of_all_nodes_that_has_begun_may_pause_no_longer_than_other_answers() {
    let begun = stream::iter([Ok(Frame::data(Bytes::from_static(b"k8s")))]).chain(stream::pending());
    let mut answer = Some(sent(StreamBody::new(begun).boxed_unsync()));
    let answer = move |_| {
        let answer = answer.take();
        async move {
            sleep(Duration::from_secs(20)).await;
            answer.unwrap()
        }
    };
    let api = Api::new(client(answer), Timeouts::default(), String::new());
    let mut arriving = api.list_nodes(Extent::All, "").await.unwrap();
    assert!(arriving.next_in_time().await.unwrap().is_some());
    let since = Instant::now();
    let fault = arriving.next_in_time().await.unwrap_err();
    assert!(fault.error.problem.contains("no answer within 10s"), "{}", fault.error.problem);
    assert_eq!(since.elapsed().as_secs(), 10);
}
