//! Parses the API server's answers in Kubernetes' protobuf piece by piece, so that at most one object is in memory.
//!
//! The messages are those of `generated.proto` of each API group: their numbers never change, and unknown members are
//! skipped. The server's own encoder made them, so a broken message fails the request. Text is accepted whatever its
//! bytes are: otherwise an account that may write one Node could make all lists fail.

use std::borrow::Cow;
use std::ops::Range;

/// The requested media type, and the start of each answer's media type.
pub(crate) const TYPE: &str = "application/vnd.kubernetes.protobuf";

/// The largest object that is read, in bytes. etcd accepts 1.5 MB.
pub(crate) const MAX_OBJECT: usize = 4 << 20;

/// The bytes before each object.
const MAGIC: &[u8] = b"k8s\0";

/// The number of the member of `Unknown` that contains the object.
const RAW: u64 = 2;

/// The answer is not in the requested form.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("an object is larger than {MAX_OBJECT} bytes")]
    TooLarge,
    #[error("the answer is not Kubernetes' protobuf: {0}")]
    Message(&'static str),
}

const CUT: Malformed = Malformed::Message("it ends in the middle");

/// A member of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Field<'a> {
    pub(crate) number: u64,
    /// The content; for a number, its encoding.
    pub(crate) bytes: &'a [u8],
}

impl<'a> Field<'a> {
    /// Splits off the first member. Returns `None` if it has not arrived completely.
    fn split(bytes: &'a [u8]) -> Result<Option<(Self, &'a [u8])>, Malformed> {
        let Some(Head { number, length, content }) = Head::read(bytes)? else { return Ok(None) };
        if length > MAX_OBJECT {
            return Err(Malformed::TooLarge);
        }
        Ok(content.split_at_checked(length).map(|(bytes, rest)| (Self { number, bytes }, rest)))
    }

    /// Returns the content as text. Invalid UTF-8 is replaced, as the server does in JSON.
    pub(crate) fn text(&self) -> Cow<'a, str> {
        text(self.bytes)
    }
}

/// The start of a member.
struct Head<'a> {
    number: u64,
    /// The length of the content, which may not have arrived.
    length: usize,
    /// What has arrived from the content on.
    content: &'a [u8],
}

impl<'a> Head<'a> {
    fn read(bytes: &'a [u8]) -> Result<Option<Self>, Malformed> {
        let Some((tag, content)) = varint(bytes)? else { return Ok(None) };
        let number = tag >> 3;
        let of_length = |length| Ok(Some(Self { number, length, content }));
        match tag & 7 {
            0 => match varint(content)? {
                Some((_, rest)) => of_length(content.len() - rest.len()),
                None => Ok(None),
            },
            1 => of_length(8),
            2 => {
                let Some((length, content)) = varint(content)? else { return Ok(None) };
                let length = usize::try_from(length).map_err(|_| Malformed::TooLarge)?;
                Ok(Some(Self { number, length, content }))
            }
            5 => of_length(4),
            _ => Err(Malformed::Message("a member is of no known kind")),
        }
    }
}

/// Returns the members of a complete message.
pub(crate) fn fields(message: &[u8]) -> impl Iterator<Item = Result<Field<'_>, Malformed>> {
    let mut rest = message;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let first = Field::split(rest).and_then(|first| first.ok_or(CUT));
        // After a broken member, the rest cannot be parsed.
        let (field, after) = first.map_or_else(|error| (Err(error), &[][..]), |(field, after)| (Ok(field), after));
        rest = after;
        Some(field)
    })
}

/// Returns the content of the member at this path of numbers, the last if there are several; empty if there is none.
pub(crate) fn find<'a>(message: &'a [u8], path: &[u64]) -> Result<&'a [u8], Malformed> {
    path.iter().try_fold(message, |message, number| {
        fields(message).try_fold(&[][..], |found, field| {
            let field = field?;
            Ok(if field.number == *number { field.bytes } else { found })
        })
    })
}

/// Returns the number that a content encodes; 0 if there is none.
pub(crate) fn number(bytes: &[u8]) -> u64 {
    varint(bytes).ok().flatten().map_or(0, |(number, _)| number)
}

pub(crate) fn text(bytes: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(bytes)
}

/// Returns the object in an answer or in an event of a watch.
pub(crate) fn object(bytes: &[u8]) -> Result<&[u8], Malformed> {
    let unknown = bytes.strip_prefix(MAGIC).ok_or(Malformed::Message("an object does not begin as one"))?;
    find(unknown, &[RAW])
}

/// Splits off a number. Returns `None` if it has not arrived completely.
fn varint(bytes: &[u8]) -> Result<Option<(u64, &[u8])>, Malformed> {
    let (mut number, mut rest) = (0, bytes);
    for shift in (0..64).step_by(7) {
        let Some((byte, after)) = rest.split_first() else { return Ok(None) };
        number |= u64::from(byte & 0x7f) << shift;
        if byte & 0x80 == 0 {
            return Ok(Some((number, after)));
        }
        rest = after;
    }
    Err(Malformed::Message("a number has no end"))
}

