//! Debian's nbd-server and ours, with the same configuration, the same signals and the same clients: each question has the same answer, or
//! stands in [`MEANT`] with both answers and the reason. `docs/migrate-from-nbd-server.md` shows that list.
//!
//! The seeds are what appliances met: a path that is stale after a swap or a failback, an export that outlives its section, a SIGHUP that
//! closes everybody's door, helpers that look for one process, checks that count lines.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use support::client::{Client, Endpoint, Go, knock};
use support::daemon::{binary, free_port};
use support::ground::{Ground, Need, real, tell};
use support::loops::LoopDevice;
use support::nbd_server::NbdServer;
use support::process;
use support::scene::Volume;
use support::{Doing, Outcome, hold, pattern, settled, until};

const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Tool("nbd-server"),
    Need::Tool("nbd-client"),
    Need::Tool("nbdinfo"),
    Need::Tool("nbdcopy"),
    Need::Tool("qemu-img"),
    Need::Tool("setpriv"),
    Need::Tool("pgrep"),
];
const LIMIT: Duration = Duration::from_secs(60);
const BYTES: u64 = 4 << 20;

/// A question whose answers differ, and why that is so.
struct Meant {
    question: &'static str,
    stock: &'static str,
    ours: &'static str,
    why: &'static str,
}

const fn meant(
    question: &'static str,
    stock: &'static str,
    ours: &'static str,
    why: &'static str,
) -> Meant {
    Meant {
        question,
        stock,
        ours,
        why,
    }
}

const MEANT: &[Meant] = &[
    meant(
        "exit code of nbdinfo --list",
        "exit status: 0",
        "exit status: 1",
        "it asks INFO of each, also of the dead job's: that is told to be missing",
    ),
    meant(
        "FLUSH without flush = true",
        "no",
        "yes",
        "durable writes are not an option",
    ),
    meant("FUA without fua = true", "no", "yes", "as above"),
    meant(
        "TRIM without trim = true",
        "no",
        "yes",
        "offered where the disk or file can discard",
    ),
    meant("CACHE", "no", "yes", "more of the protocol"),
    meant("structured replies", "no", "yes", "more of the protocol"),
    meant(
        "size in the answer to INFO",
        "0",
        "1048576",
        "the stock server looks at a path only when a client has chosen it",
    ),
    meant(
        "a name that is no export",
        "ERR_UNKNOWN: Export unknown",
        "ERR_UNKNOWN: no export of this name",
        "the same in other words",
    ),
    meant(
        "an export whose path is not there",
        "ERR_POLICY: Access denied by server configuration",
        "ERR_UNKNOWN: no disk is at /dev/of-a-dead-job: No such file or directory (os error 2)",
        "says what is the matter",
    ),
    meant(
        "an export whose authfile lists others",
        "ERR_POLICY: Access denied by server configuration",
        "ERR_POLICY: the authfile of export others does not list this client",
        "says what is the matter",
    ),
    meant(
        "an export whose authfile is not there",
        "served, 1048576 bytes",
        "ERR_POLICY: the authfile of export nolist does not list this client",
        "a list that is missing admits no one; `x-missing-authfile = allow` is as it was",
    ),
    meant(
        "a second section of a file that a client writes to",
        "served, 1048576 bytes",
        "ERR_POLICY: InUse: 1 clients of export plain have the volume of export again; 'x-share = true' on both lets both write",
        "two writers destroy each other's data",
    ),
    meant(
        "the next client where maxconnections is 1, when the first has left",
        "refused",
        "served",
        "the stock server counts all that ever came",
    ),
    meant(
        "processes that pgrep nbd-server finds with two clients",
        "3",
        "1",
        "one process; `| head -1` is right with both",
    ),
    meant(
        "processes that pgrep -f 'nbd-server -C PATH' finds with two clients",
        "3",
        "1",
        "as above",
    ),
    meant(
        "exit code of a second one on the same port",
        "exit status: 0",
        "exit status: 1",
        "the exit code says whether it serves",
    ),
    meant(
        "a section that was appended, after a SIGHUP",
        "true or false",
        "true",
        "a SIGHUP damages the stock server's memory, and what becomes of it then is chance",
    ),
    meant(
        "an export that was there, after a SIGHUP",
        "1048576 bytes or not served",
        "1048576 bytes",
        "as above",
    ),
    meant(
        "an export whose section names another file, after a SIGHUP",
        "1048576 bytes or not served",
        "2097152 bytes",
        "what changed is applied",
    ),
    meant(
        "an export whose section went, after a SIGHUP",
        "1048576 bytes or not served",
        "not served",
        "what went goes",
    ),
    meant(
        "a section beside a file that is half written, after a SIGHUP",
        "false",
        "true",
        "a broken file is that file's matter",
    ),
    meant(
        "an export that was there beside a file that is half written, after a SIGHUP",
        "1048576 bytes or not served",
        "1048576 bytes",
        "see the first one after a SIGHUP",
    ),
    meant(
        "an export after three SIGHUPs that bring nothing",
        "1048576 bytes or not served",
        "1048576 bytes",
        "as above",
    ),
    meant(
        "an export whose disk is away",
        "served",
        "refused",
        "an empty device has no byte to serve",
    ),
    meant(
        "another disk at the path is served",
        "true",
        "false",
        "it is another volume",
    ),
    meant(
        "a job's write after the swap",
        "done",
        "refused",
        "it would go to another volume",
    ),
    meant(
        "the job after a failback, when its old path is empty",
        "served, 18446744073709551615 bytes",
        "served, 4194304 bytes",
        "the volume is followed to its new path",
    ),
    meant(
        "the last byte that the job's disk got",
        "1",
        "3",
        "the second write was refused, the third came to its disk",
    ),
    meant(
        "the last byte that the other disk got",
        "3",
        "0",
        "no byte of another's job",
    ),
];

