//! The client against real tungstenite servers on loopback: what it promises about order, errors and the close.
#![cfg(feature = "client")]
#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::{
    error::Error as _,
    future::Future,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use futures_util::{FutureExt as _, SinkExt as _, StreamExt as _};
use serde::{Deserialize, Serialize};
use shardcast::{
    BinaryCodec, CodecError, Decode, Encode, HubClient, JsonCodec, RawCodec, RawMessage,
    client::{ClientClose, ClientError, SendError},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        handshake::server::{Request, Response},
        protocol::{
            CloseFrame,
            frame::{
                Frame,
                coding::{CloseCode, Data, OpCode},
            },
        },
    },
};

type Peer = WebSocketStream<TcpStream>;

/// Awaits what has to come, however busy the machine.
async fn within_timeout<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it has to come")
}

/// Serves one connection by a script; the URL, and what the script returns.
async fn server<T, F>(script: impl FnOnce(Peer) -> F + Send + 'static) -> (String, JoinHandle<T>)
where
    T: Send + 'static,
    F: Future<Output = T> + Send + 'static,
{
    let (url, listener) = listen().await;
    let serve = async move {
        let (socket, _) = listener.accept().await.unwrap();
        script(tokio_tungstenite::accept_async(socket).await.unwrap()).await
    };
    (url, tokio::spawn(serve))
}

async fn listen() -> (String, TcpListener) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    (format!("ws://{}/ws", listener.local_addr().unwrap()), listener)
}

/// Reads to the end and gives back every message, the Close included.
async fn everything<T>(mut peer: WebSocketStream<T>) -> Vec<Message>
where
    T: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin,
{
    let mut messages = Vec::new();
    while let Some(Ok(message)) = peer.next().await {
        messages.push(message);
    }
    messages
}

/// Sends back what comes, until the client closes.
async fn echo(mut peer: Peer) {
    while let Some(Ok(message)) = peer.next().await {
        if message.is_text() || message.is_binary() {
            peer.send(message).await.unwrap();
        }
    }
}

fn client<S, R, C>(url: String) -> HubClient<S, R, C>
where
    R: Send + 'static,
    C: Encode<S> + Decode<R>,
{
    HubClient::builder(url).with_in_message::<S>().with_out_message::<R>().with_codec::<C>().build()
}

fn raw_client(url: String) -> HubClient<String, String, RawCodec> {
    client(url)
}

fn received<R, S, C>(client: &mut HubClient<S, R, C>) -> mpsc::UnboundedReceiver<R>
where
    R: Send + 'static,
    C: Encode<S> + Decode<R>,
{
    let (sender, receiver) = mpsc::unbounded_channel();
    client.on_message(move |message| sender.send(message).unwrap());
    receiver
}

