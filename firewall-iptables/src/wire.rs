//! The output of `iptables-save` and the input of `iptables-restore`. Pure.

use std::collections::BTreeMap;
use std::fmt::Write;

use flannel_core::firewall::{Drift, Problem};

use crate::wanted::Chain;

/// The present state of one of the overlay's chains.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(crate) struct Seen {
    exists: bool,
    /// The rules after `-A <name>`.
    rules: Vec<String>,
    /// Every rule that leads to it, each with its chain: the part after `-A <that chain>`.
    jumps: Vec<(String, String)>,
}

/// Finds a chain in the output of `iptables-save -t <table>`.
pub(crate) fn find(saved: &str, name: &str) -> Seen {
    let mut seen = Seen::default();
    for line in saved.lines() {
        if let Some(declared) = line.strip_prefix(':') {
            seen.exists |= declared.split(' ').next() == Some(name);
            continue;
        }
        let Some((chain, rule)) = line.strip_prefix("-A ").and_then(|rule| rule.split_once(' ')) else { continue };
        if chain == name {
            seen.rules.push(rule.to_owned());
        } else if leads_to(rule, name) {
            seen.jumps.push((chain.to_owned(), rule.to_owned()));
        }
    }
    seen
}

/// A jump to a user-defined chain has no options, so it ends the line. A line that ends with a quote ends with a
/// comment.
fn leads_to(rule: &str, name: &str) -> bool {
    let Some(before) = rule.strip_suffix(name) else { return false };
    ["-j ", "-g "].iter().any(|jump| before == *jump || before.ends_with(&format!(" {jump}")))
}

/// Returns the lines that turn the present into the wanted state, for use between `*<table>` and `COMMIT`; empty if
/// there is nothing to do.
pub(crate) fn commands(chain: &Chain, seen: &Seen) -> String {
    let Chain { hook, name, jump, rules, .. } = chain;
    let mut text = String::new();
    // Writing to a String cannot fail.
    let Some(rules) = rules else {
        if !seen.exists {
            return text;
        }
        for (from, rule) in &seen.jumps {
            let _ = writeln!(text, "-D {from} {rule}");
        }
        let _ = writeln!(text, ":{name} - [0:0]\n-X {name}");
        return text;
    };
    // With --noflush this creates the chain or empties it.
    let _ = writeln!(text, ":{name} - [0:0]");
    for rule in rules {
        let _ = writeln!(text, "-A {name} {rule}");
    }
    match own_jumps(chain, seen) {
        0 => _ = writeln!(text, "-A {hook} {jump}"),
        there => (1..there).for_each(|_| _ = writeln!(text, "-D {hook} {jump}")),
    }
    text
}

/// Returns the number of jumps that this crate made. Another program's jump, such as one further up, is kept until the
/// chain is deleted.
fn own_jumps(Chain { hook, jump, .. }: &Chain, seen: &Seen) -> usize {
    seen.jumps.iter().filter(|(from, rule)| from == hook && rule == jump).count()
}

/// Returns the input of one `iptables-restore`: these commands, as one transaction per table.
pub(crate) fn restore(tables: &BTreeMap<&'static str, String>) -> String {
    let wanted = tables.iter().filter(|(_, commands)| !commands.is_empty());
    wanted.map(|(table, commands)| format!("*{table}\n{commands}COMMIT\n")).collect()
}

/// Returns how a chain differs from the wanted one. `tool` is used in messages.
pub(crate) fn compare(tool: &str, chain: &Chain, seen: &Seen) -> Vec<Drift> {
    let Chain { table, hook, name, rules, .. } = chain;
    let mut drift = Vec::new();
    let mut report = |what: String, problem| drift.push(Drift::new(format!("{tool} {table} {what}"), problem));
    match rules {
        None if seen.exists => report(name.clone(), Problem::Leftover),
        None => {}
        Some(_) if !seen.exists => report(name.clone(), Problem::Missing),
        Some(rules) => {
            if *rules != seen.rules {
                report(name.clone(), Problem::Changed);
            }
            match own_jumps(chain, seen) {
                0 => report(format!("{hook} -j {name}"), Problem::Missing),
                1 => {}
                _ => report(format!("{hook} -j {name}"), Problem::Changed),
            }
        }
    }
    drift
}

