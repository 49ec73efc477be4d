//! TLS sessions in the shards, and the listener that accepts them.
//!
//! Real clients of rustls over real sockets, which do what a browser does not: they end the session without ending the
//! stream and the other way round, change keys, break records, say nothing. That hubs work over TLS as they do without is
//! in the suites that take a `Transport`, and in `tls_and_http2.rs`.
#![cfg(feature = "tls")]
#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::any;
use shardcast::tls::{PeerAddr, TlsConfig, TlsListener};
use shardcast::{
    CloseReason, Engine, EngineConfig, Hub, HubContext, RawCodec, UserLimit, WebSocketUpgrade, WsHub,
    WsHubConfig,
};
use shardcast_engine::{TlsEnd, TlsSession};
use testkit::frames::{CLOSE, FrameReader, TEXT, client_text, close_code};
use testkit_hub::tls::TlsPair;
use testkit_hub::{eventually, within_timeout};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinHandle;
use tokio_rustls::client::TlsStream;
use tokio_rustls::rustls::ClientConnection;

const HANDSHAKE: &str = "GET /ws HTTP/1.1\r\nhost: localhost\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
    sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n";

/// Sends back what it receives, a text that says `long N` as a text of so many bytes, and `wait` when there is a permit.
/// Reports ends.
struct Echo {
    ends: mpsc::UnboundedSender<CloseReason>,
    permits: Arc<Semaphore>,
}

impl WsHub for Echo {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        if text == "wait" {
            self.permits.acquire().await.unwrap().forget();
        }
        let long = text.strip_prefix("long ").map(|bytes| "x".repeat(bytes.parse().unwrap()));
        ctx.unicast(long.unwrap_or(text)).await;
    }

    async fn on_disconnected(&self, _: HubContext<Self>, reason: CloseReason) {
        let _ = self.ends.send(reason); // the test may be over
    }
}

/// A hub behind a [`TlsListener`].
struct Server {
    address: SocketAddr,
    pair: TlsPair,
    config: TlsConfig,
    engine: Engine,
    hub: Hub<Echo>,
    ends: mpsc::UnboundedReceiver<CloseReason>,
    permits: Arc<Semaphore>,
    task: JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start() -> Self {
        let config = WsHubConfig { max_message_bytes: 1 << 20, ..WsHubConfig::default() };
        Self::with(EngineConfig::default(), config, |listener| listener).await
    }

    /// One for each kind of session: of a [`TlsListener`], and of another server by `tokio_rustls`, with rustls' buffers.
    async fn of_each_kind() -> [Self; 2] {
        let config = WsHubConfig { max_message_bytes: 1 << 20, ..WsHubConfig::default() };
        [Self::start().await, Self::serving(EngineConfig::default(), config, None).await]
    }

    async fn with(
        engine: EngineConfig,
        hub: WsHubConfig,
        prepare: impl FnOnce(TlsListener) -> TlsListener + 'static,
    ) -> Self {
        Self::serving(engine, hub, Some(Box::new(prepare))).await
    }

    /// Behind a [`TlsListener`] that was prepared so, or behind `tokio_rustls`.
    async fn serving(
        engine: EngineConfig,
        hub: WsHubConfig,
        prepare: Option<Box<dyn FnOnce(TlsListener) -> TlsListener>>,
    ) -> Self {
        let engine = Engine::start(EngineConfig { shards: Some(2), pin: false, ..engine }).unwrap();
        let hub = engine.hub::<Echo>(hub).unwrap();
        let (report, ends) = mpsc::unbounded_channel();
        let permits = Arc::new(Semaphore::new(0));
        let for_hub = permits.clone();
        let serve = async move |ws: WebSocketUpgrade, State(hub): State<Hub<Echo>>| {
            ws.serve(&hub, Echo { ends: report.clone(), permits: for_hub.clone() }).user("ada")
        };
        let app = Router::new().route("/ws", any(serve)).with_state(hub.clone());
        let pair = TlsPair::new(&["http/1.1"]);
        let config = TlsConfig::from(pair.server_config());
        let (address, task) = match prepare {
            Some(prepare) => {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = listener.local_addr().unwrap();
                let listener = prepare(TlsListener::new(listener, config.clone()));
                let app = app.into_make_service_with_connect_info::<PeerAddr>();
                (address, tokio::spawn(async move { axum::serve(listener, app).await.unwrap() }))
            }
            None => {
                let listener = testkit_hub::tls::TlsListener::bind(&pair, |_| Ok(())).await.unwrap();
                let address = axum::serve::Listener::local_addr(&listener).unwrap();
                (address, tokio::spawn(async move { axum::serve(listener, app).await.unwrap() }))
            }
        };
        Self { address, pair, config, engine, hub, ends, permits, task }
    }

