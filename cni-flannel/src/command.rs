//! What each command does (CNI specification 1.1, "CNI operations").

use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::conf::{self, Conf, Object, VALID, VERSIONS};
use crate::error::Error;
use crate::request::{Command, ContainerId, Request};
use crate::state::{Call, Store};
use crate::subnet_env::SubnetEnv;
use crate::{delegate, go_json, invoke};

/// How often ADD looks whether the agent has written `subnet.env`. A look costs some microseconds; inotify would need an
/// instance for each waiting pod, of which a user has 128.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// Answers a request: what goes to stdout.
pub(crate) fn run(request: &Request, stdin: &[u8]) -> Result<Vec<u8>, Error> {
    if request.command == Command::Version {
        return version(stdin).map(String::into_bytes);
    }
    let conf = Conf::parse(stdin)?;
    if let Some(needed) = request.command.since().filter(|needed| !conf::is_at_least(conf.version, needed)) {
        let command = request.command.name();
        return Err(Error::TooOld { command, needed, found: conf.version.to_owned() });
    }
    match request.command {
        Command::Add => add(request, &conf),
        Command::Del => del(request, &conf),
        Command::Check => check(request, &conf),
        Command::Status => status(request, &conf),
        Command::Gc => gc(request, &conf),
        Command::Version => Ok(Vec::new()),
    }
}

/// The version that the caller asked for, or the newest where it did not ask.
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
    let config = delegate::config(conf, &wait_for_agent(conf)?)?;
    let entry = Store(&conf.data_dir).entry(container, Call::Needs)?;
    let text = go_json::object(&config);
    // Before it is run: what ADD leaves when it fails or is killed, DEL has to find.
    entry.store(&text, request.ifname()?)?;
    invoke::run(kind(&config)?, &request.path, text.as_bytes(), &[])
}

/// What the agent has written, for which this waits as long as the configuration says.
fn wait_for_agent(conf: &Conf) -> Result<SubnetEnv, Error> {
    let until = Instant::now() + conf.wait;
    loop {
        match SubnetEnv::read(&conf.subnet_file) {
            Ok(env) => return Ok(env),
            Err(problem) if Instant::now() >= until => return Err(Error::NotReady(problem)),
            Err(_) => thread::sleep(LOOK_EVERY),
        }
    }
}

fn del(request: &Request, conf: &Conf) -> Result<Vec<u8>, Error> {
    let container = request.container()?;
    let store = Store(&conf.data_dir);
    if !store.exists() {
        return Ok(Vec::new());
    }
    let entry = store.entry(container, Call::Frees)?;
    let Some(text) = entry.load()? else {
        // A call that was killed may have left a part of one.
        return entry.remove().map(|()| Vec::new());
    };
    let (kind, text) = match stored(&text) {
        Some(kind) => (kind, text),
        // Go flannel's plug-in does not write it whole or not at all, and then gives up here. Its addresses would stay taken.
        None => {
            let env = SubnetEnv::read(&conf.subnet_file).map_err(Error::NotReady)?;
            let config = delegate::config(conf, &env)?;
            (kind(&config)?.to_owned(), go_json::object(&config).into_bytes())
        }
    };
    let printed = invoke::run(&kind, &request.path, &text, &[])?;
    entry.remove()?;
    Ok(printed)
}

/// The plug-in of a stored configuration; `None` where it is not whole.
fn stored(text: &[u8]) -> Option<String> {
    let config: Object = serde_json::from_slice(text).ok()?;
    kind(&config).ok().map(str::to_owned)
}

fn kind(config: &Object) -> Result<&str, Error> {
    const PLACE: &str = "`delegate.type`";
    let kind = config.get("type").and_then(Value::as_str).unwrap_or_default();
    conf::check_type(kind, PLACE).map(|()| kind)
}

fn check(request: &Request, conf: &Conf) -> Result<Vec<u8>, Error> {
    let container = request.container()?;
    let entry = Store(&conf.data_dir).entry(container, Call::Needs)?;
    let stored = entry.load()?.and_then(|text| serde_json::from_slice::<Object>(&text).ok());
    let not_attached =
        || Error::NotAttached { container: container.as_str().to_owned(), data_dir: conf.data_dir.clone() };
    let mut config = stored.ok_or_else(not_attached)?;
    if let Some(result) = &conf.result {
        config.insert("prevResult".to_owned(), result.clone());
    }
    if let Some(runtime) = &conf.runtime {
        config.insert("runtimeConfig".to_owned(), runtime.clone().into());
    }
    invoke::run(kind(&config)?, &request.path, go_json::object(&config).as_bytes(), &[])
}

fn status(request: &Request, conf: &Conf) -> Result<Vec<u8>, Error> {
    let env = SubnetEnv::read(&conf.subnet_file).map_err(Error::NotReady)?;
    let config = delegate::config(conf, &env)?;
    invoke::run(kind(&config)?, &request.path, go_json::object(&config).as_bytes(), &[])
}

/// Detaches containers that are gone, and then has the other plug-in collect what it has of them.
fn gc(request: &Request, conf: &Conf) -> Result<Vec<u8>, Error> {
    let missing = || Error::Config { place: VALID, problem: "is missing".to_owned() };
    let (valid, attachments) = conf.valid.clone().ok_or_else(missing)?;
    let containers = Store(&conf.data_dir).containers()?;
    let gone = containers.iter().filter(|container| !valid.iter().any(|valid| valid == container.as_str()));
    // All are tried.
    let detached: Vec<_> = gone.map(|container| detach(request, conf, container)).collect();
    // Without a subnet there is no configuration to ask with, and nothing can have been attached since.
    if let Ok(env) = SubnetEnv::read(&conf.subnet_file) {
        let mut config = delegate::config(conf, &env)?;
        config.insert(VALID.to_owned(), attachments);
        invoke::run(kind(&config)?, &request.path, go_json::object(&config).as_bytes(), &[])?;
    }
    detached.into_iter().collect::<Result<(), _>>()?;
    Ok(Vec::new())
}

/// Runs DEL for a container that is gone, with its network namespace, if it is one of this network.
fn detach(request: &Request, conf: &Conf, container: &ContainerId) -> Result<(), Error> {
    let entry = Store(&conf.data_dir).entry(container, Call::Frees)?;
    let Some(text) = entry.load()? else { return Ok(()) };
    let config = serde_json::from_slice::<Object>(&text).ok();
    // Networks may share the directory.
    let Some(config) = config.filter(|config| config.get("name").and_then(Value::as_str) == Some(&conf.name)) else {
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