fn closes<R: Send + 'static, S, C>(client: &mut HubClient<S, R, C>) -> mpsc::UnboundedReceiver<ClientClose>
where
    C: Encode<S> + Decode<R>,
{
    let (sender, receiver) = mpsc::unbounded_channel();
    client.on_close(move |close| sender.send(close).unwrap());
    receiver
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
enum Event {
    Said { text: String, at: u64 },
}

fn said(at: u64) -> Event {
    Event::Said { text: "dobrý den".into(), at }
}

/// The client's program in the seed, the crate's name apart.
#[allow(dead_code)]
mod seed {
    use serde::{Deserialize, Serialize};
    use shardcast::{HubClient, JsonCodec};

    #[derive(Serialize)]
    pub(crate) struct HelloMessage {
        pub text: String,
    }

    #[derive(Deserialize, Debug)]
    pub(crate) enum HelloReply {
        Ok(String),
        Err(String),
    }

    #[tokio::main]
    #[allow(clippy::print_stdout)]
    async fn main() -> Result<(), Box<dyn std::error::Error>> {
        let mut client = HubClient::builder("ws://localhost:3000/ws")
            .with_in_message::<HelloMessage>()
            .with_out_message::<HelloReply>()
            .with_codec::<JsonCodec>()
            .build();
        client.on_message(|reply: HelloReply| println!("{reply:?}"));
        client.connect().await?;
        client.send(HelloMessage { text: "hello".into() })?;
        // sends a Close frame and waits for the server to echo it back
        client.disconnect().await;
        Ok(())
    }
}

async fn events_come_back_in_order<C: Encode<Event> + Decode<Event>>() {
    let (url, server) = server(echo).await;
    let mut client = client::<Event, Event, C>(url);
    let mut replies = received(&mut client);
    client.connect().await.unwrap();
    assert!(client.is_connected());
    for at in 0..500 {
        client.send(said(at)).unwrap();
    }
    for at in 0..500 {
        assert_eq!(replies.recv().await, Some(said(at)));
    }
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
    assert!(!client.is_connected());
    server.await.unwrap();
}

#[tokio::test]
async fn json_messages_come_back_in_order() {
    events_come_back_in_order::<JsonCodec>().await;
}

#[tokio::test]
async fn binary_messages_come_back_in_order() {
    events_come_back_in_order::<BinaryCodec>().await;
}

#[tokio::test]
async fn json_is_the_codec_unless_another_is_named() {
    let (url, server) = server(everything).await;
    let mut client = HubClient::builder(url).with_in_message::<Event>().with_out_message::<Event>().build();
    client.connect().await.unwrap();
    client.send(said(1)).unwrap();
    client.disconnect().await;
    let messages = server.await.unwrap();
    assert_eq!(messages[0], Message::text(r#"{"Said":{"text":"dobrý den","at":1}}"#));
}

#[tokio::test]
async fn disconnect_writes_what_is_queued_then_sends_a_close_and_waits_for_the_answer() {
    let (close_seen, mut close_was_seen) = oneshot::channel();
    let (answer, may_answer) = oneshot::channel::<()>();
    let (url, server) = server(|mut peer| async move {
        for number in 0..100 {
            assert_eq!(peer.next().await.unwrap().unwrap(), Message::text(number.to_string()));
        }
        let Message::Close(Some(frame)) = peer.next().await.unwrap().unwrap() else { panic!("no Close") };
        close_seen.send(frame.code).unwrap();
        // tungstenite writes the answer with the next read.
        may_answer.await.unwrap();
        assert!(peer.next().await.is_none(), "the client is done");
    })
    .await;
    let mut client = raw_client(url);
    client.connect().await.unwrap();
    for number in 0..100 {
        client.send(number.to_string()).unwrap();
    }
    {
        let mut disconnect = std::pin::pin!(client.disconnect());
        tokio::select! {
            close = &mut disconnect => panic!("did not wait: {close:?}"),
            code = &mut close_was_seen => assert_eq!(code.unwrap(), CloseCode::Normal),
        }
        assert!((&mut disconnect).now_or_never().is_none(), "the server has not answered");
        answer.send(()).unwrap();
        assert!(matches!(disconnect.await, Some(ClientClose::ByClient)));
    }
    server.await.unwrap();
}

#[tokio::test]
async fn disconnect_does_not_wait_for_the_server_to_hang_up() {
    let (done, is_done) = oneshot::channel::<()>();
    let (url, server) = server(|mut peer| async move {
        assert!(peer.next().await.unwrap().unwrap().is_close());
        peer.flush().await.unwrap();
        is_done.await.unwrap();
    })
    .await;
    let mut client = raw_client(url);
    client.connect().await.unwrap();
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
    done.send(()).unwrap();
    server.await.unwrap();
}

#[tokio::test]
async fn a_server_that_does_not_answer_the_close_is_waited_for_until_the_timeout() {
    let (url, server) = server(|peer| async move {
        std::future::pending::<()>().await;
        drop(peer);
    })
    .await;
    let mut client = HubClient::builder(url)
        .with_in_message::<String>()
        .with_out_message::<String>()
        .with_codec::<RawCodec>()
        .with_disconnect_timeout(Duration::from_millis(50))
        .build();
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    // More than the sockets take, so that the client is stuck in writing when it is to close.
    for _ in 0..1000 {
        client.send("x".repeat(20_000)).unwrap();
    }
    assert!(matches!(client.disconnect().await, Some(ClientClose::Unanswered)));
    assert!(matches!(closes.recv().await, Some(ClientClose::Unanswered)));
    server.abort();
}

#[tokio::test]
async fn a_dropped_client_still_writes_what_is_queued_and_sends_a_close() {
    let (url, server) = server(everything).await;
    let mut client = raw_client(url);
    client.connect().await.unwrap();
    client.send("last words".into()).unwrap();
    let sender = client.sender();
    drop(client);
    let messages = server.await.unwrap();
    assert_eq!(messages[0], Message::text("last words"));
    assert!(messages[1].is_close(), "{messages:?}");
    assert!(matches!(sender.send("more".into()), Err(SendError::NotConnected(message)) if message == "more"));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_an_error() {
    let (url, listener) = listen().await;
    drop(listener);
    let mut client = raw_client(url);
    let error = client.connect().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable(_)), "{error:?}");
    assert!(!client.is_connected());
    assert!(client.disconnect().await.is_none());
}

#[tokio::test]
async fn a_server_that_does_not_answer_the_handshake_is_an_error_in_time() {
    let (url, _listener) = listen().await;
    let mut client = HubClient::builder(url)
        .with_in_message::<Event>()
        .with_out_message::<Event>()
        .with_connect_timeout(Duration::from_millis(50))
        .build();
    let error = client.connect().await.unwrap_err();
    assert!(matches!(error, ClientError::TimedOut), "{error:?}");
}

#[tokio::test]
async fn a_refusal_comes_with_its_status_and_headers() {
    let (url, listener) = listen().await;
    let server = tokio::spawn(async move {
        let (mut socket, _) = listener.accept().await.unwrap();
        let mut request = Vec::new();
        while !request.ends_with(b"\r\n\r\n") {
            request.push(socket.read_u8().await.unwrap());
        }
        let refusal = b"HTTP/1.1 503 Service Unavailable\r\nretry-after: 7\r\ncontent-length: 4\r\n\r\nfull";
        socket.write_all(refusal).await.unwrap();
    });
    let error = raw_client(url).connect().await.unwrap_err();
    assert_eq!(error.to_string(), "the server refused the handshake with 503 Service Unavailable");
    let ClientError::Refused(response) = error else { panic!("{error:?}") };
    assert_eq!(response.headers()["retry-after"], "7");
    server.await.unwrap();
}

#[tokio::test]
async fn a_url_or_header_that_is_none_is_an_error_of_connect() {
    let builder = |url: &str| {
        HubClient::builder(url)
            .with_in_message::<Event>()
            .with_out_message::<Event>()
            .with_codec::<JsonCodec>()
    };
    let good = "ws://127.0.0.1:1/";
    for mut client in [
        builder("not a url").build(),
        builder("http://127.0.0.1:1/").build(),
        #[cfg(not(feature = "client-tls"))]
        builder("wss://127.0.0.1:1/").build(),
        builder(good).with_header("x y", "z").build(),
        builder(good).with_header("authorization", "a\nb").build(),
        builder(good).with_subprotocol("a\nb").build(),
        builder(good).with_subprotocol("a, b").build(),
        builder(good).with_subprotocol("").build(),
    ] {
        let error = client.connect().await.unwrap_err();
        assert!(matches!(error, ClientError::InvalidRequest(_)), "{client:?}: {error:?}");
    }
}

/// The head of a request, as it came.
async fn head(listener: TcpListener) -> String {
    let (mut socket, _) = listener.accept().await.unwrap();
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap().to_lowercase()
}

#[tokio::test]
async fn a_host_of_ones_own_is_sent_in_place_of_the_url_s() {
    let (url, listener) = listen().await;
    let server = tokio::spawn(head(listener));
    let mut client = HubClient::builder(url)
        .with_in_message::<Event>()
        .with_out_message::<Event>()
        .with_header("Host", "chat.test:8080")
        .with_header("X-Twice", "1")
        .with_header("X-Twice", "2")
        .build();
    client.connect().await.unwrap_err();
    let head = within_timeout(server).await.unwrap();
    assert_eq!(head.matches("\r\nhost: ").count(), 1, "{head}");
    for line in ["host: chat.test:8080", "x-twice: 1", "x-twice: 2"] {
        assert!(head.contains(&format!("\r\n{line}\r\n")), "{line} is not in {head}");
    }
}

#[tokio::test]
async fn a_header_that_would_not_be_sent_is_refused_with_the_reason() {
    let refused = async |headers: &[(&str, &str)]| {
        let mut builder = HubClient::builder("ws://127.0.0.1:1/")
            .with_in_message::<Event>()
            .with_out_message::<Event>()
            .with_codec::<JsonCodec>();
        for &(name, value) in headers {
            builder = builder.with_header(name, value);
        }
        let error = builder.build().connect().await.unwrap_err();
        assert!(matches!(error, ClientError::InvalidRequest(_)), "{headers:?}: {error:?}");
        error.source().unwrap().to_string()
    };
    for (name, value, why) in [
        ("Connection", "close", "the handshake sets it"),
        ("Upgrade", "h2c", "the handshake sets it"),
        ("Sec-WebSocket-Key", "dGhlIHNhbXBsZSBub25jZQ==", "the handshake sets it"),
        ("Sec-WebSocket-Version", "8", "the handshake sets it"),
        ("Sec-WebSocket-Accept", "x", "the handshake sets it"),
        ("Sec-WebSocket-Extensions", "permessage-deflate", "the client supports no extensions"),
        ("Sec-WebSocket-Protocol", "chat", "use `with_subprotocol` to offer subprotocols"),
        ("Content-Length", "5", "a handshake has no body"),
        ("Transfer-Encoding", "chunked", "a handshake has no body"),
        ("Expect", "100-continue", "a handshake has no body"),
        ("Host", "not a host", "its value is not a host"),
        ("Host", "ada@chat.test", "its value is not a host"),
    ] {
        let expected = format!("the header `{}` cannot be set: {why}", name.to_lowercase());
        assert_eq!(refused(&[(name, value)]).await, expected);
    }
    let twice = refused(&[("Host", "a.test"), ("Host", "b.test")]).await;
    assert_eq!(twice, "the header `host` is set twice: set it once");
}

#[tokio::test]
async fn headers_and_subprotocols_are_sent_and_the_selected_protocol_is_known() {
    let (url, listener) = listen().await;
    let server = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        #[allow(clippy::result_large_err)]
        let answer = |request: &Request, mut response: Response| {
            assert_eq!(request.headers()["authorization"], "Bearer 42");
            assert_eq!(request.headers()["sec-websocket-protocol"], "chat.v2, chat.v1");
            response.headers_mut().insert("sec-websocket-protocol", "chat.v1".parse().unwrap());
            Ok(response)
        };
        echo(tokio_tungstenite::accept_hdr_async(socket, answer).await.unwrap()).await;
    });
    let mut client = HubClient::builder(url)
        .with_in_message::<Event>()
        .with_out_message::<Event>()
        .with_header("authorization", "Bearer 42")
        .with_subprotocol("chat.v2")
        .with_subprotocol("chat.v1")
        .build();
    assert!(client.selected_protocol().is_none());
    client.connect().await.unwrap();
    assert_eq!(client.selected_protocol().unwrap(), "chat.v1");
    client.disconnect().await;
    server.await.unwrap();
}

