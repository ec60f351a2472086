//! `check`: reads the configuration as the daemon would and tells every problem.

use std::path::Path;

use super::Failure;
use crate::config;
use crate::daemon;

/// Checks the configuration at `path`; with `start` only for what keeps a daemon from starting.
pub fn check(path: &Path, start: bool, json: bool) -> Result<(), Failure> {
    let problems = match start {
        true => obstacles(path),
        false => problems(path),
    };
    if json {
        super::show::print_json(&serde_json::json!({
            "config": path.display().to_string(),
            "problems": problems,
        }))?;
    } else {
        for problem in &problems {
            eprintln!("{problem}");
        }
        if problems.is_empty() {
            super::show::print(&format!("{}: good\n", path.display()))?;
        }
    }
    match problems.len() {
        0 => Ok(()),
        count => Err(Failure::Config(count)),
    }
}

/// Reads and parses: one line for each problem.
pub fn problems(path: &Path) -> Vec<String> {
    if config::is_ini(path) {
        let files = config::read_ini(path).files;
        let judged = config::nbd_server::judge(&files, &Default::default());
        let paths = daemon::refused_for_their_paths(&judged);
        let names = daemon::refused_for_their_names(&judged);
        let settings = daemon::refused_in_settings(&judged);
        let all = judged.problems.iter().chain(&names);
        let all = all.chain(&settings).chain(&paths);
        return all.map(ToString::to_string).collect();
    }
    match config::read(path) {
        Ok(files) => match config::parse(&files) {
            Ok(_) => Vec::new(),
            Err(problems) => problems.iter().map(ToString::to_string).collect(),
        },
        Err(error) => vec![error.to_string()],
    }
}

/// As [`problems`], without those of sections of nbd-server's configuration: the others are served.
fn obstacles(path: &Path) -> Vec<String> {
    if !config::is_ini(path) {
        return problems(path);
    }
    let files = config::read_ini(path).files;
    let judged = config::nbd_server::judge(&files, &Default::default());
    if judged.generic.is_none() {
        return judged.problems.iter().map(ToString::to_string).collect();
    }
    let names = daemon::refused_for_their_names(&judged);
    let settings = daemon::refused_in_settings(&judged);
    names
        .iter()
        .chain(&settings)
        .map(ToString::to_string)
        .collect()
}
