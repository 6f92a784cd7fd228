//! Cuts what an API server sends into objects while it arrives, so that no more than one of them is held as text.

/// The largest object that is read, in bytes. etcd takes 1.5 MB, and JSON is a little longer than what is stored.
pub(crate) const MAX_OBJECT: usize = 4 << 20;

/// The most bytes of a list around its items.
const MAX_HEAD: usize = 64 << 10;

/// What arrives is not what was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Malformed {
    #[error("an object is larger than {MAX_OBJECT} bytes")]
    TooLarge,
    #[error("the answer is not a list of objects: {0}")]
    NoList(&'static str),
}

/// A list: `{"kind":"NodeList",…,"items":[{…},{…}]}`.
#[derive(Debug, Default)]
pub(crate) struct Items {
    /// The list without its items: a JSON object of its own.
    head: Vec<u8>,
    /// The item that is being read.
    item: Vec<u8>,
    /// Where the last string of the list's own members begins and ends in `head`, without its quotes.
    string: (usize, usize),
    /// Brackets and braces that are open: in an item those of the item.
    depth: usize,
    place: Place,
    text: Text,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Place {
    #[default]
    Head,
    BetweenItems,
    Item,
}

#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
enum Text {
    #[default]
    Outside,
    Inside,
    /// After a backslash.
    Escaped,
}

impl Items {
    /// Takes the next bytes. Calls `each` with every item that they complete.
    pub(crate) fn feed<E: From<Malformed>>(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = bytes;
        while let Some((first, after)) = rest.split_first() {
            match self.place {
                Place::BetweenItems => {
                    match first {
                        b' ' | b'\t' | b'\r' | b'\n' | b',' => {}
                        b'{' => {
                            (self.place, self.depth) = (Place::Item, 1);
                            self.item.clear();
                            self.item.push(b'{');
                        }
                        b']' => {
                            (self.place, self.depth) = (Place::Head, 1);
                            self.head.push(b']');
                        }
                        _ => return Err(Malformed::NoList("an item is no object").into()),
                    }
                    rest = after;
                }
                Place::Item => {
                    let (taken, ended) = self.take_item(rest);
                    if self.item.len() + taken.len() > MAX_OBJECT {
                        return Err(Malformed::TooLarge.into());
                    }
                    self.item.extend_from_slice(taken);
                    rest = rest.get(taken.len()..).unwrap_or_default();
                    if ended {
                        self.place = Place::BetweenItems;
                        each(&self.item)?;
                    }
                }
                Place::Head => {
                    self.take_head(*first);
                    if self.head.len() > MAX_HEAD {
                        return Err(Malformed::NoList("there is too much beside its items").into());
                    }
                    rest = after;
                }
            }
        }
        Ok(())
    }

    /// The list without its items, once all has arrived.
    pub(crate) fn finish(self) -> Result<Vec<u8>, Malformed> {
        let is_whole = self.place == Place::Head && self.depth == 0 && !self.head.is_empty();
        if is_whole { Ok(self.head) } else { Err(Malformed::NoList("it ends in the middle")) }
    }

    /// What of `bytes` belongs to the item, and whether it ends there.
    fn take_item<'a>(&mut self, bytes: &'a [u8]) -> (&'a [u8], bool) {
        let mut at = 0;
        while let Some(byte) = bytes.get(at) {
            match self.text {
                Text::Inside => {
                    // Most of an item is text.
                    let rest = bytes.get(at..).unwrap_or_default();
                    let Some(found) = memchr::memchr2(b'"', b'\\', rest) else { break };
                    at += found;
                    self.text = if rest.get(found) == Some(&b'"') { Text::Outside } else { Text::Escaped };
                }
                Text::Escaped => self.text = Text::Inside,
                Text::Outside => match byte {
                    b'"' => self.text = Text::Inside,
                    b'{' | b'[' => self.depth += 1,
                    b'}' | b']' => {
                        self.depth -= 1;
                        if self.depth == 0 {
                            return (bytes.get(..=at).unwrap_or_default(), true);
                        }
                    }
                    _ => {}
                },
            }
            at += 1;
        }
        (bytes, false)
    }

    fn take_head(&mut self, byte: u8) {
        self.head.push(byte);
        match (self.text, byte) {
            (Text::Escaped, _) => self.text = Text::Inside,
            (Text::Inside, b'\\') => self.text = Text::Escaped,
            (Text::Inside, b'"') => {
                self.text = Text::Outside;
                self.string.1 = self.head.len() - 1;
            }
            (Text::Inside, _) => {}
            (Text::Outside, b'"') => {
                self.text = Text::Inside;
                self.string.0 = self.head.len();
            }
            (Text::Outside, b'{') => self.depth += 1,
            (Text::Outside, b'[') => {
                let is_items = self.depth == 1 && self.head.get(self.string.0..self.string.1) == Some(b"items");
                if is_items {
                    self.place = Place::BetweenItems;
                } else {
                    self.depth += 1;
                }
            }
            (Text::Outside, b'}' | b']') => self.depth = self.depth.saturating_sub(1),
            (Text::Outside, _) => {}
        }
    }
}

/// Lines: what a watch sends.
#[derive(Debug, Default)]
pub(crate) struct Lines {
    /// What has arrived of a line.
    begun: Vec<u8>,
}

