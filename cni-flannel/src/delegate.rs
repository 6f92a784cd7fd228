//! The other plug-in's configuration, derived from the network's configuration and `subnet.env`.

use std::net::IpAddr;

use flannel_core::net::{Prefix, split_cidr};
use serde_json::{Value, json};

use crate::conf::{Conf, Object};
use crate::error::Error;
use crate::subnet_env::SubnetEnv;

/// Returns the configuration by flannel's rules (docs/compatibility.md, "CNI plug-in").
pub(crate) fn config(conf: &Conf, env: &SubnetEnv) -> Result<Object, Error> {
    let mut config = conf.delegate.clone();
    if let Some(runtime) = &conf.runtime {
        config.insert("runtimeConfig".to_owned(), runtime.clone().into());
    }
    config.insert("name".to_owned(), conf.name.clone().into());
    let kind = config.entry("type").or_insert_with(|| "bridge".into());
    let is_bridge = kind == "bridge";
    // Either the agent masquerades or the other plug-in does.
    config.entry("ipMasq").or_insert_with(|| (!env.ip_masq).into());
    config.entry("mtu").or_insert_with(|| env.mtu.into());
    if is_bridge {
        config.entry("isGateway").or_insert(true.into());
    }
    if conf.has_version {
        config.insert("cniVersion".to_owned(), conf.version.into());
    }
    config.insert("ipam".to_owned(), ipam(conf, env)?.into());
    Ok(config)
}

fn ipam(conf: &Conf, env: &SubnetEnv) -> Result<Object, Error> {
    let mut ipam = conf.ipam.clone();
    ipam.entry("type").or_insert_with(|| "host-local".into());
    let ranges: Vec<_> = env.subnets.iter().map(|(_, subnet)| json!([{"subnet": subnet.to_string()}])).collect();
    ipam.insert("ranges".to_owned(), ranges.into());
    let configured = match ipam.remove("routes") {
        None | Some(Value::Null) => Vec::new(),
        Some(Value::Array(routes)) => routes,
        Some(_) => return Err(bad_route("is not a list")),
    };
    let configured = configured.iter().map(route).collect::<Result<Vec<_>, _>>()?;
    let networks = env.networks.iter().map(|network| json!({"dst": network.to_string()}));
    ipam.insert("routes".to_owned(), configured.into_iter().chain(networks).collect());
    Ok(ipam)
}

/// Returns a route as Go's plug-ins write it: only the members they know, without those that are zero.
fn route(route: &Value) -> Result<Value, Error> {
    let Value::Object(fields) = route else { return Err(bad_route("has an entry that is not an object")) };
    let mut known = Object::new();
    let dst = fields.get("dst").and_then(Value::as_str).and_then(cidr);
    known.insert("dst".to_owned(), dst.ok_or_else(|| bad_route("has an entry whose `dst` is not a CIDR"))?.into());
    match fields.get("gw") {
        None | Some(Value::Null) => {}
        Some(gw) => {
            let gw = gw.as_str().and_then(|gw| gw.parse::<IpAddr>().ok());
            let gw = gw.ok_or_else(|| bad_route("has an entry whose `gw` is not an address"))?;
            known.insert("gw".to_owned(), gw.to_string().into());
        }
    }
    for name in ["mtu", "advmss", "priority", "table", "scope"] {
        match fields.get(name) {
            None | Some(Value::Null) => {}
            Some(value) if value.as_i64().is_none() => {
                return Err(bad_route("has an entry with an invalid number"));
            }
            // In these two, zero differs from a missing member.
            Some(value) if value.as_i64() != Some(0) || matches!(name, "table" | "scope") => {
                known.insert(name.to_owned(), value.clone());
            }
            Some(_) => {}
        }
    }
    Ok(known.into())
}

/// Returns a CIDR in Go's spelling. Its host bits stay set.
fn cidr(text: &str) -> Option<String> {
    let (addr, len) = split_cidr(text).ok()?;
    Prefix::masked(addr, len).ok()?;
    Some(format!("{addr}/{len}"))
}

fn bad_route(problem: &str) -> Error {
    Error::Config { place: "ipam.routes", problem: problem.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::go_json;
    use flannel_core::net::Dual;

    fn env() -> SubnetEnv {
        SubnetEnv {
            networks: vec!["10.1.0.0/16".parse().unwrap()],
            subnets: Dual { v4: Some("10.1.17.0/24".parse().unwrap()), v6: None },
            mtu: 1472,
            ip_masq: true,
        }
    }

    fn made(conf: &str, env: &SubnetEnv) -> String {
        go_json::object(&config(&Conf::parse(conf.as_bytes()).unwrap(), env).unwrap())
    }

    /// As Go flannel's plug-in stores it.
    #[test]
    fn it_is_go_flannels_to_the_byte() {
        let conf = r#"{"name":"cni-flannel","type":"flannel"}"#;
        assert_eq!(
            made(conf, &env()),
            r#"{"ipMasq":false,"ipam":{"ranges":[[{"subnet":"10.1.17.0/24"}]],"routes":[{"dst":"10.1.0.0/16"}],"type":"host-local"},"isGateway":true,"mtu":1472,"name":"cni-flannel","type":"bridge"}"#
        );
    }

    #[test]
    fn the_operator_decides_and_both_families_are_there() {
        let mut env = env();
        env.networks.push("fc00::/48".parse().unwrap());
        env.subnets.v6 = Some("fc00:0:0:7::/64".parse().unwrap());
        env.ip_masq = false;
        let conf = r#"{
            "cniVersion": "1.0.0", "name": "cbr0", "type": "flannel",
            "ipam": {"type": "other", "routes": [{"gw": "10.1.17.9", "dst": "10.7.1.2/16", "mtu": 0}], "x": 1.0, "ranges": 3},
            "delegate": {"hairpinMode": true, "isDefaultGateway": true, "mtu": 1400, "ipMasq": "no", "type": "ptp"},
            "runtimeConfig": {"portMappings": [{"hostPort": 80}]}
        }"#;
        assert_eq!(
            made(conf, &env),
            concat!(
                r#"{"cniVersion":"1.0.0","hairpinMode":true,"ipMasq":"no","ipam":{"#,
                r#""ranges":[[{"subnet":"10.1.17.0/24"}],[{"subnet":"fc00:0:0:7::/64"}]],"#,
                r#""routes":[{"dst":"10.7.1.2/16","gw":"10.1.17.9"},{"dst":"10.1.0.0/16"},{"dst":"fc00::/48"}],"#,
                r#""type":"other","x":1},"isDefaultGateway":true,"mtu":1400,"name":"cbr0","#,
                r#""runtimeConfig":{"portMappings":[{"hostPort":80}]},"type":"ptp"}"#,
            )
        );
    }

    #[test]
    fn bad_routes_are_refused() {
        for routes in [
            r#"{}"#,
            r#"[1]"#,
            r#"[{}]"#,
            r#"[{"dst":"10.0.0.0"}]"#,
            r#"[{"dst":"10.0.0.0/+8"}]"#,
            r#"[{"dst":"10.0.0.0/8","gw":"x"}]"#,
        ] {
            let conf = format!(r#"{{"name":"n","ipam":{{"routes":{routes}}}}}"#);
            let error = config(&Conf::parse(conf.as_bytes()).unwrap(), &env()).unwrap_err();
            assert!(error.to_string().contains("`ipam.routes`"), "{error}");
        }
    }
}
