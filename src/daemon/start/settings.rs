//! What nbd-server's configuration says of the server as a whole, with what the file of ours beside it says.

use std::fs;
use std::net::{SocketAddr, ToSocketAddrs};

use crate::config::nbd_server::{Generic, Judged};
use crate::config::{self, Config, Problem};
use crate::daemon::Error;

/// IANA's port of nbd, which the stock server takes by default.
const PORT: u16 = 10809;

/// What is wrong in the file that `x-settings` names: no daemon starts with it.
pub fn refused_in_settings(judged: &Judged) -> Vec<Problem> {
    let settings = judged.generic.as_ref().map(config::settings_of);
    settings.and_then(Result::err).unwrap_or_default()
}

/// What `[generic]` says of the server as a whole, and for the rest what the file beside it does. Blocks on the names of hosts.
///
/// # Errors
/// An address, a port or a bus that cannot be.
pub(in crate::daemon) fn server_of(generic: &Generic, settings: Config) -> Result<Config, Error> {
    let mut config = settings;
    let server = &mut config.server;
    server.listen = Vec::new();
    server.socket.clone_from(&generic.unix);
    server.watch_config = generic.watch;
    // For exports that are made at run time; those of the sections have their own folders where none is said.
    config.identity.file_roots.clone_from(&generic.file_roots);
    if generic.unix.is_none() || generic.dual {
        server.listen = addresses(generic)?;
    }
    if let Some(state) = &generic.state {
        server.state.clone_from(state);
    }
    if let Some(bus) = &generic.bus {
        server.bus = config::Bus::parse(bus).map_err(|reason| Error::Option {
            what: "x-bus",
            text: bus.clone(),
            reason,
        })?;
    }
    Ok(config)
}

fn addresses(generic: &Generic) -> Result<Vec<SocketAddr>, Error> {
    let port = match generic.port.as_deref() {
        None | Some("nbd") => PORT,
        Some(text) => text.parse().map_err(|_| Error::Option {
            what: "port",
            text: text.to_owned(),
            reason: "expected a number, or nbd; names of other services are refused".to_owned(),
        })?,
    };
    if generic.listen.is_empty() {
        let all = [
            SocketAddr::from(([0; 4], port)),
            SocketAddr::from(([0u16; 8], port)),
        ];
        let has_v6 = !fs::read("/proc/net/if_inet6")
            .unwrap_or_default()
            .is_empty();
        return Ok(all.into_iter().filter(|a| a.is_ipv4() || has_v6).collect());
    }
    let mut found: Vec<SocketAddr> = Vec::new();
    for host in &generic.listen {
        let resolved = (host.as_str(), port)
            .to_socket_addrs()
            .map_err(|error| Error::Option {
                what: "listenaddr",
                text: host.clone(),
                reason: error.to_string(),
            })?;
        for address in resolved {
            if !found.contains(&address) {
                found.push(address);
            }
        }
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;

    use super::*;
    use crate::config::nbd_server;

    fn generic(text: &str) -> Generic {
        let file = nbd_server::IniFile {
            path: PathBuf::from("config"),
            text: Ok(format!("[generic]\n{text}")),
        };
        nbd_server::judge(&[file], &BTreeMap::new())
            .generic
            .unwrap()
    }

    #[test]
    fn the_servers_sockets_are_those_of_the_stock_server() {
        let listen = |text: &str| {
            let server = server_of(&generic(text), Config::default()).unwrap().server;
            let listen: Vec<String> = server.listen.iter().map(ToString::to_string).collect();
            (listen.join(" "), server.socket)
        };
        let all = listen("").0;
        assert!(all.starts_with("0.0.0.0:10809"), "{all}");
        assert_eq!(listen("listenaddr = 127.0.0.1\nport = 5").0, "127.0.0.1:5");
        assert_eq!(
            listen("listenaddr = 127.0.0.1, ::1\nport = nbd").0,
            "127.0.0.1:10809 [::1]:10809"
        );
        let socket = Some(PathBuf::from("/run/nbd"));
        assert_eq!(
            listen("unixsock = /run/nbd"),
            (String::new(), socket.clone())
        );
        let both = "unixsock = /run/nbd\nduallisten = true\nlistenaddr = 127.0.0.1";
        assert_eq!(listen(both), ("127.0.0.1:10809".to_owned(), socket));
        for wrong in ["port = telnet", "port = 70000", "x-bus = nowhere"] {
            assert!(
                server_of(&generic(wrong), Config::default()).is_err(),
                "{wrong}"
            );
        }
    }

    #[test]
    fn what_the_file_beside_it_says_is_taken_and_the_rest_is_the_stock_servers() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("ours.toml");
        let text = "[server]\nstore = \"mysql://nbd@db/appliance\"\ndetach_grace_s = 7\n[claim]\nhotplugged = true\n";
        fs::write(&path, text).unwrap();
        let of = format!(
            "x-settings = {}\nx-state = /s\nunixsock = /run/nbd\nx-file-roots = /b\n",
            path.display()
        );
        let generic = generic(&of);
        let config = server_of(&generic, config::settings_of(&generic).unwrap()).unwrap();
        let server = &config.server;
        assert_eq!(server.database.as_ref().unwrap().host, "db");
        assert_eq!(server.detach_grace.as_secs(), 7);
        assert_eq!(
            (
                server.state.clone(),
                server.socket.clone(),
                server.listen.len()
            ),
            (PathBuf::from("/s"), Some(PathBuf::from("/run/nbd")), 0)
        );
        assert_eq!(config.identity.file_roots, [PathBuf::from("/b")]);
        assert!(config.claim.unwrap().hotplugged);
        // One that is not there is told with the place of its name.
        fs::remove_file(&path).unwrap();
        let told = config::settings_of(&generic).unwrap_err();
        assert_eq!((told.len(), told[0].line), (1, 2));
        assert!(told[0].message.contains("x-settings: ") && told[0].message.contains("ours.toml"));
    }
}
