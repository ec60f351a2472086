//! What the simulation found, each told as a short schedule of its own.

use std::time::Duration;

use nbdtrack::correlation::{DiskSeq, RemoveMode, Reply, Request, RequestError, Source, State};

use crate::world::{Broken, World, definition, ensure, name, volume};

const WITHIN: Duration = Duration::from_secs(30);

/// Export e0 serves volume 0 on `/dev/x0`, and e1 waits for volume 1.
fn serving() -> World {
    let mut world = World::new(
        Broken::Nothing,
        &[(0, 0)],
        &[
            definition(0, 0, 0, Source::Dbus),
            definition(1, 1, 0, Source::Dbus),
        ],
    );
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Serving));
    world
}

fn state(world: &World, index: u8) -> Option<State> {
    world.middle.export(&name(index)).map(|view| view.state)
}

fn deliver_all(world: &mut World) {
    while !world.observations.is_empty() {
        world.deliver(0);
    }
}

fn prepare_detach(index: u8, hard: bool) -> Request {
    Request::PrepareDetach {
        volume: volume(index),
        hard,
        within: WITHIN,
    }
}

fn add(index: u8, volume: u8) -> Request {
    Request::AddExport {
        definition: definition(index, volume, 0, Source::Dbus),
        wait: Duration::ZERO,
    }
}

fn remove(index: u8, hard: bool) -> Request {
    Request::RemoveExport {
        name: name(index),
        mode: if hard {
            RemoveMode::Hard
        } else {
            RemoveMode::Soft
        },
        within: WITHIN,
    }
}

fn ends_well(mut world: World) {
    world.rest();
    assert_eq!(world.violation, None);
}

/// The conflicts of the store were given only to exports of the store: one of the configuration, which is read later,
/// served the survivor after a restart.
#[test]
fn a_conflict_of_a_configured_export_survives_a_restart() {
    let mut world = World::new(Broken::Nothing, &[(0, 0)], &[]);
    world.configure(vec![definition(0, 0, 0, Source::Config)]);
    world.settle_all();
    world.attach(1, 0, true);
    world.settle_all();
    world.detach(0, true);
    world.settle_all();
    world.crash(false, 0);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Ambiguous));
    ends_well(world);
}

/// A new definition of the same volume began without its conflict.
#[test]
fn a_conflict_survives_a_new_definition_of_the_same_volume() {
    let mut world = World::new(Broken::Nothing, &[(0, 0), (1, 0)], &[]);
    world.configure(vec![definition(0, 0, 0, Source::Config)]);
    world.settle_all();
    world.detach(0, true);
    world.settle_all();
    world.configure(vec![definition(0, 0, 1, Source::Config)]);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Ambiguous));
    ends_well(world);
}

/// An export that was added to a volume in conflict served the survivor that the others refused.
#[test]
fn a_new_export_waits_with_the_others_of_its_volume() {
    let mut world = serving();
    world.attach(1, 0, true);
    world.settle_all();
    world.detach(0, true);
    world.settle_all();
    world.ask(Request::AddExport {
        definition: definition(2, 0, 1, Source::Dbus),
        wait: Duration::ZERO,
    });
    world.settle_all();
    assert_eq!(state(&world, 2), Some(State::Ambiguous));
    ends_well(world);
}

