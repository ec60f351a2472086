//! The package's whole life in a Debian that runs, and the exchange with the stock server: what dpkg and the service manager make of
//! it, and what clients see.

use std::path::Path;
use std::time::Duration;

use serde_json::Value;

use crate::bed::{Bed, STEP};
use crate::machine::Shape;
use crate::stage::scenario;
use support::client::{Client, Go, knock};
use support::ground::skip;
use support::process::{command, installed, run_command};
use support::{Doing, Outcome, until};
use support::{hold, trouble};

/// On one machine type each: dpkg and systemd are the same on both.
mod package {
    mod pc {
        use crate::machine::Shape;
        use support::Outcome;

        #[test]
        fn package_is_installed_upgraded_removed_and_purged_beside_clients() -> Outcome<()> {
            super::super::life_of_a_package(Shape::Pc)
        }
    }

    mod q35 {
        use crate::machine::Shape;
        use support::Outcome;

        #[test]
        fn stock_servers_place_goes_along_with_upgrades_and_back_with_the_removal() -> Outcome<()> {
            super::super::place_of_a_package(Shape::Q35)
        }
    }
}

mod take_over {
    mod q35 {
        use crate::machine::Shape;
        use support::Outcome;

        #[test]
        fn stock_servers_place_is_taken_and_given_back_beside_clients() -> Outcome<()> {
            super::super::exchange_of_servers(Shape::Q35)
        }
    }
}

/// What `make install` put into the guest's root is in no package: it would be in the way of none, and hide what one lacks.
const UNPACKAGE: &str = "find /etc /usr /lib -xdev -name '*nbdtrack*' -not -path '*/bed/*' -exec rm -rf {} + ; \
    systemctl daemon-reload; udevadm control --reload; groupdel nbdtrack; ! command -v nbdtrack";
/// Unpacking under emulation, and a service that starts or ends.
const DPKG: Duration = Duration::from_secs(180);

fn life_of_a_package(shape: Shape) -> Outcome<()> {
    if !installed("dpkg-shlibdeps") {
        return skip("package", "dpkg-dev is not installed");
    }
    scenario("package", shape, |bed| {
        let packages = ["0.0.1", "0.0.2"].map(package);
        for (version, package) in ["old", "new"].into_iter().zip(packages) {
            bed.machine
                .agent
                .put(&format!("/root/{version}.deb"), package?)?;
        }
        bed.machine.agent.run(UNPACKAGE)?;
        let (configured, added) = (bed.add("vol-a")?, bed.add("vol-b")?);
        bed.plug_all_and_settle(&[configured, added])?;
        fresh(bed, configured, added)?;
        journal_tells(bed, configured)?;
        upgrade(bed, configured, added)?;
        fail_to_start(bed, configured)?;
        remove_and_come_back(bed, configured, added)?;
        purge(bed)
    })
}

/// Makes the package of a version; its bytes.
fn package(version: &str) -> Outcome<Vec<u8>> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut script = command(root.join("scripts/deb"));
    script.env("NBDTRACK_VERSION", version).current_dir(root);
    let made = run_command("scripts/deb", script, DPKG)?;
    hold!(made.status.success(), "scripts/deb: {}", made.stderr);
    let path = root.join(made.stdout.lines().last().unwrap_or_default());
    let bytes = std::fs::read(&path).doing(path.display())?;
    std::fs::remove_file(&path)?;
    Ok(bytes)
}

fn dpkg(bed: &Bed, words: &str) -> Outcome<String> {
    let command = format!("DEBIAN_FRONTEND=noninteractive dpkg {words} 2>&1");
    let id = bed.machine.agent.begin(&command, &[])?;
    let ran = bed.machine.agent.finish(id, &command, DPKG)?;
    hold!(ran.code == 0, "{command}: {}{}", ran.stdout, ran.stderr);
    Ok(ran.stdout)
}

