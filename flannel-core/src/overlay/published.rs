//! The status as it is published: a value to whoever reads it.

use std::sync::Arc;

use tokio::sync::watch;

use crate::agent::Status;

/// The agent's end. A reader takes an [`Arc`] and no lock, so whatever it does with it keeps nobody waiting.
#[derive(Debug, Clone)]
pub(crate) struct Published(watch::Sender<Arc<Status>>);

impl Published {
    pub(crate) fn new(status: Status) -> Self {
        Self(watch::Sender::new(Arc::new(status)))
    }

    /// The status, for the agent itself: no change may be made before the guard is dropped.
    pub(crate) fn borrow(&self) -> watch::Ref<'_, Arc<Status>> {
        self.0.borrow()
    }

    /// Changes it and wakes who waits for a change.
    pub(crate) fn send_modify(&self, modify: impl FnOnce(&mut Status)) {
        self.0.send_modify(|status| modify(Arc::make_mut(status)));
    }

    /// Changes it and wakes who waits, if `is_due` says that there is something to change. Returns what it said.
    pub(crate) fn send_if(&self, is_due: impl FnOnce(&Status) -> bool, modify: impl FnOnce(&mut Status)) -> bool {
        self.0.send_if_modified(|status| {
            let due = is_due(status);
            if due {
                modify(Arc::make_mut(status));
            }
            due
        })
    }

    /// Publishes this one.
    pub(crate) fn set(&self, status: Status) {
        self.0.send_replace(Arc::new(status));
    }

    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Status>> {
        self.0.subscribe()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_copies_the_status_only_where_a_reader_has_kept_it() {
        let published = Published::new(Status::default());
        let reader = published.subscribe();
        let place = |published: &Published| Arc::as_ptr(&published.borrow());
        let first = place(&published);
        published.send_modify(|status| status.audits = 1);
        drop(Arc::clone(&reader.borrow()));
        published.send_modify(|status| status.audits = 2);
        assert_eq!(place(&published), first);
        let kept = Arc::clone(&reader.borrow());
        published.send_modify(|status| status.audits = 3);
        let second = place(&published);
        published.send_modify(|status| status.audits = 4);
        assert_eq!((place(&published), kept.audits), (second, 2));
        // What changes nothing copies nothing, and wakes nobody.
        let (mut waiting, kept) = (published.subscribe(), Arc::clone(&published.borrow()));
        waiting.mark_unchanged();
        assert!(!published.send_if(|status| status.audits != 4, |status| status.audits = 4));
        assert_eq!((place(&published), waiting.has_changed().ok()), (Arc::as_ptr(&kept), Some(false)));
        assert!(published.send_if(|status| status.audits != 5, |status| status.audits = 5));
        assert_eq!((published.borrow().audits, kept.audits, waiting.has_changed().ok()), (5, 4, Some(true)));
        assert_ne!(second, first);
    }
}
