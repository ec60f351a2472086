//! `take-over`, `give-back` and the package's own scripts in a Debian beside this machine's: its files under an overlay, with processes and
//! a network of its own and an init script as its service manager. What systemd makes of it is for the guest's tests.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use support::client::Endpoint;
use support::daemon::binary;
use support::ground::{Ground, Need, real, skip, tell};
use support::loops::LoopDevice;
use support::process::{self, Finished, Running, command};
use support::stream::{Held, Pace, Stream};
use support::{Doing, Outcome, hold, trouble, until};

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
        // It cannot be copied: that is known before anybody is stopped.
        let process = debian.run("cat /run/nbd-server.pid")?;
        let untouched = "nothing was changed";
        debian.run("mkdir /bin/nbd-server.nbdtrack-new")?;
        debian.fails("nbdtrack take-over", &["copy this program to", untouched])?;
        debian.run("rmdir /bin/nbd-server.nbdtrack-new")?;
        debian.is_stock()?;
        // dpkg refuses the diversion: something is where the stock server should go.
        debian.run("echo mine >/bin/nbd-server.stock")?;
        debian.fails("nbdtrack take-over", &["dpkg-divert", untouched])?;
        hold!(
            debian.run("cat /bin/nbd-server.stock")? == "mine\n",
            "a foreign file was touched"
        );
        debian.run("rm /bin/nbd-server.stock")?;
        debian.is_stock()?;
        let now = debian.run("cat /run/nbd-server.pid")?;
        hold!(now == process, "{process} was stopped, {now} serves");
        // It has lost its binary.
        debian.run("mv /bin/nbd-server /root/stock")?;
        let says = ["--reinstall nbd-server", untouched];
        debian.fails("nbdtrack take-over", &says)?;
        debian.run("mv /root/stock /bin/nbd-server")?;
        // It cannot be stopped.
        debian.run("cp /etc/init.d/nbd-server /root/init && sed -i 's/^    stop)/    stop) exit 3 ;;\\n    never)/' /etc/init.d/nbd-server")?;
        let says = ["/etc/init.d/nbd-server stop", untouched];
        debian.fails("nbdtrack take-over", &says)?;
        debian.run("cp /root/init /etc/init.d/nbd-server")?;
        debian.is_stock()?;
        // And then it goes well, twice, and back, twice.
        for _ in 0..2 {
            debian.run("nbdtrack take-over")?;
            debian.serves("/usr/bin/nbdtrack")?;
        }
        // Its own process is no rival, and its service has another name.
        let doctor = debian.attempt("nbdtrack doctor")?.stdout;
        for word in [
            "other NBD servers: none runs",
            "systemctl start dbus nbd-server",
            "/etc/nbd-server/config is good",
        ] {
            hold!(doctor.contains(word), "{word}: {doctor}");
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
        let untouched = "nothing was changed";
        debian.fails("nbdtrack take-over", &["copy this program to", untouched])?;
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

/// The stock server refuses a section without `exportname`, and its init script says that all went well.
const STOCK_CANNOT_START: &str = "[generic]\nallowlist = true\nlistenaddr = 127.0.0.1\nx-state = /var/lib/beside\nx-bus = none\n\
    [one]\nexportname = /srv/one\n[two]\nx-volume = serial:nowhere\n";

/// The service was stopped by then; what did not run was not started by the repetition that the message asked for.
#[test]
fn give_back_that_fails_leaves_ours_serving_and_goes_well_once_its_reason_is_gone() -> Outcome<()> {
    beside("give-back that fails", |debian| {
        debian.start_stock()?;
        debian.run("nbdtrack take-over")?;
        debian.serves("/usr/bin/nbdtrack")?;
        let stays = "nbdtrack has the place again";
        let only_aside = |what: &str| {
            let beside = debian.run("ls -d /bin/nbd-server?*")?;
            hold!(beside == "/bin/nbd-server.stock\n", "{what}: {beside}");
            Ok(())
        };
        // dpkg cannot write its list.
        debian.run(
            "mount --bind /var/lib/dpkg /var/lib/dpkg && mount -o remount,ro,bind /var/lib/dpkg",
        )?;
        debian.fails("nbdtrack give-back", &["dpkg-divert", stays])?;
        debian.serves("/usr/bin/nbdtrack")?;
        only_aside("a list that cannot be written")?;
        debian.run("umount /var/lib/dpkg")?;
        // The stock server does not take the configuration.
        debian.configure(STOCK_CANNOT_START)?;
        debian.fails("nbdtrack give-back", &["no process of", "came", stays])?;
        debian.serves("/usr/bin/nbdtrack")?;
        only_aside("a stock server that does not start")?;
        debian.configure(GOOD)?;
        // It has lost its binary.
        debian.run("mv /bin/nbd-server.stock /root/stock")?;
        debian.fails("nbdtrack give-back", &["--reinstall nbd-server"])?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.run("mv /root/stock /bin/nbd-server.stock")?;
        debian.run("nbdtrack give-back")?;
        debian.is_stock()
    })
}

/// Kills whoever calls it, before or after it has done what it is called for.
const CUT: &str = r#"#!/bin/sh
case " $* " in
*" --test "*) ;;
*" $CUT "*)
    [ "$AT" = before ] || /usr/bin/dpkg-divert "$@"
    kill -KILL $PPID
    exit 1 ;;
