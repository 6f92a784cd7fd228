//! Connections to etcd: to one member at a time, and to another one if it fails.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use etcd_client::{Certificate, Client, ConnectOptions, GetOptions, Identity, ResponseHeader, TlsOptions};
use flannel_core::files::{self, Trust};
use futures_util::StreamExt;
use futures_util::stream::FuturesUnordered;
use tokio::sync::Mutex;

use crate::config::{Config, ConfigError, Password, Timeouts, Tls};
use crate::error::{Fault, Kind};
use crate::scheme;

/// How long to wait for a member before the next one is tried in parallel (RFC 8305, section 5).
const STAGGER: Duration = Duration::from_millis(250);
/// How long to find out whether a member that did not answer serves the other scheme.
const PROBE: Duration = Duration::from_millis(500);

/// Opens and shares connections.
pub(crate) struct Connector {
    source: Source,
    timeouts: Timeouts,
    /// The key that is read to check that a member answers in agreement with the majority.
    probe: String,
    state: Mutex<State>,
}

enum Source {
    Config { config: Box<Config>, endpoints: Vec<Arc<str>> },
    Ready(Box<Client>),
}

#[derive(Default)]
struct State {
    current: Option<Connection>,
    /// The endpoint to try first.
    next: usize,
    made: u64,
}

/// A client connected to one member.
#[derive(Clone)]
pub(crate) struct Connection {
    pub(crate) client: Client,
    pub(crate) endpoint: Arc<str>,
    number: u64,
}

/// The cluster, term and revision of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Header {
    pub(crate) cluster: u64,
    pub(crate) term: u64,
    pub(crate) revision: i64,
}

impl Header {
    pub(crate) fn of(header: Option<&ResponseHeader>) -> Self {
        header.map_or_else(Self::default, |header| Self {
            cluster: header.cluster_id(),
            term: header.raft_term(),
            revision: header.revision(),
        })
    }
}

impl Connector {
    pub(crate) fn new(config: Config) -> Result<Self, ConfigError> {
        let endpoints = config.checked_endpoints()?.into_iter().map(Arc::from).collect();
        let (timeouts, probe) = (config.timeouts, config.prefix.config());
        let source = Source::Config { config: Box::new(config), endpoints };
        Ok(Self { source, timeouts, probe, state: Mutex::default() })
    }

    pub(crate) fn ready(client: Client, probe: String, timeouts: Timeouts) -> Self {
        Self { source: Source::Ready(Box::new(client)), timeouts, probe, state: Mutex::default() }
    }

    /// Makes a request that only reads. If it fails on an existing connection, it is retried once on a new one.
    pub(crate) async fn read<T, F>(&self, work: impl Fn(Client) -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let (is_new, connection) = self.connection().await?;
        match self.attempt(&connection, self.timeouts.request, work(connection.client.clone())).await {
            Err(fault) if !is_new && matches!(fault.kind, Kind::Cut | Kind::Token) => {
                let (_, connection) = self.connection().await?;
                self.attempt(&connection, self.timeouts.request, work(connection.client.clone())).await
            }
            result => result,
        }
    }

    /// Makes a request that writes. It is sent again only if the first was refused for its log-in.
    pub(crate) async fn write<T, F>(&self, work: impl Fn(Client) -> F) -> Result<T, Fault>
    where
        F: Future<Output = Result<T, etcd_client::Error>>,
    {
        let (is_new, connection) = self.connection().await?;
        match self.attempt(&connection, self.timeouts.request, work(connection.client.clone())).await {
            Err(fault) if !is_new && fault.kind == Kind::Token => {
                let (_, connection) = self.connection().await?;
                self.attempt(&connection, self.timeouts.request, work(connection.client.clone())).await
            }
            result => result,
        }
    }

    /// Makes a request over this connection. The connection is dropped if the request fails.
    pub(crate) async fn attempt<T>(
        &self,
        connection: &Connection,
        limit: Duration,
        work: impl Future<Output = Result<T, etcd_client::Error>>,
    ) -> Result<T, Fault> {
        let fault = match tokio::time::timeout(limit, work).await {
            Ok(Ok(value)) => return Ok(value),
            Ok(Err(error)) => Fault::of(&connection.endpoint, &error),
            Err(_) => Fault::late(&connection.endpoint, limit),
        };
        if matches!(fault.kind, Kind::Cut | Kind::Token) {
            self.forget(connection).await;
        }
        Err(fault)
    }

    pub(crate) fn request_limit(&self) -> Duration {
        self.timeouts.request
    }

