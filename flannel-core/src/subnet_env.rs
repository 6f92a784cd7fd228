//! `subnet.env`, the file that the CNI plug-in reads (docs/compatibility.md, "`subnet.env`").

use std::fmt::Write as _;
use std::path::Path;

use crate::config::pool::{address, number};
use crate::files::{self, FileError, Mode, Trust};
use crate::net::{Dual, Family, Mtu, Prefix, split_cidr};

/// The largest file that is read, in bytes. Flannel's file has less than 300.
const MAX_BYTES: u64 = 64 << 10;

/// The values of the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub struct SubnetEnv {
    /// The pod network of each family in use.
    pub networks: Dual<Prefix>,
    /// This node's subnet of each family in use. The file contains its second address, with the prefix length.
    pub subnets: Dual<Prefix>,
    /// The MTU for pods; `None` if the file has no valid one.
    pub mtu: Option<Mtu>,
    /// Whether the agent masquerades. If so, the plug-in must not.
    pub ip_masq: Option<bool>,
}

/// The result of [`SubnetEnv::keep`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kept {
    /// The file was already up to date.
    Same,
    /// The file was written.
    Written,
}

impl SubnetEnv {
    /// Returns the file's text, byte for byte as flannel writes it. A family is included if it has both a network and a
    /// subnet.
    pub fn render(&self) -> String {
        let mut text = String::new();
        for family in Family::BOTH {
            let (Some(network), Some(subnet)) = (self.networks.get(family), self.subnets.get(family)) else { continue };
            let keys = Keys::of(family);
            let first = address(number(subnet.addr()).wrapping_add(1), family);
            // Writing to a String cannot fail.
            let _ = writeln!(text, "{}={network}", keys.network);
            let _ = writeln!(text, "{}={first}/{}", keys.subnet, subnet.len());
        }
        if let Some(mtu) = self.mtu {
            let _ = writeln!(text, "FLANNEL_MTU={mtu}");
        }
        if let Some(ip_masq) = self.ip_masq {
            let _ = writeln!(text, "FLANNEL_IPMASQ={ip_masq}");
        }
        text
    }

    /// Parses the text by the rules of dotenv files. A value that does not parse counts as absent, and so does a key
    /// with several CIDRs, because it does not name a single subnet.
    pub fn parse(text: &str) -> Self {
        let mut env = Self::default();
        for (key, value) in text.lines().filter_map(assignment) {
            for family in Family::BOTH {
                let keys = Keys::of(family);
                if key == keys.network {
                    *env.networks.slot(family) = only_cidr(&value, family);
                } else if key == keys.subnet {
                    *env.subnets.slot(family) = only_cidr(&value, family);
                }
            }
            match key {
                "FLANNEL_MTU" => env.mtu = value.parse().ok().map(Mtu),
                "FLANNEL_IPMASQ" => env.ip_masq = value.parse().ok(),
                _ => {}
            }
        }
        env
    }

    /// Reads the file. Returns `None` if it does not exist. It has to be a regular file of at most 64 KiB, or a link to
    /// one, that belongs to root or to this process's user: its content determines which subnet a node requests and
    /// where routes of former runs are searched.
    ///
    /// # Errors
    /// [`FileError`] when the file exists and cannot be read.
    pub fn read(path: &Path) -> Result<Option<Self>, FileError> {
        match files::read(path, Trust::Owners, MAX_BYTES) {
            Ok(bytes) => Ok(bytes.map(|bytes| Self::parse(&String::from_utf8_lossy(&bytes)))),
            Err(error) => Err(FileError::new("read", path, error.into())),
        }
    }

    /// Writes the file. A reader sees either the whole old or the whole new text, also after a crash. Creates missing
    /// directories (0755). A new file has mode 0644 regardless of the umask. A file of root or of this process's user
    /// keeps its mode, without write permission for group and others.
    ///
    /// Blocks on disk I/O: do not call it from an async task.
    ///
    /// # Errors
    /// [`FileError`]: the old file, if any, is unchanged, or the new one is in place and only the directory could not be synced.
    pub fn write(&self, path: &Path) -> Result<(), FileError> {
        files::replace(path, Mode::Public, MAX_BYTES, |file| file.write_all(self.render().as_bytes()))
    }

    /// Writes the file unless it already has exactly this content.
    ///
    /// Blocks on disk I/O: do not call it from an async task.
    ///
    /// # Errors
    /// As [`write`](Self::write).
    pub fn keep(&self, path: &Path) -> Result<Kept, FileError> {
        // A file that cannot be read is replaced too.
        let found = files::read(path, Trust::Owners, MAX_BYTES).ok().flatten();
        if found.is_some_and(|text| text == self.render().as_bytes()) {
            return Ok(Kept::Same);
        }
        self.write(path).map(|()| Kept::Written)
    }
}

struct Keys {
    network: &'static str,
    subnet: &'static str,
}

impl Keys {
    fn of(family: Family) -> Self {
        match family {
            Family::V4 => Self { network: "FLANNEL_NETWORK", subnet: "FLANNEL_SUBNET" },
            Family::V6 => Self { network: "FLANNEL_IPV6_NETWORK", subnet: "FLANNEL_IPV6_SUBNET" },
        }
    }
}