esac
exec /usr/bin/dpkg-divert "$@"
"#;

/// Between dpkg's rename and ours there was no nbd-server at all, and a boot would have started none.
#[test]
fn exchange_that_is_cut_off_leaves_a_program_in_the_place_and_is_finished_by_the_next()
-> Outcome<()> {
    beside("take-over that is cut off", |debian| {
        debian.start_stock()?;
        debian.run(&format!(
            "mkdir /root/cut && cat >/root/cut/dpkg-divert <<'end'\n{CUT}end\nchmod 755 /root/cut/dpkg-divert"
        ))?;
        let cut = |command: &str, word: &str, at: &str| {
            let words = format!("PATH=/root/cut:$PATH CUT={word} AT={at} nbdtrack {command}");
            debian.fails(&words, &[])?;
            debian.run("test -x /bin/nbd-server && ! pidof nbd-server && test -s /bin/nbd-server.nbdtrack-ran")
        };
        for at in ["before", "after"] {
            cut("take-over", "--add", at)?;
            debian.run("nbdtrack take-over")?;
            debian.serves("/usr/bin/nbdtrack")?;
            cut("give-back", "--remove", at)?;
            debian.run("nbdtrack give-back")?;
            debian.is_stock()?;
            cut("take-over", "--add", at)?;
            debian.run("nbdtrack give-back")?;
            debian.is_stock()?;
        }
        // All but the start.
        let script = "/etc/init.d/nbd-server";
        debian.run(&format!(
            "cp {script} /root/init && sed -i 's/^    start)/    start) kill -KILL $PPID; exit 1 ;;\\n    never)/' {script}"
        ))?;
        debian.fails("nbdtrack take-over", &[])?;
        debian.run(&format!("cp /root/init {script}"))?;
        debian.run("nbdtrack take-over")?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.run("nbdtrack give-back")?;
        debian.is_stock()?;
        // dpkg puts another version of the stock server there before the next one.
        debian.run("cp /bin/nbd-server /root/newer && echo >>/root/newer")?;
        for (next, beside) in [
            ("give-back", "! ls -d /bin/nbd-server?*"),
            ("take-over", "cmp /bin/nbd-server.stock /root/newer"),
        ] {
            cut("take-over", "--add", "before")?;
            debian.run(&format!(
                "cp /root/newer /bin/nbd-server.dpkg-new && mv /bin/nbd-server.dpkg-new /bin/nbd-server && nbdtrack {next} && {beside}"
            ))?;
        }
        debian.serves("/usr/bin/nbdtrack")
    })
}

