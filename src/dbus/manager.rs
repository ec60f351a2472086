//! The Manager object: what its methods take and give. PURE: arguments in, a [`Call`] or the refusal that names the
//! argument out.

use std::time::Duration;

use zbus::Message;

use super::introspect::{Interface, Method, Signal};
use super::options::{
    Given, Options, arguments, bounded, named, no_options, no_such_method, only_options, short,
};
use super::pins;
use super::{Call, Filter};
use super::{backups, images, inquiries, mappings};
use crate::correlation::{
    Definition, DiskSeq, Ensure, ExportName, Mapping, RemoveMode, Request, RequestError, Source,
    VmDisk, VmDiskError,
};
use crate::identity::{Format, VolumeId};

/// How long `AddExport` waits for the export to serve unless told.
pub const WAIT_MS: u32 = 10_000;
/// How long a drain may take unless told.
pub const TIMEOUT_MS: u32 = 30_000;
/// How long a cut waits for the disk unless told, before the caller hears that it has not answered: the clients are gone at once.
pub const CUT_TIMEOUT_MS: u32 = 5_000;

/// The longest name of a job, in bytes: it goes into the audit trail, nowhere else.
const JOB_BYTES_MAX: usize = 128;

const NAME: (&str, &str) = ("name", "s");
const VOLUME: (&str, &str) = ("volume", "s");
const OPTIONS: (&str, &str) = ("options", "a{sv}");
const OBJECT: (&str, &str) = ("object", "o");
const ID: (&str, &str) = ("id", "s");

pub const MANAGER: Interface = Interface {
    name: "org.nbdtrack1.Manager",
    methods: &[
        Method {
            name: "AddExport",
            takes: &[NAME, OPTIONS],
            gives: &[("export", "o"), ("created", "b")],
        },
        Method {
            name: "EnsureVmExport",
            takes: &[("vm_id", "s"), ("disk", "u"), ("vm_name", "s"), OPTIONS],
            gives: &[("export", "o"), NAME, ("created", "b")],
        },
        Method {
            name: "RemoveExport",
            takes: &[NAME, OPTIONS],
            gives: &[],
        },
        Method {
            name: "PrepareDetach",
            takes: &[VOLUME, OPTIONS],
            gives: &[],
        },
        Method {
            name: "CancelDetach",
            takes: &[VOLUME, OPTIONS],
            gives: &[],
        },
        Method {
            name: "ResolveConflict",
            takes: &[NAME, ("diskseq", "t"), OPTIONS],
            gives: &[],
        },
        Method {
            name: "ResolveVolume",
            takes: &[OPTIONS],
            gives: &[("volumes", "ao")],
        },
        Method {
            name: "Rescan",
            takes: &[OPTIONS],
            gives: &[],
        },
        Method {
            name: "Reload",
            takes: &[OPTIONS],
            gives: &[("difference", "a{sv}")],
        },
        Method {
            name: "ListSessions",
            takes: &[OPTIONS],
            gives: &[("sessions", "aa{sv}")],
        },
        Method {
            name: "EndSession",
            takes: &[("session", "t"), OPTIONS],
            gives: &[],
        },
        Method {
            name: "GetStats",
            takes: &[OPTIONS],
            gives: &[("stats", "a{sv}")],
        },
        inquiries::EXPLAIN_EXPORT,
        inquiries::EXPLAIN_DISK,
        inquiries::GET_HISTORY,
        inquiries::GET_EXPORT_STATS,
        inquiries::GET_METRICS,
        pins::LIST_PINS,
        pins::CONFIRM_PIN,
        pins::REPIN,
        pins::UNPIN,
        mappings::LIST_MAPPINGS,
        mappings::PRUNE_MAPPINGS,
        images::CREATE_IMAGE,
        backups::BEGIN_BACKUP,
        backups::FINISH_BACKUP,
        backups::DELETE_BACKUP,
        backups::LIST_BACKUPS,
    ],
    signals: &[
        Signal {
            name: "VolumeAttached",
            carries: &[OBJECT, ID, ("node", "s"), ("diskseq", "t")],
        },
        Signal {
            name: "VolumeDetached",
            carries: &[OBJECT, ID, ("node", "s"), ("diskseq", "t")],
        },
        Signal {
            name: "VolumeRenamed",
            carries: &[OBJECT, ID, ("old_node", "s"), ("new_node", "s")],
        },
        Signal {
            name: "VolumeResized",
            carries: &[OBJECT, ID, ("old", "t"), ("new", "t")],
        },
        Signal {
            name: "ExportStateChanged",
            carries: &[OBJECT, NAME, ("old", "s"), ("new", "s"), ("reason", "s")],
        },
        Signal {
            name: "IdentityConflict",
            carries: &[ID, ("volumes", "ao")],
        },
        Signal {
            name: "ConfigReloaded",
            carries: &[("difference", "a{sv}")],
        },
    ],
    properties: &[],
    writable: &[],
};