    /// Reads the state of the store, through the majority.
    pub(crate) async fn header(&self) -> Result<Header, Fault> {
        let header = |mut client: Client| async move {
            let options = GetOptions::new().with_count_only();
            let response = client.get(self.probe.as_str(), Some(options)).await?;
            Ok(Header::of(response.header()))
        };
        self.read(header).await
    }

    /// Returns the existing connection, or a new one.
    pub(crate) async fn current(&self) -> Result<Connection, Fault> {
        Ok(self.connection().await?.1)
    }

    /// Drops a connection: the next request goes to the next member.
    pub(crate) async fn forget(&self, connection: &Connection) {
        let mut state = self.state.lock().await;
        if state.current.as_ref().is_some_and(|current| current.number == connection.number) {
            state.current = None;
            state.next = state.next.wrapping_add(1);
        }
    }

    async fn connection(&self) -> Result<(bool, Connection), Fault> {
        let (config, endpoints) = match &self.source {
            Source::Ready(client) => {
                let endpoint = "injected etcd client".into();
                return Ok((false, Connection { client: (**client).clone(), endpoint, number: 0 }));
            }
            Source::Config { config, endpoints } => (config, endpoints),
        };
        let mut state = self.state.lock().await;
        if let Some(current) = &state.current {
            return Ok((false, current.clone()));
        }
        let (place, client) = self.first_to_answer(config, endpoints, state.next).await?;
        state.next = place;
        state.made += 1;
        let connection = Connection { client, endpoint: Arc::clone(&endpoints[place]), number: state.made };
        state.current = Some(connection.clone());
        Ok((true, connection))
    }

    /// Tries the members from `first` on, each as soon as the one before it fails or is slow.
    async fn first_to_answer(
        &self,
        config: &Config,
        endpoints: &[Arc<str>],
        first: usize,
    ) -> Result<(usize, Client), Fault> {
        let mut waiting = (0..endpoints.len()).map(|n| first.wrapping_add(n) % endpoints.len());
        let mut trying = FuturesUnordered::new();
        let mut faults: Option<Fault> = None;
        loop {
            let next = waiting.next();
            trying.extend(next.map(|place| async move { (place, self.connect(config, &endpoints[place]).await) }));
            let answer = match next {
                Some(_) => tokio::time::timeout(STAGGER, trying.next()).await,
                None => Ok(trying.next().await),
            };
            match answer {
                Ok(Some((place, Ok(client)))) => return Ok((place, client)),
                Ok(Some((_, Err(fault)))) => faults = Some(join(faults, fault)),
                Ok(None) => return Err(faults.unwrap_or_else(|| Fault::cut("etcd", "no endpoint"))),
                // This attempt continues beside the next.
                Err(_) => {}
            }
        }
    }

    async fn connect(&self, config: &Config, endpoint: &Arc<str>) -> Result<Client, Fault> {
        let limit = self.timeouts.connect;
        let options = self.options(config, endpoint).await?;
        let work = async {
            let with_user = options.1.is_some();
            let client = match log_in(endpoint, &options).await {
                Err(error) if with_user && is_without_authentication(&error) => {
                    // flannel also continues without a log-in: authentication is not enabled yet.
                    log_in(endpoint, &(options.0, None)).await?
                }
                result => result?,
            };
            let probe = GetOptions::new().with_count_only();
            match client.kv_client().get(self.probe.as_str(), Some(probe)).await {
                Ok(_) => Ok(client),
                Err(error) => Err(error),
            }
        };
        let mut fault = match tokio::time::timeout(limit, work).await {
            Ok(Ok(client)) => return Ok(client),
            Ok(Err(error)) => Fault::of(endpoint, &error),
            Err(_) => return Err(Fault::late(endpoint, limit)),
        };
        if fault.kind == Kind::Cut
            && let Ok(Some(remedy)) = tokio::time::timeout(PROBE, scheme::remedy(endpoint)).await
        {
            fault.error.remedy = remedy;
        }
        Err(fault)
    }

    async fn options(&self, config: &Config, endpoint: &str) -> Result<Login, Fault> {
        let mut options = ConnectOptions::new()
            .with_connect_timeout(self.timeouts.connect)
            .with_keep_alive(self.timeouts.keep_alive, self.timeouts.keep_alive_answer)
            .with_keep_alive_while_idle(true)
            .with_require_leader(true);
        if endpoint.starts_with("https://") {
            options = options.with_tls(tls(config.tls.as_ref(), endpoint).await?);
        }
        let Some(credentials) = &config.credentials else { return Ok((options, None)) };
        let password = match &credentials.password {
            Password::Text(secret) => secret.reveal().to_owned(),
            Password::File(path) => {
                let bytes = read(path, endpoint).await?;
                String::from_utf8_lossy(&bytes).trim_end_matches(['\r', '\n']).to_owned()
            }
        };
        Ok((options, Some((credentials.user.clone(), password))))
    }
}