    async fn tls(&self) -> TlsStream<TcpStream> {
        let stream = TcpStream::connect(self.address).await.unwrap();
        within_timeout(self.pair.connect(stream)).await.unwrap()
    }

    /// A WebSocket, on which nothing happens unless it is asked for.
    async fn connect(&self) -> Client {
        let mut client = Client { stream: self.tls().await, reader: FrameReader::new(64 << 20) };
        let response = client.request().await;
        assert!(response.starts_with("HTTP/1.1 101 "), "{response}");
        client
    }

    /// A WebSocket for which the kernel keeps few bytes.
    async fn connect_narrow(&self) -> Client {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4096).unwrap();
        let stream = socket.connect(self.address).await.unwrap();
        let stream = within_timeout(self.pair.connect(stream)).await.unwrap();
        let mut client = Client { stream, reader: FrameReader::new(64 << 20) };
        client.request().await;
        client
    }

    async fn ended(&mut self) -> CloseReason {
        within_timeout(self.ends.recv()).await.unwrap()
    }
}

struct Client {
    stream: TlsStream<TcpStream>,
    reader: FrameReader,
}

impl Client {
    /// Asks for a WebSocket; returns the head of the response.
    async fn request(&mut self) -> String {
        self.stream.write_all(HANDSHAKE.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within_timeout(self.stream.read_u8()).await.unwrap());
        }
        String::from_utf8(head).unwrap()
    }

    async fn send(&mut self, text: &str) {
        within_timeout(self.stream.write_all(&client_text(text))).await.unwrap();
        within_timeout(self.stream.flush()).await.unwrap();
    }

    /// The next frame; none at the end of the session.
    async fn frame(&mut self) -> Option<(u8, Vec<u8>)> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            if let Some(frame) = self.reader.next_frame() {
                return Some(frame);
            }
            match within_timeout(self.stream.read(&mut buffer)).await.unwrap() {
                0 => return None,
                count => self.reader.feed(&buffer[..count]),
            }
        }
    }

    async fn recv(&mut self) -> String {
        match self.frame().await {
            Some((TEXT, text)) => String::from_utf8(text).unwrap(),
            other => panic!("no text but {other:?}"),
        }
    }

    /// Reads to the end: the code of the Close frame.
    async fn close_code(mut self) -> Option<u16> {
        let mut code = None;
        while let Some((opcode, payload)) = self.frame().await {
            if opcode == CLOSE {
                code = close_code(&payload);
            }
        }
        code
    }
}

#[tokio::test]
async fn messages_of_every_length_are_echoed() {
    for server in Server::of_each_kind().await {
        let mut client = server.connect().await;
        // Around the length of a record (16 KiB), of one write (64 KiB), and more than any buffer.
        for length in [0, 1, 125, 126, 16_383, 16_384, 16_385, 65_535, 65_536, 200_000, 1_000_000] {
            let text = "y".repeat(length);
            client.send(&text).await;
            assert_eq!(client.recv().await, text);
            client.send(&format!("long {length}")).await;
            assert_eq!(client.recv().await.len(), length);
        }
    }
}

#[tokio::test]
async fn what_a_client_sends_together_with_its_handshake_is_received() {
    for server in Server::of_each_kind().await {
        let mut client = Client { stream: server.tls().await, reader: FrameReader::new(1 << 20) };
        // In one record, and more than an HTTP server reads ahead.
        let texts: Vec<_> = (0..14).map(|number| format!("{number:01000}")).collect();
        let frames = texts.iter().map(|text| client_text(text));
        let all: Vec<u8> = std::iter::once(HANDSHAKE.into()).chain(frames).collect::<Vec<Vec<u8>>>().concat();
        client.stream.write_all(&all).await.unwrap();
        client.stream.flush().await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(within_timeout(client.stream.read_u8()).await.unwrap());
        }
        for text in texts {
            assert_eq!(client.recv().await, text);
        }
    }
}

