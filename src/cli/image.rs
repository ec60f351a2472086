//! `image`: makes images and looks at them. Needs no daemon, and asks none: files are opened by whoever calls.

use std::path::Path;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::Failure;
use super::lasting;
use super::progress::ProgressLine;
use super::show::{print, print_json};
use super::table::{TableStyle, lay_out, size as shown};
use crate::correlation::{NewImage, Preallocation};
use crate::dbus::client::{Client, ClientError};
use crate::identity::Format;
use crate::image::beneath::Roots;
use crate::image::create;
use crate::image::describe::{self, Content, Described};
use crate::image::qcow2::check::Findings;
use crate::image::qcow2::header::Compression;

#[derive(Debug, Args)]
pub struct Asked {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make an image: whole or not at all, and never over a file that is there
    Create(Create),
    /// Tell what an image is, and whether it would be served
    Info(At),
    /// Look for errors and leaked clusters, as qemu-img check does; changes nothing
    Check(At),
    /// List an image and all that lies beneath it
    Chain(At),
}

#[derive(Debug, Args)]
struct At {
    /// The file
    path: String,
    /// How it is read [default: qcow2 for a name that ends in .qcow2, else raw]
    #[arg(long, value_name = "FORMAT", value_parser = ["raw", "qcow2"])]
    format: Option<String>,
}

#[derive(Debug, Args)]
struct Create {
    /// The file to make; its folder is there
    path: String,
    /// Virtual size in bytes, or with K, M, G, T or P for powers of 1024; not needed on a backing file
    #[arg(value_name = "SIZE", value_parser = bytes, required_unless_present = "backing")]
    size: Option<u64>,
    /// raw or qcow2 [default: qcow2 for a name that ends in .qcow2; else it has to be said]
    #[arg(long, value_name = "FORMAT", value_parser = ["raw", "qcow2"])]
    format: Option<String>,
    /// Bytes of a cluster, from 512 to 2M [default: 64K]
    #[arg(long, value_name = "SIZE", value_parser = bytes)]
    cluster_size: Option<u64>,
    /// The file that the image lies on: absolute, or beside the image
    #[arg(long, value_name = "PATH", requires = "backing_format")]
    backing: Option<String>,
    /// How the backing file is read
    #[arg(long, value_name = "FORMAT", value_parser = ["raw", "qcow2"], requires = "backing")]
    backing_format: Option<String>,
    /// What is there before anything is written
    #[arg(long, value_name = "MODE", value_parser = ["off", "metadata", "falloc", "full"], default_value = "off")]
    preallocation: String,
    /// Have the daemon make it, beneath one of its file_roots, and export it under this name
    #[arg(long, value_name = "NAME")]
    export: Option<String>,
    /// How long to wait until it serves [default: 10]
    #[arg(long, value_name = "SECONDS", value_parser = super::seconds, requires = "export")]
    wait: Option<Duration>,
}

impl Asked {
    /// Whether a daemon is to do it.
    pub fn needs_daemon(&self) -> bool {
        matches!(&self.command, Command::Create(asked) if asked.export.is_some())
    }
}

pub fn image(asked: &Asked, as_json: bool) -> Result<(), Failure> {
    match &asked.command {
        Command::Create(asked) => create(asked, as_json),
        Command::Info(at) => info(at, as_json),
        Command::Check(at) => check(at, as_json),
        Command::Chain(at) => chain(at, as_json),
    }
}

/// Any file: the one who calls may open what the kernel lets it.
fn everything() -> Roots {
    Roots::new(vec!["/".into()])
}

/// The absolute path without links of a file, or of one that is to be made in a folder.
fn absolute(path: &str, made: bool) -> Result<String, Failure> {
    let asked = Path::new(path);
    let told = |error: std::io::Error| Failure::Image(format!("{path}: {error}"));
    let found = match (made, asked.file_name()) {
        (true, Some(name)) => {
            let folder = asked
                .parent()
                .filter(|folder| !folder.as_os_str().is_empty());
            let folder = folder.unwrap_or(Path::new("."));
            folder.canonicalize().map_err(told)?.join(name)
        }
        (true, None) => return Err(Failure::Argument(format!("{path}: names no file"))),
        (false, _) => asked.canonicalize().map_err(told)?,
    };
    let text = found.into_os_string().into_string();
    text.map_err(|_| Failure::Argument(format!("{path}: its name is not UTF-8")))
}

/// How a file is read that no one said it of, by the end of its name.
fn by_name(path: &str) -> Option<Format> {
    let image = path.to_ascii_lowercase().ends_with(".qcow2");
    image.then_some(Format::Qcow2)
}

fn said(format: Option<&str>) -> Result<Option<Format>, Failure> {
    let told = |format| Format::told("", Some(format)).map_err(Failure::Argument);
    format.map(told).transpose()
}

