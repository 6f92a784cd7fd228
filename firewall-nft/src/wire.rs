//! The input and output of `nft`: commands as text, listings as JSON. Pure.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::{self, Write};
use std::net::IpAddr;

use flannel_core::firewall::{Drift, Problem, SourcePorts};
use flannel_core::net::{Family, Prefix};
use serde_json::{Value, json};

use crate::wanted::{CHAINS, Chain, Is, Match, PEERS, Rule, Side, Table, Verdict};

/// How an existing table is updated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Start {
    /// It is kept, and its chains are filled again.
    Keep,
    /// It is deleted first, as is necessary if one of its chains is on another hook.
    Over,
}

/// Returns the keyword for a table's family.
pub(crate) fn keyword(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    }
}

/// Returns the commands that bring `table` into the wanted state, as part of one transaction.
pub(crate) fn put(table: &Table, start: Start) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let _ = write_put(&mut text, table, start);
    text
}

/// Returns the commands that delete a table, whether or not it exists.
pub(crate) fn delete(family: Family, name: &str) -> String {
    let family = keyword(family);
    format!("add table {family} {name}\ndelete table {family} {name}\n")
}

/// Returns a transaction, to be checked only, that shows whether `fully-random` is supported.
pub(crate) fn probe() -> String {
    "add table ip flannel-probe\n\
     add chain ip flannel-probe postrtg { type nat hook postrouting priority srcnat ; }\n\
     add rule ip flannel-probe postrtg masquerade fully-random\n"
        .to_owned()
}

fn write_put(text: &mut String, table: &Table, start: Start) -> fmt::Result {
    let (family, name) = (keyword(table.family), &table.name);
    if start == Start::Over {
        text.push_str(&delete(table.family, name));
    }
    writeln!(text, "add table {family} {name} {{ comment \"rules for {name}\" ; }}")?;
    let kind = match table.family {
        Family::V4 => "ipv4_addr",
        Family::V6 => "ipv6_addr",
    };
    // The set is added before the rules that use it, and deleted after them.
    for chain in CHAINS {
        let Some(wanted) = table.chains.iter().find(|wanted| wanted.name == chain) else {
            writeln!(text, "add chain {family} {name} {chain}")?;
            writeln!(text, "flush chain {family} {name} {chain}")?;
            writeln!(text, "delete chain {family} {name} {chain}")?;
            continue;
        };
        let Chain { kind, hook, priority: (priority, _), comment, .. } = wanted;
        writeln!(
            text,
            "add chain {family} {name} {chain} {{ type {kind} hook {hook} priority {priority} ; policy accept ; comment \"{comment}\" ; }}"
        )?;
        writeln!(text, "flush chain {family} {name} {chain}")?;
    }
    writeln!(text, "add set {family} {name} {PEERS} {{ type {kind} ; }}")?;
    writeln!(text, "flush set {family} {name} {PEERS}")?;
    match &table.peers {
        None => writeln!(text, "delete set {family} {name} {PEERS}")?,
        Some(peers) if peers.is_empty() => {}
        Some(peers) => {
            let peers: Vec<String> = peers.iter().map(IpAddr::to_string).collect();
            writeln!(text, "add element {family} {name} {PEERS} {{ {} }}", peers.join(", "))?;
        }
    }
    for chain in &table.chains {
        for rule in &chain.rules {
            writeln!(text, "add rule {family} {name} {} {rule}", chain.name)?;
        }
    }
    Ok(())
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|matched| write!(f, "{matched} "))?;
        match self.1 {
            Verdict::Return => f.write_str("return"),
            Verdict::Accept => f.write_str("accept"),
            Verdict::Drop => f.write_str("drop"),
            Verdict::Masquerade(SourcePorts::FullyRandom) => f.write_str("masquerade fully-random"),
            Verdict::Masquerade(SourcePorts::Kernel) => f.write_str("masquerade"),
        }
    }
}

