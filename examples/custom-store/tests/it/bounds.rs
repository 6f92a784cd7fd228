//! Requests that the hub refuses.

use std::error::Error;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use custom_store::Hub;
use flannelkit::spi::subnet::{NodeIdentity, SubnetManager};
use futures_util::StreamExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio::time::{sleep, timeout};

use crate::fleet::Fleet;

const NETWORK: &str = r#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

#[tokio::test]
async fn invalid_and_oversized_requests_are_refused_and_the_hub_keeps_serving() {
    let fleet = Fleet::new().await;
    let long = "x".repeat(64 * 1024 + 1);
    let large =
        format!(r#"{{"revision":0,"ttl_ms":1,"claim":{{"subnet":"10.5.1.0/24","attrs":"{}"}}}}"#, &long[..8192]);
    let refused = async |method: &str, path: &str, body: &str| {
        let answer = fleet.curl(method, path, body.to_owned()).await.expect_err("a refusal");
        answer.split(' ').nth(1).unwrap().to_owned()
    };
    for (method, path, body, status) in [
        ("GET", "/", "", "404"),
        ("GET", "/v1/config", "", "404"),
        ("GET", "/v1/watch", "", "404"),
        ("GET", "/v1/leases/a", "", "404"),
        ("DELETE", "/v1/leases/a", "", "404"),
        ("DELETE", "/v1/leases/a?revision=x", "", "400"),
        ("POST", "/v1/config", "", "405"),
        ("PUT", "/v1/config", r#"{"Network":"10.5.0.0/33"}"#, "400"),
        ("PUT", "/v1/config", &long, "413"),
        ("PUT", "/v1/leases/a", &long, "413"),
        ("PUT", "/v1/leases/a", "", "400"),
        ("PUT", "/v1/leases/a", "[[[[", "400"),
        ("PUT", "/v1/leases/a", &large, "400"),
        ("PUT", "/v1/leases/%2e%2e%2fa", &large, "400"),
    ] {
        assert_eq!(refused(method, path, body).await, status, "{method} {path} {:.60}", body);
    }
    fleet.curl("PUT", "/v1/config", NETWORK.to_owned()).await.unwrap();
    assert_eq!(fleet.curl("GET", "/v1/config", String::new()).await.unwrap(), NETWORK);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_with_an_incomplete_request_is_disconnected() {
    let fleet = Fleet::new().await;
    let addr = fleet.addr;
    let ended = tokio::task::spawn_blocking(move || {
        let mut stream = TcpStream::connect(addr).unwrap();
        // The hub waits five seconds for the head.
        stream.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        stream.write_all(b"GET /v1/config HTTP/1.1\r\nHost: ").unwrap();
        stream.read_to_end(&mut Vec::new())
    });
    ended.await.unwrap().expect("the hub closes the connection");
}

#[tokio::test]
async fn a_watch_whose_list_never_ends_fails() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let hub = Hub::new(listener.local_addr().unwrap(), NodeIdentity::new("a").unwrap());
    let beats = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        stream.read_u8().await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\n\r\n").await.unwrap();
        while stream.write_all(b"\"beat\"\n").await.is_ok() {
            sleep(Duration::from_secs(1)).await;
        }
        std::future::pending().await
    };
    let mut watch = hub.watch();
    let first = tokio::select! {
        first = timeout(Duration::from_secs(20), watch.next()) => first.expect("the list has a time limit"),
        () = beats => None,
    };
    let error = first.unwrap().unwrap_err();
    assert_eq!(error.source().unwrap().to_string(), "the hub did not answer within 10s");
}
