//! What sections of an nbd-server file become, key by key, and how a bad one is named.

use super::*;

fn file(path: &str, text: &str) -> IniFile {
    IniFile {
        path: path.into(),
        text: Ok(text.to_owned()),
    }
}

fn read(text: &str) -> Judged {
    judge(&[file("/etc/nbd-server/config", text)], &LastGood::new())
}

fn told(list: &[Problem]) -> String {
    list.iter().map(|p| format!("{p}\n")).collect()
}

/// Each row of the table, with a value that asks for it: it works, is accepted, or is refused by its name.
#[test]
fn every_key_has_the_fate_that_the_table_says() {
    let example = |key: &Key| match (key.name, key.kind) {
        ("exportname", _) => "/dev/vdb",
        ("x-volume", _) => "serial:WD-WMAP9A966149",
        ("virtstyle", _) => "cidrhash 24",
        ("x-missing-authfile", _) => "allow",
        ("x-format", _) => "qcow2",
        ("x-file-roots", _) => "/a, /b/c",
        (_, Kind::Boolean) => "true",
        (_, Kind::Integer | Kind::Integer64) => "7",
        (_, Kind::Text) => "/a/b",
    };
    let check = |key: &Key, text: String| {
        let judged = read(&text);
        let problems = told(&judged.problems);
        match key.fate {
            Fate::Works | Fate::InPart(_) | Fate::Accepted(_) => {
                assert_eq!(problems, "", "{text}");
                assert!(judged.generic.is_some());
                assert!(judged.sections.contains_key("e"), "{text}");
            }
            Fate::Refused(reason) => {
                let says = format!("{} is refused: {reason}", key.name);
                assert!(problems.contains(&says), "{text}: {problems}");
                assert!(
                    judged.generic.is_none() || judged.sections.is_empty(),
                    "{text}"
                );
            }
        }
    };
    for key in GENERIC.iter().chain(&GENERIC_OURS) {
        let text = format!(
            "[generic]\n{} = {}\n[e]\nexportname = /dev/x\n",
            key.name,
            example(key)
        );
        check(key, text);
    }
    for key in &SECTION {
        let rest = match key.name {
            "exportname" => "",
            "x-format" => "exportname = /a/x\n",
            _ => "exportname = /dev/x\n",
        };
        let text = format!("[generic]\n[e]\n{rest}{} = {}\n", key.name, example(key));
        check(key, text);
    }
}

/// Each style, with a path that asks for what it says and one that does not.
#[test]
fn virtstyle_is_no_matter_but_for_a_path_of_each_client_which_is_refused() {
    let with = |style: &str, path: &str| {
        let said = match style {
            "" => String::new(),
            style => format!("virtstyle = {style}\n"),
        };
        let judged = read(&format!("[generic]\n[e]\n{said}exportname = {path}\n"));
        let told = told(&judged.problems);
        match judged.sections.get("e").map(|section| &section.backing) {
            Some(Backing::File(path, _)) => Ok(path.display().to_string()),
            Some(other) => panic!("{other:?}"),
            None => Err(told),
        }
    };
    for style in ["", "ipliteral", "iphash", "cidrhash 24"] {
        assert_eq!(with(style, "/a/b").as_deref(), Ok("/a/b"), "{style}");
        assert_eq!(with(style, "/a/9%%").as_deref(), Ok("/a/9%"), "{style}");
        for (path, says) in [
            ("/a/%s", "each client's address (%s) is refused"),
            ("/a/9%", "a format of printf(3)"),
            ("/a/%n", "a format of printf(3)"),
        ] {
            let told = with(style, path).unwrap_err();
            assert!(told.contains("exportname") && told.contains(says), "{told}");
        }
    }
    for path in ["/a/b", "/a/%s", "/a/9%%", "/a/9%", "/a/%n"] {
        assert_eq!(with("none", path).as_deref(), Ok(path));
    }
}

