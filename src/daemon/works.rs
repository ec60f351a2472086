//! Calls that need files: each is a task beside the loop, which does its I/O in threads of the blocking pool and asks the loop for what only
//! the loop may do.
//!
//! ```text
//!   loop ── CreateImage ──> task ──> thread: the file is made, durable
//!   loop <── Wish: export it ── task
//!   loop ── reply of the middle ──> task ── Wish: answer the caller ──> loop
//! ```
//! A task never makes the loop wait, and ends with its call; a thread that a file system holds is left behind with the call that began it. So that
//! a file system that hangs leaves room for the others (invariant 11), the works of each mount are counted by themselves.

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::runtime::Handle;
use tokio::sync::oneshot;

use super::backup::beside::Images;
use super::control::{Asker, Control};
use super::keeper::Order;
use super::reports::{Report, Reports};
use crate::correlation::{Backup, BackupChange, Event, Reply, Request, RequestError, RequestId};
use crate::dbus::Answer;
use crate::files::{self, Mounts};
use crate::image::beneath::FileError;

/// Works that go on at one time of one mount; past it a caller is told `NotReady`. Each takes one thread, for as long as its file system does.
const WORKS_PER_MOUNT: usize = 32;
/// Of all mounts: four can hang with all their places taken, and there is room for the rest.
const WORKS_MAX: usize = 5 * WORKS_PER_MOUNT;

/// What a task asks the loop for.
pub(super) enum Wish {
    Ask {
        what: Request,
        answer: oneshot::Sender<Result<Reply, RequestError>>,
    },
    /// Keep changes of backups.
    Keep {
        changes: Vec<BackupChange>,
        kept: oneshot::Sender<Result<(), RequestError>>,
    },
    /// The images that may be lost with these backups.
    ImagesBeside {
        backups: Arc<Vec<Backup>>,
        images: oneshot::Sender<Images>,
    },
    /// Whether an export has the file at this absolute path.
    IsExported {
        path: String,
        exported: oneshot::Sender<bool>,
    },
    /// How much of a backup is read, of 1,000, in the job that this is.
    Read { job: RequestId, read: u32 },
    /// The job is over.
    End {
        job: RequestId,
        result: Result<(), RequestError>,
    },
    /// Answer a caller, after all that was offered before is visible.
    Answer {
        asker: Asker,
        answer: Result<Answer, RequestError>,
    },
}

/// How many works go on, by the mounts that their files lie on; a mount without any is not in it. Held for map operations.
type Going = Arc<Mutex<BTreeMap<PathBuf, usize>>>;

/// The works that go on.
#[derive(Default)]
pub(super) struct Works(Going);

impl Works {
    /// A place among the works of each mount that any of the absolute `paths` lies on, for as long as it is held.
    ///
    /// # Errors
    /// `NotReady` where one of them, or the daemon, has as many as it may.
    pub fn place<'a>(
        &self,
        paths: impl IntoIterator<Item = &'a str>,
    ) -> Result<Place, RequestError> {
        self.place_on(&files::mounts(), paths)
    }

    fn place_on<'a>(
        &self,
        mounts: &Mounts,
        paths: impl IntoIterator<Item = &'a str>,
    ) -> Result<Place, RequestError> {
        let on: BTreeSet<PathBuf> = paths.into_iter().map(|path| mounts.of(path)).collect();
        let mut going = locked(&self.0);
        let full = on
            .iter()
            .find(|mount| going.get(*mount) >= Some(&WORKS_PER_MOUNT));
        if let Some(mount) = full {
            return Err(RequestError::NotReady(format!(
                "{WORKS_PER_MOUNT} calls that make or read files of {} go on already; try again",
                mount.display()
            )));
        }
        if going.values().sum::<usize>() + on.len() > WORKS_MAX {
            return Err(RequestError::NotReady(format!(
                "{WORKS_MAX} calls that make or read files go on already; try again"
            )));
        }
        for mount in &on {
            *going.entry(mount.clone()).or_default() += 1;
        }
        Ok(Place {
            going: Arc::clone(&self.0),
            on,
        })
    }
}

