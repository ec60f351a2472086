//! Plain files, and QCOW2 images in them, are served as disks are: what stands under the path is known by its inode, has one writer, and what is
//! put in its place is served to nobody who did not say so.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use nbdtrack::correlation::DiskSeq;
use support::bus::{Bus, Client as Caller};
use support::client::Client;
use support::daemon::Home;
use support::fuse_disk::{FuseFile, LOOKS, WRITES};
use support::ground::{Ground, Need, real};
use support::images::{qemu_img, qemu_io, text};
use support::loops::{LoopDevice, sparse_file};
use support::mounts::Mounted;
use support::pattern;
use support::process;
use support::scene::{STEP_LIMIT, Scene, nbdtrack};
use support::{Doing, Outcome, hold, trouble, until};

const NEEDS: &[Need] = &[Need::Bus, Need::Tool("nbdcopy")];
const BYTES: u64 = 8 << 20;

fn roots(folder: &Path) -> String {
    format!("file_roots = [{:?}]\n", folder.display().to_string())
}

fn id(path: &Path) -> String {
    Kind::Raw.id(path)
}

/// What is in a file that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Raw,
    Qcow2,
}

impl Kind {
    const ALL: [Kind; 2] = [Kind::Raw, Kind::Qcow2];

    fn format(self) -> &'static str {
        match self {
            Kind::Raw => "raw",
            Kind::Qcow2 => "qcow2",
        }
    }

    /// As the daemon is told.
    fn id(self, path: &Path) -> String {
        let scheme = match self {
            Kind::Raw => "file",
            Kind::Qcow2 => "qcow2",
        };
        format!("{scheme}:{}", path.display())
    }

    /// Makes one of zeroes in `folder`.
    fn make(self, folder: &Path, name: &str) -> Outcome<PathBuf> {
        if self == Kind::Raw {
            return sparse_file(folder, name, BYTES);
        }
        // Whole before it has its name: who waits for it would have it open, and locked, while it is made.
        let (made, path) = (folder.join(format!("{name}.made")), folder.join(name));
        let bytes = BYTES.to_string();
        qemu_img(&["create", "-q", "-f", "qcow2", &text(&made), &bytes])?;
        std::fs::rename(&made, &path)?;
        Ok(path.canonicalize()?)
    }

    /// All that it reads as, by QEMU and not by us, in a file of its own; it may be served meanwhile.
    fn read(self, ground: &Ground, path: &Path) -> Outcome<PathBuf> {
        let raw = ground.file("as-raw");
        let names = [text(path), text(&raw)];
        let args = ["convert", "-U", "-f", self.format(), "-O", "raw"];
        qemu_img(&[&args[..], &[&names[0], &names[1]]].concat())?;
        Ok(raw)
    }
}

/// A folder of its own that may be served from, one file in it, and a daemon that serves it as `a`; all of it beneath `ground/KIND`.
fn serving(ground: &Ground, kind: Kind) -> Outcome<(Scene, PathBuf)> {
    let home = ground.file(kind.format());
    let folder = home.join("backups");
    std::fs::create_dir_all(&folder)?;
    let path = kind.make(&folder, "a.img")?;
    let scene = Scene::told_in(&home, roots(&folder), &[("a", kind.id(&path))])?;
    scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
    Ok((scene, path))
}

fn reason(scene: &Scene, name: &str) -> Outcome<String> {
    let export = scene.export(name)?;
    Ok(export
        .get("Reason")
        .map_or(String::new(), |w| w.text().to_owned()))
}

/// Whether a flush is answered with success.
fn served(client: &mut Client) -> bool {
    matches!(client.flush(), Ok(Ok(())))
}

#[test]
fn file_is_filled_and_read_as_a_disk_is_and_stays_given_up_over_a_restart() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("qemu-img")]].concat();
    real("file served", &needs, |ground| {
        for kind in Kind::ALL {
            is_filled(ground, kind).doing(format!("{kind:?}"))?;
        }
        Ok(())
    })
}

