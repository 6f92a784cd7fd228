//! A lease store of your own: a hub that keeps the leases of a fleet in memory, and nodes that reach it over HTTP.
//!
//! ```text
//! GET  PUT         /v1/config          the network's configuration, flannel's document
//! GET  PUT  DELETE /v1/leases/NODE     one node's lease (wire.rs)
//! GET              /v1/watch           every lease, one a line, then "listed", then what changes, and "beat" meanwhile
//! ```
//!
//! Who writes a lease says which revision of it he has seen, 0 for none: another one is there now, and he is refused (409).
//! The hub gives no subnet to two nodes, whatever they ask for. A lease ends by itself unless it is written again in time.
//!
//! [`Server`] is the hub, [`Hub`] what a node knows of it: a [`SubnetManager`](flannelkit::spi::subnet::SubnetManager), which is
//! all that an [`Overlay`](flannelkit::Overlay) asks for.
//!
//! ```no_run
//! # fn example() -> Result<(), Box<dyn std::error::Error>> {
//! use std::sync::Arc;
//!
//! use custom_store::Hub;
//! use flannelkit::spi::subnet::NodeIdentity;
//! use flannelkit::{NetlinkKernel, Overlay, vxlan::Vxlan};
//!
//! let hub = Hub::new("192.0.2.1:7000".parse()?, NodeIdentity::new("node-1")?);
//! let kernel = NetlinkKernel::new()?;
//! let overlay = Overlay::builder().backend("vxlan", Vxlan::new).build(Arc::new(hub), Arc::new(kernel))?;
//! # Ok(())
//! # }
//! ```
//!
//! Whoever reaches the hub may write: there is no TLS and no password here. Nothing is kept on a disk. A hub that starts anew
//! answers no watch before it has a configuration again; then it lists nothing, and the nodes, which kept everything as it was,
//! take the subnets again that they had.

mod client;
mod connections;
mod http;
mod leases;
mod lines;
mod server;
mod watch;
mod wire;

pub use client::Hub;
pub use server::Server;
