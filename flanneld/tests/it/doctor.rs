//! What doctor finds before it stops or degrades a start, and what the agent says of the same.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use etcd_client::{Permission, PermissionType};
use nix::sys::signal::Signal;
use serde_json::Value;
use testkit::Process;

use crate::harness::{Agent, BINARY, CommandOutput, Site, VXLAN, bare, command, copy_program, owned};
use crate::store::Cluster;

const NOBODY: u32 = 65534;

/// One finding: severity, text and remedy.
#[derive(Debug, Clone)]
struct Found {
    severity: String,
    text: String,
    fix: String,
}

/// The findings of one check, in a report in JSON.
fn of(report: &CommandOutput, check: &str) -> Vec<Found> {
    let json: Value = serde_json::from_str(&report.out).unwrap_or_else(|error| panic!("{error}: {report:?}"));
    let findings = json["findings"].as_array().unwrap();
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let found = |finding: &Value| Found {
        severity: text(&finding["severity"]),
        text: text(&finding["found"]),
        fix: text(&finding["fix"]),
    };
    findings.iter().filter(|finding| finding["check"] == check).map(found).collect()
}

/// Asserts that there is one finding of a check, and what it contains.
#[track_caller]
fn assert_found(report: &CommandOutput, check: &str, severity: &str, text: &str, fix: &str) {
    let found = of(report, check);
    let [Found { severity: said, text: what, fix: remedy }] = found.as_slice() else {
        panic!("{check}: {found:?} in {}", report.out)
    };
    assert!(said == severity && what.contains(text) && remedy.contains(fix), "{found:?}");
}

fn leases(site: &Site) -> usize {
    fs::read_dir(site.path("store/leases")).map(Iterator::count).unwrap_or_default()
}

