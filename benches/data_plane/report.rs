//! Results as tables for a person and as JSON for a program.

use std::path::Path;

use crate::results::{Results, Row, Series};
use crate::servers::Kind;
use crate::turn::Sample;
use support::{Doing, Outcome};

/// Three tables: nbdtrack against the best peer and the bound, what it costs, and every server's figure.
pub fn print(results: &Results) {
    println!("{}\n", results.machine);
    against_the_best(results);
    costs(results);
    everyone(results);
    for note in &results.notes {
        println!("{note}");
    }
    println!("{} rows in {:.0} s", results.rows.len(), results.seconds);
}

fn name_width(results: &Results) -> usize {
    let names = results.rows.iter().map(|row| row.name.len());
    names.max().unwrap_or(0).max(4)
}

fn against_the_best(results: &Results) {
    let width = name_width(results);
    println!(
        "{:width$} {:>8} {:8}  {:>6} {:13} {:21} {:>6}  {:>15}  {:>15}  {:>4}",
        "row",
        "nbdtrack",
        "unit",
        "ratio",
        "least..most",
        "to the best peer",
        "pump",
        "p50/p99 us",
        "best peer's",
        "load"
    );
    for row in &results.rows {
        let Some(ours) = row.of(Kind::Nbdtrack) else {
            continue;
        };
        let mut line = format!(
            "{:width$} {:>8} {:8}",
            row.name,
            figure(ours.figure()),
            row.unit.name()
        );
        match row.best_peer() {
            Some(best) => {
                let ratio = row.ratio(ours, best);
                let spread = format!("{:.2}..{:.2}", ratio.least, ratio.most);
                line += &format!(
                    "  {:>6.2} {spread:13} {:21}",
                    ratio.median,
                    best.kind.name()
                );
            }
            None => line += &format!("  {:>6} {:13} {:21}", "", "", ""),
        }
        let pump = row.of(Kind::Pump).map(|pump| row.ratio(ours, pump).median);
        line += &format!(
            " {:>6}",
            pump.map_or(String::new(), |ratio| format!("{ratio:.2}"))
        );
        line += &format!(
            "  {:>15}  {:>15}",
            latencies(Some(ours)),
            latencies(row.best_peer())
        );
        let load = row
            .series
            .iter()
            .filter_map(|s| s.median_of(|sample| sample.own_share))
            .max_by(f64::total_cmp);
        line += &format!(
            "  {:>4}",
            load.map_or(String::new(), |share| format!("{share:.2}"))
        );
        println!("{}", line.trim_end());
    }
    println!(
        "\nratio: median of the rounds, above 1 nbdtrack is better; pump: the same to the bound; \
         load: the generator's largest share of a processor in the row\n"
    );
}

fn costs(results: &Results) {
    let width = name_width(results);
    println!(
        "{:width$} {:>10} {:>10}  {:>10} {:>10}  {:>9} {:>9}",
        "processor and memory",
        "us/op",
        "least peer",
        "s/GiB",
        "least peer",
        "peak MiB",
        "best peer"
    );
    for row in &results.rows {
        let Some(ours) = row.of(Kind::Nbdtrack) else {
            continue;
        };
        let mut line = format!("{:width$}", row.name);
        let fields: [fn(&Sample) -> Option<f64>; 2] =
            [|sample| sample.cpu_us_per_op, |sample| sample.cpu_s_per_gib];
        for field in fields {
            let shown = |value: Option<f64>| value.map_or(String::new(), figure);
            line += &format!(
                " {:>10} {:>10} ",
                shown(ours.median_of(field)),
                shown(row.cheapest_peer(field))
            );
        }
        let peak = row
            .best_peer()
            .map_or(String::new(), |best| figure(best.peak_mib()));
        line += &format!(" {:>9} {peak:>9}", figure(ours.peak_mib()));
        println!("{}", line.trim_end());
    }
    println!();
}

fn everyone(results: &Results) {
    let width = name_width(results);
    let mut head = format!("{:width$} {:8}", "every server", "unit");
    for kind in Kind::ALL {
        head += &format!(" {:>20}", kind.name());
    }
    println!("{head}");
    for row in &results.rows {
        let mut line = format!("{:width$} {:8}", row.name, row.unit.name());
        for kind in Kind::ALL {
            let shown = row
                .of(kind)
                .map_or(String::new(), |series| figure(series.figure()));
            line += &format!(" {shown:>20}");
        }
        println!("{}", line.trim_end());
    }
    println!();
}

/// Three digits that count.
fn figure(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

fn latencies(series: Option<&Series>) -> String {
    let of = |field: fn(&Sample) -> Option<f64>| series.and_then(|series| series.median_of(field));
    match (of(|sample| sample.p50_us), of(|sample| sample.p99_us)) {
        (Some(p50), Some(p99)) => format!("{}/{}", figure(p50), figure(p99)),
        _ => String::new(),
    }
}

/// Writes `bench.json` into the folder.
pub fn write(folder: &Path, results: &Results) -> Outcome<()> {
    let rows: Vec<_> = results.rows.iter().map(row_json).collect();
    let all = serde_json::json!({
        "machine": results.machine, "seconds": results.seconds, "notes": results.notes, "rows": rows,
    });
    std::fs::create_dir_all(folder)?;
    let path = folder.join("bench.json");
    std::fs::write(&path, serde_json::to_vec_pretty(&all)?).doing(path.display())
}

fn row_json(row: &Row) -> serde_json::Value {
    let best = row.best_peer();
    let servers: Vec<_> = row
        .series
        .iter()
        .map(|series| {
            let figures: Vec<f64> = series.samples.iter().map(|sample| sample.figure).collect();
            let ratio = best.map(|best| row.ratio(series, best));
            serde_json::json!({
                "server": series.kind.name(),
                "figures": figures,
                "median": series.figure(),
                "ratio_to_best_peer": ratio.map(|ratio| [ratio.least, ratio.median, ratio.most]),
                "cpu_us_per_op": series.median_of(|sample| sample.cpu_us_per_op),
                "cpu_s_per_gib": series.median_of(|sample| sample.cpu_s_per_gib),
                "p50_us": series.median_of(|sample| sample.p50_us),
                "p99_us": series.median_of(|sample| sample.p99_us),
                "generator_share": series.median_of(|sample| sample.own_share),
                "peak_mib": series.peak_mib(),
            })
        })
        .collect();
    serde_json::json!({
        "row": row.name, "unit": row.unit.name(), "less_is_better": row.unit.less_is_better(),
        "best_peer": best.map(|best| best.kind.name()), "servers": servers,
    })
}
