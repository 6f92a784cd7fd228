//! Creates a client of the API server from settings that match flannel's flags.

use std::fmt;
use std::path::PathBuf;
use std::thread;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};

use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::spawn_blocking;
use tokio::time::timeout;

use crate::api::first_line;
use crate::credentials;
use crate::error::in_words;
use crate::plug_in::PlugIn;

/// How to reach the API server.
#[derive(Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Access {
    /// A kubeconfig file. Default: none.
    pub kubeconfig: Option<PathBuf>,
    /// The server's URL, which overrides the one in the kubeconfig. Default: none.
    pub url: Option<String>,
}

/// No client could be created with this [`Access`]. Final until an operator has fixed what the error names.
#[derive(Debug, thiserror::Error)]
#[error("{at}: {problem}; {remedy}")]
#[non_exhaustive]
pub struct AccessError {
    /// The place: a file, a URL, or the Pod's own account.
    pub at: String,
    /// What is wrong.
    pub problem: String,
    /// How to fix it.
    pub remedy: &'static str,
}

/// A client and the URL of its server.
#[derive(Clone)]
#[non_exhaustive]
pub struct Connection {
    /// The client.
    pub client: kube::Client,
    /// The API server's URL, without credentials.
    pub server: String,
}

/// The time limit for creating a client, which may run the program of a kubeconfig's `auth-provider`.
const PREPARE: Duration = Duration::from_secs(30);
/// The time limit for connecting.
const CONNECT: Duration = Duration::from_secs(5);

impl Access {
    /// Uses the account of the Pod that this program runs in.
    pub fn in_cluster() -> Self {
        Self::default()
    }

    /// Uses a kubeconfig file.
    pub fn kubeconfig(path: impl Into<PathBuf>) -> Self {
        Self { kubeconfig: Some(path.into()), url: None }
    }

    /// Sets the server's URL. Without a kubeconfig, no credentials are used.
    #[must_use]
    pub fn at(self, url: impl Into<String>) -> Self {
        Self { url: Some(url.into()), ..self }
    }

    /// Creates a client and returns it with the server's URL. Sends nothing yet. A token file is read again every
    /// minute, so that a rotated token is used in time. So is `ca.crt` of the Pod's own account, for new connections.
    /// The certificates of a kubeconfig are read once.
    ///
    /// The credential plug-in of a kubeconfig is run once before this returns. If it fails, this succeeds all the same,
    /// and requests fail until a later run succeeds: it is run again after 1 s, 2 s and so on, up to about 30 s. It is
    /// also run again a minute before the `expirationTimestamp` that it printed, and after the answer 401. Until it has
    /// printed new credentials, requests use the old ones. A watch continues with those that it began with. Plug-ins are
    /// run one at a time, without a terminal and without input, and what they print to their standard error is not
    /// shown. One that has not ended after 30 s, or when the client is dropped, is killed with its process group.
    ///
    /// The client requests compressed answers and does not repeat requests. With a kubeconfig, the proxy is that of the
    /// kubeconfig, else that of the environment variables that Go programs use.
    ///
    /// # Errors
    /// [`AccessError`] names the file or URL. Final until that is fixed.
    ///
    /// # Cancel safety
    /// Reads files, and runs the credential plug-in of the kubeconfig, or the program of its `auth-provider`, for at most
    /// 30 s. If this is dropped, a plug-in is killed, and that program continues.
    pub async fn connect(&self) -> Result<Connection, AccessError> {
        // A process has one provider, and another part of it may have installed one.
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let access = self.clone();
        let read = spawn_blocking(move || Handle::current().block_on(access.config())).await;
        let (mut config, plug_in) = read.map_err(|error| AccessError {
            at: "the files of the connection".to_owned(),
            problem: error.to_string(),
            remedy: "try again",
        })??;
        config.connect_timeout = Some(CONNECT);
        // The callers detect silence: a watch may be silent for long.
        config.read_timeout = None;
        config.write_timeout = Some(CONNECT);
        config.disable_compression = false;
        config.default_retry = false;
        let server = shown(&config.cluster_url);
        let made = timeout(PREPARE, client(config.clone())).await;
        let made = made.map_err(|_| format!("the auth-provider of the kubeconfig does not end within {PREPARE:?}"));
        match (made.and_then(|made| made.map_err(|error| in_words(&error))), plug_in) {
            (Ok(client), None) => Ok(Connection { client, server }),
            // The client without credentials shows that the other settings can be used.
            (Ok(_), Some(plug_in)) => Ok(Connection { client: credentials::client(config, plug_in).await, server }),
            (Err(problem), _) => {
                Err(AccessError { at: server, problem, remedy: "check the certificates and credentials given for it" })
            }
        }
    }