#[tokio::test]
async fn a_full_queue_gives_the_message_back_and_loses_none_that_it_took() {
    /// Neither `Debug` nor `Clone`, as in the seed.
    #[derive(Serialize)]
    struct Plain(u32);

    let (url, server) = server(everything).await;
    let mut client = HubClient::builder(url)
        .with_in_message::<Plain>()
        .with_out_message::<Event>()
        .with_queue_messages(4)
        .build();
    client.connect().await.unwrap();
    // Without an await the connection's task does not get to run.
    for number in 0..4 {
        client.send(Plain(number)).unwrap();
    }
    let error = client.send(Plain(4)).unwrap_err();
    assert!(error.is_full() && !error.is_closed());
    assert_eq!(format!("{error} {error:?}"), "the queue is full: try again later Full(..)");
    assert_eq!(error.into_inner().0, 4);

    client.disconnect().await;
    let refused = client.send(Plain(5)).unwrap_err();
    assert!(matches!(&refused, SendError::NotConnected(Plain(5))), "{refused}");
    assert!(refused.is_closed() && !refused.is_full());
    assert_eq!(refused.into_inner().0, 5);

    let mut messages = server.await.unwrap();
    assert!(messages.pop().unwrap().is_close());
    assert_eq!(messages, ["0", "1", "2", "3"].map(Message::text));
}

#[tokio::test]
async fn a_message_that_cannot_be_encoded_comes_back_and_takes_no_place() {
    let (url, server) = server(everything).await;
    let mut client = HubClient::builder(url)
        .with_in_message::<std::collections::HashMap<(u8, u8), u8>>()
        .with_out_message::<Event>()
        .with_queue_messages(1)
        .build();
    client.connect().await.unwrap();
    let odd = std::collections::HashMap::from([((1, 2), 3)]);
    for _ in 0..2 {
        let error = client.send(odd.clone()).unwrap_err();
        assert!(error.source().is_some());
        let SendError::Encode { message, source: CodecError::Encode(_) } = error else { panic!("{error:?}") };
        assert_eq!(message, odd);
    }
    client.disconnect().await;
    assert_eq!(server.await.unwrap().len(), 1, "the Close");
}

