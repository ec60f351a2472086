//! The power goes, or the writer is killed, between any two requests that a QCOW2 image makes of its file: our check finds no error but
//! clusters that are lost, every byte that was told to be durable is there, and none that nobody wrote there.
//!
//! Here the image is opened as the daemon opens one, in this process, on a file whose unflushed writes are forgotten and put in another
//! order; `real_qcow2_crash` has the same with the daemon, its clients and a file system between. A seed is a case and can be
//! run again: `NBDTRACK_SEED` is the first, `NBDTRACK_IMAGE_CUTS` and `NBDTRACK_IMAGE_KILLS` say how many follow. Of each `JUDGED`
//! images one is QEMU's to judge, too.

mod raw_file;

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nbdtrack::identity::Format;
use nbdtrack::image::beneath::Roots;
use nbdtrack::image::qcow2::Qcow2;
use nbdtrack::image::{Durability, Extent, Image, ZeroFlags, describe};
use raw_file::open_qcow2;
use support::dice::{self, Dice};
use support::fuse_disk::{CutKind, FuseFile};
use support::ground::{Need, real, tell};
use support::images::{KINDS, qemu_img, qemu_io, text};
use support::pattern::SECTOR;
use support::process;
use support::scene::STEP_LIMIT;
use support::{Doing, Outcome, hold, trouble};

/// Not whole clusters of any size but the smallest.
const SECTORS: usize = 2048 + 3;
const BYTES: u64 = (SECTORS * SECTOR) as u64;
const JUDGED: u64 = 25;
/// Crashes of one image, each on what the last one left.
const LIVES_MAX: usize = 3;
const OPERATIONS_MAX: usize = 300;
/// Requests of the file until the crash, at most; where there are fewer it comes behind the close.
const REQUESTS_MAX: usize = 700;

/// FUSE takes 32 pages of a write at a time, wherever in a page the bytes begin: what is longer could be parted inside of a sector, which no disk
/// does.
const WRITE_SECTORS_MAX: usize = 240;

/// Of an image whose clusters can have one user, so no snapshot.
const ONE_BIT: &str = "cluster_size=2k,refcount_bits=1";

/// What a sector holds: the same number, over and over.
type Word = u64;

/// An image before its first life.
struct Template {
    name: String,
    bytes: Vec<u8>,
    reads_as: Vec<Word>,
}

/// Of each kind one that is empty, one whose all belongs to a snapshot, and one that lies on another.
fn templates(folder: &Path) -> Outcome<Vec<Template>> {
    let mut made = Vec::new();
    let size = BYTES.to_string();
    let base = folder.join("base.qcow2");
    create(&base, "cluster_size=4k", &size, &[])?;
    qemu_io(&text(&base), "qcow2", &["write -P 17 100k 500k"])?;
    for kind in KINDS.iter().chain(&[ONE_BIT]) {
        for what in ["empty", "snapshot", "overlay"] {
            let path = folder.join("template.qcow2");
            // A snapshot shares its clusters, which a count of one bit cannot say.
            if what == "snapshot" && kind.contains("refcount_bits=1") {
                continue;
            }
            let over = ["-F", "qcow2", "-b", "base.qcow2"];
            create(
                &path,
                kind,
                &size,
                if what == "overlay" { &over } else { &[] },
            )?;
            if what == "snapshot" {
                let fill = format!("write -P 34 0 {BYTES}");
                qemu_io(&text(&path), "qcow2", &[&fill])?;
                qemu_img(&["snapshot", "-c", "before", &text(&path)])?;
            }
            made.push(Template {
                name: format!("{kind}, {what}"),
                bytes: std::fs::read(&path)?,
                reads_as: by_us(folder, &path)?,
            });
            std::fs::remove_file(&path)?;
        }
    }
    Ok(made)
}

fn create(path: &Path, options: &str, size: &str, more: &[&str]) -> Outcome<()> {
    let path = text(path);
    let args = ["create", "-q", "-f", "qcow2", "-o", options];
    let args = [&args[..], more, &[&path, size]].concat();
    qemu_img(&args).map(drop)
}

