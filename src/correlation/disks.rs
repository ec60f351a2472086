//! The disks of the machine as last observed, found by device number, by diskseq and by identity. PURE.
//!
//! Decides which of two observations is newer, and nothing about exports.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use super::doubt::Doubt;
use super::facts::{
    BootId, DeviceNode, DeviceNumber, DiskFacts, DiskSeq, Holder, HolderKind, Mark,
};
use super::index::Index;
use crate::identity::{self, Identity, Scheme};

/// One attached disk.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    pub facts: DiskFacts,
    /// What is known of its identity, also while a newer reading is outstanding; and, of a disk, this attachment of it.
    pub identities: Arc<BTreeSet<Identity>>,
    /// Which of its identities are in doubt, and why.
    pub doubt: Option<Arc<Doubt>>,
    /// When it was first seen at its node, since the start.
    pub seen: Duration,
    /// Its identity has been read at least once, so subscribers were told of it.
    pub announced: bool,
    /// What the last open that met a busy device said.
    pub busy: String,
    /// When its size was read on the opened device.
    sized: Mark,
}

impl Disk {
    /// The identity that it is called by.
    pub fn primary(&self) -> Option<&Identity> {
        identity::primary(&self.identities)
    }

    /// `scheme:value` by precedence, or empty.
    pub fn id(&self) -> String {
        self.primary().map(ToString::to_string).unwrap_or_default()
    }

    /// What the disk says of itself.
    pub fn said(&self) -> impl Iterator<Item = &Identity> {
        let made = |identity: &&Identity| identity.scheme != Scheme::Attachment;
        self.identities.iter().filter(made)
    }

    /// The multipath map or the array that has this disk. Its members are never candidates; what is built on them may be.
    pub fn member_of(&self) -> Option<&Holder> {
        let holders = &mut self.facts.holders.iter();
        holders.find(|holder| holder.kind != HolderKind::Other)
    }

    /// Why the disk may not be the volume with these candidates although it is known as that.
    pub fn doubted(&self, candidates: &BTreeSet<Identity>) -> Option<&Doubt> {
        let doubt = self.doubt.as_deref()?;
        let shared = &mut self
            .identities
            .iter()
            .filter(|one| candidates.contains(one));
        shared.all(|one| doubt.of.contains(one)).then_some(doubt)
    }

    pub fn is_member(&self) -> bool {
        self.member_of().is_some()
    }
}

/// What an observation changed.
#[derive(Debug)]
pub(super) enum DiskChange {
    Came(DiskSeq),
    Changed {
        diskseq: DiskSeq,
        before: Box<Disk>,
    },
    Left(Box<Disk>),
    /// A survey did not see it, and no other disk in its place; or it is not to be served as it is now. If it comes back, it never was away.
    Missed(Box<Disk>),
}

#[derive(Debug, Clone)]
pub(super) struct Disks {
    pub(super) boot: BootId,
    /// How long a disk may take to say that it is no other one.
    pub(super) confirm_within: Duration,
    /// The time of what is observed now, since the start.
    pub now: Duration,
    /// Boxed: a disk that comes or goes moves its neighbours in the map.
    disks: BTreeMap<DiskSeq, Box<Disk>>,
    by_number: Index<DeviceNumber, DiskSeq>,
    by_node: Index<DeviceNode, DiskSeq>,
    by_identity: Index<Identity, BTreeSet<DiskSeq>>,
    /// The newest observation of each device number. Pruned by each survey.
    touched: BTreeMap<DeviceNumber, Mark>,
    /// The newest survey, which observed every device number.
    surveyed_at: Mark,
}

impl Disks {
    pub fn new(boot: BootId, confirm_within: Duration) -> Disks {
        Disks {
            boot,
            confirm_within,
            now: Duration::ZERO,
            disks: BTreeMap::new(),
            by_number: Index::default(),
            by_node: Index::default(),
            by_identity: Index::default(),
            touched: BTreeMap::new(),
            surveyed_at: Mark::default(),
        }
    }

    /// The disk of this node.
    pub fn at(&self, node: &DeviceNode) -> Option<&Disk> {
        self.get(*self.by_node.get(node)?)
    }

    pub fn get(&self, diskseq: DiskSeq) -> Option<&Disk> {
        self.disks.get(&diskseq).map(Box::as_ref)
    }

    pub fn get_mut(&mut self, diskseq: DiskSeq) -> Option<&mut Disk> {
        self.disks.get_mut(&diskseq).map(Box::as_mut)
    }

    pub fn iter(&self) -> impl Iterator<Item = (DiskSeq, &Disk)> {
        self.disks
            .iter()
            .map(|(diskseq, disk)| (*diskseq, disk.as_ref()))
    }