impl Lines {
    /// Takes the next bytes. Calls `each` with every line that they complete, without its end.
    pub(crate) fn feed<E: From<Malformed>>(
        &mut self,
        bytes: &[u8],
        mut each: impl FnMut(&[u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let mut rest = bytes;
        while let Some(end) = memchr::memchr(b'\n', rest) {
            let (line, after) = rest.split_at(end);
            rest = after.get(1..).unwrap_or_default();
            if self.begun.is_empty() {
                each(line)?;
            } else {
                self.keep(line)?;
                let line = std::mem::take(&mut self.begun);
                each(&line)?;
            }
        }
        Ok(self.keep(rest)?)
    }

    fn keep(&mut self, bytes: &[u8]) -> Result<(), Malformed> {
        if self.begun.len() + bytes.len() > MAX_OBJECT {
            return Err(Malformed::TooLarge);
        }
        self.begun.extend_from_slice(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn items(chunks: &[&[u8]]) -> Result<(Vec<serde_json::Value>, serde_json::Value), Malformed> {
        let (mut split, mut found) = (Items::default(), Vec::new());
        for chunk in chunks {
            split.feed(chunk, |item| {
                found.push(serde_json::from_slice(item).expect("an item is JSON"));
                Ok::<_, Malformed>(())
            })?;
        }
        Ok((found, serde_json::from_slice(&split.finish()?).expect("the head is JSON")))
    }

    fn json() -> impl Strategy<Value = serde_json::Value> {
        let leaf = prop_oneof![
            Just(serde_json::Value::Null),
            any::<bool>().prop_map(Into::into),
            any::<i32>().prop_map(Into::into),
            "[\\PC\"\\\\{}\\[\\]]{0,8}".prop_map(Into::into),
        ];
        leaf.prop_recursive(3, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Into::into),
                object(inner).prop_map(Into::into),
            ]
        })
    }

    fn object(
        inner: impl Strategy<Value = serde_json::Value>,
    ) -> impl Strategy<Value = serde_json::Map<String, serde_json::Value>> {
        prop::collection::btree_map("[a-z\"\\\\{}\\[\\]]{0,6}|items|metadata", inner, 0..4)
            .prop_map(|members| members.into_iter().collect())
    }

    proptest! {
        /// Whatever the objects hold, in whatever pieces they arrive, wherever the items stand among the members.
        #[test]
        fn a_list_is_cut_into_its_items(
            all in prop::collection::vec(object(json()), 0..5),
            before in object(json()),
            after in object(json()),
            pretty: bool,
            cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..6),
        ) {
            let all: Vec<serde_json::Value> = all.into_iter().map(Into::into).collect();
            let print = |value: &serde_json::Value| match pretty {
                true => serde_json::to_string_pretty(value).unwrap(),
                false => value.to_string(),
            };
            let wrap = |members| print(&serde_json::json!({ "in": serde_json::Value::Object(members) }));
            let (before, after, inner) = (wrap(before), wrap(after), print(&all.clone().into()));
            let text = format!("{{\"a\":{before},\"items\" : {inner},\"b\":{after}}}\n");
            let mut at: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let chunks: Vec<&[u8]> = at.windows(2).map(|ends| &text.as_bytes()[ends[0]..ends[1]]).collect();
            let (found, head) = items(&chunks).unwrap();
            prop_assert_eq!(found, all);
            prop_assert_eq!(&head["items"], &serde_json::json!([]));
            prop_assert_eq!(head["a"].to_string(), serde_json::from_str::<serde_json::Value>(&before).unwrap().to_string());
        }

        #[test]
        fn any_bytes_are_refused_or_cut(bytes: Vec<u8>, list: bool) {
            let mut split = Items::default();
            let start: &[u8] = if list { b"{\"items\":[" } else { b"" };
            let fed = split.feed(start, |_| Ok::<_, Malformed>(())).and_then(|()| split.feed(&bytes, |_| Ok(())));
            let _ = fed.and_then(|()| split.finish().map(|_| ()));
        }
    }

    #[test]
    fn a_list_that_ends_in_the_middle_is_none() {
        let text = br#"{"metadata":{"resourceVersion":"7"},"items":[{"a":"]}"}]}"#;
        assert!(items(&[text]).is_ok());
        for end in 0..text.len() {
            assert!(items(&[&text[..end]]).is_err(), "{end}");
        }
        assert_eq!(items(&[br#"{"items":[1]}"#]), Err(Malformed::NoList("an item is no object")));
    }

    #[test]
    fn an_object_and_a_head_without_end_are_refused() {
        let endless = vec![b'x'; MAX_OBJECT];
        let mut split = Items::default();
        split.feed(b"{\"items\":[{\"", |_| Ok::<_, Malformed>(())).unwrap();
        assert_eq!(split.feed(&endless, |_| Ok(())), Err(Malformed::TooLarge));
        assert!(Items::default().feed(&endless, |_| Ok::<_, Malformed>(())).is_err());
        let mut lines = Lines::default();
        lines.feed(b"x", |_| Ok::<_, Malformed>(())).unwrap();
        assert_eq!(lines.feed(&endless, |_| Ok(())), Err(Malformed::TooLarge));
    }

    #[test]
    fn lines_come_whole_in_whatever_pieces() {
        let text = b"one\n\ntwo\nthree";
        for cut in 0..text.len() {
            let (mut lines, mut found) = (Lines::default(), Vec::new());
            for chunk in [&text[..cut], &text[cut..]] {
                lines
                    .feed(chunk, |line| {
                        found.push(String::from_utf8(line.to_vec()).expect("text"));
                        Ok::<_, Malformed>(())
                    })
                    .unwrap();
            }
            assert_eq!(found, ["one", "", "two"], "{cut}");
        }
    }
}
