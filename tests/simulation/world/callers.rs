//! The callers, with what is right for them to hear; and the configuration.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use nbdtrack::correlation::{
    BootId, ConfiguredSection, Definition, DiskSeq, Event, ExportName, RemoveMode, Reply, Request,
    RequestError, RequestId, SectionsChange, VmDisk,
};

use super::{Broken, MARGIN, TruthDisk, VOLUMES, World, index_of, volume};

/// What a caller waits for.
#[derive(Clone, Debug)]
pub(super) enum Pending {
    Add {
        /// The volume that has to serve.
        volume: Option<u8>,
        name: ExportName,
        wait: Duration,
        due: Option<Duration>,
    },
    Ensure {
        /// The volume that has to serve.
        volume: Option<u8>,
        disk: VmDisk,
        wait: Duration,
        due: Option<Duration>,
    },
    Remove {
        name: ExportName,
        hide: bool,
    },
    /// `released` present the volume's identity when asked; `held` are held as it.
    /// Of `unread` the middle knows, but not that they are the volume.
    Detach {
        volume: u8,
        released: BTreeSet<DiskSeq>,
        held: BTreeSet<DiskSeq>,
        unread: BTreeSet<DiskSeq>,
        due: Duration,
    },
    Cancel {
        volume: u8,
    },
    Resolve {
        name: ExportName,
    },
}

impl Pending {
    fn kind(&self) -> &'static str {
        match self {
            Pending::Add { .. } => "add",
            Pending::Ensure { .. } => "ensure",
            Pending::Remove { .. } => "remove",
            Pending::Detach { .. } => "detach",
            Pending::Cancel { .. } => "cancel",
            Pending::Resolve { .. } => "resolve",
        }
    }
}

impl World {
    pub fn ask(&mut self, what: Request) {
        let request = RequestId(self.next_request);
        self.next_request += 1;
        let pending = match &what {
            Request::AddExport { definition, wait } => {
                let exists = self.middle.export(&definition.name).is_some();
                let due = exists.then(|| self.now + *wait);
                Pending::Add {
                    volume: (0..VOLUMES).find(|v| volume(*v) == definition.volume),
                    name: definition.name.clone(),
                    wait: *wait,
                    due,
                }
            }
            Request::EnsureVmExport(ensure) => Pending::Ensure {
                volume: (0..VOLUMES).find(|v| Some(volume(*v)) == ensure.volume),
                disk: ensure.disk.clone(),
                wait: ensure.wait,
                due: None,
            },
            Request::Pin { .. } | Request::Unpin { .. } => {
                unreachable!("this world has no sections; tests/pins.rs has one of its own")
            }
            Request::RemoveExport { name, mode, .. } => Pending::Remove {
                name: name.clone(),
                hide: *mode == RemoveMode::Hide,
            },
            Request::PrepareDetach { volume, within, .. } => {
                let released: BTreeSet<DiskSeq> =
                    self.middle.disks_of(volume).into_iter().collect();
                let index = (0..VOLUMES).find(|v| self::volume(*v) == *volume);
                let held = self
                    .leases
                    .values()
                    .filter(|l| Some(l.volume) == index)
                    .map(|l| l.seq)
                    .collect();
                let volume = index.unwrap_or(VOLUMES);
                let is_unread = |disk: &&TruthDisk| {
                    disk.volume == volume
                        && !released.contains(&disk.seq)
                        && self.middle.diskseqs().any(|known| known == disk.seq)
                        && self.middle.disk(disk.seq).is_none()
                };
                let unread = self.slots.iter().flatten().filter(is_unread);
                // Where a disk is there that is known to be the volume, it is the one that is given up.
                let unread = unread.filter(|_| released.is_empty());
                Pending::Detach {
                    volume,
                    unread: unread.map(|disk| disk.seq).collect(),
                    released,
                    held,
                    due: self.now + *within + MARGIN,
                }
            }
            Request::CancelDetach { volume } => Pending::Cancel {
                volume: index_of(volume).unwrap_or(VOLUMES),
            },
            Request::ResolveConflict { name, .. } => Pending::Resolve { name: name.clone() },
        };
        self.pending.insert(request, pending);
        self.apply(Event::Asked { request, what });
    }

    /// The middle is told what differs from the reading before, and does what it would do if it were told everything anew.
    pub fn configure(&mut self, definitions: Vec<Definition>) {
        self.config.clone_from(&definitions);
        self.config_refused.clear();
        let named: BTreeMap<ExportName, ConfiguredSection> = definitions
            .iter()
            .map(|definition| (definition.name.clone(), definition.clone().into()))
            .collect();
        let sections: Vec<ConfiguredSection> = named.into_values().collect();
        let change = SectionsChange::between(&std::mem::take(&mut self.told), &sections);
        let everything = SectionsChange {
            put: sections.clone(),
            ..change.clone()
        };
        self.told = sections;
        // Once is enough: what is broken on purpose is not broken by this.
        if self.broken == Broken::Nothing && change != everything {
            let [by_change, by_everything] = [change.clone(), everything].map(|change| {
                let mut middle = self.middle.clone();
                middle.apply(self.now, Event::Sections(change))
            });
            assert_eq!(by_change, by_everything, "{change:?}");
        }
        self.apply(Event::Sections(change));
        self.configured.retain(|export, _| {
            self.config
                .iter()
                .any(|definition| definition.name == *export)
        });
        for definition in definitions {
            if !self.config_refused.contains(&definition.name) {
                self.configured.insert(definition.name.clone(), definition);
            }
        }
    }

