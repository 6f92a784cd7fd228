//! A real Kubernetes API server on the loopback, with a real etcd, which ends when its handle is dropped.
//!
//! It authenticates by token and client certificate, authorizes Nodes and by RBAC, and has the default admission
//! plug-ins and `NodeRestriction`. No kubelet registers Nodes. Tests create them with podCIDRs, or let
//! kube-controller-manager assign these ([`ApiServer::assign_pod_cidrs`]).

mod manifest;
mod proxy;

use std::fs;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use http::{Method, Request};
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    SanType,
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::etcd::{self, Etcd};
use crate::{Context, Error, Process, programs};

pub use manifest::{manifest, objects, rules, rules_without};
pub use proxy::{Fault, Proxy, Seen};

/// The version of Kubernetes' programs.
pub(crate) const VERSION: &str = "1.36.3";

/// The token of the group `system:masters`.
const ADMIN: &str = "administrator";

/// The server's own address among those of Services.
const SERVICE: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 1);

/// How long a server may take to be ready: 4 s alone on two cores.
const PATIENCE: Duration = Duration::from_secs(120);

/// A running API server. Dropping it kills it and its etcd, and removes their data.
#[derive(Debug)]
pub struct ApiServer {
    etcd: Etcd,
    program: PathBuf,
    /// The address at which it can be reached besides the loopback.
    address: Option<IpAddr>,
    port: u16,
    process: Option<Process>,
    issuer: Issuer<'static, KeyPair>,
    dir: TempDir,
}

/// Returns the path of a program of Kubernetes: `target/NAME-1.36.3`, which `./test` builds.
///
/// # Errors
/// The path that was searched and how to get the program: a test that needs it fails without it.
pub fn program(name: &str) -> Result<PathBuf, Error> {
    programs::find(&format!("{name}-{VERSION}"))
}

/// Returns the path of Helm, which `./test` builds.
///
/// # Errors
/// As [`program`].
pub fn helm() -> Result<PathBuf, Error> {
    programs::find("helm-4.3.2")
}

impl ApiServer {
    /// Starts a server with an etcd of this version, and waits until it is ready.
    ///
    /// # Errors
    /// What is missing, or the end of its log.
    pub async fn start(version: etcd::Version) -> Result<Self, Error> {
        Self::start_at(version, None).await
    }

    /// Like [`start`](Self::start), in the network namespace of this thread, for clients that reach it at `address`.
    ///
    /// # Errors
    /// As [`start`](Self::start).
    pub async fn start_at(version: etcd::Version, address: Option<IpAddr>) -> Result<Self, Error> {
        // A process has one provider, and the enabled features include more than one.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let program = program("kube-apiserver")?;
        let etcd = Etcd::start(etcd::Options::single(version))?;
        let dir = crate::memory_dir().context(|| "no temporary directory".to_owned())?;
        let [port] = crate::ports::free()?;
        let issuer = write_keys(dir.path(), address);
        let issuer = issuer.map_err(|error| Error::new(format!("cannot write the server's keys: {error}")))?;
        let mut server = Self { etcd, program, address, port, process: None, issuer, dir };
        server.restart().await?;
        Ok(server)
    }

    /// Returns the URL for clients of other network namespaces, if there is one, else the one on the loopback.
    pub fn url(&self) -> String {
        let host = self.address.unwrap_or(Ipv4Addr::LOCALHOST.into());
        format!("https://{}", SocketAddr::new(host, self.port))
    }

    /// Returns the port on which it listens.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Returns the server's etcd.
    pub fn etcd(&mut self) -> &mut Etcd {
        &mut self.etcd
    }

