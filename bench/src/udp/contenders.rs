//! What is measured beside one another, each on two hosts of its own.

use bench::Error;
use bench::agent::{Agent, Program, Programs};
use bench::cluster::Cluster;
use bench::peers::Backend;
use tempfile::TempDir;

use crate::udp::forwarder::Forwarder;
use crate::udp::library::Library;
use crate::udp::pair::{Pair, Way};

/// The MTU inside of UDP datagrams on this link, and of VXLAN.
const UDP_MTU: u32 = 1472;
const VXLAN_MTU: u32 = 1450;

/// Who carries the packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Kind {
    /// Nobody: the hosts' own addresses.
    Raw,
    /// The kernel.
    Vxlan,
    /// Go flannel's UDP backend.
    Go,
    /// A forwarder of tun-rs and quinn-udp.
    TunRs,
    /// The crate that all of this is about.
    Ours,
}

impl Kind {
    pub(crate) const ALL: [Self; 5] = [Self::Raw, Self::Vxlan, Self::Go, Self::TunRs, Self::Ours];

    /// Its name in rows.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Vxlan => "vxlan",
            Self::Go => "go",
            Self::TunRs => "tun_rs",
            Self::Ours => "ours",
        }
    }
}

/// A contender that is ready: packets go through.
pub(crate) struct Contender {
    pub(crate) kind: Kind,
    // Ended before its hosts are gone.
    _carrier: Carrier,
    pub(crate) pair: Pair,
}

enum Carrier {
    Nobody,
    Library { _agents: Library },
    Forwarders { _both: [Forwarder; 2] },
    Programs { _both: Box<Flanneld> },
}

impl Contender {
    pub(crate) fn start(kind: Kind, programs: &Programs) -> Result<Self, Error> {
        let mut pair = Pair::new()?;
        let carrier = match kind {
            Kind::Raw => Carrier::Nobody,
            Kind::Vxlan => Carrier::Library { _agents: Library::start(&pair, Backend::Vxlan, 1)? },
            Kind::Ours => Carrier::Library { _agents: Library::start(&pair, Backend::Udp, 1)? },
            Kind::TunRs => Carrier::Forwarders { _both: Forwarder::both(&pair, UDP_MTU)? },
            Kind::Go => Carrier::Programs { _both: Box::new(Flanneld::start(&pair, programs, Program::Go, 1)?) },
        };
        match kind {
            Kind::Raw => {}
            Kind::Vxlan => pair.attach_pods(VXLAN_MTU)?,
            Kind::Go | Kind::TunRs | Kind::Ours => pair.attach_pods(UDP_MTU)?,
        }
        let contender = Self { kind, _carrier: carrier, pair };
        for way in [Some(contender.hosts()), contender.pods()].into_iter().flatten() {
            way.until_open().map_err(|error| format!("{}: {error}", kind.name()))?;
        }
        Ok(contender)
    }

    /// From host to host.
    pub(crate) fn hosts(&self) -> Way<'_> {
        match self.kind {
            Kind::Raw => self.pair.underlay(),
            _ => self.pair.overlay(),
        }
    }

    /// From pod to pod.
    pub(crate) fn pods(&self) -> Option<Way<'_>> {
        self.pair.pods()
    }
}

/// A flanneld on each of two hosts, ours or Go's, with an etcd on the first.
pub(crate) struct Flanneld {
    pub(crate) agents: [Agent; 2],
    args: Vec<String>,
    dirs: [TempDir; 2],
    _cluster: Cluster,
}

impl Flanneld {
    /// Starts them among `peers` peers, of whom the second host is one.
    pub(crate) fn start(pair: &Pair, programs: &Programs, program: Program, peers: u32) -> Result<Self, Error> {
        let [one, two] = &pair.hosts;
        let cluster = one.ns.run(|| -> Result<Cluster, Error> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(Cluster::with_peers(Backend::Udp, peers, Some(one.public())))
        })??;
        // No program but this one forwards here, and rules would be measured with it.
        let args = [&cluster.args()[..], &["-iptables-forward-rules=false".to_owned()]].concat();
        let dirs = [tempfile::tempdir()?, tempfile::tempdir()?];
        let [first, second] = &dirs;
        let agents = [
            one.ns.run(|| Agent::start(programs, program, 0, &args, first.path()))??,
            two.ns.run(|| Agent::start(programs, program, 1, &args, second.path()))??,
        ];
        let both = Self { agents, args, dirs, _cluster: cluster };
        pair.overlay().until_open().map_err(|error| both.with_last_words(error))?;
        Ok(both)
    }

    /// Kills the first host's agent and starts it again at once.
    pub(crate) fn restart_first(&mut self, pair: &Pair, programs: &Programs, program: Program) -> Result<(), Error> {
        let ([host, _], [dir, _], [agent, _]) = (&pair.hosts, &self.dirs, &mut self.agents);
        agent.kill()?;
        *agent = host.ns.run(|| Agent::start(programs, program, 0, &self.args, dir.path()))??;
        Ok(())
    }

    fn with_last_words(&self, error: Error) -> Error {
        let [one, two] = &self.agents;
        format!("{error}\n{}\n{}", one.last_words(), two.last_words()).into()
    }
}
