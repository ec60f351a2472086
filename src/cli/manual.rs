//! `manual`: writes a manual page for each command, from the very definitions that parse the command line.

use std::path::Path;

use clap::Command;

/// Writes `nbdtrack-COMMAND.1` for each command that is not hidden into `folder`.
pub fn write(mut program: Command, folder: &Path) -> std::io::Result<()> {
    program.build();
    for command in program.get_subcommands() {
        if command.is_hide_set() || command.get_name() == "help" {
            continue;
        }
        let name = format!("nbdtrack-{}", command.get_name());
        let page = command
            .clone()
            .display_name(name.clone())
            .bin_name(name.replacen('-', " ", 1))
            // A page that changed only because of a release would be drift.
            .version(None::<&str>)
            .after_help("nbdtrack(1) says more, and lists the exit codes. nbdtrack.toml(5) has the configuration.");
        // Neither the day nor the version is in it, so that the same definitions make the same page.
        let page = clap_mangen::Man::new(page).date("").source("").manual("");
        let mut text = Vec::new();
        page.render(&mut text)?;
        std::fs::write(folder.join(format!("{name}.1")), text)?;
    }
    Ok(())
}
