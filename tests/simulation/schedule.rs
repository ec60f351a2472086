//! Schedules: what happens in which order, drawn from a seed, and the shortest one that still fails.

use std::time::Duration;

use nbdtrack::correlation::{Definition, DiskSeq, RemoveMode, Request, Source};

use crate::world::{Broken, NAMES, SLOTS, VOLUMES, World, definition, ensure, name, volume};

/// SplitMix64: small, and good enough to choose steps.
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn byte(&mut self) -> u8 {
        self.next().to_le_bytes()[0]
    }

    pub fn below(&mut self, bound: u8) -> u8 {
        self.byte() % bound
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Attach,
    Detach,
    Swap,
    ChangeIdentity,
    Alter,
    Deliver,
    DeliverLater,
    Lose,
    Double,
    Survey,
    Blind,
    Sizeless,
    Silent,
    Open,
    OpenFails,
    Answer,
    Write,
    FinishWrite,
    EndLease,
    EndUnflushed,
    Keep,
    KeepFails,
    Add,
    Ensure,
    Remove,
    PrepareDetach,
    CancelDetach,
    Resolve,
    Configure,
    Edit,
    Pass,
    PassToDeadline,
    Crash,
    Reboot,
    Stop,
}

/// How often each kind is drawn, and whether a seed may leave it out.
const KINDS: [(Kind, u8, bool); 35] = [
    (Kind::Attach, 10, false),
    (Kind::Detach, 6, true),
    (Kind::Swap, 3, true),
    (Kind::ChangeIdentity, 2, true),
    (Kind::Alter, 4, true),
    (Kind::Deliver, 24, false),
    (Kind::DeliverLater, 4, true),
    (Kind::Lose, 2, true),
    (Kind::Double, 2, true),
    (Kind::Survey, 4, true),
    (Kind::Blind, 1, true),
    (Kind::Sizeless, 1, true),
    (Kind::Silent, 1, true),
    (Kind::Open, 14, false),
    (Kind::OpenFails, 2, true),
    (Kind::Answer, 24, false),
    (Kind::Write, 5, true),
    (Kind::FinishWrite, 4, true),
    (Kind::EndLease, 10, false),
    (Kind::EndUnflushed, 1, true),
    (Kind::Keep, 8, false),
    (Kind::KeepFails, 1, true),
    (Kind::Add, 4, true),
    (Kind::Ensure, 5, true),
    (Kind::Remove, 3, true),
    (Kind::PrepareDetach, 4, true),
    (Kind::CancelDetach, 2, true),
    (Kind::Resolve, 3, true),
    (Kind::Configure, 2, true),
    (Kind::Edit, 1, true),
    (Kind::Pass, 3, true),
    (Kind::PassToDeadline, 3, true),
    (Kind::Crash, 1, true),
    (Kind::Reboot, 1, true),
    (Kind::Stop, 1, true),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Step {
    pub kind: Kind,
    pub a: u8,
    pub b: u8,
    pub c: u8,
}

#[derive(Clone, Debug)]
pub struct Schedule {
    pub disks: Vec<(u8, u8)>,
    pub exports: Vec<Definition>,
    pub steps: Vec<Step>,
}

/// The same seed gives the same schedule.
pub fn draw(seed: u64) -> Schedule {
    let mut random = Random(seed);
    let disks = (0..random.below(3))
        .map(|slot| (slot, random.below(VOLUMES)))
        .collect();
    let mut exports = vec![
        definition(0, 0, 0, Source::Dbus),
        definition(1, 1, 0, Source::Dbus),
    ];
    if random.below(3) == 0 {
        exports[0].share = true;
        exports.push(definition(2, 0, 2 | random.below(2), Source::Dbus));
    }
    // Swarm: some kinds of step are left out, so that others come often enough to meet.
    let off = random.next() & random.next();
    let kinds: Vec<Kind> = KINDS
        .iter()
        .enumerate()
        .filter(|(index, (_, _, may_be_off))| !*may_be_off || off >> index & 1 == 0)
        .flat_map(|(_, (kind, weight, _))| std::iter::repeat_n(*kind, usize::from(*weight)))
        .collect();
    let steps = (0..30 + random.below(150))
        .map(|_| {
            let index = usize::try_from(random.next() >> 40).expect("24 bits") % kinds.len();
            Step {
                kind: kinds[index],
                a: random.byte(),
                b: random.byte(),
                c: random.byte(),
            }
        })
        .collect();
    Schedule {
        disks,
        exports,
        steps,
    }
}

/// Runs a schedule and then lets the world come to rest; what was broken first, if anything.
pub fn run(schedule: &Schedule, broken: Broken, log: bool) -> (Option<String>, u64, Vec<String>) {
    // An assertion of the middle is a broken promise like any other.
    let lines = std::sync::Arc::new(std::sync::Mutex::new(Vec::new()));
    let kept = lines.clone();
    let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut world = World::new(broken, &schedule.disks, &schedule.exports);
        world.log = log.then(Vec::new);
        for step in &schedule.steps {
            take(&mut world, *step);
            if let Some(log) = &mut world.log {
                kept.lock().expect("not poisoned").append(log);
            }
            if world.violation.is_some() {
                break;
            }
        }
        if world.violation.is_none() {
            world.rest();
        }
        kept.lock()
            .expect("not poisoned")
            .append(world.log.as_mut().unwrap_or(&mut Vec::new()));
        (world.violation.take(), world.applied)
    }));
    let (violation, applied) = outcome.unwrap_or_else(|panic| {
        let what = panic
            .downcast_ref::<String>()
            .cloned()
            .unwrap_or_else(|| "it panicked".to_owned());
        (Some(what), 0)
    });
    let lines = std::mem::take(&mut *lines.lock().expect("not poisoned"));
    (violation, applied, lines)
}

