//! What stands under the paths that exports name, told as it changes. EDGE: looks files up beneath the configured roots, and
//! decides nothing.
//!
//! A path is looked up when an export comes to want it, when the kernel says that something happened there (`notice`), when a survey of
//! the disks is ordered, and at an interval. Each look-up is a call of its own on the blocking pool, a few of one mount at a time: a file system that hangs (a server of
//! NFS that is gone) keeps those threads, its other paths stay as they were last seen, and no path of another one waits for it (invariant 11).

mod known;
mod look_up;
mod mounts;
mod notice;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, Semaphore, mpsc};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::MissedTickBehavior;

use crate::correlation::{DiskSeq, Event, Mark};
use crate::identity::Identity;
use crate::image::beneath::Roots;
use crate::image::block::Claims;
use known::{Found, Known};
use look_up::{Looked, look_up};
pub use mounts::Mounts;
use notice::{Due, Notices};

/// Look-ups at one time.
const LOOKS_MAX: usize = 16;
/// Of them of one mount; so many threads it keeps when it hangs.
const LOOKS_PER_MOUNT: usize = 4;
/// A look-up that takes longer is waited for no more; its path stays as it was last seen.
const LOOK_WITHIN: Duration = Duration::from_secs(2);
/// A path whose look-up was not answered, though a file was seen there, is looked up again so much later: nobody new is served meanwhile.
const LOOK_AGAIN: Duration = Duration::from_secs(2);
/// Paths whose look-up hangs, each with a thread: of 32 mounts. Past it no new path is looked up until one answers.
const HUNG_MAX: usize = 32 * LOOKS_PER_MOUNT;

/// What the observer tells.
#[derive(Debug)]
pub enum Told {
    Happened(Event),
    /// Every path has been looked up since this was asked for, but for those that hang.
    Checked(Round),
}

/// Counts the rounds of look-ups that were asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Round(u64);

/// The running observer; dropping it stops it.
pub struct Observer {
    shared: Arc<Shared>,
    task: JoinHandle<()>,
}

#[derive(Default)]
struct Shared {
    /// As many as there are exports of files at most. Held for a few instructions.
    wanted: Mutex<Wanted>,
    asked: AtomicU64,
    /// Counts the beginnings of look-ups, and the opens.
    marks: AtomicU64,
    /// Something above has changed.
    changed: Notify,
}

#[derive(Default)]
struct Wanted {
    paths: BTreeSet<Identity>,
    /// Those that were asked for since the last round: whoever asks is told what is found, also when others were told so before.
    anew: BTreeSet<Identity>,
    /// Files that were opened since the last look-up.
    opened: BTreeMap<DiskSeq, Mark>,
}

impl Shared {
    fn wanted(&self) -> std::sync::MutexGuard<'_, Wanted> {
        // What a panic leaves between two insertions is one more look-up, so a poisoned lock is still good.
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn mark(&self) -> Mark {
        Mark(self.marks.fetch_add(1, Ordering::SeqCst) + 1)
    }
}

/// Tells the observer of the files that are opened.
#[derive(Clone)]
pub struct Opens(Arc<Shared>);

impl Opens {
    /// The size of what was opened of this file has been read. What a look-up that began before this call says of it is older.
    pub fn opened(&self, file: DiskSeq) -> Mark {
        let mark = self.0.mark();
        self.0.wanted().opened.insert(file, mark);
        mark
    }
}

/// Watches no path yet. Has to be called on a tokio runtime. `out` full: the observer waits, and looks up nothing meanwhile.
/// Of a file that is among `claims` it is looked, too, whether its locks still keep others out.
pub fn observe(
    roots: Arc<Roots>,
    claims: Arc<Claims>,
    every: Duration,
    out: mpsc::Sender<Told>,
) -> Observer {
    let shared = Arc::<Shared>::default();
    let watch = Watch {
        roots,
        claims,
        shared: Arc::clone(&shared),
        out,
        known: Known::default(),
        notices: Notices::new(),
        looks: JoinSet::new(),
        places: Arc::new(Semaphore::new(LOOKS_MAX)),
        looking: BTreeMap::new(),
        hung: BTreeMap::new(),
        overdue: BTreeSet::new(),
    };
    let task = tokio::spawn(watch.run(every));
    Observer { shared, task }
}

impl Observer {
    /// The path of `file` is looked up from now on, for files of its format.
    pub fn watch(&self, file: Identity) {
        let mut wanted = self.shared.wanted();
        wanted.anew.insert(file.clone());
        wanted.paths.insert(file);
        drop(wanted);
        self.shared.changed.notify_one();
    }

