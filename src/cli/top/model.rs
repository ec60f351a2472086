//! What `top` shows: rates from two samples, sorted, filtered, one export looked into. PURE: samples and keys in, rows out.

use std::time::Instant;

use ratatui::crossterm::event::{KeyCode, KeyEvent, KeyModifiers};

use super::super::show::plain;
use crate::dbus::ExportStats;
use crate::dbus::client::Objects;

/// What the daemon said at one time.
pub struct Sample {
    pub at: Instant,
    pub objects: Objects,
    pub stats: ExportStats,
}

/// One export on the screen.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Row {
    pub name: String,
    pub state: String,
    pub reason: String,
    pub volume: String,
    pub node: String,
    pub generation: u64,
    pub size: u64,
    pub clients: u64,
    /// Bytes a second.
    pub read: f64,
    pub written: f64,
    /// Requests a second.
    pub iops: f64,
    /// Mean of the last interval, in microseconds; `None` when nothing was timed.
    pub latency_us: Option<f64>,
    /// Since the daemon started.
    pub failed: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sort {
    Name,
    State,
    Clients,
    Read,
    Written,
    Iops,
    Latency,
}

impl Sort {
    const ALL: [Sort; 7] = [
        Sort::Name,
        Sort::State,
        Sort::Clients,
        Sort::Read,
        Sort::Written,
        Sort::Iops,
        Sort::Latency,
    ];

    pub fn title(self) -> &'static str {
        match self {
            Sort::Name => "NAME",
            Sort::State => "STATE",
            Sort::Clients => "CLIENTS",
            Sort::Read => "READ/s",
            Sort::Written => "WRITE/s",
            Sort::Iops => "IOPS",
            Sort::Latency => "LATENCY",
        }
    }
}

#[derive(Debug, PartialEq, Eq)]
pub enum After {
    Stay,
    Quit,
}

pub struct Model {
    pub colour: bool,
    pub sort: Sort,
    pub descending: bool,
    /// Only exports whose name, state or volume has this in it.
    pub filter: String,
    /// The filter is being typed.
    pub typing: bool,
    pub selected: usize,
    /// One export is looked into.
    pub detail: bool,
    /// Why the newest sample is missing.
    pub trouble: String,
    pub volumes: usize,
    all: Vec<Row>,
    last: Option<(Instant, ExportStats)>,
}

impl Model {
    pub fn new(colour: bool) -> Model {
        Model {
            colour,
            sort: Sort::Name,
            descending: false,
            filter: String::new(),
            typing: false,
            selected: 0,
            detail: false,
            trouble: String::new(),
            volumes: 0,
            all: Vec::new(),
            last: None,
        }
    }

    pub fn lost(&mut self, reason: String) {
        self.trouble = reason;
    }

    /// Takes a sample; rates are those since the one before.
    pub fn take(&mut self, sample: Sample) {
        let kept = self.rows().get(self.selected).map(|row| row.name.clone());
        self.trouble.clear();
        self.volumes = sample.objects.volumes.len();
        let seconds = self
            .last
            .as_ref()
            .map(|(at, _)| sample.at.duration_since(*at).as_secs_f64())
            .filter(|seconds| *seconds > 0.0);
        let before = self.last.as_ref().map(|(_, stats)| stats);
        self.all = sample
            .objects
            .exports
            .values()
            .map(|export| {
                let text = |key: &str| {
                    export
                        .get(key)
                        .map(|value| plain(value))
                        .unwrap_or_default()
                };
                let number = |key: &str| text(key).parse().unwrap_or(0);
                let name = text("Name");
                let now = |key: &str| count(&sample.stats, &name, key);
                // A daemon that started anew counts from 0.
                let grown = |key: &str| {
                    let before = before.map_or(0, |stats| count(stats, &name, key));
                    now(key).checked_sub(before).unwrap_or_else(|| now(key))
                };
                #[allow(clippy::cast_precision_loss, reason = "for a screen")]
                let rate = |keys: &[&str]| {
                    let sum: u64 = keys.iter().map(|key| grown(key)).sum();
                    seconds.map_or(0.0, |seconds| sum as f64 / seconds)
                };
                let timed = grown("timed");
                #[allow(clippy::cast_precision_loss, reason = "for a screen")]
                let latency_us = (seconds.is_some() && timed > 0)
                    .then(|| grown("microseconds") as f64 / timed as f64);
                Row {
                    state: text("State"),
                    reason: text("Reason"),
                    volume: text("VolumeId"),
                    node: text("DeviceNode"),
                    generation: number("Generation"),
                    size: number("Size"),
                    clients: number("Clients"),
                    read: rate(&["bytes_read"]),
                    written: rate(&["bytes_written"]),
                    iops: rate(&["reads", "writes", "others"]),
                    latency_us,
                    failed: now("failed"),
                    name,
                }
            })
            .collect();
        self.last = Some((sample.at, sample.stats));
        // The one that is looked at stays so, wherever it sorts now.
        if let Some(kept) = kept {
            self.selected = self
                .rows()
                .iter()
                .position(|row| row.name == kept)
                .unwrap_or(self.selected);
        }
        self.clamp();
    }