impl At {
    fn place(&self) -> Result<(String, Format), Failure> {
        let format = said(self.format.as_deref())?.or(by_name(&self.path));
        Ok((absolute(&self.path, false)?, format.unwrap_or_default()))
    }
}

fn wanted(asked: &Create) -> Result<NewImage, Failure> {
    let format = said(asked.format.as_deref())?.or(by_name(&asked.path));
    let format = format.ok_or_else(|| {
        Failure::Argument(format!(
            "{}: say --format raw or --format qcow2",
            asked.path
        ))
    })?;
    let cluster = asked.cluster_size.map(u32::try_from).transpose();
    let backing = said(asked.backing_format.as_deref())?;
    Ok(NewImage {
        format,
        size: asked.size,
        cluster_bytes: cluster
            .map_err(|_| Failure::Argument("--cluster-size: at most 2M".to_owned()))?,
        backing: asked.backing.clone().zip(backing),
        preallocation: Preallocation::parse(&asked.preallocation).unwrap_or_default(),
    })
}

fn create(asked: &Create, as_json: bool) -> Result<(), Failure> {
    let new = wanted(asked)?;
    let path = absolute(&asked.path, true)?;
    let size = create::create(&path, &everything(), &new, &|| true)
        .map_err(|error| Failure::Image(error.to_string()))?
        .size;
    if as_json {
        let made = json!({"path": path, "format": new.format.name(), "size": size});
        return Ok(print_json(&made)?);
    }
    Ok(print(&format!(
        "made: {path} ({}, {})\n",
        new.format.name(),
        shown(size)
    ))?)
}

/// Has the daemon make the image and export it.
pub async fn export(client: &Client, asked: &Asked, as_json: bool) -> Result<(), Asking> {
    let Command::Create(asked) = &asked.command else {
        return Err(Failure::Usage("only create has --export").into());
    };
    let Some(name) = &asked.export else {
        return Err(Failure::Usage("say --export").into());
    };
    let (new, path) = (wanted(asked)?, absolute(&asked.path, true)?);
    let made = client.create_image(name, &path, &new, asked.wait);
    let object = lasting::shown(client, made).await?;
    if as_json {
        let made =
            json!({"path": path, "format": new.format.name(), "export": name, "object": object});
        return Ok(print_json(&made).map_err(Failure::Output)?);
    }
    let said = format!("made: {path}, exported as {name}\n");
    Ok(print(&said).map_err(Failure::Output)?)
}

/// How a command that asks a daemon ends without having done it.
pub enum Asking {
    Client(ClientError),
    Failure(Failure),
}

impl Asking {
    /// The failure, with what the bus said told by `failed`.
    pub fn failure(self, failed: impl FnOnce(ClientError) -> Failure) -> Failure {
        match self {
            Asking::Client(error) => failed(error),
            Asking::Failure(failure) => failure,
        }
    }
}

impl From<ClientError> for Asking {
    fn from(error: ClientError) -> Asking {
        Asking::Client(error)
    }
}

impl From<Failure> for Asking {
    fn from(failure: Failure) -> Asking {
        Asking::Failure(failure)
    }
}

fn info(at: &At, as_json: bool) -> Result<(), Failure> {
    let (path, format) = at.place()?;
    let described = describe::describe(&path, format, &everything());
    let described = described.map_err(|error| Failure::Image(error.to_string()))?;
    if as_json {
        return Ok(print_json(&Value::Object(facts(&described)))?);
    }
    let mut text = String::new();
    for (name, value) in facts(&described) {
        let value = match (&value, name.ends_with("bytes") || name.ends_with("size")) {
            (Value::Number(bytes), true) => {
                let bytes = bytes.as_u64().unwrap_or_default();
                format!("{} ({bytes} bytes)", shown(bytes))
            }
            (Value::String(text), _) => text.chars().filter(|c| !c.is_control()).collect(),
            (value, _) => value.to_string(),
        };
        text += &format!("{:<20} {value}\n", name.replace('_', " "));
    }
    Ok(print(&text)?)
}

