//! etcd errors, with endpoint and remedy.

use std::error::Error;
use std::path::Path;
use std::time::Duration;

use flannel_core::subnet::SubnetError;
use flannel_core::text::Plain;

/// A request to etcd failed. This is the source of [`SubnetError::Unavailable`] and [`SubnetError::Denied`], which
/// document whether to retry. Contains no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}: {}; {remedy}", Plain(endpoint), Plain(problem))]
#[non_exhaustive]
pub struct EtcdError {
    /// The member or members.
    pub endpoint: String,
    /// The error from the member or the connection.
    pub problem: String,
    /// How to fix the error.
    pub remedy: &'static str,
}

/// A failed request, without its purpose.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) error: EtcdError,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No answer, or an answer that does not show whether the request was carried out.
    Cut,
    /// The log-in has to be repeated; the request was not carried out.
    Token,
    /// Access was denied; the request was not carried out.
    Denied,
    /// The requested revision is gone.
    Compacted,
    /// The answer is larger than the limit.
    TooLarge,
    /// The etcd lease of the write has ended; the request was not carried out.
    Ended,
}

impl Fault {
    pub(crate) fn of(endpoint: &str, error: &etcd_client::Error) -> Self {
        let (kind, remedy) = match error {
            etcd_client::Error::GRpcStatus(status) => judge(i32::from(status.code()), status.message()),
            _ => (Kind::Cut, CHECK),
        };
        let problem = match error {
            etcd_client::Error::GRpcStatus(status) => chain(status.message(), Error::source(status)),
            etcd_client::Error::TransportError(error) => chain(&error.to_string(), error.source()),
            other => other.to_string(),
        };
        Self::new(kind, endpoint, problem, remedy)
    }

    pub(crate) fn late(endpoint: &str, after: Duration) -> Self {
        Self::new(Kind::Cut, endpoint, format!("no answer within {after:?}"), CHECK)
    }

    pub(crate) fn file(endpoint: &str, path: &Path, error: &std::io::Error) -> Self {
        let problem = format!("cannot read {}: {error}", path.display());
        Self::new(Kind::Denied, endpoint, problem, "make the file readable for this process")
    }

    pub(crate) fn cut(endpoint: &str, problem: impl Into<String>) -> Self {
        Self::new(Kind::Cut, endpoint, problem.into(), CHECK)
    }

    /// The member cancelled a watch. It gives a reason as text, without a status code.
    pub(crate) fn cancelled(endpoint: &str, reason: String) -> Self {
        // The codes that a call would have: permission denied, or invalid argument.
        let code = if reason.contains("permission denied") { 7 } else { 3 };
        let (kind, remedy) = judge(code, &reason);
        Self::new(kind, endpoint, reason, remedy)
    }

    fn new(kind: Kind, endpoint: &str, problem: String, remedy: &'static str) -> Self {
        let remedy = match tls_remedy(&problem) {
            Some(remedy) => remedy,
            None if remedy == CHECK && endpoint.starts_with("https:") => CHECK_TLS,
            None => remedy,
        };
        Self { kind, error: EtcdError { endpoint: endpoint.to_owned(), problem, remedy } }
    }

    /// Whether the request may nevertheless have been carried out.
    pub(crate) fn is_unsettled(&self) -> bool {
        !matches!(self.kind, Kind::Token | Kind::Denied | Kind::Ended)
    }

    pub(crate) fn into_subnet_error(self, doing: &'static str) -> SubnetError {
        let source = Box::new(self.error);
        match self.kind {
            Kind::Token | Kind::Denied => SubnetError::Denied { doing, source },
            Kind::Cut | Kind::Compacted | Kind::TooLarge | Kind::Ended => SubnetError::Unavailable { doing, source },
        }
    }
}

const CHECK: &str = "check that this member is running and reachable";

/// A TLS 1.3 member refuses a client without a certificate after the client completed the handshake. Its alert, a reset
/// and a broken pipe arrive in any order, so any cut connection over TLS may have this cause.
const CHECK_TLS: &str = "check that this member is running and reachable, and whether it requires a client certificate";