fn is_filled(ground: &Ground, kind: Kind) -> Outcome<()> {
    let (mut scene, path) = serving(ground, kind)?;
    let uri = scene.endpoint().uri("a");
    let stamped = ground.file("stamped");
    pattern::write_file(&stamped, "a", BYTES, 1)?;
    let limit = STEP_LIMIT;
    process::succeed(
        "nbdcopy",
        &["--flush", &stamped.to_string_lossy(), &uri],
        limit,
    )?;
    let tally = pattern::examine_whole(&kind.read(ground, &path)?, "a", BYTES, 1)?;
    hold!(tally.all_right(), "in the file: {tally}");
    let back = ground.file("back");
    process::succeed("nbdcopy", &[uri.as_str(), &back.to_string_lossy()], limit)?;
    let tally = pattern::examine_whole(&back, "a", BYTES, 1)?;
    hold!(tally.all_right(), "through the export: {tally}");

    let mut client = Client::open(&scene.endpoint(), "a")?;
    scene.client.prepare_detach(&kind.id(&path))?;
    hold!(!served(&mut client), "its client is still served");
    hold!(
        scene.state("a")? == "Released",
        "it is {}",
        scene.state("a")?
    );
    scene.stop()?;
    scene.start()?;
    scene.client.reach_state("a", "Released", STEP_LIMIT)?;
    scene.client.cancel_detach(&kind.id(&path))?;
    scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
    scene.stop()
}

