//! The commands (CNI specification 1.1, "CNI operations").

use std::time::Duration;

use serde_json::{Value, json};

use crate::conf::{self, Conf, Object, VALID, VERSIONS};
use crate::error::Error;
use crate::request::{Command, ContainerId, Request};
use crate::state::{Purpose, Store};
use crate::subnet_env::SubnetEnv;
use crate::{delegate, go_json, invoke};

/// How often ADD reads `subnet.env` while it waits for the agent. A read takes some microseconds. inotify would need one
/// instance per waiting pod, and a user has 128 of them.
const POLL_EVERY: Duration = Duration::from_millis(20);

/// Runs a command and returns the text for stdout.
pub(crate) fn run(request: &Request, stdin: &[u8]) -> Result<Vec<u8>, Error> {
    let command: fn(&Request, &Conf) -> Result<Vec<u8>, Error> = match request.command {
        Command::Version => return version(stdin).map(String::into_bytes),
        Command::Add => add,
        Command::Del => del,
        Command::Check => check,
        Command::Status => status,
        Command::Gc => gc,
    };
    let conf = Conf::parse(stdin)?;
    match request.command.since() {
        Some(needed) if !conf::is_at_least(conf.version, needed) => {
            Err(Error::TooOld { command: request.command.name(), needed, found: conf.version.to_owned() })
        }
        _ => command(request, &conf),
    }
}

/// Returns the supported versions, with the version that the caller named, or the newest one if it named none.
fn version(stdin: &[u8]) -> Result<String, Error> {
    let asked = match stdin.trim_ascii() {
        [] => None,
        text => {
            let fields: Object = serde_json::from_slice(text).map_err(|error| Error::Decode(error.to_string()))?;
            fields.get("cniVersion").and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned)
        }
    };
    let newest = VERSIONS.last().copied().unwrap_or_default();
    let asked = asked.as_deref().unwrap_or(newest);
    Ok(json!({"cniVersion": asked, "supportedVersions": VERSIONS}).to_string())
}

fn add(request: &Request, conf: &Conf) -> Result<Vec<u8>, Error> {
    let container = request.container()?;
    let env = SubnetEnv::wait(&conf.subnet_file, conf.wait, POLL_EVERY).map_err(Error::NotReady)?;
    let config = delegate::config(conf, &env)?;
    let entry = Store(&conf.data_dir).entry(container, Purpose::Use)?;
    let text = go_json::object(&config);
    // Stored before the plug-in runs, so that DEL can remove what an ADD that fails or is killed has left.
    entry.store(&text, request.ifname()?)?;
    invoke::run(kind(&config)?, &request.path, text.as_bytes(), &[])
}

fn del(request: &Request, conf: &Conf) -> Result<Vec<u8>, Error> {
    let container = request.container()?;
    let store = Store(&conf.data_dir);
    if !store.exists() {
        return Ok(Vec::new());
    }
    let entry = store.entry(container, Purpose::Remove)?;
    let Some(text) = entry.load()? else {
        // An ADD that was killed may have left temporary files.
        return entry.remove().map(|()| Vec::new());
    };
    let printed = match read_stored(&text) {
        Some(config) => invoke::run(kind(&config)?, &request.path, &text, &[])?,
        // Go flannel's plug-in can leave half of it after a crash. It then reports success, and the addresses stay reserved.
        None => {
            let env = SubnetEnv::read(&conf.subnet_file).map_err(Error::NotReady)?;
            invoke(request, &delegate::config(conf, &env)?)?
        }
    };
    entry.remove()?;
    Ok(printed)
}

/// Parses a stored configuration. Returns `None` if it is incomplete.
fn read_stored(text: &[u8]) -> Option<Object> {
    serde_json::from_slice(text).ok().filter(|config| kind(config).is_ok())
}

/// Returns the name of the plug-in that a configuration is for.
fn kind(config: &Object) -> Result<&str, Error> {
    const PLACE: &str = "delegate.type";
    let kind = config.get("type").and_then(Value::as_str).unwrap_or_default();
    conf::check_type(kind, PLACE).map(|()| kind)
}

/// Runs the plug-in that a configuration is for.
fn invoke(request: &Request, config: &Object) -> Result<Vec<u8>, Error> {
    invoke::run(kind(config)?, &request.path, go_json::object(config).as_bytes(), &[])
}

fn check(request: &Request, conf: &Conf) -> Result<Vec<u8>, Error> {
    let container = request.container()?;
    let entry = Store(&conf.data_dir).entry(container, Purpose::Use)?;
    let stored = entry.load()?.and_then(|text| read_stored(&text));
    let not_attached =
        || Error::NotAttached { container: container.as_str().to_owned(), data_dir: conf.data_dir.clone() };
    let mut config = stored.ok_or_else(not_attached)?;
    if let Some(result) = &conf.result {
        config.insert("prevResult".to_owned(), result.clone());
    }
    if let Some(runtime) = &conf.runtime {
        config.insert("runtimeConfig".to_owned(), runtime.clone().into());
    }
    invoke(request, &config)
}

fn status(request: &Request, conf: &Conf) -> Result<Vec<u8>, Error> {
    let env = SubnetEnv::read(&conf.subnet_file).map_err(Error::NotReady)?;
    invoke(request, &delegate::config(conf, &env)?)
}

/// Runs DEL for containers that no longer exist, and then the other plug-in's GC.
fn gc(request: &Request, conf: &Conf) -> Result<Vec<u8>, Error> {
    let missing = || Error::Config { place: VALID, problem: "is missing".to_owned() };
    let (valid, attachments) = conf.valid.clone().ok_or_else(missing)?;
    let containers = Store(&conf.data_dir).containers()?;
    let gone = containers.iter().filter(|container| !valid.iter().any(|valid| valid == container.as_str()));
    // An error of one container does not keep the others from being detached.
    let detached: Vec<_> = gone.map(|container| detach(request, conf, container)).collect();
    // Without the agent's file the other plug-in's configuration cannot be made.
    if let Ok(env) = SubnetEnv::read(&conf.subnet_file) {
        let mut config = delegate::config(conf, &env)?;
        config.insert(VALID.to_owned(), attachments);
        invoke(request, &config)?;
    }
    detached.into_iter().collect::<Result<(), _>>()?;
    Ok(Vec::new())
}

/// Runs DEL for a container that no longer exists, without a network namespace, if this network attached it.
fn detach(request: &Request, conf: &Conf, container: &ContainerId) -> Result<(), Error> {
    let entry = Store(&conf.data_dir).entry(container, Purpose::Remove)?;
    let Some(text) = entry.load()? else { return Ok(()) };
    // Networks may share the directory.
    let Some(config) =
        read_stored(&text).filter(|config| config.get("name").and_then(Value::as_str) == Some(&conf.name))
    else {
        return Ok(());
    };
    let ifname = entry.ifname();
    let environment = [
        ("CNI_COMMAND", "DEL"),
        ("CNI_CONTAINERID", container.as_str()),
        ("CNI_IFNAME", ifname.as_str()),
        ("CNI_NETNS", ""),
    ];
    invoke::run(kind(&config)?, &request.path, &text, &environment)?;
    entry.remove()
}
