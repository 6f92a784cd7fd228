//! The backend: computes kernel state from settings and host.

use flannelkit::config::{ConfigError, NetworkConfig};
use flannelkit::lease::LeaseAttrs;
use flannelkit::net::{Dual, Family, MacAddr, Mtu};
use flannelkit::spi::backend::{Backend, BackendError, LocalNode, NodeContext, Peer, Skip};
use flannelkit::spi::kernel::{self, LinkId, LinkName, PeerState, Route, RouteSlot, State};

use crate::device::Device;
use crate::published;

/// Routes to peers over a device that another program creates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Lan {
    interface: LinkName,
    slot: RouteSlot,
}

const MISSING: &str = "start the program that creates it, or correct $.Backend.Interface";
const DOWN: &str = "bring it up, and check its connection";
const UNADDRESSED: &str = "assign it an address";
const CHANGED: &str = "restore the address, or restart the agent to publish the new one";
const OFF_LINK: &str = "connect all nodes' devices to one network, with addresses in one prefix";

impl Lan {
    /// The backend's name in the configuration and in leases.
    pub const TYPE: &'static str = "lan";

    /// Parses the settings `Interface` and `Metric` of the network configuration.
    ///
    /// # Errors
    /// [`BackendError::Config`] names the setting. Final for this configuration.
    pub fn new(config: &NetworkConfig) -> Result<Self, BackendError> {
        let settings = &config.backend.settings;
        let wrong = |key, problem: &str, remedy: &str| ConfigError::new(settings.path_of(key), problem, remedy);
        let name = settings.string("Interface")?;
        let name = name.ok_or_else(|| wrong("Interface", "is missing", "name the device, such as \"eth1\""))?;
        let interface = LinkName::new(&name)
            .map_err(|error| wrong("Interface", &error.to_string(), "write the device's name, such as \"eth1\""))?;
        let slot = match settings.u64("Metric")? {
            None => RouteSlot::MAIN,
            Some(metric) => {
                let metric = u32::try_from(metric).ok().filter(|metric| *metric > 0);
                let metric = metric.ok_or_else(|| wrong("Metric", "is not a valid metric", "write 1 to 4294967295"))?;
                RouteSlot::new(RouteSlot::MAIN.table, metric)
            }
        };
        Ok(Self { interface, slot })
    }

    fn device<'a>(&self, context: &'a NodeContext) -> Option<Device<'a>> {
        Device::find(&context.host, &self.interface)
    }

    /// Returns the device if it can carry packets of this family.
    fn ready_device<'a>(&self, local: &'a LocalNode, family: Family) -> Result<Device<'a>, Skip> {
        let (name, host) = (&self.interface, &local.context.host);
        let not_ready = |what: String, remedy| Skip::NotReady { what, remedy };
        let device = self.device(&local.context).ok_or_else(|| not_ready(format!("{name} is missing"), MISSING))?;
        if !device.link.carrier {
            return Err(not_ready(format!("{name} is down or without a carrier"), DOWN));
        }
        // Peers send to the address in the lease, which does not follow the device's.
        let own = published::address(&local.lease.attrs, family).ok();
        if !own.is_some_and(|own| device.has(host, own)) {
            let what = format!("{name} does not have the {family} address that this node publishes");
            return Err(not_ready(what, CHANGED));
        }
        Ok(device)
    }
}

