//! What people say of pins, and what they are shown of them. PURE.

use super::pin_rule::{AtPath, Pin, Verdict, mismatch};
use super::pins::{NamedPath, OWN_REQUESTS};
use super::requests::Persisting;
use super::vacant::Vacancy;
use super::{
    Action, Change, Correlation, Decision, Definition, DiskSeq, Export, ExportName, Level, Reply,
    Request, RequestError, RequestId, Topic,
};

/// One pinned section as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PinView {
    pub export: ExportName,
    pub path: String,
    /// `scheme:value`, `diskseq N of this boot`, or empty.
    pub to: String,
    /// A person has to confirm it, or nothing is at the path yet.
    pub pending: bool,
    /// Why it is pending, or what disagrees; empty when all is well.
    pub reason: String,
    /// The disk at the path; 0 when there is none.
    pub diskseq: DiskSeq,
    pub node: String,
    /// Of the disk at the path, `scheme:value` or empty.
    pub id: String,
    pub serial: String,
    /// Bytes.
    pub size: u64,
}

impl Correlation {
    /// A person says that the path means the disk of this number, which is there. The export has no clients, and gets none until it is stored.
    pub(super) fn pin_by_person(
        &mut self,
        request: RequestId,
        name: &ExportName,
        (diskseq, anew): (DiskSeq, bool),
        vacancy: Vacancy,
    ) -> Result<(), RequestError> {
        let section = self.section(name)?;
        let path = section.path.clone();
        let found = match self.at_path(section) {
            AtPath::Disk(found) if found.diskseq == diskseq => found,
            AtPath::Disk(found) => {
                return Err(RequestError::IdentityMismatch(format!(
                    "{path} does not hold the disk with diskseq {diskseq} now, but {}",
                    found.describe()
                )));
            }
            AtPath::Unknown(reason) | AtPath::Nothing(reason) => {
                return Err(RequestError::NotReady(reason));
            }
        };
        let decided = !matches!(
            self.verdict(name),
            Some(Verdict::Confirm { .. } | Verdict::Undecided(_))
        );
        if !anew && decided {
            return Err(RequestError::AlreadyExists(format!(
                "the path of export {name} is pinned already; if it means another disk now: 'nbdtrack repin {name} --diskseq {diskseq}'"
            )));
        }
        let to = found.pinned_to(&self.settings.boot).ok_or_else(|| {
            RequestError::NotReady(format!(
                "the identity of {} has not been read yet",
                found.node
            ))
        })?;
        let volume = to
            .volume()
            .ok_or_else(|| RequestError::NotSupported(format!("{to} names no volume")))?;
        let definition = Definition {
            volume,
            ..self.planned_of(name)?.clone()
        };
        self.judge_definition(&definition)?;
        if vacancy == Vacancy::Unknown {
            let name = name.clone();
            let what = Request::Pin {
                name,
                diskseq,
                anew,
            };
            self.count_clients(request, what);
            return Ok(());
        }
        self.begin_storing(name, Some(diskseq));
        let pin = Pin {
            export: name.clone(),
            path,
            to,
        };
        let changes = vec![Change::PutPin(pin.clone())];
        self.persist(request, Persisting::Pins(vec![pin]), changes);
        self.settle(name);
        Ok(())
    }

    /// A person says that what the path means is to be judged anew. As there, no client comes until it is.
    pub(super) fn unpin(
        &mut self,
        request: RequestId,
        name: &ExportName,
        vacancy: Vacancy,
    ) -> Result<(), RequestError> {
        self.section(name)?;
        if !self.pins.known.contains_key(name) {
            return Err(RequestError::NotFound(format!(
                "the path of export {name} is not pinned"
            )));
        }
        if vacancy == Vacancy::Unknown {
            self.count_clients(request, Request::Unpin { name: name.clone() });
            return Ok(());
        }
        self.begin_storing(name, None);
        let changes = vec![Change::DeletePin(name.clone())];
        self.persist(request, Persisting::Unpin(name.clone()), changes);
        Ok(())
    }

    pub(super) fn unpinned(
        &mut self,
        request: RequestId,
        name: &ExportName,
        result: Result<(), RequestError>,
    ) {
        self.end_storing(name);
        if result.is_ok() {
            self.pins.known.remove(name);
            self.pins.said.remove(name);
            self.judge_pin(name);
            self.store_pins();
        }
        self.show(name);
        self.reply(request, result.map(|()| Reply::Done));
    }

