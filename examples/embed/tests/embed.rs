//! Runs the example in a namespace with an uplink and checks its output. Without a harness: see
//! [`testkit::userns::enter`].

use std::error::Error;
use std::process::Command;

use testkit::{Families, Underlay, userns};

fn main() -> Result<(), Box<dyn Error>> {
    userns::enter()?;
    let lab = Underlay::new(1, Families::V4)?;
    let node = &lab.nodes()[0].ns;
    // A child process starts in the namespace of the thread that spawns it.
    let output = node.run(|| Command::new(env!("CARGO_BIN_EXE_embed")).output())??;
    let text = String::from_utf8(output.stdout)?;
    if !output.status.success() {
        return Err(format!("{}: {text}{}", output.status, String::from_utf8_lossy(&output.stderr)).into());
    }
    for part in ["pods here: 10.5.", "Ready", "Stopped"] {
        if !text.contains(part) {
            return Err(format!("no {part:?} in {text}").into());
        }
    }
    let left = node.links()?.into_iter().find(|link| link.name.starts_with("flannel"));
    left.map_or(Ok(()), |link| Err(format!("{} is left behind", link.name).into()))
}
