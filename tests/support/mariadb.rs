//! A MariaDB server of a test's own: private data, a private socket, a port of the loopback; started, stopped, paused and killed in
//! mid-run.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::process::{self, Running, command};
use super::{Doing, Outcome, until};
use crate::hold;

/// Debian's galera-4.
pub const GALERA: &str = "/usr/lib/galera/libgalera_smm.so";
/// How a node of ours gets the state of another one (the interface of MariaDB's `wsrep_sst_*`): it has it.
const SAME_STATE: &str = r#"#!/bin/sh
here=$(dirname "$0")
while [ $# -gt 0 ]; do
    case $1 in
        --role) role=$2 ;;
        --gtid) gtid=$2 ;;
    esac
    shift
done
case $role in
    joiner)
        echo "ready 127.0.0.1:1/same"
        until [ -s "$here/given" ]; do sleep 0.02; done
        cat "$here/given"
        ;;
    donor)
        echo "$gtid" >"$here/given.new"
        mv "$here/given.new" "$here/given"
        echo "done $gtid"
        ;;
esac
"#;
const START_LIMIT: Duration = Duration::from_secs(60);
const SQL_LIMIT: Duration = Duration::from_secs(30);

/// The server's data, and its process while it runs.
pub struct MariaDb {
    folder: PathBuf,
    pub socket: PathBuf,
    pub port: u16,
    options: Vec<String>,
    /// Where the server finds a program of ours.
    tools: Option<PathBuf>,
    process: Option<Running>,
}

impl MariaDb {
    /// Makes the data in `folder` (which may be a mount) with a database `appliance`, and an account `nbdtrack` without a password
    /// that may do there what it likes. Leaves the server running.
    pub fn make(folder: &Path, options: &[&str]) -> Outcome<MariaDb> {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        let mut server = MariaDb::install(folder, options)?;
        server.start()?;
        server.admit()?;
        Ok(server)
    }