/// The words of a sector each; a sector of several is none that was ever written.
fn words(bytes: &[u8]) -> Outcome<Vec<Word>> {
    let mut found = Vec::with_capacity(SECTORS);
    for (n, sector) in bytes.chunks(SECTOR).enumerate() {
        let word = &sector[..8];
        hold!(
            sector.chunks(8).all(|other| other == word),
            "sector {n} is torn"
        );
        found.push(Word::from_be_bytes(word.try_into()?));
    }
    Ok(found)
}

fn at(sector: usize, sectors: usize) -> Outcome<Extent> {
    let (offset, len) = ((sector * SECTOR) as u64, u32::try_from(sectors * SECTOR)?);
    match Extent::checked(offset, len, BYTES) {
        Some(at) => Ok(at),
        None => trouble!("{sector} and {sectors} are not in the image"),
    }
}

/// What the image at `path` reads as through a daemon's code.
fn by_us(folder: &Path, path: &Path) -> Outcome<Vec<Word>> {
    let image = open_qcow2(folder, path, false).doing("open it for reading")?;
    let mut bytes = vec![0; SECTORS * SECTOR];
    image.read(at(0, SECTORS)?, &mut bytes)?;
    words(&bytes)
}

/// What QEMU says of the image, and that it reads the same.
fn by_qemu(path: &Path, expected: &[Word]) -> Outcome<()> {
    let name = text(path);
    let checked = process::run("qemu-img", &["check", "-f", "qcow2", &name], STEP_LIMIT)?;
    hold!(
        matches!(checked.status.code(), Some(0 | 3)),
        "{}{}",
        checked.stdout,
        checked.stderr
    );
    let raw = path.with_extension("raw");
    qemu_img(&["convert", "-f", "qcow2", "-O", "raw", &name, &text(&raw)])?;
    let found = words(&std::fs::read(&raw)?)?;
    hold!(found == expected, "QEMU reads something else than we do");
    Ok(std::fs::remove_file(raw)?)
}

/// What each sector is, and what it may be after a crash.
struct Model {
    now: Vec<Word>,
    /// The last that was durable, and what came after.
    may: Vec<Vec<Word>>,
    last: Word,
}

impl Model {
    fn of(words: Vec<Word>) -> Model {
        Model {
            may: words.iter().map(|word| vec![*word]).collect(),
            now: words,
            // No pattern of a template's.
            last: 1 << 32,
        }
    }

    fn durable(&mut self, sectors: std::ops::Range<usize>) {
        for sector in sectors {
            self.may[sector] = vec![self.now[sector]];
        }
    }
}

/// How an operation ended.
enum Done {
    Yes,
    /// The file answers no more.
    Cut,
}

struct Case<'a> {
    image: &'a Qcow2,
    model: &'a mut Model,
    dice: &'a mut Dice,
    file: &'a FuseFile,
}

