//! Disks that fail, hang, come in crowds, and a guest that has little of anything.

use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bed::Bed;
use crate::hold;
use crate::machine::{PC_SLOTS, Q35_PORTS, Shape};
use crate::stage::scenario;
use crate::support::Outcome;
use crate::support::client::Client;
use crate::support::stream::BLOCK;

scenario!(errors, disk_with_errors_ends_only_its_own_requests);
scenario!(hang, hanging_disk_keeps_no_one_else_waiting);
scenario!(flood, thirty_two_disks_at_once_each_find_their_export);
scenario!(scarce, few_descriptors_refuse_exports_with_a_reason);

/// The block whose first sector cannot be written.
const BAD: usize = 5;

fn disk_with_errors_ends_only_its_own_requests(shape: Shape) -> Outcome<()> {
    scenario("I/O errors (blkdebug)", shape, |bed| {
        let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
        bed.volumes[a].layer = Some(|mut blocks: Value| {
            let file = blocks["file"].take();
            let fault = json!({ "event": "none", "iotype": "write", "errno": 5, "sector": BAD * BLOCK / 512 });
            json!({ "driver": "raw", "file": { "driver": "blkdebug", "image": file, "inject-error": [fault] } })
        });
        bed.serve_all()?;
        let mut on_a = Client::open(&bed.endpoint(), "vol-a")?;
        let mut on_b = Client::open(&bed.endpoint(), "vol-b")?;
        hold!(
            bed.write_on(&mut on_a, a, 1)?.is_ok(),
            "a block that is good"
        );
        let said = bed.write_on(&mut on_a, a, BAD)?;
        // EIO
        hold!(said == Err(5), "the bad block: {said:?}");
        // Invariant 9: after a failed FUA write nothing is promised as durable any more.
        let said = bed.write_on(&mut on_a, a, 2)?;
        hold!(said == Err(5), "durability is latched: {said:?}");
        for block in 0..8 {
            hold!(
                bed.write_on(&mut on_b, b, block)?.is_ok(),
                "the other export"
            );
        }
        bed.compare(b)?;
        // A new generation begins with a clean slate: the disk is pulled and comes back whole.
        bed.volumes[a].layer = None;
        bed.unplug(a)?;
        bed.attach(a)?;
        bed.write(a, BAD)?;
        bed.compare(a)
    })
}

fn hanging_disk_keeps_no_one_else_waiting(shape: Shape) -> Outcome<()> {
    scenario("hang (throttle)", shape, |bed| {
        bed.machine.qmp.ask(
            "object-add",
            json!({ "qom-type": "throttle-group", "id": "slow" }),
        )?;
        let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
        bed.volumes[a].layer = Some(|mut blocks: Value| {
            let file = blocks["file"].take();
            json!({ "driver": "raw", "file": { "driver": "throttle", "throttle-group": "slow", "file": file } })
        });
        bed.serve_all()?;
        let mut on_b = Client::open(&bed.endpoint(), "vol-b")?;
        let before = worst(bed, &mut on_b, b)?;
        let on_a = Client::open(&bed.endpoint(), "vol-a")?;
        throttle(bed, 1000)?;
        // Requests that the disk answers after half a minute: QEMU lets what is queued wait also when the limit is gone.
        let mut waiting = on_a.socket.try_clone()?;
        for number in 0..3u64 {
            let sequence = bed.sequence();
            let block = 10 + usize::try_from(number)?;
            let offset = (block * BLOCK) as u64;
            let mut data = vec![0; BLOCK];
            crate::support::pattern::stamp(&mut data, "vol-a", offset, sequence);
            bed.volumes[a].ledger.sent(block, sequence);
            let mut message =
                crate::support::client::request(1, 1, 100 + number, offset, u32::try_from(BLOCK)?)
                    .to_vec();
            message.extend_from_slice(&data);
            std::io::Write::write_all(&mut waiting, &message)?;
        }
        let during = worst(bed, &mut on_b, b)?;
        let id = bed.volumes[a].id.clone();
        let ran = bed
            .machine
            .agent
            .attempt(&format!("nbdtrack prepare-detach {id} --timeout 3"))?;
        hold!(
            ran.code == 4,
            "PrepareDetach of a hanging disk: {} {}{}",
            ran.code,
            ran.stdout,
            ran.stderr
        );
        bed.row
            .notes
            .push(format!("PrepareDetach: {}", ran.stderr.trim()));
        let began = Instant::now();
        let ran = bed
            .machine
            .agent
            .attempt(&format!("nbdtrack prepare-detach {id} --hard --timeout 3"))?;
        bed.row
            .notes
            .push(format!("hard: exit {} {}", ran.code, ran.stderr.trim()));
        // The first request may have been carried out before the disk hung.
        let mut answered = 0;
        while let Ok((_, 0)) = crate::support::client::read_reply(&on_a.socket) {
            answered += 1;
        }
        hold!(answered < 3, "the disk did not hang");
        bed.row.notes.push(format!(
            "hard freed the client after {} ms",
            began.elapsed().as_millis()
        ));
        bed.refused(a)?;
        let after = worst(bed, &mut on_b, b)?;
        bed.row.notes.push(format!(
            "worst (write on the other, D-Bus): before {before:?}, during {during:?}, after {after:?}"
        ));
        let slack = Duration::from_secs(2);
        hold!(
            during[0] < before[0] + slack && during[1] < before[1] + slack,
            "others waited: {before:?} {during:?}"
        );
        throttle(bed, 0)?;
        bed.machine
            .agent
            .attempt(&format!("nbdtrack cancel-detach {id}"))?;
        bed.reach(a, "Serving")?;
        bed.write(a, 1)?;
        bed.compare(a)
    })
}

