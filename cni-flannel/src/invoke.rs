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

/// The longest output of a plug-in, in bytes.
const MAX: u64 = 1 << 20;

/// How much of an unreadable error of a plug-in is shown, in characters.
const SHOWN: usize = 400;

/// How many times a plug-in is started that another process is writing, and the pause between the attempts.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(50);

/// Runs the plug-in `name` with a configuration and returns its output. It inherits stderr, and the environment with the
/// variables of `changed`.
pub(crate) fn run(name: &str, path: &[PathBuf], config: &[u8], changed: &[(&str, &str)]) -> Result<Vec<u8>, Error> {
    let program = find(name, path).ok_or_else(|| Error::NoPlugin { name: name.to_owned() })?;
    let failed = |source| Error::Run { path: program.clone(), source };
    let mut child = start(&program, changed).map_err(failed)?;
    // The plug-in may end before it has read everything.
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
        // The rest is discarded, so that the plug-in does not block.
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

/// Returns the first executable file of that name. Directories that are not absolute are skipped: they would depend on the
/// runtime's current directory.
fn find(name: &str, path: &[PathBuf]) -> Option<PathBuf> {
    let is_program = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0)
    };
    path.iter().filter(|dir| dir.is_absolute()).map(|dir| dir.join(name)).find(is_program)
}
