//! How a daemon comes to the shared table in a real MariaDB: over TLS with an authority of one's own, with a password from a credential,
//! and through transactions that the server, or a node of a Galera cluster, gives up for others.

use std::fs;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use support::bus::{Client, Options, Refused};
use support::daemon::Home;
use support::ground::{Need, real};
use support::mariadb::MariaDb;
use support::process::{self, Running};
use support::scene::{STEP_LIMIT, Scene};
use support::{Doing, Outcome, hold, trouble, until};
use zbus::Variant;

const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Bus,
    Need::Tool("mariadbd"),
    Need::Tool("mariadb-install-db"),
    Need::Tool("mariadb"),
    Need::Tool("openssl"),
];
const VM: &str = "4205784a-098a-40f1-1f1e-a5cd2597fd59";

/// Keeps the export of a volume that is not there, under this name of the VM; an answer `NotReady` for the volume's sake is none.
fn ensure(client: &Client, vm_name: &str) -> Result<(), Refused> {
    let options = Options::from([
        ("volume", Variant::from("serial:not-there")),
        ("wait_ms", Variant::from(0_u32)),
    ]);
    match client.call("EnsureVmExport", &(VM, 0_u32, vm_name, options)) {
        Err(refusal) if refusal.is("NotReady") && !refusal.text.contains("is away") => Ok(()),
        other => other.map(drop),
    }
}

fn ensure_when_up(client: &Client, vm_name: &str) -> Outcome<()> {
    until(STEP_LIMIT, "the database to be reached", || {
        match ensure(client, vm_name) {
            Ok(()) => Ok(Some(())),
            Err(refusal) if refusal.is("NotReady") => Ok(None),
            Err(refusal) => Err(refusal.into()),
        }
    })
}

fn vm_name(server: &MariaDb) -> Outcome<String> {
    server.sql(&format!(
        "SELECT vm_name FROM vm_export_mappings WHERE vm_id = '{VM}'"
    ))
}

fn count(client: &Client, name: &str) -> Outcome<u64> {
    let stats = client.stats()?;
    Ok(stats.get(name).map_or(0, |value| value.number()))
}

/// How many transactions were begun anew, once there were any: it is told with the next look at the table.
fn counted(client: &Client) -> Outcome<u64> {
    until(STEP_LIMIT, "a transaction to be begun anew", || {
        let count = count(client, "database_retried")?;
        Ok((count > 0).then_some(count))
    })
}

fn openssl(folder: &Path, line: &str) -> Outcome<()> {
    let mut command = process::command("openssl");
    command.args(line.split(' ')).current_dir(folder);
    let made = process::run_command("openssl", command, STEP_LIMIT)?;
    hold!(made.status.success(), "openssl {line}: {}", made.stderr);
    Ok(())
}

/// Two authorities, and a server's certificate of the first, for `names`.
fn certificates(folder: &Path, names: &str) -> Outcome<()> {
    const KEY: &str = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes";
    for name in ["ca", "other"] {
        openssl(
            folder,
            &format!(
                "req -x509 {KEY} -keyout {name}.key -out {name}.pem -days 30 -subj /CN={name}"
            ),
        )?;
    }
    openssl(
        folder,
        &format!("req {KEY} -keyout server.key -out server.csr -subj /CN=database"),
    )?;
    fs::write(folder.join("names"), format!("subjectAltName={names}\n"))?;
    openssl(
        folder,
        "x509 -req -in server.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out server.pem -days 30 -extfile names",
    )
}