    /// What is shown, in its order.
    pub fn rows(&self) -> Vec<&Row> {
        let filter = self.filter.to_lowercase();
        let has = |text: &String| text.to_lowercase().contains(&filter);
        let mut rows: Vec<&Row> = self
            .all
            .iter()
            .filter(|row| {
                filter.is_empty() || has(&row.name) || has(&row.state) || has(&row.volume)
            })
            .collect();
        rows.sort_by(|a, b| {
            let order = match self.sort {
                Sort::Name => a.name.cmp(&b.name),
                Sort::State => a.state.cmp(&b.state),
                Sort::Clients => a.clients.cmp(&b.clients),
                Sort::Read => a.read.total_cmp(&b.read),
                Sort::Written => a.written.total_cmp(&b.written),
                Sort::Iops => a.iops.total_cmp(&b.iops),
                Sort::Latency => a
                    .latency_us
                    .unwrap_or(-1.0)
                    .total_cmp(&b.latency_us.unwrap_or(-1.0)),
            };
            let order = if self.descending {
                order.reverse()
            } else {
                order
            };
            order.then_with(|| a.name.cmp(&b.name))
        });
        rows
    }

    pub fn total(&self) -> usize {
        self.all.len()
    }

    pub fn on_key(&mut self, key: KeyEvent) -> After {
        if key.modifiers.contains(KeyModifiers::CONTROL) && key.code == KeyCode::Char('c') {
            return After::Quit;
        }
        if self.typing {
            match key.code {
                KeyCode::Enter => self.typing = false,
                KeyCode::Esc => {
                    self.typing = false;
                    self.filter.clear();
                }
                KeyCode::Backspace => {
                    self.filter.pop();
                }
                KeyCode::Char(c) if self.filter.len() < FILTER_BYTES_MAX => self.filter.push(c),
                _ => {}
            }
            self.clamp();
            return After::Stay;
        }
        match key.code {
            KeyCode::Char('q') => return After::Quit,
            KeyCode::Esc if self.detail => self.detail = false,
            KeyCode::Esc => self.filter.clear(),
            KeyCode::Char('/') => self.typing = true,
            KeyCode::Char('s') => self.sort_by_next(),
            KeyCode::Char('r') => self.descending = !self.descending,
            KeyCode::Enter => self.detail = !self.detail && !self.rows().is_empty(),
            KeyCode::Down | KeyCode::Char('j') => self.selected += 1,
            KeyCode::Up | KeyCode::Char('k') => self.selected = self.selected.saturating_sub(1),
            KeyCode::PageDown => self.selected += PAGE,
            KeyCode::PageUp => self.selected = self.selected.saturating_sub(PAGE),
            KeyCode::Home => self.selected = 0,
            KeyCode::End => self.selected = usize::MAX,
            _ => {}
        }
        self.clamp();
        After::Stay
    }

    fn sort_by_next(&mut self) {
        let at = Sort::ALL.iter().position(|sort| *sort == self.sort);
        let next = at.map_or(0, |at| (at + 1) % Sort::ALL.len());
        self.sort = Sort::ALL.get(next).copied().unwrap_or(Sort::Name);
        // Of numbers the largest are looked for.
        self.descending = !matches!(self.sort, Sort::Name | Sort::State);
    }

    fn clamp(&mut self) {
        self.selected = self.selected.min(self.rows().len().saturating_sub(1));
    }
}

const FILTER_BYTES_MAX: usize = 64;
const PAGE: usize = 10;

fn count(stats: &ExportStats, name: &str, key: &str) -> u64 {
    stats
        .get(name)
        .and_then(|counters| counters.get(key))
        .copied()
        .unwrap_or(0)
}
