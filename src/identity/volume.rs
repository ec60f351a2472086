//! A volume as its consumer names it: `profile:id` from and to text, its candidates, and which volumes collide.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::hash::{Hash, Hasher};

use super::profile::{self, OptIn, Profile, profile_names};
use super::{Format, Identity, Scheme, worthless};

/// The longest volume id in bytes: the longest profile and its colon before a path of Linux's PATH_MAX.
pub const VOLUME_ID_BYTES_MAX: usize = 4096 + 16;

/// A volume as its consumer names it: `profile:id`, in the profile's one spelling, so that two ids
/// written differently that mean the same are equal.
#[derive(Clone)]
pub struct VolumeId {
    profile: &'static Profile,
    id: String,
}

impl VolumeId {
    /// Parses `profile:id`.
    ///
    /// # Errors
    /// Says what was expected, with an example, when there is no such profile or it has no such ids.
    pub fn parse(text: &str) -> Result<VolumeId, VolumeIdError> {
        if text.len() > VOLUME_ID_BYTES_MAX {
            return Err(VolumeIdError::TooLong(text.len()));
        }
        let Some((name, id)) = text.split_once(':') else {
            return Err(VolumeIdError::NoProfile(shown(text)));
        };
        let profile =
            profile::find(name).ok_or_else(|| VolumeIdError::UnknownProfile(shown(name)))?;
        let id = (profile.normalise)(id).ok_or_else(|| VolumeIdError::Malformed {
            seen: shown(text),
            expects: profile.expects,
            example: profile.example,
        })?;
        let volume = VolumeId { profile, id };
        if volume.candidates().is_empty() {
            return Err(VolumeIdError::Worthless(shown(text)));
        }
        Ok(volume)
    }

    pub fn profile(&self) -> &'static str {
        self.profile.name
    }

    /// The id in its profile's spelling, without the profile.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The volume that is the file under this path, read in this format.
    ///
    /// # Errors
    /// The path is not absolute, or not in the one spelling that a path has.
    pub fn of_file(path: &str, format: Format) -> Result<VolumeId, VolumeIdError> {
        VolumeId::parse(&format!("{}:{path}", format.scheme().name()))
    }

    /// The disk that says this of itself, and no other.
    ///
    /// # Errors
    /// The identity names no volume, or many disks could carry it.
    pub fn of_identity(identity: &Identity) -> Result<VolumeId, VolumeIdError> {
        VolumeId::parse(&format!("disk:{identity}"))
    }

    /// A disk that has no identity, by its number in one boot. Nothing that is written is this.
    pub fn of_attachment(boot: &str, diskseq: u64) -> VolumeId {
        VolumeId {
            profile: &profile::ATTACHMENT,
            id: Identity::of_attachment(boot, diskseq).value,
        }
    }

    /// What a path means, while that is not known: no disk is this. Nothing that is written is this.
    pub fn of_path(path: &str) -> VolumeId {
        VolumeId {
            profile: &profile::PATH,
            id: path.to_owned(),
        }
    }

    /// The path of which it is not known which volume it means.
    pub fn path(&self) -> Option<&str> {
        std::ptr::eq(self.profile, &profile::PATH).then_some(self.id.as_str())
    }

    /// The path, of a file.
    pub fn file(&self) -> Option<&str> {
        let named = |format: Format| self.profile.name == format.scheme().name();
        Format::ALL
            .into_iter()
            .any(named)
            .then_some(self.id.as_str())
    }

    /// The finite set of identities by which a disk is this volume; never empty, at most eight.
    pub fn candidates(&self) -> BTreeSet<Identity> {
        (self.profile.candidates)(&self.id)
            .into_iter()
            .filter(counts)
            .collect()
    }

    /// What the configuration has to allow before this id may be used; `None` for nothing.
    ///
    /// Whoever takes an id from outside asks this, not only the configuration.
    pub fn opt_in(&self) -> Option<OptIn> {
        (self.profile.opt_in)(&self.id)
    }
}

