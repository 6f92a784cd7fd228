//! `docs/bounds.md` names constants and tests that exist, with the values they have.
#![expect(clippy::expect_used, reason = "helpers of tests")]

use std::path::{Path, PathBuf};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("a workspace").to_owned()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_default()
}

/// All Rust code beside what was built.
fn code(dir: &Path, found: &mut String) {
    for entry in std::fs::read_dir(dir).expect("a directory").flatten() {
        let (path, name) = (entry.path(), entry.file_name());
        if path.is_dir() && name != "target" && name != ".git" {
            code(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push_str(&read(&path));
        }
    }
}

/// The texts between back quotes.
fn quoted(cell: &str) -> Vec<&str> {
    cell.split('`').skip(1).step_by(2).collect()
}

#[test]
fn the_table_of_bounds_names_what_there_is() {
    let (table, mut all) = (read(&root().join("docs/bounds.md")), String::new());
    code(&root(), &mut all);
    let rows: Vec<Vec<&str>> =
        table.lines().filter(|line| line.starts_with("| ")).skip(1).map(|line| line.split('|').collect()).collect();
    assert!(rows.len() > 30, "{} rows", rows.len());
    for row in rows {
        let [_, what, constant, _, test, _] = row[..] else { panic!("{row:?}") };
        let [file, constant] = quoted(constant)[..] else { panic!("{what}: {constant}") };
        let (name, value) = constant.split_once(" = ").expect("a name and a value");
        let text = read(&root().join(file));
        let is_it = |line: &str| {
            let declared = line.split_once(&format!("const {name}: ")).and_then(|(_, rest)| rest.split_once(" = "));
            declared.is_some_and(|(_, found)| found.trim_end_matches(';') == value)
        };
        assert!(text.lines().any(is_it), "{what}: no {constant} in {file}");
        for test in quoted(test) {
            assert!(all.contains(&format!("fn {test}(")), "{what}: no test {test}");
        }
    }
}
