//! The network configuration that a runtime passes on stdin.

use std::path::PathBuf;
use std::time::Duration;

use serde_json::{Map, Value};

use crate::error::Error;

/// The supported versions of the CNI specification. Results are passed on unchanged, so the other plug-in has to support
/// the version, too.
pub(crate) const VERSIONS: [&str; 7] = ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"];

/// The version of a configuration that names none.
const OLDEST: &str = "0.1.0";

const SUBNET_FILE: &str = "/run/flannel/subnet.env";
const DATA_DIR: &str = "/var/lib/cni/flannel";

/// How long ADD waits for the agent by default and at most, in seconds. Runtimes allow two minutes or more for a pod's network.
const WAIT: u64 = 15;
const MAX_WAIT: u64 = 110;

/// A JSON object.
pub(crate) type Object = Map<String, Value>;

/// The configuration. Members that are not named here are ignored, as in Go flannel's plug-in.
#[derive(Debug, Clone)]
pub(crate) struct Conf {
    /// One of [`VERSIONS`].
    pub(crate) version: &'static str,
    /// Whether the configuration names a version. If not, the derived configuration names none either.
    pub(crate) has_version: bool,
    pub(crate) name: String,
    /// The configuration of the IPAM plug-in.
    pub(crate) ipam: Object,
    /// The operator's part of the other plug-in's configuration.
    pub(crate) delegate: Object,
    pub(crate) runtime: Option<Object>,
    pub(crate) subnet_file: PathBuf,
    pub(crate) data_dir: PathBuf,
    pub(crate) wait: Duration,
    /// `prevResult`: with CHECK, the result of ADD.
    pub(crate) result: Option<Value>,
    /// With GC: the containers that exist, and the member itself, which is passed on.
    pub(crate) valid: Option<(Vec<String>, Value)>,
}

/// The member that lists the valid attachments (CNI specification 1.1, "GC").
pub(crate) const VALID: &str = "cni.dev/valid-attachments";

impl Conf {
    /// Parses the JSON text.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, Error> {
        let mut fields: Object = serde_json::from_slice(text).map_err(|error| Error::Decode(error.to_string()))?;
        let (version, has_version) = version(&fields)?;
        let name = string(&fields, "name")?.unwrap_or_default();
        let name_is_right = name.starts_with(|c: char| c.is_ascii_alphanumeric())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        if !name_is_right {
            let problem = "has to be letters, digits, `_`, `.` and `-`, a letter or digit first";
            return Err(Error::Config { place: "name", problem: problem.to_owned() });
        }
        let delegate = object(&mut fields, "delegate")?.unwrap_or_default();
        check_delegate(&delegate)?;
        Ok(Self {
            version,
            has_version,
            name,
            ipam: object(&mut fields, "ipam")?.unwrap_or_default(),
            delegate,
            runtime: object(&mut fields, "runtimeConfig")?,
            subnet_file: string(&fields, "subnetFile")?.map_or_else(|| SUBNET_FILE.into(), PathBuf::from),
            data_dir: string(&fields, "dataDir")?.map_or_else(|| DATA_DIR.into(), PathBuf::from),
            wait: wait(&fields)?,
            result: fields.remove("prevResult"),
            valid: fields.remove(VALID).map(valid).transpose()?,
        })
    }
}

/// Returns the version in force, and whether the configuration names it.
pub(crate) fn version(fields: &Object) -> Result<(&'static str, bool), Error> {
    let named = string(fields, "cniVersion")?;
    let wanted = named.as_deref().unwrap_or(OLDEST);
    let known = VERSIONS.into_iter().find(|known| *known == wanted);
    Ok((known.ok_or_else(|| Error::Version(wanted.to_owned()))?, named.is_some()))
}

/// Returns whether `version` is `other` or later; both are of [`VERSIONS`].
pub(crate) fn is_at_least(version: &str, other: &str) -> bool {
    let place = |wanted| VERSIONS.iter().position(|known| *known == wanted);
    place(version) >= place(other)
}

/// Returns a string member. An empty string counts as missing.
fn string(fields: &Object, name: &'static str) -> Result<Option<String>, Error> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone()).filter(|text| !text.is_empty())),
        Some(_) => Err(Error::Config { place: name, problem: "is not a string".to_owned() }),
    }
}

fn object(fields: &mut Object, name: &'static str) -> Result<Option<Object>, Error> {
    match fields.remove(name) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(object)) => Ok(Some(object)),
        Some(_) => Err(Error::Config { place: name, problem: "is not an object".to_owned() }),
    }
}

