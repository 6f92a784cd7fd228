//! The packet filter around a running agent: its own rules, and those of others.

use std::fs::Permissions;
use std::net::{IpAddr, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use flannel_core::net::{Family, Prefix};
use nix::sys::signal::Signal;
use testkit::{Fdb, Namespace, Neighbour, Route, VxlanLink};

use crate::harness::{Agent, PATIENCE, Site, VXLAN, routes};
use crate::records::{peer_key, put_peers};
use crate::store::{Cluster, assert_no_loss, flow, reaches};

const NFT: &str = r#"{"EnableNFTables":true,"Network":"10.244.0.0/16","SubnetLen":24,"Backend":{"Type":"vxlan"}}"#;

#[test]
fn a_guarded_port_takes_no_packet_of_a_stranger_and_those_of_every_peer() {
    let cluster = Cluster::new(3, NFT);
    let _agents = [cluster.start(1, &["-vxlan-guard"]), cluster.start(2, &[])].map(Agent::ready);
    let pods = [cluster.pod(1), cluster.pod(2)];
    reaches(&pods[0], &pods[1]);
    reaches(&pods[1], &pods[0]);

    // Node 3 is nobody's peer, and knows all that a peer would.
    let stranger = cluster.ns(3);
    let vxlan = VxlanLink {
        vni: 1,
        port: Some(8472),
        local: Some("10.89.0.13".parse().unwrap()),
        lower: Some("eth0".to_owned()),
        ..VxlanLink::default()
    };
    stranger.add_vxlan("rogue", &vxlan, None).unwrap();
    stranger.set_up("rogue").unwrap();
    stranger.add_address("rogue", "10.98.0.1".parse().unwrap(), 32).unwrap();
    let inboxes = [1, 2].map(|nth| {
        let addr = cluster.subnet(nth).addr();
        let mac = cluster.ns(nth).link("flannel.1").unwrap().mac.unwrap();
        stranger.add_route(&Route::to(Prefix::new(addr, 32).unwrap()).dev("rogue")).unwrap();
        stranger.put_neighbours(&[Neighbour::permanent("rogue", addr, mac)]).unwrap();
        let outer: IpAddr = format!("10.89.0.{}", 10 + nth).parse().unwrap();
        stranger.put_fdb(&[Fdb::permanent("rogue", mac, outer)]).unwrap();
        inbox(cluster.ns(nth), addr)
    });
    let outbox = stranger.run(|| UdpSocket::bind(("10.98.0.1", 0)).unwrap()).unwrap();
    for inbox in &inboxes {
        outbox.send_to(b"x", inbox.local_addr().unwrap()).unwrap();
    }
    assert!(inboxes[1].recv(&mut [0; 8]).is_ok(), "it would have come through");
    inboxes[0].set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    assert!(inboxes[0].recv(&mut [0; 8]).is_err(), "the guard let it through");

    stranger.delete_link("rogue").unwrap();
    let _three = cluster.start(3, &[]).ready();
    reaches(&cluster.pod(3), &pods[0]);
}

#[test]
fn the_guarded_port_is_that_of_the_device() {
    let site = Site::new(1, NFT);
    let other = VxlanLink {
        vni: 1,
        port: Some(4789),
        local: Some("10.89.0.11".parse().unwrap()),
        lower: Some("eth0".to_owned()),
        ..VxlanLink::default()
    };
    site.ns(1).add_vxlan("flannel.1", &other, None).unwrap();
    let device = || site.tool(1, &["ip", "-details", "link", "show", "flannel.1"]).out;
    let agent = site.start(1, &[]).ready();
    assert!(device().contains("dstport 4789"), "without a port, any is adopted: {}", device());
    agent.end(Signal::SIGTERM);
    let _agent = site.start(1, &["-vxlan-guard"]).ready();
    assert!(device().contains("dstport 8472"), "{}", device());
    let rules = site.tool(1, &["nft", "list", "ruleset"]).out;
    assert!(rules.contains("udp dport 8472"), "{rules}");
}

#[test]
fn a_restart_under_guard_costs_no_packet() {
    let cluster = Cluster::placed(2, NFT);
    let start = || cluster.start(1, &["-vxlan-guard"]);
    let (mut one, two) = (start(), cluster.start(2, &[]));
    [&one, &two].into_iter().for_each(Agent::until_ready);
    let pods = [cluster.pod(1), cluster.pod(2)];
    reaches(&pods[1], &pods[0]);
    let flow = flow(&pods[1], &pods[0], Family::V4);
    for signal in [Signal::SIGTERM, Signal::SIGKILL, Signal::SIGTERM, Signal::SIGKILL] {
        one.end(signal);
        one = start();
        one.until_ready();
    }
    assert_no_loss(flow);
}

#[test]
fn after_a_restart_the_guard_still_admits_peers_whose_removal_is_withheld() {
    let cluster = Cluster::new(1, NFT);
    let start = || cluster.start(1, &["-vxlan-guard"]);
    put_peers(&cluster, 100..120);
    let set = || cluster.site.tool(1, &["nft", "list", "set", "ip", "flannel-ipv4", "peers"]).out;
    let let_in = || (100..120).filter(|n| set().contains(&format!("10.89.1.{n}"))).count();
    let agent = start();
    agent.until_ready();
    agent.until("guarded", || let_in() == 20);
    agent.end(Signal::SIGTERM);
    (100..118).for_each(|n| cluster.delete(&peer_key(n)));
    let agent = start();
    agent.until_ready();
    // Their routes are still there, so what they send has to be as well.
    assert!(routes(cluster.ns(1)).contains("10.244.100.0/24 "));
    assert_eq!(let_in(), 20, "{}", set());
}

#[test]
fn after_a_restart_the_guard_admits_for_a_bad_record_the_former_peer_of_its_subnet_alone() {
    let cluster = Cluster::new(1, NFT);
    let start = || cluster.start(1, &["-vxlan-guard"]);
    put_peers(&cluster, 100..110);
    let set = || cluster.site.tool(1, &["nft", "list", "set", "ip", "flannel-ipv4", "peers"]).out;
    let let_in = || (100..110).filter(|n| set().contains(&format!("10.89.1.{n}"))).collect::<Vec<u8>>();
    let agent = start();
    agent.until_ready();
    agent.until("guarded", || let_in().len() == 10);
    agent.end(Signal::SIGTERM);
    cluster.put(&peer_key(100), "no JSON");
    cluster.delete(&peer_key(101));
    let agent = start();
    agent.until_ready();
    let here = routes(cluster.ns(1));
    assert!(here.contains("10.244.100.0/24 ") && !here.contains("10.244.101.0/24 "), "{here}");
    assert_eq!(let_in(), [100].into_iter().chain(102..110).collect::<Vec<_>>(), "{}", set());
}

#[test]
fn what_the_other_tool_left_is_cleared_as_soon_as_that_tool_works() {
    let site = Site::new(1, VXLAN);
    let agent = site.start(1, &["-ip-masq"]).ready();
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
    // The tool's lock is held by somebody, as far as its exit status tells.
    // Programs are not put into memory: containers let nobody execute what is there.
    let (bin, held) = (tempfile::tempdir().unwrap(), site.path("held"));
    std::fs::write(&held, "").unwrap();
    for tool in ["iptables-restore", "ip6tables-restore"] {
        let script = format!("#!/bin/sh\n[ ! -e {} ] || exit 4\nexec /usr/sbin/{tool} \"$@\"\n", held.display());
        std::fs::write(bin.path().join(tool), script).unwrap();
        std::fs::set_permissions(bin.path().join(tool), Permissions::from_mode(0o755)).unwrap();
    }
    std::fs::write(site.path("store/config.json"), NFT).unwrap();
    let path = format!("{}:{}", bin.path().display(), std::env::var("PATH").unwrap());
    let agent = site.start_with_path(1, &["-ip-masq", "-iptables-resync=1"], &path);
    agent.until_ready();
    let left = || site.tool(1, &["iptables-save"]).out.contains("FLANNEL-POSTRTG");
    agent.until("told of the failure", || agent.log().contains("cannot remove the rules"));
    assert!(left());
    std::fs::remove_file(&held).unwrap();
    agent.until("rid of what iptables had", || !left());
}

fn inbox(ns: &Namespace, addr: IpAddr) -> UdpSocket {
    let socket = ns.run(|| UdpSocket::bind((addr, 0)).unwrap()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    socket
}

#[test]
fn a_guard_by_iptables_is_refused_with_its_remedy() {
    let site = Site::new(1, VXLAN);
    let mut agent = site.start(1, &["-vxlan-guard"]);
    assert_eq!(agent.wait(), Some(1), "{}", agent.log());
    let log = agent.log();
    let said = log.lines().find(|line| line.starts_with("flanneld: ")).unwrap_or(&log);
    assert!(said.contains("-vxlan-guard") && said.contains("EnableNFTables"), "{said}");
    let leases = std::fs::read_dir(site.path("store/leases")).map(Iterator::count).unwrap_or_default();
    assert!(leases == 0 && site.ns(1).link("flannel.1").is_err(), "refused before anything is touched");
    let doctor = site.run(1, &["doctor", "-vxlan-guard"]).out;
    assert!(doctor.lines().any(|line| line.starts_with("ERROR    guard")), "{doctor}");
}

#[test]
fn rules_of_others_stay_as_they_are_while_ours_come_back_and_go() {
    for (config, ours) in [(NFT, &["nft", "list", "ruleset"][..]), (VXLAN, &["iptables-save"])] {
        let site = Site::new(1, config);
        let run = |words: &[&str]| {
            let told = site.tool(1, words);
            assert_eq!(told.code, Some(0), "{words:?}: {told:?}");
            told.out
        };
        run(&["nft", "add table ip flannel-other"]);
        run(&["nft", "add chain ip flannel-other c { type filter hook forward priority 10; }"]);
        run(&["nft", "add rule ip flannel-other c ip saddr 10.99.0.0/16 drop"]);
        for rule in [
            "-t nat -N FLANNEL-OTHER",
            "-t nat -A POSTROUTING -s 10.99.0.0/16 -j FLANNEL-OTHER",
            "-A FORWARD -p tcp --dport 9 -j DROP",
        ] {
            run(&[&["iptables"], rule.split(' ').collect::<Vec<_>>().as_slice()].concat());
        }
        let theirs = || {
            let saved = run(&["iptables-save"]);
            let saved = saved.lines().filter(|line| line.starts_with("-A") && !line.contains("flanneld"));
            let saved: Vec<_> = saved.map(str::to_owned).collect();
            (saved, run(&["nft", "list", "table", "ip", "flannel-other"]))
        };
        let before = theirs();
        assert_eq!(before.0.len(), 2);
        let agent = site.start(1, &["-ip-masq"]).ready();
        let written = run(ours);
        assert!(written.to_lowercase().contains("masquerade"), "{written}");
        // So that it does not mend what we look at.
        agent.signal(Signal::SIGSTOP);
        match config {
            NFT => run(&["nft", "flush", "chain", "ip", "flannel-ipv4", "postrtg"]),
            _ => run(&["iptables", "-t", "nat", "-F", "FLANNEL-POSTRTG"]),
        };
        assert_ne!(run(ours), written);
        agent.signal(Signal::SIGCONT);
        let mended = || {
            Ok::<_, testkit::Error>(
                run(ours)
                    .lines()
                    .filter(|line| line.contains("10.244."))
                    .eq(written.lines().filter(|line| line.contains("10.244."))),
            )
        };
        testkit::wait_until("ours again", PATIENCE, mended).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(theirs(), before);
        assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
        assert!(mended().unwrap(), "they outlive the agent");
        assert_eq!(site.run(1, &["cleanup"]).code, Some(0));
        assert_eq!(theirs(), before);
        assert!(
            !run(&["iptables-save"]).contains("flanneld") && !run(&["nft", "list", "ruleset"]).contains("flannel-ipv4")
        );
    }
}
