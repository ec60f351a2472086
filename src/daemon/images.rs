//! Files and images that are made on request, and their exports. One that lies on another file holds it meanwhile, and after a crash too.
//!
//! ```text
//!   on a file: path kept ──> image made, its foundation held ──> exported ──> path forgotten ──> answered
//! ```
//! Whoever deletes a backup asks for the images that may lie on it when the file is locked: one that is being made holds what it lies on, and one that was
//! made has an export or, after a crash, its path.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::backup::shelf::{Making, Shelf};
use super::control::{Asker, Control};
use super::patience::Patience;
use super::works::{Held, Place, ToLoop, refusal_of_file};
use crate::correlation::{
    BackupChange, CreateImage, Definition, ExportName, NewImage, Reply, Request, RequestError,
    Source,
};
use crate::dbus::{Answer, Caller};
use crate::identity::{Format, VolumeId};
use crate::image::beneath::Roots;
use crate::image::create::{self, CreateError, Created};

impl Control {
    pub(super) fn create_image(&mut self, asked: CreateImage, asker: Asker, caller: &Caller) {
        let begun = self.begin_image(&asked);
        let told = match &begun {
            Ok(begun) => format!("{} at {}", asked.name, begun.path),
            Err(error) => format!("refused: {error}"),
        };
        self.trail.note_other("CreateImage", caller, told);
        let begun = match begun {
            Ok(begun) => begun,
            Err(error) => return self.answer(asker, Err(error)),
        };
        let path = begun.path.clone();
        let (to_loop, roots, shelf) = (self.to_loop(), Arc::clone(&self.roots), self.shelf.clone());
        let patience = Patience::new();
        let hangs = format!("{path} is not made, and will not be when it answers: try again then");
        tokio::spawn(async move {
            let work = async {
                let exported = make_image(&to_loop, &shelf, roots, &begun, asked, &patience).await;
                drop(begun);
                exported
            };
            patience.answer(&to_loop, asker, work, hangs).await;
        });
    }

    fn begin_image(&self, asked: &CreateImage) -> Result<BegunImage, RequestError> {
        let invalid = RequestError::InvalidArgument;
        let path = asked
            .place(self.roots.first().as_deref())
            .map_err(invalid)?;
        let volume = VolumeId::of_file(&path, asked.new.format)
            .map_err(|error| invalid(format!("option path: {error}")))?;
        self.rules.permit(&volume).map_err(invalid)?;
        let beneath = asked.new.backing.as_ref().map(|(backing, _)| {
            let beside = path.rsplit_once('/').map_or("", |(folder, _)| folder);
            match backing.starts_with('/') {
                true => backing.clone(),
                false => format!("{beside}/{backing}"),
            }
        });
        if let Some(beneath) = &beneath {
            self.shelf.may_lie_beneath(beneath)?;
        }
        if self.correlation.export(&asked.name).is_some() {
            return Err(RequestError::AlreadyExists(format!(
                "there is an export {} already",
                asked.name
            )));
        }
        let place = self
            .works
            .place([path.as_str()].into_iter().chain(beneath.as_deref()))?;
        let making = beneath.map(|on| Making::begin(&self.shelf, &path, &on));
        Ok(BegunImage {
            making: making.transpose()?,
            path,
            volume,
            _place: place,
        })
    }

    /// Images that were being made on another file when a daemon ended: one that has its export is done after all, and of one that is there without
    /// an export a person is told. One that is not found may lie on a file system that is not mounted yet.
    pub(super) fn see_to_begun_images(&self) {
        let begun = self.shelf.known().backups.begun_images().clone();
        let (_, volumes) = self.correlation.volumes();
        let exported: BTreeSet<&str> = volumes.filter_map(VolumeId::file).collect();
        for path in begun {
            if exported.contains(path.as_str()) {
                let (to_loop, shelf) = (self.to_loop(), self.shelf.clone());
                tokio::spawn(async move {
                    // Else the next daemon does it.
                    let _kept = shelf
                        .keep(&to_loop, vec![BackupChange::EndImage(path)])
                        .await;
                });
                continue;
            }
            let roots = Arc::clone(&self.roots);
            // Nobody waits for it, and a file system that hangs keeps no other look-up waiting.
            let _looked = tokio::task::spawn_blocking(move || {
                if roots.find(&path, Format::Raw).is_ok() {
                    tell_unexported(&path);
                }
            });
        }
    }
}

