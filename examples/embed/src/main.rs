//! An overlay inside your own program.

fn main() {}