#[test]
fn a_server_that_is_not_the_one_that_was_said_hears_no_password() -> Outcome<()> {
    real("the database over TLS", NEEDS, |ground| {
        const PASSWORD: &str = "correct-horse-battery";
        let folder = ground.path();
        certificates(folder, "DNS:database.example")?;
        let file = |name: &str| folder.join(name).display().to_string();
        let options = [
            format!("--ssl-ca={}", file("ca.pem")),
            format!("--ssl-cert={}", file("server.pem")),
            format!("--ssl-key={}", file("server.key")),
        ];
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let mut server = MariaDb::make(folder, &options)?;
        server.sql(&format!(
            "CREATE USER secret@localhost IDENTIFIED BY '{PASSWORD}' REQUIRE SSL; GRANT ALL ON appliance.* TO secret@localhost"
        ))?;
        // As systemd leaves it for `LoadCredential=store-password:…`.
        let credentials = ground.file("credentials");
        fs::create_dir(&credentials)?;
        let credential = credentials.join("store-password");
        fs::write(&credential, format!("{PASSWORD}\n"))?;
        fs::set_permissions(&credential, fs::Permissions::from_mode(0o400))?;
        let mut home = Home::new(&ground.file("home"), "none")?;
        home.filter = "trace".to_owned();
        home.environment = vec![("CREDENTIALS_DIRECTORY", credentials)];
        let mut says = |port: u16, query: &str, word: &str| {
            home.server = format!(
                "store = \"mysql://secret@127.0.0.1:{port}/appliance?{query}\"\nstore_owner = \"one\"\nstore_poll_s = 1\n"
            );
            home.configure(&[])?;
            let _gone = fs::remove_file(&home.log);
            let daemon = home.start()?;
            let mut log = String::new();
            until(STEP_LIMIT, format!("{query} to say {word:?}"), || {
                log = fs::read_to_string(&home.log)?;
                Ok(log.contains(word).then_some(()))
            })
            .doing(log.lines().last().unwrap_or_default())?;
            for place in ["cmdline", "environ"] {
                log.push_str(&fs::read_to_string(format!(
                    "/proc/{}/{place}",
                    daemon.pid()
                ))?);
            }
            hold!(!log.contains("horse"), "the password was shown:\n{log}");
            daemon.stop()
        };
        const REACHED: &str = "the shared table is reached";
        let port = server.port;
        let ca = |name: &str| format!("ssl-ca={}", file(name));
        let (right, wrong) = (ca("ca.pem"), ca("other.pem"));
        says(port, &format!("ssl-mode=verify-ca&{right}"), REACHED)?;
        says(port, "ssl-mode=required", REACHED)?;
        // What the server shows was signed by someone else, is another server's, or cannot be judged.
        for (query, word) in [
            (format!("ssl-mode=verify-ca&{wrong}"), "UnknownIssuer"),
            (
                format!("ssl-mode=verify-identity&{right}"),
                "not valid for name",
            ),
            (
                "ssl-mode=verify-ca&ssl-ca=/nowhere/ca.pem".to_owned(),
                "No such file",
            ),
        ] {
            says(port, &query, word)?;
        }
        let denied = "SELECT VARIABLE_VALUE FROM information_schema.global_status WHERE VARIABLE_NAME = 'Access_denied_errors'";
        hold!(server.sql(denied)? == "0", "someone tried to log in");
        // The account takes no plaintext.
        says(port, "ssl-mode=disabled", "Access denied")?;

        // The certificate that has the name.
        server.stop()?;
        certificates(folder, "DNS:localhost,IP:127.0.0.1")?;
        server.start()?;
        says(port, &format!("ssl-mode=verify-identity&{right}"), REACHED)?;
        server.stop()?;
        // And a server that has no TLS is of no use to who wants it.
        let plain = ground.file("plain");
        fs::create_dir(&plain)?;
        let plain = MariaDb::make(&plain, &["--skip-ssl"])?;
        says(plain.port, "ssl-mode=required", "does not support TLS")?;
        hold!(plain.sql(denied)? == "0", "someone tried to log in");
        Ok(())
    })
}

