//! A small NBD client, written from proto.md and sharing no line with the server: simple replies, one export, any
//! number of requests in flight. It also can say what no polite client says.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use socket2::{Domain, SockAddr, Socket, Type};

use super::{Doing, Outcome};
use crate::{hold, trouble};

/// Where a server listens.
#[derive(Debug, Clone)]
pub enum Endpoint {
    Unix(PathBuf),
    Tcp(SocketAddr),
}

impl Endpoint {
    pub fn connect(&self) -> Outcome<Socket> {
        let (domain, address) = match self {
            Endpoint::Unix(path) => (Domain::UNIX, SockAddr::unix(path)?),
            Endpoint::Tcp(address) => (Domain::for_address(*address), SockAddr::from(*address)),
        };
        let socket = Socket::new(domain, Type::STREAM, None)?;
        socket
            .connect(&address)
            .doing(format!("connect to {self}"))?;
        if matches!(self, Endpoint::Tcp(_)) {
            socket.set_tcp_nodelay(true)?;
        }
        socket.set_read_timeout(Some(PATIENCE))?;
        socket.set_write_timeout(Some(PATIENCE))?;
        Ok(socket)
    }

    /// The NBD URI of an export here.
    pub fn uri(&self, export: &str) -> String {
        match self {
            Endpoint::Unix(path) => format!("nbd+unix:///{export}?socket={}", path.display()),
            Endpoint::Tcp(address) => format!("nbd://{address}/{export}"),
        }
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Unix(path) => write!(f, "{}", path.display()),
            Endpoint::Tcp(address) => write!(f, "{address}"),
        }
    }
}

/// How long a server may leave us without a byte.
pub const PATIENCE: Duration = Duration::from_secs(45);

// proto.md "Values"
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;
pub const REQUEST_MAGIC: u32 = 0x2560_9513;
pub const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub const OPT_LIST: u32 = 3;
pub const OPT_GO: u32 = 7;
pub const OPT_STRUCTURED_REPLY: u32 = 8;
pub const REP_ACK: u32 = 1;
pub const REP_SERVER: u32 = 2;
pub const REP_INFO: u32 = 3;
const REP_ERROR: u32 = 1 << 31;
pub const REP_ERR_UNSUP: u32 = REP_ERROR + 1;
pub const REP_ERR_POLICY: u32 = REP_ERROR + 2;
pub const REP_ERR_UNKNOWN: u32 = REP_ERROR + 6;
pub const REP_ERR_SHUTDOWN: u32 = REP_ERROR + 7;
pub const CMD_READ: u16 = 0;
pub const CMD_WRITE: u16 = 1;
pub const CMD_DISC: u16 = 2;
pub const CMD_FLUSH: u16 = 3;
pub const CMD_TRIM: u16 = 4;
pub const CMD_WRITE_ZEROES: u16 = 6;
pub const FLAG_FUA: u16 = 1;
pub const FLAG_NO_HOLE: u16 = 2;
pub const STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;
/// The longest option reply or read that we take, in bytes.
const REPLY_BYTES_MAX: u32 = 64 << 20;

/// What the server said to GO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Go {
    /// Bytes, and the transmission flags.
    Agreed { size: u64, flags: u16 },
    /// Reply type and text.
    Refused { kind: u32, text: String },
}

/// Sends the fixed newstyle greeting's answer and `NBD_OPT_GO`, and reads to its end.
pub fn negotiate(socket: &Socket, export: &str) -> Outcome<Go> {
    greet(socket)?;
    go(socket, export)
}

/// As [`negotiate`], with structured replies where the server has them.
pub fn negotiate_structured(socket: &Socket, export: &str) -> Outcome<Go> {
    greet(socket)?;
    send_option(socket, OPT_STRUCTURED_REPLY, &[])?;
    let (_, kind, _) = read_option_reply(socket)?;
    hold!(
        [REP_ACK, REP_ERR_UNSUP].contains(&kind),
        "structured replies: {kind:#x}"
    );
    go(socket, export)
}

fn go(socket: &Socket, export: &str) -> Outcome<Go> {
    let mut data = Vec::new();
    data.extend_from_slice(&u32::try_from(export.len())?.to_be_bytes());
    data.extend_from_slice(export.as_bytes());
    data.extend_from_slice(&0u16.to_be_bytes());
    send_option(socket, OPT_GO, &data)?;
    let mut agreed = None;
    loop {
        let (option, kind, data) = read_option_reply(socket)?;
        hold!(option == OPT_GO, "a reply to option {option} instead of GO");
        match kind {
            REP_INFO if data.len() == 12 && data[..2] == [0, 0] => {
                let size = u64::from_be_bytes(data[2..10].try_into()?);
                let flags = u16::from_be_bytes(data[10..].try_into()?);
                agreed = Some(Go::Agreed { size, flags });
            }
            REP_INFO => {}
            REP_ACK => match agreed {
                Some(agreed) => return Ok(agreed),
                None => trouble!("GO was acknowledged without NBD_INFO_EXPORT"),
            },
            kind if kind & REP_ERROR != 0 => {
                let text = String::from_utf8_lossy(&data).into_owned();
                return Ok(Go::Refused { kind, text });
            }
            kind => trouble!("unexpected reply type {kind} to GO"),
        }
    }
}

/// Reads the greeting and answers it with FIXED_NEWSTYLE and NO_ZEROES.
pub fn greet(mut socket: &Socket) -> Outcome<()> {
    let mut greeting = [0u8; 18];
    socket
        .read_exact(&mut greeting)
        .doing("read the greeting")?;
    hold!(
        greeting[..8] == NBD_MAGIC.to_be_bytes() && greeting[8..16] == OPTION_MAGIC.to_be_bytes(),
        "no NBD greeting: {greeting:02x?}"
    );
    socket.write_all(&3u32.to_be_bytes())?;
    Ok(())
}

