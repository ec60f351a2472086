//! Disks that hang and disks that fail, as the kernel sees them: what is promised to the callers, to the clients
//! and to everyone else meanwhile.

mod raw_file;

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nbdtrack::image::Image;
use nix::sys::signal::Signal;
use support::bus::Options;
use support::client::{CMD_READ, CMD_WRITE, Client, FLAG_FUA, read_reply, request};
use support::fuse_disk::{ALL, FLUSHES, FuseDisk, FuseFile, LOOKS, WRITES};
use support::ground::{Ground, Need, real, tell};
use support::images::{qemu_img, text};
use support::loops::sparse_file;
use support::mounts::Mounted;
use support::process;
use support::scene::{STEP_LIMIT, Scene};
use support::stream::{Pace, Stream};
use support::{Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 16 << 20;
/// A call that does not depend on the hung disk answers within this.
const PROMPT: Duration = Duration::from_millis(500);

fn id(disk: &FuseDisk) -> String {
    format!("loop:{}", disk.file.display())
}

/// `vol-b` on an ordinary disk, `ill` on one that can be made ill.
fn ward(ground: &Ground) -> Outcome<(FuseDisk, Scene)> {
    let disk = FuseDisk::make(ground.path(), "ill", BYTES)?;
    let scene = Scene::serving(ground, &["vol-b"], BYTES)?;
    scene.client.add_export("ill", &id(&disk))?;
    scene.client.reach_state("ill", "Serving", STEP_LIMIT)?;
    Ok((disk, scene))
}

fn number(scene: &Scene, name: &str) -> Outcome<u64> {
    Ok(scene.client.stats()?.get(name).map_or(0, |w| w.number()))
}

#[test]
fn disk_made_of_fuse_hangs_fails_and_heals() -> Outcome<()> {
    real("fuse disk", NEEDS, |ground| {
        let (disk, mut scene) = ward(ground)?;
        let _healer = disk.healer();
        let mut client = Client::open(&scene.endpoint(), "ill")?;
        hold!(
            client.write(0, &[7; 4096], true)? == Ok(()),
            "a healthy disk takes a write"
        );
        let mut byte = [0; 4096];
        hold!(
            client.read(0, &mut byte)? == Ok(()) && byte == [7; 4096],
            "and gives it back"
        );
        let back = std::fs::read(disk.back())?;
        hold!(back[..4096] == [7; 4096], "FUA is on the disk");
        client.leave()?;
        scene.stop()
    })
}

/// One deadline holds for all exports: disks that are slow one after another would take it from those that come last.
#[test]
fn stop_asks_all_slow_disks_to_flush_at_the_same_time() -> Outcome<()> {
    real("stop beside slow disks", NEEDS, |ground| {
        let mut disks = Vec::new();
        for number in 0..4_u8 {
            let name = format!("slow-{number}");
            disks.push(FuseDisk::make(ground.path(), &name, BYTES)?);
        }
        let mut scene = Scene::empty(ground)?;
        let mut clients = Vec::new();
        for (number, disk) in (1_u8..).zip(&disks) {
            let name = format!("slow-{number}");
            scene.client.add_export(&name, &id(disk))?;
            scene.client.reach_state(&name, "Serving", STEP_LIMIT)?;
            let mut client = Client::open(&scene.endpoint(), &name)?;
            let written = client.write(0, &[number; 4096], false)?;
            hold!(written == Ok(()), "a write into the page cache");
            clients.push(client);
        }
        let _healers: Vec<_> = disks.iter().map(FuseDisk::healer).collect();
        let before: Vec<u64> = disks.iter().map(FuseDisk::held).collect();
        disks.iter().for_each(|disk| disk.hang(FLUSHES));
        scene.daemon()?.running.signal(Signal::SIGTERM)?;
        // None of them answers before all are asked.
        until(STEP_LIMIT, "every disk to be asked to flush", || {
            let mut disks = disks.iter().zip(&before);
            Ok(disks.all(|(disk, held)| disk.held() > *held).then_some(()))
        })?;
        disks.iter().for_each(FuseDisk::heal);
        let ended = scene.daemon()?.running.wait(STEP_LIMIT)?;
        hold!(ended.success(), "it ends in order: {ended}");
        scene.daemon = None;
        for (number, disk) in (1_u8..).zip(&disks) {
            let back = std::fs::read(disk.back())?;
            hold!(
                back[..4096] == [number; 4096],
                "what {number} wrote is on its disk"
            );
        }
        Ok(())
    })
}

#[test]
fn failed_flush_is_told_and_never_forgotten_until_the_next_generation() -> Outcome<()> {
    real("failed flush", NEEDS, |ground| {
        let (disk, mut scene) = ward(ground)?;
        let _healer = disk.healer();
        let mut one = Client::open(&scene.endpoint(), "ill")?;
        let mut two = Client::open(&scene.endpoint(), "ill")?;
        hold!(
            one.write(0, &[1; 4096], false)? == Ok(()),
            "a write into the page cache"
        );
        disk.fail(FLUSHES);
        hold!(one.flush()? == Err(5), "the flush that fails is EIO");
        disk.heal();
        hold!(
            one.flush()? == Err(5),
            "the next one, too, though the disk would say yes"
        );
        hold!(two.flush()? == Err(5), "and that of another connection");
        hold!(two.write(8192, &[2; 4096], true)? == Err(5), "and FUA");
        let mut three = Client::open(&scene.endpoint(), "ill")?;
        hold!(
            three.flush()? == Err(5),
            "and that of a connection that came later"
        );
        match scene.client.prepare_detach(&id(&disk)) {
            Err(e) if e.is("Failed") && e.text.contains("flush") => tell(&format!("latched: {e}")),
            other => trouble!("expected Failed that names the flush, got {other:?}"),
        }
        // A caller that lost the answer, or tries again, must not be told that all is well.
        match scene.client.prepare_detach(&id(&disk)) {
            Err(e) if e.is("Failed") && e.text.contains("flush") => {}
            other => trouble!("asked again: expected Failed that names the flush, got {other:?}"),
        }
        let reason = scene
            .export("ill")?
            .get("Reason")
            .map(|w| w.text().to_owned());
        hold!(
            reason.as_ref().is_some_and(|r| r.contains("flush")),
            "the Reason says so: {reason:?}"
        );
        disk.device.detach_now()?;
        let mark = scene.client.mark();
        disk.device.attach(&disk.file)?;
        scene
            .client
            .wait_state(mark, "ill", "Serving", STEP_LIMIT)?;
        let mut four = Client::open(&scene.endpoint(), "ill")?;
        hold!(
            four.write(0, &[3; 4096], false)? == Ok(()),
            "a new generation"
        );
        hold!(four.flush()? == Ok(()), "begins anew");
        scene.stop()
    })
}

#[test]
fn write_back_that_fails_is_found_by_the_flush() -> Outcome<()> {
    real("failed write-back", NEEDS, |ground| {
        let (disk, mut scene) = ward(ground)?;
        let _healer = disk.healer();
        let mut one = Client::open(&scene.endpoint(), "ill")?;
        disk.fail(WRITES);
        hold!(
            one.write(0, &[1; 65536], false)? == Ok(()),
            "the page cache takes it"
        );
        match scene.client.prepare_detach(&id(&disk)) {
            Err(e) if e.is("Failed") && e.text.contains("flush") => {
                tell(&format!("write-back: {e}"))
            }
            other => trouble!("expected Failed that names the flush, got {other:?}"),
        }
        disk.heal();
        scene.stop()
    })
}

#[test]
fn hung_disk_holds_up_nobody_else() -> Outcome<()> {
    real("hung disk", NEEDS, |ground| {
        let (disk, mut scene) = ward(ground)?;
        let _healer = disk.healer();
        let bystander = Stream::start(&scene.endpoint(), "vol-b", "vol-b", Pace::BYSTANDER, 0)?;
        bystander.wait_for(300)?;
        let mut victim = Client::open(&scene.endpoint(), "ill")?;
        hold!(
            victim.write(0, &[1; 65536], false)? == Ok(()),
            "the page cache takes it"
        );
        disk.hang(ALL);
        let stuck = std::thread::spawn(move || {
            let answer = victim.flush();
            format!("{answer:?}")
        });
        until(STEP_LIMIT, "the disk to hang", || {
            Ok((disk.held() > 0).then_some(()))
        })?;

        let began = Instant::now();
        let soon = Options::from([("timeout_ms", zbus::Variant::from(1000u32))]);
        let answer = scene.client.call("PrepareDetach", &(id(&disk), soon));
        let took = began.elapsed();
        match answer {
            Err(e) if e.is("TimedOut") && e.text.contains("FLUSH") => {
                tell(&format!("hung: {e} after {took:?}"))
            }
            other => {
                trouble!("expected TimedOut that names what holds it, got {other:?} after {took:?}")
            }
        }
        hold!(
            took < Duration::from_secs(2),
            "at its deadline, not after {took:?}"
        );
        tell(&format!("hung: {:?}", scene.export("ill")?));
        hold!(
            number(&scene, "orphans")? == 1,
            "the orphan is counted: {:?}",
            scene.client.stats()?
        );
        hold!(scene.state("ill")? == "Failed", "the volume is blocked");

        // Everyone else.
        let mut slowest = Duration::ZERO;
        for _ in 0..20 {
            let began = Instant::now();
            scene.client.stats()?;
            scene.client.objects("Export")?;
            slowest = slowest.max(began.elapsed());
        }
        hold!(slowest < PROMPT, "D-Bus answers took {slowest:?}");
        let began = Instant::now();
        scene.client.rescan()?;
        let rescan = began.elapsed();
        let began = Instant::now();
        scene.detach(0, 0)?;
        let detach = began.elapsed();
        let began = Instant::now();
        scene.attach(0, 0)?;
        tell(&format!(
            "hung: slowest D-Bus answer {slowest:?}, rescan {rescan:?}, another volume's detach {detach:?} and attach {:?}",
            began.elapsed()
        ));
        drop(bystander);
        let bystander = Stream::start(
            &scene.endpoint(),
            "vol-b",
            "vol-b",
            Pace::BYSTANDER,
            1_000_000,
        )?;
        bystander.wait_for(1000)?;
        let report = bystander.finish()?;
        hold!(report.broken.is_none(), "{:?}", report.broken);
        tell(&format!(
            "hung: bystander's longest stall {:?}",
            report.longest_stall
        ));

        // The disk answers: the orphan closes, the volume is to be had again.
        disk.heal();
        until(STEP_LIMIT, "the orphan to close", || {
            Ok((number(&scene, "orphans")? == 0).then_some(()))
        })?;
        tell(&format!(
            "hung: the client of the hung disk heard {}",
            stuck.join().unwrap_or_default()
        ));
        tell(&format!("healed: {:?}", scene.export("ill")?));
        if scene.state("ill")? != "Serving" {
            scene.client.cancel_detach(&id(&disk))?;
        }
        scene.client.reach_state("ill", "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

#[test]
fn flush_that_fails_after_the_deadline_is_told_to_who_asks_again() -> Outcome<()> {
    real("late failed flush", NEEDS, |ground| {
        let (disk, mut scene) = ward(ground)?;
        let _healer = disk.healer();
        let mut victim = Client::open(&scene.endpoint(), "ill")?;
        hold!(
            victim.write(0, &[1; 65536], false)? == Ok(()),
            "the page cache takes it"
        );
        disk.hang(ALL);
        for _ in 0..2 {
            let soon = Options::from([("timeout_ms", zbus::Variant::from(500u32))]);
            match scene.client.call("PrepareDetach", &(id(&disk), soon)) {
                Err(e) if e.is("TimedOut") => {}
                other => trouble!("expected TimedOut, got {other:?}"),
            }
        }
        disk.fail(WRITES | FLUSHES);
        disk.hang(0);
        until(STEP_LIMIT, "the orphan to close", || {
            Ok((number(&scene, "orphans")? == 0).then_some(()))
        })?;
        match scene.client.prepare_detach(&id(&disk)) {
            Err(e) if e.is("Failed") && e.text.contains("flush") => tell(&format!("late: {e}")),
            other => trouble!("expected Failed that names the flush, got {other:?}"),
        }
        disk.heal();
        scene.stop()
    })
}

#[test]
fn hard_frees_the_clients_at_once_and_blocks_the_volume_until_the_disk_answers() -> Outcome<()> {
    real("hard", NEEDS, |ground| {
        let (disk, mut scene) = ward(ground)?;
        let _healer = disk.healer();
        let mut victim = Client::open(&scene.endpoint(), "ill")?;
        hold!(
            victim.write(0, &[1; 65536], false)? == Ok(()),
            "the page cache takes it"
        );
        disk.hang(ALL);
        let began = Instant::now();
        let freed = std::thread::spawn(move || {
            let answer = victim.flush();
            (format!("{answer:?}"), began.elapsed())
        });
        until(STEP_LIMIT, "the disk to hang", || {
            Ok((disk.held() > 0).then_some(()))
        })?;
        let began = Instant::now();
        let hard = Options::from([
            ("hard", zbus::Variant::from(true)),
            ("timeout_ms", zbus::Variant::from(2000u32)),
        ]);
        let answer = scene.client.call("PrepareDetach", &(id(&disk), hard));
        let took = began.elapsed();
        let (heard, after) = freed.join().unwrap_or_default();
        tell(&format!(
            "hard: answered {answer:?} after {took:?}; its client was freed after {after:?} with {heard}"
        ));
        hold!(answer.is_err(), "a disk that is held is not safe to detach");
        hold!(after < took, "the client does not wait for the deadline");
        hold!(number(&scene, "orphans")? == 1, "counted");
        hold!(scene.state("ill")? == "Failed", "blocked");
        // A new name for the same volume does not get around it.
        scene.client.remove_export("ill", "hard")?;
        let soon = Options::from([("wait_ms", zbus::Variant::from(500u32))]);
        let again = scene.client.add_export_with("again", &id(&disk), soon);
        hold!(
            again.is_err(),
            "the volume is blocked for every name: {again:?}"
        );
        tell(&format!("hard: another name is told {again:?}"));
        disk.heal();
        until(STEP_LIMIT, "the orphan to close", || {
            Ok((number(&scene, "orphans")? == 0).then_some(()))
        })?;
        scene.client.cancel_detach(&id(&disk))?;
        scene.client.reach_state("again", "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

#[test]
fn crowd_of_clients_of_a_hung_disk_takes_no_thread_from_the_others() -> Outcome<()> {
    real("hung crowd", NEEDS, |ground| {
        let (disk, mut scene) = ward(ground)?;
        let _healer = disk.healer();
        let bystander = Stream::start(&scene.endpoint(), "vol-b", "vol-b", Pace::BYSTANDER, 0)?;
        bystander.wait_for(300)?;
        disk.hang(ALL);
        let mut crowd = Vec::new();
        for who in 0..300u64 {
            let client = Client::open(&scene.endpoint(), "ill")?;
            // Part of a page that is in no cache: the kernel reads it first, inside the write.
            for round in 0..10u64 {
                let offset = (who * 10 + round) * 4096 + 100;
                let mut message = request(CMD_WRITE, 0, round, offset, 512).to_vec();
                message.extend_from_slice(&[9; 512]);
                message.extend_from_slice(&request(CMD_READ, 0, 100 + round, offset, 512));
                (&client.socket).write_all(&message)?;
            }
            crowd.push(client);
        }
        until(STEP_LIMIT, "the disk to hang", || {
            Ok((disk.held() > 0).then_some(()))
        })?;
        // Half a second of the crowd's requests, for the threads that they could take.
        std::thread::sleep(Duration::from_millis(500));
        let mut slowest = Duration::ZERO;
        for _ in 0..20 {
            let began = Instant::now();
            let mut other = Client::open(&scene.endpoint(), "vol-b")?;
            hold!(
                other.read(8 << 20, &mut [0; 4096])? == Ok(()),
                "a read of the other export"
            );
            hold!(
                other.write(9 << 20, &[1; 512], true)? == Ok(()),
                "and a durable write"
            );
            slowest = slowest.max(began.elapsed());
            other.leave()?;
        }
        hold!(
            slowest < PROMPT,
            "a new client of another export waited {slowest:?}"
        );
        let began = Instant::now();
        let answer = scene.client.remove_export("ill", "hard");
        tell(&format!(
            "hung crowd: hard removal answered {answer:?} after {:?}",
            began.elapsed()
        ));
        let report = bystander.finish()?;
        hold!(report.broken.is_none(), "{:?}", report.broken);
        let threads = scene.daemon()?.holdings()?.threads;
        tell(&format!(
            "hung crowd: 300 clients, 6,000 requests, {threads} threads; connect, read, FUA elsewhere {slowest:?} at most; \
             bystander's longest stall {:?}",
            report.longest_stall
        ));
        disk.heal();
        until(STEP_LIMIT, "the orphan to close", || {
            Ok((number(&scene, "orphans")? == 0).then_some(()))
        })?;
        drop(crowd);
        scene.stop()
    })
}

/// Threads of the daemon by their names.
fn threads_named(pid: u32, name: &str) -> Outcome<usize> {
    let tasks = std::fs::read_dir(format!("/proc/{pid}/task"))?.flatten();
    // One that has ended meanwhile is none.
    let names = tasks.filter_map(|task| std::fs::read_to_string(task.path().join("comm")).ok());
    Ok(names.filter(|found| found.trim() == name).count())
}

/// As a server of NFS that is gone: every file of one file system hangs, raw ones and images, each with clients that want something durable.
#[test]
fn file_system_that_hangs_has_threads_of_its_own_and_holds_up_nobody_else() -> Outcome<()> {
    const FILES: usize = 40;
    const REQUESTS: usize = 16;
    /// `Limits::file_system_threads`; when half of them are taken each export has one more at most.
    const THREADS_MAX: usize = 128;
    let needs = [
        NEEDS,
        &[
            Need::Tool("mkfs.ext4"),
            Need::Tool("mount"),
            Need::Tool("qemu-img"),
        ],
    ]
    .concat();
    real("hung file system", &needs, |ground| {
        let disk = FuseDisk::make(ground.path(), "far", 64 << 20)?;
        let (far, near) = (ground.file("far"), ground.file("near"));
        std::fs::create_dir(&near)?;
        let node = disk.device.node();
        process::succeed("mkfs.ext4", &["-q", "-F", &node], STEP_LIMIT)?;
        let _mounted = Mounted::new(far.clone(), &[&node])?;
        let roots = format!("file_roots = [{:?}, {:?}]\n", text(&far), text(&near));
        let mut scene = Scene::told(ground, roots, &[])?;
        let _healer = disk.healer();
        for n in 0..FILES {
            let (name, path) = (format!("far{n}"), far.join(format!("f{n}")));
            let format = if n % 2 == 0 { "raw" } else { "qcow2" };
            qemu_img(&["create", "-q", "-f", format, &text(&path), "1M"])?;
            let scheme = if n % 2 == 0 { "file" } else { "qcow2" };
            let id = format!("{scheme}:{}", path.display());
            scene.client.add_export(&name, &id)?;
        }
        let at_hand = |n: usize| -> Outcome<String> {
            let path = sparse_file(&near, &format!("n{n}"), BYTES)?;
            Ok(format!("file:{}", path.display()))
        };
        scene.client.add_export("near", &at_hand(0)?)?;
        let bystander = Stream::start(&scene.endpoint(), "near", "near", Pace::BYSTANDER, 0)?;
        bystander.wait_for(100)?;
        disk.hang(ALL);
        let mut stuck = Vec::new();
        for n in 0..FILES {
            let client = Client::open(&scene.endpoint(), &format!("far{n}"))?;
            for request_of in 0..REQUESTS as u64 {
                let at = request_of * 4096;
                let head = request(CMD_WRITE, FLAG_FUA, request_of, at, 4096);
                let message = [&head[..], &[7; 4096]].concat();
                (&client.socket).write_all(&message)?;
            }
            stuck.push(client);
        }
        let pid = scene.daemon()?.pid();
        until(STEP_LIMIT, "its threads to be taken", || {
            Ok((threads_named(pid, "nbd-files")? >= THREADS_MAX / 2).then_some(()))
        })?;
        // All of this comes to its end while it hangs: what has clients goes on, and what is new is found, opened, written and flushed.
        bystander.wait_for(100)?;
        for n in 1..4 {
            let name = format!("near{n}");
            scene.client.add_export(&name, &at_hand(n)?)?;
            let mut client = Client::open(&scene.endpoint(), &name)?;
            hold!(client.write(0, &[1; 4096], true)? == Ok(()), "{name}: FUA");
            client.leave()?;
            scene.client.remove_export(&name, "soft")?;
        }
        scene.client.rescan()?;
        let threads = threads_named(pid, "nbd-files")?;
        // The file at hand has threads of its own, of which some stay.
        hold!(
            threads <= THREADS_MAX + 8,
            "{threads} threads wait for files"
        );
        let disks = threads_named(pid, "nbd-disk")?;
        hold!(disks < 8, "{disks} threads that were for disks");
        // Its clients are freed by a removal, and not by the file system.
        let freed = stuck.pop();
        let name = format!("far{}", FILES - 1);
        let answer = scene.client.remove_export(&name, "hard");
        if let Some(client) = freed {
            hold!(
                read_reply(&client.socket).is_err(),
                "a client of a removed export is told of its write"
            );
        }
        tell(&format!(
            "hung file system: {FILES} exports, {} requests, {threads} threads wait for files; a hard removal answered {answer:?}",
            FILES * REQUESTS
        ));
        let report = bystander.finish()?;
        hold!(report.broken.is_none(), "{:?}", report.broken);
        disk.heal();
        for client in &stuck {
            for _ in 0..REQUESTS {
                let (_, error) = read_reply(&client.socket)?;
                hold!(error == 0, "error {error} after it healed");
            }
        }
        drop(stuck);
        scene.stop()
    })
}

/// Calls that make files, as many as one mount may have and more, all of them on a file system that hangs.
#[test]
fn calls_that_make_files_on_a_file_system_that_hangs_leave_room_for_those_of_others() -> Outcome<()>
{
    /// `WORKS_PER_MOUNT` of src/daemon/works.rs.
    const PER_MOUNT: usize = 32;
    const MORE: usize = 4;
    let needs = [NEEDS, &[Need::Tool("mkfs.ext4"), Need::Tool("mount")]].concat();
    real("works of a hung mount", &needs, |ground| {
        let disk = FuseDisk::make(ground.path(), "far", 64 << 20)?;
        let (far, near) = (ground.file("far"), ground.file("near"));
        std::fs::create_dir(&near)?;
        let node = disk.device.node();
        process::succeed("mkfs.ext4", &["-q", "-F", &node], STEP_LIMIT)?;
        let _mounted = Mounted::new(far.clone(), &[&node])?;
        let roots = format!("file_roots = [{:?}, {:?}]\n", text(&far), text(&near));
        let mut scene = Scene::told(ground, roots, &[])?;
        let healer = disk.healer();
        let make = |name: &str, folder: &std::path::Path| {
            let path = text(&folder.join(format!("{name}.raw")));
            let options = Options::from([
                ("path", zbus::Variant::from(path)),
                ("format", zbus::Variant::from("raw")),
            ]);
            scene
                .client
                .call("CreateImage", &(name, 1_u64 << 20, options))
        };
        make("first", &far)?;
        disk.hang(ALL);
        let refused = AtomicUsize::new(0);
        let (made, longest) = std::thread::scope(|threads| -> Outcome<_> {
            // Thread: each waits for its one call, which is refused at once or ends when the disk is healed.
            let calls: Vec<_> = (0..PER_MOUNT + MORE)
                .map(|n| {
                    let (make, far, refused) = (&make, &far, &refused);
                    threads.spawn(move || match make(&format!("far{n}"), far) {
                        Err(e) if e.is("NotReady") && e.text.contains(&text(far)) => {
                            refused.fetch_add(1, Ordering::SeqCst);
                            false
                        }
                        made => made.is_ok(),
                    })
                })
                .collect();
            let elsewhere = || -> Outcome<Duration> {
                // Then all of the others have their places.
                until(STEP_LIMIT, "the mount's places to be taken", || {
                    Ok((refused.load(Ordering::SeqCst) == MORE).then_some(()))
                })?;
                let mut longest = Duration::ZERO;
                for n in 0..4 {
                    let began = Instant::now();
                    make(&format!("near{n}"), &near)?;
                    longest = longest.max(began.elapsed());
                }
                let begin = |folder: &std::path::Path| {
                    let options = Options::from([
                        ("size", zbus::Variant::from(1_u64 << 20)),
                        ("folder", zbus::Variant::from(text(folder))),
                    ]);
                    scene.client.call("BeginBackup", &("vm", 0_u32, options))
                };
                hold!(begin(&far).is_err(), "a backup on the hung mount");
                begin(&near)?;
                Ok(longest)
            };
            let longest = elsewhere();
            disk.heal();
            let made = calls.into_iter().filter_map(|call| call.join().ok());
            Ok((made.filter(|made| *made).count(), longest?))
        })?;
        hold!(made == PER_MOUNT, "{made} were made when it answered");
        make("last", &far)?;
        tell(&format!(
            "works of a hung mount: {PER_MOUNT} hang, an image elsewhere within {longest:?}"
        ));
        drop(healer);
        scene.stop()
    })
}

#[test]
fn stop_with_a_hung_disk_ends_within_its_deadline() -> Outcome<()> {
    real("stop while hung", NEEDS, |ground| {
        let (disk, mut scene) = ward(ground)?;
        let healer = disk.healer();
        let mut victim = Client::open(&scene.endpoint(), "ill")?;
        hold!(
            victim.write(0, &[1; 65536], false)? == Ok(()),
            "the page cache takes it"
        );
        disk.hang(ALL);
        let stuck = std::thread::spawn(move || format!("{:?}", victim.flush()));
        until(STEP_LIMIT, "the disk to hang", || {
            Ok((disk.held() > 0).then_some(()))
        })?;
        let began = Instant::now();
        let daemon = scene.daemon()?;
        daemon.running.signal(nix::sys::signal::Signal::SIGTERM)?;
        let pid = daemon.pid();
        // The process leaves the table only with its last thread, which the kernel holds in the disk: its end is when its
        // first thread is gone.
        let gone = || {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            stat.is_empty() || stat.contains(") Z ")
        };
        until(Duration::from_secs(45), "the daemon to end", || {
            Ok(gone().then_some(()))
        })?;
        tell(&format!("stop while hung: {:?}", began.elapsed()));
        // The next daemon does not wait for the disk; what the last one could not close stays claimed.
        let next = scene.home.start()?;
        scene.client.reach_state("vol-b", "Serving", STEP_LIMIT)?;
        let ill = scene.export("ill")?;
        tell(&format!(
            "started again while hung: {:?} {:?}",
            ill.get("State"),
            ill.get("Reason")
        ));
        hold!(
            scene.state("ill")? != "Serving",
            "the old daemon's claim keeps it from being served"
        );
        drop(healer);
        tell(&format!(
            "stop while hung: its client heard {}",
            stuck.join().unwrap_or_default()
        ));
        let status = scene.daemon()?.running.wait(STEP_LIMIT)?;
        tell(&format!(
            "stop while hung: {status}, {:?} with the disk healed",
            began.elapsed()
        ));
        scene.client.reach_state("ill", "Serving", STEP_LIMIT)?;
        next.stop()
    })
}

/// What a call does in a thread, when that ends within a few seconds.
fn prompt<T: Send + 'static>(call: impl FnOnce() -> T + Send + 'static) -> Outcome<T> {
    let (tell, told) = std::sync::mpsc::channel();
    // Thread: left behind when it hangs; it ends with the fault.
    std::thread::spawn(move || tell.send(call()));
    Ok(told.recv_timeout(Duration::from_secs(5))?)
}

/// Every open for writing looked at the files of all loop devices, on whatever mount they lay.
#[test]
fn a_loop_device_on_a_server_that_is_gone_holds_up_no_open_of_another_file() -> Outcome<()> {
    real("loop device on a dead mount", &[Need::Loop], |ground| {
        let far = FuseDisk::make(ground.path(), "far", 1 << 20)?;
        let _healer = far.healer();
        let path = sparse_file(ground.path(), "near.raw", 1 << 20)?;
        let folder = ground.path().to_owned();
        far.hang(LOOKS);
        let size = prompt(move || raw_file::open(&folder, &path).size())?;
        hold!(size == 1 << 20, "{size}");
        Ok(())
    })
}

/// Whoever comes next is told it, and its server is not waited for.
#[test]
fn what_a_file_has_grown_to_is_known_without_asking_its_server() -> Outcome<()> {
    real("growth of a file", &[], |ground| {
        let back = sparse_file(ground.path(), "back", 1 << 20)?;
        let far = FuseFile::over(&back, "far", false)?;
        let _healer = far.healer();
        let image = raw_file::open(ground.path(), &far.file);
        std::fs::OpenOptions::new()
            .write(true)
            .open(&back)?
            .set_len(2 << 20)?;
        far.power_up()?;
        // As the look-up that finds it.
        hold!(far.file.metadata()?.len() == 2 << 20, "its server's");
        far.hang(LOOKS);
        let grown = prompt(move || image.grow())??;
        hold!(grown == 2 << 20, "{grown}");
        Ok(())
    })
}
