//! Installs the CNI plug-in and its configuration on the host, and restores them (`-cni-bin-dir`, `-cni-conf-dir`).

use std::path::{Path, PathBuf};
use std::time::Duration;

use cni_flannel::install::{self, InstallError, Installed};
use flannel_core::firewall_keeper::RulesState;
use flannel_core::overlay::Handle;
use flannel_core::text::{Plain, chain};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until, timeout_at};

use crate::flags::{UsageError, Values};
use crate::status::{changed, is_ready};

/// How often both are checked, as `subnet.env` is.
const CHECK_EVERY: Duration = Duration::from_secs(30);
/// The delay before a retry.
const RETRY: Duration = Duration::from_secs(5);

/// The file of `-cni-conf` cannot be used. It may be written while the supervisor starts the agent again.
#[derive(Debug, thiserror::Error)]
#[error("-cni-conf={}", Plain(path.display()))]
pub(crate) struct ConfigurationError {
    path: PathBuf,
    source: InstallError,
}

/// What is installed, and where. Nothing by default.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Cni {
    plugin: Option<Plugin>,
    configuration: Option<Configuration>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Plugin {
    source: PathBuf,
    directory: PathBuf,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Configuration {
    /// `None` for that of flannel's manifest.
    source: Option<PathBuf>,
    directory: PathBuf,
}

impl Configuration {
    fn text(&self) -> Result<String, InstallError> {
        self.source.as_deref().map_or_else(|| Ok(install::DEFAULT.to_owned()), install::read)
    }
}

impl Cni {
    /// Reads the flags. No file is read: commands beside the agent need none.
    pub(crate) fn read(values: &Values, beside: impl FnOnce() -> PathBuf) -> Result<Self, UsageError> {
        let plugin = match (values.path("cni-bin-dir"), values.path("cni-plugin")) {
            (Some(directory), source) => Some(Plugin { source: source.unwrap_or_else(beside), directory }),
            (None, Some(_)) => return Err(UsageError::requires("cni-plugin", "cni-bin-dir")),
            (None, None) => None,
        };
        let configuration = match (values.path("cni-conf-dir"), values.path("cni-conf")) {
            (Some(directory), source) => Some(Configuration { source, directory }),
            (None, Some(_)) => return Err(UsageError::requires("cni-conf", "cni-conf-dir")),
            (None, None) => None,
        };
        Ok(Self { plugin, configuration })
    }

    /// Checks the configuration before the agent starts.
    pub(crate) fn check(&self) -> Result<(), ConfigurationError> {
        let Some(configuration) = &self.configuration else { return Ok(()) };
        let checked = configuration.text().and_then(|text| install::check(&text));
        let path = || configuration.source.clone().unwrap_or_default();
        checked.map_err(|source| ConfigurationError { path: path(), source })
    }

    /// Returns the directories to install in, each with its flag.
    pub(crate) fn directories(&self) -> impl Iterator<Item = (&'static str, &Path)> {
        let plugin = self.plugin.as_ref().map(|plugin| ("cni-bin-dir", plugin.directory.as_path()));
        let configuration = self.configuration.as_ref();
        plugin.into_iter().chain(configuration.map(|found| ("cni-conf-dir", found.directory.as_path())))
    }

    /// Installs the plug-in at once and the configuration when pods can be attached, and restores both until the agent ends.
    /// They stay afterwards, because the pods stay.
    pub(crate) async fn keep(self, mut handle: Handle, mut rules: watch::Receiver<RulesState>) {
        if self == Self::default() {
            return;
        }
        let (mut logged, mut is_open) = (Logged::default(), false);
        loop {
            let cni = self.clone();
            let Ok(outcome) = spawn_blocking(move || cni.install(is_open)).await else { return };
            let due = Instant::now() + if outcome.is_ok() { CHECK_EVERY } else { RETRY };
            logged.log(&outcome, &self);
            if !is_open {
                match timeout_at(due, until_ready(&mut handle, &mut rules)).await {
                    Ok(true) => is_open = true,
                    Ok(false) => return,
                    Err(_) => {}
                }
            } else {
                sleep_until(due).await;
            }
            if handle.status().ended.is_some() {
                return;
            }
        }
    }

    /// Installs the plug-in and, if pods can be attached, the configuration. Blocks on the disk.
    fn install(&self, is_open: bool) -> Result<Option<Installed>, InstallError> {
        if let Some(Plugin { source, directory }) = &self.plugin {
            install::plugin(source, directory)?;
        }
        match &self.configuration {
            Some(configuration) if is_open => {
                install::configuration(&configuration.text()?, &configuration.directory).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// Returns the configuration that is installed. A removal deletes it, but not the plug-in, because the runtime needs
    /// that to detach pods.
    pub(crate) fn installed(&self) -> Option<Conflist> {
        let configuration = self.configuration.as_ref()?;
        let path = configuration.directory.join(install::CONFLIST);
        // Without its source it cannot be told from another.
        let is_ours = configuration.text().is_ok_and(|text| install::is_installed(&text, &configuration.directory));
        path.exists().then_some(Conflist { path, is_ours })
    }
}

/// The CNI configuration on the host.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Conflist {
    pub(crate) path: PathBuf,
    /// Whether it is as this program installs it.
    pub(crate) is_ours: bool,
}

/// Returns the default plug-in to install.
pub(crate) fn beside_this_program() -> PathBuf {
    std::env::current_exe().unwrap_or_default().with_file_name("flannel")
}

/// Waits until pods can be attached. Returns false if the agent has ended before that.
async fn until_ready(handle: &mut Handle, rules: &mut watch::Receiver<RulesState>) -> bool {
    while !is_ready(&handle.status(), &rules.borrow_and_update()) {
        if !changed(handle, rules).await {
            return false;
        }
    }
    true
}

/// The state that was logged last. Each change is logged once.
#[derive(Debug, Default)]
struct Logged {
    error: Option<String>,
    before: Vec<PathBuf>,
}

impl Logged {
    fn log(&mut self, outcome: &Result<Option<Installed>, InstallError>, cni: &Cni) {
        let error = outcome.as_ref().err().map(|error| chain(error));
        if let Some(error) = error.as_ref().filter(|error| self.error.as_ref() != Some(*error)) {
            tracing::warn!(
                target: "flannel::cni",
                error,
                "cannot install the CNI plug-in or its configuration; retrying"
            );
        }
        self.error = error;
        let Ok(Some(installed)) = outcome else { return };
        if let Some(configuration) = cni.configuration.as_ref().filter(|_| installed.written) {
            let path = configuration.directory.join(install::CONFLIST);
            tracing::info!(
                target: "flannel::cni",
                path = %path.display(),
                "CNI configuration written: pods can be attached"
            );
        }
        for path in &installed.replaced {
            tracing::info!(
                target: "flannel::cni",
                path = %path.display(),
                "another CNI configuration of flannel was renamed to *.replaced"
            );
        }
        if self.before != installed.before {
            for path in &installed.before {
                let path = path.display();
                tracing::warn!(
                    target: "flannel::cni",
                    %path,
                    "the runtime uses this CNI configuration first; delete it to use flannel"
                );
            }
            self.before.clone_from(&installed.before);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::flags::parse;

    fn read(arguments: &[String]) -> Result<Cni, String> {
        let values = parse(arguments.iter().cloned()).unwrap().values;
        Cni::read(&values, || "/usr/bin/flannel".into()).map_err(|error| error.to_string())
    }

    #[test]
    fn nothing_is_installed_unless_a_directory_is_named() {
        assert_eq!(read(&[]).unwrap(), Cni::default());
        let bin = read(&["-cni-bin-dir=/opt/cni/bin".to_owned()]).unwrap().plugin.unwrap();
        assert_eq!(bin, Plugin { source: "/usr/bin/flannel".into(), directory: "/opt/cni/bin".into() });
        for (flag, other) in [("cni-plugin", "-cni-bin-dir"), ("cni-conf", "-cni-conf-dir")] {
            let error = read(&[format!("-{flag}=/x")]).unwrap_err();
            assert!(error.contains(flag) && error.contains(other), "{error}");
        }
    }

    #[test]
    fn an_invalid_configuration_is_an_error_and_the_installed_one_is_recognized() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("conf"), "{}").unwrap();
        let arguments = ["conf", "missing"].map(|name| {
            vec![format!("-cni-conf-dir={}", path("net.d").display()), format!("-cni-conf={}", path(name).display())]
        });
        for arguments in &arguments {
            let error = chain(&read(arguments).unwrap().check().unwrap_err());
            assert!(error.contains("cni-conf") && error.contains(dir.path().to_str().unwrap()), "{error}");
        }
        let cni = read(&arguments[0][..1]).unwrap();
        assert_eq!(cni.install(false).unwrap(), None);
        assert_eq!(cni.installed(), None);
        assert!(cni.install(true).unwrap().unwrap().written);
        let installed = |is_ours| Some(Conflist { path: path("net.d/10-flannel.conflist"), is_ours });
        assert_eq!(cni.installed(), installed(true));
        assert_eq!(read(&arguments[1]).unwrap().installed(), installed(false), "its source is missing");
        fs::write(path("net.d/10-flannel.conflist"), "changed").unwrap();
        assert_eq!(cni.installed(), installed(false));
    }
}
