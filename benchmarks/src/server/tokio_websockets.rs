//! The crate tokio-websockets with a broadcast channel of tokio, in its fastest form.
//!
//! One task for each connection, one shared encoding of each message, and batches: everything in the channel is fed and
//! then flushed once, which the crate turns into vectored writes. That is the fastest known way to fan out with tokio.
//! A client that lags by more than the channel's capacity is disconnected, because a loss must not be silent.

use std::io;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::sync::broadcast::{self, error::TryRecvError};
use tokio_websockets::{Message as Frame, ServerBuilder, WebSocketStream};

use super::{
    listener::{Listener, Stream},
    runtime::{CHANNEL_MESSAGES, Message},
};

type Socket = WebSocketStream<Stream>;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the client disconnected")]
    Disconnected,
    #[error("a message is invalid")]
    Foreign,
    #[error("the client lags by more than the channel's capacity")]
    Lagged,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    WebSocket(#[from] tokio_websockets::Error),
}

/// Serves until it is killed.
pub(crate) async fn serve(mut listener: Listener) -> io::Result<()> {
    let (channel, _) = broadcast::channel(CHANNEL_MESSAGES);
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(serve_connection(stream, channel.clone()));
    }
}

async fn serve_connection(stream: Stream, channel: broadcast::Sender<Bytes>) -> Result<(), Ended> {
    let (request, socket) = ServerBuilder::new().accept(stream).await?;
    match request.uri().path() {
        "/echo" => repeat(socket).await,
        _ => join(socket, channel).await,
    }
}

async fn join(mut socket: Socket, channel: broadcast::Sender<Bytes>) -> Result<(), Ended> {
    let mut messages = channel.subscribe();
    loop {
        // Both are cancel safe.
        tokio::select! {
            frame = socket.next() => {
                if let Some(text) = relay(frame)? {
                    // Fails only without receivers, and this connection is one.
                    let _ = channel.send(text);
                }
            }
            text = messages.recv() => {
                let text = text.map_err(|_| Ended::Lagged)?;
                socket.feed(Frame::text(text)).await?;
                loop {
                    match messages.try_recv() {
                        Ok(text) => socket.feed(Frame::text(text)).await?,
                        Err(TryRecvError::Empty) => break,
                        Err(_) => return Err(Ended::Lagged),
                    }
                }
                socket.flush().await?;
            }
        }
    }
}

async fn repeat(mut socket: Socket) -> Result<(), Ended> {
    loop {
        let frame = socket.next().await;
        if let Some(text) = relay(frame)? {
            socket.send(Frame::text(text)).await?;
        }
    }
}

/// The text to send for a frame: none for a control frame, which the crate answers itself.
fn relay(frame: Option<Result<Frame, tokio_websockets::Error>>) -> Result<Option<Bytes>, Ended> {
    let frame = frame.ok_or(Ended::Disconnected)??;
    if !frame.is_text() {
        return Ok(None);
    }
    Message::relay_shared(frame.as_payload()).map(Some).ok_or(Ended::Foreign)
}
