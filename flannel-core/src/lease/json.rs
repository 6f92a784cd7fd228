//! JSON values, kept as their text.

use std::borrow::Cow;
use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, Visitor};
use serde_json::value::RawValue;

use crate::text::Plain;

/// A JSON value kept as its compact text: ten thousand of them use little memory, and the text is written back
/// unchanged.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct Json(Box<str>);

/// The text is not exactly one JSON value. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("not a JSON value: {}", Plain(.0))]
pub struct JsonError(String);

impl Json {
    /// Parses `text`, ignoring white space around it.
    ///
    /// # Errors
    /// [`JsonError`] when it is not exactly one JSON value. Final for this input.
    pub fn parse(text: &str) -> Result<Self, JsonError> {
        let raw = serde_json::from_str(text).map_err(|error| JsonError(error.to_string()))?;
        Ok(Self::of_raw(raw))
    }

    /// The text of the value `null`.
    pub(crate) const NULL: &str = "null";

    /// Keeps the text of a value that was parsed.
    pub(crate) fn of_raw(raw: &RawValue) -> Self {
        Self(raw.get().into())
    }

    /// Returns an object with these members in this order, in compact form.
    pub fn object(members: &[(&str, Scalar<'_>)]) -> Self {
        let member = |(name, value): &(&str, Scalar<'_>)| {
            let value = match value {
                Scalar::Number(number) => serde_json::Value::from(*number),
                Scalar::Text(text) => serde_json::Value::from(*text),
            };
            format!("{}:{value}", serde_json::Value::from(*name))
        };
        Self(format!("{{{}}}", members.iter().map(member).collect::<Vec<_>>().join(",")).into())
    }

    /// Returns the JSON text.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Returns whether the value is `null`, which flannel writes when a backend has no data.
    pub fn is_null(&self) -> bool {
        &*self.0 == Self::NULL
    }
}

/// A member's value in [`Json::object`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Scalar<'a> {
    /// A number.
    Number(u64),
    /// A string.
    Text(&'a str),
}

impl fmt::Debug for Json {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// A JSON string, borrowed from its document unless it contains an escape.
pub(crate) struct Text<'a>(pub(crate) Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_str(TextVisitor)
    }
}

struct TextVisitor;

impl<'de> Visitor<'de> for TextVisitor {
    type Value = Text<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string")
    }

    fn visit_borrowed_str<E: Error>(self, text: &'de str) -> Result<Self::Value, E> {
        Ok(Text(text.into()))
    }

    fn visit_str<E: Error>(self, text: &str) -> Result<Self::Value, E> {
        Ok(Text(text.to_owned().into()))
    }
}
