//! The store's task: writes what the middle ordered, in that order; keeps the rows of VMs' disks true; lists and prunes them.
//!
//! ```text
//!   loop ── Order (write, list, prune) ──> keeper ──> Store
//!   loop ── how a mapping's export is ──> MappingStates (last value per row) ──> keeper
//! ```

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::control::{Asker, Control};
use super::orders::Orders;
use super::owed::OwedChanges;
use super::reports::{Report, Reports};
use super::shared::table::{SharedTable, Told};
use crate::correlation::{
    BackupChange, Change, Event, ExportName, INTERNAL, MappingState, RequestError, RequestId,
    Unkept, VmDisk,
};
use crate::dbus::Answer;
use crate::mapping::basis::RowSaid;
use crate::mapping::{Store, StoreError};

/// Rows of one transaction, so that an order behind it waits for some milliseconds.
const STATES_MAX: usize = 1_000;
/// An attach is three changes within some milliseconds: one commit for them, and still well within a second.
const GATHER: Duration = Duration::from_millis(100);
/// For the shared table at a stop, of the five seconds that the store has to close.
const REST_WITHIN: Duration = Duration::from_secs(2);
/// After a failure, doubled with each more.
const RETRY_MIN: Duration = Duration::from_secs(1);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// What the store's task is to do.
pub(super) enum Order {
    Write {
        request: RequestId,
        changes: Vec<Change>,
        /// What the row of the shared table said that asks for it; `None` where no row does.
        by_row: Option<RowSaid>,
    },
    /// Look at the shared table, if there is one.
    Look,
    /// Of backups.
    Keep {
        changes: Vec<BackupChange>,
        kept: oneshot::Sender<Result<(), RequestError>>,
    },
    /// The table of VMs' disks.
    List { asker: Asker },
    /// Delete inactive rows of it that are so many days old.
    Prune {
        days: u32,
        dry_run: bool,
        asker: Asker,
    },
}

/// How the exports of mappings are, on the way to their rows. Shared by the loop, which only replaces values, and the task.
#[derive(Clone, Default)]
pub(super) struct MappingStates {
    /// At most one for each export; a value that is not written yet is replaced by the next. Held for map operations.
    waiting: Arc<Mutex<BTreeMap<VmDisk, MappingState>>>,
    some: Arc<Notify>,
    /// What the loop last said of each: what did not change is not written again. At most one for each export.
    said: Arc<Mutex<BTreeMap<VmDisk, MappingState>>>,
}

impl MappingStates {
    /// Has it written how this export is, if that is news.
    pub fn say(&self, name: &ExportName, state: Option<MappingState>) {
        let Some(state) = state else {
            // Whoever comes next under the name has a row that says nothing yet.
            if let Some(disk) = VmDisk::of_export(name) {
                locked(&self.said).remove(&disk);
            }
            return;
        };
        if locked(&self.said).get(&state.disk) == Some(&state) {
            return;
        }
        locked(&self.said).insert(state.disk.clone(), state.clone());
        locked(&self.waiting).insert(state.disk.clone(), state);
        self.some.notify_one();
    }

    fn take(&self) -> Vec<MappingState> {
        let mut waiting = locked(&self.waiting);
        let mut taken = Vec::new();
        while taken.len() < STATES_MAX
            && let Some((_, state)) = waiting.pop_first()
        {
            taken.push(state);
        }
        taken
    }

    /// Could not be written: tried again, but for what has changed since.
    fn give_back(&self, states: Vec<MappingState>) {
        let mut waiting = locked(&self.waiting);
        for state in states {
            waiting.entry(state.disk.clone()).or_insert(state);
        }
    }

    fn is_empty(&self) -> bool {
        locked(&self.waiting).is_empty()
    }
}

fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The store and what is on its way there.
pub(super) struct Keeper {
    pub store: Store,
    /// The table in a database that others use too. What it is asked for waits for its deadlines, some seconds once; a database that
    /// did not answer counts as away, and is asked for nothing until it does.
    pub shared: Option<SharedTable>,
    pub states: MappingStates,
    pub owed: OwedChanges,
    /// The loop's; it is gone only when the daemon stops.
    pub reports: Reports,
}

