//! A machine that lacks something: room on the disk, or time on the processor.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::harness::{Agent, BINARY, VXLAN, bare, routes, side_by_side};
use crate::records::{peer_key, put_peers};
use crate::store::{Cluster, SUBNETS, status};

/// An agent whose files are on a small disk of its own, which nobody else sees.
struct OnSmallDisk {
    agent: Agent,
    /// The disk, as seen from outside.
    disk: PathBuf,
}

/// How many bytes the disk takes: two files of a page each and the directory entries for them.
const ROOM: &str = "size=12k";

impl OnSmallDisk {
    fn start(cluster: &Cluster, before: &str) -> Self {
        let dir = cluster.site.path("disk");
        fs::create_dir_all(&dir).unwrap();
        let script = format!("mount -t tmpfs -o {ROOM},mode=755 none \"$DIR\"; {before}; exec \"$0\" \"$@\"");
        let mut command = bare(std::process::Command::new("unshare"));
        command.args(["--mount", "--propagation=private", "sh", "-c", &script, BINARY]).args(cluster.args(1));
        command.arg(format!("-subnet-file={}", dir.join("subnet.env").display()));
        command.arg(format!("-state-file={}", dir.join("state.json").display()));
        let agent = Agent::start_in(cluster.ns(1), command.env("DIR", &dir), cluster.site.path("log1"));
        let disk = PathBuf::from(format!("/proc/{}/root{}", agent.pid(), dir.display()));
        Self { agent, disk }
    }

    /// Everything that is on the disk, by name.
    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.disk).unwrap();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    fn read(&self, name: &str) -> String {
        fs::read_to_string(self.disk.join(name)).unwrap_or_default()
    }

    fn remount(&self, how: &str, cluster: &Cluster) {
        let [pid, dir] = [self.agent.pid().to_string(), cluster.site.path("disk").display().to_string()];
        let told = cluster.site.tool(1, &["nsenter", "-t", &pid, "-m", "mount", "-o", &format!("remount,{how}"), &dir]);
        assert_eq!(told.code, Some(0), "{told:?}");
    }
}

/// Leaves no byte on a disk. What does not fit is not written.
fn fill(disk: &Path) {
    let _ = fs::write(disk.join("filler"), vec![b'x'; 1 << 20]);
}

fn has_peer(cluster: &Cluster, n: u8) -> bool {
    routes(cluster.ns(1)).contains(&format!("10.244.{n}.0/24 via"))
}

#[test]
fn a_disk_that_is_full_at_the_start_costs_no_peer_and_is_made_up_for_once_there_is_room() {
    let cluster = Cluster::placed(1, VXLAN);
    put_peers(&cluster, 200..201);
    let on = OnSmallDisk::start(&cluster, "head -c 1M /dev/zero >\"$DIR/filler\" 2>/dev/null");
    let agent = &on.agent;
    agent.until("programmed", || has_peer(&cluster, 200));
    let not_ready = || agent.get(9472, "/status").is_some_and(|(_, text)| text.contains("free some space"));
    agent.until("told why it is not ready", not_ready);
    assert_eq!(agent.get(8081, "/readyz").map(|(code, _)| code), Some(503));
    put_peers(&cluster, 201..202);
    agent.until("told of the newcomer", || has_peer(&cluster, 201));
    // While it tries again, what it writes is there for a moment.
    agent.until("rid of what it could not write", || on.names() == ["filler"]);
    fs::remove_file(on.disk.join("filler")).unwrap();
    agent.until_ready();
    assert!(on.read("subnet.env").ends_with("FLANNEL_IPMASQ=false\n"), "{}", on.read("subnet.env"));
    agent.until("written down", || on.read("state.json").ends_with("}\n"));
    agent.until("done", || on.names() == ["state.json", "subnet.env"]);
}

