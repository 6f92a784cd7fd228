//! flanneld: the drop-in flannel agent.

mod agent;
mod assemble;
mod blackhole;
mod certificates;
mod cleanup;
mod client;
mod cni;
mod command_table;
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
mod help;
mod log;
mod malloc;
mod metrics;
mod notify;
mod options;
mod output;
#[cfg(test)]
mod packaging;
mod peers;
mod privileges;
mod processes;
mod serve;
mod signals;
mod status;
mod stderr;
mod stores;

use std::process::ExitCode;

pub(crate) use flannel_core::text::chain;

use command_table::{COMMANDS, Command};
use commands::CommandError;
use flags::{UsageError, Values};
use options::Options;
use output::Output;

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

/// Runs the program on the arguments and the environment of the process.
pub fn main() -> ExitCode {
    stderr::abort_on_panic();
    let code = match start() {
        Ok(code) => code,
        Err(error) => {
            stderr::write(format!("flanneld: {error}\nflanneld help lists all flags and commands\n"));
            exit::USAGE
        }
    };
    ExitCode::from(code)
}

fn start() -> Result<u8, UsageError> {
    let flags::Line { mut values, words, help } = flags::parse(flags::texts(std::env::args_os().skip(1))?)?;
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let command = words.first().map(|word| named(word)).transpose()?;
    let operands = words.get(1..).unwrap_or_default();
    if help {
        return Ok(print(&command.map_or_else(help::all, help::of)));
    }
    flags::check_command(&values, command)?;
    if values.bool("version") {
        // On stderr, as in Go flannel.
        stderr::write(commands::version_line());
        return Ok(exit::SUCCESS);
    }
    match (command.map(|command| command.name), operands) {
        (Some("help"), []) => return Ok(print(&help::all())),
        (Some("help"), [word]) => return Ok(print(&help::of(named(word)?))),
        (Some("version"), []) => {
            return Ok(commands::version(Output::read(&values)?).unwrap_or_else(|error| fail(&error)));
        }
        _ => {}
    }
    let (variables, mut warnings) = env::texts(std::env::vars_os());
    warnings.extend(env::overlay(&mut values, variables)?);
    warnings.extend(ignored(&values));
    let hostname = nix::unistd::gethostname().ok().and_then(|name| name.into_string().ok()).unwrap_or_default();
    let options = Options::read(&values, |name| std::env::var(name).ok(), hostname)?;
    let Some(command) = command else { return Ok(run(&options, &values.summary(), &warnings)) };
    let outcome = match (command.name, operands) {
        ("status", []) => commands::status(&options),
        ("peers", []) => commands::peers(&options),
        ("plan", []) => commands::plan(&options),
        ("explain", [peer]) => commands::explain(&options, peer),
        ("doctor", []) => commands::doctor(&options, &warnings),
        ("cleanup", []) => commands::cleanup(&options),
        _ => return Err(UsageError::Operands(command)),
    };
    Ok(outcome.unwrap_or_else(|error| fail(&error)))
}

/// Returns the command of this name.
fn named(word: &str) -> Result<&'static Command, UsageError> {
    command_table::find(word).ok_or_else(|| UsageError::Command {
        word: word.to_owned(),
        near: flags::near(word, COMMANDS.iter().map(|command| command.name)),
    })
}

fn print(text: &str) -> u8 {
    match output::write(text) {
        Ok(_) => exit::SUCCESS,
        Err(error) => fail(&CommandError::Output(error)),
    }
}

fn fail(error: &CommandError) -> u8 {
    stderr::write(format!("flanneld: {}\n", chain(error)));
    exit::FAILURE
}

fn run(options: &Options, flags: &str, warnings: &[String]) -> u8 {
    malloc::give_memory_back();
    match agent::run(options, flags, warnings) {
        Ok(()) => exit::SUCCESS,
        Err(error) => {
            stderr::write(log::last_line(options.log.format, &chain(&error)));
            error.code()
        }
    }
}

/// Returns a warning for each given flag that has no effect.
fn ignored(values: &Values) -> Vec<String> {
    let given = ["vmodule", "log_backtrace_at"].into_iter().filter(|name| values.is_given(name));
    given.map(|name| format!("-{name} has no effect")).collect()
}