impl fmt::Display for Match {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Marked(mark) => write!(f, "meta mark & {mark:#010x} == {mark:#010x}"),
            Self::Address(side, is, prefix) => {
                let not = match is {
                    Is::In => "",
                    Is::Outside => "!= ",
                };
                write!(f, "{} {} {not}{prefix}", keyword(prefix.family()), field(*side))
            }
            Self::UdpTo(port) => write!(f, "udp dport {port}"),
            Self::FromPeer(family) => write!(f, "{} saddr @{PEERS}", keyword(*family)),
        }
    }
}

fn field(side: Side) -> &'static str {
    match side {
        Side::Source => "saddr",
        Side::Destination => "daddr",
    }
}

/// Whether the JSON of `nft list tables` contains a table.
///
/// # Errors
/// The problem with the text.
pub(crate) fn lists(text: &str, family: Family, name: &str) -> Result<bool, String> {
    let listed = listed(text)?;
    Ok(objects(&listed, "table").any(|table| table["family"] == keyword(family) && table["name"] == name))
}

/// Returns how the JSON of `nft list table` differs from the wanted table.
///
/// # Errors
/// The problem with the text.
pub(crate) fn compare(text: &str, wanted: &Table) -> Result<Vec<Drift>, String> {
    let listed = listed(text)?;
    let mut rules: BTreeMap<&str, Vec<Value>> = BTreeMap::new();
    for rule in objects(&listed, "rule") {
        rules.entry(rule["chain"].as_str().unwrap_or_default()).or_default().push(canonical(&rule["expr"]));
    }
    let mut drift = Vec::new();
    let mut report = |what: &str, name: &str, problem| {
        let place = format!("{what} {} {} {name}", keyword(wanted.family), wanted.name);
        drift.push(Drift::new(place, problem));
    };
    for name in CHAINS {
        let seen = objects(&listed, "chain").find(|chain| chain["name"] == name);
        let rules = rules.remove(name).unwrap_or_default();
        match (wanted.chains.iter().find(|chain| chain.name == name), seen) {
            (None, None) => {}
            (Some(_), None) => report("chain", name, Problem::Missing),
            (None, Some(_)) => report("chain", name, Problem::Leftover),
            (Some(wanted), Some(seen)) if same_chain(wanted, seen, &rules) => {}
            (Some(_), Some(_)) => report("chain", name, Problem::Changed),
        }
    }
    let seen = objects(&listed, "set").find(|set| set["name"] == PEERS).map(elements);
    match (&wanted.peers, seen) {
        (None, None) => {}
        (Some(_), None) => report("set", PEERS, Problem::Missing),
        (None, Some(_)) => report("set", PEERS, Problem::Leftover),
        (Some(wanted), Some(seen)) if seen.as_ref() == Some(wanted) => {}
        (Some(_), Some(_)) => report("set", PEERS, Problem::Changed),
    }
    Ok(drift)
}

/// Returns the peers in the JSON of `nft list table`. Empty if the set is not as this crate writes it.
///
/// # Errors
/// The problem with the text.
pub(crate) fn peers(text: &str) -> Result<BTreeSet<IpAddr>, String> {
    let listed = listed(text)?;
    let set = objects(&listed, "set").find(|set| set["name"] == PEERS);
    Ok(set.and_then(elements).unwrap_or_default())
}

fn listed(text: &str) -> Result<Vec<Value>, String> {
    let mut listing: Value = serde_json::from_str(text).map_err(|error| format!("nft said no JSON: {error}"))?;
    match listing.get_mut("nftables").map(Value::take) {
        Some(Value::Array(objects)) => Ok(objects),
        _ => Err("nft said JSON without a list \"nftables\"".to_owned()),
    }
}

fn objects<'a>(listed: &'a [Value], kind: &'static str) -> impl Iterator<Item = &'a Value> {
    listed.iter().filter_map(move |object| object.get(kind))
}

fn same_chain(wanted: &Chain, seen: &Value, rules: &[Value]) -> bool {
    let shape = json!([wanted.kind, wanted.hook, wanted.priority.1, "accept"]);
    let seen_shape = json!([seen["type"], seen["hook"], seen["prio"], seen["policy"]]);
    shape == seen_shape
        && wanted.rules.len() == rules.len()
        && wanted.rules.iter().map(Rule::json).eq(rules.iter().cloned())
}

