//! A firewall with iptables rules, byte for byte those of flannel (docs/compatibility.md, "iptables"), so that either
//! agent can replace the other on a node.
//!
//! The chains are `FLANNEL-POSTRTG` in table nat and `FLANNEL-FWD` in table filter. For an overlay with another name
//! than `flannel`, `-<name>` is appended. One jump to each chain is appended to `POSTROUTING` and `FORWARD`. An
//! existing jump stays where it is.
//!
//! A [`VxlanGuard`](flannel_core::firewall::VxlanGuard) is not supported: use `flannel-firewall-nft` for that.
//!
//! ```no_run
//! use flannel_core::firewall_keeper::{self, KeepOptions};
//! use flannel_core::overlay::Overlay;
//! use flannel_firewall_iptables::Iptables;
//!
//! # async fn example(overlay: Overlay) -> Result<(), Box<dyn std::error::Error>> {
//! // Writes the rules once there is a lease, and again whenever another program deletes one.
//! firewall_keeper::keep(&overlay.handle(), &Iptables::new()?, KeepOptions::default()).await?;
//! # Ok(())
//! # }
//! ```
//!
//! The crate `flannelkit` exports this as `flannelkit::firewall::Iptables`, and `flannelkit::testing::FakeFirewall` for
//! tests.

#[cfg(any(test, feature = "fuzzing"))]
#[doc(hidden)]
pub mod fuzzing;
mod wanted;
mod wire;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use flannel_core::firewall::{Call, Drift, Firewall, FirewallError, Program, Rules, SourcePorts, Tools};
use flannel_core::kernel::OverlayName;
use flannel_core::net::Family;
use nix::sched::{CloneFlags, setns};
use tokio::sync::{Mutex, OnceCell};

use crate::wanted::{Chains, chains, none};
use crate::wire::Seen;

/// The time limit of one run of a tool: twice the time it may wait for the lock that iptables programs share.
const WITHIN: Duration = Duration::from_secs(10);

/// The first version with `--random-fully`, and with `-w` for `iptables-restore`.
const MODERN: [u32; 3] = [1, 6, 2];

/// How often rules are read and written again after another program changed them in between.
const ATTEMPTS: u32 = 3;

/// iptables of one network namespace, through its programs.
///
/// Starts one thread per address family. They end when this value is dropped; the rules stay. Needs `CAP_NET_ADMIN`,
/// and with legacy iptables also `CAP_NET_RAW`.
#[derive(Debug)]
pub struct Iptables {
    v4: Tools,
    v6: Tools,
    variant: Variant,
    directory: PathBuf,
    version: OnceCell<[u32; 3]>,
    /// Held during a write: older versions try only once a second to get the lock that all iptables programs share.
    writing: Mutex<()>,
}

/// The variant of iptables: a host may have two, with separate rules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[non_exhaustive]
pub enum Variant {
    /// The program `iptables`: the host's default.
    #[default]
    Default,
    /// `iptables-nft`, on top of nftables.
    Nft,
    /// `iptables-legacy`, on top of xtables.
    Legacy,
}

impl Iptables {
    /// Uses iptables in the calling thread's network namespace, with the programs on `PATH`.
    ///
    /// # Errors
    /// [`FirewallError::Failed`] if no thread could be created. Retry with back-off.
    pub fn new() -> Result<Self, FirewallError> {
        Ok(Self::with(Tools::start()?, Tools::start()?))
    }

    /// Uses iptables in a given network namespace (an open `/run/netns/…` or `/proc/…/ns/net`).
    ///
    /// # Errors
    /// As [`new`](Self::new); [`FirewallError::Denied`] without `CAP_SYS_ADMIN`, and [`FirewallError::Failed`] if
    /// `namespace` is not a network namespace: both final.
    pub fn in_namespace(namespace: OwnedFd) -> Result<Self, FirewallError> {
        let namespace = Arc::new(namespace);
        let start = || {
            let namespace = Arc::clone(&namespace);
            Tools::start_after(move || Ok(setns(namespace, CloneFlags::CLONE_NEWNET)?))
        };
        Ok(Self::with(start()?, start()?))
    }

