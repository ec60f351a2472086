//! What callers of the live daemon can rely on: how exports are removed, sessions ended, the configuration read again, and
//! long calls watched.

use std::collections::BTreeMap;
use std::io::Write;

use support::bus::{Client as Caller, Options, ROOT, Refused, Signal, Word};
use support::client::{
    CMD_READ, Client, Go, OPT_LIST, REP_ACK, REP_ERR_POLICY, REP_ERR_UNKNOWN, REP_SERVER, greet,
    knock, read_option_reply, request, send_option,
};
use support::fuse_disk::{ALL, FuseDisk};
use support::ground::{Ground, Need, real};
use support::loops::LoopDevice;
use support::scene::{STEP_LIMIT, Scene, Volume, nbdtrack};
use support::{Outcome, hold, trouble, until};
use zbus::{OwnedVariant, Variant};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 4 << 20;

/// A daemon, and the export `made` that was added over D-Bus.
fn made(ground: &Ground) -> Outcome<(LoopDevice, Volume, Scene)> {
    let volume = Volume::make(ground.path(), "made", BYTES)?;
    let device = LoopDevice::add()?;
    device.attach(&volume.image)?;
    let scene = Scene::empty(ground)?;
    scene.client.add_export("made", &volume.id())?;
    scene.client.reach_state("made", "Serving", STEP_LIMIT)?;
    Ok((device, volume, scene))
}

/// What LIST answers.
fn listed(scene: &Scene) -> Outcome<Vec<String>> {
    let socket = scene.endpoint().connect()?;
    greet(&socket)?;
    send_option(&socket, OPT_LIST, b"")?;
    let mut names = Vec::new();
    loop {
        match read_option_reply(&socket)? {
            (OPT_LIST, REP_SERVER, data) => {
                let name = data.get(4..).unwrap_or_default();
                names.push(String::from_utf8_lossy(name).into_owned());
            }
            (OPT_LIST, REP_ACK, _) => return Ok(names),
            other => trouble!("LIST was answered {other:x?}"),
        }
    }
}

/// The member of `dictionary` that is a list of names.
fn names(dictionary: &BTreeMap<String, OwnedVariant>, key: &str) -> Outcome<Vec<String>> {
    let Some(value) = dictionary.get(key) else {
        trouble!("there is no {key} in {dictionary:?}");
    };
    Ok(value.try_clone()?.try_into()?)
}

fn sessions(caller: &Caller, export: Option<&str>) -> Result<Vec<u64>, Refused> {
    let of = export.map(|name| ("export", Variant::from(name)));
    let options: Options = of.into_iter().collect();
    let answer = caller.call("ListSessions", &(options,))?;
    let all: Vec<BTreeMap<String, OwnedVariant>> = answer.body().deserialize()?;
    let id = |session: &BTreeMap<String, OwnedVariant>| match session.get("Id").map(|id| &**id) {
        Some(Variant::U64(id)) => *id,
        other => u64::MAX - u64::from(other.is_none()),
    };
    Ok(all.iter().map(id).collect())
}

