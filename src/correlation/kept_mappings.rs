//! Mappings without an export: of each VM's disk whose export may stand in a file of the configuration that could not be taken. PURE.
//!
//! A file can be mended, and until then the disk is still the VM's: its row stays active and says that nothing is served.

use std::collections::BTreeMap;

use super::{
    Action, Change, Correlation, ExportName, INTERNAL, Mapping, MappingState, Notice, State,
};

impl Correlation {
    /// The configuration was read: what it does not name has no export that its mapping could be of. Of what may stand in a file that
    /// could not be read, or be refused there, the next reading says more, and until then the mapping is kept.
    pub(super) fn retire_leftovers(&mut self) {
        let (kept, gone) = std::mem::take(&mut self.remembered_mappings)
            .into_iter()
            .partition(|(name, _)| self.may_come(name));
        self.remembered_mappings = kept;
        // What the row says is of before the start.
        let names = self.remembered_mappings.keys().cloned();
        self.out
            .extend(names.map(|name| Action::Tell(Notice::Export(name))));
        let changes: Vec<Change> = BTreeMap::into_values(gone)
            .map(|mapping: Mapping| Change::RetireMapping(mapping.disk))
            .collect();
        if !changes.is_empty() {
            self.out.push(Action::Persist {
                request: INTERNAL,
                changes,
            });
        }
    }

    /// The mapping that an export took over which was never stored: when that goes, the mapping waits for its section as before.
    pub(super) fn lent_mapping(&self, name: &ExportName) -> Option<Mapping> {
        let export = self.exports.get(name)?;
        let lent = !export.durable && export.mapped_by == INTERNAL && self.may_come(name);
        export.mapping.clone().filter(|_| lent)
    }

