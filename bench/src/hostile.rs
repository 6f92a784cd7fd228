//! What hostile records cost: beside good ones, and alone.

use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bench::Error;
use bench::bed::in_bed;
use bench::peers::{Backend, config, peer};
use bench::report::{median, row};
use flannel_backend_vxlan::Vxlan;
use flannel_core::admit::{Admission, HostView, Rules};
use flannel_core::config::{Allocation, NetworkConfig};
use flannel_core::lease::{Json, Lease, LeaseKey, Record, Scalar};
use flannel_core::net::{Dual, MacAddr, Prefix};
use flannel_core::overlay::Teardown;
use flannel_core::testing::MemorySubnets;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;

use crate::node::{self, store};

/// Good records, and hostile ones beside them.
const BESIDE: u32 = 10_000;
/// Records that share one subnet or one MAC address.
const SHARING: u32 = 60_000;

type Kind = fn(u32) -> Lease;

/// Record `n` of those that want one subnet.
fn same_subnet(n: u32) -> Lease {
    hostile(n, "subnet", Prefix::masked(Ipv4Addr::new(10, 50, 0, 0).into(), 24), n)
}

/// Record `n` of those that say to answer to one MAC address.
fn same_mac(n: u32) -> Lease {
    let addr = u32::from(Ipv4Addr::new(10, 50, 0, 0)) + (n << 2);
    hostile(n, "mac", Prefix::masked(IpAddr::V4(addr.into()), 30), 0)
}

/// Record `n` of those that are around the subnets of many.
fn wide(n: u32) -> Lease {
    let len = 12 + (n % 8) as u8;
    hostile(
        n,
        "wide",
        Prefix::masked(Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + ((n % 1024) << 12)).into(), len),
        n,
    )
}

/// One of all kinds, and such as cannot be read.
fn mixed(n: u32) -> Lease {
    match n % 4 {
        0 => same_subnet(n),
        1 => same_mac(n),
        2 => wide(n),
        _ => {
            let mut lease = same_subnet(n);
            lease.attrs.backend_type = "udp".into();
            lease
        }
    }
}

fn hostile(n: u32, kind: &str, subnet: Result<Prefix, impl std::error::Error>, mac: u32) -> Lease {
    let [.., a, b, c] = mac.to_be_bytes();
    let mac = MacAddr([0x02, 0xff, 0, a, b, c]).to_string();
    let mut lease = peer(1);
    lease.key = LeaseKey::new(&format!("zz-{kind}-{n}"));
    lease.subnets = Dual { v4: subnet.ok(), v6: None };
    lease.attrs.public_ip.v4 = Some(Ipv4Addr::new(203, 0, 113, 77).into());
    let data = Json::object(&[("VNI", Scalar::Number(1)), ("VtepMAC", Scalar::Text(&mac))]);
    lease.attrs.backend_data.v4 = Some(data);
    lease
}

pub(crate) fn all(runs: u32) -> Result<(), Error> {
    beside(runs)?;
    for (name, kind) in [("admit_hostile_subnet", same_subnet as Kind), ("admit_hostile_mac", same_mac)] {
        let mut cpu = Vec::new();
        for _ in 0..runs {
            let store = store(1)?;
            store.insert((0..SHARING).map(kind));
            cpu.push(start(store)?.1.as_secs_f64());
        }
        row(name, SHARING, median(cpu), "s", None);
        let mut admission = admission(SHARING, kind)?;
        let mut took = Vec::new();
        for n in 0..runs {
            let addr = IpAddr::V4(Ipv4Addr::from(u32::from(Ipv4Addr::new(198, 51, 100, 0)) + n));
            let mut host = HostView::default();
            host.addresses.insert(addr);
            let started = Instant::now();
            admission.set_host(host);
            // What a status shows of it.
            let shown = admission.quarantined().take(flannel_core::overlay::Status::MAX_QUARANTINED).count();
            took.push(started.elapsed().as_secs_f64() * 1e3);
            if shown == 0 {
                return Err("hostile records were taken for peers".into());
            }
        }
        row(&format!("{name}_address"), SHARING, median(took), "ms", None);
    }
    for count in [1_000, 10_000, 100_000] {
        let mut took = Vec::new();
        for _ in 0..runs {
            let started = Instant::now();
            admission(count, mixed)?;
            took.push(started.elapsed().as_secs_f64() * 1e6 / f64::from(count));
        }
        row("admit_hostile_each", count, median(took), "us", None);
    }
    Ok(())
}

/// A start with as many hostile records as good ones; the floor is the same start without them.
fn beside(runs: u32) -> Result<(), Error> {
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..runs {
        without.push(start(store(BESIDE)?)?.0.as_secs_f64());
        let both = store(BESIDE)?;
        both.insert((0..BESIDE).map(mixed));
        with.push(start(both)?.0.as_secs_f64());
    }
    row("admit_hostile", BESIDE, median(with), "s", Some(median(without)));
    Ok(())
}

/// A start of an agent on this store: how long it took, and the processor time of the whole process.
fn start(store: MemorySubnets) -> Result<(Duration, Duration), Error> {
    in_bed(|| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(async {
            let before = cpu()?;
            let (node, took) = node::start(&store).await?;
            let used = cpu()?.saturating_sub(before);
            node::stop(node, Teardown::Keep).await?;
            Ok((took, used))
        })
    })
}

fn cpu() -> Result<Duration, Error> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(Duration::from_micros(micros.unsigned_abs()))
}

/// What an agent holds of so many records of this kind.
fn admission(count: u32, kind: Kind) -> Result<Admission, Error> {
    let config = NetworkConfig::parse(config(Backend::Vxlan).as_bytes(), Allocation::Pool)?;
    let backend: Arc<dyn flannel_core::backend::Backend> = Arc::new(Vxlan::new(&config)?);
    let mut admission = Admission::new(Rules::new(&config, backend), HostView::default());
    let record = |n: u32| {
        let lease = kind(n);
        Record { key: lease.key.clone(), created: n.into(), lease: Ok(Arc::new(lease)) }
    };
    admission.reset((0..count).map(record).collect());
    Ok(admission)
}