#[tokio::test]
async fn what_was_decrypted_and_not_read_yet_is_read_when_the_handler_is_free() {
    for server in Server::of_each_kind().await {
        // Two of them are as much as is held for a busy handler and the rest of a record.
        for count in 1..=6 {
            let mut client = server.connect().await;
            let texts: Vec<_> = (0..count).map(|number| format!("{number:010000}")).collect();
            client.send("wait").await;
            for text in &texts {
                client.send(text).await; // one record each
            }
            eventually(true, || server.engine.metrics().unfinished_bytes > 10_000).await;
            server.permits.add_permits(1);
            assert_eq!(client.recv().await, "wait");
            for text in texts {
                assert_eq!(client.recv().await, text, "{count} messages");
            }
        }
    }
}

#[tokio::test]
async fn the_last_bytes_reach_a_slow_client_wherever_the_kernel_has_refused_them() {
    for server in Server::of_each_kind().await {
        for messages in 1..=40 {
            let mut client = server.connect_narrow().await;
            let text = "z".repeat(10_000);
            for _ in 0..messages {
                // A write of its own, which the kernel may take in part.
                let _receipt = server.hub.to_all().deliver(&text).await.unwrap();
            }
            for _ in 0..messages {
                assert_eq!(client.recv().await.len(), text.len(), "{messages} messages");
            }
            client.stream.shutdown().await.unwrap();
            eventually(0, || server.hub.len()).await;
        }
    }
}

#[tokio::test]
async fn the_end_of_a_session_counts_although_the_stream_goes_on() {
    for mut server in Server::of_each_kind().await {
        let mut client = server.connect().await;
        let mut records = Vec::new();
        let session = client.stream.get_mut().1;
        std::io::Write::write_all(&mut session.writer(), &client_text("last")).unwrap();
        session.send_close_notify();
        while session.wants_write() {
            session.write_tls(&mut records).unwrap();
        }
        client.stream.get_mut().0.write_all(&records).await.unwrap(); // both at once
        assert_eq!(client.recv().await, "last");
        assert_eq!(client.frame().await, None);
        assert_eq!(server.ended().await, CloseReason::Disconnected);
    }
}

#[tokio::test]
async fn a_record_may_be_cut_anywhere_and_hold_many_messages() {
    for server in Server::of_each_kind().await {
        let mut client = server.connect().await;
        let texts: Vec<_> = (0..50).map(|number| format!("message {number}")).collect();
        let frames: Vec<_> = texts.iter().flat_map(|text| client_text(text)).collect();
        // In one record, then a byte in each.
        client.stream.write_all(&frames).await.unwrap();
        for byte in &frames {
            client.stream.write_all(&[*byte]).await.unwrap();
            client.stream.flush().await.unwrap();
        }
        for text in texts.iter().chain(&texts) {
            assert_eq!(client.recv().await, *text);
        }
        // A record of which the kernel gets one byte at a time.
        let mut record = Vec::new();
        let session = client.stream.get_mut().1;
        std::io::Write::write_all(&mut session.writer(), &client_text("in pieces")).unwrap();
        session.write_tls(&mut record).unwrap();
        let socket = client.stream.get_mut().0;
        socket.set_nodelay(true).unwrap();
        for byte in record {
            socket.write_all(&[byte]).await.unwrap();
        }
        assert_eq!(client.recv().await, "in pieces");
    }
}

#[tokio::test]
async fn keys_are_updated_by_either_side() {
    for server in Server::of_each_kind().await {
        let mut client = server.connect().await;
        for round in 0..5 {
            client.stream.get_mut().1.refresh_traffic_keys().unwrap();
            let text = format!("under new keys {round}");
            client.send(&text).await;
            assert_eq!(client.recv().await, text);
        }
    }
}

/// Adds the records of a text to `records`.
fn encrypt(session: &mut ClientConnection, text: &str, records: &mut Vec<u8>) {
    std::io::Write::write_all(&mut session.writer(), &client_text(text)).unwrap();
    while session.wants_write() {
        session.write_tls(records).unwrap();
    }
}

