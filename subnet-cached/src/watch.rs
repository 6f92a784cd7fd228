//! The watch: the inner store's, taken in as it passes, and begun with the last snapshot where that is away.

use std::sync::Arc;

use flannel_core::lease::LeaseEvent;
use flannel_core::subnet::SubnetError;
use futures_util::StreamExt;
use futures_util::future::pending;
use futures_util::stream::{BoxStream, unfold};
use tokio::task::JoinHandle;

use crate::is_away;
use crate::keeper::Keeper;

type Item = Result<LeaseEvent, SubnetError>;

/// `inner` through `keeper`.
pub(crate) fn watch(inner: BoxStream<'static, Item>, keeper: Arc<Keeper>) -> BoxStream<'static, Item> {
    let watch = Watch { number: keeper.open(), inner, keeper, begun: false, trouble: None, write: None };
    unfold(watch, |mut watch| async move { watch.next().await.map(|item| (item, watch)) }).boxed()
}

struct Watch {
    /// What the keeper knows it by.
    number: u64,
    inner: BoxStream<'static, Item>,
    keeper: Arc<Keeper>,
    /// Whether a first `Reset` was given.
    begun: bool,
    /// Follows the snapshot that stands in.
    trouble: Option<SubnetError>,
    /// The write under way. Dropped midway it goes on to its end.
    write: Option<JoinHandle<()>>,
}

impl Watch {
    async fn next(&mut self) -> Option<Item> {
        if let Some(trouble) = self.trouble.take() {
            return Some(Err(trouble));
        }
        let keeper = Arc::clone(&self.keeper);
        loop {
            // Before the look at what is due: a change between the two must not be missed.
            let changed = keeper.changes();
            let due = keeper.write_due().filter(|_| self.write.is_none());
            let timer = async {
                match due {
                    Some(due) => keeper.clock().sleep_until(due).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                biased;
                // Keeps nobody waiting: a write takes place elsewhere, and both are rare.
                () = finished(&mut self.write) => {}
                () = timer => {
                    let keeper = Arc::clone(&keeper);
                    // The keeper tells of a failure, and tries again.
                    self.write = Some(tokio::task::spawn_blocking(move || drop(keeper.write())));
                }
                item = self.inner.next() => return Some(self.pass(item?).await),
                () = changed => {}
            }
        }
    }

    /// What becomes of an item of the inner store.
    async fn pass(&mut self, item: Item) -> Item {
        if item.is_err() {
            self.keeper.unheard(self.number);
        }
        match item {
            Ok(event) => {
                self.begun = true;
                self.keeper.heard(self.number);
                if self.keeper.records(self.number, || matches!(event, LeaseEvent::Reset(_))) {
                    self.keeper.learn(|known| known.event(&event));
                }
                Ok(event)
            }
            Err(error) if !self.begun && is_away(&error) => {
                self.keeper.recall().await;
                let Some(records) = self.keeper.known(|known| known.snapshot()) else { return Err(error) };
                self.keeper.standing_in(&error);
                self.begun = true;
                self.trouble = Some(error);
                Ok(LeaseEvent::Reset(records))
            }
            Err(error) => Err(error),
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.keeper.close(self.number);
    }
}

/// The end of what is under way in `slot`, which is then empty.
async fn finished(slot: &mut Option<JoinHandle<()>>) {
    match slot {
        Some(write) => {
            // A write that panicked has changed nothing.
            let _ = write.await;
            *slot = None;
        }
        None => pending().await,
    }
}
