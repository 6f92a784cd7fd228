//! An overlay inside your own operator, with its Kubernetes client. Run one on each node, as root, with `NODE_NAME`.
//! The rights of its account are in deploy/kubernetes/flannel.yaml. After ctrl-c the data plane stays as it is.
#![expect(clippy::print_stdout, reason = "to print is what the example is about")]

use std::{error::Error, sync::Arc};

use flannelkit::config::{Allocation, NetworkConfig};
use flannelkit::kube::{ConfigSource, KubeSubnets, NodeName, Options};
use flannelkit::vxlan::Vxlan;
use flannelkit::{NetlinkKernel, Overlay, Teardown};

const NETWORK: &[u8] = br#"{"Network":"10.244.0.0/16","Backend":{"Type":"vxlan"}}"#;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let client = kube::Client::try_default().await?;
    let network = ConfigSource::Fixed(NetworkConfig::parse(NETWORK, Allocation::External)?);
    let store = KubeSubnets::new(client, Options::new(NodeName::from_env()?, network));
    let kernel = Arc::new(NetlinkKernel::new()?);
    let overlay = Overlay::builder().backend("vxlan", Vxlan::new).build(Arc::new(store), kernel)?;
    let (mut running, mut said) = (overlay.spawn()?, String::new());
    let mut handle = overlay.handle();
    loop {
        // Your operator's own work. If a cloud taints Nodes: store.set_network_unavailable(false) once it is ready.
        tokio::select! {
            _ = tokio::signal::ctrl_c() => return Ok(running.shutdown(Teardown::Keep).await?),
            Ok(status) = handle.changed() => {
                let waits: Vec<_> = status.waits_for().iter().map(ToString::to_string).collect();
                let now = format!("{:?}, {} peers, waits for: {}", status.phase, status.peers.accepted, waits.join(", "));
                if now != said {
                    println!("{now}");
                    said = now;
                }
            }
            outcome = running.wait() => return Ok(outcome?),
        }
    }
}