pub fn take(world: &mut World, step: Step) {
    let Step { kind, a, b, c } = step;
    let slot = a % SLOTS;
    match kind {
        Kind::Attach => world.attach(slot, b % (VOLUMES + 1), c & 1 == 0),
        Kind::Detach => world.detach(slot, b & 7 != 0),
        Kind::Swap => {
            let other = b % SLOTS;
            let volumes =
                [slot, other].map(|s| world.slots[usize::from(s)].as_ref().map(|disk| disk.volume));
            world.detach(slot, true);
            world.detach(other, true);
            for (place, volume) in [(other, volumes[0]), (slot, volumes[1])] {
                if let Some(volume) = volume {
                    world.attach(place, volume, c & 1 == 0);
                }
            }
        }
        // A disk that says nothing any more has not become another one: `Silent`.
        Kind::ChangeIdentity => world.change_identity(slot, b % VOLUMES),
        Kind::Alter => world.alter(slot, b),
        Kind::Deliver => world.deliver(0),
        Kind::DeliverLater => world.deliver(a),
        Kind::Lose => world.lose(a),
        Kind::Double => world.double(a),
        Kind::Survey => world.survey(if b & 3 == 0 { a } else { 0 }, b & 4 != 0),
        Kind::Blind => world.blind(slot),
        Kind::Sizeless => world.sizeless(slot),
        Kind::Silent if b >= 192 => world.bar(slot),
        Kind::Silent => world.silent(slot, b),
        Kind::Open => world.open(a, 0),
        Kind::OpenFails => world.open(a, 1 + (b & 1)),
        Kind::Answer => world.answer(a),
        Kind::Write => world.write(a),
        Kind::FinishWrite => world.finish_write(a),
        Kind::EndLease => world.end_lease(a, false),
        Kind::EndUnflushed => world.end_lease(a, true),
        Kind::Keep => world.keep(false),
        Kind::KeepFails => world.keep(true),
        Kind::Add => {
            let wait = Duration::from_millis(u64::from(c) * 100);
            world.ask(Request::AddExport {
                definition: definition(a, b, c, Source::Dbus),
                wait,
            });
        }
        Kind::Ensure => {
            let wait = Duration::from_millis(u64::from(c) * 100);
            world.ask(Request::EnsureVmExport(ensure(a, a >> 4, b, wait)));
        }
        Kind::Remove => {
            let within = Duration::from_secs(u64::from(c & 31));
            world.ask(Request::RemoveExport {
                name: name(a),
                mode: [
                    RemoveMode::Soft,
                    RemoveMode::Hard,
                    RemoveMode::Hide,
                    RemoveMode::Safe,
                ][usize::from(b & 3)],
                within,
            });
        }
        Kind::PrepareDetach => {
            let within = Duration::from_secs(u64::from(c & 31));
            world.ask(Request::PrepareDetach {
                volume: volume(a % VOLUMES),
                hard: b & 1 == 1,
                within,
            });
        }
        Kind::CancelDetach => world.ask(Request::CancelDetach {
            volume: volume(a % VOLUMES),
        }),
        Kind::Resolve => {
            let claimants = world
                .middle
                .export(&name(a))
                .map(|view| view.volume_id)
                .and_then(|volume_id| {
                    let index = (0..VOLUMES).find(|v| volume(*v).to_string() == volume_id)?;
                    let disks = world.middle.disks_of(&volume(index));
                    disks.get(usize::from(b) % disks.len().max(1)).copied()
                });
            let diskseq = claimants.unwrap_or(DiskSeq(u64::from(b & 7)));
            world.ask(Request::ResolveConflict {
                name: name(a),
                diskseq,
            });
        }
        Kind::Configure => world.configure(file(a, b, c)),
        Kind::Edit => world.edit(file(a, b, c), c >> 6),
        Kind::Pass => world.pass(Duration::from_millis(u64::from(a) * u64::from(a))),
        Kind::PassToDeadline => {
            world.pass_to_deadline(Duration::from_secs(u64::from(a) * 2));
        }
        Kind::Crash => world.crash(false, a & 3),
        Kind::Reboot => world.crash(true, a & 3),
        Kind::Stop => {
            if a & 3 == 0 {
                world.stop();
            }
        }
    }
}

