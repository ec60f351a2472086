//! The bus room alone, on a real private bus: a made-up loop answers, a real client looks.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test ends where something is missing"
)]

mod bus;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::time::Duration;

use bus::{PrivateBus, block_on};
use futures_util::StreamExt;
use nbdtrack::correlation::*;
use nbdtrack::dbus::{
    Answer, Bus, Call, Caller, Command, JobView, LogLevel, LogState, Publication, Publisher, Stage,
    serve,
};
use nbdtrack::identity::{Identity, Scheme};
use tokio::sync::mpsc;
use zbus::message::Type;
use zbus::{Connection, MatchRule, MessageStream, OwnedObjectPath, OwnedVariant, Variant};

type Properties = BTreeMap<String, OwnedVariant>;
type Managed = HashMap<OwnedObjectPath, BTreeMap<String, Properties>>;

const NAME: &str = "org.nbdtrack1";
const ROOT: &str = "/org/nbdtrack1";
const MANAGER: &str = "org.nbdtrack1.Manager";

async fn call<B>(
    connection: &Connection,
    path: &str,
    interface: &str,
    method: &str,
    body: &B,
) -> zbus::Result<zbus::Message>
where
    B: serde::Serialize + zbus::DynamicType,
{
    let call = connection.call_method(Some(NAME), path, Some(interface), method, body);
    tokio::time::timeout(Duration::from_secs(20), call)
        .await
        .expect("an answer in time")
}

async fn managed(connection: &Connection) -> Managed {
    let interface = "org.freedesktop.DBus.ObjectManager";
    let answer = call(connection, ROOT, interface, "GetManagedObjects", &())
        .await
        .unwrap();
    answer.body().deserialize().unwrap()
}

async fn start(bus: &PrivateBus) -> (Publisher, mpsc::Receiver<Command>, Connection) {
    let (commands, queue) = mpsc::channel(64);
    let publisher = serve(&Bus::parse(&bus.address).unwrap(), commands)
        .await
        .unwrap();
    (publisher, queue, bus.connect().await)
}

fn disk(diskseq: u64, value: &str) -> DiskView {
    DiskView {
        id: format!("loop:{value}"),
        twin: false,
        identities: vec![Identity {
            scheme: Scheme::Loop,
            value: value.to_owned(),
        }],
        serial: "serial".to_owned(),
        wwid: String::new(),
        node: DeviceNode(format!("/dev/loop{diskseq}")),
        number: DeviceNumber { major: 7, minor: 3 },
        diskseq: DiskSeq(diskseq),
        size: 1 << 20,
        read_only: false,
        model: String::new(),
        in_use: String::new(),
        exports: Vec::new(),
    }
}

fn export(name: &str, disk: Option<u64>) -> ExportView {
    ExportView {
        name: ExportName::parse(name).unwrap(),
        state: State::Serving,
        reason: String::new(),
        volume_id: "loop:/x".to_owned(),
        disk: disk.map(DiskSeq),
        node: None,
        generation: Generation(1),
        size: 1 << 20,
        read_only: false,
        hidden: false,
        source: Source::Dbus,
        mapping: None,
    }
}

fn job(id: u64, clients: u32) -> JobView {
    JobView {
        id,
        operation: "prepare-detach",
        target: "loop:/x".to_owned(),
        exports: vec![ExportName::parse("a").unwrap()],
        caller: Caller {
            name: ":1.7".to_owned(),
            uid: Some(0),
            unit: String::new(),
        },
        started_usec: 1,
        deadline_usec: 2,
        stage: Stage::Draining,
        clients,
        clients_max: 4,
    }
}

fn shown(view: ExportView, clients: u32) -> Publication {
    Publication::Export { view, clients }
}

