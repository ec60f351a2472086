//! A MariaDB server of a test's own: private data, a private socket, a port of the loopback; started, stopped, paused and killed in
//! mid-run.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use nix::sys::signal::Signal;

use super::process::{self, Running, command};
use super::{Doing, Outcome, until};
use crate::hold;

const START_LIMIT: Duration = Duration::from_secs(60);
const SQL_LIMIT: Duration = Duration::from_secs(30);

/// The server's data, and its process while it runs.
pub struct MariaDb {
    folder: PathBuf,
    pub socket: PathBuf,
    pub port: u16,
    options: Vec<String>,
    process: Option<Running>,
}

impl MariaDb {
    /// Makes the data in `folder` (which may be a mount) with a database `appliance`, and an account `nbdtrack` without a password
    /// that may do there what it likes. Leaves the server running.
    pub fn make(folder: &Path, options: &[&str]) -> Outcome<MariaDb> {
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
        let mut server = MariaDb {
            folder: folder.to_owned(),
            socket: folder.join("mysqld.sock"),
            port: super::daemon::free_port()?,
            options: options.iter().map(|&option| option.to_owned()).collect(),
            process: None,
        };
        server.start()?;
        server.sql("CREATE DATABASE appliance; CREATE USER nbdtrack@localhost; GRANT ALL ON appliance.* TO nbdtrack@localhost")?;
        Ok(server)
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
