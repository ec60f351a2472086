//! Debian's nbd-server in the daemon's place: exports by path, and the waits that stand where the daemon's signals are.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use super::bed::{Bed, STEP};
use support::client::{Client, knock};
use support::{Outcome, until};
use support::{hold, trouble};

/// The stock server's exports.
#[derive(Default)]
pub struct Stock {
    /// Volumes that get an export at the start.
    pub wanted: Vec<usize>,
    /// The path of each export: the node that its volume had at the first start, as whoever wrote the configuration found it.
    paths: BTreeMap<usize, String>,
}

/// The server and its children, by number. A child holds the disk of one connection open.
pub const SERVERS: &str = "grep -lsx nbd-server /proc/[0-9]*/comm | cut -d/ -f3";

/// Where udevd does not run there is nothing to wait for.
const SETTLE: &str = "udevadm settle --timeout=50 || true";

/// As long as [`STEP`] six times over. Where it greets at all it greets in seconds, but once, on a loaded host, it had not in forty; what it
/// makes first are primes, at random.
const DH_PARAMETERS: Duration = Duration::from_secs(240);

impl Bed {
    /// Gives an export a path by hand, for a disk that says no serial or is to be found by a link.
    pub fn export_path(&mut self, index: usize, path: &str) {
        if let Some(stock) = &mut self.stock {
            stock.paths.insert(index, path.to_owned());
        }
    }

    /// Starts the stock server, whose paths stay what they were found to be at its first start.
    pub fn start_stock(&mut self) -> Outcome<()> {
        let Some(stock) = &self.stock else {
            trouble!("the daemon serves");
        };
        let mut text = "[generic]\nuser = root\ngroup = root\nallowlist = true\n".to_owned();
        let mut paths = BTreeMap::new();
        for index in &stock.wanted {
            let path = match stock.paths.get(index) {
                Some(path) => path.clone(),
                // Not there: no one could have found its path.
                None if self.volumes[*index].plug.is_none() => continue,
                None => self.node_by_link(*index)?,
            };
            let name = &self.volumes[*index].export;
            let _ = write!(
                text,
                "[{name}]\nexportname = {path}\nflush = true\nfua = true\n"
            );
            paths.insert(*index, path);
        }
        let Some(first) = paths.keys().next().copied() else {
            trouble!("no volume is plugged");
        };
        self.stock = Some(Stock {
            wanted: stock.wanted.clone(),
            paths,
        });
        self.machine.agent.put("/etc/nbd-server/config", &text)?;
        self.machine
            .agent
            .run("nbd-server -C /etc/nbd-server/config")?;
        // It listens at once, and accepts only after it has made its DH parameters.
        let (endpoint, name) = (self.endpoint(), self.volumes[first].export.clone());
        until(DH_PARAMETERS, "the stock server's greeting", || {
            Ok(knock(&endpoint, &name).ok())
        })?;
        self.closed_stock(first)
    }

    pub fn kill_stock(&self) -> Outcome<()> {
        self.machine.agent.run(&format!("kill -9 $({SERVERS})"))?;
        let gone = format!("[ -z \"$({SERVERS})\" ]");
        self.guest_until("the end of the stock server", &gone)
    }

    /// Plugs volumes one right after the other, and waits until the guest has their nodes and udev is done with them.
    pub fn attach_stock(&mut self, indexes: &[usize]) -> Outcome<()> {
        let mark = self.machine.udev.mark();
        for index in indexes {
            self.plug(*index)?;
        }
        let mut left = indexes.len();
        let limit = STEP * u32::try_from(indexes.len())?;
        self.machine
            .udev
            .wait(mark, limit, "the kernel's `add`", |line| {
                let mut words = line.text.split_whitespace();
                if words.next()?.starts_with("KERNEL[") && words.next()? == "add" {
                    left -= 1;
                }
                (left == 0).then_some(())
            })?;
        self.udev_settled()
    }

    /// Waits until udevd, where it runs, has nothing to do: it opens disks that come, and those that a writer has closed.
    fn udev_settled(&self) -> Outcome<()> {
        self.machine.agent.run(SETTLE).map(drop)
    }

    /// Waits until no one has the disk of a stock export open that its clients have left: neither the server's child nor udevd.
    /// A name is given again only then. Nothing to wait for under the daemon.
    pub fn closed_stock(&self, index: usize) -> Outcome<()> {
        let path = self.stock.as_ref().and_then(|s| s.paths.get(&index));
        let Some(path) = path else { return Ok(()) };
        // The file system of a removed node says so behind the name.
        let closed = format!(
            "n=$(readlink -f {path}); while readlink $(grep -lsx nbd-server /proc/[0-9]*/comm | sed 's,comm,fd/*,') | grep -Eqx \"$n( .deleted.)?\"; \
             do sleep 0.05; done; {SETTLE}"
        );
        self.machine.agent.run(&closed).map(drop)
    }

    /// As [`Bed::write`], where a refusal or an error is counted.
    pub fn write_stock(&mut self, index: usize, block: usize) -> Outcome<()> {
        let Ok(mut client) = Client::open(&self.endpoint(), &self.volumes[index].export) else {
            self.told.refused += 1;
            return Ok(());
        };
        match self.write_on(&mut client, index, block)? {
            Ok(()) => self.told.acknowledged += 1,
            Err(_) => self.told.refused += 1,
        }
        client.leave()?;
        self.closed_stock(index)
    }

    /// Waits until a file that is written now proves by its time that it is of this boot, to the daemon: half a minute after the boot began.
    pub fn past_boot(&self) -> Outcome<()> {
        self.guest_until(
            "the guest to have run for a while",
            "[ $(cut -d. -f1 /proc/uptime) -gt 30 ]",
        )
    }

    /// The node of a plugged disk that no daemon tells of: where its link points, once udevd has nothing to do. The daemon serves a disk
    /// seconds before a slow udevd has moved the link.
    pub fn node_by_link(&self, index: usize) -> Outcome<String> {
        let properties = &self.volumes[index].properties;
        let link = match properties["wwn"].as_u64() {
            Some(wwn) => format!("wwn-0x{wwn:016x}"),
            None => {
                let serial = properties["serial"].as_str().unwrap_or_default();
                format!("*{}", &serial[..serial.len().min(20)])
            }
        };
        let said = self.machine.agent.run(&format!(
            "{SETTLE}; for l in /dev/disk/by-id/{link}; do readlink -f $l; break; done"
        ))?;
        hold!(
            said.starts_with("/dev/") && !said.contains('*'),
            "no node of {}: {said}",
            self.volumes[index].name
        );
        Ok(said.trim().to_owned())
    }
}