/// What `take-over` asks a service manager for, of an init script and a unit that is only said to run; what a real one makes of it is for the guest.
const MANAGER: &str = r#"#!/bin/sh
is() { [ -e "$1" ] && echo active || { echo inactive; exit 3; }; }
case "$*" in
"is-active nbdtrack.service") is /run/own ;;
*"is-active nbd-server") is /run/unit ;;
"is-active "*) is /nowhere ;;
"is-enabled "*) echo enabled ;;
"show --property=SourcePath "*) echo /etc/init.d/nbd-server ;;
"show --property=ExecStart "*) echo "{ path=/usr/bin/nbdtrack ; argv[]=/usr/bin/nbdtrack serve --config /etc/nbdtrack ; ignore_errors=no }" ;;
"start nbd-server") /etc/init.d/nbd-server start; ! pidof nbd-server || : >/run/unit ;;
"stop nbd-server") [ ! -e /run/unit ] || { rm /run/unit; /etc/init.d/nbd-server stop; } ;;
"--quiet stop nbdtrack.service") rm /run/own ;;
"--quiet start nbdtrack.service") [ ! -e /root/broken ] && : >/run/own ;;
"--quiet is-active nbdtrack.service") is /run/own >/dev/null ;;
"--quiet is-active nbd-server.service") is /run/unit >/dev/null ;;
"--quiet is-enabled nbd-server.service") [ -e /run/wanted ] ;;
esac
"#;
const INVOKE: &str = "#!/bin/sh\necho \"$@\" >>/root/invoked\n";
const HELPER: &str = "#!/bin/sh\necho \"$@\" >>/root/helped\n";

impl Debian {
    /// Has it look like a machine with systemd.
    fn manage(&self) -> Outcome<()> {
        self.run("mkdir -p /run/systemd/system")?;
        for (name, text) in [
            ("systemctl", MANAGER),
            ("deb-systemd-invoke", INVOKE),
            ("deb-systemd-helper", HELPER),
        ] {
            let path = format!("/usr/local/sbin/{name}");
            self.run(&format!("cat >{path} <<'end'\n{text}end\nchmod 755 {path}"))?;
        }
        Ok(())
    }
}

/// It stopped the only server that there was, and said that all went well.
#[test]
fn take_over_from_our_own_service_starts_nbd_server_in_its_place() -> Outcome<()> {
    beside("take-over from our own service", |debian| {
        debian.manage()?;
        debian.run(": >/run/own")?;
        let plan = debian.run("nbdtrack take-over --dry-run")?;
        hold!(
            plan.contains("nbd-server is started in its place"),
            "{plan}"
        );
        // One that fails leaves it as it was.
        debian.configure(OURS_CANNOT_START)?;
        debian.fails(
            "nbdtrack take-over",
            &["no process of", "the stock server has its place"],
        )?;
        debian.run("test -e /run/own && ! pidof nbd-server && test ! -e /bin/nbd-server.stock")?;
        // Nor is nobody there when that cannot be taken back.
        debian.run(
            "mkdir /root/stuck && printf '#!/bin/sh\\ncase \"$*\" in *--remove*) exit 2;; esac\\nexec /usr/bin/dpkg-divert \"$@\"\\n' \
             >/root/stuck/dpkg-divert && chmod 755 /root/stuck/dpkg-divert",
        )?;
        debian.fails(
            "PATH=/root/stuck:$PATH nbdtrack take-over",
            &["no process of", "which starts what ran"],
        )?;
        debian.serves("/bin/nbd-server.stock")?;
        // What ran is what is started: not the stock server, which only stood in.
        debian.run("test ! -e /run/own && : >/root/broken")?;
        debian.fails(
            "nbdtrack give-back",
            &[
                "start nbdtrack.service",
                "the stock server has its place again",
            ],
        )?;
        debian.serves("/bin/nbd-server")?;
        let told = debian.run("rm /root/broken && nbdtrack give-back")?;
        hold!(told.contains("nbdtrack.service ran"), "{told}");
        debian.run("test -e /run/own && ! pidof nbd-server")?;
        debian.run("dpkg --verify nbd-server && ! ls -d /bin/nbd-server?* && ! dpkg-divert --list | grep nbd-server")?;
        debian.configure(GOOD)?;
        debian.run("nbdtrack take-over")?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.run("test ! -e /run/own")?;
        // The unit waits for the drain; the manager here does not read it.
        let drop_in = "/etc/systemd/system/nbd-server.service.d/nbdtrack.conf";
        let wait = debian.run(&format!(
            "grep -q '^ExecStop=$' {drop_in} && sed -n 's/^ExecStop=-//p' {drop_in}"
        ))?;
        let slow = "p=$(cat /run/nbd-server.pid); kill -STOP $p; (sleep 3; kill -CONT $p) &";
        debian.run(&format!("{slow} {wait}"))?;
        debian.run("! pidof nbd-server && /etc/init.d/nbd-server start")?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.run("nbdtrack give-back")?;
        debian.is_stock()?;
        debian.run("test ! -e /etc/systemd/system/nbd-server.service.d")?;
        Ok(())
    })
}

