//! Packs the relocations of the program where the C library can read them.
//!
//! The relocations of a position-independent program are read at each start and stay resident: 0.9 MiB unpacked, 10 KiB
//! packed.

use std::env;
use std::process::Command;

/// The environment variable that leaves the relocations unpacked if it is `0`, for a program that has to run with an
/// older glibc.
const SWITCH: &str = "FLANNELKIT_PACK_RELOCATIONS";

/// The first glibc that reads `DT_RELR` (its NEWS for 2.36). With an older one a packed program does not start.
const FIRST: (u32, u32) = (2, 36);

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed={SWITCH}");
    // A program for another machine meets a C library that is not known here.
    let is_native = env::var_os("HOST") == env::var_os("TARGET");
    let is_glibc = env::var("CARGO_CFG_TARGET_ENV").is_ok_and(|libc| libc == "gnu");
    let is_off = env::var(SWITCH).is_ok_and(|switch| switch == "0");
    if is_native && is_glibc && !is_off && glibc().is_some_and(|version| version >= FIRST) {
        println!("cargo::rustc-link-arg-bin=flanneld=-Wl,-z,pack-relative-relocs");
    }
}

/// Returns major and minor version of this machine's glibc, if it has one.
fn glibc() -> Option<(u32, u32)> {
    let output = Command::new("getconf").arg("GNU_LIBC_VERSION").output().ok()?;
    let text = String::from_utf8(output.stdout).ok()?;
    let (major, minor) = text.trim().strip_prefix("glibc ")?.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}
