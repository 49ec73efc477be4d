//! Upgrades over real sockets, up to the raw socket that a shard would get.
//!
//! In place of a shard stands a tungstenite server that reads the socket itself. Owned by [`super`], whose private
//! parts it takes apart. Does not know hubs or the engine.

use std::{convert::Infallible, net::SocketAddr};

use axum::{Router, body::Body, extract::Request, routing::any, serve::Listener};
use futures_util::{SinkExt as _, StreamExt as _};
use http::{Method, Version};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto,
    service::TowerToHyperService,
};
use testkit_hub::tls::{Buffered, TlsListener, TlsPair};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _},
    net::{TcpListener, UnixListener},
    sync::mpsc,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Message,
        client::IntoClientRequest as _,
        protocol::{CloseFrame, Role, frame::coding::CloseCode},
    },
};

use super::*;

/// What the handler saw of an upgraded connection.
#[derive(Debug, PartialEq)]
struct Seen {
    kind: &'static str,
    read_ahead: Bytes,
    protocol: Option<HeaderValue>,
}

/// An application that echoes messages over the raw socket, and what it sees.
fn echo_app() -> (Router, mpsc::UnboundedReceiver<Seen>) {
    let (seen, was_seen) = mpsc::unbounded_channel();
    let handler = async move |ws: WebSocketUpgrade| {
        ws.protocols(["chat.v2", "chat.v1"]).on_upgrade(move |socket| async move {
            let protocol = socket.protocol().cloned();
            let WebSocketParts { socket, read_ahead } = socket.into_parts();
            match socket {
                RawSocket::Tcp(socket) => {
                    seen.send(Seen { kind: "tcp", read_ahead: read_ahead.clone(), protocol }).unwrap();
                    // Fails if a runtime still had it.
                    echo(TcpStream::from_std(socket).unwrap(), read_ahead).await;
                }
                #[cfg(feature = "tls")]
                RawSocket::Tls(_) => panic!("no test of these uses TLS"),
                RawSocket::Unix(socket) | RawSocket::Bridge(socket, _) => {
                    seen.send(Seen { kind: "unix", read_ahead: read_ahead.clone(), protocol }).unwrap();
                    echo(UnixStream::from_std(socket).unwrap(), read_ahead).await;
                }
            }
        })
    };
    (Router::new().route("/ws", any(handler)), was_seen)
}

async fn echo(socket: impl AsyncRead + AsyncWrite + Unpin, read_ahead: Bytes) {
    let mut peer =
        WebSocketStream::from_partially_read(socket, read_ahead.to_vec(), Role::Server, None).await;
    while let Some(Ok(message)) = peer.next().await {
        if message.is_text() || message.is_binary() {
            peer.send(message).await.unwrap();
        }
    }
}

/// Talks to [`echo`] through an upgraded stream, long enough to fill every buffer on the way, and closes.
async fn talk_and_close(socket: impl AsyncRead + AsyncWrite + Unpin) {
    let mut client = WebSocketStream::from_raw_socket(socket, Role::Client, None).await;
    for message in ["hello".to_owned(), "x".repeat(300_000), "žluťoučký".to_owned()] {
        client.send(Message::text(message.clone())).await.unwrap();
        assert_eq!(client.next().await.unwrap().unwrap(), Message::text(message));
    }
    client.close(Some(CloseFrame { code: CloseCode::Away, reason: "done".into() })).await.unwrap();
    let Some(Ok(Message::Close(Some(answer)))) = client.next().await else { panic!("no Close came back") };
    assert_eq!(answer.code, CloseCode::Away);
    assert!(client.next().await.is_none(), "the server hangs up");
}

async fn serve<L: Listener>(listener: L, app: Router)
where
    L::Addr: std::fmt::Debug,
{
    axum::serve(listener, app).await.unwrap();
}

async fn tcp_listener() -> (TcpListener, SocketAddr) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    (listener, address)
}

fn request_bytes() -> &'static [u8] {
    b"GET /ws HTTP/1.1\r\nhost: x\r\nconnection: Upgrade\r\nupgrade: websocket\r\n\
      sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
}

