//! Promise: in a real MariaDB a row of the shared table is written only where it is this daemon's, by each byte of its id, and only while it
//! says what its writing rests on. A daemon that writes nothing keeps its name there.

use std::collections::BTreeMap;

use nbdtrack::correlation::{MappingState, State, VmDisk};
use nbdtrack::mapping::basis::{Basis, RowSaid};
use nbdtrack::mapping::reconcile::{KnownDisk, Values};
use nbdtrack::mapping::{Address, Database, DatabaseError, Tls};
use support::daemon::Home;
use support::ground::{Need, real};
use support::mariadb::MariaDb;
use support::scene::STEP_LIMIT;
use support::{Doing, Outcome, hold, trouble, until};
use tokio::runtime::{Builder, Runtime};

const NEEDS: &[Need] = &[
    Need::Tool("mariadbd"),
    Need::Tool("mariadb-install-db"),
    Need::Tool("mariadb"),
];
/// As an appliance has it: its collation takes `ABC` and `abc` for equal.
const TABLE: &str = "CREATE TABLE vm_export_mappings (
    id BIGINT UNSIGNED AUTO_INCREMENT PRIMARY KEY,
    vm_id VARCHAR(191) NOT NULL, disk_unit_number BIGINT NOT NULL, vm_name LONGTEXT NOT NULL,
    export_name VARCHAR(191) NOT NULL, device_path LONGTEXT NOT NULL, status VARCHAR(191) DEFAULT 'active',
    created_at DATETIME(3) NULL, updated_at DATETIME(3) NULL,
    UNIQUE KEY (export_name), UNIQUE KEY (vm_id, disk_unit_number)) CHARACTER SET utf8mb4";
const ALL: &str = "SELECT vm_id, vm_name, export_name, device_path, status FROM vm_export_mappings; SELECT * FROM nbdtrack_mappings";

fn runtime() -> Outcome<Runtime> {
    let runtime = Builder::new_current_thread().enable_all().build();
    runtime.doing("start a runtime")
}

async fn connect(server: &MariaDb, owner: &str) -> Outcome<Database> {
    let address = Address {
        host: String::new(),
        port: 0,
        socket: Some(server.socket.clone()),
        user: "nbdtrack".to_owned(),
        password: None,
        database: "appliance".to_owned(),
        tls: Tls::Off,
        ca: None,
        owner: owner.to_owned(),
        instance: owner.to_owned(),
    };
    Ok(Database::connect(&address).await?)
}

fn disk(vm_id: &str) -> Outcome<VmDisk> {
    VmDisk::new(vm_id, 0).doing("an id")
}

fn known(vm_name: &str, device_path: &str) -> KnownDisk {
    KnownDisk {
        vm_name: vm_name.to_owned(),
        active: true,
        device_path: device_path.to_owned(),
        kept: true,
    }
}

fn untold() -> Basis {
    Basis::Caller {
        told: None,
        exported: true,
    }
}

/// What a caller has written who was told nothing of the row, of a disk that is exported.
async fn put(
    database: &mut Database,
    vm_id: &str,
    known: KnownDisk,
) -> Outcome<Result<(), DatabaseError>> {
    put_by(database, vm_id, known, untold()).await
}

async fn put_by(
    database: &mut Database,
    vm_id: &str,
    known: KnownDisk,
    basis: Basis,
) -> Outcome<Result<(), DatabaseError>> {
    let disk = disk(vm_id)?;
    let puts = BTreeMap::from([(disk.clone(), known)]);
    Ok(database.put(&puts, &BTreeMap::from([(disk, basis)])).await)
}

/// A daemon was asked for an export whose id another one's row had in other letters: it wrote that row, both exports went by it in the end,
/// and what had been answered as kept was lost.
#[test]
fn a_row_is_a_disks_by_each_letter_of_its_id() -> Outcome<()> {
    real("ids in other letters", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        server.sql(TABLE)?;
        runtime()?.block_on(async {
            let mut two = connect(&server, "two").await?;
            hold!(
                put(&mut two, "ABC", known("web", "/dev/vdb")).await? == Ok(()),
                "new"
            );
            let before = server.sql(ALL)?;
            let mut one = connect(&server, "one").await?;
            let taken = put(&mut one, "abc", known("other", "/dev/vdc")).await?;
            hold!(
                matches!(&taken, Err(DatabaseError::Taken(reason)) if reason.contains("vm_id abc")),
                "{taken:?}"
            );
            let state = MappingState {
                disk: disk("abc")?,
                volume: "serial:x".to_owned(),
                state: State::Serving,
                reason: String::new(),
                node: "/dev/vdc".to_owned(),
                diskseq: 1,
                generation: 1,
                size: 1,
            };
            // Of what is exported here and has no row, also by the owner of the other.
            two.note(std::slice::from_ref(&state)).await?;
            let after = server.sql(ALL)?;
            hold!(before == after, "{before}\nbecame\n{after}");
            Ok(())
        })
    })
}

/// Holds all rows until two transactions wait for them.
const HOLD: &str = "DELIMITER //
    CREATE PROCEDURE hold() BEGIN
        DECLARE waiting INT DEFAULT 0;
        START TRANSACTION;
        SELECT id INTO waiting FROM vm_export_mappings FOR UPDATE;
        DO GET_LOCK('holds', 0);
        REPEAT
            DO SLEEP(0.15);
            SELECT COUNT(*) INTO waiting FROM information_schema.innodb_trx WHERE trx_state = 'LOCK WAIT';
        UNTIL waiting >= 2 END REPEAT;
        COMMIT;
    END //";

