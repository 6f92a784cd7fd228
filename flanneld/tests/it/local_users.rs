//! What another user of the host may do to the agent: to its name, its pages and its files.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::errno::Errno;
use nix::sys::socket::{AddressFamily, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, socket};
use tempfile::TempDir;
use testkit::Namespace;

use crate::harness::{Agent, BINARY, Site, VXLAN, bare, copy_program};
use crate::store::Cluster;

const NOBODY: u32 = 65534;
const ACTION: &str = "FLANNELD_TEST_OTHER_USER";
/// More than the agent has descriptors.
const IDLE: usize = 300;

/// Another user, who does something until this is dropped.
struct OtherUser {
    child: Child,
    /// Where the program is.
    _dir: TempDir,
}

impl OtherUser {
    /// Starts a copy of this binary as nobody: where the build is, nobody may not be allowed to read.
    fn start(ns: &Namespace, action: &str) -> Self {
        // Not in memory: containers let nobody execute what is there.
        let dir = tempfile::tempdir().unwrap();
        fs::set_permissions(dir.path(), Permissions::from_mode(0o755)).unwrap();
        let copy = dir.path().join("other-user");
        copy_program(std::env::current_exe().unwrap(), &copy);
        fs::set_permissions(&copy, Permissions::from_mode(0o755)).unwrap();
        let mut command = Command::new(&copy);
        command.args(["--exact", "local_users::child_process", "--nocapture"]).env(ACTION, action);
        command.uid(NOBODY).gid(NOBODY).current_dir("/").stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = ns.run(|| command.spawn().unwrap()).unwrap();
        let mut other_user = Self { child, _dir: dir };
        let lines = BufReader::new(other_user.child.stdout.take().unwrap()).lines();
        let mut said = Vec::new();
        for line in lines {
            said.push(line.unwrap());
            if said.last().is_some_and(|line| line.ends_with("in place")) {
                return other_user;
            }
        }
        panic!("the other user did not begin: {said:?}");
    }
}

impl Drop for OtherUser {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The process that the other tests start. As a test it does nothing.
#[test]
fn child_process() {
    let Ok(action) = std::env::var(ACTION) else { return };
    assert!(!nix::unistd::geteuid().is_root());
    match action.as_str() {
        "names" => take_names(),
        "connections" => take_connections(),
        "ports" => hold([8081, 8082].map(|port| TcpListener::bind(("127.0.0.1", port)).unwrap())),
        other => panic!("no such action: {other}"),
    }
}

fn hold<T>(held: T) {
    std::io::stdout().write_all(b"in place\n").unwrap();
    // Until the other end goes.
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    drop(held);
}

fn take_names() {
    let names =
        ["flannelkit/flannel/10.244.0.0-16/-", "flannelkit/flannel~/10.244.0.0-16/-", "flannelkit/x/0.0.0.0-0/-"];
    let bound = |name: &&str| UnixListener::bind_addr(&SocketAddr::from_abstract_name(name).unwrap()).unwrap();
    let sockets: Vec<_> = names.iter().map(bound).collect();
    let proof =
        socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), SockProtocol::NetlinkUserSock).unwrap();
    assert_eq!(bind(proof.as_raw_fd(), &NetlinkAddr::new(0, 1)), Err(Errno::EPERM), "anybody could prove a claim");
    hold(sockets);
}

fn take_connections() {
    let mut held = Vec::new();
    for port in [8081, 8082] {
        for nth in 0..IDLE {
            let mut stream = TcpStream::connect(("127.0.0.1", port)).unwrap();
            if nth % 2 == 0 {
                // It may have been ended already.
                let _ = stream.write_all(b"GET /status HTTP/1.1\r\nHost:");
            }
            held.push(stream);
        }
    }
    hold(held);
}

pub(crate) fn as_nobody(ns: &Namespace, words: &[&str]) -> bool {
    let command = || Command::new(words[0]).args(&words[1..]).uid(NOBODY).gid(NOBODY).output().unwrap();
    ns.run(|| command().status.success()).unwrap()
}

#[test]
fn the_name_of_an_overlay_cannot_be_taken_by_another_user() {
    let site = Site::new(1, VXLAN);
    let _other_user = OtherUser::start(site.ns(1), "names");
    let _first = site.start(1, &[]).ready();
    let second = site.run(1, &["-healthz-port=0", "-metrics-port=0"]);
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(second.error().contains("overlay flannel/10.244.0.0-16/- is already running"), "{second:?}");
}

