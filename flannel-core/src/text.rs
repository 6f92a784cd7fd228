//! Makes untrusted text safe to show.

use std::error::Error;
use std::fmt::{self, Write};

/// Shows a value with escapes for all characters that have an effect beyond their display: control characters (a
/// terminal executes them, and a line break forges a log line), line and paragraph separators, and characters that
/// change the writing direction. Escapes are spelt as in JSON, `\u001b`, and are not escaped again.
///
/// All text from a lease store, the kernel or another program is escaped like this before it is shown:
/// [`LeaseKey`](crate::lease::LeaseKey), [`Reason`](crate::admit::Reason), [`LinkName`](crate::kernel::LinkName) and
/// the texts of errors in [`Status`](crate::overlay::Status) and [`Event`](crate::overlay::Event) escape themselves.
#[derive(Debug, Clone, Copy)]
pub struct Plain<T>(pub T);

impl<T: fmt::Display> fmt::Display for Plain<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{}", self.0)
    }
}

/// A writer that escapes like [`Plain`].
#[derive(Debug)]
pub struct Escaping<W>(pub W);

impl<W: Write> Write for Escaping<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let mut rest = text;
        while let Some((at, special)) = rest.char_indices().find(|(_, c)| !is_plain(*c)) {
            self.0.write_str(&rest[..at])?;
            write!(self.0, "\\u{:04x}", u32::from(special))?;
            rest = &rest[at + special.len_utf8()..];
        }
        self.0.write_str(rest)
    }
}

/// Returns whether a character has no effect beyond its display.
pub fn is_plain(c: char) -> bool {
    let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !(c.is_control() || turns || matches!(c, '\u{2028}' | '\u{2029}'))
}

/// The longest text of an error with its sources in a status, an event or a log line, in bytes.
pub const MAX_ERROR: usize = 4096;

/// A writer that accepts a limited number of bytes, in whole characters, and counts the rest, so that the text in
/// memory never exceeds the limit.
#[derive(Debug)]
pub struct Cut<W> {
    out: W,
    room: usize,
    missing: usize,
}

impl<W: Write> Cut<W> {
    /// Creates a writer that accepts at most `max` bytes.
    pub fn new(out: W, max: usize) -> Self {
        Self { out, room: max, missing: 0 }
    }

    /// Writes how much is missing, as [`cut`] does, if anything is missing.
    ///
    /// # Errors
    /// Errors of the underlying writer.
    pub fn end(&mut self) -> fmt::Result {
        if self.missing == 0 { Ok(()) } else { write!(self.out, " ... ({} more bytes)", self.missing) }
    }
}

impl<W: Write> Write for Cut<W> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let max = if self.missing == 0 { self.room } else { 0 };
        let (shown, missing) = text.split_at(boundary(text, max));
        (self.room, self.missing) = (max - shown.len(), self.missing + missing.len());
        self.out.write_str(shown)
    }
}

/// Shortens a text to at most `max` bytes of whole characters, and appends how many bytes are missing.
pub fn cut(text: &mut String, max: usize) {
    if text.len() <= max {
        return;
    }
    let end = boundary(text, max);
    let missing = text.len() - end;
    text.truncate(end);
    text.push_str(&format!(" ... ({missing} more bytes)"));
    text.shrink_to_fit();
}

/// Returns the length of the longest prefix of whole characters within `max` bytes.
fn boundary(text: &str, max: usize) -> usize {
    (0..=max.min(text.len())).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default()
}