#[test]
fn one_export_is_for_clients_that_name_none() {
    let section = |name: &str| format!("[{name}]\nexportname = /a/{name}\nx-default = true\n");
    let judged = read(&format!("[generic]\n{}", section("one")));
    assert!(judged.sections["one"].unnamed);
    let both = format!("[generic]\n{}{}", section("one"), section("two"));
    let judged = read(&both);
    assert!(told(&judged.problems).contains(":5:1: [two]: x-default stands in [one] already"));
    assert_eq!(judged.sections.keys().collect::<Vec<_>>(), ["one"]);
}

/// A false boolean asks for nothing: what would be refused is not.
#[test]
fn a_feature_that_is_switched_off_is_not_refused() {
    for key in SECTION.iter().filter(|key| key.kind == Kind::Boolean) {
        let judged = read(&format!(
            "[generic]\n[e]\nexportname=/dev/x\n{}=false\n",
            key.name
        ));
        assert_eq!(told(&judged.problems), "");
    }
}

#[test]
fn a_value_that_the_stock_server_refuses_is_refused_with_its_place() {
    for (line, says) in [
        ("readonly = yes", "no boolean"),
        ("readonly = TRUE", "no boolean"),
        ("filesize = 12 ", "no whole number"),
        ("maxconnections = 12x", "no whole number"),
        ("authfile = a\\x", "no such escape"),
        ("virtstyle = cidrhash", "length is missing"),
        ("virtstyle = other", "expected none"),
        ("x-volume = nobody:1", "unknown profile"),
        ("x-shared = true", "no key of nbdtrack"),
        ("exportname = relative", "absolute path"),
        ("exportname = /a/%s", "each client's address"),
        ("x-format = raw", "x-format is of a file"),
    ] {
        let judged = read(&format!("[generic]\n[e]\nexportname=/dev/x\n  {line}\n"));
        let problems = told(&judged.problems);
        assert!(
            problems.starts_with("/etc/nbd-server/config:4:3: [e]"),
            "{line}: {problems}"
        );
        assert!(problems.contains(says), "{line}: {problems}");
        assert!(judged.sections.is_empty());
        assert_eq!(judged.refused, 1);
    }
}

#[test]
fn an_unknown_key_is_a_warning() {
    let text = "[generic]\n[e]\nexportname=/dev/x\nreadOnly=true\n";
    let judged = read(text);
    assert!(told(&judged.warnings).contains(":4:1: [e]: readOnly: unknown key"));
    assert_eq!(judged.sections.len(), 1);
}

#[test]
fn a_broken_file_keeps_its_sections_and_the_others_go_on() {
    let before = judge(
        &[
            file("/m", "[generic]\n[m]\nexportname=/dev/a\n"),
            file("/d/1.conf", "[one]\nexportname=/dev/b\n"),
            file("/d/2.conf", "[two]\nexportname=/dev/c\n"),
        ],
        &LastGood::new(),
    );
    assert_eq!(before.sections.len(), 3);
    let after = judge(
        &[
            file(
                "/m",
                "[generic]\n[m]\nexportname=/dev/a\nreadonly=perhaps\n",
            ),
            file("/d/1.conf", "[one]\nexportname=/dev/z\n[hal"),
            file("/d/2.conf", "[two]\nexportname=/dev/y\n"),
            file("/d/3.conf", "[three]\nexportname=/dev/x\n"),
        ],
        &before.sections,
    );
    assert_eq!(after.sections["m"], before.sections["m"]);
    assert_eq!(after.sections["one"], before.sections["one"]);
    assert_eq!(
        after.sections["two"].backing,
        Backing::Device("/dev/y".into())
    );
    assert_eq!(after.sections.len(), 4);
    assert!(told(&after.problems).contains("/d/1.conf:3:1: "));
    assert!(told(&after.problems).contains("/m:4:1: [m]: readonly"));
    // A file that is not there any more is another matter: its sections go.
    let gone = judge(&[file("/m", "[generic]\n")], &after.sections);
    assert!(gone.sections.is_empty());
}

