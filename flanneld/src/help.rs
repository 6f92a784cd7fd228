//! The text of `help` and `-help`, made from the tables of flags and commands.

use std::fmt::Write as _;

use textwrap::{WordSeparator, WordSplitter};

use crate::command_table::{ADDRESS, COMMANDS, Command, Source};
use crate::exit;
use crate::flag_table::{Flag, GROUPS, Group, Kind, find, variable};

/// Text is wrapped at this column.
const WIDTH: usize = 80;

/// Exit codes of the agent, with their meanings.
pub(crate) const EXITS: &[(u8, &str)] = &[
    (exit::SUCCESS, "ended by a signal"),
    (exit::FAILURE, "did not start, or cannot continue"),
    (exit::USAGE, USAGE),
    (exit::LEASE_LOST, "the lease is lost, with -on-lease-loss=stop"),
    (
        exit::CONFIG_CHANGED,
        "the network configuration changed, with -on-config-change=restart or after a start from the state file",
    ),
];
/// The meaning of [`exit::USAGE`], for every command.
pub(crate) const USAGE: &str = "the command line or the environment is not valid";
/// How flags are written.
pub(crate) const SYNTAX: &str = "Each flag is written as -name VALUE or -name=VALUE; a switch as -name or -name=false. Two \
     dashes are the same as one. Each flag can also be set by the environment variable in brackets; the command line takes \
     precedence.";

/// Returns the description of all flags and commands.
pub(crate) fn all() -> String {
    let mut text = String::from("Usage: flanneld [flags] [command]\n\n");
    text += "Without a command, the agent runs until a signal ends it.\n\nCommands:\n";
    for command in COMMANDS {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {:<16} {}", called(command), command.summary);
    }
    let _ = writeln!(text, "\nflanneld help COMMAND describes a command.\n\n{}", wrapped(SYNTAX, 0));
    for Group { title, flags } in GROUPS {
        let _ = writeln!(text, "\n{title}:");
        flags.iter().for_each(|flag| describe(flag, &mut text));
    }
    text += "\nExit codes of the agent:\n";
    exits(EXITS, &mut text);
    text
}

/// Returns the description of a command.
pub(crate) fn of(command: &Command) -> String {
    let mut text = format!("Usage: flanneld {} [flags]\n\n{}\n", called(command), wrapped(command.details, 0));
    let address: &[&str] = if command.source == Source::Agent { &ADDRESS } else { &[] };
    let flags: Vec<_> = command.flags.iter().chain(address).filter_map(|name| find(name)).collect();
    if !flags.is_empty() {
        text += "\nFlags:\n";
        flags.into_iter().for_each(|flag| describe(flag, &mut text));
    }
    if command.source == Source::Host {
        let hint = "Give it the flags that the agent has, on the command line or in the environment: flanneld help lists them.";
        // Writing to a String cannot fail.
        let _ = writeln!(text, "\n{}", wrapped(hint, 0));
    }
    text += "\nExit codes:\n";
    exits(command.exits, &mut text);
    if !command.exits.iter().any(|(_, meaning)| *meaning == "always") {
        exits(&[(exit::USAGE, USAGE)], &mut text);
    }
    text += "\nExamples:\n";
    for example in command.examples {
        let _ = writeln!(text, "  {example}");
    }
    text
}

/// Returns the command with its operand.
pub(crate) fn called(command: &Command) -> String {
    format!("{} {}", command.name, command.operand).trim_end().to_owned()
}

/// Returns the default as it is shown; `None` if there is none.
pub(crate) fn default(flag: &Flag) -> Option<String> {
    match (flag.kind, flag.default) {
        (_, "") => None,
        (Kind::Text(_) | Kind::List(_), default) => Some(format!("\"{default}\"")),
        (Kind::Bool | Kind::Int(_), default) => Some(default.to_owned()),
    }
}

fn describe(flag: &Flag, text: &mut String) {
    let value = flag.kind.value().map(|value| format!(" {value}")).unwrap_or_default();
    let default = default(flag).map(|default| format!(" (default {default})")).unwrap_or_default();
    let variable = variable(flag).map(|name| format!(" [{name}]")).unwrap_or_default();
    let details = format!("{}{default}{variable}", flag.help);
    // Writing to a String cannot fail.
    let _ = writeln!(text, "  -{}{value}\n{}", flag.name, wrapped(&details, 8));
}

fn exits(exits: &[(u8, &str)], text: &mut String) {
    for (code, meaning) in exits {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  {code}  {}", wrapped(meaning, 5).trim_start());
    }
}

/// Wraps at spaces only: names, addresses and flags stay whole.
fn wrapped(text: &str, indent: usize) -> String {
    let indent = " ".repeat(indent);
    let options = textwrap::Options::new(WIDTH).initial_indent(&indent).subsequent_indent(&indent).break_words(false);
    let options = options.word_separator(WordSeparator::AsciiSpace).word_splitter(WordSplitter::NoHyphenation);
    textwrap::fill(text, options)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flag_table::flags;

    #[test]
    fn help_shows_each_flag_with_kind_default_and_variable_within_80_columns() {
        let help = all();
        for flag in flags() {
            let lines: Vec<_> = help.lines().skip_while(|line| !is_of(line, flag)).take(8).collect();
            let shown = lines.join(" ");
            let variable = variable(flag).map(|name| format!("[{name}]"));
            assert!(variable.is_none_or(|variable| shown.contains(&variable)), "{}: {shown}", flag.name);
            assert!(flag.default.is_empty() || shown.contains(flag.default), "{}: {shown}", flag.name);
        }
        assert!(help.contains("  -iptables-resync SECONDS\n"), "{help}");
        assert!(help.contains("\nExit codes of the agent:\n  0  "), "{help}");
        let wide = help.lines().find(|line| line.len() > WIDTH && line.trim_start().contains(' '));
        assert_eq!(wide, None);
    }

    fn is_of(line: &str, flag: &Flag) -> bool {
        line.strip_prefix("  -").and_then(|line| line.split(' ').next()) == Some(flag.name)
    }

    #[test]
    fn help_of_a_command_has_usage_flags_exit_codes_and_an_example() {
        for command in COMMANDS {
            let help = of(command);
            assert!(help.starts_with(&format!("Usage: flanneld {}", command.name)), "{help}");
            for part in ["\nExit codes:\n  0  ", "\nExamples:\n  flanneld "] {
                assert!(help.contains(part), "{part:?} is not in\n{help}");
            }
            assert!(command.flags.iter().all(|flag| help.contains(&format!("  -{flag}"))), "{help}");
            assert!(help.lines().all(|line| line.len() <= WIDTH), "{help}");
            assert!(all().contains(command.summary));
        }
    }
}
