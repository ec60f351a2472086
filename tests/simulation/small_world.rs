//! All interleavings of a small world: two volumes, two names, one or two exports, to a stated depth.
//!
//! A state is what the middle, the machine and everything under way look like; one that was seen before at no greater
//! depth is not gone into again.

use std::collections::HashMap;
use std::hash::{BuildHasher, BuildHasherDefault, DefaultHasher};
use std::time::Instant;

use nbdtrack::correlation::{Definition, Request, Source};

use crate::number_from;
use crate::world::{Broken, World, definition, volume};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Move {
    /// Volume 0 or 1 comes to name 0 or 1.
    Attach(u8, u8),
    Detach(u8),
    Deliver(u8),
    Lose,
    Survey,
    Open,
    OpenFails,
    Answer(u8),
    Write(u8),
    FinishWrite(u8),
    EndLease(u8),
    Keep,
    PrepareDetach(u8),
    CancelDetach(u8),
    Crash,
}

/// What can be done in this world now.
fn moves(world: &World) -> Vec<Move> {
    let mut moves = Vec::new();
    for slot in 0..2 {
        match &world.slots[usize::from(slot)] {
            Some(_) => moves.push(Move::Detach(slot)),
            None => moves.extend([Move::Attach(slot, 0), Move::Attach(slot, 1)]),
        }
    }
    let under_way = |count: usize| 0..u8::try_from(count.min(2)).expect("at most 2");
    moves.extend(under_way(world.observations.len()).map(Move::Deliver));
    if world.observations.is_empty() {
        moves.push(Move::Survey);
    } else {
        moves.push(Move::Lose);
    }
    if !world.opens.is_empty() {
        moves.extend([Move::Open, Move::OpenFails]);
    }
    moves.extend(under_way(world.answers.len()).map(Move::Answer));
    for (index, lease) in (0_u8..).zip(world.leases.values()) {
        match (lease.ending, lease.in_flight) {
            (None, 0) => moves.push(Move::Write(index)),
            (None, _) => {}
            (Some(_), 0) => moves.push(Move::EndLease(index)),
            (Some(_), _) => moves.extend([Move::EndLease(index), Move::FinishWrite(index)]),
        }
    }
    if !world.writes.is_empty() {
        moves.push(Move::Keep);
    }
    moves.extend([Move::PrepareDetach(0), Move::CancelDetach(0), Move::Crash]);
    moves
}

fn make(world: &mut World, what: Move) {
    match what {
        Move::Attach(slot, volume) => world.attach(slot, volume, true),
        Move::Detach(slot) => world.detach(slot, true),
        Move::Deliver(index) => world.deliver(index),
        Move::Lose => world.lose(0),
        Move::Survey => world.survey(0, false),
        Move::Open => world.open(0, 0),
        Move::OpenFails => world.open(0, 1),
        Move::Answer(index) => world.answer(index),
        Move::Write(index) => world.write(index),
        Move::FinishWrite(index) => world.finish_write(index),
        Move::EndLease(index) => {
            // Counted among those that end.
            let ending = world
                .leases
                .values()
                .take(usize::from(index))
                .filter(|l| l.ending.is_some())
                .count();
            world.end_lease(u8::try_from(ending).expect("few leases"), false);
        }
        Move::Keep => world.keep(false),
        Move::PrepareDetach(index) => {
            let within = std::time::Duration::from_secs(30);
            world.ask(Request::PrepareDetach {
                volume: volume(index),
                hard: false,
                within,
            });
        }
        Move::CancelDetach(index) => world.ask(Request::CancelDetach {
            volume: volume(index),
        }),
        Move::Crash => world.crash(false, 0),
    }
}

struct Explored {
    states: usize,
    steps: u64,
    deepest: usize,
    violation: Option<(String, Vec<Move>)>,
}

/// Breadth first, so that the first path that breaks a promise is a shortest one.
fn explore(start: World, depth: usize) -> Explored {
    let hasher = BuildHasherDefault::<DefaultHasher>::default();
    let mut seen: HashMap<u64, usize> = HashMap::new();
    let mut explored = Explored {
        states: 1,
        steps: 0,
        deepest: 0,
        violation: None,
    };
    let mut edge = vec![(start, Vec::new())];
    for level in 1..=depth {
        let mut next = Vec::new();
        for (world, path) in edge {
            for what in moves(&world) {
                let mut after = world.clone();
                make(&mut after, what);
                explored.steps += 1;
                let mut path: Vec<Move> = path.clone();
                path.push(what);
                if let Some(violation) = after.violation.take() {
                    explored.violation = Some((violation, path));
                    return explored;
                }
                if let std::collections::hash_map::Entry::Vacant(place) =
                    seen.entry(hasher.hash_one(after.picture()))
                {
                    place.insert(level);
                    explored.states += 1;
                    next.push((after, path));
                }
            }
        }
        explored.deepest = level;
        edge = next;
    }
    explored
}

fn one() -> Vec<Definition> {
    vec![definition(0, 0, 0, Source::Dbus)]
}

fn two() -> Vec<Definition> {
    vec![
        definition(0, 0, 0, Source::Dbus),
        definition(1, 1, 0, Source::Dbus),
    ]
}

#[test]
fn no_reachable_state_of_a_small_world_serves_the_wrong_volume() {
    let deeper = number_from("SMALL_WORLD_DEEPER")
        .map_or(0, |more| usize::try_from(more).expect("a small number"));
    // From a machine without disks before its first survey, and from one that serves what it has.
    let empty = |exports: &[Definition]| World::new(Broken::Nothing, &[], exports);
    let settled = |exports: &[Definition], disks: &[(u8, u8)]| {
        let mut world = World::new(Broken::Nothing, disks, exports);
        world.settle_all();
        world
    };
    let both = [(0, 0), (1, 1)];
    let twins = [(0, 0), (1, 0)];
    for (what, start, depth) in [
        ("one export, nothing attached", empty(&one()), 8),
        ("one export, served", settled(&one(), &both[..1]), 6),
        ("two exports, nothing attached", empty(&two()), 7),
        ("two exports, both served", settled(&two(), &both), 5),
        ("one export, two disks claim it", settled(&one(), &twins), 6),
    ] {
        let began = Instant::now();
        let depth = depth + deeper;
        let explored = explore(start, depth);
        assert_eq!(explored.violation, None);
        assert_eq!(explored.deepest, depth);
        crate::tell(&format!(
            "{what}: {} states, {} steps, all interleavings of {depth} moves, {:.1} s",
            explored.states,
            explored.steps,
            began.elapsed().as_secs_f64()
        ));
    }
}

#[test]
fn a_small_world_finds_what_is_broken_on_purpose() {
    for (broken, disks) in [
        (Broken::PathsForIdentity, [].as_slice()),
        (Broken::OpenBeforeDrained, &[(0, 0)]),
        (Broken::SealIgnored, &[(0, 0)]),
    ] {
        let mut start = World::new(broken, disks, &one());
        if !disks.is_empty() {
            start.settle_all();
        }
        let explored = explore(start, 7);
        let (violation, path) = explored.violation.expect("a broken world breaks a promise");
        crate::tell(&format!(
            "{broken:?}: {} states to {violation}: {path:?}",
            explored.states
        ));
    }
}
