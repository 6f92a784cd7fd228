//! The modules of flannel-core point one way, and those that decide do no I/O.
#![expect(clippy::expect_used, reason = "helpers of tests")]

mod repository;

use std::collections::BTreeSet;

use regex::Regex;
use repository::files;

/// Each module may use those before it.
const ORDER: [&str; 21] = [
    "net",
    "text",
    "clock",
    "backoff",
    "files",
    "lease",
    "config",
    "allocation",
    "subnet_env",
    "kernel",
    "netlink",
    "plan",
    "subnet",
    "firewall",
    "backend",
    "uplink",
    "admit",
    "agent",
    "overlay",
    "firewall_keeper",
    "serialize",
];

/// Modules that serve tests: they may use any.
const OF_TESTS: [&str; 2] = ["testing", "fuzzing"];

/// Modules that have no runtime, no clock and no I/O.
const PURE: [&str; 7] = ["net", "allocation", "kernel", "plan", "uplink", "admit", "agent"];

/// The product's code in the modules of flannel-core, without comments and tests: module, file, code.
fn modules() -> Vec<(String, String, String)> {
    let name = Regex::new(r"^flannel-core/src/(\w+)(?:\.rs|/)").expect("a pattern");
    let comment = Regex::new(r"(?m)//.*$").expect("a pattern");
    let of_tests = ["tests.rs", "properties.rs", "hostile.rs", "large.rs", "sharing.rs", "acts.rs", "lib.rs"];
    let mut found = Vec::new();
    for (place, text) in files("rs") {
        let Some(module) = name.captures(&place).map(|found| found[1].to_owned()) else { continue };
        if OF_TESTS.contains(&&*module) || of_tests.iter().any(|end| place.ends_with(end)) {
            continue;
        }
        let code = comment.replace_all(&text, "");
        let product = code.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default();
        found.push((module, place, product.to_owned()));
    }
    found
}

#[test]
fn a_module_uses_only_those_before_it() {
    let used = Regex::new(r"\bcrate::(?:(\w+)|\{)").expect("a pattern");
    let rank = |module: &str| ORDER.iter().position(|name| *name == module);
    let modules = modules();
    let seen: BTreeSet<&str> = modules.iter().map(|(module, ..)| &**module).collect();
    assert_eq!(seen, ORDER.into(), "a module is new or gone: say here where it stands");
    for (module, place, code) in &modules {
        for found in used.captures_iter(code) {
            let other =
                found.get(1).unwrap_or_else(|| panic!("{place}: name each module in a `use` of its own")).as_str();
            if OF_TESTS.contains(&other) || other == module {
                continue;
            }
            assert!(rank(other) < rank(module), "{place}: {module} must not use {other}");
        }
    }
}

#[test]
fn what_decides_does_no_io_and_reads_no_clock() {
    let io = Regex::new(r"\b(tokio|std::(fs|net::(Tcp|Udp)\w*|process|thread|env)|Instant|SystemTime)\b")
        .expect("a pattern");
    for (module, place, code) in modules() {
        if PURE.contains(&&*module) {
            let found = io.find(&code).map(|found| found.as_str());
            assert_eq!(found, None, "{place}");
        }
    }
}