/// The service runs at once, with no export; what an administrator writes and adds is served.
fn fresh(bed: &mut Bed, configured: usize, added: usize) -> Outcome<()> {
    dpkg(bed, "-i /root/old.deb")?;
    bed.machine
        .agent
        .run("systemctl is-active nbdtrack && systemctl is-enabled nbdtrack && nbdtrack status")?;
    bed.tables = "file_roots = [\"/backups\"]\n".to_owned();
    bed.configure(&[configured])?;
    // As docs/backups.md says: the unit that ships may write to its own folder only.
    let drop_in = "/etc/systemd/system/nbdtrack.service.d";
    let agent = &bed.machine.agent;
    agent.run(&format!("mkdir -p /backups {drop_in}"))?;
    let text = "[Service]\nReadWritePaths=/backups\n";
    agent.put(&format!("{drop_in}/backups.conf"), text)?;
    // Another port is a matter of a restart, too.
    agent.run("systemctl daemon-reload && systemctl restart nbdtrack")?;
    agent.run(&format!(
        "nbdtrack image create --export image /backups/image.qcow2 1M && nbdtrack remove image && \
         test -s /backups/image.qcow2 && rm -r {drop_in}"
    ))?;
    let (name, id) = (&bed.volumes[added].name, &bed.volumes[added].id);
    bed.machine
        .agent
        .run(&format!("nbdtrack add {name} --volume {id}"))?;
    // The unit hides the processes of others from the daemon, which asks systemd.
    let history = bed.machine.agent.run("nbdtrack --json history -n 1000")?;
    let called = history
        .lines()
        .map(serde_json::from_str)
        .collect::<Result<Vec<Value>, _>>()?;
    let by_whom = called.iter().find(|record| {
        record["kind"] == "call"
            && record["new"] == "AddExport"
            && record["export"] == name.as_str()
    });
    let unit = by_whom.map(|record| &record["unit"]);
    hold!(
        unit.is_some_and(|unit| unit == "bed-agent.service"),
        "the caller's unit is in the history: {by_whom:?}"
    );
    bed.machine.agent.run("systemctl reload nbdtrack")?;
    both_serve(bed, configured, added, 1)
}

/// A volume that left and came back stands in the guest's journal with its fields, and the catalog of the package explains it.
fn journal_tells(bed: &mut Bed, index: usize) -> Outcome<()> {
    bed.unplug(index)?;
    bed.attach(index)?;
    let (name, id) = (
        bed.volumes[index].name.clone(),
        bed.volumes[index].id.clone(),
    );
    let node = bed.node(index)?;
    let generation = bed.export(index)?["generation"].to_string();
    let agent = &bed.machine.agent;
    let of = format!("journalctl --quiet --no-pager -u nbdtrack EXPORT={name}");
    // What is written comes there a moment later.
    let (serving, absent) = (message_id("Serving")?, message_id("Absent")?);
    let (back, left) = until(STEP, "the journal to have both", || {
        let entries = agent.run(&format!("{of} -o json"))?;
        let entries: Vec<Value> = entries
            .lines()
            .map(serde_json::from_str)
            .collect::<Result<_, _>>()?;
        let last = |id: &str| entries.iter().rev().find(|entry| entry["MESSAGE_ID"] == id);
        let both = last(&serving).cloned().zip(last(&absent).cloned());
        Ok(both.filter(|(back, _)| back["GENERATION"] == generation.as_str()))
    })?;
    hold!(back["DEVICE_NODE"] == node.as_str(), "{node}: {back}");
    for entry in [&back, &left] {
        for (field, value) in [
            ("VOLUME", id.as_str()),
            ("PRIORITY", "6"),
            ("SYSLOG_IDENTIFIER", "nbdtrack"),
            ("_SYSTEMD_UNIT", "nbdtrack.service"),
        ] {
            hold!(entry[field] == value, "{field} is {value}: {entry}");
        }
    }
    let diskseq = back["DISKSEQ"].as_str().unwrap_or_default();
    hold!(diskseq.parse::<u64>().is_ok(), "DISKSEQ={diskseq}");
    let explained = agent.run(&format!("{of} -x MESSAGE_ID={serving}"))?;
    let text = format!(
        "The volume {id} is served from {node} (diskseq {diskseq}), generation {generation}."
    );
    hold!(explained.contains(&text), "{text} is not in: {explained}");
    bed.compare(index)
}

/// As the daemon gives it to the journal.
fn message_id(what: &str) -> Outcome<String> {
    let source = include_str!("../../../src/daemon/log/journal.rs");
    let begin = format!("(\"{what}\", \"");
    match source.split(&begin).nth(1).and_then(|rest| rest.get(..32)) {
        Some(id) => Ok(id.to_owned()),
        None => trouble!("{what} has no MESSAGE_ID"),
    }
}

