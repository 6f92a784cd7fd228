//! API server errors, with the remedy.

use std::error::Error;
use std::time::Duration;

use flannel_core::subnet::SubnetError;
use flannel_core::text::chain;
use http::StatusCode;
use kube::client::AuthError;

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
        let problem = in_words(error);
        let remedy = tls_remedy(&problem).unwrap_or(CHECK);
        Self::new(Kind::NoAnswer, problem, remedy)
    }

    /// Returns the fault of a refused request, with the message of the server's Status object.
    pub(crate) fn status(code: StatusCode, said: &str, retry_after: Option<Duration>, rule: Rule) -> Self {
        let said: String = said.chars().take(SAID).collect();
        let problem = if said.is_empty() { code.to_string() } else { format!("{code}: {said}") };
        match code {
            StatusCode::UNAUTHORIZED => {
                Self::new(Kind::Denied, problem, "check the token or client certificate, and whether it has expired")
            }
            // The authorizer's text: `User "x" cannot patch resource "nodes/status" ...`.
            StatusCode::FORBIDDEN if said.is_empty() || said.contains(&format!("cannot {} ", rule.verb())) => {
                let remedy = format!("add to the rules of this program's role: {}", rule.yaml());
                Self::new(Kind::Denied, problem, remedy)
            }
            StatusCode::FORBIDDEN => Self::new(Kind::Denied, problem, POLICY),
            StatusCode::NOT_FOUND => Self::new(Kind::Missing, problem, "check the name"),
            // Others changed the object each time that the server tried to apply the patch.
            StatusCode::CONFLICT => Self::new(Kind::Refused, problem, "try again"),
            // A patch with the uid of a Node that was replaced by another.
            StatusCode::UNPROCESSABLE_ENTITY if said.contains("metadata.uid") => {
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

/// Returns why a request got no answer. Leaves out the output of a credential plug-in, which may be a token.
pub(crate) fn in_words(error: &kube::Error) -> String {
    match error {
        kube::Error::Auth(AuthError::AuthExecRun { out, .. }) => {
            format!("the credential plug-in of the kubeconfig failed with {}", out.status)
        }
        kube::Error::Auth(AuthError::AuthExecParse(_)) => {
            "the credential plug-in of the kubeconfig printed something other than an ExecCredential".to_owned()
        }
        // The URL may contain a password.
        kube::Error::ProxyProtocolUnsupported { .. } | kube::Error::ProxyProtocolDisabled { .. } => {
            "the proxy of the kubeconfig or of the environment is not http:// or https://".to_owned()
        }
        // The client's own message only names the part that failed.
        error => chain(error.source().unwrap_or(error)),
    }
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
