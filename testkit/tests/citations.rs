//! What code and documents cite is in the repository, and the faults in docs/faults.md have the tests that it names.
#![expect(clippy::expect_used, clippy::panic, reason = "helpers of tests")]

mod repository;

use std::collections::BTreeSet;
use std::fs;

use regex::Regex;

use repository::{files, root};

fn regex(pattern: &str) -> Regex {
    Regex::new(pattern).expect("a pattern")
}

/// Comments without the marks that begin their lines, so that what is cited may go over the end of a line.
fn unwrapped(text: &str) -> String {
    regex(r"\n\s*(//[/!]?|#)?\s*").replace_all(text, " ").into_owned()
}

fn document(name: &str) -> String {
    fs::read_to_string(root().join("docs").join(name)).unwrap_or_else(|error| panic!("docs/{name}: {error}"))
}

#[test]
fn every_section_that_is_cited_exists() {
    let citation = regex(r#"\(?\b([a-z-]+\.md)\)?, ((?:"[^"]+"(?:, )?)+)"#);
    let section = regex(r#""([^"]+)""#);
    let heading = regex(r"(?m)^#+ (.+)$");
    let mut cited = 0;
    for (place, text) in [files("rs"), files("md")].concat() {
        let text = unwrapped(&text);
        for found in citation.captures_iter(&text) {
            let name = &found[1];
            let headings: BTreeSet<String> =
                heading.captures_iter(&document(name)).map(|found| found[1].to_owned()).collect();
            for section in section.captures_iter(&found[2]) {
                assert!(
                    headings.contains(&section[1]),
                    "{place} cites {:?}, which docs/{name} does not have",
                    &section[1]
                );
                cited += 1;
            }
        }
    }
    assert!(cited > 50, "only {cited} citations were found: the pattern is wrong");
}

#[test]
fn nothing_outside_the_repository_is_cited() {
    let elsewhere = regex(r"\bcontract \d|\bkernel-facts \d|\(design, |(^|[^/\w])faults\.md|flannel-contract");
    let all = ["rs", "toml", "yaml", "service", "dict"].into_iter().flat_map(files);
    for (place, text) in all.filter(|(place, _)| !place.ends_with("tests/citations.rs")) {
        let text = unwrapped(&text);
        if let Some(found) = elsewhere.find(&text) {
            panic!("{place} cites {:?}: name a section of docs/", found.as_str());
        }
    }
}

#[test]
fn every_link_between_documents_leads_somewhere() {
    let link = regex(r"\]\(([^)#:]+)(?:#[^)]*)?\)");
    for (place, text) in files("md") {
        let folder = root().join(&place).parent().expect("a folder").to_owned();
        for found in link.captures_iter(&text) {
            assert!(folder.join(&found[1]).exists(), "{place} links to {}, which does not exist", &found[1]);
        }
    }
}

#[test]
fn every_fault_has_the_tests_that_are_named_and_every_cited_fault_exists() {
    let faults = document("faults.md");
    let defined: BTreeSet<String> = faults
        .lines()
        .filter_map(|line| line.strip_prefix("| ")?.split_once(" |"))
        .map(|(id, _)| id.to_owned())
        .collect();
    let name = regex(r"\bfn ([a-z0-9_]+)");
    let mut names = BTreeSet::new();
    let cited = regex(r"docs/faults\.md, ([A-Z][0-9]+)(?: and ([A-Z][0-9]+))?");
    for (place, text) in files("rs") {
        names.extend(name.captures_iter(&text).map(|found| found[1].to_owned()));
        for found in cited.captures_iter(&unwrapped(&text)) {
            for id in found.iter().skip(1).flatten() {
                assert!(defined.contains(id.as_str()), "{place} cites fault {}, which does not exist", id.as_str());
            }
        }
    }
    let targets = fs::read_dir(root().join("fuzz/fuzz_targets")).expect("fuzz targets");
    names.extend(targets.map(|target| {
        let path = target.expect("an entry").path();
        path.file_stem().expect("a name").to_string_lossy().into_owned()
    }));
    let quoted = regex(r"`([a-z0-9_]+)`");
    for line in faults.lines().filter(|line| regex(r"^\| [A-Z]\d+ \|").is_match(line)) {
        let shown = line.rsplit('|').nth(1).expect("a table").trim();
        assert!(!shown.is_empty(), "nothing shows {line}");
        for test in quoted.captures_iter(shown) {
            assert!(names.contains(&test[1]), "docs/faults.md names the test {}, which does not exist", &test[1]);
        }
    }
}