#[tokio::test]
async fn a_close_of_the_server_s_is_answered_and_reported_once_with_code_and_reason() {
    let (url, server) = server(|mut peer| async move {
        let frame = CloseFrame { code: CloseCode::Again, reason: "too slow".into() };
        peer.close(Some(frame)).await.unwrap();
        everything(peer).await
    })
    .await;
    let mut client = raw_client(url);
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    let close = closes.recv().await.unwrap();
    assert!(
        matches!(&close, ClientClose::ByServer { code: 1013, reason } if reason == "too slow"),
        "{close:?}"
    );
    assert_eq!(close.to_string(), "closed by the server with 1013: too slow");
    assert!(!client.is_connected());
    assert!(matches!(client.send("x".into()), Err(SendError::NotConnected(_))));
    assert!(matches!(server.await.unwrap()[..], [Message::Close(_)]), "the client has answered");
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByServer { code: 1013, .. })));
    assert!(client.disconnect().await.is_none());
    assert!(closes.try_recv().is_err());
}

#[tokio::test]
async fn a_close_without_a_code_is_1005() {
    let (url, server) = server(|mut peer| async move { peer.close(None).await.unwrap() }).await;
    let mut client = raw_client(url);
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    assert!(matches!(closes.recv().await, Some(ClientClose::ByServer { code: 1005, .. })));
    server.await.unwrap();
}

#[tokio::test]
async fn a_server_that_vanishes_is_reported_as_lost() {
    let (url, server) = server(|peer| async move { drop(peer) }).await;
    let mut client = raw_client(url);
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    assert!(matches!(closes.recv().await, Some(ClientClose::Lost(_))));
    server.await.unwrap();
}

/// The Close frame that a server has read, and nothing else.
fn only_close(messages: &[Message]) -> (u16, &str) {
    let [Message::Close(Some(frame))] = messages else { panic!("{messages:?}") };
    (frame.code.into(), &frame.reason)
}

#[tokio::test]
async fn a_message_above_the_limit_is_a_1009_to_the_server_and_the_limit_to_the_application() {
    for fragments in [1, 3] {
        let (url, server) = server(move |mut peer| async move {
            let part = "x".repeat(1001_usize.div_ceil(fragments));
            for number in 0..fragments {
                let kind = if number == 0 { Data::Text } else { Data::Continue };
                let frame = Frame::message(part.clone(), OpCode::Data(kind), number + 1 == fragments);
                peer.send(Message::Frame(frame)).await.unwrap();
            }
            everything(peer).await
        })
        .await;
        let mut client = HubClient::builder(url)
            .with_in_message::<String>()
            .with_out_message::<String>()
            .with_codec::<RawCodec>()
            .with_message_bytes_max(1000)
            .build();
        let mut closes = closes(&mut client);
        client.connect().await.unwrap();
        let close = within_timeout(closes.recv()).await.unwrap();
        assert!(matches!(close, ClientClose::TooLong { bytes: 1001.., bytes_max: 1000 }), "{close:?}");
        assert!(close.to_string().ends_with(" is above the limit of 1000"), "{close}");
        assert_eq!(only_close(&within_timeout(server).await.unwrap()), (1009, "message over 1000 bytes"));
        let ended = client.disconnect().await;
        assert!(matches!(ended, Some(ClientClose::TooLong { bytes_max: 1000, .. })), "{ended:?}");
    }
}

/// More than the sockets hold, so that a client that hung up at once would reset the connection, and with it what the
/// server has not read yet.
#[tokio::test]
async fn a_server_that_is_still_sending_what_is_too_long_gets_the_1009_and_no_reset() {
    const BYTES: usize = 64 << 20;
    let (url, server) = server(|peer| async move {
        let (mut from_client, mut to_client) = peer.into_inner().into_split();
        let frame = [&[0x82, 127][..], &BYTES.to_be_bytes(), &vec![0; BYTES]].concat();
        to_client.write_all(&frame).await.expect("the client takes what it will not have");
        let mut close = [0; 8];
        from_client.read_exact(&mut close).await.unwrap();
        assert_eq!(close[0], 0x88, "a Close");
        let [high, low] = [close[6] ^ close[2], close[7] ^ close[3]]; // masked
        u16::from_be_bytes([high, low])
    })
    .await;
    let mut client = client::<RawMessage, RawMessage, RawCodec>(url);
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    let close = within_timeout(closes.recv()).await.unwrap();
    assert!(matches!(close, ClientClose::TooLong { bytes: BYTES, bytes_max: 16_777_216 }), "{close:?}");
    assert_eq!(within_timeout(server).await.unwrap(), 1009);
}

#[tokio::test]
async fn a_server_that_breaks_the_protocol_is_told_so() {
    for (bytes, code) in [
        (&b"\x81\x01\xff"[..], 1007), // no UTF-8
        (b"\xc1\x01x", 1002),         // a reserved bit
        (b"\x81\x81abcdx", 1002),     // masked
        (b"\x80\x01x", 1002),         // goes on with nothing
    ] {
        let (url, server) = server(move |mut peer| async move {
            peer.get_mut().write_all(bytes).await.unwrap();
            everything(peer).await
        })
        .await;
        let mut client = raw_client(url);
        let mut closes = closes(&mut client);
        client.connect().await.unwrap();
        let close = within_timeout(closes.recv()).await;
        assert!(matches!(close, Some(ClientClose::ProtocolViolation(_))), "{bytes:?}: {close:?}");
        assert_eq!(only_close(&within_timeout(server).await.unwrap()).0, code, "{bytes:?}");
    }
}

#[tokio::test]
async fn a_server_that_falls_silent_ends_the_connection_and_is_told() {
    let (url, server) = server(everything).await;
    let mut client = HubClient::builder(url)
        .with_in_message::<String>()
        .with_out_message::<String>()
        .with_codec::<RawCodec>()
        .with_silence_timeout(Duration::from_millis(200))
        // The server would answer.
        .with_ping_interval(None)
        .build();
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    let close = within_timeout(closes.recv()).await.unwrap();
    assert!(matches!(close, ClientClose::Silent { .. }), "{close:?}");
    assert_eq!(close.to_string(), "nothing was received from the server for 200ms");
    assert!(!client.is_connected());
    assert!(matches!(client.send("x".into()), Err(SendError::NotConnected(_))));
    assert!(matches!(client.disconnect().await, Some(ClientClose::Silent { .. })));
    assert_eq!(only_close(&within_timeout(server).await.unwrap()).0, 1011);
}

