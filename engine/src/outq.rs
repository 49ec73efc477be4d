//! How many bytes of a socket its client has not taken yet.
//!
//! The kernel knows whether a client makes progress: bytes stay in its queue until the other end has them. Called
//! only when a connection is about to be ended, or when a ping is written. Does not know connections or time.

use std::os::fd::AsFd;

/// Bytes passed to the kernel that the client's kernel has not acknowledged. For a Unix socket, the memory
/// taken by what the client has not read. None where the system does not report it.
#[cfg(any(target_os = "linux", target_os = "android"))]
pub(crate) fn unacknowledged(socket: impl AsFd) -> Option<u32> {
    use rustix::ioctl::{Getter, Opcode, ioctl};
    // SAFETY: on a stream socket, TIOCOUTQ (also called SIOCOUTQ) writes one `int` to where the argument
    // points, and does nothing else; `Getter` provides room for one. On any other descriptor it is refused.
    // Witness: the tests below.
    let bytes = unsafe { ioctl(socket, Getter::<{ libc::TIOCOUTQ as Opcode }, libc::c_int>::new()) };
    bytes.ok().and_then(|bytes| u32::try_from(bytes).ok())
}

#[cfg(not(any(target_os = "linux", target_os = "android")))]
pub(crate) fn unacknowledged(_: impl AsFd) -> Option<u32> {
    None
}

#[cfg(all(test, any(target_os = "linux", target_os = "android"), not(miri)))]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn bytes_are_unacknowledged_until_the_client_has_read_them() {
        let (mut ours, mut theirs) = UnixStream::pair().expect("a pair");
        assert_eq!(unacknowledged(&ours), Some(0));
        ours.write_all(&[0; 1000]).expect("room");
        assert!(unacknowledged(&ours).is_some_and(|bytes| bytes >= 1000));
        theirs.read_exact(&mut [0; 1000]).expect("a thousand bytes");
        assert_eq!(unacknowledged(&ours), Some(0));
    }

    #[test]
    fn a_descriptor_that_is_not_a_socket_has_no_result() {
        let file = std::fs::File::open("/dev/null").expect("it exists");
        assert_eq!(unacknowledged(&file), None);
    }
}
