//! Disks that move about under their clients.

use std::time::Instant;

use crate::bed::Bed;
use crate::fences::Clients;
use crate::machine::Shape;
use crate::stage::scenario;
use support::Outcome;
use support::client::Client;
use support::hold;
use support::stream::{Pace, Stream};

scenario!(rotation, five_rotated_disks_keep_their_exports);
scenario!(streams, streaming_clients_lose_no_flushed_byte_in_a_swap);
scenario!(hundred, fast_swaps_by_all_methods_move_no_byte);
scenario!(alone, disk_that_comes_back_under_the_others_name_is_itself);
scenario!(
    taken,
    another_disk_takes_the_name_while_an_old_client_is_connected
);
scenario!(held, both_back_in_the_same_order_while_a_client_held_one);

/// What a client does that is there while disks move: not more than an emulated guest carries beside its other work.
const STREAM: Pace = Pace {
    depth: 4,
    rate: 200,
    region: 2 << 20,
};

/// As [`STREAM`], for one that has to go on while the guest's processor has disks to find.
const BYSTANDER: Pace = Pace {
    depth: 4,
    rate: 50,
    region: 2 << 20,
};
/// As [`STREAM`], for a client that is there for one swap.
pub const SHORT: Pace = Pace {
    depth: 4,
    rate: 400,
    region: 512 << 10,
};

fn five_rotated_disks_keep_their_exports(shape: Shape) -> Outcome<()> {
    scenario("rotation of five", shape, rotate)
}

pub fn rotate(bed: &mut Bed) -> Outcome<()> {
    for name in ["vol-a", "vol-b", "vol-c", "vol-d", "vol-e"] {
        bed.add(name)?;
    }
    bed.serve_all()?;
    let before: Vec<_> = (0..5).map(|i| bed.node(i)).collect::<Outcome<_>>()?;
    for index in 0..5 {
        bed.write(index, index)?;
        bed.unplug(index)?;
    }
    for index in [1, 2, 3, 4, 0] {
        bed.attach(index)?;
    }
    for index in 0..5 {
        let now = bed.node(index)?;
        hold!(
            now == before[(index + 4) % 5],
            "volume {index} is at {now}; the nodes were {before:?}"
        );
        bed.compare(index)?;
        bed.fill(index)?;
    }
    Ok(())
}

fn streaming_clients_lose_no_flushed_byte_in_a_swap(shape: Shape) -> Outcome<()> {
    scenario("swap under streams", shape, swap_under_streams)
}

pub fn swap_under_streams(bed: &mut Bed) -> Outcome<()> {
    // Two by SCSI: their device_del takes the disk away without asking the guest.
    let (a, b) = (bed.add_scsi("vol-a")?, bed.add_scsi("vol-b")?);
    let c = bed.add("vol-c")?;
    bed.serve_all()?;
    bed.trace_fences()?;
    let endpoint = bed.endpoint();
    let third = Stream::start(&endpoint, "vol-c", "vol-c", STREAM, 1)?;
    for round in 0..3u64 {
        let first = 1000 * (round + 1);
        let on_a = Stream::start(&endpoint, "vol-a", "vol-a", STREAM, first)?;
        let on_b = Stream::start(&endpoint, "vol-b", "vol-b", STREAM, first)?;
        on_a.wait_for(150)?;
        on_b.wait_for(100)?;
        bed.unplug(a)?;
        bed.unplug(b)?;
        for (index, stream) in [(a, on_a), (b, on_b)] {
            let report = stream.finish()?;
            hold!(report.broken.is_some(), "the removal ended the session");
            bed.account(index, &report)?;
        }
        bed.take_fences()?;
        let order = if round % 2 == 0 { [b, a] } else { [a, b] };
        for index in order {
            bed.attach(index)?;
        }
        bed.compare(a)?;
        bed.compare(b)?;
        bed.row.count += 1;
    }
    // Streams write all that they cover: what an earlier round put on the wrong disk, the next one may have put right.
    bed.write(a, 7)?;
    bed.write(b, 7)?;
    let report = third.finish()?;
    hold!(report.broken.is_none(), "the third: {:?}", report.broken);
    bed.row.notes.push(format!(
        "third's longest stall {} ms over {} writes",
        report.longest_stall.as_millis(),
        report.writes
    ));
    bed.account(c, &report)
}

