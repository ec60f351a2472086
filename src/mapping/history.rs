//! The audit trail: what happened to disks, exports, clients and who called what. EDGE: a SQLite file of its own beside the
//! store, so that a trail that is full, damaged or on a hung disk never touches what exports need to be served.
//!
//! Whoever has something to tell never waits: records go into a bounded queue, and what does not fit is counted and told in
//! a record of its own once there is room. One task writes, many records in one transaction.
//!
//! Bounds: [`Bounds`] in bytes of the file and in age, and [`CLASS_RECORDS_MAX`] records of each class, so that a flood of
//! one class pushes out only its own kind.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use sqlx::SqliteConnection;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::timeout;

use super::index_room::IndexRoom;
use super::trail_rows::{self as rows, TrailError};
use crate::correlation::{Inquiry, Record, RecordKind};

/// The trail's file in the state directory.
pub const HISTORY_FILE: &str = "history.db";
/// Records that wait to be written. Each is at most some KiB, most are 200 bytes.
const QUEUE_MAX: usize = 8_192;
/// Records in one transaction, and how long the first of them waits for others. In that time the queue takes eighty thousand a second.
const BATCH_MAX: usize = 512;
const GATHER: Duration = Duration::from_millis(100);
/// Records of one class: 200,000 of 200 bytes are 40 MB.
pub const CLASS_RECORDS_MAX: u32 = 200_000;
/// Questions that wait.
const QUESTIONS_MAX: usize = 64;
/// The most records of one answer.
pub const PAGE_MAX: u32 = 1_000;
/// A healthy disk answers in milliseconds; who asks is not made to wait for another one.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);
/// After a failure the file is tried again at the first record after this.
const RETRY_AFTER: Duration = Duration::from_secs(10);
/// Age and number are looked at this often.
const PRUNE_EVERY: Duration = Duration::from_secs(60);
/// A tenth each time: what is left of a trail of the smallest bound then holds the largest batch.
const DROPS_MAX: u32 = 20;
const CLOSE_WITHIN: Duration = Duration::from_secs(1);

/// How much is kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Bounds {
    /// Of the file, in MiB.
    pub mib: u32,
    /// Older records go, but for the newest of each class, and by a clock with which the trail agrees: one that jumps ahead must not
    /// empty it.
    pub age: Duration,
    pub class_records: u32,
}

impl Default for Bounds {
    fn default() -> Bounds {
        Bounds {
            mib: 64,
            age: Duration::from_secs(90 * 86_400),
            class_records: CLASS_RECORDS_MAX,
        }
    }
}

/// Why a question to the trail was not answered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HistoryError {
    #[error("the history cannot be read: {0}")]
    Unreadable(String),
    #[error("too many questions to the history wait; ask again")]
    Busy,
    #[error("the history did not answer within {} s: its disk hangs or is slow", .0.as_secs())]
    TimedOut(Duration),
}

type Question = (Inquiry, oneshot::Sender<Result<Vec<Record>, HistoryError>>);

/// The way to the trail; clones are the same trail.
#[derive(Debug, Clone)]
pub struct History {
    /// [`QUEUE_MAX`]; when full the record is counted as lost. The task ends when it is told to.
    records: mpsc::Sender<Record>,
    /// [`QUESTIONS_MAX`]; when full the question is refused.
    questions: mpsc::Sender<Question>,
    lost: Arc<AtomicU64>,
    kept: Arc<AtomicU64>,
}

/// The task that writes; ended with the daemon.
#[derive(Debug)]
pub struct HistoryTask {
    task: JoinHandle<()>,
    end: oneshot::Sender<()>,
}