/// Nobody looked at it any more, which was taken for its end: an export that was added to it served it.
#[test]
fn a_file_that_was_given_up_stays_so_while_it_has_no_export_and_until_it_goes() -> Outcome<()> {
    real("file given up", NEEDS, |ground| {
        let folder = ground.file("files");
        std::fs::create_dir(&folder)?;
        let path = sparse_file(&folder, "a", BYTES)?;
        let mut scene = Scene::told(ground, roots(&folder), &[])?;
        let volume = id(&path);
        scene.client.add_export("a", &volume)?;
        scene.client.prepare_detach(&volume)?;
        scene.client.remove_export("a", "hard")?;
        scene.client.rescan()?;
        let again = scene.client.add_export("a", &volume);
        let state = scene.state("a")?;
        hold!(state == "Released", "it is {state}: {again:?}");
        scene.client.remove_export("a", "hard")?;
        std::fs::remove_file(&path)?;
        scene.client.rescan()?;
        sparse_file(&folder, "a", BYTES)?;
        scene.client.add_export("a", &volume)?;
        scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

#[test]
fn what_is_no_file_beneath_a_root_is_refused_by_name() -> Outcome<()> {
    real("no file", NEEDS, |ground| {
        let (mut scene, path) = serving(ground, Kind::Raw)?;
        let folder = path.parent().unwrap_or(&path).to_owned();
        let other = sparse_file(ground.path(), "other.raw", BYTES)?;
        symlink(&other, folder.join("link"))?;
        nix::unistd::mkfifo(&folder.join("fifo"), nix::sys::stat::Mode::S_IRWXU)?;
        std::fs::create_dir(folder.join("folder"))?;
        File::create(folder.join("empty"))?;
        for (name, word) in [
            ("link", "leads out of the file_roots"),
            ("fifo", "a FIFO is not served"),
            ("folder", "a folder is not served"),
            ("later", "there is no such file"),
            ("empty", "no steady size, or none at all"),
        ] {
            let options = [("wait_ms", zbus::Variant::new(300_u32))].into();
            let refused = scene
                .client
                .add_export_with(name, &id(&folder.join(name)), options);
            hold!(refused.is_err(), "{name} is served");
            let told = reason(&scene, name)?;
            hold!(told.contains(word), "{name}: {told:?}");
        }
        let outside = scene.client.add_export("outside", &id(&other));
        let told = outside.map_or_else(|refused| format!("{refused:?}"), |_| String::new());
        hold!(told.contains("not beneath"), "outside: {told:?}");

        // It comes, and is found when someone asks for it.
        sparse_file(&folder, "later", BYTES)?;
        scene.client.rescan()?;
        scene.client.reach_state("later", "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

#[test]
fn a_file_has_one_writer_whatever_it_is_called_and_whoever_asks() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Loop]].concat();
    real("one writer of a file", &needs, |ground| {
        let (mut scene, path) = serving(ground, Kind::Raw)?;
        let folder = path.parent().unwrap_or(&path).to_owned();
        let link = folder.join("link.raw");
        std::fs::hard_link(&path, &link)?;
        let refused = scene.client.add_export("hard-link", &id(&link));
        let told = refused.map_or_else(|refused| format!("{refused:?}"), |_| String::new());
        hold!(
            told.contains("InUse"),
            "a second writer by a hard link: {told:?}"
        );
        hold!(
            scene.state("a")? == "Serving",
            "the first writer is {}",
            scene.state("a")?
        );

        // A second daemon has its own state and its own idea of the file.
        let second = ground.file("second");
        std::fs::create_dir_all(&second)?;
        let bus = Bus::start(&second)?;
        let mut home = Home::new(&second, &bus.address)?;
        home.server = roots(&folder);
        home.configure(&[("a", id(&path))])?;
        let daemon = home.start()?;
        let caller = Caller::connect(&bus)?;
        let found = caller.reach_state("a", "Failed", STEP_LIMIT)?;
        let told = found.get("Reason").map_or("", |w| w.text()).to_owned();
        hold!(told.contains("another nbdtrack) writes to it"), "{told:?}");
        // The lock ends with its process, however that ends.
        scene.kill()?;
        caller.reach_state("a", "Serving", STEP_LIMIT)?;
        daemon.stop()?;

        let device = LoopDevice::add()?;
        device.attach(&path)?;
        scene.start()?;
        let found = scene.client.reach_state("a", "Failed", STEP_LIMIT)?;
        let told = found.get("Reason").map_or("", |w| w.text()).to_owned();
        hold!(
            told.contains(&format!("backs {}", device.name())),
            "{told:?}"
        );
        scene.stop()
    })
}

/// Nothing told the daemon of a device that was attached to a file while that was served: two writers.
#[test]
fn a_loop_device_on_a_served_file_ends_its_leases_and_is_not_served_beside_it() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Loop, Need::Tool("losetup")]].concat();
    real("file, then loop device", &needs, |ground| {
        let (mut scene, path) = serving(ground, Kind::Raw)?;
        let caller = &scene.client;
        let device = LoopDevice::add()?;
        let mut client = Client::open(&scene.endpoint(), "a")?;
        let node = device.node();
        let file = path.to_string_lossy();
        process::succeed("losetup", &[node.as_str(), &file], STEP_LIMIT)?;
        let volume = format!("loop:{}", path.display());
        let options = [("wait_ms", zbus::Variant::new(300_u32))].into();
        // Refused as long as the file's own export is there; which of the two it is then is told by nobody's hand.
        let _asked = caller.add_export_with("device", &volume, options);
        caller.rescan()?;
        until(STEP_LIMIT, "one of them to be the only writer", || {
            // In this order: once the device is served the file is no more.
            let device = scene.state("device")?;
            let file = scene.state("a")?;
            hold!(device != "Serving" || file != "Serving", "both are served");
            Ok((file != "Serving").then_some(()))
        })?;
        hold!(!served(&mut client), "the file's client is still served");
        let told = reason(&scene, "a")?;
        hold!(
            told.contains(&format!("backs {}", device.name())),
            "{told:?}"
        );
        scene.client.remove_export("device", "soft")?;
        device.detach_now()?;
        scene.client.rescan()?;
        scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

/// Two writers of which one goes past the page cache would undo each other's halves of a page; a request of less than a block could
/// only be done through it.
#[test]
fn direct_export_is_whole_blocks_only_and_shares_with_direct_writers_alone() -> Outcome<()> {
    let needs = [
        NEEDS,
        &[Need::Loop, Need::Tool("qemu-io"), Need::Tool("nbdinfo")],
    ]
    .concat();
    real("direct", &needs, |ground| {
        let (mut scene, path) = serving(ground, Kind::Raw)?;
        let other = path.with_file_name("b.raw");
        sparse_file(path.parent().unwrap_or(&path), "b.raw", BYTES)?;
        let device = LoopDevice::add()?;
        device.attach(&other)?;
        let options = |share: bool, direct: bool| {
            [("share", share), ("direct", direct)]
                .map(|(key, on)| (key, zbus::Variant::new(on)))
                .into()
        };
        let volume = format!("loop:{}", other.display());
        let caller = &scene.client;
        caller.add_export_with("one", &volume, options(true, true))?;
        let refused = caller.add_export_with("cached", &volume, options(true, false));
        let told = refused.map_or_else(|refused| format!("{refused:?}"), |_| String::new());
        hold!(
            told.contains("InUse") && told.contains("say it on both"),
            "a writer through the page cache beside it: {told:?}"
        );
        caller.add_export_with("two", &volume, options(true, true))?;

        let uri = scene.endpoint().uri("one");
        let said = process::succeed("nbdinfo", &["--json", &uri], STEP_LIMIT)?;
        hold!(
            said.contains("\"block_size_minimum\": 512"),
            "the disk's own block: {said}"
        );
        let mut client = Client::open(&scene.endpoint(), "one")?;
        let part = client.read(256, &mut [0; 512])?;
        hold!(part == Err(22), "half of two blocks: {part:?}");
        let script = [
            "-c",
            "write -P 7 1M 512",
            "-c",
            "write -P 8 2M 1M",
            "-c",
            "flush",
        ];
        let script = [&["-f", "raw", &uri][..], &script].concat();
        process::succeed("qemu-io", &script, STEP_LIMIT)?;
        let two = scene.endpoint().uri("two");
        let script = ["-c", "read -P 7 1M 512", "-c", "read -P 8 2M 1M"];
        let script = [&["-f", "raw", &two][..], &script].concat();
        let said = process::succeed("qemu-io", &script, STEP_LIMIT)?;
        hold!(!said.contains("verification failed"), "{said}");

        let stamped = ground.file("stamped");
        pattern::write_file(&stamped, "b", BYTES, 1)?;
        let args = ["--flush", &stamped.to_string_lossy(), &uri];
        process::succeed("nbdcopy", &args, STEP_LIMIT)?;
        let tally = pattern::examine_whole(&other, "b", BYTES, 1)?;
        hold!(tally.all_right(), "in the backing file: {tally}");
        // It is kept: after a restart it is as direct as before.
        scene.stop()?;
        scene.start()?;
        scene.client.reach_state("one", "Serving", STEP_LIMIT)?;
        let part = Client::open(&scene.endpoint(), "one")?.read(256, &mut [0; 512])?;
        hold!(part == Err(22), "after a restart: {part:?}");
        scene.stop()
    })
}

#[test]
fn what_is_put_in_the_place_of_a_served_file_waits_for_a_person() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("qemu-img")]].concat();
    real("file replaced", &needs, |ground| {
        for kind in Kind::ALL {
            is_replaced(ground, kind).doing(format!("{kind:?}"))?;
        }
        Ok(())
    })
}

fn is_replaced(ground: &Ground, kind: Kind) -> Outcome<()> {
    let (mut scene, path) = serving(ground, kind)?;
    let folder = path.parent().unwrap_or(&path).to_owned();
    let mut client = Client::open(&scene.endpoint(), "a")?;
    hold!(client.write(0, &[7; 512], true)?.is_ok(), "cannot write");
    // The file that was agreed on keeps a name.
    let old = folder.join("old.img");
    std::fs::hard_link(&path, &old)?;
    let new = kind.make(&folder, "new.img")?;
    let untouched = std::fs::read(&new)?;
    std::fs::rename(&new, &path)?;
    // Noticed by now or not: what is written goes to the file that was agreed on, or nowhere.
    let written = matches!(client.write(4096, &[7; 512], true), Ok(Ok(())));
    scene.client.reach_state("a", "Ambiguous", STEP_LIMIT)?;
    hold!(
        std::fs::read(&path)? == untouched,
        "the write went to the new file"
    );
    hold!(!served(&mut client), "its client is still served");
    hold!(
        Client::open(&scene.endpoint(), "a").is_err(),
        "new clients are let in"
    );
    // Also after a restart.
    scene.stop()?;
    let there = std::fs::read(kind.read(ground, &old)?)?;
    hold!(there[..512] == [7; 512], "what was told to be durable");
    hold!(
        !written || there[4096..4608] == [7; 512],
        "the write went elsewhere"
    );
    scene.start()?;
    scene.client.reach_state("a", "Ambiguous", STEP_LIMIT)?;
    let volumes = scene.client.objects("Volume")?;
    let file = volumes
        .values()
        .map(|volume| volume.get("DiskSeq").map_or(0, |w| w.number()))
        .find(|diskseq| DiskSeq(*diskseq).is_file());
    let Some(diskseq) = file else {
        trouble!("the file is no volume: {volumes:?}")
    };
    scene.client.resolve_conflict("a", diskseq)?;
    scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
    let mut client = Client::open(&scene.endpoint(), "a")?;
    let mut bytes = [1; 512];
    hold!(client.read(0, &mut bytes)?.is_ok(), "cannot read");
    hold!(bytes == [0; 512], "the old file's bytes");
    scene.stop()
}

#[test]
fn a_file_that_shrinks_grows_or_goes_is_told_and_no_lease_outlives_it() -> Outcome<()> {
    real("file resized", NEEDS, |ground| {
        let (mut scene, path) = serving(ground, Kind::Raw)?;
        let size = |scene: &Scene| -> Outcome<u64> {
            Ok(scene.export("a")?.get("Size").map_or(0, |w| w.number()))
        };
        let file = OpenOptions::new().write(true).open(&path)?;
        let mut client = Client::open(&scene.endpoint(), "a")?;
        file.set_len(2 * BYTES)?;
        scene.client.rescan()?;
        until(STEP_LIMIT, "the new size", || {
            Ok((size(&scene)? == 2 * BYTES).then_some(()))
        })?;
        hold!(
            client.flush()?.is_ok(),
            "a client of the smaller file was cut off"
        );

        let mark = scene.client.mark();
        file.set_len(BYTES)?;
        scene.client.rescan()?;
        scene.client.wait_state(mark, "a", "Serving", STEP_LIMIT)?;
        hold!(size(&scene)? == BYTES, "it shows {} bytes", size(&scene)?);
        hold!(
            !served(&mut client),
            "a client of the larger file is still served"
        );

        let mut client = Client::open(&scene.endpoint(), "a")?;
        std::fs::remove_file(&path)?;
        scene.client.rescan()?;
        scene.client.reach_state("a", "Absent", STEP_LIMIT)?;
        hold!(
            !served(&mut client),
            "a client of the removed file is still served"
        );
        let told = reason(&scene, "a")?;
        hold!(told.contains("there is no such file"), "{told:?}");
        // Whoever asks for it anew is told again.
        let text = std::fs::read_to_string(&scene.home.config)?;
        std::fs::write(&scene.home.config, text + "read_only = true\n")?;
        nbdtrack(&scene, &["reload"])?;
        until(STEP_LIMIT, "the reason of the new definition", || {
            let told = reason(&scene, "a")?;
            Ok(told.contains("there is no such file").then_some(()))
        })?;
        scene.stop()
    })
}

/// Whatever made a look-up fail was taken for a file that is gone: its clients were cut off, and one that was given up was opened for writing at the
/// next look-up, beside whoever it had been given up for. The interval is an hour: nobody else looks again.
#[test]
fn a_look_up_that_fails_ends_no_lease_and_no_release() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("qemu-img")]].concat();
    real("failed look-up", &needs, |ground| {
        for kind in Kind::ALL {
            is_not_found(ground, kind).doing(format!("{kind:?}"))?;
        }
        Ok(())
    })
}

