//! The rows of the comparison: what is asked, over what, of which disk.

use crate::disks::DiskKind;
use crate::images::Contents;
use crate::load::{MARK, Op, Shape};
use crate::servers::Transport;

pub const KIB: usize = 1 << 10;
/// One request of a sequential row: what nbdcopy and qemu-img ask for.
const SEQUENTIAL_BYTES: usize = 256 * KIB;
const SEQUENTIAL_DEPTH: usize = 8;

/// Who disturbs a client that reads 4 KiB at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neighbour {
    /// A client that asks for much and takes none of it.
    SlowReader,
    /// A client that reads 32 MiB at a time.
    HugeRequests,
    /// A client of another export, whose disk answers nothing.
    HungDisk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Load(Shape),
    /// A load after all that the disk holds was given back.
    Fresh(Shape),
    /// Connect, choose an export, disconnect, one after the other.
    Connect,
    /// Memory of this many connections that say nothing.
    Idle(usize),
    /// A load beside connections that say nothing.
    BesideIdle(Shape, usize),
    /// By how much a neighbour raises the p99 of a load.
    Beside(Shape, Neighbour),
    /// nbdcopy, from the export (to nowhere) or to it.
    Nbdcopy {
        to_export: bool,
    },
}

/// What a server's figure means, and whether more of it is better.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unit {
    /// Thousands of requests in a second.
    Requests,
    GibPerSecond,
    ConnectsPerSecond,
    CopiesPerSecond,
    /// KiB for each connection.
    KibEach,
    /// p99 with the neighbour to p99 without.
    Times,
}

impl Unit {
    pub fn name(self) -> &'static str {
        match self {
            Unit::Requests => "k/s",
            Unit::GibPerSecond => "GiB/s",
            Unit::ConnectsPerSecond => "conn/s",
            Unit::CopiesPerSecond => "copies/s",
            Unit::KibEach => "KiB each",
            Unit::Times => "x p99",
        }
    }

    pub fn less_is_better(self) -> bool {
        matches!(self, Unit::KibEach | Unit::Times)
    }
}

/// One row.
#[derive(Debug, Clone)]
pub struct Workload {
    pub name: String,
    pub stage: Stage,
    pub what: What,
    /// Part of the short form.
    pub quick: bool,
}

/// What the servers of a row are started on; rows of one stage share them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stage {
    pub disk: DiskKind,
    pub transport: Transport,
    pub exports: usize,
    /// 4 GiB of which 64 MiB hold data, instead of a disk that is full.
    pub sparse: bool,
    /// There is a second export, `ill`, on a disk that can be made to hang.
    pub ill: bool,
}

impl Stage {
    /// For a note: which rows these are.
    pub fn name(self) -> String {
        match self.disk {
            DiskKind::Qcow2(_) => "the rows of QCOW2 images".to_owned(),
            DiskKind::File if self.sparse => "the row of a sparse file".to_owned(),
            _ if self.ill => "the row of a hung disk".to_owned(),
            DiskKind::File if self.exports > 1 => format!("the row with {} exports", self.exports),
            DiskKind::File => "the rows of a plain file".to_owned(),
            DiskKind::Loop | DiskKind::LoopDirect => "the rows of a block device".to_owned(),
        }
    }

    /// Little of the disk, or nothing, holds data.
    pub fn is_empty(self) -> bool {
        self.sparse || self.disk == DiskKind::Qcow2(Contents::Fresh)
    }
}

impl Workload {
    pub fn unit(&self) -> Unit {
        match self.what {
            What::Load(shape) | What::Fresh(shape) if !shape.random => Unit::GibPerSecond,
            What::Load(_) | What::Fresh(_) | What::BesideIdle(..) => Unit::Requests,
            What::Connect => Unit::ConnectsPerSecond,
            What::Idle(_) => Unit::KibEach,
            What::Beside(..) => Unit::Times,
            What::Nbdcopy { .. } if self.stage.sparse => Unit::CopiesPerSecond,
            What::Nbdcopy { .. } => Unit::GibPerSecond,
        }
    }
}

/// All rows, in the order of their stages.
pub fn all() -> Vec<Workload> {
    let mut rows = Vec::new();
    for transport in [Transport::Unix, Transport::Tcp] {
        of_transport(&mut rows, transport);
    }
    for exports in [1000, 10_000] {
        let stage = Stage {
            exports,
            ..stage(DiskKind::File, Transport::Unix)
        };
        rows.push(row(
            format!("connect-{exports}-exports"),
            stage,
            What::Connect,
            exports == 1000,
        ));
    }
    let sparse = Stage {
        sparse: true,
        ..stage(DiskKind::File, Transport::Unix)
    };
    let ill = Stage {
        ill: true,
        ..stage(DiskKind::File, Transport::Unix)
    };
    let one = random(Op::Read, 4 * KIB, 1, 1, false);
    let beside = What::Beside(one, Neighbour::HungDisk);
    rows.push(row("beside-hung-disk".to_owned(), ill, beside, true));
    let copy = What::Nbdcopy { to_export: false };
    rows.push(row("nbdcopy-sparse".to_owned(), sparse, copy, true));
    for (disk, word) in [
        (DiskKind::Loop, "loop"),
        (DiskKind::LoopDirect, "loop-direct"),
    ] {
        let stage = stage(disk, Transport::Unix);
        let quick = disk == DiskKind::LoopDirect;
        for (op, name) in [(Op::Read, "read"), (Op::Write, "write")] {
            let what = What::Load(sequential(op, 1));
            rows.push(row(format!("{word}-seq-{name}"), stage, what, quick));
        }
        for (op, name, depth) in [
            (Op::Read, "read", 1),
            (Op::Read, "read", 32),
            (Op::Write, "write", 1),
            (Op::Write, "write", 32),
        ] {
            let what = What::Load(random(op, 4 * KIB, depth, 1, false));
            let name = format!("{word}-{name}-4k-d{depth}");
            rows.push(row(name, stage, what, false));
        }
    }
    of_images(&mut rows);
    rows
}

