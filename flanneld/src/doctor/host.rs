//! Checks of the host, made on data that was read before, so that they can be tested.

use std::net::SocketAddr;

use flannel_backend_udp::Udp;
use flannel_backend_vxlan::Vxlan;
use flannel_core::backend::Uplink;
use flannel_core::config::NetworkConfig;
use flannel_core::kernel::{HostFacts, LinkKind, OverlayName, Vxlan as VxlanLink};
use flannel_core::net::{Dual, Family, Prefix};
use flannel_core::subnet_env::SubnetEnv;

use super::source::Source;
use super::{Finding, Severity};
use crate::assemble::BACKENDS;

/// 2024-01-01, in seconds since 1970: before this program was written.
const LONG_AGO: u64 = 1_704_067_200;

/// Facts about the host.
pub(super) struct Host<'a> {
    pub(super) overlay: &'a OverlayName,
    pub(super) config: Option<&'a NetworkConfig>,
    pub(super) facts: &'a HostFacts,
    pub(super) uplink: Option<&'a Uplink>,
    pub(super) env: Option<&'a SubnetEnv>,
    pub(super) agents: Agents,
}

/// Which agents of this overlay run here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Agents {
    None,
    /// One of this program.
    Ours,
    /// Another, such as a Go flannel before an upgrade: what it uses becomes free when it is stopped.
    Another,
}

