//! `take-over`, `give-back` and the package's own scripts in a Debian beside this machine's: its files under an overlay, with processes and
//! a network of its own and an init script as its service manager. What systemd makes of it is for the guest's tests.

mod support;

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use support::client::Endpoint;
use support::daemon::binary;
use support::ground::{Ground, Need, real, skip, tell};
use support::process::{self, Finished, Running, command};
use support::stream::{Held, Pace, Stream};
use support::{Doing, Outcome, until};

const NEEDS: &[Need] = &[
    Need::Loop,
    Need::Tool("nbd-server"),
    Need::Tool("dpkg-divert"),
    Need::Tool("nbdinfo"),
    Need::Tool("unshare"),
    Need::Tool("nsenter"),
    Need::Tool("ip"),
    Need::Tool("strip"),
];
const LIMIT: Duration = Duration::from_secs(90);
const CONFIG: &str = "/etc/nbd-server/config";
const GOOD: &str = "[generic]\nallowlist = true\nlistenaddr = 127.0.0.1\nx-state = /var/lib/beside\nx-bus = none\n\
    [one]\nexportname = /srv/one\n";
/// The stock server reads over `x-state`; nbdtrack finds a file where its state should be.
const OURS_CANNOT_START: &str = "[generic]\nallowlist = true\nlistenaddr = 127.0.0.1\nx-state = /etc/hostname\nx-bus = none\n\
    [one]\nexportname = /srv/one\n";

/// Process 1 ends with its namespaces, and everything in them with it.
const INIT: &str = r#"set -e
mkdir "$0/layers" "$0/root"
mount -t tmpfs tmpfs "$0/layers"
mkdir "$0/layers/upper" "$0/layers/work"
mount -t overlay overlay -o "lowerdir=/,upperdir=$0/layers/upper,workdir=$0/layers/work" "$0/root"
cd "$0/root"
mkdir -p ground
mount --bind "$0" ground
mount -t proc proc proc
mount -t sysfs sysfs sys
mount --rbind /dev dev
mount -t tmpfs tmpfs run
ip link set lo up
exec chroot . /bin/bash -c 'trap : CHLD; : >/ground/ready; while :; do sleep 3600 & wait $!; done'
"#;

/// A Debian of the test's own; gone when dropped.
struct Debian {
    init: u32,
    _process: Running,
}

impl Debian {
    /// `None` where the kernel or the machine's file system does not let it be.
    fn begin(ground: &Ground) -> Outcome<Option<Debian>> {
        let mut unshare = command("unshare");
        unshare
            .args(["--mount", "--pid", "--net", "--fork", "--kill-child"])
            .args(["--propagation", "private", "/bin/bash", "-c", INIT])
            .arg(ground.path())
            .stdout(fs::File::create(ground.file("init.log"))?)
            .stderr(fs::File::create(ground.file("init.err.log"))?);
        let mut process = Running(unshare.spawn().doing("start unshare")?);
        let ready = ground.file("ready");
        let there = until(LIMIT, "the other Debian", || {
            if process.0.try_wait()?.is_some() {
                return Ok(Some(false));
            }
            Ok(ready.exists().then_some(true))
        })?;
        if !there {
            return Ok(None);
        }
        let outer = process.0.id();
        let children = fs::read_to_string(format!("/proc/{outer}/task/{outer}/children"))?;
        let init = children.trim().parse().doing("the number of process 1")?;
        let debian = Debian {
            init,
            _process: process,
        };
        put_scripts(ground.path())?;
        let ours = ground.file("nbdtrack");
        let (from, to) = (binary().display().to_string(), ours.display().to_string());
        process::succeed("strip", &["-o", &to, &from], LIMIT)?;
        debian.run("install -m 755 /ground/nbdtrack /usr/bin/nbdtrack; truncate -s 1M /srv/one; rm -rf /etc/nbd-server/conf.d/*")?;
        debian.configure(GOOD)?;
        Ok(Some(debian))
    }

    fn attempt(&self, script: &str) -> Outcome<Finished> {
        let init = self.init.to_string();
        let script = format!("cd / && {{ {script}\n}}");
        let args = [
            "--target", &init, "--mount", "--pid", "--net", "--root", "/bin/sh", "-c", &script,
        ];
        process::run("nsenter", &args, LIMIT)
    }

