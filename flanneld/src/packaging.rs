//! The manual page and the completions of shells, made from the tables of flags and commands. The files are in
//! `deploy`; to write them again, set `RECORD_GOLDEN` and run the tests of this module.

mod bash;
mod fish;
mod manual;
mod zsh;

use crate::command_table::{COMMANDS, Command};
use crate::flag_table::{Flag, Kind, flags, of_commands};

/// What a shell offers as the value of a flag.
enum Values<'a> {
    /// The flag is a switch.
    None,
    Files,
    Directories,
    Choices(Vec<&'a str>),
    /// Any text.
    Any,
}

impl Values<'_> {
    fn of(flag: &Flag) -> Self {
        match flag.kind.value() {
            None => Self::None,
            Some("FILE") => Self::Files,
            Some("DIR") => Self::Directories,
            Some(value) if value.contains('|') => Self::Choices(value.split('|').collect()),
            Some(_) => Self::Any,
        }
    }
}

/// The flags that are allowed with every command and without one.
fn common_flags() -> impl Iterator<Item = &'static Flag> {
    flags().filter(|flag| !of_commands().any(|other| other.name == flag.name))
}

fn is_repeatable(flag: &Flag) -> bool {
    matches!(flag.kind, Kind::List(_))
}

/// The names of the commands, with spaces between them.
fn command_names() -> String {
    COMMANDS.iter().map(|command| command.name).collect::<Vec<_>>().join(" ")
}

/// The flags that only this command takes, with dashes.
fn own_flags(command: &Command) -> Vec<String> {
    command.flags.iter().map(|name| format!("-{name}")).collect()
}

const HEADER: &str = "Made from flanneld's tables of flags and commands (flanneld/src/packaging.rs). Do not edit.";

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;

    #[test]
    fn the_files_in_deploy_are_made_from_the_tables() {
        for (name, text) in [
            ("man/flanneld.8", manual::page()),
            ("completions/flanneld.bash", bash::script()),
            ("completions/_flanneld", zsh::script()),
            ("completions/flanneld.fish", fish::script()),
        ] {
            let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../deploy").join(name);
            if std::env::var_os("RECORD_GOLDEN").is_some() {
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(&path, &text).unwrap();
            }
            let found = fs::read_to_string(&path).unwrap_or_default();
            assert!(found == text, "{name} is out of date: RECORD_GOLDEN=1 cargo test -p flanneld --lib packaging");
        }
    }
}
