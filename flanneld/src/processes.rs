//! Other flannel agents on this host, found in `/proc`. Go flannel's program is called `flanneld`, too.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::{command_table, env, flags};

const NAME: &str = "flanneld";

/// A running agent of flannelkit or Go flannel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Agent {
    pub(crate) pid: u32,
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
    let name = env::variable("overlay-name");
    let variable = texts("environ").into_iter().find_map(|text| {
        let (found, value) = text.split_once('=')?;
        (found == name && !value.is_empty()).then(|| value.to_owned())
    });
    let given = line.values.is_given("overlay-name");
    let overlay = variable.filter(|_| !given).unwrap_or_else(|| line.values.text("overlay-name").to_owned());
    let program = fs::read_link(process.join("exe")).unwrap_or_else(|_| NAME.into());
    let place = |process: &Path| fs::metadata(process.join("exe")).ok().map(|found| (found.dev(), found.ino()));
    let own = place(Path::new("/proc/self"));
    Some(Agent { pid, program, overlay, is_this_program: own.is_some() && own == place(process) })
}
