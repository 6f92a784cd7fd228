//! Checks of parsers that are not public, for fuzz targets and property tests. Each panics where a property fails.

use flannel_core::lease::{BadRecord, LeaseAttrs, LeaseEvent, LeaseKey, Record};

use crate::keys::{AnnotationPrefix, Keys};
use crate::node::Node;
use crate::nodes::{Change, Nodes};
use crate::split::{Items, Lines, Malformed};

/// The text of a Node: what is kept of it is small, a list shows the same as a watch, and it is news once.
pub fn node(text: &[u8]) {
    let Ok(node) = Node::parse(text) else { return };
    let mut listed = nodes();
    listed.begin_list();
    listed.list(&node);
    let records = shown(Some(listed.end_list().0));
    let mut watched = nodes();
    assert_eq!(shown(watched.change(Change::Put, &node)), records);
    assert_eq!(watched.change(Change::Put, &node), None, "the same again is no news");
    for record in records {
        assert!(record.key.as_str().len() <= LeaseKey::MAX_BYTES);
        match &record.lease {
            Ok(lease) => {
                assert!(!lease.subnets.is_empty());
                assert!(lease.attrs.backend_data.iter().all(|(_, data)| data.as_str().len() <= LeaseAttrs::MAX_BYTES));
            }
            Err(bad) => assert!(bad.reason.len() <= BadRecord::MAX_BYTES),
        }
    }
}

/// What a server sends, in two pieces: where it is cut does not matter.
pub fn stream(bytes: &[u8], cut: usize) {
    let (one, two) = bytes.split_at(cut.min(bytes.len()));
    let items = |pieces: &[&[u8]]| {
        let (mut split, mut found) = (Items::default(), Vec::new());
        for piece in pieces {
            split.feed(piece, |item| {
                found.push(item.to_vec());
                Ok::<_, Malformed>(())
            })?;
        }
        split.finish().map(|head| (head, found))
    };
    assert_eq!(items(&[bytes]), items(&[one, two]));
    let lines = |pieces: &[&[u8]]| {
        let (mut split, mut found) = (Lines::default(), Vec::new());
        for piece in pieces {
            split.feed(piece, |line| {
                found.push(line.to_vec());
                Ok::<_, Malformed>(())
            })?;
        }
        Ok::<_, Malformed>(found)
    };
    assert_eq!(lines(&[bytes]), lines(&[one, two]));
}

fn shown(event: Option<LeaseEvent>) -> Vec<Record> {
    match event {
        Some(LeaseEvent::Reset(records)) => records,
        Some(LeaseEvent::Upsert(record)) => vec![record],
        Some(LeaseEvent::Remove(_) | LeaseEvent::Resumed | LeaseEvent::ThisNode(_)) | None => Vec::new(),
    }
}

fn nodes() -> Nodes {
    Nodes::new(Keys::new(AnnotationPrefix::default()), Default::default())
}
