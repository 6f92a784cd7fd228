//! A regular expression as a value.

use std::fmt;

use regex::Regex;

/// A regular expression in Go's RE2 syntax that may match anywhere in a text. Compared by its text.
#[derive(Clone)]
pub struct Pattern(Regex);

/// The text is not a regular expression. Final for this input.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a regular expression: {problem}")]
pub struct PatternError {
    text: String,
    problem: String,
}

impl Pattern {
    /// Compiles `text`.
    ///
    /// # Errors
    /// [`PatternError`] describes the syntax error. Final for this input.
    pub fn new(text: &str) -> Result<Self, PatternError> {
        let failed = |error: regex::Error| {
            // The error has several lines; the last one describes the problem.
            let problem = error.to_string();
            let problem = problem.lines().last().unwrap_or_default().trim_start_matches("error: ").to_owned();
            PatternError { text: text.chars().take(128).collect(), problem }
        };
        Regex::new(text).map(Self).map_err(failed)
    }

    pub(super) fn matches(&self, text: &str) -> bool {
        self.0.is_match(text)
    }
}

impl PartialEq for Pattern {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_str() == other.0.as_str()
    }
}

impl Eq for Pattern {}

impl fmt::Display for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.0.as_str())
    }
}

impl fmt::Debug for Pattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
