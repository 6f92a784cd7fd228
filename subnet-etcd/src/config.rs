//! The configuration of the connection to etcd and of the leases.

use std::fmt;
use std::net::Ipv6Addr;
use std::path::PathBuf;
use std::time::Duration;

/// The endpoints of etcd, the authentication, and the lifetime of leases.
///
/// Checked as a whole by [`EtcdSubnets::new`](crate::EtcdSubnets::new) or by [`check`](Self::check).
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// The members, such as `https://10.0.0.1:2379`. At least one; all `https`, or all `http`. The default scheme is
    /// `https` if [`tls`](Self::tls) is set, else `http`.
    pub endpoints: Vec<String>,
    /// The prefix of all keys. Default: `/coreos.com/network`.
    pub prefix: KeyPrefix,
    /// The trusted authorities and the client certificate. Default: none; `https` then trusts the system's roots.
    pub tls: Option<Tls>,
    /// The user and password. Default: none.
    pub credentials: Option<Credentials>,
    /// Whether credentials may be sent over `http`. Default: refused.
    pub clear_text: ClearText,
    /// The lifetime of a lease. Default: 24 h.
    pub ttl: Ttl,
    /// The timeouts.
    pub timeouts: Timeouts,
}

impl Config {
    /// Creates a configuration with these endpoints and defaults for everything else.
    pub fn new<S: Into<String>>(endpoints: impl IntoIterator<Item = S>) -> Self {
        Self {
            endpoints: endpoints.into_iter().map(Into::into).collect(),
            prefix: KeyPrefix::default(),
            tls: None,
            credentials: None,
            clear_text: ClearText::Refuse,
            ttl: Ttl::default(),
            timeouts: Timeouts::default(),
        }
    }

    /// Sets the key prefix.
    #[must_use]
    pub fn with_prefix(self, prefix: KeyPrefix) -> Self {
        Self { prefix, ..self }
    }

    /// Sets the TLS files.
    #[must_use]
    pub fn with_tls(self, tls: Tls) -> Self {
        Self { tls: Some(tls), ..self }
    }

    /// Sets the lifetime of leases.
    #[must_use]
    pub fn with_ttl(self, ttl: Ttl) -> Self {
        Self { ttl, ..self }
    }

    /// Checks whether [`EtcdSubnets::new`](crate::EtcdSubnets::new) accepts this configuration, for a program that
    /// reads its command line before it connects. Reads no file and sends nothing.
    ///
    /// # Errors
    /// [`ConfigError`] names what to change. Final for this configuration.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.checked_endpoints().map(drop)
    }

    /// Returns the endpoints with their scheme, after all checks.
    pub(crate) fn checked_endpoints(&self) -> Result<Vec<String>, ConfigError> {
        if self.endpoints.is_empty() {
            return Err(ConfigError::NoEndpoint);
        }
        let default = if self.tls.is_some() { Scheme::Https } else { Scheme::Http };
        let endpoints: Vec<_> =
            self.endpoints.iter().map(|text| endpoint(text, default)).collect::<Result<_, ConfigError>>()?;
        let is_clear = endpoints[0].0 == Scheme::Http;
        if endpoints.iter().any(|(scheme, _)| *scheme != endpoints[0].0) {
            return Err(ConfigError::MixedSchemes);
        }
        if is_clear && self.tls.is_some() {
            return Err(ConfigError::TlsOverClearText(endpoints[0].1.clone()));
        }
        if is_clear && self.credentials.is_some() && self.clear_text == ClearText::Refuse {
            return Err(ConfigError::CredentialsOverClearText(endpoints[0].1.clone()));
        }
        if self.credentials.as_ref().is_some_and(|credentials| credentials.user.is_empty()) {
            return Err(ConfigError::NoUser);
        }
        Ok(endpoints.into_iter().map(|(_, text)| text).collect())
    }
}

