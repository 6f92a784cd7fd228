//! An overlay inside your own program: `overlay.rs` is all there is to it.
//!
//! This file is the program around it: it gives the overlay a network namespace with an uplink to live in, so that
//! `cargo run -p embed` needs no root and changes nothing on this machine.

mod overlay;

use std::os::fd::AsFd;

use flannel_core::netlink::NetlinkKernel;
use testkit::{Families, Underlay, userns};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    userns::enter()?;
    let lab = Underlay::new(1, Families::V4)?;
    // A program that lives in the host's own network uses `NetlinkKernel::new()`.
    let kernel = NetlinkKernel::in_namespace(lab.nodes()[0].ns.as_fd().try_clone_to_owned()?)?;
    tokio::runtime::Runtime::new()?.block_on(overlay::run(kernel))
}
