//! The rules on the real kernel, through both variants: the contract of a packet filter, and iptables-specific tests.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::os::fd::AsFd;
use std::time::Duration;

use flannel_core::firewall::{Drift, Firewall, Forward, Problem};
use flannel_core::kernel::OverlayName;
use flannel_core::net::Family;
use flannel_firewall_iptables::{Iptables, Variant};
use testkit::filter::{Datagram, FilterLab};
use testkit::firewall_contract::{self, Harness, SOON, namespace, rules, run};
use testkit::{Families, Namespace};

const NEVER: Duration = Duration::from_millis(200);
const TOOLS: [Tool; 2] = [Tool(Variant::Nft, "-nft"), Tool(Variant::Legacy, "-legacy")];

/// Foreign rules, some with names similar to the overlay's.
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

/// An nftables table with the name that the overlay's table would have.
const FOREIGN_TABLE: &str = "table ip flannel-ipv4 { chain postrtg { type nat hook postrouting priority 100; }; }";

struct Tool(Variant, &'static str);

impl Harness for Tool {
    fn firewall(&self, ns: &Namespace) -> Box<dyn Firewall> {
        Box::new(Iptables::in_namespace(ns.as_fd().try_clone_to_owned().unwrap()).unwrap().variant(self.0))
    }

    fn without_tool(&self) -> (Box<dyn Firewall>, &'static str) {
        (Box::new(Iptables::new().unwrap().programs_in("/nonexistent")), "apt install iptables")
    }

    /// The saved rules of both families, each line with its program and table: without comments, counters and built-in
    /// chains.
    fn listing(&self, ns: &Namespace) -> String {
        let mut text = String::new();
        for (tool, table) in
            [("iptables", "nat"), ("iptables", "filter"), ("ip6tables", "nat"), ("ip6tables", "filter")]
        {
            let saved = run(ns, &format!("{tool}{}-save", self.1), &format!("-t {table}"), "");
            let is_rule = |line: &&str| line.starts_with('-') || line.starts_with(':') && !line.contains(" ACCEPT [");
            text.extend(saved.lines().filter(is_rule).map(|line| format!("{tool} {table} {line}\n")));
        }
        text
    }

    fn words(&self) -> [&'static str; 2] {
        ["iptables ", "ip6tables "]
    }

    fn options(&self) -> &'static [&'static str] {
        &["random", "FWD"]
    }

    fn guards(&self) -> bool {
        false
    }

    fn is_one_transaction(&self) -> bool {
        false
    }

    fn add_rules_of_others(&self, ns: &Namespace) {
        for tool in ["iptables", "ip6tables"] {
            run(ns, &format!("{tool}{}-restore", self.1), "-w 10", FOREIGN);
        }
        run(ns, "nft", "-f -", FOREIGN_TABLE);
    }

    fn rules_of_others(&self, ns: &Namespace) -> String {
        let names = ["FLANNEL-POSTRTG", "FLANNEL-FWD", "FLANNEL-POSTRTG-blue", "FLANNEL-FWD-blue"];
        let is_ours = |line: &&str| {
            let is_of = |name| [format!(" :{name} "), format!(" -A {name} ")].iter().any(|text| line.contains(text));
            names.iter().any(|name| is_of(name) || line.ends_with(&format!("-j {name}")))
        };
        let others = self.listing(ns).lines().filter(|line| !is_ours(line)).collect::<Vec<_>>().join("\n");
        others + &run(ns, "nft", "list table ip flannel-ipv4", "")
    }

    fn acts(&self) -> Vec<(&'static str, Vec<Drift>)> {
        let drift = |place, problem| Drift::new(format!("iptables{} {place}", self.1), problem);
        let (nat, filter) = ("nat FLANNEL-POSTRTG", "filter FLANNEL-FWD");
        let changed = |place| vec![drift(place, Problem::Changed)];
        vec![
            ("-t nat -F FLANNEL-POSTRTG", changed(nat)),
            ("-t nat -D FLANNEL-POSTRTG 5", changed(nat)),
            ("-t nat -I FLANNEL-POSTRTG -j ACCEPT", changed(nat)),
            ("-t filter -A FLANNEL-FWD -s 10.0.0.1 -j DROP", changed(filter)),
            ("-t nat -F POSTROUTING", vec![drift("nat POSTROUTING -j FLANNEL-POSTRTG", Problem::Missing)]),
            ("-t filter -D FORWARD 1", vec![drift("filter FORWARD -j FLANNEL-FWD", Problem::Missing)]),
            ("-t nat -R FLANNEL-POSTRTG 1 -j RETURN", changed(nat)),
            ("*nat\nCOMMIT\n*filter\nCOMMIT\n", vec![drift(nat, Problem::Missing), drift(filter, Problem::Missing)]),
        ]
    }

    /// `act` is arguments of the program, or input that replaces all rules.
    fn sabotage(&self, ns: &Namespace, act: &str) {
        if act.starts_with('*') {
            run(ns, &format!("iptables{}-restore", self.1), "-w 10", act);
        } else {
            run(ns, &format!("iptables{}", self.1), &format!("-w 10 {act}"), "");
        }
    }
}

