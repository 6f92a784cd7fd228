//! The floor: the same objects, written by `ip -batch` and `bridge -batch`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{Duration, Instant};

use flannel_core::net::Prefix;
use flannel_core::state::Route;

use bench::peers::{mac, public, subnet};
use bench::{Error, bed};

/// Which protocol numbers the routes have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Protocols {
    /// As ours have.
    Spread,
    /// One for all, which is how everybody does it.
    Plain,
}

/// The batches for `n` peers.
pub(crate) struct Floor {
    neighbours: tempfile::NamedTempFile,
    fdb: tempfile::NamedTempFile,
    routes: tempfile::NamedTempFile,
}

impl Floor {
    pub(crate) fn new(n: u16, protocols: Protocols) -> Result<Self, Error> {
        let (mut neighbours, mut fdb, mut routes) = (String::new(), String::new(), String::new());
        for peer in 1..=n {
            let (hop, public, mac) = (subnet(peer), public(peer), mac(peer));
            let subnet = Prefix::new(hop.into(), 24)?;
            writeln!(neighbours, "neigh replace {hop} lladdr {mac} dev flannel.1 nud permanent")?;
            writeln!(fdb, "fdb replace {mac} dev flannel.1 self permanent dst {public}")?;
            let proto = match protocols {
                Protocols::Spread => format!(" proto {}", Route::protocol_for(&subnet)),
                Protocols::Plain => String::new(),
            };
            writeln!(routes, "route add {subnet} via {hop} dev flannel.1 onlink{proto}")?;
        }
        Ok(Self { neighbours: file(&neighbours)?, fdb: file(&fdb)?, routes: file(&routes)? })
    }

    /// Device, neighbours, forwarding entries and routes, from an empty kernel. Runs in the caller's namespace.
    pub(crate) fn program(&self) -> Result<Duration, Error> {
        let started = Instant::now();
        bed::ip("link add flannel.1 mtu 1450 txqueuelen 0 type vxlan id 1 dev eth0 local 192.168.0.1 nolearning")?;
        bed::ip("address add 10.5.0.0/32 dev flannel.1")?;
        bed::ip("link set flannel.1 up")?;
        batch("bridge", &self.fdb)?;
        batch("ip", &self.neighbours)?;
        batch("ip", &self.routes)?;
        Ok(started.elapsed())
    }
}

fn file(text: &str) -> Result<tempfile::NamedTempFile, Error> {
    let mut file = tempfile::NamedTempFile::new()?;
    file.write_all(text.as_bytes())?;
    file.flush()?;
    Ok(file)
}

fn batch(program: &str, file: &tempfile::NamedTempFile) -> Result<(), Error> {
    bed::run(program, &["-batch", &file.path().to_string_lossy()])
}
