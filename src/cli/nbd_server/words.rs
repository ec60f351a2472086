//! What nbd-server's command line asks for. PURE.

use std::path::{Path, PathBuf};

use crate::config::nbd_server::CommandLine;

const CONFIG: &str = "/etc/nbd-server/config";
/// Where the init script of Debian's nbd-server looks for the process.
pub const PID_FILE: &str = "/var/run/nbd-server.pid";

pub(super) const USAGE: &str = "\
Usage: nbd-server [-C config_file] [-p pid_file] [-d] [-V]
       nbd-server [ip:|ip6@]port file [-l file] [-r] [-M number] [-C config_file] [-p pid_file] [-d]
       nbd-server [ip:|ip6@]port file [size][kKmM] [-l file] [-r] -o section
	-C FILE	the configuration [/etc/nbd-server/config]
	-p FILE	where to write the process id [/var/run/nbd-server.pid]
	-d	stay in the foreground, and serve every client
	-o NAME	print a section for what the command line says
	-r	with a file: read only
	-l FILE	with a file: who may connect [/etc/nbd-server/allow, if it is there]
	-M N	with a file: how many may be connected at a time
	-V	print the version and exit
	The stock server's long names of these are taken, too.

	A file is served, beside the configuration, to clients that name no export. A size, -c and -m are refused.
";

/// What [`USAGE`] says of each option: its letter, its value's name, and what it does.
pub(super) fn options() -> impl Iterator<Item = (char, Option<&'static str>, &'static str)> {
    USAGE.lines().filter_map(|line| {
        let (option, says) = line.strip_prefix("\t-")?.split_once('\t')?;
        let mut words = option.split(' ');
        Some((words.next()?.chars().next()?, words.next(), says))
    })
}

/// What the command line asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Asked {
    Version,
    Usage {
        unknown: Option<String>,
    },
    /// Print a section.
    Section(String),
    Serve(Serve),
    Refused(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Serve {
    pub config: PathBuf,
    pub pid_file: PathBuf,
    pub foreground: bool,
    pub export: Option<Named>,
}

/// The export that the command line names.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Named {
    place: String,
    file: String,
    read_only: bool,
    authfile: Option<String>,
    clients_max: Option<String>,
}

impl Named {
    /// Who may connect stands in `allow` where nothing is said and that is there.
    ///
    /// # Errors
    /// In words: what is refused.
    pub fn line(&self, allow: &str) -> Result<CommandLine, String> {
        let authfile = self.authfile.as_deref();
        let authfile = authfile.or(Path::new(allow).exists().then_some(allow));
        CommandLine::new(
            &self.place,
            &self.file,
            self.read_only,
            authfile,
            self.clients_max.as_deref(),
        )
    }

    /// The command line's words again, for another process.
    pub fn words(&self) -> Vec<String> {
        let mut words = vec![self.place.clone(), self.file.clone()];
        if self.read_only {
            words.push("-r".to_owned());
        }
        for (option, value) in [("-l", &self.authfile), ("-M", &self.clients_max)] {
            if let Some(value) = value {
                words.extend([option.to_owned(), value.clone()]);
            }
        }
        words
    }
}

