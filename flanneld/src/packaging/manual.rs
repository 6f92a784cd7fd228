//! The manual page, `man 8 flanneld`.

use std::fmt::Write as _;

use crate::command_table::{ADDRESS, COMMANDS, Command, Source};
use crate::flag_table::{Flag, GROUPS, Group, variable};
use crate::help;

/// Files that the agent uses by default, and their purpose.
const FILES: &[(&str, &str)] = &[
    ("/run/flannel/subnet.env", "Subnet, network and MTU of this node, for the CNI plug-in."),
    ("/var/lib/flannel/OVERLAY.state", "Lease and peers, for a boot while the lease store is unavailable."),
    ("/etc/kube-flannel/net-conf.json", "Network configuration, with -kube-subnet-mgr."),
    ("/etc/default/flanneld", "Environment of the systemd service."),
];

/// Returns the page in the macros of man(7).
pub(super) fn page() -> String {
    let mut page =
        format!(".\\\" {}\n.TH FLANNELD 8 \"\" \"flannelkit\" \"System Administration\"\n.nh\n", super::HEADER);
    page += ".SH NAME\nflanneld \\- agent of a flannel overlay network\n";
    page += ".SH SYNOPSIS\n.B flanneld\n.RI [ flags ]\n";
    for command in COMMANDS {
        // Writing to a String cannot fail.
        let _ = writeln!(page, ".br\n.B flanneld {}\n.RI [ flags ]", text(&help::called(command)));
    }
    page += ".SH DESCRIPTION\n";
    page += "Without a command,\n.B flanneld\nruns the agent until a signal ends it: it acquires a lease of a subnet from etcd, Kubernetes or a\n\
             directory, and programs devices, routes and firewall rules so that pods reach the pods of other nodes.\n";
    page += ".SH COMMANDS\n";
    COMMANDS.iter().for_each(|command| describe_command(command, &mut page));
    let _ = writeln!(page, ".SH OPTIONS\n{}", text(help::SYNTAX));
    for Group { title, flags } in GROUPS {
        let _ = writeln!(page, ".SS {}", text(title));
        flags.iter().for_each(|flag| describe_flag(flag, &mut page));
    }
    page += ".SH EXIT STATUS\nOf the agent; those of commands are described with them.\n";
    for (code, meaning) in help::EXITS {
        let _ = writeln!(page, ".TP\n.B {code}\n{}", sentence(meaning));
    }
    page += ".SH FILES\n";
    for (file, purpose) in FILES {
        let _ = writeln!(page, ".TP\n.I {}\n{}", text(file), text(purpose));
    }
    page += ".SH EXAMPLES\n.nf\n";
    for example in COMMANDS.iter().flat_map(|command| command.examples) {
        let _ = writeln!(page, "{}", text(example));
    }
    page + ".fi\n"
}

fn describe_command(command: &Command, page: &mut String) {
    let flags = super::own_flags(command);
    // Writing to a String cannot fail.
    let _ = writeln!(page, ".TP\n.B {}\n{}", text(&help::called(command)), text(command.details));
    if !flags.is_empty() {
        let _ = writeln!(page, "Flags: {}.", text(&flags.join(", ")));
    }
    let _ = writeln!(
        page,
        "{}",
        match command.source {
            Source::Agent =>
                text(&format!("The agent is found by {}.", ADDRESS.map(|name| format!("-{name}")).join(" and "))),
            Source::Host => "It needs the flags of the agent.".to_owned(),
            Source::Nothing => String::new(),
        }
    );
    // An empty line would be a paragraph of its own.
    *page = page.trim_end().to_owned() + "\n";
    let exits: Vec<_> = command.exits.iter().map(|(code, meaning)| format!("{code}: {meaning}")).collect();
    let _ = writeln!(page, "Exit status {}.", text(&exits.join("; ")));
}

fn describe_flag(flag: &Flag, page: &mut String) {
    let value = flag.kind.value().map(|value| format!(" \" {}\"", text(value))).unwrap_or_default();
    // Writing to a String cannot fail.
    let _ = writeln!(page, ".TP\n.BI {}{value}\n{}", text(&format!("-{}", flag.name)), sentence(flag.help));
    if let Some(default) = help::default(flag) {
        let _ = writeln!(page, "Default: {}.", text(&default));
    }
    if let Some(variable) = variable(flag) {
        let _ = writeln!(page, "Variable: {}.", text(&variable));
    }
}

/// Returns text as a sentence.
fn sentence(words: &str) -> String {
    let mut characters = words.chars();
    let first = characters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    text(&format!("{first}{}.", characters.as_str()))
}

/// Escapes text, also where it begins a line. Dashes stay dashes, so that flags can be copied.
fn text(text: &str) -> String {
    let escaped = text.replace('\\', "\\e").replace('-', "\\-");
    if escaped.starts_with(['.', '\'']) { format!("\\&{escaped}") } else { escaped }
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::process::{Command as Process, Stdio};

    use super::*;

    #[test]
    fn groff_formats_the_page_without_a_warning() {
        let mut groff = Process::new("groff");
        groff.args(["-man", "-ww", "-z", "-Tutf8"]).stdin(Stdio::piped()).stderr(Stdio::piped());
        let mut groff = groff.spawn().expect("groff is missing: apt install groff");
        groff.stdin.take().unwrap().write_all(page().as_bytes()).unwrap();
        let output = groff.wait_with_output().unwrap();
        let warnings = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && warnings.is_empty(), "{warnings}");
    }
}
