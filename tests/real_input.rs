//! Bad input of every kind: a clear error each time, and the daemon that was serving still serves.

use std::io::{Read, Write};
use std::path::Path;
use std::time::Duration;

use support::client::{
    CMD_READ, CMD_WRITE, Client, Go, NBD_MAGIC, OPTION_MAGIC, greet, knock, read_reply, request,
    send_option,
};
use support::daemon::{Home, free_port};
use support::ground::{Need, real, tell};
use support::mounts::Mounted;
use support::scene::Scene;
use support::{Outcome, hold, process, trouble};

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 4 << 20;

/// The daemon must not start, end soon with a failure, and say `word`.
fn must_refuse(home: &Home, what: &str, word: &str) -> Outcome<()> {
    match home.try_start()? {
        Ok(_) => trouble!("{what}: the daemon serves"),
        Err((status, said)) => {
            hold!(!status.success(), "{what}: it ended with success");
            hold!(
                status.code().is_some(),
                "{what}: it ended by a signal ({status})"
            );
            hold!(!said.contains("panicked"), "{what}: it panicked: {said}");
            hold!(
                said.contains(word),
                "{what}: nothing about {word:?} in: {said}"
            );
            Ok(())
        }
    }
}

#[test]
fn bad_configuration_is_refused_and_named() -> Outcome<()> {
    real("bad configuration", &[], |ground| {
        let home = Home::new(ground.path(), "none")?;
        std::fs::remove_file(&home.config)?;
        must_refuse(&home, "no file", "nbdtrack.toml")?;
        std::fs::create_dir(&home.config)?;
        must_refuse(&home, "a folder without a file in it", "nbdtrack.toml")?;
        std::fs::remove_dir(&home.config)?;
        let binary: Vec<u8> = (0..=255).cycle().take(64 << 10).collect();
        std::fs::write(&home.config, binary)?;
        must_refuse(&home, "binary", "nbdtrack.toml")?;
        std::fs::write(&home.config, "#".repeat(50 << 20))?;
        must_refuse(&home, "50 MiB", "nbdtrack.toml")?;
        std::fs::write(&home.config, "[server]\nlissten = []\n")?;
        must_refuse(&home, "an unknown key", "lissten")?;
        std::fs::write(
            &home.config,
            "[[export]]\nname = \"a\"\nvolume = \"loop:/x\"\nread_only = 7\n",
        )?;
        must_refuse(&home, "a wrong type", "read_only")?;
        std::fs::write(
            &home.config,
            "[[export]]\nname = \"a\"\npath = \"/x.qcow2\"\n",
        )?;
        must_refuse(&home, "a file instead of a volume", "path")?;
        // More likely a write that failed than a wish for no exports; that wish takes a comment.
        std::fs::write(&home.config, "")?;
        must_refuse(&home, "an empty file", "empty")?;
        std::fs::write(&home.config, "# no exports yet\n")?;
        home.start()?.stop()
    })
}

#[test]
fn bad_store_is_refused_and_kept() -> Outcome<()> {
    real("bad store", &[Need::Tool("mount")], |ground| {
        let home = Home::new(ground.path(), "none")?;
        home.start()?.stop()?;
        let store = home.state.join("nbdtrack.db");
        let good = std::fs::read(&store)?;
        hold!(
            good.starts_with(b"SQLite format 3\0"),
            "the store is SQLite"
        );
        from_the_future(&store)?;
        let newer = std::fs::read(&store)?;
        let mut torn = good.clone();
        let middle = torn.len() / 2;
        torn[100..middle].fill(0xa5);
        for (what, bytes) in [
            (
                "a store of noise",
                b"no database at all, and long enough to look".repeat(200),
            ),
            ("a torn store", torn),
            ("a newer store", newer),
        ] {
            for rest in ["nbdtrack.db-wal", "nbdtrack.db-shm"] {
                let _ = std::fs::remove_file(home.state.join(rest));
            }
            std::fs::write(&store, &bytes)?;
            must_refuse(&home, what, "nbdtrack.db")?;
            hold!(
                std::fs::read(&store)? == bytes,
                "{what}: it was overwritten"
            );
        }
        std::fs::write(&store, &good)?;
        let state = home.state.to_string_lossy().into_owned();
        let limit = Duration::from_secs(10);
        let mounted = Mounted::new(home.state.clone(), &["--bind", &state])?;
        process::succeed("mount", &["-o", "remount,bind,ro", &state], limit)?;
        must_refuse(&home, "a read-only store", "state")?;
        drop(mounted);
        home.start()?.stop()
    })
}