#[tokio::test]
async fn the_contract_holds_with_nft() {
    firewall_contract::all(&TOOLS[0]).await;
}

#[tokio::test]
async fn the_contract_holds_with_legacy() {
    firewall_contract::all(&TOOLS[1]).await;
}

#[tokio::test]
async fn rules_are_saved_as_flannels_and_what_is_switched_off_is_left_over() {
    for tool in TOOLS {
        let ns = namespace();
        let firewall = tool.firewall(&ns);
        let full = rules("flannel");
        assert_eq!(firewall.check(&full).await.unwrap().len(), 4);
        firewall.apply(&full).await.unwrap();
        let saved = tool.listing(&ns);
        for (program, golden) in
            [("iptables", include_str!("golden/v4.restore")), ("ip6tables", include_str!("golden/v6.restore"))]
        {
            let mut table = "";
            for line in golden.lines().filter(|line| *line != "COMMIT") {
                table = line.strip_prefix('*').unwrap_or(table);
                let is_there = line.starts_with('*') || saved.contains(&format!("{program} {table} {line}\n"));
                assert!(is_there, "{line:?} is not in:\n{saved}");
            }
        }
        let mut only = full;
        (only.forward, only.pods.v4) = (Forward::Untouched, None);
        let leftover = firewall.check(&only).await.unwrap();
        assert!(leftover.len() == 3 && leftover.iter().all(|it| it.problem == Problem::Leftover), "{leftover:?}");
    }
}

#[tokio::test]
async fn a_jump_to_our_chain_that_somebody_else_made_is_his_until_the_chain_goes() {
    for tool in TOOLS {
        let ns = namespace();
        let firewall = tool.firewall(&ns);
        let rules = rules("flannel");
        firewall.apply(&rules).await.unwrap();
        // So that it is evaluated before another program's drop.
        tool.sabotage(&ns, "-I FORWARD 1 -j FLANNEL-FWD");
        let before = tool.listing(&ns);
        assert_eq!(firewall.check(&rules).await.unwrap(), []);
        firewall.apply(&rules).await.unwrap();
        assert_eq!(tool.listing(&ns), before);
        firewall.remove(&OverlayName::default()).await.unwrap();
        assert!(!tool.listing(&ns).contains("FLANNEL-FWD"), "{}", tool.listing(&ns));
    }
}

#[tokio::test]
async fn pods_pass_a_forward_chain_that_drops_by_policy() {
    for tool in TOOLS {
        let lab = FilterLab::new(Families::Dual).unwrap();
        let ns = &lab.node().ns;
        let firewall = tool.firewall(ns);
        for (family, program) in [(Family::V4, "iptables"), (Family::V6, "ip6tables")] {
            run(ns, &format!("{program}{}", tool.1), "-w 10 -P FORWARD DROP", "");
            let to_pod = Datagram::new(&lab.pod().ns, &lab.peer_pod().ns, lab.peer_pod().addr(family).unwrap());
            assert_eq!(to_pod.sender_seen(NEVER).unwrap(), None, "before");
            firewall.apply(&lab.rules(OverlayName::default()).unwrap()).await.unwrap();
            assert!(to_pod.sender_seen(SOON).unwrap().is_some(), "with our rules");
            firewall.remove(&OverlayName::default()).await.unwrap();
            assert_eq!(to_pod.sender_seen(NEVER).unwrap(), None, "after");
        }
    }
}
