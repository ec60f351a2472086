//! Promise: a call that makes, finishes or deletes a file on a file system that hangs is answered in time, says so, and holds up nobody else. What it
//! was told is not made is not made later either; and when the file system answers, each call can be repeated.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use zbus::{OwnedVariant, Variant};

use support::backups::{copy_in, random, sha256, state};
use support::bus::{Client as Caller, Options, Refused};
use support::fuse_disk::{ALL, FuseDisk, READS};
use support::ground::{Ground, Need, real, tell};
use support::images::{qemu_img, text};
use support::mounts::Mounted;
use support::process;
use support::scene::{STEP_LIMIT, Scene};
use support::stream::{Pace, Stream};
use support::{Outcome, hold, until};

const NEEDS: &[Need] = &[
    Need::Bus,
    Need::Loop,
    Need::Tool("mkfs.ext4"),
    Need::Tool("mount"),
    Need::Tool("fsfreeze"),
    Need::Tool("nbdcopy"),
    Need::Tool("qemu-img"),
    Need::Tool("sha256sum"),
];
/// `STEP_WITHIN` of src/daemon/patience.rs, and what two steps and a busy machine add.
const ANSWERED: Duration = Duration::from_secs(23);
/// What waits for no file of the mount answers within this.
const PROMPT: Duration = Duration::from_secs(2);
const BYTES: u64 = 1 << 20;
/// Images that are made elsewhere meanwhile.
const NEAR_MAX: u32 = 20;
const AT: u64 = 1_764_129_600;

/// Where the file system hangs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// Nothing is in memory, and nothing can be read.
    Look,
    /// No name comes or goes, and nothing is written.
    Frozen,
    /// Nothing becomes durable.
    Sync,
}

/// A file system with three backups, of which one is not finished. Fields are dropped in this order.
struct Place {
    way: Way,
    mounted: Mounted,
    disk: FuseDisk,
    /// Complete, with one on it.
    full: String,
    child: String,
    open: String,
    sum: String,
}

/// Thaws when it is dropped, whatever became of the test.
struct Frozen(String);

impl Drop for Frozen {
    fn drop(&mut self) {
        let _ = process::run("fsfreeze", &["-u", &self.0], STEP_LIMIT);
    }
}

fn call<B>(caller: &Caller, member: &str, body: &B) -> (Result<zbus::Message, Refused>, Duration)
where
    B: serde::Serialize + zbus::DynamicType,
{
    let begun = Instant::now();
    let said = caller.call(member, body);
    (said, begun.elapsed())
}

fn begin(
    caller: &Caller,
    vm: &str,
    folder: &Path,
    parent: Option<&str>,
) -> (Result<zbus::Message, Refused>, Duration) {
    let mut options = Options::from([
        ("size", Variant::from(BYTES)),
        ("at", Variant::from(AT + u64::from(parent.is_some()))),
        ("folder", Variant::from(text(folder))),
    ]);
    if let Some(parent) = parent {
        options.insert("parent", Variant::from(parent.to_owned()));
    }
    call(caller, "BeginBackup", &(vm, 0_u32, options))
}

fn begun(caller: &Caller, vm: &str, folder: &Path, parent: Option<&str>) -> Outcome<String> {
    let (_, name): (zbus::OwnedObjectPath, String) =
        begin(caller, vm, folder, parent).0?.body().deserialize()?;
    Ok(name)
}

fn finish(caller: &Caller, name: &str) -> (Result<zbus::Message, Refused>, Duration) {
    let options = Options::from([
        ("mode", Variant::from("hard")),
        ("wait_ms", Variant::from(10_000_u32)),
    ]);
    call(caller, "FinishBackup", &(name, options))
}

fn delete(caller: &Caller, name: &str) -> (Result<zbus::Message, Refused>, Duration) {
    call(caller, "DeleteBackup", &(name, Options::new()))
}

fn make(caller: &Caller, name: &str, folder: &Path) -> (Result<zbus::Message, Refused>, Duration) {
    let path = text(&folder.join(format!("{name}.qcow2")));
    let options = Options::from([("path", Variant::from(path))]);
    call(caller, "CreateImage", &(name, BYTES, options))
}

impl Way {
    const ALL: [Way; 3] = [Way::Look, Way::Frozen, Way::Sync];

    fn name(self) -> &'static str {
        match self {
            Way::Look => "look",
            Way::Frozen => "frozen",
            Way::Sync => "sync",
        }
    }
}

impl Place {
    fn make(ground: &Ground, way: Way) -> Outcome<(Mounted, FuseDisk)> {
        let disk = FuseDisk::make(ground.path(), &format!("{}-disk", way.name()), 32 << 20)?;
        let node = disk.device.node();
        process::succeed("mkfs.ext4", &["-q", "-F", &node], STEP_LIMIT)?;
        let mounted = Mounted::new(ground.file(way.name()), &[&node])?;
        Ok((mounted, disk))
    }