    fn run(&self, script: &str) -> Outcome<String> {
        let ran = self.attempt(script)?;
        hold!(
            ran.status.success(),
            "{script}: {}\n{}{}",
            ran.status,
            ran.stdout,
            ran.stderr
        );
        Ok(ran.stdout)
    }

    fn configure(&self, text: &str) -> Outcome<()> {
        self.run(&format!("cat >{CONFIG} <<'end'\n{text}end"))?;
        Ok(())
    }

    fn start_stock(&self) -> Outcome<()> {
        self.run("/etc/init.d/nbd-server start")?;
        self.serves("/bin/nbd-server")
    }

    /// There is one server, its process is this program, and clients get the export.
    fn serves(&self, program: &str) -> Outcome<()> {
        let mut last = String::new();
        let asked = format!(
            "p=$(pidof nbd-server) && [ \"$p\" = \"$(cat /run/nbd-server.pid)\" ] && cmp /proc/$p/exe {program} && \
             nbdinfo --size nbd://127.0.0.1/one"
        );
        let size = until(LIMIT, format!("{program} to serve"), || {
            let ran = self.attempt(&asked)?;
            last = format!("{}{}", ran.stdout, ran.stderr);
            Ok(ran.status.success().then_some(ran.stdout))
        })
        .doing(last)?;
        hold!(size.trim() == "1048576", "{size}");
        Ok(())
    }

    /// As the package has it: no diversion, no file beside it, and the package's own binary.
    fn is_stock(&self) -> Outcome<()> {
        self.run("dpkg --verify nbd-server && ! dpkg-divert --list | grep nbd-server")?;
        let beside = self.run("ls -d /bin/nbd-server?* 2>/dev/null; true")?;
        hold!(beside.is_empty(), "{beside}");
        self.serves("/bin/nbd-server")
    }

    fn fails(&self, command: &str, says: &[&str]) -> Outcome<()> {
        let ran = self.attempt(command)?;
        hold!(ran.status.into_raw() != 0, "{command} went well");
        for word in says {
            hold!(ran.stderr.contains(word), "{word}: {}", ran.stderr);
        }
        Ok(())
    }
}

fn beside(what: &str, check: impl Fn(&Debian) -> Outcome<()>) -> Outcome<()> {
    real(what, NEEDS, |ground| match Debian::begin(ground)? {
        Some(debian) => check(&debian),
        None => {
            let why = fs::read_to_string(ground.file("init.err.log"))?;
            skip(
                what,
                &format!("no overlay with namespaces here: {}", why.trim()),
            )
        }
    })
}

#[test]
fn exchange_that_fails_leaves_the_stock_server_as_it_was() -> Outcome<()> {
    beside("take-over that fails", |debian| {
        debian.start_stock()?;
        debian.is_stock()?;
        let back = "the stock server has its place, and no file of its own was changed";
        // Ours does not start.
        debian.configure(OURS_CANNOT_START)?;
        debian.fails("nbdtrack take-over", &["no process of", "came", back])?;
        debian.is_stock()?;
        debian.configure(GOOD)?;
        // It cannot be copied.
        debian.run("mkdir /bin/nbd-server.nbdtrack-new")?;
        debian.fails("nbdtrack take-over", &["copy this program to", back])?;
        debian.run("rmdir /bin/nbd-server.nbdtrack-new")?;
        debian.is_stock()?;
        // dpkg refuses the diversion: something is where the stock server should go.
        debian.run("echo mine >/bin/nbd-server.stock")?;
        debian.fails("nbdtrack take-over", &["dpkg-divert", back])?;
        hold!(
            debian.run("cat /bin/nbd-server.stock")? == "mine\n",
            "a foreign file was touched"
        );
        debian.run("rm /bin/nbd-server.stock")?;
        debian.is_stock()?;
        // It cannot be stopped.
        debian.run("cp /etc/init.d/nbd-server /root/init && sed -i 's/^    stop)/    stop) exit 3 ;;\\n    never)/' /etc/init.d/nbd-server")?;
        let says = ["/etc/init.d/nbd-server stop", "nothing was changed"];
        debian.fails("nbdtrack take-over", &says)?;
        debian.run("cp /root/init /etc/init.d/nbd-server")?;
        debian.is_stock()?;
        // And then it goes well, twice, and back, twice.
        for _ in 0..2 {
            debian.run("nbdtrack take-over")?;
            debian.serves("/usr/bin/nbdtrack")?;
        }
        for _ in 0..2 {
            debian.run("nbdtrack give-back")?;
            debian.is_stock()?;
        }
        Ok(())
    })
}

