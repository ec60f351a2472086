//! Which exports look for an identity, and who of them look for it alike. PURE.
//!
//! Ten thousand exports of one file are of a few kinds: who comes to them is judged beside one of each kind, and not beside all.

use std::collections::{BTreeMap, BTreeSet};

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

/// The exports that look for one identity.
#[derive(Debug, Clone, Default)]
pub(super) struct Wanting {
    names: BTreeSet<ExportName>,
    by_kind: BTreeMap<Kind, BTreeSet<ExportName>>,
}

impl Wanting {
    pub fn insert(&mut self, definition: &Definition) {
        self.names.insert(definition.name.clone());
        let alike = self.by_kind.entry(Kind::of(definition)).or_default();
        alike.insert(definition.name.clone());
    }

    /// As it was inserted.
    pub fn remove(&mut self, definition: &Definition) {
        self.names.remove(&definition.name);
        let kind = Kind::of(definition);
        if let Some(alike) = self.by_kind.get_mut(&kind) {
            alike.remove(&definition.name);
            if alike.is_empty() {
                self.by_kind.remove(&kind);
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.names.is_empty()
    }

    /// All of them, by name.
    pub fn names(&self) -> &BTreeSet<ExportName> {
        &self.names
    }

    /// Those of each kind, by name.
    pub fn kinds(&self) -> impl Iterator<Item = &BTreeSet<ExportName>> {
        self.by_kind.values()
    }

    /// Whether the export of this definition is found as what it is, and as nothing else.
    pub fn has(&self, definition: &Definition) -> bool {
        let alike = |(kind, alike): (&Kind, &BTreeSet<ExportName>)| {
            alike.contains(&definition.name) == (*kind == Kind::of(definition))
        };
        self.names.contains(&definition.name) && self.by_kind.iter().all(alike)
    }
}
