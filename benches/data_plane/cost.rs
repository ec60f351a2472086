//! What a server uses: processor time and memory of its process and of those that it forked.

use std::time::Duration;

use nix::time::clock_getcpuclockid;
use nix::unistd::{Pid, SysconfVar, sysconf};

use support::Outcome;

/// Processor time so far. Children that are gone count with the kernel's ticks, all else with nanoseconds.
pub fn cpu(pid: Pid) -> Outcome<Duration> {
    let mut sum = reaped(pid)?;
    for pid in family(pid) {
        // A child that has just ended is in `reaped` the next time.
        if let Ok(now) = clock_getcpuclockid(pid).and_then(nix::time::ClockId::now) {
            sum += Duration::from(now);
        }
    }
    Ok(sum)
}

/// Forgets the peak that [`peak_kib`] tells; see proc_pid_clear_refs(5).
pub fn reset_peak(pid: Pid) {
    for pid in family(pid) {
        // A child may have just ended.
        let _ = std::fs::write(format!("/proc/{pid}/clear_refs"), "5");
    }
}

/// The most that was resident since [`reset_peak`], in KiB.
pub fn peak_kib(pid: Pid) -> u64 {
    sum(pid, "status", "VmHWM:")
}

/// What would be free if the processes were not there, in KiB: pages that processes share count once.
pub fn resident_kib(pid: Pid) -> u64 {
    sum(pid, "smaps_rollup", "Pss:")
}

fn sum(pid: Pid, file: &str, field: &str) -> u64 {
    let read = |pid: Pid| {
        let text = std::fs::read_to_string(format!("/proc/{pid}/{file}")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(field))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    family(pid).into_iter().filter_map(read).sum()
}

/// The process and its children.
fn family(pid: Pid) -> Vec<Pid> {
    let mut all = vec![pid];
    let threads = std::fs::read_dir(format!("/proc/{pid}/task"));
    for thread in threads.into_iter().flatten().flatten() {
        let text = std::fs::read_to_string(thread.path().join("children")).unwrap_or_default();
        let children = text.split_whitespace().filter_map(|word| word.parse().ok());
        all.extend(children.map(Pid::from_raw));
    }
    all
}

/// proc_pid_stat(5), fields 16 and 17: what children took that are gone.
fn reaped(pid: Pid) -> Outcome<Duration> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // Field 2 is a name in parentheses that may hold anything; field 3 comes after the last of them.
    let after = text.rsplit(')').next().unwrap_or_default();
    let fields = after.split_whitespace().skip(13).take(2);
    let ticks: u64 = fields.filter_map(|word| word.parse::<u64>().ok()).sum();
    let per_second = sysconf(SysconfVar::CLK_TCK)?.unwrap_or(100);
    Ok(Duration::from_secs(ticks) / u32::try_from(per_second)?)
}
