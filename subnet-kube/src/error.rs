//! What goes wrong with the API server, said with the remedy.

use std::error::Error;
use std::time::Duration;

use flannel_core::subnet::SubnetError;
use flannel_core::text::chain;
use http::StatusCode;
use kube::client::AuthError;

use crate::protobuf::Malformed;

/// A request to the API server failed: the source of [`SubnetError::Unavailable`] and [`SubnetError::Denied`], which say
/// whether to retry. Holds no secret.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("Kubernetes API server: {problem}; {remedy}")]
#[non_exhaustive]
pub struct KubeError {
    /// What it or the way to it says.
    pub problem: String,
    /// What to do about it.
    pub remedy: String,
}

/// A failed request, before it is said what it was for.
#[derive(Debug, Clone)]
pub(crate) struct Fault {
    pub(crate) kind: Kind,
    pub(crate) error: KubeError,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// No answer, or none that settles it.
    Cut,
    /// We may not; nothing was done.
    Denied,
    /// There is no such object.
    Missing,
    /// The object is another one by now; nothing was done.
    Conflict,
    /// The version asked for is gone.
    Gone,
    /// The server answers, and does not do it.
    Refused,
    /// The server asks to be left alone for so long; nothing was done.
    Busy(Option<Duration>),
}

/// What a request needs to be allowed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rule {
    GetNode,
    ListNodes,
    WatchNodes,
    PatchNodeStatus,
    GetPod,
    /// To ask for one's own rights: what every account may, unless somebody took that away.
    Review,
}

impl Rule {
    pub(crate) fn verb(self) -> &'static str {
        match self {
            Self::GetNode | Self::GetPod => "get",
            Self::ListNodes => "list",
            Self::WatchNodes => "watch",
            Self::PatchNodeStatus => "patch",
            Self::Review => "create",
        }
    }

    pub(crate) fn group(self) -> &'static str {
        match self {
            Self::GetNode | Self::ListNodes | Self::WatchNodes | Self::PatchNodeStatus | Self::GetPod => "",
            Self::Review => "authorization.k8s.io",
        }
    }

    /// With the subresource after a slash.
    pub(crate) fn resource(self) -> &'static str {
        match self {
            Self::GetNode | Self::ListNodes | Self::WatchNodes => "nodes",
            Self::PatchNodeStatus => "nodes/status",
            Self::GetPod => "pods",
            Self::Review => "selfsubjectaccessreviews",
        }
    }

    /// The rule of a role that allows it, as YAML on one line.
    pub(crate) fn yaml(self) -> String {
        let (group, resource, verb) = (self.group(), self.resource(), self.verb());
        format!("{{apiGroups: [\"{group}\"], resources: [{resource}], verbs: [{verb}]}}")
    }
}

/// The most of a server's own words that are kept, in characters.
const SAID: usize = 300;

impl Fault {
    fn new(kind: Kind, problem: impl Into<String>, remedy: impl Into<String>) -> Self {
        Self { kind, error: KubeError { problem: problem.into(), remedy: remedy.into() } }
    }

    pub(crate) fn cut(problem: impl Into<String>) -> Self {
        Self::new(Kind::Cut, problem, CHECK)
    }

    pub(crate) fn late(after: Duration) -> Self {
        Self::cut(format!("no answer within {after:?}"))
    }

    /// The same, with the server's URL.
    pub(crate) fn at(mut self, server: &str) -> Self {
        if !server.is_empty() {
            self.error.problem = format!("{server}: {}", self.error.problem);
        }
        self
    }

    pub(crate) fn malformed(problem: impl std::fmt::Display) -> Self {
        Self::new(
            Kind::Cut,
            problem.to_string(),
            "check that this is a Kubernetes API server, and what stands before it",
        )
    }

    /// The request did not get an answer.
    pub(crate) fn of(error: &kube::Error) -> Self {
        let problem = in_words(error);
        let remedy = tls_remedy(&problem).unwrap_or(CHECK);
        Self::new(Kind::Cut, problem, remedy)
    }

    /// The server refused: this is what it says in its Status object.
    pub(crate) fn status(code: StatusCode, said: &str, retry_after: Option<Duration>, rule: Rule) -> Self {
        let said: String = said.chars().take(SAID).collect();
        let problem = if said.is_empty() { code.to_string() } else { format!("{code}: {said}") };
        match code {
            StatusCode::UNAUTHORIZED => {
                Self::new(Kind::Denied, problem, "check the token or client certificate, and whether it has expired")
            }
            // As the authorizer words it: `User "x" cannot patch resource "nodes/status" ...`.
            StatusCode::FORBIDDEN if said.is_empty() || said.contains(&format!("cannot {} ", rule.verb())) => {
                let remedy = format!("add to the rules of this program's role: {}", rule.yaml());
                Self::new(Kind::Denied, problem, remedy)
            }
            StatusCode::FORBIDDEN => Self::new(Kind::Denied, problem, POLICY),
            StatusCode::NOT_FOUND => Self::new(Kind::Missing, problem, "check the name"),
            StatusCode::CONFLICT => Self::new(Kind::Conflict, problem, "try again"),
            // A patch with the uid of a Node that another one has taken the place of.
            StatusCode::UNPROCESSABLE_ENTITY if said.contains("metadata.uid") => {
                Self::new(Kind::Conflict, problem, "try again")
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
            Kind::Cut | Kind::Missing | Kind::Conflict | Kind::Gone | Kind::Refused | Kind::Busy(_) => {
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

const CHECK: &str = "check that the API server runs and can be reached";
const POLICY: &str = "an admission policy or plug-in of the cluster refuses it: change that, or what it names";

/// Returns why a request got no answer. Leaves out the output of a credential plug-in, which may be a token.
pub(crate) fn in_words(error: &kube::Error) -> String {
    match error {
        kube::Error::Auth(AuthError::AuthExecRun { out, .. }) => {
            format!("the credential plug-in of the kubeconfig failed with {}", out.status)
        }
        kube::Error::Auth(AuthError::AuthExecParse(_)) => {
            "the credential plug-in of the kubeconfig printed something that is no ExecCredential".to_owned()
        }
        // Its URL may hold a password.
        kube::Error::ProxyProtocolUnsupported { .. } | kube::Error::ProxyProtocolDisabled { .. } => {
            "the proxy of the kubeconfig or of the environment is not http:// or https://".to_owned()
        }
        // The client's own words only say which part of it failed.
        error => chain(error.source().unwrap_or(error)),
    }
}

fn tls_remedy(problem: &str) -> Option<&'static str> {
    // As rustls words them; what it words anew falls back to the general remedy.
    let remedies = [
        ("UnknownIssuer", "give the authority that signed the API server's certificate"),
        ("BadSignature", "give the authority that signed the API server's certificate"),
        ("not valid for name", "use a name that the API server's certificate holds"),
        ("certificate expired", "renew the API server's expired certificate, or check this machine's clock"),
        ("certificate not valid yet", "check the clocks of this machine and of the authority"),
        ("InvalidContentType", "the server speaks clear text: give its address as http://, or its TLS port"),
    ];
    remedies.into_iter().find(|(sign, _)| problem.contains(sign)).map(|(_, remedy)| remedy)
}
