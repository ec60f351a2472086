//! Who this daemon is in the shared database, and by which password: files and systemd's credentials.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use crate::config::{self, Tls};
use crate::daemon::Error;
use crate::mapping::{Address, Secret, Tls as Wire};

/// systemd.exec(5), `LoadCredential=store-password:PATH`
const CREDENTIAL: &str = "store-password";
/// machine-id(5): 32 hexadecimal digits.
const MACHINE_ID: &str = "/etc/machine-id";
/// random(4): another UUID each time.
const RANDOM: &str = "/proc/sys/kernel/random/uuid";
/// More than any password has, in bytes.
const PASSWORD_BYTES_MAX: u64 = 4_096;

pub(in crate::daemon) fn address(database: &config::Database) -> Result<Address, Error> {
    let owner = match &database.owner {
        Some(owner) => owner.clone(),
        None => {
            let id = read(Path::new(MACHINE_ID)).map_err(|reason| told(MACHINE_ID, reason))?;
            config::Database::owner(&id)
                .map_err(|reason| told(MACHINE_ID, format!("{reason}; say store_owner")))?
        }
    };
    Ok(Address {
        host: database.host.clone(),
        port: database.port,
        socket: database.socket.clone(),
        user: database.user.clone(),
        password: password(database)?,
        database: database.name.clone(),
        tls: match database.tls {
            Tls::Off => Wire::Off,
            Tls::Preferred => Wire::Preferred,
            Tls::Required => Wire::Required,
            Tls::VerifyCa => Wire::VerifyCa,
            Tls::VerifyIdentity => Wire::VerifyIdentity,
        },
        ca: database.ca.clone(),
        owner,
        instance: read(Path::new(RANDOM)).map_err(|reason| told(RANDOM, reason))?,
    })
}

/// Never on a command line, in an environment or in the configuration, where others read it.
fn password(database: &config::Database) -> Result<Option<Secret>, Error> {
    let credential = std::env::var_os("CREDENTIALS_DIRECTORY")
        .map(|folder| PathBuf::from(folder).join(CREDENTIAL))
        .filter(|path| path.exists());
    let Some(path) = database.password_file.clone().or(credential) else {
        return Ok(None);
    };
    let shown = path.display().to_string();
    let mode = std::fs::metadata(&path)
        .map_err(|error| told(&shown, error.to_string()))?
        .mode();
    if mode & 0o007 != 0 {
        let reason = format!(
            "everyone may read it (mode {:o}): chmod o= it",
            mode & 0o777
        );
        return Err(told(&shown, reason));
    }
    let text = read(&path).map_err(|reason| told(&shown, reason))?;
    Ok(Some(Secret::new(text)))
}

fn read(path: &Path) -> Result<String, String> {
    let mut text = String::new();
    File::open(path)
        .and_then(|file| file.take(PASSWORD_BYTES_MAX).read_to_string(&mut text))
        .map_err(|error| error.to_string())?;
    Ok(text.trim_end_matches(['\n', '\r']).to_owned())
}

fn told(text: &str, reason: String) -> Error {
    Error::Option {
        what: "store",
        text: text.to_owned(),
        reason,
    }
}