    /// Sets the variant.
    #[must_use]
    pub fn variant(self, variant: Variant) -> Self {
        Self { variant, ..self }
    }

    /// Sets the directory of the programs, instead of `PATH`.
    #[must_use]
    pub fn programs_in(self, directory: impl Into<PathBuf>) -> Self {
        Self { directory: directory.into(), ..self }
    }

    /// Checks that the programs that are needed for rules in these families are on `PATH`. Runs nothing.
    ///
    /// # Errors
    /// [`FirewallError::Unsupported`] names the first missing program. Final until it is installed.
    pub fn check_programs(families: impl IntoIterator<Item = Family>) -> Result<(), FirewallError> {
        let of = |family| ["-save", "-restore"].map(|suffix| format!("{}{suffix}", base_name(family)));
        let names = families.into_iter().flat_map(of);
        // The version is that of the IPv4 program.
        [base_name(Family::V4).to_owned()].into_iter().chain(names).try_for_each(|name| program(name.into()).check())
    }

    fn with(v4: Tools, v6: Tools) -> Self {
        Self {
            v4,
            v6,
            variant: Variant::default(),
            directory: PathBuf::new(),
            version: OnceCell::new(),
            writing: Mutex::default(),
        }
    }

    async fn chains(&self, rules: &Rules) -> Result<[(Family, Chains); 2], FirewallError> {
        if rules.guard.is_some() {
            let what = "a peer set for the VXLAN port by way of iptables".to_owned();
            return Err(FirewallError::Unsupported { what, hint: "use nftables, or none".to_owned() });
        }
        let most = match rules.masquerade.map(|masquerade| masquerade.ports) {
            Some(SourcePorts::FullyRandom) if !rules.pods.is_empty() => self.most().await?,
            _ => SourcePorts::Kernel,
        };
        let wanted = chains(rules, most);
        let of = |family| wanted.get(family).cloned().unwrap_or_else(|| none(&rules.overlay));
        Ok(Family::BOTH.map(|family| (family, of(family))))
    }

    async fn most(&self) -> Result<SourcePorts, FirewallError> {
        Ok(if self.version().await? >= MODERN { SourcePorts::FullyRandom } else { SourcePorts::Kernel })
    }

    async fn version(&self) -> Result<[u32; 3], FirewallError> {
        let ask = || async {
            // Beside the calls for IPv4, of which there are more.
            let name = self.name(Family::V4);
            let said = self.run(&self.v6, name, &["--version"], String::new(), "asking for the version").await?;
            let unreadable = || FirewallError::Failed {
                doing: "iptables: asking for the version".to_owned(),
                reason: format!("it said {:?}", said.chars().take(64).collect::<String>()),
            };
            wire::version(&said).ok_or_else(unreadable)
        };
        self.version.get_or_try_init(ask).await.copied()
    }

