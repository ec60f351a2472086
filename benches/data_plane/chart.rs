//! The ratios as a picture: a bar for each row, from 1 to the left or the right, on a logarithmic scale.

use std::fmt::Write as _;
use std::path::Path;

use crate::results::Results;
use crate::servers::Kind;
use support::{Doing, Outcome};

const LINE: f64 = 18.0;
const LABEL: f64 = 260.0;
const WIDTH: f64 = 900.0;
/// Ratios at the edges.
const EDGE: f64 = 8.0;

/// Writes `bench.svg` into the folder.
pub fn write(folder: &Path, results: &Results) -> Outcome<()> {
    let path = folder.join("bench.svg");
    std::fs::write(&path, draw(results)?).doing(path.display())
}

/// Where a ratio stands.
fn x(ratio: f64) -> f64 {
    let half = (WIDTH - LABEL - 40.0) / 2.0;
    LABEL + half + half * (ratio.clamp(1.0 / EDGE, EDGE).ln() / EDGE.ln())
}

fn draw(results: &Results) -> Result<String, std::fmt::Error> {
    let height = LINE * (results.rows.len() as f64 + 4.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" font-family=\"sans-serif\" font-size=\"11\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"8\" y=\"16\" font-size=\"13\">nbdtrack to the best peer of each row (median of the rounds; line: least to most; tick: the bound)</text>\n"
    );
    for mark in [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0] {
        let (at, colour) = (x(mark), if mark == 1.0 { "black" } else { "lightgrey" });
        writeln!(
            svg,
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{LINE}\" y2=\"{:.1}\" stroke=\"{colour}\"/>",
            height - LINE
        )?;
        writeln!(
            svg,
            "<text x=\"{at:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{mark}</text>",
            height - 4.0
        )?;
    }
    let mut y = LINE * 2.0;
    for row in &results.rows {
        let (Some(ours), Some(best)) = (row.of(Kind::Nbdtrack), row.best_peer()) else {
            continue;
        };
        let ratio = row.ratio(ours, best);
        let colour = if ratio.median >= 1.0 {
            "seagreen"
        } else {
            "indianred"
        };
        let (from, to) = (x(ratio.median.min(1.0)), x(ratio.median.max(1.0)));
        let middle = y - 4.0;
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{y:.1}\" text-anchor=\"end\">{}</text>",
            LABEL - 8.0,
            row.name
        )?;
        writeln!(
            svg,
            "<rect x=\"{from:.1}\" y=\"{:.1}\" width=\"{:.1}\" height=\"11\" fill=\"{colour}\"/>",
            y - 10.0,
            to - from
        )?;
        writeln!(
            svg,
            "<line x1=\"{:.1}\" x2=\"{:.1}\" y1=\"{middle:.1}\" y2=\"{middle:.1}\" stroke=\"black\"/>",
            x(ratio.least),
            x(ratio.most)
        )?;
        if let Some(pump) = row.of(Kind::Pump) {
            let at = x(row.ratio(pump, best).median);
            writeln!(
                svg,
                "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{:.1}\" y2=\"{y:.1}\" stroke=\"darkorange\" stroke-width=\"2\"/>",
                y - 10.0
            )?;
        }
        writeln!(
            svg,
            "<text x=\"{:.1}\" y=\"{y:.1}\">{:.2}</text>",
            WIDTH - 34.0,
            ratio.median
        )?;
        y += LINE;
    }
    svg.push_str("</svg>\n");
    Ok(svg)
}
