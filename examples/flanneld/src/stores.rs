//! The choice of the lease store.

use std::net::IpAddr;
use std::sync::Arc;

use flannel_core::overlay::Identity;
use flannel_core::subnet::{SubnetError, SubnetManager};
use flannel_subnet_file::{FileSubnets, LeaseTime, LeaseTimeError, Options as FileOptions, Ttl};

use crate::options::StoreOptions;

/// A store, ready to be asked.
pub(crate) struct Opened {
    pub(crate) subnets: Arc<dyn SubnetManager>,
    /// Who this node is to it.
    pub(crate) identity: Identity,
    /// Its own addresses, which no peer may claim.
    pub(crate) addresses: Vec<IpAddr>,
    /// What people call it.
    pub(crate) name: String,
}

/// No store can be made of the options.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    #[error("opening the lease store in {dir}")]
    Dir {
        dir: String,
        #[source]
        source: SubnetError,
    },
    #[error("-subnet-lease-ttl")]
    Ttl(#[from] LeaseTimeError),
    #[error("this build has no etcd store: give -subnet-dir")]
    NoEtcd,
}

/// Opens the store that the options name.
pub(crate) fn open(options: &StoreOptions) -> Result<Opened, StoreError> {
    let Some(dir) = &options.dir else { return Err(StoreError::NoEtcd) };
    let ttl = Ttl::After(LeaseTime::new(options.ttl)?);
    let subnets = FileSubnets::open(dir, FileOptions { ttl, ..FileOptions::default() })
        .map_err(|source| StoreError::Dir { dir: dir.display().to_string(), source })?;
    Ok(Opened {
        subnets: Arc::new(subnets),
        identity: Identity::Named(options.node.clone()),
        addresses: Vec::new(),
        name: format!("directory {}", dir.display()),
    })
}