/// An I/O error made the serial of a disk an empty one: it was taken for another disk, and the clients of an export that had not changed were cut
/// off. And a SCSI disk that reported that it may be another one by now was offered to new clients until the next survey.
#[test]
fn a_disk_that_does_not_say_what_it_is_keeps_its_clients_and_gets_no_new_ones() {
    use nbdtrack::correlation::{PartlyRead, Reading};
    use nbdtrack::identity::Scheme;
    let failed = [(Scheme::Loop, "EIO".to_owned())].into();
    for (what, said) in [
        ("nothing", Reading::Known([].into())),
        (
            "may be another",
            Reading::Doubtful("it was reset".to_owned()),
        ),
        (
            "unread",
            Reading::Partly(Box::new(PartlyRead {
                read: [].into(),
                unread: failed,
            })),
        ),
    ] {
        let mut world = serving();
        let generation = |world: &World| world.middle.export(&name(0)).map(|view| view.generation);
        let before = generation(&world);
        world.say(0, said);
        world.settle_all();
        assert_eq!(state(&world, 0), Some(State::Ambiguous), "{what}");
        assert_eq!(generation(&world), before, "{what}: its clients go on");
        // Nobody answers: that settles nothing.
        world.say(0, Reading::Unknown("the disk does not answer".to_owned()));
        world.settle_all();
        assert_eq!(state(&world, 0), Some(State::Ambiguous), "{what}");
        world.survey(0, true);
        world.settle_all();
        assert_eq!(state(&world, 0), Some(State::Serving), "{what}");
        assert_eq!(generation(&world), before, "{what}");
        // Another value is another volume, doubt or no doubt.
        world.say(0, Reading::Doubtful("it was reset".to_owned()));
        world.change_identity(0, 1);
        world.settle_all();
        assert_eq!(state(&world, 0), Some(State::Absent), "{what}");
        assert_eq!(state(&world, 1), Some(State::Serving), "{what}");
        ends_well(world);
    }
}

/// A disk that may be another one and does not say what it is kept the clients that it had for good: what they wrote went to whatever was there.
#[test]
fn a_disk_that_does_not_say_that_it_is_still_the_volume_loses_its_clients_in_the_end() {
    use nbdtrack::correlation::Reading;
    for then in [
        Reading::Unknown("EIO".to_owned()),
        Reading::Known([].into()),
    ] {
        let mut world = serving();
        let second = Duration::from_secs(1);
        world.say(0, Reading::Doubtful("it was reset".to_owned()));
        world.settle_all();
        for _ in 0..9 {
            world.pass(second);
            // Said again it is no reason to wait longer.
            world.say(0, Reading::Doubtful("it was reset".to_owned()));
            world.say(0, then.clone());
            world.settle_all();
            assert_eq!(state(&world, 0), Some(State::Ambiguous));
        }
        world.pass(second);
        let cut: Vec<_> = world.leases.values().map(|lease| lease.ending).collect();
        assert_eq!(cut, [Some(true)], "not drained: nothing more is written");
        world.settle_all();
        assert_eq!(state(&world, 0), Some(State::Absent));
        // It is the volume after all.
        world.survey(0, true);
        world.settle_all();
        assert_eq!(state(&world, 0), Some(State::Serving));
        ends_well(world);
    }
    // Also beside a twin.
    let mut world = serving();
    world.say(0, Reading::Doubtful("it was reset".to_owned()));
    world.attach(1, 0, true);
    world.settle_all();
    assert_eq!(world.leases.len(), 1);
    world.pass(Duration::from_secs(10));
    world.settle_all();
    assert_eq!(
        (state(&world, 0), world.leases.len()),
        (Some(State::Ambiguous), 0)
    );
    world.survey(0, true);
    ends_well(world);
    // A disk of which nobody said that it may be another one is no other one.
    let mut world = serving();
    world.say(0, Reading::Known([].into()));
    world.settle_all();
    world.pass(Duration::from_secs(60));
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Ambiguous));
    world.survey(0, true);
    ends_well(world);
}

/// A disk that was another volume was closed without a word: the close, or the kernel before it, wrote the first volume's last writes to it.
#[test]
fn who_wrote_to_a_disk_that_is_another_volume_now_is_told_where_that_went() {
    for (read_only, warned) in [(0, true), (1, false)] {
        let exports = [definition(0, 0, read_only, Source::Dbus)];
        let mut world = World::new(Broken::Nothing, &[(0, 0)], &exports);
        world.log = Some(Vec::new());
        world.settle_all();
        world.change_identity(0, 1);
        world.settle_all();
        let told = |line: &String| line.contains("did not flush is written by the kernel");
        let lines = world.log.take().unwrap_or_default();
        assert_eq!(lines.iter().any(told), warned, "{lines:?}");
        ends_well(world);
    }
}