/// As getopt_long(3) reads it: options and words in any order, values apart or joined.
pub(super) fn parse(words: &[String]) -> Asked {
    let mut serve = Serve {
        config: CONFIG.into(),
        pid_file: PID_FILE.into(),
        foreground: false,
        export: None,
    };
    let (mut plain, mut section, mut authfile, mut clients_max) = (Vec::new(), None, None, None);
    let (mut read_only, mut copy, mut multi) = (false, false, false);
    let mut rest = words.iter();
    while let Some(word) = rest.next() {
        let (short, mut value) = match option(word) {
            Some(found) => found,
            None if word == "--" => {
                plain.extend(rest.by_ref().cloned());
                break;
            }
            None if word.starts_with('-') && word.len() > 1 => {
                return Asked::Usage {
                    unknown: Some(word.trim_start_matches('-').to_owned()),
                };
            }
            None => {
                plain.push(word.clone());
                continue;
            }
        };
        if "CploM".contains(short) && value.is_none() {
            value = rest.next().cloned();
            if value.is_none() {
                return Asked::Usage {
                    unknown: Some(format!("{short} (its value is missing)")),
                };
            }
        }
        let value = value.unwrap_or_default();
        match short {
            'V' => return Asked::Version,
            'C' => serve.config = value.into(),
            'p' => serve.pid_file = value.into(),
            'd' => serve.foreground = true,
            'o' => section = Some(value),
            'l' => authfile = Some(value),
            'r' => read_only = true,
            'c' => copy = true,
            'm' => multi = true,
            'M' => clients_max = Some(value),
            _ => return Asked::Usage { unknown: None },
        }
    }
    for (is, name, why) in [
        (copy, "-c", "a view of its own for each client is not built"),
        (multi, "-m", "joining files is not built"),
    ] {
        if is {
            return Asked::Refused(format!("{name} is refused: {why}"));
        }
    }
    let is_said = read_only || authfile.is_some() || clients_max.is_some();
    match (section, plain.as_slice()) {
        (Some(_), _) if clients_max.is_some() => Asked::Refused(
            "-M with -o is refused: say maxconnections in the section".to_owned(),
        ),
        (Some(section), [_, file, size @ ..]) if size.len() < 2 => {
            output(&section, file, size.first(), read_only, authfile.as_deref())
        }
        (Some(_), _) => Asked::Refused(
            "Need a complete configuration on the command line to output a config file section!"
                .to_owned(),
        ),
        (None, []) if is_said => Asked::Refused(
            "-r, -l and -M are refused without a file: say readonly, authfile or maxconnections in the section"
                .to_owned(),
        ),
        (None, []) => Asked::Serve(serve),
        (None, [place, file]) => {
            serve.export = Some(Named {
                place: place.clone(),
                file: file.clone(),
                read_only,
                authfile,
                clients_max,
            });
            Asked::Serve(serve)
        }
        (None, [_]) => Asked::Refused("a port without a file is refused".to_owned()),
        (None, [_, _, size, ..]) => Asked::Refused(format!(
            "the size \"{size}\" is refused: an export has the size of its volume"
        )),
    }
}

fn output(
    section: &str,
    file: &str,
    size: Option<&String>,
    read_only: bool,
    authfile: Option<&str>,
) -> Asked {
    let mut text = format!("[{section}]\n\texportname = {file}\n");
    if let Some(size) = size {
        let digits = size.trim_end_matches(['k', 'K', 'm', 'M']);
        let unit = match size.get(digits.len()..) {
            Some("k" | "K") => 1024,
            Some("m" | "M") => 1024 * 1024,
            Some("") => 1,
            _ => 0,
        };
        let bytes = digits.parse::<u64>().ok().and_then(|n| n.checked_mul(unit));
        let Some(bytes) = bytes.filter(|bytes| *bytes > 0) else {
            return Asked::Refused(format!("\"{size}\": no size"));
        };
        text.push_str(&format!("\tfilesize = {bytes}\n"));
    }
    if read_only {
        text.push_str("\treadonly = true\n");
    }
    if let Some(authfile) = authfile {
        text.push_str(&format!("\tauthfile = {authfile}\n"));
    }
    Asked::Section(text)
}

/// One option's letter, and the value that is joined to it.
fn option(word: &str) -> Option<(char, Option<String>)> {
    if let Some(long) = word.strip_prefix("--") {
        let (name, value) = match long.split_once('=') {
            Some((name, value)) => (name, Some(value.to_owned())),
            None => (long, None),
        };
        let short = LONG.iter().find(|(known, _)| *known == name)?.1;
        return Some((short, value));
    }
    let mut letters = word.strip_prefix('-')?.chars();
    let short = letters.next()?;
    let known = LONG.iter().any(|(_, letter)| *letter == short);
    let joined = letters.as_str();
    (known && (joined.is_empty() || "CploM".contains(short)))
        .then(|| (short, (!joined.is_empty()).then(|| joined.to_owned())))
}

