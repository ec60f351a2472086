//! nbd-server's configuration, served by nbdtrack: a path is pinned to the volume that was there, a newcomer gets no byte, and the keys
//! that the table says work do.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime};

use nix::sys::signal::Signal;
use support::bus::{Bus, Client as Caller};
use support::client::{Client, Go, knock};
use support::daemon::{Daemon, Home, binary};
use support::ground::{Ground, Need, real, tell};
use support::loops::LoopDevice;
use support::scene::{STEP_LIMIT, Volume};
use support::stream::{Pace, Stream};
use support::{Outcome, Trouble, hold, pattern, process, trouble, until};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus, Need::Tool("nbdcopy")];
const BYTES: u64 = 8 << 20;
/// Between two SIGHUPs.
const HANGUP_EVERY: Duration = Duration::from_millis(10);
/// How late the last of them may be: a thread that sleeps is not always woken in time.
const LATE_MAX: Duration = Duration::from_secs(1);
/// What the daemon may hold more after two thirds of them.
const GROWN_KIB: u64 = 4 << 10;

/// A daemon that was started with nbd-server's configuration, and its caller.
struct Place {
    caller: Caller,
    daemon: Option<Daemon>,
    home: Home,
    conf: PathBuf,
    _bus: Bus,
}

impl Place {
    fn begin(ground: &Ground, generic: &str) -> Outcome<Place> {
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        let conf = ground.file("conf.d");
        fs::create_dir_all(&conf)?;
        home.config = ground.file("nbd-server.conf");
        let text = format!("[generic]\nincludedir = {}\n{generic}", conf.display());
        fs::write(&home.config, text)?;
        let daemon = Some(home.start()?);
        Ok(Place {
            caller: Caller::connect(&bus)?,
            daemon,
            home,
            conf,
            _bus: bus,
        })
    }

    /// Writes one file of `conf.d`; whole or not at all, as an appliance does.
    fn write(&self, file: &str, text: &str) -> Outcome<()> {
        let new = self.conf.join(format!(".{file}.new"));
        // The time of a file is that of the last tick of the kernel's clock, which lies up to 10 ms back.
        let now = SystemTime::now();
        until(STEP_LIMIT, "the file's time to be now", || {
            fs::write(&new, text)?;
            Ok((fs::metadata(&new)?.modified()? >= now).then_some(()))
        })?;
        fs::rename(&new, self.conf.join(file))?;
        Ok(())
    }

    /// Reads the configuration again, and gives what was wrong in it.
    fn reload(&self) -> Result<(), String> {
        let options = std::collections::BTreeMap::<&str, zbus::Variant<'_>>::new();
        match self.caller.call("Reload", &options) {
            Ok(_) => Ok(()),
            Err(refused) => Err(refused.text),
        }
    }

    fn hang_up(&self) -> Outcome<()> {
        match &self.daemon {
            Some(daemon) => daemon.running.signal(Signal::SIGHUP),
            None => trouble!("no daemon"),
        }
    }

    fn reason(&self, export: &str) -> Outcome<String> {
        let found = self.caller.export(export)?.unwrap_or_default();
        Ok(found
            .get("Reason")
            .map_or(String::new(), |w| w.text().to_owned()))
    }

    fn fill(&self, ground: &Ground, export: &str, volume: &Volume, sequence: u64) -> Outcome<()> {
        let file = ground.file("fill.pattern");
        pattern::write_file(&file, &volume.name, volume.bytes, sequence)?;
        let uri = self.home.endpoint().uri(export);
        process::succeed(
            "nbdcopy",
            &["--flush", &file.to_string_lossy(), &uri],
            STEP_LIMIT,
        )?;
        Ok(())
    }

    /// The refusal that a client who asks for the export is told.
    fn refusal(&self, export: &str) -> Outcome<String> {
        match knock(&self.home.endpoint(), export)? {
            Go::Refused { text, .. } => Ok(text),
            other => trouble!("{export} was not refused: {other:?}"),
        }
    }

    /// A command of nbdtrack, on this daemon's bus.
    fn nbdtrack(&self, args: &[&str]) -> Outcome<String> {
        let output = Command::new(binary())
            .args(["--bus", &self.home.bus])
            .args(args)
            .output()?;
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complained = String::from_utf8_lossy(&output.stderr);
        hold!(output.status.success(), "{args:?}: {complained}");
        Ok(said)
    }
}

fn section(name: &str, node: &str, more: &str) -> String {
    format!("[{name}]\nexportname = {node}\n{more}")
}

