//! API server errors, with the remedy.

use std::error::Error;
use std::time::Duration;

use flannel_core::subnet::SubnetError;
use flannel_core::text::{Plain, chain};
use http::StatusCode;
use kube::client::AuthError;

use crate::plug_in::PlugInError;
use crate::protobuf::Malformed;

/// A request to the API server failed. This is the source of [`SubnetError::Unavailable`] and [`SubnetError::Denied`],
/// which document whether to retry. Contains no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Kubernetes API server: {problem}; {remedy}")]
#[non_exhaustive]
pub struct KubeError {
    /// The error from the server or the connection.
    pub problem: String,
    /// How to fix the error.
    pub remedy: String,
}

/// A failed request, without its purpose.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) error: KubeError,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No answer, or an answer that does not show whether the request was carried out.
    NoAnswer,
    /// Access was denied; the request was not carried out.
    Denied,
    /// The object does not exist.
    Missing,
    /// Another object has its name by now; the request was not carried out.
    Replaced,
    /// The requested version is gone.
    Gone,
    /// The server refused the request.
    Refused,
    /// The server asks to wait for this time; the request was not carried out.
    Busy(Option<Duration>),
}

/// The right that a request needs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    GetNode,
    ListNodes,
    WatchNodes,
    PatchNodeStatus,
    GetPod,
    CreateEvent,
    /// Asking for one's own rights, which every account may do unless an administrator revoked it.
    Review,
}

impl Rule {
    pub(crate) fn verb(self) -> &'static str {
        match self {
            Self::GetNode | Self::GetPod => "get",
            Self::ListNodes => "list",
            Self::WatchNodes => "watch",
            Self::PatchNodeStatus => "patch",
            Self::Review | Self::CreateEvent => "create",
        }
    }

    pub(crate) fn group(self) -> &'static str {
        match self {
            Self::GetNode
            | Self::ListNodes
            | Self::WatchNodes
            | Self::PatchNodeStatus
            | Self::GetPod
            | Self::CreateEvent => "",
            Self::Review => "authorization.k8s.io",
        }
    }

    /// Returns the resource, with the subresource after a slash.
    pub(crate) fn resource(self) -> &'static str {
        match self {
            Self::GetNode | Self::ListNodes | Self::WatchNodes => "nodes",
            Self::PatchNodeStatus => "nodes/status",
            Self::GetPod => "pods",
            Self::CreateEvent => "events",
            Self::Review => "selfsubjectaccessreviews",
        }
    }

    /// Returns the role's rule that allows it, as YAML on one line.
    pub(crate) fn yaml(self) -> String {
        let (group, resource, verb) = (self.group(), self.resource(), self.verb());
        format!("{{apiGroups: [\"{group}\"], resources: [{resource}], verbs: [{verb}]}}")
    }
}

/// What a server says about a request that it refused.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Said {
    pub(crate) message: String,
    /// The reason of a Status object, a word in CamelCase; empty if the answer is none.
    pub(crate) reason: String,
}

/// The longest kept part of a server's message, in characters.
const SAID: usize = 300;

impl Fault {
    fn new(kind: Kind, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { kind, error: KubeError { problem: problem.into(), remedy: remedy.into() } }
    }

    pub(crate) fn no_answer(problem: impl Into<String>) -> Self {
        Self::new(Kind::NoAnswer, problem, CHECK)
    }

    pub(crate) fn late(after: Duration) -> Self {
        Self::no_answer(format!("no answer within {after:?}"))
    }

    /// Adds the server's URL.
    pub(crate) fn at(mut self, server: &str) -> Self {
        if !server.is_empty() {
            self.error.problem = format!("{server}: {}", self.error.problem);
        }
        self
    }

    pub(crate) fn malformed(problem: impl std::fmt::Display) -> Self {
        Self::new(
            Kind::NoAnswer,
            problem.to_string(),
            "check that this is a Kubernetes API server, and proxies in front of it",
        )
    }

