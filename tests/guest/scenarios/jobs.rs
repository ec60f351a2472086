//! A failback as an appliance does it, with nbdtrack in nbd-server's place: two VMs of three disks, replication running, everything
//! detached at once and attached in another order, sections appended by whoever does not find its name, a SIGHUP, and the next jobs.

use std::time::Duration;

use crate::bed::Bed;
use crate::hold;
use crate::machine::Shape;
use crate::scenarios::packaging::{greeted, one_process, served_by_ours};
use crate::stage::scenario;
use crate::support::Outcome;
use crate::support::stream::{Pace, Stream};

/// On one machine type: what differs between them is in the scenarios of moves.
mod failback {
    mod q35 {
        use crate::machine::Shape;
        use crate::support::Outcome;

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

fn failback_of_two_vms(shape: Shape) -> Outcome<()> {
    scenario("failback", shape, |bed| {
        let mut web = Vec::new();
        let mut db = Vec::new();
        // Short names: a stamp has room for sixteen letters.
        for disk in 0..3 {
            web.push(bed.add(&format!("vm-web-disk{disk}"))?);
            db.push(bed.add(&format!("vm-db-disk{disk}"))?);
        }
        let all = [web.clone(), db.clone()].concat();
        for index in &all {
            bed.plug_and_settle(*index)?;
        }
        bed.past_boot()?;
        let agent = &bed.machine.agent;
        let conf = format!(
            "[generic]\nuser = root\ngroup = root\nallowlist = true\nincludedir = {CONF}\n"
        );
        agent.put("/etc/nbd-server/config", conf)?;
        // Of a job that is long over: nobody takes such a section out of a file that is only ever appended to.
        let dead = "[vm-gone-disk0]\nexportname = /dev/vdz\n";
        agent.put(&format!("{CONF}/gone.conf"), dead)?;
        let before = nodes(bed, &all)?;
        for (index, node) in all.iter().zip(&before) {
            put_section(bed, *index, node)?;
        }
        let agent = &bed.machine.agent;
        agent.run("systemctl daemon-reload && systemctl start nbd-server")?;
        greeted(bed, all[0])?;
        bed.machine.agent.run("nbdtrack take-over")?;
        hold!(served_by_ours(bed)?, "nbdtrack is in the place");
        let process = one_process(bed)?;
        for index in &all {
            bed.reach(*index, "Serving")?;
        }

        // Replication runs on all six; then the failover takes all disks at once, without a word to the daemon.
        let jobs = start_jobs(bed, &all)?;
        for (_, job) in &jobs {
            job.wait_for(20)?;
        }
        bed.unplug_all(&all)?;
        for (index, job) in jobs {
            let report = job.finish()?;
            hold!(report.broken.is_some(), "the removal ends the job");
            bed.account(index, &report)?;
        }
        let listed = list(bed)?;
        for index in &all {
            hold!(
                listed.contains(&bed.volumes[*index].name),
                "who looks for its name finds it, so it appends nothing: {listed:?}"
            );
        }
        // They come back in another order, the two VMs mixed.
        let order = [db[2], web[1], db[0], web[2], web[0], db[1]];
        for index in order {
            bed.attach(index)?;
        }
        let after = nodes(bed, &all)?;
        let moved = before.iter().zip(&after).filter(|(was, is)| was != is);
        let moved = moved.count();
        hold!(moved >= 4, "{before:?} and then {after:?}");

        // The job of the one VM finds its names and goes on as it is; that of the other writes its paths anew; a VM that was
        // replicated elsewhere until now gets its first section here. One SIGHUP for all, as the appliance sends it.
        let running = start_jobs(bed, &web)?;
        for (_, job) in &running {
            job.wait_for(10)?;
        }
        for (index, node) in all
            .iter()
            .zip(&after)
            .filter(|(index, _)| db.contains(index))
        {
            put_section(bed, *index, node)?;
        }
        let new = bed.add("vm-new-disk0")?;
        bed.plug(new)?;
        bed.wait_udev(new)?;
        bed.guest_until(
            "the daemon to see the disk",
            &format!("nbdtrack volumes | grep -q {}", serial(bed, new)),
        )?;
        let node = bed.node_by_link(new)?;
        put_section(bed, new, &node)?;
        bed.machine
            .agent
            .run("kill -HUP $(cat /var/run/nbd-server.pid)")?;
        bed.reach(new, "Serving")?;
        let listed = list(bed)?;
        hold!(
            listed.len() == 8,
            "the six, the new one and the dead one: {listed:?}"
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
        for index in &db {
            bed.reach(*index, "Serving")?;
        }

        // The next jobs: whole disks, each read back through its export; the judge reads the backing files.
        for index in all.iter().chain([&new]) {
            bed.fill(*index)?;
            bed.compare(*index)?;
        }
        hold!(one_process(bed)? == process, "one process throughout");
        // Each path that holds another disk now is told, and nobody is asked for anything.
        let count = |word: &str| {
            let lines =
                format!("journalctl -b -o cat -t nbd-server --no-pager | grep -c '{word}' || true");
            bed.machine.agent.run(&lines)
        };
        let (told, asked) = (count("IdentityMismatch")?, count("pin needs confirmation")?);
        hold!(
            told.trim() == moved.to_string() && asked.trim() == "0",
            "{told} paths are told of, {asked} lines ask for a person"
        );
        bed.row.count = u64::try_from(all.len())?;
        bed.row.notes.push(format!("{moved} of 6 nodes changed"));
        Ok(())
    })
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
    let name = &bed.volumes[index].name;
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
            let name = &bed.volumes[*index].name;
            Ok((*index, Stream::start(&endpoint, name, name, JOB, first)?))
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
        .filter(|line| line.starts_with("vm-"))
        .map(str::to_owned)
        .collect())
}
