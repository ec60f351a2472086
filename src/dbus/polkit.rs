//! Asks polkit whether a caller may, within bounds of number and time; whatever is no clear yes is a no.
//!
//! ```text
//!   call ──> who calls (the bus, remembered) ──> root, a named user, the group reading ──────────> dispatched
//!                                            └─> anyone else: CheckAuthorization ── yes ─────────> dispatched
//!                                                                                └─ else: refused, and why
//! ```
//!
//! Each call that has to wait is a task of its own; neither the loop nor a caller who needs no polkit waits for one.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::timeout;
use zbus::message::Flags;
use zbus::{Connection, Message, Variant};

use super::access::{Access, Right};
use super::call::{CallPlace, CallPlaces, Calls};
use super::callers::{Callers, KnownCaller};
use super::connect::{CALLER_WITHIN, open};
use super::reply::{Refusal, standard};
use super::{Bus, Caller};
use crate::correlation::RequestError;

/// Calls of callers of whom the bus is being asked who they are; that takes it a millisecond, and at most a second.
const INTRODUCING_MAX: usize = 1_024;
/// Of those, for connections that have none yet, so that root's first call has a place beside all connections of one user. Whose a
/// connection is, is what is being asked; but a bus gives each user 256 of them (dbus-daemon(1), max_connections_per_user).
const INTRODUCING_KEPT: usize = 512;
/// Questions to polkit at one time.
const ASKING_MAX: usize = 64;
/// Of those, of one user, who may have many connections: enough for a person, and six users have to flood before a seventh is
/// told to come again.
const ASKING_OF_USER_MAX: usize = 10;

/// For an answer that needs no person: polkit reads its rules, and starts when it was not there.
const RULES_WITHIN: Duration = Duration::from_secs(5);
/// For a person who types a password.
pub(super) const PERSON_WITHIN: Duration = Duration::from_secs(120);

const POLKIT: &str = "org.freedesktop.PolicyKit1";
const AUTHORITY: &str = "org.freedesktop.PolicyKit1.Authority";
const AUTHORITY_PATH: &str = "/org/freedesktop/PolicyKit1/Authority";

/// polkit's AllowUserInteraction (org.freedesktop.PolicyKit1.Authority, CheckAuthorizationFlags).
const ALLOW_INTERACTION: u32 = 1;

/// Why a call did not reach the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Denial {
    /// A password would let it through, and no one was asked for it: nothing was decided, and whoever can ask calls again.
    PasswordWanted,
    Refused,
}

/// Hears whose call of which method was kept from the loop, and why.
pub type OnDenied = Arc<dyn Fn(&Caller, &str, Denial, &str) + Send + Sync>;

/// Whoever comes through here may call.
pub struct Gate {
    access: Access,
    denied: OnDenied,
    /// Where polkit is asked.
    bus: Bus,
    /// [`INTRODUCING_MAX`], half for one connection, and [`INTRODUCING_KEPT`]; when used up, `NotReady`.
    introducing: Arc<CallPlaces>,
    /// [`ASKING_MAX`], by user; when used up, `NotReady`.
    asking: Arc<CallPlaces>,
}

/// The place of a call that has to wait.
pub enum Admitted {
    /// Of one whom the bus has introduced already: to ask polkit.
    Known {
        known: KnownCaller,
        place: CallPlace,
    },
    /// To ask the bus who calls.
    Unknown(CallPlace),
}

impl Gate {
    pub fn new(bus: &Bus, access: Access, denied: OnDenied) -> Gate {
        Gate {
            access,
            denied,
            bus: bus.clone(),
            introducing: CallPlaces::keeping(
                INTRODUCING_MAX,
                INTRODUCING_MAX / 2,
                INTRODUCING_KEPT,
            ),
            asking: CallPlaces::new(ASKING_MAX, ASKING_OF_USER_MAX),
        }
    }

    /// Whether a caller who is known already needs no polkit.
    pub fn lets(
        &self,
        callers: &Callers,
        link: &Connection,
        message: &Message,
        right: Right,
    ) -> bool {
        let known = callers.at_hand(link, message);
        known.is_some_and(|known| self.access.lets(&known, right))
    }

    /// Takes the place that [`Gate::permit`] begins with: of one whom the bus has introduced, by its user, else by its connection.
    pub fn admit(
        &self,
        (callers, calls): (&Callers, &Calls),
        link: &Connection,
        message: &Message,
    ) -> Result<Admitted, Refusal> {
        let busy = || Refusal::from(calls.busy());
        if let Some(known) = callers.at_hand(link, message)
            && let Some(uid) = known.caller.uid
        {
            let place = self.asking.take(&uid.to_string()).ok_or_else(busy)?;
            return Ok(Admitted::Known { known, place });
        }
        let header = message.header();
        let sender = header.sender().map_or("", |sender| sender.as_str());
        let place = self.introducing.take(sender).ok_or_else(busy)?;
        Ok(Admitted::Unknown(place))
    }