/// A name is compared with names and nothing else: the stock server of old opened what a client asked for.
#[test]
fn names_that_are_paths_are_names_and_nothing_else() -> Outcome<()> {
    real("names as paths", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let mut writer = Client::open(&scene.endpoint(), "vol-a")?;
        hold!(writer.write(0, &[0x5a; 512], true)? == Ok(()), "a write");
        writer.leave()?;
        // Each leads to something that is there and is not the volume.
        let stranger = Volume::make(ground.path(), "stranger", BYTES)?;
        let device = LoopDevice::add()?;
        device.attach(&stranger.image)?;
        let image = stranger.image.display().to_string();
        let beside = format!(
            "../{}",
            ground.path().file_name().unwrap_or_default().display()
        );
        let names = [
            device.node(),
            image,
            beside,
            "../x".to_owned(),
            "a/b".to_owned(),
            "/".to_owned(),
            ".".to_owned(),
            "..".to_owned(),
            "stranger.img".to_owned(),
        ];
        let nobody_has = |scene: &Scene, when: &str| -> Outcome<()> {
            for name in &names {
                match knock(&scene.endpoint(), name)? {
                    Go::Refused { kind, .. } if kind == REP_ERR_UNKNOWN => {}
                    other => trouble!("{name:?} {when}: {other:?}"),
                }
            }
            Ok(())
        };
        let all_are_the_volume = |scene: &Scene, how: &str| -> Outcome<()> {
            for name in &names {
                scene.client.reach_state(name, "Serving", STEP_LIMIT)?;
                let mut client = Client::open(&scene.endpoint(), name)?;
                let mut bytes = [0; 512];
                hold!(client.read(0, &mut bytes)? == Ok(()), "{name:?} {how}");
                hold!(bytes == [0x5a; 512], "{name:?} {how} is the volume");
                client.leave()?;
            }
            let listed = listed(scene)?;
            hold!(names.iter().all(|name| listed.contains(name)), "{listed:?}");
            Ok(())
        };
        nobody_has(&scene, "before it is defined")?;
        let text = std::fs::read_to_string(&scene.home.config)?;
        let volume = scene.volumes[0].id();
        let sections = names.iter().map(|name| {
            format!("\n[[export]]\nname = {name:?}\nvolume = {volume:?}\nread_only = true\n")
        });
        std::fs::write(
            &scene.home.config,
            text.clone() + &sections.collect::<String>(),
        )?;
        scene.client.call("Reload", &(Options::new(),))?;
        all_are_the_volume(&scene, "in the configuration")?;
        std::fs::write(&scene.home.config, text)?;
        scene.client.call("Reload", &(Options::new(),))?;
        until(STEP_LIMIT, "the sections to go", || {
            Ok((scene.client.objects("Export")?.len() == 1).then_some(()))
        })?;
        nobody_has(&scene, "after it went")?;
        for name in &names {
            let options = Options::from([("read_only", Variant::from(true))]);
            scene.client.add_export_with(name, &volume, options)?;
        }
        all_are_the_volume(&scene, "over D-Bus")?;
        scene.kill()?;
        scene.start()?;
        all_are_the_volume(&scene, "after kill -9")?;
        for name in &names {
            scene.client.remove_export(name, "soft")?;
        }
        nobody_has(&scene, "after its removal")?;
        scene.stop()
    })
}

#[test]
fn safe_removal_refuses_while_a_client_is_there() -> Outcome<()> {
    real("removal safe", NEEDS, |ground| {
        let (_device, _volume, mut scene) = made(ground)?;
        let mut client = Client::open(&scene.endpoint(), "made")?;
        let mark = scene.client.mark();
        match scene.client.remove_export("made", "safe") {
            Err(e) if e.is("InUse") && e.text.contains("1 clients") => {}
            other => trouble!("expected InUse that counts the client, got {other:?}"),
        }
        // A person is told what to type next about the clients, and not how two exports share a volume.
        let told = nbdtrack(&scene, &["remove", "--safe", "made"])?;
        hold!(
            told.status.code() == Some(1)
                && told.stderr.contains("'nbdtrack sessions made' lists them")
                && !told.stderr.contains("share"),
            "{}",
            told.stderr
        );
        // What is refused for what the export is, is so whoever is connected, and needs nobody to leave.
        for refused in [&["repin", "made", "--diskseq", "1"][..], &["unpin", "made"]] {
            let told = nbdtrack(&scene, refused)?;
            hold!(
                told.status.code() == Some(1) && told.stderr.contains("has no path"),
                "{refused:?}: {}",
                told.stderr
            );
        }
        hold!(
            client.write(0, &[1; 512], true)? == Ok(()),
            "the client is served on"
        );
        let new = Client::open(&scene.endpoint(), "made")?;
        new.leave()?;
        client.leave()?;
        scene
            .client
            .wait(mark, STEP_LIMIT, "no clients", |signal| {
                signal.member == "PropertiesChanged" && signal.path.ends_with("/made")
            })?;
        support::until(STEP_LIMIT, "the last client to be gone", || {
            Ok(scene
                .client
                .remove_export("made", "safe")
                .is_ok()
                .then_some(()))
        })?;
        hold!(scene.client.export("made")?.is_none(), "it is gone");
        scene.kill()?;
        scene.start()?;
        hold!(scene.client.export("made")?.is_none(), "also after kill -9");
        scene.stop()
    })
}

