//! The client's side of the members about files that are made.

use std::time::Duration;

use zbus::{OwnedObjectPath, Variant};

use super::call::MAKING;
use super::client::{Client, ClientError, Options, limit, read};
use super::images::CREATE_IMAGE;
use super::manager::WAIT_MS;
use crate::correlation::NewImage;

impl Client {
    /// Has a file made at the absolute `path` and exported; returns the export's object.
    ///
    /// # Errors
    /// As every call of the client: [`ClientError`].
    pub async fn create_image(
        &self,
        name: &str,
        path: &str,
        new: &NewImage,
        wait: Option<Duration>,
    ) -> Result<String, ClientError> {
        let mut options = Options::from([
            ("path", Variant::new(path)),
            ("format", Variant::new(new.format.name())),
            ("preallocation", Variant::new(new.preallocation.name())),
        ]);
        if let Some(bytes) = new.cluster_bytes {
            options.insert("cluster_size", Variant::new(u64::from(bytes)));
        }
        if let Some((path, format)) = &new.backing {
            options.insert("backing", Variant::new(path.as_str()));
            options.insert("backing_format", Variant::new(format.name()));
        }
        let within = limit(&mut options, "wait_ms", wait, WAIT_MS) + MAKING;
        let body = (name, new.size.unwrap_or(0), options);
        let answer = self.manager(CREATE_IMAGE.name, &body, within).await?;
        let path: OwnedObjectPath = read(&answer)?;
        Ok(path.to_string())
    }
}
