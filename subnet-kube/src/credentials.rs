//! A client that uses the credentials of a plug-in, and runs the plug-in again before they expire and when the server
//! refuses them.

use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use flannel_core::backoff::{Backoff, Jitter};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use http::{Request, Response, StatusCode};
use kube::client::Body;
use tokio::sync::{Notify, watch};
use tokio::task::{JoinSet, spawn_blocking};
use tokio::time::{Instant, sleep_until, timeout};
use tower::{BoxError, Service};

use crate::plug_in::{self, PlugIn, PlugInError};

/// How long before credentials expire they are renewed.
const AHEAD: Duration = Duration::from_secs(60);
/// The longest wait between two runs of a plug-in that fails, or whose credentials are refused or expire at once.
const LONGEST: Duration = Duration::from_secs(30);
/// The back-off is reset after credentials were used for this long.
const LASTING: Duration = Duration::from_secs(60);
/// A plug-in may print the same credentials until they expire. It is run again this long after that.
const BEHIND: Duration = Duration::from_secs(1);

/// Creates a client that sends requests with what the plug-in prints, and otherwise as `config` says. Waits until the
/// first run of the plug-in has ended; if it failed, so do requests until a later one succeeds.
///
/// # Cancel safety
/// If this is dropped, or later the client, a running plug-in is killed.
pub(crate) async fn client(config: kube::Config, plug_in: PlugIn) -> kube::Client {
    let namespace = config.default_namespace.clone();
    let (published, mut state) = watch::channel(Err(plug_in.failed("has not ended yet")));
    let source = Arc::new(plug_in);
    let mut task = JoinSet::new();
    task.spawn(renew(published, move || fetch(config.clone(), Arc::clone(&source))));
    // The plug-in's own limit does not cover its start, which may hang with the disk. Requests then fail with that error.
    let _ = timeout(plug_in::RUN, state.changed()).await;
    kube::Client::new(Renewed { state, _task: task }, namespace)
}

/// What requests are sent with.
type State = Result<Current, PlugInError>;

/// Credentials in use.
#[derive(Clone)]
struct Current {
    client: kube::Client,
    /// Notified when the server refuses them.
    refused: Arc<Notify>,
    /// Why the last run of the plug-in gave no newer ones.
    trouble: Option<PlugInError>,
}

/// A client with new credentials, and how long they can be used.
struct Fetched {
    client: kube::Client,
    lifetime: Duration,
}

/// Sends each request with the current credentials.
struct Renewed {
    state: watch::Receiver<State>,
    /// Runs the plug-in, and ends with the client.
    _task: JoinSet<()>,
}

impl Service<Request<Body>> for Renewed {
    type Response = Response<Body>;
    type Error = BoxError;
    type Future = BoxFuture<'static, Result<Response<Body>, BoxError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), BoxError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        send(self.state.borrow().clone(), request).boxed()
    }
}

async fn send(state: State, request: Request<Body>) -> Result<Response<Body>, BoxError> {
    let Current { client, refused, trouble } = state?;
    let response = client.send(request).await?;
    if response.status() == StatusCode::UNAUTHORIZED {
        refused.notify_one();
        if let Some(trouble) = trouble {
            return Err(trouble.into());
        }
    }
    Ok(response)
}

/// Publishes what `fetch` returns, and calls it again before that expires, or once it is refused. If `fetch` fails,
/// credentials that have not expired stay published, because the server may still accept them.
async fn renew<F>(published: watch::Sender<State>, mut fetch: impl FnMut() -> F)
where
    F: Future<Output = Result<Fetched, PlugInError>>,
{
    let mut backoff = Backoff::up_to(LONGEST, Jitter::random());
    // The last credentials, since when, and for how long they can be used.
    let mut last: Option<(Current, Instant, Duration)> = None;
    loop {
        let fetched = fetch().await;
        let since = Instant::now();
        let mut next = since + backoff.wait();
        match fetched {
            Ok(Fetched { client, lifetime }) => {
                let refused = Arc::new(Notify::new());
                let current = Current { client, refused: Arc::clone(&refused), trouble: None };
                drop(published.send_replace(Ok(current.clone())));
                last = Some((current, since, lifetime));
                let is_refused = timeout(lifetime.saturating_sub(AHEAD), refused.notified()).await.is_ok();
                if since.elapsed() >= LASTING {
                    backoff.reset();
                }
                // The timeout has elapsed, so the sum cannot overflow.
                if !is_refused && !lifetime.is_zero() {
                    next = next.min(since + lifetime + BEHIND);
                }
            }
            Err(error) => {
                let usable = last.as_ref().filter(|(_, since, lifetime)| since.elapsed() < *lifetime);
                drop(published.send_replace(match usable {
                    Some((current, ..)) => Ok(Current { trouble: Some(error), ..current.clone() }),
                    None => Err(error),
                }));
            }
        }
        sleep_until(next).await;
    }
}

