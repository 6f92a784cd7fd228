//! Requests to the API server: one try each, with a deadline.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use flannel_core::backoff::Jitter;
use http::header::{ACCEPT, ACCEPT_ENCODING, CONTENT_TYPE, DATE, RETRY_AFTER};
use http::response::Parts;
use http::{Method, Request, StatusCode};
use http_body_util::BodyExt;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;
use kube::client::Body;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde_json::{Value, json};
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use crate::Timeouts;
use crate::error::{Fault, Kind, Rule, Said};
use crate::nodes::locked;
use crate::protobuf::{self, MAX_OBJECT, Malformed, find, number, object, text};

/// The characters of a name, version or continue token that are not percent-encoded in a URL.
const UNRESERVED: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');

/// The longest time to wait when a server asks for it. Up to a fifth is added.
const MOST_BUSY: Duration = Duration::from_secs(60);

/// How long the answer to a list of all Nodes may take to begin, unless other answers may take longer. A busy server
/// queues such a list for up to 15 s before it refuses it.
const LIST_BEGINS: Duration = Duration::from_secs(30);

/// How much of an error response is read, in bytes.
const MAX_REFUSAL: usize = 64 << 10;

/// The connection to the API server.
pub(crate) struct Api {
    client: kube::Client,
    /// The server's name in errors.
    server: Arc<str>,
    pub(crate) timeouts: Timeouts,
    /// The server asked for no request before this time.
    busy_until: Mutex<Option<Instant>>,
    jitter: Mutex<Jitter>,
}

/// Whether an account may do something.
pub(crate) struct Review {
    pub(crate) is_allowed: bool,
    /// The time on the server's clock.
    pub(crate) date: Option<Timestamp>,
}

/// How many Nodes are in a list.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Extent {
    /// At most one.
    One,
    All,
}

/// A body that is being received.
pub(crate) struct Arriving {
    body: Body,
    /// The server's name in errors.
    server: Arc<str>,
    /// When the request was sent.
    pub(crate) since: Instant,
    /// How long it may take, if it is read whole.
    limit: Duration,
    /// How long the next bytes may take, if it is read piece by piece.
    pause: Duration,
}

impl Arriving {
    /// Returns the next bytes, or `None` at the end.
    ///
    /// # Cancel safety
    /// No data is lost if this is dropped.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        loop {
            match self.body.frame().await {
                None => return Ok(None),
                Some(Err(error)) => return Err(Fault::of(&error).at(&self.server)),
                Some(Ok(frame)) => {
                    // Trailers are not used.
                    if let Ok(bytes) = frame.into_data() {
                        return Ok(Some(bytes));
                    }
                }
            }
        }
    }

    /// Returns the next bytes, and waits for them as long as for the answer to a small request.
    ///
    /// # Cancel safety
    /// As [`next`](Self::next).
    pub(crate) async fn next_in_time(&mut self) -> Result<Option<Bytes>, Fault> {
        let pause = self.pause;
        timeout(pause, self.next()).await.unwrap_or_else(|_| Err(self.late(pause)))
    }

    /// Returns the whole body, of at most `max` bytes, before the request has taken too long.
    async fn whole(mut self, max: usize) -> Result<Vec<u8>, Fault> {
        let (limit, until) = (self.limit, self.since + self.limit);
        let read = async {
            let mut whole = Vec::new();
            while let Some(bytes) = self.next().await? {
                if whole.len() + bytes.len() > max {
                    let fault = Fault::malformed(format!("an answer of more than {max} bytes"));
                    return Err(fault.at(&self.server));
                }
                whole.extend_from_slice(&bytes);
            }
            Ok(whole)
        };
        let read = timeout_at(until, read).await;
        read.unwrap_or_else(|_| Err(self.late(limit)))
    }

    fn late(&self, after: Duration) -> Fault {
        Fault::late(after).at(&self.server)
    }
}

impl Api {
    pub(crate) fn new(client: kube::Client, timeouts: Timeouts, server: String) -> Self {
        Self {
            client,
            server: server.into(),
            timeouts,
            busy_until: Mutex::default(),
            jitter: Mutex::new(Jitter::random()),
        }
    }

    /// Returns an answer that contains a Node.
    pub(crate) async fn node(&self, name: &str) -> Result<Vec<u8>, Fault> {
        self.object(Method::GET, &format!("/api/v1/nodes/{}", percent_encoded(name)), Vec::new(), Rule::GetNode).await
    }