#[test]
fn newer_version_that_does_not_run_leaves_the_older_one_in_the_place() -> Outcome<()> {
    beside("take-over by a newer version", |debian| {
        debian.start_stock()?;
        debian.run("nbdtrack take-over")?;
        debian.serves("/usr/bin/nbdtrack")?;
        // An older version that runs where the newer one does not: to the service it is any program that is an nbd-server.
        debian.run("cp /bin/nbd-server.stock /root/older && echo >>/root/older")?;
        debian.configure(OURS_CANNOT_START)?;
        let place = |older: &str| {
            debian.run(&format!(
                "/etc/init.d/nbd-server stop; cp {older} /bin/nbd-server.tmp && mv /bin/nbd-server.tmp /bin/nbd-server; \
                 /etc/init.d/nbd-server start; true"
            ))
        };
        place("/root/older")?;
        debian.serves("/root/older")?;
        let kept = "the version of nbdtrack that was there before has its place";
        debian.fails("nbdtrack take-over", &["no process of", kept])?;
        debian.serves("/root/older")?;
        // Nor when it does not come so far.
        debian.run("mkdir /bin/nbd-server.nbdtrack-new")?;
        debian.fails("nbdtrack take-over", &["copy this program to", kept])?;
        debian.run("rmdir /bin/nbd-server.nbdtrack-new")?;
        debian.serves("/root/older")?;
        let beside = debian.run("ls -d /bin/nbd-server?*")?;
        hold!(beside == "/bin/nbd-server.stock\n", "{beside}");
        // What the package says of it, and that it goes on.
        debian.run("install -D -m 644 /ground/sysusers /usr/lib/sysusers.d/nbdtrack.conf")?;
        let told = debian.attempt("sh /ground/postinst configure 0.0.1 2>&1")?;
        hold!(
            told.status.success() && told.stdout.contains("is still the old one"),
            "{told:?}"
        );
        debian.serves("/root/older")?;
        debian.run("nbdtrack give-back")?;
        debian.is_stock()
    })
}

/// Serves `/ground/one`, which this machine sees, too.
const IN_SIGHT: &str = "[generic]\nallowlist = true\nlistenaddr = 127.0.0.1\nx-state = /var/lib/beside\nx-bus = none\n\
    [one]\nexportname = /ground/one\n";
const REGION: u64 = 1 << 20;
const VOLUME: &str = "one";
/// What a client hears of a server that ends in order (proto.md, "Error values").
const ESHUTDOWN: &str = "errno 108";

impl Debian {
    /// A client that writes without end, from within.
    fn stream(&self, first: u64) -> Outcome<Stream> {
        let net = fs::File::open(format!("/proc/{}/ns/net", self.init))?;
        let pace = Pace {
            depth: 4,
            rate: 1000,
            region: REGION,
        };
        let endpoint = Endpoint::Tcp(([127, 0, 0, 1], 10809).into());
        // A socket stays in the network that it was made in; the thread ends, and its network with it.
        std::thread::scope(|scope| {
            let inside = scope.spawn(|| {
                let network = Some(rustix::thread::LinkNameSpaceType::Network);
                rustix::thread::move_into_link_name_space(net.as_fd(), network)?;
                Stream::start(&endpoint, "one", VOLUME, pace, first)
            });
            match inside.join() {
                Ok(stream) => stream,
                Err(_) => trouble!("the thread panicked"),
            }
        })
    }

