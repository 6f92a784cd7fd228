//! A whole Kubernetes cluster.

use std::process::ExitCode;
use std::time::Instant;

use testkit::Families;
use testkit::cluster::{Cluster, Options, isolated};

fn main() -> ExitCode {
    let ran = isolated(|dir| {
        let start = Instant::now();
        let options = Options { nodes: 2, families: Families::V4, images: vec![] };
        let cluster = Cluster::start(dir, &options)?;
        println!("started in {:?}", start.elapsed());
        println!("{}", cluster.state());
        Ok(())
    });
    ran.unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::FAILURE
    })
}
