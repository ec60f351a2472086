//! What the bus was last told: all objects with their state, and the difference that a new state makes.
//! PURE: it says what to tell and tells nothing.
//!
//! A property is always computed from the state that is stored here, and a signal from the difference of two such
//! states, so that the two cannot contradict each other.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::Arc;

use zbus::{ObjectPath, Variant};

use super::export::{self, EXPORT};
use super::job::{self, JOB};
use super::log_control::{self, LOG_CONTROL};
use super::volume::{self, VOLUME};
use super::{JobView, LogState, paths};
use crate::correlation::{DiskSeq, DiskView, ExportName, ExportView, RequestError};

/// Properties by name.
pub type Properties = Vec<(&'static str, Variant<'static>)>;

/// How many disks that left are remembered with their paths, for the signals that say that they
/// left. Those follow in the same batch, so this only has to hold the largest burst.
const DEPARTED_MAX: usize = 16 * 1024;

/// One object as the bus knows it.
#[derive(Debug, Clone, PartialEq)]
pub enum Object {
    Export {
        view: ExportView,
        clients: u32,
        /// The path of its disk's object, as it is now.
        volume: ObjectPath<'static>,
    },
    Volume {
        view: DiskView,
    },
    Job {
        view: JobView,
    },
}

/// What subscribers have to be told.
#[derive(Debug, PartialEq)]
pub enum Told {
    Added {
        path: ObjectPath<'static>,
        interface: &'static str,
        properties: Properties,
    },
    Changed {
        path: ObjectPath<'static>,
        interface: &'static str,
        /// Only those that differ; never empty.
        properties: Properties,
    },
    Removed {
        path: ObjectPath<'static>,
        interface: &'static str,
    },
    /// The job at this path ended so.
    Completed {
        path: ObjectPath<'static>,
        result: Result<(), RequestError>,
    },
}

#[derive(Debug, Default)]
pub struct Tree {
    /// Shared with readers that take a snapshot.
    objects: HashMap<ObjectPath<'static>, Arc<Object>>,
    exports: BTreeMap<ExportName, ObjectPath<'static>>,
    disks: BTreeMap<DiskSeq, ObjectPath<'static>>,
    /// The exports whose `Volume` follows a disk's path.
    bound: BTreeMap<DiskSeq, BTreeSet<ExportName>>,
    jobs: BTreeSet<u64>,
    /// Not among the managed objects: its interface is systemd's.
    pub log: LogState,
    /// Paths of disks that left, oldest first; at most [`DEPARTED_MAX`].
    departed: VecDeque<(DiskSeq, ObjectPath<'static>)>,
}

impl Object {
    pub fn interface(&self) -> &'static str {
        match self {
            Object::Export { .. } => EXPORT.name,
            Object::Volume { .. } => VOLUME.name,
            Object::Job { .. } => JOB.name,
        }
    }

    pub fn properties(&self) -> Properties {
        match self {
            Object::Export {
                view,
                clients,
                volume,
            } => export::properties(view, *clients, volume),
            Object::Volume { view } => volume::properties(view),
            Object::Job { view } => job::properties(view),
        }
    }
}

impl Tree {
    /// Takes an export's new state; `None` when it is gone.
    pub fn put_export(&mut self, name: &ExportName, state: Option<(ExportView, u32)>) -> Vec<Told> {
        let before = self.exports.get(name).cloned();
        if let Some(Object::Export { view, .. }) = before
            .as_ref()
            .and_then(|path| self.objects.get(path))
            .map(Arc::as_ref)
            && let Some(disk) = view.disk
            && let Some(names) = self.bound.get_mut(&disk)
        {
            names.remove(name);
            if names.is_empty() {
                self.bound.remove(&disk);
            }
        }
        let Some((view, clients)) = state else {
            self.exports.remove(name);
            return before
                .into_iter()
                .filter_map(|path| self.remove(path))
                .collect();
        };
        if let Some(disk) = view.disk {
            self.bound.entry(disk).or_default().insert(name.clone());
        }
        let Ok(path) = before.map_or_else(|| ObjectPath::try_from(paths::export(name)), Ok) else {
            // paths:: only makes valid ones; its tests hold that.
            return Vec::new();
        };
        self.exports.insert(name.clone(), path.clone());
        let volume = self.volume_path(view.disk);
        let object = Object::Export {
            view,
            clients,
            volume,
        };
        self.put(path, object).into_iter().collect()
    }

