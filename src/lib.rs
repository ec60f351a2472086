//! nbdtrack: NBD exports that follow the volume, not the path.
//!
//! # The house
//!
//! A middle that only decides, edges that only do. Values go in and values come out of the middle, so
//! that a simulation can drive it; the edges carry out one order and report one event.
//!
//! | room | what lives there | may use |
//! |---|---|---|
//! | [`identity`] | PURE: what a disk says of itself, and which volume that is | – |
//! | [`correlation`] | PURE: disks, exports, their states; `apply(now, event) → actions` | `identity` |
//! | [`config`] | PURE parsing of `nbdtrack.toml` and `conf.d`, and the reading of files beside it | `correlation`, `identity` |
//! | [`udev`] | EDGE: the kernel's and udev's events, and the survey | `correlation`, `identity` |
//! | [`files`] | EDGE: what stands under the paths of exports that are files | `image`, `correlation`, `identity`, `mounts` |
//! | [`mapping`] | EDGE: what is durable: exports made at run time, releases, conflicts, pins, backups, the table of VMs' disks, the audit trail | `correlation`, `identity` |
//! | [`claim`] | EDGE: which disks udev's rules keep the machine's hands off; its `list` and `spec` are pure | `udev`, `correlation`, `identity`, `mounts` |
//! | [`image`] | EDGE: one opened disk: read, write, flush, zero, discard | `correlation`, `identity`, `mounts`, `sync` |
//! | [`nbd`] | EDGE: clients; its `wire`, `command` and `handshake` are pure | `image`, `correlation`, `sync` |
//! | [`sync`] | the locks and threads of these two, or a model checker's | – |
//! | [`mounts`] | PURE: the kernel's table of mounts | – |
//! | [`dbus`] | EDGE: the objects on the bus, and the client that the command line uses | `correlation`, `identity` |
//! | [`daemon`] | the loop, the only place where the edges meet | `dbus`, `udev`, `files`, `claim`, `mapping`, `config`, `nbd`, `image`, `correlation`, `identity` |
//! | [`cli`] | the command line | `daemon`, `dbus`, `config`, `claim`, `udev`, `image`, `correlation`, `identity` |
//! | `main` | the process | `cli` |
//!
//! Arrows go one way: `main → cli → daemon → {dbus, claim → udev, mapping, config, {nbd, files} → image} → correlation → identity`.
//! `tests/arrows.rs` reads this table and each path that begins at `crate::`, and holds them together.
//!
//! # Invariants
//!
//! A comment or an assertion that rests on one of these names it by its number.
//!
//! 1. **One lease per connection, for life.** A session is bound at GO to one opened image of one disk
//!    incarnation and never moves to another.
//! 2. **One disk per export.** While two live disks claim an identity, no new connection reaches either.
//!    Sessions that were bound while theirs was the only claimant go on.
//! 3. **The disk that is open is the disk that was announced.** Device number and diskseq are compared after the
//!    open, and the identity is read again.
//! 4. **State is truth, events are hints.** After a survey the model equals the machine, whatever was
//!    lost, doubled or reordered before.
//! 5. **Durable before told.** A mapping, an export or a pin is on disk before a caller hears of it.
//! 6. **Close before open.** An export opens its next image only after its last one is fenced, drained and
//!    closed. I/O that a hung disk never finishes leaves an orphan; until it is closed no export opens that volume on
//!    any node, for a late write could land on newer data.
//! 7. **Exactly one reply per request**, with its cookie, while the connection lives.
//! 8. **Only checked ranges reach an image.** Offset and length are validated once, into a type.
//! 9. **FLUSH and FUA are durable**, and cover the acknowledged writes of every connection of the export. After the
//!    first one that failed, every later one answers EIO until a new generation: the kernel reports a write-back
//!    error once and may then call the pages clean. One that only had no room (ENOSPC) has given the kernel nothing that it could lose.
//! 10. **Bounded everything.** Queues, bytes in flight, connections, handshakes, options, replies to slow readers.
//! 11. **Control and data never wait for each other.** A hung disk stops neither events nor D-Bus nor other exports.
//! 12. **No path fallback.** An export whose volume is not positively identified is not served, and says why.

pub mod claim;
pub mod cli;
pub mod config;
pub mod correlation;
pub mod daemon;
pub mod dbus;
pub mod files;
pub mod identity;
pub mod image;
pub mod mapping;
pub mod mounts;
pub mod nbd;
pub mod sync;
pub mod udev;
