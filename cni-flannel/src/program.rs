//! The program: a request in the environment and on stdin, an answer on stdout.

use std::env;
use std::io::{self, Read, Write};
use std::process::ExitCode;

use crate::conf::{self, Object};
use crate::error::Error;
use crate::request::Request;
use crate::{command, install};

/// The largest configuration that is read, in bytes.
const MAX: u64 = 1 << 20;

const USAGE: &str = "\
flannel is a CNI plug-in: a container runtime runs it, with CNI_COMMAND in its environment.

    flannel install [OPTIONS]    installs the plug-in and its configuration; --help lists the options
    flannel --version
";

/// Runs the program on the arguments, the environment and the standard streams of the process.
pub fn main() -> ExitCode {
    let mut arguments = env::args_os().skip(1);
    let is_plugin = env::var_os("CNI_COMMAND").is_some();
    match arguments.next().as_deref().and_then(|argument| argument.to_str()) {
        Some("install") if !is_plugin => install::main(arguments),
        Some("--version" | "-V") if !is_plugin => {
            print(concat!("flannel (flannelkit) ", env!("CARGO_PKG_VERSION"), "\n"))
        }
        Some("--help" | "-h") if !is_plugin => print(USAGE),
        _ if !is_plugin => {
            complain(USAGE);
            ExitCode::from(2)
        }
        _ => serve(),
    }
}

fn serve() -> ExitCode {
    let command = env::var("CNI_COMMAND").ok();
    let stdin = read_stdin();
    let answer = match &stdin {
        Ok(stdin) => Request::read(|name| env::var_os(name)).and_then(|request| command::run(&request, stdin)),
        Err(error) => Err(Error::Stdin(io::Error::new(error.kind(), error.to_string()))),
    };
    match answer {
        Ok(printed) => print(printed),
        Err(error) => {
            let fields = stdin.ok().and_then(|stdin| serde_json::from_slice::<Object>(&stdin).ok());
            let version = fields.and_then(|fields| conf::version(&fields).ok()).map(|(version, _)| version);
            let newest = conf::VERSIONS.last().copied().unwrap_or_default();
            print(error.to_json(version.unwrap_or(newest), command.as_deref()) + "\n");
            ExitCode::FAILURE
        }
    }
}

fn read_stdin() -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    io::stdin().take(MAX + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX {
        return Err(io::Error::other(format!("more than {MAX} bytes")));
    }
    Ok(text)
}

pub(crate) fn print(text: impl AsRef<[u8]>) -> ExitCode {
    let mut out = io::stdout();
    match out.write_all(text.as_ref()).and_then(|()| out.flush()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}

pub(crate) fn complain(text: &str) {
    // A failure to write to stderr cannot be reported.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// The arguments after a subcommand.
pub(crate) type Arguments = std::iter::Skip<env::ArgsOs>;

/// Returns arguments for tests.
#[cfg(test)]
pub(crate) fn arguments(list: &[&str]) -> Vec<std::ffi::OsString> {
    list.iter().map(Into::into).collect()
}