/// A small generator (Knuth's MMIX constants): the seed that is printed gives the same run again.
struct Dice(u64);

impl Dice {
    fn below(&mut self, n: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % n
    }
}

fn fast_swaps_by_all_methods_move_no_byte(shape: Shape) -> Outcome<()> {
    let number = |name: &str, other: u64| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(other)
    };
    let swaps = number("NBDTRACK_GUEST_SWAPS", 100);
    let clock = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH)?;
    let seed = number("NBDTRACK_GUEST_SEED", clock.as_secs());
    scenario("fast swaps", shape, |bed| swap_fast(bed, swaps, seed))
}

/// So many swaps of a pair by a seed's choice, two clients on it each time, while a bystander streams on a fifth volume.
pub fn swap_fast(bed: &mut Bed, swaps: u64, seed: u64) -> Outcome<()> {
    bed.row.notes.push(format!("seed {seed}"));
    let mut dice = Dice(seed);
    // A pair that the guest is asked for, and a pair that goes by surprise.
    let pairs = [
        [bed.add("vol-a")?, bed.add("vol-b")?],
        [bed.add_scsi("vol-c")?, bed.add_scsi("vol-d")?],
    ];
    let bystander = bed.add("vol-e")?;
    bed.serve_all()?;
    bed.trace_fences()?;
    let third = Stream::start(&bed.endpoint(), "vol-e", "vol-e", BYSTANDER, 1)?;
    let mut told = [0u32; 3];
    let mut streamed = 0;
    let began = Instant::now();
    for round in 1..=swaps {
        let which = dice.below(2);
        let mut pair = pairs[usize::try_from(which)?];
        if dice.below(2) == 0 {
            pair.reverse();
        }
        // Two of three are in the middle of their writes when the disk goes, the others have written and wait.
        let streaming = dice.below(3) > 0;
        let (mut streams, mut clients) = (Vec::new(), Vec::new());
        for index in pair {
            let block = usize::try_from(dice.below(256))?;
            let name = bed.volumes[index].name.clone();
            if streaming {
                let first = bed.sequence();
                match Stream::start(&bed.endpoint(), &name, &name, SHORT, first) {
                    Ok(stream) => streams.push((index, stream)),
                    Err(_) if !bed.ours() => bed.told.refused += 1,
                    Err(e) => return Err(e),
                }
            } else if bed.ours() {
                let mut client = Client::open(&bed.endpoint(), &name)?;
                let said = bed.write_on(&mut client, index, block)?;
                hold!(said.is_ok(), "round {round}: {said:?}");
                clients.push((index, client));
            } else {
                // A client that stays would hold the name back, and with it the swap.
                bed.write(index, block)?;
            }
        }
        for (_, stream) in &streams {
            stream.wait_for(20)?;
            streamed += 1;
        }
        let prepared = [dice.below(3) == 0, dice.below(3) == 0];
        bed.measure(match prepared {
            [false, false] if streaming => Clients::Stream,
            [false, false] => Clients::Wait,
            _ => Clients::Gone,
        })?;
        for (index, prepared) in pair.into_iter().zip(prepared) {
            if prepared {
                bed.prepare_detach(index)?;
                told[2] += 1;
            } else {
                told[usize::from(which == 1)] += 1;
            }
        }
        // Both requests are out before the first is carried out.
        bed.unplug_all(&pair)?;
        for (index, stream) in streams {
            let report = stream.finish()?;
            hold!(report.broken.is_some(), "round {round}: a removed disk's");
            bed.account(index, &report)?;
        }
        if dice.below(2) == 0 {
            pair.reverse();
        }
        bed.attach_all(&pair)?;
        // An old session has ended; its late write reaches nothing.
        for (index, mut client) in clients {
            if let Ok(Ok(())) = bed.write_on(&mut client, index, 0) {
                support::trouble!("round {round}: a write of an old session was acknowledged");
            }
        }
        if round % 10 == 0 {
            bed.take_fences()?;
        }
        bed.row.count = round;
    }
    let each = began.elapsed().as_secs_f32() / swaps as f32;
    let report = third.finish()?;
    let broken = &report.broken;
    hold!(broken.is_none(), "the bystander: {broken:?}");
    bed.row.notes.push(format!(
        "{each:.1} s a swap, {streamed} streams cut; pulled by virtio device_del {}, by SCSI surprise {}, after PrepareDetach {}; \
         bystander's longest stall {} ms over {} writes",
        told[0],
        told[1],
        told[2],
        report.longest_stall.as_millis(),
        report.writes
    ));
    bed.account(bystander, &report)?;
    for index in pairs.into_iter().flatten() {
        bed.compare(index)?;
    }
    Ok(())
}

