//! Notices that files of the configuration have changed, and says so once they rest. EDGE: a thread of its own; the loop is only told.
//!
//! inotify(7) is a hint, as an event of a disk is: what counts is that everything is read again, by the code that SIGHUP runs. So a lost event
//! costs time until the next look, and a wrong one a reading that changes nothing.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, InotifyEvent, WatchDescriptor};
use tokio::sync::Notify;

use crate::config::{self, Watched};

/// An editor writes beside the file, renames, takes its copy away; an appliance writes several files: one reload for all of it.
const REST: Duration = Duration::from_millis(500);
/// Whoever goes on changing files is not waited for longer than this.
const REST_MAX: Duration = Duration::from_secs(5);
/// A folder that was put in another's place, or was not there: it is looked for this often.
const LOOK_AGAIN: Duration = Duration::from_secs(30);

/// Changes that are over when they are told: a file that is being written is not read.
const CHANGES: AddWatchFlags = AddWatchFlags::IN_CLOSE_WRITE
    .union(AddWatchFlags::IN_MOVED_TO)
    .union(AddWatchFlags::IN_MOVED_FROM)
    .union(AddWatchFlags::IN_DELETE)
    // Only of what is not written after it is made; see `is_change`.
    .union(AddWatchFlags::IN_CREATE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_ONLYDIR);

/// A watch of the configuration's files.
pub(in crate::daemon) struct ConfigWatch {
    inotify: Inotify,
    path: PathBuf,
    /// What counts in each folder that is watched: a handful.
    folders: HashMap<WatchDescriptor, Vec<Watched>>,
}

impl ConfigWatch {
    /// Watches the configuration at `path`. Blocks as its files do.
    ///
    /// # Errors
    /// The kernel has no inotify instance (inotify(7), `max_user_instances`).
    pub fn begin(path: PathBuf) -> io::Result<ConfigWatch> {
        let inotify = Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?;
        let mut watch = ConfigWatch {
            inotify,
            path,
            folders: HashMap::new(),
        };
        watch.look_up();
        Ok(watch)
    }

    /// Notifies `changed` after each change, for as long as the process lives.
    ///
    /// # Errors
    /// The kernel has no thread to give.
    pub fn run(mut self, changed: Arc<Notify>) -> io::Result<()> {
        // Ends with the process: it holds nothing that would have to be put in order.
        let thread = std::thread::Builder::new().name("config-watch".into());
        thread.spawn(move || {
            loop {
                if let Err(error) = self.next() {
                    tracing::error!(%error, "the configuration's files cannot be watched any more: send SIGHUP after a change");
                    return;
                }
                tracing::info!(config = %self.path.display(), "the configuration's files have changed");
                changed.notify_one();
            }
        })?;
        Ok(())
    }

    /// Watches the folders that the configuration has now; true when they are others than before.
    fn look_up(&mut self) -> bool {
        let mut folders: HashMap<WatchDescriptor, Vec<Watched>> = HashMap::new();
        for one in config::watched(&self.path) {
            match self.inotify.add_watch(&one.folder, CHANGES) {
                Ok(descriptor) => folders.entry(descriptor).or_default().push(one),
                // It may come: the folder above is watched.
                Err(Errno::ENOENT | Errno::ENOTDIR) => {}
                Err(error) => {
                    tracing::warn!(folder = %one.folder.display(), %error, "cannot watch the configuration");
                }
            }
        }
        let gone = self.folders.keys().filter(|old| !folders.contains_key(old));
        for descriptor in gone {
            // Gone with its folder already, most often.
            let _gone = self.inotify.rm_watch(*descriptor);
        }
        let other = folders.len() != self.folders.len()
            || folders.keys().any(|new| !self.folders.contains_key(new));
        self.folders = folders;
        other
    }

    /// Returns after a change, when nothing has changed for a while.
    fn next(&mut self) -> io::Result<()> {
        loop {
            let events = self.events(Instant::now() + LOOK_AGAIN)?;
            if events.iter().any(|event| self.is_change(event)) {
                self.rest()?;
                self.look_up();
                return Ok(());
            }
            if events.is_empty() && self.look_up() {
                return Ok(());
            }
        }
    }

    fn rest(&self) -> io::Result<()> {
        let most = Instant::now() + REST_MAX;
        let mut until = Instant::now() + REST;
        loop {
            let events = self.events(until.min(most))?;
            if events.is_empty() {
                return Ok(());
            }
            if events.iter().any(|event| self.is_change(event)) {
                until = Instant::now() + REST;
            }
        }
    }

    /// The next events; none when there were none until then.
    fn events(&self, until: Instant) -> io::Result<Vec<InotifyEvent>> {
        loop {
            let left = until.saturating_duration_since(Instant::now());
            // Rounded up, so that none is left afterwards.
            let left = PollTimeout::try_from(left.as_millis().saturating_add(1));
            let mut fds = [PollFd::new(self.inotify.as_fd(), PollFlags::POLLIN)];
            match poll(&mut fds, left.unwrap_or(PollTimeout::MAX)) {
                Ok(0) if Instant::now() >= until => return Ok(Vec::new()),
                Ok(0) | Err(Errno::EINTR) => continue,
                Ok(_) => {}
                Err(error) => return Err(error.into()),
            }
            match self.inotify.read_events() {
                Err(Errno::EAGAIN | Errno::EINTR) => {}
                Err(error) => return Err(error.into()),
                Ok(events) => return Ok(events),
            }
        }
    }

    fn is_change(&self, event: &InotifyEvent) -> bool {
        let Some(watched) = self.folders.get(&event.wd) else {
            // Events were lost (IN_Q_OVERFLOW), or are of a folder that was watched once.
            return event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW);
        };
        let Some(name) = &event.name else {
            // The folder itself went.
            return true;
        };
        let counting = watched.iter().find(|one| one.counts(name));
        counting.is_some_and(|one| {
            !event.mask.contains(AddWatchFlags::IN_CREATE) || is_whole(&one.folder.join(name))
        })
    }
}

/// A folder or a link is all there is when it is made; of a file the end of the writing is told.
fn is_whole(made: &Path) -> bool {
    made.symlink_metadata().is_ok_and(|facts| !facts.is_file())
}