    /// Returns the fault of a request without an answer.
    pub(crate) fn of(error: &kube::Error) -> Self {
        if let Some(error) = found::<PlugInError>(error) {
            return Self::new(Kind::NoAnswer, error.to_string(), &error.remedy);
        }
        let problem = in_words(error);
        let remedy = tls_remedy(&problem).unwrap_or(CHECK);
        Self::new(Kind::NoAnswer, problem, remedy)
    }

    /// Returns the fault of a refused request, with what the server said.
    pub(crate) fn status(code: StatusCode, said: &Said, retry_after: Option<Duration>, rule: Rule) -> Self {
        let message: String = said.message.chars().take(SAID).collect();
        let problem = if message.is_empty() { code.to_string() } else { format!("{code}: {message}") };
        match code {
            StatusCode::UNAUTHORIZED => {
                Self::new(Kind::Denied, problem, "check the token or client certificate, and whether it has expired")
            }
            // The authorizer's text: `User "x" cannot patch resource "nodes/status" ...`.
            StatusCode::FORBIDDEN if message.is_empty() || message.contains(&format!("cannot {} ", rule.verb())) => {
                let remedy = format!("add to the rules of this program's role: {}", rule.yaml());
                Self::new(Kind::Denied, problem, remedy)
            }
            StatusCode::FORBIDDEN => Self::new(Kind::Denied, problem, POLICY),
            StatusCode::NOT_FOUND if said.reason == "NotFound" => Self::new(Kind::Missing, problem, "check the name"),
            // The answer of a proxy, or of another server, says nothing about the object.
            StatusCode::NOT_FOUND => {
                Self::new(Kind::Refused, problem, "check the URL of the API server, and proxies in front of it")
            }
            // Others changed the object each time that the server tried to apply the patch.
            StatusCode::CONFLICT => Self::new(Kind::Refused, problem, "try again"),
            // A patch with the uid of a Node that was replaced by another.
            StatusCode::UNPROCESSABLE_ENTITY if message.contains("metadata.uid") => {
                Self::new(Kind::Replaced, problem, "try again")
            }
            StatusCode::UNPROCESSABLE_ENTITY => Self::new(Kind::Denied, problem, POLICY),
            StatusCode::GONE => Self::new(Kind::Gone, problem, "list again"),
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE => {
                Self::new(Kind::Busy(retry_after), problem, CHECK)
            }
            _ => Self::new(Kind::Refused, problem, CHECK),
        }
    }

    pub(crate) fn into_subnet_error(self, doing: &'static str) -> SubnetError {
        let source = Box::new(self.error);
        match self.kind {
            Kind::Denied => SubnetError::Denied { doing, source },
            Kind::NoAnswer | Kind::Missing | Kind::Replaced | Kind::Gone | Kind::Refused | Kind::Busy(_) => {
                SubnetError::Unavailable { doing, source }
            }
        }
    }
}

impl From<Malformed> for Fault {
    fn from(error: Malformed) -> Self {
        Self::malformed(error)
    }
}

const CHECK: &str = "check that the API server is running and reachable";
const POLICY: &str =
    "an admission policy or plug-in of the cluster refuses it: change the policy, or what it objects to";

/// Returns why a request got no answer. Contains no secret.
pub(crate) fn in_words(error: &kube::Error) -> String {
    if let Some(error) = found::<AuthError>(error) {
        return auth_in_words(error);
    }
    // The body of an answer comes through two clients if a plug-in prints the credentials.
    if let kube::Error::Service(inner) = error
        && let Some(inner) = inner.downcast_ref()
    {
        return in_words(inner);
    }
    match error {
        // The URL may contain a password.
        kube::Error::ProxyProtocolUnsupported { .. } | kube::Error::ProxyProtocolDisabled { .. } => {
            "the proxy of the kubeconfig or of the environment is not http:// or https://".to_owned()
        }
        // The client's own message only names the part that failed.
        error => chain(error.source().unwrap_or(error)),
    }
}

