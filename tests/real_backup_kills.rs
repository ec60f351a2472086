//! Promise: wherever in their lives kill -9 meets backups, each row and each file says what is so. An unfinished one is known as such and is no
//! parent; one that was answered complete is complete, with the same checksum; each flushed byte is there; nothing half made is left.
//!
//! `NBDTRACK_SEED` replays a run's choices, `NBDTRACK_BACKUP_KILLS` makes it longer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::Value;
use zbus::{OwnedVariant, Variant};

use support::backup_model::{Backup, Stage};
use support::backups::json;
use support::bus::{Client as Caller, Options, Refused};
use support::client::{Client, Endpoint};
use support::dice::{self, Dice};
use support::ground::{Need, real, tell};
use support::images::{qemu_img, scene, text};
use support::process;
use support::scene::{STEP_LIMIT, Scene};
use support::{Doing, Outcome, Trouble, hold, trouble};

const NEEDS: &[Need] = &[Need::Bus, Need::Tool("qemu-img")];
/// Kills in the short form.
const KILLS: u64 = 12;
/// The daemon is killed at any moment of so many milliseconds of work, or so early in one piece of it.
const MOMENT_MS: usize = 700;
const EARLY_US: usize = 25_000;
/// A piece of work that does not come up meanwhile is not waited for any longer.
const COMES_UP: Duration = Duration::from_millis(900);
const PIECES: [&str; 5] = ["begin", "write", "finish", "delete", "image"];
const BYTES: u64 = (support::backup_model::BLOCK * support::backup_model::BLOCKS) as u64;
const BACKUPS_MAX: usize = 7;
const DEPTH_MAX: usize = 4;

/// Why the work on backups ended.
enum Stop {
    Killed,
    Wrong(Trouble),
}

impl From<Trouble> for Stop {
    fn from(trouble: Trouble) -> Stop {
        Stop::Wrong(trouble)
    }
}

type Step<T> = Result<T, Stop>;

/// What was asked for and not answered before the kill, and has no name here.
enum Pending {
    Begin { parent: Option<String> },
    Image { name: String },
}

#[derive(Default)]
struct Tally {
    complete: u64,
    deleted: u64,
    writes: u64,
    cut: BTreeMap<&'static str, u64>,
}

/// All that there should be.
struct Life {
    folder: PathBuf,
    backups: Vec<Backup>,
    pending: Option<Pending>,
    /// Of writes, and of names.
    number: u64,
    dice: Dice,
    tally: Tally,
}

/// The work on backups until the daemon is killed under it.
struct Worker<'a> {
    life: &'a mut Life,
    caller: &'a Caller,
    endpoint: &'a Endpoint,
    killed: &'a AtomicBool,
    /// Each piece of work, as it begins; unbounded, for the one who listens leaves before us.
    begins: mpsc::Sender<&'static str>,
}

