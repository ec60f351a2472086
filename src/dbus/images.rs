//! The Manager's members about files that are made: arguments in, a [`Call`] out. PURE.

use zbus::Message;

use super::Call;
use super::introspect::Method;
use super::manager::{WAIT_MS, export_name};
use super::options::{Given, Options, arguments, no_such_method, short};
use crate::correlation::{CreateImage, NewImage, Preallocation, RequestError};
use crate::identity::{Format, VolumeId};

pub const CREATE_IMAGE: Method = Method {
    name: "CreateImage",
    takes: &[("name", "s"), ("size", "t"), ("options", "a{sv}")],
    gives: &[("export", "o")],
};

/// Reads the call out of a message of the method above.
///
/// # Errors
/// `InvalidArgument`, naming the argument; `NotSupported` for another method.
pub fn parse(method: &str, message: &Message) -> Result<Call, RequestError> {
    match method {
        "CreateImage" => create(message),
        other => Err(no_such_method(other)),
    }
}

fn create(message: &Message) -> Result<Call, RequestError> {
    let (name, size, given): (String, u64, Given) = arguments(message)?;
    let mut options = Options::take(given)?;
    let name = export_name(&name)?;
    let path = options.text("path")?;
    let format = format(&mut options, "format")?.unwrap_or(Format::Qcow2);
    if let Some(path) = &path {
        // In the one spelling that an export's path has.
        VolumeId::of_file(path, format)
            .map_err(|error| RequestError::InvalidArgument(format!("option path: {error}")))?;
    }
    let backing = match (options.text("backing")?, format_of_backing(&mut options)?) {
        (Some(path), Some(format)) => Some((path, format)),
        (None, None) => None,
        _ => {
            return Err(RequestError::InvalidArgument(
                "options backing and backing_format: give both or none".to_owned(),
            ));
        }
    };
    let new = NewImage {
        format,
        size: (size > 0).then_some(size),
        cluster_bytes: cluster_bytes(&mut options)?,
        backing,
        preallocation: preallocation(&mut options)?,
    };
    let wait = options.milliseconds("wait_ms", WAIT_MS)?;
    options.end()?;
    Ok(Call::CreateImage(CreateImage {
        name,
        path,
        new,
        wait,
    }))
}

fn format_of_backing(options: &mut Options) -> Result<Option<Format>, RequestError> {
    format(options, "backing_format")
}

fn format(options: &mut Options, key: &str) -> Result<Option<Format>, RequestError> {
    let said = options.text(key)?;
    let told = |said: String| {
        Format::told("", Some(&said)).map_err(|error| {
            RequestError::InvalidArgument(format!("option {key}: {}", short(&error)))
        })
    };
    said.map(told).transpose()
}

pub(super) fn cluster_bytes(options: &mut Options) -> Result<Option<u32>, RequestError> {
    let asked = options.number("cluster_size")?;
    let fits = |bytes: u64| {
        u32::try_from(bytes).map_err(|_| {
            RequestError::InvalidArgument(format!(
                "option cluster_size: at most 2097152, this is {bytes}"
            ))
        })
    };
    asked.map(fits).transpose()
}

pub(super) fn preallocation(options: &mut Options) -> Result<Preallocation, RequestError> {
    let words = Preallocation::ALL.map(|one| (one.name(), one));
    let said = options.one_of("preallocation", &words)?;
    Ok(said.unwrap_or(Preallocation::Off))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use zbus::Variant;

    fn with<const N: usize>(
        size: u64,
        pairs: [(&'static str, Variant<'static>); N],
    ) -> Result<Call, RequestError> {
        let message = Message::method_call("/org/nbdtrack1", "CreateImage");
        let options: BTreeMap<&str, Variant<'_>> = pairs.into();
        parse(
            "CreateImage",
            &message.build(&("a", size, options)).unwrap(),
        )
    }

    #[test]
    fn an_image_is_qcow2_and_as_large_as_it_was_said_to_be() {
        let Ok(Call::CreateImage(asked)) = with(1 << 30, []) else {
            panic!("refused");
        };
        assert_eq!(asked.new.format, Format::Qcow2);
        assert_eq!((asked.new.size, asked.path), (Some(1 << 30), None));
        let on = [
            ("backing", Variant::new("/b.qcow2")),
            ("backing_format", Variant::new("qcow2")),
        ];
        let Ok(Call::CreateImage(asked)) = with(0, on) else {
            panic!("refused");
        };
        assert_eq!(asked.new.size, None, "as large as what it lies on");
    }

    #[test]
    fn what_cannot_be_is_refused_by_its_name() {
        let rows: [(Result<Call, RequestError>, &str); 7] = [
            (with(1, [("path", Variant::new("x"))]), "option path: "),
            (
                with(1, [("format", Variant::new("vmdk"))]),
                "option format: ",
            ),
            (
                with(1, [("backing", Variant::new("/b"))]),
                "options backing and backing_format",
            ),
            (
                with(1, [("backing_format", Variant::new("qcow2"))]),
                "options backing and",
            ),
            (
                with(1, [("cluster_size", Variant::new(1_u64 << 32))]),
                "option cluster_size: ",
            ),
            (
                with(1, [("preallocation", Variant::new("most"))]),
                "option preallocation: ",
            ),
            (with(1, [("colour", Variant::new("red"))]), "option colour"),
        ];
        for (found, wanted) in rows {
            let told = found.unwrap_err().to_string();
            assert!(told.starts_with(wanted), "{told}");
        }
    }
}