impl Keeper {
    /// Begins [`Self::run`] on a thread of its own, which ends with it: ten thousand rows of a shared table are decoded and judged at each
    /// look, and the loop's thread would have time for nobody else meanwhile (invariant 11).
    pub fn spawn(self, orders: mpsc::Receiver<Order>) -> JoinHandle<()> {
        tokio::task::spawn_blocking(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            match runtime {
                Ok(runtime) => {
                    runtime.block_on(self.run(orders));
                    // A look-up of a path that hangs holds nobody up.
                    runtime.shutdown_background();
                }
                // The loop takes the end of this thread for what it is.
                Err(error) => tracing::error!(%error, "the store's thread cannot start"),
            }
        })
    }

    /// Carries out orders one after the other, in the order in which the middle gave them: a deletion that overtook the addition
    /// before it would leave the export in the store. Ends with the last sender.
    pub async fn run(mut self, mut orders: mpsc::Receiver<Order>) {
        let mut due: Option<Instant> = None;
        let mut trouble: Option<(String, Duration)> = None;
        loop {
            let look = self.shared.as_ref().and_then(SharedTable::due);
            let renewal = self.shared.as_ref().and_then(SharedTable::renewal);
            let writes = self.shared.as_ref().is_some_and(SharedTable::has_writes);
            // Cancel-safe: neither channel nor Notify loses anything.
            tokio::select! {
                biased;
                order = orders.recv() => match order {
                    Some(order) => self.carry_out(order).await,
                    None => break,
                },
                told = told(&mut self.shared) => {
                    if let Some(shared) = &mut self.shared {
                        shared.on_told(told);
                    }
                }
                () = until(self.owed.due()) => self.pay().await,
                () = self.states.some.notified(), if due.is_none() => due = Some(Instant::now() + GATHER),
                () = until(due) => {
                    self.note(&mut trouble).await;
                    due = match &trouble {
                        Some((_, wait)) => Some(Instant::now() + *wait),
                        None => (!self.states.is_empty()).then(Instant::now),
                    };
                }
                () = until(renewal) => {
                    if let Some(shared) = &mut self.shared {
                        shared.renew().await;
                    }
                }
                () = until(look) => {
                    if let Some(shared) = &mut self.shared {
                        shared.turn(&self.store).await;
                    }
                }
                // Last: whatever comes meanwhile waits for one batch only.
                () = std::future::ready(()), if writes => {
                    if let Some(shared) = &mut self.shared {
                        shared.write_some(&self.store).await;
                    }
                }
            }
        }
        // What the drain did to the exports is their last word; rows that a failing disk does not take, the next start writes.
        while trouble.is_none() && !self.states.is_empty() {
            self.note(&mut trouble).await;
        }
        if !self.owed.is_empty() {
            self.pay().await;
        }
        if let Some(shared) = &mut self.shared {
            // A slow server is told less; what it was not told, the next start says.
            if timeout(REST_WITHIN, shared.say_rest()).await.is_err() {
                tracing::info!(
                    "the shared table was not told everything before the stop: the next start tells it"
                );
            }
        }
        if let Err(error) = self.store.close().await {
            tracing::warn!(%error, "the store did not close; the next start tidies up");
        }
    }

    async fn carry_out(&mut self, order: Order) {
        match order {
            Order::Write {
                request,
                changes,
                by_row,
            } => {
                let result = self.write(request, &changes, by_row).await;
                self.reports
                    .send(Report::Happened(Event::Persisted { request, result }));
            }
            Order::Look => {
                if let Some(shared) = &mut self.shared {
                    shared.look();
                }
            }
            Order::Keep { changes, kept } => {
                let done = self.store.keep_backups(&changes).await;
                // Who asked ends with the daemon only.
                let _ended = kept.send(done.map_err(unkept));
            }
            Order::List { asker } => {
                let mut rows = self.store.mappings().await;
                if let (Ok(rows), Some(shared)) = (&mut rows, &self.shared) {
                    rows.extend(shared.waiting());
                }
                answer(asker, rows.map(Answer::Mappings));
            }
            Order::Prune {
                days,
                dry_run,
                asker,
            } => {
                if let Some(shared) = &mut self.shared
                    && !dry_run
                    && let Err(unkept) = shared.prune(days).await
                {
                    let _gone = asker.send(Err(unkept.into()));
                    return;
                }
                let pruned = self.store.prune(days, dry_run).await;
                answer(asker, pruned.map(Answer::Mappings));
            }
        }
    }

    /// What callers change has to be in the shared table first: one that says no has the last word. What the middle changes by itself
    /// is so already, and the table is told when it can be.
    async fn write(
        &mut self,
        request: RequestId,
        changes: &[Change],
        by_row: Option<RowSaid>,
    ) -> Result<(), Unkept> {
        let kept = match &mut self.shared {
            Some(shared) if request != INTERNAL => shared.keep(changes, by_row).await?,
            _ => None,
        };
        let stored = self.store(request, changes).await;
        match (stored, &mut self.shared) {
            (Ok(()), Some(shared)) => shared.stored(changes, kept),
            (Ok(()), None) => {}
            (Err(error), shared) => {
                if let (Some(shared), Some(kept)) = (shared, kept) {
                    shared.undo(kept).await;
                }
                return Err(Unkept::Failed(error.to_string()));
            }
        }
        Ok(())
    }

    /// Behind what is owed, in order. What holds although the store did not take it is owed from now on.
    async fn store(&mut self, request: RequestId, changes: &[Change]) -> Result<(), StoreError> {
        if !self.owed.is_empty() {
            // A store that hangs has the whole time once, and not once for each.
            if let Err(error) = self.store.apply(&self.owed.changes()).await {
                match request {
                    INTERNAL => self.owed.own(changes),
                    _ => self.owed.refused(changes, Vec::new()),
                }
                return Err(error);
            }
            self.paid();
        }
        if request == INTERNAL {
            let stored = self.store.apply(changes).await;
            if stored.is_err() {
                self.owed.own(changes);
            }
            return stored;
        }
        let stored = self.store.apply_or_not(changes).await;
        stored.map_err(|(error, before)| {
            self.owed.refused(changes, before);
            error
        })
    }

    /// Tries what is owed.
    async fn pay(&mut self) {
        match self.store.apply(&self.owed.changes()).await {
            Ok(()) => self.paid(),
            Err(error) => {
                tracing::debug!(%error, "the store does not take what it owes yet");
                self.owed.put_off();
            }
        }
    }

    fn paid(&mut self) {
        if let Some(shared) = &mut self.shared {
            shared.stored(&self.owed.changes(), None);
        }
        self.owed.paid();
        tracing::info!(name: "store_caught_up", "the store has caught up with what it did not take");
    }

    async fn note(&mut self, trouble: &mut Option<(String, Duration)>) {
        let states = self.states.take();
        if states.is_empty() {
            return;
        }
        let noted = self.store.note(&states).await;
        if let Some(shared) = &mut self.shared {
            shared.note(states.clone()).await;
        }
        match noted {
            Ok(()) => {
                if trouble.take().is_some() {
                    tracing::info!("the rows of VMs' disks are kept true again");
                }
            }
            Err(error) => {
                self.states.give_back(states);
                let reason = error.to_string();
                let wait = match trouble.take() {
                    Some((known, wait)) if known == reason => (wait * 2).min(RETRY_MAX),
                    _ => {
                        tracing::warn!(
                            reason,
                            "the rows of VMs' disks cannot be kept true; exports are served on"
                        );
                        RETRY_MIN
                    }
                };
                *trouble = Some((reason, wait));
            }
        }
    }
}

