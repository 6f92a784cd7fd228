//! The rules on the real kernel, by way of both variants: what they do to packets, what is noticed, what is left alone.
#![expect(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::io::Write;
use std::os::fd::AsFd;
use std::process::{Command, Stdio};
use std::time::Duration;

use flannel_core::firewall::{Drift, Firewall, FirewallError, Forward, Masquerade, Problem, Rules, VxlanGuard};
use flannel_core::kernel::OverlayName;
use flannel_core::net::{Dual, Family, Prefix};
use flannel_firewall_iptables::{Iptables, Variant};
use testkit::filter::{Datagram, FilterLab, Newcomers, outside_address, second_address};
use testkit::{Families, Namespace};

const SOON: Duration = Duration::from_secs(3);
const NEVER: Duration = Duration::from_millis(200);
const VARIANTS: [(Variant, &str); 2] = [(Variant::Nft, "-nft"), (Variant::Legacy, "-legacy")];

fn namespace() -> Namespace {
    Namespace::new("filter").expect("the tests need root, or a user namespace: unshare -Urn cargo test")
}

fn lab(families: Families) -> FilterLab {
    FilterLab::new(families).expect("the lab needs root, or a user namespace: unshare -Urn cargo test")
}

fn iptables_in(ns: &Namespace, variant: Variant) -> Iptables {
    Iptables::in_namespace(ns.as_fd().try_clone_to_owned().unwrap()).unwrap().variant(variant)
}

/// Runs a program, for what a test itself does to the rules.
fn run(ns: &Namespace, program: &str, args: &str, input: &str) -> String {
    let run = || {
        let mut child = Command::new(program)
            .args(args.split_whitespace())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}; the tests need: apt install iptables nftables"));
        child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    };
    let output = ns.run(run).unwrap();
    assert!(output.status.success(), "{program} {args}");
    String::from_utf8(output.stdout).unwrap()
}

