//! Turning away: a Close frame for a WebSocket that no shard owns.
//!
//! After a 101 the client has a WebSocket, and must learn why it ends. A client that cannot be served gets a short task
//! that owns the stream: it writes one Close frame, shuts down its side, and reads what the client still sends, because
//! closing a socket with unread bytes would destroy the frame in flight. The task ends within [`LINGER`].
//! These tasks belong to the process, because no engine is known where a WebSocket is dropped, and their number is
//! limited to [`AT_ONCE_MAX`]: clients decide how many are turned away, and no limit on connections counts them. Above
//! the limit a client is sent the frame and is disconnected without waiting for it.
//! Knows streams and the Close frame. Does not know why a client is turned away, or where the stream comes from.

use std::{
    io::{self, Read, Write},
    pin::pin,
    task::{Context, Waker},
    time::Duration,
};

use shardcast_engine::{CloseCode, ControlFrame};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    sync::{Semaphore, SemaphorePermit},
    time::timeout,
};

/// How long a client that is turned away may take to read the frame and close, before it is disconnected.
pub(crate) const LINGER: Duration = Duration::from_secs(2);

/// The maximum number of clients that are waited for at once. Each costs a socket and a task.
pub(crate) const AT_ONCE_MAX: usize = 1024;

/// Up to 64 KiB are read from a client that is not waited for, so that its socket is closed without unread bytes.
const READS_AT_ONCE: usize = 16;
const READ_BYTES: usize = 4096;

/// The limit of this process.
pub(crate) static LIMIT: Limit = Limit(Semaphore::const_new(AT_ONCE_MAX));

/// How many clients may be waited for at once.
#[derive(Debug)]
pub(crate) struct Limit(Semaphore);

impl Limit {
    #[cfg(test)]
    pub(crate) fn new(at_once_max: usize) -> &'static Self {
        Box::leak(Box::new(Self(Semaphore::new(at_once_max))))
    }

    /// A permit to wait for one more client, released when it is dropped.
    pub(crate) fn permit(&'static self) -> Option<SemaphorePermit<'static>> {
        self.0.try_acquire().ok()
    }
}

/// Sends a Close frame and waits for the client to close, at most [`LINGER`]. Must be called within a tokio runtime.
pub(crate) async fn turn_away<S>(stream: S, code: CloseCode, reason: &str)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    // Nothing more can be done for a client that has disconnected or does not close.
    let _ = timeout(LINGER, close(stream, code, reason, usize::MAX)).await;
}

/// Like [`turn_away`] without waiting: does what the stream accepts at once.
pub(crate) fn turn_away_at_once<S>(stream: S, code: CloseCode, reason: &str)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let closing = pin!(close(stream, code, reason, READS_AT_ONCE));
    let _ = closing.poll(&mut Context::from_waker(Waker::noop()));
}

/// Like [`turn_away_at_once`], for a non-blocking socket that is registered with no runtime. `end` shuts down our side.
pub(crate) fn turn_socket_away_at_once<S>(
    mut stream: S,
    end: impl FnOnce(&S) -> io::Result<()>,
    code: CloseCode,
    reason: &str,
) where
    S: Read + Write,
{
    let close = || {
        stream.write_all(ControlFrame::close(code, reason).as_bytes())?;
        end(&stream)?;
        for _ in 0..READS_AT_ONCE {
            if stream.read(&mut [0; READ_BYTES])? == 0 {
                break;
            }
        }
        Ok::<_, io::Error>(())
    };
    let _ = close(); // after an error there is nothing more to try
}

async fn close<S>(mut stream: S, code: CloseCode, reason: &str, reads_max: usize) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    stream.write_all(ControlFrame::close(code, reason).as_bytes()).await?;
    stream.shutdown().await?;
    for _ in 0..reads_max {
        if stream.read(&mut [0; READ_BYTES]).await? == 0 {
            break;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use tokio::{
        io::{DuplexStream, duplex},
        time::Instant,
    };

    use super::*;

    async fn frame(client: &mut DuplexStream) -> Vec<u8> {
        let mut frame = Vec::new();
        client.read_to_end(&mut frame).await.unwrap();
        frame
    }

    #[tokio::test]
    async fn a_client_that_is_still_talking_gets_the_frame() {
        let (mut client, stream) = duplex(64);
        let client = async {
            client.write_all(&[7; 500]).await.unwrap();
            let frame = frame(&mut client).await;
            drop(client);
            frame
        };
        let ((), frame) = tokio::join!(turn_away(stream, CloseCode::TRY_AGAIN_LATER, "full"), client);
        assert_eq!(frame, b"\x88\x06\x03\xf5full");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_hang_up_is_cut_off() {
        let (_client, stream) = duplex(64);
        let started = Instant::now();
        turn_away(stream, CloseCode::GOING_AWAY, "").await;
        assert_eq!(started.elapsed(), LINGER);
    }

    #[tokio::test]
    async fn a_client_that_is_not_waited_for_gets_the_frame_although_it_has_talked() {
        let (mut client, stream) = duplex(64);
        client.write_all(&[7; 60]).await.unwrap();
        turn_away_at_once(stream, CloseCode::TRY_AGAIN_LATER, "full");
        assert_eq!(frame(&mut client).await, b"\x88\x06\x03\xf5full");
    }
}
