//! Callers on the live daemon's bus: with nonsense, in crowds, and gone before the answer.

use std::time::{Duration, Instant};

use support::Outcome;
use support::bus::{Client, Options, ROOT, SERVICE};
use support::ground::{Need, real, tell};
use support::scene::Scene;
use support::{hold, trouble};
use zbus::Variant;

const NEEDS: &[Need] = &[Need::Loop, Need::Bus];
const BYTES: u64 = 4 << 20;
/// What a daemon keeps after many calls: 7 to 13 MiB were seen, some of it the history's queue of 8,192 records and its pages.
const KEPT_KIB_MAX: u64 = 20 << 10;
/// Every method of the Manager with the signature of what it takes, as its XML file tells callers.
fn methods() -> Vec<(String, String)> {
    let xml = include_str!("../dbus/org.nbdtrack1.Manager.xml");
    let attribute = |tag: &str, name: &str| {
        let rest = tag.split_once(&format!("{name}=\""))?.1;
        Some(rest.split('"').next()?.to_owned())
    };
    let of = |method: &str| {
        let (method, _) = method.split_once("</method>")?;
        let taken = method
            .split("<arg ")
            .filter(|arg| arg.contains("direction=\"in\""));
        let signature = taken.filter_map(|arg| attribute(arg, "type")).collect();
        Some((attribute(method, "name")?, signature))
    };
    xml.split("<method ").skip(1).filter_map(of).collect()
}

fn refused(
    client: &Client,
    method: &str,
    what: &str,
    body: &(impl serde::Serialize + zbus::DynamicType),
) -> Outcome<()> {
    match client.call(method, body) {
        Err(e) if e.is("InvalidArgument") && !e.text.is_empty() && e.text.len() < 1024 => Ok(()),
        other => {
            trouble!("{method} with {what}: expected InvalidArgument in few words, got {other:?}")
        }
    }
}

#[test]
fn nonsense_is_refused_by_name_on_every_method() -> Outcome<()> {
    real("bus nonsense", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let client = &scene.client;
        let megabyte = "x".repeat(1 << 20);
        let many: Options = ["a", "b", "c"]
            .into_iter()
            .map(|key| (key, Variant::from(megabyte.as_str())))
            .collect();
        let methods = methods();
        hold!(methods.len() >= 28, "{methods:?}");
        for (method, signature) in &methods {
            refused(client, method, "three numbers", &(1u32, 2u32, 3u32))?;
            refused(client, method, "a megabyte", &(megabyte.as_str(),))?;
            let (what, many) = ("a megabyte in each of three options", many.clone());
            match signature.as_str() {
                "a{sv}" => refused(client, method, what, &(many,))?,
                "sa{sv}" => refused(client, method, what, &("vol-a", many))?,
                "ta{sv}" => refused(client, method, what, &(1u64, many))?,
                "sta{sv}" => refused(client, method, what, &("vol-a", 1u64, many))?,
                "sua{sv}" => refused(client, method, what, &("vol-a", 1u32, many))?,
                "susa{sv}" => refused(client, method, what, &("vol-a", 1u32, "vm", many))?,
                other => trouble!("{method} takes {other}, of which nothing is tried here"),
            }
        }
        for method in ["AddExport", "RemoveExport", "PrepareDetach", "CancelDetach"] {
            refused(client, method, "an empty name", &("", Options::new()))?;
            refused(
                client,
                method,
                "a name of a megabyte",
                &(megabyte.as_str(), Options::new()),
            )?;
            refused(
                client,
                method,
                "a control character",
                &("a\u{1}b", Options::new()),
            )?;
        }
        refused(
            client,
            "ResolveConflict",
            "an empty name",
            &("", 1u64, Options::new()),
        )?;
        refused(
            client,
            "ResolveConflict",
            "no disk",
            &("vol-a", 0u64, Options::new()),
        )?;
        for (key, value) in [
            ("wait_ms", Variant::from(u32::MAX)),
            ("wait_ms", Variant::from(-1i32)),
            ("wait_ms", Variant::from("soon")),
            ("read_only", Variant::from(1u32)),
            ("volume", Variant::from(7u64)),
            ("volume", Variant::from("")),
            ("volume", Variant::from(":")),
            ("volume", Variant::from("loop:")),
            ("volume", Variant::from("loop:relative")),
        ] {
            let options = Options::from([("volume", Variant::from("loop:/x")), (key, value)]);
            refused(client, "AddExport", key, &("new", options))?;
        }
        hold!(
            scene.client.export("new")?.is_none(),
            "nothing was added by any of it"
        );
        hold!(scene.state("vol-a")? == "Serving", "and it still serves");
        scene.stop()
    })
}

