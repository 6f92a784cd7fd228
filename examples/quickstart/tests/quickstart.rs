//! Runs the built quickstart as its users do.
//!
//! Like the quickstart, needs root, or user namespaces for all users.
#![expect(clippy::unwrap_used, reason = "a helper of a test fails as the test does")]

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::Mutex;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::{Pid, geteuid};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_quickstart");
const NOBODY: u32 = 65534;
const LONGEST: Duration = Duration::from_secs(60);

/// The tests measure time, so they run one at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// A program under test with its own directory for temporary files, to detect what it leaves behind.
struct Run {
    temporary: tempfile::TempDir,
    command: Command,
}

impl Run {
    fn of(program: &Path, args: &[&str]) -> Self {
        let temporary = tempfile::tempdir().unwrap();
        // Sticky and world-writable, like /tmp.
        fs::set_permissions(temporary.path(), Permissions::from_mode(0o1777)).unwrap();
        let mut command = Command::new(program);
        command.args(args).env("TMPDIR", temporary.path()).current_dir("/").process_group(0);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        Self { temporary, command }
    }

    fn start(&mut self) -> Child {
        self.command.spawn().unwrap()
    }

    fn output(mut self) -> Output {
        let child = self.start();
        let pid = child.id();
        let output = child.wait_with_output().unwrap();
        self.assert_nothing_left(pid);
        output
    }

    /// Only this process holds namespaces here, so they end with it.
    fn assert_nothing_left(&self, pid: u32) {
        let left: Vec<_> = fs::read_dir(self.temporary.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert_eq!(left, Vec::<PathBuf>::new());
        assert_eq!(group(pid), Vec::<u32>::new());
    }
}

/// Returns the processes of a group.
fn group(pid: u32) -> Vec<u32> {
    let processes = fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    let belongs = |process: &u32| {
        // It may have ended meanwhile.
        let Ok(stat) = fs::read_to_string(format!("/proc/{process}/stat")) else { return false };
        // proc_pid_stat(5): the fields after the name are state, parent and group.
        let group = stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(2));
        group == Some(pid.to_string().as_str())
    };
    processes.filter(belongs).collect()
}

fn json(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stdout);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{}\n{text}{errors}", output.status);
    assert_eq!(text.lines().count(), 1, "one object and nothing else: {text}");
    serde_json::from_str(&text).unwrap()
}

/// Checks the parts of the object that do not depend on the arguments.
fn assert_good(object: &Value, nodes: u64, backend: &str, acts: usize) {
    assert_eq!(object["nodes"], nodes);
    assert_eq!(object["backend"], backend);
    assert_eq!(object["pairs"], nodes * (nodes - 1));
    assert_eq!(object["pairs_ok"], object["pairs"]);
    assert!(object["throughput_gbps"].as_f64().unwrap() > 0.0);
    assert!(object["seconds"].as_f64().unwrap() > 0.0);
    let heals = object["heals"].as_array().unwrap();
    assert_eq!(heals.len(), acts);
    for heal in heals {
        assert_eq!(heal["healed"], true, "{heal}");
        assert!(!heal["act"].as_str().unwrap().is_empty());
        assert!(heal["ms"].as_f64().unwrap() < 10_000.0, "{heal}");
    }
}

#[test]
fn vxlan_pings_and_heals() {
    let _alone = ALONE.lock();
    let object = json(&Run::of(PROGRAM.as_ref(), &["--json"]).output());
    assert_good(&object, 3, "vxlan", 24);
}

#[test]
fn host_gw_pings_and_heals() {
    let _alone = ALONE.lock();
    let object = json(&Run::of(PROGRAM.as_ref(), &["--json", "--backend", "host-gw", "--nodes", "2"]).output());
    assert_good(&object, 2, "host-gw", 8);
}

#[test]
fn udp_pings_and_heals() {
    let _alone = ALONE.lock();
    let object = json(&Run::of(PROGRAM.as_ref(), &["--json", "--backend", "udp", "--nodes", "2"]).output());
    assert_good(&object, 2, "udp", 18);
}

#[test]
fn dual_stack_pings_and_heals() {
    let _alone = ALONE.lock();
    let object = json(&Run::of(PROGRAM.as_ref(), &["--json", "--dual-stack"]).output());
    assert_good(&object, 3, "vxlan", 24);
}

#[test]
fn ipv6_alone_pings_and_heals() {
    let _alone = ALONE.lock();
    let object = json(&Run::of(PROGRAM.as_ref(), &["--json", "--ipv6", "--nodes", "2"]).output());
    assert_good(&object, 2, "vxlan", 24);
}

/// Root runs it as the user nobody (uid 65534); other users are already unprivileged.
#[test]
fn nobody_needs_no_privileges() {
    let _alone = ALONE.lock();
    // The user nobody may not be allowed to read the build directory.
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("quickstart");
    // By another process: a child that another test forks would keep the copy open for writing, and it could not be run.
    assert!(Command::new("cp").arg(PROGRAM).arg(&copy).status().unwrap().success());
    for path in [dir.path(), &copy] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    let mut run = Run::of(&copy, &["--json"]);
    if geteuid().is_root() {
        run.command.uid(NOBODY).gid(NOBODY);
    }
    assert_good(&json(&run.output()), 3, "vxlan", 24);
}

