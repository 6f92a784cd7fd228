//! A lease store of your own: a hub that keeps the leases of a fleet in memory, and nodes that reach it over HTTP.
//!
//! ```text
//! GET  PUT         /v1/config          the network's configuration, flannel's document
//! GET  PUT  DELETE /v1/leases/NODE     one node's lease (wire.rs)
//! GET              /v1/watch           every lease, one a line, then "listed", then what changes, and "beat" meanwhile
//! ```
//!
//! A write of a lease names the revision that the client has seen, 0 for none. If there is another one, the answer is 409.
//! The hub never gives one subnet to two nodes. A lease expires unless it is written again in time.
//!
//! [`Server`] is the hub. [`Hub`] is its client on a node: a [`SubnetManager`](flannelkit::spi::subnet::SubnetManager) for an
//! [`Overlay`](flannelkit::Overlay).
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
//! Any client that reaches the hub can write: there is no TLS and no password here. Nothing is stored on a
//! disk. After a restart the hub answers no watch before it has a configuration again. Then it lists nothing, and the nodes, which
//! have kept their kernel objects, acquire the subnets that they had.

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