    /// A person's word on what the export's path means is being stored. Whoever came meanwhile would be moved to another volume by it.
    pub(super) fn is_being_aimed(&self, name: &ExportName) -> bool {
        self.persisting
            .iter()
            .any(|(request, purpose)| match purpose {
                Persisting::Unpin(unpinned) => unpinned == name,
                Persisting::Pins(pins) => {
                    request.0 & OWN_REQUESTS == 0 && pins.iter().any(|pin| pin.export == *name)
                }
                _ => false,
            })
    }

    fn section(&self, name: &ExportName) -> Result<&NamedPath, RequestError> {
        let section = self.pins.sections.get(name).ok_or_else(|| {
            RequestError::NotFound(format!(
                "export {name} has no path that could be pinned; 'nbdtrack pins' lists those that have"
            ))
        })?;
        if self.pins.storing.contains(name) {
            return Err(RequestError::NotReady(format!(
                "a pin of export {name} is being stored; try again"
            )));
        }
        Ok(section)
    }

    /// All sections with a path, in the order of their names.
    pub fn pins(&self) -> Vec<PinView> {
        let views = self.pins.sections.iter().map(|(name, section)| {
            let verdict = self.verdict(name);
            let found = match self.at_path(section) {
                AtPath::Disk(found) => Some(found),
                AtPath::Unknown(_) | AtPath::Nothing(_) => None,
            };
            let to = match (&verdict, self.pins.known.get(name)) {
                (Some(Verdict::Keep | Verdict::KeepAgainst(_)), Some(pin)) => pin.to.to_string(),
                _ => String::new(),
            };
            let reason = match &verdict {
                Some(Verdict::Confirm { why, .. }) => why.clone(),
                Some(Verdict::Undecided(reason)) => reason.clone(),
                Some(Verdict::KeepAgainst(_)) => "another disk is at the path".to_owned(),
                _ => String::new(),
            };
            let identities = found.as_ref().and_then(|found| found.identities.as_ref());
            PinView {
                export: name.clone(),
                path: section.path.clone(),
                pending: matches!(
                    verdict,
                    Some(Verdict::Confirm { .. } | Verdict::Undecided(_))
                ),
                to,
                reason,
                id: identities
                    .and_then(crate::identity::primary)
                    .map(ToString::to_string)
                    .unwrap_or_default(),
                diskseq: found.as_ref().map_or(DiskSeq(0), |found| found.diskseq),
                node: found
                    .as_ref()
                    .map(|found| found.node.to_string())
                    .unwrap_or_default(),
                serial: found
                    .as_ref()
                    .map(|found| found.serial.clone())
                    .unwrap_or_default(),
                size: found.as_ref().map_or(0, |found| found.size),
            }
        });
        views.collect()
    }

    /// What the store has an export with a path pinned to; `None` for an export without a path.
    pub(super) fn pinned_volume(
        &self,
        name: &ExportName,
    ) -> Option<Option<crate::identity::VolumeId>> {
        self.pins.sections.get(name)?;
        Some(self.pins.known.get(name).and_then(|pin| pin.to.volume()))
    }

    /// Why the pinned volume is not there, when another disk is at the path.
    pub(super) fn absent_by_pin(&self, export: &Export) -> Option<String> {
        let name = &export.definition.name;
        let pin = self.pins.known.get(name)?;
        match self.verdict(name)? {
            Verdict::KeepAgainst(found) => Some(mismatch(name, &pin.path, &pin.to, &found)),
            Verdict::Keep | Verdict::Pin(_) | Verdict::Confirm { .. } | Verdict::Undecided(_) => {
                None
            }
        }
    }

    /// Once for each thing that is to be said.
    pub(super) fn say(&mut self, name: &ExportName, level: Level, topic: Topic, reason: String) {
        if self.pins.said.get(name) == Some(&reason) {
            return;
        }
        self.pins.said.insert(name.clone(), reason.clone());
        let volume = self
            .exports
            .get(name)
            .map(|export| export.definition.volume.to_string());
        self.out.push(Action::Log(Decision {
            export: Some(name.clone()),
            volume,
            ..Decision::new(level, topic, Some(reason))
        }));
    }
}
