//! A custom backend: pods' traffic over a second network, which another program sets up.
//!
//! Packets between pods use another device than the uplink: a storage network, a VLAN, a tunnel of another program. The
//! network configuration names the device:
//!
//! ```json
//! {"Network":"10.5.0.0/16","Backend":{"Type":"lan","Interface":"eth1","Metric":50}}
//! ```
//!
//! `Interface` is the device's name on every node, and `Metric` the metric of the routes (default: the kernel's). A
//! node publishes the device's first usable address in its lease, and routes each peer's subnet to the address in the
//! peer's lease.
//!
//! The other program owns the device: the overlay does not create, change or delete it. While the device is missing,
//! peers are skipped with [`Skip::NotReady`](flannelkit::spi::backend::Skip::NotReady). A node cannot start without the
//! device, whose address it publishes. A changed address is published at the next start.
//!
//! ```no_run
//! # use flannelkit::spi::subnet::SubnetManager;
//! # fn example(store: std::sync::Arc<dyn SubnetManager>) -> Result<(), Box<dyn std::error::Error>> {
//! use custom_backend::Lan;
//! use flannelkit::{NetlinkKernel, Overlay};
//!
//! let kernel = std::sync::Arc::new(NetlinkKernel::new()?);
//! let overlay = Overlay::builder().backend(Lan::TYPE, Lan::new).build(store, kernel)?;
//! # Ok(())
//! # }
//! ```

mod device;
mod lan;
mod published;

pub use lan::Lan;