impl Host<'_> {
    /// Runs all checks that need no store.
    pub(super) fn judge(&self, source: &dyn Source) -> Vec<Finding> {
        let mut findings = self.backend();
        findings.extend(self.networks());
        findings.push(self.mtu());
        findings.extend(self.forwarding(source));
        findings.push(self.reverse_path(source));
        findings.extend(self.bridge_netfilter(source));
        findings.extend(self.vxlan());
        findings.extend(self.udp(source));
        findings.extend(network_daemons(source));
        findings.push(clock(source));
        findings
    }

    fn families(&self) -> Vec<Family> {
        match self.config {
            Some(config) => config.networks.families().collect(),
            None => vec![Family::V4],
        }
    }

    fn runs(&self, backend: &str) -> bool {
        self.config.is_some_and(|config| config.backend.kind == backend)
    }

    fn backend(&self) -> Vec<Finding> {
        let Some(config) = self.config else { return Vec::new() };
        let kind = config.backend.kind.as_str();
        vec![if BACKENDS.contains(&kind) {
            Finding::ok("backend", format!("{kind} is available"))
        } else {
            let fix = format!("set $.Backend.Type in the store to one of {}", BACKENDS.join(", "));
            Finding::new("backend", Severity::Error, format!("{kind:?} is not available here"), fix)
        }]
    }

    fn networks(&self) -> Vec<Finding> {
        let Some(config) = self.config else { return Vec::new() };
        config.networks.iter().map(|(family, network)| self.network(family, network.prefix)).collect()
    }

    /// Checks whether pods could get addresses that another host has.
    fn network(&self, family: Family, network: Prefix) -> Finding {
        let key = match family {
            Family::V4 => "$.Network",
            Family::V6 => "$.IPv6Network",
        };
        let fix = format!(
            "write another {key} to the store, which does not overlap the nodes' own networks; then restart the agents"
        );
        let found = |severity, found: String| Finding::new("network", severity, found, fix.clone());
        let own = self.uplink.and_then(|uplink| Some((uplink, *uplink.addrs.get(family)?)));
        if let Some((uplink, addr)) = own.filter(|(_, addr)| network.contains(*addr)) {
            let what = format!("{network} contains {addr} of {}: nodes do not accept each other as peers", uplink.name);
            return found(Severity::Error, what);
        }
        if let Some(gateway) =
            self.facts.defaults.iter().filter_map(|route| route.gateway).find(|hop| network.contains(*hop))
        {
            return found(Severity::Warning, format!("{network} contains {gateway}, the gateway of a default route"));
        }
        let is_around = |prefix: &Prefix| prefix.covers(&network) && *prefix != network;
        // One inside the network counts more than one around it.
        match self.foreign(family).filter(|prefix| prefix.overlaps(&network)).min_by_key(is_around) {
            Some(prefix) if is_around(&prefix) => {
                let what = format!("{network} lies in {prefix}, which this host is connected to");
                found(Severity::Note, format!("{what}: correct as long as no host there has an address in it"))
            }
            Some(prefix) => found(Severity::Warning, format!("{network} overlaps {prefix}, which is connected")),
            None => Finding::ok("network", format!("{network} does not overlap host networks")),
        }
    }

    /// Returns the connected prefixes of the host, without those of the overlay's devices and of this node's pods.
    fn foreign(&self, family: Family) -> impl Iterator<Item = Prefix> + '_ {
        let overlays = |index: u32| {
            let link = self.facts.links.get(&index);
            link.is_some_and(|link| self.overlay.owns(link.group, link.alias.as_deref()))
        };
        let pods = self.env.and_then(|env| env.subnets.get(family).copied());
        let addresses = self.facts.addresses.iter().filter(move |address| !overlays(address.link));
        let prefixes = addresses.filter_map(|address| Prefix::masked(address.addr, address.len).ok());
        prefixes.filter(move |prefix| prefix.family() == family && !pods.is_some_and(|pods| pods.covers(prefix)))
    }

    /// Compares the configuration with that of the last run, which is in `subnet.env`.
    pub(super) fn change(&self) -> Option<Finding> {
        let (config, env) = (self.config?, self.env?);
        let (wanted, written) = (config.networks.map(|_, network| network.prefix), env.networks);
        let list = |networks: &Dual<Prefix>| {
            networks.iter().map(|(_, network)| network.to_string()).collect::<Vec<_>>().join(" and ")
        };
        if wanted == written || written.is_empty() {
            return None;
        }
        let found = format!("the network in the store is {}, in subnet.env {}", list(&wanted), list(&written));
        Some(Finding::new(
            "configuration",
            Severity::Warning,
            found,
            "restart the agent (systemctl restart flanneld): it then uses the new network",
        ))
    }

    /// The severity of what keeps an agent from starting, unless it goes away with another agent.
    fn in_the_way(&self) -> Severity {
        if self.agents == Agents::Another { Severity::Warning } else { Severity::Error }
    }

    fn mtu(&self) -> Finding {
        let Some(uplink) = self.uplink else { return Finding::ok("mtu", "not checked: there is no uplink") };
        let v6 = self.families().contains(&Family::V6);
        let overhead = match (self.runs(Vxlan::TYPE), self.runs(Udp::TYPE), v6) {
            (true, _, false) => 50,
            (true, _, true) => 70,
            (_, true, false) => 28,
            (_, true, true) => 48,
            (false, false, _) => 0,
        };
        let most = uplink.mtu.0.saturating_sub(overhead);
        let least = if v6 { 1280 } else { 576 };
        if most < least {
            let fix = format!("ip link set {} mtu {} or more, on every node", uplink.name, least + overhead);
            let found = format!(
                "{} has MTU {}: {most} bytes are left for pods, and {least} are needed",
                uplink.name, uplink.mtu
            );
            return Finding::new("mtu", Severity::Error, found, fix);
        }
        match self.env.and_then(|env| env.mtu) {
            Some(written) if written.0 > most => {
                let fix =
                    "start or restart the agent, then restart the pods: they keep the MTU that they were created with";
                let found = format!(
                    "subnet.env gives pods MTU {written}, and {} has room for {most}: large packets are lost",
                    uplink.name
                );
                Finding::new("mtu", self.in_the_way(), found, fix)
            }
            _ => Finding::ok("mtu", format!("{} has MTU {}, pods get at most {most}", uplink.name, uplink.mtu)),
        }
    }

    fn forwarding(&self, source: &dyn Source) -> Vec<Finding> {
        let judge = |family: Family| {
            let (name, key) = match family {
                Family::V4 => ("net/ipv4/ip_forward", "net.ipv4.ip_forward"),
                Family::V6 => ("net/ipv6/conf/all/forwarding", "net.ipv6.conf.all.forwarding"),
            };
            match source.sysctl(name).as_deref() {
                Some("0") | None => {
                    let fix = format!("sysctl -w {key}=1 (at boot: echo {key}=1 >/etc/sysctl.d/90-flannel.conf)");
                    Finding::new(
                        "forwarding",
                        Severity::Error,
                        format!("this host does not forward {family}: pods cannot reach other nodes"),
                        fix,
                    )
                }
                Some(_) => Finding::ok("forwarding", format!("{family} is forwarded")),
            }
        };
        self.families().into_iter().map(judge).collect()
    }

    /// Checks `rp_filter`. The kernel uses the maximum of `all` and the device's own value (kernel, ip-sysctl).
    fn reverse_path(&self, source: &dyn Source) -> Finding {
        let read = |device: &str| -> u8 {
            let value = source.sysctl(&format!("net/ipv4/conf/{device}/rp_filter"));
            value.and_then(|text| text.parse().ok()).unwrap_or_default()
        };
        let all = read("all");
        let ours = self.facts.links.values().filter(|link| self.overlay.owns(link.group, link.alias.as_deref()));
        let names =
            self.uplink.map(|uplink| uplink.name.as_str()).into_iter().chain(ours.map(|link| link.name.as_str()));
        let strict: Vec<&str> = names.filter(|name| all.max(read(name)) == 1).collect();
        if strict.is_empty() {
            return Finding::ok("rp_filter", "not strict on the devices of the overlay");
        }
        // With slashes, because names of devices may have dots.
        let fix = format!("if packets are lost: sysctl -w net/ipv4/conf/{}/rp_filter=2 (loose)", strict[0]);
        let found = format!(
            "strict reverse path filter on {}: it drops packets whose replies take another device",
            strict.join(", ")
        );
        Finding::new("rp_filter", Severity::Note, found, fix)
    }

    fn bridge_netfilter(&self, source: &dyn Source) -> Vec<Finding> {
        let judge = |family: Family| {
            let name = match family {
                Family::V4 => "bridge-nf-call-iptables",
                Family::V6 => "bridge-nf-call-ip6tables",
            };
            match source.sysctl(&format!("net/bridge/{name}")).as_deref() {
                Some("1") => Finding::ok("bridge-nf", format!("{name} is on")),
                Some(_) => {
                    let found = format!("{name} is off: services do not work between pods on one bridge");
                    Finding::new("bridge-nf", Severity::Note, found, format!("sysctl -w net.bridge.{name}=1"))
                }
                None => {
                    let found = format!("{name} does not exist: services do not work between pods on one bridge");
                    let fix =
                        "modprobe br_netfilter (at boot: echo br_netfilter >/etc/modules-load.d/br_netfilter.conf)";
                    Finding::new("bridge-nf", Severity::Note, found, fix)
                }
            }
        };
        self.families().into_iter().map(judge).collect()
    }

    fn udp(&self, source: &dyn Source) -> Vec<Finding> {
        let Some(config) = self.config.filter(|_| self.runs(Udp::TYPE)) else { return Vec::new() };
        let udp = match Udp::new(config) {
            Ok(udp) => udp,
            Err(error) => {
                let fix = "correct the network configuration in the store";
                return vec![Finding::new("udp", Severity::Error, crate::chain(&error), fix)];
            }
        };
        let driver = match source.tun() {
            Ok(()) => Finding::ok("tun", "TUN devices can be opened"),
            Err(error) => {
                let fix = "modprobe tun, or give the container the device /dev/net/tun";
                Finding::new("tun", Severity::Error, error, fix)
            }
        };
        let foreign = self
            .facts
            .links
            .values()
            .find(|link| link.name == *udp.device() && !self.overlay.owns(link.group, link.alias.as_deref()));
        let device = match foreign {
            Some(link) => Finding::new(
                "udp",
                self.in_the_way(),
                format!("{} belongs to another program, so this overlay cannot create its device", link.name),
                format!(
                    "stop that program (a Go flannel's device goes away with it), or delete the device: ip link delete {}",
                    link.name
                ),
            ),
            None => Finding::ok("udp", format!("no other program has the device {}", udp.device())),
        };
        // A running agent uses the port itself. Its device alone does not show that it runs: the device outlives it.
        let Some(uplink) = self.uplink.filter(|_| self.agents != Agents::Ours) else { return vec![driver, device] };
        let port = match source.sockets(uplink.addrs.map(|_, addr| SocketAddr::new(*addr, udp.config().port))) {
            Ok(()) => Finding::ok("port", format!("UDP port {} is free", udp.config().port)),
            Err(error) => {
                let fix = format!("stop the program that uses it: ss -ulpn sport = :{}", udp.config().port);
                Finding::new("port", self.in_the_way(), error, fix)
            }
        };
        vec![driver, device, port]
    }

    fn vxlan(&self) -> Vec<Finding> {
        let Some(config) = self.config.filter(|_| self.runs(Vxlan::TYPE)) else { return Vec::new() };
        let vxlan = match Vxlan::new(config) {
            Ok(vxlan) => vxlan,
            Err(error) => {
                let fix = "correct the network configuration in the store";
                return vec![Finding::new("vxlan", Severity::Error, crate::chain(&error), fix)];
            }
        };
        let (vni, port) = (vxlan.config().vni, vxlan.config().port.unwrap_or(VxlanLink::DEFAULT_PORT));
        let mut findings = Vec::new();
        for link in self.facts.links.values() {
            let LinkKind::Vxlan(seen) = &link.kind else { continue };
            if self.overlay.owns(link.group, link.alias.as_deref()) {
                continue;
            }
            let same_port = seen.port.unwrap_or(VxlanLink::DEFAULT_PORT) == port;
            let flannels = ["flannel.", "flannel-v6."].iter().any(|name| link.name.as_str() == format!("{name}{vni}"));
            let finding = match () {
                () if seen.vni == vni && flannels => Finding::new(
                    "vxlan",
                    Severity::Note,
                    format!("{} belongs to another flannel, or was created by hand", link.name),
                    "nothing, if it is Go flannel's: the agent adopts it".to_owned(),
                ),
                () if seen.vni == vni && same_port => Finding::new(
                    "vxlan",
                    Severity::Error,
                    format!(
                        "{} has VNI {vni} on port {port}: this overlay cannot create its device beside it",
                        link.name
                    ),
                    format!("ip link delete {}, or set another $.Backend.VNI on all nodes", link.name),
                ),
                () if same_port => Finding::new(
                    "vxlan",
                    Severity::Note,
                    format!("{} (VNI {}) uses port {port} too", link.name, seen.vni),
                    format!("nothing, unless a removed CNI plug-in left it: ip link delete {}", link.name),
                ),
                () => continue,
            };
            findings.push(finding);
        }
        if findings.is_empty() {
            findings.push(Finding::ok("vxlan", format!("no foreign device has VNI {vni} or port {port}")));
        }
        let device = match config.networks.v4 {
            Some(_) => format!("flannel.{vni}"),
            None => format!("flannel-v6.{vni}"),
        };
        findings.push(Finding::new(
            "checksums",
            Severity::Note,
            "some network cards compute wrong checksums for encapsulated packets",
            format!("if TCP between nodes hangs while ping works: ethtool -K {device} tx-checksum-ip-generic off"),
        ));
        findings
    }
}

