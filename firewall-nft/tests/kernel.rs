//! The rules on the real kernel: what they do to packets, what is noticed, and what is left alone.
#![expect(clippy::unwrap_used, clippy::expect_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use flannel_core::firewall::{
    Drift, Firewall, FirewallError, Forward, Masquerade, Problem, Rules, SourcePorts, VxlanGuard,
};
use flannel_core::kernel::OverlayName;
use flannel_core::net::{Dual, Family, Prefix};
use flannel_firewall_iptables::Iptables;
use flannel_firewall_nft::Nft;
use testkit::filter::{Datagram, FilterLab, Newcomers, outside_address, second_address};
use testkit::{Families, Namespace};

const SOON: Duration = Duration::from_secs(3);
const NEVER: Duration = Duration::from_millis(200);

fn namespace() -> Namespace {
    Namespace::new("filter").expect("the tests need root, or a user namespace: unshare -Urn cargo test")
}

fn lab(families: Families) -> FilterLab {
    FilterLab::new(families).expect("the lab needs root, or a user namespace: unshare -Urn cargo test")
}

fn nft_in(ns: &Namespace) -> Nft {
    Nft::in_namespace(ns.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

/// Runs `nft` with this input, for what a test itself does to the rules.
fn nft(ns: &Namespace, args: &[&str], input: &str) -> String {
    let run = || {
        let mut child = Command::new("nft")
            .args(args)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .expect("the tests need nft: apt install nftables");
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let output = ns.run(run).unwrap();
    assert!(output.status.success(), "nft {args:?}");
    String::from_utf8(output.stdout).unwrap()
}

fn ruleset(ns: &Namespace) -> String {
    nft(ns, &["list", "ruleset"], "")
}

fn sabotage(ns: &Namespace, commands: &str) {
    nft(ns, &["-f", "-"], commands);
}

fn dual(v4: &str, v6: &str) -> Dual<Prefix> {
    Dual { v4: Some(v4.parse().unwrap()), v6: Some(v6.parse().unwrap()) }
}

fn rules(overlay: &str) -> Rules {
    let networks = dual("10.42.0.0/16", "2001:cafe:42::/56");
    let subnets = dual("10.42.7.0/24", "2001:cafe:42:7::/64");
    let rules = Rules::new(OverlayName::new(overlay).unwrap(), &networks, &subnets);
    Rules { masquerade: Some(Masquerade::default()), ..rules }
}

fn guarded(overlay: &str) -> Rules {
    let peers = ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|addr| addr.parse().unwrap()).into();
    Rules { guard: Some(VxlanGuard { port: 8472, peers }), ..rules(overlay) }
}

async fn in_place(firewall: &Nft, rules: &Rules) {
    assert_eq!(firewall.check(rules).await.unwrap(), []);
}

#[tokio::test]
async fn rules_applied_are_in_place_and_listed_as_go_flannels_but_for_the_mask_and_the_fourth() {
    let ns = namespace();
    let firewall = nft_in(&ns);
    firewall.apply(&guarded("flannel")).await.unwrap();
    in_place(&firewall, &guarded("flannel")).await;
    let ours = ruleset(&ns);
    sabotage(&ns, "flush ruleset");
    sabotage(&ns, include_str!("golden/go.nft"));
    let lines = |text: &str| -> Vec<String> {
        let table = text.split_inclusive("\n}\n").next().unwrap();
        let chains =
            table.lines().filter(|line| !["set ", "type ipv4_addr", "elements"].iter().any(|it| line.contains(it)));
        chains.map(|line| line.trim().to_owned()).filter(|line| !line.is_empty()).collect()
    };
    let (ours, go) = (lines(&ours), lines(&ruleset(&ns)));
    let only = |these: &[String], those: &[String]| -> Vec<String> {
        these.iter().filter(|line| !those.contains(line) && !line.contains("vxlan")).cloned().collect()
    };
    assert_eq!(
        only(&go, &ours),
        ["meta mark 0x00004000 return", "ip saddr != 10.42.7.0/24 ip daddr 10.42.0.0/16 return"]
    );
    let more = only(&ours, &go);
    assert!(more[0].starts_with("meta mark & 0x"), "{more:?}");
    assert_eq!(more[1], "ip saddr != 10.42.0.0/16 ip daddr 10.42.7.0/24 return");
}

#[tokio::test]
async fn one_family_gets_one_table_and_switched_off_rules_leave_no_chain() {
    for family in Family::BOTH {
        let ns = namespace();
        let firewall = nft_in(&ns);
        let mut only = rules("flannel");
        firewall.apply(&guarded("flannel")).await.unwrap();
        *only.pods.slot(if family == Family::V4 { Family::V6 } else { Family::V4 }) = None;
        only.masquerade = Some(Masquerade { ports: SourcePorts::Kernel });
        only.forward = Forward::Untouched;
        assert!(!firewall.check(&only).await.unwrap().is_empty());
        firewall.apply(&only).await.unwrap();
        in_place(&firewall, &only).await;
        let text = ruleset(&ns);
        assert_eq!(text.matches("table ").count(), 1, "{text}");
        for gone in ["random", "forward", "vxlan", "peers"] {
            assert!(!text.contains(gone), "{gone}: {text}");
        }
        assert_eq!(text.contains("ip6 "), family == Family::V6, "{text}");
    }
}

#[tokio::test]
async fn nothing_of_a_former_network_or_lease_stays() {
    let ns = namespace();
    let firewall = nft_in(&ns);
    firewall.apply(&guarded("flannel")).await.unwrap();
    let networks = Dual { v4: Some("172.30.0.0/16".parse().unwrap()), v6: None };
    let subnets = Dual { v4: Some("172.30.9.0/24".parse().unwrap()), v6: None };
    let moved =
        Rules { masquerade: Some(Masquerade::default()), ..Rules::new(OverlayName::default(), &networks, &subnets) };
    firewall.apply(&moved).await.unwrap();
    in_place(&firewall, &moved).await;
    let text = ruleset(&ns);
    assert!(!text.contains("10.42.") && !text.contains("cafe") && text.contains("172.30.9.0/24"), "{text}");
}

/// What others have, some of it with names close to ours.
const FOREIGN: &str = "
    table ip flannel-ipv4-x { chain postrtg { type nat hook postrouting priority 100; ip saddr 10.9.0.0/16 masquerade; }; }
    table inet flannel-ipv4 { set peers { type ipv4_addr; elements = { 1.2.3.4 } ; }; chain forward { type filter hook forward priority 0; counter; }; }
    table ip nat { chain FLANNEL-POSTRTG { return; }; chain POSTROUTING { type nat hook postrouting priority 100; jump FLANNEL-POSTRTG; }; }
    table ip6 filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }
    table bridge flannel-ipv6 { chain c { type filter hook input priority 0; }; }
";

#[tokio::test]
async fn rules_of_others_stay_byte_for_byte() {
    let ns = namespace();
    let firewall = nft_in(&ns);
    sabotage(&ns, FOREIGN);
    let before = ruleset(&ns);
    let others = OverlayName::new("blue").unwrap();
    for overlay in ["flannel", "blue"] {
        firewall.apply(&guarded(overlay)).await.unwrap();
        firewall.apply(&rules(overlay)).await.unwrap();
    }
    let text = ruleset(&ns);
    assert!(text.starts_with(&before), "{text}");
    assert!(text.contains("table ip6 flannel-ipv6-blue {"), "{text}");
    firewall.remove(&OverlayName::default()).await.unwrap();
    in_place(&firewall, &rules("blue")).await;
    for _ in 0..2 {
        firewall.remove(&others).await.unwrap();
        assert_eq!(ruleset(&ns), before);
    }
}

#[tokio::test]
async fn whatever_is_done_to_our_rules_is_noticed_and_mended() {
    let chain = |name: &str| Drift { place: format!("chain ip flannel-ipv4 {name}"), problem: Problem::Changed };
    let acts: [(&str, &str, Option<Drift>); 10] = [
        ("everything flushed", "flush ruleset", None),
        ("a table deleted", "delete table ip6 flannel-ipv6", None),
        ("a chain flushed", "flush chain ip flannel-ipv4 postrtg", Some(chain("postrtg"))),
        ("a rule deleted", "delete rule ip flannel-ipv4 forward handle FIRST", Some(chain("forward"))),
        ("a rule added", "add rule ip flannel-ipv4 forward ip saddr 10.0.0.1 drop", Some(chain("forward"))),
        ("a rule put first", "insert rule ip flannel-ipv4 postrtg accept", Some(chain("postrtg"))),
        (
            "the order changed",
            "add rule ip flannel-ipv4 forward ip saddr 10.42.0.0/16 accept\ndelete rule ip flannel-ipv4 forward handle FIRST",
            Some(chain("forward")),
        ),
        ("a policy", "add chain ip flannel-ipv4 forward { policy drop ; }", Some(chain("forward"))),
        ("a peer added", "add element ip flannel-ipv4 peers { 6.6.6.6 }", None),
        (
            "another hook",
            "delete chain ip flannel-ipv4 forward\nadd chain ip flannel-ipv4 forward { type filter hook input priority 0 ; }",
            None,
        ),
    ];
    let ns = namespace();
    let firewall = nft_in(&ns);
    let rules = guarded("flannel");
    firewall.apply(&rules).await.unwrap();
    let before = ruleset(&ns);
    for (name, act, expected) in acts {
        let listing = nft(&ns, &["-a", "list", "chain", "ip", "flannel-ipv4", "forward"], "");
        let first = listing.lines().find(|line| line.contains("saddr")).unwrap();
        let handle = first.rsplit(' ').next().unwrap();
        sabotage(&ns, &act.replace("FIRST", handle));
        let drift = firewall.check(&rules).await.unwrap();
        assert!(!drift.is_empty(), "{name} is not noticed");
        if let Some(expected) = expected {
            assert_eq!(drift, [expected], "{name}");
        }
        firewall.apply(&rules).await.unwrap();
        in_place(&firewall, &rules).await;
        let sorted =
            |text: &str| text.split_inclusive('}').map(str::to_owned).collect::<std::collections::BTreeSet<_>>();
        assert_eq!(sorted(&ruleset(&ns)), sorted(&before), "{name}");
    }
}

#[tokio::test]
async fn go_flannels_own_rules_are_taken_over() {
    let ns = namespace();
    sabotage(&ns, include_str!("golden/go.nft"));
    let firewall = nft_in(&ns);
    assert!(!firewall.check(&rules("flannel")).await.unwrap().is_empty());
    firewall.apply(&rules("flannel")).await.unwrap();
    in_place(&firewall, &rules("flannel")).await;
    firewall.remove(&OverlayName::default()).await.unwrap();
    assert_eq!(ruleset(&ns), "");
}

#[tokio::test]
async fn pods_are_masqueraded_towards_the_world_only_and_hosts_towards_remote_pods() {
    let lab = lab(Families::Dual);
    let firewall = nft_in(&lab.node().ns);
    let rules = Rules { masquerade: Some(Masquerade::default()), ..lab.rules(OverlayName::default()).unwrap() };
    firewall.apply(&rules).await.unwrap();
    in_place(&firewall, &rules).await;
    for family in Family::BOTH {
        let (pod, remote) = (lab.pod().addr(family).unwrap(), lab.peer_pod().addr(family).unwrap());
        let (node, outside) = (lab.node().addr(family).unwrap(), outside_address(family));
        let to_world = Datagram::new(&lab.pod().ns, lab.outside(), outside);
        assert_eq!(to_world.sender_seen(SOON).unwrap(), Some(node), "pod to world");
        let to_pod = Datagram::new(&lab.pod().ns, &lab.peer_pod().ns, remote);
        assert_eq!(to_pod.sender_seen(SOON).unwrap(), Some(pod), "pod to pod");
        let from_pod = Datagram::new(&lab.peer_pod().ns, &lab.pod().ns, pod);
        assert_eq!(from_pod.sender_seen(SOON).unwrap(), Some(remote), "remote pod to pod");
        let from_world = Datagram::new(lab.outside(), &lab.pod().ns, pod);
        assert_eq!(from_world.sender_seen(SOON).unwrap(), Some(outside), "world to pod");
        let second = Some(second_address(family));
        let from_host = Datagram { source: second, ..Datagram::new(&lab.node().ns, &lab.peer_pod().ns, remote) };
        assert_eq!(from_host.sender_seen(SOON).unwrap(), Some(node), "host to remote pod");
        // Kubernetes marks with one bit of many: the mask counts.
        let marked = Datagram { mark: 0x4001, ..from_host };
        assert_eq!(marked.sender_seen(SOON).unwrap(), second, "marked by Kubernetes");
        let marked = Datagram { mark: 0x8001, ..from_host };
        assert_eq!(marked.sender_seen(SOON).unwrap(), Some(node), "marked by somebody else");
    }
    firewall.remove(&OverlayName::default()).await.unwrap();
    let to_world = Datagram::new(&lab.pod().ns, lab.outside(), outside_address(Family::V4));
    assert_eq!(to_world.sender_seen(SOON).unwrap(), Some(lab.pod().addr(Family::V4).unwrap()), "without rules");
}

#[tokio::test]
async fn re_applying_loses_no_packet_and_lets_none_through_as_it_was() {
    let lab = lab(Families::V4);
    let firewall = nft_in(&lab.node().ns);
    let rules = Rules { masquerade: Some(Masquerade::default()), ..lab.rules(OverlayName::default()).unwrap() };
    firewall.apply(&rules).await.unwrap();
    let newcomers = Newcomers::start(&lab.pod().ns, lab.outside(), outside_address(Family::V4)).unwrap();
    newcomers.await_more(100).unwrap();
    for nth in 0..30 {
        // A rule set that differs is replaced just the same.
        let forward = if nth % 2 == 0 { Forward::Untouched } else { Forward::Accept };
        firewall.apply(&Rules { forward, ..rules.clone() }).await.unwrap();
        newcomers.await_more(20).unwrap();
    }
    let (sent, seen) = newcomers.stop().unwrap();
    assert_eq!(seen, BTreeMap::from([(lab.node().v4().unwrap(), sent)]));
}

#[tokio::test]
async fn switching_to_iptables_and_back_loses_no_packet_and_leaves_nothing_of_the_other() {
    let lab = lab(Families::V4);
    let node = &lab.node().ns;
    let (nft, iptables) = (nft_in(node), Iptables::in_namespace(node.as_fd().try_clone_to_owned().unwrap()).unwrap());
    let overlay = OverlayName::default();
    let rules = Rules { masquerade: Some(Masquerade::default()), ..lab.rules(overlay.clone()).unwrap() };
    nft.apply(&rules).await.unwrap();
    let newcomers = Newcomers::start(&lab.pod().ns, lab.outside(), outside_address(Family::V4)).unwrap();
    for _ in 0..5 {
        newcomers.await_more(50).unwrap();
        iptables.apply(&rules).await.unwrap();
        nft.remove(&overlay).await.unwrap();
        assert!(!ruleset(node).contains("table ip flannel-ipv4"));
        newcomers.await_more(50).unwrap();
        nft.apply(&rules).await.unwrap();
        iptables.remove(&overlay).await.unwrap();
        assert!(!ruleset(node).contains("FLANNEL"));
        in_place(&nft, &rules).await;
    }
    let (sent, seen) = newcomers.stop().unwrap();
    assert_eq!(seen, BTreeMap::from([(lab.node().v4().unwrap(), sent)]));
}

#[tokio::test]
async fn a_dropped_apply_leaves_all_or_nothing_and_the_next_one_works() {
    let ns = namespace();
    let firewall = nft_in(&ns);
    let rules = guarded("flannel");
    for millis in 0..20 {
        firewall.remove(&OverlayName::default()).await.unwrap();
        let cut = tokio::time::timeout(Duration::from_millis(millis), firewall.apply(&rules)).await;
        let drift = firewall.check(&rules).await.unwrap();
        assert!(drift.is_empty() || (cut.is_err() && drift.len() == 2), "{drift:?}");
    }
    firewall.apply(&rules).await.unwrap();
    in_place(&firewall, &rules).await;
}

#[tokio::test]
async fn the_vxlan_port_answers_known_peers_only() {
    let lab = lab(Families::Dual);
    let firewall = nft_in(&lab.node().ns);
    let mut rules = lab.rules(OverlayName::default()).unwrap();
    for family in Family::BOTH {
        let node = lab.node().addr(family).unwrap();
        let vxlan = |from| Datagram { port: 8472, ..Datagram::new(from, &lab.node().ns, node) };
        let peers = [lab.peer().addr(family).unwrap()].into();
        rules.guard = Some(VxlanGuard { port: 8472, peers });
        firewall.apply(&rules).await.unwrap();
        in_place(&firewall, &rules).await;
        assert!(vxlan(&lab.peer().ns).sender_seen(SOON).unwrap().is_some());
        assert_eq!(vxlan(lab.outside()).sender_seen(NEVER).unwrap(), None);
        assert!(Datagram::new(lab.outside(), &lab.node().ns, node).sender_seen(SOON).unwrap().is_some());
        rules.guard = Some(VxlanGuard { port: 8472, peers: [outside_address(family)].into() });
        firewall.apply(&rules).await.unwrap();
        in_place(&firewall, &rules).await;
        assert_eq!(vxlan(&lab.peer().ns).sender_seen(NEVER).unwrap(), None);
        assert!(vxlan(lab.outside()).sender_seen(SOON).unwrap().is_some());
    }
}

#[tokio::test]
async fn whom_a_former_run_let_in_is_read_from_the_kernel() {
    let ns = namespace();
    let overlay = OverlayName::new("flannel").unwrap();
    assert_eq!(nft_in(&ns).let_in(&overlay).await.unwrap(), [].into());
    nft_in(&ns).apply(&rules("flannel")).await.unwrap();
    assert_eq!(nft_in(&ns).let_in(&overlay).await.unwrap(), [].into());
    let rules = guarded("flannel");
    nft_in(&ns).apply(&rules).await.unwrap();
    assert_eq!(nft_in(&ns).let_in(&overlay).await.unwrap(), rules.guard.unwrap().peers);
    assert_eq!(nft_in(&ns).let_in(&OverlayName::new("other").unwrap()).await.unwrap(), [].into());
}

#[tokio::test]
async fn ten_thousand_peers_fit_the_guard() {
    let ns = namespace();
    let firewall = nft_in(&ns);
    let peers = (0..10_000_u32).map(|nth| std::net::Ipv4Addr::from(0x0a00_0001 + nth * 7).into()).collect();
    let rules = Rules { guard: Some(VxlanGuard { port: 8472, peers }), ..rules("flannel") };
    firewall.apply(&rules).await.unwrap();
    in_place(&firewall, &rules).await;
}

#[tokio::test]
async fn a_missing_nft_is_unsupported_with_the_remedy() {
    let firewall = Nft::new().unwrap().program("no-such-nft");
    for error in [
        firewall.apply(&rules("flannel")).await.unwrap_err(),
        firewall.check(&rules("flannel")).await.unwrap_err(),
        firewall.remove(&OverlayName::default()).await.unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(matches!(error, FirewallError::Unsupported { .. }) && text.contains("apt install nftables"), "{text}");
    }
}

#[tokio::test]
async fn what_the_tool_refuses_is_an_error_with_its_words() {
    let ns = namespace();
    let firewall = nft_in(&ns);
    let mut wrong = rules("flannel");
    let v6 = wrong.pods.v6.unwrap();
    // A prefix of the other family is what a caller could get wrong.
    wrong.pods.v4 = Some(v6);
    let error = firewall.apply(&wrong).await.unwrap_err();
    assert!(matches!(&error, FirewallError::Refused { text, .. } if text.contains("Error")), "{error}");
    assert_eq!(ruleset(&ns), "");
}
