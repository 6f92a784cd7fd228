//! The control groups of a run: those of version 1, one in each hierarchy for each node.

use std::fs;
use std::path::{Path, PathBuf};

use nix::fcntl::{Flock, FlockArg};

use super::isolation::runs;
use crate::{Context, Error};

const MOUNT: &str = "/sys/fs/cgroup";
/// Without these two, no process may enter a group of this hierarchy.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// The groups of a run, which have the name of its directory.
#[derive(Debug)]
pub(super) struct Groups(Vec<PathBuf>);

impl Groups {
    /// Returns the groups of the run with this directory, which may not exist yet.
    ///
    /// # Errors
    /// If the host has no hierarchy of version 1.
    pub(super) fn of(dir: &Path) -> Result<Self, Error> {
        let name = dir.file_name().unwrap_or_default();
        let entries = fs::read_dir(MOUNT).context(|| format!("reading {MOUNT}"))?;
        let hierarchies = entries.filter_map(|entry| Some(entry.ok()?.path()));
        let groups: Vec<_> =
            hierarchies.filter(|path| path.join("tasks").exists()).map(|path| path.join(name)).collect();
        if groups.is_empty() {
            let remedy = "boot with systemd.unified_cgroup_hierarchy=0, or mount them there";
            return Err(Error::new(format!("{MOUNT} has no control groups of version 1: {remedy}")));
        }
        Ok(Self(groups))
    }

    /// Creates the groups of a node, and returns their directories.
    ///
    /// # Errors
    /// The system's error.
    pub(super) fn create(&self, node: &str) -> Result<Vec<PathBuf>, Error> {
        let of = |group: &PathBuf| -> Result<PathBuf, Error> {
            let node = group.join(node);
            for dir in [group, &node] {
                fs::create_dir_all(dir).context(|| format!("creating the control group {}", dir.display()))?;
                for file in CPUSET.map(|name| dir.join(name)).iter().filter(|file| file.exists()) {
                    let parent = dir.parent().unwrap_or(dir).join(file.file_name().unwrap_or_default());
                    let value = fs::read(&parent).context(|| format!("reading {}", parent.display()))?;
                    fs::write(file, value).context(|| format!("writing {}", file.display()))?;
                }
            }
            Ok(node)
        };
        self.0.iter().map(of).collect()
    }

    /// Removes the groups. Returns whether all are gone: not yet, if processes are still ending.
    pub(super) fn remove(&self) -> bool {
        self.0.iter().all(|group| remove(group))
    }

    /// Removes what killed runs have left in `target`: their groups and directories.
    ///
    /// # Errors
    /// The system's error.
    pub(super) fn remove_left_over(target: &Path) -> Result<(), Error> {
        for dir in runs(target)? {
            let Ok(_alone) = lock(&dir) else { continue };
            Self::of(&dir)?.remove();
            fs::remove_dir_all(&dir).context(|| format!("removing {}", dir.display()))?;
        }
        Ok(())
    }
}

/// Marks the directory of a run as in use.
///
/// # Errors
/// If another process holds it.
pub(super) fn lock(dir: &Path) -> Result<Flock<fs::File>, Error> {
    let file = fs::File::open(dir).context(|| format!("opening {}", dir.display()))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, error)| Error::io(format!("locking {}", dir.display()), error))
}

/// A group can be removed once it has no processes and no groups inside.
fn remove(group: &Path) -> bool {
    let inside = fs::read_dir(group).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    inside.filter(|path| path.is_dir()).all(|path| remove(&path)) && (fs::remove_dir(group).is_ok() || !group.exists())
}
