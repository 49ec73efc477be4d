//! The client's end of a connection: a bare stream, or a TLS session on one.
//!
//! Blocking or not, as the test sets it. Over TLS the handshake is made in memory, before either end is used. Which of both
//! a client gets is decided for all clients of a test by [`over`]. Does not know frames or the engine.

use std::cell::Cell;
use std::io::{self, ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};

use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection};
use shardcast_engine::TlsSession;

/// What clients and engine talk over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transport {
    /// A pair of sockets.
    Plain,
    /// TLS over TCP.
    Tls,
    /// The same, with a server's session that has buffers of its own.
    BufferedTls,
}

thread_local! {
    static TRANSPORT: Cell<Transport> = const { Cell::new(Transport::Plain) };
}

/// Runs a test whose clients connect over this.
pub fn over(transport: Transport, test: impl FnOnce()) {
    TRANSPORT.set(transport);
    test();
}

/// What the clients of the test on this thread connect over.
pub fn transport() -> Transport {
    TRANSPORT.get()
}

/// Makes two tests of a function: `NAME::plain` and `NAME::over_tls`.
///
/// For tests that do not depend on when the client's kernel acknowledges: over TLS the clients are on TCP, whose clock a test
/// cannot drive. Nor on how little the kernel keeps.
#[macro_export]
macro_rules! on_each_transport {
    ($name:ident) => {
        mod $name {
            #[test]
            fn plain() {
                $crate::stream::over($crate::stream::Transport::Plain, super::$name);
            }

            #[test]
            fn over_tls() {
                $crate::stream::over($crate::stream::Transport::Tls, super::$name);
            }
        }
    };
}

/// The client's end of a connection. Dropped without a word: over TLS no `close_notify` is sent.
#[derive(Debug)]
pub enum Stream {
    /// A bare stream; also a TCP connection, which is only read, written and shut down.
    Plain(UnixStream),
    /// A session on such a stream.
    Tls(UnixStream, Box<ClientConnection>),
}

impl From<UnixStream> for Stream {
    fn from(stream: UnixStream) -> Self {
        Self::Plain(stream)
    }
}

impl Stream {
    fn bare(&self) -> &UnixStream {
        match self {
            Self::Plain(stream) | Self::Tls(stream, _) => stream,
        }
    }

    /// As [`UnixStream::set_nonblocking`].
    pub fn set_nonblocking(&self, is_nonblocking: bool) -> io::Result<()> {
        self.bare().set_nonblocking(is_nonblocking)
    }

    /// As [`UnixStream::shutdown`]. If only the client's side ends, so does that of its session.
    pub fn shutdown(&mut self, how: Shutdown) -> io::Result<()> {
        if let (Self::Tls(stream, session), Shutdown::Write) = (&mut *self, how) {
            session.send_close_notify();
            while session.wants_write() {
                session.write_tls(stream)?;
            }
        }
        self.bare().shutdown(how)
    }

    /// Reads at most `max` bytes from the kernel; returns what they are, which over TLS is nothing unless they complete a
    /// record.
    pub fn take_at_most(&mut self, max: usize) -> io::Result<Vec<u8>> {
        let mut received = vec![0; max];
        let count = self.bare().read(&mut received)?;
        received.truncate(count);
        let Self::Tls(_, session) = self else { return Ok(received) };
        let (mut rest, mut plaintext) = (&received[..], Vec::new());
        while !rest.is_empty() {
            session.read_tls(&mut rest)?;
            session.process_new_packets().map_err(io::Error::other)?;
            match session.reader().read_to_end(&mut plaintext) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                result => drop(result?),
            }
        }
        Ok(plaintext)
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.read(buffer),
            Self::Tls(stream, session) => {
                // A stream that ends without its session has ended all the same, as a plain one.
                match rustls::Stream::new(&mut **session, stream).read(buffer) {
                    Err(error) if error.kind() == ErrorKind::UnexpectedEof => Ok(0),
                    result => result,
                }
            }
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(stream) => stream.write(bytes),
            Self::Tls(stream, session) => {
                while session.wants_write() {
                    session.write_tls(stream)?;
                }
                let count = session.writer().write(bytes)?;
                while session.wants_write() {
                    match session.write_tls(stream) {
                        Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                        sent => drop(sent?),
                    }
                }
                Ok(count)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        let Self::Tls(stream, session) = self else { return Ok(()) };
        while session.wants_write() {
            session.write_tls(stream)?;
        }
        Ok(())
    }
}

/// Sessions of a server and a client whose handshake is over.
pub fn sessions() -> (TlsSession, ClientConnection) {
    let mut server = TlsSession::new(CONFIGS.0.clone()).expect("a session");
    let client = shake_hands(|records| {
        let mut answer = Vec::new();
        server.decrypt(records, &mut answer, |_| {});
        answer
    });
    assert!(!server.is_handshaking());
    (server, client)
}

/// The same; the server's has buffers of its own.
pub fn buffered_sessions() -> (ServerConnection, ClientConnection) {
    let mut server = ServerConnection::new(CONFIGS.0.clone()).expect("a session");
    let client = shake_hands(|records| {
        let (mut records, mut answer) = (&records[..], Vec::new());
        while !records.is_empty() {
            server.read_tls(&mut records).expect("memory");
            server.process_new_packets().expect("a handshake");
        }
        while server.wants_write() {
            server.write_tls(&mut answer).expect("memory");
        }
        answer
    });
    assert!(!server.is_handshaking());
    (server, client)
}

/// The client's session, after a handshake with a server that answers like this.
fn shake_hands(mut answer: impl FnMut(&mut [u8]) -> Vec<u8>) -> ClientConnection {
    let name = ServerName::try_from("localhost").expect("a host name");
    let mut client = ClientConnection::new(CONFIGS.1.clone(), name).expect("a session");
    while client.wants_write() {
        let mut records = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut records).expect("memory");
        }
        let answer = answer(&mut records);
        let mut received = &answer[..];
        while !received.is_empty() {
            client.read_tls(&mut received).expect("memory");
            client.process_new_packets().expect("a handshake");
        }
    }
    assert!(!client.is_handshaking());
    client
}

static CONFIGS: LazyLock<(Arc<ServerConfig>, Arc<ClientConfig>)> = LazyLock::new(configs);

fn configs() -> (Arc<ServerConfig>, Arc<ClientConfig>) {
    let made = rcgen::generate_simple_self_signed(["localhost".to_owned()]).expect("a certificate");
    let certificate: CertificateDer<'static> = made.cert.der().clone();
    let key = PrivateKeyDer::try_from(made.signing_key.serialize_der()).expect("a private key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let server = ServerConfig::builder_with_provider(provider.clone())
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(vec![certificate.clone()], key));
    let mut roots = RootCertStore::empty();
    roots.add(certificate).expect("a certificate");
    let client = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("ring has them")
        .with_root_certificates(roots)
        .with_no_client_auth();
    (Arc::new(server.expect("the key fits the certificate")), Arc::new(client))
}