/// Returns an error and its sources as one line that is safe to show, of at most [`MAX_ERROR`] bytes plus the note of
/// [`cut`]. Omits a source whose text ends the text before it: many errors print their source themselves.
pub fn chain(error: &dyn Error) -> String {
    let mut shown = Cut::new(String::new(), MAX_ERROR);
    // Writing to a String cannot fail.
    let _ = write!(shown, "{}", Plain(error));
    let mut source = error.source();
    while let Some(error) = source {
        let mut said = Cut::new(String::new(), MAX_ERROR);
        let _ = write!(said, "{}", Plain(error));
        if !shown.out.ends_with(&said.out) {
            let _ = write!(shown, ": {}", Plain(error));
        }
        source = error.source();
    }
    let _ = shown.end();
    shown.out
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::path::Path;
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;
    use crate::admit::Reason;
    use crate::backend::Skip;
    use crate::config::ConfigError;
    use crate::files::FileError;
    use crate::firewall::FirewallError;
    use crate::kernel::{KernelError, LinkName};
    use crate::lease::{AttrsError, Json, LeaseAttrs, LeaseKey};
    use crate::net::MacAddr;
    use crate::overlay::{Explanation, LossReason, Verdict};
    use crate::subnet::SubnetError;

    /// Text that an attacker could write: any characters, many of them not plain.
    fn hostile() -> impl Strategy<Value = String> {
        let special = prop::sample::select(vec![
            '\0', '\n', '\r', '\t', '\u{1b}', '\u{7f}', '\u{85}', '\u{9b}', '\u{61c}', '\u{200f}', '\u{2028}',
            '\u{2029}', '\u{202e}', '\u{2066}', '\\', '"', '{',
        ]);
        prop::collection::vec(prop_oneof![any::<char>(), special], 0..40).prop_map(|chars| chars.into_iter().collect())
    }

    proptest! {
        #[test]
        fn what_is_shown_is_plain_and_is_not_escaped_twice(text in hostile()) {
            let shown = Plain(&text).to_string();
            prop_assert!(shown.chars().all(is_plain), "{shown:?}");
            prop_assert_eq!(Plain(&shown).to_string(), shown.clone());
            if text.chars().all(is_plain) {
                prop_assert_eq!(shown, text);
            }
        }
    }

    proptest! {
        #[test]
        fn a_text_that_is_cut_while_it_is_written_is_the_one_that_is_cut_afterwards(
            parts in prop::collection::vec(hostile(), 0..6), max in 0usize..100,
        ) {
            let (mut written, mut whole) = (String::new(), parts.concat());
            let mut out = Cut::new(&mut written, max);
            parts.iter().for_each(|part| out.write_str(part).unwrap());
            out.end().unwrap();
            cut(&mut whole, max);
            prop_assert_eq!(written, whole);
        }
    }

    proptest! {
        /// Text that a hostile record, store or interface puts into answers, logs and status.
        #[test]
        fn each_type_that_holds_text_of_others_shows_it_in_one_plain_line(text in hostile()) {
            let key = LeaseKey::new(&text);
            let unavailable = SubnetError::Unavailable { doing: "watching", source: text.clone().into() };
            let invalid = SubnetError::Invalid { at: text.clone(), reason: text.clone() };
            let (mac, subnet) = (MacAddr([2; 6]), "10.5.1.0/24".parse().unwrap());
            let mut lines = vec![
                key.to_string(),
                format!("{key:?}"),
                chain(&unavailable),
                invalid.to_string(),
                SubnetError::Exhausted(text.clone()).to_string(),
                SubnetError::Lost(text.clone()).to_string(),
                LossReason::Refused(text.clone()).to_string(),
                Reason::Unreadable(text.clone()).to_string(),
                Reason::WrongType { found: text.clone(), expected: "vxlan" }.to_string(),
                Reason::BackendData(Skip::BadData(text.clone())).to_string(),
                Reason::SameMac { mac, with: key.clone() }.to_string(),
                Reason::Overlap { subnet, other: subnet, with: key.clone() }.to_string(),
            ];
            let (doing, hint) = (text.clone(), text.clone());
            let within = Duration::from_secs(1);
            lines.extend([
                KernelError::Refused { doing: doing.clone(), errno: 22, message: hint.clone() }.to_string(),
                KernelError::Timeout { doing: doing.clone(), within }.to_string(),
                KernelError::Lost { doing: doing.clone(), reason: hint.clone() }.to_string(),
                KernelError::Unsupported { what: doing.clone(), hint: hint.clone() }.to_string(),
                KernelError::Denied { doing: doing.clone(), hint: hint.clone() }.to_string(),
                KernelError::Conflict { other: doing.clone(), hint: hint.clone() }.to_string(),
                FirewallError::Unsupported { what: doing.clone(), hint: hint.clone() }.to_string(),
                FirewallError::Denied { doing: doing.clone(), hint: hint.clone() }.to_string(),
                FirewallError::Refused { doing: doing.clone(), text: hint.clone() }.to_string(),
                FirewallError::Timeout { doing: doing.clone(), within }.to_string(),
                FirewallError::Failed { doing, reason: hint }.to_string(),
                ConfigError::new(&text, &text, &text).to_string(),
                AttrsError::Json(text.clone()).to_string(),
                FileError::new("read", Path::new(&text), io::ErrorKind::NotFound.into()).to_string(),
            ]);
            lines.extend(Json::parse(&text).map_err(|error| error.to_string()).err());
            lines.extend(LinkName::new(&text).map(|name| name.to_string()));
            lines.extend(LeaseAttrs::from_json(text.as_bytes()).map_err(|error| error.to_string()).err());
            for line in lines {
                prop_assert!(line.chars().all(is_plain), "{line:?}");
            }
            let verdict = Verdict::Quarantined(Reason::Unreadable(text));
            let explanation = Explanation { key, verdict, lease: None, states: Vec::new(), unsettled: Vec::new() };
            let explained = explanation.to_string();
            prop_assert_eq!(explained.matches('\n').count(), 1);
            prop_assert!(explained.trim_end_matches('\n').chars().all(is_plain), "{explained:?}");
        }
    }

    #[test]
    fn a_cause_that_the_error_before_it_repeats_is_shown_once() {
        #[derive(Debug, thiserror::Error)]
        #[error("{0}")]
        struct Layer(&'static str, #[source] Option<Box<Layer>>);
        let error = ["refused", "connect: refused", "connect: refused", "reading: connect: refused", "no client"];
        let error = error.into_iter().fold(None, |below, said| Some(Box::new(Layer(said, below)))).unwrap();
        assert_eq!(chain(&*error), "no client: reading: connect: refused");
    }

    #[test]
    fn a_text_without_end_is_cut_between_characters_and_says_how_much_is_missing() {
        for (text, max, left) in
            [("short", 5, "short"), ("éé", 3, "é ... (2 more bytes)"), ("é", 1, " ... (2 more bytes)")]
        {
            let mut cut_to = text.to_owned();
            cut(&mut cut_to, max);
            assert_eq!(cut_to, left);
        }
        let error = SubnetError::Unavailable { doing: "watching", source: "\u{1b}".repeat(1 << 20).into() };
        let shown = chain(&error);
        assert!(shown.len() < MAX_ERROR + 40 && shown.ends_with(" more bytes)"), "{}", shown.len());
        assert!(shown.capacity() < 4 * MAX_ERROR, "{} bytes were held", shown.capacity());
    }

    #[test]
    fn an_escape_is_one_in_json_too() {
        let shown = Plain("\u{1b}[31m\u{202e}").to_string();
        assert_eq!(shown, "\\u001b[31m\\u202e");
        assert_eq!(serde_json::from_str::<String>(&format!("\"{shown}\"")).unwrap(), "\u{1b}[31m\u{202e}");
    }
}