/// A peer that is frozen takes nothing, either.
#[tokio::test]
async fn silence_is_noticed_while_the_client_is_stuck_in_writing() {
    let (url, server) = server(|peer| async move {
        std::future::pending::<()>().await;
        drop(peer);
    })
    .await;
    let mut client = HubClient::builder(url)
        .with_in_message::<String>()
        .with_out_message::<String>()
        .with_codec::<RawCodec>()
        .with_silence_timeout(Duration::from_millis(200))
        .with_disconnect_timeout(Duration::from_secs(24 * 60 * 60))
        .build();
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    for _ in 0..1000 {
        client.send("x".repeat(20_000)).unwrap();
    }
    assert!(matches!(within_timeout(closes.recv()).await, Some(ClientClose::Silent { .. })));
    server.abort();
}

#[tokio::test]
async fn every_byte_is_a_sign_of_life_and_not_only_a_whole_message() {
    let text = "so slow a line";
    let (url, server) = server(move |mut peer| async move {
        peer.get_mut().write_all(&[0x81, text.len() as u8]).await.unwrap();
        // Longer than the silence timeout in all, and never so long from one byte to the next.
        for byte in text.bytes() {
            tokio::time::sleep(Duration::from_millis(200)).await;
            peer.get_mut().write_all(&[byte]).await.unwrap();
        }
        everything(peer).await;
    })
    .await;
    let mut client = HubClient::builder(url)
        .with_in_message::<String>()
        .with_out_message::<String>()
        .with_codec::<RawCodec>()
        .with_silence_timeout(Duration::from_millis(1500))
        .build();
    let mut messages = received(&mut client);
    client.connect().await.unwrap();
    assert_eq!(within_timeout(messages.recv()).await.unwrap(), text);
    client.disconnect().await;
    server.await.unwrap();
}

#[tokio::test]
async fn without_a_silence_timeout_silence_is_nothing_and_zero_is_refused() {
    let builder = |timeout: Option<Duration>| {
        HubClient::builder("ws://127.0.0.1:1/")
            .with_in_message::<Event>()
            .with_out_message::<Event>()
            .with_silence_timeout(timeout)
    };
    let error = builder(Some(Duration::ZERO)).build().connect().await.unwrap_err();
    assert_eq!(
        error.source().unwrap().to_string(),
        "the silence timeout is zero: set a longer one, or `None` for no timeout"
    );
    let error = builder(None).build().connect().await.unwrap_err();
    assert!(matches!(error, ClientError::Unreachable(_)), "{error:?}");
}