/// Parses the version in `iptables v1.8.9 (nf_tables)`.
pub(crate) fn version(text: &str) -> Option<[u32; 3]> {
    let number = text.split_whitespace().find_map(|word| word.strip_prefix('v'))?;
    let mut parts = number.split('.').map(|part| part.parse().ok());
    Some([parts.next()??, parts.next()??, parts.next().unwrap_or(Some(0))?])
}

#[cfg(test)]
mod tests {
    use flannel_core::firewall::{Masquerade, Rules, SourcePorts};
    use flannel_core::kernel::OverlayName;
    use flannel_core::net::{Dual, Family};

    use super::*;
    use crate::wanted::{chains, none};

    fn script(rules: &Rules, family: Family, most: SourcePorts) -> String {
        let chains = chains(rules, most);
        let chains = chains.get(family).unwrap();
        restore(&chains.iter().map(|chain| (chain.table, commands(chain, &Seen::default()))).collect())
    }

    fn rules() -> Rules {
        let networks =
            Dual { v4: Some("10.42.0.0/16".parse().unwrap()), v6: Some("2001:cafe:42::/56".parse().unwrap()) };
        let subnets =
            Dual { v4: Some("10.42.7.0/24".parse().unwrap()), v6: Some("2001:cafe:42:7::/64".parse().unwrap()) };
        let rules = Rules::new(OverlayName::default(), &networks, &subnets);
        rules.masquerading(Masquerade::default())
    }

    #[test]
    fn rules_are_flannels_byte_for_byte() {
        let rules = rules();
        assert_eq!(script(&rules, Family::V4, SourcePorts::FullyRandom), include_str!("../tests/golden/v4.restore"));
        assert_eq!(script(&rules, Family::V6, SourcePorts::FullyRandom), include_str!("../tests/golden/v6.restore"));
        let plain = include_str!("../tests/golden/v4.restore").replace(" --random-fully", "");
        assert_eq!(script(&rules, Family::V4, SourcePorts::Kernel), plain);
    }

    #[test]
    fn one_jump_of_ours_stays_and_those_of_others_go_with_the_chain_only() {
        let mut chain = none(&OverlayName::default())[1].clone();
        chain.rules = Some(vec![]);
        let jump = &chain.jump;
        let saved = format!(
            ":FORWARD DROP [0:0]\n:FLANNEL-FWD - [0:0]\n:FLANNEL-FWD-x - [0:0]\n-A FORWARD -j FLANNEL-FWD\n-A FORWARD {jump}\n\
             -A FORWARD {jump}\n-A FORWARD -j FLANNEL-FWD-x\n-A FORWARD -m comment --comment \"-j FLANNEL-FWD\"\n-A OTHER -g FLANNEL-FWD\n"
        );
        let seen = find(&saved, "FLANNEL-FWD");
        assert_eq!(seen.jumps.len(), 4);
        let text = commands(&chain, &seen);
        assert_eq!(text, format!(":FLANNEL-FWD - [0:0]\n-D FORWARD {jump}\n"));
        assert_eq!(
            compare("iptables", &chain, &seen)[0].to_string(),
            "iptables filter FORWARD -j FLANNEL-FWD was changed"
        );
        chain.rules = None;
        assert_eq!(commands(&chain, &seen).matches("-D ").count(), 4);
        assert_eq!(commands(&chain, &find("", "FLANNEL-FWD")), "");
    }

    #[test]
    fn versions_are_read_and_nonsense_is_none() {
        assert_eq!(version("iptables v1.8.9 (nf_tables)\n"), Some([1, 8, 9]));
        assert_eq!(version("iptables v1.6\n"), Some([1, 6, 0]));
        for nonsense in ["", "iptables", "v", "v1", "v1.x.2", "vv1.2.3"] {
            assert_eq!(version(nonsense), None, "{nonsense}");
        }
        assert!([1, 6, 1] < [1, 6, 2] && [1, 10, 0] > [1, 6, 2]);
    }
}
