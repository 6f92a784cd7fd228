//! Checks of private parsers, for fuzz targets and property tests. Each panics if a property fails.

use flannel_core::lease::{BadRecord, LeaseAttrs, LeaseEvent, LeaseKey, Record};

use crate::keys::{AnnotationPrefix, Keys};
use crate::node::Node;
use crate::nodes::{Change, Nodes};
use crate::protobuf::{Events, Items, Malformed};

/// Checks for a Node in protobuf that its kept part is small, that a list and a watch show the same, and that it is
/// reported once.
pub fn node(bytes: &[u8]) {
    let keys = Keys::new(AnnotationPrefix::default());
    let Ok(node) = Node::parse(bytes, &keys) else { return };
    let mut listed = Nodes::default();
    listed.begin_list(None);
    listed.list(&node);
    let records = shown(Some(listed.end_list().0));
    let mut watched = Nodes::default();
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

/// Checks that a server's answer is parsed the same as a whole and byte by byte. Each object in it is checked as a
/// [`node`].
pub fn stream(bytes: &[u8]) {
    let pieces: Vec<&[u8]> = bytes.chunks(1).collect();
    let listed = items(&[bytes]);
    assert_eq!(items(&pieces), listed);
    let watched = events(&[bytes]);
    assert_eq!(events(&pieces), watched);
    listed.iter().flat_map(|(_, all)| all).for_each(|object| node(object));
    watched.iter().flatten().for_each(|(_, object)| node(object));
}

/// Returns the version and the items of a list that arrives in these pieces.
pub(crate) fn items(pieces: &[&[u8]]) -> Result<(String, Vec<Vec<u8>>), Malformed> {
    let (mut items, mut found) = (Items::default(), Vec::new());
    for piece in pieces {
        items.feed(piece);
        while let Some(item) = items.next()? {
            found.push(item.to_vec());
        }
    }
    Ok((items.finish()?, found))
}

/// Returns the kinds and objects of a watch's events that arrive in these pieces.
pub(crate) fn events(pieces: &[&[u8]]) -> Result<Vec<(String, Vec<u8>)>, Malformed> {
    let (mut events, mut found) = (Events::default(), Vec::new());
    for piece in pieces {
        events.feed(piece);
        while let Some(event) = events.next()? {
            found.push((event.kind.into_owned(), event.object.to_vec()));
        }
    }
    Ok(found)
}

fn shown(event: Option<LeaseEvent>) -> Vec<Record> {
    match event {
        Some(LeaseEvent::Reset(records)) => records,
        Some(LeaseEvent::Upsert(record)) => vec![record],
        Some(LeaseEvent::Remove(_) | LeaseEvent::Resumed | LeaseEvent::ThisNode(_) | LeaseEvent::ConfigChanged)
        | None => Vec::new(),
    }
}
