//! A WebSocket client for scripts: sends each line of its standard input, and prints each message that it receives.
//!
//! `websocket_lines URL`. Prints `connected` first and `closed` last. The end of its input ends nothing. `ci/partition` runs
//! it in network namespaces.

#![allow(clippy::print_stdout, clippy::unwrap_used, reason = "a script sees its output, and how it ended")]

use std::io::BufRead as _;

use futures_util::{SinkExt as _, StreamExt as _};
use testkit_hub::Client;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::Message;

fn main() {
    let url = std::env::args().nth(1).expect("usage: websocket_lines URL");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (sender, mut lines) = mpsc::unbounded_channel();
    std::thread::spawn(move || {
        for line in std::io::stdin().lock().lines().map_while(Result::ok) {
            let _ = sender.send(line); // the connection has ended
        }
    });
    runtime.block_on(async {
        let (mut outgoing, mut incoming) = Client::connect(url).await.socket.split();
        println!("connected");
        let send = async {
            while let Some(line) = lines.recv().await {
                outgoing.send(Message::text(line)).await.unwrap();
            }
            std::future::pending().await
        };
        let receive = async {
            while let Some(Ok(message)) = incoming.next().await {
                if let Message::Text(text) = message {
                    println!("{text}");
                }
            }
        };
        tokio::select! {
            () = send => {}
            () = receive => println!("closed"),
        }
    });
}
