//! The options that result from flags and environment, checked.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use flannel_backend_vxlan::Vxlan;
use flannel_core::config::NetworkConfig;
use flannel_core::firewall::{Forward, Masquerade, SourcePorts};
use flannel_core::kernel::{LinkName, OverlayName};
use flannel_core::net::{Dual, Family, is_public_unicast};
use flannel_core::overlay::{ConfigPolicy, LossPolicy};
use flannel_core::subnet::NodeIdentity;
use flannel_core::uplink::{Pattern, Select};
use flannel_subnet_etcd::{ClearText, ClientCertificate, ConfigError, Credentials, KeyPrefix, Password, Secret, Tls};
use flannel_subnet_kube::{Access, AnnotationPrefix, NodeName};

use crate::blackhole::Routes;
use crate::cni::{self, Cni};
use crate::flags::{UsageError, Values, near, suggestion};
use crate::output::Output;

/// Replaces a value that may contain a password.
const HIDDEN: &str = "…";

/// All options.
#[derive(Debug, Clone)]
pub(crate) struct Options {
    pub(crate) store: StoreOptions,
    pub(crate) overlay: OverlayName,
    pub(crate) uplink: Select,
    pub(crate) public: Dual<IpAddr>,
    pub(crate) subnet_file: PathBuf,
    pub(crate) state_file: Option<StateFile>,
    pub(crate) on_loss: LossPolicy,
    pub(crate) audit_every: Duration,
    pub(crate) firewall: FirewallOptions,
    pub(crate) healthz: Option<SocketAddr>,
    pub(crate) metrics: Option<Metrics>,
    pub(crate) log: LogOptions,
    pub(crate) capabilities: Capabilities,
    pub(crate) cni: Cni,
    pub(crate) output: Output,
    pub(crate) on_config_change: ConfigPolicy,
    pub(crate) cleanup: Cleanup,
}

/// How `cleanup` works.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) struct Cleanup {
    /// Whether it only prints what it would remove.
    pub(crate) dry_run: bool,
    /// Whether it works while other flannel agents run here.
    pub(crate) force: bool,
}

/// The lease store and the time to live of its leases.
#[derive(Debug, Clone)]
pub(crate) struct StoreOptions {
    pub(crate) location: StoreLocation,
    /// How long a lease of this node lasts.
    pub(crate) ttl: Duration,
}

/// The lease store.
#[derive(Debug, Clone)]
pub(crate) enum StoreLocation {
    /// The embedded store.
    Dir {
        dir: PathBuf,
        /// This node's name in the store.
        node: NodeIdentity,
    },
    /// etcd; the time to live is in [`StoreOptions::ttl`].
    Etcd(Box<flannel_subnet_etcd::Config>),
    /// The Kubernetes API.
    Kube(Box<KubeOptions>),
}

/// Options of the Kubernetes store.
#[derive(Debug, Clone)]
pub(crate) struct KubeOptions {
    pub(crate) access: Access,
    pub(crate) node: NodeName,
    /// The file with the network configuration.
    pub(crate) config: PathBuf,
    pub(crate) prefix: AnnotationPrefix,
    /// Addresses to publish if the Node has no annotation for them.
    pub(crate) public: Dual<IpAddr>,
    /// Whether the Node's condition NetworkUnavailable is written once the overlay is ready.
    pub(crate) sets_condition: bool,
}

/// Options of the firewall.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FirewallOptions {
    pub(crate) masquerade: Option<Masquerade>,
    pub(crate) forward: Forward,
    pub(crate) guard: PortGuard,
    /// How often the rules are checked.
    pub(crate) resync: Duration,
    pub(crate) blackhole: Routes,
}

/// Whether the VXLAN port accepts packets of known peers only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PortGuard {
    Peers,
    None,
}

impl PortGuard {
    /// Whether the guard is requested for VXLAN without nftables, which it needs for a set of peers.
    pub(crate) fn lacks_its_tool(self, config: &NetworkConfig) -> bool {
        self == Self::Peers && !config.enable_nftables && config.backend.kind == Vxlan::TYPE
    }
}

