//! How a command ends without having done what it was asked: its words, its exit code, and what to do next.

use super::take_over::{self, TakeOverError};
use crate::correlation::RequestError;
use crate::daemon;
use crate::dbus::client::ClientError;
use crate::dbus::{Bus, BusError};

/// Why a command ended without doing what it was asked.
#[derive(Debug, thiserror::Error)]
pub enum Failure {
    #[error("no daemon on {}: {reason}; start it with {}", place(bus), starts())]
    NoDaemon { bus: Bus, reason: String },
    #[error("{0}")]
    Client(ClientError),
    #[error("{0}")]
    Bus(#[from] BusError),
    #[error("{0}")]
    Daemon(#[from] daemon::Error),
    #[error("{0}")]
    Usage(&'static str),
    /// What an argument says cannot be understood.
    #[error("{0}")]
    Argument(String),
    /// Everything was printed already.
    #[error("the configuration has {}", if *.0 == 1 { "a problem".to_owned() } else { format!("{} problems", .0) })]
    Config(usize),
    /// Everything was printed already.
    #[error("{} of what was looked at {} the daemon from serving as it should", .0, if *.0 == 1 { "keeps" } else { "keep" })]
    Unwell(usize),
    #[error("{0}; nothing is claimed")]
    Claim(String),
    #[error("{0}")]
    TakeOver(#[from] TakeOverError),
    /// An image cannot be made or read.
    #[error("{0}")]
    Image(String),
    /// Everything was printed already.
    #[error("the image has {0} errors; a copy of it can be repaired with: qemu-img check -r all")]
    Errors(u64),
    /// Everything was printed already.
    #[error(
        "{0} clusters are leaked: room, and no harm; they are given back with: qemu-img check -r leaks"
    )]
    Leaks(u64),
    #[error("standard output: {0}")]
    Output(#[from] std::io::Error),
}

impl Failure {
    /// The exit code; the list stands in `--help` and in the man page.
    pub fn code(&self) -> u8 {
        match self {
            Failure::Usage(_) | Failure::Argument(_) | Failure::Bus(BusError::Address { .. }) => 2,
            Failure::NoDaemon { .. } => 3,
            Failure::Errors(_) => 6,
            Failure::Leaks(_) => 7,
            Failure::Daemon(daemon::Error::Listen(daemon::ListenError::Answered(_))) => 8,
            Failure::Client(error) => match error {
                ClientError::NoDaemon(_) => 3,
                ClientError::TimedOut(_)
                | ClientError::Refused(RequestError::TimedOut(_) | RequestError::NotReady(_)) => 4,
                ClientError::Denied(_) | ClientError::PasswordWanted(_) => 5,
                ClientError::Refused(_) | ClientError::Bus(_) => 1,
            },
            Failure::Bus(_)
            | Failure::Daemon(_)
            | Failure::Config(_)
            | Failure::Unwell(_)
            | Failure::Claim(_)
            | Failure::TakeOver(_)
            | Failure::Image(_)
            | Failure::Output(_) => 1,
        }
    }

    /// The error's name for machines: D-Bus's where there is one.
    pub fn name(&self) -> &'static str {
        match self {
            Failure::Client(error) => error.name(),
            Failure::NoDaemon { .. } => "NoDaemon",
            Failure::Usage(_) | Failure::Argument(_) | Failure::Bus(BusError::Address { .. }) => {
                "InvalidArgument"
            }
            Failure::Config(_) => "InvalidConfig",
            Failure::Bus(_)
            | Failure::Daemon(_)
            | Failure::Claim(_)
            | Failure::TakeOver(_)
            | Failure::Image(_)
            | Failure::Errors(_)
            | Failure::Leaks(_)
            | Failure::Unwell(_)
            | Failure::Output(_) => "Failed",
        }
    }

    /// What happened, and what to do next where that is known.
    pub fn text(&self) -> String {
        let next = match self {
            Failure::Client(ClientError::Denied(_)) => {
                "; changing needs root, reading root or the group nbdtrack"
            }
            Failure::Client(ClientError::PasswordWanted(_)) => {
                "; on a terminal, without --no-ask-password and with pkttyagent installed, this command asks for it"
            }
            Failure::Client(ClientError::Refused(error)) => match error {
                RequestError::NotFound(_) => {
                    "; 'nbdtrack exports' and 'nbdtrack volumes' list what there is"
                }
                RequestError::Ambiguous(_) => {
                    "; 'nbdtrack volumes' shows the disks, 'nbdtrack resolve NAME --diskseq N' chooses one"
                }
                RequestError::NotReady(_) => "; 'nbdtrack status' shows what it waits for",
                RequestError::TimedOut(_) => {
                    "; ask again, with a longer --timeout or --hard where the command has them"
                }
                _ => "",
            },
            _ => "",
        };
        let said = self.to_string();
        // The daemon knows more than we do: what it says to do next is enough.
        if said.contains("'nbdtrack ") {
            said
        } else {
            said + next
        }
    }
}

/// What starts the daemon on this machine, in words.
fn starts() -> &'static str {
    match take_over::has_place() {
        true => "'systemctl start nbd-server'",
        false => "'systemctl start nbdtrack' or 'nbdtrack serve --config PATH'",
    }
}

/// Where a daemon was looked for, in words.
fn place(bus: &Bus) -> String {
    match bus {
        Bus::System => "the system bus".to_owned(),
        Bus::None | Bus::Address(_) => bus.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Every export in use was once told how to share a volume, also one that only had clients.
    #[test]
    fn what_is_in_use_is_told_in_the_daemons_words_alone() {
        let in_use = RequestError::InUse("export vol-a has 2 clients".to_owned());
        let failure = Failure::Client(ClientError::Refused(in_use));
        assert_eq!(failure.text(), "export vol-a has 2 clients");
    }

    /// By this number the unit knows that another start would bring nothing.
    #[test]
    fn port_of_a_server_that_answers_has_the_exit_code_that_the_unit_does_not_start_again_after() {
        let address = std::net::SocketAddr::from(([127, 0, 0, 1], 10809));
        let answered = daemon::Error::from(daemon::ListenError::Answered(address));
        let code = Failure::Daemon(answered).code();
        let unit = include_str!("../../systemd/nbdtrack.service");
        let line = format!("\nRestartPreventExitStatus={code}\n");
        assert!(code != 1 && unit.contains(&line), "{line}");
    }

    #[test]
    fn every_failure_that_may_pass_by_itself_has_exit_code_4() {
        let refused = |error| Failure::Client(ClientError::Refused(error)).code();
        assert_eq!(refused(RequestError::NotReady(String::new())), 4);
        assert_eq!(refused(RequestError::TimedOut(String::new())), 4);
        assert_eq!(refused(RequestError::NotFound(String::new())), 1);
    }
}