/// Reads the head of a response, and not a byte more.
async fn response_head(socket: &mut (impl AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(socket.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

#[tokio::test]
async fn a_plain_connection_gives_up_its_own_socket() {
    let (listener, address) = tcp_listener().await;
    let (app, mut seen) = echo_app();
    let server = tokio::spawn(serve(listener, app));

    let mut request = format!("ws://{address}/ws").into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("chat.v1, chat.v2"));
    let (client, response) = tokio_tungstenite::connect_async(request).await.unwrap();
    assert_eq!(response.status(), StatusCode::SWITCHING_PROTOCOLS);
    assert_eq!(response.headers()["sec-websocket-protocol"], "chat.v2", "the server's preference decides");
    talk_and_close(client.into_inner()).await;

    let protocol = Some(HeaderValue::from_static("chat.v2"));
    assert_eq!(seen.recv().await, Some(Seen { kind: "tcp", read_ahead: Bytes::new(), protocol }));
    server.abort();
}

#[tokio::test]
async fn frames_that_came_together_with_the_handshake_are_not_lost() {
    let (listener, address) = tcp_listener().await;
    let (app, mut seen) = echo_app();
    let server = tokio::spawn(serve(listener, app));

    // "hi" as text, masked with zeros, and the first byte of the next frame.
    let early = [0x81, 0x82, 0, 0, 0, 0, b'h', b'i', 0x81];
    let mut socket = TcpStream::connect(address).await.unwrap();
    socket.write_all(&[request_bytes(), &early].concat()).await.unwrap();
    let head = response_head(&mut socket).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    assert!(head.contains("\r\nsec-websocket-accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n"), "{head}");

    let read_ahead = Bytes::copy_from_slice(&early);
    assert_eq!(seen.recv().await, Some(Seen { kind: "tcp", read_ahead, protocol: None }));
    socket.write_all(&[0x82, 0, 0, 0, 0, b'y', b'o']).await.unwrap();
    let mut answers = [0; 8];
    socket.read_exact(&mut answers).await.unwrap();
    assert_eq!(answers, *b"\x81\x02hi\x81\x02yo");
    server.abort();
}

#[tokio::test]
async fn nothing_of_the_upgrade_remains_once_the_socket_is_handed_over() {
    let (listener, address) = tcp_listener().await;
    let (sockets, mut handed_over) = mpsc::unbounded_channel();
    let handler = async move |ws: WebSocketUpgrade| {
        ws.on_upgrade(async move |socket| sockets.send(socket.into_parts().socket).unwrap())
    };
    let server = tokio::spawn(serve(listener, Router::new().route("/ws", any(handler))));

    let mut clients = Vec::new();
    let mut sockets = Vec::new();
    for _ in 0..5 {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(request_bytes()).await.unwrap();
        response_head(&mut client).await;
        clients.push(client);
        sockets.push(handed_over.recv().await.unwrap());
    }
    let alive = || tokio::runtime::Handle::current().metrics().num_alive_tasks();
    while alive() > 1 {
        tokio::task::yield_now().await;
    }
    assert_eq!(alive(), 1, "the server itself");

    // And the sockets live on, non-blocking and without the runtime.
    for (socket, client) in sockets.into_iter().zip(&mut clients) {
        let RawSocket::Tcp(mut socket) = socket else { panic!("{socket:?}") };
        let nothing = std::io::Read::read(&mut socket, &mut [0; 8]).unwrap_err();
        assert_eq!(nothing.kind(), io::ErrorKind::WouldBlock);
        std::io::Write::write_all(&mut socket, b"frame").unwrap();
        let mut frame = [0; 5];
        client.read_exact(&mut frame).await.unwrap();
        assert_eq!(&frame, b"frame");
    }
    server.abort();
}

#[tokio::test]
async fn the_explicit_form_yields_the_socket_to_who_awaits_it() {
    let (listener, address) = tcp_listener().await;
    let (pending, mut accepted) = mpsc::unbounded_channel();
    let handler = async move |ws: WebSocketUpgrade| {
        let (response, socket) = ws.accept().unwrap();
        pending.send(socket).unwrap();
        response
    };
    let server = tokio::spawn(serve(listener, Router::new().route("/ws", any(handler))));
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(request_bytes()).await.unwrap();
    let socket = accepted.recv().await.unwrap().socket().await.unwrap();
    assert!(matches!(socket.into_parts().socket, RawSocket::Tcp(_)));
    server.abort();
}

/// What hyper asks a body when it sends a response is what the verdict goes by.
#[tokio::test]
async fn hyper_s_own_servers_are_seen_to_send_a_101() {
    for is_auto in [true, false] {
        let (listener, address) = tcp_listener().await;
        let (pending, mut accepted) = mpsc::unbounded_channel();
        let handler = async move |ws: WebSocketUpgrade| {
            let (response, socket) = ws.accept().unwrap();
            pending.send(socket).unwrap();
            response
        };
        let app = Router::new().route("/ws", any(handler));
        let server = tokio::spawn(async move {
            if is_auto {
                return serve(listener, app).await;
            }
            let (socket, _) = listener.accept().await.unwrap();
            let connection = hyper::server::conn::http1::Builder::new()
                .serve_connection(TokioIo::new(socket), TowerToHyperService::new(app));
            connection.with_upgrades().await.unwrap();
        });
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(request_bytes()).await.unwrap();
        let verdict = accepted.recv().await.unwrap().verdict.unwrap();
        assert_eq!(verdict.verdict().await, Verdict::Sent);
        server.abort();
    }
}

#[tokio::test]
async fn a_client_that_is_gone_before_the_answer_fails_the_upgrade() {
    let (listener, address) = tcp_listener().await;
    let (pending, mut accepted) = mpsc::unbounded_channel();
    let handler = async move |ws: WebSocketUpgrade| {
        let (response, socket) = ws.accept().unwrap();
        pending.send(socket).unwrap();
        std::future::pending::<()>().await;
        response
    };
    let server = tokio::spawn(serve(listener, Router::new().route("/ws", any(handler))));
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(request_bytes()).await.unwrap();
    let pending = accepted.recv().await.unwrap();
    drop(client);
    let lost = pending.socket().await;
    assert!(matches!(lost, Err(UpgradeError::NotSent)), "{lost:?}");
    server.abort();
}

#[tokio::test]
async fn hyper_s_own_http_1_server_gives_up_the_socket_too() {
    let (listener, address) = tcp_listener().await;
    let (app, mut seen) = echo_app();
    let server = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let service = TowerToHyperService::new(app);
        let connection =
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(socket), service);
        connection.with_upgrades().await.unwrap();
    });
    let (client, _) = tokio_tungstenite::connect_async(format!("ws://{address}/ws")).await.unwrap();
    talk_and_close(client.into_inner()).await;
    assert_eq!(seen.recv().await.unwrap().kind, "tcp");
    server.await.unwrap();
}