    pub fn unwatch(&self, file: &Identity) {
        self.shared.wanted().paths.remove(file);
        self.shared.changed.notify_one();
    }

    pub fn opens(&self) -> Opens {
        Opens(Arc::clone(&self.shared))
    }

    /// Orders a look-up of every path; a `Checked` of this round or a later one follows.
    pub fn check(&self) -> Round {
        let round = self.shared.asked.fetch_add(1, Ordering::AcqRel) + 1;
        self.shared.changed.notify_one();
        Round(round)
    }
}

impl Drop for Observer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

enum Look {
    Found(Identity, Looked),
    /// Not answered in time; it goes on.
    Slow(Identity, JoinHandle<Looked>),
    /// A slow one has ended: the path is to be looked up again.
    Late(Identity),
}

/// The daemon has ended.
struct Stopped;

struct Watch {
    roots: Arc<Roots>,
    claims: Arc<Claims>,
    shared: Arc<Shared>,
    out: mpsc::Sender<Told>,
    known: Known,
    notices: Notices,
    /// At most one for each path.
    looks: JoinSet<Look>,
    places: Arc<Semaphore>,
    /// Each with its mount, as `hung`.
    looking: BTreeMap<Identity, PathBuf>,
    /// No path of these mounts is looked up until they answer.
    hung: BTreeMap<Identity, PathBuf>,
    /// On a mount that answered again in the middle of a round: for the next one.
    overdue: BTreeSet<Identity>,
}

impl Watch {
    async fn run(mut self, every: Duration) {
        let mut tick = tokio::time::interval(every);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut again = tokio::time::interval(LOOK_AGAIN);
        again.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let shared = Arc::clone(&self.shared);
        let mut done = 0;
        loop {
            // Cancel-safe: none takes anything before it is chosen.
            let in_doubt = self.known.doubted().next().is_some();
            let mut due = tokio::select! {
                () = shared.changed.notified() => Due::default(),
                _ = tick.tick() => Due::everything(),
                _ = again.tick(), if in_doubt => Due {
                    all: false,
                    paths: self.known.doubted().cloned().collect(),
                },
                due = self.notices.next() => due,
                Some(Ok(look)) = self.looks.join_next() => match look {
                    Look::Late(path) => self.answers_again(&path),
                    // A round waits for all others.
                    Look::Found(..) | Look::Slow(..) => Due::default(),
                }
            };
            due.paths.append(&mut self.overdue);
            let asked = shared.asked.load(Ordering::Acquire);
            due.all |= asked != done;
            let round = self.round(&due).await;
            let told = match round {
                Ok(()) if asked != done => self.tell(Told::Checked(Round(asked))).await,
                other => other,
            };
            done = asked;
            if told.is_err() {
                return;
            }
        }
    }

    /// Looks up what is new and what is due; forgets what no one wants.
    async fn round(&mut self, due: &Due) -> Result<(), Stopped> {
        let wanted = {
            let mut wanted = self.shared.wanted();
            for path in std::mem::take(&mut wanted.anew) {
                self.known.forget_absence(&path);
            }
            wanted.paths.clone()
        };
        let gone: Vec<Identity> = self
            .known
            .paths()
            .filter(|path| !wanted.contains(*path))
            .cloned()
            .collect();
        for path in gone {
            self.notices.register(&path, Vec::new());
            for event in self.known.forget(&path) {
                self.tell(Told::Happened(event)).await?;
            }
        }
        let mut waiting = self.to_look_up(&wanted, due);
        loop {
            self.start_some(&mut waiting);
            if self.looking.is_empty() {
                break;
            }
            // Only a look-up can panic, and that is told as its answer.
            let Some(Ok(look)) = self.looks.join_next().await else {
                break;
            };
            self.on_look(look).await?;
        }
        self.notices.sweep();
        if !self.overdue.is_empty() {
            self.shared.changed.notify_one();
        }
        Ok(())
    }

