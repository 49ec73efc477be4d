//! WebSockets on streams of an HTTP/2 connection (RFC 8441), as a client opens them.
//!
//! By hyper's client, since none for WebSockets speaks HTTP/2.

use axum::body::Body;
use axum::extract::Request;
use axum::http::{Method, StatusCode, Version};
use hyper::client::conn::http2;
use hyper::upgrade::Upgraded;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::client::Client;
use crate::wait::within_timeout;

/// An HTTP/2 connection that knows the server to offer extended `CONNECT`.
pub async fn http_2<S>(stream: S) -> http2::SendRequest<Body>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    http_2_by(&http2::Builder::new(TokioExecutor::new()), stream).await
}

/// The same with the client's own settings.
pub async fn http_2_by<S>(client: &http2::Builder<TokioExecutor>, stream: S) -> http2::SendRequest<Body>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (client, connection) = within_timeout(client.handshake(TokioIo::new(stream))).await.unwrap();
    // hyper has a task of its own for this, which wakes nobody when the server's settings arrive.
    within_timeout(async {
        while !connection.is_extended_connect_protocol_enabled() {
            tokio::task::yield_now().await;
        }
    })
    .await;
    tokio::spawn(connection);
    client
}

/// A client on one more stream of an HTTP/2 connection, at the path `/ws`.
pub async fn connect_by_http_2(connection: &mut http2::SendRequest<Body>) -> Client<TokioIo<Upgraded>> {
    let request = Request::builder()
        .method(Method::CONNECT)
        .version(Version::HTTP_2)
        .uri("https://localhost/ws")
        .extension(hyper::ext::Protocol::from_static("websocket"))
        .header("sec-websocket-version", "13")
        .body(Body::empty())
        .unwrap();
    let mut response = within_timeout(connection.send_request(request)).await.unwrap();
    assert_eq!(response.status(), StatusCode::OK, "not 101: the stream is the connection");
    let stream = within_timeout(hyper::upgrade::on(&mut response)).await.unwrap();
    Client::upgraded(TokioIo::new(stream)).await
}