    /// Somebody edits the file while the daemon is down.
    pub fn edit(&mut self, definitions: Vec<Definition>, kept: u8) {
        self.config = definitions;
        self.crash(false, kept);
    }

    pub(super) fn reply(&mut self, request: RequestId, reply: Result<Reply, RequestError>) {
        self.replies.push(reply.clone());
        if let Some(reached) = &mut self.reached {
            let answer = format!("{reply:?}");
            let short = answer
                .split(['(', '{'])
                .take(2)
                .collect::<Vec<_>>()
                .join(" ")
                .replace(')', "");
            reached.insert(format!(
                "{}: {short}",
                self.pending.get(&request).map_or("?", Pending::kind)
            ));
        }
        let Some(pending) = self.pending.remove(&request) else {
            return self.fail(format!("{request:?} is answered twice, or was never asked"));
        };
        if self.occupied.remove(&request) && reply.is_ok() {
            self.fail(format!(
                "{pending:?} was done though its export had clients"
            ));
        }
        match (pending, reply) {
            (Pending::Add { name, volume, .. }, Ok(Reply::Added { created, .. })) => {
                if created {
                    self.made.remove(&name);
                }
                if created && !self.store.exports.contains_key(&name) {
                    let adopted = self.config.iter().any(|definition| definition.name == name);
                    if !adopted {
                        self.fail(format!("{name} was told to be added before it is stored"));
                    }
                }
                self.judge_served(&name, volume);
            }
            (Pending::Ensure { disk, volume, .. }, Ok(Reply::Added { name, created })) => {
                self.judge_ensured(&disk, volume, &name, created);
            }
            (Pending::Remove { name, hide: true }, Ok(_)) => {
                if self.middle.export(&name).is_some() && !self.hidden.contains(&name) {
                    self.fail(format!("{name} was told to be hidden and is not"));
                }
            }
            (Pending::Remove { name, .. }, Ok(_)) => {
                if self.store.exports.contains_key(&name) && self.middle.export(&name).is_none() {
                    self.fail(format!("{name} was told to be removed and is still stored"));
                }
                if self
                    .lease_of(&name)
                    .is_some_and(|lease| lease.ending.is_none())
                {
                    self.fail(format!("{name} was told to be removed and still serves"));
                }
            }
            (
                Pending::Detach {
                    volume,
                    released,
                    held,
                    unread,
                    ..
                },
                Ok(_),
            ) => {
                self.promised
                    .extend(unread.iter().map(|seq| (*seq, volume)));
                let boot = BootId(format!("boot{}", self.boot));
                for seq in released.union(&held).copied() {
                    if self.leases.values().any(|lease| lease.seq == seq)
                        || self.handles.values().any(|handle| handle.seq == seq)
                    {
                        self.fail(format!("diskseq {seq} is held and was told to be safe"));
                    }
                    if released.contains(&seq)
                        && self.slots.iter().flatten().any(|disk| disk.seq == seq)
                    {
                        if !self
                            .store
                            .releases
                            .iter()
                            .any(|r| r.diskseq == seq && r.boot == boot)
                            && self.middle.diskseqs().any(|known| known == seq)
                        {
                            self.fail(format!(
                                "diskseq {seq} was told to be given up before it is stored"
                            ));
                        }
                        self.given_up.insert(seq);
                    }
                }
            }
            (Pending::Resolve { name }, Ok(_)) => {
                let volume = self.volume_of(&name);
                self.conflicts.retain(|(_, about), _| *about != volume);
                self.doubts.remove(&volume);
                self.equals.remove(&volume);
            }
            (Pending::Cancel { volume }, Ok(_)) => self.promised.retain(|(_, of)| *of != volume),
            (_, Err(_)) => {}
            (Pending::Add { name, .. }, Ok(other)) => self.fail(format!("{name}: {other:?}")),
            (Pending::Ensure { disk, .. }, Ok(other)) => self.fail(format!("{disk}: {other:?}")),
        }
    }

    /// Who asked for it was told that the export serves, and this volume.
    fn judge_served(&mut self, export: &ExportName, wanted: Option<u8>) {
        if !self.accepts(export) {
            self.fail(format!("{export} was told to serve and does not"));
        }
        let served = self.lease_of(export).map(|lease| lease.volume);
        if wanted.is_some() && served != wanted {
            self.fail(format!(
                "{export} was told to serve volume {wanted:?} and serves {served:?}"
            ));
        }
    }

    /// Who ensured a disk's export was told that it serves this volume, stored with whose it is; one was told to have made it.
    fn judge_ensured(
        &mut self,
        disk: &VmDisk,
        wanted: Option<u8>,
        export: &ExportName,
        created: bool,
    ) {
        if *export != disk.export() {
            self.fail(format!("{disk} was told to be {export}"));
        }
        self.judge_served(export, wanted);
        if !self.store.mappings.contains_key(disk) && !self.forgetful {
            self.fail(format!(
                "{disk} was told to have {export} before it is stored"
            ));
        }
        let under_way = !self.writes.is_empty()
            || self
                .answers
                .iter()
                .any(|answer| matches!(answer, Event::Persisted { .. }));
        if self.middle.mapping(disk) != self.store.mappings.get(disk) && !under_way {
            self.fail(format!(
                "{disk}: the store has another mapping than the export"
            ));
        }
        if created && !self.made.remove(export) && !self.forgetful {
            self.fail(format!("{export} was told twice to be made"));
        }
    }
}