    /// Reads the present state of these chains. A family that the host does not support is empty if nothing is wanted
    /// in it.
    async fn seen(&self, family: Family, chains: &Chains) -> Result<[Seen; 2], FirewallError> {
        let wanted = chains.iter().any(|chain| chain.rules.is_some());
        let mut seen = [Seen::default(), Seen::default()];
        for (seen, chain) in seen.iter_mut().zip(chains) {
            match self.run_for(family, "-save", &["-t", chain.table], String::new(), "reading the rules").await {
                Ok(saved) => *seen = wire::find(&saved, &chain.name),
                Err(FirewallError::Unsupported { .. }) if !wanted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(seen)
    }

    async fn put(&self, family: Family, chains: &Chains) -> Result<(), FirewallError> {
        let mut attempt = 1;
        loop {
            let (seen, version) = tokio::join!(self.seen(family, chains), self.version());
            let seen = seen?;
            let commands = chains.iter().zip(&seen).map(|(chain, seen)| (chain.table, wire::commands(chain, seen)));
            let input = wire::restore(&commands.collect::<BTreeMap<_, _>>());
            if input.is_empty() {
                return Ok(());
            }
            let wait: &[&str] = if version? >= MODERN { &["-w", "5"] } else { &[] };
            let args = [&["--noflush"], wait].concat();
            let _turn = self.writing.lock().await;
            match self.run_for(family, "-restore", &args, input, "writing the overlay's rules").await {
                Ok(_) => return Ok(()),
                // Another program may have deleted a jump before this one could.
                Err(FirewallError::Refused { .. }) if attempt < ATTEMPTS => attempt += 1,
                Err(error) => return Err(error),
            }
        }
    }

    /// Writes both families, even if one fails.
    async fn put_all(&self, [one, other]: &[(Family, Chains); 2]) -> Result<(), FirewallError> {
        let (one, other) = tokio::join!(self.put(one.0, &one.1), self.put(other.0, &other.1));
        one.and(other)
    }

    /// Runs a program of this family, after those that were requested before.
    async fn run_for(
        &self,
        family: Family,
        suffix: &str,
        args: &[&str],
        input: String,
        doing: &str,
    ) -> Result<String, FirewallError> {
        let tools = match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        };
        self.run(tools, format!("{}{suffix}", self.name(family)), args, input, doing).await
    }

    async fn run(
        &self,
        tools: &Tools,
        name: String,
        args: &[&str],
        input: String,
        doing: &str,
    ) -> Result<String, FirewallError> {
        let doing = format!("{name}: {doing}");
        let call = Call {
            program: program(self.directory.join(name)),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            input,
            doing: doing.clone(),
            within: WITHIN,
        };
        let answer = tools.run(call).await?;
        if answer.status.success() { Ok(answer.stdout) } else { Err(answer.refused(doing)) }
    }

    fn name(&self, family: Family) -> String {
        let base = base_name(family);
        match self.variant {
            Variant::Default => base.to_owned(),
            Variant::Nft => format!("{base}-nft"),
            Variant::Legacy => format!("{base}-legacy"),
        }
    }
}

fn base_name(family: Family) -> &'static str {
    match family {
        Family::V4 => "iptables",
        Family::V6 => "ip6tables",
    }
}

fn program(path: PathBuf) -> Program {
    let hint = "install iptables (apt install iptables), or use nftables (\"EnableNFTables\": true in the network \
                configuration)";
    Program { path, hint: hint.to_owned() }
}

#[async_trait]
impl Firewall for Iptables {
    async fn apply(&self, rules: &Rules) -> Result<(), FirewallError> {
        self.put_all(&self.chains(rules).await?).await
    }

    async fn check(&self, rules: &Rules) -> Result<Vec<Drift>, FirewallError> {
        let [one, other] = &self.chains(rules).await?;
        let (seen_one, seen_other) = tokio::join!(self.seen(one.0, &one.1), self.seen(other.0, &other.1));
        let mut drift = Vec::new();
        for ((family, chains), seen) in [(one, seen_one?), (other, seen_other?)] {
            let tool = self.name(*family);
            drift.extend(chains.iter().zip(&seen).flat_map(|(chain, seen)| wire::compare(&tool, chain, seen)));
        }
        Ok(drift)
    }

    /// Returns an empty set: there is no guard with iptables.
    async fn let_in(&self, _overlay: &OverlayName) -> Result<BTreeSet<IpAddr>, FirewallError> {
        Ok(BTreeSet::new())
    }

    async fn remove(&self, overlay: &OverlayName) -> Result<(), FirewallError> {
        self.version().await?;
        self.put_all(&Family::BOTH.map(|family| (family, none(overlay)))).await
    }
}
