//! The commands that talk to a running daemon.

use serde_json::json;
use zbus::Variant;

use super::lasting::shown;
use super::show::{self, print, print_json};
use super::{
    Add, Command, Ensure, Explain, Failure, PrepareDetach, backups, doctor, explain, history,
    image, import, mappings, metrics, pins, top, watch,
};
use crate::dbus::Bus;
use crate::dbus::client::{AddedExport, Client, ClientError, Options};

/// Connects, and runs one command. Without `may_ask`, no one is asked for a password.
pub async fn run(bus: &Bus, command: Command, as_json: bool, may_ask: bool) -> Result<(), Failure> {
    let failed = |error| failure(bus, error);
    if let Command::Doctor { config } = &command {
        return doctor::doctor(bus, config.as_deref(), as_json).await;
    }
    let client = Client::connect(bus).await.map_err(failed)?;
    // A screen that is drawn anew each second is no place for a question.
    let client = match command {
        Command::Top(_) => client,
        _ if may_ask => client.asking(),
        _ => client,
    };
    match command {
        Command::Status => {
            let objects = client.objects().await.map_err(failed)?;
            let stats = client.stats().await.map_err(failed)?;
            show::status(&bus.to_string(), &objects, &stats, as_json)?;
        }
        Command::Volumes => {
            show::volumes(&client.objects().await.map_err(failed)?, as_json)?;
        }
        Command::Exports => {
            show::exports(&client.objects().await.map_err(failed)?, as_json)?;
        }
        Command::Add(add) => self::add(&client, add, as_json).await.map_err(failed)??,
        Command::Ensure(asked) => ensure(&client, asked, as_json).await.map_err(failed)??,
        Command::Remove(remove) => {
            let mode = match (remove.safe, remove.hide, remove.hard) {
                (true, ..) => "safe",
                (_, true, _) => "hide",
                (.., true) => "hard",
                _ => "soft",
            };
            let removed = client.remove(&remove.name, mode, remove.timeout);
            shown(&client, removed).await.map_err(failed)?;
            let what = if remove.hide {
                "hidden until its clients have left, then removed"
            } else {
                "removed"
            };
            done(as_json, what, &remove.name)?;
        }
        Command::PrepareDetach(prepare) => {
            let PrepareDetach {
                volume,
                hard,
                timeout,
            } = &prepare;
            let prepared = client.prepare_detach(volume, *hard, *timeout);
            shown(&client, prepared).await.map_err(failed)?;
            done(as_json, "safe to detach", &prepare.volume)?;
        }
        Command::CancelDetach { volume } => {
            client.cancel_detach(&volume).await.map_err(failed)?;
            done(as_json, "served again", &volume)?;
        }
        Command::Resolve { name, diskseq } => {
            client.resolve(&name, diskseq).await.map_err(failed)?;
            done(as_json, "resolved", &name)?;
        }
        Command::Pins(asked) => pins::pins(&client, &asked, as_json)
            .await
            .map_err(failed)??,
        Command::Import(asked) => import::import(&client, &asked, as_json).await?,
        Command::Mappings(asked) => mappings::mappings(&client, &asked, as_json)
            .await
            .map_err(failed)??,
        Command::Repin { name, diskseq } => {
            client.pin(&name, diskseq, true).await.map_err(failed)?;
            done(as_json, "pinned anew", &name)?;
        }
        Command::Unpin { name } => {
            client.unpin(&name).await.map_err(failed)?;
            done(as_json, "judged anew", &name)?;
        }
        Command::Image(asked) => image::export(&client, &asked, as_json)
            .await
            .map_err(|asking| asking.failure(failed))?,
        Command::Backup(asked) => backups::backup(&client, &asked, as_json)
            .await
            .map_err(|asking| asking.failure(failed))?,
        Command::Backups => backups::list(&client.backups().await.map_err(failed)?, as_json)?,
        Command::Rescan => {
            shown(&client, client.rescan()).await.map_err(failed)?;
            done(as_json, "rescanned", "")?;
        }
        Command::Reload(_) => {
            let difference = shown(&client, client.reload()).await.map_err(failed)?;
            show::reload(&difference, as_json)?;
        }
        Command::Sessions { export } => {
            let sessions = client.sessions(export.as_deref()).await.map_err(failed)?;
            show::sessions(&sessions, as_json)?;
        }
        Command::EndSession { id } => {
            client.end_session(id).await.map_err(failed)?;
            done(as_json, "ended", &format!("session {id}"))?;
        }
        Command::Explain(Explain { export, disk }) => {
            let explanation = match (&export, &disk) {
                (_, Some(disk)) => client.explain_disk(disk).await,
                (export, None) => {
                    client
                        .explain_export(export.as_deref().unwrap_or_default())
                        .await
                }
            };
            explain::explain(&explanation.map_err(failed)?, as_json)?;
        }
        Command::History(asked) => history::history(&client, &asked, as_json).await?,
        Command::Watch(asked) => watch::watch(&client, &asked, as_json).await?,
        Command::Top(asked) => top::top(&client, &asked).await?,
        Command::Metrics(asked) => metrics::metrics(bus, client, &asked).await?,
        // Carried out without a daemon, before this.
        Command::Doctor { .. }
        | Command::NbdServer { .. }
        | Command::BackupName(_)
        | Command::Manual { .. }
        | Command::Serve(_)
        | Command::Check { .. }
        | Command::TakeOver(_)
        | Command::GiveBack(_)
        | Command::UdevClaim { .. } => {}
    }
    Ok(())
}