fn error_name(result: zbus::Result<zbus::Message>) -> (String, String) {
    match result {
        Err(zbus::Error::MethodError(name, text, _)) => {
            (name.to_string(), text.unwrap_or_default())
        }
        Err(zbus::Error::FDO(error)) => {
            use zbus::DBusError;
            (
                error.name().to_string(),
                error.description().unwrap_or("").to_owned(),
            )
        }
        other => panic!("no refusal: {other:?}"),
    }
}

async fn all_signals(connection: &Connection) -> MessageStream {
    let rule = MatchRule::builder()
        .msg_type(Type::Signal)
        .sender(NAME)
        .build()
        .unwrap();
    MessageStream::for_match_rule(rule, connection, std::num::NonZeroUsize::new(100_000))
        .await
        .unwrap()
}

/// A model of the objects kept only from signals, as a client that came before them would.
#[derive(Default)]
struct Listener(BTreeMap<String, Properties>);

impl Listener {
    fn of(managed: Managed) -> Listener {
        let one = |(path, mut interfaces): (OwnedObjectPath, BTreeMap<String, Properties>)| {
            assert_eq!(interfaces.len(), 1);
            (path.to_string(), interfaces.pop_first().unwrap().1)
        };
        Listener(managed.into_iter().map(one).collect())
    }

    fn hear(&mut self, message: &zbus::Message) {
        let header = message.header();
        match header.member().unwrap().as_str() {
            "InterfacesAdded" => {
                let (path, interfaces): (OwnedObjectPath, BTreeMap<String, Properties>) =
                    message.body().deserialize().unwrap();
                for properties in interfaces.into_values() {
                    assert!(
                        self.0.insert(path.to_string(), properties).is_none(),
                        "{path} twice"
                    );
                }
            }
            "InterfacesRemoved" => {
                let (path, _): (OwnedObjectPath, Vec<String>) =
                    message.body().deserialize().unwrap();
                assert!(
                    self.0.remove(path.as_str()).is_some(),
                    "{path} was not there"
                );
            }
            "PropertiesChanged" => {
                let (_, changed, gone): (String, Properties, Vec<String>) =
                    message.body().deserialize().unwrap();
                assert!(!changed.is_empty() && gone.is_empty());
                let object = self.0.get_mut(header.path().unwrap().as_str()).unwrap();
                for (name, value) in changed {
                    let old = object.insert(name.clone(), value.try_clone().unwrap());
                    assert_ne!(old, Some(value), "{name} was told and had not changed");
                }
            }
            _ => {}
        }
    }
}

/// Waits until everything that was offered is out, and lets the listener hear it all.
async fn settle(
    publisher: &Publisher,
    connection: &Connection,
    stream: &mut MessageStream,
    listener: &mut Listener,
) {
    assert!(publisher.flush(Duration::from_secs(20)).await);
    // An answer comes after all signals that were sent before it.
    call(connection, ROOT, "org.freedesktop.DBus.Peer", "Ping", &())
        .await
        .unwrap();
    while let Ok(message) = tokio::time::timeout(Duration::from_millis(100), stream.next()).await {
        listener.hear(&message.unwrap().unwrap());
    }
}

#[test]
fn two_hundred_exports_come_and_go_and_signals_never_contradict_properties() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, _queue, client) = start(&bus).await;
        let mut stream = all_signals(&client).await;
        let mut listener = Listener::default();
        publisher.offer(
            (0..50)
                .map(|n| Publication::Disk(disk(n + 1, &format!("/v{n}"))))
                .collect(),
        );
        for round in 0_u64..6 {
            for n in 0..200_u64 {
                let name = format!("vm-{n}");
                if (n + round) % 7 == 0 {
                    publisher.offer(vec![Publication::ExportGone(
                        ExportName::parse(&name).unwrap(),
                    )]);
                } else {
                    let mut view = export(&name, Some((n + round) % 60 + 1));
                    view.generation = Generation(round / 2);
                    let clients = u32::try_from(n % 3).unwrap();
                    publisher.offer(vec![shown(view, clients)]);
                }
                if n % 40 == 0 {
                    publisher.offer(vec![Publication::DiskGone(DiskSeq(round * 3 + 1))]);
                    tokio::task::yield_now().await;
                }
            }
            settle(&publisher, &client, &mut stream, &mut listener).await;
            let found = Listener::of(managed(&client).await).0;
            assert!(found.len() > 150);
            assert_eq!(found, listener.0, "round {round}");
            for (path, properties) in found.iter().filter(|(path, _)| path.contains("/exports/")) {
                let volume: OwnedObjectPath = properties["Volume"]
                    .try_clone()
                    .unwrap()
                    .try_into()
                    .unwrap();
                assert!(
                    volume.as_str() == "/" || found.contains_key(volume.as_str()),
                    "{path}: {volume} does not exist"
                );
            }
        }
    });
}