impl FirewallOptions {
    /// Returns the flag without whose rules pods must not be attached.
    pub(crate) fn needed_for(&self, config: &NetworkConfig) -> Option<&'static str> {
        match self.masquerade {
            Some(_) => Some("-ip-masq"),
            None => (self.guard == PortGuard::Peers && config.backend.kind == Vxlan::TYPE).then_some("-vxlan-guard"),
        }
    }

    fn read(values: &Values) -> Result<Self, UsageError> {
        let ports =
            if values.bool("ip-masq-fully-random-disable") { SourcePorts::Kernel } else { SourcePorts::FullyRandom };
        Ok(Self {
            masquerade: values.bool("ip-masq").then_some(Masquerade::with_ports(ports)),
            forward: if values.bool("iptables-forward-rules") { Forward::Accept } else { Forward::Untouched },
            guard: if values.bool("vxlan-guard") { PortGuard::Peers } else { PortGuard::None },
            resync: Duration::from_secs(values.number("iptables-resync", 1, 86_400)?.into()),
            blackhole: if values.bool("ip-blackhole-route") { Routes::Blackhole } else { Routes::None },
        })
    }
}

/// The file for the last state of the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct StateFile {
    pub(crate) path: PathBuf,
    /// Whether the flag was given. If so, a file that cannot be written is an error, else a warning, because Go flannel
    /// has no such file.
    pub(crate) asked_for: bool,
}

/// The address of `/metrics` and `/status`.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Metrics {
    pub(crate) addr: SocketAddr,
    /// Whether a flag was given. If so, an address that cannot be listened on is an error, else a warning, because Go
    /// flannel needs none.
    pub(crate) asked_for: bool,
}

#[derive(Debug, Clone, Copy)]
pub(crate) struct LogOptions {
    pub(crate) format: LogFormat,
    pub(crate) verbosity: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// Whether unneeded capabilities are dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Capabilities {
    Drop,
    Keep,
}

impl Options {
    /// Checks all values. `variable` (of the environment) and `hostname` name the node if no flag does.
    pub(crate) fn read(
        values: &Values,
        variable: impl Fn(&str) -> Option<String>,
        hostname: String,
    ) -> Result<Self, UsageError> {
        values.number("subnet-lease-renew-margin", 1, 1439)?;
        let public = Dual { v4: public(values, Family::V4)?, v6: public(values, Family::V6)? };
        let overlay = OverlayName::new(values.text("overlay-name"))
            .map_err(|error| UsageError::value("overlay-name", values.text("overlay-name"), error))?;
        let store = StoreOptions::read(values, public, variable, hostname)?;
        Ok(Self {
            state_file: state_file(values, &store.location, &overlay),
            overlay,
            uplink: match uplink(values)? {
                Some(uplink) => uplink,
                // An annotation of the Node may give another address, which then selects the interface.
                None if matches!(store.location, StoreLocation::Kube(_)) => Select::DefaultRoute,
                None => Select::implied_by(&public),
            },
            store,
            public,
            subnet_file: path(values, "subnet-file")?,
            on_loss: on_loss(values)?,
            audit_every: Duration::from_secs(values.number("audit-interval", 1, 600)?.into()),
            firewall: FirewallOptions::read(values)?,
            healthz: health(values)?,
            metrics: socket(values, "metrics-ip", "metrics-port")?.map(|addr| Metrics {
                addr,
                asked_for: values.is_given("metrics-port") || values.is_given("metrics-ip"),
            }),
            log: LogOptions { format: log_format(values)?, verbosity: values.number("v", 0, 100)? },
            capabilities: if values.bool("keep-capabilities") { Capabilities::Keep } else { Capabilities::Drop },
            cni: Cni::read(values, cni::beside_this_program)?,
            output: Output::read(values)?,
            on_config_change: on_config_change(values)?,
            cleanup: Cleanup { dry_run: values.bool("dry-run"), force: values.bool("force") },
        })
    }
}

impl StoreOptions {
    fn read(
        values: &Values,
        public: Dual<IpAddr>,
        variable: impl Fn(&str) -> Option<String>,
        hostname: String,
    ) -> Result<Self, UsageError> {
        let minutes = values.number("subnet-lease-ttl", 2, 43_200)?;
        let location = match (values.is_given("subnet-dir"), values.bool("kube-subnet-mgr")) {
            (true, true) => {
                return Err(UsageError::value(
                    "subnet-dir",
                    values.text("subnet-dir"),
                    "give it or -kube-subnet-mgr, not both",
                ));
            }
            (true, false) => {
                let node = match (values.text("node-name"), variable("NODE_NAME")) {
                    ("", Some(name)) if !name.is_empty() => name,
                    ("", _) => hostname,
                    (given, _) => given.to_owned(),
                };
                let node = NodeIdentity::new(&node).map_err(|error| UsageError::value("node-name", &node, error))?;
                StoreLocation::Dir { dir: path(values, "subnet-dir")?, node }
            }
            (false, true) => StoreLocation::Kube(Box::new(kube(values, public, variable)?)),
            (false, false) => StoreLocation::Etcd(Box::new(etcd(values)?)),
        };
        Ok(Self { location, ttl: Duration::from_secs(u64::from(minutes) * 60) })
    }
}

