//! Installs the plug-in and its configuration in the directories of the container runtime.
//!
//! A runtime reports its network as ready as soon as a configuration exists. Attaching a pod fails until `subnet.env` exists, and
//! a kubelet retries only many seconds later. So the configuration is written last, after `subnet.env`.

use std::fs;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use flannel_core::files::{self, FileError, Mode, Trust};
use serde_json::Value;

use crate::conf::{Conf, Object};
use crate::program::{Arguments, complain, print};
use crate::subnet_env::SubnetEnv;

/// The file name of the configuration, the same as flannel's.
pub const CONFLIST: &str = "10-flannel.conflist";

/// The default configuration: that of flannel's manifest.
pub const DEFAULT: &str = r#"{
  "name": "cbr0",
  "cniVersion": "0.3.1",
  "plugins": [
    {
      "type": "flannel",
      "delegate": {
        "hairpinMode": true,
        "isDefaultGateway": true
      }
    },
    {
      "type": "portmap",
      "capabilities": {
        "portMappings": true
      }
    }
  ]
}
"#;

/// The largest configuration and the largest plug-in, in bytes.
const MAX_CONFIG: u64 = 1 << 20;
const MAX_PLUGIN: u64 = 64 << 20;

/// How often `subnet.env` is read while it is waited for.
const POLL_EVERY: Duration = Duration::from_millis(100);

/// Why the plug-in or the configuration was not installed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InstallError {
    /// A file was not read or written. Apply the remedy of the error, then retry.
    #[error(transparent)]
    File(#[from] FileError),
    /// The configuration cannot be used. Final until it is corrected.
    #[error("the CNI configuration {0}")]
    Config(String),
    /// The agent has not written `subnet.env` in time. Retry.
    #[error("subnet.env cannot be used after waiting {} s: {problem}", waited.as_secs())]
    NoSubnet {
        /// How long this waited.
        waited: Duration,
        /// What is wrong with the file.
        problem: String,
    },
}

/// What [`configuration`] did.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct Installed {
    /// Whether the file was written. It is not written if its content would be the same.
    pub written: bool,
    /// Other flannel configurations that a runtime would have used instead, under their former names. They were renamed to
    /// `*.replaced`; older files of that name were overwritten.
    pub replaced: Vec<PathBuf>,
    /// Configurations of other plug-ins that a runtime uses instead, because their names sort first. Delete them to use
    /// flannel.
    pub before: Vec<PathBuf>,
}

/// Copies the plug-in `source` into a directory, which is created if it does not exist. Returns whether the file was written;
/// an identical one is not. The file is replaced atomically. If two processes install at the same time, one of them can fail; a
/// retry succeeds.
///
/// Blocks on the disk.
///
/// # Errors
/// [`FileError`]: the former file, if any, is unchanged.
pub fn plugin(source: &Path, directory: &Path) -> Result<bool, FileError> {
    let target = directory.join("flannel");
    let read = |path: &Path| {
        files::read(path, Trust::Anyone, MAX_PLUGIN).map_err(|error| FileError::new("read", path, error.into()))
    };
    let missing = || FileError::new("read", source, io::ErrorKind::NotFound.into());
    let wanted = read(source)?.ok_or_else(missing)?;
    let is_program = |path| fs::metadata(path).is_ok_and(|found| found.permissions().mode() & 0o111 == 0o111);
    if files::read(&target, Trust::Anyone, MAX_PLUGIN).ok().flatten().as_ref() == Some(&wanted) && is_program(&target) {
        return Ok(false);
    }
    files::replace(&target, Mode::Program, MAX_PLUGIN, |file| file.write_all(&wanted))?;
    Ok(true)
}

/// Writes a configuration list that contains flannel to [`CONFLIST`] in a directory, atomically, and renames other flannel
/// configurations that a runtime would use instead. Creates the directory.
///
/// Blocks on the disk.
///
/// # Errors
/// [`InstallError::Config`]: nothing was changed. [`InstallError::File`]: the configuration may have been written, and some files
/// renamed; repeat the call.
pub fn configuration(text: &str, directory: &Path) -> Result<Installed, InstallError> {
    check(text)?;
    let target = directory.join(CONFLIST);
    let mut installed = Installed::default();
    if files::read(&target, Trust::Owners, MAX_CONFIG).ok().flatten().as_deref() != Some(text.as_bytes()) {
        files::replace(&target, Mode::Public, MAX_CONFIG, |file| file.write_all(text.as_bytes()))?;
        installed.written = true;
    }
    for path in configurations_before(directory)? {
        if is_of_flannel(&path) {
            let mut aside = path.clone().into_os_string();
            aside.push(".replaced");
            fs::rename(&path, &aside).map_err(|error| FileError::new("rename", &path, error))?;
            installed.replaced.push(path);
        } else {
            installed.before.push(path);
        }
    }
    Ok(installed)
}