    /// Returns the name of the Node of a Pod, empty if it has none yet.
    pub(crate) async fn node_of_pod(&self, namespace: &str, name: &str) -> Result<String, Fault> {
        let path = format!("/api/v1/namespaces/{}/pods/{}", percent_encoded(namespace), percent_encoded(name));
        let answer = self.object(Method::GET, &path, Vec::new(), Rule::GetPod).await?;
        // `Pod { spec: { nodeName } }`
        Ok(text(find(object(&answer)?, &[2, 10])?).into_owned())
    }

    /// Merges `patch` into a Node through its status.
    pub(crate) async fn patch_node_status(&self, name: &str, patch: Vec<u8>) -> Result<(), Fault> {
        let path = format!("/api/v1/nodes/{}/status", percent_encoded(name));
        self.object(Method::PATCH, &path, patch, Rule::PatchNodeStatus).await.map(drop)
    }

    /// Creates an Event about something that has no namespace.
    pub(crate) async fn create_event(&self, event: Vec<u8>) -> Result<(), Fault> {
        self.object(Method::POST, "/api/v1/namespaces/default/events", event, Rule::CreateEvent).await.map(drop)
    }

    /// Asks whether this account may do what `rule` allows, with the object of this name if given.
    pub(crate) async fn review(
        &self,
        rule: Rule,
        namespace: Option<&str>,
        name: Option<&str>,
    ) -> Result<Review, Fault> {
        let (resource, subresource) = rule.resource().split_once('/').unwrap_or((rule.resource(), ""));
        let asked = json!({
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": { "resourceAttributes": {
                "verb": rule.verb(),
                "group": rule.group(),
                "resource": resource,
                "subresource": subresource,
                "namespace": namespace.unwrap_or_default(),
                "name": name.unwrap_or_default(),
            } },
        });
        let path = "/apis/authorization.k8s.io/v1/selfsubjectaccessreviews";
        let (head, arriving) = self.answer(Method::POST, path, asked.to_string().into(), Rule::Review).await?;
        let date = head.headers.get(DATE).and_then(|value| value.to_str().ok());
        let date = date.and_then(|text| DateTimeParser::new().parse_timestamp(text).ok());
        let answer = arriving.whole(MAX_OBJECT).await?;
        // `SelfSubjectAccessReview { status: { allowed } }`
        Ok(Review { is_allowed: number(find(object(&answer)?, &[3, 1])?) != 0, date })
    }

    /// Starts to read a list of Nodes.
    pub(crate) async fn list_nodes(&self, extent: Extent, query: &str) -> Result<Arriving, Fault> {
        let request = request(Method::GET, &format!("/api/v1/nodes?{query}"), Vec::new(), Rule::ListNodes)?;
        let begins = match extent {
            Extent::One => self.timeouts.request,
            Extent::All => self.timeouts.request.max(LIST_BEGINS),
        };
        self.send(request, Rule::ListNodes, begins).await.map(|(_, arriving)| arriving)
    }

    /// Starts to watch the Nodes.
    pub(crate) async fn watch_nodes(&self, query: &str) -> Result<Arriving, Fault> {
        self.open(Method::GET, &format!("/api/v1/nodes?watch=true&{query}"), Vec::new(), Rule::WatchNodes).await
    }

    async fn object(&self, method: Method, path: &str, body: Vec<u8>, rule: Rule) -> Result<Vec<u8>, Fault> {
        self.open(method, path, body, rule).await?.whole(MAX_OBJECT).await
    }

    async fn open(&self, method: Method, path: &str, body: Vec<u8>, rule: Rule) -> Result<Arriving, Fault> {
        self.answer(method, path, body, rule).await.map(|(_, arriving)| arriving)
    }

    /// Sends a request, and waits until the answer starts.
    async fn answer(&self, method: Method, path: &str, body: Vec<u8>, rule: Rule) -> Result<(Parts, Arriving), Fault> {
        self.send(request(method, path, body, rule)?, rule, self.timeouts.request).await
    }

    /// Sends a request, and waits until the answer starts, for at most `limit`.
    async fn send(&self, request: Request<Body>, rule: Rule, limit: Duration) -> Result<(Parts, Arriving), Fault> {
        let busy_until = *locked(&self.busy_until);
        if let Some(until) = busy_until {
            sleep_until(until).await;
        }
        let since = Instant::now();
        let response = timeout_at(since + limit, self.client.send(request)).await.map_err(|_| Fault::late(limit));
        let response = response.and_then(|sent| sent.map_err(|error| Fault::of(&error)));
        let (head, body) = response.map_err(|fault| fault.at(&self.server))?.into_parts();
        let server = Arc::clone(&self.server);
        let arriving = Arriving { body, server, since, limit, pause: self.timeouts.request };
        if head.status.is_success() {
            let kind = head.headers.get(CONTENT_TYPE).map_or(&b"nothing"[..], |kind| kind.as_bytes());
            if !kind.starts_with(protobuf::TYPE.as_bytes()) {
                let kind: String = text(kind).chars().take(64).collect();
                let fault = Fault::malformed(format!("an answer in {kind} and not in {}", protobuf::TYPE));
                return Err(fault.at(&self.server));
            }
            return Ok((head, arriving));
        }
        let fault = refusal(&head, arriving, rule).await;
        if let Kind::Busy(Some(wait)) = fault.kind {
            // Refused clients must not all return at once.
            let more = u64::try_from(wait.as_millis() / 5).unwrap_or(u64::MAX).max(1);
            let more = Duration::from_millis(locked(&self.jitter).number() % more);
            // A request that was sent earlier may have been told to wait for longer.
            let until = Instant::now() + wait + more;
            let mut busy_until = locked(&self.busy_until);
            *busy_until = busy_until.max(Some(until));
        }
        Err(fault)
    }
}

