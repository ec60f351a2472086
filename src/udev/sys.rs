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

/// `struct sg_io_hdr` of `scsi/sg.h`.
#[repr(C)]
struct SgIo {
    interface_id: libc::c_int,
    dxfer_direction: libc::c_int,
    cmd_len: u8,
    mx_sb_len: u8,
    iovec_count: u16,
    dxfer_len: u32,
    dxferp: *mut u8,
    cmdp: *const u8,
    sbp: *mut u8,
    timeout_ms: u32,
    flags: u32,
    pack_id: libc::c_int,
    usr_ptr: *mut libc::c_void,
    status: u8,
    masked_status: u8,
    msg_status: u8,
    sb_len_wr: u8,
    host_status: u16,
    driver_status: u16,
    resid: libc::c_int,
    duration: u32,
    info: u32,
}

/// `SG_IO` of scsi/sg.h.
const SG_IO: libc::Ioctl = 0x2285;
/// `SG_DXFER_FROM_DEV` of scsi/sg.h.
const FROM_DEVICE: libc::c_int = -3;
/// The longest sense data (SPC-4, "Sense data").
const SENSE_BYTES: usize = 252;
/// The patience of the kernel's own inquiries (`drivers/scsi/scsi.c`, `scsi_vpd_inquiry`) and, by default, of its reads and writes. A command that
/// times out makes the driver abort it and then reset the device, with all that is in flight on it, and the kernel takes less than 7 s for
/// 7 s (`BLK_MIN_SG_TIMEOUT`). So our deadline gives up the answer, not the command.
const INQUIRY_MS: u32 = 30_000;

/// How an inquiry ended.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Inquired {
    /// The disk's.
    pub status: u8,
    /// The driver's: 0 when the disk was reached.
    pub host_status: u16,
    /// What the disk transferred.
    pub data: Vec<u8>,
    pub sense: Vec<u8>,
}

/// INQUIRY (opcode 12h) for a page of vital product data (SPC-4, "INQUIRY command").
fn inquiry_command(page: u8, bytes: u16) -> [u8; 6] {
    let [high, low] = bytes.to_be_bytes();
    [0x12, 0x01, page, high, low, 0]
}

/// Asks a SCSI disk for at most `bytes` of a page of vital product data. Needs no right beyond that of reading: the kernel passes INQUIRY on for
/// everyone who could open the disk (`drivers/scsi/scsi_ioctl.c`, `scsi_cmd_allowed`).
///
/// # Errors
/// What the kernel says; a disk that answers with an error is none here.
pub fn inquire(disk: &File, page: u8, bytes: u16) -> io::Result<Inquired> {
    let command = inquiry_command(page, bytes);
    let mut data = vec![0_u8; usize::from(bytes)];
    let mut sense = [0_u8; SENSE_BYTES];
    let mut order = SgIo {
        interface_id: libc::c_int::from(b'S'),
        dxfer_direction: FROM_DEVICE,
        cmd_len: 6,
        mx_sb_len: 252,
        iovec_count: 0,
        dxfer_len: u32::from(bytes),
        dxferp: data.as_mut_ptr(),
        cmdp: command.as_ptr(),
        sbp: sense.as_mut_ptr(),
        timeout_ms: INQUIRY_MS,
        flags: 0,
        pack_id: 0,
        usr_ptr: std::ptr::null_mut(),
        status: 0,
        masked_status: 0,
        msg_status: 0,
        sb_len_wr: 0,
        host_status: 0,
        driver_status: 0,
        resid: 0,
        duration: 0,
        info: 0,
    };
    // SAFETY: the descriptor is open; `order`, the `cmd_len` bytes at `cmdp`, the `dxfer_len` bytes at `dxferp` and the `mx_sb_len` bytes at `sbp`
    // are live, no reference to them is used during the call, and INQUIRY transfers towards the host only.
    let done = unsafe { libc::ioctl(disk.as_raw_fd(), SG_IO, &raw mut order) };
    if done < 0 {
        return Err(io::Error::last_os_error());
    }
    let left = usize::try_from(order.resid).unwrap_or(0);
    data.truncate(data.len().saturating_sub(left));
    let written = usize::from(order.sb_len_wr).min(SENSE_BYTES);
    Ok(Inquired {
        status: order.status,
        host_status: order.host_status,
        data,
        sense: sense[..written].to_vec(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::mem::offset_of;

    #[test]
    #[cfg(target_pointer_width = "64")]
    fn the_scsi_order_is_laid_out_as_the_kernel_has_it() {
        assert_eq!(size_of::<SgIo>(), 88);
        assert_eq!(offset_of!(SgIo, dxferp), 16);
        assert_eq!(offset_of!(SgIo, timeout_ms), 40);
        assert_eq!(offset_of!(SgIo, usr_ptr), 56);
        assert_eq!(offset_of!(SgIo, status), 64);
        assert_eq!(offset_of!(SgIo, host_status), 68);
        assert_eq!(offset_of!(SgIo, resid), 72);
        assert_eq!(
            inquiry_command(0x83, 0x1234),
            [0x12, 1, 0x83, 0x12, 0x34, 0]
        );
    }

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
