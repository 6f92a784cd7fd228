//! An overlay, put together from the options.

use std::sync::Arc;

use flannel_backend_hostgw::HostGw;
use flannel_backend_vxlan::Vxlan;
use flannel_core::backend::alloc::Alloc;
use flannel_core::kernel::{Kernel, KernelError};
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{BuildError, Masquerade, MissingUplink, Overlay, SubnetEnvFile};

use crate::blackhole::Blackhole;
use crate::options::Options;
use crate::stores::Opened;

/// The backends there are.
pub(crate) const BACKENDS: [&str; 3] = [Vxlan::TYPE, HostGw::TYPE, Alloc::TYPE];

/// Why there is no overlay.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PartsError {
    #[error("using the kernel")]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Opens the kernel of this network namespace. Nothing is written.
pub(crate) fn assemble(
    options: &Options,
    store: &Opened,
    missing_uplink: MissingUplink,
) -> Result<Overlay, PartsError> {
    let kernel: Arc<dyn Kernel> = Arc::new(NetlinkKernel::new()?);
    let masquerade = match options.firewall.masquerade {
        Some(_) => Masquerade::Agent,
        None => Masquerade::Plugin,
    };
    let routes = options.firewall.blackhole;
    Ok(Overlay::builder()
        .name(options.overlay.clone())
        .backend(Vxlan::TYPE, move |config| Ok(Blackhole::around(Vxlan::new(config)?, routes)))
        .backend(HostGw::TYPE, move |_| Ok(Blackhole::around(HostGw, routes)))
        .backend(Alloc::TYPE, move |_| Ok(Blackhole::around(Alloc, routes)))
        .uplink(options.uplink.clone())
        .missing_uplink(missing_uplink)
        .public(options.public)
        .store_addresses(store.addresses.clone())
        .on_loss(options.on_loss)
        .audit_every(options.audit_every)
        .subnet_env(SubnetEnvFile { path: options.subnet_file.clone(), masquerade })
        .build(Arc::clone(&store.subnets), kernel)?)
}