fn kube(
    values: &Values,
    public: Dual<IpAddr>,
    variable: impl Fn(&str) -> Option<String>,
) -> Result<KubeOptions, UsageError> {
    let mut access = Access::in_cluster();
    access.kubeconfig = values.path("kubeconfig-file");
    access.url = values.non_empty("kube-api-url").map(str::to_owned);
    let node = NodeName::of(|name| match (name, values.non_empty("node-name")) {
        ("NODE_NAME", Some(node)) => Some(node.to_owned()),
        _ => variable(name),
    });
    let prefix = values.text("kube-annotation-prefix");
    Ok(KubeOptions {
        access,
        node: node.map_err(|error| UsageError::value("node-name", values.text("node-name"), error))?,
        config: path(values, "net-config-path")?,
        prefix: AnnotationPrefix::new(prefix)
            .map_err(|error| UsageError::value("kube-annotation-prefix", prefix, error))?,
        public,
        sets_condition: values.bool("set-node-network-unavailable"),
    })
}

fn etcd(values: &Values) -> Result<flannel_subnet_etcd::Config, UsageError> {
    let mut config = flannel_subnet_etcd::Config::new(values.text("etcd-endpoints").split(',').map(str::trim));
    config.prefix = KeyPrefix::new(values.text("etcd-prefix"))
        .map_err(|error| UsageError::value("etcd-prefix", values.text("etcd-prefix"), error))?;
    let client = match (values.path("etcd-certfile"), values.path("etcd-keyfile")) {
        (Some(certificate), Some(key)) => Some(ClientCertificate { certificate, key }),
        (None, None) => None,
        (Some(_), None) => return Err(UsageError::requires("etcd-certfile", "etcd-keyfile")),
        (None, Some(_)) => return Err(UsageError::requires("etcd-keyfile", "etcd-certfile")),
    };
    let ca = values.path("etcd-cafile");
    if ca.is_some() || client.is_some() {
        let tls = config.tls.insert(Tls::default());
        (tls.ca, tls.client) = (ca, client);
    }
    let password = match (values.path("etcd-password-file"), values.text("etcd-password")) {
        (Some(_), text) if !text.is_empty() => {
            let text = "give -etcd-password-file or -etcd-password, not both";
            return Err(UsageError::Combination(text.to_owned()));
        }
        (Some(file), _) => Some(Password::File(file)),
        (None, "") => None,
        (None, text) => Some(Password::Text(Secret::new(text))),
    };
    let user = values.text("etcd-username");
    config.credentials = match (user, password) {
        ("", None) => None,
        ("", Some(Password::File(_))) => return Err(UsageError::requires("etcd-password-file", "etcd-username")),
        ("", Some(_)) => return Err(UsageError::requires("etcd-password", "etcd-username")),
        (user, Some(password)) => Some(Credentials { user: user.to_owned(), password }),
        (_, None) => return Err(UsageError::requires("etcd-username", "etcd-password or -etcd-password-file")),
    };
    if values.bool("etcd-allow-clear-text-credentials") {
        config.clear_text = ClearText::AllowCredentials;
    }
    match config.check() {
        Err(
            error @ (ConfigError::NoEndpoint
            | ConfigError::Endpoint(_)
            | ConfigError::UserInEndpoint
            | ConfigError::MixedSchemes),
        ) => Err(UsageError::value("etcd-endpoints", HIDDEN, error)),
        // Other errors concern several flags, and are reported when the store is opened.
        _ => Ok(config),
    }
}

