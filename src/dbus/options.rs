//! The arguments of a call out of its message, its options, and the limits of both. PURE.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::de::DeserializeOwned;
use zbus::{Message, OwnedVariant, Type, Variant};

use crate::correlation::RequestError;
use crate::identity::VOLUME_ID_BYTES_MAX;

/// The longest argument that names something, in bytes: a volume is the longest.
const ARGUMENT_BYTES_MAX: usize = VOLUME_ID_BYTES_MAX;
/// The longest time that a caller may ask for.
pub const WAIT_MS_MAX: u32 = 600_000;
/// More options than any method has.
const OPTIONS_MAX: usize = 32;

/// The dictionary at the end of a call's arguments.
pub type Given = BTreeMap<String, OwnedVariant>;

/// Reads the arguments of a message whose signature was compared with the table of its interface.
///
/// # Errors
/// `InvalidArgument`: what is in the message is not of that signature after all.
pub fn arguments<T: DeserializeOwned + Type>(message: &Message) -> Result<T, RequestError> {
    let body = message.body();
    let read = body.deserialize();
    read.map_err(|error| RequestError::InvalidArgument(format!("arguments: {error}")))
}

/// Reads the one argument of a call that takes a dictionary of options and nothing else.
///
/// # Errors
/// `InvalidArgument`, as [`arguments`] and [`Options::take`].
pub fn only_options(message: &Message) -> Result<Options, RequestError> {
    Options::take(arguments(message)?)
}

/// Reads the arguments of a call that takes a name and a dictionary of options.
///
/// # Errors
/// `InvalidArgument`, as [`arguments`] and [`Options::take`].
pub fn named(message: &Message) -> Result<(String, Options), RequestError> {
    let (name, given): (String, Given) = arguments(message)?;
    Ok((name, Options::take(given)?))
}

/// Holds that a call of a method without options was given none.
///
/// # Errors
/// `InvalidArgument`, naming the first.
pub fn no_options(given: Given) -> Result<(), RequestError> {
    Options::take(given)?.end()
}

/// The refusal of a method that the reader of a message does not know: no call is carried out in its place.
pub fn no_such_method(method: &str) -> RequestError {
    RequestError::NotSupported(format!("{} does not exist", short(method)))
}

/// What one of several words stands for.
///
/// # Errors
/// `InvalidArgument`, with the words that there are.
pub fn one_of<T: Copy>(argument: &str, said: &str, words: &[(&str, T)]) -> Result<T, RequestError> {
    let found = words.iter().find(|(word, _)| *word == said);
    found.map(|(_, meaning)| *meaning).ok_or_else(|| {
        let words: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        RequestError::InvalidArgument(format!(
            "{argument}: {:?} is not one of {}",
            short(said),
            words.join(", ")
        ))
    })
}

/// The options of a call: each is taken once, and what is left at the end is refused by name.
pub struct Options(Given);

impl Options {
    pub fn take(given: Given) -> Result<Options, RequestError> {
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

    /// One of these words, as what it stands for.
    pub fn one_of<T: Copy>(
        &mut self,
        key: &str,
        words: &[(&str, T)],
    ) -> Result<Option<T>, RequestError> {
        let said = self.text(key)?;
        said.map(|said| one_of(&format!("option {key}"), &said, words))
            .transpose()
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