/// Returns a set's addresses, or `None` if it contains anything else.
fn elements(set: &Value) -> Option<BTreeSet<IpAddr>> {
    let addr = |element: &Value| element.as_str()?.parse().ok();
    match &set["elem"] {
        Value::Null => Some(BTreeSet::new()),
        Value::Array(elements) => elements.iter().map(addr).collect(),
        one => addr(one).map(|addr| [addr].into()),
    }
}

/// Returns statements in one form for all releases of nft: some list a single flag as an array, others (1.0.6) bare.
fn canonical(expr: &Value) -> Value {
    let Value::Array(statements) = expr else { return expr.clone() };
    let one = |statement: &Value| match statement.get("masquerade").map(|masquerade| &masquerade["flags"]) {
        Some(Value::Array(flags)) if flags.len() == 1 => json!({ "masquerade": { "flags": flags[0] } }),
        _ => statement.clone(),
    };
    statements.iter().map(one).collect()
}

impl Rule {
    fn json(&self) -> Value {
        let verdict = match self.1 {
            Verdict::Return => json!({ "return": null }),
            Verdict::Accept => json!({ "accept": null }),
            Verdict::Drop => json!({ "drop": null }),
            Verdict::Masquerade(SourcePorts::FullyRandom) => json!({ "masquerade": { "flags": "fully-random" } }),
            Verdict::Masquerade(SourcePorts::Kernel) => json!({ "masquerade": null }),
        };
        self.0.iter().map(Match::json).chain([verdict]).collect()
    }
}

impl Match {
    fn json(&self) -> Value {
        let payload = |protocol: &str, field: &str| json!({ "payload": { "protocol": protocol, "field": field } });
        let (op, left, right) = match self {
            Self::Marked(mark) => ("==", json!({ "&": [{ "meta": { "key": "mark" } }, mark] }), json!(mark)),
            Self::Address(side, is, prefix) => {
                let op = match is {
                    Is::In => "==",
                    Is::Outside => "!=",
                };
                (op, payload(keyword(prefix.family()), field(*side)), prefix_json(prefix))
            }
            Self::UdpTo(port) => ("==", payload("udp", "dport"), json!(port)),
            Self::FromPeer(family) => ("==", payload(keyword(*family), "saddr"), json!(format!("@{PEERS}"))),
        };
        json!({ "match": { "op": op, "left": left, "right": right } })
    }
}

fn prefix_json(prefix: &Prefix) -> Value {
    if prefix.len() == prefix.family().bits() {
        return json!(prefix.addr().to_string());
    }
    json!({ "prefix": { "addr": prefix.addr().to_string(), "len": prefix.len() } })
}

#[cfg(test)]
mod tests {
    use flannel_core::firewall::{Forward, Masquerade, Rules, VxlanGuard};
    use flannel_core::kernel::OverlayName;
    use flannel_core::net::Dual;
    use proptest::prelude::*;

    use super::*;
    use crate::wanted::tables;

    fn rules() -> Rules {
        let networks =
            Dual { v4: Some("10.42.0.0/16".parse().unwrap()), v6: Some("2001:cafe:42::/56".parse().unwrap()) };
        let subnets =
            Dual { v4: Some("10.42.7.0/24".parse().unwrap()), v6: Some("2001:cafe:42:7::/64".parse().unwrap()) };
        let rules = Rules::new(OverlayName::default(), &networks, &subnets);
        rules.masquerading(Masquerade::default())
    }

    fn script(rules: &Rules) -> String {
        tables(rules, SourcePorts::FullyRandom).iter().map(|(_, table)| put(table, Start::Keep)).collect()
    }