impl Control {
    /// Has changes written, or says that they cannot be.
    pub(super) fn write(&mut self, request: RequestId, changes: Vec<Change>) {
        if let Err(unkept) = self.orders.write(request, changes) {
            let result = Err(unkept);
            self.reports
                .send(Report::Happened(Event::Persisted { request, result }));
        }
    }

    /// Hands another order to the store's task, or refuses it.
    pub(super) fn order(&self, order: Order) {
        let Err(refused) = self.orders.send(order) else {
            return;
        };
        let reason = Orders::FULL.to_owned();
        match refused {
            // The next look is never far; changes go by `write`.
            Order::Look | Order::Write { .. } => {}
            Order::Keep { kept, .. } => {
                let _ended = kept.send(Err(RequestError::NotReady(reason)));
            }
            Order::List { asker } | Order::Prune { asker, .. } => {
                self.answer(asker, Err(RequestError::NotReady(reason)));
            }
        }
    }
}

fn answer(asker: Asker, answer: Result<Answer, StoreError>) {
    // Who asked may have gone.
    let _gone = asker.send(answer.map_err(unkept));
}

fn unkept(error: StoreError) -> RequestError {
    match error {
        StoreError::TimedOut { .. } => RequestError::NotReady(error.to_string()),
        error => RequestError::Failed(error.to_string()),
    }
}