#[test]
fn files_of_sections_are_served_from_their_folders_each_in_its_format() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("qemu-img"), Need::Tool("qemu-io")]].concat();
    real("nbd-server's files in formats", &needs, |ground| {
        let place = Place::begin(ground, "")?;
        let folder = ground.file("exports");
        fs::create_dir(&folder)?;
        let path = |name: &str| folder.join(name).display().to_string();
        let (image, raw, not) = (path("image.qcow2"), path("raw"), path("not.qcow2"));
        process::succeed(
            "qemu-img",
            &["create", "-q", "-f", "qcow2", &image, "9M"],
            STEP_LIMIT,
        )?;
        let args = ["-f", "qcow2", "-c", "write -P 7 8M 64k", &image];
        process::succeed("qemu-io", &args, STEP_LIMIT)?;
        fs::write(&raw, vec![1; 1 << 20])?;
        fs::write(&not, vec![1; 1 << 20])?;
        let image_bytes = fs::metadata(&image)?.len();
        let size = |name: &str| -> Outcome<u64> {
            let found = place.caller.export(name)?.unwrap_or_default();
            Ok(found.get("Size").map_or(0, |w| w.number()))
        };
        place.write(
            "a.conf",
            &[
                section("image", &image, ""),
                section("raw", &raw, ""),
                section("not", &not, ""),
            ]
            .concat(),
        )?;
        place.reload().or_else(|told| trouble!("{told}"))?;
        place.caller.reach_state("image", "Serving", STEP_LIMIT)?;
        place.caller.reach_state("raw", "Serving", STEP_LIMIT)?;
        hold!(
            (size("image")?, size("raw")?) == (9 << 20, 1 << 20),
            "{} and {} bytes",
            size("image")?,
            size("raw")?
        );
        let uri = place.home.endpoint().uri("image");
        let said = process::succeed(
            "qemu-io",
            &["-f", "raw", "-c", "read -P 7 8M 64k", &uri],
            STEP_LIMIT,
        )?;
        hold!(!said.contains("failed"), "{said}");
        until(
            STEP_LIMIT,
            "the file that is no image to be refused",
            || {
                Ok(place
                    .reason("not")?
                    .contains("does not begin as a QCOW2 image")
                    .then_some(()))
            },
        )?;
        hold!(
            place.refusal("not")?.contains("not.qcow2"),
            "the file is not named"
        );

        let as_raw = section("image", &image, "x-format = raw\nreadonly = true\n");
        place.write("a.conf", &as_raw)?;
        place.reload().or_else(|told| trouble!("{told}"))?;
        until(STEP_LIMIT, "its bytes", || {
            Ok((size("image")? == image_bytes).then_some(()))
        })?;
        place.caller.reach_state("image", "Serving", STEP_LIMIT)?;

        // Only beneath the folders that are said, when some are.
        drop(place);
        let elsewhere = ground.file("elsewhere");
        fs::create_dir(&elsewhere)?;
        let place = Place::begin(ground, &format!("x-file-roots = {}\n", elsewhere.display()))?;
        place.reload().or_else(|told| trouble!("{told}"))?;
        until(STEP_LIMIT, "it to be refused", || {
            Ok(place
                .reason("image")?
                .contains("not beneath any of the file_roots")
                .then_some(()))
        })
    })
}

/// Of each thread of a process: its capabilities, whether it can gain any, and its ids, as proc(5) has them.
fn rights(pid: u32) -> Outcome<BTreeMap<String, BTreeSet<String>>> {
    const WANTED: [&str; 9] = [
        "CapInh",
        "CapPrm",
        "CapEff",
        "CapBnd",
        "CapAmb",
        "NoNewPrivs",
        "Uid",
        "Gid",
        "Groups",
    ];
    let mut all: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    let mut threads = 0;
    for task in fs::read_dir(format!("/proc/{pid}/task"))? {
        // A thread may end meanwhile.
        let Ok(status) = fs::read_to_string(task?.path().join("status")) else {
            continue;
        };
        threads += 1;
        for (key, value) in status.lines().filter_map(|line| line.split_once(':')) {
            if WANTED.contains(&key) {
                let value = value.split_whitespace().collect::<Vec<_>>().join(" ");
                all.entry(key.to_owned()).or_default().insert(value);
            }
        }
    }
    hold!(threads > 3, "{threads} threads are no daemon that serves");
    Ok(all)
}

/// The capabilities that the manual says are kept, as the mask that proc(5) shows. Numbers: linux/capability.h.
fn documented_mask() -> Outcome<String> {
    let manual = include_str!("../docs/migrate-from-nbd-server.md");
    let row = manual.lines().find(|line| line.starts_with("| `user` |"));
    let row = row.unwrap_or_default();
    let mut mask = 0u64;
    for word in row.split(|c: char| !c.is_ascii_uppercase() && c != '_') {
        mask |= match word {
            "CAP_DAC_OVERRIDE" => 1 << 1,
            "CAP_NET_ADMIN" => 1 << 12,
            cap if cap.starts_with("CAP_") => trouble!("{cap}: which number is that?"),
            _ => 0,
        };
    }
    Ok(format!("{mask:016x}"))
}

#[test]
fn with_a_user_the_daemon_has_the_rights_that_the_manual_lists_and_serves_on() -> Outcome<()> {
    real(
        "user and group of nbd-server's configuration",
        NEEDS,
        |ground| {
            // Debian has both; what they own nobody else may read.
            let place = Place::begin(ground, "user = nobody\ngroup = nogroup\n")?;
            let nobody = nix::unistd::User::from_name("nobody")?;
            let Some(nobody) = nobody else {
                trouble!("this machine has no user nobody");
            };
            let folder = ground.file("theirs");
            fs::create_dir(&folder)?;
            let file = folder.join("file");
            fs::write(&file, vec![0; 1 << 20])?;
            for (path, mode) in [(&file, 0o600), (&folder, 0o700)] {
                fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
                nix::unistd::chown(path, Some(nobody.uid), Some(nobody.gid))?;
            }
            let (first, second) = (LoopDevice::add()?, LoopDevice::add()?);
            let a = Volume::make(ground.path(), "vol-a", BYTES)?;
            first.attach(&a.image)?;
            until(STEP_LIMIT, "the daemon to see the disk", || {
                let seen = place.caller.objects("Volume")?;
                let here = |v: &&support::bus::Properties| v["DeviceNode"].text() == first.node();
                Ok(seen.values().find(here).map(|_| ()))
            })?;
            place.write("job.conf", &section("job", &first.node(), ""))?;
            place.write(
                "file.conf",
                &section("file", &file.display().to_string(), ""),
            )?;
            place.hang_up()?;
            place.caller.reach_state("job", "Serving", STEP_LIMIT)?;
            place.caller.reach_state("file", "Serving", STEP_LIMIT)?;
            place.fill(ground, "job", &a, 1)?;

            // The volume comes back at another node, which is opened anew.
            place.caller.prepare_detach(&a.id())?;
            first.detach_now()?;
            second.attach(&a.image)?;
            let served = place.caller.reach_state("job", "Serving", STEP_LIMIT)?;
            hold!(served["DeviceNode"].text() == second.node(), "{served:?}");
            place.fill(ground, "job", &a, 2)?;
            let mut client = Client::open(&place.home.endpoint(), "file")?;
            let written = client.write(0, &[7; 512], true)?;
            hold!(written.is_ok(), "{written:?}");
            hold!(
                fs::read(&file)?.starts_with(&[7; 512]),
                "the file has no byte of it"
            );

            let Some(daemon) = &place.daemon else {
                trouble!("no daemon");
            };
            let found = rights(daemon.pid())?;
            let kept = documented_mask()?;
            let zero = format!("{:016x}", 0);
            let group = nix::unistd::Group::from_name("nogroup")?;
            let gid = group.map_or(String::new(), |group| group.gid.to_string());
            for (key, wanted) in [
                ("CapInh", zero.as_str()),
                ("CapPrm", &kept),
                ("CapEff", &kept),
                ("CapBnd", &kept),
                ("CapAmb", &zero),
                ("NoNewPrivs", "1"),
                ("Uid", "0 0 0 0"),
                ("Gid", &[gid.as_str(); 4].join(" ")),
                ("Groups", ""),
            ] {
                let has = found.get(key).into_iter().flatten().collect::<Vec<_>>();
                hold!(
                    has == [wanted],
                    "{key} of all threads: {has:?}, wanted {wanted}"
                );
            }
            drop(client);

            // As the stock server: it does not start.
            drop(place);
            for key in ["user", "group"] {
                let mut home = Home::new(ground.path(), "none")?;
                home.config = ground.file("unknown.conf");
                fs::write(&home.config, format!("[generic]\n{key} = no-such-one\n"))?;
                let Err((status, said)) = home.try_start()? else {
                    trouble!("an unknown {key} was taken");
                };
                let wanted = format!(
                    "{}:2:1: [generic]: {key} \"no-such-one\": there is no such {key}",
                    home.config.display()
                );
                hold!(
                    !status.success() && said.contains(&wanted),
                    "{status}: {said}"
                );
            }
            Ok(())
        },
    )
}