    /// Finds out whether the sender of `message` may; takes at most [`CALLER_WITHIN`] and [`RULES_WITHIN`], or
    /// [`PERSON_WITHIN`] when the caller says that it waits for a person.
    ///
    /// # Errors
    /// `NotReady` when too many are asked of polkit already; the standard `InteractiveAuthorizationRequired` when a password would
    /// do and no one was asked for it; else `NotAuthorized`, with polkit's answer or why there is none.
    pub async fn permit(
        &self,
        (callers, calls): (&Callers, &Calls),
        link: &Connection,
        message: &Message,
        right: Right,
        admitted: Admitted,
    ) -> Result<(), Refusal> {
        let (known, place) = match admitted {
            Admitted::Known { known, place } => (known, Some(place)),
            Admitted::Unknown(place) => {
                let known = callers.of(link, message).await;
                drop(place);
                (known, None)
            }
        };
        if self.access.lets(&known, right) {
            return Ok(());
        }
        let header = message.header();
        let method = header.member().map_or("", |member| member.as_str());
        let Some(uid) = known.caller.uid else {
            let text = format!(
                "the bus did not say within {} s who calls",
                CALLER_WITHIN.as_secs()
            );
            (self.denied)(&known.caller, method, Denial::Refused, &text);
            return Err(RequestError::NotAuthorized(text).into());
        };
        let _place = place
            .or_else(|| self.asking.take(&uid.to_string()))
            .ok_or_else(|| Refusal::from(calls.busy()))?;
        let flags = header.primary().flags();
        let question = Question {
            caller: &known.caller.name,
            method,
            action: right.action(),
            interactive: flags.contains(Flags::ALLOW_INTERACTIVE_AUTH),
        };
        let answer = question.ask(&self.bus).await;
        let allowed = answer.is_ok();
        let Question { method, action, .. } = question;
        tracing::debug!(method, uid, action, allowed, "asked of polkit");
        answer.map_err(|(denial, refusal)| {
            (self.denied)(&known.caller, method, denial, &refusal.text);
            refusal
        })
    }
}

/// One CheckAuthorization.
struct Question<'a> {
    /// Its unique name, by which polkit asks the bus itself.
    caller: &'a str,
    method: &'a str,
    action: &'static str,
    interactive: bool,
}

impl Question<'_> {
    async fn ask(&self, bus: &Bus) -> Result<(), (Denial, Refusal)> {
        let within = match self.interactive {
            true => PERSON_WITHIN,
            false => RULES_WITHIN,
        };
        let no = |text: String| {
            let refusal = RequestError::NotAuthorized(text).into();
            Err((Denial::Refused, refusal))
        };
        let (method, action) = (self.method, self.action);
        let (authorized, challenge, details) = match timeout(within, self.check(bus, within)).await
        {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return no(format!("{method}: polkit cannot be asked: {error}")),
            Err(_) => {
                let seconds = within.as_secs();
                return no(format!(
                    "{method}: polkit did not answer within {seconds} s ({action})"
                ));
            }
        };
        if authorized {
            return Ok(());
        }
        let dismissed = details.contains_key("polkit.dismissed");
        if challenge && !dismissed {
            // D-Bus Specification, "Message Format", ALLOW_INTERACTIVE_AUTHORIZATION: the error that asks for the flag. With the flag it
            // says, as systemd's does, that no one was asked: who can asks now, and calls again.
            let what = match self.interactive {
                true => "the caller has no authentication agent that asks for it",
                false => "the call does not allow to ask for one",
            };
            let text = format!("{method}: polkit wants a password for {action}, and {what}");
            let refusal = standard("InteractiveAuthorizationRequired", text);
            return Err((Denial::PasswordWanted, refusal));
        }
        no(match dismissed {
            true => format!("{method}: no password was given for {action}"),
            false => format!("{method}: polkit does not let this user do {action}"),
        })
    }

    /// On a connection of its own, for two reasons: a person takes longer than the daemon's other peers may, and when it ends, in
    /// whatever way, polkit takes the question back from the person.
    async fn check(&self, bus: &Bus, within: Duration) -> zbus::Result<Checked> {
        // Past the deadline of the whole, which has its own words.
        let link = open(bus, within * 2).await?;
        let name = BTreeMap::from([("name", Variant::new(self.caller))]);
        // Rules see it by action.lookup("method").
        let details = BTreeMap::from([("method", self.method)]);
        let flags = if self.interactive {
            ALLOW_INTERACTION
        } else {
            0
        };
        let body = (("system-bus-name", name), self.action, details, flags, "");
        let answer = link.call_method(
            Some(POLKIT),
            AUTHORITY_PATH,
            Some(AUTHORITY),
            "CheckAuthorization",
            &body,
        );
        answer.await?.body().deserialize()
    }
}

/// is_authorized, is_challenge, details.
type Checked = (bool, bool, BTreeMap<String, String>);
