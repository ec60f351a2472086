//! Samples become rows, rows a table and a file. Decides what "missed" means: the aim's column is over the aim.

use std::path::Path;
use std::time::Duration;

use support::{Doing, Outcome};

/// Which number of a row its aim speaks of.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Aim {
    None,
    P99(f64),
    Worst(f64),
}

/// One line of the table.
#[derive(Debug, Clone)]
pub struct Row {
    what: String,
    unit: &'static str,
    samples: usize,
    median: f64,
    p99: f64,
    worst: f64,
    aim: Aim,
}

impl Row {
    /// A row of these samples, none of which is NaN; there is at least one.
    pub fn of(what: impl Into<String>, unit: &'static str, mut samples: Vec<f64>, aim: Aim) -> Row {
        samples.sort_by(f64::total_cmp);
        let n = samples.len();
        // Nearest rank: of 200 samples the p99 is the 198th.
        let rank = |percent: usize| samples[(n * percent).div_ceil(100).max(1) - 1];
        Row {
            what: what.into(),
            unit,
            samples: n,
            median: rank(50),
            p99: rank(99),
            worst: rank(100),
            aim,
        }
    }

    pub fn median(&self) -> f64 {
        self.median
    }

    fn verdict(&self) -> (String, &'static str) {
        let judge = |seen: f64, aim: f64| if seen <= aim { "held" } else { "MISSED" };
        match self.aim {
            Aim::None => (String::new(), ""),
            Aim::P99(aim) => (format!("p99 <= {aim}"), judge(self.p99, aim)),
            Aim::Worst(aim) => (format!("worst <= {aim}"), judge(self.worst, aim)),
        }
    }
}

pub fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

pub fn print(machine: &str, rows: &[Row], notes: &[String], took: Duration) {
    let width = rows.iter().map(|row| row.what.len()).max().unwrap_or(0);
    println!("{machine}\n");
    println!(
        "{:width$}  {:>6}  {:>9}  {:>9}  {:>9}  {:4}  {:14}",
        "what", "times", "median", "p99", "worst", "unit", "aim"
    );
    for row in rows {
        let (aim, verdict) = row.verdict();
        let line = format!(
            "{:width$}  {:>6}  {:>9.3}  {:>9.3}  {:>9.3}  {:4}  {aim:14}  {verdict}",
            row.what, row.samples, row.median, row.p99, row.worst, row.unit
        );
        println!("{}", line.trim_end());
    }
    println!();
    for note in notes {
        println!("{note}");
    }
    let missed = rows
        .iter()
        .filter(|row| row.verdict().1 == "MISSED")
        .count();
    let aims = rows.iter().filter(|row| row.aim != Aim::None).count();
    println!(
        "{aims} aims, {missed} missed; measured in {:.0} s",
        took.as_secs_f64()
    );
}

pub fn write(path: &Path, machine: &str, rows: &[Row], notes: &[String]) -> Outcome<()> {
    let rows: Vec<_> = rows
        .iter()
        .map(|row| {
            let (aim, verdict) = row.verdict();
            serde_json::json!({
                "what": row.what, "unit": row.unit, "times": row.samples, "median": row.median,
                "p99": row.p99, "worst": row.worst, "aim": aim, "verdict": verdict,
            })
        })
        .collect();
    let all = serde_json::json!({ "machine": machine, "rows": rows, "notes": notes });
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    std::fs::write(path, serde_json::to_vec_pretty(&all)?).doing(path.display())
}
