//! Which volume the path in a row of a shared table means. PURE: by the rule of a new pin, for it is the same question.

use super::pin_rule::{AtPath, Question, Verdict, judge};
use super::pins::NamedPath;
use super::{Correlation, ExportName, RequestError, VmDisk};
use crate::identity::VolumeId;

impl Correlation {
    /// The volume that somebody means who wrote this path for this disk of a VM.
    ///
    /// # Errors
    /// `NotReady` while it cannot be said; `IdentityMismatch` when a person has to say it, with the disk and the command.
    pub fn volume_at(&self, disk: &VmDisk, path: &NamedPath) -> Result<VolumeId, RequestError> {
        let name = disk.export();
        let at = self.at_path(path);
        let claimed_by = match &at {
            AtPath::Disk(found) => self.claimant(&name, &path.path, found.diskseq),
            AtPath::Unknown(_) | AtPath::Nothing(_) => None,
        };
        let verdict = judge(Question {
            path: &path.path,
            pin: None,
            at: &at,
            written: path.written,
            trust_path: path.trust,
            claimed_by: claimed_by.as_ref(),
            boot: &self.settings.boot,
        });
        match verdict {
            Verdict::Pin(to) => to.volume().ok_or_else(|| {
                RequestError::IdentityMismatch(format!(
                    "{} holds {to}, which names no volume",
                    path.path
                ))
            }),
            Verdict::Confirm { found, why } => Err(RequestError::IdentityMismatch(confirmation(
                &name,
                disk,
                &path.path,
                &found.describe(),
                &why,
                found
                    .pinned_to(&self.settings.boot)
                    .and_then(|to| to.volume()),
            ))),
            Verdict::Undecided(reason) => Err(RequestError::NotReady(reason)),
            // There is no pin that could be kept.
            Verdict::Keep | Verdict::KeepAgainst(_) => Err(RequestError::NotReady(format!(
                "what {} means has not been judged yet",
                path.path
            ))),
        }
    }
}

fn confirmation(
    name: &ExportName,
    disk: &VmDisk,
    path: &str,
    found: &str,
    why: &str,
    volume: Option<VolumeId>,
) -> String {
    let volume = volume.map_or_else(|| "PROFILE:ID".to_owned(), |volume| volume.to_string());
    format!(
        "{name}: a row says device_path {path}, which holds {found}, but {why}; if it is meant, \
         'nbdtrack ensure {} {} --volume {volume} --move'",
        disk.vm_id(),
        disk.unit()
    )
}