    /// Writes a kubeconfig file called `name` with this token, which is read from its own file, and with a server at
    /// this URL.
    ///
    /// # Errors
    /// The system's error.
    pub fn kubeconfig(&self, name: &str, token: &str, url: &str) -> Result<PathBuf, Error> {
        let token_file = self.token_file(name);
        let path = self.file(&format!("{name}.kubeconfig"));
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "c", "cluster": { "server": url, "certificate-authority": self.file("ca.pem") } }],
            "users": [{ "name": "u", "user": { "tokenFile": token_file } }],
            "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
            "current-context": "x",
        });
        fs::write(&token_file, token).context(|| "cannot write a token".to_owned())?;
        fs::write(&path, config.to_string()).context(|| "cannot write a kubeconfig".to_owned())?;
        Ok(path)
    }

    /// Writes a kubeconfig file of the administrator.
    ///
    /// # Errors
    /// The system's error.
    pub fn admin_kubeconfig(&self) -> Result<PathBuf, Error> {
        self.kubeconfig(ADMIN, ADMIN, &self.url())
    }

    /// Returns the path of the authority that signed the server's certificate, in PEM.
    pub fn authority_file(&self) -> PathBuf {
        self.file("ca.pem")
    }

    /// Returns the path of the token of the kubeconfig file of this name.
    pub fn token_file(&self, name: &str) -> PathBuf {
        self.file(&format!("{name}.token"))
    }

    /// Creates a service account with these RBAC rules for the whole cluster. Returns its token.
    ///
    /// # Errors
    /// The server's error.
    pub async fn service_account(&self, name: &str, rules: Value) -> Result<String, Error> {
        let role = json!({ "metadata": { "name": name }, "rules": rules });
        self.create("/apis/rbac.authorization.k8s.io/v1/clusterroles", &role).await?;
        let binding = json!({
            "metadata": { "name": name },
            "roleRef": { "apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name },
            "subjects": [{ "kind": "ServiceAccount", "name": name, "namespace": "kube-system" }],
        });
        self.create("/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", &binding).await?;
        let accounts = "/api/v1/namespaces/kube-system/serviceaccounts";
        self.create(accounts, &json!({ "metadata": { "name": name } })).await?;
        let token = self.create(&format!("{accounts}/{name}/token"), &json!({ "spec": {} })).await?;
        let text = token.pointer("/status/token").and_then(Value::as_str);
        text.map(str::to_owned).ok_or_else(|| Error::new(format!("no token in {token}")))
    }

    /// Replaces the RBAC rules of an account, and waits until the server applies them: until it allows, or denies,
    /// `verb` on `resource`.
    ///
    /// # Errors
    /// The server's error, or that it does not apply the rules.
    pub async fn set_rules(&self, name: &str, rules: Value, verb: &str, resource: &str) -> Result<(), Error> {
        let (resource, subresource) = resource.split_once('/').unwrap_or((resource, ""));
        let is_granted = |rule: &Value| {
            let has = |field: &str, text: &str| rule[field].as_array().is_some_and(|all| all.contains(&json!(text)));
            let full = [resource, subresource].join("/");
            has("verbs", verb) && has("resources", full.trim_end_matches('/'))
        };
        let wanted = rules.as_array().is_some_and(|rules| rules.iter().any(is_granted));
        self.patch(&format!("/apis/rbac.authorization.k8s.io/v1/clusterroles/{name}"), &json!({ "rules": rules }))
            .await?;
        let asked = json!({ "spec": {
            "user": format!("system:serviceaccount:kube-system:{name}"),
            "resourceAttributes": { "verb": verb, "resource": resource, "subresource": subresource },
        } });
        let deadline = Instant::now() + PATIENCE;
        loop {
            let review = self.create("/apis/authorization.k8s.io/v1/subjectaccessreviews", &asked).await?;
            if review["status"]["allowed"] == wanted {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(Error::new(format!("the server does not go by {rules}")));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Creates a Node with these podCIDRs, or without.
    ///
    /// # Errors
    /// The server's error.
    pub async fn create_node(&self, name: &str, cidrs: &[String]) -> Result<Value, Error> {
        let spec = match cidrs.first() {
            Some(first) => json!({ "podCIDR": first, "podCIDRs": cidrs }),
            None => json!({}),
        };
        self.create("/api/v1/nodes", &json!({ "metadata": { "name": name }, "spec": spec })).await
    }

    /// Sets annotations of a Node; `null` removes one.
    ///
    /// # Errors
    /// The server's error.
    pub async fn annotate(&self, name: &str, annotations: Value) -> Result<Value, Error> {
        self.patch(&format!("/api/v1/nodes/{name}"), &json!({ "metadata": { "annotations": annotations } })).await
    }

    /// Creates a Pod in `kube-system` that runs as this account. Without `node` it has no Node yet.
    ///
    /// # Errors
    /// The server's error.
    pub async fn create_pod(&self, name: &str, account: &str, node: Option<&str>) -> Result<Value, Error> {
        let containers = json!([{ "name": "agent", "image": "example.com/agent" }]);
        let mut spec = json!({ "serviceAccountName": account, "containers": containers });
        if let Some(node) = node {
            spec["nodeName"] = json!(node);
        }
        self.create("/api/v1/namespaces/kube-system/pods", &json!({ "metadata": { "name": name }, "spec": spec })).await
    }

    /// Binds a Pod to a Node, as the scheduler does.
    ///
    /// # Errors
    /// The server's error.
    pub async fn bind_pod(&self, name: &str, node: &str) -> Result<Value, Error> {
        let target = json!({ "metadata": { "name": name }, "target": { "kind": "Node", "name": node } });
        self.create(&format!("/api/v1/namespaces/kube-system/pods/{name}/binding"), &target).await
    }

    /// Writes a condition of a Node and keeps the others, as a kubelet does.
    ///
    /// # Errors
    /// The server's error.
    pub async fn set_condition(&self, name: &str, condition: &Value) -> Result<Value, Error> {
        let patch = json!({ "status": { "conditions": [condition] } });
        let content = "application/strategic-merge-patch+json";
        self.send(Method::PATCH, &format!("/api/v1/nodes/{name}/status"), content, Some(&patch)).await
    }

    /// Runs kube-controller-manager, which assigns podCIDRs from `cluster_cidrs` and does nothing else.
    ///
    /// # Errors
    /// How to get the program, if it is missing.
    pub fn assign_pod_cidrs(&self, cluster_cidrs: &str) -> Result<Process, Error> {
        self.run_component("kube-controller-manager", |command| {
            command.args(["--controllers=node-ipam-controller", "--allocate-node-cidrs"]);
            command.args(["--service-cluster-ip-range=10.96.0.0/16"]).arg(format!("--cluster-cidr={cluster_cidrs}"));
        })
    }

    /// Runs kube-controller-manager with all its controllers.
    ///
    /// # Errors
    /// How to get the program, if it is missing.
    pub fn run_controllers(&self, cluster_cidrs: &str) -> Result<Process, Error> {
        self.run_component("kube-controller-manager", |command| {
            command.args(["--allocate-node-cidrs", "--service-cluster-ip-range=10.96.0.0/16"]);
            command.arg(format!("--cluster-cidr={cluster_cidrs}"));
            command.arg(format!("--root-ca-file={}", self.file("ca.pem").display()));
        })
    }

    /// Runs kube-scheduler.
    ///
    /// # Errors
    /// How to get the program, if it is missing.
    pub fn run_scheduler(&self) -> Result<Process, Error> {
        self.run_component("kube-scheduler", |_| {})
    }

    fn run_component(&self, name: &str, more: impl FnOnce(&mut Command)) -> Result<Process, Error> {
        let mut command = Command::new(program(name)?);
        command.arg(format!("--kubeconfig={}", self.admin_kubeconfig()?.display()));
        command.args(["--leader-elect=false", "--secure-port=0"]);
        command.env_clear().stdin(Stdio::null()).stdout(Stdio::null());
        more(&mut command);
        Process::start(&mut command, &self.file(&format!("{name}.log")))
    }

    /// Writes `NAME.kubeconfig` of a user who has a certificate, with the authority's in `ca.pem`, into a folder that
    /// another file system may have as `/etc/kubernetes`.
    ///
    /// # Errors
    /// The system's error.
    pub fn write_credentials(&self, dir: &Path, name: &str, user: &str, group: &str) -> Result<(), Error> {
        let mut params = CertificateParams::default();
        params.distinguished_name = named(user);
        params.distinguished_name.push(DnType::OrganizationName, group);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate();
        let signed = key.and_then(|key| Ok((params.signed_by(&key, &self.issuer)?.pem(), key.serialize_pem())));
        let (certificate, key) = signed.map_err(|error| Error::new(format!("no certificate of {user}: {error}")))?;
        let authority = fs::read_to_string(self.file("ca.pem")).context(|| "no authority".to_owned())?;
        let inside = |file: &str| format!("/etc/kubernetes/{file}");
        let config = json!({
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{ "name": "c", "cluster": { "server": self.url(), "certificate-authority": inside("ca.pem") } }],
            "users": [{ "name": "u", "user": {
                "client-certificate": inside(&format!("{name}.pem")),
                "client-key": inside(&format!("{name}.key")),
            } }],
            "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
            "current-context": "x",
        });
        for (file, text) in [
            ("ca.pem".to_owned(), authority),
            (format!("{name}.pem"), certificate),
            (format!("{name}.key"), key),
            (format!("{name}.kubeconfig"), config.to_string()),
        ] {
            fs::write(dir.join(&file), text).context(|| format!("writing {file}"))?;
        }
        Ok(())
    }

    /// Reads an object.
    ///
    /// # Errors
    /// The server's error.
    pub async fn get(&self, path: &str) -> Result<Value, Error> {
        self.request(Method::GET, path, None).await
    }

    /// Creates an object.
    ///
    /// # Errors
    /// The server's error.
    pub async fn create(&self, path: &str, object: &Value) -> Result<Value, Error> {
        self.request(Method::POST, path, Some(object)).await
    }

    /// Merges a patch into an object.
    ///
    /// # Errors
    /// The server's error.
    pub async fn patch(&self, path: &str, patch: &Value) -> Result<Value, Error> {
        self.request(Method::PATCH, path, Some(patch)).await
    }

    /// Deletes an object, or all of a kind.
    ///
    /// # Errors
    /// The server's error.
    pub async fn delete(&self, path: &str) -> Result<Value, Error> {
        self.request(Method::DELETE, path, None).await
    }

    /// Kills the server; its etcd continues.
    pub fn kill(&mut self) {
        self.process = None;
    }

    /// Starts the server again, and waits until it is ready.
    ///
    /// # Errors
    /// The end of its log.
    pub async fn restart(&mut self) -> Result<(), Error> {
        self.process = None;
        let file = |name: &str| self.file(name).display().to_string();
        let mut command = Command::new(&self.program);
        command
            .arg(format!("--etcd-servers={}", self.etcd.endpoint(0)))
            .arg(format!("--advertise-address={}", self.address.unwrap_or(Ipv4Addr::LOCALHOST.into())))
            // The Service `kubernetes` leads to an address that others reach.
            .arg(format!("--endpoint-reconciler-type={}", if self.address.is_some() { "lease" } else { "none" }))
            .arg(format!("--bind-address={}", if self.address.is_some() { "0.0.0.0" } else { "127.0.0.1" }))
            .arg(format!("--secure-port={}", self.port))
            .arg(format!("--tls-cert-file={}", file("server.pem")))
            .arg(format!("--tls-private-key-file={}", file("server.key")))
            .arg(format!("--client-ca-file={}", file("ca.pem")))
            .arg(format!("--token-auth-file={}", file("tokens.csv")))
            .args(["--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"])
            .arg("--service-account-issuer=https://kubernetes.default.svc")
            .arg(format!("--service-account-signing-key-file={}", file("accounts.key")))
            .arg(format!("--service-account-key-file={}", file("accounts.pub")))
            .arg("--service-cluster-ip-range=10.96.0.0/16")
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        self.process = Some(Process::start(&mut command, &self.file("server.log"))?);
        self.await_readiness().await
    }

    async fn await_readiness(&mut self) -> Result<(), Error> {
        let deadline = Instant::now() + PATIENCE;
        // The namespace is created after the server reports that it is ready; a restored store has it before.
        while !self.is_ready().await || self.get("/api/v1/namespaces/kube-system").await.is_err() {
            let Some(process) = &mut self.process else { return Ok(()) };
            if process.ended()?.is_some() || Instant::now() > deadline {
                return Err(Error::new(format!("kube-apiserver is not ready:\n{}", process.last_words())));
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        Ok(())
    }

    /// Sends a request with this token.
    ///
    /// # Errors
    /// The server's error, with its message.
    pub async fn request_as(
        &self,
        token: &str,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, Error> {
        let content = content(&method);
        ask(self.client_of(Some(token))?, request(method, path, content, body)?).await
    }

    /// Whether the server has started all of its own controllers, and ends no more by itself.
    async fn is_ready(&self) -> bool {
        let Ok(client) = self.client().await else { return false };
        let Ok(request) = Request::get("/readyz").body(Vec::new()) else { return false };
        client.request_text(request).await.is_ok()
    }

    async fn request(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Value, Error> {
        let content = content(&method);
        self.send(method, path, content, body).await
    }

    async fn send(&self, method: Method, path: &str, content: &str, body: Option<&Value>) -> Result<Value, Error> {
        ask(self.client().await?, request(method, path, content, body)?).await
    }

    /// Returns a client with the administrator's credentials. Each runtime needs its own.
    ///
    /// # Errors
    /// If the server's URL or authority is refused.
    pub async fn client(&self) -> Result<kube::Client, Error> {
        self.client_of(Some(ADMIN))
    }

    /// Returns a client with this token, or without credentials.
    fn client_of(&self, token: Option<&str>) -> Result<kube::Client, Error> {
        let refused = |error: &dyn std::fmt::Display| Error::new(format!("no client of kube-apiserver: {error}"));
        let url = format!("https://127.0.0.1:{}", self.port).parse().map_err(|error| refused(&error))?;
        let mut config = kube::Config::new(url);
        config.root_cert = Some(vec![fs::read(self.file("ca.der")).context(|| "no authority".to_owned())?]);
        config.auth_info.token = token.map(|token| token.to_owned().into());
        config.default_retry = false;
        kube::Client::try_from(config).map_err(|error| refused(&error))
    }

    fn file(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

fn named(name: &str) -> DistinguishedName {
    let mut distinguished = DistinguishedName::new();
    distinguished.push(DnType::CommonName, name);
    distinguished
}

/// Writes the server's keys and certificates, and returns the authority.
fn write_keys(dir: &Path, address: Option<IpAddr>) -> Result<Issuer<'static, KeyPair>, Box<dyn std::error::Error>> {
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    authority.distinguished_name = named("authority");
    let authority_key = KeyPair::generate()?;
    let authority_certificate = authority.self_signed(&authority_key)?;
    let issuer = Issuer::new(authority, authority_key);
    let mut server = CertificateParams::default();
    server.distinguished_name = named("server");
    let addresses = address.into_iter().chain([Ipv4Addr::LOCALHOST.into(), SERVICE.into()]);
    server.subject_alt_names = addresses.map(SanType::IpAddress).collect();
    let server_key = KeyPair::generate()?;
    let server_certificate = server.signed_by(&server_key, &issuer)?;
    let accounts = KeyPair::generate()?;
    fs::write(dir.join("ca.der"), authority_certificate.der())?;
    for (name, text) in [
        ("ca.pem", authority_certificate.pem()),
        ("server.pem", server_certificate.pem()),
        ("server.key", server_key.serialize_pem()),
        ("accounts.key", accounts.serialize_pem()),
        ("accounts.pub", accounts.public_key_pem()),
        ("tokens.csv", format!("{ADMIN},administrator,administrator,\"system:masters\"\n")),
    ] {
        fs::write(dir.join(name), text)?;
    }
    Ok(issuer)
}

/// Returns a request with this type of body.
fn request(method: Method, path: &str, content: &str, body: Option<&Value>) -> Result<Request<Vec<u8>>, Error> {
    let body = body.map(|body| body.to_string().into_bytes()).unwrap_or_default();
    let request = Request::builder().method(method).uri(path).header("content-type", content).body(body);
    request.map_err(|error| Error::new(format!("{path}: {error}")))
}

/// Returns the type of a request's body.
fn content(method: &Method) -> &'static str {
    if method == Method::PATCH { "application/merge-patch+json" } else { "application/json" }
}

async fn ask(client: kube::Client, request: Request<Vec<u8>>) -> Result<Value, Error> {
    let doing = format!("{} {}", request.method(), request.uri());
    let answer = tokio::time::timeout(Duration::from_secs(30), client.request(request)).await;
    let answer = answer.map_err(|_| Error::new(format!("{doing}: no answer within 30 s")))?;
    answer.map_err(|error| Error::new(format!("{doing}: {}", flannel_core::text::chain(&error))))
}