type Login = (ConnectOptions, Option<(String, String)>);

/// The client's automatic token refresh stays off: it would log in with the old password. If a token is refused, the
/// connection is dropped, and the next one reads the password again.
async fn log_in(endpoint: &Arc<str>, (options, user): &Login) -> Result<Client, etcd_client::Error> {
    let options = match user {
        Some((user, password)) => options.clone().with_user(user, password),
        None => options.clone(),
    };
    Client::connect([&**endpoint], Some(options)).await
}

fn is_without_authentication(error: &etcd_client::Error) -> bool {
    let etcd_client::Error::GRpcStatus(status) = error else { return false };
    status.message().contains("authentication is not enabled")
}

async fn tls(tls: Option<&Tls>, endpoint: &str) -> Result<TlsOptions, Fault> {
    let mut options = TlsOptions::new();
    match tls.and_then(|tls| tls.ca.as_ref()) {
        Some(ca) => options = options.ca_certificate(Certificate::from_pem(read(ca, endpoint).await?)),
        None => options = options.with_enabled_roots(),
    }
    let Some(tls) = tls else { return Ok(options) };
    if let Some(client) = &tls.client {
        let certificate = read(&client.certificate, endpoint).await?;
        options = options.identity(Identity::from_pem(certificate, read(&client.key, endpoint).await?));
    }
    if let Some(name) = &tls.server_name {
        options = options.domain_name(name);
    }
    Ok(options)
}

/// The largest certificate, key or password file, in bytes. A bundle of all public authorities is a quarter of that.
const MAX_FILE: u64 = 1 << 20;

/// Reads a certificate, key or password file as the store does for each connection: a regular file of at most 1 MiB,
/// with any owner. Blocks on the disk: not for an async task.
///
/// # Errors
/// The system's error, or an error if the file is not regular or too large.
pub fn credential_file(path: &Path) -> io::Result<Vec<u8>> {
    match files::read(path, Trust::Anyone, MAX_FILE)? {
        Some(bytes) => Ok(bytes),
        None => Err(io::Error::new(io::ErrorKind::NotFound, "there is no such file")),
    }
}

async fn read(path: &Path, endpoint: &str) -> Result<Vec<u8>, Fault> {
    let owned: PathBuf = path.to_owned();
    match tokio::task::spawn_blocking(move || credential_file(&owned)).await {
        Ok(Ok(bytes)) => Ok(bytes),
        Ok(Err(error)) => Err(Fault::file(endpoint, path, &error)),
        Err(error) => Err(Fault::cut(endpoint, error.to_string())),
    }
}

/// Returns one fault with the text of both. If a member denies access, its fault is the main one, because an operator
/// has to act on it.
fn join(first: Option<Fault>, second: Fault) -> Fault {
    let Some(first) = first else { return second };
    let (mut kept, other) = match first.kind {
        Kind::Denied | Kind::Token => (first, second),
        Kind::Cut | Kind::Compacted | Kind::TooLarge | Kind::Ended => (second, first),
    };
    kept.error.problem = format!("{}; and {}: {}", kept.error.problem, other.error.endpoint, other.error.problem);
    kept
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_credentials_file_without_end_or_that_is_none_is_refused_by_its_name() {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        std::fs::write(at("largest"), vec![b'x'; MAX_FILE as usize]).unwrap();
        std::fs::write(at("larger"), vec![b'x'; MAX_FILE as usize + 1]).unwrap();
        nix::unistd::mkfifo(&at("pipe"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        let told = async |path: &Path| read(path, "https://etcd:2379").await.map_err(|fault| fault.error.to_string());
        assert_eq!(told(&at("largest")).await.map(|bytes| bytes.len()), Ok(MAX_FILE as usize));
        for (path, reason) in [
            (at("larger"), "larger than 1048576 bytes"),
            (at("pipe"), "not a regular file"),
            (PathBuf::from("/dev/null"), "not a regular file"),
            (at("nowhere"), "there is no such file"),
        ] {
            let error = told(&path).await.unwrap_err();
            assert!(error.contains(&path.display().to_string()) && error.contains(reason), "{error}");
        }
    }
}
