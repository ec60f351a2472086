//! What the kernel says of the paths that are watched: a name that came or went, a file that was closed by a writer, a mount. EDGE:
//! inotify(7), and `/proc/self/mountinfo`, whose changes poll(2) tells (proc_pid_mountinfo(5)).
//!
//! It is a hint, as an event of a disk is: whatever it says, the path is looked up. What the kernel does not say (a file made longer
//! or shorter by someone who keeps it open, a change by another machine on a network file system) is seen at the next interval.
//! Writes are not asked for: each write of each client would be one.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::ffi::OsString;
use std::fs::File;
use std::future::pending;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until};

use crate::identity::Identity;

/// What belongs together comes together: a file that is removed and made anew at once is one that was replaced.
const REST: Duration = Duration::from_millis(50);
/// Machines that run containers mount all the time, and each mount is a look at every path.
const REST_OF_MOUNTS: Duration = Duration::from_secs(1);
/// Readings that nobody has taken; past it the kernel keeps the events, and says so when they are too many for it.
const READINGS_MAX: usize = 16;
/// So long the thread that reads may go on when nobody takes what it reads any more.
const ENDS_WITHIN: u16 = 5_000;

const OF_FOLDERS: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_ONLYDIR);
/// `IN_ATTRIB` is also the removal of a name.
const OF_FILES: AddWatchFlags = AddWatchFlags::IN_CLOSE_WRITE
    .union(AddWatchFlags::IN_ATTRIB)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF);

/// One thing whose events concern a path: a name in a folder, or the file itself.
pub type Place = (WatchDescriptor, Option<OsString>);

/// Adds watches; to be called where a file system may hang.
#[derive(Clone)]
pub struct Watcher {
    inotify: Arc<Inotify>,
    /// That there are no more of them was told.
    told: Arc<AtomicBool>,
}

impl Watcher {
    /// Watches the folders that lead to `below` in `root`, and the one that `root` lies in, as far as they are there.
    ///
    /// # Errors
    /// The kernel watches no more (inotify(7), `max_user_watches`).
    pub fn folders(&self, root: &Path, below: &Path) -> io::Result<Vec<Place>> {
        let mut places = Vec::new();
        let mut folder = match root.parent() {
            Some(parent) => {
                let name = root.file_name().map(OsString::from);
                if !self.folder(parent, name, &mut places)? {
                    return Ok(places);
                }
                root.to_owned()
            }
            None => PathBuf::from(root),
        };
        for part in below {
            if !self.folder(&folder, Some(part.to_owned()), &mut places)? {
                break;
            }
            folder.push(part);
        }
        Ok(places)
    }

    /// False when there is no such folder: the one above is watched for it.
    fn folder(
        &self,
        folder: &Path,
        name: Option<OsString>,
        places: &mut Vec<Place>,
    ) -> io::Result<bool> {
        match self.inotify.add_watch(folder, OF_FOLDERS) {
            Ok(watch) => places.push((watch, name)),
            Err(Errno::ENOENT | Errno::ENOTDIR | Errno::EACCES | Errno::ELOOP) => return Ok(false),
            Err(error) => return Err(error.into()),
        }
        Ok(true)
    }

    /// Watches what is open, under whatever name.
    ///
    /// # Errors
    /// As [`Watcher::folders`].
    pub fn file(&self, file: &File) -> io::Result<Place> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Ok((self.inotify.add_watch(path.as_str(), OF_FILES)?, None))
    }
}

impl Watcher {
    /// Tells, once, what is not watched: it is looked at all the same, at each interval.
    pub fn tell(&self, path: &str, error: &io::Error) {
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::warn!(path, %error, "the kernel watches no more (fs.inotify.max_user_watches): such files are only looked at every survey_interval_s");
        }
    }
}

/// Paths that are to be looked up.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Due {
    pub all: bool,
    pub paths: BTreeSet<Identity>,
}

impl Due {
    pub fn everything() -> Due {
        Due {
            all: true,
            paths: BTreeSet::new(),
        }
    }
}

/// Paths by what concerns them.
#[derive(Default)]
struct Concerned(HashMap<Option<OsString>, BTreeSet<Identity>>);

/// What is watched, and what has happened to it.
pub struct Notices {
    /// `None` when the kernel has none to give: then there are the intervals.
    watcher: Option<Watcher>,
    /// [`READINGS_MAX`]; its thread ends when this is dropped, and the other way round when it cannot read.
    readings: Option<mpsc::Receiver<Reading>>,
    /// As many as there are paths, times their folders.
    watched: HashMap<WatchDescriptor, Concerned>,
    places: BTreeMap<Identity, Vec<Place>>,
    /// Watches that a path no longer needed. Taken back only while no look-up is under way, which could just be relying on one.
    stale: HashSet<WatchDescriptor>,
    due: Due,
    rest_until: Option<Instant>,
}

impl Notices {
    pub fn new() -> Notices {
        let begun = begin();
        if let Err(error) = &begun {
            tracing::warn!(%error, "files cannot be watched: they are only looked at every survey_interval_s");
        }
        let (watcher, readings) = begun.ok().unzip();
        Notices {
            watcher,
            readings,
            watched: HashMap::new(),
            places: BTreeMap::new(),
            stale: HashSet::new(),
            due: Due::default(),
            rest_until: None,
        }
    }

    pub fn watcher(&self) -> Option<Watcher> {
        self.watcher.clone()
    }

