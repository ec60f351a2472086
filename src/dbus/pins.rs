//! The Manager's members about what paths of nbd-server's configuration mean: arguments in, a [`Call`] out; pins to dictionaries. PURE.

use std::collections::BTreeMap;

use zbus::{Message, OwnedVariant, Variant};

use super::Call;
use super::introspect::Method;
use super::manager::{export_name, some_diskseq};
use super::options::Options;
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
/// `InvalidArgument`, naming the argument.
pub fn parse(method: &str, message: &Message) -> Result<Call, RequestError> {
    let body = message.body();
    let unreadable =
        |error: zbus::Error| RequestError::InvalidArgument(format!("arguments: {error}"));
    if method == LIST_PINS.name {
        let options: BTreeMap<String, OwnedVariant> = body.deserialize().map_err(unreadable)?;
        let mut options = Options::take(options)?;
        let pending = options.truth("pending")?.unwrap_or(false);
        options.end()?;
        return Ok(Call::Pins { pending });
    }
    if method == UNPIN.name {
        let (named, options): (&str, BTreeMap<String, OwnedVariant>) =
            body.deserialize().map_err(unreadable)?;
        Options::take(options)?.end()?;
        let name = export_name(named)?;
        return Ok(Call::Request(Request::Unpin { name }));
    }
    let (named, diskseq, options): (&str, u64, BTreeMap<String, OwnedVariant>) =
        body.deserialize().map_err(unreadable)?;
    Options::take(options)?.end()?;
    Ok(Call::Request(Request::Pin {
        name: export_name(named)?,
        diskseq: some_diskseq(diskseq)?,
        anew: method == REPIN.name,
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
