//! Text that others wrote, made safe to show.

use std::fmt::{self, Write};

/// Shows a value with each character escaped that could do more than be read: control characters (a terminal obeys
/// them, and a line break forges a log line), line and paragraph separators, and those that turn the direction of
/// writing. An escape is spelt as in JSON, `\u001b`, and stays as it is when it is escaped again.
///
/// What comes from a lease store, from the kernel or from another program goes through this wherever it is shown:
/// [`LeaseKey`](crate::lease::LeaseKey), [`Reason`](crate::admit::Reason), [`LinkName`](crate::state::LinkName) and the
/// texts of errors in [`Status`](crate::overlay::Status) and [`Event`](crate::overlay::Event) do so by themselves.
#[derive(Debug, Clone, Copy)]
pub struct Plain<T>(pub T);

impl<T: fmt::Display> fmt::Display for Plain<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(Escaping(f), "{}", self.0)
    }
}

struct Escaping<'a, 'b>(&'a mut fmt::Formatter<'b>);

impl Write for Escaping<'_, '_> {
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

/// Whether a character does nothing but stand there.
pub fn is_plain(c: char) -> bool {
    let turns = matches!(c, '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
    !(c.is_control() || turns || matches!(c, '\u{2028}' | '\u{2029}'))
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Text as an attacker would write it: any characters, among them many that are not plain.
    pub(crate) fn hostile() -> impl Strategy<Value = String> {
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

    #[test]
    fn an_escape_is_one_in_json_too() {
        let shown = Plain("\u{1b}[31m\u{202e}").to_string();
        assert_eq!(shown, "\\u001b[31m\\u202e");
        assert_eq!(serde_json::from_str::<String>(&format!("\"{shown}\"")).unwrap(), "\u{1b}[31m\u{202e}");
    }
}
