//! `metrics`: what the daemon measures, for Prometheus: printed, as a text file for node_exporter, or answered over HTTP on a
//! Unix socket or the loopback. A process of its own, so that no HTTP reaches the daemon that holds the disks.

use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::show::print;
use super::{Failure, Metrics};
use crate::dbus::Bus;
use crate::dbus::client::Client;

/// Scrapers at one time; more are closed at once.
const SCRAPES_MAX: usize = 8;
/// The longest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 8 << 10;
/// For the head, and again for the answer.
const WITHIN: Duration = Duration::from_secs(10);
/// Who may scrape over the Unix socket: its owner and group.
const SOCKET_MODE: u32 = 0o660;

/// Prints, writes or serves.
pub async fn metrics(bus: &Bus, client: Client, asked: &Metrics) -> Result<(), Failure> {
    if let Some(path) = &asked.textfile {
        let text = client.metrics().await.map_err(Failure::Client)?;
        return Ok(write_whole(path, &text)?);
    }
    if let Some(address) = asked.listen {
        if !address.ip().is_loopback() {
            return Err(Failure::Argument(format!(
                "--listen {address}: only loopback addresses, for names of exports are not for everyone; let a proxy with access \
                 control carry them further"
            )));
        }
        let listener = tokio::net::TcpListener::bind(address).await?;
        let mut server = Server::new(bus, client);
        return until_interrupted(async {
            loop {
                server.admit(listener.accept().await?.0);
            }
        })
        .await;
    }
    if let Some(path) = &asked.socket {
        let listener = bind(path)?;
        let mut server = Server::new(bus, client);
        let ended = until_interrupted(async {
            loop {
                server.admit(listener.accept().await?.0);
            }
        })
        .await;
        std::fs::remove_file(path)?;
        return ended;
    }
    Ok(print(&client.metrics().await.map_err(Failure::Client)?)?)
}

async fn until_interrupted(serving: impl Future<Output = io::Result<()>>) -> Result<(), Failure> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut term = signal(SignalKind::terminate())?;
    tokio::select! {
        ended = serving => Ok(ended?),
        _ = tokio::signal::ctrl_c() => Ok(()),
        _ = term.recv() => Ok(()),
    }
}

/// Whoever reads the file sees the old text or the new one (node_exporter's textfile collector asks for that).
fn write_whole(path: &Path, text: &str) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = Path::new(&beside);
    std::fs::write(beside, text)?;
    std::fs::set_permissions(beside, std::fs::Permissions::from_mode(0o644))?;
    std::fs::rename(beside, path)
}

fn bind(path: &Path) -> io::Result<tokio::net::UnixListener> {
    // Left behind by one that was killed: only a socket on which no one listens is taken over.
    if std::os::unix::net::UnixStream::connect(path)
        .is_err_and(|error| error.kind() == io::ErrorKind::ConnectionRefused)
    {
        std::fs::remove_file(path)?;
    }
    let listener = tokio::net::UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(SOCKET_MODE))?;
    Ok(listener)
}

struct Server {
    bus: Bus,
    /// The connection to the bus, made anew when it broke.
    client: Arc<tokio::sync::Mutex<Option<Client>>>,
    /// [`SCRAPES_MAX`]; when used up, the connection is closed.
    places: Arc<Semaphore>,
}

impl Server {
    fn new(bus: &Bus, client: Client) -> Server {
        Server {
            bus: bus.clone(),
            client: Arc::new(tokio::sync::Mutex::new(Some(client))),
            places: Arc::new(Semaphore::new(SCRAPES_MAX)),
        }
    }

    fn admit(&mut self, stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) {
        let Ok(place) = self.places.clone().try_acquire_owned() else {
            return;
        };
        let (bus, client) = (self.bus.clone(), self.client.clone());
        // One task for each place; it ends by its deadlines.
        tokio::spawn(async move {
            // A scraper that went away or dawdled has nothing to be told.
            let _ended = scrape(stream, &bus, &client).await;
            drop(place);
        });
    }
}

async fn scrape(
    mut stream: impl AsyncRead + AsyncWrite + Unpin,
    bus: &Bus,
    client: &tokio::sync::Mutex<Option<Client>>,
) -> io::Result<()> {
    let late = |_| io::Error::from(io::ErrorKind::TimedOut);
    let head = timeout(WITHIN, head(&mut stream)).await.map_err(late)??;
    let answer = match head.split(' ').collect::<Vec<_>>()[..] {
        ["GET", path, ..] if path == "/metrics" || path.starts_with("/metrics?") => {
            match fetch(bus, client).await {
                Ok(text) => response(
                    "200 OK",
                    "application/openmetrics-text; version=1.0.0; charset=utf-8",
                    &text,
                ),
                Err(reason) => response("503 Service Unavailable", "text/plain", &reason),
            }
        }
        ["GET", ..] => response("404 Not Found", "text/plain", "see /metrics\n"),
        _ => response("405 Method Not Allowed", "text/plain", "GET only\n"),
    };
    let sending = async {
        stream.write_all(answer.as_bytes()).await?;
        stream.shutdown().await
    };
    timeout(WITHIN, sending).await.map_err(late)?
}

/// The request's first line; RFC 9112 section 2.1.
async fn head(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<String> {
    let mut bytes = Vec::new();
    let mut chunk = [0u8; 1_024];
    while !bytes.windows(4).any(|end| end == b"\r\n\r\n") {
        let count = stream.read(&mut chunk).await?;
        if count == 0 || bytes.len() > HEAD_BYTES_MAX {
            return Err(io::ErrorKind::InvalidData.into());
        }
        bytes.extend_from_slice(&chunk[..count]);
    }
    let line = bytes
        .split(|byte| *byte == b'\r')
        .next()
        .unwrap_or_default();
    Ok(String::from_utf8_lossy(line).into_owned())
}

async fn fetch(bus: &Bus, held: &tokio::sync::Mutex<Option<Client>>) -> Result<String, String> {
    let mut held = held.lock().await;
    let client = match held.take() {
        Some(client) => client,
        None => Client::connect(bus).await.map_err(|e| e.to_string())?,
    };
    let text = client.metrics().await.map_err(|error| error.to_string())?;
    // Only a connection that works is kept.
    *held = Some(client);
    Ok(text)
}

fn response(status: &str, kind: &str, body: &str) -> String {
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{body}",
        body.len()
    )
}