#[test]
fn hidden_export_serves_its_clients_takes_no_new_one_and_goes_with_the_last() -> Outcome<()> {
    real("removal hide", NEEDS, |ground| {
        let (_device, volume, mut scene) = made(ground)?;
        let mut one = Client::open(&scene.endpoint(), "made")?;
        let mut two = Client::open(&scene.endpoint(), "made")?;
        let nowhere = Options::from([("wait_ms", Variant::from(0u32))]);
        match scene
            .client
            .add_export_with("other", "loop:/nowhere", nowhere)
        {
            Err(e) if e.is("NotReady") => {}
            other => trouble!("expected NotReady for a volume that is nowhere, got {other:?}"),
        }
        let names = listed(&scene)?;
        hold!(names == ["made", "other"], "LIST has both: {names:?}");
        scene.client.remove_export("made", "hide")?;
        let export = scene.export("made")?;
        hold!(
            export.get("Hidden") == Some(&support::bus::Word::Flag(true)),
            "the answer comes after the property: {export:?}"
        );
        match knock(&scene.endpoint(), "made")? {
            Go::Refused { kind, .. } => {
                hold!(kind == REP_ERR_POLICY, "a new client is refused: {kind:x}")
            }
            go => trouble!("a new client was let in: {go:?}"),
        }
        // The other one shows that LIST was answered at all.
        let names = listed(&scene)?;
        hold!(names == ["other"], "LIST has it no longer: {names:?}");
        hold!(
            one.write(0, &[1; 512], true)? == Ok(()),
            "its clients go on"
        );
        // Asked again, as by a caller who lost the reply.
        scene.client.remove_export("made", "hide")?;
        match scene.client.add_export("made", &volume.id()) {
            Err(e) if e.is("NotReady") => {}
            other => trouble!("expected NotReady while it goes, got {other:?}"),
        }
        one.leave()?;
        hold!(two.write(0, &[2; 512], true)? == Ok(()), "one is left");
        hold!(
            scene.client.export("made")?.is_some(),
            "and so is the export"
        );
        let mark = scene.client.mark();
        two.leave()?;
        scene
            .client
            .wait(mark, STEP_LIMIT, "the export to go", |signal| {
                signal.member == "InterfacesRemoved" && signal.text(0).ends_with("/made")
            })?;
        let (_, created) = scene.client.add_export("made", &volume.id())?;
        hold!(created, "the name is free again");
        Client::open(&scene.endpoint(), "made")?.leave()?;
        scene.stop()
    })
}

#[test]
fn hidden_export_can_be_removed_harder() -> Outcome<()> {
    real("removal hide then hard", NEEDS, |ground| {
        let (_device, _volume, mut scene) = made(ground)?;
        let mut client = Client::open(&scene.endpoint(), "made")?;
        scene.client.remove_export("made", "hide")?;
        scene.client.remove_export("made", "hard")?;
        hold!(scene.client.export("made")?.is_none(), "it is gone");
        hold!(
            client.read(0, &mut [0; 512]).is_err(),
            "and its client is cut off"
        );
        scene.stop()
    })
}

#[test]
fn sessions_are_listed_and_one_is_ended_alone() -> Outcome<()> {
    real("bus sessions", NEEDS, |ground| {
        let (_device, _volume, mut scene) = made(ground)?;
        hold!(sessions(&scene.client, None)?.is_empty(), "none at first");
        let mut one = Client::open(&scene.endpoint(), "made")?;
        let first = sessions(&scene.client, Some("made"))?;
        let mut two = Client::open(&scene.endpoint(), "made")?;
        let both = sessions(&scene.client, None)?;
        hold!(first.len() == 1 && both.len() == 2, "{first:?}, {both:?}");
        hold!(both.contains(&first[0]), "its number stays");
        hold!(
            sessions(&scene.client, Some("other"))?.is_empty(),
            "of another export none"
        );
        scene
            .client
            .call("EndSession", &(first[0], Options::new()))?;
        hold!(one.read(0, &mut [0; 512]).is_err(), "it is cut off");
        hold!(two.read(0, &mut [0; 512])? == Ok(()), "the other goes on");
        support::until(STEP_LIMIT, "its end to be seen", || {
            Ok((sessions(&scene.client, None)?.len() == 1).then_some(()))
        })?;
        match scene.client.call("EndSession", &(first[0], Options::new())) {
            Err(e) if e.is("NotFound") => {}
            other => trouble!("expected NotFound the second time, got {other:?}"),
        }
        Client::open(&scene.endpoint(), "made")?.leave()?;
        scene.stop()
    })
}

