//! What all servers on tokio share: flags, runtime, listener, and the message.
//!
//! So that the crates are compared and not our use of them: each server gets the same runtime and listener,
//! and decodes and encodes each message as a hub does. Does not know
//! WebSocket.

use std::{future::Future, io, net::Ipv4Addr, path::PathBuf};

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokio::{
    net::TcpListener,
    runtime::{Builder, Runtime},
};

use super::listener::Listener;
use crate::{
    cpu::{self, PinError},
    tls::{self, TlsError},
};

/// The capacity of a broadcast channel, where the crate's own example does not set one: more than any scenario has in
/// flight, so that only clients that do not read lose messages.
pub(crate) const CHANNEL_MESSAGES: usize = 1024;

/// The command line of a server on tokio.
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
    /// Serve over TLS, with the certificate and the private key in this PEM file.
    #[arg(long)]
    tls: Option<PathBuf>,
}

/// Why a server stopped.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ServeError {
    #[error(transparent)]
    Pin(#[from] PinError),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error("the server's socket failed")]
    Io(#[from] io::Error),
    #[error("the accepting task failed")]
    Join(#[from] tokio::task::JoinError),
}

/// The load generator's message.
#[derive(Debug, Deserialize, Serialize)]
pub(crate) struct Message {
    t: u64,
    p: String,
}

impl Message {
    /// Decodes a message and encodes it again; `None` when it is invalid.
    pub(crate) fn relay(text: &[u8]) -> Option<String> {
        let message: Self = serde_json::from_slice(text).ok()?;
        serde_json::to_string(&message).ok()
    }

    /// The same, as bytes that connections can share.
    pub(crate) fn relay_shared(text: &[u8]) -> Option<Bytes> {
        Self::relay(text).map(Bytes::from)
    }
}

/// Runs `serve` until the process is killed.
pub(crate) fn run<F>(options: &Options, serve: impl FnOnce(Listener) -> F) -> Result<(), ServeError>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    cpu::pin(options.cpu)?;
    let tls = options.tls.as_deref().map(tls::server_config).transpose()?;
    runtime(options.threads)?.block_on(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, options.port)).await?;
        let listener = Listener::new(listener, tls);
        println!("{}", super::READY);
        // Spawned, because block_on would run the accept loop on an additional thread.
        Ok(tokio::spawn(serve(listener)).await??)
    })
}

/// For one thread a current-thread runtime, tokio's fastest.
fn runtime(threads: usize) -> io::Result<Runtime> {
    match threads {
        0 | 1 => Builder::new_current_thread().enable_all().build(),
        _ => Builder::new_multi_thread().worker_threads(threads).enable_all().build(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_relayed_unchanged_and_an_invalid_one_is_not() {
        let text = r#"{"t":1000000000,"p":"xx"}"#;
        assert_eq!(Message::relay(text.as_bytes()).as_deref(), Some(text));
        assert_eq!(Message::relay(b"{}"), None);
    }
}