#[tokio::test]
async fn records_that_are_longer_than_a_read_are_received_and_keys_may_change_within_a_burst() {
    // No record of 16 KiB arrives in one read, and many reads end within a record.
    let engine = EngineConfig { read_buffer_bytes: 1024, ..EngineConfig::default() };
    let config = WsHubConfig { max_message_bytes: 1 << 20, ..WsHubConfig::default() };
    let server = Server::with(engine, config, |listener| listener).await;
    let mut client = server.connect().await;
    let lengths = [20_000, 1, 999, 1_000, 1_001, 40_000, 0, 3_000, 16_300];
    let texts: Vec<_> = lengths
        .iter()
        .cycle()
        .take(30)
        .enumerate()
        .map(|(n, length)| format!("{n} {:x<length$}", ""))
        .collect();
    let mut records = Vec::new();
    let session = client.stream.get_mut().1;
    for (number, text) in texts.iter().enumerate() {
        if number % 7 == 3 {
            session.refresh_traffic_keys().unwrap(); // and asks the server for the same
        }
        encrypt(session, text, &mut records);
    }
    let (mut reading, mut writing) = tokio::io::split(client.stream.get_mut().0);
    // The client's session is not needed for what is encrypted already, so the answers can be read meanwhile.
    let (mut answers, mut received) = (Vec::new(), vec![0; 64 << 10]);
    let send = async { writing.write_all(&records).await.unwrap() };
    let receive = async {
        let all: usize = texts.iter().map(String::len).sum();
        while answers.len() < all {
            let count = within_timeout(reading.read(&mut received)).await.unwrap();
            assert_ne!(count, 0, "the server has ended the stream");
            answers.extend_from_slice(&received[..count]);
        }
    };
    tokio::join!(send, receive);
    let session = client.stream.get_mut().1;
    let mut unread = &answers[..];
    while !unread.is_empty() {
        session.read_tls(&mut unread).unwrap();
        session.process_new_packets().unwrap();
        let mut decrypted = Vec::new();
        while let Ok(count @ 1..) = std::io::Read::read(&mut session.reader(), &mut received) {
            decrypted.extend_from_slice(&received[..count]);
        }
        client.reader.feed(&decrypted);
    }
    for text in texts {
        assert_eq!(client.recv().await, text);
    }
    client.send("after all").await;
    assert_eq!(client.recv().await, "after all");
}

#[test]
fn a_session_keeps_nothing_but_the_beginning_of_a_record() {
    let pair = TlsPair::new(&["http/1.1"]);
    let mut server = TlsSession::new(pair.server_config()).unwrap();
    let name = "localhost".try_into().unwrap();
    let mut client = ClientConnection::new(pair.client.clone(), name).unwrap();
    let none = |_: &[u8]| panic!("nothing was sent");
    while client.is_handshaking() || server.is_handshaking() {
        let (mut flight, mut answer) = (Vec::new(), Vec::new());
        while client.wants_write() {
            client.write_tls(&mut flight).unwrap();
        }
        for piece in flight.chunks_mut(100) {
            server.decrypt(piece, &mut answer, none);
        }
        assert!(!(flight.is_empty() && answer.is_empty()), "the handshake does not go on");
        let mut answer = &answer[..];
        while !answer.is_empty() {
            client.read_tls(&mut answer).unwrap();
            client.process_new_packets().unwrap();
        }
    }
    assert_eq!(server.partial_bytes(), 0);
    for cut in [1, 4, 5, 6, 500, 1_000] {
        let mut records = Vec::new();
        encrypt(&mut client, &"x".repeat(1_000), &mut records);
        client.refresh_traffic_keys().unwrap();
        encrypt(&mut client, "under new keys", &mut records);
        let whole = records.len();
        let (mut texts, mut answer) = (Vec::new(), Vec::new());
        let (begin, rest) = records.split_at_mut(cut);
        server.decrypt(begin, &mut answer, none);
        assert_eq!(server.partial_bytes(), cut);
        // It may write meanwhile.
        server.encrypt(b"hello", &mut answer).unwrap();
        server.decrypt(rest, &mut answer, |piece| texts.extend_from_slice(piece));
        assert_eq!(server.partial_bytes(), 0, "of {whole} bytes");
        assert_eq!(texts.len(), client_text(&"x".repeat(1_000)).len() + client_text("under new keys").len());
        server.encrypt(b"world", &mut answer).unwrap();
        let (mut answer, mut received) = (&answer[..], [0; 100]);
        let mut decrypted = Vec::new();
        while !answer.is_empty() {
            client.read_tls(&mut answer).unwrap();
            client.process_new_packets().unwrap();
            while let Ok(count @ 1..) = std::io::Read::read(&mut client.reader(), &mut received) {
                decrypted.extend_from_slice(&received[..count]);
            }
        }
        assert_eq!(decrypted, b"helloworld");
    }
}