impl Case<'_> {
    /// An error before the crash is none that there may be.
    fn ended(&self, done: std::io::Result<()>) -> Outcome<Done> {
        match done {
            Ok(()) => Ok(Done::Yes),
            Err(_) if self.file.was_cut().is_some() => Ok(Done::Cut),
            Err(error) => trouble!("{error}, and nothing was cut"),
        }
    }

    fn operate(&mut self) -> Outcome<Done> {
        let first = self.dice.roll(SECTORS);
        let most = [8, 32, WRITE_SECTORS_MAX][self.dice.roll(3)].min(SECTORS - first);
        let sectors = first..first + 1 + self.dice.roll(most);
        let extent = at(first, sectors.len())?;
        match self.dice.roll(20) {
            0..=2 => {
                let done = self.image.flush();
                let done = self.ended(done)?;
                if matches!(done, Done::Yes) {
                    self.model.durable(0..SECTORS);
                }
                Ok(done)
            }
            3 | 4 => self.read(sectors),
            5 | 6 => {
                for sector in sectors.clone() {
                    self.model.may[sector].push(0);
                }
                let done = self.image.discard(extent, Durability::ByFlush);
                // What it has become is to be asked.
                match self.ended(done)? {
                    Done::Yes => self.settle(sectors),
                    Done::Cut => Ok(Done::Cut),
                }
            }
            7..=9 => {
                let flags = ZeroFlags {
                    no_hole: self.dice.happens(40),
                    fast: false,
                    fua: self.dice.happens(20),
                };
                self.changed(sectors, 0, flags.fua, |image| image.zero(extent, flags))
            }
            _ => {
                self.model.last += 1;
                let word = self.model.last;
                let bytes = word.to_be_bytes().repeat(sectors.len() * SECTOR / 8);
                let fua = self.dice.happens(10);
                self.changed(sectors, word, fua, |image| {
                    image.write(extent, &bytes, Durability::of_fua(fua))
                })
            }
        }
    }

    fn changed(
        &mut self,
        sectors: std::ops::Range<usize>,
        word: Word,
        fua: bool,
        change: impl FnOnce(&Qcow2) -> std::io::Result<()>,
    ) -> Outcome<Done> {
        for sector in sectors.clone() {
            self.model.may[sector].push(word);
        }
        let done = change(self.image);
        let done = self.ended(done)?;
        if matches!(done, Done::Yes) {
            self.model.now[sectors.clone()].fill(word);
            if fua {
                self.model.durable(sectors);
            }
        }
        Ok(done)
    }

    fn look(&self, sectors: &std::ops::Range<usize>) -> Outcome<Option<Vec<Word>>> {
        let mut bytes = vec![0; sectors.len() * SECTOR];
        let done = self
            .image
            .read(at(sectors.start, sectors.len())?, &mut bytes);
        match self.ended(done)? {
            Done::Yes => words(&bytes).map(Some),
            Done::Cut => Ok(None),
        }
    }

    fn read(&self, sectors: std::ops::Range<usize>) -> Outcome<Done> {
        let Some(found) = self.look(&sectors)? else {
            return Ok(Done::Cut);
        };
        let expected = &self.model.now[sectors.clone()];
        hold!(
            found == expected,
            "{sectors:?} are {found:?}, not {expected:?}"
        );
        Ok(Done::Yes)
    }

    fn settle(&mut self, sectors: std::ops::Range<usize>) -> Outcome<Done> {
        let Some(found) = self.look(&sectors)? else {
            return Ok(Done::Cut);
        };
        for (sector, word) in sectors.zip(found) {
            let before = self.model.now[sector];
            hold!(
                word == 0 || word == before,
                "sector {sector} is {word} after a discard, and was {before}"
            );
            self.model.now[sector] = word;
        }
        Ok(Done::Yes)
    }
}

/// What all cases have come to.
#[derive(Default)]
struct Sum {
    crashes: u64,
    /// Crashes behind the close.
    closed: u64,
    sectors_lost: u64,
    /// Crashes after which something that was acknowledged, and not durable, was gone.
    forgotten: u64,
    leaks: u64,
    operations: u64,
    judged: u64,
}

struct Bench {
    folder: PathBuf,
    file: FuseFile,
    templates: Vec<Template>,
}

impl Bench {
    fn case(&self, seed: u64, kind: CutKind, sum: &mut Sum) -> Outcome<()> {
        let mut dice = Dice::new(seed);
        let template = &self.templates[dice.roll(self.templates.len())];
        let back = std::fs::File::options().write(true).open(&self.file.back)?;
        back.set_len(0)?;
        back.write_all_at(&template.bytes, 0)?;
        self.file.power_up()?;
        let mut model = Model::of(template.reads_as.clone());
        for life in 0..1 + dice.roll(LIVES_MAX) {
            let judged = seed.is_multiple_of(JUDGED);
            self.live(&mut model, &mut dice, kind, judged, sum)
                .doing(format!("{}, life {life}", template.name))?;
        }
        Ok(())
    }