const LONG: [(&str, char); 11] = [
    ("config-file", 'C'),
    ("pid-file", 'p'),
    ("authorize-file", 'l'),
    ("output-config", 'o'),
    ("max-connections", 'M'),
    ("max-connection", 'M'),
    ("dont-fork", 'd'),
    ("read-only", 'r'),
    ("copy-on-write", 'c'),
    ("multi-file", 'm'),
    ("version", 'V'),
];

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(line: &str) -> Asked {
        let words: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
        parse(&words)
    }

    #[test]
    fn every_option_is_honoured_or_refused_by_its_name() {
        let serve = |config: &str, pid_file: &str, foreground| {
            Asked::Serve(Serve {
                config: config.into(),
                pid_file: pid_file.into(),
                foreground,
                export: None,
            })
        };
        assert_eq!(asked(""), serve(CONFIG, PID_FILE, false));
        for line in [
            "-C /c -p /p -d",
            "-d -C/c -p/p",
            "--config-file=/c --pid-file /p --dont-fork",
        ] {
            assert_eq!(asked(line), serve("/c", "/p", true), "{line}");
        }
        assert_eq!(asked("-V -x"), Asked::Version);
        assert_eq!(asked("--version"), Asked::Version);
        for (line, named) in [
            ("-x", "x"),
            ("--help", "help"),
            ("-C", "C (its value is missing)"),
            ("-dx", "dx"),
        ] {
            let unknown = Some(named.to_owned());
            assert_eq!(asked(line), Asked::Usage { unknown }, "{line}");
        }
        for (line, says) in [
            ("-c", "-c is refused"),
            ("-m", "-m is refused"),
            ("-M 3", "-r, -l and -M are refused"),
            ("-r", "-r, -l and -M are refused"),
            ("-l /a", "-r, -l and -M are refused"),
            ("10809", "a port without a file"),
            ("10809 /file 3M", "the size \"3M\" is refused"),
            ("10809 /file -c", "-c is refused"),
            ("10809 /file -M 3 -o s", "-M with -o"),
            ("10809 /file 1x -o s", "no size"),
            ("-o s", "Need a complete configuration"),
        ] {
            match asked(line) {
                Asked::Refused(why) => assert!(why.contains(says), "{line}: {why}"),
                other => panic!("{line}: {other:?}"),
            }
        }
        assert_eq!(
            asked("10809 /file 100K -r -l /a -o s"),
            Asked::Section(
                "[s]\n\texportname = /file\n\tfilesize = 102400\n\treadonly = true\n\tauthfile = /a\n"
                    .to_owned()
            )
        );
    }

    #[test]
    fn the_usage_tells_of_every_option_that_is_not_refused_and_of_its_value() {
        let told: std::collections::BTreeMap<char, Option<&str>> = options()
            .map(|(letter, value, _)| (letter, value))
            .collect();
        for (name, letter) in LONG {
            let refused = ['c', 'm'].contains(&letter);
            assert_eq!(told.contains_key(&letter), !refused, "--{name}");
            let valued = "CploM".contains(letter);
            assert_eq!(
                told.get(&letter).is_some_and(Option::is_some),
                valued,
                "{letter}"
            );
        }
    }

    #[test]
    fn a_file_is_named_by_words_in_any_order_which_come_out_again() {
        let line = "-r 127.0.0.1:2000 -M 3 /file -l/a";
        let Asked::Serve(serve) = asked(line) else {
            panic!("{line}");
        };
        let named = serve.export.unwrap();
        assert_eq!(
            named.words(),
            ["127.0.0.1:2000", "/file", "-r", "-l", "/a", "-M", "3"]
        );
        assert_eq!(asked(&named.words().join(" ")), asked(line));
        assert!(
            named
                .line("/etc")
                .unwrap()
                .section
                .contains("authfile = /a")
        );
        let open = Named {
            authfile: None,
            ..named
        };
        let said = |allow: &str| open.line(allow).unwrap().section;
        assert!(said("/etc").contains("authfile = /etc"));
        assert!(!said("/there/is/none").contains("authfile"));
    }
}
