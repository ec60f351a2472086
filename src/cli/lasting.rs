//! A call that lasts, on a terminal: what it waits for and for how long, on a line that goes with the call.

use std::future::pending;
use std::time::Instant;

use super::progress::{EVERY, ProgressLine};
use crate::dbus::client::{Client, ClientError};
use crate::dbus::client_jobs::Jobs;

/// Waits for `call`, and shows meanwhile what it waits for.
pub async fn shown<T>(
    client: &Client,
    call: impl Future<Output = Result<T, ClientError>>,
) -> Result<T, ClientError> {
    let mut line = ProgressLine::begin();
    if !line.is_seen() {
        return call.await;
    }
    // Without it the time alone is shown.
    let mut jobs = client.jobs().await.ok();
    let mut left = None;
    let began = Instant::now();
    let mut call = std::pin::pin!(call);
    let mut ticks = tokio::time::interval(EVERY);
    loop {
        tokio::select! {
            biased;
            outcome = &mut call => return outcome,
            clients = clients_left(&mut jobs) => left = Some(clients),
            _ = ticks.tick() => {}
        }
        // A password is asked for on this terminal; a job begins when that is over.
        if left.is_some() || !client.has_asked() {
            line.tell(&format!("{}: {} s", waits(left), began.elapsed().as_secs()));
        }
    }
}

async fn clients_left(jobs: &mut Option<Jobs>) -> u32 {
    if let Some(listening) = jobs {
        match listening.clients_left().await {
            Some(clients) => return clients,
            // What became of the bus, the call itself says.
            None => *jobs = None,
        }
    }
    pending().await
}

/// What a call waits for, in words: by the clients of its job, if it is one.
fn waits(left: Option<u32>) -> String {
    match left {
        None => "waiting for the daemon".to_owned(),
        Some(0) => "waiting for the disk to be flushed and closed".to_owned(),
        Some(1) => "waiting for 1 client to leave".to_owned(),
        Some(clients) => format!("waiting for {clients} clients to leave"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_person_reads_how_many_clients_are_left_and_then_that_the_disk_is() {
        assert_eq!(waits(Some(2)), "waiting for 2 clients to leave");
        assert_eq!(waits(Some(1)), "waiting for 1 client to leave");
        assert!(waits(Some(0)).contains("disk") && waits(None).contains("daemon"));
    }
}
