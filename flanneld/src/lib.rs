//! flanneld: the drop-in flannel agent.

mod agent;
mod assemble;
mod blackhole;
mod certificates;
mod cleanup;
mod client;
mod cni;
mod commands;
mod condition;
mod config_keys;
mod connections;
mod credentials;
mod directories;
mod doctor;
mod env;
mod firewall;
mod flag_table;
mod flags;
#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod last_words;
mod log;
mod malloc;
mod metrics;
mod notify;
mod options;
mod other_agents;
mod peers;
mod privileges;
mod processes;
mod serve;
mod signals;
mod status;
mod stores;

use std::process::ExitCode;

pub(crate) use flannel_core::text::chain;

use flags::{UsageError, Values};
use options::Options;

/// Exit codes of the process.
pub(crate) mod exit {
    /// The command succeeded, or the agent ended by a signal, with the data plane up.
    pub(crate) const SUCCESS: u8 = 0;
    /// The agent did not start or cannot continue, or a command failed or found an error.
    pub(crate) const FAILURE: u8 = 1;
    /// The command line or the environment is not valid.
    pub(crate) const USAGE: u8 = 2;
    /// The lease is lost, and `-on-lease-loss=stop`.
    pub(crate) const LEASE_LOST: u8 = 3;
    /// The network configuration changed, and `-on-config-change=restart`.
    pub(crate) const CONFIG_CHANGED: u8 = 4;
}

/// The commands.
pub(crate) const COMMANDS: [&str; 6] = ["status", "peers", "plan", "explain", "doctor", "cleanup"];

/// Runs the program on the arguments and the environment of the process.
pub fn main() -> ExitCode {
    last_words::abort_on_panic();
    let code = match start() {
        Ok(code) => code,
        Err(error) => {
            last_words::say(format!("flanneld: {error}\nflanneld -help lists all flags and commands\n"));
            exit::USAGE
        }
    };
    ExitCode::from(code)
}

fn start() -> Result<u8, UsageError> {
    let flags::Line { mut values, words, help } = flags::parse(flags::texts(std::env::args_os().skip(1))?)?;
    if help {
        last_words::say(flags::usage());
        return Ok(exit::SUCCESS);
    }
    if values.bool("version") {
        last_words::say(concat!("flanneld ", env!("CARGO_PKG_VERSION"), " (flannelkit)\n").to_owned());
        return Ok(exit::SUCCESS);
    }
    let (variables, mut warnings) = env::texts(std::env::vars_os());
    warnings.extend(env::overlay(&mut values, variables)?);
    warnings.extend(ignored(&values));
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let options = Options::read(&values, |name| std::env::var(name).ok(), hostname)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let outcome = match words.as_slice() {
        [] => return Ok(run(&options, &values.summary(), &warnings)),
        ["status"] => commands::status(&options),
        ["peers"] => commands::peers(&options),
        ["plan"] => commands::plan(&options),
        ["explain", peer] => commands::explain(&options, peer),
        ["doctor"] => commands::doctor(&options, &warnings),
        ["cleanup"] => commands::cleanup(&options),
        ["explain", ..] => {
            return Err(UsageError::Operands("explain takes one operand: a key or an address".to_owned()));
        }
        [word, ..] if COMMANDS.contains(word) => {
            return Err(UsageError::Operands(format!("{word} takes no operands")));
        }
        [word, ..] => {
            let near = flags::near(word, COMMANDS.into_iter());
            return Err(UsageError::Command { word: (*word).to_owned(), near });
        }
    };
    Ok(outcome.unwrap_or_else(|error| {
        last_words::say(format!("flanneld: {}\n", chain(&error)));
        exit::FAILURE
    }))
}

fn run(options: &Options, flags: &str, warnings: &[String]) -> u8 {
    malloc::give_memory_back();
    match agent::run(options, flags, warnings) {
        Ok(()) => exit::SUCCESS,
        Err(error) => {
            last_words::say(log::last_line(options.log.format, &chain(&error)));
            error.code()
        }
    }
}

fn ignored(values: &Values) -> impl Iterator<Item = String> {
    let given = |name: &&str| values.is_given(name);
    ["vmodule", "log_backtrace_at"]
        .into_iter()
        .filter(given)
        .map(|name| format!("-{name} has no effect"))
        .collect::<Vec<_>>()
        .into_iter()
}
