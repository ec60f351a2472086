//! Names errors on the bus, in both directions. PURE.

use crate::correlation::RequestError;

/// What all error names of ours begin with.
pub const PREFIX: &str = "org.nbdtrack1.Error.";

/// Why the bus could not be served.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// The address is not one.
    #[error("{text}: not a bus: {reason}; write system, none or an address like unix:path=/run/x")]
    Address { text: String, reason: String },
    /// No bus answers there.
    #[error("{bus}: cannot connect: {reason}; is the bus running? --bus none serves without one")]
    Connect { bus: String, reason: String },
    /// Someone else has the name.
    #[error("{bus}: the name {name} is taken by {owner}; is another nbdtrack running?")]
    NameTaken {
        bus: String,
        name: &'static str,
        /// Unique name, and process and user where the bus tells.
        owner: String,
    },
    /// The bus does not let us have the name.
    #[error("{bus}: the bus refuses the name {name}: {reason}; is its policy file installed?")]
    NameRefused {
        bus: String,
        name: &'static str,
        reason: String,
    },
}

/// Returns the error's full name and its text.
pub fn on_the_wire(error: &RequestError) -> (String, &str) {
    let (name, text) = parts(error);
    (format!("{PREFIX}{name}"), text)
}

/// Returns the request error of a full name; `None` for a name that is not ours.
pub fn from_the_wire(name: &str, text: String) -> Option<RequestError> {
    Some(match name.strip_prefix(PREFIX)? {
        "NotFound" => RequestError::NotFound(text),
        "AlreadyExists" => RequestError::AlreadyExists(text),
        "Ambiguous" => RequestError::Ambiguous(text),
        "IdentityMismatch" => RequestError::IdentityMismatch(text),
        "DeviceBusy" => RequestError::DeviceBusy(text),
        "NotReady" => RequestError::NotReady(text),
        "InUse" => RequestError::InUse(text),
        "InvalidArgument" => RequestError::InvalidArgument(text),
        "InvalidConfig" => RequestError::InvalidConfig(text),
        "NotAuthorized" => RequestError::NotAuthorized(text),
        "NotSupported" => RequestError::NotSupported(text),
        "TimedOut" => RequestError::TimedOut(text),
        "Failed" => RequestError::Failed(text),
        _ => return None,
    })
}

/// Returns the error's short name and its text.
pub fn parts(error: &RequestError) -> (&'static str, &str) {
    match error {
        RequestError::NotFound(text) => ("NotFound", text),
        RequestError::AlreadyExists(text) => ("AlreadyExists", text),
        RequestError::Ambiguous(text) => ("Ambiguous", text),
        RequestError::IdentityMismatch(text) => ("IdentityMismatch", text),
        RequestError::DeviceBusy(text) => ("DeviceBusy", text),
        RequestError::NotReady(text) => ("NotReady", text),
        RequestError::InUse(text) => ("InUse", text),
        RequestError::InvalidArgument(text) => ("InvalidArgument", text),
        RequestError::InvalidConfig(text) => ("InvalidConfig", text),
        RequestError::NotAuthorized(text) => ("NotAuthorized", text),
        RequestError::NotSupported(text) => ("NotSupported", text),
        RequestError::TimedOut(text) => ("TimedOut", text),
        RequestError::Failed(text) => ("Failed", text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_keeps_its_name_over_the_bus() {
        let text = || "why".to_owned();
        for error in [
            RequestError::NotFound(text()),
            RequestError::AlreadyExists(text()),
            RequestError::Ambiguous(text()),
            RequestError::IdentityMismatch(text()),
            RequestError::DeviceBusy(text()),
            RequestError::NotReady(text()),
            RequestError::InUse(text()),
            RequestError::InvalidArgument(text()),
            RequestError::InvalidConfig(text()),
            RequestError::NotAuthorized(text()),
            RequestError::NotSupported(text()),
            RequestError::TimedOut(text()),
            RequestError::Failed(text()),
        ] {
            let (name, text) = on_the_wire(&error);
            assert_eq!(from_the_wire(&name, text.to_owned()), Some(error));
        }
        assert_eq!(from_the_wire("org.example.NotFound", text()), None);
    }
}