#[test]
fn reload_answers_with_what_it_changed_and_a_bad_file_changes_nothing() -> Outcome<()> {
    real("bus reload", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a", "vol-b"], BYTES)?;
        let (a, b) = (scene.volumes[0].id(), scene.volumes[1].id());
        let mut untouched = Client::open(&scene.endpoint(), "vol-a")?;
        let reload = |scene: &Scene| -> Result<BTreeMap<String, OwnedVariant>, Refused> {
            let answer = scene.client.call("Reload", &(Options::new(),))?;
            Ok(answer.body().deserialize()?)
        };
        let mark = scene.client.mark();
        scene
            .home
            .configure(&[("vol-a", a.clone()), ("vol-c", "loop:/nowhere".to_owned())])?;
        let difference = reload(&scene)?;
        for (key, wanted) in [
            ("Added", &["vol-c"][..]),
            ("Removed", &["vol-b"]),
            ("Changed", &[]),
        ] {
            let found = names(&difference, key)?;
            hold!(found == wanted, "{key}: {found:?}");
        }
        hold!(
            scene.client.export("vol-c")?.is_some(),
            "it is there when the answer comes"
        );
        scene.client.wait(mark, STEP_LIMIT, "ConfigReloaded", |s| {
            s.member == "ConfigReloaded"
        })?;
        std::fs::write(&scene.home.config, "[server\nlisten = 7\n")?;
        match reload(&scene) {
            Err(e) if e.is("InvalidConfig") && e.text.contains("nbdtrack.toml:1") => {}
            other => trouble!("expected InvalidConfig with the file and its line, got {other:?}"),
        }
        hold!(scene.state("vol-a")? == "Serving", "everything stays");
        hold!(scene.client.export("vol-c")?.is_some(), "as it was");
        hold!(
            untouched.read(0, &mut [0; 512])? == Ok(()),
            "and who is served notices nothing"
        );
        scene.home.configure(&[("vol-a", a), ("vol-b", b)])?;
        let difference = reload(&scene)?;
        hold!(names(&difference, "Added")? == ["vol-b"], "{difference:?}");
        scene.client.reach_state("vol-b", "Serving", STEP_LIMIT)?;
        let (a, elsewhere) = (scene.volumes[0].id(), "loop:/nowhere".to_owned());
        scene
            .home
            .configure(&[("vol-a", a), ("vol-b", elsewhere)])?;
        let difference = reload(&scene)?;
        for (key, wanted) in [
            ("Added", &[][..]),
            ("Removed", &[]),
            ("Changed", &["vol-b"]),
        ] {
            let found = names(&difference, key)?;
            hold!(found == wanted, "{key}: {found:?}");
        }
        scene.client.reach_state("vol-b", "Absent", STEP_LIMIT)?;
        // A second writer of a volume: the section is refused with the reason, and what had its name stays.
        let (a, b) = (scene.volumes[0].id(), scene.volumes[1].id());
        scene.client.add_export("made", &b)?;
        scene.home.configure(&[("vol-a", a), ("vol-b", b)])?;
        let difference = reload(&scene)?;
        let refused = format!("{:?}", difference.get("Refused"));
        for says in ["\"vol-b\"", "written to by export made"] {
            hold!(refused.contains(says), "no {says} in {refused}");
        }
        for key in ["Added", "Removed", "Changed"] {
            let found = names(&difference, key)?;
            hold!(found.is_empty(), "{key}: {found:?}");
        }
        let kept = scene.export("vol-b")?;
        hold!(kept["VolumeId"].text() == "loop:/nowhere", "{kept:?}");
        hold!(
            untouched.read(0, &mut [0; 512])? == Ok(()),
            "and who is served notices nothing of that"
        );
        scene.stop()
    })
}

#[test]
fn reload_without_a_configuration_says_so() -> Outcome<()> {
    real("bus reload nothing", NEEDS, |ground| {
        let mut scene = Scene::empty(ground)?;
        std::fs::remove_file(&scene.home.config)?;
        match scene.client.call("Reload", &(Options::new(),)) {
            Err(e) if e.is("InvalidConfig") => {}
            other => trouble!("expected InvalidConfig, got {other:?}"),
        }
        scene.stop()
    })
}

