//! The networks in which routes of the overlay may be, in addition to the one in `subnet.env`.
//!
//! A route belongs to the overlay only inside one of its networks, so former networks have to be recorded in a way that
//! survives a kill at any point. The record is a file beside `subnet.env` with one network per line (`10.5.0.0/16
//! fd00:5::/48`). It is written before the first route in a network that is not in `subnet.env` yet, and removed once
//! `subnet.env` names that network and no routes are left in the former ones.

use std::path::{Path, PathBuf};
use std::{fs, io};

use crate::files::{self, FileError, Mode, Trust, Unread};
use crate::net::{Dual, Family, Prefix};
use crate::subnet_env::SubnetEnv;

/// The maximum size of the record, in bytes: room for some 500 changes of network without a clean-up in between.
const MAX_BYTES: u64 = 32 << 10;

/// Whether the record of former networks is still needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Retention {
    /// Routes may be left in a former network: the record stays.
    Keep,
    /// `subnet.env` names the only network: the record is deleted.
    Delete,
}

/// The networks of former runs, the latest last: those in the record, then the one in `subnet.env`.
pub(crate) fn known(env: &Path) -> Vec<Dual<Prefix>> {
    let file = beside(env);
    let found = bytes(&file).unwrap_or_else(|error| {
        tracing::warn!(
            target: "flannel::kernel",
            path = %file.display(),
            %error,
            "cannot read the former networks; ignored"
        );
        None
    });
    let mut networks =
        found.and_then(|found| String::from_utf8(found).ok()).map(|text| parse(&text)).unwrap_or_default();
    networks.extend(SubnetEnv::read(env).ok().flatten().map(|env| env.networks));
    distinct(networks)
}

/// Records the `former` networks and the `present` one, unless `subnet.env` alone already names them.
///
/// Blocks on the disk: not for an async task.
pub(crate) fn remember(env: &Path, former: &[Dual<Prefix>], present: Dual<Prefix>) -> Result<(), FileError> {
    let named = SubnetEnv::read(env).ok().flatten().map(|env| env.networks);
    if former.is_empty() && named == Some(present) {
        return Ok(());
    }
    let networks = distinct(former.iter().copied().chain([present]));
    files::replace(&beside(env), Mode::Public, MAX_BYTES, |file| file.write_all(print(&networks).as_bytes()))
}

/// Deletes the record. Idempotent.
pub(crate) fn forget(env: &Path) -> io::Result<()> {
    let file = beside(env);
    // Checked first: a read-only file system refuses to delete even a file that does not exist.
    match fs::symlink_metadata(&file).and_then(|_| fs::remove_file(&file)) {
        // A file that is not trusted is not read as a record, so it may stay.
        Err(error) if error.kind() != io::ErrorKind::NotFound && matches!(bytes(&file), Ok(Some(_))) => Err(error),
        _ => Ok(()),
    }
}

/// The content of the record, if its owner and mode can be trusted: it decides where routes are deleted.
fn bytes(file: &Path) -> Result<Option<Vec<u8>>, Unread> {
    files::read(file, Trust::OwnersAlone, MAX_BYTES)
}

fn beside(env: &Path) -> PathBuf {
    env.with_file_name(format!(".{}.networks", env.file_name().unwrap_or_default().to_string_lossy()))
}

fn parse(text: &str) -> Vec<Dual<Prefix>> {
    text.lines().map(network).collect()
}

fn print(networks: &[Dual<Prefix>]) -> String {
    networks.iter().map(|networks| line(networks) + "\n").collect()
}

fn line(networks: &Dual<Prefix>) -> String {
    let words: Vec<_> = networks.iter().map(|(_, network)| network.to_string()).collect();
    words.join(" ")
}

/// Words that do not parse are ignored.
fn network(line: &str) -> Dual<Prefix> {
    let mut networks = Dual::default();
    for prefix in line.split_whitespace().filter_map(|word| word.parse::<Prefix>().ok()) {
        *networks.slot(prefix.family()) = Some(prefix);
    }
    networks
}

fn distinct(networks: impl IntoIterator<Item = Dual<Prefix>>) -> Vec<Dual<Prefix>> {
    let mut distinct: Vec<Dual<Prefix>> = Vec::new();
    for each in networks {
        let is_any = Family::BOTH.iter().any(|family| each.get(*family).is_some());
        if is_any && !distinct.contains(&each) {
            distinct.push(each);
        }
    }
    distinct
}

/// Checks that the networks in a text are parsed to the same value after printing.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn check_former_networks(text: &str) {
    let networks = distinct(parse(text));
    assert!(networks.len() <= text.lines().count());
    assert_eq!(parse(&print(&networks)), networks, "{text:?}");
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn networks(text: &[&str]) -> Vec<Dual<Prefix>> {
        text.iter().map(|line| network(line)).collect()
    }

    #[test]
    fn every_network_is_known_until_it_is_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let env = dir.path().join("run/subnet.env");
        assert!(known(&env).is_empty());
        let all = networks(&["10.5.0.0/16", "fd00:5::/48", "10.6.0.0/16 fd00:6::/48"]);
        remember(&env, &all[..2], all[2]).unwrap();
        fs::write(&env, "FLANNEL_NETWORK=10.7.0.0/16\n").unwrap();
        assert_eq!(known(&env), [all.as_slice(), &networks(&["10.7.0.0/16"])].concat());
        remember(&env, &known(&env), all[2]).unwrap();
        assert_eq!(known(&env).len(), 4);
        forget(&env).unwrap();
        forget(&env).unwrap();
        assert_eq!(known(&env), networks(&["10.7.0.0/16"]));
    }

    #[test]
    fn a_memory_that_is_too_large_is_neither_read_nor_written() {
        let dir = tempfile::tempdir().unwrap();
        let env = dir.path().join("subnet.env");
        let many: Vec<_> =
            (0..MAX_BYTES as u32 / 8).map(|n| network(&format!("10.{}.{}.0/24", n >> 8, n & 0xff))).collect();
        remember(&env, &many[..100], many[0]).unwrap();
        assert_eq!(remember(&env, &many, many[0]).unwrap_err().source.kind(), io::ErrorKind::FileTooLarge);
        assert_eq!(known(&env).len(), 100);
        fs::write(beside(&env), print(&many)).unwrap();
        assert!(known(&env).is_empty());
    }

    #[test]
    fn what_subnet_env_says_alone_needs_no_memory() {
        let dir = tempfile::tempdir().unwrap();
        let env = dir.path().join("subnet.env");
        fs::write(&env, "FLANNEL_NETWORK=10.7.0.0/16\n").unwrap();
        remember(&env, &[], network("10.7.0.0/16")).unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        remember(&env, &[], network("10.8.0.0/16")).unwrap();
        assert_eq!(known(&env), networks(&["10.8.0.0/16", "10.7.0.0/16"]));
    }

    #[test]
    fn a_memory_that_is_garbage_names_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let env = dir.path().join("subnet.env");
        fs::write(beside(&env), b"\xff\n10.5/16 x\n\n").unwrap();
        assert!(known(&env).is_empty());
        fs::write(beside(&env), "x\n10.5.0.0/16 y\n").unwrap();
        assert_eq!(known(&env), networks(&["10.5.0.0/16"]));
    }

    proptest! {
        #[test]
        fn what_a_text_names_reads_back(text in "((10\\.[0-9]{1,3}\\.0\\.0/1[0-9]|fd00:[0-9]::/48|\\PC{0,9})[ \n]{1,2}){0,9}") {
            check_former_networks(&text);
        }
    }
}