/// The longest beginning that a session keeps, and the longest message of a handshake that rustls accepts.
const PARTIAL_BYTES_MAX: usize = 80 << 10;
const HANDSHAKE_MESSAGE_BYTES_MAX: usize = 0xFFFF;

/// Sends a server all but the last byte of such a message, so many bytes of it in each record; returns how many bytes it
/// kept at most.
fn begin_handshake(server: &mut TlsSession, record_bytes: usize) -> usize {
    let mut message = vec![0; 4 + HANDSHAKE_MESSAGE_BYTES_MAX];
    message[..4].copy_from_slice(&[1, 0, 0xFF, 0xFF]); // a ClientHello, and its length
    message.pop();
    let mut kept = 0;
    for fragment in message.chunks(record_bytes) {
        let mut record = vec![22, 3, 1];
        record.extend((fragment.len() as u16).to_be_bytes());
        record.extend(fragment);
        server.decrypt(&mut record, &mut Vec::new(), |_| panic!("nothing was sent"));
        kept = kept.max(server.partial_bytes());
    }
    kept
}

#[test]
fn a_handshake_in_small_records_costs_no_more_memory_than_a_long_one() {
    let pair = TlsPair::new(&["http/1.1"]);
    let session = || TlsSession::new(pair.server_config()).unwrap();
    // In records of 16 KiB it is accepted; with the header of a record for each byte it would be 384 KiB.
    let mut server = session();
    let kept = begin_handshake(&mut server, 16 << 10);
    assert_eq!((server.end(), kept), (None, 4 + HANDSHAKE_MESSAGE_BYTES_MAX - 1 + 5 * 5));
    for record_bytes in [1, 10] {
        let mut server = session();
        let kept = begin_handshake(&mut server, record_bytes);
        assert_eq!((server.end(), server.partial_bytes()), (Some(TlsEnd::Failed), 0));
        assert!((PARTIAL_BYTES_MAX - 15..=PARTIAL_BYTES_MAX).contains(&kept), "{kept}");
    }
}

#[tokio::test]
async fn a_client_that_ends_its_session_gets_what_is_queued_and_is_disconnected() {
    for mut server in Server::of_each_kind().await {
        let mut client = server.connect().await;
        client.send("long 3000000").await;
        client.send("last").await;
        client.stream.shutdown().await.unwrap(); // `close_notify`, and the end of its side of the stream
        assert_eq!(client.recv().await.len(), 3_000_000);
        assert_eq!(client.recv().await, "last");
        assert_eq!(client.frame().await, None, "our `close_notify`, or reading would have failed");
        assert_eq!(server.ended().await, CloseReason::Disconnected);
    }
}

#[tokio::test]
async fn a_client_whose_stream_ends_without_the_end_of_its_session_is_disconnected() {
    for mut server in Server::of_each_kind().await {
        let mut client = server.connect().await;
        client.send("hello").await;
        assert_eq!(client.recv().await, "hello");
        let (socket, _) = client.stream.into_inner();
        drop(socket);
        assert_eq!(server.ended().await, CloseReason::Disconnected);
    }
}

#[cfg(target_os = "linux")] // only there a socket can be corked
#[tokio::test]
async fn a_client_whose_stream_ends_within_a_record_is_disconnected() {
    for mut server in Server::of_each_kind().await {
        let mut client = server.connect().await;
        client.send("hello").await;
        assert_eq!(client.recv().await, "hello");
        // The beginning of a record and the end of the stream, which arrive together.
        let socket = socket2::SockRef::from(client.stream.get_ref().0);
        socket.set_tcp_cork(true).unwrap();
        std::io::Write::write_all(&mut &*socket, &[0x17, 3, 3, 0, 100, 1, 2, 3]).unwrap();
        socket.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(server.ended().await, CloseReason::Disconnected);
    }
}