/// What is told of an image, in the order in which people read it.
fn facts(described: &Described) -> Map<String, Value> {
    let mut facts = Map::new();
    let mut put = |name: &str, value: Value| facts.insert(name.to_owned(), value);
    put("path", json!(described.path));
    let format = match described.content {
        Content::Raw => Format::Raw,
        Content::Qcow2(_) | Content::Unread(_) => Format::Qcow2,
    };
    put("format", json!(format.name()));
    put("virtual_size", json!(described.size));
    put("file_bytes", json!(described.file_bytes));
    put("taken_bytes", json!(described.taken_bytes));
    if let Content::Qcow2(header) = &described.content {
        put("version", json!(header.version));
        put("cluster_size", json!(header.cluster_bytes()));
        put("refcount_bits", json!(1 << header.refcount_order));
        let compression = match header.compression {
            Compression::Zlib => "zlib",
            Compression::Zstd => "zstd",
        };
        put("compression", json!(compression));
        put("extended_l2", json!(header.extended_l2));
        put("snapshots", json!(header.snapshots));
        put("bitmaps", json!(header.bitmaps));
        put("dirty", json!(header.dirty));
        put("corrupt", json!(header.corrupt));
        if let Some(data_file) = &header.data_file {
            put("data_file", json!(data_file));
        }
        if let Some(backing) = &header.backing {
            put("backing", json!(backing.name));
            put("backing_format", json!(backing.format));
        }
    }
    let refusal = described.refusal().map(|refusal| refusal.to_string());
    put("served", json!(refusal.is_none()));
    if let Some(refusal) = refusal {
        put("reason", json!(refusal));
    }
    facts
}

fn check(at: &At, as_json: bool) -> Result<(), Failure> {
    let (path, format) = at.place()?;
    let mut line = ProgressLine::begin();
    let found = describe::check(&path, format, &everything(), &mut |share| {
        line.show(share);
        true
    });
    drop(line);
    let found = found.map_err(|error| Failure::Image(error.to_string()))?;
    told(&path, &found, as_json)?;
    match (found.errors, found.leaks) {
        (0, 0) => Ok(()),
        (0, leaks) => Err(Failure::Leaks(leaks)),
        (errors, _) => Err(Failure::Errors(errors)),
    }
}

fn told(path: &str, found: &Findings, as_json: bool) -> Result<(), Failure> {
    if as_json {
        let all = json!({
            "path": path, "errors": found.errors, "leaks": found.leaks, "clusters": found.clusters,
            "allocated_clusters": found.allocated, "compressed_clusters": found.compressed,
            "dirty": found.dirty, "corrupt": found.corrupt, "told": found.told,
        });
        return Ok(print_json(&all)?);
    }
    let mut text: String = found.told.iter().map(|what| format!("{what}\n")).collect();
    let more = found.errors.saturating_sub(found.told.len() as u64);
    if more > 0 {
        text += &format!("and {more} more\n");
    }
    if found.dirty {
        text += "marked dirty: whoever wrote it last did not close it\n";
    }
    if found.corrupt {
        text += "marked corrupt\n";
    }
    text += &format!(
        "{} errors, {} leaked clusters; {} clusters in the file, {} of the guest\n",
        found.errors, found.leaks, found.clusters, found.allocated
    );
    Ok(print(&text)?)
}

fn chain(at: &At, as_json: bool) -> Result<(), Failure> {
    let (path, format) = at.place()?;
    let found = describe::chain(&path, format, &everything());
    let (layers, broken) = found.map_err(|error| Failure::Image(error.to_string()))?;
    let broken = broken.map(|error| error.to_string());
    if as_json {
        let layers: Vec<Value> = layers
            .iter()
            .map(|layer| Value::Object(facts(layer)))
            .collect();
        print_json(&json!({"chain": layers, "broken": broken}))?;
    } else {
        let rows: Vec<Vec<String>> = layers
            .iter()
            .map(|layer| {
                let refusal = layer.refusal().map(|refusal| refusal.to_string());
                let format = facts(layer).remove("format").unwrap_or_default();
                vec![
                    layer.path.clone(),
                    format.as_str().unwrap_or_default().to_owned(),
                    shown(layer.size),
                    shown(layer.taken_bytes),
                    refusal.unwrap_or_default(),
                ]
            })
            .collect();
        let header = ["PATH", "FORMAT", "SIZE", "TAKEN", "NOT SERVED"];
        print(&lay_out(&header, &rows, TableStyle::of_stdout()))?;
    }
    broken.map_or(Ok(()), |reason| {
        Err(Failure::Image(format!("the chain is broken: {reason}")))
    })
}

/// Bytes, as `512`, `64K` or `10G`.
pub(super) fn bytes(text: &str) -> Result<u64, String> {
    let wrong = || "expected bytes, or a number with K, M, G, T or P for powers of 1024".to_owned();
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 = digits.parse().map_err(|_| wrong())?;
    let shift = match text[digits.len()..].to_ascii_uppercase().as_str() {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        _ => return Err(wrong()),
    };
    number.checked_mul(1 << shift).ok_or_else(wrong)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, wanted) in [
            ("512", 512),
            ("64K", 65536),
            ("64k", 65536),
            ("3G", 3 << 30),
        ] {
            assert_eq!(bytes(text), Ok(wanted));
        }
        for text in ["", "K", "-1", "1.5G", "1GiB", "99999999P", "1 G"] {
            assert!(bytes(text).is_err(), "{text}");
        }
    }
}
