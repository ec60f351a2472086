//! Holds the manual pages and the README to what the program takes: every command, option, key and profile that the program tells of
//! is in its page, and what the README says to type is a command.
#![allow(clippy::unwrap_used, clippy::panic)] // A test ends where something is missing.

mod support;

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
    for key in expected("[server]\nno_such_key = 1\n") {
        assert!(manual.contains(&format!(".It Cm {key} Ar")), "{key}");
    }
    for key in expected("[dbus]\nno_such_key = 1\n") {
        assert!(manual.contains(&format!(".It Cm {key} Ar")), "{key}");
    }
    for key in expected("[limits]\nno_such_key = 1\n") {
        assert!(manual.contains(&format!(".It Cm {key} Ar")), "{key}");
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

/// The pages of the commands are written by `make man` from the definitions that parse the command line.
#[test]
fn the_pages_of_the_commands_are_what_the_program_takes() {
    let folder = tempfile::tempdir().unwrap();
    nbdtrack(&["manual", folder.path().to_str().unwrap()]);
    for command in commands() {
        let name = format!("nbdtrack-{command}.1");
        let fresh = std::fs::read_to_string(folder.path().join(&name)).unwrap();
        let kept = std::fs::read_to_string(format!("{}/man/{name}", env!("CARGO_MANIFEST_DIR")));
        assert!(
            kept.unwrap_or_default() == fresh,
            "man/{name} is not up to date: run 'make man'"
        );
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