/// What the stock server does wrong after a swap: it opens the path for each connection, so the next client writes to the newcomer and
/// is told that all is well.
#[test]
fn newcomer_at_the_path_gets_no_byte_and_the_volume_is_followed() -> Outcome<()> {
    real("nbd-server's paths", NEEDS, |ground| {
        let place = Place::begin(ground, "")?;
        let (first, second) = (LoopDevice::add()?, LoopDevice::add()?);
        let a = Volume::make(ground.path(), "vol-a", BYTES)?;
        let b = Volume::make(ground.path(), "vol-b", BYTES)?;
        first.attach(&a.image)?;
        until(STEP_LIMIT, "the daemon to see the disk", || {
            let seen = place.caller.objects("Volume")?;
            let here = |v: &&support::bus::Properties| v["DeviceNode"].text() == first.node();
            Ok(seen.values().find(here).map(|_| ()))
        })?;
        place.write("job.conf", &section("job", &first.node(), ""))?;
        place.hang_up()?;
        place.caller.reach_state("job", "Serving", STEP_LIMIT)?;
        place.fill(ground, "job", &a, 1)?;

        // The volume leaves and another one has its name.
        place.caller.prepare_detach(&a.id())?;
        first.detach_now()?;
        first.attach(&b.image)?;
        until(STEP_LIMIT, "the daemon to see the newcomer", || {
            Ok(place
                .reason("job")?
                .contains("IdentityMismatch")
                .then_some(()))
        })?;
        let told = place.refusal("job")?;
        for part in [
            "IdentityMismatch",
            "vol-a.img",
            "vol-b.img",
            "nbdtrack repin job --diskseq",
        ] {
            hold!(told.contains(part), "{told}");
        }
        // A reload, with the file as it was or written again, changes nothing about that.
        place.write("job.conf", &section("job", &first.node(), ""))?;
        hold!(place.reload().is_ok(), "reload");
        hold!(
            place.refusal("job")?.contains("IdentityMismatch"),
            "after a reload"
        );

        second.attach(&a.image)?;
        let served = place.caller.reach_state("job", "Serving", STEP_LIMIT)?;
        hold!(served["DeviceNode"].text() == second.node(), "{served:?}");
        place.fill(ground, "job", &a, 2)?;

        place.caller.prepare_detach(&a.id())?;
        second.detach_now()?;
        let written = a.examine(2)?;
        hold!(written.all_right(), "vol-a: {written}");
        hold!(
            fs::read(&b.image)?.iter().all(|byte| *byte == 0),
            "vol-b was written to"
        );
        Ok(())
    })
}

