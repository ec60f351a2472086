//! Every object with all its properties, as `GetManagedObjects` gives them. PURE.

use std::collections::BTreeMap;
use std::sync::Arc;

use zbus::{Message, ObjectPath, Variant};

use super::reply::{Response, response};
use super::signals::by_name;
use super::tree::Object;

/// Builds the answer; some 10 ms of work for each 1,000 objects.
pub fn managed(message: &Message, objects: &[(ObjectPath<'static>, Arc<Object>)]) -> Response {
    let properties: Vec<_> = objects
        .iter()
        .map(|(_, object)| object.properties())
        .collect();
    let by_path: BTreeMap<&str, BTreeMap<&str, BTreeMap<&str, &Variant<'_>>>> = objects
        .iter()
        .zip(&properties)
        .map(|((path, object), properties)| {
            let interfaces = BTreeMap::from([(object.interface(), by_name(properties))]);
            (path.as_str(), interfaces)
        })
        .collect();
    let managed: BTreeMap<ObjectPath<'_>, _> = by_path
        .into_iter()
        .map(|(path, interfaces)| (ObjectPath::from_str_unchecked(path), interfaces))
        .collect();
    response(message, &managed)
}