/// A configuration that would not work, or would expose a secret. Final: change what the error names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// There are no endpoints.
    #[error("no etcd endpoint is given; name at least one, as https://10.0.0.1:2379")]
    NoEndpoint,
    /// Text that is not an endpoint. It is omitted if it may contain a password.
    #[error("etcd endpoint {0:?} is not [http://|https://]HOST[:PORT]")]
    Endpoint(String),
    /// An endpoint contains a user.
    #[error("an etcd endpoint contains a user or password; give them as credentials")]
    UserInEndpoint,
    /// Some endpoints are `http`, others `https`.
    #[error("etcd endpoints mix http and https; give all of them one scheme")]
    MixedSchemes,
    /// TLS files are given, but would not be used.
    #[error("TLS files are given, but {0} is unencrypted; write https://")]
    TlsOverClearText(String),
    /// The password would be sent unencrypted.
    #[error("credentials would be sent to {0} unencrypted; write https://, or set ClearText::AllowCredentials")]
    CredentialsOverClearText(String),
    /// A password without a user.
    #[error("a password is given without a user name; give both")]
    NoUser,
    /// A lease's lifetime is out of range.
    #[error("a lease of {given:?} is not within {min:?} to {max:?}", min = Ttl::MIN, max = Ttl::MAX)]
    Ttl {
        /// The given lifetime.
        given: Duration,
    },
    /// The text is not a valid key prefix.
    #[error("key prefix {0:?} contains a control character; write one without")]
    Prefix(String),
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Scheme {
    Http,
    Https,
}

fn endpoint(text: &str, default: Scheme) -> Result<(Scheme, String), ConfigError> {
    let (scheme, rest) = match text.split_once("://") {
        Some(("http", rest)) => (Scheme::Http, rest),
        Some(("https", rest)) => (Scheme::Https, rest),
        None => (default, text),
        Some(_) => return Err(ConfigError::Endpoint(without_user(text))),
    };
    if rest.contains('@') {
        return Err(ConfigError::UserInEndpoint);
    }
    let rest = rest.strip_suffix('/').unwrap_or(rest);
    if !is_authority(rest) {
        return Err(ConfigError::Endpoint(without_user(text)));
    }
    let scheme_text = if scheme == Scheme::Http { "http" } else { "https" };
    Ok((scheme, format!("{scheme_text}://{rest}")))
}

/// Whether this is a host, or an IPv6 address in brackets, with an optional port.
fn is_authority(text: &str) -> bool {
    let (is_host, port) = match text.strip_prefix('[').map(|text| text.split_once(']')) {
        Some(None) => return false,
        Some(Some((address, port))) => (address.parse::<Ipv6Addr>().is_ok(), port),
        None => {
            let (host, port) = text.split_at(text.find(':').unwrap_or(text.len()));
            let ok = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            (!host.is_empty() && host.chars().all(ok), port)
        }
    };
    let is_port = |port: &str| port.parse::<u16>().is_ok() && !port.starts_with('+');
    is_host && (port.is_empty() || port.strip_prefix(':').is_some_and(is_port))
}

fn without_user(text: &str) -> String {
    text.rsplit('@').next().unwrap_or_default().chars().take(100).collect()
}

/// The prefix of all keys, cleaned as flannel does (docs/compatibility.md, "Keys"): a trailing slash is removed, a
/// missing leading one stays missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KeyPrefix(String);

impl KeyPrefix {
    /// Cleans `text` as Go's `path.Join` does.
    ///
    /// # Errors
    /// [`ConfigError::Prefix`]. Final for this text.
    pub fn new(text: &str) -> Result<Self, ConfigError> {
        if text.chars().any(char::is_control) {
            return Err(ConfigError::Prefix(text.chars().take(100).collect()));
        }
        let is_rooted = text.starts_with('/');
        let mut parts: Vec<&str> = Vec::new();
        for part in text.split('/') {
            match part {
                "" | "." => {}
                ".." if parts.last().is_some_and(|last| *last != "..") => drop(parts.pop()),
                ".." if is_rooted => {}
                part => parts.push(part),
            }
        }
        let root = if is_rooted { "/" } else { "" };
        Ok(Self(format!("{root}{}", parts.join("/"))))
    }

    /// Returns the cleaned text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns the key of the network's configuration.
    pub(crate) fn config(&self) -> String {
        self.join("config")
    }

    /// Returns the prefix of the keys of all subnets.
    pub(crate) fn subnets(&self) -> String {
        self.join("subnets/")
    }

    fn join(&self, name: &str) -> String {
        let slash = if self.0.is_empty() || self.0.ends_with('/') { "" } else { "/" };
        format!("{}{slash}{name}", self.0)
    }
}

