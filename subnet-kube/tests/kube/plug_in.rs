//! Client certificates from a credential plug-in, which are a part of the connection to the server.

use std::fs;
use std::path::Path;
use std::time::Duration;

use flannel_core::subnet::SubnetManager;
use flannel_subnet_kube::{Access, KubeSubnets};
use jiff::Timestamp;
use serde_json::{Value, json};
use tokio::time::Instant;

use crate::common::{Lab, WITHIN, options};

/// The plug-in prints this file of the directory.
const PRINTED: &str = "printed";

/// The plug-in prints credentials with this status from now on.
fn print(dir: &Path, status: &Value) {
    let printed = json!({ "kind": "ExecCredential", "status": status }).to_string();
    fs::write(dir.join("next"), printed).unwrap();
    fs::rename(dir.join("next"), dir.join(PRINTED)).unwrap();
}

/// Returns the certificate of the user with this name.
fn certificate(dir: &Path, name: &str) -> Value {
    let read = |kind: &str| fs::read_to_string(dir.join(format!("{name}.{kind}"))).unwrap();
    json!({ "clientCertificateData": read("pem"), "clientKeyData": read("key") })
}

/// Asks for the own Node until the server refuses it in these words.
async fn until_refused(store: &KubeSubnets, words: &str) {
    let end = Instant::now() + Duration::from_secs(WITHIN);
    loop {
        let said = flannel_core::text::chain(&store.this_node().await.unwrap_err());
        if said.contains(words) {
            return;
        }
        assert!(Instant::now() < end, "{said}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_takes_the_place_of_a_refused_token_and_of_one_that_expires() {
    let lab = Lab::new().await;
    let dir = tempfile::tempdir().unwrap();
    for name in ["first", "second"] {
        lab.server.write_credentials(dir.path(), name, name, "users-of-a-plug-in").unwrap();
    }
    let exec = json!({
        "apiVersion": "client.authentication.k8s.io/v1",
        "command": "cat",
        "args": [dir.path().join(PRINTED)],
        "interactiveMode": "Never",
    });
    let cluster = json!({ "server": lab.server.url(), "certificate-authority": lab.server.authority_file() });
    let config = json!({
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "x",
        "clusters": [{ "name": "c", "cluster": cluster }],
        "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
        "users": [{ "name": "u", "user": { "exec": exec } }],
    });
    let kubeconfig = dir.path().join("kubeconfig");
    fs::write(&kubeconfig, config.to_string()).unwrap();
    let client = Access::kubeconfig(kubeconfig).client().await.unwrap();
    let store = KubeSubnets::new(client, options(lab.number()));
    print(dir.path(), &json!({ "token": "none-of-these" }));
    until_refused(&store, "401").await;
    let mut first = certificate(dir.path(), "first");
    // It is renewed a minute before.
    first["expirationTimestamp"] = json!((Timestamp::now() + Duration::from_secs(65)).to_string());
    print(dir.path(), &first);
    until_refused(&store, "User \"first\" cannot get").await;
    print(dir.path(), &certificate(dir.path(), "second"));
    until_refused(&store, "User \"second\" cannot get").await;
}
