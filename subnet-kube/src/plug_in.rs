//! Runs the credential plug-in of a kubeconfig as client-go does: a program that prints an `ExecCredential`.

use std::collections::HashMap;
use std::io;
use std::process::Stdio;
use std::time::Duration;

use base64::prelude::{BASE64_STANDARD, Engine};
use flannel_core::text::{Plain, cut};
use http::HeaderValue;
use jiff::Timestamp;
use kube::config::{AuthInfo, ExecInteractiveMode};
use nix::sys::signal::{Signal, killpg};
use nix::unistd::Pid;
use serde_json::{Value, json};
use tokio::io::AsyncReadExt;
use tokio::process::{Child, Command};
use tokio::task::spawn_blocking;
use tokio::time::timeout;

/// How long a plug-in may run.
pub(crate) const RUN: Duration = Duration::from_secs(30);

/// How much a plug-in may print, in bytes. A certificate and its key take a few thousand.
const MAX_OUTPUT: u64 = 1 << 20;

/// The supported versions of `ExecCredential`. The fields that are used here are the same in both.
const VERSIONS: [&str; 2] = ["client.authentication.k8s.io/v1", "client.authentication.k8s.io/v1beta1"];

/// How much of a text of the kubeconfig is shown, in bytes.
const SHOWN: usize = 200;

const BY_HAND: &str =
    "run it by hand as this program's user, with the arguments and environment in users[].user.exec of the kubeconfig";
const INSTALL: &str = "install it, or correct users[].user.exec.command of the kubeconfig";

/// A credential plug-in. Has no `Debug`, because its arguments and environment may be secret.
pub(crate) struct PlugIn {
    command: String,
    args: Vec<String>,
    env: Vec<(String, String)>,
    /// The value of `KUBERNETES_EXEC_INFO`.
    request: String,
    install_hint: Option<String>,
    limit: Duration,
}

/// A plug-in gave no credentials. Contains nothing of its arguments, environment or output.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the credential plug-in {name} of the kubeconfig {problem}")]
pub(crate) struct PlugInError {
    name: String,
    problem: String,
    /// How to fix it.
    pub(crate) remedy: String,
}

/// What a plug-in printed. Has no `Debug`, because it is secret.
pub(crate) struct Credentials {
    token: Option<String>,
    /// A client certificate and its key, in PEM.
    identity: Option<(String, String)>,
    expires: Option<Timestamp>,
}

impl PlugIn {
    /// Takes the plug-in out of the settings of a user. `None` if there is none, or if the settings have a token or a
    /// password, which take precedence.
    ///
    /// # Errors
    /// What is wrong with its settings.
    pub(crate) fn take(user: &mut AuthInfo) -> Result<Option<Self>, &'static str> {
        let has_password = user.username.is_some() && user.password.is_some();
        let has_token = user.token.is_some() || user.token_file.is_some() || user.auth_provider.is_some();
        let Some(exec) = user.exec.take().filter(|_| !has_password && !has_token) else { return Ok(None) };
        let Some(command) = exec.command.filter(|command| !command.is_empty()) else {
            return Err("the credential plug-in has no command");
        };
        if exec.interactive_mode == Some(ExecInteractiveMode::Always) {
            return Err("the credential plug-in needs a terminal (interactiveMode: Always), and there is none");
        }
        if !exec.api_version.as_deref().is_some_and(|version| VERSIONS.contains(&version)) {
            return Err("the credential plug-in has no supported apiVersion");
        }
        let mut spec = json!({ "interactive": false });
        // Only with provideClusterInfo.
        if let Some(cluster) = exec.cluster {
            spec["cluster"] = serde_json::to_value(cluster).unwrap_or_default();
        }
        let request = json!({ "kind": "ExecCredential", "apiVersion": exec.api_version, "spec": spec });
        let variable = |entry: &HashMap<String, String>| {
            Some((entry.get("name")?.clone(), entry.get("value").cloned().unwrap_or_default()))
        };
        Ok(Some(Self {
            command,
            args: exec.args.unwrap_or_default(),
            env: exec.env.iter().flatten().filter_map(variable).collect(),
            request: request.to_string(),
            install_hint: exec.install_hint,
            limit: RUN,
        }))
    }

    /// Runs the plug-in, and returns what it printed.
    ///
    /// # Cancel safety
    /// If this is dropped, the plug-in is killed.
    pub(crate) async fn run(&self) -> Result<Credentials, PlugInError> {
        let running = self.start().await?;
        let printed = timeout(self.limit, self.output(running)).await;
        let printed = printed.unwrap_or_else(|_| Err(self.failed(format!("did not end within {:?}", self.limit))))?;
        // A panic of the parser must not end the caller.
        let parsed = spawn_blocking(move || Credentials::parse(&printed)).await;
        parsed.unwrap_or(Err("printed output that cannot be read")).map_err(|problem| self.failed(problem))
    }

    /// Returns the error of this plug-in with this problem.
    pub(crate) fn failed(&self, problem: impl Into<String>) -> PlugInError {
        PlugInError { name: shown(&self.command), problem: problem.into(), remedy: BY_HAND.to_owned() }
    }

    async fn start(&self) -> Result<Running, PlugInError> {
        let mut command = Command::new(&self.command);
        command.args(&self.args).envs(self.env.iter().cloned()).env("KUBERNETES_EXEC_INFO", &self.request);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null()).process_group(0);
        // The program may be on a disk that hangs.
        let started = spawn_blocking(move || command.spawn().map(Running)).await;
        let started = started.unwrap_or_else(|error| Err(io::Error::other(error)));
        started.map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                // A hint may have several lines.
                let hint =
                    self.install_hint.as_deref().unwrap_or_default().split_whitespace().collect::<Vec<_>>().join(" ");
                let remedy = if hint.is_empty() { INSTALL.to_owned() } else { shown(&hint) };
                PlugInError { remedy, ..self.failed("was not found, or its interpreter was not") }
            }
            kind => self.failed(format!("cannot be started: {kind}")),
        })
    }

    /// Returns what a plug-in prints until it ends.
    async fn output(&self, mut running: Running) -> Result<Vec<u8>, PlugInError> {
        let unreadable = |error: io::Error| self.failed(format!("cannot be read: {}", error.kind()));
        let mut printed = Vec::new();
        if let Some(stdout) = running.0.stdout.take() {
            stdout.take(MAX_OUTPUT + 1).read_to_end(&mut printed).await.map_err(unreadable)?;
        }
        if printed.len() as u64 > MAX_OUTPUT {
            return Err(self.failed(format!("printed more than {MAX_OUTPUT} bytes")));
        }
        let status = running.0.wait().await.map_err(unreadable)?;
        if status.success() { Ok(printed) } else { Err(self.failed(format!("failed with {status}"))) }
    }
}