impl History {
    /// Starts to keep the trail in `state_dir`, which exists and is ours. Never fails: a trail that cannot be kept is told
    /// in the log and tried again.
    pub fn keep(state_dir: &Path, bounds: Bounds) -> (History, HistoryTask) {
        let (records, record_receiver) = mpsc::channel(QUEUE_MAX);
        let (questions, question_receiver) = mpsc::channel(QUESTIONS_MAX);
        let history = History {
            records,
            questions,
            lost: Arc::default(),
            kept: Arc::default(),
        };
        let keeper = Keeper {
            file: state_dir.join(HISTORY_FILE),
            bounds,
            connection: None,
            index: IndexRoom::default(),
            tried: None,
            pruned: None,
            trouble: None,
            lost: history.lost.clone(),
            kept: history.kept.clone(),
            told_lost: 0,
        };
        let (end, ended) = oneshot::channel();
        let task = tokio::spawn(keeper.run(record_receiver, question_receiver, ended));
        (history, HistoryTask { task, end })
    }

    /// Remembers `record`; never waits.
    pub fn note(&self, record: Record) {
        if self.records.try_send(record.bounded()).is_err() {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Answers `inquiry` with at most [`PAGE_MAX`] records, in the order in which they were written.
    ///
    /// # Errors
    /// [`HistoryError`]; serving goes on.
    pub async fn ask(&self, inquiry: Inquiry) -> Result<Vec<Record>, HistoryError> {
        let (reply, answer) = oneshot::channel();
        self.questions
            .try_send((inquiry, reply))
            .map_err(|_| HistoryError::Busy)?;
        match timeout(ANSWER_WITHIN, answer).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(_)) => Err(HistoryError::Unreadable(
                "the daemon is stopping".to_owned(),
            )),
            Err(_) => Err(HistoryError::TimedOut(ANSWER_WITHIN)),
        }
    }

    /// Records that were kept, and that could not be, since the start.
    pub fn counts(&self) -> (u64, u64) {
        (
            self.kept.load(Ordering::Relaxed),
            self.lost.load(Ordering::Relaxed),
        )
    }
}

impl HistoryTask {
    /// Has what was noted so far written, and waits a moment for it.
    pub async fn end(self) {
        // A task that has ended has nothing to write.
        let _ended = self.end.send(());
        if timeout(CLOSE_WITHIN, self.task).await.is_err() {
            tracing::warn!("the history was not written to its end in time");
        }
    }
}

/// Now, as records have it.
pub fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.map_or(0, |since| {
        u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
    })
}

struct Keeper {
    file: PathBuf,
    bounds: Bounds,
    connection: Option<SqliteConnection>,
    index: IndexRoom,
    /// The last attempt to open that failed.
    tried: Option<Instant>,
    pruned: Option<Instant>,
    /// What was last told in the log, so that a full disk is one line and not a thousand.
    trouble: Option<String>,
    lost: Arc<AtomicU64>,
    kept: Arc<AtomicU64>,
    told_lost: u64,
}

impl Keeper {
    async fn run(
        mut self,
        mut records: mpsc::Receiver<Record>,
        mut questions: mpsc::Receiver<Question>,
        mut ended: oneshot::Receiver<()>,
    ) {
        let mut batch = Vec::with_capacity(BATCH_MAX);
        loop {
            // Cancel-safe: both lose nothing.
            tokio::select! {
                biased;
                question = questions.recv() => match question {
                    Some(question) => {
                        // What was noted before the question is in its answer.
                        self.write_all(&mut records, &mut batch).await;
                        self.answer(question).await;
                    }
                    None => break,
                },
                record = records.recv() => match record {
                    Some(record) => {
                        batch.push(record);
                        // Not woken for each that comes meanwhile: thousands of clients in a second would turn this task as often.
                        tokio::time::sleep(GATHER).await;
                        self.write_all(&mut records, &mut batch).await;
                    }
                    None => break,
                },
                _ = &mut ended => break,
            }
        }
        self.write_all(&mut records, &mut batch).await;
        if let Some(connection) = self.connection.take() {
            // The file is whole either way; a clean close only saves the next start a look at the log.
            let _unclean = sqlx::Connection::close(connection).await;
        }
    }

