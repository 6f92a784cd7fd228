//! Other flannel agents on this host, found in `/proc`. Go flannel's program is called `flanneld`, too.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::{command_table, flag_table, flags};

const NAME: &str = "flanneld";

/// A running agent of flannelkit or Go flannel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Agent {
    pub(crate) pid: u32,
    /// Its process ID in its own PID namespace, which differs from `pid` if it runs in a container.
    pub(crate) inner_pid: u32,
    pub(crate) program: PathBuf,
    /// The overlay by its flags; Go flannel's is `flannel`.
    pub(crate) overlay: String,
    /// Whether it runs this very program file: such agents exclude each other by their claims.
    pub(crate) is_this_program: bool,
}

/// Returns the agents in this network namespace other than this process, as far as this user may see them.
pub(crate) fn agents() -> Vec<Agent> {
    let namespace = |process: &Path| fs::read_link(process.join("ns/net")).ok();
    let Some(own) = namespace(Path::new("/proc/self")) else { return Vec::new() };
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let numbered = processes.filter_map(|entry| Some((entry.file_name().to_str()?.parse().ok()?, entry.path())));
    let mut agents: Vec<_> = numbered
        .filter(|(pid, path)| *pid != std::process::id() && namespace(path).as_ref() == Some(&own))
        .filter_map(|(pid, path)| agent(pid, &path))
        .collect();
    agents.sort_unstable_by_key(|agent| agent.pid);
    agents
}

fn agent(pid: u32, process: &Path) -> Option<Agent> {
    if fs::read_to_string(process.join("comm")).ok()?.trim_end() != NAME {
        return None;
    }
    let texts = |file: &str| -> Vec<String> {
        let bytes = fs::read(process.join(file)).unwrap_or_default();
        let parts = bytes.split(|byte| *byte == 0).filter(|part| !part.is_empty());
        parts.map(|part| String::from_utf8_lossy(part).into_owned()).collect()
    };
    let arguments = texts("cmdline");
    // A process that has ended has no command line.
    let (_, arguments) = arguments.split_first()?;
    let line = flags::parse(arguments.iter().cloned()).unwrap_or_default();
    if line.words.first().is_some_and(|word| command_table::find(word).is_some()) {
        return None;
    }
    let name = flag_table::find("overlay-name").and_then(flag_table::variable);
    let variable = texts("environ").into_iter().find_map(|text| {
        let (found, value) = text.split_once('=')?;
        (Some(found) == name.as_deref() && !value.is_empty()).then(|| value.to_owned())
    });
    let given = line.values.is_given("overlay-name");
    let overlay = variable.filter(|_| !given).unwrap_or_else(|| line.values.text("overlay-name").to_owned());
    let program = fs::read_link(process.join("exe")).unwrap_or_else(|_| NAME.into());
    let place = |process: &Path| fs::metadata(process.join("exe")).ok().map(|found| (found.dev(), found.ino()));
    let own = place(Path::new("/proc/self"));
    let status = fs::read_to_string(process.join("status")).unwrap_or_default();
    let inner_pid = innermost_pid(&status).unwrap_or(pid);
    Some(Agent { pid, inner_pid, program, overlay, is_this_program: own.is_some() && own == place(process) })
}

/// Returns the process ID in the process's own PID namespace, from its `/proc/PID/status` (proc(5), NSpid).
fn innermost_pid(status: &str) -> Option<u32> {
    let pids = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    pids.split_whitespace().last()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_in_a_container_has_another_process_id_there() {
        for (status, pid) in [
            ("Name:\tflanneld\nNSpid:\t4711\n", Some(4711)),
            ("Pid:\t4711\nNSpid:\t4711\t12\t1\nNSpgid:\t4711\t12\t1\n", Some(1)),
            ("Pid:\t4711\n", None),
            ("NSpid:\t\n", None),
        ] {
            assert_eq!(innermost_pid(status), pid, "{status:?}");
        }
    }
}