/// Lets the store say that a far newer version wrote it.
fn from_the_future(store: &Path) -> Outcome<()> {
    use sqlx::Connection;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let address = format!("sqlite://{}", store.display());
        let mut store = sqlx::SqliteConnection::connect(&address).await?;
        sqlx::query("INSERT INTO nbdtrack_schema (version) VALUES (1000000)")
            .execute(&mut store)
            .await?;
        // The last to close brings the log into the file.
        store.close().await?;
        Ok(())
    })
}

#[test]
fn what_another_daemon_holds_is_refused() -> Outcome<()> {
    real("held by another", &[], |ground| {
        let mut first = Home::new(ground.path(), "none")?;
        let address = format!("127.0.0.1:{}", free_port()?);
        first.listen = vec![address.clone()];
        let mut running = first.start()?;
        let folder = ground.file("second");
        std::fs::create_dir(&folder)?;
        let mut second = Home::new(&folder, "none")?;
        second.state.clone_from(&first.state);
        must_refuse(&second, "the state directory of another", "state")?;
        second.state = folder.join("state");
        // Its unit is not to start it again and again.
        second.listen = vec![address];
        match second.try_start()? {
            Ok(_) => trouble!("two listen at one port"),
            Err((status, said)) => hold!(
                status.code() == Some(8) && said.contains("another NBD server listens and answers"),
                "{status}: {said}"
            ),
        }
        let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
        let address = taken.local_addr()?.to_string();
        second.listen = vec![address.clone()];
        must_refuse(&second, "a port in use", &address)?;
        second.listen = vec![format!("127.0.0.1:{}", free_port()?)];
        second.socket.clone_from(&first.socket);
        must_refuse(&second, "a socket in use", "nbd.sock")?;
        running.assert_alive()?;
        let _ = first.endpoint().connect()?;
        running.stop()
    })
}

#[test]
fn handshake_cut_or_broken_at_every_byte_harms_no_one() -> Outcome<()> {
    real("handshakes", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let mut whole = 3u32.to_be_bytes().to_vec();
        whole.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
        whole.extend_from_slice(&7u32.to_be_bytes());
        whole.extend_from_slice(&11u32.to_be_bytes());
        whole.extend_from_slice(&5u32.to_be_bytes());
        whole.extend_from_slice(b"vol-a\0\0");
        for cut in 0..whole.len() {
            let mut socket = scene.endpoint().connect()?;
            socket.write_all(&whole[..cut])?;
        }
        for at in 0..whole.len() {
            for value in [0x00, 0x7f, 0x80, 0xff] {
                let mut socket = scene.endpoint().connect()?;
                let mut broken = whole.clone();
                broken[at] = value;
                socket.write_all(&broken)?;
                socket.shutdown(std::net::Shutdown::Write)?;
                let mut said = Vec::new();
                // A reset is a fine answer, too.
                let _ = (&socket).take(1 << 20).read_to_end(&mut said);
                let magic = NBD_MAGIC.to_be_bytes();
                hold!(
                    said.is_empty() || said.starts_with(&magic),
                    "byte {at}: {said:02x?}"
                );
            }
        }
        still_serves(&mut scene)
    })
}

#[test]
fn names_of_every_length_get_an_answer() -> Outcome<()> {
    real("names", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        for length in [0, 255, 256, 4096] {
            let go = knock(&scene.endpoint(), &"n".repeat(length))?;
            hold!(matches!(go, Go::Refused { .. }), "{length}: {go:?}");
        }
        // Longer than the protocol allows, and not UTF-8: refused, or the connection ends.
        let _ = knock(&scene.endpoint(), &"n".repeat(4097));
        let socket = scene.endpoint().connect()?;
        greet(&socket)?;
        send_option(&socket, 7, b"\0\0\0\x04\xff\xfe\xfd\xfc\0\0")?;
        let _ = support::client::read_option_reply(&socket);
        still_serves(&mut scene)
    })
}