/// A new version does not start with what it cannot read, and then there was none.
#[test]
fn upgrade_leaves_the_old_daemon_with_a_configuration_that_the_new_one_would_not_take()
-> Outcome<()> {
    beside("upgrade with a broken configuration", |debian| {
        debian.manage()?;
        debian.run("install -D -m 644 /ground/sysusers /usr/lib/sysusers.d/nbdtrack.conf")?;
        debian.run(
            ": >/run/own; mkdir -p /etc/nbdtrack; echo 'listen = 7' >/etc/nbdtrack/nbdtrack.toml",
        )?;
        let told = debian.attempt("sh /ground/postinst configure 0.0.1 2>&1")?;
        hold!(
            told.status.success()
                && told.stdout.contains("/etc/nbdtrack/nbdtrack.toml:1")
                && told.stdout.contains("the old version serves on"),
            "{told:?}"
        );
        debian.run("! grep nbdtrack.service /root/invoked")?;
        debian.run("echo '# Nothing yet.' >/etc/nbdtrack/nbdtrack.toml; sh /ground/postinst configure 0.0.1 && grep 'restart nbdtrack.service' /root/invoked")?;
        // In the place, what keeps ours from starting is no matter of --force.
        debian.run("rm -r /run/systemd")?;
        debian.start_stock()?;
        debian.run("nbdtrack take-over")?;
        let process = debian.run("cat /run/nbd-server.pid")?;
        debian.configure(&GOOD.replace("x-bus", "x-settings = /etc/none.toml\nx-bus"))?;
        debian.run("echo >>/usr/bin/nbdtrack")?;
        debian.fails(
            "nbdtrack take-over --force",
            &["nothing of it can be served"],
        )?;
        let now = debian.run("cat /run/nbd-server.pid")?;
        hold!(now == process, "{process} was stopped, {now} serves");
        Ok(())
    })
}

/// Started, it was tried again every two seconds; enabled, whichever came first at a boot had the port.
#[test]
fn new_package_where_the_stock_server_runs_or_will_leaves_its_service_to_a_person() -> Outcome<()> {
    beside("a new package beside the stock server", |debian| {
        debian.manage()?;
        debian.run("install -D -m 644 /ground/sysusers /usr/lib/sysusers.d/nbdtrack.conf")?;
        for (given, starts) in [
            ("true", true),
            (": >/run/unit", false),
            ("rm /run/unit; : >/run/wanted", false),
            ("rm /run/wanted", true),
        ] {
            let told = debian.run(&format!(
                "{given}; : >/root/invoked; : >/root/helped; sh /ground/postinst configure '' 2>&1"
            ))?;
            hold!(
                told.contains("neither enabled nor started") != starts,
                "{given}: {told}"
            );
            let done = debian.run(
                "cat /root/helped /root/invoked | grep -E '^(enable|start) nbdtrack.service$'; true",
            )?;
            let wanted = match starts {
                true => "enable nbdtrack.service\nstart nbdtrack.service\n",
                false => "",
            };
            hold!(done == wanted, "{given}: {done}");
        }
        Ok(())
    })
}