    #[test]
    fn commands_are_as_they_always_were() {
        let mut rules = rules();
        assert_eq!(script(&rules), include_str!("../tests/golden/dual.commands"));
        let v4 = rules.pods.v4.take();
        assert_eq!(script(&rules), include_str!("../tests/golden/v6.commands"));
        rules.pods = Dual { v4, v6: None };
        let peers = ["192.0.2.1", "192.0.2.2", "2001:db8::1"].map(|addr| addr.parse().unwrap()).into();
        rules.guard = Some(VxlanGuard { port: 8472, peers });
        assert_eq!(script(&rules), include_str!("../tests/golden/v4_guarded.commands"));
    }

    /// Returns a listing in `nft`'s form: these chains, each with the JSON of its rules.
    fn listing(table: &Table, rule: impl Fn(&Rule) -> Value) -> String {
        let mut objects = vec![json!({ "metainfo": { "json_schema_version": 1 } })];
        for chain in &table.chains {
            objects.push(json!({ "chain": { "name": chain.name, "type": chain.kind, "hook": chain.hook,
                "prio": chain.priority.1, "policy": "accept", "handle": 7 } }));
            objects.extend(chain.rules.iter().map(|it| json!({ "rule": { "chain": chain.name, "expr": rule(it) } })));
        }
        objects.extend(table.peers.iter().map(|peers| json!({ "set": { "name": PEERS, "elem": peers } })));
        json!({ "nftables": objects }).to_string()
    }

    proptest! {
        #[test]
        fn what_is_wanted_is_no_drift_and_without_any_part_of_it_is(
            (network, len) in (any::<IpAddr>(), 8u8..=30), port: u16, guarded: bool, masqueraded: bool,
            peers in proptest::collection::btree_set(any::<IpAddr>(), 0..4), forward: bool, left_out: prop::sample::Index,
        ) {
            let prefix = Prefix::masked(network, len).unwrap();
            let mut pods = Dual::default();
            *pods.slot(prefix.family()) = Some(prefix);
            let mut rules = Rules::new(OverlayName::default(), &pods, &pods);
            rules.masquerade = masqueraded.then(Masquerade::default);
            rules.forward = if forward { Forward::Accept } else { Forward::Untouched };
            rules.guard = guarded.then_some(VxlanGuard { port, peers });
            let table = tables(&rules, SourcePorts::FullyRandom).slot(prefix.family()).take().unwrap();
            let text = listing(&table, Rule::json);
            prop_assert_eq!(compare(&text, &table), Ok(vec![]));
            let mut objects: Value = serde_json::from_str(&text).unwrap();
            let list = objects["nftables"].as_array_mut().unwrap();
            // The first only contains nft's version.
            if list.len() > 1 {
                list.remove(1 + left_out.index(list.len() - 1));
                prop_assert_ne!(compare(&objects.to_string(), &table), Ok(vec![]));
            }
        }
    }

    #[test]
    fn a_lone_flag_may_stand_in_a_list() {
        let table = tables(&rules(), SourcePorts::FullyRandom).v4.unwrap();
        let in_list = |rule: &Rule| {
            let text = rule.json().to_string().replace("\"fully-random\"", "[\"fully-random\"]");
            serde_json::from_str(&text).unwrap()
        };
        assert_eq!(compare(&listing(&table, in_list), &table), Ok(vec![]));
        assert_eq!(compare(&listing(&table, Rule::json), &table), Ok(vec![]));
    }

    #[test]
    fn other_ports_or_an_empty_listing_are_drift_and_nonsense_is_an_error() {
        let table = tables(&rules(), SourcePorts::FullyRandom).v4.unwrap();
        let plain = tables(&rules(), SourcePorts::Kernel).v4.unwrap();
        let drift = compare(&listing(&plain, Rule::json), &table).unwrap();
        assert_eq!(
            drift.iter().map(Drift::to_string).collect::<Vec<_>>(),
            ["chain ip flannel-ipv4 postrtg was changed"]
        );
        let drift = compare(r#"{"nftables": []}"#, &table).unwrap();
        assert!(drift.len() == 2 && drift.iter().all(|drift| drift.problem == Problem::Missing), "{drift:?}");
        for nonsense in ["", "{}", "[]", "7", "null", r#"{"nftables": 7}"#] {
            assert!(compare(nonsense, &table).is_err(), "{nonsense}");
        }
    }
}