fn request(method: Method, path: &str, body: Vec<u8>, rule: Rule) -> Result<Request<Body>, Fault> {
    let kind = match method {
        Method::PATCH => Some("application/strategic-merge-patch+json"),
        Method::POST => Some("application/json"),
        _ => None,
    };
    let mut request = Request::builder().method(method).uri(path).header(ACCEPT, protobuf::TYPE);
    if rule == Rule::WatchNodes {
        // Since 1.37, servers compress each event separately, and kube's client reads only the first.
        request = request.header(ACCEPT_ENCODING, "identity");
    }
    if let Some(kind) = kind {
        request = request.header(CONTENT_TYPE, kind);
    }
    request.body(Body::from(body)).map_err(|error| Fault::malformed(&error))
}

/// Returns the fault of a refused request.
async fn refusal(head: &Parts, arriving: Arriving, rule: Rule) -> Fault {
    let seconds = head.headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    let retry_after = seconds.map(|seconds| Duration::from_secs(seconds).min(MOST_BUSY));
    let answer = arriving.whole(MAX_REFUSAL).await.unwrap_or_default();
    Fault::status(head.status, &said(&answer), retry_after, rule)
}

/// Returns the fault in an event of a watch: `Status { message, reason, code }`.
pub(crate) fn failure(status: &[u8]) -> Result<Fault, Malformed> {
    let code = u16::try_from(number(find(status, &[6])?)).ok().and_then(|code| StatusCode::from_u16(code).ok());
    let said = in_protobuf(status)?;
    Ok(Fault::status(code.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), &said, None, Rule::WatchNodes))
}

/// Returns what an answer says: a Status object, which a proxy before the API server writes in JSON, or any text.
fn said(answer: &[u8]) -> Said {
    let said = object(answer).and_then(in_protobuf).ok().or_else(|| in_json(answer));
    said.unwrap_or_else(|| Said { message: first_line(&text(answer)).to_owned(), reason: String::new() })
}

/// Reads a `Status { message, reason }`.
fn in_protobuf(status: &[u8]) -> Result<Said, Malformed> {
    let part = |number| find(status, &[number]).map(|bytes| text(bytes).into_owned());
    Ok(Said { message: part(3)?, reason: part(4)? })
}

/// Reads the message of an object in JSON, and the reason if it is a Status.
fn in_json(answer: &[u8]) -> Option<Said> {
    let answer: Value = serde_json::from_slice(answer).ok()?;
    let part = |name: &str| answer.get(name).and_then(Value::as_str);
    let message = part("message")?.to_owned();
    let reason = part("reason").filter(|_| part("kind") == Some("Status"));
    Some(Said { message, reason: reason.unwrap_or_default().to_owned() })
}

/// Returns the first line of `text`: a proxy before an API server may answer with a page.
pub(crate) fn first_line(text: &str) -> &str {
    text.trim().lines().next().unwrap_or_default()
}

/// Returns `text` encoded as a part of a URL.
pub(crate) fn percent_encoded(text: &str) -> impl std::fmt::Display + '_ {
    utf8_percent_encode(text, UNRESERVED)
}
