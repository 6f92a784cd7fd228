//! Certificates: authorities, client certificates, and files that change.

use std::path::{Path, PathBuf};

use flannel_core::subnet::{SubnetError, SubnetManager};
use flannel_subnet_etcd::{ClientCertificate, Config, EtcdSubnets, Tls};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd,
};
use tempfile::TempDir;
use testkit::etcd::{Etcd, Options, ServerTls, Version};

use crate::common::{self, chain, node, watching};

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        Self(CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap())
    }

    fn write(&self, path: &Path) -> PathBuf {
        std::fs::write(path, self.0.pem()).unwrap();
        path.to_owned()
    }

    /// Issues a certificate for `name` with its key, and overwrites existing files.
    fn issue(&self, dir: &Path, file: &str, name: &str, year: i32) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.0).unwrap();
        let (cert_path, key_path) = (dir.join(format!("{file}.crt")), dir.join(format!("{file}.key")));
        std::fs::write(&cert_path, certificate.pem()).unwrap();
        std::fs::write(&key_path, key.serialize_pem()).unwrap();
        (cert_path, key_path)
    }
}

fn start(dir: &Path, authority: &Authority, name: &str, year: i32, client_ca: Option<PathBuf>) -> Etcd {
    let (certificate, key) = authority.issue(dir, "server", name, year);
    let tls = Some(ServerTls { certificate, key, client_ca });
    Etcd::start(Options { tls, ..Options::single(Version::Debian) }).unwrap_or_else(|error| panic!("{error}"))
}

fn open(etcd: &Etcd, tls: Tls) -> EtcdSubnets {
    EtcdSubnets::new(Config::new(etcd.endpoints()).with_tls(tls)).unwrap()
}

async fn refusal(store: &EtcdSubnets) -> String {
    let error = store.network_config().await.unwrap_err();
    assert!(matches!(error, SubnetError::Unavailable { .. } | SubnetError::Denied { .. }), "{error:?}");
    chain(&error)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_authority_alone_is_enough_and_no_other_will_do() {
    let dir = TempDir::new().unwrap();
    let authority = Authority::new();
    let ca = authority.write(&dir.path().join("ca.crt"));
    let etcd = start(dir.path(), &authority, "127.0.0.1", 2100, None);
    let store = open(&etcd, Tls::of_authority(ca));
    store.put_config_json(common::CONFIG).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    node(1).acquire(&store).await;

    let other = Authority::new().write(&dir.path().join("other.crt"));
    let said = refusal(&open(&etcd, Tls::of_authority(other))).await;
    assert!(said.contains(&etcd.endpoint(0)) && said.contains("as CA file"), "{said}");
    let said = refusal(&open(&etcd, Tls::default())).await;
    assert!(said.contains("as CA file"), "the system's roots: {said}");
    let missing = dir.path().join("missing.crt");
    let said = refusal(&open(&etcd, Tls::of_authority(&missing))).await;
    assert!(said.contains(&missing.display().to_string()), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_for_another_name_or_time_is_refused() {
    let dir = TempDir::new().unwrap();
    let authority = Authority::new();
    let ca = authority.write(&dir.path().join("ca.crt"));
    let etcd = start(dir.path(), &authority, "etcd.example", 2100, None);
    let said = refusal(&open(&etcd, Tls::of_authority(&ca))).await;
    assert!(said.contains("etcd.example") && said.contains("subjectAltName"), "{said}");
    let mut named = Tls::of_authority(&ca);
    named.server_name = Some("etcd.example".to_owned());
    open(&etcd, named).put_config_json(common::CONFIG).await.unwrap();
    drop(etcd);
    let etcd = start(dir.path(), &authority, "127.0.0.1", 2001, None);
    let said = refusal(&open(&etcd, Tls::of_authority(ca))).await;
    assert!(said.contains("expired"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_with_the_wrong_scheme_is_recognised() {
    let dir = TempDir::new().unwrap();
    let authority = Authority::new();
    let ca = authority.write(&dir.path().join("ca.crt"));
    for version in Version::ALL {
        let (certificate, key) = authority.issue(dir.path(), "server", "127.0.0.1", 2100);
        let tls = Some(ServerTls { certificate, key, client_ca: None });
        let serves_tls = Etcd::start(Options { tls, ..Options::single(version) }).unwrap();
        let plain = serves_tls.endpoint(0).replace("https", "http");
        let said = refusal(&EtcdSubnets::new(Config::new([plain])).unwrap()).await;
        assert!(said.contains("serves TLS: write https://"), "{version:?}: {said}");
        let serves_none = Etcd::start(Options::single(version)).unwrap();
        let secure = serves_none.endpoint(0).replace("http", "https");
        let config = Config::new([secure]).with_tls(Tls::of_authority(&ca));
        let said = refusal(&EtcdSubnets::new(config).unwrap()).await;
        assert!(said.contains("serves no TLS: write http://"), "{version:?}: {said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_show_their_certificate_where_it_is_asked_for() {
    let dir = TempDir::new().unwrap();
    let authority = Authority::new();
    let ca = authority.write(&dir.path().join("ca.crt"));
    // A member's own health check uses the member's certificate, which is valid for both ends.
    let etcd = start(dir.path(), &authority, "127.0.0.1", 2100, Some(ca.clone()));
    let (certificate, key) = authority.issue(dir.path(), "client", "flannel", 2100);
    let mut tls = Tls::of_authority(&ca);
    tls.client = Some(ClientCertificate { certificate, key });
    let store = open(&etcd, tls);
    store.put_config_json(common::CONFIG).await.unwrap_or_else(|error| panic!("{}", chain(&error)));
    let said = refusal(&open(&etcd, Tls::of_authority(ca))).await;
    assert!(said.contains("client certificate"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn rotated_files_come_into_use_by_themselves() {
    let dir = TempDir::new().unwrap();
    let ca = dir.path().join("ca.crt");
    let first = Authority::new();
    first.write(&ca);
    let mut etcd = start(dir.path(), &first, "127.0.0.1", 2100, None);
    let store = open(&etcd, Tls::of_authority(&ca));
    store.put_config_json(common::CONFIG).await.unwrap();
    let mut watcher = watching(&store, &store).await;
    etcd.kill(0);
    let second = Authority::new();
    second.issue(dir.path(), "server", "127.0.0.1", 2100);
    second.write(&ca);
    etcd.restart(0).unwrap();
    let lease = loop {
        if let Ok(lease) = store.acquire(&node(2).id, node(2).want()).await {
            break lease;
        }
    };
    watcher.until(30, "a lease under the new authority", |watcher| watcher.good(&lease.key).is_some()).await;
}
