//! `manual`: writes a manual page for each command, from the very definitions that parse the command line.

use std::path::Path;

use clap::{Arg, ArgAction, Command};

use super::nbd_server;

/// What each page ends with.
const MORE: &str =
    "nbdtrack(1) says more, and lists the exit codes. nbdtrack.toml(5) has the configuration.";

/// The page that is written by hand; the others have its date.
const BY_HAND: &str = include_str!("../../man/nbdtrack.1");

/// Writes `nbdtrack-COMMAND.1` into `folder` for each command that is not hidden, and `nbdtrack-COMMAND-SUBCOMMAND.1` for each of its own.
pub fn write(program: Command, folder: &Path) -> std::io::Result<()> {
    let mut program = program
        // Each of them has one, which says what --help says.
        .disable_help_subcommand(true)
        .mut_subcommand("nbd-server", |stock| {
            stock.args(nbd_server::options().map(option_of_stock))
        });
    program.build();
    of_each(&program, "nbdtrack", folder)
}

fn of_each(above: &Command, prefix: &str, folder: &Path) -> std::io::Result<()> {
    // The day on which something was last said otherwise, not the day of the build: the same definitions make the same page.
    let date = BY_HAND.lines().find_map(|line| line.strip_prefix(".Dd "));
    for command in above.get_subcommands() {
        if command.is_hide_set() {
            continue;
        }
        let name = format!("{prefix}-{}", command.get_name());
        of_each(command, &name, folder)?;
        let page = command
            .clone()
            .display_name(name.clone())
            .bin_name(format!(
                "{} {}",
                prefix.replacen('-', " ", 1),
                command.get_name()
            ))
            // A page that changed only because of a release would be drift.
            .version(None::<&str>)
            .after_help(MORE);
        let page = clap_mangen::Man::new(page)
            .date(date.unwrap_or_default())
            .source("nbdtrack")
            .manual("Commands of nbdtrack");
        let mut text = Vec::new();
        page.render(&mut text)?;
        std::fs::write(folder.join(format!("{name}.1")), text)?;
    }
    Ok(())
}

/// An option of the stock server, which is not parsed as ours are.
fn option_of_stock((letter, value, says): (char, Option<&'static str>, &'static str)) -> Arg {
    let option = Arg::new(says).short(letter).help(says);
    match value {
        Some(name) => option.value_name(name),
        None => option.action(ArgAction::SetTrue),
    }
}
