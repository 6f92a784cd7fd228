//! `subnet.env`: when it is written, and what becomes of it.

use std::future::ready;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use flannel_core::backend::Backend;
use flannel_core::kernel::{Device, KernelError, Link, LinkKind, LinkName, Op, OverlayName, Vxlan};
use flannel_core::net::{Prefix, Vni};
use flannel_core::overlay::{EnvFile, Event, Masquerade, OverlayError, Phase, Status, SubnetEnvFile, Teardown};
use flannel_core::subnet::SubnetError;
use flannel_core::testing::{Call, MemorySubnets, StoreDouble};
use tokio::sync::Notify;
use tokio::time::Instant;

use crate::altered::Altered;
use crate::log::Log;
use crate::node::{Agent, Node, eventually, parse, pass, subnet};
use crate::tunnel::Tunnel;

pub(crate) fn env_file(dir: &tempfile::TempDir) -> SubnetEnvFile {
    SubnetEnvFile::new(dir.path().join("run/subnet.env"), Masquerade::Agent)
}

/// Runs a test as on a host whose disk hangs: the only thread for blocking work is busy until the sender is dropped.
fn on_a_hung_disk(test: impl AsyncFnOnce(mpsc::Sender<()>)) {
    let (disk, hangs) = mpsc::channel();
    on_one_thread(async {
        tokio::task::spawn_blocking(move || hangs.recv());
        test(disk).await;
    });
}

/// Runs a test with one thread for blocking work.
fn on_one_thread(test: impl Future<Output = ()>) {
    let mut runtime = tokio::runtime::Builder::new_current_thread();
    let runtime = runtime.enable_all().start_paused(true).max_blocking_threads(1).build().unwrap();
    runtime.block_on(test);
}

/// Returns the output of `work`. Once the disk hangs, time passes although a thread is busy. Before that, no time
/// passes while the disk is at work, however long the machine takes for it.
async fn while_time_passes<T>(hangs: impl Future<Output = ()>, work: impl Future<Output = T>) -> T {
    let mut work = std::pin::pin!(work);
    tokio::select! {
        biased;
        output = &mut work => return output,
        () = hangs => {}
    }
    for _ in 0..1000 {
        tokio::select! {
            biased;
            output = &mut work => return output,
            () = tokio::task::yield_now() => tokio::time::advance(Duration::from_millis(100)).await,
        }
    }
    panic!("no end after 100 s");
}

#[test]
fn a_start_is_stopped_while_the_disk_hangs() {
    on_a_hung_disk(async |disk| {
        let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
        let builder = node.builder().subnet_env(env_file(&dir));
        let overlay = builder.build(Arc::new(node.store.clone()), Arc::new(node.kernel.clone())).unwrap();
        let stop = async {
            pass(20.0).await;
            Teardown::Remove
        };
        while_time_passes(ready(()), overlay.run(stop)).await.unwrap();
        assert_eq!(node.kernel.writes(), 0);
        drop(disk);
    });
}

/// A store after whose first lease the disk hangs, and another network is configured.
struct ThenAllChanges {
    store: MemorySubnets,
    hangs: Mutex<Option<mpsc::Receiver<()>>>,
    /// Told when the disk hangs.
    begun: Notify,
}

impl StoreDouble for ThenAllChanges {
    type Store = MemorySubnets;

    fn store(&self) -> &MemorySubnets {
        &self.store
    }