    /// Two nodes of one Galera cluster on the loopback, in folders of their own; both begin with the same data, and what the first has
    /// done since then the second is told as it joins.
    pub fn cluster(folder: &Path) -> Outcome<[MariaDb; 2]> {
        let (one, two) = (folder.join("node-1"), folder.join("node-2"));
        let joins = folder.join("wsrep_sst_same");
        std::fs::write(&joins, SAME_STATE)?;
        std::fs::set_permissions(&joins, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let mut ports = [0; 4];
        for port in &mut ports {
            *port = super::daemon::free_port()?;
        }
        let options = |node: usize, peers: &str| {
            vec![
                "--wsrep-on=ON".to_owned(),
                format!("--wsrep-provider={GALERA}"),
                format!(
                    "--wsrep-provider-options=gmcast.listen_addr=tcp://127.0.0.1:{};ist.recv_addr=127.0.0.1:{};\
                     gcache.size=8M;gcache.page_size=8M;pc.recovery=false",
                    ports[node],
                    ports[node + 2]
                ),
                format!("--wsrep-cluster-address=gcomm://{peers}"),
                "--wsrep-cluster-name=nbdtrack".to_owned(),
                format!("--wsrep-node-name=node-{}", node + 1),
                "--wsrep-node-address=127.0.0.1".to_owned(),
                "--wsrep-sst-method=same".to_owned(),
                "--binlog-format=ROW".to_owned(),
                "--innodb-autoinc-lock-mode=2".to_owned(),
            ]
        };
        std::fs::create_dir(&one)?;
        let mut first = MariaDb::install(&one, options(0, ""))?;
        first.tools = Some(folder.to_owned());
        first.start()?;
        first.admit()?;
        first.stop()?;
        let copied = [&one, &two].map(|folder| folder.display().to_string());
        process::succeed("cp", &["-a", &copied[0], &copied[1]], START_LIMIT)?;
        first.start()?;
        let mut second = MariaDb {
            socket: two.join("mysqld.sock"),
            folder: two,
            port: super::daemon::free_port()?,
            options: options(1, &format!("127.0.0.1:{}", ports[0])),
            tools: Some(folder.to_owned()),
            process: None,
        };
        second.start()?;
        for node in [&first, &second] {
            until(START_LIMIT, "two nodes to be one cluster", || {
                Ok((node.status("wsrep_cluster_size")? == 2).then_some(()))
            })?;
        }
        Ok([first, second])
    }

    /// A number that the server counts.
    pub fn status(&self, name: &str) -> Outcome<u64> {
        let line = self.sql(&format!("SHOW GLOBAL STATUS LIKE '{name}'"))?;
        let value = line.rsplit('\t').next().unwrap_or_default();
        value.parse().doing(format!("{name}: {line:?}"))
    }

    fn install(folder: &Path, options: Vec<String>) -> Outcome<MariaDb> {
        let data = folder.join("data");
        let args = [
            "--no-defaults".to_owned(),
            format!("--datadir={}", data.display()),
            "--auth-root-authentication-method=normal".to_owned(),
            "--skip-test-db".to_owned(),
            "--user=root".to_owned(),
            // The least that the server takes: its data is to fit a small disk.
            "--innodb-log-file-size=4M".to_owned(),
        ];
        process::succeed("mariadb-install-db", &args, START_LIMIT)?;
        Ok(MariaDb {
            folder: folder.to_owned(),
            socket: folder.join("mysqld.sock"),
            port: super::daemon::free_port()?,
            options,
            tools: None,
            process: None,
        })
    }

    /// Makes the database and the account.
    fn admit(&self) -> Outcome<()> {
        self.sql("CREATE DATABASE appliance; CREATE USER nbdtrack@localhost; GRANT ALL ON appliance.* TO nbdtrack@localhost")?;
        Ok(())
    }

    /// Starts the server (again), and waits until it answers.
    pub fn start(&mut self) -> Outcome<()> {
        assert!(self.process.is_none(), "one server at a time");
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(self.folder.join("mariadb.log"))?;
        let mut command = command("/usr/sbin/mariadbd");
        command
            .arg("--no-defaults")
            .arg(format!("--datadir={}", self.folder.join("data").display()))
            .arg(format!("--socket={}", self.socket.display()))
            .arg(format!(
                "--pid-file={}",
                self.folder.join("mysqld.pid").display()
            ))
            .arg(format!("--port={}", self.port))
            .args(["--user=root", "--bind-address=127.0.0.1"])
            .args(["--innodb-log-file-size=4M", "--innodb-buffer-pool-size=8M"])
            .args(&self.options)
            .stdout(Stdio::null())
            .stderr(log);
        if let Some(tools) = &self.tools {
            let path = std::env::var("PATH").unwrap_or_default();
            command.env("PATH", format!("{}:{path}", tools.display()));
        }
        self.process = Some(Running(command.spawn().doing("start mariadbd")?));
        until(START_LIMIT, "mariadbd to answer", || {
            if let Some(process) = &mut self.process
                && let Some(status) = process.0.try_wait()?
            {
                crate::trouble!("mariadbd ended with {status}");
            }
            let asked = self.ask("SELECT 1")?;
            Ok(asked.status.success().then_some(()))
        })
    }

    fn ask(&self, statements: &str) -> Outcome<process::Finished> {
        let socket = format!("--socket={}", self.socket.display());
        let args = [
            "--no-defaults",
            &socket,
            "--user=root",
            "-NB",
            "appliance",
            "-e",
            statements,
        ];
        let args: Vec<&str> = args
            .into_iter()
            // Before it is made.
            .filter(|arg| {
                *arg != "appliance"
                    || !statements.starts_with("CREATE DATABASE") && statements != "SELECT 1"
            })
            .collect();
        process::run("mariadb", &args, SQL_LIMIT)
    }

    /// Runs statements as the appliance's account, and returns what they give: a line for each row, tabs between columns.
    pub fn sql(&self, statements: &str) -> Outcome<String> {
        let done = self.ask(statements)?;
        hold!(done.status.success(), "{statements}: {}", done.stderr);
        Ok(done.stdout.trim_end().to_owned())
    }

    /// The lines of `[server]` by which a daemon uses it, over its socket.
    pub fn store(&self, owner: &str) -> String {
        format!(
            "store = \"mysql://nbdtrack@localhost/appliance?socket={}\"\nstore_owner = {owner:?}\nstore_poll_s = 1\n",
            self.socket.display()
        )
    }

    pub fn pause(&self) -> Outcome<()> {
        self.signal(Signal::SIGSTOP)
    }

    pub fn resume(&self) -> Outcome<()> {
        self.signal(Signal::SIGCONT)
    }

    fn signal(&self, signal: Signal) -> Outcome<()> {
        match &self.process {
            Some(process) => process.signal(signal),
            None => crate::trouble!("the server does not run"),
        }
    }

    /// `kill -9`
    pub fn kill(&mut self) -> Outcome<()> {
        self.process.take();
        Ok(())
    }

    /// In order, as an operator does.
    pub fn stop(&mut self) -> Outcome<()> {
        self.signal(Signal::SIGTERM)?;
        if let Some(mut process) = self.process.take() {
            process.wait(START_LIMIT)?;
        }
        Ok(())
    }
}