/// A disk grew while it was being opened. What had been read of it before came later, and was taken for a disk that shrank: its new clients were cut off.
#[test]
fn a_size_that_was_read_before_the_open_ends_no_lease() {
    // Says the same again; grows, and nobody is told; shrinks.
    const AGAIN: u8 = 6;
    const GROW_UNTOLD: u8 = 201;
    const SHRINK: u8 = 4;
    let mut world = World::new(Broken::Nothing, &[], &[definition(0, 0, 0, Source::Dbus)]);
    world.settle_all();
    world.attach(0, 0, true);
    deliver_all(&mut world);
    world.alter(0, AGAIN);
    world.alter(0, GROW_UNTOLD);
    world.open(0, 0);
    world.answer(0);
    let size = |world: &World| world.middle.export(&name(0)).map(|view| view.size);
    assert_eq!(
        (state(&world, 0), size(&world)),
        (Some(State::Serving), Some(1100))
    );
    deliver_all(&mut world);
    assert_eq!(
        (state(&world, 0), size(&world)),
        (Some(State::Serving), Some(1100))
    );
    // What is read from now on is newer.
    world.alter(0, SHRINK);
    deliver_all(&mut world);
    assert_eq!(state(&world, 0), Some(State::Draining));
    ends_well(world);
}

/// Somebody who came to be in a file while that was given up ended the release: it was opened again once they had left.
#[test]
fn what_is_not_to_be_served_for_a_moment_stays_given_up() {
    let mut world = serving();
    world.bar(0);
    world.deliver(0);
    assert_ne!(state(&world, 0), Some(State::Serving));
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Serving));
    world.ask(prepare_detach(0, false));
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Released));
    world.bar(0);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Released));
    assert_eq!(world.store.releases.len(), 1);
    world.bar(0);
    world.deliver(0);
    world.crash(false, 0);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Released));
    ends_well(world);
}

/// Clients were counted before the export was hidden: one that came between went on under a name that was being removed, or that meant another volume.
#[test]
fn an_export_is_hidden_before_its_clients_are_counted_and_shown_again_where_there_are_some() {
    let mut world = World::new(Broken::Nothing, &[], &[definition(0, 0, 0, Source::Dbus)]);
    world.settle_all();
    world.attach(0, 0, true);
    deliver_all(&mut world);
    world.open(0, 0);
    world.answer(0);
    world.write(0);
    let remove = || Request::RemoveExport {
        name: name(0),
        mode: RemoveMode::Safe,
        within: Duration::from_secs(1),
    };
    world.ask(remove());
    assert!(matches!(
        world.replies.last(),
        Some(Err(RequestError::InUse(why))) if why.contains("has 1 clients: end them first")
    ));
    assert!(world.writes.is_empty() && world.accepts(&name(0)));
    world.finish_write(0);
    world.ask(remove());
    assert!(!world.writes.is_empty() && !world.accepts(&name(0)));
    world.settle_all();
    assert_eq!(state(&world, 0), None);
    ends_well(world);
}

/// With `allow = ["gpt"]`, a partition table that could not be read hid the serial that the export is known by.
#[test]
fn a_scheme_that_cannot_be_read_concerns_no_export_of_another() {
    use nbdtrack::correlation::{PartlyRead, Reading};
    use nbdtrack::identity::Scheme;
    let mut world = serving();
    let read = volume(0).candidates();
    let unread = [(Scheme::GptGuid, "its partition table: EIO".to_owned())].into();
    world.say(0, Reading::Partly(Box::new(PartlyRead { read, unread })));
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Serving));
    ends_well(world);
}

/// Disk 1 was served as volume 0 by e0, disk 2 came beside it, and is alone now.
fn survivor() -> World {
    let mut world = serving();
    left_alone(&mut world);
    world
}

fn left_alone(world: &mut World) {
    world.attach(1, 0, true);
    world.settle_all();
    world.detach(0, true);
    world.settle_all();
    assert_eq!(state(world, 0), Some(State::Ambiguous));
}

fn resolve(index: u8, diskseq: u64) -> Request {
    Request::ResolveConflict {
        name: name(index),
        diskseq: DiskSeq(diskseq),
    }
}