#[test]
fn disk_that_was_there_before_the_daemon_waits_to_be_confirmed_and_stays_so_over_a_restart()
-> Outcome<()> {
    real("pins of nbd-server's paths", NEEDS, |ground| {
        let device = LoopDevice::add()?;
        let a = Volume::make(ground.path(), "vol-a", BYTES)?;
        device.attach(&a.image)?;
        let mut place = Place::begin(ground, "")?;
        place.write("job.conf", &section("job", &device.node(), ""))?;
        // A loop device's node is older than what is attached to it: nothing says that it was there before the line, but the daemon,
        // and that one has seen it only now. Unless it has: then it is pinned.
        hold!(place.reload().is_ok(), "reload");
        place.caller.reach_state("job", "Serving", STEP_LIMIT)?;
        // Another one, whose disk comes after its line.
        let late = LoopDevice::add()?;
        let b = Volume::make(ground.path(), "vol-b", BYTES)?;
        place.write("late.conf", &section("late", &late.node(), ""))?;
        hold!(place.reload().is_ok(), "reload");
        late.attach(&b.image)?;
        place.caller.reach_state("late", "Failed", STEP_LIMIT)?;
        hold!(
            place.refusal("late")?.contains("pin needs confirmation"),
            "{}",
            place.refusal("late")?
        );
        let pending = place.nbdtrack(&["pins", "--pending"])?;
        let shown = ["vol-b.img", &BYTES.to_string()];
        hold!(
            shown.iter().all(|word| pending.contains(word)) && !pending.contains("vol-a.img"),
            "{pending}"
        );

        let daemon = place.daemon.take();
        if let Some(daemon) = daemon {
            daemon.stop()?;
        }
        place.daemon = Some(place.home.start()?);
        place.caller.reach_state("job", "Serving", STEP_LIMIT)?;
        place.caller.reach_state("late", "Failed", STEP_LIMIT)?;
        let pending = place.nbdtrack(&["pins", "--pending"])?;
        hold!(
            pending.contains("first read (diskseq")
                && pending.contains("this disk came after the line was written"),
            "the first reason, over the restart: {pending}"
        );
        let said = place.nbdtrack(&["pins", "confirm", "--all"])?;
        hold!(said.contains("late") && !said.contains("job"), "{said}");
        place.caller.reach_state("late", "Serving", STEP_LIMIT)?;
        place.fill(ground, "late", &b, 1)?;
        let all = place.nbdtrack(&["--json", "pins"])?;
        hold!(all.contains("\"pinned_to\": \"loop:"), "{all}");
        let wrong = place.nbdtrack(&["repin", "late", "--diskseq", "999999999"]);
        hold!(wrong.is_err(), "a disk that is not there was taken");
        // Under a client its path means what it meant, and a person is told what to type next about that client.
        let mut client = Client::open(&place.home.endpoint(), "late")?;
        let diskseq = late.diskseq()?.to_string();
        let repin = ["repin", "late", "--diskseq", &diskseq];
        for refused in [&repin[..], &["unpin", "late"]] {
            let told = place.nbdtrack(refused);
            let says = |why: &Trouble| {
                why.0.contains("'nbdtrack sessions late' lists them") && !why.0.contains("share")
            };
            hold!(told.as_ref().is_err_and(says), "{refused:?}: {told:?}");
        }
        hold!(client.read(0, &mut [0; 512])? == Ok(()), "it goes on");
        // And others come as before.
        Client::open(&place.home.endpoint(), "late")?;
        drop(client);
        until(STEP_LIMIT, "the clients to be gone", || {
            let sessions = place.nbdtrack(&["--json", "sessions", "late"])?;
            Ok((!sessions.contains("peer")).then_some(()))
        })?;
        place.nbdtrack(&["unpin", "late"])?;
        place.caller.reach_state("late", "Failed", STEP_LIMIT)?;
        Ok(())
    })
}

#[test]
fn broken_file_keeps_its_last_good_state_and_the_rest_is_applied() -> Outcome<()> {
    real("nbd-server's files", NEEDS, |ground| {
        let place = Place::begin(ground, "")?;
        let device = LoopDevice::add()?;
        let a = Volume::make(ground.path(), "vol-a", BYTES)?;
        device.attach(&a.image)?;
        let volume = format!("x-volume = {}\n", a.id());
        place.write("a.conf", &section("one", &device.node(), &volume))?;
        hold!(place.reload().is_ok(), "reload");
        place.caller.reach_state("one", "Serving", STEP_LIMIT)?;
        let mut client = Client::open(&place.home.endpoint(), "one")?;
        for broken in ["[one", "", "[one]\nreadonly = yes\nexportname = /dev/x\n"] {
            place.write("a.conf", broken)?;
            place.write(
                "b.conf",
                &section("two", "/dev/none", "x-volume = serial:WD-WMAP9A966149\n"),
            )?;
            let told = place.reload();
            hold!(
                told.as_ref()
                    .is_err_and(|text| text.contains("a.conf:1:") || text.contains("a.conf:2:")),
                "{broken:?}: {told:?}"
            );
            place.caller.reach_state("two", "Absent", STEP_LIMIT)?;
            hold!(client.flush()?.is_ok(), "the client of [one] was disturbed");
            fs::remove_file(place.conf.join("b.conf"))?;
        }
        // The folder itself, for a moment or for its mistyped name.
        place.write("a.conf", &section("one", &device.node(), &volume))?;
        hold!(place.reload().is_ok(), "reload");
        let aside = ground.file("aside");
        fs::rename(&place.conf, &aside)?;
        for _ in 0..2 {
            let told = place.reload().err().unwrap_or_default();
            hold!(
                told.contains(&format!("{}:1:1: includedir", place.conf.display())),
                "{told}"
            );
            hold!(client.flush()?.is_ok(), "the client of [one] was disturbed");
        }
        fs::rename(&aside, &place.conf)?;
        hold!(place.reload().is_ok(), "it is back");
        hold!(client.flush()?.is_ok(), "the client of [one] was disturbed");
        // What goes, goes.
        fs::remove_file(place.conf.join("a.conf"))?;
        hold!(place.reload().is_ok(), "reload");
        let gone = until(STEP_LIMIT, "the export to go", || {
            Ok(place.caller.export("one")?.is_none().then_some(()))
        });
        gone?;
        // TLS is refused loudly, and so is what is not built.
        for line in [
            "force_tls = true",
            "tlsonly = true",
            "copyonwrite = true",
            "transactionlog = /tmp/x",
        ] {
            place.write("a.conf", &section("one", &device.node(), line))?;
            let told = place.reload();
            let key = line.split(' ').next().unwrap_or_default();
            hold!(
                told.as_ref()
                    .is_err_and(|text| text.contains(&format!("{key} is refused"))),
                "{line}: {told:?}"
            );
            hold!(
                place.caller.export("one")?.is_none(),
                "{line}: it is served"
            );
        }
        Ok(())
    })
}