    fn live(
        &self,
        model: &mut Model,
        dice: &mut Dice,
        kind: CutKind,
        judged: bool,
        sum: &mut Sum,
    ) -> Outcome<()> {
        let requests = dice.roll(REQUESTS_MAX) as u64;
        let fate = Dice::new(dice.roll(1 << 30) as u64);
        let image = open_qcow2(&self.folder, &self.file.file, true).doing("open it")?;
        self.file.cut_after(requests, fate, kind);
        let mut case = Case {
            image: &image,
            model,
            dice,
            file: &self.file,
        };
        for _ in 0..OPERATIONS_MAX {
            sum.operations += 1;
            if matches!(case.operate()?, Done::Cut) {
                break;
            }
        }
        drop(image);
        match self.file.was_cut() {
            Some(cut) => sum.sectors_lost += cut.lost,
            // What was closed is durable.
            None => {
                sum.closed += 1;
                model.durable(0..SECTORS);
                self.file.cut(dice)?;
            }
        }
        sum.crashes += 1;
        self.file.power_up()?;
        let path = &self.file.back;
        let roots = Roots::new(vec![self.folder.clone()]);
        let found =
            describe::check(&text(path), Format::Qcow2, &roots, &mut |_| true).doing("check it")?;
        hold!(found.errors == 0, "{found:?}");
        sum.leaks += found.leaks;
        let words = by_us(&self.folder, path)?;
        for (sector, word) in words.iter().enumerate() {
            let may = &model.may[sector];
            hold!(
                may.contains(word),
                "sector {sector} is {word:#x}, and may be {may:x?}"
            );
        }
        if judged {
            sum.judged += 1;
            by_qemu(path, &words).doing("QEMU")?;
        }
        sum.forgotten += u64::from(words != model.now);
        let last = model.last;
        *model = Model::of(words);
        model.last = last;
        Ok(())
    }
}

fn crashes(name: &str, kind: CutKind, count: u64) -> Outcome<()> {
    let needs = [Need::Loop, Need::Tool("qemu-img"), Need::Tool("qemu-io")];
    real(name, &needs, |ground| {
        let first = dice::seed()?;
        let began = Instant::now();
        let folder = ground.file("images");
        std::fs::create_dir(&folder)?;
        let templates = templates(&folder)?;
        let back = folder.join("image.back");
        std::fs::write(&back, [0; SECTOR])?;
        let bench = Bench {
            file: FuseFile::over(&back, "image", true)?,
            folder,
            templates,
        };
        let mut sum = Sum::default();
        for seed in first..first + count {
            bench
                .case(seed, kind, &mut sum)
                .doing(format!("NBDTRACK_SEED={seed}"))?;
        }
        tell(&format!(
            "{name}: seeds {first} to {}, {} crashes ({} behind the close) in {:.0} s, {} operations; {} sectors lost, {} crashes lost a write that was acknowledged \
             and not promised; {} clusters lost; QEMU judged {}",
            first + count - 1,
            sum.crashes,
            sum.closed,
            began.elapsed().as_secs_f64(),
            sum.operations,
            sum.sectors_lost,
            sum.forgotten,
            sum.leaks,
            sum.judged,
        ));
        if kind == CutKind::Power {
            hold!(
                sum.sectors_lost > 0 && sum.forgotten > 0,
                "no cut has lost anything, so the run has shown nothing"
            );
        }
        Ok(())
    })
}

#[test]
fn what_an_image_says_to_be_durable_survives_a_power_cut_between_any_two_requests() -> Outcome<()> {
    let count = dice::environment("NBDTRACK_IMAGE_CUTS").unwrap_or(30);
    crashes("power cuts of an image", CutKind::Power, count)
}

#[test]
fn what_an_image_says_to_be_durable_survives_the_end_of_its_writer_between_any_two_requests()
-> Outcome<()> {
    let count = dice::environment("NBDTRACK_IMAGE_KILLS").unwrap_or(10);
    crashes("ends of an image's writer", CutKind::Kill, count)
}
