//! An overlay inside your own program: a store in memory, and a printer of your own for what happens.
//!
//! It makes its device where it runs, and takes it away again. To try it without root, give it a place of its own:
//!
//! ```text
//! cargo build -p embed
//! unshare -Urn sh -c 'ip link add eth0 type bridge; ip address add 192.0.2.1/24 dev eth0
//!   ip link set eth0 up; ip route add default via 192.0.2.2; target/debug/embed'
//! ```
#![expect(clippy::print_stdout, reason = "to print is what the example is about")]

use std::{error::Error, sync::Arc};

use flannel_backend_vxlan::Vxlan;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{Event, Overlay, Phase, Teardown};
use flannel_core::subnet::{NodeIdentity, ThisNode};
use flannel_core::testing::MemorySubnets;
use tokio_util::sync::CancellationToken;

const NETWORK: &[u8] = br#"{"Network":"10.5.0.0/16","Backend":{"Type":"vxlan"}}"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let store = MemorySubnets::new(NetworkConfig::parse(NETWORK, Allocation::Pool)?);
    let store = store.for_node(ThisNode::named(NodeIdentity::new("my-node")?));
    let overlay = Overlay::builder()
        .backend("vxlan", Vxlan::new)
        .teardown(Teardown::Remove)
        .build(Arc::new(store), Arc::new(NetlinkKernel::new()?))?;
    let (cancel, handle) = (CancellationToken::new(), overlay.handle());
    let mut events = handle.events();
    let agent = tokio::spawn(overlay.run(cancel.clone()));
    while let Some(event) = events.next().await {
        match &event {
            Event::LeaseAcquired(lease) => lease.subnets.iter().for_each(|(_, subnet)| println!("pods here: {subnet}")),
            other => println!("{other:?}"),
        }
        // Here your program would do its own work; this one has seen enough. It goes by the status: a reader that is slow
        // misses events.
        if handle.status().phase == Phase::Ready {
            cancel.cancel();
        }
    }
    Ok(agent.await??)
}