/// The line at the end said how many went, and none which.
#[test]
fn each_section_that_comes_changes_or_goes_has_its_line_in_the_log() -> Outcome<()> {
    real("lines of a reload", &[Need::Bus], |ground| {
        let place = Place::begin(ground, "")?;
        let text = |sections: &[(&str, &str)]| {
            let sections = sections
                .iter()
                .map(|(name, more)| section(name, "/dev/none", more));
            sections.collect::<String>()
        };
        let mut seen = 0;
        for (sections, wanted) in [
            (
                vec![("stays", ""), ("one", ""), ("two", "")],
                vec![
                    "added to the configuration export=one",
                    "added to the configuration export=stays",
                    "added to the configuration export=two",
                    "added 3, changed 0, removed 0, unchanged 0, refused 0",
                ],
            ),
            (
                vec![
                    ("stays", ""),
                    ("one", "readonly = true\n"),
                    ("three", ""),
                    ("bad", "copyonwrite = true\n"),
                ],
                vec![
                    "changed in the configuration export=one",
                    "added to the configuration export=three",
                    "removed from the configuration export=two",
                    "[bad]: copyonwrite is refused",
                    "added 1, changed 1, removed 1, unchanged 1, refused 1",
                ],
            ),
            (
                vec![("stays", ""), ("one", "readonly = true\n"), ("three", "")],
                vec!["added 0, changed 0, removed 0, unchanged 3, refused 0"],
            ),
        ] {
            place.write("a.conf", &text(&sections))?;
            let _told = place.reload();
            // A thread of its own writes it.
            let log = until(STEP_LIMIT, "the summary", || {
                let log = fs::read_to_string(&place.home.log)?;
                let there = wanted.last().is_some_and(|last| log[seen..].contains(last));
                Ok(there.then_some(log))
            })?;
            let new = &log[seen..];
            for words in &wanted {
                hold!(new.matches(words).count() == 1, "{words:?}: {new}");
            }
            let lines = new.matches(" the configuration export=").count();
            let named = wanted
                .iter()
                .filter(|words| words.contains("export="))
                .count();
            hold!(lines == named, "{lines} lines and not {named}: {new}");
            seen = log.len();
        }
        Ok(())
    })
}

#[test]
fn keys_that_work_do_what_the_stock_server_does() -> Outcome<()> {
    real("nbd-server's keys", NEEDS, |ground| {
        let mut place = Place::begin(ground, "")?;
        let device = LoopDevice::add()?;
        let a = Volume::make(ground.path(), "vol-a", BYTES)?;
        device.attach(&a.image)?;
        let volume = format!("x-volume = {}\n", a.id());
        let allowed = ground.file("allowed");
        fs::write(&allowed, "10.1.2.3\n")?;
        let of = |more: &str| section("one", &device.node(), &format!("{volume}{more}"));
        let text = format!(
            "{}{}",
            of("maxconnections = 1\nsync = true\n"),
            section("two", &device.node(), &format!("{volume}readonly = true\n"))
        );
        place.write("a.conf", &text)?;
        hold!(place.reload().is_ok(), "reload");
        place.caller.reach_state("one", "Serving", STEP_LIMIT)?;
        place.caller.reach_state("two", "Serving", STEP_LIMIT)?;
        // maxconnections is of live ones; the stock server counts those that have left, too.
        for _ in 0..3 {
            let mut client = Client::open(&place.home.endpoint(), "one")?;
            hold!(
                place.refusal("one")?.contains("has 1 clients"),
                "{}",
                place.refusal("one")?
            );
            hold!(client.write(0, &[7; 4096], false)?.is_ok(), "a write");
            client.leave()?;
            until(STEP_LIMIT, "the client to be gone", || {
                let export = place.caller.export("one")?.unwrap_or_default();
                Ok((export["Clients"].number() == 0).then_some(()))
            })?;
        }
        let mut client = Client::open(&place.home.endpoint(), "two")?;
        hold!(
            client.write(0, &[7; 4096], false)?.is_err(),
            "readonly was written to"
        );
        client.leave()?;
        // sync: each write is durable before it is answered. The kernel counts what it has the disk flush (field 16 of "stat", see
        // Documentation/block/stat.rst).
        let flushes = || -> Outcome<u64> {
            let stat = fs::read_to_string(format!("/sys/block/{}/stat", device.name()))?;
            Ok(stat.split_whitespace().nth(15).unwrap_or("0").parse()?)
        };
        for (line, wanted) in [("sync = true\n", 8), ("sync = false\n", 0), ("", 0)] {
            place.write("a.conf", &of(line))?;
            hold!(place.reload().is_ok(), "reload");
            place.caller.reach_state("one", "Serving", STEP_LIMIT)?;
            let mut client = Client::open(&place.home.endpoint(), "one")?;
            hold!(client.flush()?.is_ok(), "a flush");
            let before = flushes()?;
            for offset in (0..8).map(|block| block * 4096) {
                hold!(client.write(offset, &[7; 4096], false)?.is_ok(), "a write");
            }
            let made = flushes()? - before;
            hold!(made == wanted, "{line:?}: {made} flushes for 8 writes");
            client.leave()?;
        }
        // rotational: as the section says, or else the disk.
        let queue = format!("/sys/block/{}/queue/rotational", device.name());
        for disk_turns in [true, false] {
            fs::write(&queue, u8::from(disk_turns).to_string())?;
            // An image is asked when it is opened.
            fs::remove_file(place.conf.join("a.conf"))?;
            hold!(place.reload().is_ok(), "reload");
            for (line, wanted) in [
                ("", disk_turns),
                ("rotational = true\n", true),
                ("rotational = false\n", false),
            ] {
                place.write("a.conf", &of(line))?;
                hold!(place.reload().is_ok(), "reload");
                place.caller.reach_state("one", "Serving", STEP_LIMIT)?;
                let client = Client::open(&place.home.endpoint(), "one")?;
                // proto.md "Transmission flags": bit 4
                let told = client.flags & (1 << 4) != 0;
                hold!(
                    told == wanted,
                    "a disk that says {disk_turns}, {line:?}: {told}"
                );
                client.leave()?;
            }
        }
        // authfile: a client on a Unix socket has no address; no file admits no one.
        for authfile in [allowed.display().to_string(), "/nowhere/at/all".to_owned()] {
            place.write("a.conf", &of(&format!("authfile = {authfile}\n")))?;
            hold!(place.reload().is_ok(), "reload");
            hold!(
                place.refusal("one")?.contains("authfile"),
                "{}",
                place.refusal("one")?
            );
        }
        // Two sections of one volume: it is the first one's that a client binds, and free when that has left.
        let both = |share: &str| {
            format!(
                "{}{}",
                section("one", &device.node(), &format!("{volume}{share}")),
                section("other", &device.node(), &format!("{volume}{share}"))
            )
        };
        place.write("a.conf", &both(""))?;
        hold!(place.reload().is_ok(), "reload");
        place.caller.reach_state("one", "Serving", STEP_LIMIT)?;
        place.caller.reach_state("other", "Serving", STEP_LIMIT)?;
        let client = Client::open(&place.home.endpoint(), "one")?;
        let told = place.refusal("other")?;
        hold!(
            told.contains("InUse") && told.contains("export one"),
            "{told}"
        );
        client.leave()?;
        let other = until(STEP_LIMIT, "the volume to be free", || {
            Ok(Client::open(&place.home.endpoint(), "other").ok())
        })?;
        other.leave()?;
        place.write("a.conf", &both("x-share = true\n"))?;
        hold!(place.reload().is_ok(), "reload");
        place.caller.reach_state("one", "Serving", STEP_LIMIT)?;
        place.caller.reach_state("other", "Serving", STEP_LIMIT)?;
        let (one, other) = (
            Client::open(&place.home.endpoint(), "one")?,
            Client::open(&place.home.endpoint(), "other")?,
        );
        one.leave()?;
        other.leave()?;
        // allowlist.
        let list = |place: &Place| {
            let uri = place.home.endpoint().uri("");
            process::run("nbdinfo", &["--list", &uri], STEP_LIMIT)
        };
        if process::installed("nbdinfo") {
            let found = list(&place)?;
            hold!(!found.status.success(), "LIST without allowlist");
            let text = format!(
                "[generic]\nincludedir = {}\nallowlist = true\n",
                place.conf.display()
            );
            fs::write(&place.home.config, text)?;
            hold!(place.reload().is_ok(), "reload");
            let found = list(&place)?;
            hold!(found.status.success(), "LIST with allowlist");
        }
        if let Some(daemon) = place.daemon.take() {
            daemon.stop()?;
        }
        Ok(())
    })
}

