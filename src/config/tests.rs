//! What `config` promises, by example.

use std::fmt::Write as _;
use std::time::Instant;

use proptest::prelude::*;

use super::*;

#[test]
fn nothing_written_gives_the_defaults() {
    let config = parse(&[main("# nothing yet\n")]).expect("a comment is a configuration");
    assert_eq!(config, Config::default());
    assert_eq!(
        config.server.listen,
        ["127.0.0.1:10809".parse().expect("an address")]
    );
}

#[test]
fn everything_that_can_be_written_is_read() {
    let config = parse(&[main(
        r#"
[server]
listen = ["127.0.0.1:0", "[::1]:10809"]
socket = "/run/nbdtrack/nbd.sock"
state = "/tmp/state"
bus = "unix:path=/tmp/bus"
detach_grace_s = 60
survey_interval_s = 5
history_mib = 8
history_days = 7
max_connections = 10
[dbus]
polkit = true
users = ["volumed"]
[identity]
allow = ["gpt", "slot"]
[[export]]
name = "a"
volume = "gpt:93623F30-edc3-42fe-9def-a2aef1725f9d"
read_only = true
share = true
on_detach = "disconnect"
"#,
    )])
    .expect("valid");
    assert_eq!(config.server.listen.len(), 2);
    assert_eq!(config.server.socket, Some("/run/nbdtrack/nbd.sock".into()));
    assert_eq!(config.server.state, PathBuf::from("/tmp/state"));
    assert_eq!(
        config.server.bus,
        Bus::Address("unix:path=/tmp/bus".to_owned())
    );
    assert_eq!(config.server.detach_grace, Duration::from_secs(60));
    assert_eq!(config.server.survey_interval, Duration::from_secs(5));
    assert_eq!(config.server.history_mib, Some(8));
    assert_eq!(
        config.server.history_age,
        Some(Duration::from_secs(7 * 86_400))
    );
    assert_eq!(config.server.max_connections, 10);
    assert!(config.dbus.polkit);
    assert_eq!(config.dbus.users, ["volumed"]);
    let [export] = &config.exports[..] else {
        panic!("one export")
    };
    assert_eq!(
        export.volume.to_string(),
        "gpt:93623f30-edc3-42fe-9def-a2aef1725f9d"
    );
    assert!(export.read_only && export.share);
}

#[test]
fn everything_wrong_is_told_at_once_with_its_place() {
    let files = [
        main(
            r#"[server]
listen = ["localhost:10809", "127.0.0.1:1", "127.0.0.1:1"]
port = 10809
survey_interval_s = 0
state = "state"
bus = "session"
[identity]
allow = ["path"]
[[export]]
name = "a"
volume = "ebs:vol-1"
colour = "red"
exportname = "/dev/vdb"
[[export]]
name = "b"
path = "/backups/disk0.qcow2"
format = "vhdx"
[[export]]
volume = "serial:X17"
read_only = "yes"
on_detach = "stall"
[extra]
"#,
        ),
        other(
            "10.toml",
            "[[export]]\nname = \"c\"\nvolume = \"gpt:93623f30-edc3-42fe-9def-a2aef1725f9d\"\n",
        ),
        other("20.toml", "[server]\nlisten = []\n[export]\nname = \"x\"\n"),
    ];
    let told = problems(&files);
    let expected = [
        ("nbdtrack.toml:2:11", "127.0.0.1:10809"),
        ("nbdtrack.toml:2:45", "twice"),
        ("nbdtrack.toml:3:1", "unknown key \"port\""),
        ("nbdtrack.toml:4:21", "expected 1 to 3600"),
        ("nbdtrack.toml:5:9", "absolute path"),
        ("nbdtrack.toml:6:7", "expected \"system\""),
        ("nbdtrack.toml:8:10", "expected \"gpt\" or \"slot\""),
        ("nbdtrack.toml:11:10", "for example ebs:vol-0fab"),
        ("nbdtrack.toml:12:1", "unknown key \"colour\""),
        (
            "nbdtrack.toml:13:1",
            "unknown key \"exportname\" (nbd-server's",
        ),
        (
            "nbdtrack.toml:16:8",
            "[server] file_roots lists, and it lists none",
        ),
        (
            "nbdtrack.toml:17:10",
            "export \"b\": format: \"vhdx\": expected \"raw\" or \"qcow2\"",
        ),
        ("nbdtrack.toml:18:1", "name is missing"),
        (
            "nbdtrack.toml:20:13",
            "read_only: invalid type: string \"yes\", expected a boolean",
        ),
        ("nbdtrack.toml:21:13", "on_detach = \"stall\""),
        ("nbdtrack.toml:22:2", "unknown key \"extra\""),
        ("10.toml:3:10", "[identity] allow = [\"gpt\"]"),
        ("20.toml:1:1", "belongs into the main file"),
        ("20.toml:3:1", "two brackets"),
    ];
    assert_eq!(told.len(), expected.len(), "{told:#?}");
    for (told, (place, words)) in told.iter().zip(expected) {
        assert!(
            told.contains(&format!("/{place}: ")) && told.contains(words),
            "{told}\nis not {place}: {words}"
        );
    }
}