impl Default for KeyPrefix {
    fn default() -> Self {
        Self("/coreos.com/network".to_owned())
    }
}

impl fmt::Display for KeyPrefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// TLS files, in PEM. They are read again for every new connection, so rotated files take effect without a restart.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Tls {
    /// The authorities that may sign the members' certificates. Default: the system's roots.
    pub ca: Option<PathBuf>,
    /// The client certificate. Default: none.
    pub client: Option<ClientCertificate>,
    /// The expected name in the members' certificates. Default: the endpoint's host.
    pub server_name: Option<String>,
}

impl Tls {
    /// Trusts only the authorities in this file.
    pub fn of_authority(ca: impl Into<PathBuf>) -> Self {
        Self { ca: Some(ca.into()), ..Self::default() }
    }
}

/// A client certificate with its key, in PEM files.
#[derive(Debug, Clone)]
pub struct ClientCertificate {
    /// The certificate, including its chain.
    pub certificate: PathBuf,
    /// The private key.
    pub key: PathBuf,
}

/// An etcd user.
#[derive(Debug, Clone)]
pub struct Credentials {
    /// The user's name.
    pub user: String,
    /// The user's password.
    pub password: Password,
}

/// The source of the password.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Password {
    /// This text.
    Text(Secret),
    /// This file, read again for every new connection; trailing line ends are ignored.
    File(PathBuf),
}

/// Text that is never shown: `Debug` prints stars.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(String);

impl Secret {
    /// Wraps `text`.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    pub(crate) fn reveal(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("***")
    }
}

/// Whether credentials may be sent over `http`, where others on the path can read them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClearText {
    /// No: it is a [`ConfigError`].
    #[default]
    Refuse,
    /// Yes: the path is trusted.
    AllowCredentials,
}

/// How long a lease lasts unless renewed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Ttl(Duration);

impl Ttl {
    /// The shortest lifetime: a minute. A shorter lease could expire during an election in etcd.
    pub const MIN: Duration = Duration::from_secs(60);

    /// The longest lifetime: a year.
    pub const MAX: Duration = Duration::from_secs(366 * 24 * 3600);

    /// Checks `duration` and rounds it down to whole seconds, etcd's unit.
    ///
    /// # Errors
    /// [`ConfigError::Ttl`]. Final for this value.
    pub fn new(duration: Duration) -> Result<Self, ConfigError> {
        if !(Self::MIN..=Self::MAX).contains(&duration) {
            return Err(ConfigError::Ttl { given: duration });
        }
        Ok(Self(Duration::from_secs(duration.as_secs())))
    }

    /// Returns the lifetime.
    pub fn duration(self) -> Duration {
        self.0
    }

    pub(crate) fn seconds(self) -> i64 {
        i64::try_from(self.0.as_secs()).unwrap_or(i64::MAX)
    }
}

impl Default for Ttl {
    /// 24 h, as in flannel (docs/compatibility.md, "Time to live").
    fn default() -> Self {
        Self(Duration::from_secs(86_400))
    }
}

