//! Start, readiness, end.

use std::fs;
use std::io::Write;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use flannel_core::net::{Family, Prefix};
use nix::sys::signal::Signal;

use crate::harness::{Agent, BINARY, PATIENCE, Site, VXLAN, bare, read, routes};

#[test]
fn two_agents_are_ready_with_peers_programmed_and_leave_the_data_plane_up() {
    let site = Site::new(2, VXLAN);
    let mut one = site.start(1, &["-ip-masq=false"]).ready();
    let two = site.start(2, &[]).ready();
    // Ready means that peers are programmed: no further wait for the second agent's.
    let of = |nth| subnet(&read(&site.subnet_file(nth)));
    let (first, second) = (of(1), of(2));
    assert!(routes(site.ns(2)).contains(&format!("{first} via")), "{}", routes(site.ns(2)));
    one.until("told of its peer", || routes(site.ns(1)).contains(&format!("{second} via")));

    let env = read(&site.subnet_file(1));
    let address = first.replace(".0/24", ".1/24");
    let wanted =
        format!("FLANNEL_NETWORK=10.244.0.0/16\nFLANNEL_SUBNET={address}\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=false\n");
    assert_eq!(env, wanted);
    assert_eq!(one.get(8081, "/healthz"), Some((200, "flanneld is running".to_owned())));
    assert!(one.messages().contains("READY=1\n"), "{}", one.messages());

    let before = routes(site.ns(1));
    one.signal(Signal::SIGTERM);
    assert_eq!(one.wait(), Some(0));
    assert!(one.messages().contains("STOPPING=1\n"), "{}", one.messages());
    assert_eq!(routes(site.ns(1)), before);
    assert!(site.ns(1).link("flannel.1").unwrap().is_up());
    assert_eq!(two.end(Signal::SIGINT).0, Some(0));

    // The next run takes over what is there: same subnet, same bytes, nothing written.
    let _again = site.start(1, &[]).ready();
    assert_eq!(read(&site.subnet_file(1)), env);
    assert_eq!(routes(site.ns(1)), before);
}

#[test]
fn an_agent_keeps_only_the_capability_it_needs() {
    let site = Site::new(1, VXLAN);
    let agent = site.start(1, &[]).ready();
    let mut tasks = 0;
    for task in fs::read_dir(format!("/proc/{}/task", agent.pid())).unwrap() {
        // A thread that worked for a blocking call may have gone meanwhile.
        let Ok(status) = fs::read_to_string(task.unwrap().path().join("status")) else { continue };
        let field = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().to_owned()
        };
        let net_admin = format!("{:016x}", 1 << 12);
        for set in ["CapEff", "CapPrm", "CapBnd"] {
            assert_eq!(field(set), net_admin, "{set}");
        }
        assert_eq!(field("NoNewPrivs"), "1");
        tasks += 1;
    }
    assert!(tasks >= 3, "netlink, log and signal threads: {tasks}");
}

#[test]
fn a_second_agent_in_the_namespace_refuses_and_touches_nothing() {
    let site = Site::new(1, VXLAN);
    let agent = site.start(1, &[]).ready();
    let before = routes(site.ns(1));
    let second = site.run(1, &["-node-name=other", "-healthz-port=0", "-subnet-file", &path(&site, "other.env")]);
    assert_eq!(second.code, Some(1), "{second:?}");
    assert!(second.err.contains("already running in this network namespace"), "{}", second.err);
    assert_eq!(routes(site.ns(1)), before);
    assert!(!site.path("store/leases/other.json").exists() && !site.path("other.env").exists());
    agent.until_ready();
}

#[test]
fn an_agent_waits_for_its_uplink_and_says_so_once() {
    let site = Site::new(1, VXLAN);
    let node = &site.underlay.nodes()[0];
    node.ns.flush_main_routes().unwrap();
    let agent = site.start(1, &[]);
    agent.until("waiting", || agent.log().contains("no usable uplink"));
    let (code, reason) = agent.get(8081, "/readyz").unwrap();
    assert!(code == 503 && reason.starts_with("flanneld is not ready yet\nan uplink ("), "{code} {reason}");
    assert_eq!(agent.get(8081, "/healthz").map(|(code, _)| code), Some(200));
    node.restore_underlay().unwrap();
    agent.until_ready();
    assert_eq!(agent.log().matches("no usable uplink").count(), 1, "{}", agent.log());
}

