//! The table of flags, in the groups in which help and manual show them.

use Kind::{Bool, Int, List, Text};

/// The kind of a flag's value. Its text describes the value: `FILE`, `DIR`, or the allowed values with `|` between them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// `-name`, or `-name=false`.
    Bool,
    /// A whole number.
    Int(&'static str),
    /// Any text.
    Text(&'static str),
    /// Any text; may be repeated.
    List(&'static str),
}

impl Kind {
    /// Returns the description of the value; `None` for a switch.
    pub(crate) fn value(self) -> Option<&'static str> {
        match self {
            Self::Bool => None,
            Self::Int(value) | Self::Text(value) | Self::List(value) => Some(value),
        }
    }
}

/// A flag.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Flag {
    pub(crate) name: &'static str,
    pub(crate) kind: Kind,
    pub(crate) default: &'static str,
    pub(crate) help: &'static str,
}

/// Flags of one topic.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Group {
    pub(crate) title: &'static str,
    pub(crate) flags: &'static [Flag],
}

const OF_COMMANDS: &str = "Commands";

/// The start of the name of every flag's variable.
pub(crate) const VARIABLE_PREFIX: &str = "FLANNELD_";

/// Returns all flags.
pub(crate) fn flags() -> impl Iterator<Item = &'static Flag> {
    GROUPS.iter().flat_map(|group| group.flags)
}

/// Returns the flags that only commands have.
pub(crate) fn of_commands() -> impl Iterator<Item = &'static Flag> {
    GROUPS.iter().filter(|group| group.title == OF_COMMANDS).flat_map(|group| group.flags)
}

/// Returns the name of a flag's environment variable. `-version` and the flags of commands have none, because a variable
/// would apply to every command.
pub(crate) fn variable(flag: &Flag) -> Option<String> {
    let has_none = flag.name == "version" || of_commands().any(|other| other.name == flag.name);
    (!has_none).then(|| format!("{VARIABLE_PREFIX}{}", flag.name.to_ascii_uppercase().replace('-', "_")))
}

/// Returns the flag of this name.
pub(crate) fn find(name: &str) -> Option<&'static Flag> {
    flags().find(|flag| flag.name == name)
}

const fn switch(name: &'static str, help: &'static str) -> Flag {
    flag(name, Bool, "false", help)
}

const fn flag(name: &'static str, kind: Kind, default: &'static str, help: &'static str) -> Flag {
    Flag { name, kind, default, help }
}

