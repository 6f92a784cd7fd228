//! Bad input: a message that names the place and the remedy, a code that is not 0, and nothing touched.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::UnixStream;
use std::process::Command;

use testkit::Namespace;

use crate::harness::{BINARY, PATIENCE, Site, VXLAN, command, owned, run};

#[test]
fn a_bad_command_line_exits_with_2_and_names_the_flag() {
    let ns = Namespace::new("bare").unwrap();
    for (args, part) in [
        (&["-ifcae=eth0"][..], "-ifcae (did you mean iface?)"),
        (&["-quux"], "flag provided but not defined: -quux"),
        (&["-healthz-port"], "flag needs an argument: -healthz-port"),
        (&["-healthz-port=http"], "invalid value \"http\" for flag -healthz-port"),
        (&["-healthz-port=70000"], "must be from 0 to 65535"),
        (&["-ip-masq=maybe"], "invalid value \"maybe\" for flag -ip-masq"),
        (&["-subnet-lease-renew-margin=1440"], "must be from 1 to 1439"),
        (&["-public-ip=1.2.3"], "not an IP address"),
        (&["-iface-regex=eth("], "unclosed group"),
        (&["-kube-subnet-mgr"], "set NODE_NAME"),
        (&["-kube-subnet-mgr", "-subnet-dir=/d"], "not both"),
        (&["-public-ip=224.0.0.1"], "not a usable unicast address"),
        (&["-etcd-endpoints=http://a b:1"], "invalid value \"…\" for -etcd-endpoints"),
        (&["-etcd-endpoints=http://a:2379,https://b:2379"], "one scheme"),
        (&["-ip-masq", "yes"], "use -ip-masq or -ip-masq=true"),
        (&["-etcd-username=u"], "-etcd-username requires -etcd-password"),
        (&["plan", "-w"], "plan does not take -w: only these commands do: status, peers"),
        (&["-o", "json"], "-o needs one of the commands status"),
        (&["status", "-o", "yaml"], "must be table, wide or json"),
        (&["help", "statsu"], "unknown command \"statsu\" (did you mean status?)"),
        (&["version", "now"], "version takes no operands"),
        (&["statsu"], "unknown command \"statsu\" (did you mean status?)"),
        (&["status", "now"], "status takes no operands"),
        (&["explain"], "explain takes one operand"),
    ] {
        let told = run(&ns, &owned(args));
        assert_eq!((told.code, told.out.as_str()), (Some(2), ""), "{args:?}: {told:?}");
        assert!(told.err.contains(part), "{args:?}: {}", told.err);
    }
}

#[test]
fn a_bad_variable_exits_with_2_and_names_it() {
    let ns = Namespace::new("bare").unwrap();
    for (name, value, part) in [
        ("FLANNELD_HEALTHZ_PORT", "x", "environment variable FLANNELD_HEALTHZ_PORT"),
        ("FLANNELD_PUBLIC_IP", "nowhere", "FLANNELD_PUBLIC_IP"),
    ] {
        let output = ns.run(|| command(&[]).env(name, value).output().unwrap()).unwrap();
        let err = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{err}");
        assert!(err.contains(part), "{err}");
    }
}

#[test]
fn what_is_not_text_is_named_and_ends_nothing_in_a_panic() {
    let ns = Namespace::new("bare").unwrap();
    let broken = OsStr::from_bytes(b"\xff");
    let output = ns.run(|| command(&[]).arg("-iface").arg(broken).output().unwrap()).unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert_eq!((output.status.code(), err.contains("UTF-8")), (Some(2), true), "{err}");
    // Its default directory would be created on this host.
    let dir = tempfile::tempdir().unwrap();
    let file = format!("-subnet-file={}", dir.path().join("subnet.env").display());
    let args = owned(&["-subnet-dir=/nonexistent", &file]);
    let output = ns.run(|| command(&args).env("FLANNELD_IFACE", broken).output().unwrap()).unwrap();
    let err = String::from_utf8(output.stderr).unwrap();
    assert!(err.contains("FLANNELD_IFACE is not UTF-8"), "{err}");
}

#[test]
fn help_is_on_stdout_and_version_as_in_go_flannel_on_stderr_with_0() {
    let ns = Namespace::new("bare").unwrap();
    for args in [&["-h"][..], &["--help", "-quux"], &["help"]] {
        let told = run(&ns, &owned(args));
        assert_eq!((told.code, told.err.as_str()), (Some(0), ""));
        assert!(told.out.contains("-subnet-file FILE\n"), "{}", told.out);
    }
    for args in [&["help", "peers"][..], &["peers", "-help"], &["peers", "-h"]] {
        let told = run(&ns, &owned(args));
        assert_eq!((told.code, told.err.as_str()), (Some(0), ""));
        assert!(told.out.starts_with("Usage: flanneld peers [flags]\n"), "{}", told.out);
    }
    let told = run(&ns, &owned(&["version"]));
    assert_eq!((told.code, told.out.starts_with("flanneld ")), (Some(0), true), "{told:?}");
    let version = run(&ns, &owned(&["--version"]));
    assert_eq!((version.code, version.out.as_str()), (Some(0), ""));
    assert!(version.err.starts_with("flanneld "), "{}", version.err);
}

