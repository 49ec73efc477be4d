//! Turning away: a Close frame for a WebSocket that no shard owns.
//!
//! After a 101 a client has a WebSocket, and must not have to guess why it ends. A client that cannot be served is told
//! in a short task that owns the stream: it writes one frame, ends its side, and reads what the client still
//! sends, because closing a socket with unread bytes would destroy the frame on its way. All within [`LINGER`].
//! Knows streams and the Close frame. Does not know reasons, nor where the stream comes from.

use std::{io, time::Duration};

use shardcast_engine::{CloseCode, ControlFrame};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    time::timeout,
};

/// How long a client that is turned away may take to read the frame and hang up, before it is cut off.
pub(crate) const LINGER: Duration = Duration::from_secs(2);

/// Sends a Close frame, and waits for the client to hang up. Must be called within a tokio runtime.
pub(crate) async fn turn_away<S>(mut stream: S, code: CloseCode, reason: &str)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let frame = ControlFrame::close(code, reason);
    let farewell = async {
        stream.write_all(frame.as_bytes()).await?;
        stream.shutdown().await?;
        while stream.read(&mut [0; 1024]).await? > 0 {}
        Ok::<_, io::Error>(())
    };
    // Nothing more can be done for a client that has gone or does not hang up.
    let _ = timeout(LINGER, farewell).await;
}

#[cfg(test)]
mod tests {
    use tokio::{io::duplex, time::Instant};

    use super::*;

    #[tokio::test]
    async fn a_client_that_is_still_talking_gets_the_frame() {
        let (mut client, stream) = duplex(64);
        let client = async {
            client.write_all(&[7; 500]).await.unwrap();
            let mut frame = Vec::new();
            client.read_to_end(&mut frame).await.unwrap();
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
}
