//! Backups: which there are, what each lies on, and what may become of one. PURE.
//!
//! ```text
//!   begin ──> writing ──finish, checked──> complete ──delete──> gone
//!                │ ├────finish, damaged──> failed ─────delete──> gone
//!                │ └────its last flush failed──┘
//!                └─the daemon ended──> interrupted ──finish, when told to take it──> complete
//! ```
//! Only a complete one can be a parent, and a complete one is not written any more, by any export.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use super::backup_calls::{BeginBackup, Children, Interrupted};
use super::facts::{DiskSeq, ExportName};
use super::messages::Request;
use super::new_image::{NewImage, file_in};
use super::request_error::RequestError;
use crate::identity::Format;

/// Virtual bytes of a backup, 64 TiB: it is read to its end when it is finished, and what was never written takes as long as what was.
const SIZE_MAX: u64 = 64 << 40;

/// How far a backup has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BackupState {
    /// Its export is there, or was, and it is not finished.
    Writing,
    /// The daemon ended while it was written: something that a client wrote may be lost.
    Interrupted,
    Complete,
    /// It was found to be damaged when it was finished, or something that was written into it is lost.
    Failed,
}

impl BackupState {
    pub const ALL: [BackupState; 4] = [
        BackupState::Writing,
        BackupState::Interrupted,
        BackupState::Complete,
        BackupState::Failed,
    ];

    pub fn name(self) -> &'static str {
        match self {
            BackupState::Writing => "writing",
            BackupState::Interrupted => "interrupted",
            BackupState::Complete => "complete",
            BackupState::Failed => "failed",
        }
    }
}

/// One backup. Its file is a QCOW2 image; its name is its export's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Backup {
    pub name: ExportName,
    /// Absolute.
    pub path: String,
    /// Virtual, in bytes.
    pub size: u64,
    pub parent: Option<ExportName>,
    pub state: BackupState,
    /// Why it is failed or interrupted.
    pub reason: String,
    /// Seconds since 1970; 0 for not yet.
    pub begun: u64,
    pub finished: u64,
    /// Of a complete one.
    pub proof: Option<Proof>,
    /// The file that this daemon made for it. In no row: after a restart an unfinished one is interrupted, and is finished on the word of who asks.
    pub made: Option<Inode>,
}

/// A file by its inode, whatever number its file system has at the moment: that can be another after each mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    pub number: u64,
    /// Nanoseconds since 1970; 0 where its file system does not keep it.
    pub born_ns: u128,
}

/// A file that is a complete backup, which stays as it was finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CompleteBackup {
    /// As it was asked for.
    pub path: String,
    pub name: ExportName,
    /// The backups that lie on it.
    pub children: Vec<ExportName>,
}

impl std::error::Error for CompleteBackup {}

impl fmt::Display for CompleteBackup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} is the complete backup {}", self.path, self.name)?;
        for (at, child) in self.children.iter().enumerate() {
            let before = if at == 0 { ", and " } else { ", " };
            write!(f, "{before}{child}")?;
        }
        if !self.children.is_empty() {
            write!(f, " lie on it")?;
        }
        write!(
            f,
            ": it is exported with read_only ('nbdtrack add --read-only'), or deleted"
        )
    }
}

/// A file that is a backup which is not complete: nothing can lie on it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("backing: {path} is backup {name}, which is {}", .state.name())]
pub struct UnfinishedBackup {
    /// As it was asked for.
    pub path: String,
    pub name: ExportName,
    pub state: BackupState,
}

/// What a complete backup was when it was finished.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proof {
    /// SHA-256 in hexadecimal, over all that the image reads as, from its first byte to its last.
    pub sha256: String,
    pub file_bytes: u64,
    /// Of the file, in nanoseconds since 1970.
    pub modified_ns: u64,
    /// Of the file, read as raw bytes and as an image.
    pub incarnations: [DiskSeq; 2],
}

/// A change of what is kept of backups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BackupChange {
    Put(Box<Backup>),
    Delete(ExportName),
    /// An image that lies on another file is being made at this absolute path. From now on it may be there, and no export's.
    BeginImage(String),
    /// An export has it, or it was not made.
    EndImage(String),
}