fn both_serve(bed: &mut Bed, configured: usize, added: usize, block: usize) -> Outcome<()> {
    for index in [configured, added] {
        bed.reach(index, "Serving")?;
        bed.write(index, block)?;
        bed.compare(index)?;
    }
    bed.row.count += 1;
    Ok(())
}

/// A client that is there is told that the server ends; what it was promised is kept, and so are both exports.
fn upgrade(bed: &mut Bed, configured: usize, added: usize) -> Outcome<()> {
    let mut client = Client::open(&bed.endpoint(), &bed.volumes[added].name)?;
    let said = bed.write_on(&mut client, added, 2)?;
    hold!(said.is_ok(), "before the upgrade: {said:?}");
    let told = dpkg(bed, "-i /root/new.deb")?;
    hold!(
        told.contains("clients are drained"),
        "the upgrade says what it does to clients: {told}"
    );
    let mut bytes = [0; 512];
    let after = client.read(0, &mut bytes);
    hold!(
        !matches!(after, Ok(Ok(()))),
        "the client's session ended with the old daemon"
    );
    let version = bed
        .machine
        .agent
        .run("dpkg-query -W -f '${Version}' nbdtrack")?;
    hold!(version == "0.0.2", "{version}");
    both_serve(bed, configured, added, 3)
}

/// With a configuration that the new version would not start with, the old process serves on; and a service that does not start says why where an
/// operator looks.
fn fail_to_start(bed: &mut Bed, configured: usize) -> Outcome<()> {
    let agent = &bed.machine.agent;
    agent.run("cp /etc/nbdtrack/nbdtrack.toml /root/good.toml && echo 'listen = 7' >>/etc/nbdtrack/nbdtrack.toml")?;
    let process = "systemctl show --property=MainPID --value nbdtrack";
    let before = agent.run(process)?;
    let told = dpkg(bed, "-i /root/new.deb")?;
    hold!(
        told.contains("the old version serves on") && told.contains("/etc/nbdtrack/nbdtrack.toml:"),
        "the package says what it did not do, and why: {told}"
    );
    let agent = &bed.machine.agent;
    let status = agent.run("dpkg-query -W -f '${Status}' nbdtrack")?;
    hold!(status == "install ok installed", "{status}");
    hold!(agent.run(process)? == before, "{before} serves on");
    bed.reach(configured, "Serving")?;
    let agent = &bed.machine.agent;
    agent.attempt("systemctl restart nbdtrack")?;
    // Each try of the unit shows its own lines only, and the next one begins two seconds later.
    bed.guest_until(
        "systemctl status to name the file",
        "systemctl status --no-pager --lines=20 nbdtrack | grep -q /etc/nbdtrack/nbdtrack.toml:",
    )?;
    let agent = &bed.machine.agent;
    let doctor = agent.attempt("nbdtrack doctor")?;
    hold!(
        doctor.code != 0 && doctor.stdout.contains("nbdtrack.toml"),
        "{} {}",
        doctor.stdout,
        doctor.stderr
    );
    agent.run("cp /root/good.toml /etc/nbdtrack/nbdtrack.toml && systemctl reset-failed nbdtrack && systemctl start nbdtrack")?;
    bed.reach(configured, "Serving")
}

/// State and configuration outlive the package; it comes back as it was.
fn remove_and_come_back(bed: &mut Bed, configured: usize, added: usize) -> Outcome<()> {
    dpkg(bed, "-r nbdtrack")?;
    let agent = &bed.machine.agent;
    agent.run("! command -v nbdtrack && ! systemctl is-active nbdtrack && test -s /var/lib/nbdtrack/nbdtrack.db && test -s /etc/nbdtrack/nbdtrack.toml")?;
    let name = &bed.volumes[configured].name;
    match knock(&bed.endpoint(), name) {
        // QEMU takes the connection for the guest, which has no one for it.
        Err(_) => {}
        Ok(Go::Refused { .. } | Go::Agreed { .. }) => trouble!("someone answers for {name}"),
    }
    dpkg(bed, "-i /root/new.deb")?;
    until(STEP, "the daemon", || {
        Ok((bed.machine.agent.attempt("nbdtrack status")?.code == 0).then_some(()))
    })?;
    both_serve(bed, configured, added, 4)
}

