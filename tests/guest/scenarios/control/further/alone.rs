//! Controls with moves of their own: where the daemon's scenario asks for what only the daemon has.

use std::io::Read;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::bed::Bed;
use crate::machine::{Bus, Shape};
use crate::scenarios::trouble;
use crate::stage::{Verdict, control};
use crate::stock::SERVERS;
use support::Outcome;
use support::client::{Client, Go, knock};
use support::hold;

scenario!(twins, stock_server_by_path_knows_nothing_of_a_twin);
scenario!(twins_by_link, stock_server_by_link_writes_to_the_twin);
scenario!(serials, stock_server_by_link_mixes_up_cut_serials);
scenario!(errors, stock_server_loses_bytes_that_it_said_are_durable);
scenario!(hang, stock_server_waits_only_for_the_hanging_disk);
scenario!(scarce, stock_server_without_descriptors_serves_no_one);

/// The twin gets the next name; what the first one's path serves is right, also when it is gone and the twin is not.
fn stock_server_by_path_knows_nothing_of_a_twin(shape: Shape) -> Outcome<()> {
    control("twins", shape, Verdict::NoWrongByte, |bed| {
        let (a, _) = with_twin(bed, None)?;
        bed.write(a, 2)?;
        bed.unplug(a)?;
        match knock(&bed.endpoint(), "vol-a")? {
            Go::Refused { .. } => Ok(()),
            Go::Agreed { .. } => support::trouble!("the path was there without a disk"),
        }
    })
}

/// udev points the link to the disk that came last.
fn stock_server_by_link_writes_to_the_twin(shape: Shape) -> Outcome<()> {
    control("twins, by link", shape, Verdict::WrongBytes, |bed| {
        let (a, _) = with_twin(bed, Some("/dev/disk/by-id/virtio-"))?;
        bed.write(a, 2)
    })
}

/// Serves a volume, by its path or by a link that ends with its serial, and plugs another one that says the same of itself.
fn with_twin(bed: &mut Bed, link: Option<&str>) -> Outcome<(usize, usize)> {
    let a = bed.add("vol-a")?;
    if let Some(link) = link {
        let serial = bed.volumes[a].properties["serial"].clone();
        bed.export_path(a, &format!("{link}{}", serial.as_str().unwrap_or_default()));
    }
    bed.serve_all()?;
    bed.write(a, 1)?;
    let twin = bed.add("twin")?;
    bed.volumes[twin].properties = bed.volumes[a].properties.clone();
    bed.attach(twin)?;
    Ok((a, twin))
}

/// Two serials that are one where the disk cuts them: both exports have the same link.
fn stock_server_by_link_mixes_up_cut_serials(shape: Shape) -> Outcome<()> {
    control("serials, by link", shape, Verdict::WrongBytes, |bed| {
        let same = "uvwxyz----0123456789";
        let mut both = Vec::new();
        for number in [1, 2] {
            let serial = format!("{same}-{number}");
            let index = bed.add_as(
                &format!("vol-same-{number}"),
                Bus::VirtioBlk,
                &format!("serial:{serial}"),
                json!({ "serial": serial }),
            )?;
            bed.export_path(index, &format!("/dev/disk/by-id/virtio-{same}"));
            both.push(index);
        }
        bed.serve_all()?;
        for index in both {
            bed.write(index, 1 + index)?;
        }
        Ok(())
    })
}

/// The kernel tells of a failed write-back once; the flush after it succeeds, and the server says so.
fn stock_server_loses_bytes_that_it_said_are_durable(shape: Shape) -> Outcome<()> {
    let title = "I/O errors (blkdebug)";
    control(title, shape, Verdict::LostBytes, |bed| {
        let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
        bed.volumes[a].layer = Some(trouble::bad_block);
        bed.serve_all()?;
        let mut on_a = Client::open(&bed.endpoint(), "vol-a")?;
        let fua = bed.write_on(&mut on_a, a, trouble::BAD)?;
        let flushes = [on_a.flush()?, on_a.flush()?];
        let said = format!("FUA write {fua:?}, flushes {flushes:?}");
        bed.row.notes.push(said);
        if flushes[1].is_ok() {
            let sequence = bed.sequence() - 1;
            bed.volumes[a].ledger.durable(trouble::BAD, sequence);
        }
        on_a.leave()?;
        bed.write(b, 1)
    })
}

/// A child for each connection: the other export goes on.
fn stock_server_waits_only_for_the_hanging_disk(shape: Shape) -> Outcome<()> {
    control("hang (throttle)", shape, Verdict::NoWrongByte, |bed| {
        bed.machine.qmp.ask(
            "object-add",
            json!({ "qom-type": "throttle-group", "id": "slow" }),
        )?;
        let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
        bed.volumes[a].layer = Some(trouble::slow);
        bed.serve_all()?;
        bed.write(b, 1)?;
        let on_a = Client::open(&bed.endpoint(), "vol-a")?;
        trouble::throttle(bed, 1000)?;
        trouble::send_writes(bed, &on_a, a, 2)?;
        let path = bed.node(a)?;
        let held = format!("ls -l /proc/[0-9]*/fd 2>/dev/null | grep -q -- '-> {path}$'");
        bed.guest_until("the child of the hanging disk", &held)?;
        let mut on_b = Client::open(&bed.endpoint(), "vol-b")?;
        let began = Instant::now();
        let said = bed.write_on(&mut on_b, b, 2)?;
        let other = began.elapsed();
        hold!(said.is_ok(), "the other export: {said:?}");
        on_b.leave()?;
        bed.machine.agent.run(&format!("kill -9 $({SERVERS})"))?;
        let still = bed.machine.agent.attempt(&held)?.code == 0;
        bed.row.notes.push(format!(
            "a write on the other export took {} ms; held after kill -9: {still}",
            other.as_millis()
        ));
        drop(on_a);
        trouble::throttle(bed, 0)?;
        bed.closed_stock(a)
    })
}

/// Without a descriptor for the next connection it greets no one, and says nothing; with one it serves on.
fn stock_server_without_descriptors_serves_no_one(shape: Shape) -> Outcome<()> {
    let title = "few descriptors";
    control(title, shape, Verdict::NoWrongByte, |bed| {
        let a = bed.add_scsi("vol-a")?;
        bed.serve_all()?;
        bed.write(a, 1)?;
        let limit = |bed: &Bed, descriptors: u32| {
            let command = format!("prlimit --pid $({SERVERS}) --nofile={descriptors}:1024");
            bed.machine.agent.run(&command)
        };
        limit(bed, 1)?;
        let mut socket = bed.endpoint().connect()?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        let mut greeting = [0; 8];
        let said = socket.read_exact(&mut greeting);
        hold!(said.is_err(), "a greeting without a descriptor");
        drop(socket);
        let began = Instant::now();
        limit(bed, 1024)?;
        bed.write(a, 2)?;
        bed.row.notes.push(format!(
            "no greeting within 3 s, no reason; served again {} ms after there was room",
            began.elapsed().as_millis()
        ));
        Ok(())
    })
}
