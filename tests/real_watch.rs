//! With `watch_config`, files that change are read again by themselves: once for what belongs together, and not for an editor's own.

use std::fs;
use std::path::Path;

use support::Outcome;
use support::bus::{Bus, Client, Options};
use support::client::Client as NbdClient;
use support::daemon::Home;
use support::ground::{Ground, Need, real};
use support::hold;
use support::scene::STEP_LIMIT;

const NEEDS: &[Need] = &[Need::Bus];

/// Waits until an export is there, or not there any more, and gives how many reloads were told since `mark`.
fn until_export(client: &Client, mark: usize, name: &str, wanted: bool) -> Outcome<usize> {
    support::until(STEP_LIMIT, format_args!("{name}: {wanted}"), || {
        Ok((client.export(name)?.is_some() == wanted).then_some(()))
    })?;
    let reloads = |signals: Vec<support::bus::Signal>| {
        signals
            .iter()
            .filter(|s| s.member == "ConfigReloaded")
            .count()
    };
    Ok(reloads(client.since(mark)))
}

/// As careful programs write: beside the place, then over it.
fn replace(file: &Path, text: &str) -> Outcome<()> {
    let new = file.with_extension("tmp");
    fs::write(&new, text)?;
    fs::rename(&new, file)?;
    Ok(())
}

fn export(name: &str) -> String {
    format!("[[export]]\nname = \"{name}\"\nvolume = \"serial:{name}\"\n")
}

#[test]
fn files_that_change_are_read_again_once_and_an_editors_are_passed_over() -> Outcome<()> {
    real("watched configuration", NEEDS, |ground| {
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        home.server = "watch_config = true\n".to_owned();
        home.configure(&[("first", "serial:first".to_owned())])?;
        let daemon = home.start()?;
        let client = Client::connect(&bus)?;
        // The folder was not there at the start.
        let conf = ground.file("conf.d");
        let mark = client.mark();
        fs::create_dir(&conf)?;
        for number in 0..20 {
            let name = format!("job-{number}");
            fs::write(conf.join(format!("{name}.toml")), export(&name))?;
        }
        let reloads = until_export(&client, mark, "job-19", true)?;
        hold!(
            (1..=2).contains(&reloads),
            "{reloads} reloads for twenty files that came together"
        );
        let mark = client.mark();
        replace(&conf.join("job-3.toml"), "# nothing any more\n")?;
        let reloads = until_export(&client, mark, "job-3", false)?;
        hold!(reloads == 1, "{reloads} reloads for one file");
        let mark = client.mark();
        fs::remove_file(conf.join("job-4.toml"))?;
        until_export(&client, mark, "job-4", false)?;
        // What editors write: none of it is read, and none of it makes anything be read.
        let mark = client.mark();
        for name in [".job-5.toml.swp", "job-5.toml~", "#job-5.toml#", "4913"] {
            fs::write(conf.join(name), export("ghost"))?;
            fs::remove_file(conf.join(name))?;
        }
        // What is wrong changes nothing; what mends it is seen.
        replace(&home.config, "[server\n")?;
        support::until(STEP_LIMIT, "the refusal", || {
            let log = fs::read_to_string(&home.log)?;
            Ok(log.contains("configuration refused").then_some(()))
        })?;
        hold!(client.export("first")?.is_some(), "what was there stays");
        home.configure(&[
            ("first", "serial:first".to_owned()),
            ("second", "serial:second".to_owned()),
        ])?;
        let reloads = until_export(&client, mark, "second", true)?;
        hold!(reloads == 1, "{reloads} reloads: only the good file is one");
        hold!(
            client.export("ghost")?.is_none(),
            "an editor's file is none"
        );
        drop(client);
        daemon.stop()
    })
}

/// Whoever puts another folder in the place of `conf.d` takes the old one away first; as "no exports" it ended every session of its files.
#[test]
fn folder_that_is_gone_for_a_moment_ends_no_session() -> Outcome<()> {
    real("conf.d that is gone", NEEDS, |ground| {
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        let files = ground.file("files");
        fs::create_dir(&files)?;
        fs::write(files.join("a.raw"), vec![1; 1 << 20])?;
        home.server = format!("file_roots = [{:?}]\n", files.display().to_string());
        home.configure(&[])?;
        let (conf, aside) = (ground.file("conf.d"), ground.file("aside"));
        fs::create_dir(&conf)?;
        let path = files.join("a.raw").display().to_string();
        let text = format!("[[export]]\nname = \"a\"\npath = {path:?}\n");
        fs::write(conf.join("a.toml"), text)?;
        let daemon = home.start()?;
        let caller = Client::connect(&bus)?;
        let reload = || caller.call("Reload", &(Options::new(),));
        caller.reach_state("a", "Serving", STEP_LIMIT)?;
        let mut client = NbdClient::open(&home.endpoint(), "a")?;

        fs::rename(&conf, &aside)?;
        for _ in 0..2 {
            let told = reload().err().map(|refused| refused.text);
            let told = told.unwrap_or_default();
            hold!(told.contains("conf.d: the folder is gone"), "{told:?}");
            let wrote = client.write(0, &[7; 512], true)?;
            hold!(wrote.is_ok(), "the client of its export: {wrote:?}");
        }
        fs::rename(&aside, &conf)?;
        hold!(reload().is_ok(), "it is back");
        hold!(client.flush()?.is_ok(), "the client of its export");

        // One that is empty is meant.
        fs::rename(&conf, &aside)?;
        fs::create_dir(&conf)?;
        hold!(reload().is_ok(), "an empty folder");
        support::until(STEP_LIMIT, "the export to go", || {
            Ok(caller.export("a")?.is_none().then_some(()))
        })?;
        drop(caller);
        daemon.stop()
    })
}

/// nbd-server's files, as an appliance that sends no signal would write them.
fn sections(ground: &Ground, main: &Path) -> Outcome<std::path::PathBuf> {
    let conf = ground.file("sections");
    fs::create_dir(&conf)?;
    let text = format!(
        "[generic]\nincludedir = {}\nx-watch-config = true\n",
        conf.display()
    );
    fs::write(main, text)?;
    Ok(conf)
}

#[test]
fn sections_of_nbd_server_that_come_and_go_are_seen_without_a_signal() -> Outcome<()> {
    real("watched sections", NEEDS, |ground| {
        let bus = Bus::start(ground.path())?;
        let mut home = Home::new(ground.path(), &bus.address)?;
        home.config = ground.file("nbd-server.conf");
        let conf = sections(ground, &home.config)?;
        let daemon = home.start()?;
        let client = Client::connect(&bus)?;
        let mark = client.mark();
        let file = conf.join("job.conf");
        replace(&file, "[job]\nexportname = /dev/none\n")?;
        until_export(&client, mark, "job", true)?;
        fs::remove_file(&file)?;
        until_export(&client, mark, "job", false)?;
        // Another folder is included from now on.
        let other = ground.file("others");
        fs::create_dir(&other)?;
        let text = format!(
            "[generic]\nincludedir = {}\nx-watch-config = true\n",
            other.display()
        );
        let mark = client.mark();
        replace(&home.config, &text)?;
        client.wait(mark, STEP_LIMIT, "the reload", |s| {
            s.member == "ConfigReloaded"
        })?;
        fs::write(other.join("next.conf"), "[next]\nexportname = /dev/none\n")?;
        until_export(&client, mark, "next", true)?;
        drop(client);
        daemon.stop()
    })
}