impl Backend for Lan {
    fn name(&self) -> &'static str {
        Self::TYPE
    }

    fn wire_type(&self) -> &'static str {
        Self::TYPE
    }

    fn writes(&self) -> bool {
        true
    }

    fn slots(&self) -> Vec<RouteSlot> {
        vec![self.slot]
    }

    /// Returns none: the configuration names the device. An `External` device is identified by the overlay's mark,
    /// which the other program would have to set.
    fn devices(&self, _: &LocalNode) -> Vec<kernel::Device> {
        Vec::new()
    }

    fn mtu(&self, context: &NodeContext) -> Option<Mtu> {
        self.device(context).map(|device| Mtu(device.link.mtu))
    }

    fn advertise(&self, context: &NodeContext) -> Result<LeaseAttrs, BackendError> {
        let host = |what: String, remedy: &str| BackendError::Host { what, remedy: remedy.to_owned() };
        let name = &self.interface;
        let device = self.device(context).ok_or_else(|| host(format!("{name} is missing"), MISSING))?;
        let mut data = Dual::default();
        for family in context.config.networks.families() {
            let addr = device.address(&context.host, family);
            let addr = addr.ok_or_else(|| host(format!("{name} has no {family} address"), UNADDRESSED))?;
            *data.slot(family) = Some(published::data(addr));
        }
        Ok(LeaseAttrs::new(context.public).with_backend(Self::TYPE, data))
    }

    fn hardware_address(&self, _: &LeaseAttrs, _: Family) -> Result<Option<MacAddr>, Skip> {
        Ok(None)
    }

    fn base(&self, _: &LocalNode) -> State {
        State::default()
    }

    fn peer(&self, local: &LocalNode, peer: &Peer, family: Family) -> Result<PeerState, Skip> {
        let context = &local.context;
        let network = context.config.networks.get(family);
        let subnet = network.and(peer.subnets.get(family)).ok_or(Skip::NoAddress(family))?;
        let addr = published::address(&peer.attrs, family)?;
        let device = self.ready_device(local, family)?;
        if context.host.addresses.iter().any(|own| own.addr == addr) {
            return Err(Skip::BadData(format!("{family} Address is this node's own")));
        }
        // The kernel refuses a gateway that is off-link. An untrusted one must be on this device's link.
        if context.host.on_link(addr) != Some(device.index) {
            return Err(Skip::NotOnLink { addr, remedy: OFF_LINK });
        }
        let link = if device.index == context.uplink.index { LinkId::Uplink } else { LinkId::Other(device.index) };
        Ok(PeerState::default().with_route(*subnet, Route::direct(*subnet, addr, link).in_slot(self.slot)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    use flannelkit::lease::Lease;
    use flannelkit::spi::kernel::{HostAddress, HostFacts};
    use flannelkit::testing::backend_contract::{self, Made};
    use flannelkit::testing::samples;

    const SETTINGS: &str = r#"{"Type":"lan","Interface":"eth1","Metric":50}"#;
    const ETH1: u32 = samples::UPLINK + 1;

    #[test]
    fn the_backend_contract_holds() {
        // All hosts of the contract have addresses on eth0.
        backend_contract::all(&Made::new(r#"{"Type":"lan","Interface":"eth0","Metric":50}"#, Lan::new));
        backend_contract::all(&Made::new(r#"{"Type":"lan","Interface":"eth0"}"#, Lan::new));
    }

    fn lan() -> Lan {
        Lan::new(&samples::config(&Family::BOTH, SETTINGS)).unwrap()
    }

    /// Returns node 1, whose eth1 has 198.51.100.1/24 and 2001:db8:1::1/64, after `change` to its host.
    fn local(change: impl FnOnce(&mut HostFacts)) -> LocalNode {
        let mut context = samples::context(samples::config(&Family::BOTH, SETTINGS));
        let mut host = HostFacts::clone(&context.host);
        host.links.insert(ETH1, samples::link("eth1").into());
        host.addresses.push(HostAddress::new(ETH1, "198.51.100.1".parse().unwrap(), 24));
        host.addresses.push(HostAddress::new(ETH1, "2001:db8:1::1".parse().unwrap(), 64));
        let prefixes = [("192.0.2.0/24", samples::UPLINK), ("198.51.100.0/24", ETH1), ("2001:db8:1::/64", ETH1)];
        host.on_link = prefixes.map(|(prefix, link)| samples::on_link(prefix, link)).into_iter().collect();
        change(&mut host);
        context.host = Arc::new(host);
        let own = peer("198.51.100.1", "2001:db8:1::1").attrs;
        samples::local(context, own)
    }

    fn peer(v4: &str, v6: &str) -> Lease {
        let mut peer = samples::lease(2, &Family::BOTH, Lan::TYPE);
        peer.attrs.backend_data = samples::dual(v4, v6).map(|_, addr| published::data(*addr));
        peer
    }

    #[test]
    fn a_peers_subnet_is_routed_to_its_address_on_the_device_with_the_metric() {
        let (lan, local) = (lan(), local(|_| {}));
        let published = lan.advertise(&local.context).unwrap().to_json();
        assert!(published.contains(r#""BackendData":{"Address":"198.51.100.1"}"#), "{published}");
        assert!(published.contains(r#""BackendV6Data":{"Address":"2001:db8:1::1"}"#), "{published}");
        for (family, addr) in [(Family::V4, "198.51.100.2"), (Family::V6, "2001:db8:1::2")] {
            let state = lan.peer(&local, &peer("198.51.100.2", "2001:db8:1::2"), family).unwrap();
            let [(prefix, route)] = &state.routes[..] else { panic!("{state:?}") };
            assert_eq!(*prefix, samples::node_subnet(family, 2));
            assert_eq!((route.gateway, route.link), (Some(addr.parse().unwrap()), Some(LinkId::Other(ETH1))));
            assert_eq!(route.slot(), RouteSlot::new(254, 50));
        }
    }

    #[test]
    fn peers_are_not_ready_while_the_device_or_its_address_is_missing() {
        type Change = fn(&mut HostFacts);
        let cases: [(Change, &str, bool); 4] = [
            (|host| drop(host.links.remove(&ETH1)), "eth1 is missing", false),
            (|host| host.addresses.retain(|it| it.link != ETH1), "eth1 does not have the IPv4 address", false),
            (|host| host.addresses[2].addr = "198.51.100.9".parse().unwrap(), "eth1 does not have the IPv4", true),
            (|host| host.links.get_mut(&ETH1).unwrap().carrier = false, "eth1 is down", true),
        ];
        for (change, says, publishes) in cases {
            let local = local(change);
            match lan().peer(&local, &peer("198.51.100.2", "2001:db8:1::2"), Family::V4) {
                Err(Skip::NotReady { what, remedy }) => assert!(what.starts_with(says) && !remedy.is_empty(), "{what}"),
                other => panic!("{says}: {other:?}"),
            }
            assert_eq!(lan().advertise(&local.context).is_ok(), publishes, "{says}");
        }
    }

    #[test]
    fn a_gateway_that_is_off_link_or_this_node_is_refused() {
        let refused = |addr: &str| lan().peer(&local(|_| {}), &peer(addr, ""), Family::V4).unwrap_err();
        for elsewhere in ["203.0.113.7", "192.0.2.2"] {
            assert!(matches!(refused(elsewhere), Skip::NotOnLink { .. }), "{elsewhere}");
        }
        assert!(matches!(refused("198.51.100.1"), Skip::BadData(_)));
        assert!(matches!(refused("192.0.2.1"), Skip::BadData(_)));
    }

    #[test]
    fn invalid_settings_are_named() {
        for (settings, path) in [
            (r#"{"Type":"lan"}"#, "$.Backend.Interface"),
            (r#"{"Type":"lan","Interface":7}"#, "$.Backend.Interface"),
            (r#"{"Type":"lan","Interface":"a/b"}"#, "$.Backend.Interface"),
            (r#"{"Type":"lan","Interface":"eth1","Metric":0}"#, "$.Backend.Metric"),
            (r#"{"Type":"lan","Interface":"eth1","Metric":4294967296}"#, "$.Backend.Metric"),
        ] {
            let error = Lan::new(&samples::config(&[Family::V4], settings)).unwrap_err().to_string();
            assert!(error.starts_with(path), "{settings}: {error}");
        }
    }
}