    /// What the row of a mapping says whose export is not there; `None` when none is kept for this name.
    pub fn kept_mapping_state(&self, name: &ExportName) -> Option<MappingState> {
        let mapping = self.remembered_mappings.get(name)?;
        let why = match self.in_the_files {
            None => "not all files of the configuration could be read, and it may stand in one",
            Some(_) => "its section in the configuration was refused",
        };
        Some(MappingState {
            disk: mapping.disk.clone(),
            node: String::new(),
            state: State::Absent,
            reason: format!(
                "export {name} is not there: {why}; the log says what to mend, then 'nbdtrack reload'"
            ),
            volume: String::new(),
            diskseq: 0,
            generation: 0,
            size: 0,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::*;
    use crate::identity::VolumeId;

    fn disk() -> VmDisk {
        VmDisk::new("a", 0).unwrap()
    }

    fn mapping() -> Mapping {
        Mapping::new(disk(), "web").unwrap()
    }

    /// A start that knows of the mapping and of a configuration that was read like this; and the actions of the reading.
    fn read(change: SectionsChange) -> (Correlation, Vec<Action>) {
        let settings = Settings::new(BootId("boot".to_owned()));
        let remembered = Remembered {
            mappings: vec![mapping()],
            ..Remembered::default()
        };
        let mut middle = Correlation::new(settings, remembered);
        middle.start();
        let actions = middle.apply(Duration::ZERO, Event::Sections(change));
        (middle, actions)
    }

    fn unread() -> SectionsChange {
        SectionsChange {
            unread: true,
            ..SectionsChange::default()
        }
    }

    fn all_read() -> SectionsChange {
        SectionsChange {
            refused: Some(BTreeSet::new()),
            ..SectionsChange::default()
        }
    }

    fn retires(actions: &[Action]) -> bool {
        actions.iter().any(|action| {
            matches!(action, Action::Persist { changes, .. } if changes.contains(&Change::RetireMapping(disk())))
        })
    }

    fn tells(actions: &[Action]) -> bool {
        actions.contains(&Action::Tell(Notice::Export(disk().export())))
    }

    fn definition() -> Definition {
        Definition {
            name: disk().export(),
            volume: VolumeId::parse("serial:x").unwrap(),
            read_only: false,
            share: false,
            direct: false,
            source: Source::Dbus,
        }
    }

    fn add() -> Request {
        Request::AddExport {
            definition: definition(),
            wait: Duration::ZERO,
        }
    }

    fn ensure() -> Request {
        Request::EnsureVmExport(Ensure {
            disk: disk(),
            mapping: Mapping::new(disk(), "other").unwrap(),
            volume: Some(definition().volume),
            diskseq: None,
            read_only: None,
            share: None,
            moves: false,
            job: String::new(),
            wait: Duration::ZERO,
        })
    }

    /// The store answers the requests of these numbers.
    fn answered(middle: &mut Correlation, answers: &[(u64, Result<(), Unkept>)]) -> Vec<Action> {
        let mut actions = Vec::new();
        for (request, result) in answers {
            let persisted = Event::Persisted {
                request: RequestId(*request),
                result: result.clone(),
            };
            actions.extend(middle.apply(middle.now, persisted));
        }
        actions
    }

    fn ask(middle: &mut Correlation, request: u64, what: Request) -> Vec<Action> {
        let request = RequestId(request);
        middle.apply(middle.now, Event::Asked { request, what })
    }

    fn full() -> Result<(), Unkept> {
        Err(Unkept::Failed("disk full".to_owned()))
    }

    /// It said `Serving` and where its volume had been before a crash, for as long as the file was not mended.
    #[test]
    fn the_row_of_a_mapping_whose_section_cannot_be_taken_says_that_nothing_is_served() {
        let name = disk().export();
        let refused = SectionsChange {
            refused: Some([name.clone()].into()),
            ..SectionsChange::default()
        };
        for (change, why) in [(unread(), "could be read"), (refused, "was refused")] {
            let (mut middle, actions) = read(change);
            assert!(tells(&actions), "{why}");
            let state = middle.kept_mapping_state(&name).unwrap();
            assert_eq!((state.state, state.node.as_str()), (State::Absent, ""));
            assert!(state.reason.contains(why), "{}", state.reason);
            middle.apply(Duration::ZERO, Event::Sections(all_read()));
            assert_eq!(middle.kept_mapping_state(&name), None);
        }
    }

    /// A caller that the store refused had the mapping retired of an export that it had not made.
    #[test]
    fn a_mapping_outlives_an_export_that_took_it_over_and_was_not_stored() {
        for what in [add(), ensure()] {
            let (mut middle, _) = read(unread());
            ask(&mut middle, 1, what);
            assert_eq!(middle.mapping(&disk()), Some(&mapping()));
            let actions = answered(&mut middle, &[(1, full())]);
            assert!(middle.export(&disk().export()).is_none());
            assert!(!retires(&actions), "{actions:?}");
            assert!(tells(&actions));
            assert!(middle.kept_mapping_state(&disk().export()).is_some());
            let actions = middle.apply(Duration::ZERO, Event::Sections(all_read()));
            assert!(retires(&actions), "it stands in no file");
        }
    }

    #[test]
    fn a_mapping_goes_with_an_export_whose_name_stands_in_no_file_or_that_a_caller_removes() {
        // All files were read while its export was being stored.
        let (mut middle, _) = read(unread());
        ask(&mut middle, 1, add());
        middle.apply(Duration::ZERO, Event::Sections(all_read()));
        assert!(retires(&answered(&mut middle, &[(1, full())])));
        // Somebody removes it.
        let (mut middle, _) = read(unread());
        ask(&mut middle, 1, add());
        answered(&mut middle, &[(1, Ok(()))]);
        let remove = Request::RemoveExport {
            name: disk().export(),
            mode: RemoveMode::Soft,
            within: Duration::ZERO,
        };
        assert!(retires(&ask(&mut middle, 2, remove)));
        answered(&mut middle, &[(2, Ok(()))]);
        assert_eq!(middle.kept_mapping_state(&disk().export()), None);
    }

    /// What it asked for may be in the store by now, or not: the disk is the VM's either way.
    #[test]
    fn a_mapping_outlives_a_caller_who_renames_it_on_an_export_that_is_not_stored() {
        let (mut middle, _) = read(unread());
        ask(&mut middle, 1, add());
        ask(&mut middle, 2, ensure());
        let actions = answered(&mut middle, &[(1, full()), (2, Ok(()))]);
        assert!(!retires(&actions), "{actions:?}");
        assert!(middle.kept_mapping_state(&disk().export()).is_some());
    }
}