/// Returns the interface selection in Go flannel's order: each -iface, each -iface-regex, -iface-can-reach; the first
/// match wins. `None` if no such flag is given. An empty -iface or -iface-regex is the interface of the default route.
fn uplink(values: &Values) -> Result<Option<Select>, UsageError> {
    let mut choices = Vec::new();
    for text in values.texts("iface") {
        choices.push(match text.parse() {
            _ if text.is_empty() => Select::DefaultRoute,
            Ok(addr) => Select::Ip(addr),
            Err(_) => Select::Name(LinkName::new(text).map_err(|error| UsageError::value("iface", text, error))?),
        });
    }
    for text in values.texts("iface-regex") {
        let pattern = || Pattern::new(text).map_err(|error| UsageError::value("iface-regex", text, error));
        choices.push(if text.is_empty() { Select::DefaultRoute } else { Select::Regex(pattern()?) });
    }
    let reach = values.text("iface-can-reach");
    if !reach.is_empty() {
        choices.push(Select::CanReach(address("iface-can-reach", reach)?));
    }
    Ok(match choices.len() {
        0 => None,
        1 => Some(choices.remove(0)),
        _ => Some(Select::FirstOf(choices)),
    })
}

fn public(values: &Values, family: Family) -> Result<Option<IpAddr>, UsageError> {
    let name = match family {
        Family::V4 => "public-ip",
        Family::V6 => "public-ipv6",
    };
    let text = values.text(name);
    if text.is_empty() {
        return Ok(None);
    }
    let addr = address(name, text)?;
    if Family::of(addr) != family {
        return Err(UsageError::value(name, text, format!("not an {family} address")));
    }
    if !is_public_unicast(addr) {
        let problem = "not a usable unicast address: give an address of this host";
        return Err(UsageError::value(name, text, problem));
    }
    Ok(Some(addr))
}

fn address(name: &str, text: &str) -> Result<IpAddr, UsageError> {
    text.parse().map_err(|_| UsageError::value(name, text, "not an IP address"))
}

fn socket(values: &Values, ip: &'static str, port: &'static str) -> Result<Option<SocketAddr>, UsageError> {
    let addr = address(ip, values.text(ip))?;
    let port = values.number(port, 0, 65_535)?;
    Ok(u16::try_from(port).ok().filter(|port| *port != 0).map(|port| SocketAddr::new(addr, port)))
}

/// With `-kube-subnet-mgr` the default address is Go flannel's, 0.0.0.0, because kubelet probes the node's address.
fn health(values: &Values) -> Result<Option<SocketAddr>, UsageError> {
    let socket = socket(values, "healthz-ip", "healthz-port")?;
    let is_open = values.bool("kube-subnet-mgr") && !values.is_given("healthz-ip");
    Ok(socket.map(|addr| if is_open { SocketAddr::new(Ipv4Addr::UNSPECIFIED.into(), addr.port()) } else { addr }))
}

fn path(values: &Values, name: &'static str) -> Result<PathBuf, UsageError> {
    let text = values.text(name);
    if text.is_empty() { Err(UsageError::value(name, text, "give a path")) } else { Ok(text.into()) }
}

/// Returns `None` for the embedded store: a directory is always available.
fn state_file(values: &Values, location: &StoreLocation, overlay: &OverlayName) -> Option<StateFile> {
    let text = values.text("state-file");
    if text.is_empty() || matches!(location, StoreLocation::Dir { .. }) {
        return None;
    }
    let asked_for = values.is_given("state-file");
    let path = if asked_for { text.into() } else { text.replace("OVERLAY", overlay.as_str()).into() };
    Some(StateFile { path, asked_for })
}

fn on_loss(values: &Values) -> Result<LossPolicy, UsageError> {
    match values.text("on-lease-loss") {
        "reacquire" => Ok(LossPolicy::Reacquire),
        "keep" => Ok(LossPolicy::Keep),
        "stop" => Ok(LossPolicy::Stop),
        other => Err(one_of("on-lease-loss", other, &["reacquire", "keep", "stop"])),
    }
}

fn on_config_change(values: &Values) -> Result<ConfigPolicy, UsageError> {
    match values.text("on-config-change") {
        "keep" => Ok(ConfigPolicy::KeepOnceConfirmed),
        "restart" => Ok(ConfigPolicy::Stop),
        other => Err(one_of("on-config-change", other, &["keep", "restart"])),
    }
}

fn log_format(values: &Values) -> Result<LogFormat, UsageError> {
    match values.text("log-format") {
        "text" => Ok(LogFormat::Text),
        "json" => Ok(LogFormat::Json),
        other => Err(one_of("log-format", other, &["text", "json"])),
    }
}