#[test]
fn a_reply_comes_after_the_object_it_speaks_of_is_visible() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, mut queue, client) = start(&bus).await;
        tokio::spawn(async move {
            let mut number = 1;
            while let Some(command) = queue.recv().await {
                assert_eq!(command.caller.uid, Some(0));
                let Call::Request(Request::AddExport { definition, .. }) = command.call else {
                    panic!("unexpected call")
                };
                let name = definition.name;
                let answer = Ok(Answer::Added {
                    name: name.clone(),
                    created: true,
                });
                number += 1;
                publisher.offer(vec![
                    Publication::Disk(disk(number, name.as_str())),
                    shown(export(name.as_str(), Some(number)), 0),
                    Publication::Signal(Notice::ExportState {
                        export: name,
                        old: State::Absent,
                        new: State::Serving,
                        reason: String::new(),
                    }),
                    Publication::Reply(command.reply, answer),
                ]);
            }
        });
        for n in 0..50 {
            let options = BTreeMap::from([("volume", Variant::new("loop:/x"))]);
            let answer = call(
                &client,
                ROOT,
                MANAGER,
                "AddExport",
                &(format!("e{n}"), options),
            )
            .await;
            let (path, created): (OwnedObjectPath, bool) =
                answer.unwrap().body().deserialize().unwrap();
            assert!(created);
            let get = ("org.nbdtrack1.Export", "Volume");
            let answer = call(
                &client,
                path.as_str(),
                "org.freedesktop.DBus.Properties",
                "Get",
                &get,
            );
            let value: OwnedVariant = answer.await.unwrap().body().deserialize().unwrap();
            let volume: OwnedObjectPath = value.try_into().unwrap();
            assert_eq!(volume.as_str(), format!("/org/nbdtrack1/volumes/loop_e{n}"));
        }
    });
}