#[tokio::test]
async fn an_undecodable_message_is_reported_and_harms_nothing_else() {
    let (url, server) = server(|mut peer| async move {
        for text in
            [r#"{"Said":{"text":"dobrý den","at":1}}"#, "?", r#"{"Said":{"text":"dobrý den","at":2}}"#]
        {
            peer.send(Message::text(text)).await.unwrap();
        }
        everything(peer).await
    })
    .await;
    let mut client = client::<Event, Event, JsonCodec>(url);
    let log = Arc::new(Mutex::new(Vec::new()));
    let (done, mut is_done) = mpsc::unbounded_channel();
    client.on_message({
        let log = Arc::clone(&log);
        move |Event::Said { at, .. }| {
            log.lock().unwrap().push(at.to_string());
            done.send(()).unwrap();
        }
    });
    client.on_error({
        let log = Arc::clone(&log);
        move |error| log.lock().unwrap().push(error.to_string())
    });
    client.connect().await.unwrap();
    is_done.recv().await.unwrap();
    is_done.recv().await.unwrap();
    assert_eq!(*log.lock().unwrap(), ["1", "the payload cannot be decoded", "2"]);
    assert!(client.is_connected());
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
    server.await.unwrap();
}

#[tokio::test]
async fn pings_are_answered() {
    let (url, server) = server(|mut peer| async move {
        peer.send(Message::Ping("nonce".into())).await.unwrap();
        peer.next().await.unwrap().unwrap()
    })
    .await;
    let mut client = client::<RawMessage, RawMessage, RawCodec>(url);
    client.connect().await.unwrap();
    assert_eq!(server.await.unwrap(), Message::Pong("nonce".into()));
}

#[tokio::test]
async fn a_callback_can_answer_through_a_sender() {
    let (url, server) = server(|mut peer| async move {
        peer.send(Message::text("marco")).await.unwrap();
        let answer = peer.next().await.unwrap().unwrap();
        everything(peer).await;
        answer
    })
    .await;
    let mut client = raw_client(url);
    let sender = client.sender();
    let (answered, mut was_answered) = mpsc::unbounded_channel();
    client.on_message(move |text| {
        assert_eq!(text, "marco");
        sender.send("polo".into()).unwrap();
        answered.send(()).unwrap();
    });
    client.connect().await.unwrap();
    was_answered.recv().await.unwrap();
    client.disconnect().await;
    assert_eq!(server.await.unwrap(), Message::text("polo"));
}

#[tokio::test]
async fn a_callback_that_panics_ends_the_connection_and_the_server_is_told() {
    let (url, server) = server(|mut peer| async move {
        peer.send(Message::text("boo")).await.unwrap();
        everything(peer).await
    })
    .await;
    let mut client = raw_client(url);
    let mut closes = closes(&mut client);
    client.on_message(|_| panic!("a panic that this test expects"));
    client.connect().await.unwrap();
    let close = within_timeout(closes.recv()).await.unwrap();
    assert!(matches!(close, ClientClose::CallbackPanicked), "{close:?}");
    assert_eq!(close.to_string(), "a callback panicked");
    assert!(!client.is_connected());
    assert!(matches!(client.disconnect().await, Some(ClientClose::CallbackPanicked)));
    assert_eq!(only_close(&within_timeout(server).await.unwrap()).0, 1011);
}

#[tokio::test]
async fn on_close_that_panics_changes_nothing_about_how_the_connection_ended() {
    for code in [1001, 4001] {
        let (url, server) = server(move |mut peer| async move {
            peer.close(Some(CloseFrame { code: code.into(), reason: "so it is".into() })).await.unwrap();
            everything(peer).await
        })
        .await;
        let mut client = raw_client(url);
        client.on_close(|_| panic!("a panic that this test expects"));
        client.connect().await.unwrap();
        // The closing handshake is finished, and the server sees no reset.
        assert_eq!(only_close(&within_timeout(server).await.unwrap()).0, code);
        let close = client.disconnect().await.unwrap();
        assert_eq!(close.to_string(), format!("closed by the server with {code}: so it is"));
    }

    let (url, server) = server(everything).await;
    let mut client = raw_client(url);
    client.on_close(|_| panic!("a panic that this test expects"));
    client.connect().await.unwrap();
    client.send("last words".into()).unwrap();
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
    assert_eq!(within_timeout(server).await.unwrap()[0], Message::text("last words"));
}

/// A server that writes `flood` over and over without a pause and answers nothing; its URL, and the bytes that it gets.
async fn flooding_server(flood: Vec<u8>) -> (String, mpsc::UnboundedReceiver<u8>) {
    use std::io::{Read as _, Write as _};

    let (bytes, got) = mpsc::unbounded_channel();
    let (url, _) = server(async move |peer| {
        let mut stream = peer.into_inner().into_std().unwrap();
        stream.set_nonblocking(false).unwrap();
        let reader = stream.try_clone().unwrap();
        // Threads, which have no turn to give away. They end with the client's socket.
        std::thread::spawn(move || while stream.write_all(&flood).is_ok() {});
        std::thread::spawn(move || {
            for byte in std::io::BufReader::new(reader).bytes().map_while(Result::ok) {
                let _ = bytes.send(byte); // the test may be over
            }
        });
    })
    .await;
    (url, got)
}

/// Many messages in each read of a socket, and many reads in each message: more than tokio lets a task read in a turn.
fn floods() -> [Vec<u8>; 2] {
    let short = [0x81, 0].repeat(32 * 1024);
    let text = vec![b'x'; 4 << 20];
    let long = [&[0x81, 127][..], &text.len().to_be_bytes(), &text].concat();
    [short, long]
}

#[tokio::test]
async fn what_a_client_sends_reaches_a_server_that_floods_it_without_pause() {
    for flood in floods() {
        let (url, mut got) = flooding_server(flood).await;
        let mut client = raw_client(url);
        let (sender, mut messages) = mpsc::channel(1);
        client.on_message(move |message: String| drop(sender.try_send(message)));
        client.connect().await.unwrap();
        within_timeout(messages.recv()).await.unwrap(); // the flood has come
        for text in ["hello", "again"] {
            client.send(text.into()).unwrap();
            let mut frame = [0; 2 + 4 + 5];
            for byte in &mut frame {
                *byte = within_timeout(got.recv()).await.unwrap();
            }
            let (key, payload) = (&frame[2..6], &frame[6..]);
            let payload: Vec<u8> =
                payload.iter().zip(key.iter().cycle()).map(|(byte, key)| byte ^ key).collect();
            assert_eq!((frame[0], frame[1], payload.as_slice()), (0x81, 0x85, text.as_bytes()));
        }
    }
}

#[tokio::test]
async fn disconnect_keeps_its_time_although_the_server_floods_without_pause() {
    for flood in floods() {
        let (url, _got) = flooding_server(flood).await;
        let mut client = HubClient::builder(url)
            .with_in_message::<String>()
            .with_out_message::<String>()
            .with_codec::<RawCodec>()
            .with_disconnect_timeout(Duration::from_millis(50))
            .build();
        client.connect().await.unwrap();
        let close = within_timeout(client.disconnect()).await;
        assert!(matches!(close, Some(ClientClose::Unanswered)), "{close:?}");
    }
}

#[tokio::test]
async fn what_a_server_sends_reaches_a_client_that_sends_without_pause() {
    // Reads all that comes, and answers a kilobyte once in a megabyte.
    let (url, _server) = server(async move |peer| {
        let mut stream = peer.into_inner();
        let mut taken = vec![0; 1 << 20];
        let answer = [&[0x81, 126, 4, 0][..], &[b'x'; 1024]].concat();
        while stream.read_exact(&mut taken).await.is_ok() && stream.write_all(&answer).await.is_ok() {}
    })
    .await;
    let mut client = raw_client(url);
    let mut answers = received(&mut client);
    client.connect().await.unwrap();
    let sender = client.sender();
    let sending = std::thread::spawn(move || {
        let text = "x".repeat(10_000);
        while !matches!(sender.send(text.clone()), Err(SendError::NotConnected(_))) {}
    });
    for _ in 0..3 {
        assert_eq!(within_timeout(answers.recv()).await.unwrap().len(), 1024);
    }
    drop(client);
    sending.join().unwrap();
}

#[tokio::test]
async fn after_any_end_the_client_can_connect_again_and_its_senders_with_it() {
    let (url, listener) = listen().await;
    let server = tokio::spawn(async move {
        for round in 0..3 {
            let (socket, _) = listener.accept().await.unwrap();
            let mut peer = tokio_tungstenite::accept_async(socket).await.unwrap();
            assert_eq!(peer.next().await.unwrap().unwrap(), Message::text(round.to_string()));
            if round == 0 {
                peer.close(None).await.unwrap();
            }
            everything(peer).await;
        }
    });
    let mut client = raw_client(url);
    let mut closes = closes(&mut client);
    let sender = client.sender();
    assert!(matches!(sender.send("early".into()), Err(SendError::NotConnected(_))));

    client.connect().await.unwrap();
    assert!(matches!(client.connect().await, Err(ClientError::AlreadyConnected)));
    sender.send("0".into()).unwrap();
    assert!(matches!(closes.recv().await, Some(ClientClose::ByServer { .. })));
    for round in 1..3 {
        client.connect().await.unwrap();
        assert!(sender.is_connected());
        sender.send(round.to_string()).unwrap();
        client.disconnect().await;
        assert!(matches!(closes.recv().await, Some(ClientClose::ByClient)));
    }
    server.await.unwrap();
}

#[tokio::test]
async fn received_messages_are_awaited_in_order_with_errors_among_them_until_the_end() {
    let (url, server) = server(|mut peer| async move {
        for text in ["1", "?", "2"] {
            peer.send(Message::text(text)).await.unwrap();
        }
        peer.close(Some(CloseFrame { code: CloseCode::Away, reason: "".into() })).await.unwrap();
        everything(peer).await
    })
    .await;
    let mut client = client::<u32, u32, JsonCodec>(url);
    assert!(client.recv().await.is_none(), "not connected");
    client.connect().await.unwrap();
    let sender = client.sender();
    assert_eq!(within_timeout(client.recv()).await.unwrap().unwrap(), 1);
    let error = within_timeout(client.recv()).await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "the payload cannot be decoded");
    assert_eq!(within_timeout(client.recv()).await.unwrap().unwrap(), 2);
    assert!(within_timeout(client.recv()).await.is_none());
    assert_eq!(client.state().to_string(), "closed by the server with 1001");
    assert!(!sender.is_connected());
    server.await.unwrap();
}