fn is_not_found(ground: &Ground, kind: Kind) -> Outcome<()> {
    let home = ground.file(&format!("unasked-{}", kind.format()));
    let folder = home.join("backups");
    std::fs::create_dir_all(&folder)?;
    let back = kind.make(&folder, "a.back")?;
    let far = FuseFile::over(&back, "a", false)?;
    let server = roots(&folder) + "survey_interval_s = 3600\n";
    let volume = kind.id(&far.file);
    let mut scene = Scene::told_in(&home, server, &[("a", volume.clone())])?;
    let served = scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
    let generation = served.get("Generation").map(|w| w.number());
    let mut client = Client::open(&scene.endpoint(), "a")?;

    far.fail(LOOKS);
    scene.client.rescan()?;
    scene.client.reach_state("a", "Ambiguous", STEP_LIMIT)?;
    let told = reason(&scene, "a")?;
    hold!(told.contains("Input/output error"), "{told:?}");
    let read = client.read(0, &mut [0; 4096]);
    hold!(matches!(read, Ok(Ok(()))), "its client: {read:?}");
    hold!(
        Client::open(&scene.endpoint(), "a").is_err(),
        "new clients are let in to what nobody could look at"
    );
    far.heal();
    let served = scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
    let now = served.get("Generation").map(|w| w.number());
    hold!(now == generation, "another lease: {now:?}, {generation:?}");
    let read = client.read(0, &mut [0; 4096]);
    hold!(matches!(read, Ok(Ok(()))), "its client: {read:?}");
    client.leave()?;

    scene.client.prepare_detach(&volume)?;
    for _ in 0..2 {
        far.fail(LOOKS);
        scene.client.rescan()?;
        far.heal();
        scene.client.rescan()?;
        let state = scene.state("a")?;
        hold!(state == "Released", "given up, and it is {state}");
        scene.stop()?;
        scene.start()?;
        scene.client.reach_state("a", "Released", STEP_LIMIT)?;
    }
    scene.stop()
}