#[test]
fn main_file_that_is_refused_keeps_the_daemon_from_starting() -> Outcome<()> {
    real("nbd-server's main file", &[], |ground| {
        let home = Home {
            config: ground.file("nbd-server.conf"),
            ..Home::new(ground.path(), "none")?
        };
        for (line, says) in [
            ("keyfile = /etc/key", "keyfile is refused: TLS"),
            ("oldstyle = true", "oldstyle is refused"),
            ("port = telnet", "port"),
            ("allowlist = yes", "no boolean"),
        ] {
            fs::write(&home.config, format!("[generic]\n{line}\n"))?;
            match home.try_start()? {
                Ok(_) => trouble!("{line}: it serves"),
                Err((_, said)) => hold!(said.contains(says), "{line}: {said}"),
            }
        }
        Ok(())
    })
}

#[test]
fn partition_is_refused_by_its_name_with_what_to_do_and_its_disk_is_untouched() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("losetup"), Need::Tool("addpart")]].concat();
    real("partitions in nbd-server's files", &needs, |ground| {
        let device = LoopDevice::add()?;
        let volume = Volume::make(ground.path(), "vol-a", BYTES)?;
        let (node, image) = (device.node(), volume.image.display().to_string());
        // As a kernel that reads partition tables does; this one need not know any.
        process::succeed("losetup", &["--partscan", &node, &image], STEP_LIMIT)?;
        process::succeed("addpart", &[&node, "1", "2048", "8192"], STEP_LIMIT)?;
        let part = format!("{node}p1");
        let link = ground.file("by-id-part1");
        std::os::unix::fs::symlink(&part, &link)?;
        let link = link.display().to_string();
        let place = Place::begin(ground, "")?;
        for path in [&part, &link] {
            // A link elsewhere than beneath /dev is a file to the configuration.
            let path = match path.starts_with("/dev/") {
                true => path.clone(),
                false => format!("/dev/..{path}"),
            };
            for more in ["", "x-trust-path = true\n"] {
                place.write("a.conf", &section("part", &path, more))?;
                let told = place.reload().err().unwrap_or_default();
                for says in [
                    "a.conf:1:1: [part]: exportname",
                    "is refused: it is a partition of",
                    &node,
                    "a volume of its own",
                ] {
                    hold!(told.contains(says), "{path}: {told}");
                }
                hold!(place.caller.export("part")?.is_none(), "it is an export");
            }
        }
        let config = place.home.config.display().to_string();
        let check = place.nbdtrack(&["check", "--config", &config]);
        hold!(
            check.is_err_and(|error| error.to_string().contains("is a partition of")),
            "check does not say so"
        );
        // The disk as a whole is another matter, and its partition is nobody's.
        place.write("a.conf", &section("part", &node, "x-trust-path = true\n"))?;
        hold!(place.reload().is_ok(), "the whole disk");
        place.caller.reach_state("part", "Serving", STEP_LIMIT)?;
        Ok(())
    })
}

