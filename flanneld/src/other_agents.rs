//! Other flannel agents in this network namespace, such as Go flannel.

use std::fs::{self, DirEntry};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use flannel_core::text::Plain;

/// The name of Go flannel's program, and of this one.
const NAME: &str = "flanneld";
/// The longest command line that is shown, in bytes.
const MAX_COMMAND: usize = 200;

/// A running flannel agent that is not an agent of this program file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OtherAgent {
    pub(crate) pid: u32,
    /// Its command line, escaped and cut.
    pub(crate) command: String,
}

/// Returns the other agents. Agents of this program file are not among them: they exclude each other by their claims
/// of names and networks. Programs of other users may be missing for a caller that is not root.
pub(crate) fn running() -> Vec<OtherAgent> {
    let own = (namespace(Path::new("/proc/self")), file(Path::new("/proc/self")));
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries.flatten().filter_map(|entry| agent(&entry, &own)).collect()
}

type Place = (u64, u64);

fn agent(entry: &DirEntry, own: &(Option<Place>, Option<Place>)) -> Option<OtherAgent> {
    let pid = entry.file_name().to_str()?.parse().ok()?;
    let path = entry.path();
    let is_flannel = fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim_end() == NAME);
    let (namespace, file) = (is_flannel.then(|| namespace(&path))?, file(&path));
    // An agent that ends has neither.
    if namespace.is_none() || namespace != own.0 || file.is_none() || file == own.1 {
        return None;
    }
    let words = fs::read(path.join("cmdline")).unwrap_or_default();
    let mut command = Plain(String::from_utf8_lossy(&words).trim_end_matches('\0').replace('\0', " ")).to_string();
    flannel_core::text::cut(&mut command, MAX_COMMAND);
    Some(OtherAgent { pid, command })
}

fn namespace(process: &Path) -> Option<Place> {
    place(&process.join("ns/net"))
}

fn file(process: &Path) -> Option<Place> {
    place(&process.join("exe"))
}

fn place(path: &Path) -> Option<Place> {
    fs::metadata(path).ok().map(|found| (found.dev(), found.ino()))
}
