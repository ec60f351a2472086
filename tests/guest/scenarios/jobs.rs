//! A failback as an appliance does it, with nbdtrack in nbd-server's place: two VMs of three disks, replication running, everything
//! detached at once and attached in another order, a SIGHUP, and the next jobs. One VM's exports are sections of nbd-server's configuration,
//! appended by whoever does not find its name; the other's are rows that the appliance inserts into its own table, in a MariaDB outside the guest.

mod appliance;

use std::cell::Cell;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use self::appliance::Appliance;
use crate::bed::{Bed, STEP};
use crate::machine::{DATABASE, Shape};
use crate::scenarios::packaging::{greeted, one_process, served_by_ours};
use crate::stage::{Start, Verdict, staged};
use support::ground::skip;
use support::hold;
use support::process::installed;
use support::stream::{Pace, Stream};
use support::{Outcome, until};

/// On one machine type: what differs between them is in the scenarios of moves.
mod failback {
    mod q35 {
        use crate::machine::Shape;
        use support::Outcome;

        #[test]
        fn jobs_after_a_failback_succeed_without_a_restart() -> Outcome<()> {
            super::super::failback_of_two_vms(Shape::Q35)
        }
    }
}

/// Six of them at one time are not more than an emulated guest carries.
const JOB: Pace = Pace {
    depth: 2,
    rate: 40,
    region: 512 << 10,
};
const CONF: &str = "/etc/nbd-server/conf.d";
const SETTINGS: &str = "/etc/nbdtrack/nbd-server.toml";
/// The VM whose disks' exports are rows, and one that was replicated elsewhere until now.
const DB: &str = "4205784a-098a-40f1-1f1e-a5cd2597fd59";
const NEW: &str = "4205784a-098a-40f1-1f1e-a5cd2597fd60";

fn failback_of_two_vms(shape: Shape) -> Outcome<()> {
    for program in ["mariadbd", "mariadb-install-db", "mariadb"] {
        if !installed(program) {
            return skip("failback", &format!("{program} is not installed"));
        }
    }
    let appliance = Cell::new(None);
    let database = |folder: &std::path::Path| {
        let made = Appliance::begin(folder)?;
        let port = made.port();
        appliance.set(Some(made));
        Ok(port)
    };
    let start = Start::Reaching(&database);
    staged(
        "failback",
        shape,
        &start,
        Verdict::NoWrongByte,
        |bed| match appliance.take() {
            Some(appliance) => failback(bed, &appliance),
            None => support::trouble!("no appliance"),
        },
    )
}

/// The disks, by whose they are and what their exports come from.
struct Disks {
    /// Sections from the beginning; that of the last is written anew after the failback.
    web: Vec<usize>,
    /// Rows from the beginning.
    db: Vec<usize>,
}

impl Disks {
    fn all(&self) -> Vec<usize> {
        [self.web.clone(), self.db.clone()].concat()
    }
}

