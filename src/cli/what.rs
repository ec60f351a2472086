//! What an export is of, as it is said on the command line. Decides nothing.

use clap::Args;
use clap_complete::ArgValueCandidates;

use super::complete;

#[derive(Debug, Args)]
#[group(skip)]
pub(super) struct What {
    /// The volume
    #[arg(
        long,
        value_name = "PROFILE:ID",
        required_unless_present = "path",
        conflicts_with = "path"
    )]
    pub(super) volume: Option<String>,
    #[command(flatten)]
    pub(super) file: OfFile,
}

#[derive(Debug, Args)]
#[group(skip)]
pub(super) struct MaybeWhat {
    /// The volume; not needed for a disk that has an export
    #[arg(long, value_name = "PROFILE:ID", conflicts_with = "path", add = ArgValueCandidates::new(complete::volumes))]
    pub(super) volume: Option<String>,
    #[command(flatten)]
    pub(super) file: OfFile,
}

#[derive(Debug, Args)]
#[group(skip)]
pub(super) struct OfFile {
    /// A file, beneath one of the daemon's file_roots
    #[arg(long, value_name = "PATH")]
    pub(super) path: Option<String>,
    /// How the file is read [default: raw; has to be said of a name that ends in .qcow2]
    #[arg(long, value_name = "FORMAT", value_parser = ["raw", "qcow2"], requires = "path", conflicts_with = "volume")]
    pub(super) format: Option<String>,
}
