//! Throughput among many peers, beside that with one.

use bench::Error;
use bench::peers::Backend;
use testkit::probe::throughput;

use crate::udp::library::Library;
use crate::udp::pair::Pair;
use crate::udp::rows::{Limit, Row};
use crate::udp::session::Session;

/// Many.
pub(crate) const MANY: u32 = 10_000;

pub(crate) fn compare(session: &Session) -> Result<(), Error> {
    let numbers = [1, MANY];
    let mut overlays = Vec::new();
    for peers in numbers {
        session.go_on()?;
        let pair = Pair::new()?;
        let library = Library::start(&pair, Backend::Udp, peers)?;
        pair.overlay().until_open()?;
        overlays.push((library, pair));
    }
    let [(_, one), (_, many)] = &overlays[..] else { return Ok(()) };
    let (mut of_one, mut of_many) = (Vec::new(), Vec::new());
    for _ in 0..session.rounds {
        for (pair, figures) in [(one, &mut of_one), (many, &mut of_many)] {
            session.go_on()?;
            let way = pair.overlay();
            figures.push(throughput(way.from, way.to, way.addr, session.time)?.gbit_per_second());
        }
    }
    let row = Row { name: "udp_tcp_peers", link: Some("off"), n: MANY, unit: "Gbit/s" };
    row.beside(&of_many, "one_peer", &of_one, Some(Limit::Least(0.95)));
    Ok(())
}