#[tokio::test]
async fn a_server_on_a_unix_socket_needs_no_bridge() {
    let path = std::env::temp_dir().join(format!("shardcast-upgrade-{}.sock", std::process::id()));
    let _ = std::fs::remove_file(&path);
    let listener = UnixListener::bind(&path).unwrap();
    let (app, mut seen) = echo_app();
    let server = tokio::spawn(serve(listener, app));
    let mut client = UnixStream::connect(&path).await.unwrap();
    std::fs::remove_file(&path).unwrap();
    client.write_all(&[request_bytes(), b"\x81"].concat()).await.unwrap();
    response_head(&mut client).await;
    let read_ahead = Bytes::from_static(b"\x81");
    // A bridge would have no read_ahead.
    assert_eq!(seen.recv().await, Some(Seen { kind: "unix", read_ahead, protocol: None }));
    server.abort();
}

#[tokio::test]
async fn a_stream_that_is_no_socket_is_bridged_with_its_early_frames_and_its_ends() {
    let tls = TlsPair::new(&[]);
    let listener = Buffered(TlsListener::bind(&tls, |_| Ok(())).await.unwrap());
    let address = listener.local_addr().unwrap();
    let (app, mut seen) = echo_app();
    let server = tokio::spawn(serve(listener, app));

    let mut client = tls.connect(TcpStream::connect(address).await.unwrap()).await.unwrap();
    let early = [0x81, 0x82, 0, 0, 0, 0, b'h', b'i'];
    client.write_all(&[request_bytes(), &early].concat()).await.unwrap();
    let head = response_head(&mut client).await;
    assert!(head.starts_with("HTTP/1.1 101 "), "{head}");
    let mut answer = [0; 4];
    client.read_exact(&mut answer).await.unwrap();
    assert_eq!(&answer, b"\x81\x02hi");

    // At its end this sees the server's close_notify: without one, rustls makes the read an error.
    talk_and_close(&mut client).await;
    assert_eq!(client.read(&mut [0; 8]).await.unwrap(), 0);
    assert_eq!(seen.recv().await, Some(Seen { kind: "unix", read_ahead: Bytes::new(), protocol: None }));

    drop(client);
    while tokio::runtime::Handle::current().metrics().num_alive_tasks() > 1 {
        tokio::task::yield_now().await;
    }
    server.abort();
}

