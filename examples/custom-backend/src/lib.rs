//! A data plane of your own: pods' traffic over a second network, which another program sets up.
//!
//! Nodes find one another over the uplink, as always, but packets between pods leave by another device: a storage network, a
//! VLAN, a tunnel of another program. The network's configuration names it:
//!
//! ```json
//! {"Network":"10.5.0.0/16","Backend":{"Type":"lan","Interface":"eth1","Metric":50}}
//! ```
//!
//! `Interface` is the device's name on every node, and `Metric` the metric of the routes (default: the kernel's). A node
//! publishes its first address on the device in its lease, and routes each peer's subnet to the address that the peer
//! published.
//!
//! The device belongs to the other program. The overlay does not create, change or delete it. While it is away the peers are
//! skipped, and the status says why ([`Skip::NotReady`](flannelkit::spi::backend::Skip::NotReady)). A node cannot start without
//! it: it would have nothing to publish. An address that changes is published with the next start.
//!
//! ```no_run
//! # fn example(store: std::sync::Arc<dyn flannelkit::spi::subnet::SubnetManager>) -> Result<(), Box<dyn std::error::Error>> {
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