    fn furnish(
        scene: &Scene,
        raw: &Path,
        way: Way,
        disk: FuseDisk,
        mounted: Mounted,
    ) -> Outcome<Place> {
        let (caller, folder) = (&scene.client, &mounted.0);
        let full = begun(caller, way.name(), folder, None)?;
        copy_in(scene, raw, &full)?;
        finish(caller, &full).0?;
        let child = begun(caller, way.name(), folder, Some(&full))?;
        finish(caller, &child).0?;
        let open = begun(caller, &format!("{}-open", way.name()), folder, None)?;
        copy_in(scene, raw, &open)?;
        if way == Way::Look {
            // What is served is in memory.
            caller.remove_export(&open, "soft")?;
            let place = text(folder);
            until(STEP_LIMIT, "the file system to be let go", || {
                let done = process::run("umount", &[&place], STEP_LIMIT)?;
                Ok(done.status.success().then_some(()))
            })?;
            process::succeed("mount", &[&disk.device.node(), &place], STEP_LIMIT)?;
        }
        let sum = sha256(raw)?;
        Ok(Place {
            way,
            disk,
            mounted,
            full,
            child,
            open,
            sum,
        })
    }

    fn hang(&self) -> Outcome<Option<Frozen>> {
        match self.way {
            Way::Look => self.disk.hang(READS),
            Way::Sync => self.disk.hang(ALL),
            Way::Frozen => {
                let place = text(&self.mounted.0);
                process::succeed("fsfreeze", &["-f", &place], STEP_LIMIT)?;
                return Ok(Some(Frozen(place)));
            }
        }
        Ok(None)
    }

    /// Each call that concerns files, at one time; what each was answered, and after how long.
    fn calls(&self, caller: &Caller) -> Vec<(&'static str, Result<(), Refused>, Duration)> {
        let folder = &self.mounted.0;
        let (vm, image) = (format!("{}-new", self.way.name()), self.image());
        std::thread::scope(|threads| {
            // Thread: each waits for its one call, which has a deadline.
            let calls = [
                threads.spawn(|| ("image", make(caller, &image, folder))),
                threads.spawn(|| ("full", begin(caller, &vm, folder, None))),
                threads.spawn(|| ("incremental", begin(caller, &vm, folder, Some(&self.full)))),
                threads.spawn(|| ("finish", finish(caller, &self.open))),
                threads.spawn(|| ("delete", delete(caller, &self.child))),
            ];
            let done = calls.into_iter().filter_map(|call| call.join().ok());
            done.map(|(what, (said, took))| (what, said.map(drop), took))
                .collect()
        })
    }

    fn image(&self) -> String {
        format!("{}-image", self.way.name())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.mounted.0.join(format!("{name}.qcow2"))
    }

    /// The same calls when the file system answers: each comes to what it was asked for.
    fn repeat(&self, scene: &Scene, answers: &Answers) -> Outcome<()> {
        let (caller, folder) = (&scene.client, &self.mounted.0);
        let vm = format!("{}-new", self.way.name());
        let hung = |what| answers.get(&(self.way.name(), what)) != Some(&true);
        if hung("image") {
            // Nobody was told of it, so it is not there, now or later.
            hold!(
                caller.export(&self.image())?.is_none(),
                "{:?}: exported",
                self.way
            );
            again("CreateImage", || make(caller, &self.image(), folder).0)?;
        }
        for (what, parent) in [("full", None), ("incremental", Some(self.full.as_str()))] {
            if hung(what) {
                again("BeginBackup", || begin(caller, &vm, folder, parent).0)?;
            }
        }
        let done = again("FinishBackup", || finish(caller, &self.open).0)?;
        let done: BTreeMap<String, OwnedVariant> = done.body().deserialize()?;
        let sum = done
            .get("Sha256")
            .and_then(|sum| String::try_from(sum.clone()).ok());
        hold!(
            sum.as_ref() == Some(&self.sum),
            "{:?}: {sum:?}, not {}",
            self.way,
            self.sum
        );
        let deleted = again("DeleteBackup", || delete(caller, &self.child).0);
        if let Err(no) = &deleted {
            hold!(
                no.to_string().contains("there is no backup"),
                "{:?}: {no}",
                self.way
            );
        }
        hold!(
            state(scene, &self.child)? == "none",
            "{:?}: its row",
            self.way
        );
        hold!(!self.path(&self.child).exists(), "{:?}: its file", self.way);
        for name in [&self.full, &self.open] {
            let found = state(scene, name)?;
            hold!(found == "complete", "{:?}: {name} is {found}", self.way);
        }
        for entry in std::fs::read_dir(folder)?.flatten() {
            let path = entry.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "qcow2")
            {
                qemu_img(&["check", "-q", "-U", "-f", "qcow2", &text(&path)])?;
            } else {
                hold!(
                    entry.file_name() == "lost+found",
                    "{} is left",
                    path.display()
                );
            }
        }
        Ok(())
    }
}

/// By the way and the call, whether it was done.
type Answers = BTreeMap<(&'static str, &'static str), bool>;