/// A name of a file that was removed stayed one while another was there: its clients went on with what its path led to no more.
#[test]
fn a_name_of_a_file_that_goes_ends_its_own_leases_and_no_others() -> Outcome<()> {
    real("one of two names", NEEDS, |ground| {
        let (mut scene, path) = serving(ground, Kind::Raw)?;
        let name = path.with_file_name("b.img");
        std::fs::hard_link(&path, &name)?;
        let options = [("read_only", zbus::Variant::new(true))].into();
        scene.client.add_export_with("b", &id(&name), options)?;
        let mut first = Client::open(&scene.endpoint(), "a")?;
        let mut second = Client::open(&scene.endpoint(), "b")?;
        std::fs::remove_file(&name)?;
        scene.client.reach_state("b", "Absent", STEP_LIMIT)?;
        hold!(!served(&mut second), "its client is still served");
        hold!(scene.state("a")? == "Serving", "{}", scene.state("a")?);
        hold!(served(&mut first), "a client of the other name");
        scene.stop()
    })
}

/// Roots that were narrowed by the reload that drains an export made a cut of the drain: what was in flight was not answered.
#[test]
fn a_file_outside_the_roots_of_a_reload_is_drained_and_not_cut_off() -> Outcome<()> {
    real("roots narrowed", NEEDS, |ground| {
        let folders = ["one", "two"].map(|name| ground.file(name));
        for folder in &folders {
            std::fs::create_dir(folder)?;
        }
        let back = sparse_file(&folders[0], "a.back", BYTES)?;
        let far = FuseFile::over(&back, "a", false)?;
        let moved = sparse_file(&folders[1], "a.disk", BYTES)?;
        let both: String = format!("file_roots = {:?}\n", folders.each_ref().map(|f| text(f)));
        let mut scene = Scene::told(ground, both, &[("a", id(&far.file)), ("b", id(&moved))])?;
        scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
        let mut client = Client::open(&scene.endpoint(), "a")?;
        far.hang(WRITES);
        let writing = std::thread::spawn(move || client.write(0, &[7; 4096], true));
        until(STEP_LIMIT, "the write to hang", || {
            Ok((far.held() > 0).then_some(()))
        })?;
        scene.home.server = roots(&folders[1]);
        scene.home.configure(&[("a", id(&moved))])?;
        nbdtrack(&scene, &["reload"])?;
        scene.client.reach_state("a", "Draining", STEP_LIMIT)?;
        scene.client.rescan()?;
        far.heal();
        let Ok(written) = writing.join() else {
            trouble!("the writer panicked");
        };
        hold!(matches!(written, Ok(Ok(()))), "in flight: {written:?}");
        scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

/// Nobody asks for a survey here, and the interval is an hour.
#[test]
fn what_becomes_of_a_file_is_noticed_at_once_and_ends_the_leases_on_it() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("mount"), Need::Tool("qemu-img")]].concat();
    real("file watched", &needs, |ground| {
        for kind in Kind::ALL {
            is_watched(ground, kind).doing(format!("{kind:?}"))?;
        }
        Ok(())
    })
}