#[test]
fn signals_carry_what_the_table_says_and_a_detach_the_path_that_the_disk_had() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, _queue, client) = start(&bus).await;
        let mut stream = all_signals(&client).await;
        let mut twin = disk(9, "x");
        twin.twin = true;
        let told = |diskseq: u64| (DiskSeq(diskseq), "loop:x".to_owned());
        let node = |text: &str| DeviceNode(text.to_owned());
        let (diskseq, id) = told(9);
        publisher.offer(vec![
            Publication::Disk(twin),
            Publication::Signal(Notice::Attached {
                diskseq,
                id: id.clone(),
                node: node("/dev/a"),
            }),
            Publication::Signal(Notice::Renamed {
                diskseq,
                id: id.clone(),
                old: node("/dev/b"),
                new: node("/dev/a"),
            }),
            Publication::Signal(Notice::Resized {
                diskseq,
                id: id.clone(),
                old: 1,
                new: 2,
            }),
            Publication::Signal(Notice::IdentityConflict {
                id: id.clone(),
                disks: vec![diskseq],
            }),
        ]);
        assert!(publisher.flush(Duration::from_secs(5)).await);
        publisher.offer(vec![
            Publication::DiskGone(diskseq),
            Publication::Signal(Notice::Detached {
                diskseq,
                id,
                node: node("/dev/a"),
            }),
            Publication::Signal(Notice::Export(ExportName::parse("a").unwrap())),
        ]);
        let path = "/org/nbdtrack1/volumes/diskseq_9";
        let mut seen = Vec::new();
        while seen.len() < 7 {
            let message = tokio::time::timeout(Duration::from_secs(5), stream.next())
                .await
                .unwrap()
                .unwrap()
                .unwrap();
            let member = message.header().member().unwrap().to_string();
            let body = message.body();
            match member.as_str() {
                "VolumeAttached" | "VolumeDetached" => {
                    let (p, id, node, seq): (OwnedObjectPath, String, String, u64) =
                        body.deserialize().unwrap();
                    assert_eq!(
                        (p.as_str(), id.as_str(), node.as_str(), seq),
                        (path, "loop:x", "/dev/a", 9)
                    );
                }
                "VolumeRenamed" => {
                    let (p, _, old, new): (OwnedObjectPath, String, String, String) =
                        body.deserialize().unwrap();
                    assert_eq!(
                        (p.as_str(), old.as_str(), new.as_str()),
                        (path, "/dev/b", "/dev/a")
                    );
                }
                "VolumeResized" => {
                    let (_, _, old, new): (OwnedObjectPath, String, u64, u64) =
                        body.deserialize().unwrap();
                    assert_eq!((old, new), (1, 2));
                }
                "IdentityConflict" => {
                    let (_, volumes): (String, Vec<OwnedObjectPath>) = body.deserialize().unwrap();
                    assert_eq!(volumes[0].as_str(), path);
                }
                _ => {}
            }
            seen.push(member);
        }
        assert_eq!(
            seen,
            [
                "InterfacesAdded",
                "VolumeAttached",
                "VolumeRenamed",
                "VolumeResized",
                "IdentityConflict",
                "InterfacesRemoved",
                "VolumeDetached"
            ]
        );
    });
}

#[test]
fn bad_calls_are_refused_by_name_and_the_daemon_goes_on() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, mut queue, client) = start(&bus).await;
        publisher.offer(vec![shown(export("a", None), 0)]);
        assert!(publisher.flush(Duration::from_secs(5)).await);
        let none: BTreeMap<&str, Variant<'_>> = BTreeMap::new();
        let ours = "org.nbdtrack1.Error.InvalidArgument";

        let (name, text) = error_name(call(&client, ROOT, MANAGER, "AddExport", &(7_u32,)).await);
        assert_eq!(
            (name.as_str(), text.as_str()),
            (ours, "AddExport takes (sa{sv}), not (u)")
        );
        let (name, _) = error_name(call(&client, ROOT, MANAGER, "Rescan", &()).await);
        assert_eq!(name, ours);
        let huge = "n".repeat(1 << 20);
        let (name, text) =
            error_name(call(&client, ROOT, MANAGER, "RemoveExport", &(&huge, &none)).await);
        assert_eq!(name, ours);
        assert!(text.contains("4096") && text.len() < 200, "{text}");
        let (name, _) =
            error_name(call(&client, ROOT, MANAGER, "PrepareDetach", &(&huge, &none)).await);
        assert_eq!(name, ours);
        let options = BTreeMap::from([
            ("volume", Variant::new("loop:/x")),
            ("colour", Variant::new(1_u8)),
        ]);
        let (name, text) =
            error_name(call(&client, ROOT, MANAGER, "AddExport", &("b", options)).await);
        assert_eq!(name, ours);
        assert!(text.contains("colour"), "{text}");
        let options = BTreeMap::from([("mode", Variant::new("sideways"))]);
        let (name, text) =
            error_name(call(&client, ROOT, MANAGER, "RemoveExport", &("b", options)).await);
        assert_eq!(name, ours);
        assert!(text.contains("sideways"), "{text}");
        let (name, _) = error_name(call(&client, ROOT, MANAGER, "Explode", &()).await);
        assert_eq!(name, "org.freedesktop.DBus.Error.UnknownMethod");
        let (name, _) = error_name(
            call(
                &client,
                "/org/nbdtrack1/exports/b",
                "org.nbdtrack1.Export",
                "X",
                &(),
            )
            .await,
        );
        assert_eq!(name, "org.freedesktop.DBus.Error.UnknownObject");
        let set = ("org.nbdtrack1.Export", "Size", Variant::new(1_u64));
        let (name, _) = error_name(
            call(
                &client,
                "/org/nbdtrack1/exports/a",
                "org.freedesktop.DBus.Properties",
                "Set",
                &set,
            )
            .await,
        );
        assert_eq!(name, "org.freedesktop.DBus.Error.PropertyReadOnly");
        assert!(
            queue.try_recv().is_err(),
            "nothing of this reached the loop"
        );
        assert_eq!(managed(&client).await.len(), 1);
    });
}

