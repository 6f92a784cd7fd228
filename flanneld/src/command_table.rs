//! The table of commands, from which help and manual are made.

use crate::exit;

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Command {
    pub(crate) name: &'static str,
    /// The name of its operand; empty if it takes none. In brackets if it may be left out.
    pub(crate) operand: &'static str,
    pub(crate) summary: &'static str,
    pub(crate) details: &'static str,
    /// The flags of the group "Commands" that it takes. The others are errors.
    pub(crate) flags: &'static [&'static str],
    pub(crate) source: Source,
    /// Exit codes with their meanings, in addition to [`exit::USAGE`].
    pub(crate) exits: &'static [(u8, &'static str)],
    pub(crate) examples: &'static [&'static str],
}

/// What a command reads, which decides which flags of the agent matter for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    /// The running agent, at `-metrics-ip` and `-metrics-port`.
    Agent,
    /// Store and kernel: it needs the agent's flags.
    Host,
    /// Nothing.
    Nothing,
}

/// The flags by which a running agent is found.
pub(crate) const ADDRESS: [&str; 2] = ["metrics-ip", "metrics-port"];

const OUTPUT: &[&str] = &["o", "json"];
const FOLLOWED: &[&str] = &["o", "json", "w", "watch"];

/// Returns the command of this name.
pub(crate) fn find(name: &str) -> Option<&'static Command> {
    COMMANDS.iter().find(|command| command.name == name)
}

/// All commands.
pub(crate) const COMMANDS: &[Command] = &[
    Command {
        name: "status",
        operand: "",
        summary: "shows the state of the running agent",
        details: "Shows whether the node is ready and what readiness waits for, reasons why it is degraded, the lease, \
                  the uplink, the lease store, the firewall rules, the number of peers, and every object or record that \
                  is not as wanted, each with the reason.",
        flags: FOLLOWED,
        source: Source::Agent,
        exits: &[(exit::SUCCESS, "the agent is ready"), (exit::FAILURE, "it is not ready, or it was not reached")],
        examples: &["flanneld status", "flanneld status -o json", "flanneld status -w"],
    },
    Command {
        name: "peers",
        operand: "",
        summary: "lists the records of the other nodes",
        details: "Lists the record of every other node: subnet, address of the node, the backend's data, the state, and \
                  the reason for every state other than \"programmed\". -o wide adds the key, the subnet and address of \
                  IPv6, and the time until the lease expires. Subnets whose deletion is delayed are listed too.",
        flags: FOLLOWED,
        source: Source::Agent,
        exits: &[
            (exit::SUCCESS, "the list is complete"),
            (exit::FAILURE, "the agent was not reached, or has no list yet"),
        ],
        examples: &["flanneld peers", "flanneld peers -o wide", "flanneld peers -o json"],
    },
    Command {
        name: "plan",
        operand: "",
        summary: "shows what a start of the agent would change",
        details: "Reads the lease store and the kernel, and shows the writes that a start would make, objects of other \
                  programs in the way, and writes that would be deferred. Changes no object and no record.",
        flags: OUTPUT,
        source: Source::Host,
        exits: &[(exit::SUCCESS, "the plan is complete"), (exit::FAILURE, "store or kernel could not be read")],
        examples: &["flanneld plan -etcd-endpoints=https://10.0.0.1:2379"],
    },
    Command {
        name: "explain",
        operand: "PEER",
        summary: "shows why a peer is, or is not, programmed",
        details: "Shows the kernel objects of one peer, or the reason why there are none. PEER is the key of a record, \
                  the part of a key before a dot, a subnet, an address in a subnet, or the address of a node. All records \
                  with that subnet or address are shown.",
        flags: OUTPUT,
        source: Source::Agent,
        exits: &[
            (exit::SUCCESS, "a record matches"),
            (exit::FAILURE, "no record matches, or the agent was not reached"),
        ],
        examples: &["flanneld explain 10.5.34.7", "flanneld explain 192.168.88.12 -o json"],
    },
    Command {
        name: "doctor",
        operand: "",
        summary: "checks this host, and shows how to correct what it finds",
        details: "Checks everything that a start needs. Each finding has the severity ok, note, WARNING or ERROR, and \
                  what to do. Changes no object and no record, and needs no running agent.",
        flags: OUTPUT,
        source: Source::Host,
        exits: &[(exit::SUCCESS, "no error was found"), (exit::FAILURE, "at least one error was found")],
        examples: &["flanneld doctor -etcd-endpoints=https://10.0.0.1:2379"],
    },
    Command {
        name: "cleanup",
        operand: "",
        summary: "removes everything of this overlay from the host",
        details: "Removes devices, routes, firewall rules, files and the lease of this overlay. The agent must not run. \
                  Objects of other programs stay. It may be repeated.",
        flags: &["dry-run", "force"],
        source: Source::Host,
        exits: &[
            (exit::SUCCESS, "nothing is left on this host; a lease is, if the store cannot be reached"),
            (exit::FAILURE, "something could not be removed, or the agent runs"),
        ],
        examples: &["flanneld cleanup -dry-run -etcd-endpoints=https://10.0.0.1:2379"],
    },
    Command {
        name: "version",
        operand: "",
        summary: "prints the version",
        details: "Prints the version of this program.",
        flags: OUTPUT,
        source: Source::Nothing,
        exits: &[(exit::SUCCESS, "always")],
        examples: &["flanneld version", "flanneld version -o json"],
    },
    Command {
        name: "help",
        operand: "[COMMAND]",
        summary: "describes flags and commands",
        details: "Describes all flags and commands, or one command.",
        flags: &[],
        source: Source::Nothing,
        exits: &[(exit::SUCCESS, "always")],
        examples: &["flanneld help peers"],
    },
];

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flag_table;

    #[test]
    fn every_flag_of_a_command_exists_and_every_flag_of_commands_has_one() {
        let named = |name: &str| COMMANDS.iter().any(|command| command.flags.contains(&name));
        for flag in flag_table::of_commands() {
            assert!(named(flag.name), "-{} belongs to no command", flag.name);
        }
        for name in COMMANDS.iter().flat_map(|command| command.flags) {
            assert!(flag_table::of_commands().any(|flag| flag.name == *name), "-{name} is no flag of commands");
        }
        assert!(ADDRESS.iter().all(|name| flag_table::find(name).is_some()));
    }
}