    /// Does something to the server under a client: its stream is told that the server ends, nothing is lost of what was acknowledged,
    /// and the next one comes in as soon as there is a server again.
    fn under_a_client(
        &self,
        ground: &Ground,
        first: &mut u64,
        command: &str,
        hears: &str,
    ) -> Outcome<()> {
        let stream = self.stream(*first)?;
        // Three rounds of the region.
        stream.wait_for(250)?;
        let began = Instant::now();
        self.run(command)?;
        let took = began.elapsed();
        until(LIMIT, "the client's end", || {
            Ok(stream.is_over().then_some(()))
        })?;
        let report = stream.finish()?;
        let told = report.broken.clone().unwrap_or_default();
        hold!(told.contains(hears), "{command}: the client heard {told:?}");
        hold!(report.wrong_read.is_none(), "{:?}", report.wrong_read);
        let tally = report.verify(&ground.file("one"), VOLUME, Held::Acknowledged)?;
        hold!(tally.all_right(), "{command}: {tally}");
        *first = report
            .blocks
            .iter()
            .map(|block| block.sent)
            .max()
            .unwrap_or(0);
        let next = until(LIMIT, "the next client", || Ok(self.stream(*first).ok()))?;
        let away = began.elapsed();
        next.wait_for(100)?;
        let report = next.finish()?;
        hold!(
            report.broken.is_none() && report.wrong_read.is_none(),
            "{command}: the next one: {:?} {:?}",
            report.broken,
            report.wrong_read
        );
        let tally = report.verify(&ground.file("one"), VOLUME, Held::Flushed)?;
        hold!(tally.all_right(), "{command}: the next one: {tally}");
        *first = report
            .blocks
            .iter()
            .map(|block| block.sent)
            .max()
            .unwrap_or(0);
        tell(&format!(
            "{command}: {} ms, the next client after {} ms, the last one heard {told:?}",
            took.as_millis(),
            away.as_millis()
        ));
        Ok(())
    }
}

#[test]
fn client_that_writes_through_each_exchange_is_told_of_its_end_and_loses_no_byte() -> Outcome<()> {
    real("take-over under a client", NEEDS, |ground| {
        let Some(debian) = Debian::begin(ground)? else {
            let why = fs::read_to_string(ground.file("init.err.log"))?;
            let why = format!("no overlay with namespaces here: {}", why.trim());
            return skip("take-over under a client", &why);
        };
        fs::File::create(ground.file("one"))?.set_len(REGION)?;
        debian.configure(IN_SIGHT)?;
        debian.start_stock()?;
        let mut first = 0;
        // The stock server closes the connection, and has no word for it.
        debian.under_a_client(ground, &mut first, "nbdtrack take-over", "")?;
        debian.serves("/usr/bin/nbdtrack")?;
        // A newer version: to the command it is another program.
        debian.run(
            "cp /usr/bin/nbdtrack /root/new && echo >>/root/new && mv /root/new /usr/bin/nbdtrack",
        )?;
        debian.under_a_client(ground, &mut first, "nbdtrack take-over", ESHUTDOWN)?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.under_a_client(ground, &mut first, "nbdtrack give-back", ESHUTDOWN)?;
        debian.is_stock()
    })
}

#[test]
fn upgrades_of_the_package_take_the_place_along_and_its_removal_gives_it_back() -> Outcome<()> {
    beside("take-over and the package", |debian| {
        debian.start_stock()?;
        debian.run("install -D -m 644 /ground/sysusers /usr/lib/sysusers.d/nbdtrack.conf")?;
        // Installed without being asked to take anything over.
        debian.run("sh /ground/postinst configure ''")?;
        debian.is_stock()?;
        debian.run("nbdtrack take-over")?;
        debian.serves("/usr/bin/nbdtrack")?;
        // dpkg unpacks a newer version between the old one's prerm and the new one's postinst.
        debian.run("sh /ground/prerm upgrade 0.0.2")?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.run("cp /usr/bin/nbdtrack /root/old && cp /root/old /root/new && echo >>/root/new && mv /root/new /usr/bin/nbdtrack")?;
        debian.serves("/root/old")?;
        debian.run("sh /ground/postinst configure 0.0.1")?;
        debian.serves("/usr/bin/nbdtrack")?;
        // An upgrade that dpkg gives up in the middle.
        debian.run("sh /ground/postinst abort-upgrade 0.0.2")?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.run("sh /ground/prerm remove")?;
        debian.is_stock()
    })
}

/// The package's scripts, where the other Debian sees them.
fn put_scripts(folder: &Path) -> Outcome<()> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    for (from, to) in [
        ("packaging/debian/postinst", "postinst"),
        ("packaging/debian/prerm", "prerm"),
        ("systemd/nbdtrack.sysusers", "sysusers"),
    ] {
        fs::copy(root.join(from), folder.join(to)).doing(from)?;
    }
    Ok(())
}
