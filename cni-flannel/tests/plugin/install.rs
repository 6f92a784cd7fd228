//! `flannel install`.

use std::fs;
use std::process::{Command, Output};

use crate::lab::{PLUGIN, Place, SUBNET_ENV};

fn install(place: &Place, more: &[&str]) -> Command {
    let mut command = Command::new(PLUGIN);
    command.env_remove("CNI_COMMAND").arg("install");
    for (option, name) in [("--bin-dir", "opt"), ("--conf-dir", "net.d"), ("--subnet-file", "subnet.env")] {
        command.arg(option).arg(place.path(name));
    }
    command.args(more);
    command
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn the_configuration_comes_after_the_subnet() {
    let place = Place::new();
    fs::remove_file(place.path("subnet.env")).unwrap();
    let refused = install(&place, &["--wait", "0"]).output().unwrap();
    assert!(!refused.status.success() && text(&refused).contains("subnet.env does not exist"), "{refused:?}");
    assert!(place.path("opt/flannel").exists() && !place.path("net.d/10-flannel.conflist").exists());
    place.write("subnet.env", SUBNET_ENV);
    let installed = install(&place, &["--wait", "0"]).output().unwrap();
    assert!(installed.status.success(), "{installed:?}");
    assert!(text(&installed).contains("10-flannel.conflist written"), "{installed:?}");
    assert_eq!(fs::read(place.path("opt/flannel")).unwrap(), fs::read(PLUGIN).unwrap());
    let again = install(&place, &["--wait", "0"]).output().unwrap();
    assert_eq!(text(&again).matches("is up to date").count(), 2, "{again:?}");
}

#[test]
fn an_invalid_configuration_changes_nothing() {
    let place = Place::new();
    place.write("conf", "{}");
    let conf = place.path("conf").display().to_string();
    let refused = install(&place, &["--conf", &conf]).output().unwrap();
    assert!(!refused.status.success() && text(&refused).contains("no `name`"), "{refused:?}");
    assert!(!place.path("opt").exists() && !place.path("net.d").exists());
    let usage = install(&place, &["--other"]).output().unwrap();
    assert_eq!(usage.status.code(), Some(2), "{usage:?}");
}
