//! Restarts and sudden ends (docs/faults.md, P1 and P4).

use std::fs;
use std::net::TcpStream;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use flannel_core::net::Family;
use nix::sys::signal::Signal;

use testkit::cases;

use crate::harness::{Agent, BINARY, HOST_GW, PATIENCE, VXLAN, bare, read, routes};
use crate::store::{Cluster, RATE, assert_no_loss, flow, reaches};

const RESTARTS: usize = 50;
/// Both ways together; as long as they take, restarts go on.
const PACKETS: u64 = 60_000;

cases! {
    fn fifty_restarts_and_more_on_vxlan_lose_no_packet_and_keep_the_lease() = restarts_lose_nothing(VXLAN);
    fn fifty_restarts_and_more_on_host_gw_lose_no_packet_and_keep_the_lease() = restarts_lose_nothing(HOST_GW);
}

/// By signal and by kill -9, in turn, under a thousand packets a second each way.
fn restarts_lose_nothing(config: &str) {
    let cluster = Cluster::new(2, config);
    let start = |nth| cluster.start(nth, &["-ip-masq"]);
    let (mut one, two) = (start(1), start(2));
    [&one, &two].into_iter().for_each(Agent::until_ready);
    let pods = [cluster.pod(1), cluster.pod(2)];
    reaches(&pods[0], &pods[1]);
    let (records, env) = (cluster.records().len(), read(&cluster.site.subnet_file(1)));
    let (keys, before) = (cluster.keys_of(1), routes(cluster.ns(1)));
    let flows = [(0, 1), (1, 0)].map(|(from, to)| flow(&pods[from], &pods[to], Family::V4));
    let long = Duration::from_secs(PACKETS / u64::from(2 * RATE) + 1);
    let begin = Instant::now();
    for nth in 0.. {
        if nth >= RESTARTS && begin.elapsed() >= long {
            break;
        }
        one.end(if nth % 2 == 0 { Signal::SIGTERM } else { Signal::SIGKILL });
        one = start(1);
        one.until_ready();
    }
    let sent: u64 = flows.map(|flow| assert_no_loss(flow).sent).into_iter().sum();
    assert!(sent >= PACKETS, "{sent}");
    assert_eq!((cluster.keys_of(1), cluster.records().len()), (keys, records));
    assert_eq!((routes(cluster.ns(1)), read(&cluster.site.subnet_file(1))), (before, env));
    cluster.assert_lawful();
}

/// A process ends within 2 s (docs/faults.md, P3); the rest allows for a machine under load.
const END: Duration = Duration::from_secs(20);

#[test]
fn a_signal_at_any_moment_of_the_start_ends_it_in_time() {
    let cluster = Cluster::new(2, VXLAN);
    let _two = cluster.start(2, &[]).ready();
    for wait in (0..12).map(|nth| Duration::from_millis(nth * 20)) {
        let one = cluster.start(1, &["-ip-masq"]);
        std::thread::sleep(wait);
        let (code, took) = one.end(Signal::SIGTERM);
        // Before the handler is installed, SIGTERM kills it.
        assert!(code.is_none_or(|code| code == 0), "after {wait:?}: {code:?}");
        assert!(took < END, "after {wait:?}: {took:?}");
        assert!(cluster.keys_of(1).len() <= 1);
    }
    let _one = cluster.start(1, &["-ip-masq"]).ready();
    assert!(cluster.has_route(1, &cluster.subnet(2)));
    cluster.assert_lawful();
}

/// System calls that change something: of the kernel, of etcd, of files.
const CALLS: [&str; 5] = ["sendto", "writev", "fsync", "rename", "unlink"];

#[test]
fn killed_at_any_call_that_changes_something_the_next_start_converges_and_nothing_leaks() {
    let cluster = Cluster::new(2, VXLAN);
    let _two = cluster.start(2, &["-state-file="]).ready();
    let base = seen(&cluster);
    let flags = ["-iptables-forward-rules=false"];
    let mut killed = 0;
    for calls in CALLS {
        for nth in 1.. {
            let died = dies_at(&cluster, calls, nth, &flags);
            let env = read(&cluster.site.subnet_file(1));
            assert!(env.is_empty() || env.contains("FLANNEL_IPMASQ=false\n"), "{calls} {nth}: {env:?}");
            let keys = cluster.keys_of(1);
            assert!(keys.len() <= 1, "{calls} {nth}: {:?}", cluster.records());

            let one = cluster.start(1, &flags).ready();
            assert!(cluster.has_route(1, &cluster.subnet(2)), "{calls} {nth}: {}", routes(cluster.ns(1)));
            let found = cluster.keys_of(1);
            assert_eq!(found, [cluster.subnet(1).to_string().replace('/', "-")], "{calls} {nth}");
            assert!(keys.is_empty() || keys == found, "{calls} {nth}: {keys:?} became {found:?}");
            assert_eq!(one.get(9472, "/plan"), Some((200, "nothing to do\n".to_owned())), "{calls} {nth}");
            one.end(Signal::SIGTERM);
            let cleaned = cluster.run(1, &["cleanup"]);
            assert_eq!(cleaned.code, Some(0), "{calls} {nth}: {cleaned:?}");
            assert_eq!(seen(&cluster), base, "{calls} {nth}");
            if !died {
                break;
            }
            killed += 1;
        }
    }
    cluster.assert_lawful();
    assert!(killed >= CALLS.len() * 2, "only {killed} calls were met");
}

/// Starts an agent that is killed when one of its threads is about to make the nth of these calls. Returns whether it
/// was: one that makes fewer gets ready, and is ended.
fn dies_at(cluster: &Cluster, calls: &str, nth: usize, flags: &[&str]) -> bool {
    let mut strace = bare(Command::new("strace"));
    strace.args(["-f", "-qq", "-o", "/dev/null", "-e", &format!("trace={calls}")]);
    strace.args(["-e", &format!("inject={calls}:signal=KILL:when={nth}")]);
    // Whoever ends strace ends what it runs.
    strace.args(["setpriv", "--pdeathsig", "KILL", BINARY]).args(cluster.args(1)).args(flags).stdout(Stdio::null());
    let mut agent = Agent::start_in(cluster.ns(1), &mut strace, cluster.site.path("log-killed"));
    let ended = agent.ended_or(|agent| agent.is_ready());
    if !ended {
        agent.end(Signal::SIGKILL);
        // It dies a moment after strace.
        let gone = || cluster.ns(1).run(|| TcpStream::connect(("127.0.0.1", 8081)).is_err());
        testkit::wait_until("dead", PATIENCE, gone).unwrap();
    }
    ended
}

/// What a node and its directory look like to somebody who looks for leftovers.
fn seen(cluster: &Cluster) -> (String, Vec<String>, Vec<String>, Vec<String>) {
    let links = cluster.ns(1).links().unwrap().into_iter().map(|link| link.name).collect();
    let files = |dir: &std::path::Path| {
        let entries = fs::read_dir(dir).into_iter().flatten();
        let mut names: Vec<_> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.retain(|name| name != "etcd.log" && !name.starts_with("log"));
        names.sort();
        names
    };
    let run = cluster.site.subnet_file(1);
    (routes(cluster.ns(1)), links, files(run.parent().unwrap()), files(cluster.site.dir.path()))
}