#[test]
fn users_of_the_bus_without_polkit_are_no_grant_and_told() {
    let told = problems(&[main("[dbus]\nusers = [\"volumed\"]\n")]);
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(
        told[0].contains(":2:9: users: only with polkit = true"),
        "{told:?}"
    );
    let told = problems(&[main("[dbus]\npolkit = true\nusers = [\"\"]\nuser = 1\n")]);
    assert!(
        told[0].contains(":3:10: users: a name has 1 to 256 bytes"),
        "{told:?}"
    );
    assert!(told[1].contains("unknown key \"user\""), "{told:?}");
}

#[test]
fn what_is_wrong_across_files_names_both_places() {
    let told = problems(&[
        main("[[export]]\nname = \"a\"\nvolume = \"serial:X17\"\n"),
        other(
            "1.toml",
            "[[export]]\nname = \"a\"\nvolume = \"serial:X18\"\n",
        ),
        other(
            "2.toml",
            "[[export]]\nname = \"b\"\nvolume = \"serial:X17\"\nshare = true\n",
        ),
        other(
            "3.toml",
            "[[export]]\nname = \"c\"\nvolume = \"serial:X17_1\"\n",
        ),
    ]);
    let [twice, writers, collision] = &told[..] else {
        panic!("{told:#?}")
    };
    assert!(
        twice.contains("1.toml:2:8: ") && twice.contains("nbdtrack.toml:2:8"),
        "{twice}"
    );
    assert!(
        writers.contains("2.toml:3:10: ")
            && writers.contains("\"a\" at /etc/nbdtrack/nbdtrack.toml:2:8"),
        "{writers}"
    );
    assert!(
        collision.contains("3.toml:3:10: ") && collision.contains("nvme-serial:X17_1"),
        "{collision}"
    );
    assert!(
        collision.contains("\"c\"") && collision.contains("\"a\""),
        "{collision}"
    );
}

#[test]
fn readers_and_sharing_writers_may_have_one_volume() {
    let export = |name: &str, more: &str| {
        format!("[[export]]\nname = \"{name}\"\nvolume = \"serial:X17\"\n{more}\n")
    };
    let text = [
        export("a", "share = true"),
        export("b", "share = true"),
        export("c", "read_only = true"),
    ]
    .concat();
    assert_eq!(parse(&[main(&text)]).expect("valid").exports.len(), 3);
    let text = [export("a", "share = true"), export("b", "")].concat();
    assert_eq!(problems(&[main(&text)]).len(), 1);
}

#[test]
fn broken_lines_are_all_told_and_once() {
    let told = problems(&[main(
        "[[export]]\nname = \"a\"\nvolume = cloudstack:x\n\n[[export]]\nname = \"b\nvolume = \"serial:X17\"\n",
    )]);
    assert!(told.iter().any(|t| t.contains(":3:")), "{told:#?}");
    assert!(told.iter().any(|t| t.contains(":6:")), "{told:#?}");
    for line in [3, 6] {
        assert_eq!(
            told.iter()
                .filter(|t| t.contains(&format!(":{line}:")))
                .count(),
            1,
            "{told:#?}"
        );
    }
}

#[test]
fn an_ini_file_is_refused_by_name() {
    for text in [
        "[generic]\n[export1]\nexportname = /dev/vdb\n",
        "# old\n\n  [generic]\nport = 10809\n",
    ] {
        let told = problems(&[main(text)]);
        assert_eq!(told.len(), 1);
        assert!(told[0].contains("nbd-server"), "{told:?}");
    }
}

#[test]
fn columns_count_characters() {
    let told = problems(&[main(
        "[[export]]\nname = \"é\" # ü\nvolume = 'serial:X17'\r\n\"größe\" = 1\n",
    )]);
    assert_eq!(
        told,
        [
            "/etc/nbdtrack/nbdtrack.toml:4:1: [[export]]: unknown key \"größe\", expected one of name, volume, path, format, read_only, share, direct, on_detach"
        ]
    );
}