impl Backup {
    /// This one as failed, for that reason.
    pub fn failed(self, reason: String) -> Backup {
        Backup {
            state: BackupState::Failed,
            reason,
            proof: None,
            ..self
        }
    }
}

/// All backups, and what may lie on them that no export has.
#[derive(Debug, Default)]
pub struct Backups {
    rows: BTreeMap<ExportName, Backup>,
    begun_images: BTreeSet<String>,
}

impl Backups {
    pub fn new(backups: Vec<Backup>, begun_images: BTreeSet<String>) -> Backups {
        let named = |backup: Backup| (backup.name.clone(), backup);
        Backups {
            rows: backups.into_iter().map(named).collect(),
            begun_images,
        }
    }

    pub fn all(&self) -> impl Iterator<Item = &Backup> {
        self.rows.values()
    }

    pub fn get(&self, name: &ExportName) -> Option<&Backup> {
        self.rows.get(name)
    }

    /// The absolute paths of images that are being made on another file, or were when a daemon ended.
    pub fn begun_images(&self) -> &BTreeSet<String> {
        &self.begun_images
    }

    /// Takes over what was kept.
    pub fn take(&mut self, change: BackupChange) {
        match change {
            BackupChange::Put(backup) => {
                self.rows.insert(backup.name.clone(), *backup);
            }
            BackupChange::Delete(name) => {
                self.rows.remove(&name);
            }
            BackupChange::BeginImage(path) => {
                self.begun_images.insert(path);
            }
            BackupChange::EndImage(path) => {
                self.begun_images.remove(&path);
            }
        }
    }

    /// The backups that lie on this one.
    pub fn children(&self, name: &ExportName) -> impl Iterator<Item = &Backup> {
        let name = name.clone();
        self.all()
            .filter(move |backup| backup.parent.as_ref() == Some(&name))
    }

    /// The one itself and all that it lies on, the topmost first.
    pub fn lineage(&self, name: &ExportName) -> Vec<Backup> {
        let mut found: Vec<Backup> = Vec::new();
        let mut next = self.get(name);
        while let Some(backup) = next
            && found.iter().all(|known| known.name != backup.name)
        {
            found.push(backup.clone());
            next = backup.parent.as_ref().and_then(|parent| self.get(parent));
        }
        found
    }

    /// A new one, and its file; `now` in seconds since 1970, `root` the first folder that files may be served from.
    ///
    /// # Errors
    /// Names the argument that cannot be, or the parent that is not complete.
    pub fn begin(
        &self,
        asked: &BeginBackup,
        now: u64,
        root: Option<&str>,
    ) -> Result<(Backup, NewImage), RequestError> {
        let invalid = RequestError::InvalidArgument;
        let parent = asked
            .parent
            .as_ref()
            .map(|name| self.complete(name))
            .transpose()?;
        let name = asked.name(now)?;
        if self.rows.contains_key(&name) {
            return Err(RequestError::AlreadyExists(format!(
                "there is a backup {name} already"
            )));
        }
        let parents_folder = parent.and_then(|parent| Some(parent.path.rsplit_once('/')?.0));
        let folder = asked.folder.as_deref().or(parents_folder).or(root);
        let folder = folder.ok_or_else(|| {
            invalid("option folder: say one; file_roots in [server] has no folder".to_owned())
        })?;
        let path = file_in(folder, name.as_str(), Format::Qcow2)
            .ok_or_else(|| invalid("context: the name is no file's".to_owned()))?;
        let size = asked.size.or(parent.map(|parent| parent.size));
        let size = size.ok_or_else(|| {
            invalid(
                "option size: say it, in bytes; only an incremental backup has one without"
                    .to_owned(),
            )
        })?;
        if size > SIZE_MAX {
            return Err(invalid(format!(
                "option size: {size} bytes are more than a backup has, which is read to its end: {SIZE_MAX} at most"
            )));
        }
        let backing = parent.map(|parent| (beside(folder, &parent.path), Format::Qcow2));
        let new = NewImage {
            format: Format::Qcow2,
            size: Some(size),
            cluster_bytes: asked.cluster_bytes,
            backing,
            preallocation: asked.preallocation,
        };
        let backup = Backup {
            name,
            path,
            size,
            parent: asked.parent.clone(),
            state: BackupState::Writing,
            reason: String::new(),
            begun: now,
            finished: 0,
            proof: None,
            made: None,
        };
        Ok((backup, new))
    }