    /// Takes a disk's new state; `None` when it is gone.
    pub fn put_disk(&mut self, diskseq: DiskSeq, state: Option<DiskView>) -> Vec<Told> {
        let mut told = Vec::new();
        let before = self.disks.get(&diskseq).cloned();
        match state {
            None => {
                if let Some(path) = self.disks.remove(&diskseq) {
                    if self.departed.len() == DEPARTED_MAX {
                        self.departed.pop_front();
                    }
                    self.departed.push_back((diskseq, path.clone()));
                    told.extend(self.remove(path));
                }
            }
            Some(view) => {
                let path = self.path_for(&view);
                if let Some(old) = before.clone().filter(|old| *old != path) {
                    told.extend(self.remove(old));
                }
                self.disks.insert(diskseq, path.clone());
                told.extend(self.put(path, Object::Volume { view }));
            }
        }
        if self.disks.get(&diskseq) != before.as_ref() {
            told.extend(self.rebind(diskseq));
        }
        told
    }

    /// Takes a job's new state; with its end it is told, and the object goes.
    pub fn put_job(&mut self, job: JobView, end: Option<Result<(), RequestError>>) -> Vec<Told> {
        let id = job.id;
        let path = ObjectPath::try_from(paths::job(id)).unwrap_or_default();
        self.jobs.insert(id);
        let mut told: Vec<Told> = self
            .put(path.clone(), Object::Job { view: job })
            .into_iter()
            .collect();
        if let Some(result) = end {
            told.push(Told::Completed {
                path: path.clone(),
                result,
            });
            self.jobs.remove(&id);
            told.extend(self.remove(path));
        }
        told
    }

    /// Takes the log's new state.
    pub fn put_log(&mut self, state: LogState) -> Option<Told> {
        let before = log_control::properties(self.log);
        self.log = state;
        let mut properties = log_control::properties(state);
        properties.retain(|property| !before.contains(property));
        (!properties.is_empty()).then_some(Told::Changed {
            path: ObjectPath::from_static_str_unchecked(log_control::PATH),
            interface: LOG_CONTROL.name,
            properties,
        })
    }

    pub fn object(&self, path: &str) -> Option<Arc<Object>> {
        // A lookup by &str would need ObjectPath: Borrow<str>.
        let path = ObjectPath::try_from(path).ok()?;
        self.objects.get(&path).cloned()
    }

    pub fn snapshot(&self) -> Vec<(ObjectPath<'static>, Arc<Object>)> {
        self.objects
            .iter()
            .map(|(path, object)| (path.clone(), object.clone()))
            .collect()
    }

    /// Returns the last elements of the paths below `parent`.
    pub fn children(&self, parent: &str) -> Vec<String> {
        let of = |path: &ObjectPath<'_>| path.as_str().rsplit('/').next().unwrap_or("").to_owned();
        match parent {
            paths::EXPORTS => self.exports.values().map(of).collect(),
            paths::VOLUMES => self.disks.values().map(of).collect(),
            paths::JOBS => self.jobs.iter().map(u64::to_string).collect(),
            _ => Vec::new(),
        }
    }