/// The guest on the volume wrote a partition table, and udev's rules led the link to the partition: the next reload, for another file's
/// sake, ended the clients of a section that nobody had touched, and said that it stays as it was.
#[test]
fn section_that_is_refused_at_a_reload_keeps_its_clients() -> Outcome<()> {
    let needs = [NEEDS, &[Need::Tool("losetup"), Need::Tool("addpart")]].concat();
    real("refused sections' clients", &needs, |ground| {
        let (device, other) = (LoopDevice::add()?, LoopDevice::add()?);
        let a = Volume::make(ground.path(), "vol-a", BYTES)?;
        let b = Volume::make(ground.path(), "vol-b", BYTES)?;
        device.attach(&a.image)?;
        let (node, image) = (other.node(), b.image.display().to_string());
        process::succeed("losetup", &["--partscan", &node, &image], STEP_LIMIT)?;
        process::succeed("addpart", &[&node, "1", "2048", "8192"], STEP_LIMIT)?;
        let (link, new) = (ground.file("vol-a"), ground.file("vol-a.new"));
        let lead = |to: &str| -> Outcome<()> {
            std::os::unix::fs::symlink(to, &new)?;
            Ok(fs::rename(&new, &link)?)
        };
        lead(&device.node())?;
        let folder = ground.file("files");
        fs::create_dir(&folder)?;
        let file = folder.join("a.raw").display().to_string();
        fs::write(&file, vec![1; 1 << 20])?;

        let place = Place::begin(ground, "")?;
        // A link elsewhere than beneath /dev is a file to the configuration.
        let job = section("job", &format!("/dev/..{}", link.display()), "");
        place.write("job.conf", &job)?;
        place.write("file.conf", &section("file", &file, ""))?;
        hold!(place.reload().is_ok(), "reload");
        let names = ["job", "file"];
        let mut clients = Vec::new();
        let mut before = Vec::new();
        for name in names {
            before.push(place.caller.reach_state(name, "Serving", STEP_LIMIT)?);
            clients.push(Client::open(&place.home.endpoint(), name)?);
        }
        let mut undisturbed = |when: &str| -> Outcome<()> {
            for ((name, before), client) in names.into_iter().zip(&before).zip(&mut clients) {
                let wrote = client.write(0, &[7; 512], true)?;
                hold!(wrote.is_ok(), "{when}: the client of {name}: {wrote:?}");
                let now = place.caller.reach_state(name, "Serving", STEP_LIMIT)?;
                for property in ["Generation", "VolumeId", "DeviceNode"] {
                    hold!(now[property] == before[property], "{when}: {name}: {now:?}");
                }
                // And whoever comes is served as before.
                Client::open(&place.home.endpoint(), name)?;
            }
            Ok(())
        };
        undisturbed("before")?;

        lead(&format!("{node}p1"))?;
        place.write("more.conf", &section("more", "/dev/none", ""))?;
        for when in ["the link leads to a partition", "and again"] {
            let told = place.reload().err().unwrap_or_default();
            for says in ["job.conf:1:1: [job]", "a partition of", "stays as it was"] {
                hold!(told.contains(says), "{when}: {told}");
            }
            hold!(
                place.caller.export("more")?.is_some(),
                "the rest is applied"
            );
            undisturbed(when)?;
        }
        // As written it cannot be looked up.
        place.write(
            "file.conf",
            &section("file", &file.replace("/a.raw", "//a.raw"), ""),
        )?;
        let told = place.reload().err().unwrap_or_default();
        hold!(told.contains("file.conf:1:1: [file]: exportname"), "{told}");
        undisturbed("the path is mistyped")?;
        // A broken file keeps the section that was taken last, not the one that was refused.
        place.write("file.conf", "[file")?;
        hold!(place.reload().is_err(), "the file is broken");
        undisturbed("the file is broken, too")?;
        let log = fs::read_to_string(&place.home.log)?;
        hold!(!log.contains("removed 1"), "an export was removed: {log}");

        lead(&device.node())?;
        place.write("file.conf", &section("file", &file, ""))?;
        hold!(place.reload().is_ok(), "all is well again");
        undisturbed("all is well again")
    })
}

/// The section was refused, for an export of its name is another volume; what its authfile says came into force all the same, and the clients
/// of that export, which was to stay as it was, were turned away.
#[test]
fn section_that_is_refused_has_no_say_in_who_comes_to_the_export_of_its_name() -> Outcome<()> {
    real("refused sections' rules", NEEDS, |ground| {
        let place = Place::begin(ground, "")?;
        let device = LoopDevice::add()?;
        let a = Volume::make(ground.path(), "vol-a", BYTES)?;
        device.attach(&a.image)?;
        place.caller.add_export("one", &a.id())?;
        place.caller.reach_state("one", "Serving", STEP_LIMIT)?;
        let come = |when: &str| match Client::open(&place.home.endpoint(), "one") {
            Ok(_) => Ok(()),
            Err(error) => trouble!("{when}: {error}"),
        };
        come("before")?;
        let nobody = format!("authfile = {}\n", ground.file("none").display());
        let other = format!("x-volume = serial:WD-WMAP9A966149\n{nobody}");
        place.write("one.conf", &section("one", "/dev/none", &other))?;
        hold!(place.reload().is_ok(), "reload");
        let log = fs::read_to_string(&place.home.log)?;
        hold!(log.contains("refused 1"), "the section is taken: {log}");
        come("its section is refused")?;
        // As the volume that it is, it is taken, and so is what it says.
        let same = format!("x-volume = {}\n{nobody}", a.id());
        place.write("one.conf", &section("one", &device.node(), &same))?;
        hold!(place.reload().is_ok(), "reload");
        hold!(
            place.refusal("one")?.contains("authfile"),
            "{}",
            place.refusal("one")?
        );
        Ok(())
    })
}

