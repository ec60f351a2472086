//! An export that the stock server's command line names, beside those of its configuration: `[ip@]port file`. PURE.
//!
//! It is a section like any other, of a file that is not there; clients that name no export get it.

use std::path::Path;

use super::file::whole;
use super::key_file::shown;
use super::{Generic, Problem};

/// Where such a section stands, in what is told of it.
pub const COMMAND_LINE: &str = "the command line";
/// Its name where one is needed; the stock server has none for it.
const NAME: &str = "default";

/// What the command line says beside a configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CommandLine {
    /// Where to listen; `None` for all of this machine's addresses.
    pub host: Option<String>,
    /// A number or a service's name.
    pub port: String,
    /// The text of the section.
    pub section: String,
}

impl CommandLine {
    /// Takes `[ip:|ip6@]port` apart as the stock server does (`cmdline` in nbd-server.c), and makes the section of a file.
    ///
    /// # Errors
    /// In words: what is refused.
    pub fn new(
        place: &str,
        file: &str,
        read_only: bool,
        authfile: Option<&str>,
        clients_max: Option<&str>,
    ) -> Result<CommandLine, String> {
        let (host, port) = match place.split_once(':') {
            Some((host, port)) if !port.contains(':') => (Some(host), port),
            // An IPv6 address has several.
            _ => match place.split_once('@') {
                Some((host, port)) => (Some(host), port),
                None => (None, place),
            },
        };
        if port == "0" {
            return Err("port 0, a client on the standard input (inetd), is refused: one daemon has the disk for all clients".to_owned());
        }
        if !file.starts_with('/') {
            return Err(format!(
                "{}: the file has to be an absolute path",
                shown(file)
            ));
        }
        let mut section = format!(
            "[{NAME}]\nx-default = true\nexportname = {}\n",
            escaped(file)
        );
        if read_only {
            section.push_str("readonly = true\n");
        }
        if let Some(authfile) = authfile {
            section.push_str(&format!("authfile = {}\n", escaped(authfile)));
        }
        if let Some(number) = clients_max {
            let number: u32 = number
                .parse()
                .map_err(|_| format!("-M {}: no number of connections", shown(number)))?;
            section.push_str(&format!("maxconnections = {number}\n"));
        }
        Ok(CommandLine {
            host: host.filter(|host| !host.is_empty()).map(str::to_owned),
            port: port.to_owned(),
            section,
        })
    }

    /// Has the server listen where the command line says, unless the configuration says otherwise: that counts, as with the stock
    /// server, and is told.
    pub(crate) fn listens(&self, config: &Path, generic: &mut Generic) -> Vec<Problem> {
        let mut told = Vec::new();
        let mut odd = |what: &str, said: &str| {
            told.push(whole(
                config,
                format!(
                    "{what} counts, and not {} of the command line; the stock server does the same",
                    shown(said)
                ),
            ));
        };
        match &generic.port {
            Some(port) if *port != self.port => odd(&format!("port = {}", shown(port)), &self.port),
            _ => generic.port = Some(self.port.clone()),
        }
        match &self.host {
            Some(host) if !generic.listen.is_empty() => odd("listenaddr", host),
            Some(host) => generic.listen = vec![host.clone()],
            None => {}
        }
        told
    }
}

/// A value as GLib writes it into a key file (`g_key_file_parse_string_as_value` in glib/gkeyfile.c).
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for (at, c) in text.chars().enumerate() {
        match c {
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' ' if at == 0 => out.push_str("\\s"),
            c => out.push(c),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::super::{Backing, IniFile, LastGood, judge};
    use super::*;

    fn line(place: &str) -> Result<(Option<String>, String), String> {
        let line = CommandLine::new(place, "/f", false, None, None)?;
        Ok((line.host, line.port))
    }

    /// As the stock server of Debian 12 was seen listening.
    #[test]
    fn address_and_port_are_told_apart_as_the_stock_server_does() {
        let host = |text: &str| Some(text.to_owned());
        for (place, wanted) in [
            ("2000", (None, "2000")),
            ("127.0.0.1:2000", (host("127.0.0.1"), "2000")),
            ("127.0.0.1@2000", (host("127.0.0.1"), "2000")),
            ("::1@2000", (host("::1"), "2000")),
            (":2000", (None, "2000")),
            ("nbd", (None, "nbd")),
        ] {
            let (host, port) = wanted;
            assert_eq!(line(place), Ok((host, port.to_owned())), "{place}");
        }
        assert!(line("0").unwrap_err().contains("inetd"));
        assert!(CommandLine::new("1", "f", false, None, None).is_err());
        assert!(CommandLine::new("1", "/f", false, None, Some("x")).is_err());
    }

    #[test]
    fn a_section_says_what_the_line_said_whatever_the_path() {
        for path in ["/a b", "/a\\b\n[x]\nreadonly = true\r", "/#a", "/\t/"] {
            let said = CommandLine::new("1", path, true, Some(" /l"), Some("3")).unwrap();
            let files = ["[generic]\n", &said.section].map(|text| IniFile {
                path: PathBuf::from(COMMAND_LINE),
                text: Ok(text.to_owned()),
            });
            let judged = judge(&files, &LastGood::new());
            assert!(judged.problems.is_empty(), "{:?}", judged.problems);
            assert!(judged.warnings.is_empty(), "{:?}", judged.warnings);
            assert_eq!(judged.sections.len(), 1);
            let section = &judged.sections[NAME];
            assert_eq!(
                section.backing,
                Backing::File(path.into(), crate::identity::Format::Raw)
            );
            assert!(section.unnamed && section.read_only);
            assert_eq!(section.access.authfile, Some(" /l".into()));
            assert_eq!(section.access.connections_max, 3);
        }
    }

    #[test]
    fn what_the_configuration_says_counts_and_is_told() {
        let line = CommandLine::new("127.0.0.1:1", "/f", false, None, None).unwrap();
        let mut silent = Generic::default();
        assert!(line.listens(Path::new("c"), &mut silent).is_empty());
        assert_eq!(silent.port.as_deref(), Some("1"));
        assert_eq!(silent.listen, ["127.0.0.1"]);
        let mut says = Generic {
            port: Some("2".to_owned()),
            listen: vec!["::1".to_owned()],
            ..Generic::default()
        };
        let before = says.clone();
        assert_eq!(line.listens(Path::new("c"), &mut says).len(), 2);
        assert_eq!(says, before);
    }
}