#[test]
fn ten_thousand_exports_are_parsed_in_a_moment() {
    let one_file = SourceFile {
        text: exports(0..10_000),
        ..main("")
    };
    let mut many: Vec<SourceFile> = (0..10_000)
        .map(|n| other(&format!("{n:05}.toml"), &exports(n..n + 1)))
        .collect();
    many.insert(0, main("#\n"));
    for files in [vec![one_file], many] {
        let start = Instant::now();
        let config = parse(&files).expect("valid");
        println!(
            "10,000 exports in {} files: {:?}",
            files.len(),
            start.elapsed()
        );
        assert_eq!(config.exports.len(), 10_000);
        // Ten times what was measured in a debug build on two busy cores: finds what is not linear.
        assert!(start.elapsed() < Duration::from_secs(20));
    }
}

proptest! {
    #[test]
    fn any_text_is_parsed_without_a_panic(text in prop_oneof![any::<String>(), "([a-z\\[\\]{}\"'=,.:#\n -]|serial:|export|volume){0,60}"]) {
        if let Err(problems) = parse(&[main(&text)]) {
            prop_assert!(!problems.is_empty());
            prop_assert!(problems.iter().all(|p| p.line > 0 && p.column > 0));
        }
    }
}

fn main(text: &str) -> SourceFile {
    SourceFile {
        path: "/etc/nbdtrack/nbdtrack.toml".into(),
        text: text.to_owned(),
    }
}

fn other(name: &str, text: &str) -> SourceFile {
    SourceFile {
        path: PathBuf::from("/etc/nbdtrack/conf.d").join(name),
        text: text.to_owned(),
    }
}

fn problems(files: &[SourceFile]) -> Vec<String> {
    parse(files)
        .expect_err("something is wrong")
        .iter()
        .map(Problem::to_string)
        .collect()
}

fn exports(numbers: std::ops::Range<u32>) -> String {
    let mut text = String::new();
    for n in numbers {
        let scattered = n.wrapping_mul(2_654_435_761);
        write!(text, "[[export]]\nname = \"migration-vm-{n}-disk0\"\nvolume = \"cloudstack:{scattered:08x}-7b1d-4c55-9c39-0d2a6d0f8a11\"\n")
            .expect("a String takes all");
    }
    text
}

#[test]
fn settings_beside_nbd_servers_configuration_say_what_that_does_not_and_nothing_else() {
    let file = |text: &str| SourceFile {
        path: "/etc/nbdtrack/nbdtrack.toml".into(),
        text: text.to_owned(),
    };
    let taken = parse_settings(&file(
        "[server]\nstore = \"mysql://nbd@db/appliance\"\nstore_owner = \"a\"\nhistory_days = 7\nmax_connections = 9\n\
         [limits]\nmax_connections_per_address = 3\n[claim]\nhotplugged = true\n[dbus]\npolkit = true\n\
         [identity]\nallow = [\"gpt\"]\n",
    ))
    .unwrap();
    assert_eq!(taken.server.database.unwrap().owner.as_deref(), Some("a"));
    assert_eq!(taken.server.max_connections, 9);
    assert_eq!(taken.limits.connections_per_address, 3);
    assert!(taken.claim.unwrap().hotplugged && taken.dbus.polkit);
    assert_eq!(taken.identity.allow.len(), 1);
    for (text, place, says) in [
        ("[server]\nlisten = []\n", "2:10", "listenaddr, port of"),
        ("[server]\nsocket = \"/s\"\n", "2:10", "unixsock of"),
        ("[server]\nstate = \"/s\"\n", "2:9", "x-state of"),
        ("[server]\nbus = \"none\"\n", "2:7", "x-bus of"),
        (
            "[server]\nwatch_config = true\n",
            "2:16",
            "x-watch-config of",
        ),
        (
            "[server]\nfile_roots = [\"/b\"]\n",
            "2:14",
            "x-file-roots of",
        ),
        (
            "[[export]]\nname = \"a\"\nvolume = \"serial:a\"\n",
            "1:1",
            "[[export]]: the exports beside these settings are the sections",
        ),
        ("[server]\nstroe = 1\n", "2:1", "unknown key \"stroe\""),
        ("[sever]\n", "1:", "unknown key \"sever\""),
        ("[server]\nstore_owner = 7\n", "2:15", "store_owner"),
        ("[generic]\n", "1:1", "does not stand beside TOML"),
        ("[server\n", "1:", ""),
        (
            "[limits]\nmax_handshakes = 1\nmax_handshakes = 2\n",
            "3:1",
            "duplicate",
        ),
    ] {
        let problems = parse_settings(&file(text)).unwrap_err();
        let told: Vec<String> = problems.iter().map(ToString::to_string).collect();
        let begin = format!("/etc/nbdtrack/nbdtrack.toml:{place}");
        assert!(
            told.iter()
                .any(|line| line.starts_with(&begin) && line.contains(says)),
            "{text}: {told:?}"
        );
    }
}
