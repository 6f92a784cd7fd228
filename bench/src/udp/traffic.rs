//! Throughput, what it costs, small packets and latency: all contenders in turn, on both kinds of link.

use std::collections::BTreeMap;
use std::time::Duration;

use bench::Error;
use bench::agent::Programs;
use bench::report::median;
use testkit::probe::{pings, throughput};

use crate::udp::contenders::{Contender, Kind};
use crate::udp::pair::{Link, Way};
use crate::udp::rows::{Limit, Row};
use crate::udp::session::{Session, busy};
use crate::udp::small::highest_rate;

/// Between two echo requests.
const PING: Duration = Duration::from_millis(2);
/// A search for the highest rate tries some ten rates, each for this part of a measurement's time.
const TRIAL: u32 = 5;
/// A full frame, with its Ethernet header.
const FRAME: f64 = 1514.0;
/// How long is looked at what the machine does besides.
const BESIDES: Duration = Duration::from_millis(200);

/// What is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Figure {
    /// One TCP stream from host to host, in Gbit/s.
    Hosts,
    /// Processor time that this took, in ms a Gbit.
    Cpu,
    /// One TCP stream from pod to pod.
    Pods,
    /// Small packets a second, in thousands.
    Small,
    /// Round trip of a ping, in µs, the median.
    Ping,
}

type Figures = BTreeMap<(Figure, Kind), Vec<f64>>;

/// All rows of both kinds of link.
pub(crate) fn compare(session: &Session, programs: &Programs) -> Result<(), Error> {
    let mut contenders = Vec::new();
    for kind in Kind::ALL {
        session.go_on()?;
        contenders.push(Contender::start(kind, programs)?);
    }
    for link in Link::ALL {
        contenders.iter().try_for_each(|contender| contender.pair.set_link(link))?;
        let (mut figures, mut besides) = (Figures::new(), Vec::new());
        for _ in 0..session.rounds {
            besides.push(machine_besides()?);
            round(session, &contenders, link, &mut figures)?;
        }
        Row { name: "udp_besides", link: Some(link.name()), n: 1, unit: "share" }.print(&besides, None);
        rows(link, &figures);
    }
    Ok(())
}

fn round(session: &Session, contenders: &[Contender], link: Link, figures: &mut Figures) -> Result<(), Error> {
    let mut note = |figure, kind, value| figures.entry((figure, kind)).or_default().push(value);
    let (tcp, trial) = (session.time, session.time / TRIAL);
    for contender in contenders {
        session.go_on()?;
        let (frames, before) = (contender.pair.frames()?, busy()?);
        let gbits = gbits(contender.hosts(), tcp)?;
        let cpu = (busy()? - before).as_secs_f64() * 1e3 / (gbits * tcp.as_secs_f64());
        note(Figure::Hosts, contender.kind, gbits);
        note(Figure::Cpu, contender.kind, cpu);
        let size = contender.pair.frames()?.size_since(frames);
        if link == Link::Wire && size > FRAME {
            return Err(format!("{}: frames of {size:.0} bytes on a link that splits", contender.kind.name()).into());
        }
    }
    for (contender, way) in contenders.iter().filter_map(|contender| Some((contender, contender.pods()?))) {
        session.go_on()?;
        note(Figure::Pods, contender.kind, gbits(way, tcp)?);
    }
    let both = || contenders.iter().filter(|contender| matches!(contender.kind, Kind::Go | Kind::Ours));
    for contender in both() {
        session.go_on()?;
        note(Figure::Small, contender.kind, highest_rate(contender.hosts(), trial)? / 1e3);
    }
    for contender in both() {
        session.go_on()?;
        let Way { from, addr, .. } = contender.hosts();
        let took = pings(from, addr, PING, session.time)?;
        note(Figure::Ping, contender.kind, median(took.iter().map(|took| took.as_secs_f64() * 1e6).collect()));
    }
    Ok(())
}

fn gbits(way: Way<'_>, time: Duration) -> Result<f64, Error> {
    Ok(throughput(way.from, way.to, way.addr, time)?.gbit_per_second())
}

/// The share of all processors that is busy while nothing is measured.
fn machine_besides() -> Result<f64, Error> {
    let (processors, before) = (std::thread::available_parallelism()?, busy()?);
    std::thread::sleep(BESIDES);
    Ok((busy()? - before).as_secs_f64() / BESIDES.as_secs_f64() / processors.get() as f64)
}

/// A row: its name and unit, what is compared with whom, and what is promised: first on a link that takes all in one
/// piece, then on one of real frames.
type Promise = (&'static str, &'static str, Figure, Kind, [Option<Limit>; 2]);

const PROMISED: [Promise; 11] = {
    use Figure::{Cpu, Hosts, Ping, Pods, Small};
    use Limit::{Least, Most};
    [
        ("udp_tcp", "Gbit/s", Hosts, Kind::Raw, [None, None]),
        ("udp_tcp", "Gbit/s", Hosts, Kind::Vxlan, [Some(Least(0.55)), Some(Least(0.85))]),
        ("udp_tcp", "Gbit/s", Hosts, Kind::Go, [Some(Least(10.0)), Some(Least(7.0))]),
        ("udp_tcp", "Gbit/s", Hosts, Kind::TunRs, [Some(Least(1.2)), Some(Least(1.1))]),
        ("udp_tcp_pods", "Gbit/s", Pods, Kind::Vxlan, [Some(Least(0.55)), Some(Least(0.85))]),
        ("udp_tcp_pods", "Gbit/s", Pods, Kind::Go, [Some(Least(10.0)), Some(Least(7.0))]),
        ("udp_tcp_pods", "Gbit/s", Pods, Kind::TunRs, [Some(Least(1.2)), Some(Least(1.1))]),
        ("udp_cpu", "ms/Gbit", Cpu, Kind::Vxlan, [None, None]),
        ("udp_cpu", "ms/Gbit", Cpu, Kind::Go, [Some(Most(0.12)), Some(Most(0.2))]),
        ("udp_small", "kpackets/s", Small, Kind::Go, [Some(Least(3.0)), Some(Least(2.0))]),
        ("udp_ping", "us", Ping, Kind::Go, [Some(Most(1.5)), Some(Most(1.3))]),
    ]
};

fn rows(link: Link, figures: &Figures) {
    let of = |figure, kind| figures.get(&(figure, kind)).map(Vec::as_slice).unwrap_or_default();
    for (name, unit, figure, other, [off, wire]) in PROMISED {
        let limit = if link == Link::Off { off } else { wire };
        let row = Row { name, link: Some(link.name()), n: 1, unit };
        row.beside(of(figure, Kind::Ours), other.name(), of(figure, other), limit);
    }
}