impl Worker<'_> {
    /// What cannot be said of a daemon that was killed is its end.
    fn alive<T>(&self, said: Outcome<T>) -> Step<T> {
        said.map_err(|trouble| match self.killed.load(Ordering::SeqCst) {
            true => Stop::Killed,
            false => Stop::Wrong(trouble),
        })
    }

    fn call<B>(&self, member: &str, body: &B) -> Step<Result<zbus::Message, Refused>>
    where
        B: serde::Serialize + zbus::DynamicType,
    {
        match self.caller.call(member, body) {
            Err(no) if !no.name.starts_with("org.nbdtrack1.Error.") => self.alive(Err(no.into())),
            said => Ok(said),
        }
    }

    fn refused(&self, said: Result<zbus::Message, Refused>, kind: &str, what: &str) -> Step<()> {
        match said {
            Err(no) if no.is(kind) => Ok(()),
            other => Err(Trouble(format!("{what}: not {kind} but {other:?}")).into()),
        }
    }

    fn begins(&self, piece: &'static str) {
        let _left = self.begins.send(piece);
    }

    fn work(&mut self) -> Step<()> {
        loop {
            let unfinished = self.of(Stage::Writing).first().copied();
            let complete = self.of(Stage::Complete);
            match (unfinished, self.life.dice.roll(10)) {
                (Some(at), _) => self.go_on_interrupted(at)?,
                (_, 0) => self.image()?,
                (_, 1) if !complete.is_empty() => self.hold_complete(&complete)?,
                _ if self.life.backups.len() >= BACKUPS_MAX => self.delete_any(&complete)?,
                (_, 2) if !complete.is_empty() => self.delete_any(&complete)?,
                _ => {
                    let at = self.begin(&complete)?;
                    self.write(at)?;
                    self.finish(at, false)?;
                }
            }
        }
    }

    fn of(&self, stage: Stage) -> Vec<usize> {
        let all = self.life.backups.iter().enumerate();
        all.filter(|(_, backup)| backup.stage == stage)
            .map(|(at, _)| at)
            .collect()
    }

    fn any(&mut self, of: &[usize]) -> usize {
        of[self.life.dice.roll(of.len())]
    }

    fn begin(&mut self, complete: &[usize]) -> Step<usize> {
        let below: Vec<usize> = complete
            .iter()
            .copied()
            .filter(|at| self.life.depth(*at) < DEPTH_MAX)
            .collect();
        let parent = match below.is_empty() || self.life.dice.happens(20) {
            true => None,
            false => Some(self.any(&below)),
        };
        let parent = parent.map(|at| self.life.backups[at].clone());
        self.life.number += 1;
        let mut options = Options::from([
            ("at", Variant::from(1_000_000_000 + self.life.number)),
            ("size", Variant::from(BYTES)),
        ]);
        if let Some(parent) = &parent {
            options.insert("parent", Variant::from(parent.name.clone()));
        }
        let of = parent.as_ref().map(|parent| parent.name.clone());
        self.life.pending = Some(Pending::Begin { parent: of });
        self.begins("begin");
        let said = self.call("BeginBackup", &("vm", 0_u32, options))?;
        self.life.pending = None;
        let said = said.doing("BeginBackup")?;
        let (_, name): (zbus::OwnedObjectPath, String) =
            said.body().deserialize().map_err(wrong)?;
        let path = self.life.folder.join(format!("{name}.qcow2"));
        let new = Backup::new(name, path, parent.as_ref());
        self.life.backups.push(new);
        Ok(self.life.backups.len() - 1)
    }

    fn write(&mut self, at: usize) -> Step<()> {
        let life = &mut *self.life;
        let name = life.backups[at].name.clone();
        let opened = Client::open(self.endpoint, &name);
        let mut client = self.alive(opened)?;
        self.begins("write");
        for _ in 0..1 + self.life.dice.roll(8) {
            let life = &mut *self.life;
            life.number += 1;
            let number = life.number;
            let (offset, bytes) = life.backups[at].write(&mut life.dice, number);
            let durable = life.dice.happens(20);
            let flush = life.dice.happens(40);
            let said = client.write(offset, &bytes, durable);
            let said = self.alive(said)?;
            self.answered(said, "a write")?;
            self.life.tally.writes += 1;
            if durable {
                self.life.backups[at].forced(number);
            }
            if flush {
                let said = client.flush();
                let said = self.alive(said)?;
                self.answered(said, "a flush")?;
                self.life.backups[at].flushed();
            }
        }
        Ok(())
    }

    /// A daemon that is being killed tells no errno.
    fn answered(&self, said: Result<(), u32>, what: &str) -> Step<()> {
        said.map_err(|errno| Stop::Wrong(Trouble(format!("{what}: errno {errno}"))))
    }

    fn finish(&mut self, at: usize, interrupted: bool) -> Step<()> {
        let name = self.life.backups[at].name.clone();
        if self.life.dice.happens(30) {
            let on_it = Options::from([("parent", Variant::from(name.clone()))]);
            let said = self.call("BeginBackup", &("vm", 1_u32, on_it))?;
            self.refused(said, "InvalidArgument", "begun on an unfinished one")?;
        }
        self.life.backups[at].stage = Stage::Finishing;
        let options = Options::from([("interrupted", Variant::from(interrupted))]);
        self.begins("finish");
        let said = self.call("FinishBackup", &(name.as_str(), options))?;
        let said = said.doing("FinishBackup")?;
        let said: BTreeMap<String, OwnedVariant> = said.body().deserialize().map_err(wrong)?;
        let told = said
            .get("Sha256")
            .and_then(|sum| String::try_from(sum.clone()).ok());
        let backup = &mut self.life.backups[at];
        let expected = backup.sha256();
        if told.as_ref() != Some(&expected) {
            return Err(Trouble(format!("{name}: SHA-256 {told:?}, not {expected}")).into());
        }
        backup.flushed();
        backup.stage = Stage::Complete;
        self.life.tally.complete += 1;
        Ok(())
    }

    /// As an operator does: it is written again and taken, or deleted.
    fn go_on_interrupted(&mut self, at: usize) -> Step<()> {
        let name = self.life.backups[at].name.clone();
        let said = self.call("FinishBackup", &(name.as_str(), Options::new()))?;
        self.refused(said, "Failed", "an interrupted one finished silently")?;
        let exported = self.caller.export(&name).map_err(Trouble::from);
        let exported = self.alive(exported)?.is_some();
        if self.life.dice.happens(50) || !self.life.backups[at].path.exists() {
            if exported {
                let hard = Options::from([("mode", Variant::from("hard"))]);
                self.call("RemoveExport", &(name.as_str(), hard))?
                    .doing("RemoveExport")?;
            }
            return self.delete(at, false);
        }
        if exported {
            let serves = self.caller.reach_state(&name, "Serving", STEP_LIMIT);
            self.alive(serves)?;
            self.write(at)?;
        }
        self.finish(at, true)
    }

    /// A complete one is not written, and not deleted under what lies on it.
    fn hold_complete(&mut self, complete: &[usize]) -> Step<()> {
        let at = self.any(complete);
        let backup = self.life.backups[at].clone();
        let scheme = ["qcow2", "file"][self.life.dice.roll(2)];
        let id = format!("{scheme}:{}", backup.path.display());
        let options = Options::from([("volume", Variant::from(id))]);
        let said = self.call("AddExport", &("writer", options))?;
        self.refused(said, "InUse", "a complete backup exported for writing")?;
        if !self.life.on(&backup.name).is_empty() {
            let said = self.call("DeleteBackup", &(backup.name.as_str(), Options::new()))?;
            self.refused(said, "InUse", "a parent deleted under its children")?;
        }
        Ok(())
    }

    fn delete_any(&mut self, complete: &[usize]) -> Step<()> {
        let at = self.any(complete);
        let children = self.life.dice.happens(50);
        let alone = self.life.on(&self.life.backups[at].name).is_empty();
        match alone || children {
            true => self.delete(at, children),
            false => Ok(()),
        }
    }

    fn delete(&mut self, at: usize, children: bool) -> Step<()> {
        let name = self.life.backups[at].name.clone();
        let all = self.life.on_and(&name);
        for backup in &mut self.life.backups {
            if all.contains(&backup.name) {
                backup.stage = Stage::Deleting;
            }
        }
        let options = Options::from([("children", Variant::from(children))]);
        self.begins("delete");
        let said = self.call("DeleteBackup", &(name.as_str(), options))?;
        let said = said.doing("DeleteBackup")?;
        let gone: Vec<String> = said.body().deserialize().map_err(wrong)?;
        if gone.len() != all.len() || !gone.iter().all(|name| all.contains(name)) {
            return Err(Trouble(format!("deleted {gone:?}, and not {all:?}")).into());
        }
        self.life.tally.deleted += gone.len() as u64;
        let left = self
            .life
            .backups
            .iter()
            .find(|b| gone.contains(&b.name) && b.path.exists());
        if let Some(left) = left {
            return Err(Trouble(format!("{} is left", left.path.display())).into());
        }
        self.life
            .backups
            .retain(|backup| !gone.contains(&backup.name));
        Ok(())
    }

    /// One that is no backup: made, exported, removed.
    fn image(&mut self) -> Step<()> {
        self.life.number += 1;
        let name = format!("image{}", self.life.number);
        self.life.pending = Some(Pending::Image { name: name.clone() });
        self.begins("image");
        self.call("CreateImage", &(name.as_str(), BYTES, Options::new()))?
            .doing("CreateImage")?;
        let path = self.life.image_path(&name);
        if !path.exists() {
            return Err(Trouble(format!("{} was told to be made", path.display())).into());
        }
        let hard = Options::from([("mode", Variant::from("hard"))]);
        self.call("RemoveExport", &(name.as_str(), hard))?
            .doing("RemoveExport")?;
        self.life.pending = None;
        Ok(std::fs::remove_file(path).map_err(Trouble::from)?)
    }
}