#[test]
fn crowd_of_callers_is_answered_or_told_to_come_back() -> Outcome<()> {
    real("bus crowd", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let id = scene.volumes[0].id();
        let address = scene.bus.address.as_str();
        let began = Instant::now();
        // Threads: 20 connections with 10 callers each; joined here.
        let outcome: Vec<Outcome<(u64, u64, Duration)>> = std::thread::scope(|scope| {
            let crowds: Vec<_> = (0..20)
                .map(|_| {
                    let id = id.as_str();
                    scope.spawn(move || -> Outcome<(u64, u64, Duration)> {
                        let client = Client::connect_to(address)?;
                        let callers = std::thread::scope(|scope| {
                            let callers: Vec<_> = (0..10)
                                .map(|_| scope.spawn(|| caller(&client, id)))
                                .collect();
                            callers
                                .into_iter()
                                .map(|caller| caller.join().ok())
                                .collect::<Vec<_>>()
                        });
                        let mut all = (0, 0, Duration::ZERO);
                        for caller in callers {
                            let Some(one) = caller else {
                                trouble!("a caller panicked")
                            };
                            let one = one?;
                            all = (all.0 + one.0, all.1 + one.1, all.2.max(one.2));
                        }
                        Ok(all)
                    })
                })
                .collect();
            crowds
                .into_iter()
                .filter_map(|crowd| crowd.join().ok())
                .collect()
        });
        let mut all = (0, 0, Duration::ZERO);
        for one in outcome {
            let one = one?;
            all = (all.0 + one.0, all.1 + one.1, all.2.max(one.2));
        }
        hold!(
            all.0 + all.1 == 200 * 20,
            "every call was answered: {all:?}"
        );
        tell(&format!(
            "200 callers: {} calls done and {} told to come back in {:?}, slowest {:?}",
            all.0,
            all.1,
            began.elapsed(),
            all.2
        ));
        hold!(scene.state("vol-a")? == "Serving", "and it still serves");
        scene.stop()
    })
}

/// Twenty calls; counts those that were done and those that were told `NotReady`.
fn caller(client: &Client, id: &str) -> Outcome<(u64, u64, Duration)> {
    let (mut done, mut busy, mut slowest) = (0, 0, Duration::ZERO);
    for round in 0..20 {
        let began = Instant::now();
        let answer = match round % 4 {
            0 => client.stats().map(drop),
            1 => client.rescan(),
            2 => client.add_export("vol-a", id).map(drop),
            _ => client.cancel_detach(id),
        };
        slowest = slowest.max(began.elapsed());
        match answer {
            Ok(()) => done += 1,
            Err(e) if e.is("NotReady") => busy += 1,
            Err(e) => trouble!("round {round}: {e}"),
        }
    }
    Ok((done, busy, slowest))
}

