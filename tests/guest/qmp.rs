//! QEMU's machine protocol: commands and events, all kept in a log (QEMU, docs/interop/qmp-spec.txt).

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::lines::Lines;
use support::trouble;
use support::{Doing, Outcome};

/// How long QEMU may take to answer, on a machine that does much else.
const ANSWER: Duration = Duration::from_secs(60);

pub struct Qmp {
    socket: UnixStream,
    lines: Lines,
    /// Ids tell an answer from those of earlier commands.
    next: u64,
}

impl Qmp {
    pub fn connect(socket: UnixStream, log: &Path) -> Outcome<Qmp> {
        let lines = Lines::read(socket.try_clone()?, log)?;
        let mut qmp = Qmp {
            socket,
            lines,
            next: 0,
        };
        qmp.ask("qmp_capabilities", json!({}))?;
        Ok(qmp)
    }

    /// Runs a command; QEMU's refusal is an error.
    pub fn ask(&mut self, command: &str, arguments: Value) -> Outcome<Value> {
        match self.try_ask(command, &arguments)? {
            Ok(value) => Ok(value),
            Err(refusal) => trouble!("QMP {command} {arguments}: {refusal}"),
        }
    }

    /// Runs a command; QEMU's refusal is a value.
    pub fn try_ask(&mut self, command: &str, arguments: &Value) -> Outcome<Result<Value, String>> {
        self.next += 1;
        let id = self.next;
        let mark = self.lines.mark();
        let text = json!({ "execute": command, "arguments": arguments, "id": id }).to_string();
        self.socket
            .write_all(format!("{text}\n").as_bytes())
            .doing("write to QMP")?;
        self.lines
            .wait(mark, ANSWER, format_args!("QMP {command}"), |line| {
                let value: Value = serde_json::from_str(&line.text).ok()?;
                if value.get("id")?.as_u64()? != id {
                    return None;
                }
                Some(match value.get("error") {
                    Some(error) => Err(error["desc"].as_str().unwrap_or_default().to_owned()),
                    None => Ok(value["return"].clone()),
                })
            })
    }

    pub fn mark(&self) -> usize {
        self.lines.mark()
    }

    /// Waits for an event after `mark` of which `holds` is true.
    pub fn wait_event(
        &self,
        mark: usize,
        name: &str,
        limit: Duration,
        holds: impl Fn(&Value) -> bool,
    ) -> Outcome<Value> {
        self.lines
            .wait(mark, limit, format_args!("QEMU's {name}"), |line| {
                let value: Value = serde_json::from_str(&line.text).ok()?;
                (value.get("event")?.as_str()? == name && holds(&value["data"]))
                    .then(|| value["data"].clone())
            })
    }
}