const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const LOG: (&str, &str) = (
    "/org/freedesktop/LogControl1",
    "org.freedesktop.LogControl1",
);

/// D-Bus Specification, "org.freedesktop.DBus.Properties": an empty name of an interface means all that the object has.
#[test]
fn properties_are_had_without_the_name_of_their_interface() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, mut queue, client) = start(&bus).await;
        publisher.offer(vec![
            Publication::Disk(disk(1, "x")),
            shown(export("a", Some(1)), 0),
            Publication::Job(job(1, 0)),
        ]);
        assert!(publisher.flush(Duration::from_secs(5)).await);
        for (path, interface, least) in [
            (ROOT, MANAGER, 0),
            ("/org/nbdtrack1/jobs/1", "org.nbdtrack1.Job", 10),
            ("/org/nbdtrack1/volumes/loop_x", "org.nbdtrack1.Volume", 10),
            ("/org/nbdtrack1/exports/a", "org.nbdtrack1.Export", 10),
            (LOG.0, LOG.1, 3),
        ] {
            let mut all = Vec::new();
            for name in [interface, ""] {
                let answer = call(&client, path, PROPERTIES, "GetAll", &name).await;
                let found: Properties = answer.unwrap().body().deserialize().unwrap();
                assert!(found.len() >= least, "{path}: {found:?}");
                all.push(found);
            }
            assert_eq!(all[0], all[1], "{path}");
            for (name, value) in &all[0] {
                let answer = call(&client, path, PROPERTIES, "Get", &("", name)).await;
                let found: OwnedVariant = answer.unwrap().body().deserialize().unwrap();
                assert_eq!(found, *value, "{path} {name}");
            }
            let other = call(&client, path, PROPERTIES, "GetAll", &"org.nbdtrack1.Other").await;
            let (name, _) = error_name(other);
            assert_eq!(name, "org.freedesktop.DBus.Error.UnknownInterface");
        }
        let size = ("", "Size", Variant::new(1_u64));
        let set = call(
            &client,
            "/org/nbdtrack1/exports/a",
            PROPERTIES,
            "Set",
            &size,
        )
        .await;
        let (name, _) = error_name(set);
        assert_eq!(name, "org.freedesktop.DBus.Error.PropertyReadOnly");
        tokio::spawn(async move {
            while let Some(command) = queue.recv().await {
                assert!(matches!(command.call, Call::SetLogLevel(LogLevel::Debug)));
                let _ = command.reply.send(Ok(Answer::Done));
            }
        });
        let level = ("", "LogLevel", Variant::new("debug"));
        call(&client, LOG.0, PROPERTIES, "Set", &level)
            .await
            .unwrap();
    });
}

