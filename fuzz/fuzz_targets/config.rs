//! The network configuration, and the settings of the VXLAN backend in it.

#![no_main]

use flannel_backend_vxlan::Vxlan;
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::net::Prefix;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|json: &[u8]| {
    fuzz::bounded(json, || [Allocation::Pool, Allocation::External].iter().for_each(|by| check(json, *by)));
});

fn check(json: &[u8], allocation: Allocation) {
    let Ok(config) = NetworkConfig::parse(json, allocation) else { return };
    let text = config.to_json();
    let again = NetworkConfig::parse(text.as_bytes(), allocation);
    assert_eq!(again.as_ref(), Ok(&config), "{text}");
    assert!(config.backend.settings.means(&config.backend.settings));
    for (family, network) in config.networks.iter() {
        assert_eq!(network.prefix.family(), family);
        let Some(pool) = &network.pool else { continue };
        assert!(pool.min <= pool.max, "{text}");
        for addr in [pool.min, pool.max] {
            let subnet = Prefix::new(addr, pool.len);
            assert!(subnet.is_ok_and(|subnet| network.prefix.covers(&subnet)), "{addr} of {text}");
        }
    }
    if let Ok(vxlan) = Vxlan::new(&config) {
        assert_eq!(again.ok().and_then(|again| Vxlan::new(&again).ok()), Some(vxlan));
    }
}