fn disk_that_comes_back_under_the_others_name_is_itself(shape: Shape) -> Outcome<()> {
    scenario("back alone", shape, back_alone)
}

pub fn back_alone(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
    bed.serve_all()?;
    let name = bed.node(a)?;
    bed.unplug(a)?;
    bed.unplug(b)?;
    bed.reach(a, "Absent")?;
    bed.attach(b)?;
    hold!(bed.node(b)? == name, "vol-b has vol-a's name");
    bed.come_for_absent(a, 7)?;
    bed.write(b, 7)?;
    bed.compare(b)
}

fn another_disk_takes_the_name_while_an_old_client_is_connected(shape: Shape) -> Outcome<()> {
    for surprise in [false, true] {
        let method = if surprise { "SCSI surprise" } else { "virtio" };
        let title = format!("name taken, {method}");
        scenario(&title, shape, |bed| take_name(bed, surprise))?;
    }
    Ok(())
}

pub fn take_name(bed: &mut Bed, surprise: bool) -> Outcome<()> {
    let add = if surprise { Bed::add_scsi } else { Bed::add };
    let (a, c) = (add(bed, "vol-a")?, add(bed, "vol-c")?);
    bed.configure(&[a, c])?;
    bed.plug_and_settle(a)?;
    bed.start_daemon()?;
    bed.reach(a, "Serving")?;
    let name = bed.node(a)?;
    let mut client = Client::open(&bed.endpoint(), "vol-a")?;
    hold!(bed.write_on(&mut client, a, 1)?.is_ok(), "a first write");
    bed.unplug(a)?;
    bed.reach(a, "Absent")?;
    bed.attach(c)?;
    // The stock server's child holds the old disk open for its client, and so its name.
    hold!(
        (bed.node(c)? == name) == bed.ours(),
        "vol-c has vol-a's name where the old descriptor was closed"
    );
    // Refused by an answer or by the end of the connection; the judge sees where it went.
    if let Ok(Ok(())) = bed.write_on(&mut client, a, 2) {
        support::trouble!("a write of the old session was acknowledged");
    }
    bed.write(c, 2)?;
    bed.come_for_absent(a, 3)?;
    bed.compare(c)
}

fn both_back_in_the_same_order_while_a_client_held_one(shape: Shape) -> Outcome<()> {
    scenario("back in the same order", shape, back_in_order)
}

pub fn back_in_order(bed: &mut Bed) -> Outcome<()> {
    let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
    bed.serve_all()?;
    let before = [bed.node(a)?, bed.node(b)?];
    let mut client = Client::open(&bed.endpoint(), "vol-a")?;
    hold!(bed.write_on(&mut client, a, 1)?.is_ok(), "a first write");
    bed.unplug(a)?;
    bed.unplug(b)?;
    bed.attach(a)?;
    bed.attach(b)?;
    // The stock server's child holds vol-a's old name back.
    hold!(
        ([bed.node(a)?, bed.node(b)?] == before) == bed.ours(),
        "the names are the old ones"
    );
    if let Ok(Ok(())) = bed.write_on(&mut client, a, 2) {
        support::trouble!("a write of the old session was acknowledged");
    }
    bed.write(a, 3)?;
    bed.write(b, 3)?;
    bed.compare(a)?;
    bed.compare(b)
}
