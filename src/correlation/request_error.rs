//! Why something that was asked for was not done; the variants are D-Bus's names of errors. PURE.

/// Why a request was not carried out. The variants are the D-Bus error names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    #[error("{0}")]
    NotFound(String),
    #[error("{0}")]
    AlreadyExists(String),
    #[error("{0}")]
    Ambiguous(String),
    #[error("{0}")]
    IdentityMismatch(String),
    #[error("{0}")]
    DeviceBusy(String),
    #[error("{0}")]
    NotReady(String),
    #[error("{0}")]
    InUse(String),
    #[error("{0}")]
    InvalidArgument(String),
    #[error("{0}")]
    InvalidConfig(String),
    #[error("{0}")]
    NotAuthorized(String),
    #[error("{0}")]
    NotSupported(String),
    #[error("{0}")]
    TimedOut(String),
    #[error("{0}")]
    Failed(String),
}

impl RequestError {
    /// The same error with more to say.
    pub fn with(mut self, more: &str) -> RequestError {
        match &mut self {
            RequestError::NotFound(text)
            | RequestError::AlreadyExists(text)
            | RequestError::Ambiguous(text)
            | RequestError::IdentityMismatch(text)
            | RequestError::DeviceBusy(text)
            | RequestError::NotReady(text)
            | RequestError::InUse(text)
            | RequestError::InvalidArgument(text)
            | RequestError::InvalidConfig(text)
            | RequestError::NotAuthorized(text)
            | RequestError::NotSupported(text)
            | RequestError::TimedOut(text)
            | RequestError::Failed(text) => text.push_str(more),
        }
        self
    }
}