pub fn send_option(mut socket: &Socket, option: u32, data: &[u8]) -> Outcome<()> {
    let mut message = OPTION_MAGIC.to_be_bytes().to_vec();
    message.extend_from_slice(&option.to_be_bytes());
    message.extend_from_slice(&u32::try_from(data.len())?.to_be_bytes());
    message.extend_from_slice(data);
    socket.write_all(&message).doing("send an option")
}

/// Gives the option, the reply type and the data.
pub fn read_option_reply(mut socket: &Socket) -> Outcome<(u32, u32, Vec<u8>)> {
    let mut head = [0u8; 20];
    socket.read_exact(&mut head).doing("read an option reply")?;
    hold!(
        head[..8] == OPTION_REPLY_MAGIC.to_be_bytes(),
        "no option reply: {head:02x?}"
    );
    let option = u32::from_be_bytes(head[8..12].try_into()?);
    let kind = u32::from_be_bytes(head[12..16].try_into()?);
    let len = u32::from_be_bytes(head[16..].try_into()?);
    hold!(len <= REPLY_BYTES_MAX, "an option reply of {len} bytes");
    let mut data = vec![0; usize::try_from(len)?];
    socket.read_exact(&mut data)?;
    Ok((option, kind, data))
}

/// The 28 bytes of a request.
pub fn request(command: u16, flags: u16, cookie: u64, offset: u64, len: u32) -> [u8; 28] {
    let mut out = [0u8; 28];
    out[..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
    out[4..6].copy_from_slice(&flags.to_be_bytes());
    out[6..8].copy_from_slice(&command.to_be_bytes());
    out[8..16].copy_from_slice(&cookie.to_be_bytes());
    out[16..24].copy_from_slice(&offset.to_be_bytes());
    out[24..].copy_from_slice(&len.to_be_bytes());
    out
}

/// Reads one simple reply's head: (cookie, error).
pub fn read_reply(mut socket: &Socket) -> io::Result<(u64, u32)> {
    let mut head = [0u8; 16];
    socket.read_exact(&mut head)?;
    if head[..4] != SIMPLE_REPLY_MAGIC.to_be_bytes() {
        return Err(io::Error::other(format!("no simple reply: {head:02x?}")));
    }
    let [_, _, _, _, e0, e1, e2, e3, cookie @ ..] = head;
    Ok((
        u64::from_be_bytes(cookie),
        u32::from_be_bytes([e0, e1, e2, e3]),
    ))
}

/// One connection in transmission, one request at a time.
pub struct Client {
    pub socket: Socket,
    pub size: u64,
    pub flags: u16,
    cookie: u64,
}

impl Client {
    pub fn open(endpoint: &Endpoint, export: &str) -> Outcome<Client> {
        let socket = endpoint.connect()?;
        match negotiate(&socket, export)? {
            Go::Agreed { size, flags } => Ok(Client {
                socket,
                size,
                flags,
                cookie: 0,
            }),
            Go::Refused { kind, text } => trouble!("{export}: refused with {kind:#x}: {text}"),
        }
    }

    /// Sends one request and awaits its reply; `Ok(Err(errno))` when the server says no.
    fn ask(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        payload: &[u8],
        read: &mut [u8],
    ) -> Outcome<Result<(), u32>> {
        self.cookie += 1;
        let len = u32::try_from(payload.len().max(read.len()))?;
        let mut message = request(command, flags, self.cookie, offset, len).to_vec();
        message.extend_from_slice(payload);
        (&self.socket).write_all(&message).doing("send a request")?;
        let (cookie, error) = read_reply(&self.socket).doing("read a reply")?;
        hold!(
            cookie == self.cookie,
            "reply {cookie} to request {}",
            self.cookie
        );
        if error != 0 {
            return Ok(Err(error));
        }
        (&self.socket).read_exact(read)?;
        Ok(Ok(()))
    }

    pub fn read(&mut self, offset: u64, buffer: &mut [u8]) -> Outcome<Result<(), u32>> {
        self.ask(CMD_READ, 0, offset, &[], buffer)
    }

    pub fn write(&mut self, offset: u64, data: &[u8], fua: bool) -> Outcome<Result<(), u32>> {
        let flags = if fua { FLAG_FUA } else { 0 };
        self.ask(CMD_WRITE, flags, offset, data, &mut [])
    }

    /// Has `len` bytes read as zeroes, or given up; `command` is one of those without a payload.
    pub fn span(
        &mut self,
        command: u16,
        flags: u16,
        offset: u64,
        len: u32,
    ) -> Outcome<Result<(), u32>> {
        self.cookie += 1;
        let message = request(command, flags, self.cookie, offset, len);
        (&self.socket).write_all(&message).doing("send a request")?;
        let (cookie, error) = read_reply(&self.socket).doing("read a reply")?;
        hold!(cookie == self.cookie, "reply {cookie} to {}", self.cookie);
        Ok(if error == 0 { Ok(()) } else { Err(error) })
    }

    pub fn flush(&mut self) -> Outcome<Result<(), u32>> {
        self.ask(CMD_FLUSH, 0, 0, &[], &mut [])
    }

    /// Says goodbye.
    pub fn leave(self) -> Outcome<()> {
        (&self.socket)
            .write_all(&request(CMD_DISC, 0, 0, 0, 0))
            .doing("disconnect")
    }
}

/// What the server says to GO for this export.
pub fn knock(endpoint: &Endpoint, export: &str) -> Outcome<Go> {
    let socket = endpoint.connect()?;
    negotiate(&socket, export)
}
