//! flanneld as a process: its memory among many peers, and what a restart costs those who send.

use std::thread;
use std::time::Duration;

use bench::Error;
use bench::agent::{Program, Programs};
use testkit::probe::{Flow, throughput};
use testkit::wait_until;

use crate::udp::contenders::Flanneld;
use crate::udp::pair::Pair;
use crate::udp::peers::MANY;
use crate::udp::rows::Row;
use crate::udp::session::Session;

/// Resident memory may be this many MiB.
const MEMORY: f64 = 24.0;
/// A gap may be this many milliseconds.
const GAP: f64 = 150.0;
/// Packets a second, each way, during a restart.
const RATE: u32 = 1000;
/// How long they go on before a restart and after it.
const CALM: Duration = Duration::from_millis(500);
/// What follows a start counts too.
const AFTERMATH: Duration = Duration::from_secs(2);
/// How long packets may stay away.
const PATIENCE: Duration = Duration::from_secs(30);

/// Resident memory of flanneld among many peers, after traffic both ways.
pub(crate) fn memory(session: &Session, programs: &Programs) -> Result<(), Error> {
    session.go_on()?;
    let pair = Pair::new()?;
    let both = Flanneld::start(&pair, programs, Program::Ours, MANY)?;
    thread::sleep(AFTERMATH);
    session.go_on()?;
    let [one, two] = &pair.hosts;
    throughput(&one.ns, &two.ns, two.inner().into(), session.time)?;
    throughput(&two.ns, &one.ns, one.inner().into(), session.time)?;
    let [agent, _] = &both.agents;
    let (now, peak) = agent.memory()?;
    let row = |name| Row { name, link: None, n: MANY, unit: "MiB" };
    row("udp_memory").print(&[now], Some(MEMORY));
    row("udp_memory_peak").print(&[peak], None);
    Ok(())
}

/// The longest time without a packet, of both directions, when flanneld is killed and started again.
pub(crate) fn restart(session: &Session, programs: &Programs) -> Result<(), Error> {
    let pair = Pair::new()?;
    let mut both = Flanneld::start(&pair, programs, Program::Ours, 1)?;
    let mut gaps = Vec::new();
    for _ in 0..session.rounds {
        session.go_on()?;
        let [one, two] = &pair.hosts;
        let flows = [
            Flow::start(&one.ns, &two.ns, two.inner().into(), RATE)?,
            Flow::start(&two.ns, &one.ns, one.inner().into(), RATE)?,
        ];
        thread::sleep(CALM);
        both.restart_first(&pair, programs, Program::Ours)?;
        let before = flows.each_ref().map(Flow::received);
        wait_until("packets after the restart", PATIENCE, || {
            Ok(flows.iter().zip(before).all(|(flow, before)| flow.received() > before + u64::from(RATE) / 10))
        })?;
        thread::sleep(CALM);
        let mut longest = Duration::ZERO;
        for flow in flows {
            longest = longest.max(flow.stop()?.longest_gap);
        }
        gaps.push(longest.as_secs_f64() * 1e3);
    }
    Row { name: "udp_restart", link: None, n: 1, unit: "ms" }.print(&gaps, Some(GAP));
    Ok(())
}
