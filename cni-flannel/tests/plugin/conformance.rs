//! The CNI specification's rules, with another plug-in that is a script.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::lab::{PLUGIN, Place, SUBNET_ENV, answer};

#[test]
fn versions_are_told_whatever_is_asked_with() {
    let place = Place::new();
    for (stdin, version) in [("", "1.1.0"), ("{}", "1.1.0"), (r#"{"cniVersion":"0.4.0"}"#, "0.4.0")] {
        let answer = place.call("VERSION").unset("CNI_PATH").stdin(stdin).make().ok().json();
        assert_eq!(answer["cniVersion"], version);
        let supported = answer["supportedVersions"].as_array().unwrap();
        assert!(supported.contains(&json!("0.3.1")) && supported.contains(&json!("1.1.0")), "{answer}");
    }
}

#[test]
fn add_passes_environment_and_result_on_and_stores_what_it_asked() {
    let place = Place::new();
    let added = place.call("ADD").set("CNI_ARGS", "K=V").make().ok();
    assert_eq!(added.stdout, "{\"cniVersion\":\"1.0.0\",\"ips\":[]}\n");
    for line in ["CNI_COMMAND=ADD", "CNI_CONTAINERID=c1", "CNI_IFNAME=eth0", "CNI_ARGS=K=V"] {
        assert!(place.read("called").lines().any(|found| found == line), "{line}: {}", place.read("called"));
    }
    let asked = r#"{"cniVersion":"1.1.0","ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"mtu":1450,"name":"cbr0","type":"script"}"#;
    assert_eq!((place.read("stdin").as_str(), place.read("data/c1").as_str()), (asked, asked));
    assert_eq!(fs::metadata(place.path("data/c1")).unwrap().permissions().mode() & 0o777, 0o600);

    // The subnet that was attached is the one that is detached.
    place.write("subnet.env", &SUBNET_ENV.replace("17.1", "18.1"));
    place.call("DEL").make().ok();
    assert_eq!(place.read("stdin"), asked);
    assert!(place.stored().is_empty(), "{:?}", place.stored());
    place.call("DEL").make().ok();
    assert_eq!(place.read("called").matches("CNI_COMMAND=DEL").count(), 1, "the second time there was nothing to do");
}

#[test]
fn del_needs_neither_the_agent_nor_a_whole_file() {
    let place = Place::new();
    place.call("ADD").make().ok();
    fs::remove_file(place.path("subnet.env")).unwrap();
    place.call("DEL").set("CNI_NETNS", "").make().ok();
    assert!(place.stored().is_empty());
    // Another plug-in may have written half of it: it is made anew from the agent's file, which has to be there.
    place.write("data/c1", "{\"type\":");
    assert_eq!(place.call("DEL").make().code(), 11);
    assert_eq!(place.stored(), ["c1"]);
    place.write("subnet.env", SUBNET_ENV);
    place.call("DEL").make().ok();
    assert!(place.stored().is_empty() && place.read("stdin").contains("10.1.17.0/24"));
}

#[test]
fn the_other_plugins_error_is_passed_on_and_a_del_can_be_repeated() {
    let place = Place::new();
    place.write("error", r#"{"cniVersion":"1.0.0","code":11,"msg":"no address","details":"d"}"#);
    let failed = place.call("ADD").make();
    assert_eq!((failed.code(), failed.json()["msg"].as_str()), (11, Some("no address")));
    assert_eq!(place.stored(), ["c1"], "DEL has to find what ADD may have left");
    assert_eq!(place.call("DEL").make().code(), 11);
    assert_eq!(place.stored(), ["c1"]);
    fs::remove_file(place.path("error")).unwrap();
    place.call("DEL").make().ok();
    assert!(place.stored().is_empty());
    // What is no error in JSON.
    place.write("error", "\u{1b}[2Jsegmentation fault");
    let failed = place.call("ADD").make();
    assert_eq!(failed.code(), 999);
    assert!(failed.json()["details"].as_str().unwrap().contains("\\u{1b}[2Jsegmentation fault"), "{failed:?}");
}

#[test]
fn add_waits_for_the_agent_and_says_in_the_end_what_is_missing() {
    let place = Place::new();
    fs::remove_file(place.path("subnet.env")).unwrap();
    let waiting = place.call("ADD").start();
    // Half of it is none.
    place.write("subnet.env", "FLANNEL_MTU=1450\n");
    let hurried = place.call("ADD").stdin(place.conf("1.1.0", r#","waitForAgent":0"#)).make();
    assert_eq!(hurried.code(), 11);
    let details = hurried.json()["details"].as_str().unwrap().to_owned();
    assert!(details.contains("FLANNEL_SUBNET") && details.contains("check that flanneld runs"), "{details}");
    place.write("subnet.env", SUBNET_ENV);
    answer(waiting).ok();
    fs::remove_file(place.path("subnet.env")).unwrap();
    let started = Instant::now();
    let failed =
        place.call("ADD").set("CNI_CONTAINERID", "c2").stdin(place.conf("1.0.0", r#","waitForAgent":1"#)).make();
    assert_eq!((failed.code(), failed.json()["cniVersion"].as_str()), (11, Some("1.0.0")));
    assert!(started.elapsed() >= Duration::from_secs(1), "it did not wait");
    assert_eq!(place.stored(), ["c1"], "nothing was stored for c2");
}

#[test]
fn status_says_whether_pods_can_be_attached() {
    let place = Place::new();
    place.call("STATUS").make().ok();
    assert!(place.read("called").contains("CNI_COMMAND=STATUS"), "the other plug-in is asked, too");
    place.write("error", r#"{"cniVersion":"1.1.0","code":51,"msg":"m"}"#);
    assert_eq!(place.call("STATUS").make().code(), 51);
    fs::remove_file(place.path("subnet.env")).unwrap();
    assert_eq!(place.call("STATUS").make().code(), 50);
}

#[test]
fn check_asks_the_other_plugin_with_the_result() {
    let place = Place::new();
    let conf = place.conf("1.0.0", r#","prevResult":{"ips":[{"address":"10.1.17.2/24"}]}"#);
    assert_eq!(place.call("CHECK").stdin(&conf).make().code(), 100, "it was not attached");
    place.call("ADD").stdin(place.conf("1.0.0", "")).make().ok();
    place.call("CHECK").stdin(&conf).make().ok();
    let asked: serde_json::Value = serde_json::from_str(&place.read("stdin")).unwrap();
    assert_eq!(asked["prevResult"]["ips"][0]["address"], "10.1.17.2/24");
    place.write("error", r#"{"code":100,"msg":"no such link","cniVersion":"1.0.0"}"#);
    assert_eq!(place.call("CHECK").stdin(&conf).make().code(), 100);
}

#[test]
fn gc_removes_what_is_left_of_this_networks_containers_that_are_gone() {
    let place = Place::new();
    for (container, ifname) in [("c1", "eth0"), ("c2", "eth0"), ("c3", "net1")] {
        place.call("ADD").set("CNI_CONTAINERID", container).set("CNI_IFNAME", ifname).make().ok();
    }
    let other = place.conf("1.1.0", "").replace("cbr0", "other");
    place.call("ADD").set("CNI_CONTAINERID", "c4").stdin(other).make().ok();
    fs::remove_file(place.path("called")).unwrap();
    let valid = place.conf("1.1.0", r#","cni.dev/valid-attachments":[{"containerID":"c2","ifname":"eth0"}]"#);
    place.call("GC").unset("CNI_CONTAINERID").unset("CNI_IFNAME").stdin(valid).make().ok();
    assert_eq!(place.stored(), ["c2", "c4"]);
    let called = place.read("called");
    for call in [
        "CNI_COMMAND=DEL\nCNI_CONTAINERID=c1\nCNI_IFNAME=eth0",
        "CNI_COMMAND=DEL\nCNI_CONTAINERID=c3\nCNI_IFNAME=net1",
        "CNI_COMMAND=GC",
    ] {
        assert!(called.contains(call), "{call}: {called}");
    }
    assert!(place.read("stdin").contains(r#""cni.dev/valid-attachments":[{"containerID":"c2","ifname":"eth0"}]"#));

    // Without the list nobody is gone; with an empty one, as Go writes it, everybody is. The agent is not needed.
    let gc = |more: &str| place.call("GC").stdin(place.conf("1.1.0", more)).make();
    assert_eq!((gc("").code(), place.stored().len()), (7, 2));
    place.write("error", r#"{"cniVersion":"1.1.0","code":100,"msg":"m"}"#);
    let empty = r#","cni.dev/valid-attachments":null"#;
    assert_eq!((gc(empty).code(), place.stored().len()), (100, 2), "a GC that fails forgets nothing");
    fs::remove_file(place.path("error")).unwrap();
    fs::remove_file(place.path("subnet.env")).unwrap();
    gc(empty).ok();
    assert_eq!(place.stored(), ["c4"], "another network's");
}

#[test]
fn commands_that_a_version_does_not_have_are_refused() {
    let place = Place::new();
    for (command, version, right) in
        [("CHECK", "0.3.1", "0.4.0"), ("STATUS", "1.0.0", "1.1.0"), ("GC", "1.0.0", "1.1.0")]
    {
        let refused = place.call(command).stdin(place.conf(version, "")).make();
        assert_eq!(refused.code(), 1);
        assert!(refused.json()["details"].as_str().unwrap().contains(right), "{refused:?}");
    }
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        place.call("ADD").stdin(place.conf(version, "")).make().ok();
        place.call("DEL").stdin(place.conf(version, "")).make().ok();
    }
}

#[test]
fn bad_input_has_the_specifications_codes_and_leaves_nothing() {
    let place = Place::new();
    let conf = |from: &str, to: &str| place.conf("1.1.0", "").replace(from, to);
    let nested = "[".repeat(100_000);
    let large = format!("{{\"name\":\"{}\"}}", "x".repeat(2 << 20));
    let cases = [
        (place.call("ADD").stdin(""), 6),
        (place.call("ADD").stdin("{"), 6),
        (place.call("ADD").stdin(nested), 6),
        (place.call("ADD").stdin(large), 5),
        (place.call("ADD").stdin(conf("1.1.0", "7.0.0")), 1),
        (place.call("ADD").stdin(conf("cbr0", "")), 7),
        (place.call("ADD").stdin(conf("script", "../script")), 7),
        (place.call("ADD").stdin(conf("script", "flannel")), 7),
        (place.call("ADD").stdin(conf("script", "missing")), 7),
        (place.call("ADD").stdin(place.conf("1.1.0", r#","ipam":[]"#)), 7),
        (place.call("ADD").stdin(place.conf("1.1.0", r#","waitForAgent":-1"#)), 7),
        (place.call("ADD").unset("CNI_NETNS"), 4),
        (place.call("ADD").unset("CNI_PATH"), 4),
        (place.call("ADD").set("CNI_CONTAINERID", "../../x"), 4),
        (place.call("ADD").set("CNI_IFNAME", "a/b"), 4),
        (place.call("FORMAT"), 4),
        (place.call("GC").stdin(place.conf("1.1.0", r#","cni.dev/valid-attachments":3"#)), 7),
    ];
    for (nth, (call, code)) in cases.iter().enumerate() {
        let refused = call.make();
        assert_eq!(refused.code(), *code, "case {nth}: {refused:?}");
        assert_eq!(refused.stderr, "", "case {nth}");
    }
    // The missing plug-in was looked for after the entry was made, as for one that fails.
    place.call("DEL").make();
    assert!(place.read("called").is_empty(), "{}", place.read("called"));
}

#[test]
fn what_another_plugin_prints_is_bounded() {
    let place = Place::new();
    place.add_plugin("script", "#!/bin/sh\ncat >/dev/null; head -c 3000000 /dev/zero | tr '\\0' x; exit 1\n");
    let failed = place.call("ADD").make();
    assert_eq!(failed.code(), 999);
    assert!(failed.stdout.len() < 1000, "{}", failed.stdout.len());
    place.add_plugin("script", "#!/bin/sh\ncat >/dev/null; head -c 3000000 /dev/zero | tr '\\0' ' '\n");
    assert_eq!(place.call("ADD").make().code(), 999, "half a result is none");
}

#[test]
fn a_stored_configuration_without_end_is_an_error() {
    let place = Place::new();
    place.call("ADD").make().ok();
    place.write("data/c1", &"x".repeat(2 << 20));
    assert_eq!(place.call("DEL").make().code(), 5);
}

#[test]
fn a_full_disk_leaves_nothing() {
    let place = Place::new();
    fs::create_dir(place.path("data")).unwrap();
    let conf = place.conf("1.1.0", &format!(r#","ipam":{{"x":"{}"}}"#, "x".repeat(64 << 10)));
    let script = format!(
        "mount -t tmpfs -o size=16k none {data} && {PLUGIN}; code=$?; ls -A {data} >&2; exit $code",
        data = place.path("data").display()
    );
    let refused = place.call("ADD").stdin(conf).under(&["unshare", "-m", "sh", "-c", &script]).make();
    assert_eq!(refused.code(), 5);
    assert_eq!((refused.stderr.as_str(), place.read("called").as_str()), ("", ""));
}

#[test]
fn a_pod_is_detached_on_a_full_disk() {
    let place = Place::new();
    place.call("ADD").make().ok();
    let script = format!(
        "mount -t tmpfs -o size=64k,nr_inodes=2 none {data} && echo '{stored}' >{data}/c1 && {PLUGIN}; code=$?; ls -A {data} >&2; exit $code",
        stored = place.read("data/c1"),
        data = place.path("data").display()
    );
    let detached = place.call("DEL").under(&["unshare", "-m", "sh", "-c", &script]).make().ok();
    assert_eq!(detached.stderr, "", "nothing is left");
    assert!(place.read("called").contains("CNI_COMMAND=DEL"));
}

#[test]
fn plug_ins_are_looked_for_in_absolute_directories_alone() {
    let place = Place::new();
    let path = format!(":bin:{}", place.path("bin").display());
    place.call("ADD").set("CNI_PATH", &path).make().ok();
    assert_eq!(
        place
            .call("ADD")
            .set("CNI_PATH", ":bin:.")
            .stdin(place.conf("1.1.0", "").replace("script", "true"))
            .make()
            .code(),
        7
    );
}

#[test]
fn calls_for_one_container_do_not_meet_and_those_for_others_do_not_wait() {
    let place = Place::new();
    fs::write(place.path("slow"), "").unwrap();
    let calls: Vec<_> = (0..3).flat_map(|_| ["ADD", "DEL"]).map(|command| place.call(command).start()).collect();
    for call in calls {
        answer(call).ok();
    }
    place.call("DEL").make().ok();
    assert!(place.stored().is_empty(), "{:?}", place.stored());
    // One whose runtime has killed it: the plug-in that it ran goes on, and has the container to itself.
    let adds = place.read("called").matches("CNI_COMMAND=ADD").count();
    let mut killed = place.call("ADD").start();
    let is_called = || Ok::<_, testkit::Error>(place.read("called").matches("CNI_COMMAND=ADD").count() > adds);
    testkit::wait_until("called", Duration::from_secs(10), is_called).unwrap();
    killed.kill().unwrap();
    killed.wait().unwrap();
    place.call("DEL").make().ok();
    assert!(place.stored().is_empty(), "{:?}", place.stored());
}
