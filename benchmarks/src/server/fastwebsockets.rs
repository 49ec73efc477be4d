//! The crate fastwebsockets on hyper, with a broadcast channel of tokio.
//!
//! As in its examples: an upgrade by hyper, a task for each connection, one write for each message, and its defaults,
//! which are vectored writes for long payloads, automatic pongs and Close frames, and UTF-8 checks with SIMD. Its read
//! is not cancel safe, so for the fan-out the socket is split, and both halves run in one task. A client that lags by
//! more than the channel's capacity is disconnected, because a loss must not be silent.

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
    sync::{broadcast, mpsc},
    task::unconstrained,
};

use super::{
    listener::{Listener, Stream},
    runtime::{CHANNEL_MESSAGES, Message},
};

/// How many answers to pings and to a Close frame can wait for the writing half.
const ANSWERS: usize = 16;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("the client sent a Close frame")]
    Closed,
    #[error("a message is invalid")]
    Foreign,
    #[error("the client lags by more than the channel's capacity")]
    Lagged,
    #[error(transparent)]
    WebSocket(#[from] WebSocketError),
}

/// Serves until it is killed.
pub(crate) async fn serve(mut listener: Listener) -> io::Result<()> {
    let (channel, _) = broadcast::channel(CHANNEL_MESSAGES);
    loop {
        let (stream, _) = listener.accept().await?;
        tokio::spawn(serve_connection(stream, channel.clone()));
    }
}

async fn serve_connection(stream: Stream, channel: broadcast::Sender<Bytes>) -> hyper::Result<()> {
    let service = service_fn(|request| {
        let channel = channel.clone();
        async move { Ok::<_, Infallible>(answer(request, channel)) }
    });
    http1::Builder::new().serve_connection(TokioIo::new(stream), service).with_upgrades().await
}

fn answer(mut request: Request<Incoming>, channel: broadcast::Sender<Bytes>) -> Response<Empty<Bytes>> {
    match upgrade::upgrade(&mut request) {
        Ok((response, upgraded)) => {
            if request.uri().path() == "/echo" {
                tokio::spawn(unconstrained(repeat(upgraded)));
            } else {
                tokio::spawn(unconstrained(join(upgraded, channel)));
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

async fn join(upgraded: UpgradeFut, channel: broadcast::Sender<Bytes>) -> Result<(), Ended> {
    let (reader, writer) = upgraded.await?.split(tokio::io::split);
    let messages = channel.subscribe();
    let (answers, pending) = mpsc::channel(ANSWERS);
    let mut reader = FragmentCollectorRead::new(reader);
    let reading = async {
        let mut send_answer = |frame| {
            let answers = answers.clone();
            async move { answers.send(frame).await }
        };
        loop {
            let frame = reader.read_frame(&mut send_answer).await?;
            if let Some(text) = relay(&frame)? {
                // Fails only without receivers, and this connection is one.
                let _ = channel.send(text);
            }
        }
    };
    tokio::select! {
        ended = reading => ended,
        ended = write(writer, messages, pending) => ended,
    }
}

async fn write<S: AsyncWrite + Unpin>(
    mut writer: WebSocketWrite<S>,
    mut messages: broadcast::Receiver<Bytes>,
    mut answers: mpsc::Receiver<Frame<'static>>,
) -> Result<(), Ended> {
    loop {
        tokio::select! {
            Some(answer) = answers.recv() => writer.write_frame(answer).await?,
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

/// The text to send for a frame: none for a pong.
fn relay(frame: &Frame<'_>) -> Result<Option<Bytes>, Ended> {
    match frame.opcode {
        OpCode::Text => Message::relay_shared(&frame.payload).map(Some).ok_or(Ended::Foreign),
        OpCode::Close => Err(Ended::Closed),
        _ => Ok(None),
    }
}
