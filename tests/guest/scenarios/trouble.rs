//! Disks that fail, hang, come in crowds, and a guest that has little of anything.

use std::io::Write;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::bed::{Bed, STEP};
use crate::machine::{PC_SLOTS, Q35_PORTS, Shape};
use crate::stage::{part, scenario};
use support::client::{CMD_WRITE, Client, FLAG_FUA, request};
use support::hold;
use support::pattern;
use support::stream::BLOCK;
use support::{Outcome, until};

scenario!(errors, disk_with_errors_ends_only_its_own_requests);
scenario!(hang, hanging_disk_keeps_no_one_else_waiting);
scenario!(hung, guest_that_hangs_leaves_what_can_be_had);
scenario!(flood, thirty_two_disks_at_once_each_find_their_export);
scenario!(scarce, few_descriptors_refuse_exports_with_a_reason);

/// The block whose first sector cannot be written.
pub const BAD: usize = 5;

/// A disk on which that sector cannot be written.
pub fn bad_block(mut blocks: Value) -> Value {
    let file = blocks["file"].take();
    let fault =
        json!({ "event": "none", "iotype": "write", "errno": 5, "sector": BAD * BLOCK / 512 });
    json!({ "driver": "raw", "file": { "driver": "blkdebug", "image": file, "inject-error": [fault] } })
}

/// A disk that [`throttle`] makes hang.
pub fn slow(mut blocks: Value) -> Value {
    let file = blocks["file"].take();
    json!({ "driver": "raw", "file": { "driver": "throttle", "throttle-group": "slow", "file": file } })
}

/// Sends so many durable writes, and does not wait for their replies. No block touches another: the guest's kernel would make one request
/// of them, which a throttled disk keeps for as long as all of them together.
pub fn send_writes(bed: &mut Bed, client: &Client, index: usize, count: u64) -> Outcome<()> {
    let mut socket = client.socket.try_clone()?;
    for number in 0..count {
        let sequence = bed.sequence();
        let block = 10 + 2 * usize::try_from(number)?;
        let offset = (block * BLOCK) as u64;
        let mut data = vec![0; BLOCK];
        let volume = &mut bed.volumes[index];
        pattern::stamp(&mut data, &volume.name, offset, sequence);
        volume.ledger.sent(block, sequence);
        let bytes = u32::try_from(BLOCK)?;
        let mut message = request(CMD_WRITE, FLAG_FUA, 100 + number, offset, bytes).to_vec();
        message.extend_from_slice(&data);
        socket.write_all(&message)?;
    }
    Ok(())
}