/// An HTTP/2 connection that knows the server to offer extended `CONNECT`.
async fn http_2(address: SocketAddr) -> hyper::client::conn::http2::SendRequest<Body> {
    let socket = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (client, connection) =
        hyper::client::conn::http2::handshake(TokioExecutor::new(), socket).await.unwrap();
    // hyper has a task of its own for this, which wakes nobody when the server's settings arrive.
    while !connection.is_extended_connect_protocol_enabled() {
        tokio::task::yield_now().await;
    }
    tokio::spawn(connection);
    client
}

fn extended_connect(address: SocketAddr, protocol: &'static str, version: &str) -> Request {
    Request::builder()
        .method(Method::CONNECT)
        .version(Version::HTTP_2)
        .uri(format!("http://{address}/ws"))
        .extension(hyper::ext::Protocol::from_static(protocol))
        .header("sec-websocket-version", version)
        .header("sec-websocket-protocol", "chat.v1")
        .body(Body::empty())
        .unwrap()
}

#[tokio::test]
async fn two_websockets_share_one_http_2_connection() {
    let (listener, address) = tcp_listener().await;
    let (app, mut seen) = echo_app();
    let server = tokio::spawn(serve(listener, app));
    let mut client = http_2(address).await;
    let mut streams = Vec::new();
    for _ in 0..2 {
        let mut response = client.send_request(extended_connect(address, "websocket", "13")).await.unwrap();
        assert_eq!(response.status(), StatusCode::OK);
        assert_eq!(response.headers()["sec-websocket-protocol"], "chat.v1");
        assert!(!response.headers().contains_key("sec-websocket-accept"));
        streams.push(TokioIo::new(hyper::upgrade::on(&mut response).await.unwrap()));
        let protocol = Some(HeaderValue::from_static("chat.v1"));
        assert_eq!(seen.recv().await, Some(Seen { kind: "unix", read_ahead: Bytes::new(), protocol }));
    }
    let [first, second] = streams.try_into().unwrap();
    tokio::join!(talk_and_close(first), talk_and_close(second));
    server.abort();
}

#[tokio::test]
async fn http_2_handshakes_that_are_none_are_refused() {
    let (listener, address) = tcp_listener().await;
    let (app, _seen) = echo_app();
    let server = tokio::spawn(serve(listener, app));
    let mut client = http_2(address).await;
    for (protocol, version, status) in
        [("connect-udp", "13", StatusCode::BAD_REQUEST), ("websocket", "12", StatusCode::BAD_REQUEST)]
    {
        let response = client.send_request(extended_connect(address, protocol, version)).await.unwrap();
        assert_eq!(response.status(), status);
    }
    let get = Request::get(format!("http://{address}/ws")).body(Body::empty()).unwrap();
    assert_eq!(client.send_request(get).await.unwrap().status(), StatusCode::BAD_REQUEST);
    server.abort();
}

#[tokio::test]
async fn a_stream_of_http_2_whose_answer_was_replaced_is_no_websocket() {
    let (listener, address) = tcp_listener().await;
    let (pending, mut accepted) = mpsc::unbounded_channel();
    let handler = async move |ws: WebSocketUpgrade| {
        let (response, socket) = ws.accept().unwrap();
        pending.send(socket).unwrap();
        response
    };
    let app = Router::new().route("/ws", any(handler));
    let app = app.layer(axum::middleware::map_response(async |mut response: Response| {
        *response.status_mut() = StatusCode::FORBIDDEN;
        response
    }));
    let server = tokio::spawn(serve(listener, app));
    let mut client = http_2(address).await;
    let response = client.send_request(extended_connect(address, "websocket", "13")).await.unwrap();
    assert_eq!(response.status(), StatusCode::FORBIDDEN);
    let socket = accepted.recv().await.unwrap().socket().await;
    assert!(matches!(socket, Err(UpgradeError::ConnectionLost(_))), "{socket:?}");
    server.abort();
}

