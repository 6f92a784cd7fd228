//! A client of the API server, as flannel's flags describe it.

use std::path::PathBuf;
use std::time::Duration;

use kube::config::{KubeConfigOptions, Kubeconfig};

use crate::api::first_line;

/// How to reach the API server.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Access {
    /// A kubeconfig file. Default: none.
    pub kubeconfig: Option<PathBuf>,
    /// The server's URL, in place of the one in the kubeconfig. Default: none.
    pub url: Option<String>,
}

/// There is no client with this [`Access`]. Final until an operator has mended what it names.
#[derive(Debug, thiserror::Error)]
#[error("{at}: {problem}; {remedy}")]
#[non_exhaustive]
pub struct AccessError {
    /// The place: a file, a URL, the Pod's own account.
    pub at: String,
    /// What is wrong.
    pub problem: String,
    /// What to do about it.
    pub remedy: &'static str,
}

/// The longest time that a connection may take to come about.
const CONNECT: Duration = Duration::from_secs(5);

impl Access {
    /// The account of the Pod that this program runs in.
    pub fn in_cluster() -> Self {
        Self::default()
    }

    /// What a kubeconfig file says.
    pub fn kubeconfig(path: impl Into<PathBuf>) -> Self {
        Self { kubeconfig: Some(path.into()), url: None }
    }

    /// The same, with the server at this URL. Without a kubeconfig: with no credentials.
    #[must_use]
    pub fn at(self, url: impl Into<String>) -> Self {
        Self { url: Some(url.into()), ..self }
    }

    /// A client. Nothing is sent yet. A token file is read again every minute, so that a token that is rotated on disk is
    /// used in time.
    ///
    /// Compressed answers are asked for; requests are not repeated by the client.
    ///
    /// # Errors
    /// [`AccessError`] names the file or URL. Final until that is mended.
    ///
    /// # Cancel safety
    /// Reads files only.
    pub async fn client(&self) -> Result<kube::Client, AccessError> {
        // A process has one provider, and another part of it may have chosen one.
        if rustls::crypto::CryptoProvider::get_default().is_none() {
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let mut config = self.config().await?;
        config.connect_timeout = Some(CONNECT);
        // What is silent is noticed by those who wait: a watch may be silent for long.
        config.read_timeout = None;
        config.write_timeout = Some(CONNECT);
        config.disable_compression = false;
        config.default_retry = false;
        let at = config.cluster_url.to_string();
        kube::Client::try_from(config).map_err(|error| AccessError {
            at,
            problem: error.to_string(),
            remedy: "check the certificates and credentials given for it",
        })
    }

    async fn config(&self) -> Result<kube::Config, AccessError> {
        let url = match &self.url {
            Some(url) => Some(parse_url(url)?),
            None => None,
        };
        let Some(path) = &self.kubeconfig else {
            return match url {
                Some(url) => Ok(kube::Config::new(url)),
                None => kube::Config::incluster().map_err(|error| AccessError {
                    at: "the account of this program's Pod".to_owned(),
                    problem: flannel_core::text::chain(&error),
                    remedy: "run in a Pod with a service account, or give a kubeconfig file or the API server's URL",
                }),
            };
        };
        let at = || path.display().to_string();
        let refused = |error: kube::config::KubeconfigError| AccessError {
            at: at(),
            // Below it the parser draws the place.
            problem: first_line(&error.to_string()).to_owned(),
            remedy: "give the path of a kubeconfig file that this program can read, with a current context",
        };
        let file = Kubeconfig::read_from(path).map_err(refused)?;
        let mut config =
            kube::Config::from_custom_kubeconfig(file, &KubeConfigOptions::default()).await.map_err(refused)?;
        if let Some(url) = url {
            config.cluster_url = url;
        }
        Ok(config)
    }
}

fn parse_url(text: &str) -> Result<http::Uri, AccessError> {
    let refused = |problem: String| AccessError {
        at: format!("API server URL {text:?}"),
        problem,
        remedy: "give it as https://HOST:PORT",
    };
    let url: http::Uri = text.parse().map_err(|error: http::uri::InvalidUri| refused(error.to_string()))?;
    match url.scheme_str() {
        Some("http" | "https") if url.host().is_some() => Ok(url),
        _ => Err(refused("it has no scheme or no host".to_owned())),
    }
}