/// The gRPC status codes are part of the protocol: 3 invalid argument, 5 not found, 7 permission denied, 8 resource
/// exhausted, 9 failed precondition, 11 out of range, 16 unauthenticated.
fn judge(code: i32, message: &str) -> (Kind, &'static str) {
    let says = |text: &str| message.contains(text);
    match code {
        16 => (Kind::Token, "check user and password"),
        3 if says("invalid auth token") || says("revision of auth store is old") => (Kind::Token, "log in again"),
        // A connection without a log-in, and authentication was enabled later.
        3 if says("user name is empty") => (Kind::Token, "etcd requires authentication: give user and password"),
        3 if says("authentication failed") => (Kind::Denied, "check user and password"),
        5 if says("requested lease not found") => (Kind::Ended, "write with a new lease"),
        7 => (
            Kind::Denied,
            "grant read and write access to a role of the user: etcdctl role grant-permission ROLE readwrite \
             --prefix=true PREFIX/",
        ),
        9 if says("authentication is not enabled") => {
            (Kind::Denied, "enable authentication in etcd (etcdctl auth enable), or give no credentials")
        }
        8 if says("database space exceeded") => (
            Kind::Cut,
            "compact and defragment etcd (etcdctl compact, etcdctl defrag), then clear its alarm (etcdctl alarm disarm)",
        ),
        11 if says("compacted") => (Kind::Compacted, "list again"),
        11 if says("decoded message length too large") => {
            (Kind::TooLarge, "delete keys under PREFIX/subnets/ that are not leases")
        }
        _ => (Kind::Cut, CHECK),
    }
}

const CA: &str = "give the certificate of the authority that signed the member's certificate as CA file";

fn tls_remedy(problem: &str) -> Option<&'static str> {
    // The texts of rustls; if rustls changes a text, the general remedy is used.
    let remedies = [
        ("UnknownIssuer", CA),
        ("BadSignature", CA),
        (
            "not valid for name",
            "use a host name or address of the member's certificate in the endpoint, or reissue the certificate \
             with this one as subjectAltName",
        ),
        ("certificate expired", "renew the member's certificate, or correct this machine's clock (timedatectl)"),
        ("certificate not valid yet", "correct the clock of this machine (timedatectl), or of the authority"),
        (
            "UnsupportedCertVersion",
            "a certificate is of X.509 version 1, the client's or the member's: reissue it with extensions, which \
             makes it version 3 (openssl x509 -extfile)",
        ),
        ("CertificateRequired", "the member requires a client certificate: give one with its key"),
        (
            "received fatal alert",
            "the member rejects the client certificate: check that it is in date and signed by the authority that the \
             member trusts (openssl x509 -in FILE -noout -text)",
        ),
    ];
    remedies.into_iter().find(|(sign, _)| problem.contains(sign)).map(|(_, remedy)| remedy)
}

/// Returns the causes in one line, each once.
fn chain(first: &str, source: Option<&(dyn Error + 'static)>) -> String {
    let mut text = first.to_owned();
    let mut next = source;
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text.push_str(": ");
            text.push_str(&said);
        }
        next = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_with_a_lease_that_has_ended_did_nothing() {
        let (kind, _) = judge(5, "etcdserver: requested lease not found");
        assert!(!Fault { kind, ..Fault::cut("etcd", "") }.is_unsettled());
    }

    #[test]
    fn a_cancelled_watch_says_what_to_do() {
        let denied = Fault::cancelled(
            "etcd",
            "rpc error: code = PermissionDenied desc = etcdserver: permission denied".to_owned(),
        );
        assert!(denied.kind == Kind::Denied && denied.error.remedy.contains("grant-permission"), "{}", denied.error);
        let token = Fault::cancelled("etcd", "etcdserver: invalid auth token".to_owned());
        assert_eq!((token.kind, token.error.remedy), (Kind::Token, "log in again"));
        let other = Fault::cancelled("etcd", "the watch was cancelled".to_owned());
        assert_eq!((other.kind, other.error.remedy), (Kind::Cut, CHECK));
    }

    #[test]
    fn a_cut_over_tls_names_the_client_certificate_however_it_is_worded() {
        for problem in ["stream closed because of a broken pipe", "Connection reset by peer", "connection closed"] {
            let said = |endpoint: &str| Fault::cut(endpoint, problem).error.to_string();
            assert!(said("https://etcd.example:2379").contains("client certificate"), "{problem}");
            assert!(!said("http://etcd.example:2379").contains("client certificate"), "{problem}");
        }
        let alert = Fault::cut("https://etcd.example:2379", "received fatal alert: CertificateRequired");
        assert_eq!(alert.error.remedy, "the member requires a client certificate: give one with its key");
    }
}
