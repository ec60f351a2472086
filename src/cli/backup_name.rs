//! `backup-name`: the name of a backup's export, made or taken apart. Needs no daemon.

use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use serde_json::json;

use super::Failure;
use super::show::{print, print_json};
use crate::correlation::backup_name::{BackupContext, BackupKind, BackupName};

#[derive(Debug, Args)]
pub struct Asked {
    /// What the backup is of: the VM or the job
    #[arg(required_unless_present = "parse")]
    context: Option<String>,
    /// The number of the disk
    #[arg(required_unless_present = "parse")]
    disk: Option<u32>,
    /// Whether it holds everything, or what changed
    #[arg(long, value_enum, default_value_t = Kind::Full)]
    kind: Kind,
    /// When it is made, in seconds since 1970; now, without it
    #[arg(long, value_name = "SECONDS")]
    at: Option<u64>,
    /// Take this name apart
    #[arg(long, value_name = "NAME", conflicts_with_all = ["context", "disk", "kind", "at"])]
    parse: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Kind {
    Full,
    Incr,
}

pub fn backup_name(asked: &Asked, as_json: bool) -> Result<(), Failure> {
    let wrong = |error: crate::correlation::backup_name::BackupNameError| {
        Failure::Argument(error.to_string())
    };
    let name = match (&asked.parse, &asked.context, asked.disk) {
        (Some(name), ..) => BackupName::parse(name).map_err(wrong)?,
        (None, Some(context), Some(disk)) => {
            let kind = match asked.kind {
                Kind::Full => BackupKind::Full,
                Kind::Incr => BackupKind::Incremental,
            };
            let now = || {
                let since = SystemTime::now().duration_since(UNIX_EPOCH);
                since.map_or(0, |since| since.as_secs())
            };
            BackupName::new(context, disk, kind, asked.at.unwrap_or_else(now)).map_err(wrong)?
        }
        // The command line demands them.
        (None, ..) => return Err(Failure::Usage("say a context and a disk")),
    };
    let (context, digest) = match &name.context {
        BackupContext::Whole(context) => (context, None),
        BackupContext::Cut { beginning, digest } => (beginning, Some(digest)),
    };
    if as_json {
        let parts = json!({
            "name": name.to_string(), "context": context, "digest": digest,
            "disk": name.disk, "kind": name.kind.name(), "at": name.at,
        });
        return Ok(print_json(&parts)?);
    }
    if asked.parse.is_none() {
        return Ok(print(&format!("{name}\n"))?);
    }
    let cut = digest.map_or_else(String::new, |digest| {
        format!(" (the beginning; digest {digest})")
    });
    Ok(print(&format!(
        "context  {context}{cut}\ndisk     {}\nkind     {}\nat       {}\n",
        name.disk,
        name.kind.name(),
        name.at
    ))?)
}
