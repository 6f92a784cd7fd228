//! The floor: the same objects, written by `ip -batch` and `bridge -batch`.

use std::fmt::Write as _;
use std::io::Write as _;
use std::time::{Duration, Instant};

use flannel_core::kernel::Route;

use bench::peers::{mac, prefix, public, subnet};
use bench::{Error, bed};

/// What tells routes apart in the kernel's next-hop table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Spread {
    /// Protocols, and scopes where there are many, as ours have.
    Ours,
    /// Nothing: one protocol for all, which is how everybody does it.
    None,
}

/// Up to this ours have no scopes.
const FEW: u32 = 16_384;

/// The batches for `n` peers.
pub(crate) struct Floor {
    neighbours: tempfile::NamedTempFile,
    fdb: tempfile::NamedTempFile,
    routes: tempfile::NamedTempFile,
}

impl Floor {
    pub(crate) fn new(n: u32, spread: Spread) -> Result<Self, Error> {
        let (mut neighbours, mut fdb, mut routes) = (String::new(), String::new(), String::new());
        for peer in 1..=n {
            let (hop, public, mac) = (subnet(peer), public(peer), mac(peer));
            let subnet = prefix(peer);
            writeln!(neighbours, "neigh replace {hop} lladdr {mac} dev flannel.1 nud permanent")?;
            writeln!(fdb, "fdb replace {mac} dev flannel.1 self permanent dst {public}")?;
            let mut place = match spread {
                Spread::Ours => format!(" proto {}", Route::protocol_for(&subnet)),
                Spread::None => String::new(),
            };
            if spread == Spread::Ours && n > FEW {
                write!(place, " scope {}", Route::scope_for(&subnet))?;
            }
            writeln!(routes, "route add {subnet} via {hop} dev flannel.1 onlink{place}")?;
        }
        Ok(Self { neighbours: file(&neighbours)?, fdb: file(&fdb)?, routes: file(&routes)? })
    }

    /// Device, neighbours, forwarding entries and routes, from an empty kernel. Runs in the caller's namespace.
    pub(crate) fn program(&self) -> Result<Duration, Error> {
        let started = Instant::now();
        bed::ip("link add flannel.1 mtu 1450 txqueuelen 0 type vxlan id 1 dev eth0 local 172.16.0.1 nolearning")?;
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
