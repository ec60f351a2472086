//! A thread for long work that nobody waits for at each step: it reads ten thousand files, or rows. Whoever is woken meanwhile has the
//! processor before it.

use std::io;

use tokio::sync::mpsc::{self, OwnedPermit};

/// Steps of nice(2): a tenth of the weight of the others, so that a thread that wakes up beside it need not wait for the end of its
/// turn, and some of the processor where the others never rest.
const NICER: i32 = 10;

type Work = Box<dyn FnOnce() + Send>;

/// Does one piece of work after the other; ends when this is dropped, after what it has in hand. A thread of its own, since the blocking
/// pool's would keep the low weight, which nobody can raise without a right to it. And the same one for all of it, so that what is
/// made by one piece of work and dropped by the next lies in one heap.
pub(super) struct Aside(mpsc::Sender<Work>);

/// Room for one piece of work, kept for who has this.
pub(super) struct Place(OwnedPermit<Work>);

impl Place {
    /// Has it done; never waits.
    pub fn take(self, work: impl FnOnce() + Send + 'static) {
        self.0.send(Box::new(work));
    }
}

/// The thread has ended, or has something to do already.
#[derive(Debug, thiserror::Error)]
#[error(
    "the thread for it has ended, which is a fault of this program, or has something else to do"
)]
pub(super) struct Busy;

impl Aside {
    /// # Errors
    /// The kernel has no thread to give.
    pub fn start(name: &str) -> io::Result<Aside> {
        // One that waits: who asks for it does so when the one before has answered, and that is just before it ends.
        let (sender, mut works) = mpsc::channel::<Work>(1);
        let thread = std::thread::Builder::new().name(name.to_owned());
        thread.spawn(move || {
            weigh_little();
            while let Some(work) = works.blocking_recv() {
                work();
            }
        })?;
        Ok(Aside(sender))
    }

    /// Room for one piece of work; never waits. Asked for before anything is given to the work that would go with it.
    ///
    /// # Errors
    /// [`Busy`].
    pub fn place(&self) -> Result<Place, Busy> {
        let place = self.0.clone().try_reserve_owned();
        place.map(Place).map_err(|_| Busy)
    }
}

/// Of the calling thread, for as long as it lives. Where the service's filter of system calls refuses it, the unit's `Nice=` has put
/// the first thread above this one.
pub(super) fn weigh_little() {
    // On Linux the calling thread's alone: nice(2), "C library/kernel differences".
    if let Err(error) = rustix::process::nice(NICER) {
        tracing::debug!(%error, "the weight of a thread for long work stays as it is");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn its_works_have_one_thread_of_low_weight_and_others_keep_theirs() {
        let before = weight();
        let aside = Aside::start("test").unwrap();
        let (told, heard) = std::sync::mpsc::channel();
        let ids: Vec<_> = (0..2)
            .map(|_| {
                let told = told.clone();
                let work = move || told.send((std::thread::current().id(), weight())).unwrap();
                aside.place().unwrap().take(work);
                heard.recv().unwrap()
            })
            .collect();
        assert_eq!(ids[0], ids[1]);
        assert_eq!(ids[0].1, (before + NICER).min(19));
        assert_eq!(weight(), before);
    }

    #[test]
    fn it_has_one_work_in_hand_and_one_that_waits_and_refuses_more() {
        let aside = Aside::start("test").unwrap();
        let (begun, begins) = std::sync::mpsc::channel();
        let (go, goes) = std::sync::mpsc::channel::<()>();
        let first = move || {
            begun.send(()).unwrap();
            let _dropped = goes.recv();
        };
        aside.place().unwrap().take(first);
        begins.recv().unwrap();
        aside.place().unwrap().take(|| {});
        assert!(aside.place().is_err());
        drop(go);
    }

    fn weight() -> i32 {
        rustix::process::getpriority_process(None).unwrap()
    }
}
