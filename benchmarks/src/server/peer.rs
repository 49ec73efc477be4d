//! What all peers on tokio have in common: flags, runtime, socket options, and the message.
//!
//! So that a comparison compares the crates and not our use of them: each peer gets the same runtime, TCP_NODELAY
//! (without it Nagle's algorithm would be measured), and the same work on a message as a hub has, to decode what came
//! and to encode what goes. Knows no WebSocket.

use std::{future::Future, io, net::Ipv4Addr};

use axum::serve::{Listener, ListenerExt};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
};

use crate::cpu::{self, PinError};

/// How many messages a broadcast channel holds, where the crate's own example does not say: more than any scenario
/// has in flight, so that nobody loses but who does not read.
pub(crate) const CHANNEL_MESSAGES: usize = 1024;

/// What a peer is told.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    #[arg(long)]
    port: u16,
    /// Threads of the tokio runtime.
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// The core to run on, for all threads.
    #[arg(long)]
    cpu: Option<usize>,
}

/// Why a peer did not serve.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PeerError {
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error("the peer could not serve")]
    Io(#[from] io::Error),
    #[error("the accepting task failed")]
    Join(#[from] tokio::task::JoinError),
}

/// The message of the load generator, as a hub sees it.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Message {
    t: u64,
    p: String,
}

impl Message {
    /// Decodes a message and encodes it again; `None` when it is not ours.
    pub(crate) fn relay(text: &[u8]) -> Option<String> {
        let message: Self = serde_json::from_slice(text).ok()?;
        serde_json::to_string(&message).ok()
    }

    /// The same, as bytes that many connections share.
    pub(crate) fn relay_shared(text: &[u8]) -> Option<Bytes> {
        Self::relay(text).map(Bytes::from)
    }
}

/// Runs `serve` on the runtime that was asked for, until the server is killed.
pub(crate) fn run<F>(options: &Options, serve: impl FnOnce(TcpListener) -> F) -> Result<(), PeerError>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    cpu::pin(options.cpu)?;
    runtime(options.threads)?.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, options.port)).await?;
        println!("{}", super::READY);
        // Spawned, because block_on would run the accept loop on one more thread than was asked for.
        Ok(tokio::spawn(serve(listener)).await??)
    })
}

/// One thread is a current-thread runtime, the quickest that tokio has for it.
fn runtime(threads: usize) -> io::Result<Runtime> {
    match threads {
        0 | 1 => Builder::new_current_thread().enable_all().build(),
        _ => Builder::new_multi_thread().worker_threads(threads).enable_all().build(),
    }
}

/// The listener for axum's peers.
pub(crate) fn without_delay(
    listener: TcpListener,
) -> impl Listener<Io = tokio::net::TcpStream, Addr = std::net::SocketAddr> {
    listener.tap_io(|stream| {
        // A socket that refuses is about to fail anyway, and its own task will see it.
        let _ = stream.set_nodelay(true);
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_relayed_as_it_came_and_nonsense_is_not() {
        let text = r#"{"t":1000000000,"p":"xx"}"#;
        assert_eq!(Message::relay(text.as_bytes()).as_deref(), Some(text));
        assert_eq!(Message::relay(b"{}"), None);
    }
}
