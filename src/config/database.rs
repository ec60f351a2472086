//! `store = "mysql://…"`: where the shared table of VMs' disks is. PURE.

use std::path::PathBuf;
use std::time::Duration;

/// The longest owner, in bytes: what the column beside the table holds.
pub const OWNER_BYTES_MAX: usize = 64;

/// The shared database, as `[server]` says it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Database {
    pub host: String,
    pub port: u16,
    /// Instead of host and port.
    pub socket: Option<PathBuf>,
    pub user: String,
    pub name: String,
    pub tls: Tls,
    pub ca: Option<PathBuf>,
    /// Holds the password, and nothing else.
    pub password_file: Option<PathBuf>,
    /// Who this machine is in the database; without one the machine's id.
    pub owner: Option<String>,
    pub poll: Duration,
}

/// MySQL's `--ssl-mode`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    Off,
    Preferred,
    Required,
    VerifyCa,
    VerifyIdentity,
}

impl Database {
    /// Parses `mysql://USER@HOST[:PORT]/DATABASE[?socket=…&ssl-mode=…&ssl-ca=…]`.
    ///
    /// # Errors
    /// Says what is expected. Never repeats what could be a password.
    pub fn parse(url: &str) -> Result<Database, String> {
        const FORM: &str = "expected mysql://USER@HOST[:PORT]/DATABASE, or mysql://USER@localhost/DATABASE?socket=PATH";
        let rest = url
            .strip_prefix("mysql://")
            .or_else(|| url.strip_prefix("mariadb://"))
            .ok_or_else(|| FORM.to_owned())?;
        let (rest, query) = rest.split_once('?').unwrap_or((rest, ""));
        let (authority, name) = rest.split_once('/').ok_or_else(|| FORM.to_owned())?;
        let (user, place) = authority.rsplit_once('@').ok_or_else(|| FORM.to_owned())?;
        if user.contains(':') {
            return Err(
                "a password does not stand in this file: say store_password_file, or give the service the credential store-password"
                    .to_owned(),
            );
        }
        let (host, port) = host_and_port(place)?;
        for (what, text) in [("user", user), ("database", name)] {
            let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.' | '$');
            if text.is_empty() || text.len() > 64 || !text.chars().all(fits) {
                return Err(format!(
                    "the {what} is 1 to 64 letters, digits, '_', '-', '.' or '$'"
                ));
            }
        }
        let mut database = Database {
            host,
            port,
            socket: None,
            user: user.to_owned(),
            name: name.to_owned(),
            tls: Tls::Preferred,
            ca: None,
            password_file: None,
            owner: None,
            poll: Duration::from_secs(5),
        };
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match key {
                "socket" => database.socket = Some(absolute(key, value)?),
                "ssl-ca" => database.ca = Some(absolute(key, value)?),
                "ssl-mode" => {
                    database.tls = match value.to_ascii_lowercase().replace('_', "-").as_str() {
                        "disabled" => Tls::Off,
                        "preferred" => Tls::Preferred,
                        "required" => Tls::Required,
                        "verify-ca" => Tls::VerifyCa,
                        "verify-identity" => Tls::VerifyIdentity,
                        _ => return Err("ssl-mode: expected disabled, preferred, required, verify-ca or verify-identity".to_owned()),
                    };
                }
                _ => {
                    return Err(
                        "the query has socket, ssl-mode and ssl-ca, and nothing else".to_owned(),
                    );
                }
            }
        }
        Ok(database)
    }

    /// # Errors
    /// Says what is expected.
    pub fn owner(text: &str) -> Result<String, String> {
        let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '.');
        if text.is_empty() || text.len() > OWNER_BYTES_MAX || !text.chars().all(fits) {
            return Err(format!(
                "store_owner: 1 to {OWNER_BYTES_MAX} letters, digits, '_', '-' or '.'"
            ));
        }
        Ok(text.to_owned())
    }
}

fn host_and_port(place: &str) -> Result<(String, u16), String> {
    let strange =
        || "the host is a name or an address, IPv6 in brackets, with :PORT after it".to_owned();
    let (host, port) = match place.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']').ok_or_else(strange)?;
            (host, port.strip_prefix(':'))
        }
        None => match place.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (place, None),
        },
    };
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | ':');
    if host.is_empty() || host.len() > 253 || !host.chars().all(fits) {
        return Err(strange());
    }
    let port = port.map_or(Ok(3306), |port| port.parse().map_err(|_| strange()))?;
    Ok((host.to_owned(), port))
}

fn absolute(key: &str, value: &str) -> Result<PathBuf, String> {
    if value.starts_with('/') && !value.contains('\0') {
        Ok(PathBuf::from(value))
    } else {
        Err(format!("{key}: expected an absolute path"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_says_where_and_who() {
        let tcp = Database::parse(
            "mysql://nbd@db.example:3307/appliance?ssl-mode=VERIFY_IDENTITY&ssl-ca=/etc/ca.pem",
        )
        .unwrap();
        assert_eq!(
            (
                tcp.host.as_str(),
                tcp.port,
                tcp.user.as_str(),
                tcp.name.as_str()
            ),
            ("db.example", 3307, "nbd", "appliance")
        );
        assert_eq!(
            (tcp.tls, tcp.ca),
            (Tls::VerifyIdentity, Some(PathBuf::from("/etc/ca.pem")))
        );
        let socket =
            Database::parse("mariadb://nbd@localhost/a?socket=/run/mysqld/mysqld.sock").unwrap();
        assert_eq!(
            socket.socket,
            Some(PathBuf::from("/run/mysqld/mysqld.sock"))
        );
        let six = Database::parse("mysql://nbd@[::1]:3306/a").unwrap();
        assert_eq!((six.host.as_str(), six.port), ("::1", 3306));
    }

    #[test]
    fn what_is_wrong_is_told_and_a_password_is_not() {
        for (url, word) in [
            ("postgres://a@b/c", "expected mysql://"),
            ("mysql://nbd:hunter2@db/a", "a password does not stand"),
            ("mysql://nbd@db", "expected mysql://"),
            ("mysql://nbd@/a", "the host"),
            ("mysql://nbd@db:x/a", "the host"),
            ("mysql://nbd@db/", "the database"),
            ("mysql://nbd@db/a?password=hunter2", "the query has"),
            ("mysql://nbd@db/a?ssl-mode=hunter2", "ssl-mode: expected"),
            (
                "mysql://nbd@db/a?socket=hunter2",
                "socket: expected an absolute path",
            ),
        ] {
            let error = Database::parse(url).unwrap_err();
            assert!(
                error.contains(word) && !error.contains("hunter2"),
                "{url}: {error}"
            );
        }
    }
}