fn tell_unexported(path: &str) {
    tracing::warn!(
        path,
        "an image was made on another file, and no export has it: export it, or remove it; until then no backup that it lies on is deleted"
    );
}

/// An image that is to be made. What it lies on is deleted by nobody while this is held.
struct BegunImage {
    path: String,
    volume: VolumeId,
    /// Of one that lies on another file.
    making: Option<Making>,
    _place: Place,
}

/// Makes an image, and its export. One that lies on another file is known durably from before it is there until an export has it: else, after a
/// crash, what it lies on could be deleted.
async fn make_image(
    to_loop: &ToLoop,
    shelf: &Shelf,
    roots: Arc<Roots>,
    begun: &BegunImage,
    asked: CreateImage,
    patience: &Patience,
) -> Result<Answer, RequestError> {
    let (path, volume) = (&begun.path, begun.volume.clone());
    // One that an earlier call has left there is not this one's to forget.
    let was_left = shelf.known().backups.begun_images().contains(path);
    if begun.making.is_some() {
        let begins = BackupChange::BeginImage(path.clone());
        shelf.keep(to_loop, vec![begins]).await?;
    }
    let made = make(roots, asked.new, path, patience).await;
    let exported = match &made {
        Ok(_) => match patience.check() {
            Ok(()) => export_made(to_loop, asked.name, volume, path, asked.wait).await,
            Err(error) => Err(error.with(&format!("; the file {path} is made"))),
        },
        Err(unmade) => Err(unmade.error.clone()),
    };
    if begun.making.is_none() {
        return exported;
    }
    let may_be_there = made.map_or_else(|unmade| unmade.may_be_there || was_left, |_| true);
    if exported.is_err() && may_be_there && !to_loop.is_exported(path).await {
        tell_unexported(path);
        let what_to_do =
            "; export it, or remove it: until then no backup that it lies on is deleted";
        return exported.map_err(|error| error.with(what_to_do));
    }
    // One that stays is seen to by the next daemon.
    let ends = BackupChange::EndImage(path.clone());
    let _kept = shelf.keep(to_loop, vec![ends]).await;
    exported
}

/// Why no file was made.
pub(super) struct Unmade {
    pub error: RequestError,
    /// It may be there all the same.
    pub may_be_there: bool,
}

/// Makes a file at the absolute `path`.
pub(super) async fn make(
    roots: Arc<Roots>,
    new: NewImage,
    path: &str,
    patience: &Patience,
) -> Result<Held<Created>, Unmade> {
    let at = path.to_owned();
    let make = move |own: &Patience| create::create(&at, &roots, &new, &|| own.goes_on());
    match patience.in_thread(make).await {
        Ok(Ok(made)) => Ok(Held::new(made)),
        Ok(Err(error)) => Err(Unmade {
            may_be_there: matches!(error, CreateError::Left { .. }),
            error: refusal(error),
        }),
        // The thread broke, wherever it was.
        Err(error) => Err(Unmade {
            error,
            may_be_there: true,
        }),
    }
}

/// Makes an export of a file that was made at `path`; it is stored and served when this is answered.
pub(super) async fn export_made(
    to_loop: &ToLoop,
    name: ExportName,
    volume: VolumeId,
    path: &str,
    wait: Duration,
) -> Result<Answer, RequestError> {
    let definition = Definition {
        name,
        volume,
        read_only: false,
        share: false,
        direct: false,
        source: Source::Dbus,
    };
    match to_loop.ask(Request::AddExport { definition, wait }).await {
        Ok(Reply::Added { name, created }) => Ok(Answer::Added { name, created }),
        Ok(Reply::Done) => Ok(Answer::Done),
        Err(error) => Err(error.with(&format!("; the file {path} is made"))),
    }
}

/// What a caller hears of a file that was not made.
fn refusal(error: CreateError) -> RequestError {
    let text = error.to_string();
    match error {
        CreateError::Exists(_) => RequestError::AlreadyExists(text),
        CreateError::Folder(error) => refusal_of_file(error),
        CreateError::Layout(_)
        | CreateError::NoSize
        | CreateError::NotRaw { .. }
        | CreateError::Backing(_) => RequestError::InvalidArgument(text),
        CreateError::Kernel { .. } | CreateError::Left { .. } => RequestError::Failed(text),
    }
}
