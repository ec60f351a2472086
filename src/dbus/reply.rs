//! What a call is answered with: which method it means, the answer's message, and the refusals. EDGE only in `answer`.

use zbus::message::Flags;
use zbus::{Connection, Message};

use super::error::on_the_wire;
use super::introspect::Interface;
use super::manager::MANAGER;
use super::volume;
use crate::correlation::RequestError;

/// The longest answer. A system bus lets a message have 32 MiB (dbus-daemon(1), max_message_size) and drops a connection that
/// sends more; 20,000 objects with ordinary names need half of it.
const ANSWER_BYTES_MAX: usize = (32 << 20) - (64 << 10);

/// A refusal by full error name.
#[derive(Debug)]
pub struct Refusal {
    name: String,
    pub text: String,
}

pub type Response = Result<Message, Refusal>;

/// Finds the method that is called and compares its arguments' signature with the table.
pub fn method_of(
    interfaces: &[&'static Interface],
    wanted: Option<&str>,
    member: &str,
    message: &Message,
) -> Result<(&'static str, &'static str), Refusal> {
    let mut named = interfaces
        .iter()
        .filter(|interface| wanted.is_none_or(|wanted| wanted == interface.name))
        .peekable();
    if named.peek().is_none() {
        let text = format!("{}: not on this object", beginning(wanted.unwrap_or("")));
        return Err(standard("UnknownInterface", text));
    }
    let found = named.find_map(|interface| {
        let method = interface
            .methods
            .iter()
            .find(|method| method.name == member)?;
        Some((interface.name, method))
    });
    let Some((interface, method)) = found else {
        return Err(standard(
            "UnknownMethod",
            format!("{}: no such method", beginning(member)),
        ));
    };
    let takes: String = method
        .takes
        .iter()
        .map(|(_, signature)| *signature)
        .collect();
    let given = message.body().signature().to_string_no_parens();
    if takes != given {
        let text = format!("{member} takes ({takes}), not ({})", beginning(&given));
        return Err(if interface == MANAGER.name {
            RequestError::InvalidArgument(text).into()
        } else {
            standard("InvalidArgs", text)
        });
    }
    Ok((interface, method.name))
}

pub fn response<B: serde::Serialize + zbus::DynamicType>(message: &Message, body: &B) -> Response {
    let built = Message::method_return(&message.header())
        .build(body)
        .map_err(|error| standard("Failed", format!("the answer cannot be sent: {error}")))?;
    let length = built.data().len();
    if length > ANSWER_BYTES_MAX {
        let text = format!("the answer has {length} bytes, more than a bus takes; ask for less");
        return Err(standard("LimitsExceeded", text));
    }
    Ok(built)
}

pub async fn answer(connection: &Connection, message: &Message, response: Response) {
    let header = message.header();
    if header.primary().flags().contains(Flags::NO_REPLY_EXPECTED) {
        return;
    }
    let built = match response {
        Ok(built) => Ok(built),
        Err(refusal) => Message::error(&header, refusal.name).build(&volume::text(&refusal.text)),
    };
    let sent = match built {
        Ok(built) => connection.send(&built).await,
        Err(error) => Err(error),
    };
    if let Err(error) = sent {
        // The connection ended; so did its callers' wait.
        tracing::debug!(%error, "an answer could not be sent");
    }
}

pub fn standard(name: &str, text: String) -> Refusal {
    Refusal {
        name: format!("org.freedesktop.DBus.Error.{name}"),
        text,
    }
}

impl From<RequestError> for Refusal {
    fn from(error: RequestError) -> Refusal {
        let (name, text) = on_the_wire(&error);
        Refusal {
            name,
            text: text.to_owned(),
        }
    }
}

pub fn unreadable(error: zbus::Error) -> Refusal {
    standard("InvalidArgs", error.to_string())
}

/// The beginning of a text from outside, for a message.
pub fn beginning(text: &str) -> String {
    text.chars().take(64).collect()
}
