//! Breaks the overlay and measures how long it takes to heal.

use std::sync::Arc;
use std::time::Duration;

use flannel_core::net::{Dual, Family};
use testkit::sabotage::{Act, Overlay};
use testkit::{Pod, probe};
use tokio::time::Instant;

use crate::Error;
use crate::args::Args;
use crate::cluster::{Cluster, Member, blocking};
use crate::screen::{Screen, Style, duration};

/// How long an act may take to heal.
const PATIENCE: Duration = Duration::from_secs(10);
/// The pause between two checks: the resolution of the measurement, at little cost for the agent.
const STEP: Duration = Duration::from_millis(2);
/// How long a check waits for an echo.
const ECHO: Duration = Duration::from_millis(50);

/// The outcome of an act.
#[derive(Debug, Clone)]
pub(crate) struct Heal {
    pub(crate) act: Act,
    /// The time from the end of the act until the kernel was in the wanted state and pods pinged both ways.
    pub(crate) outcome: Result<Duration, String>,
}

/// Performs every act, each on another node than the last.
pub(crate) async fn every_act(args: &Args, screen: &mut Screen, cluster: &Cluster) -> Result<Vec<Heal>, Error> {
    const ACT: usize = 50;
    const NODE: usize = 10;
    screen.section("Break and heal")?;
    screen.note("Healed is: the kernel is as the agent wants it, no write is held back, and the")?;
    screen.note("pods of that node and the next ping both ways, timed from the end of the act.")?;
    screen.line(&[(&format!("{:<ACT$}{:<NODE$}{}", "act", "node", "healed in"), Style::Dim)])?;
    let mut heals = Vec::new();
    for (nth, act) in Act::all(args.backend.plane()).enumerate() {
        // The agent backs off from an object that changes again and again. This demonstration avoids that.
        let struck = nth % cluster.members.len();
        screen.begin(&format!("{:<ACT$}{:<NODE$}", act.name(), cluster.nodes()[struck].name), 0)?;
        let heal = Heal { act, outcome: strike(cluster, act, struck).await? };
        match &heal.outcome {
            Ok(took) => screen.end(&format!("{:>9}", duration(*took)), Style::Good)?,
            Err(why) => {
                screen.end("not healed", Style::Bad)?;
                for line in why.lines().take(6) {
                    screen.wrapped(4, 2, line, Style::Plain)?;
                }
            }
        }
        heals.push(heal);
    }
    Ok(heals)
}

async fn strike(cluster: &Cluster, act: Act, struck: usize) -> Result<Result<Duration, String>, Error> {
    let (here, there) = (&cluster.members[struck], &cluster.members[(struck + 1) % cluster.members.len()]);
    let scope = here.handle().plan().await?.scope;
    let devices = scope.devices.iter().map(|device| device.name.to_string()).collect();
    let overlay = Overlay { devices, networks: Dual { v4: scope.networks.v4, v6: scope.networks.v6 } };
    let lab = Arc::clone(cluster.underlay());
    let done = blocking(move || act.apply(&lab.nodes()[struck], &overlay)).await;
    if let Err(error) = done {
        let lab = Arc::clone(cluster.underlay());
        blocking(move || lab.nodes()[struck].restore_underlay()).await?;
        return Ok(Err(crate::chain(&*error)));
    }
    healed(here, there, cluster.families()).await
}

async fn healed(here: &Member, there: &Member, families: &[Family]) -> Result<Result<Duration, String>, Error> {
    let began = Instant::now();
    loop {
        let trouble = match tokio::time::timeout(PATIENCE, here.handle().plan()).await {
            Err(_) => "the agent does not answer".to_owned(),
            Ok(Err(error)) => crate::chain(&error),
            Ok(Ok(preview)) if !preview.is_settled() => format!("still to be done:\n{preview}"),
            Ok(Ok(_)) => match echo(&here.pod, &there.pod, families).await? {
                None => return Ok(Ok(began.elapsed())),
                Some(trouble) => trouble,
            },
        };
        if began.elapsed() > PATIENCE {
            return Ok(Err(trouble));
        }
        tokio::time::sleep(STEP).await;
    }
}

/// Pings both ways. Returns the error, if any.
async fn echo(here: &Pod, there: &Pod, families: &[Family]) -> Result<Option<String>, Error> {
    let (here, there, families) = (here.clone(), there.clone(), families.to_vec());
    let trouble = blocking(move || {
        for family in families {
            for (from, to) in [(&here, &there), (&there, &here)] {
                if let Err(error) = probe::until_reply(&from.ns, to.addr(family)?, ECHO) {
                    return Ok(Some(crate::chain(&error)));
                }
            }
        }
        Ok(None)
    });
    trouble.await
}