    /// Returns the path of a disk's object, if it has one now.
    pub fn disk_path(&self, diskseq: DiskSeq) -> Option<ObjectPath<'static>> {
        self.disks.get(&diskseq).cloned()
    }

    /// Returns the path that a disk's object has, or had when it left, or would have had.
    pub fn told_disk_path(&self, diskseq: DiskSeq, id: &str) -> ObjectPath<'static> {
        let departed = || {
            let mut newest_first = self.departed.iter().rev();
            newest_first
                .find(|(seq, _)| *seq == diskseq)
                .map(|(_, path)| path.clone())
        };
        // Never told: it came and went between two looks, so no one else has its path by identity unless
        // that is another disk's.
        let computed = || {
            let by_id = paths::volume_by_id(id).and_then(|path| ObjectPath::try_from(path).ok());
            by_id
                .filter(|path| !self.objects.contains_key(path))
                .or_else(|| ObjectPath::try_from(paths::volume_by_diskseq(diskseq)).ok())
        };
        self.disk_path(diskseq)
            .or_else(departed)
            .or_else(computed)
            .unwrap_or_default()
    }

    pub fn export_path(&self, name: &ExportName) -> ObjectPath<'static> {
        let known = self.exports.get(name).cloned();
        known
            .or_else(|| ObjectPath::try_from(paths::export(name)).ok())
            .unwrap_or_default()
    }

    fn volume_path(&self, disk: Option<DiskSeq>) -> ObjectPath<'static> {
        disk.and_then(|disk| self.disk_path(disk))
            .unwrap_or_default()
    }

    /// A disk whose path by identity is another disk's (two twins, one of them not known as such yet) is named by
    /// its disk sequence number: two objects never share a path.
    fn path_for(&self, view: &DiskView) -> ObjectPath<'static> {
        let wanted = ObjectPath::try_from(paths::volume(view)).unwrap_or_default();
        match self.objects.get(&wanted).map(Arc::as_ref) {
            Some(Object::Volume { view: other }) if other.diskseq != view.diskseq => {
                ObjectPath::try_from(paths::volume_by_diskseq(view.diskseq)).unwrap_or_default()
            }
            _ => wanted,
        }
    }

    /// Brings the `Volume` of a disk's exports up to date after its path came, went or moved.
    fn rebind(&mut self, diskseq: DiskSeq) -> Vec<Told> {
        let volume = self.volume_path(Some(diskseq));
        let names = self.bound.get(&diskseq).cloned().unwrap_or_default();
        let mut told = Vec::new();
        for name in names {
            let Some(path) = self.exports.get(&name).cloned() else {
                continue;
            };
            if let Some(Object::Export { view, clients, .. }) =
                self.objects.get(&path).map(Arc::as_ref)
            {
                let object = Object::Export {
                    view: view.clone(),
                    clients: *clients,
                    volume: volume.clone(),
                };
                told.extend(self.put(path, object));
            }
        }
        told
    }

    fn put(&mut self, path: ObjectPath<'static>, object: Object) -> Option<Told> {
        let interface = object.interface();
        let old = self.objects.get(&path);
        if old.is_some_and(|old| **old == object) {
            return None;
        }
        let mut properties = object.properties();
        let before = old.map(|old| old.properties());
        self.objects.insert(path.clone(), Arc::new(object));
        let Some(before) = before else {
            return Some(Told::Added {
                path,
                interface,
                properties,
            });
        };
        properties.retain(|property| !before.contains(property));
        (!properties.is_empty()).then_some(Told::Changed {
            path,
            interface,
            properties,
        })
    }

    fn remove(&mut self, path: ObjectPath<'static>) -> Option<Told> {
        let object = self.objects.remove(&path)?;
        Some(Told::Removed {
            path,
            interface: object.interface(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::super::log_control::LogLevel;
    use super::super::samples::{disk, export as sample, name};
    use super::*;

    fn names(told: &Told) -> Vec<&'static str> {
        match told {
            Told::Added { properties, .. } | Told::Changed { properties, .. } => {
                properties.iter().map(|(name, _)| *name).collect()
            }
            Told::Removed { .. } | Told::Completed { .. } => Vec::new(),
        }
    }

    #[test]
    fn properties_are_those_of_the_tables_with_their_signatures() {
        let objects = [
            (
                &EXPORT,
                Object::Export {
                    view: sample("a", Some(1)),
                    clients: 1,
                    volume: ObjectPath::default(),
                },
            ),
            (&VOLUME, Object::Volume { view: disk(1, "a") }),
        ];
        for (table, object) in objects {
            let found: Vec<(String, String)> = object
                .properties()
                .iter()
                .map(|(name, value)| ((*name).to_owned(), value.value_signature().to_string()))
                .collect();
            let wanted: Vec<(String, String)> = table
                .properties
                .iter()
                .map(|(name, signature)| ((*name).to_owned(), (*signature).to_owned()))
                .collect();
            assert_eq!(found, wanted);
        }
    }

    #[test]
    fn equal_state_tells_nothing_and_other_state_only_the_difference() {
        let mut tree = Tree::default();
        let mut view = sample("a", None);
        let told = tree.put_export(&name("a"), Some((view.clone(), 0)));
        assert!(matches!(told[..], [Told::Added { .. }]));
        assert!(
            tree.put_export(&name("a"), Some((view.clone(), 0)))
                .is_empty()
        );
        view.size = 77;
        let told = tree.put_export(&name("a"), Some((view, 3)));
        assert_eq!(names(&told[0]), ["Size", "Clients"]);
    }

    #[test]
    fn a_log_level_that_was_set_is_told_once() {
        let mut tree = Tree::default();
        let quiet = LogState {
            level: LogLevel::Warning,
            ..tree.log
        };
        let told = tree.put_log(quiet).unwrap();
        assert_eq!(names(&told), ["LogLevel"]);
        assert_eq!((tree.log, tree.put_log(quiet)), (quiet, None));
    }

    #[test]
    fn an_export_follows_its_disks_object() {
        let mut tree = Tree::default();
        tree.put_export(&name("a"), Some((sample("a", Some(7)), 0)));
        let told = tree.put_disk(DiskSeq(7), Some(disk(7, "x")));
        assert!(matches!(told[0], Told::Added { .. }));
        assert_eq!(names(&told[1]), ["Volume"]);
        let told = tree.put_disk(DiskSeq(7), None);
        assert!(matches!(told[0], Told::Removed { .. }));
        assert_eq!(names(&told[1]), ["Volume"]);
        assert!(tree.put_export(&name("a"), None).len() == 1);
        assert!(tree.bound.is_empty() && tree.objects.is_empty());
    }

    #[test]
    fn a_twin_moves_to_its_diskseq_and_back() {
        let mut tree = Tree::default();
        let mut first = disk(1, "x");
        tree.put_disk(DiskSeq(1), Some(first.clone()));
        let home = tree.disk_path(DiskSeq(1)).unwrap();
        first.twin = true;
        let told = tree.put_disk(DiskSeq(1), Some(first.clone()));
        assert!(matches!(&told[0], Told::Removed { path, .. } if *path == home));
        assert!(
            matches!(&told[1], Told::Added { path, .. } if path.as_str().ends_with("/diskseq_1"))
        );
        first.twin = false;
        tree.put_disk(DiskSeq(1), Some(first));
        assert_eq!(tree.disk_path(DiskSeq(1)).unwrap(), home);
    }

    #[test]
    fn two_disks_never_share_a_path_even_when_no_one_says_twin() {
        let mut tree = Tree::default();
        tree.put_disk(DiskSeq(1), Some(disk(1, "x")));
        tree.put_disk(DiskSeq(2), Some(disk(2, "x")));
        assert_ne!(tree.disk_path(DiskSeq(1)), tree.disk_path(DiskSeq(2)));
        tree.put_disk(DiskSeq(2), None);
        assert_eq!(tree.snapshot().len(), 1);
    }

    #[test]
    fn a_disk_that_left_keeps_its_path_for_the_signal() {
        let mut tree = Tree::default();
        let mut view = disk(1, "x");
        view.twin = true;
        tree.put_disk(DiskSeq(1), Some(view));
        tree.put_disk(DiskSeq(1), None);
        let path = tree.told_disk_path(DiskSeq(1), "loop:x");
        assert!(path.as_str().ends_with("/diskseq_1"));
    }
}