    fn complete(&self, name: &ExportName) -> Result<&Backup, RequestError> {
        let backup = self.known(name)?;
        if backup.state == BackupState::Complete {
            return Ok(backup);
        }
        Err(RequestError::InvalidArgument(format!(
            "parent: backup {name} is {}, and only a complete one can be a parent",
            backup.state.name()
        )))
    }

    fn known(&self, name: &ExportName) -> Result<&Backup, RequestError> {
        let none = || RequestError::NotFound(format!("there is no backup {name}"));
        self.get(name).ok_or_else(none)
    }

    /// The one that is to be finished, or is so already.
    ///
    /// # Errors
    /// There is none, or it cannot be complete any more.
    pub fn finish(
        &self,
        name: &ExportName,
        interrupted: Interrupted,
    ) -> Result<&Backup, RequestError> {
        let backup = self.known(name)?;
        match backup.state {
            BackupState::Writing | BackupState::Complete => Ok(backup),
            BackupState::Interrupted if interrupted == Interrupted::Finish => Ok(backup),
            BackupState::Interrupted => Err(RequestError::Failed(format!(
                "backup {name} was interrupted, and something that a client wrote may be lost: write it again and finish it with interrupted, or delete it"
            ))),
            BackupState::Failed => Err(RequestError::Failed(format!(
                "backup {name} is failed: {}; delete it",
                backup.reason
            ))),
        }
    }

    /// The last flush of an export failed: the unfinished backup that it was of, by its name or its file, has failed. What is lost may read
    /// well from the page cache, and the kernel has told it once.
    pub fn spoiled(&self, export: &ExportName, file: Option<&str>, why: &str) -> Option<Backup> {
        let unfinished = |backup: &&Backup| {
            let state = backup.state;
            let it = backup.name == *export || file == Some(&backup.path);
            it && matches!(state, BackupState::Writing | BackupState::Interrupted)
        };
        self.all().find(unfinished).map(|backup| Backup {
            state: BackupState::Failed,
            reason: format!("the last flush of export {export} failed: {why}"),
            ..backup.clone()
        })
    }

    /// The ones to delete, each before what it lies on.
    ///
    /// # Errors
    /// There is none, or others lie on it that stay.
    pub fn delete(
        &self,
        name: &ExportName,
        children: Children,
    ) -> Result<Vec<Backup>, RequestError> {
        let first = self.known(name)?;
        let mut found = vec![first.clone()];
        let mut seen = BTreeSet::from([name.clone()]);
        let mut next = 0;
        while next < found.len() {
            for child in self.children(&found[next].name.clone()) {
                if seen.insert(child.name.clone()) {
                    found.push(child.clone());
                }
            }
            next += 1;
        }
        if found.len() > 1 && children == Children::Keep {
            let names: Vec<&str> = found[1..].iter().map(|b| b.name.as_str()).collect();
            return Err(RequestError::InUse(format!(
                "{} lie on {name} and would be lost with it; 'nbdtrack backup delete --children' deletes all of them",
                names.join(", ")
            )));
        }
        found.reverse();
        Ok(found)
    }

    /// Refuses to have a complete backup written: the file under `path`, or the one that is this incarnation.
    ///
    /// # Errors
    /// Says whose backup it is.
    pub fn may_be_written(&self, path: &str, file: Option<DiskSeq>) -> Result<(), CompleteBackup> {
        let is = |backup: &&Backup| {
            let same = |proof: &Proof| file.is_some_and(|file| proof.incarnations.contains(&file));
            backup.state == BackupState::Complete
                && (backup.path == path || backup.proof.as_ref().is_some_and(same))
        };
        let Some(backup) = self.all().find(is) else {
            return Ok(());
        };
        let children = self.children(&backup.name);
        Err(CompleteBackup {
            path: path.to_owned(),
            name: backup.name.clone(),
            children: children.map(|child| child.name.clone()).collect(),
        })
    }

    /// The files of all complete ones.
    pub fn complete_paths(&self) -> Vec<String> {
        let complete = |backup: &&Backup| backup.state == BackupState::Complete;
        self.all()
            .filter(complete)
            .map(|backup| backup.path.clone())
            .collect()
    }

