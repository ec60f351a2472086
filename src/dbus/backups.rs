//! The Manager's members about backups: arguments in, a [`Call`] out; backups to dictionaries. PURE.

use std::collections::BTreeMap;

use zbus::{Message, Variant};

use super::images::{cluster_bytes, preallocation};
use super::introspect::Method;
use super::manager::{WAIT_MS, export_name};
use super::options::{Given, Options, arguments, named, no_such_method, only_options};
use super::volume::text;
use super::{Call, DeleteBackup, FinishBackup};
use crate::correlation::backup_name::BackupName;
use crate::correlation::{
    Backup, BackupFiles, BeginBackup, Children, Interrupted, RemoveMode, RequestError,
};
use crate::identity::{Format, VolumeId};

/// How long `FinishBackup` waits for the backup to be complete unless told: all of it is read.
pub const FINISH_MS: u32 = 300_000;

const OPTIONS: (&str, &str) = ("options", "a{sv}");
const NAME: (&str, &str) = ("name", "s");

pub const BEGIN_BACKUP: Method = Method {
    name: "BeginBackup",
    takes: &[("context", "s"), ("disk", "u"), OPTIONS],
    gives: &[("export", "o"), NAME],
};
pub const FINISH_BACKUP: Method = Method {
    name: "FinishBackup",
    takes: &[NAME, OPTIONS],
    gives: &[("backup", "a{sv}")],
};
pub const DELETE_BACKUP: Method = Method {
    name: "DeleteBackup",
    takes: &[NAME, OPTIONS],
    gives: &[("deleted", "as")],
};
pub const LIST_BACKUPS: Method = Method {
    name: "ListBackups",
    takes: &[OPTIONS],
    gives: &[("backups", "aa{sv}")],
};

/// A backup and what goes on with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackupView {
    pub backup: Backup,
    /// While it is being finished: how much of it is read, of 1,000.
    pub verifying: Option<u32>,
    /// Backups that lie on it.
    pub children: u32,
}

/// Reads the call out of a message of one of the methods above.
///
/// # Errors
/// `InvalidArgument`, naming the argument; `NotSupported` for another method.
pub fn parse(method: &str, message: &Message) -> Result<Call, RequestError> {
    match method {
        "BeginBackup" => {
            let (context, disk, given): (String, u32, Given) = arguments(message)?;
            begin(context, disk, Options::take(given)?)
        }
        "FinishBackup" => {
            let (name, options) = named(message)?;
            finish(&name, options)
        }
        "DeleteBackup" => {
            let (name, options) = named(message)?;
            delete(&name, options)
        }
        "ListBackups" => only_options(message)?.end().map(|()| Call::Backups),
        other => Err(no_such_method(other)),
    }
}

fn finish(name: &str, mut options: Options) -> Result<Call, RequestError> {
    let name = export_name(name)?;
    let modes = [
        ("safe", RemoveMode::Safe),
        ("soft", RemoveMode::Soft),
        ("hard", RemoveMode::Hard),
    ];
    let mode = options.one_of("mode", &modes)?.unwrap_or(RemoveMode::Soft);
    let interrupted = match options.truth("interrupted")? {
        Some(true) => Interrupted::Finish,
        Some(false) | None => Interrupted::Refuse,
    };
    let wait = options.milliseconds("wait_ms", FINISH_MS)?;
    options.end()?;
    Ok(Call::FinishBackup(FinishBackup {
        name,
        mode,
        interrupted,
        wait,
    }))
}

fn delete(name: &str, mut options: Options) -> Result<Call, RequestError> {
    let name = export_name(name)?;
    let children = match options.truth("children")? {
        Some(true) => Children::Delete,
        Some(false) | None => Children::Keep,
    };
    let files = match options.truth("keep_files")? {
        Some(true) => BackupFiles::Keep,
        Some(false) | None => BackupFiles::Delete,
    };
    options.end()?;
    Ok(Call::DeleteBackup(DeleteBackup {
        name,
        children,
        files,
    }))
}