/// Received bytes that are not parsed yet.
#[derive(Debug, Default)]
struct Pending {
    bytes: Vec<u8>,
    /// How many of them are parsed.
    read: usize,
}

impl Pending {
    fn feed(&mut self, bytes: &[u8]) {
        self.bytes.drain(..self.read);
        self.read = 0;
        self.bytes.extend_from_slice(bytes);
    }

    fn rest(&self) -> &[u8] {
        self.bytes.get(self.read..).unwrap_or_default()
    }

    /// Marks what comes before `rest` as parsed, and returns the place of its last `length` bytes in `bytes`.
    fn take(&mut self, rest: usize, length: usize) -> Range<usize> {
        self.read = self.bytes.len() - rest;
        self.read - length..self.read
    }
}

/// A list: `Unknown { raw: NodeList { metadata, items } }`.
#[derive(Debug, Default)]
pub(crate) struct Items {
    pending: Pending,
    version: String,
    place: Place,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    #[default]
    Start,
    Before,
    /// In the list, with this many bytes left.
    List(usize),
    After,
}

impl Items {
    /// Adds the next bytes. Then call [`next`](Self::next) until it returns `None`.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.pending.feed(bytes);
    }

    /// Returns the next complete item.
    pub(crate) fn next(&mut self) -> Result<Option<&[u8]>, Malformed> {
        let item = loop {
            let bytes = self.pending.rest();
            match self.place {
                Place::Start => {
                    let Some((magic, rest)) = bytes.split_at_checked(MAGIC.len()) else { return Ok(None) };
                    object(magic)?;
                    self.place = Place::Before;
                    self.pending.take(rest.len(), 0);
                }
                Place::Before | Place::After => {
                    let Some(head) = Head::read(bytes)? else { return Ok(None) };
                    if self.place == Place::Before && head.number == RAW {
                        self.place = Place::List(head.length);
                        self.pending.take(head.content.len(), 0);
                    } else {
                        let Some((_, rest)) = Field::split(bytes)? else { return Ok(None) };
                        self.pending.take(rest.len(), 0);
                    }
                }
                Place::List(0) => self.place = Place::After,
                Place::List(left) => {
                    let Some((field, rest)) = Field::split(bytes)? else { return Ok(None) };
                    let left = left.checked_sub(bytes.len() - rest.len());
                    self.place = Place::List(left.ok_or(Malformed::Message("a member is longer than its list"))?);
                    if field.number == 1 {
                        self.version = text(find(field.bytes, &[2])?).into_owned();
                    }
                    let (is_item, length) = (field.number == 2, field.bytes.len());
                    let item = self.pending.take(rest.len(), length);
                    if is_item {
                        break item;
                    }
                }
            }
        };
        Ok(self.pending.bytes.get(item))
    }

    /// Returns the version of the list, once it has arrived completely.
    pub(crate) fn finish(self) -> Result<String, Malformed> {
        match self.place {
            Place::After if self.version.is_empty() => Err(Malformed::Message("the list has no resourceVersion")),
            Place::After if self.pending.rest().is_empty() => Ok(self.version),
            _ => Err(CUT),
        }
    }
}

/// The events of a watch, each after its length in four bytes.
#[derive(Debug, Default)]
pub(crate) struct Events {
    pending: Pending,
}

/// An event of a watch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Event<'a> {
    pub(crate) kind: Cow<'a, str>,
    pub(crate) object: &'a [u8],
}

impl Events {
    /// Adds the next bytes. Then call [`next`](Self::next) until it returns `None`.
    pub(crate) fn feed(&mut self, bytes: &[u8]) {
        self.pending.feed(bytes);
    }

    /// Returns the next complete event.
    pub(crate) fn next(&mut self) -> Result<Option<Event<'_>>, Malformed> {
        let Some((length, rest)) = self.pending.rest().split_first_chunk() else { return Ok(None) };
        let length = usize::try_from(u32::from_be_bytes(*length)).map_err(|_| Malformed::TooLarge)?;
        if length > MAX_OBJECT {
            return Err(Malformed::TooLarge);
        }
        let Some(left) = rest.len().checked_sub(length) else { return Ok(None) };
        let event = self.pending.take(left, length);
        let event = self.pending.bytes.get(event).unwrap_or_default();
        Ok(Some(Event { kind: text(find(event, &[1])?), object: object(find(event, &[2, 1])?)? }))
    }
}

/// Encoding, for tests.
#[cfg(test)]
pub(crate) mod testing {
    use super::{MAGIC, RAW};