#[test]
fn a_disk_that_fills_up_or_becomes_read_only_later_tears_no_file_and_costs_neither_peers_nor_readiness_nor_the_end() {
    side_by_side(["full", "read-only"], |how| {
        let cluster = Cluster::placed(1, VXLAN);
        let mut on = OnSmallDisk::start(&cluster, "true");
        on.agent.until_ready();
        on.agent.until("written down", || on.read("state.json").ends_with("}\n"));
        let texts = |on: &OnSmallDisk| ["subnet.env", "state.json"].map(|name| on.read(name));
        let whole = texts(&on);
        match how {
            "full" => fill(&on.disk),
            _ => on.remount("ro", &cluster),
        }
        put_peers(&cluster, 200..201);
        on.agent.until("told of the newcomer", || has_peer(&cluster, 200));
        assert!(on.agent.is_ready(), "{how}");
        // The end writes what the state file lacks. The disk outlives it as long as it is open.
        let held = fs::File::open(&on.disk).unwrap();
        on.disk = PathBuf::from(format!("/proc/self/fd/{}", held.as_raw_fd()));
        on.agent.signal(Signal::SIGTERM);
        assert_eq!(on.agent.wait(), Some(0), "{how}");
        assert!(on.agent.log().contains("cannot write the state file"), "{how}: {}", on.agent.log());
        assert_eq!(texts(&on), whole, "{how}");
        let names = on.names().into_iter().filter(|name| name != "filler");
        assert_eq!(names.collect::<Vec<_>>(), ["state.json", "subnet.env"], "{how}");
    });
}

/// How a machine runs a process that it gives a twentieth of a processor.
const RUN: Duration = Duration::from_millis(5);
const WAIT: Duration = Duration::from_millis(95);
/// Peers that join meanwhile, and the time between two of them.
const JOINS: u8 = 200;
const PACE: Duration = Duration::from_millis(10);

/// Lets a process run for a twentieth of the time while `f` runs, and then goes on with it.
fn starved<T>(agent: &Agent, f: impl FnOnce() -> T) -> T {
    let pid = Pid::from_raw(i32::try_from(agent.pid()).unwrap());
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                kill(pid, Signal::SIGSTOP).unwrap();
                thread::sleep(WAIT);
                kill(pid, Signal::SIGCONT).unwrap();
                thread::sleep(RUN);
            }
        });
        let _over = Over(&over);
        f()
    })
}

/// Ends the starving, also where a test fails.
struct Over<'a>(&'a AtomicBool);

impl Drop for Over<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

#[test]
fn with_a_twentieth_of_a_processor_amid_churn_the_node_keeps_its_lease_heals_and_follows() {
    let cluster = Cluster::placed(2, VXLAN);
    let agents = [cluster.start(1, &[]), cluster.start(2, &[])].map(Agent::ready);
    let one = &agents[0];
    let keys = cluster.keys_of(1);
    starved(one, || {
        for n in 3..JOINS {
            put_peers(&cluster, n..n + 1);
            if n % 3 == 0 {
                cluster.delete(&peer_key(n - 1));
            }
            thread::sleep(PACE);
        }
        cluster.ns(1).delete_link("flannel.1").unwrap();
        let there = |n: u8| n % 3 != 2 || n == JOINS - 1;
        one.until("healed and told of all", || (3..JOINS).all(|n| has_peer(&cluster, n) == there(n)));
        // Somebody writes over its record, and it has to be written again.
        let value = cluster.records().into_iter().find(|(key, _)| *key == keys[0]).unwrap().1;
        cluster.put(&format!("{SUBNETS}/{}", keys[0]), &value.replace("\"VNI\":1", "\"VNI\":7"));
        one.until("published again", || cluster.records().iter().any(|(key, now)| *key == keys[0] && *now == value));
        one.until_ready();
        assert_eq!(status(one)["status"]["store"]["kind"], "live");
    });
    assert_eq!(cluster.keys_of(1), keys);
    for event in ["lease_lost", "store_lost"] {
        assert_eq!(one.metric(&format!("flannel_events_total{{kind=\"{event}\"}}")), Some(0.0), "{event}");
    }
    one.until("at rest", || one.get(9472, "/plan") == Some((200, "nothing to do\n".to_owned())));
    cluster.assert_lawful();
}
