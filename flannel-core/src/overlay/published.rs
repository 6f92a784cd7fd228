//! The published status, which readers receive as a shared value.

use std::sync::Arc;

use tokio::sync::watch;

use crate::agent::Status;

/// The agent's side of the channel. A reader receives an [`Arc`] and holds no lock, so that it never blocks the agent.
#[derive(Debug, Clone)]
pub(crate) struct Published(watch::Sender<Arc<Status>>);

impl Published {
    pub(crate) fn new(status: Status) -> Self {
        Self(watch::Sender::new(Arc::new(status)))
    }

    /// Returns the status, for the agent itself: no change may be made before the guard is dropped.
    pub(crate) fn borrow(&self) -> watch::Ref<'_, Arc<Status>> {
        self.0.borrow()
    }

    /// Changes the status and wakes waiting readers.
    pub(crate) fn send_modify(&self, modify: impl FnOnce(&mut Status)) {
        self.0.send_modify(|status| modify(Arc::make_mut(status)));
    }

    /// Changes the status and wakes waiting readers if `is_due` returns true. Returns the result of `is_due`.
    pub(crate) fn send_if(&self, is_due: impl FnOnce(&Status) -> bool, modify: impl FnOnce(&mut Status)) -> bool {
        self.0.send_if_modified(|status| {
            let due = is_due(status);
            if due {
                modify(Arc::make_mut(status));
            }
            due
        })
    }

    /// Publishes this status.
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
        // Without a change the status is not copied, and no reader is woken.
        let (mut waiting, kept) = (published.subscribe(), Arc::clone(&published.borrow()));
        waiting.mark_unchanged();
        assert!(!published.send_if(|status| status.audits != 4, |status| status.audits = 4));
        assert_eq!((place(&published), waiting.has_changed().ok()), (Arc::as_ptr(&kept), Some(false)));
        assert!(published.send_if(|status| status.audits != 5, |status| status.audits = 5));
        assert_eq!((published.borrow().audits, kept.audits, waiting.has_changed().ok()), (5, 4, Some(true)));
        assert_ne!(second, first);
    }
}
