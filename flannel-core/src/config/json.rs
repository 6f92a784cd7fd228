//! JSON objects, decoded as Go does (docs/compatibility.md, "Network configuration").

use std::collections::BTreeMap;
use std::fmt;

use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

use super::ConfigError;
use crate::lease::Json;

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
        let Members(members) = serde_json::from_slice(json).map_err(|error| {
            ConfigError::new("$", format!("not a JSON object ({error})"), "write one JSON object and nothing after it")
        })?;
        Ok(Self { members, ..Self::new("$") })
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
        self.typed(key, "true or false", |value| value.as_bool())
    }

    /// Returns a whole number, 0 or more.
    ///
    /// # Errors
    /// [`ConfigError`] when the value is something else. Final for this text.
    pub fn u64(&self, key: &str) -> Result<Option<u64>, ConfigError> {
        self.typed(key, "a whole number, 0 or more", |value| value.as_u64())
    }

    /// Returns a string.
    ///
    /// # Errors
    /// [`ConfigError`] when the value has another type. Final for this text.
    pub fn string(&self, key: &str) -> Result<Option<String>, ConfigError> {
        self.typed(key, "a string", |value| value.as_str().map(str::to_owned))
    }

    /// Returns an object.
    ///
    /// # Errors
    /// [`ConfigError`] when the value has another type. Final for this text.
    pub fn object(&self, key: &str) -> Result<Option<Self>, ConfigError> {
        let Some(json) = self.last(key, |json| !json.is_null()) else { return Ok(None) };
        match serde_json::from_str(json.as_str()) {
            Ok(Members(members)) => Ok(Some(Self { path: self.path_of(key), members })),
            Err(_) => Err(self.mistyped(key, json, "an object")),
        }
    }

    /// Returns a string. Rejects `null`, as flannel does for some keys.
    pub(super) fn string_not_null(&self, key: &str) -> Result<Option<String>, ConfigError> {
        match self.last(key, |_| true) {
            Some(json) if json.is_null() => Err(self.mistyped(key, json, "a string")),
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

    fn typed<T>(
        &self,
        key: &str,
        expected: &'static str,
        read: impl Fn(&Value) -> Option<T>,
    ) -> Result<Option<T>, ConfigError> {
        // `null` has no effect, so it does not hide an earlier value either.
        let Some(json) = self.last(key, |json| !json.is_null()) else { return Ok(None) };
        let value = serde_json::from_str::<Value>(json.as_str()).ok().as_ref().and_then(read);
        value.map(Some).ok_or_else(|| self.mistyped(key, json, expected))
    }

    fn last(&self, key: &str, accept: impl Fn(&Json) -> bool) -> Option<&Json> {
        let mut any_case = None;
        for (name, json) in self.members.iter().rev().filter(|(_, json)| accept(json)) {
            if name == key {
                return Some(json);
            }
            if any_case.is_none() && name.eq_ignore_ascii_case(key) {
                any_case = Some(json);
            }
        }
        any_case
    }

    fn mistyped(&self, key: &str, found: &Json, expected: &str) -> ConfigError {
        let found: String = found.as_str().chars().take(64).collect();
        ConfigError::new(self.path_of(key), format!("{found} is not {expected}"), format!("write {expected}"))
    }
}

struct Members(Vec<(String, Json)>);

impl<'de> serde::Deserialize<'de> for Members {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(MembersVisitor)
    }
}

struct MembersVisitor;

impl<'de> Visitor<'de> for MembersVisitor {
    type Value = Members;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Members, A::Error> {
        let mut members = Vec::new();
        while let Some((key, raw)) = map.next_entry::<String, Box<RawValue>>()? {
            let json = Json::parse(raw.get()).map_err(serde::de::Error::custom)?;
            members.push((key, json));
        }
        Ok(Members(members))
    }
}
