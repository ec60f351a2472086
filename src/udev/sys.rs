//! What this room does that has no safe wrapper.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use tokio::io::unix::AsyncFd;

/// Puts a socket into the runtime's poll set.
///
/// # Errors
/// What `epoll_ctl` says.
pub fn register(socket: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an OwnedFd names the same open descriptor for as long as it lives, and the AsyncFd owns it.
    Ok(unsafe { AsyncFd::register(socket) }?)
}

/// Reads how many messages the kernel could not put into this socket's receive buffer
/// (`SO_MEMINFO`, socket(7); `sock_diag.h` has the layout).
///
/// # Errors
/// What `getsockopt` says.
pub fn dropped_messages(socket: BorrowedFd<'_>) -> io::Result<u32> {
    const FIELDS: usize = 9; // SK_MEMINFO_VARS
    const DROPS: usize = 8; // SK_MEMINFO_DROPS
    let mut fields = [0_u32; FIELDS];
    let mut len =
        libc::socklen_t::try_from(size_of_val(&fields)).expect("36 bytes fit into a socklen_t");
    // SAFETY: `fields` and `len` live through the call, and `len` is the size of `fields`, beyond which
    // the kernel does not write.
    let answer = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_MEMINFO,
            fields.as_mut_ptr().cast(),
            &raw mut len,
        )
    };
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fields[DROPS])
}

/// `struct nvme_passthru_cmd` of `linux/nvme_ioctl.h`, there called `nvme_admin_cmd` too.
#[repr(C)]
#[derive(Default)]
struct AdminCommand {
    opcode: u8,
    flags: u8,
    reserved: u16,
    nsid: u32,
    cdw2: u32,
    cdw3: u32,
    metadata: u64,
    addr: u64,
    metadata_len: u32,
    data_len: u32,
    cdw10: u32,
    cdw11: u32,
    cdw12: u32,
    cdw13: u32,
    cdw14: u32,
    cdw15: u32,
    timeout_ms: u32,
    result: u32,
}

// linux/nvme_ioctl.h: NVME_IOCTL_ADMIN_CMD.
mod ioctl {
    nix::ioctl_readwrite!(admin_command, b'N', 0x41, super::AdminCommand);
}

/// Bytes of every Identify data structure.
const IDENTIFY_BYTES: usize = 4096;

/// Identify (opcode 06h) with CNS 00h, which is 0 in cdw10: the data structure of one namespace (NVM Express base
/// specification, "Identify command").
fn identify_command(nsid: u32, data: &mut [u8; IDENTIFY_BYTES]) -> AdminCommand {
    AdminCommand {
        opcode: 0x06,
        nsid,
        addr: data.as_mut_ptr() as u64,
        data_len: 4096,
        // 0, the driver's own patience: a command that times out makes the driver reset the controller, with
        // all that is in flight on it. Our deadline gives up the answer, not the command.
        timeout_ms: 0,
        ..AdminCommand::default()
    }
}

/// Reads the Identify Namespace data structure; `None` when the device does not know the question, and never will.
///
/// # Errors
/// What the kernel says, and any other status of the device: it may pass.
pub fn identify_namespace(disk: &File, nsid: u32) -> io::Result<Option<Box<[u8; IDENTIFY_BYTES]>>> {
    let mut data = Box::new([0; IDENTIFY_BYTES]);
    let mut command = identify_command(nsid, &mut data);
    // SAFETY: the descriptor is open; `command` and the `data_len` bytes at `addr`, which are `data`, live through
    // the call, and no reference to either is used during it. Identify transfers towards the host only, and at most
    // `data_len` bytes.
    let status = unsafe { ioctl::admin_command(disk.as_raw_fd(), &raw mut command) }?;
    match status {
        0 => Ok(Some(data)),
        refused if is_refused(refused) => Ok(None),
        failed => Err(io::Error::other(format!(
            "the disk answered Identify Namespace with status {failed:#06x}"
        ))),
    }
}

/// Whether a status says that the same command will fail again, for what it asks (NVM Express base specification, "Status Field": the bit Do
/// Not Retry above type and code; Invalid Command Opcode, Invalid Field in Command, Invalid Namespace or Format).
fn is_refused(status: libc::c_int) -> bool {
    const DO_NOT_RETRY: libc::c_int = 0x4000;
    const TYPE_AND_CODE: libc::c_int = 0x07ff;
    status & DO_NOT_RETRY != 0 && matches!(status & TYPE_AND_CODE, 0x001 | 0x002 | 0x00b)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    fn the_admin_command_is_laid_out_as_the_kernel_has_it() {
        assert_eq!(size_of::<AdminCommand>(), 72);
        assert_eq!(nix::request_code_readwrite!(b'N', 0x41, 72), 0xC048_4E41);
        assert_eq!(offset_of!(AdminCommand, nsid), 4);
        assert_eq!(offset_of!(AdminCommand, metadata), 16);
        assert_eq!(offset_of!(AdminCommand, addr), 24);
        assert_eq!(offset_of!(AdminCommand, data_len), 36);
        assert_eq!(offset_of!(AdminCommand, cdw10), 40);
        assert_eq!(offset_of!(AdminCommand, timeout_ms), 64);
        assert_eq!(offset_of!(AdminCommand, result), 68);
    }

    /// A controller that was being reset lost its disk the name that it is known by, and its clients were cut off.
    #[test]
    fn only_a_question_that_will_never_be_answered_is_no_answer() {
        for (status, refused) in [
            (0x4001, true),
            (0x4002, true),
            (0x400b, true),
            (0x6002, true),
            (0x0002, false),
            // Namespace not ready, internal error, aborted, a path's error, a type's own code of the same number.
            (0x4082, false),
            (0x4006, false),
            (0x0007, false),
            (0x4303, false),
            (0x4102, false),
        ] {
            assert_eq!(is_refused(status), refused, "{status:#x}");
        }
    }

    #[test]
    fn identify_asks_for_one_namespace_into_the_whole_buffer() {
        let mut data = [0; IDENTIFY_BYTES];
        let address = data.as_ptr() as u64;
        let command = identify_command(7, &mut data);
        assert_eq!((command.opcode, command.nsid, command.cdw10), (6, 7, 0));
        assert_eq!((command.addr, command.data_len), (address, 4096));
        assert_eq!(command.timeout_ms, 0);
    }
}