fn failback(bed: &mut Bed, appliance: &Appliance) -> Outcome<()> {
    let (mut web, mut db) = (Vec::new(), Vec::new());
    for disk in 0..3 {
        web.push(bed.add(&format!("vm-web-disk{disk}"))?);
        db.push(add_mapped(bed, &format!("vm-db-disk{disk}"), DB, disk)?);
    }
    let disks = Disks { web, db };
    let all = disks.all();
    bed.plug_all_and_settle(&all)?;
    let before = nodes(bed, &all)?;
    set_clock(bed)?;
    take_over(bed, &disks, &before)?;
    let process = one_process(bed)?;

    // The appliance has its rows for the one VM: exports appear, without a section and without a word to the daemon.
    appliance.looked_at()?;
    for (unit, (index, node)) in disks.db.iter().zip(&before[3..]).enumerate() {
        appliance.insert(DB, unit, &bed.volumes[*index].export, node)?;
    }
    reload(bed)?;
    let served = rows(bed, &disks.db, &before[3..], "Serving");
    appliance.rows_are(&served)?;

    // Replication runs on all six; then the failover takes all disks at once, without a word to the daemon.
    let jobs = start_jobs(bed, &all)?;
    for (_, job) in &jobs {
        job.wait_for(20)?;
    }
    bed.unplug_all(&all)?;
    let away = rows(bed, &disks.db, &["", "", ""], "Absent");
    let emptied = appliance.rows_are(&away)?;
    for (index, job) in jobs {
        let report = job.finish()?;
        hold!(report.broken.is_some(), "the removal ends the job");
        bed.account(index, &report)?;
    }
    let listed = list(bed)?;
    for index in &all {
        hold!(
            listed.contains(&bed.volumes[*index].export),
            "who looks for its name finds it, so it appends nothing: {listed:?}"
        );
    }
    // They come back in another order, the two VMs mixed.
    let Disks { web, db } = &disks;
    for index in [db[2], web[1], db[0], web[2], web[0], db[1]] {
        bed.attach(index)?;
    }
    let after = nodes(bed, &all)?;
    let filled = appliance.rows_are(&rows(bed, db, &after[3..], "Serving"))?;
    let moved = |range: std::ops::Range<usize>| {
        let pairs = before[range.clone()].iter().zip(&after[range]);
        pairs.filter(|(was, is)| was != is).count()
    };
    hold!(moved(0..6) >= 4, "{before:?} and then {after:?}");

    let more = come_back(bed, appliance, &disks, &after)?;
    // The next jobs: whole disks, each read back through its export; the judge reads the backing files.
    for index in all.iter().chain(&more) {
        bed.fill(*index)?;
        bed.compare(*index)?;
    }
    let [section, row] = more;
    let mapped = [db.clone(), vec![row]].concat();
    let at = [&after[3..], &nodes(bed, &[row])?].concat();
    appliance.rows_are(&rows(bed, &mapped, &at, "Serving"))?;
    hold!(one_process(bed)? == process, "one process throughout");
    bed.reach(section, "Serving")?;
    // Each path that holds another disk now is told, and nobody is asked for anything.
    let count = |word: &str| {
        let lines =
            format!("journalctl -b -o cat -t nbd-server --no-pager | grep -c '{word}' || true");
        bed.machine.agent.run(&lines)
    };
    let (told, asked) = (count("IdentityMismatch")?, count("pin needs confirmation")?);
    hold!(
        told.trim() == moved(0..3).to_string() && asked.trim() == "0",
        "{told} paths are told of, {asked} lines ask for a person"
    );
    bed.row.count = u64::try_from(all.len())?;
    bed.row.notes.push(format!(
        "{} of 6 nodes changed; device_path of three rows empty {:.1} s after the detach, true {:.1} s after the last attach",
        moved(0..6),
        emptied.as_secs_f32(),
        filled.as_secs_f32()
    ));
    Ok(())
}

/// Adds a volume whose export has the name that a row of the table gives it.
fn add_mapped(bed: &mut Bed, name: &str, vm: &str, disk: usize) -> Outcome<usize> {
    let index = bed.add(name)?;
    bed.volumes[index].export = format!("migration-vm-{vm}-disk{disk}");
    Ok(index)
}

/// The stock server with the sections of the one VM, and then nbdtrack in its place, with the appliance's table.
fn take_over(bed: &mut Bed, disks: &Disks, nodes: &[String]) -> Outcome<()> {
    bed.past_boot()?;
    let agent = &bed.machine.agent;
    let conf = format!(
        "[generic]\nuser = root\ngroup = root\nallowlist = true\nincludedir = {CONF}\nx-settings = {SETTINGS}\n"
    );
    agent.put("/etc/nbd-server/config", conf)?;
    let settings = format!(
        "[server]\nstore = \"mysql://nbdtrack@{DATABASE}/appliance\"\nstore_owner = \"appliance-1\"\nstore_poll_s = 1\n"
    );
    agent.put(SETTINGS, settings)?;
    // Of a job that is long over: nobody takes such a section out of a file that is only ever appended to.
    let dead = "[vm-gone-disk0]\nexportname = /dev/vdz\n";
    agent.put(&format!("{CONF}/gone.conf"), dead)?;
    for (index, node) in disks.web.iter().zip(nodes) {
        put_section(bed, *index, node)?;
    }
    let agent = &bed.machine.agent;
    agent.run("systemctl daemon-reload && systemctl start nbd-server")?;
    greeted(bed, disks.web[0])?;
    bed.machine.agent.run("nbdtrack take-over")?;
    hold!(served_by_ours(bed)?, "nbdtrack is in the place");
    bed.reach_all(&disks.web, "Serving")
}