#[test]
fn signals_that_mean_reload_elsewhere_are_ignored_with_a_line() {
    let site = Site::new(1, VXLAN);
    let agent = site.start(1, &[]).ready();
    for signal in [Signal::SIGHUP, Signal::SIGUSR1] {
        agent.signal(signal);
        let line = format!("signal ignored: nothing to reload signal=\"{signal}\"");
        agent.until("told of the signal", || agent.log().contains(&line));
    }
    agent.until_ready();
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
}

#[test]
fn the_log_begins_with_version_process_and_flags_without_the_password() {
    let site = Site::new(1, VXLAN);
    let flags = ["-etcd-username=u", "-etcd-password=hunter2", "-log-format=json"];
    let agent = site.start(1, &flags).ready();
    let log = agent.log();
    let first: serde_json::Value = serde_json::from_str(log.lines().next().unwrap()).unwrap();
    let fields = &first["fields"];
    assert_eq!((&fields["message"], &fields["pid"]), (&"starting flanneld".into(), &agent.pid().into()));
    assert!(fields["flags"].as_str().unwrap().contains("-etcd-password=…"), "{first}");
    assert!(!log.contains("hunter2"), "{log}");
    // So does one that cannot start.
    let second = site.run(1, &["-log-format=json", "-healthz-port=0"]);
    let lines = second.err.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let refusals = lines.filter(|line| line["fields"]["message"].to_string().contains("already running"));
    assert!(refusals.map(|line| line["level"].clone()).eq(["ERROR"]), "{second:?}");
}

#[test]
fn a_signal_while_waiting_ends_at_once() {
    let site = Site::new(1, VXLAN);
    site.underlay.nodes()[0].ns.flush_main_routes().unwrap();
    let agent = site.start(1, &[]);
    agent.until("waiting", || agent.log().contains("no usable uplink"));
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
}

#[test]
fn other_backends_run_too() {
    for (kind, programmed) in [("host-gw", true), ("alloc", false)] {
        let site = Site::new(2, &VXLAN.replace("vxlan", kind));
        let agents = [site.start(1, &[]), site.start(2, &[])].map(Agent::ready);
        let peer = subnet(&read(&site.subnet_file(2)));
        let route = format!("{peer} via 10.89.0.12 dev eth0");
        match programmed {
            true => agents[0].until("told of its peer", || routes(site.ns(1)).contains(&route)),
            false => assert!(!routes(site.ns(1)).contains("10.244."), "{}", routes(site.ns(1))),
        }
        assert!(read(&site.subnet_file(1)).contains("FLANNEL_MTU=1500\n"));
    }
}

#[test]
fn the_own_subnet_is_a_black_hole_when_asked_for() {
    let site = Site::new(1, VXLAN);
    let agent = site.start(1, &["-ip-blackhole-route"]).ready();
    let subnet = subnet(&read(&site.subnet_file(1)));
    let ns = site.ns(1);
    let blackhole = || routes(ns).contains(&format!("blackhole {subnet}"));
    assert!(blackhole(), "{}", routes(ns));
    // The pods' bridge comes, and is taken over by somebody who gives its connected route a metric.
    let prefix: Prefix = subnet.parse().unwrap();
    ns.add_bridge("cni0").unwrap();
    ns.add_address("cni0", subnet.replace(".0/24", ".1").parse().unwrap(), prefix.len()).unwrap();
    ns.set_up("cni0").unwrap();
    agent.until("out of the bridge's way", || !blackhole());
    let connected = ns.routes(Family::V4).unwrap().into_iter().find(|route| route.to == prefix).unwrap();
    ns.add_route(&connected.clone().metric(100)).unwrap();
    ns.delete_route(&connected).unwrap();
    for _ in 0..2 {
        // What it repairs shows that it has looked; the second time, that the first look is done.
        ns.set_mtu("flannel.1", 1400).unwrap();
        agent.until("aware", || ns.link("flannel.1").unwrap().mtu == 1450);
    }
    assert!(!blackhole(), "{}", routes(ns));
    ns.delete_link("cni0").unwrap();
    agent.until("back", blackhole);
}

