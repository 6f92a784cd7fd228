//! An overlay inside your own program, with an in-memory store and a custom printer for events.
//!
//! It creates its device where it runs and deletes it again. To try it without root, use a new namespace:
//!
//! ```text
//! cargo build -p embed
//! unshare -Urn sh -c 'ip link add eth0 type veth peer name eth1; ip address add 192.0.2.1/24 dev eth0
//!   ip link set eth0 up; ip link set eth1 up; ip route add default via 192.0.2.2; target/debug/embed'
//! ```
#![expect(clippy::print_stdout, reason = "to print is what the example is about")]

use std::{error::Error, sync::Arc};

use flannelkit::config::{Allocation, NetworkConfig};
use flannelkit::spi::subnet::{NodeIdentity, ThisNode};
use flannelkit::testing::MemorySubnets;
use flannelkit::vxlan::Vxlan;
use flannelkit::{Event, Events, NetlinkKernel, Overlay, Teardown};

const NETWORK: &[u8] = br#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let store = MemorySubnets::new(NetworkConfig::parse(NETWORK, Allocation::Pool)?);
    let store = store.for_node(ThisNode::named(NodeIdentity::new("my-node")?));
    let overlay =
        Overlay::builder().backend("vxlan", Vxlan::new).build(Arc::new(store), Arc::new(NetlinkKernel::new()?))?;
    let events = overlay.handle().events();
    let printer = tokio::spawn(print(events));
    let running = overlay.spawn()?;
    let status = running.ready().await?;
    println!("ready by {:?}", status.uplink);
    // Your program's own work goes here; this example ends. For a restart use `Teardown::Keep`; the overlay may be
    // spawned again.
    running.shutdown(Teardown::Remove).await?;
    Ok(printer.await?)
}

/// Prints the events of one run. A slow reader misses some; the status still shows their effects.
async fn print(mut events: Events) {
    while let Some(event) = events.next().await {
        match &event {
            Event::LeaseAcquired(lease) => lease.subnets.iter().for_each(|(_, subnet)| println!("pods here: {subnet}")),
            Event::Stopped(end) => return println!("Stopped: {end}"),
            other => println!("{other:?}"),
        }
    }
}