/// The conflict went with the export that had it: to remove it and add it again was to confirm the survivor, by two calls that
/// need no right to confirm.
#[test]
fn a_conflict_outlives_the_export_that_had_it() {
    let mut world = survivor();
    world.ask(remove(0, false));
    world.settle_all();
    assert_eq!(state(&world, 0), None);
    world.ask(add(0, 0));
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Ambiguous));
    world.ask(remove(0, false));
    world.settle_all();
    world.crash(false, 0);
    world.settle_all();
    // Another name, and a disk of a VM.
    let wait = Duration::ZERO;
    world.ask(Request::EnsureVmExport(ensure(2, 0, 0, wait)));
    world.settle_all();
    assert_eq!(state(&world, 2), Some(State::Ambiguous));
    world.ask(resolve(2, 2));
    world.settle_all();
    assert_eq!(state(&world, 2), Some(State::Serving));
    world.crash(false, 0);
    world.settle_all();
    assert_eq!(state(&world, 2), Some(State::Serving), "it was confirmed");
    ends_well(world);
}

/// What is left of a conflict is not kept for ever.
#[test]
fn a_conflict_without_an_export_ends_with_the_last_disk_of_the_volume() {
    let mut world = survivor();
    world.ask(remove(0, false));
    world.settle_all();
    assert_eq!(world.store.conflicts.len(), 1);
    world.detach(1, true);
    world.settle_all();
    assert!(world.store.conflicts.is_empty());
    world.attach(1, 0, true);
    world.settle_all();
    world.ask(add(0, 0));
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Serving));
    ends_well(world);
}

/// An export that was given another name in the file, by one reload, left its conflict behind.
#[test]
fn a_conflict_survives_another_name_and_another_volume_and_back() {
    let mut world = World::new(Broken::Nothing, &[(0, 0)], &[]);
    world.configure(vec![definition(0, 0, 0, Source::Config)]);
    world.settle_all();
    left_alone(&mut world);
    world.configure(vec![definition(1, 0, 0, Source::Config)]);
    world.settle_all();
    assert_eq!(state(&world, 0), None);
    assert_eq!(state(&world, 1), Some(State::Ambiguous));
    world.configure(vec![definition(1, 1, 0, Source::Config)]);
    world.settle_all();
    assert_eq!(state(&world, 1), Some(State::Absent));
    world.configure(vec![definition(1, 0, 0, Source::Config)]);
    world.settle_all();
    assert_eq!(state(&world, 1), Some(State::Ambiguous));
    ends_well(world);
}

/// Exports that the file got while the daemon was down: one was defined before the one that had the conflict, by its name, and served
/// the survivor; another took its place.
#[test]
fn a_conflict_meets_what_the_file_got_while_the_daemon_was_down() {
    for file in [vec![0, 1], vec![0]] {
        let mut world = World::new(Broken::Nothing, &[(0, 0)], &[]);
        let reader = |index: u8| definition(index, 0, 1, Source::Config);
        world.configure(vec![reader(1)]);
        world.settle_all();
        world.attach(1, 0, true);
        world.settle_all();
        world.detach(0, true);
        world.settle_all();
        world.edit(file.iter().copied().map(reader).collect(), 0);
        world.settle_all();
        for index in file {
            assert_eq!(state(&world, index), Some(State::Ambiguous), "e{index}");
        }
        ends_well(world);
    }
}

/// A confirmation counted for one export, and another of the same volume began its next start with the others' doubt.
#[test]
fn a_confirmation_is_of_the_volume_whoever_exports_it() {
    let mut world = serving();
    world.ask(Request::AddExport {
        definition: definition(2, 0, 1, Source::Dbus),
        wait: Duration::ZERO,
    });
    world.settle_all();
    left_alone(&mut world);
    assert_eq!(state(&world, 2), Some(State::Ambiguous));
    world.ask(resolve(2, 2));
    world.settle_all();
    let both = [state(&world, 0), state(&world, 2)];
    assert_eq!(both, [Some(State::Serving); 2]);
    world.crash(false, 0);
    world.settle_all();
    let both = [state(&world, 0), state(&world, 2)];
    assert_eq!(both, [Some(State::Serving); 2]);
    ends_well(world);
}

/// The export went while its confirmation was being stored: what was taken out of the store is put back.
#[test]
fn a_confirmation_of_an_export_that_goes_confirms_nothing() {
    let mut world = survivor();
    world.ask(remove(0, false));
    world.ask(resolve(0, 2));
    world.settle_all();
    assert_eq!(world.store.conflicts.len(), 1);
    world.crash(false, 0);
    world.ask(add(0, 0));
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Ambiguous));
    ends_well(world);
}

