//! Configuration in a file: its changes as events of a watch.

use std::fs::{self, Metadata};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use futures_util::stream::{self, BoxStream, Stream, StreamExt};
use tokio::time::sleep;

use crate::lease::LeaseEvent;
use crate::subnet::SubnetError;

/// The interval at which the file is examined.
const INTERVAL: Duration = Duration::from_secs(2);

/// Adds [`LeaseEvent::ConfigChanged`] to a watch of a store that has its network configuration in a file, each time that
/// file was written, replaced, created or deleted. Symbolic links are followed. Its metadata is compared when the watch
/// is first polled, and then every 2 s.
///
/// # Panics
/// The watch panics outside of a tokio runtime.
pub fn with_config_file(
    watch: BoxStream<'static, Result<LeaseEvent, SubnetError>>,
    path: PathBuf,
) -> BoxStream<'static, Result<LeaseEvent, SubnetError>> {
    stream::select(watch, changes(path, INTERVAL).map(|()| Ok(LeaseEvent::ConfigChanged))).boxed()
}

/// Returns a stream with an item for each change. It never ends.
fn changes(path: PathBuf, every: Duration) -> impl Stream<Item = ()> + Send + 'static {
    stream::unfold((path, None), move |(path, mut known)| async move {
        loop {
            let seen = look(path.clone()).await;
            if known.as_ref().is_some_and(|known| *known != seen) {
                return Some(((), (path, Some(seen))));
            }
            known = Some(seen);
            sleep(every).await;
        }
    })
}

/// What distinguishes the versions of a file; `None` if it cannot be seen.
#[derive(Debug, PartialEq, Eq)]
struct Version {
    #[cfg(unix)]
    place: (u64, u64),
    len: u64,
    modified: Option<SystemTime>,
}

async fn look(path: PathBuf) -> Option<Version> {
    let seen = tokio::task::spawn_blocking(move || version(&path)).await;
    seen.ok().flatten()
}

fn version(path: &Path) -> Option<Version> {
    let found: Metadata = fs::metadata(path).ok()?;
    Some(Version {
        #[cfg(unix)]
        place: {
            use std::os::unix::fs::MetadataExt;
            (found.dev(), found.ino())
        },
        len: found.len(),
        modified: found.modified().ok(),
    })
}

#[cfg(test)]
mod tests {
    use std::pin::pin;

    use super::*;

    #[tokio::test]
    async fn a_file_that_appears_is_written_replaced_by_a_link_or_deleted_has_changed() {
        let dir = tempfile::tempdir().unwrap();
        let (path, other) = (dir.path().join("file"), dir.path().join("other"));
        fs::write(&other, "b").unwrap();
        let mut changes = pin!(changes(path.clone(), Duration::from_millis(1)));
        // Until the first change is seen, it is unknown whether the stream has looked before a write.
        for len in 1.. {
            fs::write(&path, "a".repeat(len)).unwrap();
            if tokio::time::timeout(Duration::from_millis(10), changes.next()).await.is_ok() {
                break;
            }
            assert!(len < 1000, "no change is seen");
        }
        let steps: [&dyn Fn(); 4] = [
            &|| fs::write(&path, "b".repeat(2000)).unwrap(),
            &|| fs::remove_file(&path).unwrap(),
            &|| std::os::unix::fs::symlink(&other, &path).unwrap(),
            &|| fs::write(&other, "longer").unwrap(),
        ];
        for step in steps {
            step();
            tokio::time::timeout(Duration::from_secs(60), changes.next()).await.unwrap().unwrap();
        }
    }
}
