//! The table of flags.

/// The kind of a flag's value.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `-name`, or `-name=false`.
    Bool,
    /// A whole number.
    Int,
    /// Any text.
    Text,
    /// Any text; may be repeated.
    List,
}

/// A flag.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flag {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) default: &'static str,
    pub(crate) help: &'static str,
}

const fn flag(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Flag {
    Flag { name, kind, default, help }
}

/// Flannel's flags, then flanneld's additional ones.
pub(crate) const FLAGS: &[Flag] = &[
    flag(
        "etcd-endpoints",
        Kind::Text,
        "http://127.0.0.1:4001,http://127.0.0.1:2379",
        "a comma-delimited list of etcd endpoints",
    ),
    flag("etcd-prefix", Kind::Text, "/coreos.com/network", "etcd prefix"),
    flag("etcd-keyfile", Kind::Text, "", "SSL key file used to secure etcd communication"),
    flag("etcd-certfile", Kind::Text, "", "SSL certification file used to secure etcd communication"),
    flag("etcd-cafile", Kind::Text, "", "SSL Certificate Authority file used to secure etcd communication"),
    flag("etcd-username", Kind::Text, "", "username for BasicAuth to etcd"),
    flag("etcd-password", Kind::Text, "", "password for BasicAuth to etcd; better given as FLANNELD_ETCD_PASSWORD"),
    flag("kube-subnet-mgr", Kind::Bool, "false", "contact the Kubernetes API for subnet assignment instead of etcd"),
    flag("kube-api-url", Kind::Text, "", "Kubernetes API server URL (default: as in -kubeconfig-file)"),
    flag("kubeconfig-file", Kind::Text, "", "kubeconfig file location (default: the account of the Pod this runs in)"),
    flag("kube-annotation-prefix", Kind::Text, "flannel.alpha.coreos.com", "Kubernetes annotation prefix"),
    flag("net-config-path", Kind::Text, "/etc/kube-flannel/net-conf.json", "path to the network configuration file"),
    flag("set-node-network-unavailable", Kind::Bool, "true", "set NodeNetworkUnavailable after ready (Kubernetes)"),
    flag("iface", Kind::List, "", "interface to use (IP or name) for inter-host communication; may be repeated"),
    flag("iface-regex", Kind::List, "", "regex to match the first interface to use (IP or name); may be repeated"),
    flag("iface-can-reach", Kind::Text, "", "use the interface by which this IP is reached"),
    flag("public-ip", Kind::Text, "", "IP accessible by other nodes for inter-host communication"),
    flag("public-ipv6", Kind::Text, "", "IPv6 accessible by other nodes for inter-host communication"),
    flag("subnet-file", Kind::Text, "/run/flannel/subnet.env", "where to write MTU, subnet and network for CNI"),
    flag(
        "subnet-lease-renew-margin",
        Kind::Int,
        "60",
        "minutes, 1 to 1439; checked only: leases are renewed at half their time",
    ),
    flag("ip-masq", Kind::Bool, "false", "set up IP masquerading for traffic that leaves the overlay"),
    flag("ip-masq-fully-random-disable", Kind::Bool, "false", "do not ask for fully random ports when masquerading"),
    flag("iptables-forward-rules", Kind::Bool, "true", "accept forwarded traffic of the overlay"),
    flag("iptables-resync", Kind::Int, "5", "seconds between looks at the firewall's rules"),
    flag("ip-blackhole-route", Kind::Bool, "false", "drop packets to addresses of the own subnet that no pod has"),
    flag(
        "healthz-ip",
        Kind::Text,
        "127.0.0.1",
        "address of the health server; 0.0.0.0 with -kube-subnet-mgr, as in Go flannel always",
    ),
    flag("healthz-port", Kind::Int, "0", "port of the health server (0: none)"),
    flag("version", Kind::Bool, "false", "print the version and exit"),
    flag("v", Kind::Int, "0", "how much to log: 0 and 1 info, 2 to 4 debug, from 5 on trace"),
    flag("vmodule", Kind::Text, "", "accepted for Go flannel's sake, and ignored"),
    flag("log_backtrace_at", Kind::Text, "", "accepted for Go flannel's sake, and ignored"),
    flag("etcd-password-file", Kind::Text, "", "file with the etcd password, read again for every connection"),
    flag(
        "etcd-allow-clear-text-credentials",
        Kind::Bool,
        "false",
        "send user and password over http too, where anybody on the way can read them",
    ),
    flag("vxlan-guard", Kind::Bool, "false", "let the VXLAN port answer known peers only"),
    flag(
        "state-file",
        Kind::Text,
        "/var/lib/flannel/OVERLAY.state",
        "where to keep lease and peers for a boot while etcd or Kubernetes is away; in the default OVERLAY is -overlay-name (empty: nowhere)",
    ),
    flag("subnet-dir", Kind::Text, "", "directory of the embedded lease store, used instead of etcd"),
    flag("subnet-lease-ttl", Kind::Int, "1440", "minutes that a lease of ours lasts unless renewed, 2 to 43200"),
    flag(
        "node-name",
        Kind::Text,
        "",
        "this node's name in the embedded store and in Kubernetes (default $NODE_NAME, then in the store the host's name, in Kubernetes the node of the Pod $POD_NAME in $POD_NAMESPACE)",
    ),
    flag("overlay-name", Kind::Text, "flannel", "name by which the overlay finds its own kernel objects again"),
    flag("on-lease-loss", Kind::Text, "reacquire", "what to do when the lease is lost: reacquire, keep or stop"),
    flag(
        "on-config-change",
        Kind::Text,
        "keep",
        "what to do when the network configuration in the store changes: keep the former one until a restart, or restart \
         (exit with code 4, to be started again)",
    ),
    flag("audit-interval", Kind::Int, "30", "seconds between full looks at the kernel, 1 to 600"),
    flag("metrics-ip", Kind::Text, "127.0.0.1", "address of /metrics and /status"),
    flag("metrics-port", Kind::Int, "9472", "port of /metrics and /status (0: none)"),
    flag("log-format", Kind::Text, "text", "text or json, on stderr"),
    flag(
        "cni-conf-dir",
        Kind::Text,
        "",
        "where to write the CNI configuration once pods can be attached, such as /etc/cni/net.d (empty: nowhere)",
    ),
    flag("cni-conf", Kind::Text, "", "file with that configuration, a conflist (default: that of flannel's manifest)"),
    flag("cni-bin-dir", Kind::Text, "", "where to install the CNI plug-in, such as /opt/cni/bin (empty: nowhere)"),
    flag("cni-plugin", Kind::Text, "", "the plug-in to install (default: the file flannel beside this program)"),
    flag("keep-capabilities", Kind::Bool, "false", "do not drop capabilities that are not needed"),
    flag("dry-run", Kind::Bool, "false", "cleanup: print what would be removed, and remove nothing"),
    flag("force", Kind::Bool, "false", "cleanup: remove even while another flannel agent runs, such as Go flannel"),
    flag("json", Kind::Bool, "false", "status, plan, doctor: print JSON"),
];
