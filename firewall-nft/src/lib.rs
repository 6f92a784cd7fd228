//! A firewall with nftables rules: the effect of flannel's iptables rules, in the tables of flannel's nftables mode.
//!
//! There is one table per family: `ip flannel-ipv4` and `ip6 flannel-ipv6`. For an overlay with another name than
//! `flannel`, `-<name>` is appended. Each table has the chains `postrtg` (masquerade), `forward` (accept), and with a
//! [`VxlanGuard`](flannel_core::firewall::VxlanGuard) `vxlan` with the set `peers`. The rules are those for iptables,
//! not those of Go flannel for nftables (docs/compatibility.md, "iptables", "nftables"): the mark is tested under its
//! mask, and packets from a node to remote pods are masqueraded.
//!
//! In nftables, an `accept` in these chains does not override a drop in another table's chain. If a `FORWARD` chain of
//! iptables drops by policy, use `flannel-firewall-iptables`.
//!
//! ```no_run
//! use flannel_core::firewall_keeper::{self, KeepOptions};
//! use flannel_core::overlay::Overlay;
//! use flannel_firewall_nft::Nft;
//!
//! # async fn example(overlay: Overlay) -> Result<(), Box<dyn std::error::Error>> {
//! // Writes the rules once there is a lease, and again whenever another program deletes one.
//! firewall_keeper::keep(&overlay.handle(), &Nft::new()?, KeepOptions::default()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! The crate `flannelkit` exports this as `flannelkit::firewall::Nft`, and `flannelkit::testing::FakeFirewall` for
//! tests.

#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod wanted;
mod wire;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::firewall::{Call, Drift, Firewall, FirewallError, Problem, Program, Rules, SourcePorts, Tools};
use flannel_core::kernel::OverlayName;
use flannel_core::net::Family;
use nix::sched::{CloneFlags, setns};
use tokio::sync::OnceCell;

use crate::wanted::{Table, table_name, tables};
use crate::wire::Start;

const PROGRAM: &str = "nft";

/// The time limit of one run of `nft`, which takes some milliseconds on a quiet host.
const WITHIN: Duration = Duration::from_secs(10);

/// nftables of one network namespace, through the program `nft` (1.0.1 or later, with JSON).
///
/// Starts one thread, which ends when this value is dropped; the rules stay. Needs `CAP_NET_ADMIN`.
#[derive(Debug)]
pub struct Nft {
    tools: Tools,
    program: PathBuf,
    /// The support of tool and kernel for source ports, probed once.
    most: OnceCell<SourcePorts>,
}

impl Nft {
    /// Uses nftables in the calling thread's network namespace, with the `nft` on `PATH`.
    ///
    /// # Errors
    /// [`FirewallError::Failed`] if no thread could be created. Retry with back-off.
    pub fn new() -> Result<Self, FirewallError> {
        Ok(Self::with(Tools::start()?))
    }

