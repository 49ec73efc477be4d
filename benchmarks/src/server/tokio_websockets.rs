//! The peer: the crate tokio-websockets with a broadcast channel of tokio, as well as it can be done.
//!
//! One task per connection, one shared encoding of each message, and a batch per turn: whatever the channel has is
//! fed, then flushed once, which the crate turns into vectored writes. That is the strongest of the known ways to fan
//! out with tokio. Who falls behind by more than the channel holds is cut off: a loss must not be silent.

use std::io;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::broadcast::{self, error::TryRecvError},
};
use tokio_websockets::{Message as Frame, ServerBuilder, WebSocketStream};

use super::peer::{CHANNEL_MESSAGES, Message};

type Socket = WebSocketStream<TcpStream>;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the peer has gone")]
    Gone,
    #[error("a message is not ours")]
    Foreign,
    #[error("the peer is behind by more than the channel holds")]
    Lagged,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    WebSocket(#[from] tokio_websockets::Error),
}

/// Serves until it is killed.
pub(crate) async fn serve(listener: TcpListener) -> io::Result<()> {
    let (everybody, _) = broadcast::channel(CHANNEL_MESSAGES);
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(attend(stream, everybody.clone()));
    }
}

async fn attend(stream: TcpStream, everybody: broadcast::Sender<Bytes>) -> Result<(), Ended> {
    stream.set_nodelay(true)?;
    let (request, socket) = ServerBuilder::new().accept(stream).await?;
    match request.uri().path() {
        "/echo" => repeat(socket).await,
        _ => join(socket, everybody).await,
    }
}

async fn join(mut socket: Socket, everybody: broadcast::Sender<Bytes>) -> Result<(), Ended> {
    let mut messages = everybody.subscribe();
    loop {
        // Both are cancel safe.
        tokio::select! {
            frame = socket.next() => {
                if let Some(text) = relay(frame)? {
                    // Fails only without receivers, and this connection is one.
                    let _ = everybody.send(text);
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

/// What is to be sent for a frame: nothing for a control frame, which the crate answers itself.
fn relay(frame: Option<Result<Frame, tokio_websockets::Error>>) -> Result<Option<Bytes>, Ended> {
    let frame = frame.ok_or(Ended::Gone)??;
    if !frame.is_text() {
        return Ok(None);
    }
    Message::relay_shared(frame.as_payload()).map(Some).ok_or(Ended::Foreign)
}
