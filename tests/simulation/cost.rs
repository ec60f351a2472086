//! What one event costs does not grow with the number of exports and disks.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use nbdtrack::correlation::{
    Action, BootId, ConfiguredSection, Correlation, Definition, DeviceNode, DeviceNumber,
    DiskFacts, DiskSeq, EXPORTS_MAX, Event, ExportName, Mark, NamedPath, OpenedDisk, Reading,
    Remembered, Request, RequestError, RequestId, SectionsChange, Settings, Source, Written,
};
use nbdtrack::identity::{Identity, Scheme, VolumeId};

thread_local! {
    static ALLOCATIONS: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, and how often each thread has asked it for memory: what is copied, made or judged asks.
struct Counted;

// SAFETY: all is the system allocator's own; the count is a cell of the thread that needs no memory and no destructor.
unsafe impl GlobalAlloc for Counted {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller's promise is handed on as it is.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static COUNTED: Counted = Counted;

fn facts(index: u32, diskseq: u64) -> DiskFacts {
    let identity = Identity {
        scheme: Scheme::Loop,
        value: format!("/v{index}"),
    };
    DiskFacts {
        node: DeviceNode(format!("/dev/x{index}")),
        number: DeviceNumber {
            major: 7,
            minor: index,
        },
        diskseq: DiskSeq(diskseq),
        size: 1000,
        read_only: false,
        identities: Reading::Known([identity].into()),
        serial: String::new(),
        wwid: String::new(),
        model: String::new(),
        holders: Vec::new(),
        leaving: false,
    }
}

/// A model in which `count` exports serve as many disks.
fn serving(count: u32) -> Correlation {
    let exports = (0..count).map(|index| Definition {
        name: ExportName::parse(&format!("e{index}")).expect("a valid name"),
        volume: VolumeId::parse(&format!("loop:/v{index}")).expect("a valid volume"),
        read_only: false,
        share: false,
        direct: false,
        source: Source::Dbus,
    });
    let remembered = Remembered {
        exports: exports.collect(),
        ..Remembered::default()
    };
    let mut middle = Correlation::new(Settings::new(BootId("boot".to_owned())), remembered);
    middle.start();
    let disks = (0..count)
        .map(|index| facts(index, u64::from(index) + 1))
        .collect();
    let actions = middle.apply(
        Duration::ZERO,
        Event::Surveyed {
            mark: Mark(1),
            disks,
            routine: false,
        },
    );
    for action in actions {
        if let Action::OpenDisk(order) = action {
            let result = Ok(OpenedDisk {
                size: 1000,
                mark: Mark::default(),
                read_only: false,
            });
            middle.apply(
                Duration::ZERO,
                Event::DiskOpened {
                    ticket: order.ticket,
                    result,
                },
            );
        }
    }
    middle
}

/// The actions of each event of one disk's way out and back, and the mean time of an event.
fn round(count: u32) -> (Vec<usize>, Duration) {
    const ROUNDS: u32 = 50;
    let mut middle = serving(count);
    let (mut mark, mut seq) = (2, u64::from(count) + 1);
    let mut shapes = BTreeSet::new();
    let began = Instant::now();
    for round in 0..ROUNDS {
        let index = round % count;
        let mut shape = Vec::new();
        let mut step = |middle: &mut Correlation, event: Event| {
            let actions = middle.apply(Duration::ZERO, event);
            shape.push(actions.len());
            actions
        };
        let number = DeviceNumber {
            major: 7,
            minor: index,
        };
        let gone = step(
            &mut middle,
            Event::DiskGone {
                mark: Mark(mark),
                number,
                diskseq: None,
            },
        );
        for action in gone {
            if let Action::EndLease {
                export, generation, ..
            } = action
            {
                let end = nbdtrack::correlation::LeaseEnd::Closed;
                step(
                    &mut middle,
                    Event::LeaseEnded {
                        export,
                        generation,
                        end,
                    },
                );
            }
        }
        let seen = step(
            &mut middle,
            Event::DiskSeen {
                mark: Mark(mark + 1),
                facts: facts(index, seq),
            },
        );
        for action in seen {
            if let Action::OpenDisk(order) = action {
                let result = Ok(OpenedDisk {
                    size: 1000,
                    mark: Mark::default(),
                    read_only: false,
                });
                step(
                    &mut middle,
                    Event::DiskOpened {
                        ticket: order.ticket,
                        result,
                    },
                );
            }
        }
        shapes.insert(shape);
        mark += 2;
        seq += 1;
    }
    let took = began.elapsed() / (4 * ROUNDS);
    assert_eq!(middle.check(), Ok(()));
    assert_eq!(shapes.len(), 1, "every disk's way is the same: {shapes:?}");
    (shapes.into_iter().next().unwrap_or_default(), took)
}

#[test]
fn an_event_costs_the_same_beside_ten_and_ten_thousand_exports() {
    let (few, _) = round(10);
    assert_eq!(few.len(), 4, "gone, closed, seen, opened");
    for count in [10, 100, 1_000, 10_000] {
        let (actions, time) = round(count);
        crate::tell(&format!(
            "{count} exports and disks: actions {actions:?}, {time:?} an event (a debug build below 200 checks)"
        ));
        assert_eq!(actions, few);
    }
}

/// The first reading of a configuration.
fn configured(exports: impl Iterator<Item = Definition>) -> Event {
    Event::Sections(SectionsChange {
        put: exports.map(Into::into).collect(),
        ..SectionsChange::default()
    })
}

/// Ten thousand exports read one disk: each is judged, opened and served by itself, and none of that looks at all the others. Were it
/// so, this would go on for most of an hour.
#[test]
fn ten_thousand_readers_of_one_disk_come_to_serve_it() {
    const READERS: usize = 10_000;
    let mut middle = Correlation::new(
        Settings::new(BootId("boot".to_owned())),
        Remembered::default(),
    );
    let exports = (0..READERS).map(|index| Definition {
        name: ExportName::parse(&format!("e{index}")).expect("a valid name"),
        volume: VolumeId::parse("loop:/v0").expect("a valid volume"),
        read_only: true,
        share: false,
        direct: false,
        source: Source::Config,
    });
    let began = Instant::now();
    middle.apply(Duration::ZERO, configured(exports));
    let surveyed = Event::Surveyed {
        mark: Mark(1),
        disks: vec![facts(0, 1)],
        routine: false,
    };
    let mut actions = middle.apply(Duration::ZERO, surveyed);
    let mut served = 0;
    loop {
        let opens = actions.iter().filter_map(|action| match action {
            Action::OpenDisk(order) => Some(order.ticket),
            _ => None,
        });
        let opens: Vec<_> = opens.collect();
        assert!(opens.len() < 2, "one open of a disk at a time");
        let Some(ticket) = opens.into_iter().next() else {
            break;
        };
        let result = Ok(OpenedDisk {
            size: 1000,
            mark: Mark::default(),
            read_only: true,
        });
        actions = middle.apply(Duration::ZERO, Event::DiskOpened { ticket, result });
        served += actions
            .iter()
            .filter(|action| matches!(action, Action::Serve { .. }))
            .count();
    }
    crate::tell(&format!(
        "{READERS} readers of one disk came to serve it in {:?}",
        began.elapsed()
    ));
    assert_eq!(served, READERS);
    assert_eq!(middle.check(), Ok(()));
}

/// Each export of one file was judged beside all that there were: to add ten thousand was to compare fifty million pairs.
#[test]
fn an_export_comes_to_many_of_its_volume_for_what_it_costs_beside_a_few() {
    let mut middle = Correlation::new(
        Settings::new(BootId("boot".to_owned())),
        Remembered::default(),
    );
    let began = Instant::now();
    let mut add = |index: usize| {
        let definition = Definition {
            name: ExportName::parse(&format!("e{index:05}")).expect("a valid name"),
            volume: VolumeId::parse("file:/images/one").expect("a valid volume"),
            read_only: true,
            share: false,
            direct: false,
            source: Source::Dbus,
        };
        let request = RequestId(index as u64 + 1);
        let wait = Duration::ZERO;
        let what = Request::AddExport { definition, wait };
        let before = ALLOCATIONS.get();
        middle.apply(Duration::ZERO, Event::Asked { request, what });
        let asked = ALLOCATIONS.get() - before;
        let result = Ok(());
        middle.apply(Duration::ZERO, Event::Persisted { request, result });
        asked
    };
    let asked: Vec<u64> = (0..10_000).map(&mut add).collect();
    // A node of an ordered set is split now and then.
    let most = |of: std::ops::Range<usize>| asked[of].iter().copied().max();
    let (few, many) = (most(300..1_000), most(9_300..10_000));
    crate::tell(&format!(
        "10,000 exports of one file were added in {:?}; one asked for memory at most {few:?} times beside 1,000, {many:?} beside 10,000",
        began.elapsed()
    ));
    assert!(many <= few.map(|few| few + 16), "{few:?}, {many:?}");
}

#[test]
fn exports_have_a_limit_over_configuration_and_callers_together() {
    let mut middle = Correlation::new(
        Settings::new(BootId("boot".to_owned())),
        Remembered::default(),
    );
    let definition = |index: usize, source| Definition {
        name: ExportName::parse(&format!("e{index}")).expect("a valid name"),
        volume: VolumeId::parse(&format!("loop:/e{index}")).expect("a valid volume"),
        read_only: false,
        share: false,
        direct: false,
        source,
    };
    let exports = (0..EXPORTS_MAX).map(|index| definition(index, Source::Config));
    middle.apply(Duration::ZERO, configured(exports));
    let what = Request::AddExport {
        definition: definition(EXPORTS_MAX, Source::Dbus),
        wait: Duration::ZERO,
    };
    let request = RequestId(1);
    let actions = middle.apply(Duration::ZERO, Event::Asked { request, what });
    let refused = actions.iter().any(|action| {
        matches!(
            action,
            Action::Reply {
                reply: Err(RequestError::Failed(_)),
                ..
            }
        )
    });
    assert!(refused, "{actions:?}");
}

/// A section of nbd-server's configuration at whose path there is nothing.
fn section(index: usize, read_only: bool) -> ConfiguredSection {
    let path = format!("/dev/none-{index}");
    ConfiguredSection {
        definition: Definition {
            name: ExportName::parse(&format!("e{index}")).expect("a valid name"),
            volume: VolumeId::of_path(&path),
            read_only,
            share: false,
            direct: false,
            source: Source::NbdServer,
        },
        path: Some(NamedPath {
            path,
            trust: false,
            written: Written::At(1),
            at: Err("there is nothing".to_owned()),
        }),
    }
}

/// Applies what was read, and what the store answers; the number of actions, and how often the reading asked for memory.
fn read(middle: &mut Correlation, change: SectionsChange) -> (usize, u64) {
    let before = ALLOCATIONS.get();
    let actions = middle.apply(Duration::ZERO, Event::Sections(change));
    let asked = ALLOCATIONS.get() - before;
    let many = actions.len();
    for action in actions {
        if let Action::Persist { request, .. } = action {
            let result = Ok(());
            middle.apply(Duration::ZERO, Event::Persisted { request, result });
        }
    }
    (many, asked)
}

/// Nobody waits for sections that are as they were: one reload took 90 ms of the loop's time beside 10,000 of them, which were copied
/// and judged.
#[test]
fn a_reload_costs_what_changed_and_not_what_there_is() {
    let of = |put: Vec<ConfiguredSection>| SectionsChange {
        put,
        refused: Some(BTreeSet::new()),
        ..SectionsChange::default()
    };
    let (mut shapes, mut asked) = (BTreeSet::new(), Vec::new());
    for count in [1_000, 10_000] {
        let mut middle = Correlation::new(
            Settings::new(BootId("boot".to_owned())),
            Remembered::default(),
        );
        let (mark, disks) = (Mark(1), Vec::new());
        let survey = Event::Surveyed {
            mark,
            disks,
            routine: false,
        };
        middle.apply(Duration::ZERO, survey);
        let sections = (0..count).map(|index| section(index, false)).collect();
        let (_, all) = read(&mut middle, of(sections));
        let ones = (0..6).map(|round| read(&mut middle, of(vec![section(7, round % 2 == 0)])));
        let (actions, one): (Vec<_>, Vec<_>) = ones.unzip();
        shapes.extend(actions);
        crate::tell(&format!(
            "{count} sections: the first reading asked for memory {all} times, reloads with one change {one:?} times"
        ));
        assert!(all > 10 * count as u64, "what is judged is counted: {all}");
        asked.push(one.into_iter().max());
    }
    assert_eq!(shapes.len(), 1, "the actions are the same: {shapes:?}");
    assert_eq!(asked[0], asked[1], "it costs what it cost beside a tenth");
}