#[test]
fn detach_that_lasts_is_a_job_with_its_clients_and_its_end() -> Outcome<()> {
    real("bus job", NEEDS, |ground| {
        let disk = FuseDisk::make(ground.path(), "ill", BYTES)?;
        let mut scene = Scene::empty(ground)?;
        let _healer = disk.healer();
        let id = format!("loop:{}", disk.file.display());
        scene.client.add_export("ill", &id)?;
        scene.client.reach_state("ill", "Serving", STEP_LIMIT)?;
        let client = Client::open(&scene.endpoint(), "ill")?;
        disk.hang(ALL);
        (&client.socket).write_all(&request(CMD_READ, 0, 1, 0, 4096))?;
        support::until(STEP_LIMIT, "the read to hang", || {
            Ok((disk.held() > 0).then_some(()))
        })?;
        let address = scene.bus.address.clone();
        let mark = scene.client.mark();
        // Thread: the call that lasts; joined below.
        let volume = id.clone();
        let detach = std::thread::spawn(move || -> Outcome<Result<(), Refused>> {
            let caller = Caller::connect_to(&address)?;
            let options = Options::from([("timeout_ms", Variant::from(20_000u32))]);
            Ok(caller
                .call("PrepareDetach", &(volume.as_str(), options))
                .map(drop))
        });
        let (path, job) = support::until(STEP_LIMIT, "the job", || {
            Ok(scene.client.objects("Job")?.pop_first())
        })?;
        for (property, wanted) in [
            ("Operation", "prepare-detach"),
            ("Target", id.as_str()),
            ("Stage", "draining"),
        ] {
            let found = job.get(property).map_or("", |word| word.text());
            hold!(found == wanted, "{property} is {found}");
        }
        hold!(job["Clients"].number() == 1, "{job:?}");
        let seen = scene.client.objects("Job")?.len();
        hold!(seen == 1, "a client that joins late sees it, too");
        disk.heal();
        let ended = scene
            .client
            .wait(mark, STEP_LIMIT, "Completed", |s| s.member == "Completed")?;
        hold!(ended.path == path, "{} is not {path}", ended.path);
        hold!(
            ended.words[0] == support::bus::Word::Flag(true),
            "{ended:?}"
        );
        let answer = detach.join();
        hold!(matches!(answer, Ok(Ok(Ok(())))), "{answer:?}");
        scene.client.wait(mark, STEP_LIMIT, "the job to go", |s| {
            s.member == "InterfacesRemoved" && s.text(0) == path
        })?;
        let told = of_job(&scene, mark, &path);
        let told: Vec<&str> = told.iter().map(|s| s.member.as_str()).collect();
        hold!(
            told.first() == Some(&"InterfacesAdded")
                && told.ends_with(&["PropertiesChanged", "Completed", "InterfacesRemoved"]),
            "in order: {told:?}"
        );
        hold!(
            scene.client.objects("Job")?.is_empty(),
            "its object is gone"
        );
        hold!(
            scene
                .client
                .call_on(
                    &path,
                    "org.freedesktop.DBus.Properties",
                    "GetAll",
                    &"org.nbdtrack1.Job"
                )
                .is_err(),
            "and cannot be asked"
        );
        hold!(scene.state("ill")? == "Released", "when the job is over");
        scene.stop()
    })
}

/// What was told of a job since `mark`, in order.
fn of_job(scene: &Scene, mark: usize, path: &str) -> Vec<Signal> {
    let of = |signal: &Signal| {
        signal.path == path || (signal.member.starts_with("Interfaces") && signal.text(0) == path)
    };
    scene.client.since(mark).into_iter().filter(of).collect()
}