/// Disks that were given up, or are members of something else, counted as claimants: the one that was left could
/// never be confirmed.
#[test]
fn a_member_of_an_array_does_not_stand_in_the_way_of_a_confirmation() {
    let mut world = serving();
    world.attach(1, 0, true);
    world.settle_all();
    world.alter(0, 1);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Ambiguous));
    world.ask(Request::ResolveConflict {
        name: name(0),
        diskseq: DiskSeq(2),
    });
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Serving));
    ends_well(world);
}

/// A map is `dm-N`, and its paths were told by "mpath" in that name: each path was served, beside the map and beside the others.
#[test]
fn a_path_that_a_multipath_map_takes_is_given_up_and_served_again_when_the_map_is_gone() {
    let mut world = serving();
    world.alter(0, 1);
    world.settle_all();
    let view = world.middle.export(&name(0)).unwrap();
    assert_eq!(view.state, State::Absent);
    let reason = "/dev/x0 is a path of the multipath map dm-0";
    assert!(view.reason.contains(reason), "{}", view.reason);
    world.alter(0, 1);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Serving));
    ends_well(world);
}

/// The caller of a detach was told "safe" by a daemon that had not looked yet, and opened the disk right after.
#[test]
fn before_the_first_survey_nothing_is_safe_to_detach() {
    let mut world = World::new(
        Broken::Nothing,
        &[(0, 0)],
        &[definition(0, 0, 0, Source::Dbus)],
    );
    world.ask(prepare_detach(0, false));
    world.ask(Request::CancelDetach { volume: volume(0) });
    assert!(
        world
            .replies
            .iter()
            .all(|reply| matches!(reply, Err(RequestError::NotReady(_))))
    );
    assert_eq!(world.replies.len(), 2);
    ends_well(world);
}

/// A disk is attached that nobody has read. The caller was told that nothing of the volume is attached; then it was read, opened, and
/// detached under its clients.
#[test]
fn a_disk_that_is_not_read_yet_is_not_told_to_be_safe() {
    let mut world = World::new(Broken::Nothing, &[], &[definition(0, 0, 0, Source::Dbus)]);
    world.settle_all();
    world.attach(0, 0, false);
    world.deliver(0);
    world.ask(prepare_detach(0, false));
    assert!(
        matches!(world.replies.last(), Some(Err(RequestError::NotReady(_)))),
        "{:?}",
        world.replies
    );
    // It hangs, and nobody waits for it any longer; but it is not opened when it answers.
    world.pass(Duration::from_secs(10));
    world.ask(prepare_detach(0, false));
    assert_eq!(world.replies.last(), Some(&Ok(Reply::Done)));
    deliver_all(&mut world);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Released));
    world.crash(false, 0);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Released));
    world.ask(Request::CancelDetach { volume: volume(0) });
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Serving));
    ends_well(world);
}

/// The same disk turned out to be another volume, or the detach was taken back before it was read.
#[test]
fn a_promise_of_a_disk_that_was_not_read_is_of_one_volume() {
    for cancelled in [false, true] {
        let volume_of_disk = u8::from(!cancelled);
        let mut world = World::new(
            Broken::Nothing,
            &[],
            &[
                definition(0, 0, 0, Source::Dbus),
                definition(1, 1, 0, Source::Dbus),
            ],
        );
        world.settle_all();
        world.attach(0, volume_of_disk, false);
        world.deliver(0);
        world.pass(Duration::from_secs(10));
        world.ask(prepare_detach(0, false));
        assert_eq!(world.replies.last(), Some(&Ok(Reply::Done)));
        if cancelled {
            world.ask(Request::CancelDetach { volume: volume(0) });
        }
        world.settle_all();
        assert_eq!(state(&world, volume_of_disk), Some(State::Serving));
        ends_well(world);
    }
}

