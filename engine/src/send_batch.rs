//! The writes of one flush to many sockets, passed to the kernel in one system call by io_uring (feature `io-uring`, Linux).
//!
//! Owned by one shard. Each send holds references to its bytes and its socket, which compio-driver keeps until the kernel
//! is done; so no `unsafe` is needed here. No send waits (`MSG_DONTWAIT`): when the call returns, each has the result
//! that `send(2)` would have had. Does not know connections, nor what a result means to them.

use std::io::{self, ErrorKind, Read as _};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use compio_buf::{BufResult, IoBuf};
use compio_driver::op::Send;
use compio_driver::{DriverType, Key, Proactor, PushEntry};

use crate::id::Slot;
use crate::outbox::SharedBytes;
use crate::socket::SharedSocket;

/// Sends in one batch: as many as a turn flushes.
const SENDS_MAX: usize = 512;
/// Bytes that were copied together for a batch, after which it is full: they are kept until it is submitted.
const GATHERED_BYTES_MAX: usize = 1 << 20;
const FLAGS: i32 = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;

type Sending = PushEntry<Key<Send<SharedBytes, SharedSocket>>, io::Result<usize>>;

pub(crate) struct SendBatch {
    proactor: Proactor,
    sending: Vec<(Slot, Sending)>,
    gathered_bytes: usize,
    results: Vec<(Slot, io::Result<usize>)>,
}

impl SendBatch {
    /// Also tries it once: a kernel or a container can refuse io_uring at each step.
    ///
    /// # Errors
    /// The system's error. Nothing can be sent in batches then.
    pub(crate) fn open() -> io::Result<Self> {
        let proactor = Proactor::builder()
            .driver_type(DriverType::IoUring)
            .capacity(2 * SENDS_MAX as u32) // one of them is the driver's own
            .build()?;
        let mut batch = Self { proactor, sending: Vec::new(), gathered_bytes: 0, results: Vec::new() };
        let (ours, mut theirs) = UnixStream::pair()?;
        theirs.set_nonblocking(true)?;
        let ours = SharedSocket::Unix(Arc::new(mio::net::UnixStream::from_std(ours)));
        batch.push(Slot::new(0), ours, SharedBytes::of(vec![1]));
        batch.submit()?;
        let sent = batch.results().map(|(_, result)| result).sum::<io::Result<usize>>()?;
        let received = theirs.read(&mut [0])?;
        if (sent, received) == (1, 1) { Ok(batch) } else { Err(ErrorKind::Unsupported.into()) }
    }

    /// Whether it must be submitted before more is added.
    pub(crate) fn is_full(&self) -> bool {
        self.sending.len() >= SENDS_MAX || self.gathered_bytes >= GATHERED_BYTES_MAX
    }

    /// Adds a send; `slot` names it among the results. At most one for each socket.
    pub(crate) fn push(&mut self, slot: Slot, socket: SharedSocket, bytes: SharedBytes) {
        // Bytes that the next socket gets as well count again, so that nothing more must be remembered of them.
        self.gathered_bytes += bytes.gathered();
        let sending = match self.proactor.push(Send::new(socket, bytes, FLAGS)) {
            PushEntry::Pending(key) => PushEntry::Pending(key),
            PushEntry::Ready(BufResult(result, _)) => PushEntry::Ready(result),
        };
        self.sending.push((slot, sending));
    }

    /// Passes all sends to the kernel. Their results are those of [`results`](Self::results), in the order of the sends.
    ///
    /// # Errors
    /// The kernel took no more. Sends without a result have not been made, and no more can be made by this batch. The driver
    /// keeps those that it has not passed on, at most one batch of them, with their sockets and bytes.
    pub(crate) fn submit(&mut self) -> io::Result<()> {
        self.results.clear();
        self.gathered_bytes = 0;
        let mut failure = None;
        for (slot, mut sending) in self.sending.drain(..) {
            let result = loop {
                let key = match sending {
                    PushEntry::Ready(result) => break Some(result),
                    PushEntry::Pending(key) => key,
                };
                sending = match self.proactor.pop(key) {
                    PushEntry::Ready(BufResult(result, _)) => PushEntry::Ready(result),
                    PushEntry::Pending(_) if failure.is_some() => break None,
                    PushEntry::Pending(key) => {
                        failure = poll(&mut self.proactor).err();
                        PushEntry::Pending(key)
                    }
                };
            };
            self.results.extend(result.map(|result| (slot, result)));
        }
        failure.map_or(Ok(()), Err)
    }

    /// The results of the last [`submit`](Self::submit).
    pub(crate) fn results(&mut self) -> impl Iterator<Item = (Slot, io::Result<usize>)> + '_ {
        self.results.drain(..)
    }
}

