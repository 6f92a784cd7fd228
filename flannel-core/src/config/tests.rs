use std::borrow::Cow;

use proptest::prelude::*;

use super::*;

fn parse(text: &str) -> Result<NetworkConfig, ConfigError> {
    NetworkConfig::parse(text.as_bytes(), Allocation::Pool)
}

fn pool(text: &str, family: Family) -> String {
    let config = parse(text).unwrap();
    let network = config.networks.get(family).unwrap();
    let pool = network.pool.as_ref().unwrap();
    format!("{} len {} {} {}", network.prefix, pool.len, pool.min, pool.max)
}

#[track_caller]
fn rejects(text: &str, path: &str) {
    let error = parse(text).unwrap_err();
    assert_eq!(error.path, path, "{text}: {error}");
    assert!(!error.remedy.is_empty() && error.to_string().starts_with(path), "{error}");
}

#[test]
fn what_an_error_quotes_of_a_document_is_bounded() {
    let config = |kind: &str| parse(&format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{kind}"}}}}"#));
    assert!(config(&"x".repeat(MAX_KIND)).is_ok());
    let error = config(&"x".repeat(MAX_KIND + 1)).unwrap_err();
    assert_eq!(error.path, "$.Backend.Type");
    assert!(error.problem.contains("longer than 64 bytes"), "{error}");
    let error = config(&"x".repeat(1 << 14)).unwrap_err();
    assert!(error.problem.len() < ConfigError::MAX_PROBLEM + 40, "{} bytes", error.problem.len());
    assert!(error.problem.ends_with(" more bytes)"), "{error}");
}

#[test]
fn settings_mean_the_same_however_they_are_written() {
    let object = |text: &str| Object::parse(text.as_bytes()).unwrap();
    let one = object(r#"{"VNI":7,"Port":8472,"X":{"a":1,"b":2}}"#);
    assert!(one.means(&object(r#"{ "port" : 8472, "vni":7, "X": {"b":2, "a":1} }"#)));
    let deep = |depth| object(&format!("{{\"X\":{}{}}}", "[".repeat(depth), "]".repeat(depth)));
    assert!(deep(200).means(&deep(200)) && !deep(200).means(&deep(201)));
    for other in [r#"{"VNI":8,"Port":8472,"X":{"a":1,"b":2}}"#, r#"{"VNI":7,"Port":8472}"#, "{}"] {
        assert!(!one.means(&object(other)), "{other}");
    }
}

#[test]
fn worked_examples_of_the_contract() {
    assert_eq!(pool(r#"{"network":"10.3.0.0/16"}"#, Family::V4), "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0");
    assert_eq!(
        pool(r#"{"enableIPv6":true,"ipv6Network":"fc00::/48","enableIPv4":false}"#, Family::V6),
        "fc00::/48 len 64 fc00:0:0:1:: fc00:0:0:ffff::"
    );
    let dual = r#"{"EnableIPv6":true,"Network":"10.42.7.9/16","IPv6Network":"2001:cafe:42::5/56"}"#;
    assert_eq!(pool(dual, Family::V4), "10.42.0.0/16 len 24 10.42.1.0 10.42.255.0");
    assert_eq!(pool(dual, Family::V6), "2001:cafe:42::/56 len 64 2001:cafe:42:1:: 2001:cafe:42:ff::");
}

#[test]
fn the_default_length_leaves_room_for_four_subnets() {
    assert_eq!(pool(r#"{"Network":"10.3.0.0/22"}"#, Family::V4), "10.3.0.0/22 len 24 10.3.1.0 10.3.3.0");
    assert_eq!(pool(r#"{"Network":"10.3.0.0/23"}"#, Family::V4), "10.3.0.0/23 len 25 10.3.0.128 10.3.1.128");
    assert_eq!(pool(r#"{"Network":"10.3.0.0/28"}"#, Family::V4), "10.3.0.0/28 len 30 10.3.0.4 10.3.0.12");
    rejects(r#"{"Network":"10.3.0.0/29"}"#, "$.Network");
    let v6 = |len: u8| format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/{len}"}}"#);
    assert_eq!(pool(&v6(62), Family::V6), "fc00::/62 len 64 fc00:0:0:1:: fc00:0:0:3::");
    assert_eq!(pool(&v6(63), Family::V6), "fc00::/63 len 65 fc00::8000:0:0:0 fc00:0:0:1:8000::");
    assert_eq!(pool(&v6(124), Family::V6), "fc00::/124 len 126 fc00::4 fc00::c");
    rejects(&v6(125), "$.IPv6Network");
}

#[test]
fn a_length_out_of_range_is_rejected() {
    for len in ["31", "17", "400", "18446744073709551615"] {
        rejects(&format!(r#"{{"Network":"10.3.0.0/16","SubnetLen":{len}}}"#), "$.SubnetLen");
    }
    assert_eq!(
        pool(r#"{"Network":"10.3.0.0/16","SubnetLen":18}"#, Family::V4),
        "10.3.0.0/16 len 18 10.3.64.0 10.3.192.0"
    );
    assert_eq!(
        pool(r#"{"Network":"10.3.0.0/16","SubnetLen":0}"#, Family::V4),
        "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0"
    );
    let v6 = |len: u8| {
        format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48","IPv6SubnetLen":{len}}}"#)
    };
    rejects(&v6(127), "$.IPv6SubnetLen");
    rejects(&v6(49), "$.IPv6SubnetLen");
    assert!(parse(&v6(50)).is_ok() && parse(&v6(126)).is_ok());
}

#[test]
fn bounds_are_inside_aligned_and_in_order() {
    let with = |keys: &str| format!(r#"{{"Network":"10.3.0.0/16",{keys}}}"#);
    assert_eq!(
        pool(&with(r#""SubnetMin":"10.3.5.0","SubnetMax":"10.3.7.0""#), Family::V4),
        "10.3.0.0/16 len 24 10.3.5.0 10.3.7.0"
    );
    assert_eq!(
        pool(&with(r#""SubnetMin":"0.0.0.0","SubnetMax":"0.0.0.0""#), Family::V4),
        "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0"
    );
    rejects(&with(r#""SubnetMin":"10.4.0.0""#), "$.SubnetMin");
    rejects(&with(r#""SubnetMax":"10.4.0.0""#), "$.SubnetMax");
    rejects(&with(r#""SubnetMin":"10.3.5.1""#), "$.SubnetMin");
    rejects(&with(r#""SubnetMax":"10.3.5.128""#), "$.SubnetMax");
    rejects(&with(r#""SubnetMin":"10.3.9.0","SubnetMax":"10.3.8.0""#), "$.SubnetMin");
    rejects(&with(r#""SubnetMin":"fc00::""#), "$.SubnetMin");
    rejects(&with(r#""SubnetMin":null"#), "$.SubnetMin");
    let v6 = |keys: &str| format!(r#"{{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"fc00::/48",{keys}}}"#);
    rejects(&v6(r#""IPv6SubnetMin":"1.2.3.4""#), "$.IPv6SubnetMin");
    rejects(&v6(r#""IPv6SubnetMax":"fc01::""#), "$.IPv6SubnetMax");
    rejects(&v6(r#""IPv6SubnetMin":"fc00::1""#), "$.IPv6SubnetMin");
    assert!(parse(&v6(r#""IPv6SubnetMin":null,"IPv6SubnetMax":"::""#)).is_ok());
}

#[test]
fn a_family_needs_its_network_and_there_is_at_least_one() {
    rejects("{}", "$.Network");
    rejects(r#"{"Network":"0.0.0.0/0"}"#, "$.Network");
    rejects(r#"{"Network":null}"#, "$.Network");
    rejects(r#"{"Network":"10.0.0.0"}"#, "$.Network");
    rejects(r#"{"Network":"fc00::/48"}"#, "$.Network");
    rejects(r#"{"EnableIPv4":false,"EnableIPv6":true}"#, "$.IPv6Network");
    rejects(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"10.0.0.0/16"}"#, "$.IPv6Network");
    rejects(r#"{"EnableIPv4":false,"EnableIPv6":true,"IPv6Network":"::ffff:10.0.0.0/112"}"#, "$.IPv6Network");
    rejects(r#"{"EnableIPv4":false}"#, "$.EnableIPv4");
}

#[test]
fn keys_match_in_any_case_and_the_exact_one_wins() {
    assert_eq!(
        pool(r#"{"Network":"10.3.0.0/16","network":"10.4.0.0/16"}"#, Family::V4),
        "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0"
    );
    assert_eq!(
        pool(r#"{"network":"10.3.0.0/16","NETWORK":"10.4.0.0/16","x":{"y":[]}}"#, Family::V4),
        "10.4.0.0/16 len 24 10.4.1.0 10.4.255.0"
    );
    assert_eq!(
        pool(r#"{"Network":"10.3.0.0/16","Network":"10.4.0.0/16"}"#, Family::V4),
        "10.4.0.0/16 len 24 10.4.1.0 10.4.255.0"
    );
}

#[test]
fn a_document_without_end_is_rejected_in_few_words() {
    let long = "x".repeat(NetworkConfig::MAX_BYTES - 100);
    for (text, path) in [
        (format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{long}"}}}}"#), "$.Backend.Type"),
        (format!(r#"{{"Network":"{long}"}}"#), "$.Network"),
        (format!(r#"{{"Network":{long}}}"#), "$"),
        (format!(r#""{long}""#), "$"),
        (format!(r#"{{"Network":"10.5.0.0/16","Note":"{long}{long}"}}"#), "$"),
    ] {
        let error = parse(&text).unwrap_err();
        assert_eq!(error.path, path);
        assert!(error.to_string().len() < 1024, "{path}: {} bytes", error.to_string().len());
    }
}

#[test]
fn a_document_of_the_largest_size_is_read_and_a_larger_one_is_refused() {
    let bytes = |size: usize| {
        let empty = r#"{"Network":"10.5.0.0/16","Note":""}"#;
        empty.replace(r#""""#, &format!(r#""{}""#, "x".repeat(size - empty.len())))
    };
    assert_eq!(bytes(NetworkConfig::MAX_BYTES).len(), NetworkConfig::MAX_BYTES);
    parse(&bytes(NetworkConfig::MAX_BYTES)).unwrap();
    let error = parse(&bytes(NetworkConfig::MAX_BYTES + 1)).unwrap_err();
    assert!(error.to_string().contains("larger than 65536 bytes"), "{error}");
}

#[test]
fn types_are_strict_and_nothing_may_follow() {
    for text in ["", " ", "[]", "null", "7", r#"{"Network":"10.3.0.0/16"} x"#, r#"{"Network":"10.3.0.0/16"}{}"#] {
        rejects(text, "$");
    }
    for (key, value) in [
        ("EnableIPv4", "1"),
        ("EnableIPv6", "\"true\""),
        ("EnableNFTables", "0"),
        ("Network", "7"),
        ("SubnetLen", "-24"),
        ("SubnetLen", "24.5"),
        ("SubnetLen", "\"24\""),
        ("IPv6SubnetLen", "[]"),
        ("IPv6SubnetMin", "{}"),
        ("Backend", "\"vxlan\""),
    ] {
        rejects(&format!(r#"{{"network":"10.3.0.0/16","{key}":{value}}}"#), &format!("$.{key}"));
    }
    let nulls = r#"{"Network":"10.3.0.0/16","EnableIPv4":null,"EnableIPv6":null,"SubnetLen":null}"#;
    assert_eq!(pool(nulls, Family::V4), "10.3.0.0/16 len 24 10.3.1.0 10.3.255.0");
}

#[test]
fn the_backend_is_udp_only_where_none_is_given() {
    let kind = |backend: &str| parse(&format!(r#"{{"Network":"10.3.0.0/16"{backend}}}"#)).map(|c| c.backend.kind);
    assert_eq!(kind("").unwrap(), "udp");
    assert_eq!(kind(r#","Backend":{"type":"VXLAN","VNI":7}"#).unwrap(), "vxlan");
    for bad in ["null", "{}", r#"{"Type":""}"#, r#"{"Type":null}"#, r#"{"Type":7}"#] {
        assert_eq!(kind(&format!(r#","Backend":{bad}"#)).unwrap_err().path, "$.Backend.Type", "{bad}");
    }
}

#[test]
fn unknown_keys_and_a_missing_backend_are_kept_for_warnings_and_change_nothing() {
    let config = parse(r#"{"network":"10.3.0.0/16","Subnetlen":25,"SubnetLan":24,"Backnd":{"Type":"vxlan"}}"#).unwrap();
    assert_eq!(config.ignored.keys().collect::<Vec<_>>(), ["SubnetLan", "Backnd"]);
    assert!(config.backend.is_default && config.to_json().ends_with(r#""SubnetLan":24,"Backnd":{"Type":"vxlan"}}"#));
    let plain = parse(r#"{"Network":"10.3.0.0/16","Backend":{"Type":"udp"}}"#).unwrap();
    assert!(plain.is_same_overlay(&config) && !plain.backend.is_default && plain.ignored.keys().count() == 0);
}

#[test]
fn a_backend_reads_its_own_keys_and_errors_name_them() {
    let text = r#"{"Network":"10.3.0.0/16","Backend":{"Type":"vxlan","vni":7,"GBP":true,"Port":"x","Name":"n"}}"#;
    let settings = parse(text).unwrap().backend.settings;
    assert_eq!(settings.u64("VNI"), Ok(Some(7)));
    assert_eq!(settings.bool("gbp"), Ok(Some(true)));
    assert_eq!(settings.string("Name"), Ok(Some("n".to_owned())));
    assert_eq!(settings.u64("MTU"), Ok(None));
    assert_eq!(settings.u64("Port").unwrap_err().path, "$.Backend.Port");
}

#[test]
fn external_allocation_has_no_pool_and_judges_no_range() {
    let text = r#"{"Network":"10.3.0.0/30","SubnetLen":3,"SubnetMin":"9.9.9.9"}"#;
    let config = NetworkConfig::parse(text.as_bytes(), Allocation::External).unwrap();
    assert_eq!(config.networks.v4.unwrap(), Network { prefix: "10.3.0.0/30".parse().unwrap(), pool: None });
    assert!(NetworkConfig::parse(b"{}", Allocation::External).is_err());
}

proptest! {
    #[test]
    fn a_string_is_the_same_whether_the_other_members_are_kept_or_not(
        members in proptest::collection::vec(
            (
                "[kK][eE][yY]|other|\"|k\\\\u0065y",
                "\"\\PC{0,6}\"|\"\\\\u00e9\"|null|7|\\[1, \"x\"\\]|\\{\\}| \"x\" |[\"x}]",
            ),
            0..6,
        ),
    ) {
        let members: Vec<_> = members.iter().map(|(key, value)| format!("\"{key}\":{value}")).collect();
        let text = format!("{{{}}}", members.join(","));
        let kept = Object::parse(text.as_bytes()).and_then(|object| object.string("Key"));
        let alone = Object::string_of(&text, "Key");
        prop_assert_eq!(alone.map(|text| text.map(Cow::into_owned)), kept, "{}", text);
    }

    #[test]
    fn parsing_never_panics_on_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        let _ = NetworkConfig::parse(&bytes, Allocation::Pool);
    }

    #[test]
    fn parsing_never_panics_on_known_keys_of_any_value(
        members in proptest::collection::vec((0usize..14, 0usize..22), 0..10), pool: bool,
    ) {
        const KEYS: [&str; 14] = [
            "EnableIPv4", "EnableIPv6", "EnableNFTables", "Network", "IPv6Network", "SubnetMin", "SubnetMax",
            "SubnetLen", "IPv6SubnetMin", "IPv6SubnetMax", "IPv6SubnetLen", "Backend", "network", "x",
        ];
        const VALUES: [&str; 22] = [
            "true", "false", "null", "0", "1", "31", "127", "255", "1e9", "-1", "[[]]", "{}", "\"\"", "\"0.0.0.0/0\"",
            "\"10.0.0.0/8\"", "\"255.255.255.255/31\"", "\"::/1\"", "\"ffff::/16\"", "\"10.255.255.0\"",
            "\"ffff:ffff:ffff:ffff::\"", "{\"Type\":\"vxlan\"}", "\"255.255.255.252\"",
        ];
        let text = members.iter().map(|(key, value)| format!("\"{}\":{}", KEYS[*key], VALUES[*value]));
        let text = format!("{{{}}}", text.collect::<Vec<_>>().join(","));
        let allocation = if pool { Allocation::Pool } else { Allocation::External };
        if let Ok(config) = NetworkConfig::parse(text.as_bytes(), allocation) {
            prop_assert_eq!(NetworkConfig::parse(config.to_json().as_bytes(), allocation), Ok(config));
        }
    }

    #[test]
    fn what_parses_round_trips(
        v4 in any::<Option<u32>>(), v4_len in 0u8..=33, v6 in any::<Option<u128>>(), v6_len in 0u8..=129,
        subnet_len in proptest::option::of(0u8..=40), min in any::<Option<u32>>(), nft: bool,
        backend in prop_oneof![
            Just(""), Just("{\"Type\":\"VXLAN\",\"VNI\": 7, \"x\" : [1.10, {}]}"), Just("null"), Just("{\"type\":\"a\\\"b\"}")],
    ) {
        let mut fields = vec![format!("\"EnableIPv6\":{},\"enableipv4\":{}", v6.is_some(), v4.is_some())];
        fields.extend(v4.map(|v4| format!("\"Network\":\"{}/{v4_len}\"", Ipv4Addr::from(v4))));
        fields.extend(v6.map(|v6| format!("\"IPv6Network\":\"{}/{v6_len}\"", Ipv6Addr::from(v6))));
        fields.extend(subnet_len.map(|len| format!("\"SubnetLen\":{len}")));
        fields.extend(min.map(|min| format!("\"SubnetMin\":\"{}\"", Ipv4Addr::from(min & 0xffff_0000))));
        fields.push(format!("\"EnableNFTables\":{nft}"));
        if !backend.is_empty() {
            fields.push(format!("\"Backend\":{backend}"));
        }
        let text = format!("{{{}}}", fields.join(","));
        for allocation in [Allocation::Pool, Allocation::External] {
            if let Ok(config) = NetworkConfig::parse(text.as_bytes(), allocation) {
                let again = config.to_json();
                prop_assert_eq!(NetworkConfig::parse(again.as_bytes(), allocation), Ok(config), "{}", again);
            }
        }
    }
}