/// Nothing of it is left, and nobody has a disk open or listens any more: not the socket unit either.
fn purge(bed: &mut Bed) -> Outcome<()> {
    let agent = &bed.machine.agent;
    agent.run("systemctl stop nbdtrack && systemctl enable --now nbdtrack.socket && test -S /run/nbdtrack-nbd.sock")?;
    dpkg(bed, "-P nbdtrack")?;
    let agent = &bed.machine.agent;
    agent.run("! systemctl is-active nbdtrack.socket && test ! -e /run/nbdtrack-nbd.sock")?;
    let left = agent.run(
        "find / -xdev -name '*nbdtrack*' -not -path '/proc/*' -not -path '/var/lib/dpkg/*' -not -path '/var/log/*' \
         -not -path '/root/*'; getent group nbdtrack; ls -d /run/nbdtrack 2>/dev/null; true",
    )?;
    hold!(left.trim().is_empty(), "a purge left {left}");
    Ok(())
}

const STOCK: &str = "/bin/nbd-server";

fn exchange_of_servers(shape: Shape) -> Outcome<()> {
    scenario("take over", shape, |bed| {
        let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
        let nodes = serve_by_stock(bed, [a, b])?;
        let agent = &bed.machine.agent;
        let checksums = "cat /etc/nbd-server/config /etc/nbd-server/conf.d/* | md5sum";
        let config = agent.run(checksums)?;
        both_take(bed, a, b, 1)?;

        let plan = bed.machine.agent.run("nbdtrack take-over --dry-run")?;
        for word in [
            STOCK,
            "dpkg-divert",
            &nodes[0],
            &nodes[1],
            "virtio-serial:",
            "8388608",
        ] {
            hold!(plan.contains(word), "the plan says {word}: {plan}");
        }
        hold!(!served_by_ours(bed)?, "a dry run changes nothing");
        bed.machine.agent.run("nbdtrack take-over")?;
        bed.machine.agent.run(DRAINS)?;
        let process = one_process(bed)?;
        hold!(served_by_ours(bed)?, "ours is in its place");
        bed.reach_all(&[a, b], "Serving")?;
        both_take(bed, a, b, 2)?;
        // What the stock server does wrong after this is in the controls.
        bed.unplug_all(&[a, b])?;
        bed.attach(b)?;
        bed.attach(a)?;
        both_take(bed, a, b, 3)?;
        bed.compare(a)?;
        bed.compare(b)?;
        bed.machine
            .agent
            .run("kill -HUP $(cat /var/run/nbd-server.pid)")?;
        both_take(bed, a, b, 4)?;
        hold!(one_process(bed)? == process, "one process throughout");
        call_while_it_restarts(bed)?;
        upgrade_stock(bed)?;
        bed.reach_all(&[a, b], "Serving")?;
        both_take(bed, a, b, 5)?;

        // The stock server is to find its paths as they were when they were written.
        under_their_names(bed, [a, b], &nodes)?;
        let enabled = "systemctl is-enabled nbdtrack; true";
        let before = bed.machine.agent.run(enabled)?;
        let said = bed.machine.agent.run("nbdtrack give-back")?;
        hold!(said.contains("nbdtrack.service may start again"), "{said}");
        greeted(bed, a)?;
        hold!(!served_by_ours(bed)?, "the stock server is back");
        hold!(
            bed.machine.agent.run(enabled)? == before,
            "the service is enabled as it was"
        );
        both_take(bed, a, b, 6)?;
        let agent = &bed.machine.agent;
        hold!(agent.run(checksums)? == config, "not a line was changed");
        agent.run("! dpkg-divert --list | grep nbd-server && dpkg --verify nbd-server && test ! -e /bin/nbd-server.stock")?;
        agent.run("! systemctl cat nbd-server | grep TERM/ && test ! -e /etc/systemd/system/nbd-server.service.d")?;
        bed.row.count += 1;
        Ok(())
    })
}

/// How often two disks are pulled and plugged until each has its name.
const NAMINGS: u32 = 10;

