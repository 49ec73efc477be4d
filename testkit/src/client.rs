//! Connections that an engine has not adopted yet, each with the client at its other end.
//!
//! Real sockets of this machine, without a handshake: a socket pair, or TCP where TCP matters; TCP with a TLS session for a
//! test that runs over TLS.

use std::net::{TcpListener, TcpStream};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use shardcast_engine::{
    ConnectionConfig, ConnectionId, Encoding, Engine, MakeHandler, NewConnection, Socket,
};

use crate::handler::{Record, Recorder};
use crate::raw_client::RawClient;
use crate::stream::{Stream, Transport, buffered_sessions, sessions, transport};
use crate::task::lock;

/// A client, and what the handler of its connection recorded.
#[derive(Debug)]
pub struct Client {
    /// The client itself.
    pub peer: RawClient,
    /// Shared with the handler.
    pub record: Arc<Mutex<Record>>,
}

impl Client {
    /// What the handler has recorded so far.
    pub fn record(&self) -> Record {
        lock(&self.record).clone()
    }

    /// The id of the connection. Panics before it is open.
    pub fn id(&self) -> ConnectionId {
        self.record().id.expect("the connection is open")
    }

    /// Whether the handler answers `Pending` when it is told of drops, from now on.
    pub fn wait_at_drop(&self, waits: bool) {
        lock(&self.record).waits_at_drop = waits;
    }

    /// Wakes the handler. Panics if it is not waiting.
    pub fn release(&self) {
        let waker = lock(&self.record).waker.take().expect("the handler waits");
        waker.wake();
    }
}

/// A connection whose handler records its calls. `send_buffer` is how many bytes the kernel keeps for the client; Linux
/// doubles it.
pub fn new_connection(
    engine: &Engine,
    config: &Arc<ConnectionConfig>,
    send_buffer: usize,
) -> (NewConnection, Client) {
    let record = Arc::new(Mutex::new(Record::default()));
    let recorder = Recorder(record.clone());
    let (new_connection, peer) =
        new_connection_with(engine, config, send_buffer, Box::new(|_| Box::new(recorder)));
    (new_connection, Client { peer, record })
}

/// A connection with a handler of the test.
pub fn new_connection_with(
    engine: &Engine,
    config: &Arc<ConnectionConfig>,
    send_buffer: usize,
    handler: MakeHandler,
) -> (NewConnection, RawClient) {
    let (socket, theirs) = match transport() {
        Transport::Plain => {
            let (ours, theirs) = UnixStream::pair().expect("a pair of sockets");
            socket2::SockRef::from(&ours).set_send_buffer_size(send_buffer).expect("a buffer");
            (ours.into(), Stream::from(theirs))
        }
        transport => {
            let (ours, theirs) = tcp_pair(send_buffer);
            let (socket, client) = if transport == Transport::BufferedTls {
                let (server, client) = buffered_sessions();
                (Socket::tls_buffered(ours, server), client)
            } else {
                let (server, client) = sessions();
                (Socket::tls(ours, server, Vec::new()), client)
            };
            (socket, Stream::Tls(OwnedFd::from(theirs).into(), Box::new(client)))
        }
    };
    (connection_on(socket, engine, config, handler), RawClient::new(theirs))
}

/// A connection on any socket.
pub(crate) fn connection_on(
    socket: Socket,
    engine: &Engine,
    config: &Arc<ConnectionConfig>,
    handler: MakeHandler,
) -> NewConnection {
    NewConnection {
        socket,
        received: Bytes::new(),
        handler,
        config: config.clone(),
        encoding: Encoding::PLAIN,
        permit: engine.admit(None).expect("a permit"),
        rate_limit: None,
        user: None,
        first_message: None,
        expires_at: None,
    }
}

/// Both ends of a TCP connection; the kernel keeps few bytes at the client's end, and `send_buffer` at ours.
fn tcp_pair(send_buffer: usize) -> (TcpStream, TcpStream) {
    use socket2::{Domain, Socket, Type};
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let theirs = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
    theirs.set_recv_buffer_size(4096).expect("a buffer");
    theirs.connect(&listener.local_addr().expect("an address").into()).expect("a connection");
    theirs.set_tcp_nodelay(true).expect("a socket");
    let ours = listener.accept().expect("a connection").0;
    socket2::SockRef::from(&ours).set_send_buffer_size(send_buffer).expect("a buffer");
    (ours, theirs.into())
}

/// A connection over TCP, whose handler records its calls.
pub fn new_tcp_connection(engine: &Engine, config: &Arc<ConnectionConfig>) -> (NewConnection, Client) {
    let (mut new_connection, mut client) = new_connection(engine, config, 4096);
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let theirs = TcpStream::connect(listener.local_addr().expect("an address")).expect("a connection");
    theirs.set_nodelay(true).expect("a socket");
    new_connection.socket = listener.accept().expect("a connection").0.into();
    client.peer = RawClient::new_tcp(theirs);
    (new_connection, client)
}

/// Raises the limit on descriptors of this process to `count`: some systems begin with 1,024. Panics if so many are not
/// allowed.
pub fn ask_for_descriptors(count: u64) {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current.is_some_and(|current| current < count) {
        let limit = Rlimit { current: Some(count), maximum };
        setrlimit(Resource::Nofile, limit).expect("so many descriptors are allowed");
    }
}