    /// Refuses a request that would have a complete backup written.
    ///
    /// # Errors
    /// Says whose backup it is.
    pub fn permit(&self, what: &Request) -> Result<(), CompleteBackup> {
        let Request::AddExport { definition, .. } = what else {
            return Ok(());
        };
        match definition.volume.file() {
            Some(path) if !definition.read_only => self.may_be_written(path, None),
            _ => Ok(()),
        }
    }

    /// Refuses a backing file that is an unfinished backup.
    ///
    /// # Errors
    /// Says which.
    pub fn may_lie_beneath(&self, path: &str) -> Result<(), UnfinishedBackup> {
        let unfinished =
            |backup: &&Backup| backup.path == path && backup.state != BackupState::Complete;
        match self.all().find(unfinished) {
            None => Ok(()),
            Some(backup) => Err(UnfinishedBackup {
                path: path.to_owned(),
                name: backup.name.clone(),
                state: backup.state,
            }),
        }
    }
}

/// How a file in `folder` names another: by its last part where they lie side by side, so that both can be moved together.
fn beside(folder: &str, path: &str) -> String {
    match path.rsplit_once('/') {
        Some((other, name)) if other == folder.trim_end_matches('/') => name.to_owned(),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::correlation::Preallocation;

    fn asked(parent: Option<&str>) -> BeginBackup {
        BeginBackup {
            context: "vm7".to_owned(),
            disk: 0,
            parent: parent.map(|name| ExportName::parse(name).unwrap()),
            size: parent.is_none().then_some(1 << 20),
            at: None,
            folder: None,
            cluster_bytes: None,
            preallocation: Preallocation::Off,
            wait: Duration::ZERO,
        }
    }

    fn put(backups: &mut Backups, backup: &Backup, state: BackupState) {
        let proof = (state == BackupState::Complete).then(|| Proof {
            sha256: "00".repeat(32),
            file_bytes: 1,
            modified_ns: 1,
            incarnations: [DiskSeq::of_file(b"raw"), DiskSeq::of_file(b"qcow2")],
        });
        let backup = Backup {
            state,
            proof,
            ..backup.clone()
        };
        backups.take(BackupChange::Put(Box::new(backup)));
    }

    #[test]
    fn only_a_complete_backup_can_be_a_parent() {
        let mut backups = Backups::default();
        let (full, new) = backups.begin(&asked(None), 0, Some("/b")).unwrap();
        assert_eq!(full.name.as_str(), "backup-vm7-disk0-full-19700101T000000");
        assert_eq!(full.path, "/b/backup-vm7-disk0-full-19700101T000000.qcow2");
        assert_eq!((new.size, new.backing), (Some(1 << 20), None));
        let child = asked(Some(full.name.as_str()));
        assert!(
            backups.begin(&child, 60, None).is_err(),
            "there is none yet"
        );
        for state in BackupState::ALL {
            put(&mut backups, &full, state);
            let begun = backups.begin(&child, 60, None);
            assert_eq!(begun.is_ok(), state == BackupState::Complete, "{state:?}");
            let beneath = backups.may_lie_beneath(&full.path).is_ok();
            assert_eq!(beneath, state == BackupState::Complete, "{state:?}");
            let written = backups.may_be_written(&full.path, None).is_ok();
            assert_eq!(written, state != BackupState::Complete, "{state:?}");
        }
        put(&mut backups, &full, BackupState::Complete);
        let (incremental, new) = backups.begin(&child, 60, None).unwrap();
        assert_eq!(
            incremental.name.as_str(),
            "backup-vm7-disk0-incr-19700101T000100"
        );
        let name = full.path.rsplit_once('/').unwrap().1.to_owned();
        assert_eq!(new.backing, Some((name, Format::Qcow2)));
        assert_eq!(incremental.size, full.size);
        let size = |size| BeginBackup {
            size: Some(size),
            ..asked(None)
        };
        assert!(backups.begin(&size(SIZE_MAX), 60, Some("/b")).is_ok());
        let endless = backups.begin(&size(1 << 60), 60, Some("/b"));
        assert!(matches!(endless, Err(RequestError::InvalidArgument(_))));
        let again = backups.begin(&asked(None), 0, Some("/b"));
        assert!(matches!(again, Err(RequestError::AlreadyExists(_))));
    }

    #[test]
    fn a_file_is_known_as_a_backup_by_any_of_its_names() {
        let mut backups = Backups::default();
        let (full, _) = backups.begin(&asked(None), 0, Some("/b")).unwrap();
        put(&mut backups, &full, BackupState::Complete);
        for file in [b"raw".as_slice(), b"qcow2"] {
            let told = backups.may_be_written("/b/link", Some(DiskSeq::of_file(file)));
            assert_eq!(told.unwrap_err().name, full.name);
        }
        let other = backups.may_be_written("/b/link", Some(DiskSeq::of_file(b"other")));
        assert!(other.is_ok());
    }

    #[test]
    fn who_would_write_a_complete_backup_is_told_what_lies_on_it() {
        let name = |text: &str| ExportName::parse(text).unwrap();
        let refusal = |children: &[&str]| {
            let children = children.iter().map(|child| name(child)).collect();
            let (path, name) = ("/b/a".to_owned(), name("a"));
            CompleteBackup {
                path,
                name,
                children,
            }
            .to_string()
        };
        assert!(refusal(&[]).starts_with("/b/a is the complete backup a: it is exported"));
        let told = refusal(&["b", "c"]);
        assert!(
            told.contains("backup a, and b, c lie on it: it is"),
            "{told}"
        );
    }

    #[test]
    fn what_others_lie_on_is_deleted_with_them_or_not_at_all() {
        let mut backups = Backups::default();
        let (full, _) = backups.begin(&asked(None), 0, Some("/b")).unwrap();
        put(&mut backups, &full, BackupState::Complete);
        let mut last = full.clone();
        for n in 1..4 {
            let (next, _) = backups
                .begin(&asked(Some(last.name.as_str())), n * 60, None)
                .unwrap();
            put(&mut backups, &next, BackupState::Complete);
            last = next;
        }
        let refused = backups.delete(&full.name, Children::Keep);
        assert!(matches!(refused, Err(RequestError::InUse(_))));
        let all = backups.delete(&full.name, Children::Delete).unwrap();
        assert_eq!(all.len(), 4);
        for (at, backup) in all.iter().enumerate() {
            let later = &all[at + 1..];
            let parent = backup.parent.as_ref();
            assert!(parent.is_none_or(|p| later.iter().any(|b| b.name == *p)));
        }
        let alone = backups.delete(&last.name, Children::Keep).unwrap();
        assert_eq!(alone.len(), 1);
        assert_eq!(backups.lineage(&last.name).len(), 4);
    }

    #[test]
    fn a_backup_whose_flush_failed_is_known_by_its_export_or_its_file_and_a_complete_one_stays_so()
    {
        let mut backups = Backups::default();
        let (full, _) = backups.begin(&asked(None), 0, Some("/b")).unwrap();
        let other = ExportName::parse("other").unwrap();
        for state in BackupState::ALL {
            put(&mut backups, &full, state);
            for (export, file) in [(&full.name, None), (&other, Some(full.path.as_str()))] {
                let spoiled = backups.spoiled(export, file, "EIO");
                let open = matches!(state, BackupState::Writing | BackupState::Interrupted);
                assert_eq!(spoiled.is_some(), open, "{state:?}");
                assert!(spoiled.is_none_or(|b| b.state == BackupState::Failed));
            }
            assert_eq!(backups.spoiled(&other, Some("/b/x"), "EIO"), None);
        }
    }

    #[test]
    fn an_interrupted_backup_is_finished_only_by_who_says_so() {
        let mut backups = Backups::default();
        let (full, _) = backups.begin(&asked(None), 0, Some("/b")).unwrap();
        for state in BackupState::ALL {
            put(&mut backups, &full, state);
            let silently = backups.finish(&full.name, Interrupted::Refuse).is_ok();
            let told = backups.finish(&full.name, Interrupted::Finish).is_ok();
            assert_eq!(
                silently,
                !matches!(state, BackupState::Interrupted | BackupState::Failed)
            );
            assert_eq!(told, state != BackupState::Failed, "{state:?}");
        }
    }
}