/// They were counted by their name: the command waited half a minute for them, and then took all back.
#[test]
fn servers_that_somebody_started_by_hand_are_left_alone() -> Outcome<()> {
    beside("take-over beside another nbd-server", |debian| {
        debian.start_stock()?;
        debian.run("truncate -s 2M /srv/two && /bin/nbd-server 127.0.0.1:10900 /srv/two -C /dev/null -p /run/other.pid")?;
        let other = until(LIMIT, "the other one's number", || {
            let read = debian.attempt("cat /run/other.pid")?;
            Ok((!read.stdout.is_empty()).then_some(read.stdout))
        })?;
        let both = |program: &str| {
            debian.run(&format!(
                "cmp /proc/$(cat /run/nbd-server.pid)/exe {program} && nbdinfo --size nbd://127.0.0.1/one && \
                 kill -0 {other}"
            ))
        };
        debian.run("nbdtrack take-over")?;
        both("/usr/bin/nbdtrack")?;
        debian.run("nbdtrack give-back")?;
        both("/bin/nbd-server")?;
        // Nor is one that is there already the one that was started.
        debian.run("/etc/init.d/nbd-server stop")?;
        debian.configure(STOCK_CANNOT_START)?;
        debian.run("nbdtrack take-over && /etc/init.d/nbd-server start")?;
        debian.fails(
            "nbdtrack give-back",
            &["no process of", "nbdtrack has the place again"],
        )?;
        both("/usr/bin/nbdtrack")?;
        Ok(())
    })
}

/// dpkg has a newer version where the older one is by now.
#[test]
fn upgrade_of_the_stock_package_goes_beside_ours_and_is_what_comes_back() -> Outcome<()> {
    const CONTROL: &str = "Package: nbd-server\nVersion: 1:99\nArchitecture: all\nMaintainer: nobody <nobody@localhost>\n\
        Description: a newer one\n";
    beside("an upgrade of the stock package", |debian| {
        debian.start_stock()?;
        debian.run("nbdtrack take-over")?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.run(&format!(
            "mkdir -p /root/newer/DEBIAN /root/newer/bin && cat >/root/newer/DEBIAN/control <<'end'\n{CONTROL}end\n\
             cp /bin/nbd-server.stock /root/newer/bin/nbd-server && echo >>/root/newer/bin/nbd-server && \
             dpkg-deb --build --root-owner-group /root/newer /root/newer.deb && \
             DEBIAN_FRONTEND=noninteractive dpkg -i /root/newer.deb"
        ))?;
        debian.run(
            "cmp /bin/nbd-server /usr/bin/nbdtrack && cmp /bin/nbd-server.stock /root/newer/bin/nbd-server",
        )?;
        // Its scripts may have stopped the service.
        debian.run("/etc/init.d/nbd-server start; true")?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.run("nbdtrack give-back && cmp /bin/nbd-server /root/newer/bin/nbd-server && ! ls -d /bin/nbd-server?*")?;
        debian.serves("/bin/nbd-server")
    })
}

/// The diversion was looked for in the list of the package's files, which dpkg had forgotten.
#[test]
fn place_of_a_package_that_was_removed_is_cleared_and_its_state_kept_until_then() -> Outcome<()> {
    beside("the stock package is removed", |debian| {
        debian.start_stock()?;
        debian.run("nbdtrack take-over")?;
        debian.serves("/usr/bin/nbdtrack")?;
        debian.run("mkdir -p /var/lib/nbdtrack && : >/var/lib/nbdtrack/kept")?;
        // A removal whose give-back failed: who serves in the place has the state open.
        let told = debian.run("sh /ground/postrm purge 2>&1")?;
        hold!(
            told.contains("/var/lib/nbdtrack and the group stay"),
            "{told}"
        );
        debian.run("test -e /var/lib/nbdtrack/kept")?;
        debian.run("DEBIAN_FRONTEND=noninteractive dpkg -r nbd-server")?;
        debian.run("test -e /bin/nbd-server && test ! -e /bin/nbd-server.stock")?;
        debian.fails(
            "nbdtrack take-over",
            &["was removed", "'nbdtrack give-back' clears"],
        )?;
        debian.run("sh /ground/prerm remove")?;
        debian.run("! ls -d /bin/nbd-server* && ! dpkg-divert --list | grep nbd-server && ! pidof nbd-server")?;
        let said = debian.run("nbdtrack give-back")?;
        hold!(said.contains("nothing to do"), "{said}");
        debian.run("sh /ground/postrm purge && test ! -e /var/lib/nbdtrack")?;
        Ok(())
    })
}