fn is_watched(ground: &Ground, kind: Kind) -> Outcome<()> {
    let home = ground.file(&format!("watched-{}", kind.format()));
    let folder = home.join("backups");
    let within = folder.join("vm");
    std::fs::create_dir_all(&within)?;
    let path = within.join("a.img");
    let server = roots(&folder) + "survey_interval_s = 3600\n";
    let mut scene = Scene::told_in(&home, server, &[("a", kind.id(&path))])?;
    let served_from = |scene: &Scene| -> Outcome<Client> {
        scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
        Client::open(&scene.endpoint(), "a")
    };
    let gone = |scene: &Scene, client: &mut Client, what: &str| -> Outcome<()> {
        scene.client.reach_state("a", "Absent", STEP_LIMIT)?;
        let told = reason(scene, "a")?;
        hold!(told.contains("there is no such file"), "{what}: {told:?}");
        hold!(!served(client), "{what}: its client is still served");
        Ok(())
    };
    let lengthen = |bytes: u64| -> Outcome<()> {
        let file = OpenOptions::new().write(true).open(&path)?;
        Ok(file.set_len(bytes)?)
    };
    let size = |scene: &Scene| -> Outcome<u64> {
        Ok(scene.export("a")?.get("Size").map_or(0, |w| w.number()))
    };
    scene.client.reach_state("a", "Absent", STEP_LIMIT)?;
    kind.make(&within, "a.img")?;
    let mut client = served_from(&scene)?;

    // An image that is cut off is another story, and one that is longer is none.
    if kind == Kind::Raw {
        lengthen(2 * BYTES)?;
        until(STEP_LIMIT, "the new size", || {
            Ok((size(&scene)? == 2 * BYTES).then_some(()))
        })?;
        hold!(served(&mut client), "longer: its client was cut off");
        let mark = scene.client.mark();
        lengthen(BYTES)?;
        scene.client.wait_state(mark, "a", "Serving", STEP_LIMIT)?;
        hold!(size(&scene)? == BYTES, "it shows {} bytes", size(&scene)?);
        hold!(!served(&mut client), "shorter: its client is still served");
        client = served_from(&scene)?;
    }
    let aside = within.join("aside.img");
    std::fs::rename(&path, &aside)?;
    gone(&scene, &mut client, "renamed")?;
    std::fs::rename(&aside, &path)?;
    let mut client = served_from(&scene)?;
    let elsewhere = folder.join("elsewhere");
    std::fs::rename(&within, &elsewhere)?;
    gone(&scene, &mut client, "its folder renamed")?;
    std::fs::rename(&elsewhere, &within)?;
    let mut client = served_from(&scene)?;
    let over = Mounted::new(within.clone(), &["-t", "tmpfs", "tmpfs"])?;
    gone(&scene, &mut client, "mounted over")?;
    drop(over);
    let mut client = served_from(&scene)?;
    std::fs::remove_file(&path)?;
    gone(&scene, &mut client, "removed")?;

    // Another file by now, and nobody had the old one any more.
    kind.make(&within, "a.img")?;
    let mut client = served_from(&scene)?;
    let new = kind.make(&within, "new.img")?;
    std::fs::rename(&new, &path)?;
    scene.client.reach_state("a", "Ambiguous", STEP_LIMIT)?;
    hold!(!served(&mut client), "replaced: its client is still served");
    scene.stop()
}