#[test]
fn ranges_commands_and_lengths_out_of_bounds_are_refused() -> Outcome<()> {
    real("ranges", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let client = Client::open(&scene.endpoint(), "vol-a")?;
        for (command, offset, length) in [
            (CMD_READ, BYTES, 512),
            (CMD_READ, BYTES - 1, 512),
            (CMD_READ, u64::MAX, 512),
            (CMD_READ, 1 << 63, 512),
            (CMD_READ, u64::MAX - 511, 512),
            (99, 0, 0),
        ] {
            (&client.socket).write_all(&request(command, 0, 7, offset, length))?;
            let (cookie, error) = read_reply(&client.socket)?;
            hold!(
                cookie == 7 && error != 0,
                "{command} at {offset}: error {error}"
            );
        }
        // A refused write still eats its payload.
        let mut message = request(CMD_WRITE, 0, 8, BYTES, 4096).to_vec();
        message.extend_from_slice(&[0xee; 4096]);
        message.extend_from_slice(&request(CMD_READ, 0, 9, 0, 0)[..]);
        (&client.socket).write_all(&message)?;
        let (cookie, error) = read_reply(&client.socket)?;
        hold!(cookie == 8 && error != 0, "write past the end: {error}");
        let (cookie, _) = read_reply(&client.socket)?;
        hold!(cookie == 9, "the request after it is read as a request");
        // More than the server ever takes: it may answer or hang up, but not allocate and not die.
        let huge = Client::open(&scene.endpoint(), "vol-a")?;
        (&huge.socket).write_all(&request(CMD_READ, 0, 1, 0, u32::MAX))?;
        let _ = read_reply(&huge.socket);
        let huge = Client::open(&scene.endpoint(), "vol-a")?;
        (&huge.socket).write_all(&request(CMD_WRITE, 0, 1, 0, u32::MAX))?;
        let _ = read_reply(&huge.socket);
        still_serves(&mut scene)
    })
}

#[test]
fn silent_and_deaf_clients_cost_nothing_to_the_others() -> Outcome<()> {
    real("silent clients", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        // Our own limit may be 1,024: a thousand sockets are near it.
        let limit = nix::sys::resource::Resource::RLIMIT_NOFILE;
        let (_, hard) = nix::sys::resource::getrlimit(limit)?;
        nix::sys::resource::setrlimit(limit, hard, hard)?;
        let mut silent = Vec::new();
        for _ in 0..1_000 {
            // Over its limit the server may refuse; it may not stop answering the others.
            silent.extend(scene.endpoint().connect().ok());
        }
        // One that asks and never reads.
        let deaf = Client::open(&scene.endpoint(), "vol-a");
        if let Ok(deaf) = &deaf {
            deaf.socket
                .set_write_timeout(Some(Duration::from_secs(2)))?;
            for cookie in 0..2_000 {
                let ask = request(CMD_READ, 0, cookie, 0, 1 << 20);
                if (&deaf.socket).write_all(&ask).is_err() {
                    break;
                }
            }
        }
        let held = scene.daemon()?.holdings()?;
        tell(&format!("1,000 silent clients and a deaf one: {held:?}"));
        hold!(held.resident_kib < 512 << 10, "memory is bounded: {held:?}");
        drop(silent);
        still_serves(&mut scene)
    })
}

/// A polite client is served, and nothing was said of a panic.
fn still_serves(scene: &mut Scene) -> Outcome<()> {
    scene.daemon()?.assert_alive()?;
    let mut client = Client::open(&scene.endpoint(), "vol-a")?;
    let mut block = [0u8; 4096];
    let read = client.read(0, &mut block)?;
    hold!(read.is_ok(), "a polite client: {read:?}");
    hold!(block == [0; 4096], "and nothing was written");
    client.leave()?;
    scene.stop()?;
    let log = std::fs::read_to_string(Path::new(&scene.home.log))?;
    hold!(!log.contains("panicked"), "a panic in the log");
    Ok(())
}