/// QCOW2 images; raw ones are the rows of plain files.
fn of_images(rows: &mut Vec<Workload>) {
    let read = What::Load(sequential(Op::Read, 1));
    let write = sequential(Op::Write, 1);
    let at_depth = |op, depth| What::Load(random(op, 4 * KIB, depth, 1, false));
    let mut add = |contents: Contents, name: &str, what, quick| {
        let name = format!("{}-{name}", contents.name());
        let stage = stage(DiskKind::Qcow2(contents), Transport::Unix);
        rows.push(row(name, stage, what, quick));
    };
    add(Contents::Whole, "seq-read", read, true);
    for (op, name) in [(Op::Read, "read"), (Op::Write, "write")] {
        for depth in [1, 8, 32] {
            let name = format!("{name}-4k-d{depth}");
            add(Contents::Whole, &name, at_depth(op, depth), depth == 32);
        }
    }
    add(Contents::Whole, "seq-write", What::Load(write), true);
    for contents in [Contents::Compressed, Contents::Overlay, Contents::Chain] {
        add(contents, "seq-read", read, false);
        for depth in [1, 8, 32] {
            let name = format!("read-4k-d{depth}");
            add(contents, &name, at_depth(Op::Read, depth), false);
        }
    }
    // Before anything is written.
    let unallocated = |shape: Shape| {
        What::Load(Shape {
            mark: [0; 8],
            ..shape
        })
    };
    let read = unallocated(sequential(Op::Read, 1));
    add(Contents::Fresh, "seq-read", read, false);
    let read = unallocated(random(Op::Read, 4 * KIB, 32, 1, false));
    add(Contents::Fresh, "read-4k-d32", read, false);
    add(Contents::Fresh, "seq-write", What::Fresh(write), true);
    for depth in [1, 8, 32] {
        let small = random(Op::Write, 4 * KIB, depth, 1, false);
        let name = format!("write-4k-d{depth}");
        add(Contents::Fresh, &name, What::Fresh(small), false);
    }
}

fn of_transport(rows: &mut Vec<Workload>, transport: Transport) {
    let stage = stage(DiskKind::File, transport);
    let unix = transport == Transport::Unix;
    let word = if unix { "unix" } else { "tcp" };
    let mut add =
        |name: String, what, quick| rows.push(row(format!("{name}-{word}"), stage, what, quick));
    // Reads first: a write leaves dirty pages that someone has to write out later.
    for (op, name) in [(Op::Read, "read"), (Op::Mix, "mix"), (Op::Write, "write")] {
        if op != Op::Mix {
            for connections in [1, 4] {
                let what = What::Load(sequential(op, connections));
                add(
                    format!("seq-{name}-{connections}c"),
                    what,
                    unix || connections == 1,
                );
            }
        }
        for (depth, connections) in [(1, 1), (8, 1), (32, 1), (32, 8)] {
            for structured in [false, true] {
                let shape = random(op, 4 * KIB, depth, connections, structured);
                let times = if connections > 1 {
                    format!("x{connections}")
                } else {
                    String::new()
                };
                let suffix = if structured { "-structured" } else { "" };
                let quick = !structured && (unix && op != Op::Mix || op == Op::Read && depth == 32);
                add(
                    format!("{name}-4k-d{depth}{times}{suffix}"),
                    What::Load(shape),
                    quick,
                );
            }
        }
    }
    add(
        "read-64k-d8".to_owned(),
        What::Load(random(Op::Read, 64 * KIB, 8, 1, false)),
        true,
    );
    for (to_export, name) in [(false, "read"), (true, "write")] {
        add(
            format!("nbdcopy-{name}"),
            What::Nbdcopy { to_export },
            unix && !to_export,
        );
    }
    add("connect-1-export".to_owned(), What::Connect, true);
    let one = random(Op::Read, 4 * KIB, 1, 1, false);
    // What a connection costs does not hang on its socket, and over TCP a thousand take qemu's servers most of a minute: each waits for
    // the acknowledgement of what it said before.
    if unix {
        add("idle-1000".to_owned(), What::Idle(1000), true);
        let what = What::BesideIdle(one, 200);
        add("read-4k-d1-beside-200-idle".to_owned(), what, true);
    }
    add(
        "beside-slow-reader".to_owned(),
        What::Beside(one, Neighbour::SlowReader),
        unix,
    );
    add(
        "beside-huge-requests".to_owned(),
        What::Beside(one, Neighbour::HugeRequests),
        unix,
    );
}

fn row(name: String, stage: Stage, what: What, quick: bool) -> Workload {
    Workload {
        name,
        stage,
        what,
        quick,
    }
}

fn stage(disk: DiskKind, transport: Transport) -> Stage {
    Stage {
        disk,
        transport,
        exports: 1,
        sparse: false,
        ill: false,
    }
}

fn sequential(op: Op, connections: usize) -> Shape {
    Shape {
        op,
        random: false,
        block: SEQUENTIAL_BYTES,
        depth: SEQUENTIAL_DEPTH,
        connections,
        structured: false,
        mark: MARK,
    }
}

fn random(op: Op, block: usize, depth: usize, connections: usize, structured: bool) -> Shape {
    Shape {
        op,
        random: true,
        block,
        depth,
        connections,
        structured,
        mark: MARK,
    }
}
