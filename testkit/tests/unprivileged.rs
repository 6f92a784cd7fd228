//! Without the right to write, an agent says so and ends. Without a harness: privileges are given up before there is a
//! second thread.
#![expect(clippy::print_stdout, reason = "there is no harness to say what was tested")]

use std::error::Error;
use std::os::fd::AsFd;
use std::process::Command;
use std::sync::Arc;
use std::time::Duration;

use flannel_backend_hostgw::HostGw;
use flannel_backend_vxlan::Vxlan;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::kernel::KernelError;
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{Overlay, OverlayError};
use flannel_core::subnet::{NodeIdentity, ThisNode};
use flannel_core::testing::MemorySubnets;
use nix::sched::{CloneFlags, unshare};
use testkit::{Agent, Families, Underlay, userns};

fn main() -> Result<(), Box<dyn Error>> {
    userns::enter()?;
    let underlay = Underlay::new(1, Families::V4)?;
    let ns = &underlay.nodes()[0].ns;
    ns.enter()?;
    // Whoever is in another user namespace has no rights here.
    unshare(CloneFlags::CLONE_NEWUSER)?;
    let before = links()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for (backend, what) in [("vxlan", "network devices"), ("host-gw", "routes")] {
        let config = format!(r#"{{"Network":"10.244.0.0/16","Backend":{{"Type":"{backend}"}}}}"#);
        let store = MemorySubnets::new(NetworkConfig::parse(config.as_bytes(), Allocation::Pool)?);
        let overlay = Overlay::builder().backend("vxlan", Vxlan::new).backend("host-gw", |_| Ok(HostGw)).build(
            Arc::new(store.for_node(ThisNode::named(NodeIdentity::new("node-1")?))),
            Arc::new(NetlinkKernel::new()?),
        )?;
        match runtime.block_on(async { Agent::start(overlay, Duration::from_secs(10)).ended().await }) {
            Err(OverlayError::Kernel(KernelError::Denied { doing, hint }))
                if doing.contains(what) && hint.contains("CAP_NET_ADMIN") =>
            {
                println!("{backend}: no permission for {doing}: {hint}");
            }
            other => return Err(format!("{backend}: {other:?}").into()),
        }
        assert_eq!(store.records(), [], "{backend}: a lease was taken in vain");
    }
    match NetlinkKernel::in_namespace(ns.as_fd().try_clone_to_owned()?) {
        Err(KernelError::Denied { hint, .. }) if hint.contains("CAP_SYS_ADMIN") => {}
        other => return Err(format!("entering a namespace: {other:?}").into()),
    }
    assert_eq!(links()?, before);
    Ok(())
}

/// The links of this thread's namespace, which it has no right to enter once more.
fn links() -> Result<String, Box<dyn Error>> {
    let listed = Command::new("ip").args(["-details", "address"]).output()?;
    assert!(listed.status.success(), "{listed:?}");
    Ok(String::from_utf8(listed.stdout)?)
}