    /// `path` is concerned by what happens in `places`, and nowhere else.
    pub fn register(&mut self, path: &Identity, places: Vec<Place>) {
        for (watch, name) in &places {
            let concerned = self.watched.entry(*watch).or_default();
            let paths = concerned.0.entry(name.clone()).or_default();
            paths.insert(path.clone());
        }
        let before = self.places.remove(path).unwrap_or_default();
        for (watch, name) in before.iter().filter(|place| !places.contains(place)) {
            let Some(concerned) = self.watched.get_mut(watch) else {
                continue;
            };
            if let Some(paths) = concerned.0.get_mut(name) {
                paths.remove(path);
                if paths.is_empty() {
                    concerned.0.remove(name);
                }
            }
            if concerned.0.is_empty() {
                self.stale.insert(*watch);
            }
        }
        if !places.is_empty() {
            self.places.insert(path.clone(), places);
        }
    }

    /// Takes watches back that no path needs. To be called while no look-up is under way, but for those whose answer is not taken.
    pub fn sweep(&mut self) {
        for watch in std::mem::take(&mut self.stale) {
            if self
                .watched
                .get(&watch)
                .is_none_or(|left| left.0.is_empty())
            {
                self.watched.remove(&watch);
                if let Some(watcher) = &self.watcher {
                    // Gone with its folder already, most often.
                    let _gone = watcher.inotify.rm_watch(watch);
                }
            }
        }
    }

    /// Waits until paths are to be looked up. Cancel-safe: what was read stays due.
    pub async fn next(&mut self) -> Due {
        loop {
            if self.rest_until.is_some_and(|until| until <= Instant::now()) {
                self.rest_until = None;
                return std::mem::take(&mut self.due);
            }
            let rest = self.rest_until;
            let rested = async move {
                match rest {
                    Some(until) => sleep_until(until).await,
                    None => pending().await,
                }
            };
            tokio::select! {
                () = rested => {}
                reading = next_of(self.readings.as_mut()) => match reading {
                    Some(reading) => self.on_reading(&reading),
                    None => {
                        tracing::warn!("files cannot be watched any more: they are only looked at every survey_interval_s");
                        self.readings = None;
                    }
                },
            }
        }
    }

    fn on_reading(&mut self, reading: &Reading) {
        if reading.mounted {
            self.due.all = true;
            self.rest(REST_OF_MOUNTS);
        }
        reading.events.iter().for_each(|event| self.on_event(event));
    }

    fn on_event(&mut self, event: &InotifyEvent) {
        if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
            self.due.all = true;
            self.rest(REST);
        }
        let Some(concerned) = self.watched.get(&event.wd) else {
            // Was watched once.
            return;
        };
        let paths: BTreeSet<Identity> = match &event.name {
            Some(_) => concerned.0.get(&event.name).cloned().unwrap_or_default(),
            // It is the folder or the file itself.
            None => concerned.0.values().flatten().cloned().collect(),
        };
        if event.mask.contains(AddWatchFlags::IN_IGNORED) {
            // The kernel has taken the watch back: what it was of is gone, or unmounted.
            self.watched.remove(&event.wd);
        }
        if !paths.is_empty() {
            self.due.paths.extend(paths);
            self.rest(REST);
        }
    }

    fn rest(&mut self, long: Duration) {
        let until = Instant::now() + long;
        self.rest_until = Some(self.rest_until.map_or(until, |before| before.min(until)));
    }
}

async fn next_of(readings: Option<&mut mpsc::Receiver<Reading>>) -> Option<Reading> {
    match readings {
        Some(readings) => readings.recv().await,
        None => pending().await,
    }
}

/// What was read at one time.
struct Reading {
    events: Vec<InotifyEvent>,
    /// Something was mounted or unmounted.
    mounted: bool,
}

fn begin() -> io::Result<(Watcher, mpsc::Receiver<Reading>)> {
    let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
    let watcher = Watcher {
        inotify: Arc::new(inotify),
        told: Arc::default(),
    };
    let mounts = File::open("/proc/self/mountinfo")?;
    let (out, readings) = mpsc::channel(READINGS_MAX);
    let inotify = Arc::clone(&watcher.inotify);
    // Thread: these descriptors have no place in the runtime that would be safe code. It only reads memory of the kernel, and ends
    // with the receiver.
    let thread = std::thread::Builder::new().name("file-watch".into());
    thread.spawn(move || {
        while !out.is_closed() {
            match read(&inotify, &mounts) {
                Ok(Some(reading)) => {
                    let _closed = out.blocking_send(reading);
                }
                Ok(None) => {}
                Err(error) => {
                    tracing::error!(%error, "cannot read what the kernel says of files");
                    return;
                }
            }
        }
    })?;
    Ok((watcher, readings))
}

/// Waits for the kernel to say something; `None` when it did not for a while.
fn read(inotify: &Inotify, mounts: &File) -> io::Result<Option<Reading>> {
    let mut fds = [
        PollFd::new(inotify.as_fd(), PollFlags::POLLIN),
        PollFd::new(mounts.as_fd(), PollFlags::POLLPRI),
    ];
    match poll(&mut fds, PollTimeout::from(ENDS_WITHIN)) {
        Ok(0) | Err(Errno::EINTR) => return Ok(None),
        Ok(_) => {}
        Err(error) => return Err(error.into()),
    }
    // Each change is told once, as an error, too (`fs/proc_namespace.c`, `mounts_poll`).
    let told = fds[1].revents().unwrap_or(PollFlags::empty());
    let mounted = told.intersects(PollFlags::POLLPRI | PollFlags::POLLERR);
    let events = match inotify.read_events() {
        Ok(events) => events,
        Err(Errno::EAGAIN | Errno::EINTR) => Vec::new(),
        Err(error) => return Err(error.into()),
    };
    Ok(Some(Reading { events, mounted }))
}