/// Pulls both, and plugs them so that each has the node that it had. The kernel gives a name to the next disk only when the last descriptor of
/// the one that had it is closed, which can be after that one's removal was told.
fn under_their_names(bed: &mut Bed, volumes: [usize; 2], nodes: &[String; 2]) -> Outcome<()> {
    for _ in 0..NAMINGS {
        bed.unplug_all(&volumes)?;
        let mut all = true;
        for (index, node) in volumes.into_iter().zip(nodes) {
            bed.attach(index)?;
            all &= bed.node_by_link(index)? == *node;
        }
        if all {
            return Ok(());
        }
    }
    trouble!("in {NAMINGS} times the disks did not get the names {nodes:?}");
}

/// The unit that systemd made of the init script has the drop-in that waits for the drain, before the script.
const DRAINS: &str = "systemctl cat nbd-server | grep -A1 'ExecStop=-.*TERM/45$' | grep -q 'ExecStop=/etc/init.d/nbd-server stop'";

/// Between the end of one and the start of the next there is nobody whom a caller reaches: the bus would have systemd start
/// `nbdtrack.service`, on the same port and state. It keeps the call, and the next one answers it. (That systemd was asked, the bus says in the journal:
/// a unit that is not enabled is forgotten with its condition's time.)
fn call_while_it_restarts(bed: &mut Bed) -> Outcome<()> {
    let agent = &bed.machine.agent;
    let said = agent.run(
        "since=$(date +%s) && systemctl stop nbd-server && \
         { timeout 20 busctl call org.nbdtrack1 /org/nbdtrack1 org.nbdtrack1.Manager GetStats 'a{sv}' 0 >/root/answer 2>&1 & } && \
         call=$! && until journalctl -q -t dbus-daemon --since @$since -g 'Activating via systemd.*nbdtrack' | grep -q .; do sleep 0.2; done && \
         systemctl start nbd-server && wait $call && cat /root/answer && ! systemctl is-active nbdtrack",
    )?;
    hold!(said.starts_with("a{sv}"), "{said}");
    one_process(bed).map(drop)
}

/// Two sections of nbd-server's configuration, each with the node that its volume has, and the stock service on them.
fn serve_by_stock(bed: &mut Bed, volumes: [usize; 2]) -> Outcome<[String; 2]> {
    let mut nodes = [String::new(), String::new()];
    bed.plug_all_and_settle(&volumes)?;
    for (index, node) in volumes.into_iter().zip(&mut nodes) {
        *node = bed.node_by_link(index)?;
    }
    bed.past_boot()?;
    let conf = "[generic]\nuser = root\ngroup = root\nallowlist = true\nincludedir = /etc/nbd-server/conf.d\n";
    bed.machine.agent.put("/etc/nbd-server/config", conf)?;
    for (index, node) in volumes.into_iter().zip(&nodes) {
        let name = &bed.volumes[index].name;
        let section = format!("[{name}]\nexportname = {node}\nflush = true\nfua = true\n");
        let file = format!("/etc/nbd-server/conf.d/{name}.conf");
        bed.machine.agent.put(&file, section)?;
    }
    bed.machine
        .agent
        .run("systemctl daemon-reload && systemctl start nbd-server")?;
    greeted(bed, volumes[0])?;
    Ok(nodes)
}