    /// Writes what was noted up to now.
    async fn write_all(&mut self, records: &mut mpsc::Receiver<Record>, batch: &mut Vec<Record>) {
        // What is noted meanwhile waits for its turn, so that a question has its own.
        for _ in 0..QUEUE_MAX {
            let Ok(record) = records.try_recv() else {
                break;
            };
            batch.push(record);
            if batch.len() >= BATCH_MAX {
                self.write(batch).await;
            }
        }
        self.write(batch).await;
    }

    async fn write(&mut self, batch: &mut Vec<Record>) {
        if batch.is_empty() {
            return;
        }
        let count = u64::try_from(batch.len()).unwrap_or(u64::MAX);
        let lost = self.lost.load(Ordering::Relaxed);
        if lost > self.told_lost {
            let mut record = Record::new(RecordKind::Lost, now_us());
            record.detail = format!("{} records could not be kept", lost - self.told_lost);
            batch.insert(0, record);
        }
        match self.try_write(batch).await {
            Ok(()) => {
                self.kept.fetch_add(count, Ordering::Relaxed);
                self.told_lost = lost;
                if self.trouble.take().is_some() {
                    tracing::info!(name: "history_kept", file = %self.file.display(), "the history is kept again");
                }
            }
            Err(error) => {
                let reason = error.to_string();
                self.lost.fetch_add(count, Ordering::Relaxed);
                if self.trouble.as_ref() != Some(&reason) {
                    tracing::warn!(
                        name: "history_lost",
                        file = %self.file.display(), reason,
                        "the history cannot be kept; exports are served on, what happens is counted as lost"
                    );
                }
                self.trouble = Some(reason);
            }
        }
        batch.clear();
    }

    async fn try_write(&mut self, batch: &[Record]) -> Result<(), TrailError> {
        let bounds = self.bounds;
        let prune = self
            .pruned
            .is_none_or(|pruned| pruned.elapsed() >= PRUNE_EVERY);
        let connection = self.open().await?;
        if prune {
            rows::prune(connection, bounds, now_us()).await?;
        }
        let mut written = rows::insert(connection, batch).await;
        let mut dropped = 0;
        // Its own bound: the oldest make room. On a disk that is full to delete them would gain nothing.
        while dropped < DROPS_MAX
            && written.as_ref().is_err_and(rows::is_full)
            && rows::at_its_bound(connection).await?
        {
            rows::drop_oldest(connection).await?;
            written = rows::insert(connection, batch).await;
            dropped += 1;
        }
        if prune {
            self.pruned = Some(Instant::now());
        }
        if let Err(error) = &written
            && !rows::is_full(error)
        {
            // Whatever it was, begin with a new look at the file.
            self.connection = None;
        }
        Ok(written?)
    }

    async fn answer(&mut self, (inquiry, reply): Question) {
        if reply.is_closed() {
            return;
        }
        let answer = match self.open().await {
            Ok(connection) => rows::select(connection, &inquiry)
                .await
                .map_err(TrailError::from),
            Err(error) => Err(error),
        };
        let answer = answer.map_err(|error| HistoryError::Unreadable(error.to_string()));
        // Who asked may have stopped to wait.
        let _gone = reply.send(answer);
    }

    async fn open(&mut self) -> Result<&mut SqliteConnection, TrailError> {
        if self.connection.is_none() {
            if let (Some(tried), Some(trouble)) = (self.tried, &self.trouble)
                && tried.elapsed() < RETRY_AFTER
            {
                return Err(TrailError::Before(trouble.clone()));
            }
            let opened = rows::open(&self.file, self.bounds.mib, &mut self.index).await;
            if opened.is_err() {
                self.tried = Some(Instant::now());
            }
            self.connection = Some(opened?);
        }
        self.connection.as_mut().ok_or(TrailError::Closed)
    }
}