/// Locks a row that the daemon's transaction comes to second, waits until that waits for it, and then wants the row that it has. Of two
/// that wait for each other InnoDB ends the one that has changed less, so this one changes a thousand rows first. (What waits is told
/// anew only when nobody has asked for a tenth of a second: `CACHE_MIN_IDLE_TIME_US` in InnoDB's trx0i_s.cc.)
const CLASH: &str = "CREATE TABLE ballast (n INT PRIMARY KEY) ENGINE = InnoDB;
    DELIMITER //
    CREATE PROCEDURE clash() BEGIN
        DECLARE waiting INT DEFAULT 0;
        DECLARE n INT DEFAULT 0;
        START TRANSACTION;
        WHILE n < 1000 DO INSERT INTO ballast VALUES (n); SET n = n + 1; END WHILE;
        SELECT COUNT(*) FROM vm_export_mappings FOR UPDATE;
        SELECT 'locked';
        WHILE waiting = 0 DO
            SELECT COUNT(*) INTO waiting FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT';
            DO SLEEP(0.15);
        END WHILE;
        SELECT COUNT(*) FROM nbdtrack_mappings FOR UPDATE;
        DELETE FROM ballast;
        COMMIT;
    END//";

#[test]
fn a_deadlock_with_another_transaction_is_the_servers_matter_and_not_the_callers() -> Outcome<()> {
    real("a deadlock", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        server.sql(CLASH)?;
        server.sql("GRANT PROCESS ON *.* TO nbdtrack@localhost")?;
        let mut scene = Scene::told(ground, server.store("one"), &[])?;
        ensure_when_up(&scene.client, "web 0")?;
        let deadlocks = || -> Outcome<u64> {
            let count = server.sql("SELECT VARIABLE_VALUE FROM information_schema.global_status WHERE VARIABLE_NAME = 'Innodb_deadlocks'")?;
            Ok(count.parse()?)
        };
        let before = (deadlocks()?, count(&scene.client, "database_retried")?);
        let mut clash = process::command("mariadb");
        clash
            .arg("--no-defaults")
            .arg(format!("--socket={}", server.socket.display()))
            .args([
                "--user=root",
                "-NB",
                "--unbuffered",
                "appliance",
                "-e",
                "CALL clash()",
            ])
            .stdout(Stdio::piped());
        let mut clash = Running(clash.spawn().doing("start mariadb")?);
        // The client prints each result as it comes.
        let mut said = clash.0.stdout.take();
        let mut text = String::new();
        let mut byte = [0];
        while let Some(said) = &mut said
            && !text.contains("locked\n")
        {
            hold!(said.read(&mut byte)? == 1, "it ended: {text}");
            text.push(char::from(byte[0]));
        }
        ensure(&scene.client, "web 1")?;
        let status = clash.wait(STEP_LIMIT)?;
        hold!(status.success(), "the other transaction: {status}");
        hold!(vm_name(&server)? == "web 1", "{}", vm_name(&server)?);
        let retried = counted(&scene.client)?;
        hold!(
            deadlocks()? > before.0 && retried > before.1,
            "{before:?} and then {retried}"
        );
        scene.stop()
    })
}

/// As a node of a Galera cluster in front of its table: of the next transactions so many fail to be certified at their COMMIT.
struct Node {
    port: u16,
    refuses: Arc<AtomicU32>,
}