#[test]
fn masquerade_without_a_tool_ends_the_agent_and_says_what_to_install() {
    let site = Site::new(1, VXLAN);
    let mut agent = site.start_with_path(1, &["-ip-masq"], "/nonexistent");
    assert_eq!(agent.wait(), Some(1), "{}", agent.log());
    assert!(agent.log().contains("apt install iptables"), "{}", agent.log());
}

#[test]
fn forward_rules_that_cannot_be_written_are_shown_and_keep_nobody_waiting() {
    let site = Site::new(1, VXLAN);
    let agent = site.start_with_path(1, &[], "/nonexistent");
    agent.until_ready();
    assert_eq!(agent.metric("flannel_firewall_in_place"), Some(0.0));
    let table = site.run(1, &["status"]);
    assert_eq!(table.code, Some(0), "{table:?}");
    let shown = table.out.lines().find(|line| line.starts_with("firewall ")).unwrap_or(&table.out);
    assert!(shown.contains("apt install iptables"), "{shown}");
}

fn path(site: &Site, name: &str) -> String {
    site.path(name).display().to_string()
}

/// The subnet that a `subnet.env` names.
fn subnet(env: &str) -> String {
    let value = env.lines().find_map(|line| line.strip_prefix("FLANNEL_SUBNET=")).expect("no FLANNEL_SUBNET");
    value.replace(".1/24", ".0/24")
}

/// A pipe that takes nothing more, and its reader who does not read.
fn full_pipe(site: &Site) -> (PathBuf, fs::File) {
    let path = site.path("pipe");
    assert!(site.tool(1, &["mkfifo", &path.display().to_string()]).code == Some(0));
    let nonblocking = libc::O_NONBLOCK;
    let mut pipe = fs::OpenOptions::new().read(true).write(true).custom_flags(nonblocking).open(&path).unwrap();
    while pipe.write(&[b'x'; 4096]).is_ok() {}
    while pipe.write(b"x").is_ok() {}
    (path, pipe)
}

/// An agent whose log goes to `pipe`.
fn logging_to(site: &Site, pipe: &Path, more: &[&str]) -> Agent {
    let mut command = bare(Command::new("sh"));
    command.args(["-c", "exec \"$0\" \"$@\" 2>\"$LOG\"", BINARY]).args(site.args(1)).args(more);
    Agent::start_in(site.ns(1), command.env("LOG", pipe), site.path("log1"))
}

#[test]
fn a_supervisor_that_does_not_read_holds_up_neither_work_nor_end() {
    let site = Site::new(1, VXLAN);
    let agent = Agent::start_unread(site.ns(1), &site.args(1), site.path("log1"));
    agent.until("programmed", || site.subnet_file(1).exists());
    agent.until_ready();
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
}

#[test]
fn a_log_that_nobody_reads_holds_up_neither_work_nor_end() {
    let site = Site::new(1, VXLAN);
    let (pipe, _reader) = full_pipe(&site);
    let agent = logging_to(&site, &pipe, &["-v=10", "-metrics-port=8082"]);
    agent.until_ready();
    for _ in 0..5 {
        site.tool(1, &["ip", "link", "delete", "flannel.1"]);
        agent.until("healed", || site.ns(1).link("flannel.1").is_ok());
    }
    assert_eq!(agent.get(8082, "/status").unwrap().0, 200);
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
    fs::write(site.path("store/config.json"), "{").unwrap();
    assert_eq!(logging_to(&site, &pipe, &[]).wait(), Some(1), "an end with an error");
}

#[test]
fn what_the_supervisor_is_told_is_one_plain_line_that_it_takes_whatever_the_agent_was_given() {
    let site = Site::new(1, VXLAN);
    let hostile = format!("-iface-regex=eth9\nMAINPID=1\nREADY=1\u{1b}\u{202e}{}", "x".repeat(8000));
    let mut agent = site.start(1, &[&hostile]);
    agent.until("waiting", || agent.log().contains("no usable uplink"));
    let waits = |agent: &mut Agent| agent.messages().contains("waiting for");
    let mut told = false;
    testkit::wait_until("told", PATIENCE, || {
        told = waits(&mut agent);
        Ok(told)
    })
    .unwrap();
    let messages = agent.messages().to_owned();
    for line in messages.lines().filter(|line| !line.is_empty()) {
        assert!(line.starts_with("STATUS=") && line.len() < 2048, "{line:?}");
        assert!(line.chars().all(flannel_core::text::is_plain), "{line:?}");
    }
}