/// Reads the call out of a message whose signature was compared with the table.
///
/// # Errors
/// `InvalidArgument` or `NotSupported`, naming the argument.
pub fn parse(method: &str, message: &Message) -> Result<Call, RequestError> {
    match method {
        "AddExport" => {
            let (name, options) = named(message)?;
            add_export(&name, options)
        }
        "EnsureVmExport" => {
            let (vm_id, disk, vm_name, given): (String, u32, String, Given) = arguments(message)?;
            ensure_vm_export(&vm_id, disk, &vm_name, Options::take(given)?)
        }
        "RemoveExport" => {
            let (name, options) = named(message)?;
            remove_export(&name, options)
        }
        "PrepareDetach" => {
            let (volume, options) = named(message)?;
            prepare_detach(&volume, options)
        }
        "CancelDetach" => {
            let (volume, options) = named(message)?;
            options.end()?;
            let volume = volume_id("volume", &volume)?;
            Ok(Call::Request(Request::CancelDetach { volume }))
        }
        "ResolveConflict" => {
            let (name, diskseq, given): (String, u64, Given) = arguments(message)?;
            no_options(given)?;
            let name = export_name(&name)?;
            let diskseq = some_diskseq(diskseq)?;
            Ok(Call::Request(Request::ResolveConflict { name, diskseq }))
        }
        "ResolveVolume" => resolve_volume(only_options(message)?),
        "Rescan" => only_options(message)?.end().map(|()| Call::Rescan),
        "Reload" => only_options(message)?.end().map(|()| Call::Reload),
        "ListSessions" => list_sessions(only_options(message)?),
        "EndSession" => {
            let (session, given): (u64, Given) = arguments(message)?;
            no_options(given)?;
            Ok(Call::EndSession(session))
        }
        "GetStats" => only_options(message)?.end().map(|()| Call::Stats),
        "ExplainExport" | "ExplainDisk" | "GetHistory" | "GetExportStats" | "GetMetrics" => {
            inquiries::parse(method, message)
        }
        "ListMappings" | "PruneMappings" => mappings::parse(method, message),
        "ListPins" | "ConfirmPin" | "Repin" | "Unpin" => pins::parse(method, message),
        "CreateImage" => images::parse(method, message),
        "BeginBackup" | "FinishBackup" | "DeleteBackup" | "ListBackups" => {
            backups::parse(method, message)
        }
        other => Err(no_such_method(other)),
    }
}

fn add_export(name: &str, mut options: Options) -> Result<Call, RequestError> {
    let name = export_name(name)?;
    let volume = some_volume(&mut options)?.ok_or_else(|| {
        RequestError::InvalidArgument(
            "option volume is missing: say profile:id, or option path for a file".to_owned(),
        )
    })?;
    let read_only = options.truth("read_only")?.unwrap_or(false);
    let share = options.truth("share")?.unwrap_or(false);
    let direct = options.truth("direct")?.unwrap_or(false);
    let wait = options.milliseconds("wait_ms", WAIT_MS)?;
    options.end()?;
    let definition = Definition {
        name,
        volume,
        read_only,
        share,
        direct,
        source: Source::Dbus,
    };
    Ok(Call::Request(Request::AddExport { definition, wait }))
}