/// Held by one work while it goes on.
pub(super) struct Place {
    going: Going,
    on: BTreeSet<PathBuf>,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut going = locked(&self.going);
        for mount in &self.on {
            let left = going.get(mount).map_or(0, |count| count - 1);
            match left {
                0 => going.remove(mount),
                left => going.insert(mount.clone(), left),
            };
        }
    }
}

fn locked(going: &Mutex<BTreeMap<PathBuf, usize>>) -> MutexGuard<'_, BTreeMap<PathBuf, usize>> {
    // Each change of a number is whole, so a poisoned lock is still good.
    going.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A task's way to the loop. The loop is gone only when the daemon stops; then what is asked is answered `Failed`, by no one.
#[derive(Clone)]
pub(super) struct ToLoop(Reports);

impl ToLoop {
    pub async fn ask(&self, what: Request) -> Result<Reply, RequestError> {
        let (answer, answered) = oneshot::channel();
        self.wish(Wish::Ask { what, answer });
        answered.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// Durable at return (invariant 5).
    pub async fn keep(&self, changes: Vec<BackupChange>) -> Result<(), RequestError> {
        let (kept, told) = oneshot::channel();
        self.wish(Wish::Keep { changes, kept });
        told.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// The images that may lie on one of these, as they are now.
    pub async fn images_beside(&self, backups: Arc<Vec<Backup>>) -> Result<Images, RequestError> {
        let (images, told) = oneshot::channel();
        self.wish(Wish::ImagesBeside { backups, images });
        told.await.map_err(|_| stopping())
    }

    /// Whether an export has the file at the absolute `path`; false when the daemon is stopping.
    pub async fn is_exported(&self, path: &str) -> bool {
        let (exported, told) = oneshot::channel();
        let path = path.to_owned();
        self.wish(Wish::IsExported { path, exported });
        told.await.unwrap_or(false)
    }

    pub fn answer(&self, asker: Asker, answer: Result<Answer, RequestError>) {
        self.wish(Wish::Answer { asker, answer });
    }

    /// For what is told now and then, and not for each piece.
    pub fn read(&self, job: RequestId, read: u32) {
        self.wish(Wish::Read { job, read });
    }

    /// What is answered after this is answered when the job has gone.
    pub fn end(&self, job: RequestId, result: Result<(), RequestError>) {
        self.wish(Wish::End { job, result });
    }

    fn wish(&self, wish: Wish) {
        self.0.send(Report::Wishes(Box::new(wish)));
    }
}

fn stopping() -> RequestError {
    RequestError::Failed("the daemon is stopping".to_owned())
}

/// Runs what blocks in a thread of the pool.
pub(super) async fn in_thread<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, RequestError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|broken| RequestError::Failed(format!("a thread broke: {broken}")))
}

/// An open file that a task holds: closing it can wait for its file system (locks are given back, NFS and FUSE ask their servers), so wherever
/// it is dropped, a thread of the blocking pool does that and not the loop (invariant 11).
pub(super) struct Held<T: Send + 'static>(Option<T>);

impl<T: Send + 'static> Held<T> {
    pub fn new(file: T) -> Held<T> {
        Held(Some(file))
    }

    pub fn get(&self) -> Option<&T> {
        self.0.as_ref()
    }

    /// For a thread that may wait.
    pub fn take(mut self) -> Option<T> {
        self.0.take()
    }
}

impl<T: Send + 'static> Drop for Held<T> {
    fn drop(&mut self) {
        if let (Some(file), Ok(runtime)) = (self.0.take(), Handle::try_current()) {
            // Nobody waits for it; without a runtime the daemon has ended.
            let _closed = runtime.spawn_blocking(move || drop(file));
        }
    }
}

impl Control {
    pub(super) fn to_loop(&self) -> ToLoop {
        ToLoop(self.reports.clone())
    }

    pub(super) fn next_request(&mut self) -> RequestId {
        self.last_request = RequestId(self.last_request.0 + 1);
        self.last_request
    }

