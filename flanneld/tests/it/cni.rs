//! The CNI plug-in and its configuration, installed by the agent.

use std::fs;

use nix::sys::signal::Signal;

use crate::harness::{Site, VXLAN, read};

#[test]
fn plugin_and_configuration_are_installed_kept_and_removed() {
    let site = Site::new(1, VXLAN);
    let config = fs::read(site.path("store/config.json")).unwrap();
    fs::remove_file(site.path("store/config.json")).unwrap();
    fs::write(site.path("plugin"), "the plug-in").unwrap();
    ["bin", "net.d"].iter().for_each(|name| fs::create_dir(site.path(name)).unwrap());
    let flag = |name: &str, place: &str| format!("-{name}={}", site.path(place).display());
    let flags = [flag("cni-bin-dir", "bin"), flag("cni-plugin", "plugin"), flag("cni-conf-dir", "net.d")];
    let flags = flags.each_ref().map(String::as_str);
    let conflist = site.path("net.d/10-flannel.conflist");

    let agent = site.start(1, &flags);
    agent.until("installed", || read(&site.path("bin/flannel")) == "the plug-in");
    assert!(!conflist.exists(), "no pod can be attached yet");
    fs::write(site.path("store/config.json"), config).unwrap();
    let agent = agent.ready();
    agent.until("told the runtime", || read(&conflist).contains("\"type\": \"flannel\""));
    assert!(site.subnet_file(1).exists(), "{}", agent.log());

    fs::remove_file(&conflist).unwrap();
    agent.until("put back", || conflist.exists());
    agent.end(Signal::SIGTERM);
    assert!(conflist.exists(), "the pods stay, and so does their network");
    // Without its source a configuration cannot be recognized. Everything else is removed nevertheless.
    let missing = [vec!["cleanup", "-cni-conf=/nowhere"], flags.to_vec()].concat();
    let cleaned = site.run(1, &missing);
    assert_eq!(cleaned.code, Some(0), "{cleaned:?}");
    let left = format!("not removed, may belong to another program: rm {}\n", conflist.display());
    assert!(cleaned.out.contains(&left) && cleaned.out.contains("removed: link delete flannel.1"), "{cleaned:?}");
    assert!(conflist.exists() && !site.tool(1, &["iptables", "-S"]).out.contains("FLANNEL"));
    let arguments = [vec!["cleanup"], flags.to_vec()].concat();
    let cleaned = site.run(1, &arguments);
    assert!(cleaned.out.contains("net.d/10-flannel.conflist\n"), "{cleaned:?}");
    assert!(!conflist.exists() && site.path("bin/flannel").exists());
}