/// Its size is what its header says, so its clients stay; what the file has no more is never zeroes, and nothing is written to what is left.
#[test]
fn an_image_that_is_cut_off_while_it_is_served_is_eio_where_it_is_cut_and_not_written_any_more()
-> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("qemu-img"), Need::Tool("qemu-io")]].concat();
    real("image cut off", &needs, |ground| {
        let home = ground.file("cut");
        let folder = home.join("backups");
        std::fs::create_dir_all(&folder)?;
        let path = Kind::Qcow2.make(&folder, "a.img")?;
        qemu_io(
            &text(&path),
            "qcow2",
            &["write -P 1 0 1M", "write -P 2 4M 1M"],
        )?;
        let server = roots(&folder) + "survey_interval_s = 3600\n";
        let mut scene = Scene::told_in(&home, server, &[("a", Kind::Qcow2.id(&path))])?;
        scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
        let mut client = Client::open(&scene.endpoint(), "a")?;
        let bytes = std::fs::metadata(&path)?.len();
        OpenOptions::new()
            .write(true)
            .open(&path)?
            .set_len(bytes - (1 << 19))?;
        let left = std::fs::read(&path)?;
        let mut found = [0; 4096];
        hold!(
            client.read(0, &mut found)? == Ok(()) && found == [1; 4096],
            "what is there"
        );
        let lost = client.read((5 << 20) - 4096, &mut found)?;
        hold!(lost == Err(5), "what is lost: {lost:?}");
        // In place, anew, and what makes either durable.
        let said = client.write((5 << 20) - 4096, &[3; 4096], true)?;
        hold!(said == Err(5), "a durable write where it is cut: {said:?}");
        let said = client.write(6 << 20, &[3; 4096], true)?;
        hold!(said == Err(5), "a durable write elsewhere: {said:?}");
        hold!(client.flush()? == Err(5), "a flush");
        drop(client);
        scene.stop()?;
        hold!(std::fs::read(&path)? == left, "it was written to");
        // It is not opened for writing again, and what is there is read.
        scene.start()?;
        scene.client.reach_state("a", "Failed", STEP_LIMIT)?;
        let told = reason(&scene, "a")?;
        hold!(told.contains("cut off"), "{told:?}");
        scene.stop()
    })
}