/// At a boot the network may come up later than the daemon, which then did not start.
#[test]
fn address_that_comes_up_later_is_served_on() -> Outcome<()> {
    beside("an address that comes later", |debian| {
        debian.configure(&GOOD.replace("127.0.0.1", "192.0.2.7"))?;
        debian.run("nbdtrack nbd-server -C /etc/nbd-server/config")?;
        debian.fails("timeout 5 nbdinfo --size nbd://192.0.2.7/one", &[])?;
        debian.run("ip address add 192.0.2.7/32 dev lo")?;
        let size = debian.run("nbdinfo --size nbd://192.0.2.7/one")?;
        hold!(size.trim() == "1048576", "{size}");
        Ok(())
    })
}

/// The pins of its sections went with it: their paths were judged afresh, when other disks may have them.
#[test]
fn pins_outlive_a_start_that_finds_no_main_file_beside_its_command_line() -> Outcome<()> {
    beside("pins without a main file", |debian| {
        let device = LoopDevice::add()?;
        let node = device.node();
        debian.run(&format!(
            "truncate -s 2M /srv/job && losetup {node} /srv/job"
        ))?;
        let section = |more: &str| {
            format!("[generic]\nlistenaddr = 127.0.0.1\n[job]\nexportname = {node}\n{more}")
        };
        let start = format!("nbdtrack --bus none nbd-server 10809 /srv/one -C {CONFIG}");
        let ends = "p=$(cat /run/nbd-server.pid) && kill $p && while kill -0 $p 2>/dev/null; do sleep 0.1; done";
        let serves = |export: &str, bytes: &str| {
            let asked = format!("nbdinfo --size nbd://127.0.0.1/{export}");
            let size = until(LIMIT, format!("{export} to be served"), || {
                let ran = debian.attempt(&asked)?;
                Ok(ran.status.success().then_some(ran.stdout))
            })?;
            hold!(size.trim() == bytes, "{export}: {size}");
            Ok(())
        };
        debian.configure(&section("x-trust-path = true\n"))?;
        debian.run(&start)?;
        serves("job", "2097152")?;
        debian.run(ends)?;
        debian.run(&format!("mv {CONFIG} /root/aside && {start}"))?;
        serves("", "1048576")?;
        debian.fails("nbdinfo --size nbd://127.0.0.1/job", &[])?;
        debian.run(ends)?;
        // Nothing says any more that the path is to be trusted, and the daemon has seen the disk there only since its start.
        debian.configure(&section(""))?;
        debian.run(&start)?;
        serves("job", "2097152")?;
        debian.run(ends)?;
        debian.run(&format!("losetup -d {node}"))?;
        Ok(())
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
        // The init script kills what has not ended after a second, and this one needs three.
        let slow = "p=$(cat /run/nbd-server.pid); kill -STOP $p; (sleep 3; kill -CONT $p) & nbdtrack give-back";
        debian.under_a_client(ground, &mut first, slow, ESHUTDOWN)?;
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
        ("packaging/debian/postrm", "postrm"),
        ("systemd/nbdtrack.sysusers", "sysusers"),
    ] {
        fs::copy(root.join(from), folder.join(to)).doing(from)?;
    }
    Ok(())
}