fn check_delegate(delegate: &Object) -> Result<(), Error> {
    let error = |place, problem: &str| Err(Error::Config { place, problem: problem.to_owned() });
    match delegate.get("type") {
        None => {}
        Some(Value::String(kind)) => check_type(kind, "delegate.type")?,
        Some(_) => return error("delegate.type", "is not a string"),
    }
    if delegate.contains_key("name") {
        return error("delegate.name", "must not be there: it is the network's");
    }
    if delegate.contains_key("ipam") {
        return error("delegate.ipam", "must not be there: write it as `ipam` beside `delegate`");
    }
    Ok(())
}

/// Checks the name of the other plug-in: it has to be a file name, and not this plug-in's, which would run itself for ever.
pub(crate) fn check_type(kind: &str, place: &'static str) -> Result<(), Error> {
    let problem = match kind {
        "" | "." | ".." => "is not the name of a plug-in",
        kind if kind.contains(['/', '\0']) => {
            "is not the name of a plug-in: it has to be a file in a directory of CNI_PATH"
        }
        "flannel" => "is this plug-in itself",
        _ => return Ok(()),
    };
    Err(Error::Config { place, problem: problem.to_owned() })
}

fn wait(fields: &Object) -> Result<Duration, Error> {
    let seconds = match fields.get("waitForAgent") {
        None | Some(Value::Null) => WAIT,
        Some(value) => value.as_u64().filter(|seconds| *seconds <= MAX_WAIT).ok_or_else(|| {
            let problem = format!("is not a number of seconds from 0 to {MAX_WAIT}");
            Error::Config { place: "waitForAgent", problem }
        })?,
    };
    Ok(Duration::from_secs(seconds))
}

fn valid(value: Value) -> Result<(Vec<String>, Value), Error> {
    // Go programs write an empty list as null.
    let value = if value.is_null() { Value::Array(Vec::new()) } else { value };
    let id = |attachment: &Value| attachment.get("containerID")?.as_str().map(str::to_owned);
    let ids = value.as_array().and_then(|list| list.iter().map(id).collect::<Option<Vec<_>>>());
    let problem =
        || Error::Config { place: VALID, problem: "is not a list of objects with a `containerID`".to_owned() };
    Ok((ids.ok_or_else(problem)?, value))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Conf, Error> {
        Conf::parse(text.as_bytes())
    }

    #[test]
    fn what_is_left_out_has_flannels_values() {
        let conf = parse(r#"{"name":"cbr0","type":"flannel"}"#).unwrap();
        assert_eq!((conf.version, conf.has_version), ("0.1.0", false));
        assert_eq!(conf.subnet_file, PathBuf::from("/run/flannel/subnet.env"));
        assert_eq!(conf.data_dir, PathBuf::from("/var/lib/cni/flannel"));
        assert_eq!(conf.wait, Duration::from_secs(15));
        let conf = parse(r#"{"cniVersion":"1.1.0","name":"cbr0","waitForAgent":0,"dataDir":"/d"}"#).unwrap();
        assert_eq!((conf.version, conf.wait, conf.data_dir), ("1.1.0", Duration::ZERO, "/d".into()));
    }

    #[test]
    fn bad_input_is_refused_by_its_name() {
        for (text, named) in [
            ("", "not a JSON object"),
            ("[]", "not a JSON object"),
            (r#"{"name":"#, "not a JSON object"),
            (r#"{"name":"n","cniVersion":"9.0.0"}"#, "9.0.0"),
            (r#"{"name":"n","cniVersion":1}"#, "`cniVersion`"),
            ("{}", "`name`"),
            (r#"{"name":"../n"}"#, "`name`"),
            (r#"{"name":"n","ipam":3}"#, "`ipam`"),
            (r#"{"name":"n","delegate":[]}"#, "`delegate`"),
            (r#"{"name":"n","delegate":{"type":3}}"#, "`delegate.type`"),
            (r#"{"name":"n","delegate":{"type":"../bridge"}}"#, "`delegate.type`"),
            (r#"{"name":"n","delegate":{"type":"flannel"}}"#, "`delegate.type`"),
            (r#"{"name":"n","delegate":{"name":"m"}}"#, "`delegate.name`"),
            (r#"{"name":"n","delegate":{"ipam":{}}}"#, "`delegate.ipam`"),
            (r#"{"name":"n","waitForAgent":"15s"}"#, "`waitForAgent`"),
            (r#"{"name":"n","waitForAgent":111}"#, "`waitForAgent`"),
            (r#"{"name":"n","cni.dev/valid-attachments":[{}]}"#, "`cni.dev/valid-attachments`"),
        ] {
            let error = parse(text).unwrap_err();
            assert!(error.to_string().contains(named), "{text}: {error}");
        }
    }

    #[test]
    fn versions_are_in_order() {
        assert!(is_at_least("1.1.0", "0.4.0") && is_at_least("0.4.0", "0.4.0") && !is_at_least("0.3.1", "0.4.0"));
    }
}