/// Bytes a second that the slow disk carries; 0 is no limit.
fn throttle(bed: &mut Bed, bytes: u64) -> Outcome<()> {
    let limits = json!({ "bps-total": bytes });
    bed.machine
        .qmp
        .ask(
            "qom-set",
            json!({ "path": "/objects/slow", "property": "limits", "value": limits }),
        )
        .map(drop)
}

/// The worst of some durable writes through an export, and of some calls over D-Bus.
fn worst(bed: &mut Bed, client: &mut Client, index: usize) -> Outcome<[Duration; 2]> {
    let mut worst = [Duration::ZERO; 2];
    for block in 0..10 {
        let began = Instant::now();
        let said = bed.write_on(client, index, block)?;
        hold!(said.is_ok(), "a write beside the hanging disk: {said:?}");
        worst[0] = worst[0].max(began.elapsed());
        let began = Instant::now();
        bed.machine.agent.run("nbdtrack --json status >/dev/null")?;
        worst[1] = worst[1].max(began.elapsed());
    }
    Ok(worst)
}

fn thirty_two_disks_at_once_each_find_their_export(shape: Shape) -> Outcome<()> {
    scenario("32 disks at once", shape, |bed| {
        let virtio = match shape {
            Shape::Pc => PC_SLOTS.min(16),
            Shape::Q35 => Q35_PORTS,
        };
        let mut all = Vec::new();
        for number in 0..32 {
            let name = format!("vol-{number}");
            // The others on SCSI: there are not that many slots.
            all.push(if number < virtio {
                bed.add(&name)?
            } else {
                bed.add_scsi(&name)?
            });
        }
        bed.configure(&all)?;
        bed.start_daemon()?;
        let mark = bed.machine.bus.mark();
        let began = Instant::now();
        for index in &all {
            bed.plug(*index)?;
        }
        let asked = began.elapsed();
        for index in &all {
            bed.wait_state(mark, *index, "Serving")?;
        }
        bed.row.count = 32;
        bed.row.notes.push(format!(
            "{virtio} on virtio-blk; QMP took them in {:.1} s, all served after {:.1} s",
            asked.as_secs_f32(),
            began.elapsed().as_secs_f32()
        ));
        for index in &all {
            bed.write(*index, *index % 16)?;
        }
        bed.unplug_all(&all)?;
        for index in all.iter().rev() {
            bed.plug(*index)?;
        }
        for index in all {
            bed.reach(index, "Serving")?;
            bed.write(index, 20 + index % 16)?;
        }
        Ok(())
    })
}

fn few_descriptors_refuse_exports_with_a_reason(shape: Shape) -> Outcome<()> {
    scenario("few descriptors, little memory", shape, |bed| {
        for number in 0..10 {
            bed.add_scsi(&format!("vol-{number}"))?;
        }
        let all: Vec<usize> = (0..10).collect();
        bed.configure(&all)?;
        for index in &all {
            bed.plug_and_settle(*index)?;
        }
        bed.machine.agent.put(
            "/etc/systemd/system/nbdtrack.service.d/few.conf",
            "[Service]\nLimitNOFILE=40\nMemoryMax=48M\n",
        )?;
        bed.machine.agent.run("systemctl daemon-reload")?;
        // The guest's memory too: a file in memory takes most of what is free.
        bed.machine.agent.run(
            "mkdir -p /run/fill && mount -t tmpfs -o size=400M fill /run/fill; free=$(awk '/MemAvailable/ {print int($2/1024)}' /proc/meminfo); \
             dd if=/dev/zero of=/run/fill/x bs=1M count=$((free - 60)) 2>/dev/null; true",
        )?;
        bed.start_daemon()?;
        let (mut served, mut refused) = (0, 0);
        let mut clients = Vec::new();
        for index in &all {
            match Client::open(&bed.endpoint(), &bed.volumes[*index].name) {
                Ok(mut client) => {
                    served += 1;
                    let said = bed.write_on(&mut client, *index, 1)?;
                    hold!(said.is_ok(), "a served export takes writes: {said:?}");
                    clients.push(client);
                }
                Err(_) => refused += 1,
            }
        }
        let exports = bed.machine.agent.attempt("nbdtrack exports")?;
        bed.row.notes.push(format!(
            "served {served}, refused {refused}, exit of the CLI {}",
            exports.code
        ));
        drop(clients);
        // What was scarce is there again.
        bed.machine.agent.run(
            "rm -rf /run/fill/x /etc/systemd/system/nbdtrack.service.d && systemctl daemon-reload && systemctl restart nbdtrack",
        )?;
        for index in all {
            bed.reach(index, "Serving")?;
            bed.write(index, 2)?;
        }
        Ok(())
    })
}