impl Credentials {
    /// Reads an `ExecCredential` in JSON or YAML, which client-go reads too.
    fn parse(printed: &[u8]) -> Result<Self, &'static str> {
        let printed: Value =
            serde_saphyr::from_slice(printed).map_err(|_| "printed something other than an ExecCredential")?;
        let part = |name: &str| match &printed["status"][name] {
            Value::Null => Ok(None),
            Value::String(text) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
            _ => Err("printed an ExecCredential whose status has a member that is not a string"),
        };
        let token = part("token")?;
        if token.as_ref().is_some_and(|token| HeaderValue::from_str(token).is_err()) {
            return Err("printed a token with a character that a header cannot contain, such as a line break");
        }
        let identity = match (part("clientCertificateData")?, part("clientKeyData")?) {
            (None, None) => None,
            (Some(certificate), Some(key)) => Some((certificate, key)),
            _ => return Err("printed a certificate without its key, or a key without its certificate"),
        };
        if token.is_none() && identity.is_none() {
            return Err("printed no ExecCredential with a token or a certificate in its status");
        }
        let expires = part("expirationTimestamp")?.map(|time| time.parse::<Timestamp>()).transpose();
        let expires = expires.map_err(|_| "printed an expirationTimestamp that is not a time of RFC 3339")?;
        Ok(Self { token, identity, expires })
    }

    /// Returns the time until they expire; `Duration::MAX` if they have no expiry.
    pub(crate) fn lifetime(&self) -> Duration {
        self.expires.map_or(Duration::MAX, |expires| {
            Duration::try_from(expires.duration_since(Timestamp::now())).unwrap_or_default()
        })
    }

    /// Returns whether they have a certificate.
    pub(crate) fn has_identity(&self) -> bool {
        self.identity.is_some()
    }

    /// Puts them into the settings of a user.
    pub(crate) fn put_into(self, user: &mut AuthInfo) {
        user.token = self.token.map(Into::into);
        if let Some((certificate, key)) = self.identity {
            user.client_certificate_data = Some(BASE64_STANDARD.encode(certificate));
            user.client_key_data = Some(BASE64_STANDARD.encode(key).into());
        }
    }
}

/// A running plug-in. If this is dropped before the plug-in has ended, its process group is killed.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // `None` once the plug-in has ended: its number may be another group's by then.
        if let Some(group) = self.0.id().and_then(|id| i32::try_from(id).ok()) {
            // An error means that the group has ended.
            let _ = killpg(Pid::from_raw(group), Signal::SIGKILL);
        }
    }
}