fn wrong(error: zbus::Error) -> Stop {
    Stop::Wrong(error.into())
}

impl Life {
    fn at(&self, name: &str) -> Option<usize> {
        self.backups.iter().position(|backup| backup.name == name)
    }

    /// How many lie beneath and it.
    fn depth(&self, at: usize) -> usize {
        let parent = self.backups[at].parent.as_deref();
        1 + parent
            .and_then(|name| self.at(name))
            .map_or(0, |at| self.depth(at))
    }

    /// The names of those that lie on it.
    fn on(&self, name: &str) -> Vec<String> {
        let lies = |backup: &&Backup| backup.parent.as_deref() == Some(name);
        self.backups
            .iter()
            .filter(lies)
            .map(|backup| backup.name.clone())
            .collect()
    }

    /// And of all above them, and it.
    fn on_and(&self, name: &str) -> Vec<String> {
        let mut all = vec![name.to_owned()];
        for child in self.on(name) {
            all.extend(self.on_and(&child));
        }
        all
    }

    fn image_path(&self, name: &str) -> PathBuf {
        self.folder.join(format!("{name}.qcow2"))
    }

    /// The daemon is dead: what its files are.
    fn judge_files(&mut self, raw: &Path) -> Outcome<()> {
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            let name = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            hold!(
                !name.starts_with('.') && name.ends_with(".qcow2"),
                "{name} is left"
            );
            is_sound(&path)?;
        }
        for backup in &mut self.backups {
            // One that is being deleted may be gone, but never without what lies on it.
            if backup.path.exists() {
                read(&backup.path, raw)?;
                backup.judge(raw)?;
            } else {
                hold!(
                    backup.stage == Stage::Deleting,
                    "{}: its file is lost",
                    backup.name
                );
            }
        }
        Ok(())
    }

    /// The daemon is there again: what it says of each.
    fn judge_rows(&mut self, scene: &Scene, raw: &Path) -> Outcome<()> {
        let rows = json(scene, &["backups"])?;
        let rows = rows.as_array().cloned().unwrap_or_default();
        let word = |row: &Value, key: &str| row[key].as_str().unwrap_or_default().to_owned();
        for row in &rows {
            let (name, state, reason) =
                (word(row, "name"), word(row, "state"), word(row, "reason"));
            let at = match self.at(&name) {
                Some(at) => at,
                None => self.begun(row, raw)?,
            };
            let backup = &mut self.backups[at];
            hold!(
                word(row, "parent") == backup.parent.clone().unwrap_or_default(),
                "{row}"
            );
            let there = backup.path.exists();
            match backup.stage {
                Stage::Complete => hold!(
                    state == "complete" && there && word(row, "sha256") == backup.sha256(),
                    "it was told to be complete, with {}: {row}",
                    backup.sha256()
                ),
                Stage::Writing => hold!(state == "interrupted", "it was not finished: {row}"),
                Stage::Finishing if state == "complete" => {
                    hold!(
                        word(row, "sha256") == backup.sha256(),
                        "{}: {row}",
                        backup.sha256()
                    );
                    backup.stage = Stage::Complete;
                }
                Stage::Finishing => {
                    hold!(state == "interrupted", "it was not finished: {row}");
                    backup.stage = Stage::Writing;
                }
                Stage::Deleting => {
                    let known = ["complete", "interrupted"].contains(&state.as_str());
                    hold!(
                        known && (there || !reason.is_empty()),
                        "its file may be gone: {row}"
                    );
                }
            }
        }
        let names: Vec<String> = rows.iter().map(|row| word(row, "name")).collect();
        for backup in &self.backups {
            if !names.contains(&backup.name) {
                hold!(
                    backup.stage == Stage::Deleting && !backup.path.exists(),
                    "{} is forgotten as {:?}; its file is there: {}",
                    backup.name,
                    backup.stage,
                    backup.path.exists()
                );
            }
        }
        self.backups.retain(|backup| names.contains(&backup.name));
        for backup in &self.backups {
            let parent = backup.parent.as_ref().map(|name| self.at(name));
            hold!(
                parent != Some(None),
                "{}: what it lies on is gone",
                backup.name
            );
        }
        Ok(())
    }

    /// The row of a backup that nobody was told of: the one whose beginning was cut off.
    fn begun(&mut self, row: &Value, raw: &Path) -> Outcome<usize> {
        let Some(Pending::Begin { parent }) = self.pending.take() else {
            support::trouble!("nobody began it: {row}");
        };
        hold!(row["state"] == "interrupted", "it was only begun: {row}");
        let parent = parent
            .and_then(|name| self.at(&name))
            .map(|at| self.backups[at].clone());
        let name = row["name"].as_str().unwrap_or_default().to_owned();
        let path = PathBuf::from(row["path"].as_str().unwrap_or_default());
        let mut new = Backup::new(name, path, parent.as_ref());
        if new.path.exists() {
            read(&new.path, raw)?;
            new.judge(raw)?;
        }
        self.backups.push(new);
        Ok(self.backups.len() - 1)
    }

    /// What a kill left half done is done again, or away.
    fn tidy(&mut self, scene: &Scene) -> Outcome<()> {
        if let Some(Pending::Image { name }) = self.pending.take() {
            if scene.client.export(&name)?.is_some() {
                scene.client.remove_export(&name, "hard")?;
            }
            let path = self.image_path(&name);
            if path.exists() {
                std::fs::remove_file(path)?;
            }
        }
        while let Some(at) = self.backups.iter().position(|b| b.stage == Stage::Deleting) {
            let name = self.backups[at].name.clone();
            let gone = json(scene, &["backup", "delete", "--children", &name])?;
            let gone: Vec<String> = serde_json::from_value(gone["deleted"].clone())?;
            hold!(gone.contains(&name), "{name} is deleted again: {gone:?}");
            self.backups.retain(|backup| !gone.contains(&backup.name));
        }
        let known = |path: &PathBuf| self.backups.iter().any(|backup| backup.path == *path);
        for entry in std::fs::read_dir(&self.folder)? {
            let path = entry?.path();
            hold!(
                known(&path),
                "{} is left, and nothing knows it",
                path.display()
            );
        }
        Ok(())
    }

    /// What the kill met.
    fn met(&self) -> &'static str {
        let stages = self.backups.iter().map(|backup| backup.stage);
        match (
            &self.pending,
            stages.max_by_key(|stage| *stage != Stage::Complete),
        ) {
            (Some(Pending::Begin { .. }), _) => "begin",
            (Some(Pending::Image { .. }), _) => "image",
            (None, Some(Stage::Writing)) => "write",
            (None, Some(Stage::Finishing)) => "finish",
            (None, Some(Stage::Deleting)) => "delete",
            (None, Some(Stage::Complete) | None) => "between",
        }
    }
}