    /// The paths that are new or due, by the mounts that they lie on.
    fn to_look_up(
        &self,
        wanted: &BTreeSet<Identity>,
        due: &Due,
    ) -> BTreeMap<PathBuf, Vec<Identity>> {
        let known: BTreeSet<&Identity> = self.known.paths().collect();
        let is_due = |path: &Identity| due.all || due.paths.contains(path) || !known.contains(path);
        let paths: Vec<&Identity> = wanted.iter().filter(|path| is_due(path)).collect();
        let mut waiting: BTreeMap<PathBuf, Vec<Identity>> = BTreeMap::new();
        if paths.is_empty() {
            return waiting;
        }
        let mounts = mounts();
        for path in paths {
            let mount = mounts.of(path.file().unwrap_or_default());
            waiting.entry(mount).or_default().push(path.clone());
        }
        waiting
    }

    /// Starts look-ups as far as there is room for those of each mount. Of one that hangs none is started: what waits for it is left as it was.
    fn start_some(&mut self, waiting: &mut BTreeMap<PathBuf, Vec<Identity>>) {
        waiting.retain(|mount, _| !self.hung.values().any(|hung| hung == mount));
        if self.hung.len() >= HUNG_MAX {
            waiting.clear();
        }
        for (mount, paths) in waiting {
            let looking = self.looking.values().filter(|of| *of == mount).count();
            for _ in looking..LOOKS_PER_MOUNT {
                let Some(path) = paths.pop() else { break };
                self.start(path, mount.clone());
            }
        }
    }

    /// A look-up that was slow has ended: what else lies on its mount may be looked up again, and is.
    fn answers_again(&mut self, path: &Identity) -> Due {
        let mut due = Due::default();
        if let Some(mount) = self.hung.remove(path) {
            let wanted = self.shared.wanted();
            let of_it = wanted.paths.iter().filter(|path| {
                let file = path.file().unwrap_or_default();
                std::path::Path::new(file).starts_with(&mount)
            });
            due.paths.extend(of_it.cloned());
        }
        due
    }

    fn start(&mut self, path: Identity, mount: PathBuf) {
        self.looking.insert(path.clone(), mount);
        let roots = Arc::clone(&self.roots);
        let claims = Arc::clone(&self.claims);
        let places = Arc::clone(&self.places);
        let watcher = self.notices.watcher();
        let shared = Arc::clone(&self.shared);
        self.looks.spawn(async move {
            // Closed never; the place is given back when the path is waited for no more.
            let _place = places.acquire_owned().await;
            let wanted = path.clone();
            let mut look = tokio::task::spawn_blocking(move || {
                look_up(&roots, &claims, &wanted, watcher.as_ref(), shared.mark())
            });
            match tokio::time::timeout(LOOK_WITHIN, &mut look).await {
                Ok(Ok(found)) => Look::Found(path, found),
                Ok(Err(broken)) => {
                    let found = Found::Unasked {
                        incarnation: None,
                        why: format!("the look-up broke: {broken}"),
                    };
                    Look::Found(path, (found, Vec::new()))
                }
                Err(_) => Look::Slow(path, look),
            }
        });
    }

    async fn on_look(&mut self, look: Look) -> Result<(), Stopped> {
        match look {
            Look::Found(path, (found, places)) => {
                self.looking.remove(&path);
                self.notices.register(&path, places);
                let unasked = match &found {
                    Found::Unasked { why, .. } => Some(why.clone()),
                    _ => None,
                };
                for (file, mark) in std::mem::take(&mut self.shared.wanted().opened) {
                    self.known.opened(file, mark);
                }
                let news = self.known.look(&path, found);
                if let Some(reason) = unasked.filter(|_| !news.is_empty()) {
                    tracing::warn!(%path, reason, "the file could not be looked up: what was known of it stays, and nobody new is served until it can be");
                }
                for event in news {
                    self.tell(Told::Happened(event)).await?;
                }
            }
            Look::Slow(path, look) => {
                tracing::warn!(
                    %path,
                    "the file system does not answer: its files stay as they were last seen"
                );
                let mount = self.looking.remove(&path).unwrap_or_default();
                self.hung.insert(path.clone(), mount);
                self.looks.spawn(async move {
                    // Whatever it found is as old as its question: it is asked again.
                    let _old = look.await;
                    Look::Late(path)
                });
            }
            Look::Late(path) => {
                let due = self.answers_again(&path);
                self.overdue.extend(due.paths);
            }
        }
        Ok(())
    }

    async fn tell(&self, told: Told) -> Result<(), Stopped> {
        self.out.send(told).await.map_err(|_| Stopped)
    }
}

/// The mount points of this machine now. Reads memory of the kernel only; where it cannot be read all is one mount.
pub fn mounts() -> Mounts {
    Mounts::parse(&std::fs::read_to_string("/proc/self/mountinfo").unwrap_or_default())
}
