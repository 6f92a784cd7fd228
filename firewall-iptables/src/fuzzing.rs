//! Checks of private parsers, for fuzz targets and property tests. Each panics if a property fails.

use flannel_core::firewall::{Masquerade, Rules, SourcePorts};
use flannel_core::kernel::OverlayName;
use flannel_core::net::{Dual, Family, Prefix};

use crate::wanted::{Chain, Chains, chains, none};
use crate::wire::{commands, compare, find, version};

/// Checks for any output of `iptables-save` that this crate's commands produce the wanted rules and change nothing
/// else.
pub fn saved(text: &str) {
    // `iptables-save` prints no carriage returns, and the model below ignores those at the end of a line.
    let text = &restore(text, "");
    let mut wanted: Vec<Chains> = vec![none(&OverlayName::default())];
    let rules = Rules::new(OverlayName::default(), &networks(), &networks()).masquerading(Masquerade::default());
    wanted.extend(
        Family::BOTH.iter().filter_map(|family| chains(&rules, SourcePorts::FullyRandom).get(*family).cloned()),
    );
    for chain in wanted.iter().flatten() {
        let seen = find(text, &chain.name);
        let commands = commands(chain, &seen);
        let restored = restore(text, &commands);
        assert_eq!(compare("iptables", chain, &find(&restored, &chain.name)), [], "{commands}");
        assert_eq!(others(text, chain), others(&restored, chain), "{commands}");
        let drift = compare("iptables", chain, &seen);
        assert!(drift.len() <= 2 && (!drift.is_empty() || restored.len() >= others(text, chain).len()));
    }
}

/// Checks that a tool's version round-trips.
pub fn tool_version(text: &str) {
    if let Some([major, minor, patch]) = version(text) {
        assert_eq!(version(&format!("iptables v{major}.{minor}.{patch} (nf_tables)")), Some([major, minor, patch]));
    }
}

fn networks() -> Dual<Prefix> {
    Dual { v4: "10.42.0.0/16".parse().ok(), v6: "fd00:42::/48".parse().ok() }
}

/// Returns the table after `iptables-restore --noflush`.
fn restore(saved: &str, commands: &str) -> String {
    let mut lines: Vec<String> = lines_of(saved).map(str::to_owned).collect();
    for command in commands.lines() {
        if let Some(declared) = command.strip_prefix(':') {
            let name = declared.split(' ').next().unwrap_or_default();
            let rule = format!("-A {name} ");
            lines.retain(|line| !line.starts_with(&rule) && !declares(line, name));
            lines.push(command.to_owned());
        } else if let Some(name) = command.strip_prefix("-X ") {
            lines.retain(|line| !declares(line, name));
        } else if let Some(rule) = command.strip_prefix("-D ") {
            let place = lines.iter().position(|line| line.strip_prefix("-A ") == Some(rule));
            assert!(place.is_some(), "no such rule: {command}");
            place.map(|place| lines.remove(place));
        } else {
            assert!(command.starts_with("-A "), "{command}");
            lines.push(command.to_owned());
        }
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}

fn declares(line: &str, name: &str) -> bool {
    line.strip_prefix(':').is_some_and(|declared| declared.split(' ').next() == Some(name))
}

/// Returns the lines of a table that do not concern a chain.
fn others(saved: &str, chain: &Chain) -> Vec<String> {
    let Chain { hook, name, jump, .. } = chain;
    let of_rule = format!("-A {name} ");
    let own_jump = format!("-A {hook} {jump}");
    let leads = [format!(" -j {name}"), format!(" -g {name}")];
    let about = |line: &str| {
        let is_jump = line == own_jump || chain.rules.is_none() && leads.iter().any(|leads| line.ends_with(leads));
        declares(line, name) || line.starts_with(&of_rule) || is_jump
    };
    lines_of(saved).filter(|line| !about(line)).map(str::to_owned).collect()
}

/// Returns lines without carriage returns, of which [`str::lines`] removes only one per line.
fn lines_of(text: &str) -> impl Iterator<Item = &str> {
    text.lines().map(|line| line.trim_end_matches('\r'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINE: &str = "(:FLANNEL-(FWD|POSTRTG) - \\[0:0\\]|-A (FORWARD|FLANNEL-FWD|X)|) ?\
        (-s 10\\.42\\.0\\.0/16 |-m comment --comment \"flanneld forward\" |\\PC{0,9})?-[jg] FLANNEL-(FWD|POSTRTG)|\\PC{0,20}";

    proptest! {
        #[test]
        fn whatever_is_there_becomes_what_is_wanted(lines in proptest::collection::vec(LINE, 0..12)) {
            saved(&lines.join("\n"));
        }

        #[test]
        fn any_version_is_read_or_refused(text in "[a-z ]{0,9}v?([0-9]{0,11}\\.?){0,4}\\PC{0,9}") {
            tool_version(&text);
        }
    }
}
