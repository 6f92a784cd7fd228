//! `unsafe` is denied everywhere but in the modules named here.

mod repository;

use repository::files;

/// The modules that may hold `unsafe` code, and why.
const ALLOWED: [(&str, &str); 2] = [
    (
        "backend-udp/src/path/sys/mod.rs",
        "ioctl(2) of a TUN, recvmmsg(2) and sendmmsg(2) with control messages have no safe wrapper",
    ),
    ("flanneld/src/malloc.rs", "mallopt(3) has no safe wrapper"),
];

#[test]
fn only_the_modules_named_here_allow_unsafe_code() {
    let lifts = |text: &str| {
        let lines = text.lines().map(str::trim_start).filter(|line| !line.starts_with("//"));
        let code: String = lines.flat_map(str::chars).filter(|c| !c.is_whitespace()).collect();
        ["allow", "expect", "warn"].iter().any(|level| code.contains(&format!("{level}(unsafe_code")))
    };
    let found: Vec<String> = files("rs").into_iter().filter(|(_, text)| lifts(text)).map(|(place, _)| place).collect();
    assert_eq!(found, ALLOWED.map(|(place, _)| place));
    let manifests = files("toml").into_iter().filter(|(_, text)| text.contains("unsafe_code"));
    let manifests: Vec<String> = manifests.map(|(place, _)| place).collect();
    assert_eq!(manifests, ["Cargo.toml"], "the lint is the workspace's");
}
