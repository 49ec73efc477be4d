//! Authentication: a client is refused before the upgrade, or makes its hub by its first message.
//!
//! Over real sockets.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::ops::ControlFlow;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use axum::Router;
use axum::extract::State;
use axum::response::{IntoResponse as _, Response};
use axum::routing::any;
use futures_util::StreamExt as _;
use http::HeaderValue;
use shardcast::auth::{Denied, Token};
use shardcast::{
    Accepted, CloseCode, CloseReason, Engine, Hub, HubContext, JoinError, RawCodec, RawMessage, Refusal,
    UserLimit, WebSocketUpgrade, WsHub, WsHubConfig,
};
use testkit::frames::{BINARY, FIN, client_frame, client_text};
use testkit_hub::{RawClient, Server, engine, eventually, within_timeout};
use tokio::sync::Notify;
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

// ---- The first message ------------------------------------------------------------------------------------------

/// Records its calls for the test.
struct Witness {
    user: String,
    calls: Calls,
}

type Calls = Arc<Mutex<Vec<String>>>;

impl Witness {
    fn note(&self, call: &str) {
        self.calls.lock().unwrap().push(format!("{call} {}", self.user));
    }
}

impl WsHub for Witness {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        self.note("connected");
        assert_eq!(ctx.user().map(|user| user.to_string()).as_deref(), Some(&*self.user));
        ctx.add_to_group("room").await;
        ctx.unicast(format!("hello {}", self.user)).await;
        Ok(())
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        match text.as_str() {
            "expire" => ctx.expires_at(SystemTime::now()).await,
            group => match self.try_join(&ctx, group).await {
                Ok(_) => ctx.unicast(format!("joined {group}")).await,
                Err(JoinError::Refused(refusal)) => ctx.unicast(refusal.reason().to_owned()).await,
                Err(error) => panic!("{error}"),
            },
        }
    }

    async fn on_join(&self, _: &HubContext<Self>, group: &str) -> Result<(), Refusal> {
        let refusal = Refusal::new(CloseCode::POLICY_VIOLATION, "for admins only");
        if group == "admins" && self.user != "root" { Err(refusal) } else { Ok(()) }
    }

    async fn on_expired(&self, ctx: HubContext<Self>) -> ControlFlow<()> {
        self.note("expired");
        ctx.unicast("your token has expired".to_owned()).await;
        if self.user == "forever" { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    }

    async fn on_disconnected(&self, _: HubContext<Self>, reason: CloseReason) {
        self.note(reason.name());
    }
}

struct FirstMessage {
    server: Server,
    hub: Hub<Witness>,
    calls: Calls,
    _engine: Engine,
}

/// A server whose clients say who they are by their first message. The check of `slow` waits for a release.
async fn first_message_server(limit: Option<UserLimit>, release: Arc<Notify>) -> FirstMessage {
    let engine = engine(2);
    let config = WsHubConfig { max_connections_per_user: limit, ..WsHubConfig::default() };
    let hub = engine.hub::<Witness>(config).unwrap();
    let calls = Calls::default();
    let (for_route, for_hub) = (hub.clone(), calls.clone());
    let connect = move |ws: WebSocketUpgrade| {
        let (hub, calls, release) = (for_route.clone(), for_hub.clone(), release.clone());
        async move {
            let check = async move |first: RawMessage| {
                let RawMessage::Text(token) = first else {
                    return Err(Refusal::new(CloseCode::UNSUPPORTED_DATA, "a token is text"));
                };
                let user =
                    verify(&token).await.map_err(|why| Refusal::new(CloseCode::POLICY_VIOLATION, why))?;
                if user == "slow" {
                    release.notified().await;
                }
                Ok(Accepted::new(Witness { user: user.clone(), calls }).user(user))
            };
            ws.serve_first_message(&hub, check)
                .first_message_within(Duration::from_millis(500))
                .first_message_bytes(100)
        }
    };
    let server = Server::start(Router::new().route("/ws", any(connect))).await;
    FirstMessage { server, hub, calls, _engine: engine }
}

fn taken(calls: &Calls) -> Vec<String> {
    std::mem::take(&mut *calls.lock().unwrap())
}

#[tokio::test]
async fn a_hub_is_made_from_the_first_message_and_its_client_is_a_stranger_before() {
    let release = Arc::new(Notify::new());
    let FirstMessage { server, hub, calls, .. } = first_message_server(None, release.clone()).await;
    let mut client = RawClient::connect(server.address).await;
    hub.to_all().publish(&"a secret".to_owned()).await.unwrap();
    client.send(&client_text("token-of-slow")).await;
    hub.to_all().publish(&"another secret".to_owned()).await.unwrap();
    assert_eq!((taken(&calls).len(), hub.group_len("room"), hub.user_len("slow")), (0, 0, 0));
    release.notify_one();
    assert_eq!(client.recv_text().await, "hello slow");
    while hub.to_all().deliver(&"hello all".to_owned()).await.unwrap().recipients == 0 {}
    assert_eq!(client.recv_text().await, "hello all");
    hub.to_user("slow").publish(&"to the user".to_owned()).await.unwrap();
    assert_eq!(client.recv_text().await, "to the user");
    assert_eq!((hub.group_len("room"), hub.user_len("slow")), (1, 1));
    assert_eq!(
        hub.presence("room").await.unwrap().len(),
        1,
        "a group joined in `on_connected` shows the user"
    );
    drop(client);
    eventually(vec!["connected slow".to_owned(), "disconnected slow".to_owned()], || {
        calls.lock().unwrap().clone()
    })
    .await;
}

