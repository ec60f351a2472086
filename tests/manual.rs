//! Holds the manual pages and the README to what the program takes: every command, option, key and profile that the program tells of
//! is in its page, and what the README says to type is a command.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

use std::collections::BTreeMap;
use std::process::Command;

fn page(path: &str) -> String {
    std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

fn nbdtrack(arguments: &[&str]) -> (String, String) {
    let out = Command::new(env!("CARGO_BIN_EXE_nbdtrack"))
        .args(arguments)
        .output()
        .unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    (text(out.stdout), text(out.stderr))
}

fn commands() -> Vec<String> {
    let (help, _) = nbdtrack(&["--help"]);
    let list = help.split_once("Commands:\n").unwrap().1;
    let lines = list.split_once("\n\n").unwrap().0.lines();
    lines
        .filter_map(|line| line.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

/// What `check` says that it expects in `[server]`, and which profiles it has.
fn expected(config: &str) -> Vec<String> {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("nbdtrack.toml");
    std::fs::write(&file, config).unwrap();
    let (_, told) = nbdtrack(&["check", "--config", file.to_str().unwrap()]);
    let list = told.lines().next().unwrap().split_once("expected one of ");
    let list = list.unwrap_or_else(|| panic!("{told}")).1;
    list.split(", ").map(str::to_owned).collect()
}

#[test]
fn every_command_and_option_is_in_the_manual_page() {
    let manual = page("man/nbdtrack.1");
    let words: Vec<&str> = manual.split([' ', '\n', ',']).collect();
    let commands = commands();
    assert!(commands.len() > 10, "{commands:?}");
    for command in commands {
        assert!(words.contains(&command.as_str()), "{command}");
        let (help, _) = nbdtrack(&[&command, "--help"]);
        let options = help
            .lines()
            .filter_map(|line| Some(line.trim_start().split_once("--")?.1))
            .filter_map(|rest| rest.split([' ', ',', '>']).next());
        for option in options {
            let flag = format!("Fl -{option} ");
            assert!(
                manual.replace('\n', " ").contains(&flag),
                "{command} --{option}"
            );
        }
    }
}

#[test]
fn every_key_and_profile_is_in_the_manual_page() {
    let manual = page("man/nbdtrack.toml.5");
    let readme = page("README.md");
    let export = "[[export]]\nname = \"a\"\nvolume = \"serial:x\"\n";
    for table in [
        "[server]\n",
        "[dbus]\n",
        "[limits]\n",
        "[identity]\n",
        "[claim]\n",
        export,
    ] {
        // What is said of another table's key of that name is not said of this one's.
        let (name, _) = table.split_once('\n').unwrap();
        let of_table = manual.split_once(&format!(".Ss {name}\n"));
        let (of_table, _) = of_table
            .unwrap_or_else(|| panic!("no {name}"))
            .1
            .split_once("\n.S")
            .unwrap();
        let keys = expected(&format!("{table}no_such_key = 1\n"));
        assert!(!keys.is_empty(), "{name}");
        for key in keys {
            assert!(
                of_table.contains(&format!(".It Cm {key} Ar")),
                "{name} {key}"
            );
        }
    }
    for profile in expected("[[export]]\nname = \"a\"\nvolume = \"none:x\"\n") {
        assert!(manual.contains(&format!(".It Cm {profile}\n")), "{profile}");
        assert!(readme.contains(&format!("`{profile}`")), "{profile}");
    }
}

#[test]
fn what_the_readme_says_to_type_is_a_command() {
    let readme = page("README.md");
    let shells = readme.split("```sh\n").skip(1);
    let typed: Vec<&str> = shells
        .filter_map(|block| block.split("```").next())
        .flat_map(str::lines)
        .filter_map(|line| line.strip_prefix("nbdtrack ")?.split(' ').next())
        .collect();
    assert!(typed.len() > 5, "{typed:?}");
    let commands = commands();
    for command in typed {
        assert!(commands.iter().any(|known| known == command), "{command}");
    }
}

/// The pages of the commands, by their names.
fn pages(folder: &std::path::Path) -> BTreeMap<String, String> {
    let read = |entry: std::io::Result<std::fs::DirEntry>| {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        let text = std::fs::read_to_string(entry.path()).unwrap();
        name.starts_with("nbdtrack-").then_some((name, text))
    };
    std::fs::read_dir(folder)
        .unwrap()
        .filter_map(read)
        .collect()
}

/// The pages of the commands are written by `make man` from the definitions that parse the command line.
#[test]
fn the_pages_of_the_commands_are_what_the_program_takes() {
    let folder = tempfile::tempdir().unwrap();
    nbdtrack(&["manual", folder.path().to_str().unwrap()]);
    let fresh = pages(folder.path());
    let kept = pages(std::path::Path::new(concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/man"
    )));
    for command in commands() {
        assert!(
            fresh.contains_key(&format!("nbdtrack-{command}.1")),
            "{command}"
        );
    }
    for (name, text) in &fresh {
        assert!(
            kept.get(name) == Some(text),
            "man/{name} is not up to date: run 'make man'"
        );
    }
    let names = |pages: &BTreeMap<String, String>| pages.keys().cloned().collect::<Vec<_>>();
    assert_eq!(names(&kept), names(&fresh), "a page of no command");
}

/// The pages told readers of pages that nobody had written.
#[test]
fn every_page_that_a_page_tells_of_is_there() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/man");
    let all = pages(std::path::Path::new(folder));
    let mut told = 0;
    for (name, text) in &all {
        let plain = text.replace("\\-", "-");
        let words = plain.split(|letter: char| letter.is_whitespace() || "\"',;.".contains(letter));
        for page in words.filter_map(|word| word.strip_suffix("(1)")) {
            if page.starts_with("nbdtrack") {
                let there = std::path::Path::new(&format!("{folder}/{page}.1")).exists();
                assert!(there, "{name} tells of {page}(1)");
                told += 1;
            }
        }
        let title = text.lines().find(|line| line.starts_with(".TH "));
        let year = title.is_some_and(|title| title.contains(" 20"));
        assert!(year, "{name} has no date: {title:?}");
    }
    assert!(told > all.len(), "{told} pages are told of");
    for option in [
        "\\-C", "\\-p", "\\-d", "\\-o", "\\-r", "\\-l", "\\-M", "\\-V",
    ] {
        let page = &all["nbdtrack-nbd-server.1"];
        let (_, options) = page.split_once(".SH OPTIONS").unwrap();
        assert!(options.contains(option), "{option} is not in {options}");
    }
}

#[test]
fn mandoc_finds_nothing_wrong_with_the_pages() {
    if !support::process::installed("mandoc") {
        support::ground::skip("manual pages", "mandoc is not installed").unwrap();
        return;
    }
    for page in std::fs::read_dir(format!("{}/man", env!("CARGO_MANIFEST_DIR"))).unwrap() {
        let page = page.unwrap().path();
        // What is written by hand has no warning; what is generated no error.
        let by_hand = !page.to_string_lossy().contains("nbdtrack-");
        let level = if by_hand { "-Wwarning" } else { "-Werror" };
        let judged = Command::new("mandoc")
            .args(["-Tlint", level])
            .arg(&page)
            .output()
            .unwrap();
        let said = String::from_utf8_lossy(&judged.stdout).into_owned();
        assert!(said.is_empty(), "{said}");
    }
}
