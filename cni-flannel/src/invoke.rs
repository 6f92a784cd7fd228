//! Running another plug-in.

use std::fs;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::Duration;

use crate::conf::Object;
use crate::error::Error;

/// The most that is read of what a plug-in prints, in bytes.
const MAX: u64 = 1 << 20;

/// The most that is shown of what a plug-in printed in place of an error, in characters.
const SHOWN: usize = 400;

/// How often a plug-in is tried that is being written just then, and how long after one another.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Runs the plug-in `name` with a configuration, and returns what it printed. It inherits the environment of this process,
/// in which `changed` is set, and stderr.
pub(crate) fn run(name: &str, path: &[PathBuf], config: &[u8], changed: &[(&str, &str)]) -> Result<Vec<u8>, Error> {
    let program = find(name, path).ok_or_else(|| Error::NoPlugin { name: name.to_owned() })?;
    let failed = |source| Error::Run { path: program.clone(), source };
    let mut child = start(&program, changed).map_err(failed)?;
    // It may end without reading all of it.
    if let Some(mut stdin) = child.stdin.take() {
        match stdin.write_all(config) {
            Err(error) if error.kind() != ErrorKind::BrokenPipe => {
                let _ = child.kill();
                let _ = child.wait();
                return Err(failed(error));
            }
            _ => {}
        }
    }
    let (mut printed, mut rest) = (Vec::new(), 0);
    if let Some(mut stdout) = child.stdout.take() {
        let read = stdout.by_ref().take(MAX).read_to_end(&mut printed);
        // The rest is thrown away, so that the plug-in does not wait for ever.
        rest = read.and_then(|_| io::copy(&mut stdout, &mut io::sink())).map_err(failed)?;
    }
    let status = child.wait().map_err(failed)?;
    if status.success() {
        return if rest == 0 { Ok(printed) } else { Err(Error::TooMuch(name.to_owned())) };
    }
    match serde_json::from_slice::<Object>(&printed) {
        Ok(printed) if printed.contains_key("code") => Err(Error::Delegate { name: name.to_owned(), printed }),
        _ => {
            let text = String::from_utf8_lossy(&printed);
            let printed = text.chars().take(SHOWN).flat_map(char::escape_default).collect();
            Err(Error::Broken { name: name.to_owned(), status: status.to_string(), printed })
        }
    }
}

fn start(program: &Path, changed: &[(&str, &str)]) -> io::Result<std::process::Child> {
    let mut command = Command::new(program);
    command.envs(changed.iter().copied()).stdin(Stdio::piped()).stdout(Stdio::piped());
    for _ in 1..TRIES {
        match command.spawn() {
            Err(error) if error.kind() == ErrorKind::ExecutableFileBusy => thread::sleep(PAUSE),
            started => return started,
        }
    }
    command.spawn()
}

/// The first directory with an executable file of that name decides. One that is not absolute is skipped: it would depend on
/// the runtime's current directory.
fn find(name: &str, path: &[PathBuf]) -> Option<PathBuf> {
    let is_program = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    path.iter().filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(is_program)
}