/// Parses `KEY=value` or `KEY: value`, with an optional `export`, quotes and a comment (dotenv).
fn assignment(line: &str) -> Option<(&str, String)> {
    let line = line.trim();
    let line = line.strip_prefix("export ").unwrap_or(line).trim_start();
    if line.starts_with('#') {
        return None;
    }
    let (key, value) = line.split_once(['=', ':'])?;
    let value = value.trim();
    let unquoted = match value.chars().next() {
        Some(quote @ ('"' | '\'')) => value[1..].split(quote).next(),
        _ => value.split(" #").next(),
    };
    Some((key.trim(), unquoted.unwrap_or_default().trim().to_owned()))
}

/// Returns the only CIDR of a comma-separated list, masked to its network; entries that do not parse are ignored.
fn only_cidr(list: &str, family: Family) -> Option<Prefix> {
    let mut cidrs = list.split(',').filter_map(|text| {
        let (addr, len) = split_cidr(text.trim()).ok()?;
        Prefix::masked(addr, len).ok().filter(|prefix| prefix.family() == family)
    });
    let only = cidrs.next()?;
    cidrs.next().is_none().then_some(only)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::{self, Permissions};
    use std::os::unix::fs::PermissionsExt;

    fn dual() -> SubnetEnv {
        SubnetEnv {
            networks: Dual {
                v4: Some("10.42.0.0/16".parse().unwrap()),
                v6: Some("2001:cafe:42::/56".parse().unwrap()),
            },
            subnets: Dual { v4: Some("10.42.0.0/24".parse().unwrap()), v6: Some("2001:cafe:42::/64".parse().unwrap()) },
            mtu: Some(Mtu(1450)),
            ip_masq: Some(true),
        }
    }

    const DUAL: &str = "FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET=10.42.0.1/24\n\
        FLANNEL_IPV6_NETWORK=2001:cafe:42::/56\nFLANNEL_IPV6_SUBNET=2001:cafe:42::1/64\n\
        FLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn a_file_of_the_largest_size_is_read_and_a_larger_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("subnet.env");
        let filled = |size: u64| format!("{DUAL}{}", "#".repeat(size as usize - DUAL.len()));
        fs::write(&path, filled(MAX_BYTES)).unwrap();
        assert_eq!(SubnetEnv::read(&path).unwrap(), Some(dual()));
        fs::write(&path, filled(MAX_BYTES + 1)).unwrap();
        assert_eq!(SubnetEnv::read(&path).unwrap_err().source.kind(), std::io::ErrorKind::FileTooLarge);
        assert_eq!(dual().keep(&path).unwrap(), Kept::Written);
    }

    #[test]
    fn the_text_is_flannels() {
        assert_eq!(dual().render(), DUAL);
        assert_eq!(SubnetEnv::parse(DUAL), dual());
    }

    #[test]
    fn a_key_without_exactly_one_cidr_counts_as_absent() {
        let v4 = |value: &str| SubnetEnv::parse(&format!("FLANNEL_SUBNET={value}\n")).subnets.v4;
        let subnet = Some("10.5.3.0/24".parse().unwrap());
        for value in ["10.5.3.1/24", "'10.5.3.1/24'", "\"10.5.3.1/24\" # x", " 10.5.3.9/24 # x", "junk,10.5.3.1/24"] {
            assert_eq!(v4(value), subnet, "{value}");
        }
        for value in ["", "junk", "10.5.3.1/24,10.5.4.1/24", "fc00::1/64", "10.5.3.1"] {
            assert_eq!(v4(value), None, "{value}");
        }
        assert_eq!(SubnetEnv::parse("# FLANNEL_SUBNET=10.5.3.1/24\nexport FLANNEL_MTU=9\n").mtu, Some(Mtu(9)));
    }

    #[test]
    fn a_write_makes_directories_and_keeps_the_mode_of_a_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b/subnet.env");
        dual().write(&path).unwrap();
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o644, 0o755));
        assert_eq!(fs::read_to_string(&path).unwrap(), DUAL);
        fs::set_permissions(&path, Permissions::from_mode(0o600)).unwrap();
        let other = SubnetEnv { mtu: Some(Mtu(9000)), ..dual() };
        other.write(&path).unwrap();
        assert_eq!((mode(&path), SubnetEnv::read(&path).unwrap()), (0o600, Some(other)));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1, "a temporary file was left");
    }

    #[test]
    fn a_missing_file_is_none_and_a_bad_place_names_its_remedy() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(SubnetEnv::read(&dir.path().join("none")).unwrap(), None);
        fs::write(dir.path().join("file"), "x").unwrap();
        let error = dual().write(&dir.path().join("file/subnet.env")).unwrap_err();
        assert!(error.to_string().contains("parents are directories"), "{error}");
        let taken = dir.path().join("taken");
        fs::create_dir_all(taken.join("full")).unwrap();
        assert!(dual().write(&taken).is_err() && taken.join("full").is_dir());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2, "a temporary file was left");
    }

    proptest! {
        #[test]
        fn any_text_parses(text in "(FLANNEL_(SUBNET|MTU|NETWORK)[=:][\"' #]{0,2}\\PC{0,20}\n){0,4}\\PC{0,30}") {
            let _ = SubnetEnv::parse(&text);
        }
    }
}