#[test]
fn a_missing_tool_is_found_and_ends_the_agent_before_it_has_a_lease() {
    for (config, program) in [
        (VXLAN, "iptables"),
        (r#"{"EnableNFTables":true,"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#, "nft"),
    ] {
        let site = Site::new(1, config);
        let empty = site.path("empty");
        fs::create_dir(&empty).unwrap();
        let without = |more: &[&str]| -> CommandOutput {
            let args = [site.args(1), owned(more)].concat();
            let run = || command(&args).env("PATH", &empty).output().unwrap();
            site.ns(1).run(run).unwrap().into()
        };
        let ended = without(&["-ip-masq"]);
        assert_eq!(ended.code, Some(1), "{ended:?}");
        for part in [program, "-ip-masq", "apt install"] {
            assert!(ended.error().contains(part), "{part} is not in {}", ended.err);
        }
        assert_eq!((leases(&site), site.subnet_file(1).exists()), (0, false), "{}", ended.err);
        assert!(site.ns(1).link("flannel.1").is_err());
        let report = without(&["-ip-masq", "doctor", "-json"]);
        assert_eq!(report.code, Some(1));
        assert_found(&report, "firewall", "error", program, "apt install");
        assert_found(&without(&["doctor", "-json"]), "firewall", "warning", program, "apt install");
        let none = without(&["-iptables-forward-rules=false", "doctor", "-json"]);
        assert_found(&none, "firewall", "ok", "no rules", "");
        assert_found(&site.run(1, &["-ip-masq", "doctor", "-json"]), "firewall", "ok", "works", "");
    }
}

#[test]
fn a_user_who_may_not_write_is_found_with_the_command_that_grants_it() {
    let cluster = Cluster::new(1, VXLAN);
    let keys = |kind| Permission::new(kind, "/coreos.com/network/").with_prefix();
    cluster
        .ask(async |client| {
            for user in ["root", "reader", "writer", "roleless"] {
                client.user_add(user, user, None).await.unwrap();
            }
            client.role_add("read").await.unwrap();
            client.role_grant_permission("read", keys(PermissionType::Read)).await.unwrap();
            client.role_add("write").await.unwrap();
            client.role_grant_permission("write", keys(PermissionType::Readwrite)).await.unwrap();
            for (user, role) in [("root", "root"), ("reader", "read"), ("writer", "write")] {
                client.user_grant_role(user, role).await.unwrap();
            }
            client.auth_enable().await.unwrap();
        })
        .unwrap();
    let report = |user: &str, password: &str| {
        let user = format!("-etcd-username={user}");
        let password = format!("-etcd-password={password}");
        cluster.run(1, &["doctor", "-json", "-etcd-allow-clear-text-credentials", &user, &password])
    };
    let grant = "etcdctl role grant-permission read readwrite --prefix=true /coreos.com/network/";
    let reader = report("reader", "reader");
    assert_eq!(reader.code, Some(1), "{reader:?}");
    assert_found(
        &reader,
        "permissions",
        "error",
        "etcd denies user reader writing a lease under /coreos.com/network/",
        grant,
    );
    assert_found(&reader, "store", "ok", "10.244.0.0/16", "");
    let roleless = report("roleless", "roleless");
    assert_found(&roleless, "permissions", "error", "user roleless", "etcdctl user get roleless");
    assert_found(&report("writer", "writer"), "permissions", "ok", "read and written", "");
    assert_found(&report("writer", "wrong"), "store", "error", "", "check user and password");
}

#[test]
fn a_change_of_any_field_of_the_configuration_is_named() {
    let site = Site::new(1, VXLAN);
    let agent = site.start(1, &[]).ready();
    let report = || site.run(1, &["doctor", "-json"]);
    assert_found(&report(), "configuration", "ok", "", "");
    fs::write(site.path("store/config.json"), VXLAN.replace("\"vxlan\"", "\"vxlan\",\"VNI\":7")).unwrap();
    assert_found(&report(), "configuration", "warning", "Backend.VNI: not set → 7", "systemctl restart flanneld");
    fs::write(site.path("store/config.json"), VXLAN.replace(":24", ":25")).unwrap();
    assert_found(&report(), "configuration", "note", "SubnetLen: 24 → 25", "");
    agent.end(Signal::SIGTERM);
}

#[test]
fn keys_and_variables_without_effect_are_named_and_a_missing_backend_is_not_blamed_on_the_operator() {
    let config = r#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan","DirectRoutng":true}}"#;
    let site = Site::new(1, config);
    let agent = site.start(1, &[]).ready();
    let warned = |line: &&str| line.contains("WARN") && line.contains("did you mean DirectRouting?");
    agent.until("warned", || agent.log().lines().filter(warned).count() == 1);
    agent.end(Signal::SIGTERM);
    let args = [site.args(1), owned(&["doctor", "-json"])].concat();
    let run = || command(&args).env("FLANNELD_ETCD_ENDPOINT", "http://10.0.0.1:2379").output().unwrap();
    let report: CommandOutput = site.ns(1).run(run).unwrap().into();
    assert_found(&report, "config keys", "warning", "$.Backend.DirectRoutng", "spelling");
    assert_found(&report, "environment", "warning", "did you mean FLANNELD_ETCD_ENDPOINTS?", "");
    assert_eq!(report.code, Some(0), "{report:?}");

    fs::write(site.path("store/config.json"), r#"{"Network":"10.244.0.0/16"}"#).unwrap();
    let report = site.run(1, &["doctor", "-json"]);
    let backend = of(&report, "backend");
    let found =
        |found: &Found| found.text.contains("no Backend") && found.fix.contains(r#""Backend": {"Type": "vxlan"}"#);
    assert!(backend.iter().any(found), "{backend:?}");
    assert!(!report.out.contains("not available here"), "{}", report.out);
}

#[test]
fn another_flannel_is_named_with_its_process() {
    let site = Site::new(1, VXLAN);
    let report = || site.run(1, &["doctor", "-json"]);
    assert_found(&report(), "processes", "ok", "no other flannel", "");
    // Not in memory: containers execute nothing there.
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("flanneld");
    copy_program("/bin/sleep", &program);
    let other = site.ns(1).run(|| Process::start(Command::new(&program).arg("600"), &site.path("other")).unwrap());
    let other = other.unwrap();
    let pid = format!("kill {}", other.id());
    assert_found(&report(), "processes", "warning", &program.display().to_string(), &pid);
    let agent = site.start(1, &[]).ready();
    assert_found(&report(), "processes", "error", "overwrite each other", &pid);
    drop(other);
    agent.until("alone", || of(&report(), "processes")[0].severity == "ok");
}

#[test]
fn an_agent_in_a_container_is_not_another_one() {
    let site = Site::new(1, VXLAN);
    let ours = command(&site.args(1));
    // Its process ID is 1 there.
    let mut inside = bare(Command::new("unshare"));
    inside.args(["--pid", "--fork", "--kill-child"]).arg(ours.get_program()).args(ours.get_args());
    let _agent = Agent::start_in(site.ns(1), &mut inside, site.path("log1")).ready();
    let report = site.run(1, &["doctor", "-json"]);
    assert_found(&report, "agent", "ok", "(pid 1)", "");
    assert_found(&report, "processes", "ok", "no other flannel", "");
}

#[test]
fn a_state_file_of_another_user_is_not_called_corrupt() {
    let cluster = Cluster::new(1, VXLAN);
    let agent = cluster.start(1, &[]).ready();
    let state = cluster.state_file(1);
    agent.until("kept", || state.exists());
    agent.end(Signal::SIGTERM);
    // Where the build and the site are, nobody may not be allowed to read.
    let dir = tempfile::tempdir().unwrap();
    let copy = dir.path().join("flanneld-copy");
    copy_program(BINARY, &copy);
    for path in [dir.path(), cluster.site.dir.path()] {
        fs::set_permissions(path, Permissions::from_mode(0o755)).unwrap();
    }
    let mut command = bare(Command::new(&copy));
    command.args(cluster.args(1)).args(["doctor", "-json"]).uid(NOBODY).gid(NOBODY).current_dir("/");
    let run = || command.stdin(Stdio::null()).output().unwrap();
    let report: CommandOutput = cluster.ns(1).run(run).unwrap().into();
    assert_found(&report, "state file", "note", "not readable by this user (uid 65534)", "sudo");
    let rights = of(&report, "directory");
    assert!(rights.iter().any(|found| found.severity == "error" && found.text.contains("uid 65534")), "{rights:?}");

    assert_found(&cluster.run(1, &["doctor", "-json"]), "state file", "ok", "written", "");
    fs::write(&state, "{").unwrap();
    let report = cluster.run(1, &["doctor", "-json"]);
    assert_found(&report, "state file", "warning", "corrupt", &format!("rm {}", state.display()));
}

#[test]
fn a_directory_of_another_user_is_found_though_root_could_write_there() {
    let site = Site::new(1, VXLAN);
    let store = site.path("store");
    std::os::unix::fs::chown(&store, Some(NOBODY), None).unwrap();
    let denied = |more: &[&str]| {
        let report = site.run(1, &[&["doctor", "-json"], more].concat());
        of(&report, "directory").into_iter().filter(|found| found.severity == "error").collect::<Vec<_>>()
    };
    let found = denied(&[]);
    assert!(found.len() == 1 && found[0].fix.contains(&format!("chown 0 {}", store.display())), "{found:?}");
    assert!(denied(&["-keep-capabilities"]).is_empty());
}

#[test]
fn doctor_leaves_everything_as_it_is() {
    let cluster = Cluster::new(1, VXLAN);
    let revision = || {
        let ask =
            async |client: &mut etcd_client::Client| client.get("x", None).await.unwrap().header().unwrap().revision();
        cluster.ask(ask).unwrap()
    };
    let before = revision();
    let report = cluster.run(1, &["doctor", "-json"]);
    assert_found(&report, "permissions", "ok", "", "");
    assert_eq!((revision(), cluster.records().len()), (before, 0));
    assert!(!cluster.state_file(1).exists() && !cluster.site.subnet_file(1).exists());
    let agent = Agent::start(cluster.ns(1), &cluster.args(1), cluster.site.path("log1"));
    agent.until_ready();
}
