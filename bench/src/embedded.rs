//! An embedded lease store with as many leases as wanted.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::Error;
use crate::peers::{Backend, config, peer, prefix};

/// How long a lease lasts, as flannel's do.
const TTL: Duration = Duration::from_secs(86_400);

/// Writes the network's configuration and the lease of every peer from 1 to `n` into a directory.
///
/// # Errors
/// When a file cannot be written.
#[expect(clippy::disallowed_methods, reason = "the store's records have the wall clock's time")]
pub fn fill(directory: &Path, n: u32) -> Result<(), Error> {
    let leases = directory.join("leases");
    fs::create_dir(&leases)?;
    fs::write(directory.join("config.json"), config(Backend::Vxlan))?;
    let expires = (SystemTime::now().duration_since(UNIX_EPOCH)? + TTL).as_millis();
    for n in 1..=n {
        let attrs = peer(n).attrs.to_json();
        let attrs = attrs.strip_suffix('}').unwrap_or(&attrs);
        let record = format!("{attrs},\"Subnet\":\"{}\",\"Created\":{n},\"ExpiresUnixMs\":{expires}}}\n", prefix(n));
        fs::write(leases.join(format!("node-{n}.json")), record)?;
    }
    Ok(())
}