/// Submits what was pushed, and takes what is complete.
fn poll(proactor: &mut Proactor) -> io::Result<()> {
    match proactor.poll(None) {
        Err(error) if !matches!(error.kind(), ErrorKind::Interrupted | ErrorKind::TimedOut) => Err(error),
        _ => Ok(()),
    }
}

impl IoBuf for SharedBytes {
    fn as_init(&self) -> &[u8] {
        self.as_slice()
    }
}

impl AsFd for SharedSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(stream) => stream.as_fd(),
            Self::Unix(stream) => stream.as_fd(),
        }
    }
}

#[cfg(all(test, not(miri)))]
mod tests {
    use std::io::Write as _;
    use std::rc::Rc;

    use super::*;

    fn pair() -> (SharedSocket, UnixStream) {
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        ours.set_nonblocking(true).expect("a socket can be non-blocking");
        (SharedSocket::Unix(Arc::new(mio::net::UnixStream::from_std(ours))), theirs)
    }

    fn batch() -> SendBatch {
        SendBatch::open().expect("a kernel and a container that permit io_uring")
    }

    fn results(batch: &mut SendBatch) -> Vec<(usize, Result<usize, ErrorKind>)> {
        batch.submit().expect("the kernel takes it");
        batch.results().map(|(slot, result)| (slot.index(), result.map_err(|error| error.kind()))).collect()
    }

    #[test]
    fn each_send_has_the_result_that_it_would_have_had_by_itself() {
        let mut batch = batch();
        let [(open, mut peer), (full, _stalled), (part, _slow), (closed, gone)] = [(); 4].map(|()| pair());
        let SharedSocket::Unix(stream) = &full else { unreachable!() };
        while (&**stream).write(&[0; 4096]).is_ok() {}
        drop(gone);
        batch.push(Slot::new(7), open, SharedBytes::of(b"hello".to_vec()));
        batch.push(Slot::new(1), full, SharedBytes::of(b"hello".to_vec()));
        batch.push(Slot::new(5), closed, SharedBytes::of(b"hello".to_vec()));
        batch.push(Slot::new(3), part, SharedBytes::of(vec![0; 16 << 20]));
        let results = results(&mut batch);
        let expected = [(7, Ok(5)), (1, Err(ErrorKind::WouldBlock)), (5, Err(ErrorKind::BrokenPipe))];
        assert_eq!(results[..3], expected);
        assert!(matches!(results[3], (3, Ok(1..0x100_0000))), "{:?}", results[3]);
        let mut received = [0; 5];
        peer.read_exact(&mut received).expect("what was sent");
        assert_eq!(&received, b"hello");
    }

    #[test]
    fn a_full_batch_is_sent_in_order_and_the_next_one_after_it() {
        const SOCKETS: usize = 8;
        let mut batch = batch();
        let mut pairs = [(); SOCKETS].map(|()| pair());
        let mut sent = 0;
        for round in 1..=3 {
            let from = sent;
            while !batch.is_full() {
                let SharedSocket::Unix(stream) = &pairs[sent % SOCKETS].0 else { unreachable!() };
                let bytes = SharedBytes::of((sent as u32).to_be_bytes().to_vec());
                batch.push(Slot::new(sent), SharedSocket::Unix(stream.clone()), bytes);
                sent += 1;
            }
            assert_eq!(sent, round * SENDS_MAX);
            let expected: Vec<_> = (from..sent).map(|number| (number, Ok(4))).collect();
            assert_eq!(results(&mut batch), expected);
            for number in from..sent {
                let mut received = [0; 4];
                pairs[number % SOCKETS].1.read_exact(&mut received).expect("what was sent");
                assert_eq!(u32::from_be_bytes(received), number as u32);
            }
        }
    }

    #[test]
    fn what_is_copied_for_a_batch_is_bounded() {
        let (mut batch, (socket, _peer)) = (batch(), pair());
        batch.push(Slot::new(0), socket, SharedBytes::of(vec![0; GATHERED_BYTES_MAX]));
        assert!(batch.is_full());
        let _ = results(&mut batch);
        assert!(!batch.is_full());
    }

    #[test]
    fn a_batch_keeps_nothing_of_what_it_has_sent() {
        let (mut batch, (socket, _peer)) = (batch(), pair());
        let SharedSocket::Unix(stream) = &socket else { unreachable!() };
        let (stream, bytes) = (stream.clone(), Rc::new(vec![0; 10]));
        batch.push(Slot::new(0), socket, SharedBytes::Gathered(bytes.clone()));
        assert_eq!(results(&mut batch), [(0, Ok(10))]);
        assert_eq!((Arc::strong_count(&stream), Rc::strong_count(&bytes)), (1, 1));
    }
}
