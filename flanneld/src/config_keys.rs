//! Keys of the network configuration that have no effect, most of them misspelt. flannel ignores them, and so does the
//! agent, with a warning.

use flannel_backend_hostgw::HostGw;
use flannel_backend_udp::Udp;
use flannel_backend_vxlan::Vxlan;
use flannel_core::backend::alloc::Alloc;
use flannel_core::config::NetworkConfig;
use flannel_core::overlay::Handle;
use flannel_core::text::Plain;

use crate::flags::{near, suggestion};

/// Logs a warning for each such key, once the configuration is known.
pub(crate) async fn warn(handle: Handle) {
    let Ok(status) = handle.wait_for(|status| status.network.is_some()).await else { return };
    let ignored = status.network.as_deref().map(ignored).unwrap_or_default();
    ignored.iter().for_each(|key| tracing::warn!(target: "flannel::store", "network configuration: {}", Plain(key)));
}

/// Returns a sentence for each such key.
pub(crate) fn ignored(config: &NetworkConfig) -> Vec<String> {
    let kind = config.backend.kind.as_str();
    let keys: &[&'static str] = match kind {
        Vxlan::TYPE => &flannel_backend_vxlan::Config::KEYS,
        HostGw::TYPE => &HostGw::KEYS,
        Udp::TYPE => &flannel_backend_udp::Config::KEYS,
        Alloc::TYPE => &Alloc::KEYS,
        // It is an error anyway.
        _ => return Vec::new(),
    };
    let sentence = |path: String, of: &str, key: &str, known: &[&'static str]| {
        let hint = suggestion(&near(key, known.iter().copied()));
        format!("unknown key {path}{of} has no effect{hint}")
    };
    let document = &config.ignored;
    let top = document.keys().map(|key| sentence(document.path_of(key), "", key, &NetworkConfig::KEYS));
    let settings = &config.backend.settings;
    let unknown = settings.keys().filter(|key| !keys.iter().any(|known| known.eq_ignore_ascii_case(key)));
    let of = format!(" of the {kind} backend");
    top.chain(unknown.map(|key| sentence(settings.path_of(key), &of, key, keys))).collect()
}

#[cfg(test)]
mod tests {
    use flannel_core::config::Allocation;

    use super::*;

    #[test]
    fn each_listed_key_is_read_by_its_backend() {
        let error = |kind: &str, key: &str| {
            let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{kind}","{key}":[]}}}}"#);
            let config = NetworkConfig::parse(json.as_bytes(), Allocation::Pool).unwrap();
            let error = if kind == Udp::TYPE { Udp::new(&config).err() } else { Vxlan::new(&config).err() };
            error.map(|error| error.to_string()).unwrap_or_default()
        };
        for key in flannel_backend_udp::Config::KEYS {
            assert!(error(Udp::TYPE, key).contains(&format!("$.Backend.{key}")), "{key}");
        }
        for key in flannel_backend_vxlan::Config::KEYS {
            let is_of_windows = ["Name", "MacPrefix"].contains(&key);
            assert_eq!(error(Vxlan::TYPE, key).contains(&format!("$.Backend.{key}")), !is_of_windows, "{key}");
        }
    }

    #[test]
    fn misspelt_keys_are_named_with_the_likely_one() {
        let of = |rest: &str| {
            let json = format!(r#"{{"Network":"10.5.0.0/16",{rest}}}"#);
            ignored(&NetworkConfig::parse(json.as_bytes(), Allocation::Pool).unwrap())
        };
        assert_eq!(of(r#""Backend":{"Type":"vxlan","vni":1,"Port":8472,"MacPrefix":"0E-2A"}"#), Vec::<String>::new());
        assert_eq!(
            of(r#""SubnetLan":24,"Backend":{"type":"vxlan","DirectRoutng":true}"#),
            [
                "unknown key $.SubnetLan has no effect (did you mean SubnetLen?)",
                "unknown key $.Backend.DirectRoutng of the vxlan backend has no effect (did you mean DirectRouting?)",
            ]
        );
        assert_eq!(
            of(r#""Backend":{"Type":"host-gw","VNI":1}"#),
            ["unknown key $.Backend.VNI of the host-gw backend has no effect"]
        );
        assert_eq!(of(r#""Backend":{"Type":"vxlna","X":1}"#), Vec::<String>::new());
    }
}