    pub(super) fn on_wish(&mut self, wish: Wish) {
        match wish {
            Wish::Ask { what, answer } => {
                let request = self.next_request();
                self.wished.insert(request, answer);
                self.apply(Event::Asked { request, what });
            }
            Wish::Keep { changes, kept } => match self.may_keep(&changes) {
                Ok(()) => self.order(Order::Keep { changes, kept }),
                Err(error) => {
                    // Who asked ends with the daemon only.
                    let _ended = kept.send(Err(error));
                }
            },
            Wish::ImagesBeside { backups, images } => {
                // As above.
                let _ended = images.send(self.images_beside(&backups));
            }
            Wish::IsExported { path, exported } => {
                let (_, mut volumes) = self.correlation.volumes();
                let is = volumes.any(|volume| volume.file() == Some(path.as_str()));
                // As above.
                let _ended = exported.send(is);
            }
            Wish::Read { job, read } => self.progress_reading(job, read),
            Wish::End { job, result } => {
                let done = self.finish_job(job, result);
                self.publisher.offer(done.into_iter().collect());
            }
            Wish::Answer { asker, answer } => self.answer(asker, answer),
        }
    }
}

/// What a caller hears of a path that leads nowhere.
pub(super) fn refusal_of_file(error: FileError) -> RequestError {
    let text = error.to_string();
    match error {
        FileError::Kernel { .. } => RequestError::Failed(text),
        FileError::Missing(_)
        | FileError::Outside(_)
        | FileError::LeadsOut(_)
        | FileError::NotAFile { .. } => RequestError::InvalidArgument(text),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const MOUNTS: &str = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n\
         36 22 0:40 / /far rw - nfs4 far:/b rw\n\
         37 22 0:41 / /near rw - ext4 /dev/sdb1 rw\n";

    #[test]
    fn a_mount_whose_works_all_hang_leaves_room_for_those_of_others() {
        let (works, mounts) = (Works::default(), Mounts::parse(MOUNTS));
        let on = |path: &'static str| works.place_on(&mounts, [path]);
        let mut held: Vec<Place> = Vec::new();
        for _ in 0..WORKS_PER_MOUNT {
            held.push(on("/far/a").unwrap());
        }
        let refused = on("/far/b").err().unwrap().to_string();
        assert!(refused.contains("of /far go on"), "{refused}");
        // What lies on it hangs with it.
        assert!(works.place_on(&mounts, ["/near/a", "/far/a"]).is_err());
        held.push(on("/near/a").unwrap());
        // Two files of one mount are one place; two mounts are two.
        held.push(works.place_on(&mounts, ["/near/a", "/near/b"]).unwrap());
        assert_eq!(
            locked(&works.0).values().sum::<usize>(),
            WORKS_PER_MOUNT + 2
        );
        drop(held);
        assert!(locked(&works.0).is_empty(), "a place was not given back");
        assert!(on("/far/b").is_ok());
    }

    /// A close on a mount that hangs held the loop up until systemd killed the daemon.
    #[tokio::test]
    async fn a_file_that_a_task_held_is_closed_by_another_thread() {
        struct Told(std::sync::mpsc::Sender<std::thread::ThreadId>);
        impl Drop for Told {
            fn drop(&mut self) {
                self.0.send(std::thread::current().id()).unwrap();
            }
        }
        let (tell, told) = std::sync::mpsc::channel();
        drop(Held::new(Told(tell.clone())));
        let by = told.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_ne!(by, std::thread::current().id());
        // Given to whoever takes it, it is theirs to close.
        drop(Held::new(Told(tell)).take());
        let by = told.recv_timeout(Duration::from_secs(10)).unwrap();
        assert_eq!(by, std::thread::current().id());
    }

    #[test]
    fn the_works_of_all_mounts_are_bounded() {
        let works = Works::default();
        let text: String = (0..2 * WORKS_MAX)
            .map(|n| format!("{n} 1 0:1 / /m{n} rw - tmpfs x rw\n"))
            .collect();
        let mounts = Mounts::parse(&text);
        let taken: Vec<Place> = (0..2 * WORKS_MAX)
            .filter_map(|n| works.place_on(&mounts, [format!("/m{n}/a").as_str()]).ok())
            .collect();
        assert_eq!(taken.len(), WORKS_MAX);
    }
}
