//! The invariants of the model, checked after every step in debug builds and in the simulation.

use super::binding::Binding;
use super::{Correlation, Export, ExportName};

impl Correlation {
    /// Says which invariant does not hold.
    pub fn check(&self) -> Result<(), String> {
        self.disks.check()?;
        self.holds.check()?;
        for (name, export) in self.exports.iter() {
            // One export for a VM's disk, and one disk for an export: its name says which.
            if let Some(mapping) = &export.mapping
                && mapping.disk.export() != *name
            {
                return Err(format!("export {name} belongs to {}", mapping.disk));
            }
            if export.moving.is_some() && !self.replacing.contains(name) {
                return Err(format!("export {name} moves, and nothing stands beside it"));
            }
            self.check_indexes(name, export)?;
            let Some(held) = export.binding.held() else {
                continue;
            };
            self.check_pin(export)?;
            let present = self.disks.get(held.diskseq);
            let claims =
                present.is_some_and(|disk| !disk.identities.is_disjoint(&export.candidates));
            let ending = matches!(export.binding, Binding::Draining { .. });
            // Invariant 1: a lease is bound to a disk that is there and says that it is the volume, or is being ended.
            if !claims && !ending {
                return Err(format!(
                    "export {name} is bound to diskseq {} that is not its volume",
                    held.diskseq
                ));
            }
            // Invariant 2: new connections are welcome only while one disk claims the volume.
            if matches!(export.binding, Binding::Serving(_)) {
                let active = self
                    .disks
                    .presenting(&export.candidates)
                    .into_iter()
                    .filter(|diskseq| !self.released.contains_key(diskseq))
                    .filter(|diskseq| {
                        self.disks
                            .get(*diskseq)
                            .is_some_and(|disk| !disk.facts.leaving && !disk.is_member())
                    })
                    .count();
                if active != 1 && !self.stopping {
                    return Err(format!(
                        "export {name} serves while {active} disks claim its volume"
                    ));
                }
                if self.released.contains_key(&held.diskseq) {
                    return Err(format!(
                        "export {name} serves diskseq {} that was released",
                        held.diskseq
                    ));
                }
            }
            if !self.holds.is_held(held.diskseq) {
                return Err(format!(
                    "export {name} holds diskseq {} and nothing counts it",
                    held.diskseq
                ));
            }
            // Invariant 6: what this export holds is the only lease of its volume on a disk that is not going.
            if let (false, Some(blocking)) = (
                ending,
                self.holds.blocking(&export.candidates, held.diskseq),
            ) {
                return Err(format!(
                    "export {name} is on diskseq {} while {} is on {}",
                    held.diskseq, blocking.export, blocking.diskseq
                ));
            }
            // Invariant 5.
            if !export.durable {
                return Err(format!(
                    "export {name} holds a disk before its definition is stored"
                ));
            }
            if present.is_none() && matches!(export.binding, Binding::Draining { cut: false, .. }) {
                return Err(format!(
                    "export {name} drains a disk that has left, where it should be cut"
                ));
            }
        }
        for (ticket, (diskseq, _)) in &self.tickets {
            if !self.holds.is_opening(*diskseq) {
                return Err(format!(
                    "the open {} of diskseq {diskseq} is not counted",
                    ticket.0
                ));
            }
        }
        for (request, detach) in &self.detaches {
            if !self
                .timers
                .iter()
                .any(|(_, timer)| *timer == super::Timer::Detach(*request))
            {
                return Err(format!(
                    "nothing ends the detach {} ({} disks)",
                    request.0,
                    detach.disks()
                ));
            }
        }
        Ok(())
    }

    /// What is looked up instead of walked says what the export says; and who waits for an open waits for one that is made.
    fn check_indexes(&self, name: &ExportName, export: &Export) -> Result<(), String> {
        let is_found = |candidate| {
            let wanting = self.by_candidate.get(candidate);
            wanting.is_some_and(|wanting| wanting.has(&export.definition))
        };
        if !export.candidates.iter().all(is_found) {
            return Err(format!(
                "export {name} is not found as what it is by what it looks for"
            ));
        }
        if export.conflict.is_some() != self.in_conflict.contains(name) {
            return Err(format!(
                "the conflict of export {name} is not where it is looked for"
            ));
        }
        let waits = export.binding.waits_for();
        let listed = self
            .waiting
            .iter()
            .filter(|(_, names)| names.contains(name));
        if !listed.map(|(diskseq, _)| *diskseq).eq(waits) {
            return Err(format!(
                "export {name} waits for {waits:?} and is not listed so"
            ));
        }
        match waits.filter(|diskseq| !self.holds.is_opening(*diskseq)) {
            Some(diskseq) => Err(format!(
                "export {name} waits for an open of diskseq {diskseq} that nobody makes"
            )),
            None => Ok(()),
        }
    }

    /// Invariants 5 and 12: what a path means is stored before anything is opened by it, and then only that is.
    fn check_pin(&self, export: &Export) -> Result<(), String> {
        let definition = &export.definition;
        if let Some(path) = definition.volume.path() {
            return Err(format!(
                "export {} holds a disk and {path} means nothing",
                definition.name
            ));
        }
        let going = export.leaving.is_some() || self.stopping;
        match self.pinned_volume(&definition.name) {
            Some(pinned) if !going && pinned.as_ref() != Some(&definition.volume) => Err(format!(
                "export {} serves {}, and is pinned to {pinned:?}",
                definition.name, definition.volume
            )),
            _ => Ok(()),
        }
    }
}
