//! `watch`: what happens, one line each.

use serde_json::{Map, Value, json};

use super::Failure;
use super::show::{plain, print, to_json};
use super::table::printable;
use crate::dbus::client::{Client, ClientError, Told};

/// Prints signals until interrupted or until the daemon goes away.
pub async fn watch(client: &Client, as_json: bool) -> Result<(), Failure> {
    let mut watch = client.watch().await.map_err(Failure::Client)?;
    loop {
        let told = tokio::select! {
            told = watch.next() => told,
            _ = tokio::signal::ctrl_c() => return Ok(()),
        };
        match told {
            Some(told) => print(&line(&told, as_json))?,
            None => {
                let reason = "the daemon went away".to_owned();
                return Err(Failure::Client(ClientError::NoDaemon(reason)));
            }
        }
    }
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