    /// The disks that present one of these identities.
    pub fn presenting(&self, candidates: &BTreeSet<Identity>) -> BTreeSet<DiskSeq> {
        candidates
            .iter()
            .filter_map(|c| self.by_identity.get(c))
            .flatten()
            .copied()
            .collect()
    }

    /// True when a disk presents one of these identities.
    pub fn present(&self, candidates: &BTreeSet<Identity>) -> bool {
        candidates.iter().any(|candidate| {
            self.by_identity
                .get(candidate)
                .is_some_and(|disks| !disks.is_empty())
        })
    }

    /// True while another attached disk has the same name by precedence.
    pub fn has_twin(&self, disk: &Disk) -> bool {
        identity::primary(&disk.identities)
            .and_then(|id| self.by_identity.get(id))
            .is_some_and(|sharers| sharers.len() > 1)
    }

    /// Takes over the size that was read on the opened device, as of `mark`; the one before.
    pub fn believe_size(&mut self, diskseq: DiskSeq, mark: Mark, size: u64) -> Option<u64> {
        let disk = self.get_mut(diskseq)?;
        disk.sized = mark;
        Some(std::mem::replace(&mut disk.facts.size, size))
    }

    pub fn seen(&mut self, mark: Mark, mut facts: DiskFacts) -> Vec<DiskChange> {
        if self.is_stale(facts.number, mark) {
            return Vec::new();
        }
        // Of a reading that was under way when the disk was opened the size may be an older one: as less it would be taken for a disk that shrank.
        if let Some(known) = self.get(facts.diskseq)
            && known.sized > mark
        {
            facts.size = known.facts.size;
        }
        self.touched.insert(facts.number, mark);
        let mut changes = Vec::new();
        // The number was given to another disk: the one that had it is gone, told or not (invariant 4).
        if let Some(&tenant) = self.by_number.get(&facts.number)
            && tenant != facts.diskseq
        {
            changes.extend(self.remove(tenant));
        }
        // A disk under another number: one diskseq is one disk, so it is the same, released as it was, and what is open
        // of it was proven by that diskseq. The next open compares the number.
        if let Some(known) = self.disks.get(&facts.diskseq).map(|disk| disk.facts.number)
            && known != facts.number
        {
            self.by_number.remove(&known);
        }
        changes.extend(self.put(facts));
        changes
    }

    pub fn gone(
        &mut self,
        mark: Mark,
        number: DeviceNumber,
        diskseq: Option<DiskSeq>,
    ) -> Vec<DiskChange> {
        if self.is_stale(number, mark) {
            return Vec::new();
        }
        match (self.by_number.get(&number).copied(), diskseq) {
            // The number already belongs to a later disk: this tells of the one before it, and nothing of the later one.
            (Some(tenant), Some(told)) if tenant > told => return Vec::new(),
            _ => self.touched.insert(number, mark),
        };
        match (self.by_number.get(&number).copied(), diskseq) {
            (Some(tenant), _) => self.remove(tenant).into_iter().collect(),
            (None, _) => Vec::new(),
        }
    }

    /// What has this number is not to be served as it is now, and has not left.
    pub fn barred(&mut self, mark: Mark, number: DeviceNumber) -> Vec<DiskChange> {
        if self.is_stale(number, mark) {
            return Vec::new();
        }
        self.touched.insert(number, mark);
        let tenant = self.by_number.get(&number).copied();
        let change = tenant.and_then(|tenant| self.remove(tenant));
        let missed = change.map(|change| match change {
            DiskChange::Left(disk) => DiskChange::Missed(disk),
            change => change,
        });
        missed.into_iter().collect()
    }

    /// Makes the model equal to the machine (invariant 4), but for what was observed after `mark`, and for files, which
    /// no survey of disks knows.
    pub fn surveyed(&mut self, mark: Mark, disks: Vec<DiskFacts>) -> Vec<DiskChange> {
        if self.surveyed_at > mark {
            return Vec::new();
        }
        self.surveyed_at = mark;
        let present: BTreeSet<DiskSeq> = disks.iter().map(|facts| facts.diskseq).collect();
        let taken: BTreeSet<DeviceNumber> = disks.iter().map(|facts| facts.number).collect();
        let missing: Vec<DiskSeq> = self
            .disks
            .values()
            .filter(|disk| !disk.facts.diskseq.is_file())
            .filter(|disk| !present.contains(&disk.facts.diskseq))
            .filter(|disk| !self.is_stale(disk.facts.number, mark))
            .map(|disk| disk.facts.diskseq)
            .collect();
        let mut changes: Vec<DiskChange> = missing
            .into_iter()
            .filter_map(|diskseq| self.remove(diskseq))
            .map(|change| match change {
                DiskChange::Left(disk) if !taken.contains(&disk.facts.number) => {
                    DiskChange::Missed(disk)
                }
                change => change,
            })
            .collect();
        for facts in disks {
            changes.extend(self.seen(mark, facts));
        }
        let by_number = &self.by_number;
        // What is older than this survey is stale by `surveyed_at` alone. Of a file nothing is told once it has left.
        self.touched.retain(|number, touched| {
            (*touched > mark && !number.is_file()) || by_number.contains_key(number)
        });
        changes
    }