    /// Returns only the client of [`connect`](Self::connect).
    ///
    /// # Errors
    /// As [`connect`](Self::connect).
    ///
    /// # Cancel safety
    /// As [`connect`](Self::connect).
    pub async fn client(&self) -> Result<kube::Client, AccessError> {
        self.connect().await.map(|connection| connection.client)
    }

    /// Reads the settings. Blocks on disk I/O.
    async fn config(&self) -> Result<(kube::Config, Option<PlugIn>), AccessError> {
        let url = match &self.url {
            Some(url) => Some(parse_url(url)?),
            None => None,
        };
        let Some(path) = &self.kubeconfig else {
            let config = match url {
                Some(url) => Ok(kube::Config::new(url)),
                None => kube::Config::incluster().map_err(|error| AccessError {
                    at: "the account of this program's Pod".to_owned(),
                    problem: flannel_core::text::chain(&error),
                    remedy: "run in a Pod with a service account, or give a kubeconfig file or the API server's URL",
                }),
            };
            return config.map(|config| (config, None));
        };
        let at = || path.display().to_string();
        let refused = |error: kube::config::KubeconfigError| AccessError {
            at: at(),
            // The parser's further lines show the position as a drawing.
            problem: first_line(&error.to_string()).to_owned(),
            remedy: "give the path of a kubeconfig file that this program can read, with a current context",
        };
        let file = Kubeconfig::read_from(path).map_err(refused)?;
        let mut config =
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(refused)?;
        if let Some(url) = url {
            // A plug-in may ask which cluster its credentials are for.
            if let Some(cluster) = config.auth_info.exec.as_mut().and_then(|exec| exec.cluster.as_mut()) {
                cluster.server.clone_from(&self.url);
            }
            config.cluster_url = url;
        }
        if let Some(path) = &config.auth_info.token_file {
            check_token(path)?;
        }
        let plug_in = PlugIn::take(&mut config.auth_info).map_err(|problem| AccessError {
            at: at(),
            problem: problem.to_owned(),
            remedy: "correct users[].user.exec: it needs apiVersion client.authentication.k8s.io/v1 or v1beta1, a command, and interactiveMode \
                     Never or IfAvailable",
        })?;
        Ok((config, plug_in))
    }
}

/// Returns a URL without credentials.
fn shown(url: &http::Uri) -> String {
    let (scheme, host) = (url.scheme_str().unwrap_or("https"), url.host().unwrap_or_default());
    let port = url.port().map(|port| format!(":{port}")).unwrap_or_default();
    format!("{scheme}://{host}{port}{}", url.path().trim_end_matches('/'))
}

/// Checks a token file. The client sends its contents unchanged, and a header cannot contain a line break.
fn check_token(path: &str) -> Result<(), AccessError> {
    let refused = |problem: String, remedy| AccessError { at: format!("token file {path}"), problem, remedy };
    let token = std::fs::read_to_string(path)
        .map_err(|error| refused(error.to_string(), "give the path of a file that this program can read"))?;
    match token.trim() == token && !token.is_empty() {
        true => Ok(()),
        false => Err(refused(
            "it is empty, or begins or ends with a space or a line break".to_owned(),
            "write the token and nothing else: printf %s \"$TOKEN\" >FILE",
        )),
    }
}

impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let url = self.url.as_deref().map(without_user);
        f.debug_struct("Access").field("kubeconfig", &self.kubeconfig).field("url", &url).finish()
    }
}

/// Creates a client on its own thread: this may run a program and wait for it.
async fn client(config: kube::Config) -> Result<kube::Client, kube::Error> {
    let (sender, made) = oneshot::channel();
    let runtime = Handle::current();
    let make = move || {
        let _entered = runtime.enter();
        // An error means that the caller was cancelled.
        let _ = sender.send(kube::Client::try_from(config));
    };
    let thread = thread::Builder::new().name("kube-client".to_owned()).spawn(make);
    thread.map_err(|error| kube::Error::Service(Box::new(error)))?;
    made.await.unwrap_or_else(|error| Err(kube::Error::Service(Box::new(error))))
}

/// Returns the part of a URL after its credentials.
fn without_user(url: &str) -> &str {
    url.rsplit_once('@').map_or(url, |(_, rest)| rest)
}