/// Leaks are space that is lost; anything else is an error.
fn is_sound(path: &Path) -> Outcome<()> {
    let args = ["check", "-q", "-U", "-f", "qcow2", &text(path)];
    let done = process::run("qemu-img", &args, STEP_LIMIT)?;
    let code = done.status.code();
    hold!(matches!(code, Some(0 | 3)), "{}: {done:?}", path.display());
    Ok(())
}

fn read(path: &Path, raw: &Path) -> Outcome<()> {
    let (from, to) = (text(path), text(raw));
    qemu_img(&["convert", "-U", "-f", "qcow2", "-O", "raw", &from, &to]).map(drop)
}

#[test]
fn backups_that_a_kill_meets_anywhere_in_their_lives_are_what_they_are_said_to_be() -> Outcome<()> {
    const NAME: &str = "kills in backups' lives";
    real(NAME, NEEDS, |ground| {
        let seed = dice::seed()?;
        let kills = dice::environment("NBDTRACK_BACKUP_KILLS").unwrap_or(KILLS);
        tell(&format!(
            "{NAME}: NBDTRACK_SEED={seed} NBDTRACK_BACKUP_KILLS={kills}"
        ));
        let (mut scene, folder) = scene(ground)?;
        let raw = ground.file("as-raw");
        let mut life = Life {
            folder,
            backups: Vec::new(),
            pending: None,
            number: 0,
            dice: Dice::new(seed),
            tally: Tally::default(),
        };
        for round in 0..kills {
            let what = format!("NBDTRACK_SEED={seed}, kill {round}");
            let moment = Moment::any(&mut life.dice);
            killed_at_work(&mut scene, &mut life, moment).doing(&what)?;
            *life.tally.cut.entry(life.met()).or_default() += 1;
            life.judge_files(&raw).doing(&what)?;
            scene.start()?;
            life.judge_rows(&scene, &raw).doing(&what)?;
            life.tidy(&scene).doing(&what)?;
        }
        let Tally {
            complete,
            deleted,
            writes,
            cut,
        } = &life.tally;
        tell(&format!(
            "{NAME}: {complete} finished, {deleted} deleted, {writes} writes; killed in {cut:?}"
        ));
        scene.stop()
    })
}