/// The property changed and nobody was told, though what introspection says of it is that changes are.
#[test]
fn a_log_level_that_was_set_is_told_as_a_change_of_the_property() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, _queue, client) = start(&bus).await;
        let mut stream = all_signals(&client).await;
        let log = LogState {
            level: LogLevel::Debug,
            target: "console",
        };
        publisher.offer(vec![Publication::Log(log)]);
        assert!(publisher.flush(Duration::from_secs(5)).await);
        let message = tokio::time::timeout(Duration::from_secs(5), stream.next()).await;
        let message = message.expect("a signal").unwrap().unwrap();
        let header = message.header();
        assert_eq!(header.path().unwrap().as_str(), LOG.0);
        assert_eq!(header.member().unwrap().as_str(), "PropertiesChanged");
        let (interface, changed, _): (String, Properties, Vec<String>) =
            message.body().deserialize().unwrap();
        let level = OwnedVariant::try_from(Variant::new("debug")).unwrap();
        assert_eq!(interface, LOG.1);
        assert_eq!(changed, BTreeMap::from([("LogLevel".to_owned(), level)]));
        let answer = call(&client, LOG.0, PROPERTIES, "GetAll", &LOG.1).await;
        let all: Properties = answer.unwrap().body().deserialize().unwrap();
        assert_eq!(all["LogLevel"], changed["LogLevel"]);
    });
}

#[test]
fn more_calls_than_there_are_places_are_told_to_try_again() {
    let bus = PrivateBus::open();
    block_on(async {
        let (_publisher, mut queue, client) = start(&bus).await;
        let body = ("loop:/x", BTreeMap::<&str, Variant<'_>>::new());
        let waiting: Vec<_> = (0..700)
            .map(|_| {
                let (client, body) = (client.clone(), body.clone());
                tokio::spawn(
                    async move { call(&client, ROOT, MANAGER, "PrepareDetach", &body).await },
                )
            })
            .collect();
        let mut held = Vec::new();
        // The loop's queue holds 64; it takes them and answers none until all have come.
        while let Ok(Some(command)) =
            tokio::time::timeout(Duration::from_secs(1), queue.recv()).await
        {
            held.push(command);
        }
        assert!(held.len() <= 512, "{} in flight", held.len());
        let answered = held.len();
        for command in held {
            command.reply.send(Ok(Answer::Done)).unwrap();
        }
        let mut refused = 0;
        for waiting in waiting {
            match waiting.await.unwrap() {
                Ok(_) => {}
                refusal => {
                    let (name, text) = error_name(refusal);
                    assert_eq!(name, "org.nbdtrack1.Error.NotReady", "{text}");
                    refused += 1;
                }
            }
        }
        assert_eq!(answered + refused, 700);
    });
}

#[test]
fn a_loop_that_is_gone_answers_failed() {
    let bus = PrivateBus::open();
    block_on(async {
        let (_publisher, queue, client) = start(&bus).await;
        drop(queue);
        let body = BTreeMap::<&str, Variant<'_>>::new();
        let (name, _) = error_name(call(&client, ROOT, MANAGER, "GetStats", &body).await);
        assert_eq!(name, "org.nbdtrack1.Error.Failed");
    });
}

#[test]
fn a_second_daemon_is_told_who_has_the_name() {
    let bus = PrivateBus::open();
    block_on(async {
        let (_publisher, _queue, _client) = start(&bus).await;
        let (commands, _other) = mpsc::channel(1);
        let error = serve(&Bus::parse(&bus.address).unwrap(), commands)
            .await
            .unwrap_err();
        let text = error.to_string();
        assert!(matches!(error, nbdtrack::dbus::BusError::NameTaken { .. }));
        assert!(
            text.contains(&format!("process {}", std::process::id())),
            "{text}"
        );
    });
}

#[test]
fn ten_thousand_exports_are_published_read_and_introspected() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, _queue, client) = start(&bus).await;
        let start = std::time::Instant::now();
        publisher.offer(
            (0..10_000)
                .map(|n| Publication::Disk(disk(n + 1, &format!("/backing/{n}"))))
                .collect(),
        );
        publisher.offer(
            (0..10_000)
                .map(|n| shown(export(&format!("migration-vm-{n}"), Some(n + 1)), 0))
                .collect(),
        );
        let offered = start.elapsed();
        assert!(publisher.flush(Duration::from_secs(60)).await);
        let published = start.elapsed();
        let before = std::time::Instant::now();
        let interface = "org.freedesktop.DBus.ObjectManager";
        let answer = call(&client, ROOT, interface, "GetManagedObjects", &())
            .await
            .unwrap();
        let joined = before.elapsed();
        assert!(answer.body().len() < 24 << 20, "{}", answer.body().len());
        println!("20,000 objects are {} bytes", answer.body().len());
        assert_eq!(
            answer.body().deserialize::<Managed>().unwrap().len(),
            20_000
        );
        for path in ["/", ROOT, "/org/nbdtrack1/exports"] {
            let answer = call(
                &client,
                path,
                "org.freedesktop.DBus.Introspectable",
                "Introspect",
                &(),
            )
            .await
            .unwrap();
            assert!(
                answer.body().len() < 2 << 20,
                "{path}: {}",
                answer.body().len()
            );
        }
        let before = std::time::Instant::now();
        for n in 0..1000_u32 {
            publisher.offer(vec![shown(export("migration-vm-7", Some(8)), n)]);
            tokio::task::yield_now().await;
        }
        assert!(publisher.flush(Duration::from_secs(60)).await);
        println!(
            "20,000 objects: offered in {offered:?}, on the bus in {published:?}; GetManagedObjects {joined:?}; 1,000 changes {:?}",
            before.elapsed()
        );
    });
}

