//! A process without file descriptors: alone in its file, because the limit is the whole process's.
//!
//! Behind TLS a connection needs two descriptors more than its socket, and finds out that there are none only after the
//! 101. Does not know what else a client can be refused for.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.
#![cfg(target_os = "linux")]

mod fixture;

use std::fs::File;
use std::io::Write as _;
use std::net::SocketAddr;
use std::os::fd::AsRawFd as _;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use fixture::{CommandHub, Peer, command_app, engine, within_timeout};
use shardcast::WsHubConfig;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, rustls, server};

struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
}

impl Listener for TlsListener {
    type Io = server::TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            if let Ok((socket, address)) = self.listener.accept().await {
                return (self.acceptor.accept(socket).await.unwrap(), address);
            }
            // No descriptor for anybody. As axum does it, which waits longer.
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A server's and a client's configuration that trust each other.
fn tls() -> (TlsAcceptor, TlsConnector) {
    let ring = || Arc::new(rustls::crypto::ring::default_provider());
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
    let key = rustls::pki_types::PrivateKeyDer::try_from(made.signing_key.serialize_der()).unwrap();
    let server = rustls::ServerConfig::builder_with_provider(ring())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![made.cert.der().clone()], key)
        .unwrap();
    let mut roots = rustls::RootCertStore::empty();
    roots.add(made.cert.der().clone()).unwrap();
    let client = rustls::ClientConfig::builder_with_provider(ring())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    (Arc::new(server).into(), Arc::new(client).into())
}

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
    let (acceptor, connector) = tls();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let app = command_app(hub.clone());
    let server = TlsListener { listener, acceptor };
    tokio::spawn(async move { axum::serve(server, app).await.unwrap() });
    let connect = async || {
        let socket = TcpStream::connect(address).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("localhost").unwrap();
        within_timeout(connector.connect(name, socket)).await.unwrap()
    };
    let shake_hands = async |stream| {
        let (socket, response) =
            within_timeout(tokio_tungstenite::client_async("wss://localhost/ws", stream)).await.unwrap();
        assert_eq!(response.status(), 101);
        Peer { socket }
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
