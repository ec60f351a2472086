//! `watch`: what happens, one line each.

use clap::Args;
use clap_complete::ArgValueCandidates;
use serde_json::{Map, Value, json};

use super::show::{plain, print, to_json};
use super::table::printable;
use super::{Failure, complete};
use crate::dbus::client::{Client, ClientError, Told};

#[derive(Debug, Args)]
pub struct Watch {
    /// Only what is told of this export
    #[arg(long, value_name = "NAME", add = ArgValueCandidates::new(complete::exports))]
    export: Option<String>,
    /// Only what is told of this disk, SCHEME:VALUE as `nbdtrack volumes` has it
    #[arg(long, value_name = "ID")]
    volume: Option<String>,
    /// Only changes to this state
    #[arg(long, value_name = "STATE")]
    state: Option<String>,
    /// Only this signal; may be repeated
    #[arg(long, value_name = "SIGNAL")]
    signal: Vec<String>,
}

/// Prints signals until interrupted or until the daemon goes away.
pub async fn watch(client: &Client, asked: &Watch, as_json: bool) -> Result<(), Failure> {
    let mut watch = client.watch().await.map_err(Failure::Client)?;
    loop {
        let told = tokio::select! {
            told = watch.next() => told,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        match told {
            Some(told) if wanted(&told, asked) => print(&line(&told, as_json))?,
            Some(_) => {}
            None => {
                let reason = "the daemon went away".to_owned();
                return Err(Failure::Client(ClientError::NoDaemon(reason)));
            }
        }
    }
}

/// Whether each filter that was given lets it through.
fn wanted(told: &Told, asked: &Watch) -> bool {
    let is = |names: &[&str], text: &str| {
        told.arguments
            .iter()
            .any(|(name, value)| names.contains(name) && plain(value) == text)
    };
    let signal = |name: &String| told.signal.eq_ignore_ascii_case(name);
    (asked.signal.is_empty() || asked.signal.iter().any(signal))
        && asked.export.as_ref().is_none_or(|name| is(&["name"], name))
        && asked.volume.as_ref().is_none_or(|id| is(&["id"], id))
        && asked.state.as_ref().is_none_or(|state| is(&["new"], state))
}

fn line(told: &Told, as_json: bool) -> String {
    if as_json {
        let mut object = Map::new();
        object.insert("signal".to_owned(), json!(told.signal));
        for (name, value) in &told.arguments {
            object.insert((*name).to_owned(), to_json(value));
        }
        return format!("{}\n", Value::Object(object));
    }
    let mut line = told.signal.to_owned();
    for (name, value) in &told.arguments {
        if *name != "object" {
            line.push_str(&format!(" {name}={}", printable(&plain(value))));
        }
    }
    line.push('\n');
    line
}

#[cfg(test)]
mod tests {
    use super::*;
    use zbus::{OwnedVariant, Variant};

    fn told() -> Told {
        let text = |text: &'static str| OwnedVariant::try_from(Variant::new(text)).unwrap();
        Told {
            signal: "ExportStateChanged",
            arguments: vec![
                ("name", text("vm")),
                ("old", text("Absent")),
                ("new", text("Serving")),
            ],
        }
    }

    #[test]
    fn every_filter_has_to_let_a_line_through() {
        let asked = |export: Option<&str>, state: Option<&str>, signal: &[&str]| Watch {
            export: export.map(str::to_owned),
            volume: None,
            state: state.map(str::to_owned),
            signal: signal.iter().map(|name| (*name).to_owned()).collect(),
        };
        assert!(wanted(&told(), &asked(None, None, &[])));
        assert!(wanted(
            &told(),
            &asked(Some("vm"), Some("Serving"), &["exportstatechanged"])
        ));
        assert!(!wanted(&told(), &asked(Some("other"), None, &[])));
        assert!(!wanted(&told(), &asked(Some("vm"), Some("Absent"), &[])));
        assert!(!wanted(&told(), &asked(None, None, &["VolumeAttached"])));
    }
}