/// The stock server closes every connection after a SIGHUP that brings no new section, and crashes after some thirty that do. A hundred a
/// second: 300, or as many as `NBDTRACK_HANGUPS` says.
#[test]
fn hundred_hangups_a_second_disturb_no_client_of_an_unchanged_export() -> Outcome<()> {
    real("100 SIGHUPs a second", NEEDS, |ground| {
        let hangups: u32 = match std::env::var("NBDTRACK_HANGUPS") {
            Ok(number) => number.parse()?,
            Err(_) => 300,
        };
        let names = ["vol-a", "vol-b", "vol-c"];
        // Before the daemon, which holds them until it ends.
        let devices = [LoopDevice::add()?, LoopDevice::add()?, LoopDevice::add()?];
        let place = Place::begin(ground, "")?;
        for (name, device) in names.into_iter().zip(&devices) {
            let volume = Volume::make(ground.path(), name, BYTES)?;
            device.attach(&volume.image)?;
            let more = format!("x-volume = {}\n", volume.id());
            place.write(
                &format!("{name}.conf"),
                &section(name, &device.node(), &more),
            )?;
        }
        hold!(place.reload().is_ok(), "reload");
        let mut streams = Vec::new();
        for name in names {
            place.caller.reach_state(name, "Serving", STEP_LIMIT)?;
            let endpoint = place.home.endpoint();
            streams.push(Stream::start(&endpoint, name, name, Pace::BYSTANDER, 0)?);
        }
        let Some(daemon) = &place.daemon else {
            trouble!("no daemon");
        };
        let (before, open) = (daemon.holdings()?, daemon.descriptors()?);
        let mut warm = None;
        let began = Instant::now();
        for n in 0..hangups {
            std::thread::sleep(
                (began + HANGUP_EVERY * n).saturating_duration_since(Instant::now()),
            );
            // Each tenth brings another section, and takes the last one away.
            if n % 10 == 0 {
                let other = format!(
                    "[other-{n}]\nx-volume = serial:WD-WMAP9A96{n:05}\nexportname = /dev/none\n"
                );
                place.write("b.conf", &other)?;
            }
            place.hang_up()?;
            if n == hangups / 3 {
                warm = Some(daemon.holdings()?);
            }
        }
        let took = began.elapsed();
        // By construction, on a machine that lets this thread run at all.
        let planned = HANGUP_EVERY * hangups;
        hold!(took <= planned + LATE_MAX, "they took {took:?}");
        fs::remove_file(place.conf.join("b.conf"))?;
        hold!(place.reload().is_ok(), "the last reload");
        // The clients stream on, and may have more disk threads than then.
        let after = daemon.gives_back(&open, 8, usize::MAX)?;
        let (mut longest, mut writes) = (Duration::ZERO, 0);
        for (name, stream) in names.into_iter().zip(streams) {
            let report = stream.finish()?;
            hold!(report.broken.is_none(), "{name}: {:?}", report.broken);
            hold!(
                report.wrong_read.is_none(),
                "{name}: {:?}",
                report.wrong_read
            );
            longest = longest.max(report.longest_stall);
            writes += report.writes;
        }
        let exports = place.caller.objects("Export")?.len();
        hold!(exports == names.len(), "{exports} exports are left");
        // Some come while one is read, and have the next one for all of them.
        let log = fs::read_to_string(&place.home.log)?;
        let reloads = log.matches(", unchanged ").count();
        hold!(
            reloads > usize::try_from(hangups)? / 10,
            "{reloads} reloads for {hangups} SIGHUPs"
        );
        let Some(warm) = warm else {
            trouble!("no SIGHUP was sent");
        };
        let resident = [before, warm, after].map(|holdings| holdings.resident_kib);
        let grown = resident[2].saturating_sub(resident[1]);
        hold!(grown < GROWN_KIB, "it keeps {grown} KiB more: {resident:?}");
        let [first, third, last] = resident;
        tell(&format!(
            "{hangups} SIGHUPs in {} ms: {reloads} reloads; resident {first} KiB before, {third} after a third, {last} at the end; \
             three clients wrote {writes} times, the longest stall was {} ms",
            took.as_millis(),
            longest.as_millis(),
        ));
        Ok(())
    })
}

#[test]
fn ten_thousand_sections_are_read_again_while_a_client_goes_on() -> Outcome<()> {
    real("10,000 sections", NEEDS, |ground| {
        // Before the daemon, which holds it until it ends.
        let device = LoopDevice::add()?;
        let place = Place::begin(ground, "")?;
        let a = Volume::make(ground.path(), "vol-a", BYTES)?;
        device.attach(&a.image)?;
        let mut text = section("vol-a", &device.node(), &format!("x-volume = {}\n", a.id()));
        for n in 0..9_999 {
            text.push_str(&section(
                &format!("none-{n}"),
                &format!("/dev/none-{n}"),
                "",
            ));
        }
        place.write("a.conf", &text)?;
        let began = Instant::now();
        hold!(place.reload().is_ok(), "reload");
        let first = began.elapsed();
        place.caller.reach_state("vol-a", "Serving", STEP_LIMIT)?;
        let stream = Stream::start(&place.home.endpoint(), "vol-a", "vol-a", Pace::BYSTANDER, 0)?;
        let changed = text.replace("[none-7]\n", "[none-7]\nreadonly = true\n");
        place.write("a.conf", &changed)?;
        let began = Instant::now();
        hold!(place.reload().is_ok(), "reload");
        let one = began.elapsed();
        let log = fs::read_to_string(&place.home.log)?;
        let summary = "added 0, changed 1, removed 0, unchanged 9999, refused 0";
        hold!(log.contains(summary), "no line says {summary:?}");
        let report = stream.finish()?;
        hold!(report.broken.is_none(), "bystander: {:?}", report.broken);
        tell(&format!(
            "10,000 sections: first read in {} ms, one change in {} ms, the bystander's longest stall {} ms",
            first.as_millis(),
            one.as_millis(),
            report.longest_stall.as_millis()
        ));
        Ok(())
    })
}
