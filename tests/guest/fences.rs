//! How long a client's session outlives its disk, and where that time goes: by tracing the guest's kernel, on its clock.

use std::collections::{BTreeSet, VecDeque};

use super::bed::Bed;
use support::Outcome;

/// One fence, in microseconds since the kernel's `remove`.
#[derive(Debug, Clone, Copy)]
pub struct Fence {
    /// The daemon's thread of control was woken; 0 when it was about to run anyway.
    pub woken: u64,
    /// It had the processor.
    pub running: u64,
    /// It shut the client's socket down.
    pub cut: u64,
}

/// What the clients of disks that are pulled do, which says what a shutdown belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Clients {
    /// Nothing: each disk's session is there until it is cut, in the order of the removals.
    Wait,
    /// They write, and many leave at the first error, before the `remove`: such a disk has no fence, and the next shutdown is another
    /// disk's. So only one that can be no other's counts.
    Stream,
    /// There are none, for the disk was prepared.
    Gone,
}

impl Clients {
    const ALL: [Clients; 3] = [Clients::Wait, Clients::Stream, Clients::Gone];

    fn word(self) -> &'static str {
        match self {
            Clients::Wait => "wait",
            Clients::Stream => "stream",
            Clients::Gone => "gone",
        }
    }
}

/// A `remove` whose session is not cut yet.
struct Removed {
    at: u64,
    woken: Option<u64>,
    running: Option<u64>,
}

impl Bed {
    /// Traces the guest's kernel: block devices' uevents, the daemon's shutdown(2) of its clients' sockets, and when its
    /// thread of control is woken and runs.
    pub fn trace_fences(&self) -> Outcome<()> {
        if !self.ours() {
            return Ok(());
        }
        // kobject_uevent_env itself is not traceable in Debian's kernel. block_uevent is what it calls for a disk just
        // before it sends; the first one after device_del of the disk is the `remove`. Both take a struct device, whose
        // first member is its kobject, whose first member is the name. The clock is CLOCK_MONOTONIC. The thread of control
        // fences the lease and cuts its first sessions; one whose client left because its I/O failed, often before the
        // `remove`, is shut down by its own thread, and counts as no fence.
        self.machine.agent.run(
            "cd /sys/kernel/tracing && p=$(systemctl show -P MainPID nbdtrack) && echo mono >trace_clock && \
             echo 'p:bed_del device_del name=+0(+0(%di)):string' >kprobe_events && \
             echo 'p:bed_uevent block_uevent name=+0(+0(%di)):string' >>kprobe_events && \
             echo 1 >events/kprobes/enable && \
             echo \"common_pid == $p && how == 2\" >events/syscalls/sys_enter_shutdown/filter && \
             echo 1 >events/syscalls/sys_enter_shutdown/enable && \
             echo \"pid == $p\" >events/sched/sched_waking/filter && echo 1 >events/sched/sched_waking/enable && \
             echo \"next_pid == $p\" >events/sched/sched_switch/filter && echo 1 >events/sched/sched_switch/enable && \
             echo 1 >tracing_on",
        )?;
        Ok(())
    }

    /// Says of what kind the pulls from here on are. Until then, [`Clients::Stream`].
    pub fn measure(&self, clients: Clients) -> Outcome<()> {
        if !self.ours() {
            return Ok(());
        }
        let word = clients.word();
        let command = format!("echo bed_clients={word} >/sys/kernel/tracing/trace_marker");
        self.machine.agent.run(&command).map(drop)
    }

    /// Takes the fences since the last call: from the kernel's `remove` of a disk to the shutdown of its client's socket.
    pub fn take_fences(&mut self) -> Outcome<()> {
        if !self.ours() {
            return Ok(());
        }
        let text = self
            .machine
            .agent
            .run("cd /sys/kernel/tracing && cat trace && echo >trace")?;
        self.row.fences.extend(fences(&text));
        Ok(())
    }
}

