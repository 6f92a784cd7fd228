//! JSON objects, decoded as Go does (docs/compatibility.md, "Network configuration").

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;

use serde::de::{DeserializeOwned, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::ConfigError;
use crate::lease::{Json, Text};

/// A JSON object whose keys match in any case: the exact spelling wins, else the last match. Unknown keys are ignored.
///
/// The getters return `None` if the key is absent or `null`, and an error that names the JSON path if the value has
/// another type.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    path: String,
    /// In the order of the text, including duplicates.
    members: Vec<(String, Json)>,
}

impl Object {
    /// Creates an empty object at `path`.
    pub fn new(path: &str) -> Self {
        Self { path: path.to_owned(), members: Vec::new() }
    }

    /// Parses a whole document; its path is `$`.
    ///
    /// # Errors
    /// [`ConfigError`] when the text is not exactly one JSON object. Final for this text.
    pub fn parse(json: &[u8]) -> Result<Self, ConfigError> {
        Ok(Self {
            members: serde_json::from_slice::<Members<'_>>(json).map_err(not_an_object)?.owned(),
            ..Self::new("$")
        })
    }

    /// Returns a string of a whole document, as [`parse`](Self::parse) and [`string`](Self::string) do. Copies
    /// no other member, so it takes less time.
    ///
    /// # Errors
    /// [`ConfigError`] when the text is not exactly one JSON object, or the value has another type. Final for this
    /// text.
    pub fn string_of<'a>(json: &'a str, key: &str) -> Result<Option<Cow<'a, str>>, ConfigError> {
        let mut document = serde_json::Deserializer::from_str(json);
        let found = document.deserialize_map(Last::of(key)).and_then(|found| document.end().map(|()| found));
        let Some(json) = found.map_err(not_an_object)? else { return Ok(None) };
        match serde_json::from_str(json) {
            Ok(Text(text)) => Ok(Some(text)),
            Err(_) => Err(Self::new("$").mistyped(key, json, A_STRING)),
        }
    }

    /// Returns the JSON path of a key, such as `$.Backend.VNI`.
    pub fn path_of(&self, key: &str) -> String {
        format!("{}.{key}", self.path)
    }

    /// Returns whether the two are equal in content, regardless of the order and case of keys and of white space.
    pub fn means(&self, other: &Self) -> bool {
        let said = |object: &Self| -> BTreeMap<String, Result<Value, Json>> {
            // Text that does not parse as a `Value` (nested too deeply, half a surrogate pair) is compared as text.
            let value = |json: &Json| serde_json::from_str(json.as_str()).map_err(|_| json.clone());
            object.members.iter().map(|(key, json)| (key.to_ascii_lowercase(), value(json))).collect()
        };
        said(self) == said(other)
    }

    /// Returns the keys, in the order of the text.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.members.iter().map(|(key, _)| key.as_str())
    }

    /// Returns whether the key is present, `null` or not.
    pub fn contains(&self, key: &str) -> bool {
        self.last(key, |_| true).is_some()
    }

    /// Returns a boolean.
    ///
    /// # Errors
    /// [`ConfigError`] when the value has another type. Final for this text.
    pub fn bool(&self, key: &str) -> Result<Option<bool>, ConfigError> {
        self.typed(key, "true or false")
    }

    /// Returns a whole number, 0 or more.
    ///
    /// # Errors
    /// [`ConfigError`] when the value is something else. Final for this text.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        self.typed(key, "a whole number, 0 or more")
    }

    /// Returns a string.
    ///
    /// # Errors
    /// [`ConfigError`] when the value has another type. Final for this text.
    pub fn string(&self, key: &str) -> Result<Option<String>, ConfigError> {
        self.typed(key, A_STRING)
    }

    /// Returns an object.
    ///
    /// # Errors
    /// [`ConfigError`] when the value has another type. Final for this text.
    pub fn object(&self, key: &str) -> Result<Option<Self>, ConfigError> {
        let Some(json) = self.last(key, |json| !json.is_null()) else { return Ok(None) };
        match serde_json::from_str(json.as_str()) {
            Ok(members) => Ok(Some(Self { path: self.path_of(key), members: Members::owned(&members) })),
            Err(_) => Err(self.mistyped(key, json.as_str(), AN_OBJECT)),
        }
    }

    /// Returns a string. Rejects `null`, as flannel does for some keys.
    pub(super) fn string_not_null(&self, key: &str) -> Result<Option<String>, ConfigError> {
        match self.last(key, |_| true) {
            Some(json) if json.is_null() => Err(self.mistyped(key, json.as_str(), A_STRING)),
            _ => self.string(key),
        }
    }

    /// Removes a key in all its spellings.
    pub(super) fn remove(&mut self, key: &str) {
        self.members.retain(|(name, _)| !name.eq_ignore_ascii_case(key));
    }

    /// Returns the members as JSON text, without the braces.
    pub(super) fn members(&self) -> String {
        let member = |(name, json): &(String, Json)| format!("{}:{}", Value::from(name.as_str()), json.as_str());
        self.members.iter().map(member).collect::<Vec<_>>().join(",")
    }

    fn typed<T: DeserializeOwned>(&self, key: &str, expected: &'static str) -> Result<Option<T>, ConfigError> {
        // `null` has no effect, so it does not hide an earlier value either.
        let Some(json) = self.last(key, |json| !json.is_null()) else { return Ok(None) };
        serde_json::from_str(json.as_str()).map(Some).map_err(|_| self.mistyped(key, json.as_str(), expected))
    }

    fn last(&self, key: &str, accept: impl Fn(&Json) -> bool) -> Option<&Json> {
        let mut last = Last::of(key);
        self.members.iter().filter(|(_, json)| accept(json)).for_each(|(name, json)| last.offer(name, json));
        last.value()
    }

    fn mistyped(&self, key: &str, found: &str, expected: &str) -> ConfigError {
        let found: String = found.chars().take(64).collect();
        ConfigError::new(self.path_of(key), format!("{found} is not {expected}"), format!("write {expected}"))
    }
}