#[test]
fn a_late_joiner_misses_nothing_between_the_snapshot_and_the_signals() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, _queue, client) = start(&bus).await;
        let publisher = std::sync::Arc::new(publisher);
        let busy = publisher.clone();
        let changing = tokio::spawn(async move {
            for n in 0..4_000_u64 {
                let name = format!("e{}", n * 7 % 300);
                let publication = match n % 5 {
                    0 => Publication::ExportGone(ExportName::parse(&name).unwrap()),
                    1 => Publication::Disk(disk(n % 20 + 1, &format!("/v{}", n % 20))),
                    2 if n % 3 == 0 => Publication::DiskGone(DiskSeq(n % 20 + 1)),
                    _ => shown(export(&name, Some(n % 20 + 1)), u32::try_from(n).unwrap()),
                };
                busy.offer(vec![publication]);
                if n % 3 == 0 {
                    tokio::time::sleep(Duration::from_micros(200)).await;
                }
            }
        });
        let mut joiners = Vec::new();
        for _ in 0..8 {
            tokio::time::sleep(Duration::from_millis(60)).await;
            let client = bus.connect().await;
            let stream = all_signals(&client).await;
            let interface = "org.freedesktop.DBus.ObjectManager";
            let answer = call(&client, ROOT, interface, "GetManagedObjects", &())
                .await
                .unwrap();
            joiners.push((client, stream, answer));
        }
        assert!(
            !changing.is_finished(),
            "they were to join while things change"
        );
        changing.await.unwrap();
        assert!(publisher.flush(Duration::from_secs(20)).await);
        let found = Listener::of(managed(&client).await);
        for (client, mut stream, answer) in joiners {
            let mut listener = Listener::of(answer.body().deserialize().unwrap());
            call(&client, ROOT, "org.freedesktop.DBus.Peer", "Ping", &())
                .await
                .unwrap();
            while let Ok(message) =
                tokio::time::timeout(Duration::from_millis(100), stream.next()).await
            {
                let message = message.unwrap().unwrap();
                if message.recv_position() > answer.recv_position() {
                    listener.hear(&message);
                }
            }
            assert_eq!(listener.0, found.0);
        }
    });
}