#[test]
fn callers_that_leave_before_the_answer_leave_nothing_behind() -> Outcome<()> {
    real("bus leavers", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let id = scene.volumes[0].id();
        let address = scene.bus.address.clone();
        let leave = |connections: u32| -> Outcome<()> {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()?;
            runtime.block_on(async {
                for _ in 0..connections {
                    let connection = zbus::connection::Builder::address(address.as_str())
                        .build()
                        .await?;
                    for round in 0..10 {
                        let member = [
                            "Rescan",
                            "GetStats",
                            "AddExport",
                            "CancelDetach",
                            "PrepareDetach",
                        ][round % 5];
                        let message = zbus::Message::method_call(ROOT, member)
                            .destination(SERVICE)
                            .interface("org.nbdtrack1.Manager");
                        let message = match member {
                            "Rescan" | "GetStats" => message.build(&(Options::new(),))?,
                            "AddExport" => {
                                let options =
                                    Options::from([("volume", Variant::from(id.as_str()))]);
                                message.build(&("vol-a", options))?
                            }
                            "CancelDetach" => message.build(&(id.as_str(), Options::new()))?,
                            _ => message.build(&("loop:/nowhere", Options::new()))?,
                        };
                        connection.send(&message).await?;
                    }
                    drop(connection);
                }
                Ok::<_, zbus::Error>(())
            })?;
            Ok(())
        };
        let round = |client: &Client, connections: u32| -> Outcome<()> {
            leave(connections)?;
            support::until(Duration::from_secs(60), "an answer", || {
                Ok(client.rescan().is_ok().then_some(()))
            })
        };
        // What is kept for good (the history's pages, the allocator's own) is bounded, and there once a round of 10,000
        // calls adds no more than 52 bytes a call; with a leak above that none ever does.
        let fresh = scene.daemon()?.holdings()?;
        let mut before = fresh;
        let mut rounds = 0;
        loop {
            round(&scene.client, 1000)?;
            rounds += 1;
            let now = scene.daemon()?.holdings()?;
            let grown = now.resident_kib.saturating_sub(before.resident_kib);
            before = now;
            if grown < 512 {
                break;
            }
            hold!(
                rounds < 20,
                "round {rounds} of 10,000 calls still added {grown} KiB"
            );
        }
        let open = scene.daemon()?.descriptors()?;
        let began = Instant::now();
        round(&scene.client, 1000)?;
        let took = began.elapsed();
        // Whoever left has asked for surveys that go on: for as long as they do, each has a file or two of sysfs open.
        let after = scene.daemon()?.gives_back(&open, 0, before.threads + 8)?;
        tell(&format!(
            "10,000 calls without a caller in {took:?}: {before:?} after {rounds} rounds of as many, {after:?} after one more"
        ));
        hold!(
            after.resident_kib < before.resident_kib + 4096,
            "memory is flat: {before:?}, {after:?}"
        );
        hold!(
            after.resident_kib < fresh.resident_kib + KEPT_KIB_MAX,
            "what is kept is bounded: {fresh:?}, {after:?}"
        );
        hold!(scene.state("vol-a")? == "Serving", "and it still serves");
        scene.stop()
    })
}

#[test]
fn thousand_exports_are_added_while_a_thousand_others_are_removed() -> Outcome<()> {
    real("bus thousand", NEEDS, |ground| {
        let mut scene = Scene::serving(ground, &["vol-a"], BYTES)?;
        let address = scene.bus.address.as_str();
        let add = |client: &Client, name: &str| -> Outcome<()> {
            let options = Options::from([("wait_ms", Variant::from(0u32))]);
            match client.add_export_with(name, &format!("loop:/nowhere/{name}"), options) {
                Err(e) if e.is("NotReady") => Ok(()),
                other => trouble!("{name}: expected NotReady, got {other:?}"),
            }
        };
        // Ten callers at a time, each with a hundred of every kind.
        let by_ten = |work: &(dyn Fn(&Client, String) -> Outcome<()> + Sync)| -> Outcome<Duration> {
            let began = Instant::now();
            let outcomes: Vec<Option<Outcome<()>>> = std::thread::scope(|scope| {
                let worker = |worker: u32| {
                    move || -> Outcome<()> {
                        let client = Client::connect_to(address)?;
                        (0..100).try_for_each(|index| work(&client, format!("{worker}-{index}")))
                    }
                };
                let workers: Vec<_> = (0..10).map(|n| scope.spawn(worker(n))).collect();
                workers
                    .into_iter()
                    .map(|worker| worker.join().ok())
                    .collect()
            });
            for outcome in outcomes {
                match outcome {
                    Some(outcome) => outcome?,
                    None => trouble!("a worker panicked"),
                }
            }
            Ok(began.elapsed())
        };
        let first = by_ten(&|client, name| add(client, &format!("old-{name}")))?;
        let both = by_ten(&|client, name| {
            add(client, &format!("new-{name}"))?;
            Ok(client.remove_export(&format!("old-{name}"), "soft")?)
        })?;
        let left = |scene: &Scene, when: &str| -> Outcome<()> {
            let names = scene.client.objects("Export")?;
            let new = names
                .values()
                .filter(|export| export["Name"].text().starts_with("new-"))
                .count();
            hold!(
                names.len() == 1_001 && new == 1_000,
                "1,000 and vol-a are left {when}: {} of {}",
                new,
                names.len()
            );
            Ok(())
        };
        left(&scene, "at once")?;
        scene.kill()?;
        let began = Instant::now();
        scene.start()?;
        left(&scene, "also after kill -9")?;
        tell(&format!(
            "1,000 added by 10 callers in {first:?}; 1,000 more added and the first 1,000 removed in {both:?}; started again in {:?}",
            began.elapsed()
        ));
        scene.stop()
    })
}
