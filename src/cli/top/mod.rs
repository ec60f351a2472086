//! `top`: exports and what they carry, anew each second, on a whole terminal.
//!
//! `model.rs` decides what is shown (PURE), `screen.rs` draws it, this file asks the daemon and reads keys.

mod model;
mod screen;

use std::future::pending;
use std::io::IsTerminal;
use std::time::{Duration, Instant};

use ratatui::crossterm::event::{self, Event, KeyEventKind};
use tokio::sync::mpsc;

use super::{Failure, Top};
use crate::dbus::client::{Client, ClientError};
use model::{After, Model, Sample};

/// Keys that wait to be taken; more are dropped.
const KEYS_MAX: usize = 64;
/// How long the reader of keys waits before it looks whether it is still wanted.
const KEY_POLL: Duration = Duration::from_millis(200);

/// Shows the screen until `q`.
pub async fn top(client: &Client, asked: &Top) -> Result<(), Failure> {
    if !std::io::stdout().is_terminal() || !std::io::stdin().is_terminal() {
        return Err(Failure::Usage(
            "top needs a terminal; 'nbdtrack metrics' and 'nbdtrack exports' print",
        ));
    }
    let mut model = Model::new(colours());
    model.take(sample(client).await.map_err(Failure::Client)?);
    // Restores the terminal also when this program panics.
    let mut terminal = ratatui::try_init()?;
    let ended = run(client, asked.interval, &mut model, &mut terminal).await;
    ratatui::restore();
    ended
}

async fn run(
    client: &Client,
    every: Duration,
    model: &mut Model,
    terminal: &mut ratatui::DefaultTerminal,
) -> Result<(), Failure> {
    let (keys, mut pressed) = mpsc::channel(KEYS_MAX);
    // A thread, for the terminal is read by blocking; it ends when the receiver has gone.
    std::thread::spawn(move || {
        while !keys.is_closed() {
            match event::poll(KEY_POLL).and_then(|there| there.then(event::read).transpose()) {
                Ok(Some(event)) => {
                    let _full = keys.try_send(event);
                }
                Ok(None) => {}
                Err(_) => return,
            }
        }
    });
    let mut ticks = tokio::time::interval(every);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    // What the daemon is asked, until it answers: keys are taken meanwhile.
    let mut asked = None;
    loop {
        terminal.draw(|frame| screen::draw(frame, model))?;
        tokio::select! {
            _ = ticks.tick(), if asked.is_none() => asked = Some(Box::pin(sample(client))),
            answer = answered(&mut asked) => {
                asked = None;
                match answer {
                    Ok(sample) => model.take(sample),
                    Err(error) => model.lost(error.to_string()),
                }
            }
            event = pressed.recv() => match event {
                Some(Event::Key(key)) if key.kind == KeyEventKind::Press => {
                    if model.on_key(key) == After::Quit {
                        return Ok(());
                    }
                }
                Some(_) => {}
                None => return Ok(()),
            },
        }
    }
}

/// The answer to what was asked; for ever when nothing was.
async fn answered<F: Future + Unpin>(asked: &mut Option<F>) -> F::Output {
    match asked {
        Some(asked) => asked.await,
        None => pending().await,
    }
}

async fn sample(client: &Client) -> Result<Sample, ClientError> {
    let (objects, stats) = (client.objects().await?, client.export_stats().await?);
    Ok(Sample {
        at: Instant::now(),
        objects,
        stats,
    })
}

fn colours() -> bool {
    std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}