fn fences(trace: &str) -> Vec<Fence> {
    let mut found = Vec::new();
    let mut going: BTreeSet<&str> = BTreeSet::new();
    // In their order; a disk without a session has no fence, and is forgotten at the next event that is no `remove`.
    let mut removed: VecDeque<Removed> = VecDeque::new();
    let mut clients = Clients::Stream;
    for line in trace.lines() {
        let Some(at) = trace_us(line) else { continue };
        let name = line.rsplit("name=").next().unwrap_or_default();
        if let Some((_, word)) = line.split_once("bed_clients=") {
            let said = Clients::ALL.into_iter().find(|c| c.word() == word.trim());
            clients = said.unwrap_or(Clients::Gone);
            removed.clear();
        } else if line.contains("bed_del:") {
            going.insert(name);
        } else if line.contains("bed_uevent:") {
            if going.remove(name) && clients != Clients::Gone {
                removed.push_back(Removed {
                    at,
                    woken: None,
                    running: None,
                });
            } else {
                removed.clear();
            }
        } else if line.contains("sched_waking:") {
            for one in &mut removed {
                one.woken.get_or_insert(at);
            }
        } else if line.contains("sched_switch:") {
            for one in &mut removed {
                one.running.get_or_insert(at);
            }
        } else if line.contains("sys_shutdown(")
            && let Some(one) = removed.pop_front()
        {
            if clients == Clients::Stream && !removed.is_empty() {
                removed.clear();
                continue;
            }
            let since = |at: Option<u64>| at.unwrap_or(one.at).saturating_sub(one.at);
            let running = since(one.running);
            found.push(Fence {
                woken: since(one.woken).min(running),
                running,
                cut: since(Some(at)),
            });
        }
    }
    found
}

/// The time of a line of trace: `comm-pid [cpu] flags seconds.micros: event`.
fn trace_us(line: &str) -> Option<u64> {
    let word = line
        .split_whitespace()
        .find(|w| w.ends_with(':') && w.contains('.') && w.as_bytes()[0].is_ascii_digit())?;
    let (s, us) = word.trim_end_matches(':').split_once('.')?;
    Some(s.parse::<u64>().ok()? * 1_000_000 + us.parse::<u64>().ok()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cuts(trace: &str) -> Vec<u64> {
        fences(trace).iter().map(|fence| fence.cut).collect()
    }

    fn pull(disk: &str, at: &str) -> String {
        format!(
            "kworker-9 [000] d.. 7.{at}: bed_del: (device_del+0x0/0x3) name=\"{disk}\"\n\
             kworker-9 [000] d.. 7.{at}: bed_uevent: (block_uevent+0x0/0x3) name=\"{disk}\"\n"
        )
    }

    fn shutdown(at: &str) -> String {
        format!("nbdtrack-5 [000] d.. 7.{at}: sys_shutdown(fd: 11, how: 2)\n")
    }

    #[test]
    fn a_shutdown_is_counted_only_for_the_disk_whose_session_it_ends() {
        let (a, b) = (pull("vdb", "100000"), pull("vdc", "900000"));
        let both = format!("{a}{b}{}{}", shutdown("900700"), shutdown("901500"));
        let waiting =
            format!("sh-1 [000] d.. 7.000001: tracing_mark_write: bed_clients=wait\n{both}");
        assert_eq!(cuts(&waiting), [800_700, 1500]);
        // The first disk's client has left by itself, or not: no one knows whose shutdown the first is.
        assert_eq!(cuts(&both), [0; 0]);
        let one = format!("{a}{}{b}{}", shutdown("100700"), shutdown("901500"));
        assert_eq!(cuts(&one), [700, 1500]);
        let gone = format!("sh-1 [000] d.. 7.000001: tracing_mark_write: bed_clients=gone\n{one}");
        assert_eq!(cuts(&gone), [0; 0]);
    }
}
