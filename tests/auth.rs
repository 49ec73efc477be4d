//! Authentication: a client is refused before the upgrade, or makes its hub by its first message.
//!
//! Over real sockets.

#![allow(clippy::unwrap_used, reason = "a test")]

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use futures_util::StreamExt as _;
use http::HeaderValue;
use shardcast::auth::{Denied, Token};
use shardcast::{Hub, HubContext, RawCodec, Refusal, WebSocketUpgrade, WsHub, WsHubConfig};
use testkit_hub::{Server, engine, within_timeout};
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::tungstenite::{Error, Message};

/// Greets its user by name.
struct Greeter {
    user: String,
}

impl WsHub for Greeter {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.unicast(format!("hello {}", self.user)).await;
        Ok(())
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.broadcast(format!("{}: {text}", self.user)).await;
    }
}

/// The application's check; a real one asks a database.
async fn verify(token: &str) -> Result<String, &'static str> {
    tokio::task::yield_now().await;
    token.strip_prefix("token-of-").map(str::to_owned).ok_or("the token is forged")
}

async fn connect(
    ws: WebSocketUpgrade,
    token: Token,
    State(hub): State<Hub<Greeter>>,
) -> Result<Response, Denied> {
    let user = verify(token.as_str()).await.map_err(Denied::unauthorized)?;
    if user == "eve" {
        return Err(Denied::forbidden("eve may not chat"));
    }
    Ok(ws.serve(&hub, Greeter { user }).into_response())
}

async fn server() -> Server {
    let hub = engine(2).hub::<Greeter>(WsHubConfig::default()).unwrap();
    Server::start(Router::new().route("/ws", any(connect)).with_state(hub)).await
}

#[tokio::test]
async fn a_client_without_a_valid_token_is_refused_before_the_upgrade_and_told_why() {
    let server = server().await;
    for (path, status, expected) in [
        ("/ws", 401, "a token is needed: send it in the header `Authorization: Bearer TOKEN`"),
        ("/ws?token=forged", 401, "the token is forged"),
        ("/ws?token=token-of-eve", 403, "eve may not chat"),
    ] {
        let error = within_timeout(tokio_tungstenite::connect_async(server.url(path))).await.unwrap_err();
        let Error::Http(response) = error else { panic!("{error}") };
        let body = String::from_utf8_lossy(response.body().as_deref().unwrap_or_default()).into_owned();
        assert_eq!((response.status().as_u16(), body.contains(expected)), (status, true), "{body}");
        assert_eq!(response.headers().contains_key("www-authenticate"), status == 401);
    }
}

#[tokio::test]
async fn a_browser_may_send_its_token_as_a_subprotocol_and_gets_bearer_selected() {
    let server = server().await;
    let mut request = server.url("/ws").into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", HeaderValue::from_static("bearer, token-of-ada"));
    let (mut client, response) = within_timeout(tokio_tungstenite::connect_async(request)).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "bearer");
    assert_eq!(within_timeout(client.next()).await.unwrap().unwrap(), Message::text("hello ada"));
}

#[tokio::test]
async fn a_program_may_send_its_token_as_a_header() {
    let server = server().await;
    let mut request = server.url("/ws").into_client_request().unwrap();
    request.headers_mut().insert("authorization", HeaderValue::from_static("Bearer token-of-bob"));
    let (mut client, _) = within_timeout(tokio_tungstenite::connect_async(request)).await.unwrap();
    assert_eq!(within_timeout(client.next()).await.unwrap().unwrap(), Message::text("hello bob"));
}