#[tokio::test]
async fn an_application_that_does_not_read_stops_the_server_and_loses_nothing() {
    const MESSAGES: usize = 1000;
    let sent = Arc::new(AtomicUsize::new(0));
    let (url, server) = server({
        let sent = Arc::clone(&sent);
        |mut peer| async move {
            let padding = "x".repeat(64 * 1024);
            for number in 0..MESSAGES {
                peer.send(Message::text(format!("{number} {padding}"))).await.unwrap();
                sent.store(number + 1, SeqCst);
            }
            everything(peer).await
        }
    })
    .await;
    let mut client = HubClient::builder(url)
        .with_in_message::<String>()
        .with_out_message::<String>()
        .with_codec::<RawCodec>()
        .with_inbox_messages(4)
        // Bytes that wait in the kernel are not silence.
        .with_silence_timeout(Duration::from_millis(100))
        .build();
    client.connect().await.unwrap();
    let mut seen = usize::MAX;
    while seen != sent.load(SeqCst) {
        seen = sent.load(SeqCst);
        tokio::time::sleep(Duration::from_millis(300)).await;
    }
    assert!(seen < MESSAGES, "the client has read 64 MB that nobody wanted");
    let mut messages = client.take_messages().unwrap();
    for expected in 0..MESSAGES {
        let text = within_timeout(messages.next()).await.unwrap().unwrap();
        assert_eq!(text.split(' ').next(), Some(&*expected.to_string()));
    }
    within_timeout(client.disconnect()).await;
    server.await.unwrap();
}

#[tokio::test]
async fn a_full_inbox_does_not_keep_a_client_from_disconnecting() {
    let (url, server) = server(|mut peer| async move {
        for number in 0..20 {
            peer.send(Message::text(number.to_string())).await.unwrap();
        }
        everything(peer).await
    })
    .await;
    let mut client = HubClient::builder(url)
        .with_in_message::<String>()
        .with_out_message::<String>()
        .with_codec::<RawCodec>()
        .with_inbox_messages(2)
        .with_disconnect_timeout(Duration::from_secs(60))
        .build();
    client.connect().await.unwrap();
    assert_eq!(within_timeout(client.recv()).await.unwrap().unwrap(), "0");
    assert!(matches!(within_timeout(client.disconnect()).await, Some(ClientClose::ByClient)));
    // What had been received before is not lost.
    assert_eq!(client.recv().await.unwrap().unwrap(), "1");
    assert_eq!(only_close(&server.await.unwrap()).0, 1000);
}

#[tokio::test]
async fn without_anybody_to_receive_messages_they_are_discarded() {
    let (url, server) = server(|mut peer| async move {
        for _ in 0..100 {
            peer.send(Message::text("x".repeat(200_000))).await.unwrap();
        }
        peer.close(None).await.unwrap();
        everything(peer).await
    })
    .await;
    let mut client = raw_client(url);
    let mut closes = closes(&mut client);
    drop(client.take_messages());
    client.connect().await.unwrap();
    assert!(matches!(within_timeout(closes.recv()).await, Some(ClientClose::ByServer { code: 1005, .. })));
    server.await.unwrap();
}

#[tokio::test]
async fn a_client_connects_over_a_stream_of_ones_own() {
    let mut client = raw_client("ws://in.memory/ws".into());
    for text in ["1", "2"] {
        let (near, far) = tokio::io::duplex(4096);
        let server = tokio::spawn(async move {
            let mut peer = tokio_tungstenite::accept_async(far).await.unwrap();
            while let Some(Ok(message)) = peer.next().await {
                if message.is_text() {
                    peer.send(message).await.unwrap();
                }
            }
        });
        client.connect_over(near).await.unwrap();
        client.send(text.into()).unwrap();
        assert_eq!(within_timeout(client.recv()).await.unwrap().unwrap(), text);
        assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
        server.await.unwrap();
    }
}