fn parse_url(text: &str) -> Result<http::Uri, AccessError> {
    let refused = |problem: String| AccessError {
        at: format!("API server URL {:?}", without_user(text)),
        problem,
        remedy: "give it as https://HOST:PORT",
    };
    if without_user(text) != text {
        return Err(refused("it contains credentials, which are not used".to_owned()));
    }
    let url: http::Uri = text.parse().map_err(|error: http::uri::InvalidUri| refused(error.to_string()))?;
    match url.scheme_str() {
        Some("http" | "https") if url.host().is_some() => Ok(url),
        _ => Err(refused("it has no scheme or no host".to_owned())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: &str = "apiVersion: v1\nkind: Config\ncurrent-context: a\n\
        clusters: [{name: a, cluster: {server: 'https://user:secret@[2001:db8::1]:6443/'}}]\n\
        contexts: [{name: a, context: {cluster: a, user: a}}]\n";

    /// Connects with a kubeconfig file of this text and a token file of this text.
    async fn connect(text: &str, token: &str) -> Result<String, String> {
        let dir = tempfile::tempdir().unwrap();
        let (file, token_file) = (dir.path().join("kubeconfig"), dir.path().join("token"));
        std::fs::write(&token_file, token).unwrap();
        std::fs::write(&file, text.replace("TOKEN", token_file.to_str().unwrap())).unwrap();
        let connected = Access::kubeconfig(&file).connect().await;
        connected.map(|found| found.server).map_err(|error| {
            assert!(!error.to_string().contains('\n') && !error.remedy.is_empty(), "{error}");
            error.to_string()
        })
    }

    fn with_user(user: &str) -> String {
        format!("{CLUSTER}users: [{{name: a, user: {{{user}}}}}]\n")
    }

    #[tokio::test]
    async fn a_server_is_shown_without_credentials() {
        assert_eq!(connect(&with_user("tokenFile: TOKEN"), "t0ken").await.unwrap(), "https://[2001:db8::1]:6443");
        let at = async |url: &str| Access::in_cluster().at(url).connect().await.map(|found| found.server);
        assert_eq!(at("http://10.0.0.1:8080/").await.unwrap(), "http://10.0.0.1:8080");
        for (url, problem) in [("10.0.0.1:8080", "no scheme"), ("https://", "empty"), ("ftp://a", "no scheme")] {
            let error = at(url).await.unwrap_err().to_string();
            assert!(error.contains(problem) && error.contains("https://HOST:PORT"), "{error}");
        }
        for url in ["https://u:s3cret@10.0.0.1:6443", "u:s3cret@10.0.0.1", "ftp://u:s3cret@a"] {
            let error = at(url).await.unwrap_err().to_string();
            assert!(!error.contains("s3cret") && error.contains("credentials"), "{error}");
            assert!(!format!("{:?}", Access::in_cluster().at(url)).contains("s3cret"));
        }
        let proxied =
            with_user("tokenFile: TOKEN").replace("6443/'", "6443/', proxy-url: 'socks5://u:s3cret@10.0.0.2:1'");
        let error = connect(&proxied, "t0ken").await.unwrap_err();
        assert!(error.contains("proxy") && !error.contains("s3cret"), "{error}");
    }

    #[tokio::test]
    async fn what_is_wrong_with_a_kubeconfig_is_told_with_its_place() {
        for (text, problem) in [
            ("a: [1\n b: }", "parse"),
            ("", "current context"),
            (&with_user("tokenFile: /nowhere/token"), "/nowhere/token: No such file"),
            (&with_user("exec: {interactiveMode: Never}"), "kubeconfig: the credential plug-in has no command"),
            (&with_user("exec: {command: a, interactiveMode: Always}"), "the credential plug-in needs a terminal"),
        ] {
            let error = connect(text, "").await.unwrap_err();
            assert!(error.contains(problem) && error.contains('/'), "{text:?}: {error}");
        }
        let missing = Access::kubeconfig("/nowhere/kubeconfig").connect().await.map(|found| found.server).unwrap_err();
        assert!(missing.to_string().contains("/nowhere/kubeconfig: "), "{missing}");
    }

    #[tokio::test]
    async fn a_token_file_holds_a_token_and_nothing_else() {
        let text = with_user("tokenFile: TOKEN");
        for token in ["t0ken\n", " t0ken", ""] {
            let error = connect(&text, token).await.unwrap_err();
            assert!(error.contains("printf") && !error.contains("t0ken"), "{error}");
        }
    }
}