/// Two disks of a volume were given up and taken back together: the one that had come first to the machine was served again when the
/// other left, though the other may be the one with the newer data.
#[test]
fn of_two_disks_that_are_taken_back_together_none_is_the_first() {
    for leaves in [0, 1] {
        let mut world = serving();
        world.ask(prepare_detach(0, false));
        world.settle_all();
        // The first is given up: an ordinary return.
        world.attach(1, 0, true);
        world.settle_all();
        assert_eq!(state(&world, 0), Some(State::Serving));
        world.ask(prepare_detach(0, false));
        world.settle_all();
        world.ask(Request::CancelDetach { volume: volume(0) });
        world.settle_all();
        assert_eq!(state(&world, 0), Some(State::Ambiguous));
        world.detach(leaves, true);
        world.settle_all();
        assert_eq!(state(&world, 0), Some(State::Ambiguous));
        ends_well(world);
    }
}

/// A survey missed a disk that was given up; when the next one saw it, it was opened again, and detached under its clients.
#[test]
fn what_was_given_up_stays_so_when_a_survey_misses_it() {
    let mut world = serving();
    world.ask(prepare_detach(0, false));
    world.settle_all();
    assert_eq!(world.replies.last(), Some(&Ok(Reply::Done)));
    world.blind(0);
    world.deliver(0);
    assert_eq!(world.middle.disks_of(&volume(0)), []);
    world.survey(0, false);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Released));
    // The first survey of a daemon is no better than another one.
    world.crash(false, 0);
    world.blind(0);
    world.deliver(0);
    assert_eq!(state(&world, 0), Some(State::Absent));
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Released));
    world.detach(0, true);
    world.settle_all();
    assert!(world.store.releases.is_empty());
    ends_well(world);
}

/// It left while a survey had missed it: the record goes with the kernel's word.
#[test]
fn the_release_of_a_disk_that_was_missed_ends_when_it_is_removed() {
    let mut world = serving();
    world.ask(prepare_detach(0, false));
    world.settle_all();
    world.blind(0);
    world.deliver(0);
    assert_eq!(world.store.releases.len(), 1);
    world.detach(0, true);
    world.settle_all();
    assert!(world.store.releases.is_empty());
    ends_well(world);
}

/// A disk without a size, which has a diskseq and an identity as before, is neither opened nor gone.
#[test]
fn a_disk_without_a_size_is_not_opened_and_is_still_there() {
    let mut world = World::new(
        Broken::Nothing,
        &[(0, 0)],
        &[definition(0, 0, 0, Source::Dbus)],
    );
    world.settle_all();
    world.sizeless(0);
    world.deliver(0);
    assert_eq!(state(&world, 0), Some(State::Draining));
    assert_eq!(world.middle.disks_of(&volume(0)), [DiskSeq(1)]);
    world.end_lease(0, false);
    world.answer(0);
    assert_eq!(state(&world, 0), Some(State::Absent));
    assert!(world.opens.is_empty());
    // A second disk beside it is a twin.
    world.attach(1, 0, true);
    world.deliver(1);
    assert_eq!(state(&world, 0), Some(State::Ambiguous));
    ends_well(world);
}

/// A detach that was asked for while the cancellation of an earlier one was being stored was answered, and then the
/// cancellation took effect.
#[test]
fn a_cancel_that_is_being_stored_is_not_crossed_by_a_detach() {
    let mut world = serving();
    world.ask(prepare_detach(0, false));
    world.settle_all();
    world.ask(Request::CancelDetach { volume: volume(0) });
    world.ask(prepare_detach(0, false));
    assert!(matches!(
        world.replies.last(),
        Some(Err(RequestError::NotReady(_)))
    ));
    ends_well(world);
}

/// A survey forgot how old the facts of a number without a disk were, so facts read before it brought the disk back.
#[test]
fn facts_from_before_a_survey_make_no_phantom() {
    let mut world = serving();
    world.attach(1, 1, true);
    world.detach(1, true);
    world.survey(0, false);
    world.deliver(2);
    world.deliver(0);
    assert_eq!(world.middle.disks_of(&volume(1)), []);
    ends_well(world);
}

