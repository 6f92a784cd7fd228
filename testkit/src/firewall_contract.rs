//! Checks a [`Firewall`] on the real kernel: the requirements on every packet filter, whatever its tool.
//!
//! Write a [`Harness`] and call [`all`] in a test. A check panics with the method and the violated rule. Needs root or
//! a user namespace, and what the lab needs.
#![expect(clippy::unwrap_used, reason = "test support: a check fails as an assertion does")]

use std::collections::BTreeMap;
use std::time::Duration;

use flannel_core::firewall::{Drift, Firewall, FirewallError, Forward, Masquerade, Rules, SourcePorts, VxlanGuard};
use flannel_core::kernel::OverlayName;
use flannel_core::net::{Dual, Family, Prefix};

use crate::filter::{Datagram, FilterLab, Newcomers, outside_address, second_address};
use crate::{Families, Namespace};

/// How often a call is dropped, each time a millisecond later.
const CUTS: u64 = 20;

/// How long an expected datagram may take.
pub const SOON: Duration = Duration::from_secs(10);

/// A packet filter under test.
pub trait Harness {
    /// Returns a new instance that works in a namespace.
    fn firewall(&self, ns: &Namespace) -> Box<dyn Firewall>;

    /// Returns an instance whose tool is missing, and the text that its errors have to contain.
    fn without_tool(&self) -> (Box<dyn Firewall>, &'static str);

    /// Returns all rules in the namespace as the tool lists them. Two listings are equal exactly if the rules are:
    /// counters, and objects that exist before there are rules, are left out.
    fn listing(&self, ns: &Namespace) -> String;

    /// Returns the text that a listing contains if it has IPv4 rules, and the one if it has IPv6 rules.
    fn words(&self) -> [&'static str; 2];

    /// Returns the texts that a listing contains if it has fully random ports, forward rules or a guard.
    fn options(&self) -> &'static [&'static str];

    /// Whether the firewall can guard the VXLAN port.
    fn guards(&self) -> bool {
        true
    }

    /// Whether all rules are written in one transaction. Otherwise there is one transaction per table, and an error in
    /// one family does not affect the other.
    fn is_one_transaction(&self) -> bool {
        true
    }

    /// Creates foreign rules, some with names similar to those of the overlays `flannel` and `blue`.
    fn add_rules_of_others(&self, ns: &Namespace);

    /// Returns the listing without the rules of these overlays.
    fn rules_of_others(&self, ns: &Namespace) -> String;

    /// Returns the acts of others on the rules of the overlay `flannel`, as [`sabotage`](Self::sabotage) takes them,
    /// and the result that [`Firewall::check`] has to return after each. Empty: any result except an empty one.
    fn acts(&self) -> Vec<(&'static str, Vec<Drift>)>;

    /// Performs one of the acts.
    fn sabotage(&self, ns: &Namespace, act: &str);
}

/// Runs every check.
pub async fn all(harness: &dyn Harness) {
    rules_applied_are_in_place_and_stay_so(harness).await;
    what_is_no_longer_wanted_goes(harness).await;
    rules_of_others_stay_byte_for_byte(harness).await;
    whatever_is_done_to_our_rules_is_noticed_and_mended(harness).await;
    a_dropped_apply_cuts_no_transaction_in_half(harness).await;
    what_the_tool_refuses_is_an_error_with_its_words(harness).await;
    a_guard_is_read_back_or_unsupported(harness).await;
    a_missing_tool_is_unsupported_with_the_remedy(harness).await;
    pods_are_masqueraded_towards_the_world_only_and_hosts_towards_remote_pods(harness).await;
    re_applying_loses_no_packet_and_lets_none_through_as_it_was(harness).await;
}

/// Creates an empty namespace.
pub fn namespace() -> Namespace {
    Namespace::new("filter").unwrap()
}

/// Runs a program in a namespace, with arguments separated by white space.
pub fn run(ns: &Namespace, program: &str, args: &str, input: &str) -> String {
    ns.iproute(program, &args.split_whitespace().collect::<Vec<_>>(), input).unwrap()
}

/// Returns the rules of an overlay with both families, masquerade and forward rules.
pub fn rules(overlay: &str) -> Rules {
    of_networks(overlay, ["10.42.0.0/16", "2001:cafe:42::/56"], ["10.42.7.0/24", "2001:cafe:42:7::/64"])
}

/// Returns the same rules with a guard.
pub fn guarded(overlay: &str) -> Rules {
    let peers = ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|addr| addr.parse().unwrap()).into();
    rules(overlay).guarded(VxlanGuard { port: 8472, peers })
}

fn of_networks(overlay: &str, networks: [&str; 2], subnets: [&str; 2]) -> Rules {
    let dual = |[v4, v6]: [&str; 2]| -> Dual<Prefix> { Dual { v4: v4.parse().ok(), v6: v6.parse().ok() } };
    Rules::new(name(overlay), &dual(networks), &dual(subnets)).masquerading(Masquerade::default())
}

/// Returns rules with all features of this packet filter.
fn full(harness: &dyn Harness, overlay: &str) -> Rules {
    if harness.guards() { guarded(overlay) } else { rules(overlay) }
}

fn name(overlay: &str) -> OverlayName {
    OverlayName::new(overlay).unwrap()
}

/// Checks that these rules are in place.
pub async fn in_place(firewall: &dyn Firewall, rules: &Rules) {
    assert_eq!(firewall.check(rules).await.unwrap(), [], "check: must find what was applied");
}

/// Applied rules are found by any instance, and writing them again changes nothing.
async fn rules_applied_are_in_place_and_stay_so(harness: &dyn Harness) {
    let ns = namespace();
    let (one, two) = (harness.firewall(&ns), harness.firewall(&ns));
    let rules = full(harness, "flannel");
    one.remove(&rules.overlay).await.unwrap();
    assert_ne!(one.check(&rules).await.unwrap(), [], "check: must find that there are no rules");
    assert_eq!(harness.listing(&ns), "", "check, remove: must write nothing where there is nothing");
    one.apply(&rules).await.unwrap();
    let first = harness.listing(&ns);
    for firewall in [&one, &two] {
        in_place(&**firewall, &rules).await;
        firewall.apply(&rules).await.unwrap();
        assert_eq!(harness.listing(&ns), first, "apply, check: must leave rules that are right as they are");
    }
}

/// After a change of network, lease, families or settings, the result is the same as if nothing had been applied
/// before.
async fn what_is_no_longer_wanted_goes(harness: &dyn Harness) {
    let full = full(harness, "flannel");
    let changed = |rules: &Rules, change: &dyn Fn(&mut Rules)| {
        let mut rules = rules.clone();
        change(&mut rules);
        rules
    };
    let bare = full.clone().masquerading(Masquerade::with_ports(SourcePorts::Kernel));
    let bare = changed(&bare, &|rules| (rules.guard, rules.forward) = (None, Forward::Untouched));
    let of = |family| Dual {
        v4: full.pods.v4.filter(|_| family == Family::V4),
        v6: full.pods.v6.filter(|_| family == Family::V6),
    };
    let mut steps = vec![
        of_networks("flannel", ["172.30.0.0/16", ""], ["172.30.9.0/24", ""]),
        changed(&full, &|rules| rules.masquerade = None),
        changed(&full, &|rules| rules.pods = Dual::default()),
    ];
    steps.extend(Family::BOTH.map(|family| changed(&bare, &|rules| rules.pods = of(family))));
    for wanted in steps {
        let (ns, fresh) = (namespace(), namespace());
        harness.firewall(&fresh).apply(&wanted).await.unwrap();
        let firewall = harness.firewall(&ns);
        firewall.apply(&full).await.unwrap();
        assert_ne!(firewall.check(&wanted).await.unwrap(), [], "check: must find what is left over");
        firewall.apply(&wanted).await.unwrap();
        in_place(&*firewall, &wanted).await;
        let listing = harness.listing(&ns);
        assert_eq!(listing, harness.listing(&fresh), "apply: must leave nothing of former rules");
        for (family, word) in Family::BOTH.into_iter().zip(harness.words()) {
            let is_wanted = wanted.pods.get(family).is_some();
            assert_eq!(listing.contains(word), is_wanted, "apply: rules of {family}: {listing}");
            let subnet = wanted.masquerade.and(wanted.pods.get(family)).map(|pods| pods.subnet.to_string());
            assert!(subnet.is_none_or(|subnet| listing.contains(&subnet)), "apply: no rule for {family}: {listing}");
        }
        let option = harness.options().iter().find(|word| listing.contains(**word));
        let is_off = wanted.forward == Forward::Untouched || wanted.pods.is_empty();
        assert!(!is_off || option.is_none(), "apply: {option:?} is there, which is switched off: {listing}");
    }
}

/// Foreign rules and those of other overlays stay unchanged while the overlay's rules are added, changed and removed,
/// and after that.
async fn rules_of_others_stay_byte_for_byte(harness: &dyn Harness) {
    let ns = namespace();
    let firewall = harness.firewall(&ns);
    harness.add_rules_of_others(&ns);
    let (before, all_before) = (harness.rules_of_others(&ns), harness.listing(&ns));
    let unchanged =
        || assert_eq!(harness.rules_of_others(&ns), before, "apply, remove: must not touch rules of others");
    unchanged();
    for overlay in ["flannel", "blue", "flannel"] {
        for rules in [full(harness, overlay), rules(overlay)] {
            firewall.apply(&rules).await.unwrap();
            in_place(&*firewall, &rules).await;
            unchanged();
        }
    }
    firewall.remove(&name("flannel")).await.unwrap();
    in_place(&*firewall, &rules("blue")).await;
    unchanged();
    for _ in 0..2 {
        firewall.remove(&name("blue")).await.unwrap();
        unchanged();
        assert_eq!(harness.listing(&ns), all_before, "remove: must leave nothing of ours");
    }
}

/// Each act of the harness is detected, and after the next apply everything is as before.
async fn whatever_is_done_to_our_rules_is_noticed_and_mended(harness: &dyn Harness) {
    let ns = namespace();
    let firewall = harness.firewall(&ns);
    let rules = full(harness, "flannel");
    firewall.apply(&rules).await.unwrap();
    let before = harness.listing(&ns);
    for (act, expected) in harness.acts() {
        harness.sabotage(&ns, act);
        let drift = firewall.check(&rules).await.unwrap();
        assert_ne!(drift, [], "check: does not notice: {act}");
        assert!(expected.is_empty() || drift == expected, "check: after {act}: {drift:?}, not {expected:?}");
        firewall.apply(&rules).await.unwrap();
        in_place(&*firewall, &rules).await;
        assert_eq!(harness.listing(&ns), before, "apply: does not mend: {act}");
    }
}

/// A dropped call leaves each transaction completed or not started, and the next one works.
async fn a_dropped_apply_cuts_no_transaction_in_half(harness: &dyn Harness) {
    let ns = namespace();
    let firewall = harness.firewall(&ns);
    let rules = full(harness, "flannel");
    let nothing = firewall.check(&rules).await.unwrap();
    for millis in 0..CUTS {
        firewall.remove(&rules.overlay).await.unwrap();
        let cut = tokio::time::timeout(Duration::from_millis(millis), firewall.apply(&rules)).await;
        let drift = firewall.check(&rules).await.unwrap();
        assert!(drift.is_empty() || cut.is_err(), "apply: must be done when it says so: {drift:?}");
        let whole = drift.iter().all(|it| nothing.contains(it));
        let all = !harness.is_one_transaction() || drift.is_empty() || drift == nothing;
        assert!(whole && all, "apply: a dropped call must not leave a half: {drift:?}");
    }
    firewall.apply(&rules).await.unwrap();
    in_place(&*firewall, &rules).await;
}

/// A prefix of the wrong family, a possible error of a caller, is refused with the tool's message. What was written is
/// complete.
async fn what_the_tool_refuses_is_an_error_with_its_words(harness: &dyn Harness) {
    let ns = namespace();
    let firewall = harness.firewall(&ns);
    let mut wrong = full(harness, "flannel");
    wrong.pods.v4 = wrong.pods.v6;
    let error = firewall.apply(&wrong).await.err();
    let words = matches!(&error, Some(FirewallError::Refused { text, .. }) if text.contains("Error"));
    assert!(words, "apply: must be Refused, with the tool's words: {error:?}");
    if harness.is_one_transaction() {
        assert_eq!(harness.listing(&ns), "", "apply: a refused transaction must leave nothing");
    } else {
        wrong.pods.v4 = None;
        in_place(&*firewall, &wrong).await;
    }
}

/// Any later instance reads the guard's peers from the kernel. If there can be no guard, a request for one is refused
/// before anything is written.
async fn a_guard_is_read_back_or_unsupported(harness: &dyn Harness) {
    let ns = namespace();
    let guarded = guarded("flannel");
    let let_in = async |overlay| harness.firewall(&ns).let_in(&name(overlay)).await.unwrap();
    assert_eq!(let_in("flannel").await, [].into(), "let_in: nobody is let in where there is nothing");
    if !harness.guards() {
        let error = harness.firewall(&ns).apply(&guarded).await.err();
        let is_told = matches!(error, Some(FirewallError::Unsupported { .. }));
        assert!(is_told, "apply: a guard must be Unsupported: {error:?}");
        assert_eq!(harness.listing(&ns), "", "apply: nothing may be written where a part is Unsupported");
    }
    harness.firewall(&ns).apply(&rules("flannel")).await.unwrap();
    assert_eq!(let_in("flannel").await, [].into(), "let_in: nobody is let in where there is no guard");
    if harness.guards() {
        harness.firewall(&ns).apply(&guarded).await.unwrap();
        let peers = guarded.guard.map(|guard| guard.peers);
        assert_eq!(Some(let_in("flannel").await), peers, "let_in: must read the guard from the kernel");
        assert_eq!(let_in("other").await, [].into(), "let_in: must not read another overlay's guard");
    }
}

/// If the tool is missing, every call names what to install.
async fn a_missing_tool_is_unsupported_with_the_remedy(harness: &dyn Harness) {
    let ((firewall, remedy), rules) = (harness.without_tool(), rules("flannel"));
    let (apply, check) = (firewall.apply(&rules).await.err(), firewall.check(&rules).await.err());
    for error in [apply, check, firewall.remove(&rules.overlay).await.err()] {
        let is_told = matches!(&error, Some(FirewallError::Unsupported { hint, .. }) if hint.contains(remedy));
        assert!(is_told, "apply, check, remove: a missing tool must be Unsupported, with the remedy: {error:?}");
    }
}

/// Packets get the node's address from pods to the outside, and from hosts to remote pods. Packets between pods, from
/// the outside and with Kubernetes' mark keep their address. Without masquerade, and after a removal, all keep it.
async fn pods_are_masqueraded_towards_the_world_only_and_hosts_towards_remote_pods(harness: &dyn Harness) {
    let lab = FilterLab::new(Families::Dual).unwrap();
    let firewall = harness.firewall(&lab.node().ns);
    let without = lab.rules(name("flannel")).unwrap();
    let rules = without.clone().masquerading(Masquerade::default());
    firewall.apply(&rules).await.unwrap();
    in_place(&*firewall, &rules).await;
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
        // Kubernetes uses one bit of the mark: the mask matters.
        let marked = Datagram { mark: 0x4001, ..from_host };
        assert_eq!(marked.sender_seen(SOON).unwrap(), second, "marked by Kubernetes");
        let marked = Datagram { mark: 0x8001, ..from_host };
        assert_eq!(marked.sender_seen(SOON).unwrap(), Some(node), "marked by somebody else");
    }
    for how in ["without masquerade", "after a removal"] {
        match how {
            "without masquerade" => firewall.apply(&without).await.unwrap(),
            _ => firewall.remove(&without.overlay).await.unwrap(),
        }
        let to_world = Datagram::new(&lab.pod().ns, lab.outside(), outside_address(Family::V4));
        assert_eq!(to_world.sender_seen(SOON).unwrap(), lab.pod().addr(Family::V4).ok(), "pod to world {how}");
        firewall.apply(&rules).await.unwrap();
    }
}

/// Rules are replaced atomically, also by other instances: every new connection is masqueraded.
async fn re_applying_loses_no_packet_and_lets_none_through_as_it_was(harness: &dyn Harness) {
    let lab = FilterLab::new(Families::V4).unwrap();
    let firewall = harness.firewall(&lab.node().ns);
    let mut rules = lab.rules(name("flannel")).unwrap().masquerading(Masquerade::default());
    firewall.apply(&rules).await.unwrap();
    let newcomers = Newcomers::start(&lab.pod().ns, lab.outside(), outside_address(Family::V4)).unwrap();
    newcomers.await_more(100).unwrap();
    for nth in 0..30 {
        rules.forward = if nth % 2 == 0 { Forward::Untouched } else { Forward::Accept };
        firewall.apply(&rules).await.unwrap();
        newcomers.await_more(20).unwrap();
    }
    let (sent, seen) = newcomers.stop().unwrap();
    assert_eq!(seen, BTreeMap::from([(lab.node().v4().unwrap(), sent)]), "apply: packets were lost or let through");
}