/// What the appliance does once the disks are back, jobs running meanwhile: one VM's jobs find their names and go on as they are, but for the
/// last disk, whose path is written anew; the rows of the other VM are written again with the nodes that their disks have now; of a VM that was
/// replicated elsewhere until now one disk gets its first section here, and one its first row. One SIGHUP for all. Gives the two new ones.
fn come_back(
    bed: &mut Bed,
    appliance: &Appliance,
    disks: &Disks,
    found: &[String],
) -> Outcome<[usize; 2]> {
    let (going, changed) = ([&disks.web[..2], &disks.db].concat(), disks.web[2]);
    let running = start_jobs(bed, &going)?;
    for (_, job) in &running {
        job.wait_for(10)?;
    }
    put_section(bed, changed, &found[2])?;
    let section = bed.add("vm-new-disk0")?;
    let row = add_mapped(bed, "vm-new-disk1", NEW, 1)?;
    bed.plug_all_and_settle(&[section, row])?;
    for index in [section, row] {
        bed.guest_until(
            "the daemon to see the disk",
            &format!("nbdtrack volumes | grep -q {}", serial(bed, index)),
        )?;
    }
    appliance.looked_at()?;
    put_section(bed, section, &bed.node_by_link(section)?)?;
    for (unit, (index, node)) in disks.db.iter().zip(&found[3..]).enumerate() {
        appliance.insert(DB, unit, &bed.volumes[*index].export, node)?;
    }
    appliance.insert(NEW, 1, &bed.volumes[row].export, &bed.node_by_link(row)?)?;
    reload(bed)?;
    bed.reach(section, "Serving")?;
    let at = nodes(bed, &[row])?;
    appliance.rows_are(&rows(bed, &[row], &at, "Serving"))?;
    let listed = list(bed)?;
    hold!(
        listed.len() == 9,
        "the six, the two new ones and the dead one: {listed:?}"
    );
    for (index, job) in running {
        let report = job.finish()?;
        hold!(
            report.broken.is_none(),
            "a job was disturbed: {:?}",
            report.broken
        );
        bed.account(index, &report)?;
    }
    bed.reach(changed, "Serving")?;
    Ok([section, row])
}

/// Sets the guest's clock by this machine's, to less than half a second. A template's stands since it was made, and the daemon believes a row's time
/// only where its own clock and the database's are less than a second apart.
fn set_clock(bed: &Bed) -> Outcome<()> {
    until(STEP, "a clock that is set at once", || {
        let began = Instant::now();
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        let set = format!("date -s @{:.3}", now.as_secs_f64());
        bed.machine.agent.run(&set)?;
        Ok((began.elapsed() < Duration::from_millis(400)).then_some(()))
    })
}

/// As the appliance sends it.
fn reload(bed: &Bed) -> Outcome<()> {
    bed.machine
        .agent
        .run("kill -HUP $(cat /var/run/nbd-server.pid)")
        .map(drop)
}

/// What the table is to say of these disks.
fn rows(bed: &Bed, volumes: &[usize], nodes: &[impl AsRef<str>], state: &str) -> Vec<String> {
    let lines = volumes.iter().zip(nodes).map(|(index, node)| {
        let export = &bed.volumes[*index].export;
        format!("{export}\t{}\tactive\t{state}", node.as_ref())
    });
    lines.collect()
}

fn nodes(bed: &Bed, volumes: &[usize]) -> Outcome<Vec<String>> {
    volumes
        .iter()
        .map(|index| bed.node_by_link(*index))
        .collect()
}

fn serial(bed: &Bed, index: usize) -> String {
    let serial = bed.volumes[index].properties["serial"].as_str();
    serial.unwrap_or_default().to_owned()
}

/// One file a section, put in place whole, as the appliances do.
fn put_section(bed: &Bed, index: usize, node: &str) -> Outcome<()> {
    let name = &bed.volumes[index].export;
    let text = format!("[{name}]\nexportname = {node}\nflush = true\nfua = true\n");
    let agent = &bed.machine.agent;
    agent.put(&format!("{CONF}/.{name}.new"), text)?;
    agent
        .run(&format!("mv {CONF}/.{name}.new {CONF}/{name}.conf"))
        .map(drop)
}

fn start_jobs(bed: &mut Bed, volumes: &[usize]) -> Outcome<Vec<(usize, Stream)>> {
    let endpoint = bed.endpoint();
    let first = bed.sequence() + 1_000;
    bed.skip_to(first);
    volumes
        .iter()
        .map(|index| {
            let volume = &bed.volumes[*index];
            let stream = Stream::start(&endpoint, &volume.export, &volume.name, JOB, first)?;
            Ok((*index, stream))
        })
        .collect()
}

/// The names that `nbd-client -l` prints in the guest, as a consumer or a health check reads them.
fn list(bed: &Bed) -> Outcome<Vec<String>> {
    let id = bed.machine.agent.begin("nbd-client -l 127.0.0.1", &[])?;
    let said = bed
        .machine
        .agent
        .finish(id, "nbd-client -l", Duration::from_secs(60))?;
    let names = said.stdout.lines().map(str::trim);
    Ok(names
        .filter(|line| line.starts_with("vm-") || line.starts_with("migration-vm-"))
        .map(str::to_owned)
        .collect())
}
