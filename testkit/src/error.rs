//! The error type of the test kit.

use std::io;

/// An operation in the lab failed. Contains the operation and the system's error.
///
/// Retrying helps only if the system's error says so; drop a lab that failed half-way and create it again.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    context: String,
    source: Option<io::Error>,
}

impl Error {
    /// Creates an error without a system error.
    pub fn new(context: impl Into<String>) -> Self {
        Self { context: context.into(), source: None }
    }

    /// Creates an error with a system error.
    pub fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { context: context.into(), source: Some(source.into()) }
    }

    /// Returns the system's error number, if there is one.
    pub fn errno(&self) -> Option<i32> {
        self.source.as_ref().and_then(io::Error::raw_os_error)
    }

    /// Whether the system failed with this error number.
    pub fn is(&self, errno: nix::Error) -> bool {
        self.errno() == Some(errno as i32)
    }
}

/// Adds to a system error what was being done.
pub(crate) trait Context<T> {
    /// Returns the same result with context in its error.
    fn context(self, context: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| Error::io(context(), error))
    }
}