fn network_daemons(source: &dyn Source) -> Vec<Finding> {
    let programs = source.programs();
    let manages = |program: &str| programs.iter().any(|name| name == program);
    let mut findings = Vec::new();
    if manages("NetworkManager") {
        findings.push(Finding::new(
            "daemons",
            Severity::Note,
            "NetworkManager runs: it may change devices of the overlay",
            "in /etc/NetworkManager/conf.d/flannel.conf: [keyfile] unmanaged-devices=interface-name:flannel*",
        ));
    }
    if manages("systemd-network") {
        findings.push(Finding::new(
            "daemons",
            Severity::Note,
            "systemd-networkd runs: when it restarts, it deletes routes of other programs",
            "in /etc/systemd/networkd.conf: [Network] ManageForeignRoutes=no ManageForeignRoutingPolicyRules=no",
        ));
    }
    if findings.is_empty() {
        findings.push(Finding::ok("daemons", "neither NetworkManager nor systemd-networkd runs"));
    }
    findings
}

fn clock(source: &dyn Source) -> Finding {
    let fix = "apt install chrony, or: systemctl enable --now systemd-timesyncd";
    if source.wall_clock() < LONG_AGO {
        let found = "the clock is wrong by years: certificates and saved leases are checked against it";
        return Finding::new("clock", Severity::Error, found, fix);
    }
    let daemons = ["chronyd", "ntpd", "ptp4l", "openntpd"];
    let programs = source.programs();
    if source.is_synchronized() || daemons.iter().any(|name| programs.contains(*name)) {
        return Finding::ok("clock", "synchronised");
    }
    Finding::new(
        "clock",
        Severity::Note,
        "no time synchronisation found: certificates are checked against the clock",
        fix,
    )
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use flannel_core::config::Allocation;
    use flannel_core::kernel::{HostAddress, HostLink, HostRoute, Link, LinkName, Vxlan as VxlanLink};
    use flannel_core::net::{Mtu, Vni};

    use super::*;

    struct Said {
        sysctls: BTreeMap<&'static str, &'static str>,
        programs: &'static [&'static str],
        wall_clock: u64,
        agents: Agents,
    }

    impl Default for Said {
        fn default() -> Self {
            Self { sysctls: BTreeMap::new(), programs: &[], wall_clock: 0, agents: Agents::None }
        }
    }

    impl Source for Said {
        fn sysctl(&self, name: &str) -> Option<String> {
            self.sysctls.get(name).map(ToString::to_string)
        }

        fn programs(&self) -> BTreeSet<String> {
            self.programs.iter().map(ToString::to_string).collect()
        }

        fn wall_clock(&self) -> u64 {
            self.wall_clock
        }

        fn is_synchronized(&self) -> bool {
            false
        }

        fn tun(&self) -> Result<(), String> {
            Err("there is no driver".to_owned())
        }

        fn sockets(&self, _: Dual<SocketAddr>) -> Result<(), String> {
            Err("192.0.2.1:8285 is in use".to_owned())
        }
    }

    fn link(name: &str, vni: u32, port: u16) -> HostLink {
        let mut vxlan = VxlanLink::new(Vni::new(vni).unwrap());
        vxlan.port = Some(port);
        Link::new(LinkName::new(name).unwrap(), LinkKind::Vxlan(vxlan), 1450).into()
    }

    fn findings(links: Vec<HostLink>, uplink_mtu: u32, written: u32, said: &Said) -> Vec<Finding> {
        findings_of("vxlan", links, uplink_mtu, written, said)
    }

    fn findings_of(kind: &str, links: Vec<HostLink>, uplink_mtu: u32, written: u32, said: &Said) -> Vec<Finding> {
        let json = format!(r#"{{"Network":"10.5.0.0/16","Backend":{{"Type":"{kind}"}}}}"#);
        let config = NetworkConfig::parse(json.as_bytes(), Allocation::Pool).unwrap();
        let (mut facts, mut env) = (HostFacts::default(), SubnetEnv::default());
        facts.links.extend((10..).zip(links));
        env.mtu = Some(Mtu(written));
        let uplink = Uplink::new(2, LinkName::new("eth0").unwrap(), Mtu(uplink_mtu), Dual::default());
        let overlay = OverlayName::default();
        let (config, uplink, env) = (Some(&config), Some(&uplink), Some(&env));
        Host { overlay: &overlay, config, facts: &facts, uplink, env, agents: said.agents }.judge(said)
    }

    fn of<'a>(findings: &'a [Finding], check: &str) -> &'a Finding {
        findings.iter().find(|finding| finding.check == check).unwrap()
    }

    #[test]
    fn a_host_that_is_fine_has_no_errors() {
        let said = Said {
            sysctls: BTreeMap::from([("net/ipv4/ip_forward", "1"), ("net/bridge/bridge-nf-call-iptables", "1")]),
            programs: &["chronyd"],
            wall_clock: LONG_AGO + 1,
            ..Said::default()
        };
        let findings = findings(Vec::new(), 1500, 1450, &said);
        let noted: Vec<_> = findings.iter().filter(|finding| finding.severity != Severity::Ok).collect();
        assert!(noted.iter().all(|finding| finding.check == "checksums"), "{noted:?}");
    }

    #[test]
    fn udp_needs_the_driver_the_device_and_28_bytes() {
        let tun = LinkKind::Tun(flannel_core::kernel::Tun::new(false));
        let theirs = Link::new(LinkName::new("flannel0").unwrap(), tun, 1472).into();
        let findings = findings_of("udp", vec![theirs], 1500, 1472, &Said::default());
        assert_eq!(of(&findings, "mtu").severity, Severity::Ok, "{findings:?}");
        for (check, fix) in [("tun", "modprobe tun"), ("udp", "ip link delete flannel0"), ("port", "ss -ulpn")] {
            let finding = of(&findings, check);
            assert_eq!(finding.severity, Severity::Error);
            assert!(finding.fix.as_ref().unwrap().contains(fix), "{finding:?}");
        }
        assert_eq!(of(&findings_of("udp", Vec::new(), 1500, 1473, &Said::default()), "mtu").severity, Severity::Error);
    }

    #[test]
    fn what_goes_away_with_another_flannel_keeps_nobody_from_an_upgrade() {
        let tun = LinkKind::Tun(flannel_core::kernel::Tun::new(false));
        let device = || -> HostLink { Link::new(LinkName::new("flannel0").unwrap(), tun.clone(), 1472).into() };
        let judged = |agents, check| {
            let said = Said { agents, ..Said::default() };
            let findings = findings_of("udp", vec![device()], 1500, 1473, &said);
            findings.iter().find(|finding| finding.check == check).map(|finding| finding.severity)
        };
        for check in ["udp", "port", "mtu"] {
            assert_eq!(judged(Agents::None, check), Some(Severity::Error), "{check}");
            assert_eq!(judged(Agents::Another, check), Some(Severity::Warning), "{check}");
        }
        assert_eq!(judged(Agents::Ours, "port"), None, "it uses the port itself");
    }

    #[test]
    fn what_is_wrong_is_found_with_its_fix() {
        let said = Said {
            sysctls: BTreeMap::from([("net/ipv4/ip_forward", "0"), ("net/ipv4/conf/eth0/rp_filter", "1")]),
            programs: &["NetworkManager", "systemd-network"],
            ..Said::default()
        };
        let foreign =
            vec![link("vx7", 1, 8472), link("other", 7, 8472), link("flannel.1", 1, 8472), link("x", 9, 4789)];
        let findings = findings(foreign, 1400, 1450, &said);
        assert_eq!(of(&findings, "forwarding").severity, Severity::Error);
        assert!(of(&findings, "forwarding").fix.as_ref().unwrap().contains("net.ipv4.ip_forward=1"));
        assert!(of(&findings, "rp_filter").fix.as_ref().unwrap().contains("conf/eth0/rp_filter=2"));
        assert_eq!(of(&findings, "mtu").severity, Severity::Error);
        assert!(of(&findings, "bridge-nf").fix.as_ref().unwrap().contains("br_netfilter"));
        assert_eq!(of(&findings, "clock").severity, Severity::Error);
        let vxlan: Vec<_> = findings.iter().filter(|finding| finding.check == "vxlan").collect();
        let severities: Vec<_> = vxlan.iter().map(|finding| finding.severity).collect();
        assert_eq!(severities, [Severity::Error, Severity::Note, Severity::Note], "{vxlan:?}");
        assert_eq!(findings.iter().filter(|finding| finding.check == "daemons").count(), 2);
    }

    #[test]
    fn a_network_over_addresses_of_others_is_found_with_its_fix() {
        let judge = |network: &str, backend: &str, written: &str| {
            let json = format!(r#"{{"Network":"{network}","Backend":{{"Type":"{backend}"}}}}"#);
            let config = NetworkConfig::parse(json.as_bytes(), Allocation::Pool).unwrap();
            let address = |link, addr: &str, len| HostAddress::new(link, addr.parse().unwrap(), len);
            let gateway = Some("192.0.2.1".parse().unwrap());
            let gateway = HostRoute::new("0.0.0.0/0".parse().unwrap(), Some(2), gateway);
            let (mut facts, mut env) = (HostFacts::default(), SubnetEnv::default());
            facts.addresses =
                vec![address(2, "192.0.2.77", 25), address(3, "10.5.1.1", 24), address(4, "172.17.0.1", 16)];
            facts.addresses.push(address(5, "192.0.2.113", 28));
            facts.defaults.push(gateway);
            let addrs = Dual { v4: Some("192.0.2.77".parse().unwrap()), v6: None };
            let uplink = Uplink::new(2, LinkName::new("eth0").unwrap(), Mtu(1500), addrs);
            env.subnets.v4 = Some("10.5.1.0/24".parse().unwrap());
            env.networks.v4 = Some(written.parse().unwrap());
            env.mtu = Some(Mtu(1450));
            let overlay = OverlayName::default();
            let (config, uplink, env) = (Some(&config), Some(&uplink), Some(&env));
            let host = Host { overlay: &overlay, config, facts: &facts, uplink, env, agents: Agents::None };
            host.judge(&Said::default()).into_iter().chain(host.change()).collect::<Vec<_>>()
        };
        for (network, severity, part) in [
            ("10.5.0.0/16", Severity::Ok, "does not overlap"),
            ("192.0.0.0/16", Severity::Error, "192.0.2.77 of eth0"),
            ("192.0.2.0/27", Severity::Warning, "192.0.2.1, the gateway"),
            ("192.0.2.32/27", Severity::Note, "lies in 192.0.2.0/25"),
            ("172.16.0.0/12", Severity::Warning, "overlaps 172.17.0.0/16"),
            ("192.0.2.96/27", Severity::Warning, "overlaps 192.0.2.112/28"),
        ] {
            let findings = judge(network, "vxlan", network);
            let finding = of(&findings, "network");
            assert_eq!((finding.severity, finding.found.contains(part)), (severity, true), "{finding:?}");
            assert!(severity == Severity::Ok || finding.fix.as_ref().unwrap().contains("$.Network"), "{finding:?}");
            assert!(findings.iter().all(|finding| finding.check != "configuration"));
        }
        let findings = judge("10.5.0.0/16", "vxlna", "10.6.0.0/16");
        assert_eq!(of(&findings, "backend").severity, Severity::Error);
        assert!(of(&findings, "backend").fix.as_ref().unwrap().contains("vxlan, host-gw, udp, alloc"));
        assert!(of(&findings, "configuration").fix.as_ref().unwrap().contains("restart the agent"));
    }
}