async fn add(client: &Client, add: Add, as_json: bool) -> Result<std::io::Result<()>, ClientError> {
    let texts = [
        ("volume", &add.what.volume),
        ("path", &add.what.file.path),
        ("format", &add.what.file.format),
    ];
    let flags = [
        ("read_only", add.read_only),
        ("share", add.share),
        ("direct", add.direct),
    ];
    let options = said(&texts, &flags);
    let added = client.add(&add.name, options, add.wait);
    Ok(serving(as_json, &shown(client, added).await?))
}

async fn ensure(
    client: &Client,
    asked: Ensure,
    as_json: bool,
) -> Result<std::io::Result<()>, ClientError> {
    let texts = [
        ("volume", &asked.what.volume),
        ("path", &asked.what.file.path),
        ("format", &asked.what.file.format),
        ("job", &asked.job),
    ];
    let flags = [
        ("read_only", asked.read_only),
        ("share", asked.share),
        ("move", asked.moves),
    ];
    let mut options = said(&texts, &flags);
    if let Some(diskseq) = asked.diskseq {
        options.insert("diskseq", Variant::new(diskseq));
    }
    let Ensure {
        vm_id,
        disk,
        vm_name,
        wait,
        ..
    } = &asked;
    let ensured = client.ensure(vm_id, *disk, vm_name, options, *wait);
    Ok(serving(as_json, &shown(client, ensured).await?))
}

/// Only what was said, so that an older daemon is not asked for what it does not know.
fn said<'a>(
    texts: &[(&'static str, &'a Option<String>)],
    flags: &[(&'static str, bool)],
) -> Options<'a> {
    let texts = texts
        .iter()
        .filter_map(|(key, text)| Some((*key, Variant::new(text.as_deref()?))));
    let flags = flags
        .iter()
        .filter(|(_, set)| *set)
        .map(|(key, _)| (*key, Variant::new(true)));
    texts.chain(flags).collect()
}

fn serving(as_json: bool, added: &AddedExport) -> std::io::Result<()> {
    let AddedExport {
        object,
        name,
        created,
    } = added;
    if as_json {
        return print_json(&json!({ "name": name, "object": object, "created": created }));
    }
    let what = if *created {
        "serving"
    } else {
        "was there already, serving"
    };
    done(false, what, name)
}

pub fn done(as_json: bool, what: &str, whose: &str) -> std::io::Result<()> {
    if as_json {
        return print_json(&json!({ "done": what, "of": whose }));
    }
    if whose.is_empty() {
        return print(&format!("{what}\n"));
    }
    print(&format!("{}: {what}\n", super::table::printable(whose)))
}

fn failure(bus: &Bus, error: ClientError) -> Failure {
    match error {
        ClientError::NoDaemon(reason) => Failure::NoDaemon {
            bus: bus.clone(),
            reason,
        },
        error => Failure::Client(error),
    }
}