async fn told(shared: &mut Option<SharedTable>) -> Told {
    if let Some(shared) = shared
        && let Some(told) = shared.told.recv().await
    {
        return told;
    }
    std::future::pending().await
}

async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::{ExportView, Generation, Mapping, Source, State};

    fn view(state: State, mapped: bool) -> (ExportName, ExportView) {
        let disk = VmDisk::new("a", 0).unwrap();
        let name = disk.export();
        let view = ExportView {
            name: name.clone(),
            state,
            reason: String::new(),
            volume_id: "serial:x".to_owned(),
            disk: None,
            node: None,
            generation: Generation(0),
            size: 0,
            read_only: false,
            hidden: false,
            source: Source::Dbus,
            mapping: mapped.then(|| Mapping::new(disk, "").unwrap()),
        };
        (name, view)
    }

    #[test]
    fn of_many_changes_the_last_is_written_and_what_did_not_change_is_not() {
        let states = MappingStates::default();
        for state in [State::Absent, State::Opening, State::Serving] {
            let (name, view) = view(state, true);
            states.say(&name, view.mapping_state());
        }
        let taken = states.take();
        assert_eq!(taken.len(), 1);
        assert_eq!(taken[0].state, State::Serving);
        let (name, same) = view(State::Serving, true);
        states.say(&name, same.mapping_state());
        assert!(states.is_empty(), "it is no news");
        states.give_back(taken);
        assert!(
            !states.is_empty(),
            "what could not be written is tried again"
        );
        let (_, absent) = view(State::Absent, true);
        states.say(&name, absent.mapping_state());
        states.give_back(vec![same.mapping_state().unwrap()]);
        assert_eq!(
            states.take()[0].state,
            State::Absent,
            "but not over what is newer"
        );
        // Its mapping was retired; the row of the next one begins empty.
        states.say(&name, view(State::Absent, false).1.mapping_state());
        states.say(&name, absent.mapping_state());
        assert!(!states.is_empty());
    }

    fn known(keeper: &Keeper, unit: u32) -> Option<bool> {
        let shared = keeper.shared.as_ref().unwrap();
        let known = shared.known.as_ref()?;
        known.get(&disk(unit)).map(|here| here.active)
    }

    fn disk(unit: u32) -> VmDisk {
        VmDisk::new("a", unit).unwrap()
    }

    /// What was left over was retired at a start before the rows were loaded, and the retired one was all that was known from then on: whatever
    /// an appliance asked for by another row was not heard. One that the store took late was known as active until the next start.
    #[tokio::test]
    async fn what_is_known_of_the_shared_table_is_what_the_store_has() {
        let folder = tempfile::tempdir().unwrap();
        let (reports, _reported) = Reports::new();
        let mut keeper = Keeper {
            store: Store::open(folder.path()).await.unwrap(),
            shared: Some(SharedTable::of_nowhere(reports.clone())),
            states: MappingStates::default(),
            owed: OwedChanges::default(),
            reports,
        };
        let made = [0, 1, 2].map(|unit| Change::PutMapping(Mapping::new(disk(unit), "").unwrap()));
        keeper.store.apply(&made).await.unwrap();
        let retired = [Change::RetireMapping(disk(0))];
        keeper.write(INTERNAL, &retired, None).await.unwrap();
        assert_eq!(known(&keeper, 0), None, "nothing is known yet");
        let shared = keeper.shared.as_mut().unwrap();
        shared.turn(&keeper.store).await;
        let all = |keeper: &Keeper| [0, 1, 2].map(|unit| known(keeper, unit));
        assert_eq!(all(&keeper), [Some(false), Some(true), Some(true)]);
        keeper.owed.own(&[Change::RetireMapping(disk(1))]);
        keeper.pay().await;
        assert!(keeper.owed.is_empty());
        assert_eq!(all(&keeper), [Some(false), Some(false), Some(true)]);
    }
}