    pub(crate) fn varint(mut number: u64) -> Vec<u8> {
        let mut bytes = Vec::new();
        while number >= 0x80 {
            bytes.push(u8::try_from(number & 0x7f).unwrap() | 0x80);
            number >>= 7;
        }
        bytes.push(u8::try_from(number).unwrap());
        bytes
    }

    pub(crate) fn number(nth: u64, value: u64) -> Vec<u8> {
        [varint(nth << 3), varint(value)].concat()
    }

    pub(crate) fn member(nth: u64, bytes: impl AsRef<[u8]>) -> Vec<u8> {
        [&varint(nth << 3 | 2), &varint(bytes.as_ref().len() as u64), bytes.as_ref()].concat()
    }

    pub(crate) fn object(bytes: &[u8]) -> Vec<u8> {
        [MAGIC.to_vec(), member(1, "kind"), member(RAW, bytes), member(3, ""), member(4, "")].concat()
    }

    pub(crate) fn list(version: &str, items: &[Vec<u8>]) -> Vec<u8> {
        let items: Vec<_> = items.iter().flat_map(|item| member(2, item)).collect();
        object(&[member(1, [member(1, ""), member(2, version)].concat()), items].concat())
    }

    pub(crate) fn event(kind: &str, bytes: &[u8]) -> Vec<u8> {
        let event = [member(1, kind), member(2, member(1, object(bytes)))].concat();
        [&u32::try_from(event.len()).unwrap().to_be_bytes(), &*event].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fuzzing::{events, items};
    use proptest::prelude::*;

    fn pieces<'a>(text: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
        let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
        at.extend([0, text.len()]);
        at.sort_unstable();
        at.windows(2).map(|ends| &text[ends[0]..ends[1]]).collect()
    }

    proptest! {
        /// Whatever the objects contain, in whatever pieces they arrive.
        #[test]
        fn lists_and_watches_are_cut_into_their_objects(
            all in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..300), 0..5),
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let list = testing::list("42", &all);
            prop_assert_eq!(items(&pieces(&list, &cuts)), Ok(("42".to_owned(), all.clone())));
            let watch: Vec<_> = all.iter().flat_map(|object| testing::event("ADDED", object)).collect();
            let found: Vec<_> = all.into_iter().map(|object| ("ADDED".to_owned(), object)).collect();
            prop_assert_eq!(events(&pieces(&watch, &cuts)), Ok(found));
        }

        #[test]
        fn any_bytes_are_refused_or_cut(bytes: Vec<u8>, start in 0..40_usize) {
            let begun = testing::list("42", &[vec![0; 40]]);
            let _ = items(&[&begun[..start], &bytes]);
            let begun = testing::event("ADDED", &[0; 40]);
            let _ = events(&[&begun[..start], &bytes]);
        }
    }

    #[test]
    fn a_list_that_ends_in_the_middle_is_none() {
        let text = testing::list("42", &[b"one".to_vec()]);
        // The last two members are empty, and the list is complete without them.
        let last = text.len() - 4;
        for end in 0..text.len() {
            let is_whole = end >= last && (end - last).is_multiple_of(2);
            assert_eq!(items(&[&text[..end]]).is_ok(), is_whole, "{end}");
        }
        assert!(items(&[&testing::list("", &[])]).is_err(), "no version");
    }

    #[test]
    fn what_is_too_large_or_of_another_kind_is_refused() {
        let huge = |nth: u64| [testing::varint(nth << 3 | 2), testing::varint(MAX_OBJECT as u64 + 1)].concat();
        let begun = [MAGIC, &testing::varint(RAW << 3 | 2), &testing::varint(u64::from(u32::MAX))].concat();
        assert_eq!(items(&[&begun, &huge(2)]), Err(Malformed::TooLarge));
        assert_eq!(items(&[MAGIC, &huge(1)]), Err(Malformed::TooLarge));
        assert_eq!(events(&[&u32::MAX.to_be_bytes()]), Err(Malformed::TooLarge));
        let longer = [MAGIC, &testing::varint(RAW << 3 | 2), &[3], &testing::member(2, "item")].concat();
        assert_eq!(items(&[&longer]), Err(Malformed::Message("a member is longer than its list")));
        assert!(items(&[br#"{"kind":"NodeList"}"#]).is_err());
        assert!(events(&[br#"{"type":"ADDED","object":{}}"#]).is_err());
    }

    #[test]
    fn the_last_member_counts_and_none_is_nothing() {
        let message = [testing::member(3, "a"), testing::number(4, 300), testing::member(3, "b")].concat();
        assert_eq!(find(&message, &[3]), Ok(&b"b"[..]));
        assert_eq!(find(&message, &[4]).map(number), Ok(300));
        assert_eq!(find(&message, &[5, 1]).map(number), Ok(0));
        assert_eq!(find(&message[..2], &[3]), Err(CUT));
    }
}