fn disk_with_errors_ends_only_its_own_requests(shape: Shape) -> Outcome<()> {
    scenario("I/O errors (blkdebug)", shape, |bed| {
        let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
        bed.volumes[a].layer = Some(bad_block);
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

/// Requests to the disk that hangs.
const WRITES: u64 = 8;

fn hanging_disk_keeps_no_one_else_waiting(shape: Shape) -> Outcome<()> {
    scenario("hang (throttle)", shape, |bed| {
        bed.machine.qmp.ask(
            "object-add",
            json!({ "qom-type": "throttle-group", "id": "slow" }),
        )?;
        let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
        bed.volumes[a].layer = Some(slow);
        bed.serve_all()?;
        let mut on_b = Client::open(&bed.endpoint(), "vol-b")?;
        let before = latencies(bed, &mut on_b, b)?;
        let on_a = Client::open(&bed.endpoint(), "vol-a")?;
        throttle(bed, 1000)?;
        // A quarter of a minute each, so that the last outlives all that is done here on the slowest host; few enough, for QEMU lets
        // the first that is queued wait also when the limit is gone.
        send_writes(bed, &on_a, a, WRITES)?;
        // Thread: the hanging export's client; ends with its session.
        let client = std::thread::spawn(move || {
            // The first request may have been carried out before the disk hung.
            let mut answered = 0;
            while let Ok((_, 0)) = support::client::read_reply(&on_a.socket) {
                answered += 1;
            }
            (Instant::now(), answered)
        });
        let during = latencies(bed, &mut on_b, b)?;
        let id = bed.volumes[a].id.clone();
        let mark = bed.machine.bus.mark();
        let soft = bed
            .machine
            .agent
            .begin(&format!("nbdtrack prepare-detach {id} --timeout 10"), &[])?;
        bed.wait_state(mark, a, "Draining")?;
        hold!(
            !client.is_finished(),
            "a drain has cut its client off before its time"
        );
        let began = Instant::now();
        let hard = bed.machine.agent.begin(
            &format!("nbdtrack prepare-detach {id} --hard --timeout 3"),
            &[],
        )?;
        let freed = until(STEP, "the client of the hanging disk to be freed", || {
            Ok(client.is_finished().then(|| began.elapsed()))
        })?;
        let (at, answered) = client
            .join()
            .map_err(|_| support::Trouble("the client's thread broke".to_owned()))?;
        hold!(answered < WRITES, "the disk did not hang");
        let ran = bed.machine.agent.finish(hard, "a hard detach", STEP)?;
        // The caller waits its three seconds for the disk; the client does not.
        let told = began.elapsed();
        hold!(
            ran.code == 4 && freed + Duration::from_secs(1) < told,
            "hard: exit {}, the client was freed after {freed:?}, the caller told after {told:?}: {}",
            ran.code,
            ran.stderr
        );
        let said_hard = ran.stderr;
        let ran = bed.machine.agent.finish(soft, "a soft detach", STEP)?;
        hold!(
            ran.code == 4 && ran.stderr.contains("in flight"),
            "PrepareDetach of a hanging disk: {} {}{}",
            ran.code,
            ran.stdout,
            ran.stderr
        );
        bed.row
            .notes
            .push(format!("PrepareDetach: {}", ran.stderr.trim()));
        bed.row.notes.push(format!(
            "hard freed the client {} ms after its command was started in the guest, and answered after {} ms: {}",
            at.saturating_duration_since(began).as_millis(),
            told.as_millis(),
            said_hard.trim()
        ));
        let said = bed.refused(a)?;
        bed.row.notes.push(format!("the orphan blocks it: {said}"));
        let after = latencies(bed, &mut on_b, b)?;
        let shown: Vec<String> = [&before, &during, &after].map(Latencies::shown).into();
        bed.row.notes.push(format!(
            "ms median/p90/worst before, during, after: {}",
            shown.join(", ")
        ));
        // A control loop or a worker that waits for the disk makes most of these wait for it, for seconds. One in ten may meet
        // what else an emulated processor does.
        for (later, when) in [(&during, "while it hangs"), (&after, "behind its orphan")] {
            for (what, was, is) in [
                ("a write on the other export", &before.writes, &later.writes),
                ("a D-Bus answer", &before.calls, &later.calls),
            ] {
                let (was, is) = (*part(was, 90), *part(is, 90));
                hold!(
                    is <= was + Duration::from_millis(100),
                    "{what} took {is:?} {when}, {was:?} before"
                );
            }
        }
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
pub fn throttle(bed: &mut Bed, bytes: u64) -> Outcome<()> {
    let limits = json!({ "bps-total": bytes });
    bed.machine
        .qmp
        .ask(
            "qom-set",
            json!({ "path": "/objects/slow", "property": "limits", "value": limits }),
        )
        .map(drop)
}

/// Sorted times of durable writes through an export, and of calls over D-Bus.
struct Latencies {
    writes: Vec<Duration>,
    calls: Vec<Duration>,
}

impl Latencies {
    fn shown(&self) -> String {
        let ms = |d: &Duration| format!("{:.1}", d.as_secs_f64() * 1e3);
        let of = |all: &[Duration]| {
            let [a, b, c] = [50, 90, 100].map(|percent| ms(part(all, percent)));
            format!("{a}/{b}/{c}")
        };
        format!("writes {} calls {}", of(&self.writes), of(&self.calls))
    }
}

fn latencies(bed: &mut Bed, client: &mut Client, index: usize) -> Outcome<Latencies> {
    let mut writes = Vec::new();
    for block in 0..40 {
        let began = Instant::now();
        let said = bed.write_on(client, index, block)?;
        hold!(said.is_ok(), "a write beside the hanging disk: {said:?}");
        writes.push(began.elapsed());
    }
    writes.sort_unstable();
    Ok(Latencies {
        writes,
        calls: calls(bed)?,
    })
}

/// How long the daemon took for each of some calls, by the bus's own record of call and reply: what a command needs to start
/// in an emulated guest is not in it.
fn calls(bed: &Bed) -> Outcome<Vec<Duration>> {
    let said = bed.machine.agent.run(
        "busctl monitor --json=short --match=\"destination='org.nbdtrack1'\" --match=\"sender='org.nbdtrack1'\" >/run/calls 2>/dev/null & m=$!; \
         until [ -n \"$(busctl call org.nbdtrack1 /org/nbdtrack1 org.nbdtrack1.Manager GetStats 'a{sv}' 0 >/dev/null; cat /run/calls)\" ]; do :; done; \
         for i in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do \
           busctl call org.nbdtrack1 /org/nbdtrack1 org.nbdtrack1.Manager GetStats 'a{sv}' 0 >/dev/null; done; \
         kill $m; wait $m; cat /run/calls",
    )?;
    let mut asked = std::collections::BTreeMap::new();
    let mut took = Vec::new();
    for message in said
        .lines()
        .filter_map(|l| serde_json::from_str::<Value>(l).ok())
    {
        let at = message["timestamp-realtime"].as_u64();
        let (Some(at), Some(cookie)) = (at, message["cookie"].as_u64()) else {
            continue;
        };
        if message["type"] == "method_call" && message["member"] == "GetStats" {
            asked.insert((message["sender"].to_string(), cookie), at);
        } else if let Some(to) = message["reply_cookie"].as_u64()
            && let Some(began) = asked.remove(&(message["destination"].to_string(), to))
        {
            took.push(Duration::from_micros(at.saturating_sub(began)));
        }
    }
    hold!(
        took.len() >= 20,
        "{} calls with a reply in {said}",
        took.len()
    );
    took.sort_unstable();
    Ok(took)
}

/// A failed scenario of a guest that answers no more once left an empty folder, and no one knew whether it was the guest or the test.
fn guest_that_hangs_leaves_what_can_be_had(shape: Shape) -> Outcome<()> {
    scenario("guest hangs", shape, |bed| {
        let a = bed.add("vol-a")?;
        bed.serve_all()?;
        bed.write(a, 1)?;
        let logs = tempfile::tempdir()?;
        bed.keep_journal(logs.path())?;
        let journal = std::fs::read_to_string(logs.path().join("journal.log"))?;
        hold!(journal.contains("nbdtrack"), "the journal: {journal}");
        // As good as hung: it does not answer.
        bed.machine.stop()?;
        bed.keep_journal(logs.path())?;
        bed.machine.resume_processors()?;
        let said = std::fs::read_to_string(logs.path().join("hung.log"))?;
        for word in ["serial.log", "\"status\":\"paused\"", "RIP=", "blocks1"] {
            hold!(said.contains(word), "no {word} in: {said}");
        }
        Ok(())
    })
}

fn thirty_two_disks_at_once_each_find_their_export(shape: Shape) -> Outcome<()> {
    scenario("32 disks at once", shape, plug_32)
}

pub fn plug_32(bed: &mut Bed) -> Outcome<()> {
    let virtio = match bed.machine.shape {
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
    if bed.ours() {
        bed.start_daemon()?;
    }
    let began = Instant::now();
    bed.attach_all(&all)?;
    bed.row.count = 32;
    bed.row.notes.push(format!(
        "{virtio} on virtio-blk, all there after {:.1} s",
        began.elapsed().as_secs_f32()
    ));
    if !bed.ours() {
        // Only now there are paths.
        bed.start_daemon()?;
    }
    for index in &all {
        bed.write(*index, *index % 16)?;
    }
    // All places are used again at once, so each disk that asks its guest is let go before the next one is asked: ACPI tells
    // the guest of every slot that wants to go at each of its interrupts, and a slot that was told of twice is ejected twice,
    // the second time with the next disk in it.
    let (asking, surprised) = all.split_at(virtio);
    bed.unplug_all(surprised)?;
    for index in asking {
        bed.unplug(*index)?;
    }
    all.reverse();
    bed.attach_all(&all)?;
    for index in all {
        bed.write(index, 20 + index % 16)?;
    }
    Ok(())
}

fn few_descriptors_refuse_exports_with_a_reason(shape: Shape) -> Outcome<()> {
    scenario("few descriptors, little memory", shape, |bed| {
        for number in 0..10 {
            bed.add(&format!("vol-{number}"))?;
        }
        let all: Vec<usize> = (0..10).collect();
        bed.configure(&all)?;
        bed.plug_all_and_settle(&all)?;
        bed.start_daemon()?;
        bed.reach_all(&all, "Serving")?;
        // What it holds with all ten open, less a few: so some cannot be opened, wherever the first ones are.
        let count = "ls /proc/$(systemctl show -P MainPID nbdtrack)/fd | wc -l";
        let held: u64 = bed.machine.agent.run(count)?.trim().parse()?;
        let limit = held - 4;
        bed.machine.agent.run("systemctl stop nbdtrack")?;
        bed.machine.agent.put(
            "/etc/systemd/system/nbdtrack.service.d/few.conf",
            format!("[Service]\nLimitNOFILE={limit}\nMemoryMax=32M\nMemorySwapMax=0\n"),
        )?;
        bed.machine.agent.run("systemctl daemon-reload")?;
        bed.start_daemon()?;
        let pid = bed
            .machine
            .agent
            .run("systemctl show -P MainPID nbdtrack")?;
        // Before a disk's identity was read its export is absent for another reason, which is not the last word.
        let settled = |export: &Value| {
            export["state"] == "Serving"
                || export["reason"]
                    .as_str()
                    .is_some_and(|reason| reason.contains("open files"))
        };
        let (mut served, mut refused) = (Vec::new(), Vec::new());
        for index in &all {
            let export = until(
                STEP,
                "an export to be served, or refused for want of descriptors",
                || {
                    let export = bed.export(*index)?;
                    Ok(settled(&export).then_some(export))
                },
            )?;
            if export["state"] == "Serving" {
                served.push(*index);
            } else {
                let reason = export["reason"].as_str().unwrap_or_default().to_owned();
                refused.push(reason);
            }
        }
        hold!(
            !served.is_empty() && !refused.is_empty(),
            "some are served and some are refused: {served:?} {refused:?}"
        );
        bed.row.notes.push(format!(
            "{held} descriptors needed, {limit} allowed: served {}, refused {}: {}",
            served.len(),
            refused.len(),
            refused[0]
        ));
        // Disks that leave make room: the daemon can be reached again, and what it serves is right. The exports that were refused take the
        // room of as many disks, whenever they try again; one connection at a time has the rest.
        let goes = refused.len() + 2;
        hold!(goes < served.len(), "too few are served: {served:?}");
        let (gone, left) = served.split_at(goes);
        for index in gone {
            bed.unplug(*index)?;
            bed.reach(*index, "Absent")?;
        }
        for index in left {
            bed.write(*index, 1)?;
            bed.compare_over(*index, 1)?;
        }
        let now = bed
            .machine
            .agent
            .run("systemctl show -P MainPID nbdtrack")?;
        hold!(now == pid, "the daemon was replaced: {pid} {now}");
        // What was scarce is there again.
        bed.machine.agent.run(
            "rm -rf /etc/systemd/system/nbdtrack.service.d && systemctl daemon-reload && systemctl restart nbdtrack",
        )?;
        for index in gone {
            bed.attach(*index)?;
        }
        bed.reach_all(&all, "Serving")?;
        all.iter().try_for_each(|index| bed.write(*index, 2))
    })
}