#[test]
fn of_two_daemons_that_take_a_row_of_nobody_one_has_it() -> Outcome<()> {
    real("two take one row", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &["--transaction-isolation=READ-COMMITTED"])?;
        server.sql(TABLE)?;
        server.sql(HOLD)?;
        let export = disk("vm")?.export();
        server.sql(&format!(
            "INSERT INTO vm_export_mappings (vm_id, disk_unit_number, vm_name, export_name, device_path) VALUES ('vm', 0, '', '{export}', '')"
        ))?;
        let runtime = runtime()?;
        let mut one = runtime.block_on(connect(&server, "one"))?;
        let mut two = runtime.block_on(connect(&server, "two"))?;
        let took = std::thread::scope(|scope| {
            let holder = scope.spawn(|| server.sql("CALL hold()"));
            until(STEP_LIMIT, "all rows to be held", || {
                let holder = server.sql("SELECT COALESCE(IS_USED_LOCK('holds'), 0)")?;
                Ok((holder != "0").then_some(()))
            })?;
            let took = runtime.block_on(async {
                tokio::join!(
                    put(&mut one, "vm", known("of one", "")),
                    put(&mut two, "vm", known("of two", ""))
                )
            });
            match holder.join() {
                Ok(held) => held?,
                Err(_) => trouble!("who held the rows ended"),
            };
            Ok((took.0?, took.1?))
        })?;
        let name = match &took {
            (Ok(()), Err(DatabaseError::Taken(_))) => "one",
            (Err(DatabaseError::Taken(_)), Ok(())) => "two",
            took => trouble!("{took:?}"),
        };
        let row = server.sql(
            "SELECT vm_name, wrote_vm_name, owner FROM vm_export_mappings JOIN nbdtrack_mappings USING (vm_id)",
        )?;
        hold!(row == format!("of {name}\tof {name}\t{name}"), "{row}");
        Ok(())
    })
}

/// The row said vdc and was being asked for; it was corrected to vdd, and what it had said before was written over that.
#[test]
fn what_is_written_meanwhile_is_not_written_over() -> Outcome<()> {
    real("a row that is corrected", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &[])?;
        server.sql(TABLE)?;
        runtime()?.block_on(async {
            let mut one = connect(&server, "one").await?;
            let here = || known("web", "/dev/vdb");
            hold!(put(&mut one, "vm", here()).await? == Ok(()), "new");
            let says = |path: &str| Values {
                vm_name: "web".to_owned(),
                export_name: "migration-vm-vm-disk0".to_owned(),
                device_path: path.to_owned(),
                active: true,
            };
            let row_said = |path| Basis::Row(RowSaid(Some(says(path))));
            let told = |path| Basis::Caller {
                told: Some(says(path)),
                exported: true,
            };
            server.sql("UPDATE vm_export_mappings SET device_path = '/dev/vdd'")?;
            let before = server.sql(ALL)?;
            for basis in [
                row_said("/dev/vdc"),
                told("/dev/vdc"),
                untold(),
            ] {
                let answer = put_by(&mut one, "vm", here(), basis).await?;
                hold!(
                    matches!(&answer, Err(DatabaseError::Written(reason)) if reason.contains("try again")),
                    "{answer:?}"
                );
            }
            let after = server.sql(ALL)?;
            hold!(before == after, "{before}\nbecame\n{after}");
            for basis in [row_said("/dev/vdd"), told("/dev/vdd")] {
                server.sql("UPDATE vm_export_mappings SET device_path = '/dev/vdd'")?;
                let answer = put_by(&mut one, "vm", here(), basis).await?;
                hold!(answer == Ok(()), "{answer:?}");
            }
            Ok(())
        })
    })
}

/// A server ends connections that say nothing, and with it the lock by which a second daemon of one name is kept out. Nothing is written here.
#[test]
fn a_daemon_that_writes_nothing_keeps_its_name_or_takes_it_again() -> Outcome<()> {
    real("a connection at rest", NEEDS, |ground| {
        let server = MariaDb::make(ground.path(), &["--wait-timeout=5"])?;
        let mut home = Home::new(&ground.file("home"), "none")?;
        home.server = server.store("one");
        home.configure(&[])?;
        let daemon = home.start()?;
        let holder = || {
            let lock = "CONCAT('nbdtrack-', SHA1('appliance/one'))";
            server.sql(&format!("SELECT COALESCE(IS_USED_LOCK({lock}), 0)"))
        };
        let new_holder = |than: &str| {
            until(STEP_LIMIT, "the name to be held", || {
                let now = holder()?;
                Ok((now != "0" && now != than).then_some(now))
            })
        };
        let first = new_holder("0")?;
        let since = server.status("Uptime")?;
        until(STEP_LIMIT, "more than the server waits", || {
            Ok((server.status("Uptime")? > since + 7).then_some(()))
        })?;
        hold!(holder()? == first, "{first}, and then {}", holder()?);
        server.sql(&format!("KILL {first}"))?;
        new_holder(&first)?;
        daemon.stop()
    })
}