#[test]
fn a_network_config_that_is_not_there_yet_is_waited_for() {
    let site = Site::new(1, VXLAN);
    let (config, aside) = (site.path("store/config.json"), site.path("aside.json"));
    fs::rename(&config, &aside).unwrap();
    let agent = site.start(1, &[]);
    agent.until("waiting", || agent.log().contains("no network configuration"));
    assert!(!site.subnet_file(1).exists() && site.ns(1).link("flannel.1").is_err());
    fs::rename(&aside, &config).unwrap();
    agent.until("programmed", || site.subnet_file(1).exists());
}

#[test]
fn a_network_config_that_cannot_be_ends_the_agent_and_names_its_place() {
    for (config, part) in [
        ("{", "config.json"),
        (r#"{"Network":"10.244.0.0/16","SubnetLen":31,"Backend":{"Type":"vxlan"}}"#, "SubnetLen"),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlna"}}"#, "\"vxlna\" is not available here"),
        (r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","VNI":99999999}}"#, "$.Backend.VNI"),
    ] {
        let site = Site::new(1, config);
        let told = site.run(1, &[]);
        assert_eq!(told.code, Some(1), "{told:?}");
        assert!(told.error().contains(part), "{part} is not in {}", told.err);
        let doctor = site.run(1, &["doctor"]);
        assert_eq!((doctor.code, doctor.out.contains(part)), (Some(1), true), "{doctor:?}");
        assert!(!site.subnet_file(1).exists() && site.ns(1).link("flannel.1").is_err());
    }
}

#[test]
fn a_place_that_cannot_be_used_ends_the_agent_before_anything_is_touched() {
    let site = Site::new(1, VXLAN);
    fs::write(site.path("file"), "").unwrap();
    fs::create_dir(site.path("theirs")).unwrap();
    std::os::unix::fs::chown(site.path("theirs"), Some(65534), None).unwrap();
    let path = |name: &str| site.path(name).display().to_string();
    let (nowhere, theirs) = (format!("mkdir -p {}", path("nope")), format!("chown 0 {}", path("theirs")));
    let etcd = ["-etcd-endpoints=http://192.0.2.1:2379".to_owned()];
    let embedded = site.args(1)[..1].to_vec();
    let with_conflist = [&embedded[..], &[format!("-cni-conf-dir={}", path("store"))]].concat();
    let before = files(&site);
    for (store, flag, value, parts) in [
        (&embedded[..], "subnet-file", path("file/subnet.env"), ["is not a directory", "correct the path"]),
        (&embedded, "subnet-file", path(""), ["is a directory", "give the path of a file"]),
        (&embedded, "subnet-file", path("nope/deep/subnet.env"), ["does not exist", "mkdir -p"]),
        (&embedded, "subnet-file", path("theirs/subnet.env"), ["cannot write", &theirs]),
        (&etcd, "state-file", path("nope/state"), ["does not exist", &nowhere]),
        (&etcd, "state-file", path("file/state"), ["is not a directory", "correct the path"]),
        (&etcd, "state-file", path("theirs/state"), ["cannot write", &theirs]),
        (&embedded, "cni-bin-dir", path("nope"), ["does not exist", &nowhere]),
        (&embedded, "cni-conf-dir", path("nope"), ["does not exist", &nowhere]),
        (&embedded, "cni-conf-dir", path("file"), ["is not a directory", "correct the path"]),
        (&with_conflist, "cni-conf", path("nope"), ["-cni-conf=", "cannot read"]),
        (&with_conflist, "cni-conf", path("file"), ["-cni-conf=", "not a JSON object"]),
        (&[], "subnet-dir", path("nope"), ["no such directory", "mkdir -p"]),
        (&[], "subnet-dir", path("file"), ["not a directory", "name another path"]),
        (&embedded, "healthz-ip", "192.0.2.77".to_owned(), ["listening on 192.0.2.77:8081", "-healthz-ip"]),
        (&embedded, "metrics-port", "8081".to_owned(), ["listening on 127.0.0.1:8081", "-metrics-port"]),
    ] {
        let own = ["-healthz-port=8081".to_owned(), format!("-subnet-file={}", site.subnet_file(1).display())];
        let args = [store.to_vec(), own.to_vec(), vec![format!("-{flag}={value}")]].concat();
        let told = run(site.ns(1), &args);
        assert_eq!(told.code, Some(1), "{args:?}: {told:?}");
        for part in parts {
            assert!(told.error().contains(part), "{args:?}: {part} is not in {}", told.err);
        }
        assert!(site.ns(1).link("flannel.1").is_err());
        assert_eq!(files(&site), before, "{args:?} left something behind");
    }
}

/// All files and directories of a site, but for the embedded store's own directory of leases.
fn files(site: &Site) -> Vec<String> {
    let found = Command::new("find").arg(site.dir.path()).output().unwrap();
    let mut found: Vec<_> = String::from_utf8(found.stdout).unwrap().lines().map(str::to_owned).collect();
    found.retain(|path| !path.ends_with("/store/leases"));
    found.sort();
    found
}

#[test]
fn a_refusal_is_an_end_though_nobody_reads_it() {
    let (mut ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    while ours.write(&[b'x'; 4096]).is_ok() {}
    ours.set_nonblocking(false).unwrap();
    let mut child = Command::new(BINARY).arg("-nonsense").stderr(OwnedFd::from(ours)).spawn().unwrap();
    let mut code = None;
    let ended = testkit::wait_until("ended", PATIENCE, || {
        code = child.try_wait().unwrap().map(|status| status.code());
        Ok::<_, testkit::Error>(code.is_some())
    });
    if ended.is_err() {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert_eq!(code, Some(Some(2)));
    drop(theirs);
}
