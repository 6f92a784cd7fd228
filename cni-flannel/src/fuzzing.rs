//! Checks of private parsers, for fuzz targets. Each panics if a property fails.

use serde_json::Value;

use crate::conf::{Conf, Object};
use crate::subnet_env::SubnetEnv;
use crate::{delegate, go_json};

/// Parses a configuration, and a `subnet.env` after a line `---`. If both are accepted, checks that the derived configuration
/// has the members that DEL needs, and that its JSON is the same after it was parsed.
pub fn request(text: &str) {
    let (conf, env) = text.split_once("\n---\n").unwrap_or((text, ENV));
    let (Ok(conf), Ok(env)) = (Conf::parse(conf.as_bytes()), SubnetEnv::parse(env)) else { return };
    let Ok(config) = delegate::config(&conf, &env) else { return };
    let written = go_json::object(&config);
    let read: Object = serde_json::from_str(&written).unwrap_or_default();
    assert_eq!(go_json::object(&read), written);
    assert_eq!(read.get("name").and_then(Value::as_str), Some(conf.name.as_str()));
    assert!(read.get("type").is_some_and(|kind| kind.as_str() != Some("flannel")));
    assert!(read.get("ipam").and_then(|ipam| ipam.get("ranges")).is_some_and(Value::is_array));
}

const ENV: &str = "FLANNEL_NETWORK=10.1.0.0/16\nFLANNEL_SUBNET=10.1.17.1/24\nFLANNEL_MTU=1450\nFLANNEL_IPMASQ=true\n";
