//! The results of a run.

use std::io::Write;
use std::time::Duration;

use serde::Serialize;

use crate::Error;
use crate::args::Args;
use crate::heal::Heal;
use crate::screen::{Screen, Style, duration};
use crate::traffic::Pair;

/// The results.
pub(crate) struct Report {
    nodes: u8,
    backend: String,
    pairs: usize,
    /// The pairs that pinged before and after the acts.
    pairs_ok: usize,
    throughput: Option<f64>,
    heals: Vec<Heal>,
}

impl Report {
    pub(crate) fn new(args: &Args, before: &[Pair], after: &[Pair], throughput: Option<f64>, heals: Vec<Heal>) -> Self {
        let pairs_ok = before.iter().zip(after).filter(|(before, after)| before.is_good() && after.is_good()).count();
        let backend = args.backend.to_string();
        Self { nodes: args.nodes, backend, pairs: before.len(), pairs_ok, throughput, heals }
    }

    /// Whether every pair pinged and every act healed.
    pub(crate) fn is_good(&self) -> bool {
        self.pairs_ok == self.pairs && self.healed().len() == self.heals.len()
    }

    fn healed(&self) -> Vec<Duration> {
        let mut times: Vec<_> = self.heals.iter().filter_map(|heal| heal.outcome.as_ref().ok().copied()).collect();
        times.sort();
        times
    }

    /// Shows a summary of the acts.
    pub(crate) fn show(&self, screen: &mut Screen) -> Result<(), Error> {
        let times = self.healed();
        if let (Some(median), Some(slowest)) = (times.get(times.len() / 2), times.last()) {
            let text = format!("Half healed within {}, the slowest took {}.", duration(*median), duration(*slowest));
            screen.line(&[(&text, Style::Plain)])?;
        }
        Ok(())
    }

    /// Returns the result in one sentence.
    pub(crate) fn verdict(&self) -> String {
        format!(
            "{} of {} pairs pinged, before and after; {} of {} acts healed.",
            self.pairs_ok,
            self.pairs,
            self.healed().len(),
            self.heals.len()
        )
    }

    /// Prints the object for `--json`.
    pub(crate) fn print_json(&self, took: Duration) -> Result<(), Error> {
        let heals = self.heals.iter().map(|heal| Act {
            act: heal.act.name(),
            healed: heal.outcome.is_ok(),
            ms: heal.outcome.as_ref().ok().map(|took| rounded(took.as_secs_f64() * 1e3)),
        });
        let object = Object {
            nodes: self.nodes,
            backend: &self.backend,
            pairs: self.pairs,
            pairs_ok: self.pairs_ok,
            throughput_gbps: self.throughput.map(rounded),
            seconds: rounded(took.as_secs_f64()),
            heals: heals.collect(),
        };
        Ok(writeln!(std::io::stdout(), "{}", serde_json::to_string(&object)?)?)
    }
}

#[derive(Serialize)]
struct Object<'a> {
    nodes: u8,
    backend: &'a str,
    /// Ordered pairs: one to two and two to one are two pairs.
    pairs: usize,
    pairs_ok: usize,
    throughput_gbps: Option<f64>,
    seconds: f64,
    heals: Vec<Act>,
}

#[derive(Serialize)]
struct Act {
    act: &'static str,
    healed: bool,
    ms: Option<f64>,
}

fn rounded(value: f64) -> f64 {
    (value * 100.0).round() / 100.0
}
