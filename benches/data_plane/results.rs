//! Samples become rows: medians, ratios within rounds, and who is the best peer.

use crate::servers::Kind;
use crate::turn::Sample;
use crate::workloads::{Unit, Workload};
use support::Trouble;

#[derive(Debug, Default)]
pub struct Results {
    pub machine: String,
    pub seconds: f64,
    pub notes: Vec<String>,
    pub rows: Vec<Row>,
}

#[derive(Debug)]
pub struct Row {
    pub name: String,
    pub unit: Unit,
    pub series: Vec<Series>,
}

/// One server at one workload: a sample for each round.
#[derive(Debug)]
pub struct Series {
    pub kind: Kind,
    pub samples: Vec<Sample>,
}

/// The ratio of two servers in each round; above 1 the first is better.
#[derive(Debug, Clone, Copy)]
pub struct Ratio {
    pub median: f64,
    pub least: f64,
    pub most: f64,
}

impl Results {
    pub fn add(&mut self, workload: &Workload, series: Vec<Series>) {
        self.rows.push(Row {
            name: workload.name.clone(),
            unit: workload.unit(),
            series,
        });
    }

    /// A server is out of a row: said, not hidden.
    pub fn failed(&mut self, workload: &Workload, kind: Kind, why: &Trouble) {
        let (row, server) = (&workload.name, kind.name());
        self.notes.push(format!("FAILED: {row}, {server}: {why}"));
    }
}

impl Series {
    pub fn new(kind: Kind) -> Series {
        Series {
            kind,
            samples: Vec::new(),
        }
    }

    pub fn figure(&self) -> f64 {
        median(self.samples.iter().map(|sample| sample.figure))
    }

    pub fn median_of(&self, field: impl Fn(&Sample) -> Option<f64>) -> Option<f64> {
        let values: Vec<f64> = self.samples.iter().filter_map(field).collect();
        (!values.is_empty()).then(|| median(values.into_iter()))
    }

    pub fn peak_mib(&self) -> f64 {
        let peak = self.samples.iter().map(|sample| sample.peak_kib).max();
        peak.unwrap_or(0) as f64 / 1024.0
    }
}

impl Row {
    pub fn of(&self, kind: Kind) -> Option<&Series> {
        self.series.iter().find(|series| series.kind == kind)
    }

    pub fn peers(&self) -> impl Iterator<Item = &Series> {
        self.series.iter().filter(|series| series.kind.is_peer())
    }

    pub fn best_peer(&self) -> Option<&Series> {
        let better = |a: &&Series, b: &&Series| {
            let order = a.figure().total_cmp(&b.figure());
            if self.unit.less_is_better() {
                order.reverse()
            } else {
                order
            }
        };
        self.peers().max_by(better)
    }

    /// The least of a cost among the peers.
    pub fn cheapest_peer(&self, cost: impl Fn(&Sample) -> Option<f64> + Copy) -> Option<f64> {
        self.peers()
            .filter_map(|series| series.median_of(cost))
            .min_by(f64::total_cmp)
    }

    pub fn ratio(&self, ours: &Series, theirs: &Series) -> Ratio {
        let rounds = ours.samples.iter().zip(&theirs.samples);
        let mut ratios: Vec<f64> = rounds
            .map(|(ours, theirs)| {
                if self.unit.less_is_better() {
                    theirs.figure / ours.figure
                } else {
                    ours.figure / theirs.figure
                }
            })
            .collect();
        ratios.sort_by(f64::total_cmp);
        Ratio {
            median: median(ratios.iter().copied()),
            least: ratios.first().copied().unwrap_or(f64::NAN),
            most: ratios.last().copied().unwrap_or(f64::NAN),
        }
    }
}

/// NaN of nothing.
fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    match values.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => values[n / 2],
        n => f64::midpoint(values[n / 2 - 1], values[n / 2]),
    }
}