#[test]
fn idle_connections_of_another_user_cost_neither_health_nor_files() {
    let site = Site::new(1, VXLAN);
    // Fewer descriptors than the other user has connections.
    let mut command = bare(Command::new("prlimit"));
    command.args(["--nofile=96:96", BINARY]).args(site.args(1));
    command.args(["-metrics-port=8082", "-ip-masq", "-audit-interval=1"]);
    let agent = Agent::start_in(site.ns(1), &mut command, site.path("log1"));
    agent.until_ready();
    let _other_user = OtherUser::start(site.ns(1), "connections");
    assert_eq!(agent.get(8081, "/healthz"), Some((200, "flanneld is running".to_owned())));
    assert!(agent.is_ready());
    let (code, status) = agent.get(8082, "/status").unwrap();
    assert_eq!((code, status.contains("\"ready\": true")), (200, true), "{status}");
    let open = fs::read_dir(format!("/proc/{}/fd", agent.pid())).unwrap().count();
    assert!(open < 80, "{open} descriptors are open");
    fs::remove_file(site.subnet_file(1)).unwrap();
    site.tool(1, &["ip", "link", "delete", "flannel.1"]);
    agent.until("healed", || site.ns(1).link("flannel.1").is_ok());
    agent.until("written again", || site.subnet_file(1).exists());
    assert!(!agent.log().contains("Too many open files"), "{}", agent.log());
}

#[test]
fn ports_that_another_user_has_cost_the_pages_and_not_the_data_plane() {
    let site = Site::new(1, VXLAN);
    let other_user = OtherUser::start(site.ns(1), "ports");
    let agent = site.start(1, &["-metrics-port=8082"]);
    agent.until("programmed", || site.subnet_file(1).exists() && site.ns(1).link("flannel.1").is_ok());
    let told =
        |port: u16| agent.log().matches(&format!("at 127.0.0.1:{port}: another program uses the address")).count();
    agent.until("told", || told(8081) == 1 && told(8082) == 1);
    assert!(agent.log().contains("set -healthz-ip and -healthz-port"), "{}", agent.log());
    drop(other_user);
    agent.until_ready();
    agent.until("served", || agent.get(8082, "/status").is_some());
    assert_eq!((told(8081), told(8082)), (1, 1));
}

#[test]
fn nothing_is_changed_through_the_pages() {
    let site = Site::new(1, VXLAN);
    let agent = site.start(1, &["-metrics-port=8082"]).ready();
    for path in ["/healthz", "/readyz", "/metrics", "/status", "/plan", "/explain?peer=x"] {
        for method in ["POST", "PUT", "DELETE", "PATCH"] {
            let answer = agent.ask(8082, &format!("{method} {path} HTTP/1.0\r\nContent-Length: 2\r\n\r\n{{}}"));
            assert!(answer.starts_with("HTTP/1.0 405"), "{method} {path}: {answer}");
        }
    }
    let json = agent.get(8082, "/status").unwrap().1;
    assert!(json.contains("\"ready\": true"), "{json}");
}

#[test]
fn the_agents_files_are_not_for_others_to_write() {
    let site = Site::new(1, VXLAN);
    fs::set_permissions(site.dir.path(), Permissions::from_mode(0o755)).unwrap();
    let mut command = bare(Command::new("sh"));
    // As a careless service manager would have it.
    command.args(["-c", "umask 0; exec \"$0\" \"$@\"", BINARY]).args(site.args(1));
    let agent = Agent::start_in(site.ns(1), &mut command, site.path("log1"));
    agent.until_ready();
    let env = site.subnet_file(1);
    let record = site.path("store/leases/node1.json");
    let files = [env.clone(), record, site.path("store/lock")];
    let nobody = |words: &[&str]| as_nobody(site.ns(1), words);
    let texts: Vec<_> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    for file in &files {
        let [path, other_user] = [file.clone(), beside(file, ".other-user")].map(|path| path.display().to_string());
        for words in [
            &["truncate", "--size=0", &path][..],
            &["rm", "--force", &path],
            &["mv", "--force", &path, &other_user],
            &["ln", "--symbolic", "/etc/passwd", &other_user],
            &["touch", &other_user],
        ] {
            assert!(!nobody(words), "{words:?}");
        }
    }
    let lock = site.path("store/lock").display().to_string();
    assert!(!nobody(&["flock", "--nonblock", &lock, "true"]));
    assert!(nobody(&["cat", &env.display().to_string()]), "the CNI plug-in's user may read it");
    let after: Vec<_> = files.iter().map(|file| fs::read(file).unwrap()).collect();
    assert_eq!(after, texts);
}

#[test]
fn the_state_file_is_for_the_agents_user_alone() {
    let cluster = Cluster::new(1, VXLAN);
    fs::set_permissions(cluster.site.dir.path(), Permissions::from_mode(0o755)).unwrap();
    let state = cluster.site.path("state.json");
    let mut command = bare(Command::new("sh"));
    command.args(["-c", "umask 0; exec \"$0\" \"$@\"", BINARY]).args(cluster.args(1));
    command.arg(format!("-state-file={}", state.display()));
    let agent = Agent::start_in(cluster.ns(1), &mut command, cluster.site.path("log1"));
    agent.until_ready();
    agent.until("written", || state.exists());
    assert_eq!(fs::metadata(&state).unwrap().permissions().mode() & 0o7777, 0o600);
    let path = state.display().to_string();
    for words in [&["cat", &path][..], &["truncate", "--size=0", &path], &["rm", "--force", &path]] {
        assert!(!as_nobody(cluster.ns(1), words), "{words:?}");
    }
}

fn beside(file: &Path, suffix: &str) -> PathBuf {
    file.with_file_name(format!("{}{suffix}", file.file_name().unwrap().display()))
}
