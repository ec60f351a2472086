//! The keys of nbd-server(5), and what becomes of each. PURE.
//!
//! The table is the one that `docs/migrate-from-nbd-server.md` shows; a test holds the two together, and another
//! reads each row's example and compares what happens.

/// How the stock server reads a value (nbd-server.c, `parse_cfile`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    Boolean,
    Integer,
    Integer64,
    Text,
}

/// What nbdtrack does with a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fate {
    /// Does what the manual says.
    Works,
    /// Does a part of what the manual says; which, and what instead.
    InPart(&'static str),
    /// Is read and changes nothing; why that is no loss.
    Accepted(&'static str),
    /// Cannot be honoured: whoever sets it (a boolean: to true) is refused by name with this reason.
    Refused(&'static str),
}

#[derive(Debug, Clone, Copy)]
pub struct Key {
    pub name: &'static str,
    pub kind: Kind,
    pub fate: Fate,
}

const fn key(name: &'static str, kind: Kind, fate: Fate) -> Key {
    Key { name, kind, fate }
}

use Fate::{Accepted, InPart, Refused, Works};
use Kind::{Boolean, Integer, Integer64, Text};

const TLS: &str = "TLS is not built yet, and such a server must not be served in plaintext";
const TLS_ONLY: &str = "TLS is not built yet, and what asks for it must not be served in plaintext";
const PER_CLIENT: &str =
    "every client of an export works on the same volume; a view of its own for each is not built";
const JOINED: &str = "an export is one volume; joining or splitting files is not built";

/// `[generic]`.
pub const GENERIC: [Key; 19] = [
    key(
        "user",
        Text,
        InPart(
            "root's rights are given up but for CAP_DAC_OVERRIDE and CAP_NET_ADMIN, and the process stays root's, see above",
        ),
    ),
    key(
        "group",
        Text,
        InPart("the process, the Unix socket and what it makes belong to it, see above"),
    ),
    key("listenaddr", Text, Works),
    key("port", Text, Works),
    key("unixsock", Text, Works),
    key("duallisten", Boolean, Works),
    key("includedir", Text, Works),
    key("allowlist", Boolean, Works),
    key(
        "max_threads",
        Integer,
        Accepted("threads belong to the whole daemon and are made as they are needed"),
    ),
    key("force_tls", Boolean, Refused(TLS)),
    key("tlsonly", Boolean, Refused(TLS)),
    key("keyfile", Text, Refused(TLS)),
    key("certfile", Text, Refused(TLS)),
    key("cacertfile", Text, Refused(TLS)),
    key(
        "tlsprio",
        Text,
        Accepted("without keyfile there is no TLS, for the stock server neither"),
    ),
    key(
        "oldstyle",
        Boolean,
        Refused(
            "the old handshake cannot name an export, and is gone from the stock server since 3.10",
        ),
    ),
    key(
        "splice",
        Boolean,
        Accepted("how bytes are moved is the daemon's choice"),
    ),
    key(
        "sdp",
        Boolean,
        Refused("the Sockets Direct Protocol is not built, in Debian's stock server neither"),
    ),
    key(
        "timeout",
        Integer,
        Accepted("the stock server does not read it either"),
    ),
];

/// An export's section.
pub const SECTION: [Key; 34] = [
    key("exportname", Text, Works),
    key("readonly", Boolean, Works),
    key("authfile", Text, Works),
    key("maxconnections", Integer, Works),
    key("flush", Boolean, Accepted("FLUSH is always offered")),
    key("fua", Boolean, Accepted("FUA is always offered")),
    key(
        "trim",
        Boolean,
        Accepted("TRIM is offered when the disk can discard"),
    ),
    key("rotational", Boolean, Works),
    key("sync", Boolean, Works),
    key(
        "splice",
        Boolean,
        Accepted("how bytes are moved is the daemon's choice"),
    ),
    key(
        "virtstyle",
        Text,
        Accepted(
            "says how %s in exportname is filled in, and %s is refused; with none, a path with % is taken as it stands",
        ),
    ),
    key(
        "listenaddr",
        Text,
        Accepted("left over from the old handshake, the stock server does not use it either"),
    ),
    key(
        "timeout",
        Integer,
        Accepted("the stock server does not read it either"),
    ),
    key(
        "sparse_cow",
        Boolean,
        Accepted("says something only with copyonwrite"),
    ),
    key(
        "cowdir",
        Text,
        Accepted("says something only with copyonwrite or waitfile"),
    ),
    key(
        "filesize",
        Integer64,
        Refused("an export has the size of its volume"),
    ),
    key("copyonwrite", Boolean, Refused(PER_CLIENT)),
    key("waitfile", Boolean, Refused(PER_CLIENT)),
    key("temporary", Boolean, Refused(PER_CLIENT)),
    key("multifile", Boolean, Refused(JOINED)),
    key("treefiles", Boolean, Refused(JOINED)),
    key(
        "prerun",
        Text,
        Refused(
            "a command of the configuration is not run with the daemon's rights; let the caller run it before it connects",
        ),
    ),
    key(
        "postrun",
        Text,
        Refused(
            "a command of the configuration is not run with the daemon's rights; 'nbdtrack watch' tells of every change",
        ),
    ),
    key(
        "transactionlog",
        Text,
        Refused("the log of every request is not built"),
    ),
    key(
        "datalog",
        Boolean,
        Refused("the log of every request is not built"),
    ),
    key(
        "sdp",
        Boolean,
        Refused("the Sockets Direct Protocol is not built, in Debian's stock server neither"),
    ),
    key("force_tls", Boolean, Refused(TLS_ONLY)),
    key("tlsonly", Boolean, Refused(TLS_ONLY)),
    key(
        "port",
        Text,
        Accepted("left over from the old handshake, the stock server does not use it either"),
    ),
    key("x-volume", Text, Works),
    key("x-share", Boolean, Works),
    key("x-trust-path", Boolean, Works),
    key("x-default", Boolean, Works),
    key("x-format", Text, Works),
];

/// `[generic]`, ours. A stock server does not know them and reads on.
pub const GENERIC_OURS: [Key; 6] = [
    key("x-state", Text, Works),
    key("x-bus", Text, Works),
    key("x-watch-config", Boolean, Works),
    key("x-missing-authfile", Text, Works),
    key("x-file-roots", Text, Works),
    key("x-settings", Text, Works),
];