/// Calls until what hung is over: only that keeps a call from being repeated.
fn again(
    what: &str,
    mut call: impl FnMut() -> Result<zbus::Message, Refused>,
) -> Outcome<zbus::Message> {
    until(STEP_LIMIT, what, || match call() {
        Ok(said) => Ok(Some(said)),
        // In the last step of its making it has its name for a moment.
        Err(no) if no.is("NotReady") || (what == "CreateImage" && no.is("AlreadyExists")) => {
            Ok(None)
        }
        Err(no) => Err(no.into()),
    })
}

#[test]
fn a_call_on_files_that_hang_is_answered_leaves_nothing_and_can_be_repeated() -> Outcome<()> {
    const NAME: &str = "calls on a file system that hangs";
    real(NAME, NEEDS, |ground| {
        let near = ground.file("near");
        std::fs::create_dir(&near)?;
        let raw = ground.file("disk.raw");
        random(&raw, BYTES, 11)?;
        let mut bare = Vec::new();
        for way in Way::ALL {
            bare.push((way, Place::make(ground, way)?));
        }
        let mut folders = vec![text(&near)];
        folders.extend(bare.iter().map(|(_, (mounted, _))| text(&mounted.0)));
        // Behind the daemon when all ends.
        let mut places = Vec::new();
        let mut scene = Scene::told(ground, format!("file_roots = {folders:?}\n"), &[])?;
        for (way, (mounted, disk)) in bare {
            places.push(Place::furnish(&scene, &raw, way, disk, mounted)?);
        }
        let at_hand = Options::from([("path", Variant::from(text(&near.join("near.qcow2"))))]);
        call(
            &scene.client,
            "CreateImage",
            &("near", 8_u64 << 20, at_hand),
        )
        .0?;
        let bystander = Stream::start(&scene.endpoint(), "near", "near", Pace::BYSTANDER, 0)?;
        bystander.wait_for(100)?;

        let healers: Vec<_> = places.iter().map(|place| place.disk.healer()).collect();
        let frozen: Vec<_> = places.iter().map(Place::hang).collect::<Outcome<_>>()?;
        let caller = &scene.client;
        let (answered, longest) = std::thread::scope(|threads| -> Outcome<_> {
            // Thread: one for each file system, which ends with the calls on it.
            let calling: Vec<_> = places
                .iter()
                .map(|place| threads.spawn(move || place.calls(caller)))
                .collect();
            let mut longest = Duration::ZERO;
            let mut number = 0;
            until(ANSWERED * 2, "the calls' answers", || {
                let begun = Instant::now();
                if number < NEAR_MAX {
                    number += 1;
                    make(caller, &format!("near{number}"), &near).0?;
                }
                caller.call("ListBackups", &(Options::new(),))?;
                caller.stats()?;
                bystander.wait_for(10)?;
                longest = longest.max(begun.elapsed());
                hold!(longest < PROMPT, "others waited {longest:?}");
                Ok(calling
                    .iter()
                    .all(|calls| calls.is_finished())
                    .then_some(()))
            })?;
            let answered = calling
                .into_iter()
                .map(|calls| calls.join().unwrap_or_default());
            Ok((answered.collect::<Vec<_>>(), longest))
        })?;
        let mut answers = Answers::new();
        let mut told = Vec::new();
        for (place, answered) in places.iter().zip(answered) {
            hold!(answered.len() == 5, "{:?}: {answered:?}", place.way);
            for (what, said, took) in answered {
                let place_of = text(&place.mounted.0);
                let name = |text: &str| {
                    text.contains(&place_of)
                        || text.contains(&place.open)
                        || text.contains(&place.child)
                };
                let clear = match &said {
                    Ok(()) => true,
                    Err(no) => no.is("TimedOut") && name(&no.text),
                };
                hold!(
                    clear && took < ANSWERED,
                    "{:?}, {what}: {said:?} after {took:?}",
                    place.way
                );
                told.push(format!(
                    "{} {what} {} {took:.1?}",
                    place.way.name(),
                    if said.is_ok() { "done" } else { "told" }
                ));
                answers.insert((place.way.name(), what), said.is_ok());
            }
        }
        tell(&format!(
            "{NAME}: {}; others within {longest:?}",
            told.join(", ")
        ));
        // Who asks again meanwhile is told what goes on, and at once.
        for place in &places {
            let vm = format!("{}-new", place.way.name());
            let (said, took) = begin(caller, &vm, &place.mounted.0, None);
            let busy =
                matches!(&said, Err(no) if no.is("NotReady") && no.text.contains("being begun"));
            hold!(
                busy && took < PROMPT,
                "{:?}: {said:?} after {took:?}",
                place.way
            );
        }

        drop(frozen);
        for place in &places {
            place.disk.heal();
        }
        for place in &places {
            place.repeat(&scene, &answers)?;
        }
        let report = bystander.finish()?;
        hold!(report.broken.is_none(), "{:?}", report.broken);
        drop(healers);
        scene.stop()
    })
}
