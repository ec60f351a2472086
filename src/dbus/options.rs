//! The options of a call and the limits of arguments. PURE.

use std::collections::BTreeMap;
use std::time::Duration;

use zbus::{OwnedVariant, Variant};

use crate::correlation::RequestError;
use crate::identity::VOLUME_ID_BYTES_MAX;

/// The longest argument that names something, in bytes: a volume is the longest.
const ARGUMENT_BYTES_MAX: usize = VOLUME_ID_BYTES_MAX;
/// The longest time that a caller may ask for.
pub const WAIT_MS_MAX: u32 = 600_000;
/// More options than any method has.
const OPTIONS_MAX: usize = 32;

/// The options of a call: each is taken once, and what is left at the end is refused by name.
pub struct Options(BTreeMap<String, OwnedVariant>);

impl Options {
    pub fn take(given: BTreeMap<String, OwnedVariant>) -> Result<Options, RequestError> {
        if given.len() > OPTIONS_MAX {
            return Err(RequestError::InvalidArgument(format!(
                "options: at most {OPTIONS_MAX}, these are {}",
                given.len()
            )));
        }
        Ok(Options(given))
    }

    pub fn text(&mut self, key: &str) -> Result<Option<String>, RequestError> {
        match self.0.remove(key).map(Variant::from) {
            None => Ok(None),
            Some(Variant::Str(text)) => {
                bounded(&format!("option {key}"), &text)?;
                Ok(Some(text.as_str().to_owned()))
            }
            Some(other) => Err(wrong_type(key, "a string (s)", &other)),
        }
    }

    pub fn truth(&mut self, key: &str) -> Result<Option<bool>, RequestError> {
        match self.0.remove(key).map(Variant::from) {
            None => Ok(None),
            Some(Variant::Bool(truth)) => Ok(Some(truth)),
            Some(other) => Err(wrong_type(key, "a boolean (b)", &other)),
        }
    }

    pub fn number(&mut self, key: &str) -> Result<Option<u64>, RequestError> {
        match self.0.remove(key).map(Variant::from) {
            None => Ok(None),
            Some(Variant::U64(number)) => Ok(Some(number)),
            Some(other) => Err(wrong_type(key, "a number (t)", &other)),
        }
    }

    pub fn milliseconds(&mut self, key: &str, otherwise: u32) -> Result<Duration, RequestError> {
        let number = match self.0.remove(key).map(Variant::from) {
            None => otherwise,
            Some(Variant::U32(number)) => number,
            Some(other) => return Err(wrong_type(key, "milliseconds (u)", &other)),
        };
        if number > WAIT_MS_MAX {
            return Err(RequestError::InvalidArgument(format!(
                "option {key}: at most {WAIT_MS_MAX}, this is {number}"
            )));
        }
        Ok(Duration::from_millis(number.into()))
    }

    pub fn end(self) -> Result<(), RequestError> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some(key) => Err(RequestError::InvalidArgument(format!(
                "option {}: unknown to this method",
                short(&key)
            ))),
        }
    }
}

fn wrong_type(key: &str, wanted: &str, found: &Variant<'_>) -> RequestError {
    RequestError::InvalidArgument(format!(
        "option {key}: has to be {wanted}, not ({})",
        found.value_signature()
    ))
}

pub fn bounded(argument: &str, text: &str) -> Result<(), RequestError> {
    if text.len() > ARGUMENT_BYTES_MAX {
        return Err(RequestError::InvalidArgument(format!(
            "{argument}: at most {ARGUMENT_BYTES_MAX} bytes, this has {}",
            text.len()
        )));
    }
    Ok(())
}

/// The beginning of a text from outside, for a message.
pub fn short(text: &str) -> String {
    const CHARS: usize = 64;
    if text.chars().nth(CHARS).is_none() {
        return text.to_owned();
    }
    text.chars().take(CHARS).chain(['…']).collect()
}