fn begin(context: String, disk: u32, mut options: Options) -> Result<Call, RequestError> {
    let parent = options.text("parent")?;
    let parent = parent.as_deref().map(export_name).transpose()?;
    let folder = options.text("folder")?;
    if let Some(folder) = &folder {
        // In the one spelling that an export's path has.
        VolumeId::of_file(
            &format!("{}/x", folder.trim_end_matches('/')),
            Format::Qcow2,
        )
        .map_err(|error| RequestError::InvalidArgument(format!("option folder: {error}")))?;
    }
    let asked = BeginBackup {
        context,
        disk,
        parent,
        size: options.number("size")?,
        at: options.number("at")?,
        folder,
        cluster_bytes: cluster_bytes(&mut options)?,
        preallocation: preallocation(&mut options)?,
        wait: options.milliseconds("wait_ms", WAIT_MS)?,
    };
    options.end()?;
    Ok(Call::BeginBackup(asked))
}

/// A backup as it goes over the bus.
pub fn dictionary(view: &BackupView) -> BTreeMap<&'static str, Variant<'_>> {
    let backup = &view.backup;
    let named = BackupName::parse(backup.name.as_str());
    let kind = named.map_or("", |name| name.kind.name());
    let state = match view.verifying {
        Some(_) => "verifying",
        None => backup.state.name(),
    };
    let progress = f64::from(view.verifying.unwrap_or(0)) / 1000.0;
    let parent = backup.parent.as_ref().map_or("", |parent| parent.as_str());
    let proof = backup.proof.as_ref();
    let sha256 = proof.map_or("", |proof| proof.sha256.as_str());
    BTreeMap::from([
        ("Name", Variant::new(text(backup.name.as_str()))),
        ("Kind", Variant::new(kind)),
        ("Path", Variant::new(text(&backup.path))),
        ("Size", Variant::new(backup.size)),
        (
            "FileSize",
            Variant::new(proof.map_or(0, |proof| proof.file_bytes)),
        ),
        ("Parent", Variant::new(text(parent))),
        ("Children", Variant::new(view.children)),
        ("State", Variant::new(state)),
        ("Progress", Variant::new(progress)),
        ("Reason", Variant::new(text(&backup.reason))),
        ("Sha256", Variant::new(text(sha256))),
        ("Begun", Variant::new(backup.begun)),
        ("Finished", Variant::new(backup.finished)),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_backup_is_finished_softly_and_never_by_hiding_its_export() {
        let with = |options: BTreeMap<&'static str, Variant<'static>>| {
            let message = Message::method_call("/org/nbdtrack1", "FinishBackup");
            parse("FinishBackup", &message.build(&("a", options)).unwrap())
        };
        let Ok(Call::FinishBackup(asked)) = with(BTreeMap::new()) else {
            panic!("refused");
        };
        assert_eq!(asked.mode, RemoveMode::Soft);
        assert_eq!(asked.interrupted, Interrupted::Refuse);
        let hide = with(BTreeMap::from([("mode", Variant::new("hide"))]));
        assert!(
            hide.unwrap_err()
                .to_string()
                .starts_with("option mode: \"hide\" is not one of")
        );
        let begun = |options: BTreeMap<&'static str, Variant<'static>>| {
            let message = Message::method_call("/org/nbdtrack1", "BeginBackup");
            parse(
                "BeginBackup",
                &message.build(&("vm", 0_u32, options)).unwrap(),
            )
        };
        let relative = begun(BTreeMap::from([("folder", Variant::new("backups"))]));
        assert!(
            relative
                .unwrap_err()
                .to_string()
                .starts_with("option folder: ")
        );
        assert!(begun(BTreeMap::from([("size", Variant::new(1_u64 << 30))])).is_ok());
    }
}
