//! Access to `subnet.env` and the record of former networks beside it.
//!
//! A disk may hang, and work that has begun on a thread goes on after its future was dropped. So the work on the files
//! of an overlay is done one at a time, and work of a run or removal that has ended does not begin any more: a later one
//! finds its files as it left them.

use std::io;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use crate::agent::Settings;
use crate::net::{Dual, Prefix};
use crate::overlay::former_networks;
use crate::overlay::removal::in_time;
use crate::overlay::run::Seams;
use crate::overlay::turn::lock;
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
    /// Does work that may block, on a thread of its own, after all work that has begun before. If the future is dropped,
    /// work that has begun is finished nevertheless.
    pub(crate) fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> impl Future<Output = io::Result<T>> + Send + 'static {
        let (HostFiles(files), ended) = (self.files.clone(), Arc::clone(&self.ended));
        let task = tokio::task::spawn_blocking(move || {
            let _alone = lock(&files);
            (!ended.load(Ordering::Acquire)).then(work)
        });
        async move { task.await?.ok_or_else(|| io::Error::other("the run has ended")) }
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
pub(crate) async fn read(seams: &Seams, settings: &Settings) -> Named {
    let Some(file) = &settings.subnet_env else { return Named::default() };
    let path = file.path.clone();
    let access = seams.files.access();
    let read = access.run(move || {
        let env = SubnetEnv::read(&path).ok().flatten();
        Named { subnets: env.map(|env| env.subnets).unwrap_or_default(), networks: former_networks::known(&path) }
    });
    let mut read = pin!(read);
    let named = match in_time(seams, &mut read).await {
        Some(named) => named,
        None => {
            tracing::warn!(
                target: "flannel::subnet_env",
                path = %file.path.display(),
                "subnet.env is not read yet; waiting: check its file system"
            );
            read.await
        }
    };
    named.unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn work_that_hangs_is_waited_for_and_what_an_ended_run_queued_behind_it_never_begins() {
        let files = HostFiles::default();
        let (done, log) = mpsc::channel();
        let (begun, has_begun) = tokio::sync::oneshot::channel();
        let (release, released) = mpsc::channel::<()>();
        let note = |what: &'static str| {
            let done = done.clone();
            move || done.send(what).unwrap()
        };
        let (first, second) = (files.access(), files.access());
        let hang = note("hung");
        drop(first.run(move || {
            begun.send(()).unwrap();
            released.recv().unwrap();
            hang();
        }));
        has_begun.await.unwrap();
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
