//! A QCOW2 image of any bytes, alone or on another file of any bytes: described and checked, opened as the daemon opens one, read, written, and given up.

use std::path::{Path, PathBuf};
use std::time::Duration;

use nbdtrack::correlation::{DeviceNode, DeviceNumber, ExportName, OpenDisk, Ticket};
use nbdtrack::identity::{Format, Identity};
use nbdtrack::image::beneath::Roots;
use nbdtrack::image::block::Claims;
use nbdtrack::image::{Durability, Extent, Image, Span, ZeroFlags, describe, qcow2};

const TWO: u8 = 0x10;

/// The first byte says what is done; the rest is the file. With `TWO` in it the next two are the length of the file, and behind it is one that it can
/// lie on, called `base`.
pub fn run(data: &[u8]) {
    let Some((&what, mut file)) = data.split_first() else {
        return;
    };
    let mut base = None;
    if what & TWO != 0
        && let Some((length, both)) = file.split_first_chunk::<2>()
    {
        let length = usize::from(u16::from_be_bytes(*length)).min(both.len());
        let (top, below) = both.split_at(length);
        (file, base) = (top, Some(below));
    }
    let Some(place) = Place::with(file, base) else {
        return;
    };
    let Some(order) = order(&place, what & 1 != 0) else {
        return;
    };
    look(&place);
    let image = match qcow2::open(&order, &place.roots(), &Claims::default()) {
        Ok(image) => image,
        Err(refused) => {
            assert!(!refused.to_string().is_empty());
            return;
        }
    };
    let size = image.size();
    assert!(size > 0 && size.is_multiple_of(512));
    let mut bytes = vec![0; 70_000];
    for offset in [0, size / 2, size.saturating_sub(70_000)] {
        let len = (size - offset).min(70_000);
        let at = Extent::checked(offset, u32::try_from(len).unwrap_or(1), size)
            .expect("it lies in the image");
        let part = &mut bytes[..at.len() as usize];
        // Damage is an error, and not more than that.
        let _ = image.read(at, part);
        let _ = image.read_nowait(at, part);
        let span = Span::checked(offset, len, size).expect("it lies in the image");
        if let Ok(found) = image.allocation(span, 16) {
            let sum: u64 = found.iter().map(|found| found.bytes).sum();
            assert!(sum > 0 && sum <= len);
        }
        if let Ok(found) = image.depths(span, 16) {
            let sum: u64 = found.iter().map(|found| found.bytes).sum();
            assert!(sum > 0 && sum <= len);
            // The image, and what is beneath it.
            assert!(found.iter().all(|found| found.layer <= 2));
        }
        if order.write {
            let _ = image.write(
                at,
                &bytes[..at.len() as usize],
                Durability::of_fua(what & 2 != 0),
            );
            let flags = ZeroFlags {
                no_hole: what & 4 != 0,
                fast: false,
                fua: what & 8 != 0,
            };
            let _ = image.zero(at, flags);
            let _ = image.discard(at, Durability::ByFlush);
            let _ = image.flush();
        }
    }
}

/// As those who make backups and those who only ask.
fn look(place: &Place) {
    let (path, roots) = (place.image(), place.roots());
    let Some(path) = path.to_str() else { return };
    let mut last = 0.0;
    let found = describe::check(path, Format::Qcow2, &roots, &mut |share| {
        assert!((last..=1.0).contains(&share), "{share} after {last}");
        last = share;
        true
    });
    if let Ok(found) = found {
        assert!(found.told.len() as u64 <= found.errors);
        assert!(found.leaks <= found.clusters);
    }
    if let Ok((layers, broken)) = describe::chain(path, Format::Qcow2, &roots) {
        assert!(!layers.is_empty());
        assert!(broken.is_none_or(|broken| !broken.to_string().is_empty()));
    }
}

/// A folder with one image, gone when it is dropped.
struct Place(PathBuf);

impl Place {
    fn with(file: &[u8], below: Option<&[u8]>) -> Option<Place> {
        // In memory, where there is such a place: a flush of a disk takes longer than all else here.
        let memory = Path::new("/dev/shm");
        let system = std::env::temp_dir();
        let base = if memory.is_dir() { memory } else { &system };
        let folder = base.join(format!("nbdtrack-fuzz-qcow2-{}", std::process::id()));
        std::fs::create_dir_all(&folder).ok()?;
        let place = Place(folder);
        std::fs::write(place.image(), file).ok()?;
        if let Some(below) = below {
            std::fs::write(place.0.join("base"), below).ok()?;
        }
        Some(place)
    }

    fn image(&self) -> PathBuf {
        self.0.join("image")
    }

    fn roots(&self) -> Roots {
        Roots::new(vec![self.0.clone()])
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // The system's folder for such things is cleaned up some time.
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn order(place: &Place, write: bool) -> Option<OpenDisk> {
    let path = place.image();
    let path = path.to_str()?;
    Some(OpenDisk {
        ticket: Ticket(1),
        export: ExportName::parse("a").ok()?,
        node: DeviceNode(path.to_owned()),
        number: DeviceNumber::of_file(1),
        diskseq: place.roots().find(path, Format::Qcow2).ok()?.incarnation,
        identity: Identity::new(Format::Qcow2.scheme(), path),
        write,
        direct: false,
        within: Duration::from_secs(10),
    })
}