/// One writer is the operator's to see to then; whatever else a lock is answered with, nobody knows who writes.
#[test]
fn a_file_system_without_locks_is_told_in_the_log_and_one_whose_locks_fail_is_refused()
-> Outcome<()> {
    let needs = [NEEDS, &[Need::Loop, Need::Tool("qemu-img")]].concat();
    real("no locks", &needs, |ground| {
        let folder = ground.file("backups");
        std::fs::create_dir(&folder)?;
        let mut scene = Scene::told(ground, roots(&folder), &[])?;
        for (errno, has_none) in [
            (libc::ENOSYS, true),
            (libc::ENOLCK, true),
            (libc::EIO, false),
        ] {
            for kind in Kind::ALL {
                let name = format!("{}-{errno}", kind.format());
                let what = format!("{name}, {has_none}");
                let back = kind.make(&folder, &format!("{name}.back"))?;
                let far = FuseFile::without_locks(&back, &name, errno)?;
                let options = [("wait_ms", zbus::Variant::new(2_000_u32))].into();
                let id = kind.id(&far.file);
                let added = scene.client.add_export_with(&name, &id, options);
                hold!(added.is_ok() == has_none, "{what}: {added:?}");
                let log = std::fs::read_to_string(&scene.home.log)?;
                let told = |line: &&str| {
                    line.contains("the file system has no locks") && line.contains(&text(&far.file))
                };
                let told = log.lines().filter(told).count();
                if has_none {
                    hold!(told == 1, "{what}: told {told} times");
                    let mut client = Client::open(&scene.endpoint(), &name)?;
                    hold!(client.write(0, &[7; 4096], true)? == Ok(()), "{what}");
                    // Nor are its locks taken for lost when it is looked at.
                    scene.client.rescan()?;
                    hold!(scene.state(&name)? == "Serving", "{what}: looked at");
                    hold!(served(&mut client), "{what}: looked at");
                    client.leave()?;
                } else {
                    let why = reason(&scene, &name)?;
                    hold!(told == 0, "{what}: told {told} times");
                    hold!(why.contains("its locks are not to be had"), "{what}: {why}");
                }
                scene.client.remove_export(&name, "hard")?;
            }
        }
        scene.stop()
    })
}