fn one_of(name: &str, value: &str, choices: &[&'static str]) -> UsageError {
    let hint = suggestion(&near(value, choices.iter().copied()));
    UsageError::value(name, value, format!("choose one of {}{hint}", choices.join(", ")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::flags::parse;

    fn read(args: &str) -> Result<Options, UsageError> {
        read_with(args, &[])
    }

    /// The same with these variables.
    fn read_with(args: &str, variables: &[(&str, &str)]) -> Result<Options, UsageError> {
        let args = args.split(' ').filter(|word| !word.is_empty()).map(str::to_owned);
        let variable =
            |name: &str| variables.iter().find(|(found, _)| *found == name).map(|(_, text)| (*text).to_owned());
        Options::read(&parse(args)?.values, variable, "host-1".to_owned())
    }

    fn select(args: &str) -> Select {
        read(args).unwrap().uplink
    }

    #[test]
    fn the_uplink_is_looked_for_in_flannels_order() {
        assert_eq!(select(""), Select::DefaultRoute);
        assert_eq!(select("-public-ip 192.0.2.1"), Select::Ip("192.0.2.1".parse().unwrap()));
        assert_eq!(select("-iface eth1"), Select::Name(LinkName::new("eth1").unwrap()));
        for empty in ["-iface=", "-iface-regex=", "-public-ip 192.0.2.1 -iface="] {
            assert_eq!(select(empty), Select::DefaultRoute, "{empty}");
        }
        let list = select("-iface-can-reach 10.0.0.1 -iface-regex ^10 -iface eth0 -iface 192.0.2.1");
        let Select::FirstOf(choices) = list else { panic!("{list}") };
        let texts: Vec<_> = choices.iter().map(ToString::to_string).collect();
        assert_eq!(
            texts,
            [
                "the interface named eth0",
                "the interface with address 192.0.2.1",
                "the interface whose address or name matches \"^10\"",
                "the interface that reaches 10.0.0.1",
            ]
        );
    }

    #[test]
    fn the_defaults_are_flannels_but_for_the_loopback() {
        let options = read("").unwrap();
        assert_eq!(options.subnet_file, PathBuf::from("/run/flannel/subnet.env"));
        assert!(options.healthz.is_none() && options.firewall.masquerade.is_none());
        assert_eq!(options.firewall.forward, Forward::Accept);
        let StoreLocation::Etcd(etcd) = &options.store.location else { panic!("{:?}", options.store) };
        assert_eq!(etcd.endpoints, ["http://127.0.0.1:4001", "http://127.0.0.1:2379"]);
        assert_eq!((etcd.prefix.as_str(), options.store.ttl), ("/coreos.com/network", Duration::from_secs(86_400)));
        let kept = |args: &str| read(args).unwrap().state_file.map(|file| (file.path, file.asked_for));
        assert_eq!(kept(""), Some(("/var/lib/flannel/flannel.state".into(), false)));
        assert_eq!(kept("-overlay-name b -state-file /s"), Some(("/s".into(), true)));
        assert_eq!((kept("-state-file="), kept("-subnet-dir /d -state-file /s")), (None, None));
        let StoreLocation::Dir { node, .. } = read("-subnet-dir /d").unwrap().store.location else {
            panic!("not a directory")
        };
        assert_eq!(node.as_str(), "host-1");
        let health = read("-healthz-port=8081").unwrap().healthz.unwrap();
        assert_eq!(health, "127.0.0.1:8081".parse().unwrap());
        assert!(!options.metrics.unwrap().asked_for);
        assert!(read("-metrics-ip 127.0.0.2").unwrap().metrics.unwrap().asked_for);
        assert!(read("-metrics-port=0").unwrap().metrics.is_none());
    }

    #[test]
    fn a_password_is_never_shown() {
        let options = read("-etcd-username u -etcd-password hunter2").unwrap();
        assert!(!format!("{options:?}").contains("hunter2"));
    }

    #[test]
    fn kubernetes_knows_the_node_by_flag_then_variable_then_pod() {
        let node =
            |args: &str, variables: &[(&str, &str)]| match read_with(&format!("-kube-subnet-mgr {args}"), variables)
                .unwrap()
                .store
                .location
            {
                StoreLocation::Kube(kube) => kube.node,
                place => panic!("{place:?}"),
            };
        let named = |name: &str| NodeName::Named(NodeIdentity::new(name).unwrap());
        let pod = [("POD_NAME", "p"), ("POD_NAMESPACE", "n")];
        let all = [pod[0], pod[1], ("NODE_NAME", "by-variable")];
        assert_eq!(node("-node-name by-flag", &all), named("by-flag"));
        assert_eq!(node("", &all), named("by-variable"));
        assert_eq!(node("", &pod), NodeName::OfPod { namespace: "n".to_owned(), pod: "p".to_owned() });
    }

    #[test]
    fn health_is_open_to_kubelets_with_kubernetes_alone() {
        let health = |args: &str| read(&format!("-healthz-port 1 {args}")).unwrap().healthz.unwrap().to_string();
        assert_eq!(health(""), "127.0.0.1:1");
        assert_eq!(health("-kube-subnet-mgr -node-name a"), "0.0.0.0:1");
        assert_eq!(health("-kube-subnet-mgr -node-name a -healthz-ip 127.0.0.1"), "127.0.0.1:1");
    }

    #[test]
    fn bad_values_name_the_flag_the_value_and_the_remedy() {
        for (args, parts) in [
            ("-public-ip 1.2.3", ["-public-ip", "not an IP address"]),
            ("-public-ip fd00::1", ["-public-ip", "not an IPv4 address"]),
            ("-public-ipv6 1.2.3.4", ["-public-ipv6", "not an IPv6 address"]),
            ("-public-ip 224.0.0.1", ["-public-ip", "not a usable unicast address"]),
            ("-public-ip 0.0.0.0", ["-public-ip", "not a usable unicast address"]),
            ("-public-ipv6 fe80::1", ["-public-ipv6", "not a usable unicast address"]),
            ("-iface-can-reach nowhere", ["-iface-can-reach", "not an IP address"]),
            ("-iface a/b", ["-iface", "cannot be an interface name"]),
            ("-iface-regex eth(", ["-iface-regex", "unclosed group"]),
            ("-healthz-port 65536", ["-healthz-port", "from 0 to 65535"]),
            ("-healthz-port -1", ["-healthz-port", "from 0 to 65535"]),
            ("-healthz-ip localhost", ["-healthz-ip", "not an IP address"]),
            ("-subnet-lease-renew-margin 0", ["-subnet-lease-renew-margin", "from 1 to 1439"]),
            ("-subnet-lease-ttl 1", ["-subnet-lease-ttl", "from 2 to 43200"]),
            ("-audit-interval 601", ["-audit-interval", "from 1 to 600"]),
            ("-on-lease-loss stopp", ["-on-lease-loss", "did you mean stop?"]),
            ("-log-format jsn", ["-log-format", "did you mean json?"]),
            ("-overlay-name Blue", ["-overlay-name", "1 to 32 characters"]),
            ("-etcd-certfile c", ["-etcd-certfile requires", "-etcd-keyfile"]),
            ("-etcd-keyfile k", ["-etcd-keyfile requires", "-etcd-certfile"]),
            ("-etcd-username u", ["-etcd-username requires", "-etcd-password"]),
            ("-etcd-password p", ["-etcd-password requires", "-etcd-username"]),
            ("-subnet-dir d -node-name a/b", ["-node-name", "1 to 253 characters"]),
            ("-subnet-file=", ["-subnet-file", "give a path"]),
            ("-subnet-dir=", ["-subnet-dir", "give a path"]),
            ("-kube-subnet-mgr", ["-node-name", "set NODE_NAME"]),
            ("-kube-subnet-mgr -node-name a/b", ["-node-name", "1 to 253 characters"]),
            ("-kube-subnet-mgr -node-name a -subnet-dir d", ["-subnet-dir", "or -kube-subnet-mgr, not both"]),
            ("-kube-subnet-mgr -node-name a -kube-annotation-prefix org", ["-kube-annotation-prefix", "with a dot"]),
            ("-kube-subnet-mgr -node-name a -net-config-path=", ["-net-config-path", "give a path"]),
            ("-iptables-resync 0", ["-iptables-resync", "from 1 to"]),
        ] {
            let error = read(args).unwrap_err().to_string();
            assert!(parts.iter().all(|part| error.contains(part)), "{args}: {error}");
        }
    }
}
