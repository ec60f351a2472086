//! The Manager's members about what paths of nbd-server's configuration mean: arguments in, a [`Call`] out; pins to dictionaries. PURE.

use std::collections::BTreeMap;

use zbus::{Message, Variant};

use super::Call;
use super::introspect::Method;
use super::manager::{export_name, some_diskseq};
use super::options::{Given, arguments, named, no_options, no_such_method, only_options};
use super::volume::text;
use crate::correlation::{PinView, Request, RequestError};

const OPTIONS: (&str, &str) = ("options", "a{sv}");
const NAME: (&str, &str) = ("name", "s");
const DISKSEQ: (&str, &str) = ("diskseq", "t");

pub const LIST_PINS: Method = Method {
    name: "ListPins",
    takes: &[OPTIONS],
    gives: &[("pins", "aa{sv}")],
};
pub const CONFIRM_PIN: Method = Method {
    name: "ConfirmPin",
    takes: &[NAME, DISKSEQ, OPTIONS],
    gives: &[],
};
pub const REPIN: Method = Method {
    name: "Repin",
    takes: &[NAME, DISKSEQ, OPTIONS],
    gives: &[],
};
pub const UNPIN: Method = Method {
    name: "Unpin",
    takes: &[NAME, OPTIONS],
    gives: &[],
};

/// Reads the call out of a message of one of the methods above.
///
/// # Errors
/// `InvalidArgument`, naming the argument; `NotSupported` for another method.
pub fn parse(method: &str, message: &Message) -> Result<Call, RequestError> {
    match method {
        "ListPins" => {
            let mut options = only_options(message)?;
            let pending = options.truth("pending")?.unwrap_or(false);
            options.end()?;
            Ok(Call::Pins { pending })
        }
        "ConfirmPin" => pin(message, false),
        "Repin" => pin(message, true),
        "Unpin" => {
            let (name, options) = named(message)?;
            options.end()?;
            let name = export_name(&name)?;
            Ok(Call::Request(Request::Unpin { name }))
        }
        other => Err(no_such_method(other)),
    }
}

fn pin(message: &Message, anew: bool) -> Result<Call, RequestError> {
    let (name, diskseq, given): (String, u64, Given) = arguments(message)?;
    no_options(given)?;
    Ok(Call::Request(Request::Pin {
        name: export_name(&name)?,
        diskseq: some_diskseq(diskseq)?,
        anew,
    }))
}

/// Pins as they go over the bus.
pub fn pins(pins: &[PinView]) -> Vec<BTreeMap<&'static str, Variant<'_>>> {
    pins.iter()
        .map(|pin| {
            BTreeMap::from([
                ("Export", Variant::new(pin.export.as_str())),
                ("Path", Variant::new(text(&pin.path))),
                ("PinnedTo", Variant::new(text(&pin.to))),
                ("Pending", Variant::new(pin.pending)),
                ("Reason", Variant::new(text(&pin.reason))),
                ("DiskSeq", Variant::new(pin.diskseq.0)),
                ("DeviceNode", Variant::new(text(&pin.node))),
                ("Id", Variant::new(text(&pin.id))),
                ("Serial", Variant::new(text(&pin.serial))),
                ("Size", Variant::new(pin.size)),
            ])
        })
        .collect()
}