/// The disk grew and no event told: the opened device's size against the older facts looked like a disk that shrank,
/// which was cut and opened again without an end.
#[test]
fn a_size_that_no_event_told_does_not_cut_the_export_again_and_again() {
    let mut world = World::new(
        Broken::Nothing,
        &[(0, 0)],
        &[definition(0, 0, 0, Source::Dbus)],
    );
    world.survey(0, false);
    world.alter(0, 208);
    world.deliver(0);
    world.alter(0, 5 + 7 * 29);
    assert!(world.observations.is_empty());
    world.open(0, 0);
    world.answer(0);
    assert_eq!(state(&world, 0), Some(State::Serving));
    assert!(world.leases.values().all(|lease| lease.ending.is_none()));
    ends_well(world);
}

/// The generations of an export that was added again began at 1 again: the late end of its namesake's orphan was taken
/// for the end of its own lease.
#[test]
fn an_orphan_is_not_taken_for_the_lease_of_its_namesake() {
    let mut world = serving();
    world.write(0);
    world.ask(remove(0, true));
    world.keep(false);
    world.answer(0);
    world.end_lease(0, false);
    world.answer(0);
    assert_eq!(world.middle.orphans(), 1);
    world.ask(remove(1, true));
    world.keep(false);
    world.answer(0);
    world.attach(1, 1, true);
    deliver_all(&mut world);
    world.ask(add(0, 1));
    for _ in 0..3 {
        world.keep(false);
        world.open(0, 0);
        world.answer(0);
    }
    assert_eq!(state(&world, 0), Some(State::Serving));
    assert_eq!(world.middle.orphans(), 1);
    world.settle_all();
    assert_eq!(
        (state(&world, 0), world.middle.orphans()),
        (Some(State::Serving), 0)
    );
    ends_well(world);
}

/// A disk turned from volume 0 into volume 1 while writes to volume 0 were in flight, and was opened as volume 1 before
/// they had ended.
#[test]
fn a_disk_that_became_another_volume_is_opened_after_it_was_let_go() {
    let mut world = serving();
    world.write(0);
    world.change_identity(0, 1);
    deliver_all(&mut world);
    assert_eq!(
        (state(&world, 0), state(&world, 1)),
        (Some(State::Draining), Some(State::Absent))
    );
    assert!(world.opens.is_empty());
    world.settle_all();
    assert_eq!(state(&world, 1), Some(State::Serving));
    ends_well(world);
}

/// The flush of an orphan failed when it was closed at last; the detach that had waited for it said that all was well.
#[test]
fn the_failed_flush_of_an_orphan_is_told_to_who_detaches() {
    let mut world = serving();
    world.write(0);
    world.ask(prepare_detach(0, true));
    world.keep(false);
    world.answer(0);
    world.end_lease(0, false);
    world.answer(0);
    assert!(matches!(
        world.replies.last(),
        Some(Err(RequestError::TimedOut(_)))
    ));
    world.ask(prepare_detach(0, true));
    world.finish_write(0);
    world.end_lease(0, true);
    world.settle_all();
    assert!(matches!(
        world.replies.last(),
        Some(Err(RequestError::Failed(_)))
    ));
    world.ask(prepare_detach(0, true));
    world.settle_all();
    assert!(matches!(
        world.replies.last(),
        Some(Err(RequestError::Failed(_)))
    ));
    ends_well(world);
}

/// A soft removal whose last flush failed was answered Done, and nothing was told.
#[test]
fn the_failed_flush_of_a_removal_is_told() {
    let mut world = serving();
    world.ask(remove(0, false));
    world.keep(false);
    world.answer(0);
    world.end_lease(0, true);
    world.settle_all();
    let reply = world.replies.last();
    assert!(
        matches!(reply, Some(Err(RequestError::Failed(_)))),
        "{reply:?}"
    );
    ends_well(world);
}

/// Taken out of the file and put back while its clients were still being drained, the export vanished.
#[test]
fn a_definition_that_comes_back_while_it_leaves_stays() {
    let mut world = World::new(Broken::Nothing, &[(0, 0)], &[]);
    let file = vec![definition(0, 0, 0, Source::Config)];
    world.configure(file.clone());
    world.settle_all();
    world.write(0);
    world.configure(Vec::new());
    world.configure(file);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Serving));
    ends_well(world);
}