/// When the daemon is killed.
enum Moment {
    After(Duration),
    /// After the beginning of such a piece of work.
    In(&'static str, Duration),
}

impl Moment {
    fn any(dice: &mut Dice) -> Moment {
        match dice.roll(2 * PIECES.len()) {
            at if at < PIECES.len() => Moment::In(
                PIECES[at],
                Duration::from_micros(dice.roll(EARLY_US) as u64),
            ),
            _ => Moment::After(Duration::from_millis(dice.roll(MOMENT_MS) as u64)),
        }
    }

    fn wait(&self, begins: &mpsc::Receiver<&'static str>) {
        let (piece, after) = match self {
            Moment::After(time) => return std::thread::sleep(*time),
            Moment::In(piece, after) => (piece, *after),
        };
        let by = Instant::now() + COMES_UP;
        while let Ok(begun) = begins.recv_timeout(by.saturating_duration_since(Instant::now())) {
            if begun == *piece {
                return std::thread::sleep(after);
            }
        }
    }
}

/// Works on backups until the daemon is killed, at `moment`.
fn killed_at_work(scene: &mut Scene, life: &mut Life, moment: Moment) -> Outcome<()> {
    let (daemon, endpoint) = (scene.daemon.take(), scene.endpoint());
    let killed = &AtomicBool::new(false);
    let endpoint = &endpoint;
    let caller = &scene.client;
    let (begins, told) = mpsc::channel();
    let stop = std::thread::scope(|threads| -> Outcome<_> {
        // Thread: works until the daemon is gone, which each of its calls notices.
        let work = threads.spawn(move || {
            let mut worker = Worker {
                life,
                caller,
                endpoint,
                killed,
                begins,
            };
            worker.work()
        });
        moment.wait(&told);
        killed.store(true, Ordering::SeqCst);
        if let Some(daemon) = daemon {
            daemon.kill()?;
        }
        match work.join() {
            Ok(stop) => Ok(stop),
            Err(_) => trouble!("the worker panicked"),
        }
    })?;
    match stop {
        Err(Stop::Wrong(trouble)) => Err(trouble),
        Ok(()) | Err(Stop::Killed) => Ok(()),
    }
}
