//! Which exports look for an identity, and who of them look for it alike. PURE.
//!
//! Ten thousand exports of one file are of a few kinds: who comes to them is judged beside one of each kind, and not beside all.

use std::collections::BTreeSet;

use super::{Definition, ExportName, Source};
use crate::identity::VolumeId;

/// What of a definition decides whether another can stand beside it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Kind {
    volume: VolumeId,
    read_only: bool,
    share: bool,
    direct: bool,
    takes_turns: bool,
}

impl Kind {
    fn of(definition: &Definition) -> Kind {
        Kind {
            volume: definition.volume.clone(),
            read_only: definition.read_only,
            share: definition.share,
            direct: definition.direct,
            takes_turns: definition.source == Source::NbdServer,
        }
    }
}

/// Exports of one kind: at least one.
#[derive(Debug, Clone)]
pub(super) struct Alike {
    kind: Kind,
    /// Nearly always there are no others, and a set of one is ten times as large as its name.
    one: ExportName,
    others: BTreeSet<ExportName>,
}

impl Alike {
    /// All of them, in no order that means anything.
    pub fn names(&self) -> impl Iterator<Item = &ExportName> {
        std::iter::once(&self.one).chain(&self.others)
    }

    fn has(&self, name: &ExportName) -> bool {
        self.one == *name || self.others.contains(name)
    }

    fn insert(&mut self, name: &ExportName) {
        if self.one != *name {
            self.others.insert(name.clone());
        }
    }

    /// Whether one is left.
    fn remove(&mut self, name: &ExportName) -> bool {
        if self.one != *name {
            self.others.remove(name);
            return true;
        }
        let Some(next) = self.others.pop_first() else {
            return false;
        };
        self.one = next;
        true
    }
}

/// The exports that look for one identity.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanting {
    /// In the order of their kinds, of which there are at most some for a volume.
    kinds: Vec<Alike>,
}

impl Wanting {
    pub fn insert(&mut self, definition: &Definition) {
        let kind = Kind::of(definition);
        let name = &definition.name;
        match self.kinds.binary_search_by(|alike| alike.kind.cmp(&kind)) {
            Ok(at) => self.kinds[at].insert(name),
            Err(at) => {
                let alike = Alike {
                    kind,
                    one: name.clone(),
                    others: BTreeSet::new(),
                };
                // There is one for each identity of each export, so not more room than it takes.
                self.kinds.reserve_exact(1);
                self.kinds.insert(at, alike);
            }
        }
    }

    /// As it was inserted.
    pub fn remove(&mut self, definition: &Definition) {
        let kind = Kind::of(definition);
        if let Ok(at) = self.kinds.binary_search_by(|alike| alike.kind.cmp(&kind))
            && !self.kinds[at].remove(&definition.name)
        {
            self.kinds.remove(at);
        }
    }

    pub fn is_empty(&self) -> bool {
        self.kinds.is_empty()
    }

    /// All of them, in no order that means anything.
    pub fn names(&self) -> impl Iterator<Item = &ExportName> {
        self.kinds.iter().flat_map(Alike::names)
    }

    pub fn kinds(&self) -> &[Alike] {
        &self.kinds
    }

    /// Whether the export of this definition is found as what it is, and as nothing else.
    pub fn has(&self, definition: &Definition) -> bool {
        let kind = Kind::of(definition);
        let found = self
            .kinds
            .iter()
            .filter(|alike| alike.has(&definition.name));
        found.map(|alike| &alike.kind).eq([&kind])
    }
}
