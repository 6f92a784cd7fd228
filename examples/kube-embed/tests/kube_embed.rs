//! Runs the example in a namespace with an uplink and with a real API server on the switch, and checks its output.
//! Without a harness: see [`testkit::userns::enter`].

use std::error::Error;
use std::io::{BufRead, BufReader};
use std::net::IpAddr;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use testkit::etcd::Version;
use testkit::kubernetes::ApiServer;
use testkit::{Families, Underlay, userns};

const NODE: &str = "my-node";

fn main() -> Result<(), Box<dyn Error>> {
    userns::enter()?;
    let lab = Underlay::new(1, Families::V4)?;
    // The switch's address, as nodes see it.
    let switch: IpAddr = [10, 89, 0, 1].into();
    let server = lab.switch().run(|| {
        tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
            let server = ApiServer::start_at(Version::Current, Some(switch)).await?;
            server.create_node(NODE, &["10.244.7.0/24".to_owned()]).await?;
            Ok::<_, Box<dyn Error + Send + Sync>>(server)
        })
    })?;
    let server = server.map_err(|error| error.to_string())?;
    let node = &lab.nodes()[0].ns;
    let kubeconfig = server.admin_kubeconfig()?;
    let mut example = node.run(|| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_kube-embed"));
        command.env("KUBECONFIG", &kubeconfig).env("NODE_NAME", NODE).stdout(Stdio::piped()).spawn()
    })??;
    let (mut text, mut is_told) = (String::new(), false);
    for line in BufReader::new(example.stdout.take().ok_or("no output")?).lines() {
        text = format!("{text}{}\n", line?);
        if text.contains("Ready") && !is_told {
            is_told = true;
            kill(Pid::from_raw(example.id().try_into()?), Signal::SIGINT)?;
        }
    }
    let status = example.wait()?;
    if !status.success() || !text.ends_with("Ready, 0 peers, waits for: \n") {
        return Err(format!("{status}: {text}").into());
    }
    let device = node.links()?.into_iter().find(|link| link.name == "flannel.1");
    device.map(drop).ok_or_else(|| "the device is gone".into())
}