    async fn call<A: Send>(
        &self,
        call: Call<'_>,
        answer: impl Future<Output = Result<A, SubnetError>> + Send,
    ) -> Result<A, SubnetError> {
        let answer = answer.await;
        if matches!(call, Call::Acquire(_))
            && let Some(hangs) = self.hangs.lock().unwrap().take()
        {
            tokio::task::spawn_blocking(move || hangs.recv());
            self.begun.notify_one();
            self.store.set_config(parse(r#"{"Network":"10.43.0.0/16","Backend":{"Type":"tunnel"}}"#));
        }
        answer
    }
}

#[test]
fn a_start_that_is_stopped_while_the_disk_hangs_after_its_lease_gives_the_lease_back() {
    let (disk, hangs) = mpsc::channel();
    on_one_thread(async {
        let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
        let (store, hangs) = (node.store.clone(), Mutex::new(Some(hangs)));
        let store = Arc::new(ThenAllChanges { store, hangs, begun: Notify::new() });
        let builder = node.builder().subnet_env(env_file(&dir));
        let overlay = builder.build(Arc::clone(&store) as _, Arc::new(node.kernel.clone())).unwrap();
        let stop = async {
            eventually("there is a lease", || node.record().is_some()).await;
            Teardown::Remove
        };
        let ended = while_time_passes(store.begun.notified(), overlay.run(stop)).await;
        assert!(matches!(ended, Err(OverlayError::SubnetEnv { .. })), "{ended:?}");
        assert_eq!(node.record(), None);
        drop(disk);
    });
}

#[test]
fn a_removal_that_gave_up_on_a_hung_disk_deletes_no_later_file() {
    on_a_hung_disk(async |disk| {
        let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
        let file = SubnetEnvFile::new(dir.path().join("subnet.env"), Masquerade::Agent);
        std::fs::write(&file.path, "FLANNEL_NETWORK=10.42.0.0/16\n").unwrap();
        let builder = node.builder().subnet_env(file.clone());
        let overlay = builder.build(Arc::new(node.store.clone()), Arc::new(node.kernel.clone())).unwrap();
        let mut device = Link::new(LinkName::new("old0").unwrap(), LinkKind::Vxlan(Vxlan::new(Vni::ONE)), 1450);
        device.group = OverlayName::default().mark();
        node.kernel.add_link(device).unwrap();
        let removed = while_time_passes(ready(()), overlay.remove()).await;
        assert!(matches!(removed, Err(OverlayError::SubnetEnv { .. })), "{removed:?}");
        assert_eq!(node.kernel.link_index("old0"), None, "what the mark shows is removed");
        drop(disk);
        // What waited for the thread has run after this.
        tokio::task::spawn_blocking(|| {}).await.unwrap();
        assert!(file.path.exists(), "another agent may have written it");
    });
}

#[tokio::test(start_paused = true)]
async fn subnet_env_is_written_when_the_devices_are_there_and_again_when_the_lease_changes() {
    let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
    let file = env_file(&dir);
    node.kernel.fail_next_observe(KernelError::Lost { doing: "looking".to_owned(), reason: "overrun".to_owned() });
    let mut agent = node.run_as(node.builder().subnet_env(file.clone()));
    agent.until(|status| status.last_error.is_some()).await;
    assert!(!file.path.exists());
    let first = agent.ready().await.lease.unwrap().subnets.v4.unwrap();
    let text = |subnet: Prefix| {
        let address = subnet.addr().to_string();
        let first = address.strip_suffix(".0").unwrap();
        format!("FLANNEL_NETWORK=10.42.0.0/16\nFLANNEL_SUBNET={first}.1/24\nFLANNEL_MTU=1430\nFLANNEL_IPMASQ=true\n")
    };
    let path = file.path.clone();
    let says = |wanted: String| {
        let path = path.clone();
        move || std::fs::read_to_string(&path).is_ok_and(|found| found == wanted)
    };
    let other = (1..).map(subnet).find(|subnet| *subnet != first).unwrap();
    let (before, after) = (text(first), text(other));
    eventually("subnet.env says the first lease", says(before)).await;
    let mut moved = node.record().unwrap();
    moved.subnets.v4 = Some(other);
    let log = Log::listen();
    node.store.insert([moved]);
    agent.event(|event| matches!(event, Event::LeaseAcquired(lease) if lease.subnets.v4 == Some(other))).await;
    eventually("subnet.env says the second lease", says(after)).await;
    pass(1.0).await;
    let lines = log.take();
    let warned = |line: &String| line.starts_with("WARN") && line.contains(&format!("from={first}"));
    assert!(lines.iter().any(warned), "pods have addresses of the first: {lines:?}");
}

#[tokio::test(start_paused = true)]
async fn a_subnet_env_that_somebody_changes_or_deletes_is_written_again() {
    let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
    let file = env_file(&dir);
    let agent = node.run_as(node.builder().subnet_env(file.clone()));
    agent.until(|status| status.subnet_env == EnvFile::Settled && status.phase == Phase::Ready).await;
    let read = || std::fs::read_to_string(&file.path).ok();
    let before = read().unwrap();
    let at_rest = std::fs::metadata(&file.path).unwrap().modified().unwrap();
    pass(200.0).await;
    assert_eq!(std::fs::metadata(&file.path).unwrap().modified().unwrap(), at_rest, "what is right is not written");
    for harm in ["FLANNEL_NETWORK=10.9.0.0/16\n", ""] {
        let begun = Instant::now();
        match harm {
            "" => std::fs::remove_file(&file.path).unwrap(),
            text => std::fs::write(&file.path, text).unwrap(),
        }
        eventually("it is as before", || read().as_ref() == Some(&before)).await;
        assert!(begun.elapsed() < Duration::from_secs(60), "{:?}", begun.elapsed());
    }
    agent.cancelled().await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_subnet_env_that_cannot_be_written_is_tried_again_without_spinning() {
    let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
    let file = env_file(&dir);
    // A file where the directory has to be.
    std::fs::write(dir.path().join("run"), "").unwrap();
    let agent = node.run_as(node.builder().subnet_env(file.clone()));
    let failed = |status: &Status| matches!(&status.subnet_env, EnvFile::Pending { error: Some(error) } if error.contains("run"));
    agent.until(failed).await;
    // What goes well meanwhile does not hide it.
    let status = agent.audited().await;
    assert!(failed(&status), "{:?}", status.subnet_env);
    // Meanwhile the device cannot be made.
    node.kernel.refuse_if(|op| matches!(op, Op::CreateLink { .. }).then_some(12));
    node.kernel.delete_link("tun4.1").unwrap();
    agent.until(|status| status.phase == Phase::LeaseHeld).await;
    tokio::time::timeout(Duration::from_secs(60), pass(30.0)).await.unwrap();
    node.kernel.obey();
    std::fs::remove_file(dir.path().join("run")).unwrap();
    agent.ready().await;
    eventually("subnet.env is there", || file.path.exists()).await;
}

#[tokio::test(start_paused = true)]
async fn a_device_that_could_not_be_made_anew_is_not_there() {
    let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
    let file = env_file(&dir);
    let agent = node.run_ready().await;
    agent.killed().await;
    // Another VNI cannot be set on a device: it is deleted and created.
    fn renumbered(kind: LinkKind) -> LinkKind {
        let LinkKind::Vxlan(mut vxlan) = kind else { panic!("{kind:?}") };
        vxlan.vni = Vni::new(7).unwrap();
        LinkKind::Vxlan(vxlan)
    }
    let backend = Altered {
        devices: |tunnel: &Tunnel, local| {
            let devices = tunnel.devices(local).into_iter();
            devices.map(|device| Device::new(device.name, renumbered(device.kind))).collect()
        },
        base: |tunnel: &Tunnel, local| {
            let mut base = tunnel.base(local);
            base.links.values_mut().for_each(|link| link.kind = renumbered(link.kind.clone()));
            base
        },
        ..Altered::of(Tunnel)
    };
    let is_not_there = async |agent: Agent| {
        pass(30.0).await;
        assert_eq!((agent.status().phase, file.path.exists()), (Phase::LeaseHeld, false));
        assert_eq!(node.kernel.link_index("tun4.1"), None);
        agent.killed().await;
    };
    // Contact is lost after the deletion, and not found again.
    node.kernel.lose_contact_after(1);
    let agent = node.run_as(node.builder_with(backend).subnet_env(file.clone()));
    agent.until(|status| status.last_error.is_some()).await;
    let lost = || KernelError::Lost { doing: "looking".to_owned(), reason: "overrun".to_owned() };
    (0..100).for_each(|_| node.kernel.fail_next_observe(lost()));
    is_not_there(agent).await;
    node.kernel.obey();
    // The device is made, and refused the next time.
    let agent = node.run_ready().await;
    agent.killed().await;
    node.kernel.refuse_if(|op| matches!(op, Op::CreateLink { .. }).then_some(12));
    let agent = node.run_as(node.builder_with(backend).subnet_env(file.clone()));
    agent.until(|status| status.failed_writes > 0).await;
    is_not_there(agent).await;
}

#[tokio::test(start_paused = true)]
async fn a_subnet_env_that_cannot_be_removed_is_an_error_and_the_lease_is_given_back_all_the_same() {
    let (node, dir) = (Node::alone(), tempfile::tempdir().unwrap());
    let agent = node.run_ready().await;
    agent.cancelled().await.unwrap();
    let file = env_file(&dir);
    // A directory where the file has to be.
    std::fs::create_dir_all(&file.path).unwrap();
    let builder = node.builder().subnet_env(file.clone());
    let overlay = builder.build(Arc::new(node.store.clone()), Arc::new(node.kernel.clone())).unwrap();
    let outcome = overlay.remove().await;
    assert!(matches!(&outcome, Err(OverlayError::SubnetEnv { path, .. }) if *path == file.path), "{outcome:?}");
    assert_eq!(node.record(), None);
    let builder = node.builder().subnet_env(file);
    let agent = node.run_as(builder).once_ready().await;
    assert!(matches!(agent.removed().await, Err(OverlayError::SubnetEnv { .. })));
    assert_eq!(node.record(), None);
}