/// Waits until the agent has written `subnet.env`, at most for `patience`. Blocks the thread.
///
/// # Errors
/// [`InstallError::NoSubnet`].
pub fn wait_for_subnet(path: &Path, patience: Duration) -> Result<(), InstallError> {
    let outcome = SubnetEnv::wait(path, patience, POLL_EVERY);
    outcome.map(drop).map_err(|problem| InstallError::NoSubnet { waited: patience, problem })
}

/// Returns whether [`CONFLIST`] in a directory has the content `text`, so that no other program has changed it. Blocks on
/// the disk.
pub fn is_installed(text: &str, directory: &Path) -> bool {
    let found = files::read(&directory.join(CONFLIST), Trust::Anyone, MAX_CONFIG).ok().flatten();
    found.as_deref() == Some(text.as_bytes())
}

/// Deletes [`CONFLIST`] from a directory if it [is installed](is_installed). Returns whether it was deleted. Blocks on the
/// disk.
///
/// # Errors
/// [`FileError`]: the file is still there.
pub fn remove(text: &str, directory: &Path) -> Result<bool, FileError> {
    if !is_installed(text, directory) {
        return Ok(false);
    }
    files::remove(&directory.join(CONFLIST)).map(|()| true)
}

/// Reads a configuration from a file. Blocks on the disk.
///
/// # Errors
/// [`InstallError::File`]: it cannot be read. [`InstallError::Config`]: it is not UTF-8.
pub fn read(path: &Path) -> Result<String, InstallError> {
    let failed = |error| FileError::new("read", path, error);
    let bytes = files::read(path, Trust::Anyone, MAX_CONFIG).map_err(|error| failed(error.into()))?;
    let bytes = bytes.ok_or_else(|| failed(io::ErrorKind::NotFound.into()))?;
    String::from_utf8(bytes).map_err(|_| InstallError::Config("is not UTF-8".to_owned()))
}

/// Checks that a text is a configuration list that contains flannel, and that this plug-in accepts its part. The parts of other
/// plug-ins are not checked.
///
/// # Errors
/// [`InstallError::Config`].
pub fn check(text: &str) -> Result<(), InstallError> {
    let error = |problem: String| InstallError::Config(problem);
    let fields: Object = serde_json::from_str(text).map_err(|cause| error(format!("is not a JSON object: {cause}")))?;
    if fields.get("name").and_then(Value::as_str).is_none_or(str::is_empty) {
        return Err(error("has no `name`".to_owned()));
    }
    let plugins = fields.get("plugins").and_then(Value::as_array);
    let plugins = plugins.ok_or_else(|| error("has no list `plugins`".to_owned()))?;
    let flannel =
        plugins.iter().filter_map(Value::as_object).find(|plugin| plugin.get("type") == Some(&"flannel".into()));
    let mut flannel = flannel.ok_or_else(|| error("has no plug-in of type `flannel`".to_owned()))?.clone();
    // A runtime copies these members into each plug-in's configuration.
    for member in ["name", "cniVersion"] {
        flannel.extend(fields.get(member).map(|value| (member.to_owned(), value.clone())));
    }
    Conf::parse(Value::from(flannel).to_string().as_bytes())
        .map(drop)
        .map_err(|cause| error(format!("is not accepted: {cause}")))
}

/// Returns the configurations whose names sort before [`CONFLIST`]: a runtime uses the first.
fn configurations_before(directory: &Path) -> Result<Vec<PathBuf>, FileError> {
    let failed = |error| FileError::new("read", directory, error);
    let entries = fs::read_dir(directory).map_err(failed)?.collect::<io::Result<Vec<_>>>().map_err(failed)?;
    let is_configuration = |path: &PathBuf| {
        path.extension().is_some_and(|extension| ["conf", "conflist", "json"].iter().any(|known| extension == *known))
    };
    let is_before = |path: &PathBuf| path.file_name().is_some_and(|name| name < CONFLIST);
    let mut paths: Vec<_> = entries.iter().map(fs::DirEntry::path).filter(is_configuration).filter(is_before).collect();
    paths.sort();
    Ok(paths)
}

