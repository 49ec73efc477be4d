//! A process without file descriptors: alone in its file, because the limit is the whole process's.
//!
//! A stream that is not a socket, here a TLS stream in a buffer, needs two descriptors more for a shard to have it, and
//! finds out that there are none only after the 101. Does not know what else a client can be refused for.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.
#![cfg(target_os = "linux")]

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::process::{Child, Command, Stdio};

use axum::serve::Listener;
use shardcast::WsHubConfig;
use testkit_hub::tls::{Buffered, TlsListener, TlsPair};
use testkit_hub::{Client, CommandHub, command_app, engine, within_timeout};
use tokio::net::TcpStream;

/// Takes all free descriptors from this process, until it is told otherwise: by one that has its own.
struct Famine {
    helper: Child,
}

impl Famine {
    fn begin() -> Self {
        let process = std::process::id();
        let end = format!("read line; prlimit --pid {process} --nofile=1024:");
        let helper = Command::new("sh").args(["-c", &end]).stdin(Stdio::piped()).spawn().unwrap();
        let lowest_free = File::open("/dev/null").unwrap().as_raw_fd();
        let (process, limit) = (process.to_string(), format!("--nofile={lowest_free}:"));
        let begun = Command::new("prlimit").args(["--pid", &process, &limit]).status().unwrap();
        assert!(begun.success());
        assert!(File::open("/dev/null").is_err());
        Self { helper }
    }

    fn end(mut self) {
        self.helper.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert!(self.helper.wait().unwrap().success());
    }
}

#[tokio::test]
async fn a_client_for_whom_no_descriptors_are_left_is_told_to_come_back_later() {
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let tls = TlsPair::new(&[]);
    let server = Buffered(TlsListener::bind(&tls, |_| Ok(())).await.unwrap());
    let address = server.local_addr().unwrap();
    let app = command_app(hub.clone());
    tokio::spawn(async move { axum::serve(server, app).await.unwrap() });
    let connect = async || {
        let socket = TcpStream::connect(address).await.unwrap();
        within_timeout(tls.connect(socket)).await.unwrap()
    };
    let shake_hands = async |stream| {
        let (socket, response) =
            within_timeout(tokio_tungstenite::client_async("wss://localhost/ws", stream)).await.unwrap();
        assert_eq!(response.status(), 101);
        Client { socket }
    };

    // Connected; what comes now needs a pair of sockets.
    let first = connect().await;
    let famine = Famine::begin();
    assert_eq!(shake_hands(first).await.closed().await.0, 1013);
    famine.end();

    let mut second = shake_hands(connect().await).await;
    second.recv_text().await; // its id
    assert_eq!(hub.len(), 1);
    second.leave().await;
}
