//! Runs the hub or a node. On one machine:
//!
//! ```text
//! custom-store hub 192.0.2.1:7000
//! curl -T network.json http://192.0.2.1:7000/v1/config
//! curl -N http://192.0.2.1:7000/v1/watch
//! ```
//!
//! On each node, as root, with the interface that connects it to the other nodes:
//!
//! ```text
//! custom-store node 192.0.2.1:7000 eth0
//! ```
//!
//! The node's name is its host name. Ctrl-C stops either; a node's kernel objects stay, and its next run adopts them.
#![expect(clippy::print_stdout, clippy::print_stderr, reason = "a program for a terminal")]

use std::error::Error;
use std::net::SocketAddr;
use std::process::ExitCode;
use std::sync::Arc;

use custom_store::{Hub, Server};
use flannelkit::spi::kernel::LinkName;
use flannelkit::spi::subnet::NodeIdentity;
use flannelkit::uplink::Select;
use flannelkit::vxlan::Vxlan;
use flannelkit::{Handle, NetlinkKernel, Overlay, Teardown};
use tokio::net::TcpListener;
use tokio::signal::ctrl_c;

const USAGE: &str = "usage: custom-store hub IP:PORT\n       custom-store node IP:PORT INTERFACE";
const HOST_NAME: &str = "/proc/sys/kernel/hostname";

#[tokio::main]
async fn main() -> ExitCode {
    let args: Vec<String> = std::env::args_os().skip(1).map(|arg| arg.to_string_lossy().into_owned()).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let ran = match (args.as_slice(), args.get(1).map(|addr| addr.parse())) {
        (["hub", _], Some(Ok(addr))) => hub(addr).await,
        (["node", _, interface], Some(Ok(addr))) => node(addr, interface).await,
        _ => {
            eprintln!("{USAGE}");
            return ExitCode::from(2);
        }
    };
    match ran {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{}", flannelkit::spi::text::chain(&*error));
            ExitCode::FAILURE
        }
    }
}

async fn hub(addr: SocketAddr) -> Result<(), Box<dyn Error>> {
    let listener = TcpListener::bind(addr).await.map_err(|error| format!("cannot listen on {addr}: {error}"))?;
    let server = Server::default();
    println!("hub at http://{}/v1/", listener.local_addr()?);
    tokio::select! {
        ended = ctrl_c() => Ok(ended?),
        never = server.serve(listener) => match never {},
    }
}

async fn node(addr: SocketAddr, interface: &str) -> Result<(), Box<dyn Error>> {
    let name = std::fs::read_to_string(HOST_NAME).map_err(|error| format!("cannot read {HOST_NAME}: {error}"))?;
    let hub = Hub::new(addr, NodeIdentity::new(name.trim())?);
    let overlay = Overlay::builder()
        .backend("vxlan", Vxlan::new)
        .uplink(Select::Name(LinkName::new(interface)?))
        // A peer's subnet that covers the hub's address would cut off the node.
        .store_addresses(vec![addr.ip()])
        .build(Arc::new(hub), Arc::new(NetlinkKernel::new()?))?;
    let mut running = overlay.spawn()?;
    let told = tokio::spawn(tell(running.handle().clone()));
    tokio::select! {
        ended = ctrl_c() => ended?,
        ended = running.wait() => return Ok(ended?),
    }
    running.shutdown(Teardown::Keep).await?;
    Ok(told.await?)
}

/// Prints the subnets once pods can be attached.
async fn tell(handle: Handle) {
    // If the run ends first, `main` prints the error.
    let Ok(status) = handle.wait_for(|status| status.is_ready()).await else { return };
    let subnets = status.lease.iter().flat_map(|lease| lease.subnets.iter());
    let subnets: Vec<_> = subnets.map(|(_, subnet)| subnet.to_string()).collect();
    println!("ready, with pods in {}", subnets.join(" and "));
}
