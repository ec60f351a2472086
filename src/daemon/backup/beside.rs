//! The images that may lie on backups that are to be deleted: those of the same mounts are asked for as long as it takes, those of others for as
//! long as their mounts answer.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::correlation::{Backup, RequestError};
use crate::daemon::control::Control;
use crate::daemon::patience::Patience;
use crate::files;
use crate::identity::{Format, Identity, VolumeId};

/// For one image of another mount: a server that is gone would hold every deletion up.
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// Paths of images that are exported or were begun.
#[derive(Debug, Default)]
pub(in crate::daemon) struct Images {
    /// On the mounts of the backups.
    pub beside: Vec<String>,
    /// By their mounts.
    pub elsewhere: BTreeMap<PathBuf, Vec<String>>,
}

impl Control {
    /// All that are none of these backups.
    pub(in crate::daemon) fn images_beside(&self, backups: &[Backup]) -> Images {
        let mounts = files::mounts();
        let on: BTreeSet<PathBuf> = backups.iter().map(|b| mounts.of(&b.path)).collect();
        let known = self.shelf.known();
        let begun = known.backups.begun_images().iter();
        let begun = begun.map(|path| (path.as_str(), true));
        let (_, volumes) = self.correlation.volumes();
        let exported = volumes.filter_map(|volume| Some((volume.file()?, is_image(volume))));
        let mut images = Images::default();
        for (path, is_image) in exported.chain(begun) {
            if backups.iter().any(|backup| backup.path == path) {
                continue;
            }
            let mount = mounts.of(path);
            if on.contains(&mount) {
                images.beside.push(path.to_owned());
            } else if is_image {
                // What clients write to a file that is exported raw may look like an image that cannot be read, for deletions anywhere.
                let there = images.elsewhere.entry(mount).or_default();
                there.push(path.to_owned());
            }
        }
        images
    }
}

fn is_image(volume: &VolumeId) -> bool {
    let candidates = volume.candidates();
    let mut formats = candidates.iter().filter_map(Identity::format);
    formats.any(|format| format == Format::Qcow2)
}

/// Whose turn it is to ask the images of a mount: so that one that hangs keeps one thread, however many deletions there are. As many as there are mounts.
#[derive(Default)]
pub(in crate::daemon) struct Turns(Mutex<BTreeMap<PathBuf, Arc<tokio::sync::Mutex<()>>>>);

impl Turns {
    fn of(&self, mount: &Path) -> Arc<tokio::sync::Mutex<()>> {
        // A change under the lock is whole, so a poisoned lock is still good.
        let mut turns = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        Arc::clone(turns.entry(mount.to_owned()).or_default())
    }
}

/// Asks `look` of the images of each mount, in a thread: the first that lies on something. A mount that does not answer is told in the log, and what lies
/// there is not known.
///
/// # Errors
/// What `look` says; or nobody waits any more.
pub(in crate::daemon) async fn first_elsewhere<T, Look>(
    turns: &Turns,
    elsewhere: BTreeMap<PathBuf, Vec<String>>,
    patience: &Patience,
    look: Look,
) -> Result<Option<T>, RequestError>
where
    T: Send + 'static,
    Look: Fn(&[String], &dyn Fn() -> bool) -> Result<Option<T>, RequestError>,
    Look: Clone + Send + 'static,
{
    for (mount, images) in elsewhere {
        patience.check()?;
        let unasked = |images: usize| {
            let mount = mount.display();
            tracing::warn!(%mount, images, "the file system does not answer: whether an image there lies on a backup that is deleted is not known");
        };
        let number = images.len();
        let turn = turns.of(&mount).lock_owned();
        let Ok(turn) = tokio::time::timeout(ANSWERS_WITHIN, turn).await else {
            unasked(number);
            continue;
        };
        let own = Patience::with(ANSWERS_WITHIN);
        let (look, callers) = (look.clone(), patience.clone());
        let asked = own.in_thread(move |own| {
            let _turn = turn;
            look(&images, &|| own.goes_on() && callers.goes_on())
        });
        tokio::select! {
            biased;
            found = asked => if let Some(found) = found?? {
                return Ok(Some(found));
            },
            () = own.over() => unasked(number),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::{Receiver, channel};

    fn images(of: &[(&str, &[&str])]) -> BTreeMap<PathBuf, Vec<String>> {
        let each = of.iter().map(|(mount, images)| {
            let images = images.iter().map(|image| (*image).to_owned());
            (PathBuf::from(mount), images.collect())
        });
        each.collect()
    }

    /// A look at the images of a mount that hangs, until it is let go.
    fn hangs(
        held: &Arc<Mutex<Receiver<()>>>,
    ) -> impl Fn(&[String], &dyn Fn() -> bool) -> Result<Option<String>, RequestError>
    + Clone
    + Send
    + 'static
    + use<> {
        let held = Arc::clone(held);
        move |images, goes_on| {
            if images[0].starts_with("/hangs") {
                let limit = Duration::from_secs(60);
                let _ = held.lock().unwrap().recv_timeout(limit);
            }
            let found = images.iter().find(|image| image.ends_with("on it"));
            Ok(found.filter(|_| goes_on()).cloned())
        }
    }

    /// Those of other mounts were not asked at all: a backup was deleted under an exported image that had it as its backing file and was not open just then.
    #[tokio::test]
    async fn images_of_other_mounts_are_asked_and_one_that_hangs_holds_up_no_deletion() {
        let (let_go, held) = channel();
        let held = Arc::new(Mutex::new(held));
        let turns = Turns::default();
        let patience = Patience::new();
        let elsewhere = || images(&[("/hangs", &["/hangs/a"]), ("/other", &["/other/on it"])]);
        for _ in 0..2 {
            let found = first_elsewhere(&turns, elsewhere(), &patience, hangs(&held));
            assert_eq!(found.await, Ok(Some("/other/on it".to_owned())));
        }
        // One thread is in it, and the next deletion that wants to know has to wait for that one.
        let _gone = let_go.send(());
        let there = images(&[("/hangs", &["/hangs/on it"])]);
        let _gone = let_go.send(());
        let found = first_elsewhere(&turns, there, &patience, hangs(&held));
        assert_eq!(found.await, Ok(Some("/hangs/on it".to_owned())));
    }
}
