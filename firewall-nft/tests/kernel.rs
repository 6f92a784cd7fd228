//! The rules on the real kernel: the contract of a packet filter, and nftables-specific tests.
#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::time::Duration;

use flannel_core::firewall::{Drift, Firewall, Masquerade, Problem, VxlanGuard};
use flannel_core::kernel::OverlayName;
use flannel_core::net::Family;
use flannel_firewall_iptables::Iptables;
use flannel_firewall_nft::Nft;
use testkit::filter::{Datagram, FilterLab, Newcomers, outside_address};
use testkit::firewall_contract::{self, Harness, SOON, guarded, in_place, namespace, rules, run};
use testkit::{Families, Namespace};

const NEVER: Duration = Duration::from_millis(200);

/// Foreign rules, some with names similar to the overlay's.
const FOREIGN: &str = "
    table ip flannel-ipv4-x { chain postrtg { type nat hook postrouting priority 100; ip saddr 10.9.0.0/16 masquerade; }; }
    table inet flannel-ipv4 { set peers { type ipv4_addr; elements = { 1.2.3.4 } ; }; chain forward { type filter hook forward priority 0; counter; }; }
    table ip nat { chain FLANNEL-POSTRTG { return; }; chain POSTROUTING { type nat hook postrouting priority 100; jump FLANNEL-POSTRTG; }; }
    table ip6 filter { chain FORWARD { type filter hook forward priority 0; policy drop; }; }
    table bridge flannel-ipv6 { chain c { type filter hook input priority 0; }; }
";

/// Go flannel's rules, which replace all rules.
const GO_FLANNELS: &str = concat!("flush ruleset\n", include_str!("golden/go.nft"));

fn nft_in(ns: &Namespace) -> Nft {
    Nft::in_namespace(ns.as_fd().try_clone_to_owned().unwrap()).unwrap()
}

fn ruleset(ns: &Namespace) -> String {
    run(ns, "nft", "list ruleset", "")
}

struct Nftables;

impl Harness for Nftables {
    fn firewall(&self, ns: &Namespace) -> Box<dyn Firewall> {
        Box::new(nft_in(ns))
    }

    fn without_tool(&self) -> (Box<dyn Firewall>, &'static str) {
        (Box::new(Nft::new().unwrap().program("no-such-nft")), "apt install nftables")
    }

    /// Sorted: chains and tables that are created again come last.
    fn listing(&self, ns: &Namespace) -> String {
        let ruleset = ruleset(ns);
        let mut blocks: Vec<_> = ruleset.split_inclusive('}').collect();
        blocks.sort_unstable();
        blocks.concat()
    }

    fn words(&self) -> [&'static str; 2] {
        ["table ip flannel-ipv4 {", "table ip6 flannel-ipv6 {"]
    }

    fn options(&self) -> &'static [&'static str] {
        &["random", "forward", "vxlan", "peers"]
    }

    fn add_rules_of_others(&self, ns: &Namespace) {
        run(ns, "nft", "-f -", FOREIGN);
    }

    fn rules_of_others(&self, ns: &Namespace) -> String {
        let ours = ["ip flannel-ipv4", "ip6 flannel-ipv6", "ip flannel-ipv4-blue", "ip6 flannel-ipv6-blue"];
        let is_ours = |table: &&str| ours.iter().any(|name| table.starts_with(&format!("table {name} {{")));
        ruleset(ns).split_inclusive("\n}\n").filter(|table| !is_ours(table)).collect()
    }

    fn acts(&self) -> Vec<(&'static str, Vec<Drift>)> {
        let in_chain = |name: &str| {
            let place = format!("chain ip flannel-ipv4 {name}");
            vec![Drift::new(place, Problem::Changed)]
        };
        vec![
            ("flush ruleset", vec![]),
            (GO_FLANNELS, vec![]),
            ("delete table ip6 flannel-ipv6", vec![]),
            ("flush chain ip flannel-ipv4 postrtg", in_chain("postrtg")),
            ("delete rule ip flannel-ipv4 forward handle FIRST", in_chain("forward")),
            ("add rule ip flannel-ipv4 forward ip saddr 10.0.0.1 drop", in_chain("forward")),
            ("insert rule ip flannel-ipv4 postrtg accept", in_chain("postrtg")),
            (
                "add rule ip flannel-ipv4 forward ip saddr 10.42.0.0/16 accept\ndelete rule ip flannel-ipv4 forward handle FIRST",
                in_chain("forward"),
            ),
            ("add chain ip flannel-ipv4 forward { policy drop ; }", in_chain("forward")),
            ("add element ip flannel-ipv4 peers { 6.6.6.6 }", vec![]),
            (
                "delete chain ip flannel-ipv4 forward\nadd chain ip flannel-ipv4 forward { type filter hook input priority 0 ; }",
                vec![],
            ),
        ]
    }

    /// `FIRST` is the handle of the first forward rule.
    fn sabotage(&self, ns: &Namespace, act: &str) {
        let listing = run(ns, "nft", "-a list chain ip flannel-ipv4 forward", "");
        let first = listing.lines().find(|line| line.contains("saddr")).unwrap();
        run(ns, "nft", "-f -", &act.replace("FIRST", first.rsplit(' ').next().unwrap()));
    }
}

#[tokio::test]
async fn the_contract_holds() {
    firewall_contract::all(&Nftables).await;
}

#[tokio::test]
async fn rules_are_listed_as_go_flannels_but_for_the_mask_and_the_fourth() {
    let ns = namespace();
    let firewall = nft_in(&ns);
    firewall.apply(&guarded("flannel")).await.unwrap();
    let ours = ruleset(&ns);
    run(&ns, "nft", "-f -", GO_FLANNELS);
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
async fn switching_to_iptables_and_back_loses_no_packet_and_leaves_nothing_of_the_other() {
    let lab = FilterLab::new(Families::V4).unwrap();
    let node = &lab.node().ns;
    let (nft, iptables) = (nft_in(node), Iptables::in_namespace(node.as_fd().try_clone_to_owned().unwrap()).unwrap());
    let overlay = OverlayName::default();
    let rules = lab.rules(overlay.clone()).unwrap().masquerading(Masquerade::default());
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
async fn the_vxlan_port_answers_known_peers_only() {
    let lab = FilterLab::new(Families::Dual).unwrap();
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
async fn ten_thousand_peers_fit_the_guard() {
    let ns = namespace();
    let firewall = nft_in(&ns);
    let peers = (0..10_000_u32).map(|nth| std::net::Ipv4Addr::from(0x0a00_0001 + nth * 7).into()).collect();
    let rules = rules("flannel").guarded(VxlanGuard { port: 8472, peers });
    firewall.apply(&rules).await.unwrap();
    in_place(&firewall, &rules).await;
}