/// Escapes and shortens a text of the kubeconfig.
fn shown(text: &str) -> String {
    let mut shown = Plain(text).to_string();
    cut(&mut shown, SHOWN);
    shown
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use kube::config::{ExecAuthCluster, ExecConfig};
    use tokio::time::{Instant, sleep};

    use super::*;

    const TOKEN: &str = r#"{"status":{"token":"t0ken"}}"#;
    const AGES: Duration = Duration::from_secs(60);

    /// Returns the settings of a plug-in that runs this script, with secrets.
    fn settings(script: &str) -> ExecConfig {
        serde_json::from_value(json!({
            "apiVersion": "client.authentication.k8s.io/v1",
            "command": "sh",
            "args": ["-c", script, "swordfish"],
            "env": [{ "name": "PASSWORD", "value": "swordfish" }],
        }))
        .unwrap()
    }

    fn plug_in(exec: ExecConfig) -> PlugIn {
        PlugIn::take(&mut AuthInfo { exec: Some(exec), ..AuthInfo::default() }).unwrap().unwrap()
    }

    /// Waits until the process whose number is in this file has ended.
    async fn ended(pid: &Path) {
        let end = Instant::now() + AGES;
        let pid = fs::read_to_string(pid).unwrap();
        // It stays as a zombie if no process reaps orphans.
        let runs = || {
            let stat = fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
            !stat.is_empty() && !stat.contains(") Z ")
        };
        while runs() {
            assert!(Instant::now() < end, "process {pid} runs on");
            sleep(Duration::from_millis(10)).await;
        }
    }

    #[test]
    fn credentials_are_read_in_json_and_in_yaml() {
        for (printed, token, has_identity, has_end) in [
            (TOKEN, Some("t0ken"), false, false),
            ("kind: ExecCredential\nstatus:\n  token: t0ken\n", Some("t0ken"), false, false),
            (r#"{"status":{"clientCertificateData":"c","clientKeyData":"k","token":""}}"#, None, true, false),
            (r#"{"status":{"token":"t","expirationTimestamp":"2020-01-01T00:00:00Z"}}"#, Some("t"), false, true),
        ] {
            let read = Credentials::parse(printed.as_bytes()).unwrap();
            assert_eq!((read.token.as_deref(), read.identity.is_some()), (token, has_identity), "{printed}");
            let lifetime = if has_end { Duration::ZERO } else { Duration::MAX };
            assert_eq!(read.lifetime(), lifetime, "{printed}");
        }
    }

    #[test]
    fn a_certificate_replaces_the_one_in_the_settings() {
        let printed = r#"{"status":{"clientCertificateData":"new","clientKeyData":"key"}}"#;
        let mut user = AuthInfo { client_certificate_data: Some("old".to_owned()), ..AuthInfo::default() };
        Credentials::parse(printed.as_bytes()).unwrap().put_into(&mut user);
        assert_eq!((user.client_certificate_data.as_deref(), user.token.is_some()), (Some("bmV3"), false));
        assert!(user.client_key_data.is_some());
    }

    #[test]
    fn what_is_wrong_with_what_a_plug_in_prints_is_named() {
        for (printed, part) in [
            ("", "ExecCredential"),
            ("{swordfish", "something other"),
            (r#"{"kind":"ExecCredential","status":{}}"#, "no ExecCredential with a token"),
            (r#"{"status":"swordfish"}"#, "no ExecCredential with a token"),
            (r#"{"status":{"token":"swordfish","expirationTimestamp":1600000000}}"#, "not a string"),
            (r#"{"status":{"token":"swordfish\n"}}"#, "a line break"),
            (r#"{"status":{"clientKeyData":"swordfish"}}"#, "without its certificate"),
            (r#"{"status":{"token":"t","expirationTimestamp":"swordfish"}}"#, "RFC 3339"),
        ] {
            let problem = Credentials::parse(printed.as_bytes()).map(drop).unwrap_err();
            assert!(problem.contains(part) && !problem.contains("swordfish"), "{printed}: {problem}");
        }
    }

    #[test]
    fn a_plug_in_that_cannot_run_here_is_refused_and_other_credentials_come_first() {
        for (exec, part) in [
            (json!({ "args": ["a"] }), "no command"),
            (json!({ "command": "" }), "no command"),
            (json!({ "command": "a", "interactiveMode": "Always" }), "terminal"),
            (json!({ "command": "a" }), "apiVersion"),
            (json!({ "command": "a", "apiVersion": "client.authentication.k8s.io/v1alpha1" }), "apiVersion"),
        ] {
            let mut user: AuthInfo = serde_json::from_value(json!({ "exec": exec })).unwrap();
            let problem = PlugIn::take(&mut user).map(drop).unwrap_err();
            assert!(problem.contains(part), "{problem}");
        }
        for other in [
            json!({ "token": "t" }),
            json!({ "tokenFile": "/t" }),
            json!({ "username": "u", "password": "p" }),
            json!({ "auth-provider": { "name": "oidc" } }),
        ] {
            let mut user: AuthInfo = serde_json::from_value(other.clone()).unwrap();
            user.exec = Some(settings("exit"));
            assert!(PlugIn::take(&mut user).unwrap().is_none() && user.exec.is_none(), "{other}");
        }
        for mode in ["Never", "IfAvailable"] {
            let exec = json!({ "command": "a", "apiVersion": VERSIONS[1], "interactiveMode": mode });
            let mut user: AuthInfo = serde_json::from_value(json!({ "exec": exec })).unwrap();
            assert!(PlugIn::take(&mut user).unwrap().is_some(), "{mode}");
        }
    }

    #[tokio::test]
    async fn a_plug_in_has_its_environment_the_cluster_and_no_input() {
        let dir = tempfile::tempdir().unwrap();
        let told = dir.path().join("told");
        let script = format!("cat; [ $PASSWORD = swordfish ] && echo \"$KUBERNETES_EXEC_INFO\" >'{}'", told.display());
        let mut exec = settings(&format!("{script}; echo '{TOKEN}'"));
        let server = "https://192.0.2.1".to_owned();
        exec.cluster = Some(ExecAuthCluster { server: Some(server.clone()), ..ExecAuthCluster::default() });
        assert_eq!(plug_in(exec).run().await.unwrap().token.as_deref(), Some("t0ken"));
        let told: Value = serde_json::from_slice(&fs::read(told).unwrap()).unwrap();
        let wanted = json!({
            "kind": "ExecCredential",
            "apiVersion": "client.authentication.k8s.io/v1",
            "spec": { "interactive": false, "cluster": { "server": server } },
        });
        assert_eq!(told, wanted);
    }

    #[tokio::test]
    async fn a_plug_in_that_hangs_is_killed_with_its_children() {
        let dir = tempfile::tempdir().unwrap();
        let [own, child] = ["own", "child"].map(|name| dir.path().join(name));
        let script = format!("echo $$ >'{}'; sleep 600 & echo $! >'{}'; wait", own.display(), child.display());
        let mut plug_in = plug_in(settings(&script));
        plug_in.limit = Duration::from_secs(3);
        let error = plug_in.run().await.map(drop).unwrap_err();
        assert!(error.to_string().contains("did not end within 3s"), "{error}");
        ended(&own).await;
        ended(&child).await;
    }

    #[tokio::test]
    async fn a_plug_in_that_never_stops_printing_is_killed() {
        let dir = tempfile::tempdir().unwrap();
        let pid = dir.path().join("pid");
        let script = format!("echo $$ >'{}'; exec cat /dev/zero", pid.display());
        let error = plug_in(settings(&script)).run().await.map(drop).unwrap_err();
        assert!(error.to_string().contains(&format!("more than {MAX_OUTPUT} bytes")), "{error}");
        ended(&pid).await;
    }

    #[tokio::test]
    async fn no_secret_of_a_plug_in_is_shown() {
        let named = |command: &str, hint: Option<String>| ExecConfig {
            command: Some(command.to_owned()),
            install_hint: hint,
            ..settings("exit")
        };
        for (exec, parts) in [
            (settings("echo swordfish; echo swordfish >&2; exit 3"), ["plug-in sh ", "exit status: 3", "by hand"]),
            (settings("kill -9 $$"), ["plug-in sh ", "signal: 9", "by hand"]),
            (settings("echo '{swordfish'"), ["plug-in sh ", "something other", "by hand"]),
            (named("/nowhere/plug\u{1b}", None), ["plug-in /nowhere/plug\\u001b ", "was not found", "install it"]),
            (
                named("/nowhere/plug", Some(format!("get\n{}", "it ".repeat(1000)))),
                ["plug-in /nowhere/plug ", "was not found", "get it it"],
            ),
            (named("/", None), ["plug-in / ", "cannot be started", "by hand"]),
        ] {
            let error = plug_in(exec).run().await.map(drop).unwrap_err();
            let said = format!("{error}; {}", error.remedy);
            assert!(parts.iter().all(|part| said.contains(part)) && said.len() < 600, "{said}");
            assert!(!said.contains("swordfish") && !format!("{error:?}").contains("swordfish"), "{error:?}");
        }
    }
}
