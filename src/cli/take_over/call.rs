//! EDGE: programs are called by their names and never through a shell.

use std::process::Command;

use super::TakeOverError;

pub(super) fn step(what: impl Into<String>, why: impl ToString) -> TakeOverError {
    TakeOverError::Step {
        what: what.into(),
        why: why.to_string().trim().to_owned(),
    }
}

/// Whether it ended well, and what it said.
pub(super) fn run(program: &str, args: &[&str]) -> Result<(bool, String), TakeOverError> {
    let what = || format!("{program} {}", args.join(" "));
    let output = Command::new(program)
        .args(args)
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| step(what(), error))?;
    let mut said = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        said.push_str(&String::from_utf8_lossy(&output.stderr));
    }
    Ok((output.status.success(), said))
}

/// Runs what has to succeed.
pub(super) fn must(program: &str, args: &[&str]) -> Result<String, TakeOverError> {
    match run(program, args)? {
        (true, said) => Ok(said),
        (false, said) => Err(step(format!("{program} {}", args.join(" ")), said)),
    }
}