#[tokio::test]
async fn a_server_that_cannot_upgrade_refuses_with_426() {
    let (listener, address) = tcp_listener().await;
    let (app, _seen) = echo_app();
    // A middleware that has taken the upgrade for itself looks the same.
    let app = app.layer(axum::middleware::map_request(async |mut request: Request| {
        request.extensions_mut().remove::<OnUpgrade>();
        Ok::<_, Infallible>(request)
    }));
    let server = tokio::spawn(async move {
        let (socket, _) = listener.accept().await.unwrap();
        let service = TowerToHyperService::new(app);
        auto::Builder::new(TokioExecutor::new())
            .serve_connection_with_upgrades(TokioIo::new(socket), service)
            .await
            .unwrap();
    });
    let mut client = TcpStream::connect(address).await.unwrap();
    client.write_all(request_bytes()).await.unwrap();
    let head = response_head(&mut client).await;
    assert!(head.starts_with("HTTP/1.1 426 "), "{head}");
    assert!(head.contains("\r\nupgrade: websocket\r\n"), "{head}");
    drop(client);
    server.await.unwrap();
}

/// A client, and our end of its socket as a handshake leaves it.
async fn accepted() -> (TcpStream, RawSocket) {
    let (listener, address) = tcp_listener().await;
    let (client, accepted) = tokio::join!(TcpStream::connect(address), listener.accept());
    (client.unwrap(), RawSocket::Tcp(accepted.unwrap().0.into_std().unwrap()))
}

/// All that a client is sent until the end of the stream. No reset may follow: it would destroy what the client has not
/// read yet, if not on this system.
async fn told(client: &mut TcpStream) -> Vec<u8> {
    let mut told = Vec::new();
    client.read_to_end(&mut told).await.unwrap();
    assert!(client.take_error().unwrap().is_none(), "the socket was reset");
    told
}

#[tokio::test]
async fn clients_beyond_the_limit_are_turned_away_without_being_waited_for() {
    let limit = turn_away::Limit::new(2);
    let tasks = || Handle::current().metrics().num_alive_tasks();
    let mut clients = Vec::new();
    for number in 0..6 {
        let (mut client, socket) = accepted().await;
        // What it sends unasked must not cost it the frame.
        client.write_all(&[7; 10_000]).await.unwrap();
        socket.turn_away_within(limit, shardcast_engine::CloseCode::TRY_AGAIN_LATER, "full");
        assert_eq!(told(&mut client).await, b"\x88\x06\x03\xf5full");
        assert_eq!(tasks(), 2.min(number + 1));
        clients.push(client);
    }
    drop(clients);
    while tasks() > 0 {
        tokio::task::yield_now().await;
    }
    let (_client, socket) = accepted().await;
    socket.turn_away_within(limit, shardcast_engine::CloseCode::TRY_AGAIN_LATER, "full");
    assert_eq!(tasks(), 1, "there is room again");
}

#[tokio::test]
async fn a_client_that_sends_more_than_its_handshake_still_reads_why_it_is_turned_away() {
    let (listener, address) = tcp_listener().await;
    let (sockets, mut upgraded) = mpsc::unbounded_channel();
    let handler =
        async move |ws: WebSocketUpgrade| ws.on_upgrade(async move |socket| sockets.send(socket).unwrap());
    let server = tokio::spawn(serve(listener, Router::new().route("/ws", any(handler))));
    for (early, later) in [(9, 0), (9, 100_000), (30_000, 0), (30_000, 100_000)] {
        let mut client = TcpStream::connect(address).await.unwrap();
        client.write_all(&[request_bytes(), &vec![0x81; early]].concat()).await.unwrap();
        response_head(&mut client).await;
        let socket = upgraded.recv().await.unwrap();
        client.write_all(&vec![0x82; later]).await.unwrap();
        // Nobody has read that when the socket is closed.
        drop(socket);
        assert_eq!(told(&mut client).await, b"\x88\x1f\x03\xf3the connection was not served");
    }
    server.abort();
}