/// Returns the error of this type among an error and its sources. If there are no credentials for a request, the client
/// returns that as the error of any layer.
fn found<E: Error + 'static>(error: &kube::Error) -> Option<&E> {
    let mut next: Option<&(dyn Error + 'static)> = Some(error);
    while let Some(error) = next {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        next = error.source();
    }
    None
}

/// Returns what is wrong with the credentials. Leaves out the error's own text: it may contain the environment of a
/// program and what it printed, such as a token.
fn auth_in_words(error: &AuthError) -> String {
    let words = match error {
        AuthError::AuthExecRun { out, .. } => {
            return format!("the program that the kubeconfig names for credentials failed with {}", out.status);
        }
        AuthError::ReadTokenFile(error, path) => {
            return format!("token file {} cannot be read: {}", Plain(path.display()), error.kind());
        }
        AuthError::MalformedTokenExpirationDate(_) => "the time at which the token expires is not one of RFC 3339",
        AuthError::InvalidBasicAuth(_) | AuthError::InvalidBearerToken(_) => {
            "the password or token contains a character that a header cannot contain, such as a line break"
        }
        // An auth-provider's, or that of a plug-in that kube itself runs. Which others there are depends on kube's
        // features.
        _ => "no credentials could be obtained in the way that the kubeconfig names",
    };
    words.to_owned()
}

fn tls_remedy(problem: &str) -> Option<&'static str> {
    // The texts of rustls; if rustls changes a text, the general remedy is used.
    let remedies = [
        ("UnknownIssuer", "give the certificate of the authority that signed the API server's certificate"),
        ("BadSignature", "give the certificate of the authority that signed the API server's certificate"),
        ("not valid for name", "use a host name or address of the API server's certificate"),
        ("certificate expired", "renew the API server's expired certificate, or check this machine's clock"),
        ("certificate not valid yet", "correct the clock of this machine (timedatectl), or of the authority"),
        ("InvalidContentType", "the server serves no TLS: give its address as http://, or its TLS port"),
    ];
    remedies.into_iter().find(|(sign, _)| problem.contains(sign)).map(|(_, remedy)| remedy)
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::os::unix::process::ExitStatusExt;
    use std::process::{ExitStatus, Output};

    use super::*;

    /// The error of a layer of the client, around another.
    #[derive(Debug, thiserror::Error)]
    #[error("a layer failed")]
    struct Layer(#[source] AuthError);

    fn failed_run() -> AuthError {
        let status = ExitStatus::from_raw(3 << 8);
        let out = Output { status, stdout: b"swordfish".to_vec(), stderr: b"swordfish".to_vec() };
        AuthError::AuthExecRun { cmd: "PASSWORD=\"swordfish\" plug-in".to_owned(), out: Box::new(out) }
    }

    /// A token that expires is fetched again for a request: the error is then any layer's.
    #[test]
    fn no_secret_of_a_program_for_credentials_is_shown_however_its_error_arrives() {
        type Make = fn() -> AuthError;
        let errors: [(Make, &str); 5] = [
            (failed_run, "failed with exit status: 3"),
            (|| AuthError::AuthExecStart(io::Error::other("swordfish")), "no credentials"),
            (|| AuthError::AuthExec("swordfish".to_owned()), "no credentials"),
            (|| AuthError::ReadTokenFile(io::Error::other("swordfish"), "/token".into()), "token file /token"),
            (|| AuthError::MalformedTokenExpirationDate(jiff::Error::from_args(format_args!("swordfish"))), "RFC 3339"),
        ];
        for (error, part) in errors {
            assert!(error().to_string().contains("swordfish"), "{part}: there is nothing to leave out");
            for error in [
                kube::Error::Auth(error()),
                kube::Error::Service(Box::new(error())),
                kube::Error::Service(Box::new(Layer(error()))),
            ] {
                let shown = Fault::of(&error).error.to_string();
                assert!(shown.contains(part) && !shown.contains("swordfish"), "{shown}");
            }
        }
        let other = kube::Error::Service(Box::new(io::Error::other("refused")));
        assert_eq!(in_words(&other), "refused");
        assert_eq!(in_words(&kube::Error::Service(Box::new(other))), "refused");
    }
}
