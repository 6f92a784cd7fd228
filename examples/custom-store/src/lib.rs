//! A custom lease store: a hub that keeps a fleet's leases in memory, and its client, over HTTP.
//!
//! ```text
//! GET  PUT         /v1/config          the network configuration, as flannel's JSON
//! GET  PUT  DELETE /v1/leases/NODE     a node's lease (wire.rs)
//! GET              /v1/watch           one line per lease, "listed", changes; "beat" when idle
//! ```
//!
//! A write of a lease names the revision that it replaces, or 0 for a new lease. If the revision differs, the hub
//! answers 409. The subnets of two nodes never overlap. A lease expires unless it is renewed.
//!
//! [`Server`] is the hub. [`Hub`] is the client on a node: a
//! [`SubnetManager`](flannelkit::spi::subnet::SubnetManager) for an [`Overlay`](flannelkit::Overlay).
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
//! The hub has no TLS and no authentication: any client that reaches it can write. Nothing is stored on disk. After a
//! restart the hub refuses watches until the configuration is written again. Its list is then empty, and the nodes,
//! which have kept their kernel objects, acquire their former subnets.

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