/// The volume that the options name, as itself or by the path of a file.
fn some_volume(options: &mut Options) -> Result<Option<VolumeId>, RequestError> {
    let volume =
        match (options.text("volume")?, options.text("path")?) {
            (Some(volume), None) => Some(volume_id("option volume", &volume)?),
            (None, Some(path)) => {
                let said = options.text("format")?;
                let format = Format::told(&path, said.as_deref()).map_err(|error| {
                    RequestError::InvalidArgument(format!("option format: {}", short(&error)))
                })?;
                let volume = VolumeId::of_file(&path, format);
                Some(volume.map_err(|error| {
                    RequestError::InvalidArgument(format!("option path: {error}"))
                })?)
            }
            (Some(_), Some(_)) => {
                return Err(RequestError::InvalidArgument(
                    "options volume and path: give one of them".to_owned(),
                ));
            }
            (None, None) => None,
        };
    if let Some(format) = options.text("format")?
        && format != "raw"
    {
        return Err(RequestError::InvalidArgument(format!(
            "option format: {} is of a file: say path, not volume",
            short(&format)
        )));
    }
    Ok(volume)
}

fn ensure_vm_export(
    vm_id: &str,
    disk: u32,
    vm_name: &str,
    mut options: Options,
) -> Result<Call, RequestError> {
    let unfit = |error: VmDiskError| RequestError::InvalidArgument(error.to_string());
    let disk = VmDisk::new(vm_id, disk).map_err(unfit)?;
    let mapping = Mapping::new(disk.clone(), vm_name).map_err(unfit)?;
    let volume = some_volume(&mut options)?;
    let diskseq = options.number("diskseq")?.map(some_diskseq).transpose()?;
    let read_only = options.truth("read_only")?;
    let share = options.truth("share")?;
    let moves = options.truth("move")?.unwrap_or(false);
    let job = options.text("job")?.unwrap_or_default();
    let wait = options.milliseconds("wait_ms", WAIT_MS)?;
    options.end()?;
    if job.len() > JOB_BYTES_MAX || job.chars().any(char::is_control) {
        return Err(RequestError::InvalidArgument(format!(
            "option job: at most {JOB_BYTES_MAX} bytes without control characters"
        )));
    }
    Ok(Call::Request(Request::EnsureVmExport(Ensure {
        disk,
        mapping,
        volume,
        diskseq,
        read_only,
        share,
        moves,
        job,
        wait,
    })))
}

fn remove_export(name: &str, mut options: Options) -> Result<Call, RequestError> {
    let name = export_name(name)?;
    let modes = [
        ("safe", RemoveMode::Safe),
        ("hide", RemoveMode::Hide),
        ("soft", RemoveMode::Soft),
        ("hard", RemoveMode::Hard),
    ];
    let mode = options.one_of("mode", &modes)?.unwrap_or(RemoveMode::Soft);
    let within = within(&mut options, mode == RemoveMode::Hard)?;
    options.end()?;
    Ok(Call::Request(Request::RemoveExport { name, mode, within }))
}

fn list_sessions(mut options: Options) -> Result<Call, RequestError> {
    let export = options.text("export")?;
    options.end()?;
    let export = export.as_deref().map(export_name).transpose()?;
    Ok(Call::Sessions(export))
}

/// The caller's deadline for a drain, or for a cut.
fn within(options: &mut Options, hard: bool) -> Result<Duration, RequestError> {
    let otherwise = if hard { CUT_TIMEOUT_MS } else { TIMEOUT_MS };
    options.milliseconds("timeout_ms", otherwise)
}

fn prepare_detach(volume: &str, mut options: Options) -> Result<Call, RequestError> {
    let volume = volume_id("volume", volume)?;
    let hard = options.truth("hard")?.unwrap_or(false);
    let within = within(&mut options, hard)?;
    options.end()?;
    Ok(Call::Request(Request::PrepareDetach {
        volume,
        hard,
        within,
    }))
}

fn resolve_volume(mut options: Options) -> Result<Call, RequestError> {
    let volume = options.text("volume")?;
    let filter = Filter {
        volume: volume
            .map(|text| volume_id("option volume", &text))
            .transpose()?,
        serial: options.text("serial")?,
        wwid: options.text("wwid")?,
        node: options.text("node")?,
        diskseq: options.number("diskseq")?.map(some_diskseq).transpose()?,
    };
    options.end()?;
    Ok(Call::ResolveVolume(filter))
}

pub(super) fn export_name(text: &str) -> Result<ExportName, RequestError> {
    ExportName::parse(text).map_err(|error| RequestError::InvalidArgument(format!("name: {error}")))
}

fn volume_id(argument: &str, text: &str) -> Result<VolumeId, RequestError> {
    bounded(argument, text)?;
    VolumeId::parse(text)
        .map_err(|error| RequestError::InvalidArgument(format!("{argument}: {error}")))
}