    fn is_stale(&self, number: DeviceNumber, mark: Mark) -> bool {
        // Files are observed by an edge of their own, which counts its own marks.
        (self.surveyed_at > mark && !number.is_file())
            || self
                .touched
                .get(&number)
                .is_some_and(|touched| *touched > mark)
    }

    fn put(&mut self, facts: DiskFacts) -> Option<DiskChange> {
        let diskseq = facts.diskseq;
        let before = self.disks.get(&diskseq).cloned();
        let (identities, doubt) = self.weigh(&facts, before.as_deref());
        let stayed = before
            .as_ref()
            .filter(|before| before.facts.node == facts.node);
        let seen = stayed.map_or(self.now, |before| before.seen);
        self.unindex(diskseq);
        for identity in identities.iter() {
            self.by_identity
                .or_default(identity.clone())
                .insert(diskseq);
        }
        self.by_number.insert(facts.number, diskseq);
        self.by_node.insert(facts.node.clone(), diskseq);
        let disk = Disk {
            seen,
            announced: before.as_ref().is_some_and(|before| before.announced),
            busy: before
                .as_ref()
                .map(|before| before.busy.clone())
                .unwrap_or_default(),
            sized: before
                .as_ref()
                .map_or(Mark::default(), |before| before.sized),
            facts,
            identities,
            doubt,
        };
        let change = match before {
            None => Some(DiskChange::Came(diskseq)),
            Some(before)
                if before.facts == disk.facts
                    && before.identities == disk.identities
                    && before.doubt == disk.doubt =>
            {
                None
            }
            Some(before) => Some(DiskChange::Changed { diskseq, before }),
        };
        self.disks.insert(diskseq, Box::new(disk));
        change
    }

    fn remove(&mut self, diskseq: DiskSeq) -> Option<DiskChange> {
        self.unindex(diskseq);
        let disk = self.disks.remove(&diskseq)?;
        if self.by_number.get(&disk.facts.number) == Some(&diskseq) {
            self.by_number.remove(&disk.facts.number);
        }
        Some(DiskChange::Left(disk))
    }

    fn unindex(&mut self, diskseq: DiskSeq) {
        let Some(disk) = self.disks.get(&diskseq) else {
            return;
        };
        if self.by_node.get(&disk.facts.node) == Some(&diskseq) {
            self.by_node.remove(&disk.facts.node);
        }
        for identity in disk.identities.iter() {
            if let Some(sharers) = self.by_identity.get_mut(identity) {
                sharers.remove(&diskseq);
                if sharers.is_empty() {
                    self.by_identity.remove(identity);
                }
            }
        }
    }

    /// The indexes say what the disks say.
    pub fn check(&self) -> Result<(), String> {
        for (diskseq, disk) in &self.disks {
            if self.by_number.get(&disk.facts.number) != Some(diskseq) {
                return Err(format!(
                    "disk {diskseq} is not found by its number {}",
                    disk.facts.number
                ));
            }
            for identity in disk.identities.iter() {
                if !self
                    .by_identity
                    .get(identity)
                    .is_some_and(|sharers| sharers.contains(diskseq))
                {
                    return Err(format!("disk {diskseq} is not found by {identity}"));
                }
            }
        }
        let presented: BTreeSet<&Identity> = self
            .disks
            .values()
            .flat_map(|disk| disk.identities.iter())
            .collect();
        let stale = presented
            .iter()
            .filter_map(|identity| Some((identity, self.by_identity.get(*identity)?)))
            .any(|(identity, sharers)| {
                sharers.iter().any(|diskseq| {
                    self.disks
                        .get(diskseq)
                        .is_none_or(|disk| !disk.identities.contains(*identity))
                })
            });
        if self.by_number.len() != self.disks.len()
            || self.by_identity.len() != presented.len()
            || stale
        {
            return Err("an index names a disk that is gone".to_owned());
        }
        Ok(())
    }
}