/// What the programs save of both families, without comments and counters.
fn saved(ns: &Namespace, suffix: &str) -> String {
    let mut text = String::new();
    for tool in ["iptables", "ip6tables"] {
        for table in ["nat", "filter"] {
            let saved = run(ns, &format!("{tool}{suffix}-save"), &format!("-t {table}"), "");
            text.extend(saved.lines().filter(|line| !line.starts_with('#')).flat_map(|line| [line, "\n"]));
        }
    }
    text
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

async fn in_place(firewall: &Iptables, rules: &Rules) {
    assert_eq!(firewall.check(rules).await.unwrap(), []);
}

#[tokio::test]
async fn rules_applied_are_saved_as_flannels_and_stay_so() {
    for (variant, suffix) in VARIANTS {
        let ns = namespace();
        let firewall = iptables_in(&ns, variant);
        assert_eq!(firewall.check(&rules("flannel")).await.unwrap().len(), 4);
        firewall.apply(&rules("flannel")).await.unwrap();
        in_place(&firewall, &rules("flannel")).await;
        let first = saved(&ns, suffix);
        for golden in [include_str!("golden/v4.restore"), include_str!("golden/v6.restore")] {
            for line in golden.lines() {
                assert!(first.lines().any(|saved| saved == line), "{suffix}: {line:?} is not in:\n{first}");
            }
        }
        firewall.apply(&rules("flannel")).await.unwrap();
        assert_eq!(saved(&ns, suffix), first);
    }
}

#[tokio::test]
async fn one_family_gets_rules_and_switched_off_rules_leave_no_chain() {
    for (variant, suffix) in VARIANTS {
        let ns = namespace();
        let firewall = iptables_in(&ns, variant);
        firewall.apply(&rules("flannel")).await.unwrap();
        let mut only = rules("flannel");
        only.pods.v4 = None;
        only.forward = Forward::Untouched;
        let leftover = firewall.check(&only).await.unwrap();
        assert!(leftover.len() == 3 && leftover.iter().all(|it| it.problem == Problem::Leftover), "{leftover:?}");
        firewall.apply(&only).await.unwrap();
        in_place(&firewall, &only).await;
        let text = saved(&ns, suffix);
        assert!(!text.contains("10.42") && !text.contains("FWD") && text.contains("2001:cafe:42:7::/64"), "{text}");
    }
}

#[tokio::test]
async fn nothing_of_a_former_network_or_lease_stays() {
    for (variant, suffix) in VARIANTS {
        let ns = namespace();
        let firewall = iptables_in(&ns, variant);
        firewall.apply(&rules("flannel")).await.unwrap();
        let networks = Dual { v4: Some("172.30.0.0/16".parse().unwrap()), v6: None };
        let subnets = Dual { v4: Some("172.30.9.0/24".parse().unwrap()), v6: None };
        let moved = Rules::new(OverlayName::default(), &networks, &subnets);
        let moved = Rules { masquerade: Some(Masquerade::default()), ..moved };
        firewall.apply(&moved).await.unwrap();
        in_place(&firewall, &moved).await;
        let text = saved(&ns, suffix);
        assert!(!text.contains("10.42.") && !text.contains("cafe") && text.contains("172.30.9.0/24"), "{text}");
    }
}

/// What others have, some of it with names close to ours.
const FOREIGN: &str = "*nat
:KUBE-POSTROUTING - [0:0]
:FLANNEL-POSTRTG-x - [0:0]
:FLANNEL - [0:0]
-A POSTROUTING -j KUBE-POSTROUTING
-A POSTROUTING -m comment --comment \"not -j FLANNEL-POSTRTG\" -j FLANNEL-POSTRTG-x
-A POSTROUTING -o eth9 -j MASQUERADE
-A FLANNEL -m comment --comment \"flanneld masq\" -j RETURN
COMMIT
*filter
:FORWARD DROP [0:0]
:FLANNEL-FWD-x - [0:0]
-A FORWARD -m comment --comment \"flanneld forward\" -j FLANNEL-FWD-x
-A INPUT -p udp -m udp --dport 8472 -j DROP
COMMIT
";

#[tokio::test]
async fn rules_of_others_stay_byte_for_byte() {
    for (variant, suffix) in VARIANTS {
        let ns = namespace();
        let firewall = iptables_in(&ns, variant);
        for tool in ["iptables", "ip6tables"] {
            run(&ns, &format!("{tool}{suffix}-restore"), "", FOREIGN);
        }
        run(&ns, "nft", "-f -", "table ip flannel-ipv4 { chain postrtg { type nat hook postrouting priority 100; }; }");
        let (before, tables) = (saved(&ns, suffix), run(&ns, "nft", "list table ip flannel-ipv4", ""));
        let without_ours = |text: &str| -> String {
            let ours = |line: &&str| {
                let own_chain = ["POSTRTG", "FWD"].iter().any(|base| {
                    let name = format!("FLANNEL-{base}");
                    [name.clone(), format!("{name}-blue")].iter().any(|name| {
                        line.ends_with(&format!("-j {name}"))
                            || line.starts_with(&format!(":{name} "))
                            || line.starts_with(&format!("-A {name} "))
                    })
                });
                !own_chain
            };
            text.lines().filter(ours).flat_map(|line| [line, "\n"]).collect()
        };
        for overlay in ["flannel", "blue", "flannel"] {
            firewall.apply(&rules(overlay)).await.unwrap();
            in_place(&firewall, &rules(overlay)).await;
            assert_eq!(without_ours(&saved(&ns, suffix)), before);
        }
        firewall.remove(&OverlayName::default()).await.unwrap();
        in_place(&firewall, &rules("blue")).await;
        for _ in 0..2 {
            firewall.remove(&OverlayName::new("blue").unwrap()).await.unwrap();
            assert_eq!(saved(&ns, suffix), before);
        }
        assert_eq!(run(&ns, "nft", "list table ip flannel-ipv4", ""), tables);
    }
}

#[tokio::test]
async fn whatever_is_done_to_our_rules_is_noticed_and_mended() {
    let acts: [(&str, &str, Problem); 7] = [
        ("-t nat -F FLANNEL-POSTRTG", "nat FLANNEL-POSTRTG", Problem::Changed),
        ("-t nat -D FLANNEL-POSTRTG 5", "nat FLANNEL-POSTRTG", Problem::Changed),
        ("-t nat -I FLANNEL-POSTRTG -j ACCEPT", "nat FLANNEL-POSTRTG", Problem::Changed),
        ("-t filter -A FLANNEL-FWD -s 10.0.0.1 -j DROP", "filter FLANNEL-FWD", Problem::Changed),
        ("-t nat -F POSTROUTING", "nat POSTROUTING -j FLANNEL-POSTRTG", Problem::Missing),
        ("-t filter -D FORWARD 1", "filter FORWARD -j FLANNEL-FWD", Problem::Missing),
        ("-t nat -R FLANNEL-POSTRTG 1 -j RETURN", "nat FLANNEL-POSTRTG", Problem::Changed),
    ];
    for (variant, suffix) in VARIANTS {
        let ns = namespace();
        let firewall = iptables_in(&ns, variant);
        let rules = rules("flannel");
        firewall.apply(&rules).await.unwrap();
        let before = saved(&ns, suffix);
        for (act, place, problem) in &acts {
            run(&ns, &format!("iptables{suffix}"), act, "");
            let expected = Drift { place: format!("iptables{suffix} {place}"), problem: problem.clone() };
            assert_eq!(firewall.check(&rules).await.unwrap(), [expected], "{act}");
            firewall.apply(&rules).await.unwrap();
            in_place(&firewall, &rules).await;
            assert_eq!(saved(&ns, suffix), before, "{act}");
        }
        let all = "*nat\nCOMMIT\n*filter\nCOMMIT\n";
        run(&ns, &format!("iptables{suffix}-restore"), "", all);
        assert_eq!(firewall.check(&rules).await.unwrap().len(), 2, "everything flushed");
        firewall.apply(&rules).await.unwrap();
        assert_eq!(saved(&ns, suffix), before, "everything flushed");
    }
}

#[tokio::test]
async fn a_jump_to_our_chain_that_somebody_else_made_is_his_until_the_chain_goes() {
    for (variant, suffix) in VARIANTS {
        let ns = namespace();
        let firewall = iptables_in(&ns, variant);
        let rules = rules("flannel");
        firewall.apply(&rules).await.unwrap();
        // So that it comes before what another program drops.
        run(&ns, &format!("iptables{suffix}"), "-I FORWARD 1 -j FLANNEL-FWD", "");
        let before = saved(&ns, suffix);
        assert_eq!(firewall.check(&rules).await.unwrap(), []);
        firewall.apply(&rules).await.unwrap();
        assert_eq!(saved(&ns, suffix), before);
        firewall.remove(&OverlayName::default()).await.unwrap();
        assert!(!saved(&ns, suffix).contains("FLANNEL-FWD"), "{}", saved(&ns, suffix));
    }
}

#[tokio::test]
async fn pods_are_masqueraded_towards_the_world_only_and_hosts_towards_remote_pods() {
    for (variant, _) in VARIANTS {
        let lab = lab(Families::Dual);
        let firewall = iptables_in(&lab.node().ns, variant);
        let rules = Rules { masquerade: Some(Masquerade::default()), ..lab.rules(OverlayName::default()).unwrap() };
        firewall.apply(&rules).await.unwrap();
        for family in Family::BOTH {
            let (pod, remote) = (lab.pod().addr(family).unwrap(), lab.peer_pod().addr(family).unwrap());
            let (node, outside) = (lab.node().addr(family).unwrap(), outside_address(family));
            let to_world = Datagram::new(&lab.pod().ns, lab.outside(), outside);
            assert_eq!(to_world.sender_seen(SOON).unwrap(), Some(node), "pod to world");
            let to_pod = Datagram::new(&lab.pod().ns, &lab.peer_pod().ns, remote);
            assert_eq!(to_pod.sender_seen(SOON).unwrap(), Some(pod), "pod to pod");
            let from_world = Datagram::new(lab.outside(), &lab.pod().ns, pod);
            assert_eq!(from_world.sender_seen(SOON).unwrap(), Some(outside), "world to pod");
            let second = Some(second_address(family));
            let from_host = Datagram { source: second, ..Datagram::new(&lab.node().ns, &lab.peer_pod().ns, remote) };
            assert_eq!(from_host.sender_seen(SOON).unwrap(), Some(node), "host to remote pod");
            let marked = Datagram { mark: 0x4001, ..from_host };
            assert_eq!(marked.sender_seen(SOON).unwrap(), second, "marked by Kubernetes");
        }
    }
}

#[tokio::test]
async fn pods_pass_a_forward_chain_that_drops_by_policy() {
    for (variant, suffix) in VARIANTS {
        let lab = lab(Families::Dual);
        let ns = &lab.node().ns;
        let firewall = iptables_in(ns, variant);
        for (family, tool) in [(Family::V4, "iptables"), (Family::V6, "ip6tables")] {
            run(ns, &format!("{tool}{suffix}"), "-P FORWARD DROP", "");
            let to_pod = Datagram::new(&lab.pod().ns, &lab.peer_pod().ns, lab.peer_pod().addr(family).unwrap());
            assert_eq!(to_pod.sender_seen(NEVER).unwrap(), None, "before");
            let rules = lab.rules(OverlayName::default()).unwrap();
            firewall.apply(&rules).await.unwrap();
            assert!(to_pod.sender_seen(SOON).unwrap().is_some(), "with our rules");
            firewall.remove(&OverlayName::default()).await.unwrap();
            assert_eq!(to_pod.sender_seen(NEVER).unwrap(), None, "after");
        }
    }
}

#[tokio::test]
async fn re_applying_loses_no_packet_and_lets_none_through_as_it_was() {
    for (variant, _) in VARIANTS {
        let lab = lab(Families::V4);
        let firewall = iptables_in(&lab.node().ns, variant);
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
}

#[tokio::test]
async fn missing_programs_are_unsupported_with_the_remedy() {
    let firewall = Iptables::new().unwrap().programs_in("/nonexistent");
    for error in [
        firewall.apply(&rules("flannel")).await.unwrap_err(),
        firewall.check(&rules("flannel")).await.unwrap_err(),
        firewall.remove(&OverlayName::default()).await.unwrap_err(),
    ] {
        let text = error.to_string();
        assert!(matches!(error, FirewallError::Unsupported { .. }) && text.contains("apt install iptables"), "{text}");
    }
}

#[tokio::test]
async fn a_guard_is_unsupported_before_anything_is_touched() {
    let ns = namespace();
    let firewall = iptables_in(&ns, Variant::Default);
    let guard = Some(VxlanGuard { port: 8472, peers: [].into() });
    let error = firewall.apply(&Rules { guard, ..rules("flannel") }).await.unwrap_err();
    assert!(matches!(error, FirewallError::Unsupported { .. }), "{error}");
    assert!(!saved(&ns, "").contains("FLANNEL"));
}

#[tokio::test]
async fn a_family_that_is_refused_does_not_keep_the_other_from_its_rules() {
    for (variant, suffix) in VARIANTS {
        let ns = namespace();
        let firewall = iptables_in(&ns, variant);
        let mut wrong = rules("flannel");
        // A prefix of the other family is what a caller could get wrong.
        wrong.pods.v4 = wrong.pods.v6;
        let error = firewall.apply(&wrong).await.unwrap_err();
        assert!(matches!(error, FirewallError::Refused { .. }), "{error}");
        let text = saved(&ns, suffix);
        assert_eq!(text.matches("-j FLANNEL-").count(), 2, "{text}");
    }
}