pub(super) fn some_diskseq(number: u64) -> Result<DiskSeq, RequestError> {
    if number == 0 {
        return Err(RequestError::InvalidArgument(
            "diskseq: 0 is no disk; the volumes' DiskSeq says which there are".to_owned(),
        ));
    }
    Ok(DiskSeq(number))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::Subject;
    use super::*;
    use zbus::Variant;

    fn with<B: serde::Serialize + zbus::DynamicType>(
        method: &str,
        body: &B,
    ) -> Result<Call, RequestError> {
        let message = Message::method_call("/org/nbdtrack1", method);
        parse(method, &message.build(body).unwrap())
    }

    fn options<const N: usize>(
        pairs: [(&'static str, Variant<'static>); N],
    ) -> BTreeMap<&'static str, Variant<'static>> {
        pairs.into()
    }

    fn refusal(result: Result<Call, RequestError>) -> String {
        match result {
            Err(error) => format!("{}: {error}", super::super::error::parts(&error).0),
            Ok(call) => panic!("accepted: {call:?}"),
        }
    }

    /// The method that asks for this.
    fn method_of(call: &Call) -> &'static str {
        match call {
            Call::Request(request) => match request {
                Request::AddExport { .. } => "AddExport",
                Request::EnsureVmExport(_) => "EnsureVmExport",
                Request::RemoveExport { .. } => "RemoveExport",
                Request::PrepareDetach { .. } => "PrepareDetach",
                Request::CancelDetach { .. } => "CancelDetach",
                Request::ResolveConflict { .. } => "ResolveConflict",
                Request::Pin { anew: false, .. } => "ConfirmPin",
                Request::Pin { anew: true, .. } => "Repin",
                Request::Unpin { .. } => "Unpin",
            },
            Call::ResolveVolume(_) => "ResolveVolume",
            Call::Rescan => "Rescan",
            Call::Reload => "Reload",
            Call::Sessions(_) => "ListSessions",
            Call::EndSession(_) => "EndSession",
            Call::Stats => "GetStats",
            Call::Explain(Subject::Export(_)) => "ExplainExport",
            Call::Explain(Subject::Disk(_)) => "ExplainDisk",
            Call::History(_) => "GetHistory",
            Call::Measures => "GetExportStats",
            Call::Metrics => "GetMetrics",
            Call::Pins { .. } => "ListPins",
            Call::Mappings => "ListMappings",
            Call::PruneMappings { .. } => "PruneMappings",
            Call::CreateImage(_) => "CreateImage",
            Call::BeginBackup(_) => "BeginBackup",
            Call::FinishBackup(_) => "FinishBackup",
            Call::DeleteBackup(_) => "DeleteBackup",
            Call::Backups => "ListBackups",
            Call::SetLogLevel(_) => "Set",
        }
    }

    /// A message of this method, well formed but for these options.
    fn message(method: &Method, more: &[(&'static str, Variant<'static>)]) -> Message {
        let signature: String = method.takes.iter().map(|(_, of)| *of).collect();
        let mut said = match method.name {
            "AddExport" => options([("volume", Variant::new("loop:/x"))]),
            _ => options([]),
        };
        said.extend(more.iter().cloned());
        let to = Message::method_call("/org/nbdtrack1", method.name);
        let built = match signature.as_str() {
            "a{sv}" => to.build(&said),
            "sa{sv}" => to.build(&("loop:/x", said)),
            "ta{sv}" => to.build(&(7_u64, said)),
            "sta{sv}" => to.build(&("a", 7_u64, said)),
            "sua{sv}" => to.build(&("a", 0_u32, said)),
            "susa{sv}" => to.build(&("a", 0_u32, "", said)),
            other => panic!("{}: no example of {other}", method.name),
        };
        built.unwrap()
    }

    /// What a reader took for the last of its methods was whatever it did not know: to cancel a detach, to finish a backup, to pin.
    #[test]
    fn each_reader_takes_a_message_for_the_call_of_its_name_or_for_none() {
        type Reader = fn(&str, &Message) -> Result<Call, RequestError>;
        let parts: [Reader; 5] = [
            inquiries::parse,
            mappings::parse,
            pins::parse,
            images::parse,
            backups::parse,
        ];
        for method in MANAGER.methods {
            let message = message(method, &[]);
            let call =
                parse(method.name, &message).unwrap_or_else(|e| panic!("{}: {e}", method.name));
            assert_eq!(method_of(&call), method.name);
            for (index, part) in parts.iter().enumerate() {
                match part(method.name, &message) {
                    Ok(call) => assert_eq!(method_of(&call), method.name),
                    Err(RequestError::NotSupported(_)) => {}
                    Err(error) => panic!("{} by reader {index}: {error}", method.name),
                }
                let unknown = part("NoSuchMethod", &message);
                assert!(
                    matches!(unknown, Err(RequestError::NotSupported(_))),
                    "reader {index}, with the arguments of {}: {unknown:?}",
                    method.name
                );
            }
            let unknown = parse("NoSuchMethod", &message);
            assert!(matches!(unknown, Err(RequestError::NotSupported(_))));
        }
    }

    /// The options that the XML file tells callers of, each as its method and its name.
    fn told_options() -> Vec<(&'static str, &'static str)> {
        let xml = include_str!("../../dbus/org.nbdtrack1.Manager.xml");
        let mut told = Vec::new();
        for of_method in xml.split("<method name=\"").skip(1) {
            let (method, rest) = of_method.split_once('"').unwrap();
            let (before, _) = rest
                .split_once("An unknown key is refused by name.")
                .unwrap();
            let (_, says) = before.rsplit_once("value=\"").unwrap();
            for signature in [" (s)", " (b)", " (u)", " (t)"] {
                let heads = says.split_inclusive(signature);
                let heads = heads.filter_map(|head| head.strip_suffix(signature));
                told.extend(heads.map(|head| (method, head.rsplit(' ').next().unwrap())));
            }
        }
        told
    }

    #[test]
    fn every_method_refuses_an_option_that_it_does_not_have_by_its_name() {
        for method in MANAGER.methods {
            let stranger = [("no_such_option", Variant::new(true))];
            let refused = refusal(parse(method.name, &message(method, &stranger)));
            assert!(
                refused.starts_with("InvalidArgument: option no_such_option: unknown"),
                "{}: {refused}",
                method.name
            );
        }
    }

    /// No option is a floating-point number: so each is known, and refused by its name when it is of another type.
    #[test]
    fn every_option_that_callers_are_told_of_is_known_and_has_a_type() {
        let told = told_options();
        assert!(told.len() > 40, "{told:?}");
        for (method, option) in told {
            let of_name = |of: &&Method| of.name == method;
            let method = MANAGER.methods.iter().find(of_name).unwrap();
            let wrong = [(option, Variant::new(1.5_f64))];
            let refused = refusal(parse(method.name, &message(method, &wrong)));
            assert!(
                refused.starts_with(&format!("InvalidArgument: option {option}: has to be")),
                "{}: {refused}",
                method.name
            );
        }
    }

    #[test]
    fn add_export_has_defaults() {
        let body = ("a", options([("volume", Variant::new("loop:/x"))]));
        let Ok(Call::Request(Request::AddExport { definition, wait })) = with("AddExport", &body)
        else {
            panic!("refused");
        };
        assert_eq!(wait, Duration::from_secs(10));
        assert!(!definition.read_only && !definition.share);
        assert_eq!(definition.source, Source::Dbus);
    }

    #[test]
    fn a_vm_disk_is_ensured_with_what_was_said_and_nothing_else() {
        let ensure = |vm_id: &str, disk: u32, vm_name: &str, options| {
            with("EnsureVmExport", &(vm_id, disk, vm_name, options))
        };
        let Ok(Call::Request(Request::EnsureVmExport(said))) =
            ensure("4205784a", 2, "web 1", options([]))
        else {
            panic!("refused");
        };
        assert_eq!(said.disk.export().as_str(), "migration-vm-4205784a-disk2");
        assert_eq!(said.wait, Duration::from_secs(10));
        assert_eq!(
            (said.volume, said.read_only, said.share, said.moves),
            (None, None, None, false)
        );
        for (result, wanted) in [
            (
                ensure("a b", 0, "", options([])),
                "InvalidArgument: vm_id: ' '",
            ),
            (
                ensure("a", 65_536, "", options([])),
                "InvalidArgument: disk: at most",
            ),
            (
                ensure("a", 0, "x\n", options([])),
                "InvalidArgument: vm_name",
            ),
            (
                ensure(
                    "a",
                    0,
                    "",
                    options([("job", Variant::new("j".repeat(129)))]),
                ),
                "InvalidArgument: option job",
            ),
            (
                ensure("a", 0, "", options([("move", Variant::new("yes"))])),
                "InvalidArgument: option move",
            ),
        ] {
            let found = refusal(result);
            assert!(found.starts_with(wanted), "{found} is not {wanted}");
        }
    }

    #[test]
    fn the_longest_path_that_linux_has_names_a_volume() {
        let volume = format!("loop:/{}", "x".repeat(4094));
        let body = ("a", options([("volume", Variant::new(volume.clone()))]));
        assert!(with("AddExport", &body).is_ok());
        assert!(with("CancelDetach", &(volume.as_str(), options([]))).is_ok());
    }

    #[test]
    fn refusals_name_the_option() {
        let v = || ("volume", Variant::new("loop:/x"));
        let cases: Vec<(Result<Call, RequestError>, &str)> = vec![
            (
                with(
                    "AddExport",
                    &("a", options([v(), ("colour", Variant::new("red"))])),
                ),
                "InvalidArgument: option colour",
            ),
            (
                with(
                    "AddExport",
                    &("a", options([("volume", Variant::new(7_u32))])),
                ),
                "InvalidArgument: option volume: has to be a string",
            ),
            (
                with(
                    "AddExport",
                    &("a", options([v(), ("wait_ms", Variant::new(600_001_u32))])),
                ),
                "InvalidArgument: option wait_ms",
            ),
            (
                with(
                    "AddExport",
                    &("a", options([v(), ("wait_ms", Variant::new("1"))])),
                ),
                "InvalidArgument: option wait_ms",
            ),
            (
                with(
                    "AddExport",
                    &("a", options([v(), ("read_only", Variant::new(1_u32))])),
                ),
                "InvalidArgument: option read_only",
            ),
            (
                with(
                    "AddExport",
                    &("a", options([("path", Variant::new("x.raw"))])),
                ),
                "InvalidArgument: option path: ",
            ),
            (
                with(
                    "AddExport",
                    &("a", options([v(), ("path", Variant::new("/x.raw"))])),
                ),
                "InvalidArgument: options volume and path",
            ),
            (
                with(
                    "AddExport",
                    &("a", options([v(), ("format", Variant::new("qcow2"))])),
                ),
                "InvalidArgument: option format: qcow2 is of a file",
            ),
            (
                with(
                    "AddExport",
                    &("a", options([("path", Variant::new("/x.qcow2"))])),
                ),
                "InvalidArgument: option format: say \"qcow2\", or \"raw\"",
            ),
            (
                with("AddExport", &("a", options([]))),
                "InvalidArgument: option volume is missing",
            ),
            (
                with("AddExport", &("", options([v()]))),
                "InvalidArgument: name",
            ),
            (
                with("AddExport", &("n".repeat(1 << 20), options([v()]))),
                "InvalidArgument: name",
            ),
            (
                with(
                    "PrepareDetach",
                    &(format!("loop:/{}", "x".repeat(4112)), options([])),
                ),
                "InvalidArgument: volume: at most 4112 bytes",
            ),
            (
                with(
                    "RemoveExport",
                    &("a", options([("mode", Variant::new("fast"))])),
                ),
                "InvalidArgument: option mode: \"fast\" is not one of safe, hide, soft, hard",
            ),
            (
                with("ListSessions", &options([("export", Variant::new(""))])),
                "InvalidArgument: name",
            ),
            (
                with("Reload", &options([("force", Variant::new(true))])),
                "InvalidArgument: option force",
            ),
            (
                with("ResolveConflict", &("a", 0_u64, options([]))),
                "InvalidArgument: diskseq",
            ),
            (
                with(
                    "ResolveVolume",
                    &options([("diskseq", Variant::new(7_u32))]),
                ),
                "InvalidArgument: option diskseq",
            ),
            (
                with("Rescan", &options([("force", Variant::new(true))])),
                "InvalidArgument: option force",
            ),
        ];
        for (result, wanted) in cases {
            let found = refusal(result);
            assert!(found.starts_with(wanted), "{found} is not {wanted}");
            assert!(found.len() < 300, "{found}");
        }
    }
}
