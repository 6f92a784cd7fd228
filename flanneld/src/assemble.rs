//! Builds the overlay from the options.

use std::sync::Arc;

use flannel_backend_hostgw::HostGw;
use flannel_backend_udp::{Udp, UdpDataPlane};
use flannel_backend_vxlan::Vxlan;
use flannel_core::backend::BackendError;
use flannel_core::backend::alloc::Alloc;
use flannel_core::config::NetworkConfig;
use flannel_core::firewall::FirewallError;
use flannel_core::kernel::{Kernel, KernelError};
use flannel_core::net::Dual;
use flannel_core::netlink::NetlinkKernel;
use flannel_core::overlay::{BuildError, Masquerade, MissingUplink, Overlay, SubnetEnvFile};

use crate::blackhole::Blackhole;
use crate::firewall;
use crate::options::{FirewallOptions, Options, PortGuard, StoreLocation};
use crate::stores::Opened;

/// The available backends.
pub(crate) const BACKENDS: [&str; 4] = [Vxlan::TYPE, HostGw::TYPE, Udp::TYPE, Alloc::TYPE];

/// Why the overlay could not be built.
#[derive(Debug, thiserror::Error)]
pub(crate) enum AssembleError {
    #[error("using the kernel")]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Build(#[from] BuildError),
}

/// Builds the overlay on the kernel of this network namespace, with the data plane of the UDP backend. Writes nothing.
pub(crate) fn assemble(
    options: &Options,
    store: &Opened,
    missing_uplink: MissingUplink,
    plane: UdpDataPlane,
) -> Result<Overlay, AssembleError> {
    let kernel: Arc<dyn Kernel> = Arc::new(NetlinkKernel::new()?.with_data_plane(plane)?);
    let masquerade = match options.firewall.masquerade {
        Some(_) => Masquerade::Agent,
        None => Masquerade::Plugin,
    };
    let (routes, rules) = (options.firewall.blackhole, options.firewall);
    // An overlay that ends at once, for example for a removal, writes no rules.
    let writes_rules = missing_uplink == MissingUplink::Wait;
    // The configuration is known here, and no lease is acquired yet.
    let check = move |config: &NetworkConfig| if writes_rules { check_rules(rules, config) } else { Ok(()) };
    // In Kubernetes an annotation of the Node takes precedence over the flags; the store has both, and decides.
    let public = match options.store.location {
        StoreLocation::Kube(_) => Dual::default(),
        StoreLocation::Dir { .. } | StoreLocation::Etcd(_) => options.public,
    };
    Ok(Overlay::builder()
        .name(options.overlay.clone())
        .backend(Vxlan::TYPE, move |config| {
            check(config)?;
            Ok(Blackhole::around(vxlan(config, rules.guard)?, routes))
        })
        .backend(HostGw::TYPE, move |config| check(config).map(|()| Blackhole::around(HostGw, routes)))
        .backend(Udp::TYPE, move |config| {
            check(config)?;
            Ok(Blackhole::around(Udp::new(config)?, routes))
        })
        .backend(Alloc::TYPE, move |config| check(config).map(|()| Blackhole::around(Alloc, routes)))
        .uplink(options.uplink.clone())
        .missing_uplink(missing_uplink)
        .public(public)
        .store_addresses(store.addresses.clone())
        .on_loss(options.on_loss)
        .on_reconfiguration(options.on_config_change)
        .audit_every(options.audit_every)
        .subnet_env(SubnetEnvFile::new(&options.subnet_file, masquerade))
        .build(Arc::clone(&store.subnets), kernel)?)
}

/// Returns the VXLAN backend. With the guard it has a port in any case: otherwise an existing device would keep its port,
/// whichever that is, and the guard would protect another one.
pub(crate) fn vxlan(config: &NetworkConfig, guard: PortGuard) -> Result<Vxlan, BackendError> {
    let vxlan = Vxlan::new(config)?;
    Ok(match guard {
        PortGuard::Peers => vxlan.with_default_port(flannel_core::kernel::Vxlan::DEFAULT_PORT),
        PortGuard::None => vxlan,
    })
}

/// Checks that the rules which the flags need can be written: without them pods must not be attached.
fn check_rules(options: FirewallOptions, config: &NetworkConfig) -> Result<(), BackendError> {
    if options.guard.lacks_its_tool(config) {
        return Err(BackendError::Host {
            what: "-vxlan-guard needs nftables".to_owned(),
            remedy: "set \"EnableNFTables\": true in the network configuration, or leave -vxlan-guard out".to_owned(),
        });
    }
    match (options.needed_for(config), firewall::check_tool(config)) {
        (Some(flag), Err(FirewallError::Unsupported { what, hint })) => {
            Err(BackendError::Host { what: format!("{what} is missing, which {flag} needs"), remedy: hint })
        }
        (_, _) => Ok(()),
    }
}
