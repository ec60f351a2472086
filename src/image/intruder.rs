//! Who is in a file that this process has open, though it should not be: one whom its locks were to keep out, or a loop device, which
//! asks for none. EDGE: reads locks and sysfs.

use std::time::{Duration, Instant};

use super::claim::Claims;
use super::lock::{Use, in_the_way};
use super::medium::Medium;
use super::users;
use crate::correlation::DiskSeq;

/// Looks at the locks of a file that is open, and how long they are apart: who finds it taken is gone again within less.
const LOCK_LOOKS: usize = 4;
const LOCK_LOOKS_APART: Duration = Duration::from_millis(150);

impl Claims {
    /// Who is in a file that this process has open, in words. `None` when it has no such
    /// file, or nobody is. Blocks as its file system does, and for half a second where someone is in the way.
    pub fn intruder(&self, file: DiskSeq) -> Option<String> {
        let place = self.known(file)?;
        for turn in 0..LOCK_LOOKS {
            let claim = place.look_at(Instant::now() + LOCK_LOOKS_APART * u32::from(turn > 0))?;
            if claim.medium != Medium::File {
                return None;
            }
            let held = if claim.is_held_for_writing() {
                Use::Write
            } else {
                Use::Read
            };
            let lost = in_the_way(claim.held(), held).map(|by| format!("its lock was lost: {by}"));
            // Who only reads is not harmed by what a device writes.
            let device = || users::writing_loop_of(claim.held());
            let by = lost.or_else(|| (held == Use::Write).then(device).flatten())?;
            if turn + 1 == LOCK_LOOKS {
                return Some(by);
            }
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::correlation::{DeviceNode, DeviceNumber, ExportName, OpenDisk, Ticket};
    use crate::identity::{Format, Identity};
    use crate::image::beneath::Roots;
    use crate::image::raw;
    use std::os::fd::AsRawFd;
    use std::sync::mpsc::{RecvTimeoutError, channel};

    /// Whoever looked was the last to have the file open: it was told to be closed before it was, and so was what lies above it.
    #[test]
    fn a_file_is_closed_when_its_last_image_is_gone_though_somebody_looks_at_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a");
        std::fs::write(&path, [0; 4096]).unwrap();
        let roots = Roots::new(vec![folder.path().to_owned()]);
        let text = path.to_str().unwrap();
        let file = roots.find(text, Format::Raw).unwrap().incarnation;
        let order = OpenDisk {
            ticket: Ticket(1),
            export: ExportName::parse("a").unwrap(),
            node: DeviceNode(text.to_owned()),
            number: DeviceNumber::of_file(1),
            diskseq: file,
            identity: Identity::new(Format::Raw.scheme(), text),
            write: true,
            direct: false,
            within: Duration::from_secs(10),
        };
        let claims = Claims::default();
        let image = raw::open(&order, &roots, &claims).unwrap();
        assert_eq!(claims.intruder(file), None);
        let place = claims.known(file).unwrap();
        let look = place.look_at(Instant::now()).unwrap();
        let held = format!("/proc/self/fd/{}", look.held().as_raw_fd());
        assert_eq!(std::fs::read_link(&held).unwrap(), path);
        let (tell, told) = channel();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                drop(image);
                let is_open = std::fs::read_link(&held).is_ok_and(|it| it == path);
                tell.send(is_open).unwrap();
            });
            let early = told.recv_timeout(Duration::from_millis(200));
            assert_eq!(early, Err(RecvTimeoutError::Timeout), "somebody looks");
            assert!(place.look_at(Instant::now()).is_none(), "nobody comes");
            drop(look);
            let is_open = told.recv_timeout(Duration::from_secs(20)).unwrap();
            assert!(!is_open, "told before it was closed");
        });
    }
}