/// Runs the plug-in, and creates a client with what it prints.
async fn fetch(mut config: kube::Config, plug_in: Arc<PlugIn>) -> Result<Fetched, PlugInError> {
    let credentials = plug_in.run().await?;
    let (lifetime, has_identity) = (credentials.lifetime(), credentials.has_identity());
    credentials.put_into(&mut config.auth_info);
    // Blocks on disk I/O. The error may quote the key.
    let made = spawn_blocking(move || kube::Client::try_from(config)).await;
    match made.map(Result::ok) {
        Ok(Some(client)) => Ok(Fetched { client, lifetime }),
        Ok(None) | Err(_) if has_identity => Err(plug_in.failed("printed a certificate or a key that cannot be used")),
        Ok(None) | Err(_) => {
            Err(plug_in.failed("printed a token, and the certificates beside it in the kubeconfig cannot be used"))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::future::ready;
    use std::io;
    use std::path::{Path, PathBuf};
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use futures_util::future::join_all;
    use kube::config::AuthInfo;
    use serde_json::{Value, json};
    use tempfile::TempDir;
    use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
    use tokio::net::{TcpListener, TcpStream};
    use tokio::time::sleep;

    use super::*;
    use crate::Access;
    use crate::error::{Fault, Kind};
    use crate::nodes::locked;
    use crate::scripted::full;

    const SECOND: Duration = Duration::from_secs(1);
    const HOUR: Duration = Duration::from_secs(3600);
    const WITHIN: Duration = Duration::from_secs(30);

    fn plug_in(mut exec: Value) -> PlugIn {
        exec["apiVersion"] = json!("client.authentication.k8s.io/v1");
        let mut user: AuthInfo = serde_json::from_value(json!({ "exec": exec })).unwrap();
        PlugIn::take(&mut user).unwrap().unwrap()
    }

    fn error() -> PlugInError {
        plug_in(json!({ "command": "a" })).failed("failed")
    }

    /// Credentials that are renewed, without a plug-in.
    struct Simulated {
        state: watch::Receiver<State>,
        runs: Arc<AtomicUsize>,
        _task: JoinSet<()>,
    }

    impl Simulated {
        /// Each run gives credentials with the next of these lifetimes, or fails; after the last, as the last.
        fn new(lifetimes: &'static [Option<Duration>]) -> Self {
            Self::with(|run| lifetimes[run.min(lifetimes.len() - 1)])
        }

        /// Each run, counted from 0, gives credentials with this lifetime, or fails.
        fn with(lifetime: impl Fn(usize) -> Option<Duration> + Send + 'static) -> Self {
            let (published, state) = watch::channel(Err(error()));
            let runs = Arc::new(AtomicUsize::new(0));
            let counted = Arc::clone(&runs);
            let fetch = move || {
                let lifetime = lifetime(counted.fetch_add(1, Ordering::Relaxed));
                let serve = |_: Request<Body>| ready(Ok::<_, io::Error>(Response::new(full(""))));
                let client = kube::Client::new(tower::service_fn(serve), "default");
                ready(lifetime.map(|lifetime| Fetched { client, lifetime }).ok_or_else(error))
            };
            let mut task = JoinSet::new();
            task.spawn(renew(published, fetch));
            Self { state, runs, _task: task }
        }

        fn runs(&self) -> usize {
            self.runs.load(Ordering::Relaxed)
        }

        /// Whether requests are sent.
        fn are_usable(&self) -> bool {
            self.state.borrow().is_ok()
        }

        /// Whether the last run failed, although requests are sent.
        fn is_troubled(&self) -> bool {
            self.state.borrow().as_ref().is_ok_and(|current| current.trouble.is_some())
        }

        /// The server answers 401.
        fn refuse(&self) {
            if let Ok(current) = &*self.state.borrow() {
                current.refused.notify_one();
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_are_renewed_before_they_expire() {
        let simulated = Simulated::new(&[Some(HOUR)]);
        let mut due = Instant::now();
        for runs in 1..4 {
            due += HOUR - AHEAD;
            sleep_until(due - SECOND).await;
            assert_eq!(simulated.runs(), runs);
            sleep_until(due + SECOND).await;
            assert_eq!((simulated.runs(), simulated.are_usable()), (runs + 1, true));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_are_used_until_they_expire_while_the_plug_in_fails() {
        let simulated = Simulated::new(&[Some(HOUR), None]);
        sleep(HOUR - SECOND).await;
        assert!(simulated.runs() > 4 && simulated.are_usable(), "{}", simulated.runs());
        sleep(2 * LONGEST).await;
        assert!(!simulated.are_usable());
    }

    #[tokio::test(start_paused = true)]
    async fn credentials_that_are_refused_are_fetched_again_at_once_and_then_ever_less_often() {
        let simulated = Simulated::new(&[Some(Duration::MAX)]);
        sleep(HOUR).await;
        assert_eq!(simulated.runs(), 1, "they do not expire");
        simulated.refuse();
        sleep(Duration::from_millis(1)).await;
        assert_eq!(simulated.runs(), 2);
        let begun = Instant::now();
        while begun.elapsed() < 600 * SECOND {
            simulated.refuse();
            sleep(Duration::from_millis(100)).await;
        }
        assert!((15..=32).contains(&simulated.runs()), "{}", simulated.runs());
    }

    #[tokio::test(start_paused = true)]
    async fn refused_credentials_stay_while_the_plug_in_fails_and_its_error_is_known() {
        let simulated = Simulated::new(&[Some(HOUR), None, None, Some(HOUR)]);
        sleep(2 * AHEAD).await;
        simulated.refuse();
        sleep(SECOND / 2).await;
        assert_eq!((simulated.runs(), simulated.are_usable(), simulated.is_troubled()), (2, true, true));
        sleep(5 * SECOND).await;
        assert_eq!((simulated.runs(), simulated.are_usable(), simulated.is_troubled()), (4, true, false));
    }

    /// As plug-ins do that keep a token.
    #[tokio::test(start_paused = true)]
    async fn a_plug_in_that_prints_the_same_token_until_it_expires_is_run_right_after_that() {
        let begun = Instant::now();
        let left = move || HOUR.as_nanos() - begun.elapsed().as_nanos() % HOUR.as_nanos();
        let simulated = Simulated::with(move |_| Some(Duration::from_nanos(left() as u64)));
        for hour in 1..20 {
            sleep_until(begun + hour * HOUR).await;
            let runs = simulated.runs();
            sleep(2 * BEHIND).await;
            assert!(simulated.runs() > runs, "a token that expired after {hour} h stays in use");
            assert!(simulated.runs() < 15 * hour as usize, "{}", simulated.runs());
        }
    }

    /// A plug-in that prints a file, and a server.
    struct Site {
        dir: TempDir,
        url: String,
        accepted: Arc<Mutex<String>>,
        _server: JoinSet<()>,
    }

    /// Notes its number, waits for `gate` if that exists, and prints the file.
    const PLUG_IN: &str = "cd \"$DIR\"; echo $$ >>runs; if [ -p gate ]; then read -r line <gate; fi; cat printed";

    impl Site {
        async fn new() -> Self {
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let url = format!("http://{}", listener.local_addr().unwrap());
            let accepted = Arc::<Mutex<String>>::default();
            let theirs = Arc::clone(&accepted);
            let mut server = JoinSet::new();
            server.spawn(async move {
                let mut connections = JoinSet::new();
                while let Ok((stream, _)) = listener.accept().await {
                    connections.spawn(answer(stream, Arc::clone(&theirs)));
                }
            });
            Self { dir: tempfile::tempdir().unwrap(), url, accepted, _server: server }
        }

        fn file(&self, name: &str) -> PathBuf {
            self.dir.path().join(name)
        }

        /// The plug-in prints credentials with this status from now on.
        fn prints(&self, status: &Value) {
            fs::write(self.file("next"), json!({ "kind": "ExecCredential", "status": status }).to_string()).unwrap();
            fs::rename(self.file("next"), self.file("printed")).unwrap();
        }

        /// The server accepts only this token from now on, and the plug-in prints it.
        fn rotates_to(&self, token: &str) {
            token.clone_into(&mut locked(&self.accepted));
            self.prints(&json!({ "token": token }));
        }

        /// Makes the plug-in wait until the file is written.
        fn gate(&self) -> PathBuf {
            let gate = self.file("gate");
            nix::unistd::mkfifo(&gate, nix::sys::stat::Mode::S_IRWXU).unwrap();
            gate
        }

        /// Returns the numbers of the plug-in's processes so far.
        fn runs(&self) -> Vec<String> {
            fs::read_to_string(self.file("runs")).unwrap_or_default().lines().map(str::to_owned).collect()
        }

        async fn client(&self) -> kube::Client {
            let exec = json!({
                "apiVersion": "client.authentication.k8s.io/v1",
                "command": "sh",
                "args": ["-c", PLUG_IN, "swordfish"],
                "env": [{ "name": "DIR", "value": self.dir.path() }, { "name": "PASSWORD", "value": "swordfish" }],
                "interactiveMode": "Never",
            });
            let config = json!({
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "x",
                "clusters": [{ "name": "c", "cluster": { "server": self.url } }],
                "contexts": [{ "name": "x", "context": { "cluster": "c", "user": "u" } }],
                "users": [{ "name": "u", "user": { "exec": exec } }],
            });
            fs::write(self.file("kubeconfig"), config.to_string()).unwrap();
            Access::kubeconfig(self.file("kubeconfig")).client().await.unwrap()
        }
    }

    /// Answers the requests on a connection: 200 to those with the token, and 401 to others.
    async fn answer(stream: TcpStream, accepted: Arc<Mutex<String>>) {
        let mut stream = BufReader::new(stream);
        let (mut line, mut has_token) = (String::new(), false);
        while stream.read_line(&mut line).await.is_ok_and(|read| read > 0) {
            has_token |= line.trim_end() == format!("authorization: Bearer {}", locked(&accepted));
            if line == "\r\n" {
                let status = if std::mem::take(&mut has_token) { "200 OK" } else { "401 Unauthorized" };
                let head = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\n\r\n");
                stream.write_all(head.as_bytes()).await.unwrap();
            }
            line.clear();
        }
    }

    async fn ask(client: &kube::Client) -> Result<StatusCode, kube::Error> {
        let request = Request::get("/api/v1/nodes").body(Body::empty()).unwrap();
        client.send(request).await.map(|response| response.status())
    }

    /// Whether the process of this number has ended. It stays as a zombie if no process reaps orphans.
    fn has_ended(process: &str) -> bool {
        let stat = fs::read_to_string(Path::new("/proc").join(process).join("stat")).unwrap_or_default();
        stat.is_empty() || stat.contains(") Z ")
    }

    /// Sends requests until one is accepted.
    async fn until_accepted(client: &kube::Client) {
        let end = Instant::now() + WITHIN;
        while !matches!(ask(client).await, Ok(StatusCode::OK)) {
            assert!(Instant::now() < end, "no request was accepted");
            sleep(Duration::from_millis(10)).await;
        }
    }

    async fn until(what: &str, is_so: impl Fn() -> bool) {
        let end = Instant::now() + WITHIN;
        while !is_so() {
            assert!(Instant::now() < end, "{what}");
            sleep(Duration::from_millis(10)).await;
        }
    }

    #[tokio::test]
    async fn the_first_requests_share_one_run() {
        let site = Site::new().await;
        site.rotates_to("t0ken");
        let client = site.client().await;
        let answers = join_all((0..20).map(|_| ask(&client))).await;
        assert!(answers.iter().all(|answer| matches!(answer, Ok(StatusCode::OK))), "{answers:?}");
        assert_eq!(site.runs().len(), 1);
    }

    #[tokio::test]
    async fn a_client_is_there_once_the_plug_in_has_ended_and_without_it_no_plug_in_runs() {
        let site = Site::new().await;
        site.rotates_to("t0ken");
        let gate = site.gate();
        {
            let client = site.client();
            tokio::select! {
                _ = client => panic!("the plug-in has not ended"),
                () = until("the plug-in runs", || site.runs().len() == 1) => {}
            }
        }
        until("the first plug-in has ended", || has_ended(&site.runs()[0])).await;
        let client = site.client();
        let opened = async {
            until("the plug-in runs", || site.runs().len() == 2).await;
            fs::write(gate, "\n").unwrap();
        };
        let (client, ()) = tokio::join!(client, opened);
        assert_eq!(ask(&client).await.unwrap(), StatusCode::OK);
    }

    #[tokio::test]
    async fn a_plug_in_that_takes_long_holds_up_no_request() {
        let site = Site::new().await;
        site.rotates_to("one");
        let client = site.client().await;
        site.rotates_to("two");
        let gate = site.gate();
        assert_eq!(ask(&client).await.unwrap(), StatusCode::UNAUTHORIZED);
        until("the plug-in runs", || site.runs().len() == 2).await;
        assert_eq!(ask(&client).await.unwrap(), StatusCode::UNAUTHORIZED);
        fs::write(gate, "\n").unwrap();
        until_accepted(&client).await;
        assert_eq!(site.runs().len(), 2);
    }

    #[tokio::test]
    async fn the_error_of_the_plug_in_explains_why_old_credentials_are_refused() {
        let serve = |_: Request<Body>| {
            let mut refusal = Response::new(full(""));
            *refusal.status_mut() = StatusCode::UNAUTHORIZED;
            ready(Ok::<_, io::Error>(refusal))
        };
        let client = kube::Client::new(tower::service_fn(serve), "default");
        let current = Current { client, refused: Arc::default(), trouble: Some(error()) };
        let refused = send(Ok(current), Request::new(Body::empty())).await.map(drop).unwrap_err();
        assert!(refused.downcast_ref::<PlugInError>().is_some(), "{refused}");
    }

    #[tokio::test]
    async fn a_token_without_a_time_is_fetched_again_once_it_is_refused() {
        let site = Site::new().await;
        site.rotates_to("one");
        let client = site.client().await;
        assert_eq!(ask(&client).await.unwrap(), StatusCode::OK);
        site.rotates_to("two");
        assert_eq!(ask(&client).await.unwrap(), StatusCode::UNAUTHORIZED);
        until_accepted(&client).await;
        assert_eq!(site.runs().len(), 2);
    }

    #[tokio::test]
    async fn a_plug_in_that_fails_at_first_is_run_again_until_it_works() {
        let site = Site::new().await;
        let client = site.client().await;
        let Fault { kind, error } = Fault::of(&ask(&client).await.unwrap_err());
        let said = error.to_string();
        assert_eq!(kind, Kind::NoAnswer, "{said}");
        assert!(["plug-in sh ", "exit status: 1", "by hand"].iter().all(|part| said.contains(part)), "{said}");
        assert!(!said.contains("swordfish"), "{said}");
        site.rotates_to("t0ken");
        until_accepted(&client).await;
    }

    #[tokio::test]
    async fn a_certificate_that_cannot_be_used_is_an_error_and_is_not_shown() {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let printed = r#"{"status":{"clientCertificateData":"swordfish","clientKeyData":"swordfish"}}"#;
        let plug_in = Arc::new(plug_in(json!({ "command": "echo", "args": [printed] })));
        let config = kube::Config::new("https://192.0.2.1".parse().unwrap());
        let error = fetch(config, plug_in).await.map(drop).unwrap_err().to_string();
        assert!(error.contains("cannot be used") && !error.contains("swordfish"), "{error}");
    }

    #[tokio::test]
    async fn a_plug_in_ends_with_the_client() {
        let site = Site::new().await;
        site.prints(&json!({ "token": "one" }));
        let client = site.client().await;
        site.gate();
        assert_eq!(ask(&client).await.unwrap(), StatusCode::UNAUTHORIZED);
        until("the plug-in runs", || site.runs().len() == 2).await;
        drop(client);
        until("the plug-in has ended", || has_ended(&site.runs()[1])).await;
    }
}
