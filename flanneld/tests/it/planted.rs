//! Files that another user has put where the agent looks for its own: in a directory that everybody may write, such as
//! /tmp.

use std::fs::{self, Permissions};
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use nix::sys::signal::Signal;
use testkit::Route;

use crate::harness::{Site, VXLAN, routes};
use crate::local_users::as_nobody;
use crate::store::Cluster;

/// A network that was never ours, and a route there as ours are.
const ANOTHERS: &str = "10.77.0.0/16";
const ROUTE: &str = "10.77.1.0/24";

/// Node 1 of a site, whose files are to be where everybody may write.
fn exposed(site: &Site) -> std::path::PathBuf {
    fs::set_permissions(site.dir.path(), Permissions::from_mode(0o755)).unwrap();
    let file = site.subnet_file(1);
    fs::set_permissions(file.parent().unwrap(), Permissions::from_mode(0o1777)).unwrap();
    let route = Route::to(ROUTE.parse().unwrap()).via([10, 89, 0, 1].into()).dev("eth0").protocol(201);
    site.ns(1).add_route(&route).unwrap();
    file
}

/// Has another user put something in a place.
fn plant(site: &Site, script: &str, place: &Path) {
    let script = script.replace("PLACE", &place.display().to_string());
    assert!(as_nobody(site.ns(1), &["sh", "-ec", &script]), "{script}");
}

#[test]
fn what_others_put_in_the_place_of_the_former_networks_is_neither_waited_for_nor_followed_nor_believed() {
    for script in [
        "mkfifo PLACE",
        "ln -s VICTIM PLACE",
        "truncate --size=1T PLACE",
        "umask 077; echo 10.77.0.0/16 >PLACE",
        "umask 022; echo 10.77.0.0/16 >PLACE",
        "mkdir PLACE",
    ] {
        let site = Site::new(1, VXLAN);
        let env = exposed(&site);
        let victim = site.path("victim");
        fs::write(&victim, format!("{ANOTHERS}\n")).unwrap();
        let networks = env.with_file_name(".subnet.env.networks");
        plant(&site, &script.replace("VICTIM", &victim.display().to_string()), &networks);
        let agent = site.start(1, &[]).ready();
        assert!(routes(site.ns(1)).contains(ROUTE), "{script}: {}", routes(site.ns(1)));
        agent.until(&format!("told of {script}"), || agent.log().contains("cannot read the former networks"));
        assert_eq!(fs::read_to_string(&victim).unwrap(), format!("{ANOTHERS}\n"), "{script}");
        assert_eq!(agent.end(Signal::SIGTERM).0, Some(0), "{script}");
    }
    // The same words in a file of ours are what such a route goes by.
    let site = Site::new(1, VXLAN);
    let env = exposed(&site);
    fs::write(env.with_file_name(".subnet.env.networks"), format!("{ANOTHERS}\n")).unwrap();
    let agent = site.start(1, &[]);
    agent.until("rid of what is left there", || !routes(site.ns(1)).contains(ROUTE));
}

#[test]
fn what_others_put_in_the_place_of_subnet_env_is_neither_waited_for_nor_believed_and_is_replaced() {
    for script in ["mkfifo PLACE", "umask 022; echo FLANNEL_NETWORK=10.77.0.0/16 >PLACE", "truncate --size=1T PLACE"] {
        let site = Site::new(1, VXLAN);
        let env = exposed(&site);
        plant(&site, script, &env);
        let agent = site.start(1, &[]).ready();
        assert!(routes(site.ns(1)).contains(ROUTE), "{script}: {}", routes(site.ns(1)));
        let found = fs::symlink_metadata(&env).unwrap();
        assert!(found.is_file() && found.uid() == 0, "{script}: {found:?}");
        assert!(fs::read_to_string(&env).unwrap().starts_with("FLANNEL_NETWORK=10.244.0.0/16\n"), "{script}");
        assert_eq!(agent.end(Signal::SIGTERM).0, Some(0), "{script}");
    }
}

#[test]
fn a_state_file_of_another_user_is_not_what_a_node_boots_from() {
    let mut cluster = Cluster::new(1, VXLAN);
    exposed(&cluster.site);
    let state = cluster.site.path("run1/state.json");
    let flag = format!("-state-file={}", state.display());
    let agent = cluster.start(1, &[&flag]).ready();
    assert_eq!(agent.end(Signal::SIGTERM).0, Some(0));
    let readable = cluster.site.path("readable");
    fs::rename(&state, &readable).unwrap();
    fs::set_permissions(&readable, Permissions::from_mode(0o644)).unwrap();
    plant(&cluster.site, &format!("umask 022; cat {} >PLACE", readable.display()), &state);
    cluster.ns(1).delete_link("flannel.1").unwrap();
    cluster.stop_etcd();
    let agent = cluster.start(1, &[&flag]);
    agent.until("told", || agent.log().contains("belongs to another user"));
    agent.until("waiting for etcd", || agent.log().contains("lease store unreachable"));
    assert!(cluster.ns(1).link("flannel.1").is_err() && !agent.is_ready());
    cluster.start_etcd();
    agent.until_ready();
}