#[test]
fn a_bus_that_stands_still_costs_the_loop_nothing_and_is_told_the_newest_state_later() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, _queue, client) = start(&bus).await;
        bus.freeze(true);
        let mut longest = Duration::ZERO;
        for n in 0..100_000_u32 {
            let name = format!("e{}", n % 50);
            let batch = vec![
                shown(export(&name, None), n),
                Publication::Signal(Notice::ExportState {
                    export: ExportName::parse(&name).unwrap(),
                    old: State::Absent,
                    new: State::Serving,
                    reason: "a reason of some length, as they are in the field".to_owned(),
                }),
            ];
            let before = std::time::Instant::now();
            publisher.offer(batch);
            longest = longest.max(before.elapsed());
            if n % 100 == 0 {
                tokio::task::yield_now().await;
            }
        }
        assert!(!publisher.flush(Duration::from_millis(200)).await);
        bus.freeze(false);
        assert!(publisher.flush(Duration::from_secs(60)).await);
        let found = managed(&client).await;
        assert_eq!(found.len(), 50);
        for interfaces in found.into_values() {
            let clients: u32 = interfaces["org.nbdtrack1.Export"]["Clients"]
                .try_clone()
                .unwrap()
                .try_into()
                .unwrap();
            assert!(clients >= 99_950);
        }
        println!("longest offer to a bus that stands still: {longest:?}");
        // Far more than any offer takes, far less than the bus stood still.
        assert!(longest < Duration::from_millis(100), "{longest:?}");
    });
}

#[test]
fn live_introspection_is_what_the_xml_files_say() {
    let bus = PrivateBus::open();
    block_on(async {
        let (publisher, _queue, client) = start(&bus).await;
        publisher.offer(vec![
            Publication::Disk(disk(1, "x")),
            shown(export("a", Some(1)), 0),
            Publication::Job(job(1, 0)),
        ]);
        assert!(publisher.flush(Duration::from_secs(5)).await);
        for (path, interface) in [
            (ROOT, "org.nbdtrack1.Manager"),
            ("/org/nbdtrack1/jobs/1", "org.nbdtrack1.Job"),
            ("/org/nbdtrack1/volumes/loop_x", "org.nbdtrack1.Volume"),
            ("/org/nbdtrack1/exports/a", "org.nbdtrack1.Export"),
        ] {
            let answer = call(
                &client,
                path,
                "org.freedesktop.DBus.Introspectable",
                "Introspect",
                &(),
            )
            .await;
            let live: String = answer.unwrap().body().deserialize().unwrap();
            let file = std::fs::read_to_string(format!(
                "{}/dbus/{interface}.xml",
                env!("CARGO_MANIFEST_DIR")
            ))
            .unwrap();
            let (live, file) = (
                bus::members(&live, interface),
                bus::members(&file, interface),
            );
            assert!(live.len() > 10, "{live:?}");
            assert_eq!(live, file, "{interface}");
            let documented = bus::undocumented(interface);
            assert_eq!(documented, BTreeSet::new(), "members without a sentence");
        }
    });
}

#[test]
fn a_bus_that_restarts_is_served_again() {
    let mut bus = PrivateBus::open();
    block_on(async {
        let (publisher, _queue, client) = start(&bus).await;
        publisher.offer(vec![shown(export("a", None), 0)]);
        assert!(publisher.flush(Duration::from_secs(5)).await);
        assert_eq!(managed(&client).await.len(), 1);
        bus.restart();
        publisher.offer(vec![shown(export("b", None), 0)]);
        assert!(
            publisher.flush(Duration::from_secs(5)).await,
            "offers never wait for a bus"
        );
        let client = bus.connect().await;
        let mut found = 0;
        for _ in 0..100 {
            let interface = "org.freedesktop.DBus.ObjectManager";
            if let Ok(answer) = call(&client, ROOT, interface, "GetManagedObjects", &()).await {
                found = answer.body().deserialize::<Managed>().unwrap().len();
                break;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(found, 2);
    });
}
