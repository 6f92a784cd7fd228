//! `docs/bounds.md` names constants and tests that exist, with the values they have.

mod repository;

use repository::{files, root};

/// The texts between back quotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
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