/// A configuration by its bits.
fn file(a: u8, b: u8, c: u8) -> Vec<Definition> {
    let named = (0..NAMES).filter(|index| a >> index & 1 == 1);
    let definition = |index: u8| {
        let direct = (a >> (NAMES + index) & 1) << 2;
        let flags = (c >> (2 * index)) & 3 | direct;
        definition(index, b >> (2 * index) & 3, flags, Source::Config)
    };
    named.map(definition).collect()
}

/// Takes steps out for as long as the schedule fails without them.
pub fn shrink(mut schedule: Schedule, broken: Broken) -> Schedule {
    let fails = |schedule: &Schedule| run(schedule, broken, false).0.is_some();
    let mut chunk = schedule.steps.len().max(1);
    loop {
        let mut at = 0;
        let mut shorter = false;
        while at < schedule.steps.len() {
            let mut tried = schedule.clone();
            tried
                .steps
                .drain(at..(at + chunk).min(schedule.steps.len()));
            if fails(&tried) {
                schedule = tried;
                shorter = true;
            } else {
                at += chunk;
            }
        }
        for index in (0..schedule.exports.len()).rev() {
            let mut tried = schedule.clone();
            tried.exports.remove(index);
            if fails(&tried) {
                schedule = tried;
                shorter = true;
            }
        }
        for index in (0..schedule.disks.len()).rev() {
            let mut tried = schedule.clone();
            tried.disks.remove(index);
            if fails(&tried) {
                schedule = tried;
                shorter = true;
            }
        }
        if chunk == 1 && !shorter {
            return schedule;
        }
        chunk = (chunk / 2).max(1);
    }
}