/// One server, whichever, on a configuration of its own.
struct Server {
    running: Running,
    folder: PathBuf,
    config: PathBuf,
    port: u16,
    /// Where clients are asked to go instead.
    socket: Option<PathBuf>,
}

enum Running {
    Stock(NbdServer),
    Ours(Pid),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Which {
    Stock,
    Ours,
}

/// The question and the answer.
type Answers = Vec<(&'static str, String)>;

impl Server {
    /// Starts one with these sections in its main file; `conf.d` beside it is empty.
    fn start(which: Which, ground: &Ground, sections: &str) -> Outcome<Server> {
        Server::start_at(which, ground, sections, None)
    }

    /// As [`Server::start`], but that clients go to this socket.
    fn start_at(
        which: Which,
        ground: &Ground,
        sections: &str,
        socket: Option<PathBuf>,
    ) -> Outcome<Server> {
        let folder = ground.file(match which {
            Which::Stock => "stock",
            Which::Ours => "ours",
        });
        let _again = fs::remove_dir_all(&folder);
        fs::create_dir_all(folder.join("conf.d"))?;
        // A helper that is not root looks into it.
        for open in [ground.path(), &folder] {
            fs::set_permissions(open, fs::Permissions::from_mode(0o755))?;
        }
        let port = free_port()?;
        let shown = folder.display();
        let text = format!(
            "[generic]\nallowlist = true\nlistenaddr = 127.0.0.1\nport = {port}\nincludedir = {shown}/conf.d\n\
             x-state = {shown}/state\nx-bus = none\nx-settings = {shown}/ours.toml\n{sections}"
        );
        // The stock server reads over it.
        fs::write(folder.join("ours.toml"), "[server]\ndetach_grace_s = 60\n")?;
        let config = folder.join("nbd-server.conf");
        let pid_file = folder.join("nbd-server.pid");
        let running = match which {
            Which::Stock => Running::Stock(NbdServer::start(&folder, &text)?),
            Which::Ours => {
                fs::write(&config, text)?;
                let mut command = Command::new(binary());
                command.arg0("nbd-server");
                command.arg("-C").arg(&config).arg("-p").arg(&pid_file);
                let said = process::run_command("nbd-server (ours)", command, LIMIT)?;
                hold!(said.status.success(), "{}: {}", said.status, said.stderr);
                Running::Ours(Pid::from_raw(
                    fs::read_to_string(&pid_file)?.trim().parse()?,
                ))
            }
        };
        let server = Server {
            running,
            folder,
            config,
            port,
            socket,
        };
        until(LIMIT, "the server to greet", || {
            Ok(knock(&server.endpoint(), "none").ok())
        })?;
        Ok(server)
    }

    fn pid(&self) -> Pid {
        match &self.running {
            Running::Stock(server) => server.pid(),
            Running::Ours(pid) => *pid,
        }
    }

    fn endpoint(&self) -> Endpoint {
        match &self.socket {
            Some(socket) => Endpoint::Unix(socket.clone()),
            None => Endpoint::Tcp(([127, 0, 0, 1], self.port).into()),
        }
    }

    fn uri(&self, export: &str) -> String {
        self.endpoint().uri(export)
    }

    /// Puts a file into `conf.d`, whole or not at all.
    fn put(&self, name: &str, text: &str) -> Outcome<()> {
        let to = self.folder.join("conf.d").join(name);
        let new = self.folder.join("new");
        fs::write(&new, text)?;
        fs::rename(&new, to).doing(name)
    }

    /// SIGHUP, until what it is to bring is there; the server's state when it never comes.
    fn hang_up(&self, wanted: impl Fn() -> bool) -> Outcome<bool> {
        kill(self.pid(), Signal::SIGHUP)?;
        Ok(settled(Duration::from_secs(2), wanted))
    }

    /// What a client is told that chooses this export.
    fn go(&self, export: &str) -> String {
        match knock(&self.endpoint(), export) {
            Ok(Go::Agreed { size, .. }) => format!("served, {size} bytes"),
            Ok(Go::Refused { kind, text }) => {
                let kind = match kind {
                    0x8000_0002 => "ERR_POLICY",
                    0x8000_0006 => "ERR_UNKNOWN",
                    0x8000_0007 => "ERR_SHUTDOWN",
                    _ => "another error",
                };
                match text.is_empty() {
                    true => format!("{kind}, without a word"),
                    false => format!("{kind}: {text}"),
                }
            }
            Err(_) => "the connection is closed".to_owned(),
        }
    }

    fn is_served(&self, export: &str) -> bool {
        self.go(export).starts_with("served")
    }

    fn nbdinfo(&self, words: &[&str], export: &str) -> Outcome<process::Finished> {
        let uri = self.uri(export);
        let words = [words, &[uri.as_str()]].concat();
        process::run("nbdinfo", &words, LIMIT)
    }

    fn ended(&self) -> bool {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid())).unwrap_or_default();
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest);
        state.is_none_or(|state| state.starts_with('Z'))
    }

    /// As an operator does.
    fn stop(&self) -> Outcome<()> {
        kill(self.pid(), Signal::SIGTERM)?;
        until(LIMIT, "the server to end", || {
            Ok(self.ended().then_some(()))
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Running::Ours(pid) = &self.running
            && !self.ended()
        {
            let _ = kill(*pid, Signal::SIGKILL);
        }
    }
}

fn words(said: Result<(), u32>) -> String {
    match said {
        Ok(()) => "done".to_owned(),
        Err(errno) => {
            // The numbers of proto.md "Error values" are Linux's.
            nix::errno::Errno::from_raw(i32::try_from(errno).unwrap_or(0)).to_string()
        }
    }
}

/// Compares the answers of both, and each difference with its row.
fn compare(stock: Answers, ours: Answers) -> Outcome<()> {
    let mut wrong = Vec::new();
    hold!(stock.len() == ours.len(), "as many questions");
    for ((question, theirs), (_, mine)) in stock.iter().zip(&ours) {
        let row = MEANT.iter().find(|row| row.question == *question);
        match row {
            // Of the stock server there can be several: a SIGHUP damages its memory, and what becomes of that is chance.
            Some(row) if row.stock.split(" or ").any(|one| one == theirs) && row.ours == mine => {}
            None if theirs == mine => {}
            _ => wrong.push(format!(
                "{question}\n    stock: {theirs}\n    ours:  {mine}"
            )),
        }
    }
    let same = stock.iter().zip(&ours).filter(|(a, b)| a.1 == b.1).count();
    tell(&format!(
        "the stock server and ours: {same} of {} answers are the same",
        stock.len()
    ));
    hold!(wrong.is_empty(), "{}", wrong.join("\n"));
    Ok(())
}

/// Asks both the same.
fn both(what: &str, ask: impl Fn(Which, &Ground) -> Outcome<Answers>) -> Outcome<()> {
    real(what, NEEDS, |ground| {
        let stock = ask(Which::Stock, ground).doing("the stock server")?;
        let ours = ask(Which::Ours, ground).doing("ours")?;
        compare(stock, ours)
    })
}

#[test]
fn clients_get_the_same_answers_of_both_or_what_is_meant() -> Outcome<()> {
    both("the same answers", |which, ground| {
        let file = |name: &str, text: &[u8]| -> Outcome<String> {
            let path = ground.file(name);
            fs::write(&path, text)?;
            Ok(path.display().to_string())
        };
        let plain = file("plain", &vec![7; 1 << 20])?;
        let fixed = file("fixed", &vec![8; 1 << 20])?;
        let list = file("list", b"10.9.9.9\n")?;
        let sections = [
            format!("[plain]\nexportname = {plain}\n"),
            format!(
                "[offers]\nexportname = {plain}\nflush = true\nfua = true\ntrim = true\nx-share = true\n"
            ),
            format!("[again]\nexportname = {plain}\n"),
            format!("[fixed]\nexportname = {fixed}\nreadonly = true\n"),
            "[dead]\nexportname = /dev/of-a-dead-job\n".to_owned(),
            format!("[others]\nexportname = {fixed}\nreadonly = true\nauthfile = {list}\n"),
            format!("[nolist]\nexportname = {fixed}\nreadonly = true\nauthfile = {list}.none\n"),
            format!("[turns]\nexportname = {fixed}\nreadonly = true\nrotational = true\n"),
            format!("[still]\nexportname = {fixed}\nreadonly = true\nrotational = false\n"),
        ];
        let server = Server::start(which, ground, &sections.concat())?;
        let mut answers = Answers::new();
        let port = server.port.to_string();
        let listed = process::run("nbd-client", &["-l", "127.0.0.1", &port], LIMIT)?;
        let mut lines: Vec<&str> = listed.stdout.lines().collect();
        answers.push(("lines of nbd-client -l", lines.len().to_string()));
        lines.sort_unstable();
        answers.push(("nbd-client -l, sorted", lines.join(", ")));
        let lists = server.nbdinfo(&["--list", "--json"], "")?;
        answers.push(("exit code of nbdinfo --list", lists.status.to_string()));
        for export in ["plain", "fixed"] {
            let size = server.nbdinfo(&["--size"], export)?;
            answers.push(("nbdinfo --size", size.stdout.trim().to_owned()));
        }
        for (question, words, export) in [
            ("is a file writable", ["--is", "read-only"], "plain"),
            (
                "is readonly = true read-only",
                ["--is", "read-only"],
                "fixed",
            ),
            ("is it rotational", ["--is", "rotational"], "plain"),
            ("with rotational = true", ["--is", "rotational"], "turns"),
            ("with rotational = false", ["--is", "rotational"], "still"),
            ("several connections", ["--can", "multi-conn"], "plain"),
            ("FLUSH without flush = true", ["--can", "flush"], "plain"),
            ("FUA without fua = true", ["--can", "fua"], "plain"),
            ("TRIM without trim = true", ["--can", "trim"], "plain"),
            ("FLUSH with flush = true", ["--can", "flush"], "offers"),
            ("FUA with fua = true", ["--can", "fua"], "offers"),
            ("TRIM with trim = true", ["--can", "trim"], "offers"),
            ("WRITE_ZEROES", ["--can", "zero"], "plain"),
            ("CACHE", ["--can", "cache"], "plain"),
            ("structured replies", ["--can", "structured-reply"], "plain"),
        ] {
            let said = server.nbdinfo(&words, export)?;
            // Of these two nbdinfo makes its exit code: 0 is yes, 2 no.
            let word = match said.status.code() {
                Some(0) => "yes",
                Some(2) => "no",
                _ => "no answer",
            };
            answers.push((question, word.to_owned()));
        }
        let info = server.nbdinfo(&["--json"], "plain")?;
        let info: serde_json::Value = serde_json::from_str(&info.stdout)?;
        let size = &info["exports"][0]["export-size"];
        answers.push(("size in the answer to INFO", size.to_string()));
        let image = process::run(
            "qemu-img",
            &["info", "--output=json", "-f", "raw", &server.uri("plain")],
            LIMIT,
        )?;
        let image: serde_json::Value = serde_json::from_str(&image.stdout)?;
        answers.push(("qemu-img info", image["virtual-size"].to_string()));

        let pattern = ground.file("pattern");
        pattern::write_file(&pattern, "plain", 1 << 20, 3)?;
        let pattern = pattern.display().to_string();
        process::succeed("nbdcopy", &[&pattern, &server.uri("plain")], LIMIT)?;
        let copy = ground.file("copy").display().to_string();
        process::succeed("nbdcopy", &[&server.uri("plain"), &copy], LIMIT)?;
        let alike = fs::read(&copy)? == fs::read(&pattern)?;
        answers.push(("nbdcopy there and back", alike.to_string()));
        answers.push((
            "the file after nbdcopy",
            (fs::read(&plain)? == fs::read(&pattern)?).to_string(),
        ));

        for (question, export) in [
            ("a name that is no export", "none"),
            ("an export whose path is not there", "dead"),
            ("an export whose authfile lists others", "others"),
            ("an export whose authfile is not there", "nolist"),
        ] {
            answers.push((question, server.go(export)));
        }
        let client = Client::open(&server.endpoint(), "plain")?;
        answers.push((
            "a second section of a file that a client writes to",
            server.go("again"),
        ));
        client.leave()?;
        let mut client = Client::open(&server.endpoint(), "fixed")?;
        let said = client.write(0, &[1; 512], false)?;
        answers.push(("a write to what is readonly", words(said)));
        let mut client = Client::open(&server.endpoint(), "plain")?;
        let said = client.write(1 << 20, &[1; 512], false)?;
        answers.push(("a write behind the end", words(said)));
        let mut client = Client::open(&server.endpoint(), "plain")?;
        let said = client.read(1 << 20, &mut [0; 512])?;
        answers.push(("a read behind the end", words(said)));
        Ok(answers)
    })
}

#[test]
fn who_may_come_and_where_is_said_by_the_same_keys() -> Outcome<()> {
    both("who may come", |which, ground| {
        let plain = ground.file("plain");
        fs::write(&plain, vec![7; 1 << 20])?;
        let section =
            |name: &str, more: &str| format!("[{name}]\nexportname = {}\n{more}", plain.display());
        let mut answers = Answers::new();
        let socket = ground.file("nbd.sock");
        let unix = format!("unixsock = {}\n", socket.display());
        for (more, on_socket, on_tcp) in [
            ("", "unixsock: its socket", "unixsock: TCP"),
            (
                "duallisten = true\n",
                "unixsock and duallisten: its socket",
                "unixsock and duallisten: TCP",
            ),
            (
                "duallisten = false\n",
                "unixsock and duallisten = false: its socket",
                "unixsock and duallisten = false: TCP",
            ),
        ] {
            // The stock server leaves it behind, and does not begin where one is.
            let _of_the_last = fs::remove_file(&socket);
            let text = format!("{unix}{more}{}", section("plain", ""));
            let mut server = Server::start_at(which, ground, &text, Some(socket.clone()))?;
            answers.push((on_socket, server.go("plain")));
            server.socket = None;
            answers.push((on_tcp, server.go("plain")));
            server.stop()?;
        }

        let text = format!("allowlist = false\n{}", section("plain", ""));
        let server = Server::start(which, ground, &text)?;
        let lists = server.nbdinfo(&["--list"], "")?;
        answers.push((
            "exit code of nbdinfo --list without allowlist",
            lists.status.to_string(),
        ));
        let port = server.port.to_string();
        let listed = process::run("nbd-client", &["-l", "127.0.0.1", &port], LIMIT)?;
        answers.push((
            "exit code of nbd-client -l without allowlist",
            listed.status.to_string(),
        ));
        answers.push((
            "is an export named by nbd-client -l without allowlist",
            listed.stdout.contains("plain").to_string(),
        ));
        answers.push(("an export that is not listed", server.go("plain")));
        server.stop()?;

        let text = format!(
            "x-missing-authfile = allow\n{}{}",
            section("one", "maxconnections = 1\n"),
            section("nolist", "readonly = true\nauthfile = /nowhere/at/all\n")
        );
        let server = Server::start(which, ground, &text)?;
        answers.push((
            "an export whose authfile is not there, with x-missing-authfile = allow",
            server.go("nolist"),
        ));
        let client = Client::open(&server.endpoint(), "one")?;
        let second = server.go("one");
        answers.push((
            "a second client where maxconnections is 1",
            second.split(':').next().unwrap_or_default().to_owned(),
        ));
        client.leave()?;
        let next = settled(Duration::from_secs(2), || server.is_served("one"));
        answers.push((
            "the next client where maxconnections is 1, when the first has left",
            if next { "served" } else { "refused" }.to_owned(),
        ));
        Ok(answers)
    })
}

#[test]
fn helpers_find_the_process_and_what_is_not_root_may_what_it_could() -> Outcome<()> {
    both("the process", |which, ground| {
        let file = ground.file("plain");
        fs::write(&file, vec![7; 1 << 20])?;
        let section = format!("[plain]\nexportname = {}\n", file.display());
        let server = Server::start(which, ground, &section)?;
        let mut answers = Answers::new();
        let mut clients = Vec::new();
        for _ in 0..2 {
            clients.push(Client::open(&server.endpoint(), "plain")?);
        }
        let pid = server.pid().to_string();
        let session = nix::unistd::getsid(Some(server.pid()))?.to_string();
        // In its own session, for this machine may have others of the name.
        let found = process::succeed("pgrep", &["--session", &session, "nbd-server"], LIMIT)?;
        let found: Vec<&str> = found.split_whitespace().collect();
        answers.push((
            "pgrep nbd-server | head -1 is in the pid file",
            (found.first() == Some(&pid.as_str())).to_string(),
        ));
        answers.push((
            "processes that pgrep nbd-server finds with two clients",
            found.len().to_string(),
        ));
        let line = format!("nbd-server -C {}", server.config.display());
        let found = process::succeed("pgrep", &["-f", &line], LIMIT)?;
        answers.push((
            "processes that pgrep -f 'nbd-server -C PATH' finds with two clients",
            found.split_whitespace().count().to_string(),
        ));
        let nobody = |command: &[&str]| -> Outcome<String> {
            let words = [
                &["--reuid=65534", "--regid=65534", "--clear-groups"],
                command,
            ]
            .concat();
            let ran = process::run("setpriv", &words, LIMIT)?;
            Ok(match ran.status.success() {
                true => ran.stdout.trim().to_owned(),
                false => format!("refused ({})", ran.status),
            })
        };
        let pid_file = server.folder.join("nbd-server.pid").display().to_string();
        answers.push((
            "a helper that is not root reads the pid file",
            (nobody(&["cat", &pid_file])? == pid).to_string(),
        ));
        answers.push((
            "a helper that is not root sends SIGHUP",
            nobody(&["kill", "-HUP", &pid])?,
        ));
        let port = server.port.to_string();
        let listed = nobody(&["nbd-client", "-l", "127.0.0.1", &port])?;
        answers.push((
            "a helper that is not root lists",
            listed.lines().count().to_string(),
        ));
        answers.push((
            "a helper that is not root reads",
            nobody(&["nbdinfo", "--size", &server.uri("plain")])?,
        ));
        // The port is taken.
        let pid_file = ground.file("second.pid").display().to_string();
        let config = server.config.display().to_string();
        let args = ["-C", &config, "-p", &pid_file];
        let second = match which {
            Which::Stock => process::run("nbd-server", &args, LIMIT)?,
            Which::Ours => {
                let mut command = Command::new(binary());
                command.arg0("nbd-server").args(args);
                process::run_command("nbd-server (ours)", command, LIMIT)?
            }
        };
        answers.push((
            "exit code of a second one on the same port",
            second.status.to_string(),
        ));
        for client in &mut clients {
            let read = client.read(0, &mut [0; 512])?;
            answers.push(("the first one's clients go on", words(read)));
        }
        server.stop()?;
        let mut gone = clients.remove(0);
        let said = gone.read(0, &mut [0; 512]);
        answers.push((
            "a client after SIGTERM",
            match said {
                Ok(said) => words(said),
                Err(_) => "the connection is closed".to_owned(),
            },
        ));
        let there = server.folder.join("nbd-server.pid").exists();
        answers.push(("the pid file after SIGTERM is there", there.to_string()));
        Ok(answers)
    })
}

#[test]
fn signals_and_sections_do_the_same_or_what_is_meant() -> Outcome<()> {
    both("SIGHUP", |which, ground| {
        let file = |name: &str, mib: usize| -> Outcome<String> {
            let path = ground.file(name);
            fs::write(&path, vec![7; mib << 20])?;
            Ok(path.display().to_string())
        };
        let (one, two, other) = (file("one", 1)?, file("two", 2)?, file("other", 1)?);
        let section = |name: &str, path: &str| format!("[{name}]\nexportname = {path}\n");
        let mut answers = Answers::new();
        let bytes = |server: &Server, export: &str| {
            let said = server.go(export);
            let served = said.strip_prefix("served, ");
            served.unwrap_or("not served").to_owned()
        };

        // An append-only configuration with what dead jobs left in it.
        let dead = section("dead", "/dev/of-a-dead-job");
        let server = Server::start(which, ground, &(dead + &section("stays", &one)))?;
        server.put("b.conf", &section("appended", &other))?;
        let mut client = Client::open(&server.endpoint(), "stays")?;
        let came = server.hang_up(|| server.is_served("appended"))?;
        answers.push((
            "a section that was appended, after a SIGHUP",
            came.to_string(),
        ));
        answers.push((
            "an export that was there, after a SIGHUP",
            bytes(&server, "stays"),
        ));
        let read = client.read(0, &mut [0; 512]);
        answers.push((
            "a client that was there, after a SIGHUP",
            read.map_or("the connection is closed".to_owned(), words),
        ));
        drop(server);

        let of = |file: &str, path: &str| -> Outcome<Server> {
            let server = Server::start(which, ground, &section("stays", &one))?;
            server.put(file, path)?;
            Ok(server)
        };
        let server = of("new.conf", &section("new", &other))?;
        let main = fs::read_to_string(&server.config)?;
        let changed = main.replace(&section("stays", &one), &section("stays", &two));
        fs::write(&server.config, changed)?;
        server.hang_up(|| bytes(&server, "stays") == "2097152 bytes")?;
        answers.push((
            "an export whose section names another file, after a SIGHUP",
            bytes(&server, "stays"),
        ));
        drop(server);

        let server = of("new.conf", &section("new", &other))?;
        let main = fs::read_to_string(&server.config)?;
        fs::write(&server.config, main.replace(&section("stays", &one), ""))?;
        server.hang_up(|| !server.is_served("stays"))?;
        answers.push((
            "an export whose section went, after a SIGHUP",
            bytes(&server, "stays"),
        ));
        drop(server);

        let server = of("half.conf", "[half")?;
        server.put("new.conf", &section("new", &other))?;
        let came = server.hang_up(|| server.is_served("new"))?;
        answers.push((
            "a section beside a file that is half written, after a SIGHUP",
            came.to_string(),
        ));
        answers.push((
            "an export that was there beside a file that is half written, after a SIGHUP",
            bytes(&server, "stays"),
        ));
        drop(server);

        let server = Server::start(which, ground, &section("stays", &one))?;
        // There is nothing to wait for but that the server has had time.
        for _ in 0..3 {
            kill(server.pid(), Signal::SIGHUP)?;
            settled(Duration::from_millis(500), || !server.is_served("stays"));
        }
        answers.push((
            "an export after three SIGHUPs that bring nothing",
            bytes(&server, "stays"),
        ));
        Ok(answers)
    })
}

#[test]
fn disks_that_move_get_their_own_bytes_where_the_stock_server_gives_them_to_others() -> Outcome<()>
{
    both("moved disks", |which, ground| {
        let (first, second) = (LoopDevice::add()?, LoopDevice::add()?);
        let disks = ground.file(match which {
            Which::Stock => "disks-of-stock",
            Which::Ours => "disks-of-ours",
        });
        fs::create_dir(&disks)?;
        let a = Volume::make(&disks, "vol-a", BYTES)?;
        let b = Volume::make(&disks, "vol-b", BYTES)?;
        first.attach(&a.image)?;
        // The stock server reads over x-volume, which says what a pin would.
        let section = format!(
            "[job]\nexportname = {}\nflush = true\nfua = true\nx-volume = {}\n",
            first.node(),
            a.id()
        );
        let server = Server::start(which, ground, &section)?;
        let mut answers = Answers::new();
        let write = |byte: u8| -> Outcome<String> {
            let Ok(mut client) = Client::open(&server.endpoint(), "job") else {
                return Ok("refused".to_owned());
            };
            let said = client.write(0, &[byte; 4096], true)?;
            client.leave()?;
            Ok(words(said))
        };
        let listed = || -> Outcome<String> {
            let port = server.port.to_string();
            let said = process::run("nbd-client", &["-l", "127.0.0.1", &port], LIMIT)?;
            Ok(said
                .stdout
                .lines()
                .any(|line| line.trim() == "job")
                .to_string())
        };
        // Whoever has the device open keeps it attached; the loop driver sends no event of its own for that.
        let detach = |device: &LoopDevice| {
            let _deferred = device.detach()?;
            device.poke()?;
            until(LIMIT, "the device to be empty", || {
                Ok(device.backing_file().is_none().then_some(()))
            })
        };
        until(LIMIT, "the job to be served", || {
            Ok(server.is_served("job").then_some(()))
        })?;
        answers.push(("a job's write", write(1)?));
        detach(&first)?;
        answers.push(("the name in the list while the disk is away", listed()?));
        answers.push((
            "an export whose disk is away",
            match server.is_served("job") {
                true => "served",
                false => "refused",
            }
            .to_owned(),
        ));
        // Another volume gets the node.
        first.attach(&b.image)?;
        let took = settled(Duration::from_secs(2), || server.is_served("job"));
        answers.push(("another disk at the path is served", took.to_string()));
        answers.push(("a job's write after the swap", write(2)?));
        // The volume comes back under the other node: a failback.
        second.attach(&a.image)?;
        let served = settled(Duration::from_secs(10), || server.is_served("job"));
        answers.push(("the export after a failback", served.to_string()));
        answers.push(("the job's write after a failback", write(3)?));
        detach(&first)?;
        answers.push((
            "the job after a failback, when its old path is empty",
            server
                .go("job")
                .split(':')
                .next()
                .unwrap_or_default()
                .to_owned(),
        ));
        drop(server);
        detach(&second)?;
        let byte =
            |volume: &Volume| -> Outcome<String> { Ok(fs::read(&volume.image)?[0].to_string()) };
        answers.push(("the last byte that the job's disk got", byte(&a)?));
        answers.push(("the last byte that the other disk got", byte(&b)?));
        Ok(answers)
    })
}

/// The list that people read is this one.
#[test]
fn manual_lists_each_difference() {
    const PLACE: &str = "docs/migrate-from-nbd-server.md";
    const MARKS: [&str; 2] = [
        "<!-- differences: written by a test -->\n",
        "<!-- end of differences -->\n",
    ];
    let mut seen = BTreeMap::new();
    let mut table = "\n| | nbd-server 3.24 | nbdtrack | |\n|---|---|---|---|\n".to_owned();
    for Meant {
        question,
        stock,
        ours,
        why,
    } in MEANT
    {
        assert!(seen.insert(question, ()).is_none(), "{question}: twice");
        assert_ne!(stock, ours, "{question}");
        table.push_str(&format!("| {question} | {stock} | {ours} | {why} |\n"));
    }
    table.push('\n');
    let path = format!("{}/{PLACE}", env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(MARKS[0]).unwrap();
    let (kept, after) = rest.split_once(MARKS[1]).unwrap();
    if std::env::var_os("NBDTRACK_ACCEPT").is_some() {
        let text = format!("{before}{}{table}{}{after}", MARKS[0], MARKS[1]);
        fs::write(&path, text).unwrap();
        return;
    }
    assert!(
        kept == table,
        "{PLACE}: accept with NBDTRACK_ACCEPT=1\n{table}"
    );
}
