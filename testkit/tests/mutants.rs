//! Each patch of `testkit/mutants` takes a mend out of the code as it is now, and names the test that is to fail then.

mod repository;

use std::process::Command;

use repository::{files, root};

#[test]
fn every_mutant_applies_and_names_its_test() {
    let mutants: Vec<_> = files("patch").into_iter().filter(|(path, _)| path.starts_with("testkit/mutants/")).collect();
    assert!(!mutants.is_empty(), "no patch in testkit/mutants");
    for (path, text) in mutants {
        let mut lines = text.lines();
        assert!(lines.next().is_some_and(|line| line.starts_with("# ")), "{path}: its first line says what goes wrong");
        assert!(
            lines.next().is_some_and(|line| line.starts_with("# test: cargo test ")),
            "{path}: its second names a test"
        );
        let output = Command::new("git").args(["apply", "--check", &path]).current_dir(root()).output();
        let output = output.expect("this test needs git");
        assert!(output.status.success(), "{path}: make it anew: {}", String::from_utf8_lossy(&output.stderr));
    }
}