#[cfg(unix)]
#[tokio::test]
async fn a_client_connects_over_a_unix_socket() {
    let path = std::env::temp_dir().join(format!("shardcast-client-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = tokio::net::UnixListener::bind(&path).unwrap();
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        let mut peer = tokio_tungstenite::accept_async(stream).await.unwrap();
        peer.next().await.unwrap().unwrap()
    });
    let mut client = HubClient::builder("ws://localhost/ws")
        .with_in_message::<String>()
        .with_out_message::<String>()
        .with_codec::<RawCodec>()
        .with_connector({
            let path = path.clone();
            move || tokio::net::UnixStream::connect(path.clone())
        })
        .build();
    client.connect().await.unwrap();
    client.send("hello".into()).unwrap();
    assert_eq!(within_timeout(server).await.unwrap(), Message::text("hello"));
    std::fs::remove_file(path).unwrap();
}

/// A listener whose backlog is full, so that the kernel ignores further attempts; and what fills it.
#[cfg(target_os = "linux")]
async fn black_hole() -> (std::net::SocketAddr, impl Sized) {
    let socket = socket2::Socket::new(socket2::Domain::IPV4, socket2::Type::STREAM, None).unwrap();
    socket.bind(&std::net::SocketAddr::from(([127, 0, 0, 1], 0)).into()).unwrap();
    socket.listen(0).unwrap();
    let address = socket.local_addr().unwrap().as_socket().unwrap();
    let mut filling = Vec::new();
    while let Ok(stream) = tokio::time::timeout(Duration::from_millis(500), TcpStream::connect(address)).await
    {
        filling.push(stream.unwrap());
    }
    (address, (socket, filling))
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn an_address_that_does_not_answer_does_not_keep_a_client_from_the_next() {
    let (ignored, _filling) = black_hole().await;
    let (url, server) = server(echo).await;
    let answering = url.strip_prefix("ws://").unwrap().strip_suffix("/ws").unwrap().parse().unwrap();
    let builder = |addresses: Vec<std::net::SocketAddr>| {
        HubClient::builder("ws://chat.invalid/ws")
            .with_in_message::<String>()
            .with_out_message::<String>()
            .with_codec::<RawCodec>()
            .with_addresses(addresses)
    };
    let mut client = builder(vec![ignored]).with_connect_timeout(Duration::from_millis(500)).build();
    assert!(matches!(client.connect().await, Err(ClientError::TimedOut)));
    let mut client = builder(vec![ignored, answering]).build();
    within_timeout(client.connect()).await.unwrap();
    client.send("hello".into()).unwrap();
    assert_eq!(within_timeout(client.recv()).await.unwrap().unwrap(), "hello");
    within_timeout(client.disconnect()).await;
    server.await.unwrap();
}

#[tokio::test]
async fn an_address_of_the_other_family_that_refuses_does_not_keep_a_client_from_the_next() {
    let (url, server) = server(echo).await;
    let answering: std::net::SocketAddr =
        url.strip_prefix("ws://").unwrap().strip_suffix("/ws").unwrap().parse().unwrap();
    // Refused, or unreachable on a machine without IPv6.
    let refusing = std::net::SocketAddr::from((std::net::Ipv6Addr::LOCALHOST, 1));
    let mut client = HubClient::builder(url)
        .with_in_message::<String>()
        .with_out_message::<String>()
        .with_codec::<RawCodec>()
        .with_addresses([refusing, answering])
        .build();
    within_timeout(client.connect()).await.unwrap();
    within_timeout(client.disconnect()).await;
    server.await.unwrap();
}

/// A server with a certificate of its own making; needs the feature `client-tls`.
#[cfg(feature = "client-tls")]
#[tokio::test]
async fn a_server_with_a_private_certificate_is_reached_over_tls_and_only_by_who_knows_it() {
    let tls = testkit_hub::tls::TlsPair::new(&[]);
    let acceptor = tls.acceptor();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("wss://localhost:{}/ws", listener.local_addr().unwrap().port());
    let server = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        assert!(acceptor.accept(socket).await.is_err(), "a client that does not trust us");
        let (socket, _) = listener.accept().await.unwrap();
        let mut peer = tokio_tungstenite::accept_async(acceptor.accept(socket).await.unwrap()).await.unwrap();
        let message = peer.next().await.unwrap().unwrap();
        while let Some(Ok(_)) = peer.next().await {}
        message
    });

    let builder = || HubClient::builder(&url).with_in_message::<Event>().with_out_message::<Event>();
    let error = builder().build().connect().await.unwrap_err();
    assert!(matches!(error, ClientError::Handshake(_)), "{error:?}");

    let mut client = builder().with_tls_config(tls.client).build();
    client.connect().await.unwrap();
    client.send(said(1)).unwrap();
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
    assert!(server.await.unwrap().is_text());
}

/// The environment is a process's own, so this test runs itself in another one.
#[cfg(feature = "client-tls-native")]
#[tokio::test]
async fn the_system_s_root_certificates_are_trusted_if_asked() {
    const URL: &str = "SHARDCAST_TEST_URL";
    let connect = async |url: String| {
        let builder = HubClient::builder(url)
            .with_in_message::<Event>()
            .with_out_message::<Event>()
            .with_native_roots();
        within_timeout(builder.build().connect()).await
    };
    if let Ok(url) = std::env::var(URL) {
        return connect(url).await.unwrap();
    }
    let tls = testkit_hub::tls::TlsPair::new(&[]);
    let acceptor = tls.acceptor();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("wss://localhost:{}/ws", listener.local_addr().unwrap().port());
    let server = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        everything(tokio_tungstenite::accept_async(acceptor.accept(socket).await.unwrap()).await.unwrap())
            .await
    });
    let roots = std::env::temp_dir().join(format!("shardcast-roots-{}.pem", std::process::id()));
    std::fs::write(&roots, tls.certificate_pem()).unwrap();
    let itself = tokio::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "the_system_s_root_certificates_are_trusted_if_asked"])
        .envs([(URL, &*url), ("SSL_CERT_FILE", roots.to_str().unwrap())])
        .output();
    let output = within_timeout(itself).await.unwrap();
    assert!(output.status.success(), "{output:?}");
    std::fs::remove_file(roots).unwrap();
    within_timeout(server).await.unwrap();
}
