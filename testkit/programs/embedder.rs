//! An embedding program: ten overlays in one process, on one kernel. It depends on the crate `flannelkit` only.

use std::error::Error;
use std::sync::Arc;

use flannelkit::config::{Allocation, NetworkConfig};
use flannelkit::net::Family;
use flannelkit::spi::kernel::{LinkName, OverlayName};
use flannelkit::spi::subnet::{NodeIdentity, ThisNode};
use flannelkit::testing::MemorySubnets;
use flannelkit::uplink::Select;
use flannelkit::vxlan::Vxlan;
use flannelkit::{ConfigPolicy, End, Event, NetlinkKernel, Overlay, OverlayError, Phase, Running, Teardown};

const OVERLAYS: u8 = 10;

/// Returns the network of an overlay. Each has its own identifier and range.
fn network(nth: u8, second: u8) -> Result<NetworkConfig, Box<dyn Error>> {
    let json =
        format!(r#"{{"Network":"10.{second}.0.0/16","Backend":{{"Type":"vxlan","VNI":{}}}}}"#, 100 + u32::from(nth));
    Ok(NetworkConfig::parse(json.as_bytes(), Allocation::Pool)?)
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let kernel = Arc::new(NetlinkKernel::new()?);
    let (mut stores, mut overlays, mut running) = (Vec::new(), Vec::new(), Vec::new());
    for nth in 0..OVERLAYS {
        let store = MemorySubnets::new(network(nth, 100 + nth)?);
        let node = store.for_node(ThisNode::named(NodeIdentity::new("node")?));
        let overlay = Overlay::builder()
            .name(OverlayName::new(&format!("overlay-{nth}"))?)
            .on_reconfiguration(ConfigPolicy::Stop)
            .backend("vxlan", Vxlan::new)
            .build(Arc::new(node), kernel.clone())?;
        running.push(overlay.spawn()?);
        overlays.push(overlay);
        stores.push(store);
    }
    for each in &running {
        let status = each.ready().await?;
        println!("{}", serde_json::to_string(&*status)?);
    }

    // The uplink changes at run time.
    let handle = overlays[0].handle();
    let lease = handle.status().lease.clone();
    handle.set_uplink(Select::Name(LinkName::new("eth1")?))?;
    let status = handle.wait_for(|status| status.uplink.up().is_some_and(|up| up.name.as_str() == "eth1")).await?;
    assert_eq!(status.lease.as_ref().map(|lease| &lease.subnets), lease.as_ref().map(|lease| &lease.subnets));
    println!("uplink changed");

    // The network changes: this overlay ends and is run again.
    stores[1].set_config(network(1, 200)?);
    // The agent reads the store's configuration each time the store is available again.
    stores[1].outage();
    stores[1].recover();
    let mut second = running.remove(1);
    assert!(matches!(second.wait().await, Err(OverlayError::Reconfigured)));
    assert!(matches!(&overlays[1].handle().status().ended, Some(End::Failed(_))));
    let second = overlays[1].spawn()?;
    let subnet = second.ready().await?.lease.as_ref().and_then(|lease| lease.subnets.get(Family::V4).copied());
    println!("network changed: {}", subnet.ok_or("no subnet")?);

    // Ended as for an upgrade, and run again with the same handle and events.
    let third = running.remove(1);
    let (mut events, handle) = (third.handle().events(), third.handle().clone());
    third.shutdown(Teardown::Keep).await?;
    assert_eq!(handle.status().phase, Phase::Stopped);
    let third = overlays[2].spawn()?;
    handle.reached(Phase::Ready).await?;
    let mut kinds = Vec::new();
    while let Some(event) = events.next().await {
        kinds.push(event.kind());
        if event == Event::Ready {
            break;
        }
    }
    assert!(kinds.contains(&"stopped") && kinds.contains(&"lease_acquired"), "{kinds:?}");
    println!("run again");

    // Ended as for a node that leaves.
    let fourth: Running = running.remove(1);
    fourth.shutdown(Teardown::Remove).await?;
    println!("removed");
    drop((second, third, running));
    Ok(())
}
