//! The peer: the crate fastwebsockets on hyper, with a broadcast channel of tokio.
//!
//! As its examples do: an upgrade by hyper, a task per connection, one write per message, and its defaults, which
//! are vectored writes for long payloads, pongs and close frames by itself, and UTF-8 checked with SIMD. Its reading
//! is not cancel safe, so for the fan-out the socket is split, and the two halves run side by side in one task.
//! Who falls behind by more than the channel holds is cut off: a loss must not be silent.

use std::{convert::Infallible, io};

use bytes::Bytes;
use fastwebsockets::{
    FragmentCollector, FragmentCollectorRead, Frame, OpCode, Payload, WebSocketError, WebSocketWrite,
    upgrade::{self, UpgradeFut},
};
use http_body_util::Empty;
use hyper::{Request, Response, StatusCode, body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use tokio::{
    io::AsyncWrite,
    net::{TcpListener, TcpStream},
    sync::{broadcast, mpsc},
    task::unconstrained,
};

use super::peer::{CHANNEL_MESSAGES, Message};

/// Answers to pings and to a close frame, on their way from the reading half to the writing one.
const ANSWERS: usize = 16;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the peer has said goodbye")]
    Closed,
    #[error("a message is not ours")]
    Foreign,
    #[error("the peer is behind by more than the channel holds")]
    Lagged,
    #[error(transparent)]
    WebSocket(#[from] WebSocketError),
}

/// Serves until it is killed.
pub(crate) async fn serve(listener: TcpListener) -> io::Result<()> {
    let (everybody, _) = broadcast::channel(CHANNEL_MESSAGES);
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(attend(stream, everybody.clone()));
    }
}

async fn attend(stream: TcpStream, everybody: broadcast::Sender<Bytes>) -> hyper::Result<()> {
    // A socket that refuses is about to fail anyway, and the connection will see it.
    let _ = stream.set_nodelay(true);
    let service = service_fn(|request| {
        let everybody = everybody.clone();
        async move { Ok::<_, Infallible>(answer(request, everybody)) }
    });
    http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades().await
}

fn answer(mut request: Request<Incoming>, everybody: broadcast::Sender<Bytes>) -> Response<Empty<Bytes>> {
    match upgrade::upgrade(&mut request) {
        Ok((response, upgraded)) => {
            if request.uri().path() == "/echo" {
                tokio::spawn(unconstrained(repeat(upgraded)));
            } else {
                tokio::spawn(unconstrained(join(upgraded, everybody)));
            }
            response
        }
        Err(_) => {
            let mut response = Response::new(Empty::new());
            *response.status_mut() = StatusCode::BAD_REQUEST;
            response
        }
    }
}

async fn join(upgraded: UpgradeFut, everybody: broadcast::Sender<Bytes>) -> Result<(), Ended> {
    let (reader, writer) = upgraded.await?.split(tokio::io::split);
    let messages = everybody.subscribe();
    let (answers, owed) = mpsc::channel(ANSWERS);
    let mut reader = FragmentCollectorRead::new(reader);
    let reading = async {
        let mut owe = |frame| {
            let answers = answers.clone();
            async move { answers.send(frame).await }
        };
        loop {
            let frame = reader.read_frame(&mut owe).await?;
            if let Some(text) = relay(&frame)? {
                // Fails only without receivers, and this connection is one.
                let _ = everybody.send(text);
            }
        }
    };
    tokio::select! {
        ended = reading => ended,
        ended = write(writer, messages, owed) => ended,
    }
}

async fn write<S: AsyncWrite + Unpin>(
    mut writer: WebSocketWrite<S>,
    mut messages: broadcast::Receiver<Bytes>,
    mut owed: mpsc::Receiver<Frame<'static>>,
) -> Result<(), Ended> {
    loop {
        tokio::select! {
            Some(answer) = owed.recv() => writer.write_frame(answer).await?,
            text = messages.recv() => {
                let text = text.map_err(|_| Ended::Lagged)?;
                writer.write_frame(Frame::text(Payload::Borrowed(&text))).await?;
            }
        }
    }
}

async fn repeat(upgraded: UpgradeFut) -> Result<(), Ended> {
    let mut socket = FragmentCollector::new(upgraded.await?);
    loop {
        let frame = socket.read_frame().await?;
        if let Some(text) = relay(&frame)? {
            socket.write_frame(Frame::text(Payload::Owned(text.into()))).await?;
        }
    }
}

/// What is to be sent for a frame: nothing for a pong.
fn relay(frame: &Frame<'_>) -> Result<Option<Bytes>, Ended> {
    match frame.opcode {
        OpCode::Text => Message::relay_shared(&frame.payload).map(Some).ok_or(Ended::Foreign),
        OpCode::Close => Err(Ended::Closed),
        _ => Ok(None),
    }
}
