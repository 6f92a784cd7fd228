//! Access to `subnet.env` and the record of former networks beside it.
//!
//! A disk may hang, and work that has begun on a thread goes on after its future was dropped. So the work on the files
//! of an [`Overlay`](crate::overlay::Overlay) is done one at a time, and work of a run or removal that has ended does not
//! begin any more: it cannot change the files of a later one.

use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Mutex;
use tokio::task::{JoinSet, spawn_blocking};

use crate::agent::{Settings, Wait};
use crate::net::{Dual, Prefix};
use crate::overlay::former_networks;
use crate::overlay::removal::in_time;
use crate::overlay::run::Seams;
use crate::subnet_env::SubnetEnv;

/// The files of an overlay, over all its runs and removals.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostFiles(Arc<Mutex<()>>);

/// Access for a part of a run or of a removal: work that has not begun when this is dropped never begins.
#[derive(Debug)]
pub(crate) struct Access {
    files: HostFiles,
    ended: Arc<AtomicBool>,
}

impl HostFiles {
    pub(crate) fn access(&self) -> Access {
        Access { files: self.clone(), ended: Arc::default() }
    }
}

impl Access {
    /// Does work that may block, on a thread of its own, after work that waits already. If the future is dropped while the
    /// work waits for its turn, the work never begins. Work that has begun is always finished.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = io::Result<T>> + Send + 'static {
        let (HostFiles(files), ended) = (self.files.clone(), Arc::clone(&self.ended));
        // A task waits for its turn, whether or not the future is polled meanwhile, and without a thread. It ends with
        // the future.
        let mut task = JoinSet::new();
        task.spawn(async move {
            let alone = files.lock_owned().await;
            let work = spawn_blocking(move || {
                let _alone = alone;
                (!ended.load(Ordering::Acquire)).then(work)
            });
            work.await?.ok_or_else(|| io::Error::other("the run has ended"))
        });
        async move { task.join_next().await.transpose()?.unwrap_or_else(|| Err(io::ErrorKind::Interrupted.into())) }
    }
}

impl Drop for Access {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Release);
    }
}

/// What the files name.
#[derive(Debug, Default)]
pub(crate) struct Named {
    /// The subnets in `subnet.env`, which pods on this host still use.
    pub(crate) subnets: Dual<Prefix>,
    /// The networks of former runs of this or another agent, the latest last.
    pub(crate) networks: Vec<Dual<Prefix>>,
}

/// Reads the files. A file that cannot be read names nothing.
fn reading(seams: &Seams, settings: &Settings) -> impl Future<Output = Named> + use<> {
    let path = settings.subnet_env.as_ref().map(|file| file.path.clone());
    let access = seams.files.access();
    async move {
        let Some(path) = path else { return Named::default() };
        let read = access.run(move || {
            let env = SubnetEnv::read(&path).ok().flatten();
            Named { subnets: env.map(|env| env.subnets).unwrap_or_default(), networks: former_networks::known(&path) }
        });
        read.await.unwrap_or_default()
    }
}

/// Reads the files for a removal; `None` if that takes too long.
pub(crate) async fn read_in_time(seams: &Seams, settings: &Settings) -> Option<Named> {
    in_time(seams, reading(seams, settings)).await
}

/// Reads the files for a start, for as long as it takes: they show which lease is this node's.
pub(crate) async fn read(seams: &Seams, settings: &Settings) -> Named {
    let mut read = pin!(reading(seams, settings));
    if let Some(named) = in_time(seams, &mut read).await {
        return named;
    }
    tracing::warn!(target: "flannel::subnet_env", "subnet.env is not read yet; waiting: check its file system");
    let error = "it is not read yet: its file system does not answer".to_owned();
    let shown = Some(format!("subnet.env: {error}"));
    seams.status.send_modify(|status| status.last_error.clone_from(&shown));
    seams.show_wait(Wait::SubnetEnv { error: Some(error) });
    let named = read.await;
    seams.show_wait(Wait::SubnetEnv { error: None });
    seams.status.send_if(|status| status.last_error == shown, |status| status.last_error = None);
    named
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tokio::sync::oneshot;

    use super::*;

    #[tokio::test]
    async fn work_that_hangs_is_waited_for_and_what_an_ended_run_queued_behind_it_never_begins() {
        let files = HostFiles::default();
        let (done, log) = mpsc::channel();
        let (begun, has_begun) = oneshot::channel();
        let (release, released) = mpsc::channel::<()>();
        let note = |what: &'static str| {
            let done = done.clone();
            move || done.send(what).unwrap()
        };
        let (first, second) = (files.access(), files.access());
        let hang = note("hung");
        let hung = first.run(move || {
            begun.send(()).unwrap();
            released.recv().unwrap();
            hang();
        });
        has_begun.await.unwrap();
        drop(hung);
        let queued = first.run(note("queued"));
        drop(first);
        let mut next = Box::pin(second.run(note("next")));
        assert!(tokio::time::timeout(Duration::from_millis(50), &mut next).await.is_err());
        release.send(()).unwrap();
        next.await.unwrap();
        assert!(queued.await.is_err());
        assert_eq!(log.try_iter().collect::<Vec<_>>(), ["hung", "next"]);
    }
}
