use std::sync::Arc;

use flannel_core::kernel::{HostAddress, HostFacts, HostLink, Link, LinkId, LinkKind, LinkName, Op, OpText};
use flannel_core::lease::{Json, Lease};
use flannel_core::net::{Dual, Prefix, Vni};
use flannel_core::plan::plan;
use flannel_core::subnet::NodeIdentity;
use flannel_core::testing::backend_contract::{self, Made};
use flannel_core::testing::samples::{self, UPLINK, lease, node_address, node_subnet};
use proptest::prelude::*;

use super::*;

const V4: &[Family] = &[Family::V4];

fn backend(families: &[Family], settings: &str) -> (Vxlan, NodeContext) {
    let config = samples::config(families, &format!(r#"{{"Type":"vxlan"{settings}}}"#));
    (Vxlan::new(&config).unwrap(), samples::context(config))
}

fn local(families: &[Family], settings: &str) -> (Vxlan, LocalNode) {
    let (backend, context) = backend(families, settings);
    let attrs = backend.advertise(&context).unwrap();
    (backend, samples::local(context, attrs))
}

fn peer(n: u8) -> Lease {
    let mut lease = lease(n, &Family::BOTH, Vxlan::TYPE);
    let data = |family: u8| Json::parse(&format!(r#"{{"VNI":1,"VtepMAC":"02:00:00:00:0{family}:{n:02x}"}}"#)).ok();
    lease.attrs.backend_data = Dual { v4: data(4), v6: data(6) };
    lease
}

#[test]
fn the_backend_contract_holds_for_all_settings() {
    for settings in [
        r#"{"Type":"vxlan"}"#,
        r#"{"Type":"vxlan","VNI":7,"Port":4789,"MTU":1400,"GBP":true,"Learning":true}"#,
        r#"{"Type":"vxlan","DirectRouting":true}"#,
    ] {
        backend_contract::all(&Made::new(settings, Vxlan::new));
    }
}

/// Returns the commands that would be sent to an empty kernel.
fn commands(backend: &Vxlan, local: &LocalNode, peers: &[Lease]) -> Vec<String> {
    let mut wanted = backend.base(local);
    for peer in peers {
        for family in local.context.config.networks.families() {
            wanted.add(&backend.peer(local, peer, family).unwrap());
        }
    }
    let scope = local.scope(backend, &[]);
    scope.mark(&mut wanted);
    let plan = plan(&wanted, &State::default(), &scope, &|_| None);
    let text = |op: &Op| OpText { op, scope: &scope }.to_string();
    plan.ops.iter().map(text).map(|text| text.split(" proto ").next().unwrap_or_default().to_owned()).collect()
}

#[test]
fn the_golden_state_of_one_peer() {
    let (backend, local) = local(V4, r#","Port":4789"#);
    let mac = backend.hardware_address(&local.lease.attrs, Family::V4).unwrap().unwrap();
    assert_eq!(
        commands(&backend, &local, &[peer(2)]),
        [
            format!(
                "link add flannel.1 mtu 1450 address {mac} type vxlan id 1 local 192.0.2.1 dstport 4789 nolearning"
            ),
            "address add 10.42.1.0/32 dev flannel.1".into(),
            "fdb replace 02:00:00:00:04:02 dev flannel.1 dst 192.0.2.2".into(),
            "neigh replace 10.42.2.0 lladdr 02:00:00:00:04:02 dev flannel.1 nud permanent".into(),
            "route add 10.42.2.0/24 via 10.42.2.0 dev flannel.1".into(),
        ]
    );
    let route = backend.peer(&local, &peer(2), Family::V4).unwrap().routes.remove(0).1;
    assert!(route.onlink && route.has_own_protocol());
    let mut base = backend.base(&local);
    local.scope(&backend, &[]).mark(&mut base);
    let device = &base.links[&LinkId::Own(0)];
    assert_eq!(
        (device.group, device.alias.as_deref(), device.up),
        (local.context.overlay.mark(), Some("flannelkit:flannel"), true)
    );
    let LinkKind::Vxlan(vxlan) = &device.kind else { panic!("{device:?}") };
    assert_eq!(vxlan.lower, Some(LinkId::Uplink));
}

#[test]
fn dual_stack_has_a_device_of_each_family() {
    let (backend, local) = local(&Family::BOTH, "");
    let base = backend.base(&local);
    let shape = |slot| {
        let link = &base.links[&LinkId::Own(slot)];
        (link.name.as_str().to_owned(), link.mtu)
    };
    assert_eq!((shape(0), shape(1)), (("flannel.1".into(), 1450), ("flannel-v6.1".into(), 1430)));
    assert_eq!(backend.mtu(&local.context), Some(Mtu(1430)));
    assert_ne!(base.links[&LinkId::Own(0)].mac, base.links[&LinkId::Own(1)].mac);
    let commands = commands(&backend, &local, &[peer(2)]);
    for expected in [
        "address add fd00:42:0:1::/128 dev flannel-v6.1",
        "fdb replace 02:00:00:00:06:02 dev flannel-v6.1 dst 2001:db8::2",
        "neigh replace fd00:42:0:2:: lladdr 02:00:00:00:06:02 dev flannel-v6.1 nud permanent",
        "route add fd00:42:0:2::/64 via fd00:42:0:2:: dev flannel-v6.1",
    ] {
        assert!(commands.iter().any(|command| command == expected), "{expected}: {commands:#?}");
    }
    let only_v6 = self::local(&[Family::V6], "").1;
    assert_eq!(backend.base(&only_v6).links[&LinkId::Own(0)].name.as_str(), "flannel-v6.1");
}

#[test]
fn what_is_published_is_flannels_text_and_the_device_has_that_address() {
    let (backend, local) = local(&Family::BOTH, r#","VNI":7"#);
    let attrs = &local.lease.attrs;
    for (slot, family) in (0..).zip(Family::BOTH) {
        let mac = backend.hardware_address(attrs, family).unwrap().unwrap();
        let data = attrs.backend_data.get(family).unwrap();
        assert_eq!(data.as_str(), format!(r#"{{"VNI":7,"VtepMAC":"{mac}"}}"#));
        assert_eq!(backend.base(&local).links[&LinkId::Own(slot)].mac, Some(mac));
    }
    assert_eq!((&*attrs.backend_type, attrs.public_ip.v4), ("vxlan", Some(node_address(Family::V4, 1))));
}

#[test]
fn the_mac_address_is_the_previous_one_else_the_devices_else_derived() {
    let (backend, mut context) = backend(V4, "");
    let chosen = |context: &NodeContext| {
        let attrs = backend.advertise(context).unwrap();
        backend.hardware_address(&attrs, Family::V4).unwrap().unwrap().to_string()
    };
    // This value must never change: a node that lost its state has to publish the same address again.
    assert_eq!(chosen(&context), "d2:07:b7:00:e7:5c");
    let mut host = HostFacts::clone(&context.host);
    let mut links = backend.base(&samples::local(context.clone(), LeaseAttrs::default())).links;
    let mut device = links.remove(&LinkId::Own(0)).unwrap();
    (device.mac, device.group, device.alias) = ("02:00:00:00:00:aa".parse().ok(), 0, None);
    host.links.insert(9, device.into());
    context.host = Arc::new(host.clone());
    assert_eq!(chosen(&context), "02:00:00:00:00:aa");
    host.links.get_mut(&9).unwrap().name = LinkName::new("renamed").unwrap();
    context.host = Arc::new(host.clone());
    assert_eq!(chosen(&context), "d2:07:b7:00:e7:5c");
    host.links.get_mut(&9).unwrap().group = context.overlay.mark();
    context.host = Arc::new(host);
    assert_eq!(chosen(&context), "02:00:00:00:00:aa");
    context.previous = Some(Arc::new(peer(1)));
    assert_eq!(chosen(&context), "02:00:00:00:04:01");
    // An address that an older record already uses is skipped for the next one.
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..8 {
        let mac = chosen(&context);
        context.taken.insert(mac.parse().unwrap());
        assert!(seen.insert(mac));
    }
}

/// Publishes other addresses, which the host has.
fn give_another_address(context: &mut NodeContext) {
    let mut host = HostFacts::clone(&context.host);
    for family in Family::BOTH {
        let addr = node_address(family, 77);
        *context.public.slot(family) = Some(addr);
        host.addresses.push(HostAddress::new(UPLINK, addr, 24));
    }
    context.host = Arc::new(host);
}

#[test]
fn the_mac_address_of_a_device_made_for_another_address_is_not_used_again() {
    let (backend, mut context) = backend(&Family::BOTH, "");
    let mut host = HostFacts::clone(&context.host);
    let left = backend.base(&samples::local(context.clone(), backend.advertise(&context).unwrap())).links;
    host.links.extend((9..).zip(left.into_values().map(HostLink::from)));
    context.host = Arc::new(host);
    let macs = |context: &NodeContext| {
        let attrs = backend.advertise(context).unwrap();
        Family::BOTH.map(|family| backend.hardware_address(&attrs, family).unwrap())
    };
    let before = macs(&context);
    let differs = |after: [Option<MacAddr>; 2]| before.iter().zip(after).all(|(before, after)| *before != after);
    context.node = NodeIdentity::of_address(node_address(Family::V4, 77));
    let mut behind_nat = context.clone();
    for family in Family::BOTH {
        *behind_nat.public.slot(family) = Some(node_address(family, 77));
    }
    assert!(differs(macs(&behind_nat)), "{before:?}");
    give_another_address(&mut context);
    assert!(differs(macs(&context)), "{before:?}");
}

#[test]
fn a_device_sends_from_an_address_that_the_host_has() {
    let (backend, mut context) = backend(&Family::BOTH, "");
    let sources = |context: &NodeContext| {
        let local = samples::local(context.clone(), backend.advertise(context).unwrap());
        let published = Family::BOTH.map(|family| local.lease.attrs.public_ip.get(family).copied());
        let links = backend.base(&local).links;
        let of = |link: &Link| if let LinkKind::Vxlan(vxlan) = &link.kind { vxlan.local } else { None };
        (published, links.values().map(of).collect::<Vec<_>>())
    };
    let addresses = |n| Family::BOTH.map(|family| Some(node_address(family, n)));
    assert_eq!(sources(&context), (addresses(1), addresses(1).to_vec()));
    for family in Family::BOTH {
        *context.public.slot(family) = Some(node_address(family, 77));
    }
    assert_eq!(sources(&context), (addresses(77), addresses(1).to_vec()), "behind a NAT");
    give_another_address(&mut context);
    assert_eq!(sources(&context), (addresses(77), addresses(77).to_vec()), "another address of the host");
}

#[test]
fn direct_routing_needs_a_peer_on_one_of_our_links() {
    let (backend, mut local) = local(V4, r#","DirectRouting":true"#);
    let state = backend.peer(&local, &peer(2), Family::V4).unwrap();
    let (prefix, route) = state.routes[0].clone();
    assert_eq!((state.fdb, state.neighbour, prefix), (None, None, node_subnet(Family::V4, 2)));
    assert_eq!(
        (route.gateway, route.link, route.onlink),
        (Some(node_address(Family::V4, 2)), Some(LinkId::Uplink), false)
    );
    let mut host = HostFacts::clone(&local.context.host);
    host.on_link = [samples::on_link("192.0.2.0/25", UPLINK + 1)].into_iter().collect();
    local.context.host = Arc::new(host);
    let link = |n| backend.peer(&local, &peer(n), Family::V4).unwrap().routes[0].1.link;
    assert_eq!((link(2), link(200)), (Some(LinkId::Other(UPLINK + 1)), Some(LinkId::Own(0))));
}

#[test]
fn settings_out_of_range_name_their_place() {
    let error = |families: &[Family], settings: &str| {
        let config = samples::config(families, &format!(r#"{{"Type":"vxlan",{settings}}}"#));
        match Vxlan::new(&config).unwrap_err() {
            BackendError::Config(error) => error.path,
            other => panic!("{other}"),
        }
    };
    for (settings, path) in [
        (r#""VNI":16777216"#, "$.Backend.VNI"),
        (r#""VNI":10000000"#, "$.Backend.VNI"),
        (r#""VNI":-1"#, "$.Backend.VNI"),
        (r#""Port":65536"#, "$.Backend.Port"),
        (r#""mtu":65536"#, "$.Backend.MTU"),
        (r#""GBP":1"#, "$.Backend.GBP"),
        (r#""Learning":"yes""#, "$.Backend.Learning"),
        (r#""DirectRouting":{}"#, "$.Backend.DirectRouting"),
    ] {
        assert_eq!(error(V4, settings), path, "{settings}");
    }
    assert_eq!(error(&Family::BOTH, r#""VNI":10000"#), "$.Backend.VNI");
    let (all, _) =
        backend(V4, r#","vni":9999999,"Port":4789,"MTU":9000,"GBP":true,"Learning":true,"directrouting":true"#);
    let expected = Config {
        vni: Vni::new(9_999_999).unwrap(),
        port: Some(4789),
        mtu: Some(Mtu(9000)),
        gbp: true,
        learning: true,
        direct_routing: true,
    };
    assert_eq!(*all.config(), expected);
    let (none, _) = backend(V4, r#","VNI":null,"Port":0,"MTU":0"#);
    assert_eq!((none.config().vni.value(), none.config().port, none.config().mtu), (1, None, None));
    let port = |backend: Vxlan| backend.with_default_port(8472).config().port;
    assert_eq!((port(all), port(none)), (Some(4789), Some(8472)));
}

#[test]
fn an_underlay_that_is_too_narrow_is_refused_with_its_remedy() {
    let verdict = |families: &[Family], settings: &str, uplink: u32| {
        let (backend, mut context) = backend(families, settings);
        context.uplink.mtu = Mtu(uplink);
        backend.advertise(&context)
    };
    assert!(verdict(V4, "", 626).is_ok() && verdict(&Family::BOTH, "", 1350).is_ok());
    assert!(matches!(verdict(V4, "", 625), Err(BackendError::Host { .. })));
    assert!(matches!(verdict(&Family::BOTH, "", 1349), Err(BackendError::Host { .. })));
    assert!(
        matches!(verdict(V4, r#","MTU":500"#, 1500), Err(BackendError::Config(error)) if error.path == "$.Backend.MTU")
    );
}

#[test]
fn a_configured_mtu_counts_up_to_the_uplinks() {
    let mtu = |settings: &str| {
        let (backend, local) = local(V4, settings);
        (backend.mtu(&local.context).unwrap().0, backend.base(&local).links[&LinkId::Own(0)].mtu)
    };
    assert_eq!((mtu(r#","MTU":1400"#), mtu(r#","MTU":9000"#)), ((1350, 1350), (1450, 1450)));
}

#[test]
fn a_peer_that_publishes_too_little_is_skipped_with_the_reason() {
    let (backend, local) = local(V4, "");
    assert_eq!(backend.peer(&local, &peer(2), Family::V6), Err(Skip::NoAddress(Family::V6)));
    let without = |change: fn(&mut Lease)| {
        let mut lease = peer(2);
        change(&mut lease);
        backend.peer(&local, &lease, Family::V4).unwrap_err().to_string()
    };
    assert_eq!(without(|lease| lease.subnets.v4 = None), "publishes no IPv4 address or subnet");
    assert_eq!(without(|lease| lease.attrs.public_ip.v4 = None), "publishes no IPv4 address or subnet");
    assert_eq!(without(|lease| lease.attrs.backend_data.v4 = None), "backend data: no BackendData");
    for data in ["7", "{}", r#"{"VtepMAC":7}"#, r#"{"VtepMAC":"02:00"}"#, r#"{"VtepMAC":null}"#] {
        let mut lease = peer(2);
        lease.attrs.backend_data.v4 = Json::parse(data).ok();
        assert!(matches!(backend.peer(&local, &lease, Family::V4), Err(Skip::BadData(_))), "{data}");
    }
    let mut lease = peer(2);
    lease.attrs.backend_data.v4 = Json::parse(r#"{"vtepmac":"02:00:00:00:04:02","vni":"x"}"#).ok();
    assert!(backend.peer(&local, &lease, Family::V4).is_ok());
}

proptest! {
    #[test]
    fn the_keys_of_base_and_peers_are_disjoint_and_in_scope(
        peers in proptest::collection::btree_set(2u8..=255, 0..40), direct: bool,
    ) {
        let (backend, local) = local(&Family::BOTH, &format!(r#","DirectRouting":{direct}"#));
        let mut wanted = backend.base(&local);
        let mut objects = wanted.len();
        for n in peers {
            for family in Family::BOTH {
                let state = backend.peer(&local, &peer(n), family).unwrap();
                objects += usize::from(state.fdb.is_some()) + usize::from(state.neighbour.is_some()) + state.routes.len();
                prop_assert!(state.routes.iter().all(|(prefix, _)| local.scope(&backend, &[]).covers(prefix)));
                wanted.add(&state);
            }
        }
        prop_assert_eq!(wanted.len(), objects);
        prop_assert!(plan(&wanted, &wanted, &local.scope(&backend, &[]), &|_: &Prefix| None).is_empty());
    }
}