    /// Uses nftables in a given network namespace (an open `/run/netns/…` or `/proc/…/ns/net`).
    ///
    /// # Errors
    /// As [`new`](Self::new); [`FirewallError::Denied`] without `CAP_SYS_ADMIN`, and [`FirewallError::Failed`] if
    /// `namespace` is not a network namespace: both final.
    pub fn in_namespace(namespace: OwnedFd) -> Result<Self, FirewallError> {
        Ok(Self::with(Tools::start_after(move || Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?))?))
    }

    /// Sets the program for `nft`: a path, or a name on `PATH`.
    #[must_use]
    pub fn program(self, path: impl Into<PathBuf>) -> Self {
        Self { program: path.into(), ..self }
    }

    /// Checks that `nft` is on `PATH`. Runs nothing.
    ///
    /// # Errors
    /// [`FirewallError::Unsupported`]. Final until it is installed.
    pub fn check_program() -> Result<(), FirewallError> {
        program(PROGRAM.into()).check()
    }

    fn with(tools: Tools) -> Self {
        Self { tools, program: PathBuf::from(PROGRAM), most: OnceCell::new() }
    }

    async fn tables(&self, rules: &Rules) -> Result<[(Family, String, Option<Table>); 2], FirewallError> {
        let asked = rules.masquerade.map(|masquerade| masquerade.ports);
        let most = match asked {
            Some(SourcePorts::FullyRandom) if !rules.pods.is_empty() => {
                *self.most.get_or_try_init(|| self.probe()).await?
            }
            _ => SourcePorts::Kernel,
        };
        let mut wanted = tables(rules, most);
        Ok(Family::BOTH.map(|family| (family, table_name(&rules.overlay, family), wanted.slot(family).take())))
    }

    async fn probe(&self) -> Result<SourcePorts, FirewallError> {
        match self.nft(&["-c", "-f", "-"], wire::probe(), "asking for fully-random").await {
            Ok(_) => Ok(SourcePorts::FullyRandom),
            Err(FirewallError::Refused { .. }) => Ok(SourcePorts::Kernel),
            Err(error) => Err(error),
        }
    }

    /// Returns the JSON of a table that existed a moment ago, or `None` if it was deleted meanwhile.
    async fn table(&self, family: Family, name: &str) -> Result<Option<String>, FirewallError> {
        let args = ["-j", "list", "table", wire::keyword(family), name];
        match self.nft(&args, String::new(), "listing the overlay's table").await {
            Ok(text) => Ok(Some(text)),
            Err(FirewallError::Refused { text, .. }) if text.contains(ENOENT) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn commit(&self, script: String, doing: &str) -> Result<(), FirewallError> {
        if script.is_empty() {
            return Ok(());
        }
        self.nft(&["-f", "-"], script, doing).await.map(|_| ())
    }

    async fn nft(&self, args: &[&str], input: String, doing: &str) -> Result<String, FirewallError> {
        let call = Call {
            program: program(self.program.clone()),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            input,
            doing: format!("nft: {doing}"),
            within: WITHIN,
        };
        let doing = call.doing.clone();
        let answer = self.tools.run(call).await?;
        if answer.status.success() {
            return Ok(answer.stdout);
        }
        if answer.stderr.contains("JSON support not compiled") {
            let hint = "install an nft that was built with JSON support".to_owned();
            return Err(FirewallError::Unsupported { what: "nft -j".to_owned(), hint });
        }
        Err(answer.refused(doing))
    }
}

fn program(path: PathBuf) -> Program {
    let hint = "install nftables (apt install nftables), or use iptables (no \"EnableNFTables\" in the network \
                configuration)";
    Program { path, hint: hint.to_owned() }
}

#[async_trait]
impl Firewall for Nft {
    async fn apply(&self, rules: &Rules) -> Result<(), FirewallError> {
        const DOING: &str = "writing the overlay's rules";
        let tables = self.tables(rules).await?;
        let there = self.nft(&["-j", "list", "tables"], String::new(), "listing tables").await?;
        let mut scripts = [String::new(), String::new()];
        let mut found = false;
        for (family, name, table) in &tables {
            let listed = wire::lists(&there, *family, name).map_err(unreadable)?;
            found |= listed;
            for (script, start) in scripts.iter_mut().zip([Start::Keep, Start::Over]) {
                match table {
                    Some(table) => script.push_str(&wire::put(table, start)),
                    None if listed => script.push_str(&wire::delete(*family, name)),
                    None => {}
                }
            }
        }
        let [keep, over] = scripts;
        match self.commit(keep, DOING).await {
            // The present table may be in the way: one of the chains on another hook cannot be changed, only replaced.
            Err(FirewallError::Refused { .. }) if found => self.commit(over, DOING).await,
            done => done,
        }
        .map_err(missing_module)
    }

    async fn check(&self, rules: &Rules) -> Result<Vec<Drift>, FirewallError> {
        let tables = self.tables(rules).await?;
        let there = self.nft(&["-j", "list", "tables"], String::new(), "listing tables").await?;
        let mut drift = Vec::new();
        for (family, name, table) in tables {
            let keyword = wire::keyword(family);
            let whole = |problem| Drift::new(format!("table {keyword} {name}"), problem);
            match (table, wire::lists(&there, family, &name).map_err(unreadable)?) {
                (None, false) => {}
                (None, true) => drift.push(whole(Problem::Leftover)),
                (Some(_), false) => drift.push(whole(Problem::Missing)),
                (Some(table), true) => match self.table(family, &name).await? {
                    Some(text) => drift.extend(wire::compare(&text, &table).map_err(unreadable)?),
                    None => drift.push(whole(Problem::Missing)),
                },
            }
        }
        Ok(drift)
    }

    async fn let_in(&self, overlay: &OverlayName) -> Result<BTreeSet<IpAddr>, FirewallError> {
        let there = self.nft(&["-j", "list", "tables"], String::new(), "listing tables").await?;
        let mut peers = BTreeSet::new();
        for family in Family::BOTH {
            let name = table_name(overlay, family);
            if wire::lists(&there, family, &name).map_err(unreadable)?
                && let Some(text) = self.table(family, &name).await?
            {
                peers.extend(wire::peers(&text).map_err(unreadable)?);
            }
        }
        Ok(peers)
    }

    async fn remove(&self, overlay: &OverlayName) -> Result<(), FirewallError> {
        let there = self.nft(&["-j", "list", "tables"], String::new(), "listing tables").await?;
        let mut script = String::new();
        for family in Family::BOTH {
            let name = table_name(overlay, family);
            if wire::lists(&there, family, &name).map_err(unreadable)? {
                script.push_str(&wire::delete(family, &name));
            }
        }
        self.commit(script, "removing the overlay's rules").await
    }
}

const ENOENT: &str = "No such file or directory";

fn unreadable(reason: String) -> FirewallError {
    FirewallError::Failed { doing: "reading what nft lists".to_owned(), reason }
}

/// The transactions only use what they add, so a missing object is a missing part of the kernel.
fn missing_module(error: FirewallError) -> FirewallError {
    match error {
        FirewallError::Refused { doing, text } if text.contains(ENOENT) => FirewallError::Unsupported {
            what: doing,
            hint: format!("the kernel lacks a part, try: modprobe -a nf_tables nft_chain_nat nft_masq ({text})"),
        },
        error => error,
    }
}
