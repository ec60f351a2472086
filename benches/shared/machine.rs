//! What the numbers of a benchmark were measured on, in words.

/// Processor, cores and kernel.
pub fn machine() -> String {
    let word = |path: &str| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        text.trim().to_owned()
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let model = word("/proc/cpuinfo");
    let model = model
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split(": ").nth(1))
        .unwrap_or("unknown processor");
    format!(
        "{cores} cores ({model}), Linux {}",
        word("/proc/sys/kernel/osrelease")
    )
}

/// The machine's load over the last minute: above the number of cores, the tails are other programs' as well.
pub fn load() -> String {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().unwrap_or_default().to_owned()
}