#[tokio::test]
async fn a_first_message_that_is_refused_ends_the_connection_and_runs_no_hook() {
    let FirstMessage { server, calls, hub, .. } = first_message_server(None, Arc::default()).await;
    for (bytes, code) in [
        (client_text("forged"), 1008),
        (client_frame(FIN | BINARY, b"token-of-ada"), 1003),
        (client_text(&"x".repeat(101)), 1009),
        (Vec::new(), 1008), // nothing: the deadline
    ] {
        let mut client = RawClient::connect(server.address).await;
        client.send(&bytes).await;
        assert_eq!(client.close_code().await, Some(code));
    }
    eventually(0, || hub.len()).await;
    assert_eq!(taken(&calls), Vec::<String>::new());
}

#[tokio::test]
async fn a_user_who_is_known_by_the_first_message_counts_for_the_limit_per_user() {
    let FirstMessage { server, hub, calls, .. } =
        first_message_server(Some(UserLimit::OldestStays(1)), Arc::default()).await;
    let mut first = RawClient::connect(server.address).await;
    first.send(&client_text("token-of-ada")).await;
    assert_eq!(first.recv_text().await, "hello ada");
    let mut second = RawClient::connect(server.address).await;
    second.send(&client_text("token-of-ada")).await;
    assert_eq!(second.close_code().await, Some(1008));
    drop(second);
    eventually(1, || hub.len()).await;
    drop(first);
    eventually(0, || hub.user_len("ada")).await;
    eventually(vec!["connected ada".to_owned(), "disconnected ada".to_owned()], || {
        calls.lock().unwrap().clone()
    })
    .await;
}

// ---- Expiry and joins -------------------------------------------------------------------------------------------

#[tokio::test]
async fn a_connection_expires_at_its_time_and_its_hub_may_go_on() {
    let FirstMessage { server, calls, .. } = first_message_server(None, Arc::default()).await;
    for (user, goes_on) in [("ada", false), ("forever", true)] {
        let mut client = RawClient::connect(server.address).await;
        client.send(&client_text(&format!("token-of-{user}"))).await;
        assert_eq!(client.recv_text().await, format!("hello {user}"));
        client.send(&client_text("expire")).await;
        assert_eq!(client.recv_text().await, "your token has expired");
        if goes_on {
            client.send(&client_text("red")).await;
            assert_eq!(client.recv_text().await, "joined red");
        } else {
            assert_eq!(client.close_code().await, Some(1008));
            // The hook, then the reason.
            let expected = ["connected ada", "expired ada", "expired ada"].map(str::to_owned).to_vec();
            eventually(expected, || calls.lock().unwrap().clone()).await;
        }
    }
}

#[tokio::test]
async fn a_connection_that_is_served_with_an_expiry_expires() {
    let hub = engine(1).hub::<Greeter>(WsHubConfig::default()).unwrap();
    let for_route = hub.clone();
    let connect = move |ws: WebSocketUpgrade| async move {
        let at = SystemTime::now() + Duration::from_millis(200);
        ws.serve(&for_route, Greeter { user: "ada".into() }).expires_at(at)
    };
    let server = Server::start(Router::new().route("/ws", any(connect))).await;
    let mut client = RawClient::connect(server.address).await;
    assert_eq!(client.recv_text().await, "hello ada");
    assert_eq!(client.close_code().await, Some(1008));
}

#[tokio::test]
async fn a_hub_says_who_may_join_a_group() {
    let FirstMessage { server, hub, .. } = first_message_server(None, Arc::default()).await;
    for (user, group, expected) in [
        ("ada", "red", "joined red"),
        ("ada", "admins", "for admins only"),
        ("root", "admins", "joined admins"),
    ] {
        let mut client = RawClient::connect(server.address).await;
        client.send(&client_text(&format!("token-of-{user}"))).await;
        client.send(&client_text(group)).await;
        assert_eq!(client.recv_text().await, format!("hello {user}"));
        assert_eq!(client.recv_text().await, expected);
        let members = usize::from(expected.starts_with("joined"));
        eventually(members, || hub.group_len(group)).await;
        drop(client);
        eventually(0, || hub.group_len(group)).await;
    }
}
