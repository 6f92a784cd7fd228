//! The completion for zsh.

use std::fmt::Write as _;

use super::{Values, common_flags, is_repeatable};
use crate::command_table::COMMANDS;
use crate::flag_table::{Flag, find};

/// Returns the script.
pub(super) fn script() -> String {
    let mut script = format!("#compdef flanneld\n# {}\n\nlocal -a commands flags\ncommands=(\n", super::HEADER);
    for command in COMMANDS {
        // Writing to a String cannot fail.
        let _ = writeln!(script, "    {}", quoted(&format!("{}:{}", command.name, command.summary)));
    }
    script += ")\nflags=(\n";
    common_flags().for_each(|flag| specify(flag, "    ", &mut script));
    script += ")\ncase \"${words[(r)(";
    script += &super::command_names().replace(' ', "|");
    script += ")]}\" in\n";
    for command in COMMANDS.iter().filter(|command| !command.flags.is_empty()) {
        let _ = writeln!(script, "    {})\n        flags+=(", command.name);
        let own = command.flags.iter().filter_map(|name| find(name));
        own.for_each(|flag| specify(flag, "            ", &mut script));
        script += "        ) ;;\n";
    }
    script + "esac
_arguments -S $flags '1:command:{_describe command commands}' '2:operand:{[[ ${words[(r)help]} == help ]] && _describe command commands}'
"
}

fn specify(flag: &Flag, indent: &str, script: &mut String) {
    let help = flag.help.replace('\\', "\\\\").replace('[', "\\[").replace(']', "\\]");
    let repeated = if is_repeatable(flag) { "*" } else { "" };
    let value = flag.kind.value().unwrap_or_default();
    let spec = match Values::of(flag) {
        Values::None => format!("-{}[{help}]", flag.name),
        Values::Files => format!("{repeated}-{}=[{help}]:{value}:_files", flag.name),
        Values::Directories => format!("{repeated}-{}=[{help}]:{value}:_files -/", flag.name),
        Values::Choices(choices) => format!("{repeated}-{}=[{help}]:value:({})", flag.name, choices.join(" ")),
        Values::Any => format!("{repeated}-{}=[{help}]:{}: ", flag.name, value.replace(':', "\\:")),
    };
    // Writing to a String cannot fail.
    let _ = writeln!(script, "{indent}{}", quoted(&spec));
}

/// Returns text as one word of the shell.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', "'\\''"))
}
