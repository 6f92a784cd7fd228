//! The control groups of a run: those of version 1, one in each hierarchy for each node.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::{Context, Error, wait_until};

const MOUNT: &str = "/sys/fs/cgroup";
/// How long killed processes may take to leave.
const PATIENCE: Duration = Duration::from_secs(30);
/// Without these two, no process may enter a group of this hierarchy.
const CPUSET: [&str; 2] = ["cpuset.cpus", "cpuset.mems"];

/// The groups of a run, or of one of its clusters.
#[derive(Debug)]
pub(super) struct Groups(Vec<PathBuf>);

impl Groups {
    /// Returns the groups of the run with this directory, whose name they have. They may not exist yet.
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

    /// Creates groups of this name inside of these.
    ///
    /// # Errors
    /// The system's error.
    pub(super) fn create(&self, name: &str) -> Result<Self, Error> {
        let create = |group: &PathBuf| -> Result<PathBuf, Error> {
            let inside = group.join(name);
            for dir in [group, &inside] {
                fs::create_dir_all(dir).context(|| format!("creating the control group {}", dir.display()))?;
                for file in CPUSET.map(|name| dir.join(name)).iter().filter(|file| file.exists()) {
                    let parent = dir.parent().unwrap_or(dir).join(file.file_name().unwrap_or_default());
                    let value = fs::read(&parent).context(|| format!("reading {}", parent.display()))?;
                    fs::write(file, value).context(|| format!("writing {}", file.display()))?;
                }
            }
            Ok(inside)
        };
        self.0.iter().map(create).collect::<Result<_, _>>().map(Self)
    }

    /// Returns their directories.
    pub(super) fn dirs(&self) -> &[PathBuf] {
        &self.0
    }

    /// Removes the groups and those inside, once their processes have ended.
    ///
    /// # Errors
    /// If a process does not end.
    pub(super) fn remove(&self) -> Result<(), Error> {
        let removed = || Ok(self.0.iter().all(|group| remove(group)));
        wait_until("the control groups are empty", PATIENCE, removed).map(drop)
    }
}

/// A group can be removed once it has no processes and no groups inside.
fn remove(group: &Path) -> bool {
    let inside = fs::read_dir(group).into_iter().flatten().filter_map(|entry| Some(entry.ok()?.path()));
    inside.filter(|path| path.is_dir()).all(|path| remove(&path)) && (fs::remove_dir(group).is_ok() || !group.exists())
}
