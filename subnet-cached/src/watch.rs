//! The watch: passes on and records the inner store's events, and begins with the last snapshot if the inner store is
//! unavailable.

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

/// Returns the watch `inner`, recorded by `keeper`.
pub(crate) fn watch(inner: BoxStream<'static, Item>, keeper: Arc<Keeper>) -> BoxStream<'static, Item> {
    let watch = Watch { number: keeper.open(), inner, keeper, begun: false, trouble: None, write: None };
    unfold(watch, |mut watch| async move { watch.next().await.map(|item| (item, watch)) }).boxed()
}

struct Watch {
    /// The number that identifies this watch to the keeper.
    number: u64,
    inner: BoxStream<'static, Item>,
    keeper: Arc<Keeper>,
    /// Whether a first `Reset` was returned.
    begun: bool,
    /// The error to return after the cached snapshot.
    trouble: Option<SubnetError>,
    /// The write in progress. If dropped, it continues to its end.
    write: Option<JoinHandle<()>>,
}

impl Watch {
    async fn next(&mut self) -> Option<Item> {
        if let Some(trouble) = self.trouble.take() {
            return Some(Err(trouble));
        }
        let keeper = Arc::clone(&self.keeper);
        loop {
            // Registered before the due time is read: a change between the two must not be missed.
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
                // Does not delay events: a write runs on another thread, and both are rare.
                () = finished(&mut self.write) => {}
                () = timer => {
                    let keeper = Arc::clone(&keeper);
                    // The keeper logs a failure and retries.
                    self.write = Some(tokio::task::spawn_blocking(move || drop(keeper.write())));
                }
                item = self.inner.next() => return Some(self.pass(item?).await),
                () = changed => {}
            }
        }
    }

    /// Returns the item to pass on for an item of the inner store.
    async fn pass(&mut self, item: Item) -> Item {
        if item.is_err() {
            self.keeper.unheard(self.number);
        }
        match item {
            // It may come from a file of this host: it does not show that the store answers.
            Ok(LeaseEvent::ConfigChanged) => Ok(LeaseEvent::ConfigChanged),
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

/// Waits for the task in `slot`, and then empties it.
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