/// All flags: flannel's, and flanneld's additional ones.
pub(crate) const GROUPS: &[Group] = &[
    Group {
        title: "etcd",
        flags: &[
            flag(
                "etcd-endpoints",
                Text("URL,..."),
                "http://127.0.0.1:4001,http://127.0.0.1:2379",
                "endpoints of etcd, separated by commas",
            ),
            flag("etcd-prefix", Text("KEY"), "/coreos.com/network", "prefix of flannel's keys in etcd"),
            flag("etcd-cafile", Text("FILE"), "", "CA certificate that etcd's certificate is checked with"),
            flag("etcd-certfile", Text("FILE"), "", "client certificate for etcd; needs -etcd-keyfile"),
            flag("etcd-keyfile", Text("FILE"), "", "private key of -etcd-certfile"),
            flag("etcd-username", Text("USER"), "", "user for etcd; needs a password"),
            flag(
                "etcd-password",
                Text("PASSWORD"),
                "",
                "password for etcd; other users can see it on a command line: prefer -etcd-password-file",
            ),
            flag(
                "etcd-password-file",
                Text("FILE"),
                "",
                "file with the etcd password, read again for every connection",
            ),
            switch(
                "etcd-allow-clear-text-credentials",
                "send user and password over http too, where others on the network can read them",
            ),
        ],
    },
    Group {
        title: "Kubernetes",
        flags: &[
            switch("kube-subnet-mgr", "use the Kubernetes API as lease store instead of etcd"),
            flag("kube-api-url", Text("URL"), "", "URL of the API server (default: as in -kubeconfig-file)"),
            flag("kubeconfig-file", Text("FILE"), "", "kubeconfig file (default: the service account of the Pod)"),
            flag(
                "kube-annotation-prefix",
                Text("PREFIX"),
                "flannel.alpha.coreos.com",
                "prefix of the Node's annotations",
            ),
            flag(
                "net-config-path",
                Text("FILE"),
                "/etc/kube-flannel/net-conf.json",
                "file with the network configuration; used with -kube-subnet-mgr only",
            ),
            flag(
                "set-node-network-unavailable",
                Bool,
                "true",
                "set the Node's condition NetworkUnavailable to False once the agent is ready",
            ),
        ],
    },
    Group {
        title: "Interface and addresses",
        flags: &[
            flag(
                "iface",
                List("NAME"),
                "",
                "interface for traffic between nodes, by name or IP address; may be repeated",
            ),
            flag(
                "iface-regex",
                List("REGEX"),
                "",
                "use the first interface whose name or IP address matches; may be repeated",
            ),
            flag("iface-can-reach", Text("IP"), "", "use the interface through which this IP address is reached"),
            flag(
                "public-ip",
                Text("IP"),
                "",
                "IPv4 address at which other nodes reach this one (default: the interface's)",
            ),
            flag(
                "public-ipv6",
                Text("IP"),
                "",
                "IPv6 address at which other nodes reach this one (default: the interface's)",
            ),
        ],
    },
    Group {
        title: "Leases",
        flags: &[
            flag("subnet-dir", Text("DIR"), "", "use the embedded lease store in this directory instead of etcd"),
            flag(
                "node-name",
                Text("NAME"),
                "",
                "name of this node in the embedded store and in Kubernetes (default: $NODE_NAME; without it the host's name in the store, and in Kubernetes the node of the Pod $POD_NAME in $POD_NAMESPACE)",
            ),
            flag("overlay-name", Text("NAME"), "flannel", "name that marks the kernel objects of this overlay"),
            flag("subnet-lease-ttl", Int("MINUTES"), "1440", "time to live of this node's lease, 2 to 43200"),
            flag(
                "state-file",
                Text("FILE"),
                "/var/lib/flannel/OVERLAY.state",
                "file for lease and peers, used if the node boots while etcd or Kubernetes is unavailable; OVERLAY stands for -overlay-name; empty: none",
            ),
            flag(
                "subnet-file",
                Text("FILE"),
                "/run/flannel/subnet.env",
                "file with subnet, network and MTU for the CNI plug-in; one for each overlay",
            ),
            flag(
                "on-lease-loss",
                Text("reacquire|keep|stop"),
                "reacquire",
                "what to do if another node takes the lease",
            ),
            flag(
                "on-config-change",
                Text("keep|restart"),
                "keep",
                "what to do if the network configuration in the store changes: keep the former one until a restart, or restart: exit with code 4, to be started again",
            ),
        ],
    },
    Group {
        title: "Firewall and kernel",
        flags: &[
            switch("ip-masq", "masquerade traffic that leaves the overlay"),
            switch("ip-masq-fully-random-disable", "do not request fully random ports for masquerading"),
            flag("iptables-forward-rules", Bool, "true", "accept forwarded traffic of the overlay"),
            flag("iptables-resync", Int("SECONDS"), "5", "time between checks of the firewall rules, 1 to 86400"),
            switch(
                "vxlan-guard",
                "accept VXLAN packets of known peers only; needs EnableNFTables in the network configuration",
            ),
            switch("ip-blackhole-route", "drop packets to addresses of the own subnet that no pod has"),
            flag("audit-interval", Int("SECONDS"), "30", "time between full checks of the kernel, 1 to 600"),
            switch("keep-capabilities", "do not drop capabilities that are not needed"),
        ],
    },
    Group {
        title: "CNI",
        flags: &[
            flag(
                "cni-bin-dir",
                Text("DIR"),
                "",
                "directory to install the CNI plug-in in, such as /opt/cni/bin; empty: none",
            ),
            flag("cni-plugin", Text("FILE"), "", "plug-in to install (default: the file flannel beside this program)"),
            flag(
                "cni-conf-dir",
                Text("DIR"),
                "",
                "directory to write the CNI configuration to once the agent is ready, such as /etc/cni/net.d; empty: none",
            ),
            flag(
                "cni-conf",
                Text("FILE"),
                "",
                "CNI configuration to write, a conflist (default: that of flannel's manifest)",
            ),
        ],
    },
    Group {
        title: "Pages and metrics",
        flags: &[
            flag(
                "metrics-ip",
                Text("IP"),
                "127.0.0.1",
                "address of /metrics, /status and the pages that commands read",
            ),
            flag("metrics-port", Int("PORT"), "9472", "port of these pages; 0: none"),
            flag(
                "healthz-ip",
                Text("IP"),
                "127.0.0.1",
                "address of /healthz and /readyz; default 0.0.0.0 with -kube-subnet-mgr",
            ),
            flag("healthz-port", Int("PORT"), "0", "port of /healthz and /readyz; 0: none"),
        ],
    },
    Group {
        title: "Logging",
        flags: &[
            flag("v", Int("LEVEL"), "0", "how much to log: 0 and 1 info, 2 to 4 debug, 5 and more trace"),
            flag("log-format", Text("text|json"), "text", "format of the log on stderr"),
        ],
    },
    Group {
        title: OF_COMMANDS,
        flags: &[
            flag(
                "o",
                Text("table|wide|json"),
                "table",
                "output format: table; wide, with more columns and without line breaks on a terminal; or json",
            ),
            switch("json", "the same as -o json"),
            switch("w", "print again whenever the output changes, until interrupted"),
            switch("watch", "the same as -w"),
            switch("dry-run", "print what would be removed, and remove nothing"),
            switch("force", "remove even while another flannel agent runs, such as Go flannel"),
        ],
    },
    Group {
        title: "Compatibility",
        flags: &[
            switch("version", "print the version and exit"),
            flag(
                "subnet-lease-renew-margin",
                Int("MINUTES"),
                "60",
                "only checked, 1 to 1439: a lease is renewed at half of its time to live",
            ),
            flag("vmodule", Text("PATTERN"), "", "accepted without effect"),
            flag("log_backtrace_at", Text("FILE:LINE"), "", "accepted without effect"),
        ],
    },
];
