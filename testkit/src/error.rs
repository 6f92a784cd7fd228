//! The one error of the test kit.

use std::io;

/// Something in the lab did not work: what was being done, and what the system said.
///
/// Retrying helps only where the system's answer says so; a lab that fails half-way is dropped and made anew.
#[derive(Debug, thiserror::Error)]
#[error("{context}")]
pub struct Error {
    context: String,
    source: Option<io::Error>,
}

impl Error {
    /// An error that says all there is to say.
    pub fn new(context: impl Into<String>) -> Self {
        Self { context: context.into(), source: None }
    }

    /// An error of the system's.
    pub fn io(context: impl Into<String>, source: impl Into<io::Error>) -> Self {
        Self { context: context.into(), source: Some(source.into()) }
    }

    /// The system's error number, where it was the system that refused.
    pub fn errno(&self) -> Option<i32> {
        self.source.as_ref().and_then(io::Error::raw_os_error)
    }

    /// Whether the system refused with this error number.
    pub fn is(&self, errno: nix::Error) -> bool {
        self.errno() == Some(errno as i32)
    }
}

/// Says what was being done when the system refused.
pub(crate) trait Context<T> {
    /// The same result with its error in context.
    fn context(self, context: impl FnOnce() -> String) -> Result<T, Error>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn context(self, context: impl FnOnce() -> String) -> Result<T, Error> {
        self.map_err(|error| Error::io(context(), error))
    }
}
