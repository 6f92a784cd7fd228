//! The environment variables of a call (CNI specification, "Parameters").

use std::ffi::OsString;
use std::path::PathBuf;

use crate::error::Error;

/// The longest name of an interface, in bytes (`IFNAMSIZ`, include/uapi/linux/if.h, without the final zero).
const MAX_IFNAME: usize = 15;

/// The longest container ID, in bytes. It is part of file names, which have at most 255.
const MAX_CONTAINER: usize = 200;

/// A command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Command {
    Add,
    Del,
    Check,
    Status,
    Gc,
    Version,
}

impl Command {
    const ALL: [(&'static str, Self); 6] = [
        ("ADD", Self::Add),
        ("DEL", Self::Del),
        ("CHECK", Self::Check),
        ("STATUS", Self::Status),
        ("GC", Self::Gc),
        ("VERSION", Self::Version),
    ];

    pub(crate) fn name(self) -> &'static str {
        Self::ALL.into_iter().find(|(_, command)| *command == self).map_or("", |(name, _)| name)
    }

    /// Returns the version of the specification that introduced the command; `None` for the first version.
    pub(crate) fn since(self) -> Option<&'static str> {
        match self {
            Self::Check => Some("0.4.0"),
            Self::Status | Self::Gc => Some("1.1.0"),
            Self::Add | Self::Del | Self::Version => None,
        }
    }
}

/// A container's ID. It is safe as a file name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ContainerId(String);

impl ContainerId {
    pub(crate) fn new(text: &str) -> Option<Self> {
        let mut chars = text.chars();
        let first = chars.next().is_some_and(|c| c.is_ascii_alphanumeric());
        let rest = chars.all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
        (first && rest && text.len() <= MAX_CONTAINER).then(|| Self(text.to_owned()))
    }

    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

/// The checked variables of a call. The other plug-in inherits them from this process.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) command: Command,
    container: Option<ContainerId>,
    ifname: Option<String>,
    /// The directories that contain plug-ins.
    pub(crate) path: Vec<PathBuf>,
}

impl Request {
    /// Reads and checks the variables that `var` returns.
    pub(crate) fn read(var: impl Fn(&str) -> Option<OsString>) -> Result<Self, Error> {
        let text = |name: &'static str| match var(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(text)) => Ok(Some(text).filter(|text| !text.is_empty())),
            Some(Err(_)) => Err(Error::Environment { name, problem: "is not UTF-8".to_owned() }),
        };
        let required = |name: &'static str| {
            text(name)?.ok_or_else(|| Error::Environment { name, problem: "is missing".to_owned() })
        };
        let command = required("CNI_COMMAND")?;
        let command = Command::ALL.into_iter().find(|(name, _)| *name == command).map(|(_, command)| command);
        let Some(command) = command else {
            let names = Command::ALL.map(|(name, _)| name).join(", ");
            return Err(Error::Environment { name: "CNI_COMMAND", problem: format!("is none of {names}") });
        };
        let attaches = matches!(command, Command::Add | Command::Check);
        let (container, ifname) = if attaches || command == Command::Del {
            let (id, ifname) = (required("CNI_CONTAINERID")?, required("CNI_IFNAME")?);
            check_ifname(&ifname)?;
            let problem = format!(
                "is not a container ID: letters, digits, `_`, `.` and `-`, a letter or digit first, at most {MAX_CONTAINER}"
            );
            let id = ContainerId::new(&id).ok_or(Error::Environment { name: "CNI_CONTAINERID", problem })?;
            (Some(id), Some(ifname))
        } else {
            (None, None)
        };
        if attaches {
            required("CNI_NETNS")?;
        }
        let path = match command {
            Command::Version => Vec::new(),
            _ => std::env::split_paths(&required("CNI_PATH")?).collect(),
        };
        Ok(Self { command, container, ifname, path })
    }

    /// Returns the name of the container's interface. ADD, DEL and CHECK have one.
    pub(crate) fn ifname(&self) -> Result<&str, Error> {
        let missing = || Error::Environment { name: "CNI_IFNAME", problem: "is missing".to_owned() };
        self.ifname.as_deref().ok_or_else(missing)
    }

    /// Returns the container. ADD, DEL and CHECK have one.
    pub(crate) fn container(&self) -> Result<&ContainerId, Error> {
        let missing = || Error::Environment { name: "CNI_CONTAINERID", problem: "is missing".to_owned() };
        self.container.as_ref().ok_or_else(missing)
    }
}

fn check_ifname(name: &str) -> Result<(), Error> {
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace();
    if name.len() > MAX_IFNAME || name == "." || name == ".." || name.contains(bad) {
        let problem = format!("is not an interface name: at most {MAX_IFNAME} bytes without `/`, `:` and spaces");
        return Err(Error::Environment { name: "CNI_IFNAME", problem });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [(&str, &str); 5] = [
        ("CNI_COMMAND", "ADD"),
        ("CNI_CONTAINERID", "abc-1"),
        ("CNI_NETNS", "/run/netns/x"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", "/opt/cni/bin:/usr/lib/cni"),
    ];

    fn read(but: &[(&str, &str)]) -> Result<Request, Error> {
        let found = |name: &str| but.iter().chain(&ALL).find(|(known, _)| *known == name).map(|(_, text)| text.into());
        Request::read(found)
    }

    #[test]
    fn each_command_needs_its_variables_and_no_others() {
        assert_eq!(read(&[]).unwrap().path, [PathBuf::from("/opt/cni/bin"), PathBuf::from("/usr/lib/cni")]);
        for (command, needed) in [
            ("ADD", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"][..]),
            ("CHECK", &["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_PATH"]),
            ("DEL", &["CNI_CONTAINERID", "CNI_IFNAME", "CNI_PATH"]),
            ("STATUS", &["CNI_PATH"]),
            ("GC", &["CNI_PATH"]),
            ("VERSION", &[]),
        ] {
            for (name, _) in &ALL[1..] {
                let answer = read(&[("CNI_COMMAND", command), (name, "")]);
                assert_eq!(answer.is_err(), needed.contains(name), "{command} without {name}: {answer:?}");
            }
        }
    }

    #[test]
    fn bad_values_are_named() {
        for (name, value) in [
            ("CNI_COMMAND", "REMOVE"),
            ("CNI_COMMAND", ""),
            ("CNI_CONTAINERID", "../x"),
            ("CNI_CONTAINERID", ".x"),
            ("CNI_CONTAINERID", "a/b"),
            ("CNI_IFNAME", "a-name-of-more-than-fifteen"),
            ("CNI_IFNAME", ".."),
            ("CNI_IFNAME", "a b"),
        ] {
            let error = read(&[(name, value)]).unwrap_err();
            assert!(error.to_string().contains(name), "{error}");
        }
    }
}