/// The last value of a key: that of the exact spelling, or else of any case.
struct Last<'k, V> {
    key: &'k str,
    exact: Option<V>,
    any_case: Option<V>,
}

impl<'k, V> Last<'k, V> {
    fn of(key: &'k str) -> Self {
        Self { key, exact: None, any_case: None }
    }

    fn offer(&mut self, name: &str, value: V) {
        if name == self.key {
            self.exact = Some(value);
        } else if name.eq_ignore_ascii_case(self.key) {
            self.any_case = Some(value);
        }
    }

    fn value(self) -> Option<V> {
        self.exact.or(self.any_case)
    }
}

/// Returns the value's text, unless it is `null`.
impl<'de> Visitor<'de> for Last<'_, &'de str> {
    type Value = Option<&'de str>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(AN_OBJECT)
    }

    fn visit_map<A: MapAccess<'de>>(mut self, mut map: A) -> Result<Self::Value, A::Error> {
        while let Some((Text(name), raw)) = map.next_entry::<_, &RawValue>()? {
            if raw.get() != Json::NULL {
                self.offer(&name, raw.get());
            }
        }
        Ok(self.value())
    }
}

const AN_OBJECT: &str = "an object";
const A_STRING: &str = "a string";

fn not_an_object(error: serde_json::Error) -> ConfigError {
    ConfigError::new("$", format!("not a JSON object ({error})"), "write one JSON object and nothing after it")
}

/// The members of an object in the order of the text, including duplicates.
struct Members<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'a> Members<'a> {
    /// Returns the members without their document.
    fn owned(&self) -> Vec<(String, Json)> {
        self.0.iter().map(|(name, raw)| (name.to_string(), Json::of_raw(raw))).collect()
    }
}

impl<'de> serde::Deserialize<'de> for Members<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(AN_OBJECT)
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members<'de>, A::Error> {
        let mut members = Vec::new();
        while let Some((Text(name), raw)) = map.next_entry()? {
            members.push((name, raw));
        }
        Ok(Members(members))
    }
}
