//! The whole lab works for somebody without privileges. Without a harness: see [`testkit::userns::enter`].
#![expect(clippy::print_stdout, reason = "there is no harness to say what was tested")]

use std::error::Error;
use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::Duration;

use flannel_core::net::{Dual, Family, MacAddr, Mtu, Prefix};
use testkit::canary::{Canaries, Place, Where};
use testkit::sabotage::{Act, Overlay, Plane};
use testkit::{Families, Fdb, Neighbour, Node, PodNet, Route, Underlay, VxlanLink, probe, userns};

const NOBODY: u32 = 65534;
const DEV: &str = "flannel.1";

fn main() -> Result<(), Box<dyn Error>> {
    if nix::unistd::geteuid().is_root() {
        as_nobody()?;
    }
    userns::enter()?;
    build_and_hurt()?;
    println!(
        "the lab works for uid {}",
        fs::read_to_string("/proc/self/uid_map")?.split_whitespace().nth(1).unwrap_or("?")
    );
    Ok(())
}

/// Runs this same test again, as a user who can do nothing.
fn as_nobody() -> Result<(), Box<dyn Error>> {
    // Where the build is, nobody may not be allowed to read.
    let dir = tempfile::tempdir()?;
    fs::set_permissions(dir.path(), Permissions::from_mode(0o755))?;
    let copy = dir.path().join("userns");
    fs::copy(std::env::current_exe()?, &copy)?;
    fs::set_permissions(&copy, Permissions::from_mode(0o755))?;
    let run = Command::new(&copy).uid(NOBODY).gid(NOBODY).current_dir("/").status();
    match run {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("as nobody: {status}").into()),
        // Root of a user namespace of one user: it is somebody without privileges who runs this.
        Err(error) if error.raw_os_error() == Some(nix::errno::Errno::EINVAL as i32) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

fn build_and_hurt() -> Result<(), Box<dyn Error>> {
    let underlay = Underlay::new(2, Families::Dual)?;
    let [one, two] = underlay.nodes() else { return Err("two nodes".into()) };
    join(one, 1, two, 2)?;
    join(two, 2, one, 1)?;
    let net =
        |nth| Ok::<_, Box<dyn Error>>(PodNet { subnets: Dual { v4: Some(subnet(nth)?), v6: None }, mtu: Mtu(1450) });
    let (here, there) = (one.attach_pod(&net(1)?)?, two.attach_pod(&net(2)?)?);
    probe::until_reply(&here.ns, there.addr(Family::V4)?, Duration::from_secs(5))?;
    let carried = probe::throughput(&here.ns, &there.ns, there.addr(Family::V4)?, Duration::from_millis(200))?;
    println!("one TCP stream, pod to pod over vxlan: {:.1} Gbit/s", carried.gbit_per_second());

    let overlay =
        Overlay { devices: vec![DEV.to_owned()], networks: Dual { v4: Some("10.244.0.0/16".parse()?), v6: None } };
    let canaries = Canaries::place(one, &Where { places: &[Place::Apart], overlay: &overlay, peers: &[subnet(2)?] })?;
    let before = canaries.snapshot()?;
    for act in Act::all(Plane::Vxlan) {
        act.apply(one, &overlay)?;
        if one.ns.link(DEV).is_ok() {
            one.ns.delete_link(DEV)?;
        } else if one.ns.link("xflannel.1").is_ok() {
            one.ns.delete_link("xflannel.1")?;
        }
        join(one, 1, two, 2)?;
        probe::until_reply(&here.ns, there.addr(Family::V4)?, Duration::from_secs(5))?;
    }
    let changes = canaries.snapshot()?.changes_since(&before);
    if changes.is_empty() { Ok(()) } else { Err(format!("{changes:?}").into()) }
}

fn subnet(nth: u8) -> Result<Prefix, Box<dyn Error>> {
    Ok(format!("10.244.{nth}.0/24").parse()?)
}

fn mac(nth: u8) -> MacAddr {
    MacAddr([2, 0, 0, 0, 0, nth])
}

/// What an agent does.
fn join(node: &Node, nth: u8, peer: &Node, peer_nth: u8) -> Result<(), Box<dyn Error>> {
    let ns = &node.ns;
    let vxlan = VxlanLink { vni: 1, local: node.v4().ok(), lower: Some("eth0".to_owned()), ..VxlanLink::default() };
    ns.add_vxlan(DEV, &vxlan, None)?;
    ns.set_mac(DEV, mac(nth))?;
    ns.add_address(DEV, subnet(nth)?.addr(), 32)?;
    ns.set_up(DEV)?;
    let to = subnet(peer_nth)?;
    ns.put_fdb(&[Fdb::permanent(DEV, mac(peer_nth), peer.v4()?)])?;
    ns.put_neighbours(&[Neighbour::permanent(DEV, to.addr(), mac(peer_nth))])?;
    Ok(ns.add_route(&Route::to(to).via(to.addr()).dev(DEV).onlink().protocol(213))?)
}