#[test]
fn people_get_eighty_columns_without_colours_in_a_pipe() {
    let _alone = ALONE.lock();
    let output = Run::of(PROGRAM.as_ref(), &["--nodes", "10", "--dual-stack"]).output();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}");
    for line in text.lines() {
        assert!(line.chars().count() <= 80, "{line}");
        assert!(!line.contains('\x1b'), "{line}");
    }
    for part in ["Leases", "ip route", "bridge fdb show", "Break and heal", "24 of 24 acts healed"] {
        assert!(text.contains(part), "{part} in {text}");
    }
}

#[test]
fn bad_arguments_are_named_and_exit_with_two() {
    for (args, named) in [
        (&["--nodes", "1"][..], "1 is not in 2..=16"),
        (&["--nodes", "17"], "17 is not in 2..=16"),
        (&["--nodes", "many"], "many"),
        (&["--backend", "wireguard"], "vxlan, host-gw"),
        (&["--ipv6", "--dual-stack"], "--dual-stack"),
        (&["--speed"], "--speed"),
    ] {
        let output = Run::of(PROGRAM.as_ref(), args).output();
        let text = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{args:?}: {text}");
        assert!(text.contains(named), "{args:?}: {text}");
        assert!(output.stdout.is_empty());
    }
}

#[test]
fn an_interrupt_ends_it_cleanly_at_any_time() {
    let _alone = ALONE.lock();
    let moments = [
        (None, Signal::SIGINT),
        (Some("Leases"), Signal::SIGTERM),
        (Some("bridge fdb show"), Signal::SIGHUP),
        (Some("Break and heal"), Signal::SIGINT),
    ];
    for (shown, signal) in moments {
        let mut run = Run::of(PROGRAM.as_ref(), &["--dual-stack"]);
        let mut child = run.start();
        let pid = child.id();
        let mut lines = BufReader::new(child.stdout.take().unwrap());
        match shown {
            None => wait_for_store(&run),
            Some(text) => _ = read_until(&mut lines, text),
        }
        kill(Pid::from_raw(pid.try_into().unwrap()), signal).unwrap();
        let status = ends(&mut child, LONGEST);
        assert_eq!(status.code(), Some(128 + signal as i32), "after {shown:?}");
        run.assert_nothing_left(pid);
    }
}

#[test]
fn what_is_kept_can_be_entered_and_ends_on_interrupt() {
    let _alone = ALONE.lock();
    let mut run = Run::of(PROGRAM.as_ref(), &["--keep", "--nodes", "2", "--backend", "host-gw"]);
    let mut child = run.start();
    let pid = child.id();
    let mut lines = BufReader::new(child.stdout.take().unwrap());
    let text = read_until(&mut lines, "Ctrl-C ends it all");
    let printed = text.split_once("  nsenter").unwrap().1.split_once("ip route\n").unwrap().0;
    let script = format!("nsenter{printed} cat /proc/net/dev");
    let entered = Command::new("sh").args(["-c", &script]).output().unwrap();
    let shown = String::from_utf8_lossy(&entered.stdout).into_owned() + &String::from_utf8_lossy(&entered.stderr);
    assert!(shown.contains("cni0:"), "{script}: {shown}");
    kill(Pid::from_raw(pid.try_into().unwrap()), Signal::SIGINT).unwrap();
    assert!(ends(&mut child, LONGEST).success());
    run.assert_nothing_left(pid);
}

/// Returns the output up to and including a line with this text.
fn read_until(lines: &mut impl BufRead, wanted: &str) -> String {
    let mut text = String::new();
    while !text.contains(wanted) {
        assert!(lines.read_line(&mut text).unwrap() > 0, "it ended: {text}");
    }
    text
}

/// Waits until the run has its directory: from then on it handles signals.
fn wait_for_store(run: &Run) {
    let deadline = Instant::now() + LONGEST;
    while fs::read_dir(run.temporary.path()).unwrap().next().is_none() {
        assert!(Instant::now() < deadline, "the quickstart does not start");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn ends(child: &mut Child, patience: Duration) -> std::process::ExitStatus {
    let deadline = Instant::now() + patience;
    loop {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        assert!(Instant::now() < deadline, "it does not end");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn where_the_system_forbids_it_people_are_told_how_to_go_on() {
    let limits = "echo 0 > /proc/sys/user/max_net_namespaces; echo 0 > /proc/sys/user/max_user_namespaces";
    let mut run = Run::of("unshare".as_ref(), &["-Ur", "sh", "-c", &format!("{limits}; exec {PROGRAM}")]);
    run.command.env("NO_COLOR", "1");
    let output = run.output();
    let text = String::from_utf8(output.stderr).unwrap().split_whitespace().collect::<Vec<_>>().join(" ");
    assert_eq!(output.status.code(), Some(1), "{text}");
    assert!(text.contains("run as root, or: sysctl -w user.max_user_namespaces=10000"), "{text}");
}
