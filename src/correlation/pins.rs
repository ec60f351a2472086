//! The sections of nbd-server's configuration that name a path, and what is known of their pins. PURE.

use std::collections::{BTreeMap, BTreeSet};

use super::pin_rule::{Pin, PinnedTo, Written};
use super::{Definition, DeviceNode, DiskSeq, ExportName, RequestId};
use crate::identity::VolumeId;

/// One export of a configuration: a section of nbd-server's, or an `[[export]]` of `nbdtrack.toml`, which has no path to be pinned.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfiguredSection {
    /// With the volume `path:PATH` when there is a path.
    pub definition: Definition,
    pub path: Option<NamedPath>,
}

impl From<Definition> for ConfiguredSection {
    fn from(definition: Definition) -> ConfiguredSection {
        let path = None;
        ConfiguredSection { definition, path }
    }
}

/// What a reading of the configuration found otherwise than the one before it; of the first one, everything. What is as it was is not
/// said, so that a reload costs what changed, beside whatever number of sections.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct SectionsChange {
    /// New, or not as they were.
    pub put: Vec<ConfiguredSection>,
    /// The reading before had them, and this one has them not.
    pub gone: BTreeSet<ExportName>,
    /// Not all files could be read: others may stand in them.
    pub unread: bool,
    /// They stand in the files and cannot be taken; `None` when not all files could be read: else what has no section has no pin.
    pub refused: Option<BTreeSet<ExportName>>,
}

/// A path of a section, as far as it could be looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedPath {
    pub path: String,
    /// `x-trust-path`
    pub trust: bool,
    pub written: Written,
    /// Where it leads, or why nowhere.
    pub at: Result<PathFound, String>,
}

/// Where a path led when it was looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathFound {
    /// The end of its links.
    pub node: DeviceNode,
    /// The disk that the node stood for.
    pub diskseq: Option<DiskSeq>,
    /// Since when that disk has had that node, where the machine knows; microseconds since 1970.
    pub born_us: Option<u64>,
    /// Since when the links have led there; `None` when the path is no link.
    pub linked_us: Option<u64>,
}

#[derive(Debug, Clone, Default)]
pub(super) struct Pins {
    pub(super) sections: BTreeMap<ExportName, NamedPath>,
    /// What of the configuration could not stand when it was judged last. It is judged again with each reading: what it stood against
    /// may have gone.
    pub(super) unmet: BTreeMap<ExportName, Definition>,
    pub(super) by_node: BTreeMap<DeviceNode, BTreeSet<ExportName>>,
    /// As the store has them.
    pub(super) known: BTreeMap<ExportName, Pin>,
    /// Sections of which something is on its way to the store.
    pub(super) storing: BTreeSet<ExportName>,
    /// The disks that are being pinned to, and by whom.
    pub(super) claimed: BTreeMap<DiskSeq, BTreeSet<ExportName>>,
    /// What one step has to store goes as one write.
    pub(super) batch: Vec<Pin>,
    /// The disks for whose sake the links of sections were looked up again last.
    pub(super) looked: BTreeMap<ExportName, DiskSeq>,
    /// What was said of a section last, so that the log has it once.
    pub(super) said: BTreeMap<ExportName, String>,
    last_request: u64,
}

/// Requests of the middle's own, apart from those that callers are counted by.
pub(super) const OWN_REQUESTS: u64 = 1 << 63;

impl Pins {
    pub fn new(known: Vec<Pin>) -> Pins {
        Pins {
            known: known
                .into_iter()
                .map(|pin| (pin.export.clone(), pin))
                .collect(),
            ..Pins::default()
        }
    }

    pub(super) fn request(&mut self) -> RequestId {
        self.last_request += 1;
        RequestId(OWN_REQUESTS | self.last_request)
    }

    /// Takes over what the configuration says otherwise than before; a section without a path has none. A line that is as it was keeps
    /// the earlier time: the file may have been written for the sake of another one.
    ///
    /// Gives those that lead nowhere, as they did before: there is nothing to be judged anew.
    pub(super) fn configure(
        &mut self,
        put: Vec<(ExportName, Option<NamedPath>)>,
        gone: &BTreeSet<ExportName>,
    ) -> BTreeSet<ExportName> {
        let mut nowhere = BTreeSet::new();
        for (name, section) in put {
            let Some(mut section) = section else {
                self.forget(&name);
                continue;
            };
            let known = self.sections.remove(&name);
            let same = known.as_ref().is_some_and(|known| {
                known.path == section.path && known.at == section.at && known.trust == section.trust
            });
            if same && section.at.is_err() {
                nowhere.insert(name.clone());
            }
            if let Some(known) = known {
                if known.path == section.path {
                    section.written = match (known.written, section.written) {
                        (Written::At(old), Written::At(new)) => Written::At(old.min(new)),
                        (unknown @ Written::Unknown(_), _) | (_, unknown) => unknown,
                    };
                }
                if !same {
                    self.unlist(&name, &known);
                }
            }
            if !same {
                for node in nodes(&section) {
                    let names = self.by_node.entry(node).or_default();
                    names.insert(name.clone());
                }
            }
            self.sections.insert(name, section);
        }
        for name in gone {
            self.forget(name);
        }
        nowhere
    }

    /// There is no section of this name any more, or it has no path.
    fn forget(&mut self, name: &ExportName) {
        if let Some(section) = self.sections.remove(name) {
            self.unlist(name, &section);
        }
        self.said.remove(name);
        self.looked.remove(name);
    }

    fn unlist(&mut self, name: &ExportName, section: &NamedPath) {
        for node in nodes(section) {
            if let Some(names) = self.by_node.get_mut(&node) {
                names.remove(name);
                if names.is_empty() {
                    self.by_node.remove(&node);
                }
            }
        }
    }
}

/// Where a section's disk may come: at the end of its links, and by the very name, for what is not there yet may come by it. (A link
/// has to be looked up again.)
fn nodes(section: &NamedPath) -> impl Iterator<Item = DeviceNode> {
    let found = section.at.as_ref().ok().map(|found| found.node.clone());
    found.into_iter().chain([DeviceNode(section.path.clone())])
}

impl PinnedTo {
    /// The volume that an export pinned to this serves; `None` when no disk can be that.
    pub(super) fn volume(&self) -> Option<VolumeId> {
        match self {
            PinnedTo::Volume(identity) => VolumeId::of_identity(identity).ok(),
            PinnedTo::Attachment { boot, diskseq } => {
                Some(VolumeId::of_attachment(&boot.0, diskseq.0))
            }
            PinnedTo::Doubtful { .. } => None,
        }
    }
}
