//! A process without file descriptors. One test in a file of its own: the limit is the whole process's, and descriptors
//! that another test closes would be free.
//!
//! A client takes one descriptor, over TLS, too, and while there is none for the next one, that one waits. A stream that is
//! neither a socket nor a TLS session on one, here a TLS stream in a buffer, needs two descriptors more for a shard to have
//! it, and finds out that there are none only after the 101. Does not know what else a client can be refused for.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.
#![cfg(target_os = "linux")]

use std::fs::{File, read_dir, symlink_metadata};
use std::io::Write as _;
use std::process::{Child, Command, Stdio};

use axum::serve::Listener;
use shardcast::WsHubConfig;
use testkit::time::ms;
use testkit_hub::tls::{Buffered, TlsListener, TlsPair};
use testkit_hub::{
    Client, CommandHub, Server, Transport, command_app, connect, engine, eventually, logged, within_timeout,
};
use tokio::net::TcpStream;
use tokio::time::timeout;

#[tokio::test]
async fn clients_wait_or_are_told_to_come_back_later_while_no_descriptors_are_left() {
    for transport in [Transport::Plain, Transport::Tls] {
        alone(each_client_takes_one_descriptor_and_one_without_waits_until_another_leaves(transport)).await;
    }
    alone(a_client_for_whom_no_descriptors_are_left_is_told_to_come_back_later()).await;
}

/// Returns when all descriptors of the scenario are closed.
async fn alone(scenario: impl Future<Output = ()>) {
    let descriptors = || read_dir("/proc/self/fd").unwrap().count();
    let before = descriptors();
    scenario.await;
    eventually(before, descriptors).await;
}

/// Takes the free descriptors from this process, until it is told otherwise: by one that has its own.
struct Famine {
    helper: Child,
}

impl Famine {
    /// All but so many.
    fn begin(left: usize) -> Self {
        let process = std::process::id();
        let end = format!("read line; prlimit --pid {process} --nofile=1024:");
        let helper = Command::new("sh").args(["-c", &end]).stdin(Stdio::piped()).spawn().unwrap();
        let is_free = |number: &usize| symlink_metadata(format!("/proc/self/fd/{number}")).is_err();
        let limit = (0..).filter(is_free).nth(left).unwrap();
        let (process, limit) = (process.to_string(), format!("--nofile={limit}:"));
        let begun = Command::new("prlimit").args(["--pid", &process, &limit]).status().unwrap();
        assert!(begun.success());
        let all: Vec<_> = (0..left).map(|_| File::open("/dev/null").unwrap()).collect();
        assert!(File::open("/dev/null").is_err());
        drop(all);
        Self { helper }
    }

    fn end(mut self) {
        self.helper.stdin.take().unwrap().write_all(b"\n").unwrap();
        assert!(self.helper.wait().unwrap().success());
    }
}

async fn each_client_takes_one_descriptor_and_one_without_waits_until_another_leaves(transport: Transport) {
    const CLIENTS: usize = 8;
    let (_guard, logged) = logged();
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let server = Server::start_over(transport, command_app(hub.clone())).await;
    let url = server.url("/ws");
    let (first, _) = connect(&url).await;

    // One at either end of each connection, and that of one more client.
    let famine = Famine::begin(2 * CLIENTS + 1);
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(connect(&url).await.0);
    }
    let mut late = Box::pin(connect(&url));
    assert!(timeout(ms(100), &mut late).await.is_err(), "it is neither admitted nor refused");
    assert_eq!(hub.len(), CLIENTS + 1);
    if transport == Transport::Tls {
        assert_eq!(logged("ERROR"), 1, "axum's own listener logs the same, with its feature `tracing`");
        assert_eq!(logged("no connection can be accepted"), 1);
    }
    for client in &mut clients {
        client.send_text("still served").await;
        client.recv_texts(&["still served"]).await;
    }
    first.leave().await;
    late.await.0.leave().await;
    famine.end();
    eventually(CLIENTS, || hub.len()).await;
}

async fn a_client_for_whom_no_descriptors_are_left_is_told_to_come_back_later() {
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let tls = TlsPair::new(&[]);
    let server = Buffered(TlsListener::bind(&tls, |_| Ok(())).await.unwrap());
    let address = server.local_addr().unwrap();
    let app = command_app(hub.clone());
    let serving = tokio::spawn(async move { axum::serve(server, app).await.unwrap() });
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
    let famine = Famine::begin(0);
    assert_eq!(shake_hands(first).await.closed().await.0, 1013);
    famine.end();

    let mut second = shake_hands(connect().await).await;
    second.recv_text().await; // its id
    assert_eq!(hub.len(), 1);
    second.leave().await;
    serving.abort();
}
