//! Ids as text: what excludes a client, and what is said about a text that does not.
//!
//! In a file of its own, because it reads the process's log.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::io;
use std::time::Instant;

use shardcast::WsHubConfig;
use testkit_hub::{CommandHub, Server, command_app, connect, engine};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};

/// Gives what is logged to a test.
struct Log(UnboundedSender<String>);

impl io::Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let _ = self.0.send(String::from_utf8_lossy(line).into_owned()); // the test may be over
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[tokio::test]
async fn a_text_that_is_no_id_excludes_nobody_and_is_logged_once_in_a_second() {
    const MESSAGES: usize = 200;
    let (sender, mut lines) = unbounded_channel();
    tracing_subscriber::fmt().with_ansi(false).with_writer(move || Log(sender.clone())).init();
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let server = Server::start(command_app(hub)).await;
    let (mut ada, ada_id) = connect(&server.url("/ws")).await;
    let (mut bob, _) = connect(&server.url("/ws")).await;

    let start = Instant::now();
    let long = "x".repeat(100);
    for _ in 0..MESSAGES {
        ada.send_text(format!("except {ada_id},{long} others")).await;
        bob.recv_texts(&["others"]).await;
    }
    ada.send_text(format!("except {long} all")).await;
    ada.recv_texts(&["all"]).await;
    bob.recv_texts(&["all"]).await;
    let seconds = start.elapsed().as_secs() as usize;

    let mut seen = Vec::new();
    while let Ok(line) = lines.try_recv() {
        if line.contains("no connection id") {
            seen.push(line);
        }
    }
    assert!((1..=seconds + 2).contains(&seen.len()), "{} lines in {seconds} s", seen.len());
    let level = if cfg!(debug_assertions) { "ERROR" } else { "WARN" };
    for line in seen {
        assert!(line.contains(level) && line.contains(&format!("{:?}", "x".repeat(64))), "{line}");
    }
}
