//! Certificates, users and passwords on the way to etcd.

use std::fs;
use std::path::{Path, PathBuf};

use etcd_client::{Permission, PermissionType};
use nix::sys::signal::Signal;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd,
};

use crate::harness::{Agent, Site, VXLAN, bare, command, owned};
use crate::store::Cluster;

const SECRET: &str = "correct-horse-7";

/// An authority, and what it has signed: PEM files in one directory.
struct Pki {
    dir: PathBuf,
    authority: CertifiedIssuer<'static, KeyPair>,
}

impl Pki {
    fn new(dir: &Path, name: &str) -> Self {
        let mut params = CertificateParams::new([]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        fs::write(dir.join(name), authority.pem()).unwrap();
        Self { dir: dir.to_owned(), authority }
    }

    fn issue(&self, file: &str, name: &str) {
        self.issue_until(file, name, 2100);
    }

    fn issue_until(&self, file: &str, name: &str, year: i32) {
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        params.not_before = date_time_ymd(2000, 1, 1);
        params.not_after = date_time_ymd(year, 1, 1);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        let certificate = params.signed_by(&key, &self.authority).unwrap();
        fs::write(self.dir.join(format!("{file}.crt")), certificate.pem()).unwrap();
        fs::write(self.dir.join(format!("{file}.key")), key.serialize_pem()).unwrap();
    }
}

/// Whom etcd lets in.
enum Clients {
    /// Those with a certificate of the authority.
    Known,
    Any,
}

/// A node and an etcd that shows a certificate.
fn cluster(clients: Clients) -> Cluster {
    let site = Site::new(1, "{}");
    let pki = Pki::new(site.dir.path(), "ca.pem");
    Pki::new(site.dir.path(), "other.pem");
    pki.issue("server", "10.89.0.1");
    pki.issue("client", "node");
    let file = |name: &str| site.path(name).display().to_string();
    let own = [
        "--listen-client-urls=https://0.0.0.0:2379,http://127.0.0.1:2381".to_owned(),
        format!("--cert-file={}", file("server.crt")),
        format!("--key-file={}", file("server.key")),
    ];
    let asked = match clients {
        Clients::Known => vec![format!("--trusted-ca-file={}", file("ca.pem")), "--client-cert-auth".to_owned()],
        Clients::Any => Vec::new(),
    };
    Cluster::with_flags(site, VXLAN, [own.to_vec(), asked].concat())
}

fn start(cluster: &Cluster, flags: &[String]) -> Agent {
    let args = [cluster.args(1), owned(&["-etcd-endpoints=https://10.89.0.1:2379"]), flags.to_vec()].concat();
    Agent::start_in(cluster.ns(1), command(&args).env("FLANNELD_ETCD_PASSWORD", SECRET), cluster.site.path("log1"))
}

fn flag(cluster: &Cluster, name: &str, file: &str) -> String {
    format!("-etcd-{name}={}", cluster.site.path(file).display())
}

#[test]
fn an_agent_trusts_the_authority_it_is_given_and_shows_its_certificate() {
    let cluster = cluster(Clients::Known);
    let user = owned(&["-etcd-username=node"]);
    let with = |ca: &str| {
        let files = [("cafile", ca), ("certfile", "client.crt"), ("keyfile", "client.key")];
        [user.clone(), files.map(|(name, file)| flag(&cluster, name, file)).to_vec()].concat()
    };
    for (flags, part) in [
        (with("other.pem"), "certificate"),
        ([user.clone(), vec![flag(&cluster, "cafile", "ca.pem")]].concat(), "certificate"),
    ] {
        let agent = start(&cluster, &flags);
        let told = || agent.log().lines().any(|line| line.contains("lease store unreachable") && line.contains(part));
        agent.until("told why", told);
        assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
    }
    assert!(cluster.records().is_empty());
    let agent = start(&cluster, &with("ca.pem"));
    agent.until_ready();
    assert_eq!(cluster.keys_of(1).len(), 1);

    agent.end(Signal::SIGTERM);
    let mut missing = start(&cluster, &[flag(&cluster, "cafile", "nowhere.pem"), "-etcd-username=node".to_owned()]);
    assert_eq!(missing.wait(), Some(1), "{}", missing.log());
    assert!(missing.log().contains("nowhere.pem"), "{}", missing.log());
}

#[test]
fn certificates_that_cannot_work_are_found_by_doctor_and_named_by_the_agent() {
    let cluster = cluster(Clients::Known);
    let pki = Pki::new(cluster.site.dir.path(), "second.pem");
    pki.issue_until("expired", "node", 2001);
    let v1 = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/it/files");
    for file in ["v1.crt", "v1.key"] {
        fs::copy(v1.join(file), cluster.site.path(file)).unwrap();
    }
    let flags = |file: &str| {
        let files = [("cafile", "ca.pem"), ("certfile", &format!("{file}.crt")), ("keyfile", &format!("{file}.key"))];
        [owned(&["-etcd-username=node"]), files.map(|(name, file)| flag(&cluster, name, file)).to_vec()].concat()
    };
    let doctor = |file: &str| {
        let more = owned(&["-etcd-endpoints=https://10.89.0.1:2379", "-etcd-password=x", "doctor"]);
        crate::harness::run(cluster.ns(1), &[cluster.args(1), more, flags(file)].concat())
    };
    let parts = ["-etcd-certfile", "v1.crt", "version 1", "openssl x509 -req", "-extfile"];
    let mut agent = start(&cluster, &flags("v1"));
    assert_eq!(agent.wait(), Some(1), "{}", agent.log());
    let report = doctor("v1");
    assert_eq!(report.code, Some(1), "{report:?}");
    for part in parts {
        assert!(agent.log().contains(part) && report.out.contains(part), "{part}: {}{}", agent.log(), report.out);
    }

    let agent = start(&cluster, &flags("expired"));
    agent.until("warned", || agent.log().contains("expired at Jan"));
    let report = doctor("expired");
    assert_eq!(report.code, Some(1), "{report:?}");
    for part in ["-etcd-certfile", "expired.crt", "expired at Jan", "openssl x509 -in"] {
        assert!(report.out.contains(part), "{part} is not in {}", report.out);
    }
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
    let report = doctor("client");
    assert!(!report.out.contains("-etcd-certfile"), "{}", report.out);
}

#[test]
fn the_wrong_scheme_is_named_by_doctor_and_by_the_agent() {
    let tls = cluster(Clients::Any);
    let clear = Cluster::new(1, VXLAN);
    let ca = flag(&tls, "cafile", "ca.pem");
    for (cluster, endpoint, more, part) in [
        (&tls, "-etcd-endpoints=http://10.89.0.1:2379", None, "serves TLS: write https://"),
        (&clear, "-etcd-endpoints=https://10.89.0.1:2379", Some(ca.as_str()), "serves no TLS: write http://"),
    ] {
        let flags = [Some(endpoint), more].into_iter().flatten().collect::<Vec<_>>();
        let report = cluster.run(1, &[&["doctor"], flags.as_slice()].concat());
        assert_eq!(report.code, Some(1), "{report:?}");
        let agent = cluster.start(1, &flags);
        agent.until("told the remedy", || agent.log().contains(part));
        assert!(report.out.contains(part), "{}", report.out);
        agent.end(Signal::SIGTERM);
    }
}

#[test]
fn a_certificate_for_another_name_is_named_with_the_names_it_has() {
    let site = Site::new(1, "{}");
    let pki = Pki::new(site.dir.path(), "ca.pem");
    pki.issue("server", "etcd.example");
    let file = |name: &str| site.path(name).display().to_string();
    let etcd = vec![
        "--listen-client-urls=https://0.0.0.0:2379,http://127.0.0.1:2381".to_owned(),
        format!("--cert-file={}", file("server.crt")),
        format!("--key-file={}", file("server.key")),
    ];
    let cluster = Cluster::with_flags(site, VXLAN, etcd);
    let ca = flag(&cluster, "cafile", "ca.pem");
    let report = cluster.run(1, &["doctor", "-etcd-endpoints=https://10.89.0.1:2379", &ca]);
    assert_eq!(report.code, Some(1), "{report:?}");
    for part in ["10.89.0.1", "etcd.example", "subjectAltName"] {
        assert!(report.out.contains(part), "{part} is not in {}", report.out);
    }
}

#[test]
fn cleanup_works_when_the_certificates_are_gone_already() {
    let cluster = Cluster::new(1, VXLAN);
    let agent = cluster.start(1, &[]).ready();
    agent.end(Signal::SIGTERM);
    let flags = ["cleanup", "-etcd-endpoints=https://10.89.0.1:2379", "-etcd-cafile=/nowhere/ca.pem"];
    let cleaned = cluster.run(1, &flags);
    assert_eq!(cleaned.code, Some(0), "{cleaned:?}");
    for part in ["lease not released", "-etcd-cafile /nowhere/ca.pem"] {
        assert!(cleaned.out.contains(part), "{part} is not in {}", cleaned.out);
    }
    assert!(cluster.ns(1).link("flannel.1").is_err());
    assert!(!cluster.site.subnet_file(1).exists() && !cluster.state_file(1).exists());
}

#[test]
fn an_agent_logs_in_and_its_password_is_nowhere_to_be_seen() {
    let cluster = cluster(Clients::Any);
    cluster
        .ask(async |client| {
            client.user_add("root", "root", None).await.unwrap();
            client.user_grant_role("root", "root").await.unwrap();
            client.role_add("flannel").await.unwrap();
            let keys = Permission::new(PermissionType::Readwrite, "/coreos.com/network/").with_prefix();
            client.role_grant_permission("flannel", keys).await.unwrap();
            client.user_add("node", SECRET, None).await.unwrap();
            client.user_grant_role("node", "flannel").await.unwrap();
            client.auth_enable().await.unwrap();
        })
        .unwrap();
    let flags = [owned(&["-etcd-username=node", "-v=5"]), vec![flag(&cluster, "cafile", "ca.pem")]].concat();
    let agent = start(&cluster, &flags);
    agent.until_ready();
    let (_, shown) = agent.get(9472, "/status").unwrap();
    let (_, metrics) = agent.get(9472, "/metrics").unwrap();
    let arguments = fs::read_to_string(format!("/proc/{}/cmdline", agent.pid())).unwrap();
    for text in [&agent.log(), &shown, &metrics, &arguments] {
        assert!(!text.contains(SECRET), "{text}");
    }
    let state = || fs::read_to_string(cluster.state_file(1)).unwrap_or_default();
    agent.until("written down", || !state().is_empty());
    agent.end(Signal::SIGTERM);
    assert!(!state().contains(SECRET));

    fs::write(cluster.site.path("password"), "wrong").unwrap();
    let mut wrong = bare(std::process::Command::new(crate::harness::BINARY));
    wrong.args(cluster.args(1)).args(["-etcd-endpoints=https://10.89.0.1:2379", "-state-file="]).args(&flags);
    wrong.arg(flag(&cluster, "password-file", "password"));
    let wrong = Agent::start_in(cluster.ns(1), &mut wrong, cluster.site.path("log-wrong"));
    wrong.until("told that it is denied", || wrong.log().contains("denied"));
}

#[test]
fn a_password_never_goes_over_clear_text_unless_asked_for() {
    let cluster = Cluster::new(1, VXLAN);
    let flags = owned(&["-etcd-username=node", "-etcd-password=x"]);
    let told = crate::harness::run(cluster.ns(1), &[cluster.args(1), flags.clone()].concat());
    assert_eq!(told.code, Some(1), "{told:?}");
    assert!(told.err.contains("-etcd-allow-clear-text-credentials"), "{}", told.err);
}