#[tokio::test]
async fn a_client_that_breaks_a_record_gets_an_alert_and_nobody_else_notices() {
    for mut server in Server::of_each_kind().await {
        let mut other = server.connect().await;
        let mut client = server.connect().await;
        client.send("hello").await;
        assert_eq!(client.recv().await, "hello");
        client
            .stream
            .get_mut()
            .0
            .write_all(&[
                0x17, 3, 3, 0, 20, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20,
            ])
            .await
            .unwrap();
        assert_eq!(server.ended().await, CloseReason::Transport(ErrorKind::InvalidData));
        let error = within_timeout(client.stream.read(&mut [0; 100])).await.unwrap_err();
        assert!(error.to_string().contains("BadRecordMac"), "{error}");
        other.send("still here").await;
        assert_eq!(other.recv().await, "still here");
    }
}

#[tokio::test]
async fn a_client_that_a_shard_does_not_take_is_told_why() {
    let config =
        WsHubConfig { max_connections_per_user: Some(UserLimit::OldestStays(1)), ..WsHubConfig::default() };
    let server = Server::with(EngineConfig::default(), config, |listener| listener).await;
    let mut first = server.connect().await;
    first.send("hello").await;
    assert_eq!(first.recv().await, "hello");
    assert_eq!(server.connect().await.close_code().await, Some(1008));
    assert_eq!(server.hub.len(), 1);
}

#[tokio::test]
async fn an_address_at_its_limit_gets_a_503_before_the_upgrade() {
    let engine = EngineConfig { max_connections_per_address: Some(1), ..EngineConfig::default() };
    let server = Server::with(engine, WsHubConfig::default(), |listener| listener).await;
    let _first = server.connect().await;
    let mut second = Client { stream: server.tls().await, reader: FrameReader::new(1 << 20) };
    let response = second.request().await;
    assert!(response.starts_with("HTTP/1.1 503 "), "{response}");
}

#[tokio::test]
async fn clients_that_say_nothing_hold_up_nobody_and_are_disconnected() {
    let short =
        |listener: TlsListener| listener.handshake_timeout(Duration::from_millis(200)).max_handshakes(4);
    let server = Server::with(EngineConfig::default(), WsHubConfig::default(), short).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    let mut client = server.connect().await;
    client.send("hello").await;
    assert_eq!(client.recv().await, "hello");
    // As many as the limit: the next one waits until their time is over.
    for _ in 0..4 {
        silent.push(TcpStream::connect(server.address).await.unwrap());
    }
    let mut late = server.connect().await;
    late.send("hello").await;
    assert_eq!(late.recv().await, "hello");
    for mut stream in silent {
        assert_eq!(within_timeout(stream.read(&mut [0; 100])).await.unwrap_or(0), 0);
    }
}

#[tokio::test]
async fn certificates_are_replaced_while_the_server_listens() {
    let server = Server::start().await;
    let mut before = server.connect().await;
    let renewed = TlsPair::new(&["http/1.1"]);
    assert!(server.config.replace_pem(b"no certificate", b"no key").is_err());
    let (chain, key) = (renewed.certificate_pem(), renewed.key_pem());
    assert!(
        server
            .config
            .replace_pem(chain.as_bytes(), b"no key")
            .unwrap_err()
            .to_string()
            .contains("private key")
    );
    let other = TlsPair::new(&[]);
    let misfit = server.config.replace_pem(chain.as_bytes(), other.key_pem().as_bytes()).unwrap_err();
    assert!(misfit.to_string().contains("cannot be used together"), "{misfit}");
    server.config.replace_pem(chain.as_bytes(), key.as_bytes()).unwrap();
    let stream = TcpStream::connect(server.address).await.unwrap();
    within_timeout(renewed.connect(stream)).await.unwrap();
    let stream = TcpStream::connect(server.address).await.unwrap();
    assert!(
        within_timeout(server.pair.connect(stream)).await.is_err(),
        "the old certificate is not used any more"
    );
    before.send("still here").await;
    assert_eq!(before.recv().await, "still here");
}
