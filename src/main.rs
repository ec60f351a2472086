//! Parses the command line and calls one command.

#[cfg(feature = "model")]
compile_error!("the feature `model` is for `make model`: a daemon has the system's own threads");

fn main() -> std::process::ExitCode {
    nbdtrack::cli::main()
}
