//! The main job: an overlay of several nodes that pings and heals.

fn main() {}