fn place_of_a_package(shape: Shape) -> Outcome<()> {
    if !installed("dpkg-shlibdeps") {
        return skip("package in the place", "dpkg-dev is not installed");
    }
    scenario("package in the place", shape, |bed| {
        for (version, name) in [("0.0.1", "old"), ("0.0.2", "new")] {
            let path = format!("/root/{name}.deb");
            bed.machine.agent.put(&path, package(version)?)?;
        }
        bed.machine.agent.run(UNPACKAGE)?;
        let (a, b) = (bed.add("vol-a")?, bed.add("vol-b")?);
        serve_by_stock(bed, [a, b])?;
        // Its own service is left alone, and changes nothing for the stock server when it is started all the same: that is tried once.
        let told = dpkg(bed, "-i /root/old.deb")?;
        hold!(told.contains("neither enabled nor started"), "{told}");
        bed.machine.agent.run(
            "! systemctl is-enabled nbdtrack && test $(systemctl show --property=NRestarts --value nbdtrack) = 0 && \
             ! systemctl start nbdtrack && systemctl is-failed nbdtrack && \
             systemctl show --property=ExecMainStatus --value nbdtrack | grep -qx 8",
        )?;
        both_take(bed, a, b, 1)?;
        bed.machine.agent.run("nbdtrack take-over")?;
        hold!(
            served_by_ours(bed)?,
            "the package's program is in the place"
        );
        let old = one_process(bed)?;
        bed.reach_all(&[a, b], "Serving")?;
        both_take(bed, a, b, 2)?;

        dpkg(bed, "-i /root/new.deb")?;
        hold!(served_by_ours(bed)?, "the new version is in the place");
        let new = one_process(bed)?;
        // Both versions have the very same program, which is not exchanged for itself: its clients notice nothing.
        hold!(new == old, "the same program goes on");
        bed.machine.agent.run(
            "! systemctl is-active nbdtrack && ! systemctl is-enabled nbdtrack && test ! -e /bin/nbd-server.nbdtrack-old",
        )?;
        bed.reach_all(&[a, b], "Serving")?;
        both_take(bed, a, b, 3)?;
        bed.compare(a)?;
        bed.compare(b)?;

        dpkg(bed, "-r nbdtrack")?;
        greeted(bed, a)?;
        both_take(bed, a, b, 4)?;
        bed.machine.agent.run(
            "! command -v nbdtrack && ! dpkg-divert --list | grep nbd-server && dpkg --verify nbd-server && \
             test ! -e /bin/nbd-server.stock && systemctl is-active nbd-server",
        )?;
        bed.row.count += 1;
        Ok(())
    })
}

fn both_take(bed: &mut Bed, a: usize, b: usize, block: usize) -> Outcome<()> {
    bed.write(a, block)?;
    bed.write(b, block)
}

pub(super) fn greeted(bed: &Bed, index: usize) -> Outcome<()> {
    let (endpoint, name) = (bed.endpoint(), &bed.volumes[index].name);
    until(STEP, "the greeting", || {
        let answer = knock(&endpoint, name).ok();
        Ok(matches!(answer, Some(Go::Agreed { .. })).then_some(()))
    })
}

/// What `pgrep -f 'nbd-server -C PATH'` looks at, in one process: under emulation a shell's loop over all processes takes half a minute.
const BY_LINE: &str = r#"perl -e 'for my $p (glob "/proc/[0-9]*") {
    open(my $f, "<", "$p/cmdline") or next;
    my $line = <$f> // "";
    $line =~ tr/\0/ /;
    print substr($p, 6), "\n" if $line =~ m{^[^ ]*nbd-server -C /etc/nbd-server/config};
}'"#;

/// The number of the one process that helper scripts find by its name and by its command line.
pub(super) fn one_process(bed: &Bed) -> Outcome<String> {
    let agent = &bed.machine.agent;
    let by_name = agent.run("grep -lsx nbd-server /proc/[0-9]*/comm | cut -d/ -f3")?;
    let by_line = agent.run(BY_LINE)?;
    hold!(
        by_name.lines().count() == 1 && by_name == by_line,
        "by name {by_name:?}, by command line {by_line:?}"
    );
    Ok(by_name)
}

pub(super) fn served_by_ours(bed: &Bed) -> Outcome<bool> {
    let same = "p=$(cat /var/run/nbd-server.pid) && cmp -s /proc/$p/exe /usr/bin/nbdtrack";
    Ok(bed.machine.agent.attempt(same)?.code == 0)
}

/// dpkg puts a new version of the stock package beside ours, and its scripts may restart the service.
fn upgrade_stock(bed: &mut Bed) -> Outcome<()> {
    let folder = tempfile::tempdir()?;
    let mut download = command("apt-get");
    download
        .args(["-qq", "download", "nbd-server"])
        .current_dir(folder.path());
    let downloaded = run_command("apt-get download nbd-server", download, DPKG)?;
    let package = std::fs::read_dir(folder.path())?.flatten().next();
    let Some(package) = package.filter(|_| downloaded.status.success()) else {
        let note = "an upgrade of the stock package was not tried: apt-get has none".to_owned();
        bed.row.notes.push(note);
        return Ok(());
    };
    let package = std::fs::read(package.path())?;
    bed.machine.agent.put("/root/stock.deb", package)?;
    dpkg(bed, "-i /root/stock.deb")?;
    bed.machine.agent.run(
        "cmp /usr/bin/nbdtrack /bin/nbd-server && ! cmp -s /bin/nbd-server.stock /bin/nbd-server",
    )?;
    Ok(())
}