#[test]
fn removal_that_is_not_over_in_time_is_a_job_that_ends_as_its_caller_is_told() -> Outcome<()> {
    real("bus job of a removal", NEEDS, |ground| {
        let disk = FuseDisk::make(ground.path(), "ill", BYTES)?;
        let mut scene = Scene::empty(ground)?;
        let _healer = disk.healer();
        let id = format!("loop:{}", disk.file.display());
        scene.client.add_export("ill", &id)?;
        let export = scene.client.reach_state("ill", "Serving", STEP_LIMIT)?;
        hold!(export["Name"].text() == "ill", "{export:?}");
        let client = Client::open(&scene.endpoint(), "ill")?;
        disk.hang(ALL);
        (&client.socket).write_all(&request(CMD_READ, 0, 1, 0, 4096))?;
        until(STEP_LIMIT, "the read to hang", || {
            Ok((disk.held() > 0).then_some(()))
        })?;
        let mark = scene.client.mark();
        let soon = Options::from([("timeout_ms", Variant::from(1_000u32))]);
        let refused = match scene.client.call("RemoveExport", &("ill", soon)) {
            Err(refused) if refused.is("TimedOut") => refused,
            other => trouble!("expected TimedOut while a read hangs, got {other:?}"),
        };
        let ended = scene
            .client
            .wait(mark, STEP_LIMIT, "Completed", |s| s.member == "Completed")?;
        hold!(
            ended.words[0] == Word::Flag(false)
                && ended.text(1) == refused.name
                && ended.text(2) == refused.text,
            "{ended:?} and {refused:?}"
        );
        let gone =
            |signal: &Signal| signal.member == "InterfacesRemoved" && signal.text(0) == ended.path;
        scene.client.wait(mark, STEP_LIMIT, "the job to go", gone)?;
        let told = of_job(&scene, mark, &ended.path);
        let begun = told.first().map_or(String::new(), |s| format!("{s:?}"));
        for word in ["remove-export", "ill", "draining"] {
            hold!(begun.contains(word), "no {word} in {begun}");
        }
        let members: Vec<&str> = told.iter().map(|s| s.member.as_str()).collect();
        hold!(
            members.first() == Some(&"InterfacesAdded")
                && members.ends_with(&["Completed", "InterfacesRemoved"]),
            "in order: {members:?}"
        );
        disk.heal();
        until(STEP_LIMIT, "the export to be gone", || {
            let again = scene.client.remove_export("ill", "soft");
            Ok(again.is_err_and(|e| e.is("NotFound")).then_some(()))
        })?;
        scene.stop()
    })
}

#[test]
fn log_level_is_read_and_set_while_it_runs() -> Outcome<()> {
    real("bus log level", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        const PATH: &str = "/org/freedesktop/LogControl1";
        const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
        const LOG: &str = "org.freedesktop.LogControl1";
        let level = |scene: &Scene| -> Outcome<String> {
            let answer = scene
                .client
                .call_on(PATH, PROPERTIES, "Get", &(LOG, "LogLevel"))?;
            let value: OwnedVariant = answer.body().deserialize()?;
            Ok(format!("{:?}", &*value))
        };
        let set = |scene: &Scene, to: &str| {
            let body = (LOG, "LogLevel", Variant::from(to));
            scene
                .client
                .call_on(PATH, PROPERTIES, "Set", &body)
                .map(drop)
        };
        hold!(level(&scene)?.contains("info"), "{}", level(&scene)?);
        // A thread writes the log, in its order: what is there when a later line is there is all.
        let lines = |scene: &Scene, of: &str| -> Outcome<usize> {
            let log = std::fs::read_to_string(&scene.home.log)?;
            Ok(log.lines().filter(|line| line.contains(of)).count())
        };
        hold!(lines(&scene, "DEBUG")? == 0, "quiet at first");
        set(&scene, "debug")?;
        hold!(
            level(&scene)?.contains("debug"),
            "told when the answer comes"
        );
        scene.client.rescan()?;
        set(&scene, "warning")?;
        scene.client.rescan()?;
        set(&scene, "debug")?;
        scene.client.rescan()?;
        scene
            .client
            .stats()
            .map_err(|e| support::Trouble(format!("{e:?}")))?;
        until(STEP_LIMIT, "the last call's line", || {
            Ok((lines(&scene, "method=\"GetStats\"")? > 0).then_some(()))
        })?;
        let told = lines(&scene, "method=\"Rescan\"")?;
        hold!(told == 2, "{told} of three calls, one of them quiet");
        set(&scene, "warning")?;
        hold!(set(&scene, "loud").is_err(), "no such level");
        hold!(level(&scene)?.contains("warning"), "and nothing changed");
        let body = (LOG, "SyslogIdentifier", Variant::from("x"));
        hold!(
            scene
                .client
                .call_on(PATH, PROPERTIES, "Set", &body)
                .is_err(),
            "others cannot be set"
        );
        hold!(
            scene
                .client
                .call_on(ROOT, PROPERTIES, "Set", &body)
                .is_err(),
            "nor anywhere else"
        );
        scene.stop()
    })
}
