//! The wanted contents of the overlay's chains, as `iptables-save` prints them (docs/compatibility.md, "iptables").
//! Pure.

use flannel_core::firewall::{Forward, Pods, Rules, SourcePorts};
use flannel_core::kernel::OverlayName;
use flannel_core::net::{Dual, Family};

/// The longest chain name that every iptables accepts, in bytes.
const LONGEST_CHAIN: usize = 28;

/// One of the overlay's chains, and the rule that jumps to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Chain {
    /// The chain's table.
    pub(crate) table: &'static str,
    /// The built-in chain that jumps to it.
    pub(crate) hook: &'static str,
    pub(crate) name: String,
    /// The jump after `-A <hook>`.
    pub(crate) jump: String,
    /// The rules after `-A <name>`; `None` if the chain must not exist.
    pub(crate) rules: Option<Vec<String>>,
}

/// The wanted chains of one overlay in one family.
pub(crate) type Chains = [Chain; 2];

/// Returns the wanted chains. `most` is the tool's support for source ports.
pub(crate) fn chains(rules: &Rules, most: SourcePorts) -> Dual<Chains> {
    let family = |family| {
        let mut chains = none(&rules.overlay);
        if let Some(pods) = rules.pods.get(family) {
            let [masquerade, forward] = &mut chains;
            masquerade.rules = rules.masquerade.map(|masquerade| match (masquerade.ports, most) {
                (SourcePorts::FullyRandom, SourcePorts::FullyRandom) => postrtg(family, pods, " --random-fully"),
                (SourcePorts::Kernel, _) | (_, SourcePorts::Kernel) => postrtg(family, pods, ""),
            });
            forward.rules = match rules.forward {
                Forward::Accept => Some(fwd(pods)),
                Forward::Untouched => None,
            };
        }
        chains
    };
    Dual { v4: Some(family(Family::V4)), v6: Some(family(Family::V6)) }
}

/// Returns the chains of an overlay, none of which must exist.
pub(crate) fn none(overlay: &OverlayName) -> Chains {
    let chain = |table, hook, base: &str, comment: &str| {
        let name = chain_name(base, overlay);
        let jump = format!("-m comment --comment \"{comment}\" -j {name}");
        Chain { table, hook, name, jump, rules: None }
    };
    [chain("nat", "POSTROUTING", "FLANNEL-POSTRTG", MASQUERADE), chain("filter", "FORWARD", "FLANNEL-FWD", FORWARD)]
}

const MASQUERADE: &str = "flanneld masq";
const FORWARD: &str = "flanneld forward";

fn postrtg(family: Family, pods: &Pods, ports: &str) -> Vec<String> {
    let Pods { network, subnet } = pods;
    let multicast = match family {
        Family::V4 => "224.0.0.0/4",
        Family::V6 => "ff00::/8",
    };
    let comment = format!("-m comment --comment \"{MASQUERADE}\"");
    vec![
        format!("-m mark --mark 0x4000/0x4000 {comment} -j RETURN"),
        format!("-s {subnet} -d {network} {comment} -j RETURN"),
        format!("-s {network} -d {subnet} {comment} -j RETURN"),
        format!("! -s {network} -d {subnet} {comment} -j RETURN"),
        format!("-s {network} ! -d {multicast} {comment} -j MASQUERADE{ports}"),
        format!("! -s {network} -d {network} {comment} -j MASQUERADE{ports}"),
    ]
}

fn fwd(pods: &Pods) -> Vec<String> {
    let network = pods.network;
    let comment = format!("-m comment --comment \"{FORWARD}\"");
    vec![format!("-s {network} {comment} -j ACCEPT"), format!("-d {network} {comment} -j ACCEPT")]
}

/// Returns Go flannel's name for overlay `flannel`, with the overlay's name appended for others. A name that is too
/// long is cut and made distinct by its hash; the dot prevents it from being another overlay's name.
fn chain_name(base: &str, overlay: &OverlayName) -> String {
    if *overlay == OverlayName::default() {
        return base.to_owned();
    }
    let whole = format!("{base}-{overlay}");
    if whole.len() <= LONGEST_CHAIN {
        return whole;
    }
    // FNV-1a: stable across versions, as a name in the kernel has to be.
    let hash =
        overlay.as_str().bytes().fold(0x811c_9dc5_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    let room = LONGEST_CHAIN - base.len() - "-".len() - ".01234567".len();
    let start: String = overlay.as_str().chars().take(room).collect();
    format!("{base}-{start}.{hash:08x}")
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn chain_names_are_go_flannels_or_distinct_and_short_enough() {
        let names =
            ["flannel", "a", "twelve-chars", "thirteen-char", "thirteen-chas", "abcdefghijklmnopqrstuvwxyz-12345"];
        let mut seen = BTreeSet::new();
        for overlay in names {
            for chain in none(&OverlayName::new(overlay).unwrap()) {
                assert!(chain.name.len() <= LONGEST_CHAIN, "{}", chain.name);
                assert!(seen.insert(chain.name.clone()), "{} twice", chain.name);
            }
        }
        for name in ["FLANNEL-POSTRTG", "FLANNEL-FWD", "FLANNEL-POSTRTG-twelve-chars", "FLANNEL-FWD-thirteen-char"] {
            assert!(seen.contains(name), "{name}: {seen:?}");
        }
    }
}
