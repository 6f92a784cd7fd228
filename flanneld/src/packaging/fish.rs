//! The completion for fish.

use std::fmt::Write as _;

use super::{Values, common_flags};
use crate::command_table::COMMANDS;
use crate::flag_table::{Flag, of_commands};

/// Returns the script.
pub(super) fn script() -> String {
    let mut script = format!("# {}\n\ncomplete -c flanneld -f\n", super::HEADER);
    let names = super::command_names();
    for command in COMMANDS {
        // Writing to a String cannot fail.
        let _ = writeln!(
            script,
            "complete -c flanneld -n 'not __fish_seen_subcommand_from {names}' -a {} -d {}",
            command.name,
            quoted(command.summary)
        );
    }
    let _ = writeln!(script, "complete -c flanneld -n '__fish_seen_subcommand_from help' -a '{names}'");
    common_flags().for_each(|flag| specify(flag, "", &mut script));
    for flag in of_commands() {
        let takers: Vec<_> = COMMANDS.iter().filter(|command| command.flags.contains(&flag.name)).collect();
        let takers: Vec<_> = takers.iter().map(|command| command.name).collect();
        specify(flag, &format!(" -n '__fish_seen_subcommand_from {}'", takers.join(" ")), &mut script);
    }
    script
}

fn specify(flag: &Flag, condition: &str, script: &mut String) {
    let values = match Values::of(flag) {
        Values::None => String::new(),
        Values::Files => " -r -F".to_owned(),
        Values::Directories => " -x -a '(__fish_complete_directories)'".to_owned(),
        Values::Choices(choices) => format!(" -x -a '{}'", choices.join(" ")),
        Values::Any => " -x".to_owned(),
    };
    // A single letter is a short option, all others are long ones with one dash.
    let option = if flag.name.len() == 1 { "-s" } else { "-o" };
    // Writing to a String cannot fail.
    let _ = writeln!(script, "complete -c flanneld{condition} {option} {}{values} -d {}", flag.name, quoted(flag.help));
}

/// Returns text as one word of the shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\\', "\\\\").replace('\'', "\\'"))
}