/// Returns whether a file configures flannel's plug-in. A file that cannot be read does not.
fn is_of_flannel(path: &Path) -> bool {
    let text = files::read(path, Trust::Anyone, MAX_CONFIG).ok().flatten();
    let Some(fields) = text.and_then(|text| serde_json::from_slice::<Value>(&text).ok()) else { return false };
    let is_flannel = |plugin: &Value| plugin.get("type").and_then(Value::as_str) == Some("flannel");
    let in_list = fields.get("plugins").and_then(Value::as_array).is_some_and(|plugins| plugins.iter().any(is_flannel));
    is_flannel(&fields) || in_list
}

const HELP: &str = "\
Installs flannel's CNI plug-in: copies it, waits until the agent has written
subnet.env, and writes the configuration then. CNI's plug-ins bridge,
host-local, loopback and portmap have to be in the same directory.

Run it beside the agent or after it, not in an init container of the agent's
own pod: there `flanneld -cni-bin-dir=DIR -cni-conf-dir=DIR` does the same.

    flannel install [OPTIONS]

    --bin-dir DIR        where the runtime looks for plug-ins     [/opt/cni/bin]
    --conf-dir DIR       where it looks for configurations   [/etc/cni/net.d]
    --conf FILE          a conflist of your own        [that of flannel's manifest]
    --subnet-file FILE   what the agent writes      [/run/flannel/subnet.env]
    --wait SECONDS       how long to wait for it                           [300]
";

/// The options of `flannel install`.
#[derive(Debug, PartialEq, Eq)]
struct Options {
    bin_dir: PathBuf,
    conf_dir: PathBuf,
    conf: Option<PathBuf>,
    subnet_file: PathBuf,
    wait: Duration,
}

impl Options {
    /// Returns `None` if help was requested.
    fn parse(mut arguments: lexopt::Parser) -> Result<Option<Self>, lexopt::Error> {
        use lexopt::Arg::Long;
        use lexopt::ValueExt;
        let mut options = Self {
            bin_dir: "/opt/cni/bin".into(),
            conf_dir: "/etc/cni/net.d".into(),
            conf: None,
            subnet_file: "/run/flannel/subnet.env".into(),
            wait: Duration::from_secs(300),
        };
        while let Some(argument) = arguments.next()? {
            match argument {
                Long("help") | lexopt::Arg::Short('h') => return Ok(None),
                Long("bin-dir") => options.bin_dir = arguments.value()?.into(),
                Long("conf-dir") => options.conf_dir = arguments.value()?.into(),
                Long("conf") => options.conf = Some(arguments.value()?.into()),
                Long("subnet-file") => options.subnet_file = arguments.value()?.into(),
                Long("wait") => options.wait = Duration::from_secs(arguments.value()?.parse::<u32>()?.into()),
                other => return Err(other.unexpected()),
            }
        }
        Ok(Some(options))
    }
}

/// Runs `flannel install`.
pub(crate) fn main(arguments: Arguments) -> ExitCode {
    match Options::parse(lexopt::Parser::from_args(arguments)) {
        Ok(None) => print(HELP),
        Err(error) => {
            complain(&format!("flannel install: {error}\n\n{HELP}"));
            ExitCode::from(2)
        }
        Ok(Some(options)) => match run(&options) {
            Ok(text) => print(text),
            Err(error) => {
                complain(&format!("flannel install: {error}\n"));
                ExitCode::FAILURE
            }
        },
    }
}

fn run(options: &Options) -> Result<String, InstallError> {
    let text = options.conf.as_deref().map_or_else(|| Ok(DEFAULT.to_owned()), read)?;
    // Checked before anything is written.
    check(&text)?;
    let itself = std::env::current_exe().map_err(|error| FileError::new("find", Path::new("flannel"), error))?;
    let mut report = String::new();
    let mut add = |line: String| report += &(line + "\n");
    let target = options.bin_dir.join("flannel");
    if plugin(&itself, &options.bin_dir)? {
        add(format!("{} installed", target.display()));
    } else {
        add(format!("{} is up to date", target.display()));
    }
    wait_for_subnet(&options.subnet_file, options.wait)?;
    let installed = configuration(&text, &options.conf_dir)?;
    let target = options.conf_dir.join(CONFLIST);
    add(format!("{} {}", target.display(), if installed.written { "written" } else { "is up to date" }));
    for path in &installed.replaced {
        add(format!("{} renamed to *.replaced: it is another flannel configuration", path.display()));
    }
    for path in &installed.before {
        add(format!("{} sorts first, so the runtime uses it: delete it to use flannel", path.display()));
    }
    Ok(report)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::program::arguments;

    #[test]
    fn the_plugin_is_copied_once_and_again_when_it_differs() {
        let dir = tempfile::tempdir().unwrap();
        let (source, place) = (dir.path().join("source"), dir.path().join("opt/bin"));
        assert!(plugin(&source, &place).unwrap_err().to_string().contains("source"));
        fs::write(&source, "one").unwrap();
        assert!(plugin(&source, &place).unwrap() && !plugin(&source, &place).unwrap());
        fs::write(&source, "two").unwrap();
        assert!(plugin(&source, &place).unwrap());
        let target = place.join("flannel");
        assert_eq!(fs::read_to_string(&target).unwrap(), "two");
        assert_eq!(fs::metadata(&target).unwrap().permissions().mode() & 0o777, 0o755);
        assert_eq!(fs::read_dir(&place).unwrap().count(), 1, "nothing else is left");
        fs::set_permissions(&target, fs::Permissions::from_mode(0o644)).unwrap();
        assert!(plugin(&source, &place).unwrap(), "it was no program");
    }

    #[test]
    fn other_configurations_of_flannel_are_put_aside_and_others_are_told_of() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        fs::write(path("10-flannel.conf"), r#"{"name":"cbr0","type":"flannel"}"#).unwrap();
        fs::write(path("05-old.conflist"), DEFAULT).unwrap();
        fs::write(path("00-other.conflist"), r#"{"name":"x","plugins":[{"type":"bridge"}]}"#).unwrap();
        fs::write(path("99-later.conf"), r#"{"name":"cbr0","type":"flannel"}"#).unwrap();
        fs::write(path("01-readme"), "flannel").unwrap();
        let installed = configuration(DEFAULT, dir.path()).unwrap();
        assert!(installed.written);
        assert_eq!(installed.replaced, [path("05-old.conflist"), path("10-flannel.conf")]);
        assert_eq!(installed.before, [path("00-other.conflist")]);
        assert!(path("10-flannel.conf.replaced").exists() && path("99-later.conf").exists());
        assert_eq!(fs::read_to_string(path(CONFLIST)).unwrap(), DEFAULT);
        let again = configuration(DEFAULT, dir.path()).unwrap();
        assert!(!again.written && again.replaced.is_empty());
    }

    #[test]
    fn a_configuration_without_flannel_is_refused_and_nothing_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let none = ["", "[]", "{}", r#"{"name":"x"}"#, r#"{"name":"x","plugins":[{"type":"bridge"}]}"#];
        let not_accepted = [
            r#"{"name":"x","cniVersion":"9.9","plugins":[{"type":"flannel"}]}"#,
            r#"{"name":"x","plugins":[{"type":"flannel","waitForAgent":111}]}"#,
            r#"{"name":"x","plugins":[{"type":"flannel","delegate":{"name":"y"}}]}"#,
        ];
        for text in none.into_iter().chain(not_accepted) {
            assert!(matches!(configuration(text, dir.path()), Err(InstallError::Config(_))), "{text}");
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn options_are_read() {
        let parse = |list: &[&str]| Options::parse(lexopt::Parser::from_args(arguments(list)));
        assert_eq!(parse(&["--help"]).unwrap(), None);
        let options = parse(&["--bin-dir", "/b", "--conf-dir=/c", "--conf", "/f", "--wait", "7"]).unwrap().unwrap();
        assert_eq!(
            (options.bin_dir, options.conf_dir, options.wait),
            ("/b".into(), "/c".into(), Duration::from_secs(7))
        );
        for bad in [&["--wait", "x"][..], &["--wait"], &["more"], &["--other"]] {
            assert!(parse(bad).is_err(), "{bad:?}");
        }
    }
}