/// Timeouts. Any value is accepted; with zero, all requests fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Timeouts {
    /// For one endpoint: TCP, TLS, log-in and a first read. Default: 3 s.
    pub connect: Duration,
    /// For one request; each page of a listing is one. Default: 5 s.
    pub request: Duration,
    /// How long a connection may be silent before it is checked with an HTTP/2 ping. Default: 10 s. etcd closes
    /// connections that send a ping every 4 s or more often.
    pub keep_alive: Duration,
    /// How long the answer to a ping may take before the connection counts as dead. Default: 4 s, so that a frozen
    /// member is detected within 15 s.
    pub keep_alive_answer: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(3),
            request: Duration::from_secs(5),
            keep_alive: Duration::from_secs(10),
            keep_alive_answer: Duration::from_secs(4),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn credentials() -> Credentials {
        Credentials { user: "flannel".to_owned(), password: Password::Text(Secret::new("swordfish")) }
    }

    #[test]
    fn endpoints_get_their_scheme_from_tls() {
        let plain = Config::new(["10.0.0.1:2379", "http://etcd-2:2379/"]);
        assert_eq!(plain.checked_endpoints().unwrap(), ["http://10.0.0.1:2379", "http://etcd-2:2379"]);
        let tls = Config { tls: Some(Tls::default()), ..Config::new(["[fd00::1]:2379", "https://etcd-2"]) };
        assert_eq!(tls.checked_endpoints().unwrap(), ["https://[fd00::1]:2379", "https://etcd-2"]);
    }

    #[test]
    fn endpoints_that_are_none_are_refused() {
        let hosts = ["", "http://", "ftp://a:1", "a b:1", "http://a:1/path", "unix:///run/etcd", ":2379", "a]b", "a%b"];
        let ports = ["a:99999", "a:x", "a:", "a:+1", "a:1:2", "[::1]2379", "[::1]:", "[::1]:x"];
        let addresses = ["fd00::1", "[fd00::1", "fd00::1]", "[]", "[etcd]:2379", "[10.0.0.1]:2379"];
        for bad in hosts.into_iter().chain(ports).chain(addresses) {
            assert!(matches!(Config::new([bad]).check(), Err(ConfigError::Endpoint(_))), "{bad}");
        }
        assert_eq!(Config::new::<String>([]).check(), Err(ConfigError::NoEndpoint));
        assert_eq!(Config::new(["http://a", "https://b"]).check(), Err(ConfigError::MixedSchemes));
    }

    #[test]
    fn a_configuration_is_checked_as_a_store_would_before_there_is_one() {
        for (endpoints, is_good) in [(["a:2379"], true), (["etcd.example:port"], false)] {
            let config = Config::new(endpoints);
            assert_eq!(config.check().is_ok(), is_good);
            assert_eq!(config.check().err(), crate::EtcdSubnets::new(config).err());
        }
    }

    #[test]
    fn nothing_secret_goes_over_clear_text_unless_asked_for_by_name() {
        let mut config = Config { credentials: Some(credentials()), ..Config::new(["http://a:1"]) };
        assert!(matches!(config.checked_endpoints(), Err(ConfigError::CredentialsOverClearText(_))));
        config.clear_text = ClearText::AllowCredentials;
        assert!(config.checked_endpoints().is_ok());
        config.tls = Some(Tls::default());
        assert!(matches!(config.checked_endpoints(), Err(ConfigError::TlsOverClearText(_))));
    }

    #[test]
    fn secrets_are_never_shown() {
        let config = Config { credentials: Some(credentials()), ..Config::new(["https://a:1"]) };
        assert!(!format!("{config:?}").contains("swordfish"));
        for endpoint in ["https://root:swordfish@a:1", "root:swordfish@a:1", "x://root:swordfish@a:1"] {
            let error = Config::new([endpoint]).checked_endpoints().unwrap_err();
            assert!(!format!("{error} {error:?}").contains("swordfish"), "{error}");
        }
    }

    #[test]
    fn prefixes_are_cleaned_as_go_does() {
        for (text, config, subnets) in [
            ("/coreos.com/network", "/coreos.com/network/config", "/coreos.com/network/subnets/"),
            ("/coreos.com/network/", "/coreos.com/network/config", "/coreos.com/network/subnets/"),
            ("coreos.com//network", "coreos.com/network/config", "coreos.com/network/subnets/"),
            ("/", "/config", "/subnets/"),
            ("", "config", "subnets/"),
            ("/a/./b/../c", "/a/c/config", "/a/c/subnets/"),
            ("/../a", "/a/config", "/a/subnets/"),
            ("a/..", "config", "subnets/"),
            ("../a", "../a/config", "../a/subnets/"),
        ] {
            let prefix = KeyPrefix::new(text).unwrap();
            assert_eq!((prefix.config().as_str(), prefix.subnets().as_str()), (config, subnets), "{text}");
        }
        assert!(KeyPrefix::new("/a\n").is_err());
    }

    #[test]
    fn a_lease_lasts_a_minute_to_a_year() {
        assert_eq!(Ttl::default().seconds(), 86_400);
        assert_eq!(Ttl::new(Duration::from_millis(90_500)).unwrap().seconds(), 90);
        for bad in [Duration::ZERO, Duration::from_secs(59), Duration::MAX] {
            assert_eq!(Ttl::new(bad), Err(ConfigError::Ttl { given: bad }));
        }
    }
}
