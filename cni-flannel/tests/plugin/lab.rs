//! Calls of the plug-in.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

pub(crate) const PLUGIN: &str = env!("CARGO_BIN_EXE_flannel");

pub(crate) const SUBNET_ENV: &str =
    "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

/// What a call answered.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) succeeded: bool,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Answer {
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{error}: {self:?}"))
    }

    /// The code of an error.
    #[track_caller]
    pub(crate) fn code(&self) -> u64 {
        assert!(!self.succeeded, "{self:?}");
        let error = self.json();
        assert!(error["msg"].as_str().is_some_and(|text| !text.is_empty()), "{error}");
        assert!(error["cniVersion"].is_string(), "{error}");
        error["code"].as_u64().unwrap()
    }

    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert!(self.succeeded, "{self:?}");
        self
    }
}

/// A call, which is changed and then made.
#[derive(Clone)]
pub(crate) struct Call {
    command: Vec<String>,
    env: Vec<(String, String)>,
    stdin: String,
}

impl Call {
    pub(crate) fn set(mut self, name: &str, value: &str) -> Self {
        self.env.retain(|(known, _)| known != name);
        self.env.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn unset(mut self, name: &str) -> Self {
        self.env.retain(|(known, _)| known != name);
        self
    }

    pub(crate) fn stdin(mut self, text: impl Into<String>) -> Self {
        self.stdin = text.into();
        self
    }

    /// Another program in the place of the plug-in.
    pub(crate) fn under(mut self, command: &[&str]) -> Self {
        self.command = command.iter().map(|&word| word.to_owned()).collect();
        self
    }

    pub(crate) fn start(&self) -> Child {
        let mut command = Command::new(&self.command[0]);
        command.args(&self.command[1..]).env_clear().envs(self.env.iter().map(|(name, value)| (name, value)));
        // What `bridge` needs to masquerade.
        command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        // One that has ended reads nothing.
        let _ = child.stdin.take().unwrap().write_all(self.stdin.as_bytes());
        child
    }

    pub(crate) fn make(&self) -> Answer {
        answer(self.start())
    }
}

pub(crate) fn answer(child: Child) -> Answer {
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    Answer { succeeded: output.status.success(), stdout: text(output.stdout), stderr: text(output.stderr) }
}

/// A node's files: `subnet.env`, what is stored, and a plug-in `script` that writes down how it was called.
pub(crate) struct Place {
    dir: TempDir,
}

/// Prints a result, or the error whose text is in the file `error`.
const SCRIPT: &str = r#"#!/bin/sh
dir=${0%/*}/..
env | grep ^CNI_ | sort >>"$dir/called"
cat >"$dir/stdin"
echo >>"$dir/called"
[ ! -e "$dir/slow" ] || sleep 0.2
if [ -e "$dir/error" ]; then cat "$dir/error"; exit 1; fi
if [ "$CNI_COMMAND" = ADD ]; then echo '{"cniVersion":"1.0.0","ips":[]}'; fi
"#;

impl Place {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let place = Self { dir };
        fs::create_dir(place.path("bin")).unwrap();
        place.add_plugin("script", SCRIPT);
        place.write("subnet.env", SUBNET_ENV);
        place
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn write(&self, name: &str, text: &str) {
        let temporary = self.path(&format!("{name}.new"));
        fs::write(&temporary, text).unwrap();
        fs::rename(temporary, self.path(name)).unwrap();
    }

    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    pub(crate) fn add_plugin(&self, name: &str, text: &str) {
        let path = self.path("bin").join(name);
        fs::write(&path, text).unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// The members of a configuration that name this place.
    pub(crate) fn members(&self) -> String {
        format!(r#""subnetFile":"{}","dataDir":"{}""#, self.path("subnet.env").display(), self.path("data").display())
    }

    /// A configuration with `script`, and more members.
    pub(crate) fn conf(&self, version: &str, more: &str) -> String {
        format!(
            r#"{{"cniVersion":"{version}","name":"cbr0","type":"flannel","delegate":{{"type":"script"}},{}{more}}}"#,
            self.members()
        )
    }

    /// A call with all its variables.
    pub(crate) fn call(&self, command: &str) -> Call {
        let call = Call { command: vec![PLUGIN.to_owned()], env: Vec::new(), stdin: self.conf("1.1.0", "") };
        call.set("CNI_COMMAND", command)
            .set("CNI_CONTAINERID", "c1")
            .set("CNI_NETNS", "/proc/self/ns/net")
            .set("CNI_IFNAME", "eth0")
            .set("CNI_PATH", &self.path("bin").display().to_string())
    }

    /// What is stored, by container.
    pub(crate) fn stored(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path("data")).into_iter().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// A program that `./test` builds.
pub(crate) fn built(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target").join(name);
    assert!(path.exists(), "{} is missing: testkit/cni/build target builds it with Go, once", path.display());
    path.canonicalize().unwrap()
}
