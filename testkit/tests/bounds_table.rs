//! `docs/bounds.md` names constants and tests that exist, with the values they have, and all bounds that there are.

mod repository;

use repository::{files, root};

/// The texts between back quotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

/// Constants that are called as bounds are and have no row, with the reason.
const NO_ROW: [(&str, &str, &str); 13] = [
    ("backend-udp/src/path/tx.rs", "MAX_SPURIOUS_WAKEUPS", "how often something is tried before a pause"),
    ("backend-vxlan/src/config.rs", "MAX_MTU", "the kernel's limit of what an operator sets"),
    ("flannel-core/src/agent/former_networks.rs", "MOST_AT_ONCE", "how much is done at a time; nothing is left out"),
    (
        "flannel-core/src/agent/host.rs",
        "MOST_TAKEN",
        "own former MAC addresses, one a pause: forgotten, at worst used again",
    ),
    ("flannel-core/src/agent/status.rs", "MAX_CONFLICTS", "another name of Plan::MOST_TOLD"),
    ("flannel-core/src/netlink/claim.rs", "MOST_NAMES", "how often something is tried"),
    ("flanneld/src/client.rs", "MOST", "what the command line reads of the agent's answer, by whose user it is run"),
    ("subnet-etcd/src/store.rs", "MAX_OWN", "no test goes past it: an etcd with as many leases of one address"),
    ("subnet-etcd/src/store.rs", "MAX_PREVIOUS", "no test goes past it: an etcd with as many leases of one address"),
    ("subnet-kube/src/api.rs", "MAX_REFUSAL", "of the API server, which is trusted; what follows is not read"),
    ("subnet-kube/src/api.rs", "MOST_BUSY", "a time"),
    ("subnet-kube/src/check.rs", "MAX_SKEW", "a time"),
    ("subnet-kube/src/node.rs", "MOST_CIDRS", "as many as Kubernetes has: more is an error"),
];

/// The constants in the sources, but for those of tests, that are called as bounds are.
fn bounds() -> Vec<(String, String)> {
    let mut found = Vec::new();
    for (file, text) in files("rs") {
        let is_of_tests = ["testkit/", "bench/", "fuzz/", "examples/"].iter().any(|folder| file.starts_with(folder))
            || ["/tests", "/testing/"].iter().any(|folder| file.contains(folder));
        if is_of_tests || !file.contains("/src/") {
            continue;
        }
        let code = text.split("\nmod tests {").next().unwrap_or_default();
        for line in code.lines() {
            let Some((before, rest)) = line.split_once("const ") else { continue };
            let is_item = before.trim().is_empty() || before.trim().starts_with("pub");
            let Some((name, _)) = rest.split_once(": ").filter(|_| is_item) else { continue };
            if ["MAX_", "MOST_"].iter().any(|start| name.starts_with(start)) || ["MOST", "LIMIT"].contains(&name) {
                found.push((file.clone(), name.to_owned()));
            }
        }
    }
    found
}

#[test]
fn each_bound_is_in_the_table() {
    let table = std::fs::read_to_string(root().join("docs/bounds.md")).unwrap_or_default();
    let bounds = bounds();
    assert!(bounds.len() > 40, "{bounds:?}");
    let has_row = |file: &str, name: &str| table.contains(&format!("`{file}` `{name} = "));
    let is_without = |file: &str, name: &str| NO_ROW.iter().any(|(of, called, _)| (*of, *called) == (file, name));
    let missing: Vec<_> =
        bounds.iter().filter(|(file, name)| !has_row(file, name) && !is_without(file, name)).collect();
    assert!(missing.is_empty(), "give these a row in docs/bounds.md: {missing:?}");
    for (file, name, _) in NO_ROW {
        assert!(bounds.contains(&(file.to_owned(), name.to_owned())), "no {name} in {file}");
        assert!(!has_row(file, name), "{name} in {file} has a row");
    }
}

#[test]
fn the_table_of_bounds_names_what_there_is() {
    let read = |file: &str| std::fs::read_to_string(root().join(file)).unwrap_or_default();
    let table = read("docs/bounds.md");
    let all: String = files("rs").into_iter().map(|(_, text)| text).collect();
    let rows: Vec<Vec<&str>> =
        table.lines().filter(|line| line.starts_with("| ")).skip(1).map(|line| line.split('|').collect()).collect();
    assert!(rows.len() > 30, "{} rows", rows.len());
    for row in rows {
        let [_, what, constant, _, test, _] = row[..] else { panic!("{row:?}") };
        let [file, constant] = quoted(constant)[..] else { panic!("{what}: {constant}") };
        let (name, value) = constant.split_once(" = ").expect("a name and a value");
        let text = read(file);
        let is_it = |line: &str| {
            let declared = line.split_once(&format!("const {name}: ")).and_then(|(_, rest)| rest.split_once(" = "));
            declared.is_some_and(|(_, found)| found.trim_end_matches(';') == value)
        };
        assert!(text.lines().any(is_it), "{what}: no {constant} in {file}");
        assert!(!quoted(test).is_empty(), "{what}: no test is named");
        for test in quoted(test) {
            assert!(all.contains(&format!("fn {test}(")), "{what}: no test {test}");
        }
    }
}
