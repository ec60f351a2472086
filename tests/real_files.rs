//! Plain files are served as disks are: what stands under the path is known by its inode, has one writer, and what is put in
//! its place is served to nobody who did not say so.

mod support;

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};

use nbdtrack::correlation::DiskSeq;
use support::bus::{Bus, Client as Caller};
use support::client::Client;
use support::daemon::Home;
use support::ground::{Ground, Need, real};
use support::loops::{LoopDevice, sparse_file};
use support::pattern;
use support::process;
use support::scene::{STEP_LIMIT, Scene, nbdtrack};
use support::{Outcome, until};

const NEEDS: &[Need] = &[Need::Bus, Need::Tool("nbdcopy")];
const BYTES: u64 = 8 << 20;

fn roots(folder: &Path) -> String {
    format!("file_roots = [{:?}]\n", folder.display().to_string())
}

fn id(path: &Path) -> String {
    format!("file:{}", path.display())
}

/// A folder that may be served from, one file in it, and a daemon that serves it as `a`.
fn serving(ground: &Ground) -> Outcome<(Scene, PathBuf)> {
    let folder = ground.file("backups");
    std::fs::create_dir_all(&folder)?;
    let path = sparse_file(&folder, "a.raw", BYTES)?;
    let scene = Scene::told(ground, roots(&folder), &[("a", id(&path))])?;
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
    real("file served", NEEDS, |ground| {
        let (mut scene, path) = serving(ground)?;
        let uri = scene.endpoint().uri("a");
        let stamped = ground.file("stamped");
        pattern::write_file(&stamped, "a", BYTES, 1)?;
        let limit = STEP_LIMIT;
        process::succeed(
            "nbdcopy",
            &["--flush", &stamped.to_string_lossy(), &uri],
            limit,
        )?;
        let tally = pattern::examine_whole(&path, "a", BYTES, 1)?;
        hold!(tally.all_right(), "in the file: {tally}");
        let back = ground.file("back");
        process::succeed("nbdcopy", &[uri.as_str(), &back.to_string_lossy()], limit)?;
        let tally = pattern::examine_whole(&back, "a", BYTES, 1)?;
        hold!(tally.all_right(), "through the export: {tally}");

        let mut client = Client::open(&scene.endpoint(), "a")?;
        scene.client.prepare_detach(&id(&path))?;
        hold!(!served(&mut client), "its client is still served");
        hold!(
            scene.state("a")? == "Released",
            "it is {}",
            scene.state("a")?
        );
        scene.stop()?;
        scene.start()?;
        scene.client.reach_state("a", "Released", STEP_LIMIT)?;
        scene.client.cancel_detach(&id(&path))?;
        scene.client.reach_state("a", "Serving", STEP_LIMIT)?;
        scene.stop()
    })
}

#[test]
fn what_is_no_file_beneath_a_root_is_refused_by_name() -> Outcome<()> {
    real("no file", NEEDS, |ground| {
        let (mut scene, path) = serving(ground)?;
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
        let (mut scene, path) = serving(ground)?;
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
        let (mut scene, path) = serving(ground)?;
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
        let (mut scene, path) = serving(ground)?;
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
    real("file replaced", NEEDS, |ground| {
        let (mut scene, path) = serving(ground)?;
        let folder = path.parent().unwrap_or(&path).to_owned();
        let mut client = Client::open(&scene.endpoint(), "a")?;
        hold!(client.write(0, &[7; 512], true)?.is_ok(), "cannot write");
        let old = File::open(&path)?;
        let new = sparse_file(&folder, "new.raw", BYTES)?;
        std::fs::rename(&new, &path)?;
        // Noticed by now or not: what is written goes to the file that was agreed on, or nowhere.
        let written = matches!(client.write(4096, &[7; 512], true), Ok(Ok(())));
        let mut bytes = [0; 512];
        old.read_exact_at(&mut bytes, 4096)?;
        hold!(!written || bytes == [7; 512], "the write went elsewhere");
        File::open(&path)?.read_exact_at(&mut bytes, 4096)?;
        hold!(bytes == [0; 512], "the write went to the new file");
        scene.client.reach_state("a", "Ambiguous", STEP_LIMIT)?;
        hold!(!served(&mut client), "its client is still served");
        hold!(
            Client::open(&scene.endpoint(), "a").is_err(),
            "new clients are let in"
        );
        // Also after a restart.
        scene.stop()?;
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
    })
}

#[test]
fn a_file_that_shrinks_grows_or_goes_is_told_and_no_lease_outlives_it() -> Outcome<()> {
    real("file resized", NEEDS, |ground| {
        let (mut scene, path) = serving(ground)?;
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

/// A file system that is mounted over a folder, until it is dropped.
struct MountedOver(PathBuf);

impl MountedOver {
    fn at(folder: &Path) -> Outcome<MountedOver> {
        let at = folder.to_string_lossy();
        process::succeed("mount", &["-t", "tmpfs", "tmpfs", &at], STEP_LIMIT)?;
        Ok(MountedOver(folder.to_owned()))
    }
}

impl Drop for MountedOver {
    fn drop(&mut self) {
        let at = self.0.to_string_lossy();
        let _ = process::run("umount", &["-l", &at], STEP_LIMIT);
    }
}

/// Nobody asks for a survey here, and the interval is an hour.
#[test]
fn what_becomes_of_a_file_is_noticed_at_once_and_ends_the_leases_on_it() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("mount")]].concat();
    real("file watched", &needs, |ground| {
        let folder = ground.file("backups");
        let within = folder.join("vm");
        std::fs::create_dir_all(&within)?;
        let path = within.join("a.raw");
        let server = roots(&folder) + "survey_interval_s = 3600\n";
        let mut scene = Scene::told(ground, server, &[("a", id(&path))])?;
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
        sparse_file(&within, "a.raw", BYTES)?;
        let mut client = served_from(&scene)?;

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

        let mut client = served_from(&scene)?;
        let aside = within.join("aside.raw");
        std::fs::rename(&path, &aside)?;
        gone(&scene, &mut client, "renamed")?;
        std::fs::rename(&aside, &path)?;
        let mut client = served_from(&scene)?;
        let elsewhere = folder.join("elsewhere");
        std::fs::rename(&within, &elsewhere)?;
        gone(&scene, &mut client, "its folder renamed")?;
        std::fs::rename(&elsewhere, &within)?;
        let mut client = served_from(&scene)?;
        let over = MountedOver::at(&within)?;
        gone(&scene, &mut client, "mounted over")?;
        drop(over);
        let mut client = served_from(&scene)?;
        std::fs::remove_file(&path)?;
        gone(&scene, &mut client, "removed")?;

        // Another file by now, and nobody had the old one any more.
        sparse_file(&within, "a.raw", BYTES)?;
        let mut client = served_from(&scene)?;
        let new = sparse_file(&within, "new.raw", BYTES)?;
        std::fs::rename(&new, &path)?;
        scene.client.reach_state("a", "Ambiguous", STEP_LIMIT)?;
        hold!(!served(&mut client), "replaced: its client is still served");
        scene.stop()
    })
}