/// Whether a candidate identifies anything. A cut can leave the worthless part of a good id: a disk that shows
/// only that is not proven to be the volume.
fn counts(candidate: &Identity) -> bool {
    match candidate.scheme {
        Scheme::NvmeNguid | Scheme::ScsiNaa | Scheme::NvmeEui | Scheme::ScsiEui => {
            worthless::number(candidate.value.clone()).is_some()
        }
        Scheme::NvmeUuid | Scheme::GptGuid => {
            worthless::number(candidate.value.replace('-', "")).is_some()
        }
        Scheme::NvmeSerial => candidate
            .value
            .rsplit_once('_')
            .is_some_and(|(serial, _)| worthless::serial(serial).is_some()),
        Scheme::ScsiPg80
        | Scheme::VirtioSerial
        | Scheme::ScsiVendor
        | Scheme::ScsiT10
        | Scheme::GceName
        | Scheme::AzureName => worthless::serial(&candidate.value) == Some(&candidate.value),
        Scheme::Loop
        | Scheme::File
        | Scheme::Qcow2
        | Scheme::AzureLun
        | Scheme::Slot
        | Scheme::Attachment => true,
    }
}

/// As much of a foreign text as belongs into a message.
fn shown(text: &str) -> String {
    let mut shown: String = text.chars().take(SHOWN_CHARS_MAX).collect();
    if shown.len() < text.len() {
        shown.push('…');
    }
    shown.escape_debug().collect()
}

fn profile_list() -> String {
    profile_names().collect::<Vec<_>>().join(", ")
}

const SHOWN_CHARS_MAX: usize = 100;

impl fmt::Display for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.profile.name, self.id)
    }
}

impl fmt::Debug for VolumeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VolumeId({self})")
    }
}

impl PartialEq for VolumeId {
    fn eq(&self, other: &VolumeId) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for VolumeId {}

impl PartialOrd for VolumeId {
    fn partial_cmp(&self, other: &VolumeId) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for VolumeId {
    fn cmp(&self, other: &VolumeId) -> Ordering {
        (self.profile.name, &self.id).cmp(&(other.profile.name, &other.id))
    }
}

impl Hash for VolumeId {
    fn hash<H: Hasher>(&self, state: &mut H) {
        (self.profile.name, &self.id).hash(state);
    }
}

/// Why a string is no volume id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VolumeIdError {
    #[error(
        "\"{0}\": expected profile:id, for example cloudstack:5f0c2a1e-7b1d-4c55-9c39-0d2a6d0f8a11"
    )]
    NoProfile(String),
    #[error("\"{0}\": unknown profile, expected one of {names}", names = profile_list())]
    UnknownProfile(String),
    #[error("\"{seen}\": expected {expects}, for example {example}")]
    Malformed {
        seen: String,
        expects: &'static str,
        example: &'static str,
    },
    /// The id is one that many disks carry.
    #[error(
        "\"{0}\": many disks carry this value, it identifies none; give the disk a serial of its own"
    )]
    Worthless(String),
    #[error("a volume id has at most {VOLUME_ID_BYTES_MAX} bytes, this one has {0}")]
    TooLong(usize),
}

/// Two different volumes that one disk could be taken for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Collision<N> {
    pub first: N,
    pub first_volume: VolumeId,
    pub second: N,
    pub second_volume: VolumeId,
    /// What a disk of either could say of itself.
    pub shared: Identity,
}

impl<N: fmt::Display> fmt::Display for Collision<N> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "exports \"{}\" ({}) and \"{}\" ({}) cannot be told apart: a disk that says {} could be either",
            self.first, self.first_volume, self.second, self.second_volume, self.shared
        )
    }
}

/// The pairs of different volumes with a candidate in common. A volume that several exports name does not collide
/// with itself; each later name is reported against the first that has the candidate, once.
pub fn collisions<'a, N: Clone>(
    volumes: impl IntoIterator<Item = (N, &'a VolumeId)>,
) -> Vec<Collision<N>> {
    let mut owners: BTreeMap<Identity, (N, &VolumeId)> = BTreeMap::new();
    let mut found = Vec::new();
    for (name, volume) in volumes {
        let mut told: BTreeSet<&VolumeId> = BTreeSet::new();
        for candidate in volume.candidates() {
            match owners.get(&candidate) {
                None => {
                    owners.insert(candidate, (name.clone(), volume));
                }
                Some((_, owner)) if *owner == volume || !told.insert(owner) => (),
                Some((first, owner)) => found.push(Collision {
                    first: first.clone(),
                    first_volume: (*owner).clone(),
                    second: name.clone(),
                    second_volume: volume.clone(),
                    shared: candidate,
                }),
            }
        }
    }
    found
}
