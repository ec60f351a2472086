//! The client's side of jobs: how far the call is that this connection waits for.

use std::collections::BTreeMap;

use futures_util::StreamExt;
use zbus::message::Type;
use zbus::{MatchRule, Message, MessageStream, OwnedObjectPath, Variant};

use super::client::{Client, ClientError, Properties, failure};
use super::introspect::{OBJECT_MANAGER, PROPERTIES};
use super::job::JOB;
use super::{BUS_NAME, paths};

/// The newest job of this connection, as the daemon tells of it.
#[derive(Debug)]
pub struct Jobs {
    added: MessageStream,
    changed: MessageStream,
    /// This connection's name on the bus, by which a job names its caller.
    own: String,
    /// `None` until there is one.
    job: Option<OwnedObjectPath>,
}

impl Client {
    /// Listens from now on to what is told of the calls that this client makes. Whom the bus does not let hear signals hears nothing.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn jobs(&self) -> Result<Jobs, ClientError> {
        let signals = |interface, member| {
            let rule = MatchRule::builder().msg_type(Type::Signal);
            rule.sender(BUS_NAME).interface(interface).member(member)
        };
        let added = signals(OBJECT_MANAGER.name, "InterfacesAdded").path(paths::ROOT);
        let changed = signals(PROPERTIES.name, "PropertiesChanged").path_namespace(paths::JOBS);
        let own = self.connection.unique_name();
        Ok(Jobs {
            added: self.hear(added.build()).await?,
            changed: self.hear(changed.build()).await?,
            own: own.map(ToString::to_string).unwrap_or_default(),
            job: None,
        })
    }

    async fn hear(&self, rule: zbus::Result<MatchRule<'_>>) -> Result<MessageStream, ClientError> {
        let rule = rule.map_err(failure)?;
        let stream = MessageStream::for_match_rule(rule, &self.connection, None);
        stream.await.map_err(failure)
    }
}

impl Jobs {
    /// Waits for news of the newest job of this connection, and gives how many clients are left; `None` when the bus went away.
    pub async fn clients_left(&mut self) -> Option<u32> {
        loop {
            let told = tokio::select! {
                // A job is told of before its changes.
                biased;
                message = self.added.next() => self.begun(&message?.ok()?),
                message = self.changed.next() => self.moved(&message?.ok()?),
            };
            if told.is_some() {
                return told;
            }
        }
    }

    fn begun(&mut self, message: &Message) -> Option<u32> {
        let (path, mut interfaces): (OwnedObjectPath, BTreeMap<String, Properties>) =
            message.body().deserialize().ok()?;
        let job = interfaces.remove(JOB.name)?;
        match &**job.get("Caller")? {
            Variant::Str(name) if name.as_str() == self.own => self.job = Some(path),
            _ => return None,
        }
        clients(&job)
    }

    fn moved(&self, message: &Message) -> Option<u32> {
        let header = message.header();
        if header.path()?.as_str() != self.job.as_ref()?.as_str() {
            return None;
        }
        let (_, properties, _): (String, Properties, Vec<String>) =
            message.body().deserialize().ok()?;
        clients(&properties)
    }
}

fn clients(properties: &Properties) -> Option<u32> {
    match &**properties.get("Clients")? {
        Variant::U32(clients) => Some(*clients),
        _ => None,
    }
}
