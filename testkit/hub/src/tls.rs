//! TLS for tests: a server and a client that trust each other, and a listener for `axum::serve`.
//!
//! The certificate is for `localhost`, signed by itself, and made anew for each pair.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::serve::Listener;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use tokio::io::BufStream;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

pub use tokio_rustls::rustls;

/// The configurations of a server and of clients that trust it.
#[derive(Debug, Clone)]
pub struct TlsPair {
    server: Arc<rustls::ServerConfig>,
    certificate: CertificateDer<'static>,
    key: Vec<u8>,
    /// The client's.
    pub client: Arc<rustls::ClientConfig>,
}

impl TlsPair {
    /// Both sides offer these protocols by ALPN, or none if there are none.
    pub fn new(alpn: &[&str]) -> Self {
        let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
        let certificate = made.cert.der().clone();
        let key = made.signing_key.serialize_der();
        let private_key = PrivateKeyDer::try_from(key.clone()).expect("a private key");
        let mut server = rustls::ServerConfig::builder_with_provider(ring())
            .with_safe_default_protocol_versions()
            .expect("ring has them")
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], private_key)
            .expect("the key fits the certificate");
        server.alpn_protocols = protocols(alpn);
        let client = client_that_trusts(certificate.clone(), alpn);
        Self { server: Arc::new(server), certificate, key, client }
    }

    /// The certificate as a file of root certificates has it.
    pub fn certificate_pem(&self) -> String {
        pem("CERTIFICATE", &self.certificate)
    }

    /// The server's private key as a file.
    pub fn key_pem(&self) -> String {
        pem("PRIVATE KEY", &self.key)
    }

    /// The server's configuration.
    pub fn server_config(&self) -> Arc<rustls::ServerConfig> {
        self.server.clone()
    }

    /// Accepts TLS on the server's side.
    pub fn acceptor(&self) -> TlsAcceptor {
        self.server.clone().into()
    }

    /// Connects a client by TLS.
    pub async fn connect(&self, socket: TcpStream) -> io::Result<client::TlsStream<TcpStream>> {
        connect(self.client.clone(), socket).await
    }
}

fn ring() -> Arc<rustls::crypto::CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

fn protocols(alpn: &[&str]) -> Vec<Vec<u8>> {
    alpn.iter().map(|protocol| protocol.as_bytes().to_vec()).collect()
}

/// The configuration of clients that trust this certificate alone and offer these protocols.
pub fn client_that_trusts(certificate: CertificateDer<'static>, alpn: &[&str]) -> Arc<rustls::ClientConfig> {
    let mut roots = rustls::RootCertStore::empty();
    roots.add(certificate).expect("a certificate");
    let mut client = rustls::ClientConfig::builder_with_provider(ring())
        .with_safe_default_protocol_versions()
        .expect("ring has them")
        .with_root_certificates(roots)
        .with_no_client_auth();
    client.alpn_protocols = protocols(alpn);
    Arc::new(client)
}

/// Connects a client to `localhost` by TLS.
pub async fn connect(
    client: Arc<rustls::ClientConfig>,
    socket: TcpStream,
) -> io::Result<client::TlsStream<TcpStream>> {
    let name = ServerName::try_from("localhost").expect("a host name");
    TlsConnector::from(client).connect(name, socket).await
}

fn pem(label: &str, bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut pem = format!("-----BEGIN {label}-----\n");
    for line in bytes.chunks(48) {
        for bytes in line.chunks(3) {
            let bits =
                bytes.iter().fold(0, |bits, byte| bits << 8 | usize::from(*byte)) << (8 * (3 - bytes.len()));
            for digit in 0..4 {
                let value = bits >> (18 - 6 * digit) & 63;
                pem.push(if digit <= bytes.len() { char::from(DIGITS[value]) } else { '=' });
            }
        }
        pem.push('\n');
    }
    pem + &format!("-----END {label}-----\n")
}

/// Accepts TLS connections for `axum::serve`, one after the other: enough for a test. Drops a client whose handshake fails.
#[allow(missing_debug_implementations, reason = "a TlsAcceptor cannot be shown")]
pub struct TlsListener {
    listener: TcpListener,
    acceptor: TlsAcceptor,
    prepare: fn(&TcpStream) -> io::Result<()>,
}

impl TlsListener {
    /// On a free port of this machine. `prepare` gets each socket before its handshake.
    pub async fn bind(pair: &TlsPair, prepare: fn(&TcpStream) -> io::Result<()>) -> io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        Ok(Self { listener, acceptor: pair.acceptor(), prepare })
    }
}

impl Listener for TlsListener {
    type Io = server::TlsStream<TcpStream>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        loop {
            let Ok((socket, address)) = self.listener.accept().await else {
                // There is no descriptor left. As axum does it, which waits longer.
                tokio::time::sleep(Duration::from_millis(10)).await;
                continue;
            };
            (self.prepare)(&socket).expect("an open socket");
            if let Ok(stream) = self.acceptor.accept(socket).await {
                return (stream, address);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// The same streams in a buffer: none that a shard can own, so they are bridged.
#[allow(missing_debug_implementations, reason = "a TlsAcceptor cannot be shown")]
pub struct Buffered(pub TlsListener);

impl Listener for Buffered {
    type Io = BufStream<server::TlsStream<TcpStream>>;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, SocketAddr) {
        let (stream, address) = self.0.accept().await;
        (BufStream::new(stream), address)
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.0.local_addr()
    }
}