/// The definition that replaces another was not judged: two exports wrote to one volume.
#[test]
fn a_changed_definition_is_judged_beside_the_others() {
    let mut world = serving();
    world.configure(vec![definition(2, 2, 0, Source::Config)]);
    world.configure(vec![definition(2, 0, 0, Source::Config)]);
    world.settle_all();
    assert_eq!(
        world.middle.export(&name(2)).map(|view| view.volume_id),
        Some(volume(2).to_string())
    );
    ends_well(world);
}

#[test]
fn exports_that_exchange_their_volumes_do_not_collide() {
    let mut world = World::new(Broken::Nothing, &[(0, 0), (1, 1)], &[]);
    world.configure(vec![
        definition(0, 0, 0, Source::Config),
        definition(1, 1, 0, Source::Config),
    ]);
    world.settle_all();
    world.configure(vec![
        definition(0, 1, 0, Source::Config),
        definition(1, 0, 0, Source::Config),
    ]);
    world.settle_all();
    assert_eq!(
        world.middle.export(&name(0)).and_then(|view| view.disk),
        Some(DiskSeq(2))
    );
    assert_eq!(
        world.middle.export(&name(1)).and_then(|view| view.disk),
        Some(DiskSeq(1))
    );
    ends_well(world);
}

/// An export that the configuration took over stayed in the store, and was there again after it had left the file.
#[test]
fn an_adopted_export_leaves_the_store() {
    let mut world = serving();
    world.configure(vec![definition(0, 0, 0, Source::Config)]);
    world.settle_all();
    world.configure(Vec::new());
    world.settle_all();
    world.crash(false, 0);
    world.settle_all();
    assert_eq!(state(&world, 0), None);
    ends_well(world);
}

/// The second of two removals took away the export that had been added again in between.
#[test]
fn a_removal_that_is_being_stored_is_not_crossed_by_another() {
    let mut world = serving();
    world.ask(remove(0, false));
    world.ask(remove(0, false));
    assert!(matches!(
        world.replies.last(),
        Some(Err(RequestError::NotReady(_)))
    ));
    world.ask(add(0, 0));
    assert!(matches!(
        world.replies.last(),
        Some(Err(RequestError::NotReady(_)))
    ));
    world.settle_all();
    assert_eq!(world.replies.last(), Some(&Ok(Reply::Done)));
    ends_well(world);
}

/// Whoever added an export was told that it serves, when the configuration had taken its name over for another volume, and that one served.
#[test]
fn what_was_asked_for_is_not_answered_with_another_volume() {
    let mut world = World::new(Broken::Nothing, &[(0, 0), (1, 1)], &[]);
    world.settle_all();
    world.ask(Request::AddExport {
        definition: definition(0, 0, 0, Source::Dbus),
        wait: WITHIN,
    });
    world.configure(vec![definition(0, 0, 0, Source::Config)]);
    world.configure(vec![definition(0, 1, 0, Source::Config)]);
    world.settle_all();
    assert_eq!(state(&world, 0), Some(State::Serving));
    assert!(
        matches!(world.replies.last(), Some(Err(RequestError::NotReady(why))) if why.contains("changed")),
        "{:?}",
        world.replies
    );
    ends_well(world);
}

/// What a disk's export was to be, and whose, could not be stored, and who asked was told that it is: the configuration served the same volume by
/// then.
#[test]
fn a_mapping_that_could_not_be_stored_is_told_to_nobody() {
    let mut world = World::new(Broken::Nothing, &[(0, 0), (1, 1)], &[]);
    world.settle_all();
    world.ask(Request::EnsureVmExport(ensure(2, 1, 0, WITHIN)));
    world.settle_all();
    assert_eq!(state(&world, 2), Some(State::Serving));
    let moved = 64 | 1;
    world.ask(Request::EnsureVmExport(ensure(2, 0, moved, WITHIN)));
    world.configure(vec![definition(2, 0, 0, Source::Config)]);
    world.ask(Request::EnsureVmExport(ensure(2, 0, moved, WITHIN)));
    world.keep(true);
    world.settle_all();
    assert_eq!(state(&world, 2), Some(State::Serving));
    let told: Vec<_> = world.replies.iter().rev().take(2).collect();
    assert!(
        told.iter()
            .all(|reply| matches!(reply, Err(RequestError::Failed(_)))),
        "{told:?}"
    );
    ends_well(world);
}