impl Node {
    fn before(server: u16) -> Outcome<Node> {
        let listener = TcpListener::bind(("127.0.0.1", 0))?;
        let node = Node {
            port: listener.local_addr()?.port(),
            refuses: Arc::default(),
        };
        let refuses = node.refuses.clone();
        // Ends with the test's process; one thread for each direction of each connection.
        std::thread::spawn(move || {
            for client in listener.incoming().flatten() {
                let Ok(server) = TcpStream::connect(("127.0.0.1", server)) else {
                    return;
                };
                let instead = Arc::<AtomicU32>::default();
                let copies = (client.try_clone(), server.try_clone());
                let (Ok(client_too), Ok(server_too)) = copies else {
                    return;
                };
                let (refuses, told) = (refuses.clone(), instead.clone());
                std::thread::spawn(move || {
                    let _end = pass(&client, &server, |packet| {
                        let commits =
                            packet[3] == 0 && packet[4..].eq_ignore_ascii_case(b"\x03COMMIT");
                        let less = |n: u32| n.checked_sub(1);
                        if commits
                            && refuses
                                .fetch_update(Ordering::SeqCst, Ordering::SeqCst, less)
                                .is_ok()
                        {
                            told.fetch_add(1, Ordering::SeqCst);
                            *packet = framed(0, b"\x03ROLLBACK");
                        }
                    });
                    let _ = server.shutdown(Shutdown::Both);
                });
                std::thread::spawn(move || {
                    let _end = pass(&server_too, &client_too, |packet| {
                        if instead.swap(0, Ordering::SeqCst) > 0 {
                            // The answer to ROLLBACK. ERR: ER_LOCK_DEADLOCK, the state, a text.
                            let error = [
                                &[0xff][..],
                                &1213_u16.to_le_bytes(),
                                b"#40001Deadlock: wsrep aborted transaction",
                            ];
                            *packet = framed(1, &error.concat());
                        }
                    });
                    let _ = client_too.shutdown(Shutdown::Both);
                });
            }
        });
        Ok(node)
    }
}

/// "MySQL Packets" of the client/server protocol: three bytes of length, a number, the payload.
fn framed(number: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap_or(0).to_le_bytes();
    [&length[..3], &[number], payload].concat()
}

/// Passes packets on until one side ends.
fn pass(
    mut from: &TcpStream,
    mut to: &TcpStream,
    mut change: impl FnMut(&mut Vec<u8>),
) -> std::io::Result<()> {
    loop {
        let mut packet = vec![0; 4];
        from.read_exact(&mut packet)?;
        let length = u32::from_le_bytes([packet[0], packet[1], packet[2], 0]);
        packet.resize(4 + usize::try_from(length).unwrap_or(0), 0);
        from.read_exact(&mut packet[4..])?;
        change(&mut packet);
        to.write_all(&packet)?;
    }
}

#[test]
fn a_transaction_that_fails_to_be_certified_at_its_commit_is_begun_anew_a_few_times() -> Outcome<()>
{
    real("certification at the commit", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        let node = Node::before(server.port)?;
        let store = format!(
            "store = \"mysql://nbdtrack@127.0.0.1:{}/appliance?ssl-mode=disabled\"\nstore_owner = \"one\"\nstore_poll_s = 1\n",
            node.port
        );
        let mut scene = Scene::told(ground, store, &[])?;
        ensure_when_up(&scene.client, "web 0")?;
        let before = count(&scene.client, "database_retried")?;
        node.refuses.store(4, Ordering::SeqCst);
        ensure(&scene.client, "web 1")?;
        hold!(
            node.refuses.load(Ordering::SeqCst) == 0,
            "not all were asked for"
        );
        hold!(vm_name(&server)? == "web 1", "{}", vm_name(&server)?);
        let retried = counted(&scene.client)? - before;
        hold!(retried == 4, "{retried} transactions were begun anew");
        // More often than that it is away, and says so; nothing of what was asked for is half done.
        node.refuses.store(1_000_000, Ordering::SeqCst);
        match ensure(&scene.client, "web 2") {
            Err(refusal) => hold!(
                refusal.is("NotReady") && refusal.text.contains("wsrep aborted"),
                "{refusal:?}"
            ),
            Ok(()) => trouble!("it was kept"),
        }
        hold!(vm_name(&server)? == "web 1", "{}", vm_name(&server)?);
        node.refuses.store(0, Ordering::SeqCst);
        ensure_when_up(&scene.client, "web 2")?;
        hold!(vm_name(&server)? == "web 2", "{}", vm_name(&server)?);
        scene.stop()
    })
}