#[test]
fn one_name_in_two_files_is_neither_of_them() {
    let files = [
        file("/m", "[generic]\n"),
        file("/d/a.conf", "[e]\nexportname=/dev/a\n"),
        file("/d/b.conf", "\n[e]\nexportname=/dev/b\n"),
    ];
    let judged = judge(&files, &LastGood::new());
    assert!(judged.sections.is_empty());
    let problems = told(&judged.problems);
    assert!(
        problems.contains("/d/b.conf:2:1:") && problems.contains("/d/a.conf:1"),
        "{problems}"
    );
}

#[test]
fn a_main_file_without_generic_first_changes_nothing() {
    for text in [
        "",
        "# nothing\n",
        "[e]\nexportname=/dev/a\n",
        "[e]\n[generic]\n",
    ] {
        let judged = read(text);
        assert!(judged.generic.is_none() && judged.sections.is_empty());
        assert!(told(&judged.problems).contains("[generic]"), "{text}");
    }
}

#[test]
fn hostile_bytes_end_in_words_and_never_in_a_panic() {
    let mut seed = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    let pieces = [
        "[generic]",
        "[",
        "]",
        "=",
        "\n",
        "\r\n",
        "\\",
        "\\s",
        "\u{fffd}",
        "#",
        " ",
        "\t",
        "exportname",
        "/dev/x",
        "é",
        "\u{0}",
        "x-volume",
        "readonly",
        "true",
        "%s",
        "\u{feff}",
        "[e]",
        "99999999999999999999",
    ];
    for _ in 0..20_000 {
        let count = next() % 24;
        let mut text = String::from(if next() % 2 == 0 { "[generic]\n" } else { "" });
        for _ in 0..count {
            let at = usize::try_from(next()).unwrap_or(0) % pieces.len();
            text.push_str(pieces[at]);
        }
        let judged = read(&text);
        for problem in judged.problems.iter().chain(&judged.warnings) {
            assert!(problem.message.len() < 2_000);
        }
    }
}

/// The table that people read is this one.
#[test]
fn the_manual_has_every_key_and_its_fate() {
    const PLACE: &str = "docs/migrate-from-nbd-server.md";
    const MARKS: [&str; 2] = [
        "<!-- keys: written by a test -->\n",
        "<!-- end of keys -->\n",
    ];
    let mut table = String::new();
    for (group, keys) in [
        (
            "[generic]",
            GENERIC.iter().chain(&GENERIC_OURS).collect::<Vec<_>>(),
        ),
        ("an export", SECTION.iter().collect()),
    ] {
        table.push_str(&format!("\n| in {group} | | |\n|---|---|---|\n"));
        for key in keys {
            let (fate, why) = match key.fate {
                Fate::Works => ("works", ""),
                Fate::InPart(why) => ("works in part", why),
                Fate::Accepted(why) => ("changes nothing", why),
                Fate::Refused(why) => ("refused", why),
            };
            table.push_str(&format!("| `{}` | {fate} | {why} |\n", key.name));
        }
    }
    table.push('\n');
    let path = format!("{}/{PLACE}", env!("CARGO_MANIFEST_DIR"));
    let text = std::fs::read_to_string(&path).unwrap();
    let (before, rest) = text.split_once(MARKS[0]).unwrap();
    let (kept, after) = rest.split_once(MARKS[1]).unwrap();
    if std::env::var_os("NBDTRACK_ACCEPT").is_some() {
        let text = format!("{before}{}{table}{}{after}", MARKS[0], MARKS[1]);
        std::fs::write(&path, text).unwrap();
        return;
    }
    assert!(
        kept == table,
        "{PLACE}: accept with NBDTRACK_ACCEPT=1\n{table}"
    );
}
