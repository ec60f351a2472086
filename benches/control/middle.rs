//! What one event costs the pure middle, with few and with many exports and disks; and a [`Machine`] of plain values
//! that answers its orders at once.

use std::collections::{BTreeSet, VecDeque};
use std::time::{Duration, Instant};

use nbdtrack::correlation::{
    Action, BootId, Correlation, Definition, DeviceNode, DeviceNumber, DiskFacts, DiskSeq, Event,
    ExportName, LeaseEnd, Mark, OpenedDisk, Reading, Remembered, SectionsChange, Settings, Source,
};
use nbdtrack::identity::VolumeId;

use crate::table::{Aim, Row};
use support::Outcome;
use support::hold;

const SIZES: [u32; 4] = [10, 100, 1_000, 10_000];
const BYTES: u64 = 1 << 20;
/// What still counts as flat: ten thousand facts do not fit where ten do, in the processor's caches.
const FLAT: f64 = 2.0;

/// An export's definition and what its disk says; the volume's number is its node's.
pub fn definition(number: u32) -> Outcome<Definition> {
    Ok(Definition {
        name: ExportName::parse(&format!("vol-{number}"))?,
        volume: VolumeId::parse(&format!("serial:BENCH{number:07}"))?,
        read_only: false,
        share: false,
        direct: false,
        source: Source::Config,
    })
}

pub fn disk(number: u32, diskseq: u64) -> Outcome<DiskFacts> {
    let identities: BTreeSet<_> = definition(number)?
        .volume
        .candidates()
        .into_iter()
        .take(1)
        .collect();
    Ok(DiskFacts {
        node: DeviceNode(format!("/dev/vd{number}")),
        number: DeviceNumber {
            major: 254,
            minor: number,
        },
        diskseq: DiskSeq(diskseq),
        size: BYTES,
        read_only: false,
        identities: Reading::Known(identities),
        serial: format!("BENCH{number:07}"),
        wwid: String::new(),
        model: String::new(),
        holders: Vec::new(),
        leaving: false,
    })
}

/// A correlation with `count` exports configured and nothing surveyed.
pub fn configured(count: u32) -> Outcome<Correlation> {
    let mut correlation = Correlation::new(
        Settings::new(BootId("bench".to_owned())),
        Remembered::default(),
    );
    correlation.start();
    let exports = (0..count).map(definition).collect::<Outcome<Vec<_>>>()?;
    let change = SectionsChange {
        put: exports.into_iter().map(Into::into).collect(),
        ..SectionsChange::default()
    };
    correlation.apply(Duration::ZERO, Event::Sections(change));
    Ok(correlation)
}

pub fn measure(cycles: usize) -> Outcome<Vec<Row>> {
    let mut rows = SIZES
        .map(|count| at(count, cycles))
        .into_iter()
        .collect::<Outcome<Vec<_>>>()?;
    let [fewest, .., most] = rows.as_slice() else {
        return Ok(rows);
    };
    let growth = most.median() / fewest.median();
    rows.push(Row::of(
        "  10,000 exports and disks against 10 (flat is 1)",
        "x",
        vec![growth],
        Aim::Worst(FLAT),
    ));
    Ok(rows)
}

fn at(count: u32, cycles: usize) -> Outcome<Row> {
    let mut machine = Machine {
        correlation: configured(count)?,
        began: Instant::now(),
        answers: VecDeque::new(),
        costs: Vec::new(),
    };
    let disks = (0..count)
        .map(|number| disk(number, u64::from(number) + 1))
        .collect::<Outcome<Vec<_>>>()?;
    machine.tell(Event::Surveyed {
        mark: Mark(1),
        disks,
        routine: false,
    });
    machine.costs.clear();
    let mut diskseqs: Vec<u64> = (1..=u64::from(count)).collect();
    let mut last = u64::from(count);
    for cycle in 0..cycles {
        // Strides through all of them, so that none is warm because it was just used.
        let number = u32::try_from(cycle * 7919 % usize::try_from(count)?)?;
        let index = usize::try_from(number)?;
        last += 1;
        let facts = disk(number, last)?;
        let gone = Event::DiskGone {
            mark: Mark(2 * last),
            number: facts.number,
            diskseq: Some(DiskSeq(diskseqs[index])),
        };
        machine.tell(gone);
        machine.tell(Event::DiskSeen {
            mark: Mark(2 * last + 1),
            facts,
        });
        diskseqs[index] = last;
    }
    let served = machine.served();
    hold!(
        served == usize::try_from(count)?,
        "{served} of {count} exports are served after {cycles} cycles"
    );
    Ok(Row::of(
        format!("the middle's cost of one event, {count} exports and disks"),
        "us",
        machine.costs,
        Aim::None,
    ))
}

struct Machine {
    correlation: Correlation,
    began: Instant,
    answers: VecDeque<Event>,
    /// Microseconds of each event.
    costs: Vec<f64>,
}

impl Machine {
    /// One event and everything that it leads to.
    fn tell(&mut self, event: Event) {
        self.answers.push_back(event);
        while let Some(event) = self.answers.pop_front() {
            let now = self.began.elapsed();
            let began = Instant::now();
            let actions = self.correlation.apply(now, event);
            self.costs.push(began.elapsed().as_secs_f64() * 1e6);
            for action in actions {
                self.answers.extend(answer(action));
            }
        }
    }

    fn served(&self) -> usize {
        let names: Vec<ExportName> = self.correlation.export_names().cloned().collect();
        names
            .iter()
            .filter_map(|name| self.correlation.export(name))
            .filter(|view| view.state.name() == "Serving")
            .count()
    }
}

/// What a machine on which everything succeeds at once says to an order.
fn answer(action: Action) -> Option<Event> {
    match action {
        Action::OpenDisk(order) => Some(opened(order.ticket)),
        Action::DropOpened { ticket } => Some(Event::Dropped { ticket }),
        Action::EndLease {
            export, generation, ..
        } => Some(Event::LeaseEnded {
            export,
            generation,
            end: LeaseEnd::Closed,
        }),
        Action::Persist { request, .. } => Some(Event::Persisted {
            request,
            result: Ok(()),
        }),
        Action::HideAndCount { request, .. } => Some(Event::Counted {
            request,
            clients: 0,
        }),
        Action::Serve { .. }
        | Action::Refuse { .. }
        | Action::Unseal { .. }
        | Action::Hide { .. }
        | Action::Show { .. }
        | Action::Grow { .. }
        | Action::Forget { .. }
        | Action::Reply { .. }
        | Action::Survey { .. }
        | Action::WatchFile { .. }
        | Action::UnwatchFile { .. }
        | Action::LookUpPaths
        | Action::Tell(_)
        | Action::Log(_) => None,
    }
}

pub fn opened(ticket: nbdtrack::correlation::Ticket) -> Event {
    Event::DiskOpened {
        ticket,
        result: Ok(OpenedDisk {
            size: BYTES,
            mark: Mark::default(),
            read_only: false,
        }),
    }
}
