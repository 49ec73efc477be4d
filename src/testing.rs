//! Tests of an application's own hubs: servers, clients that misbehave, a clock that the test moves, contexts.
//!
//! For `[dev-dependencies]`: `shardcast = { …, features = ["testing"] }`.
//!
//! - [`TestServer`]: an application's router, and [`TestHub`]: a hub without routes. Both on a free port, or in memory with
//!   a paused clock.
//! - [`TestClient`]: sends, expects, stalls, is throttled, vanishes, resets. Its assertions wait, and when they fail they
//!   say what has arrived.
//! - [`TestContext`]: calls one method of a hub.
//!
//! A test of the README's chat:
//!
//! ```
//! use axum::{Router, extract::State, routing::{any, post}};
//! use serde::{Deserialize, Serialize};
//! use serde_json::json;
//! use shardcast::testing::TestServer;
//! use shardcast::{
//!     Engine, Hub, HubContext, JsonCodec, PublishError, Refusal, Serve, WebSocketUpgrade, WsHub, WsHubConfig,
//! };
//!
//! #[derive(Deserialize)]
//! #[serde(tag = "type", rename_all = "lowercase")]
//! enum FromClient {
//!     Say { text: String },
//!     Count,
//! }
//!
//! #[derive(Serialize)]
//! #[serde(tag = "type", rename_all = "lowercase")]
//! enum ToClient {
//!     Said { text: String },
//!     Count { clients: usize },
//!     Notice { text: String },
//! }
//!
//! struct Chat;
//!
//! impl WsHub for Chat {
//!     type Codec = JsonCodec;
//!     type InMessage = FromClient;
//!     type OutMessage = ToClient;
//!
//!     async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
//!         ctx.add_to_group("lobby").await;
//!         Ok(())
//!     }
//!
//!     async fn on_message(&self, message: FromClient, ctx: HubContext<Self>) {
//!         match message {
//!             FromClient::Say { text } => ctx.broadcast_group("lobby", ToClient::Said { text }).await,
//!             FromClient::Count => ctx.unicast(ToClient::Count { clients: ctx.clients().len() }).await,
//!         }
//!     }
//! }
//!
//! async fn connect(ws: WebSocketUpgrade, State(chat): State<Hub<Chat>>) -> Serve<Chat> {
//!     ws.serve(&chat, Chat)
//! }
//!
//! async fn notice(State(chat): State<Hub<Chat>>, text: String) -> Result<String, PublishError> {
//!     let receipt = chat.to_all().deliver(&ToClient::Notice { text }).await?;
//!     Ok(format!("accepted for {} of {} clients\n", receipt.accepted(), receipt.recipients))
//! }
//!
//! fn app(engine: &Engine) -> Router {
//!     let chat = engine.hub::<Chat>(WsHubConfig::default()).expect("the defaults are valid");
//!     Router::new().route("/ws", any(connect)).route("/notice", post(notice)).with_state(chat)
//! }
//!
//! # /*
//! #[tokio::test]
//! # */
//! # #[tokio::main(flavor = "current_thread")] async fn main() { the_lobby_hears_what_is_said().await }
//! async fn the_lobby_hears_what_is_said() {
//!     let server = TestServer::in_memory(app).await; // or `start`: over sockets, with threads
//!     let mut ada = server.connect("/ws").await;
//!     let mut bob = server.connect("/ws").await;
//!
//!     ada.send_json(&json!({ "type": "say", "text": "hello" }));
//!     bob.expect_json(&json!({ "type": "said", "text": "hello" })).await;
//!     ada.expect_json(&json!({ "type": "said", "text": "hello" })).await;
//!
//!     bob.send_json(&json!({ "type": "count" }));
//!     bob.expect_json(&json!({ "type": "count", "clients": 2 })).await;
//!     ada.expect_nothing().await;
//!
//!     let request = http::Request::post("/notice").body("restart at noon".into()).expect("a request");
//!     assert_eq!(server.request(request).await.body(), "accepted for 2 of 2 clients\n");
//!     ada.expect_json(&json!({ "type": "notice", "text": "restart at noon" })).await;
//! }
//! ```
//!
//! The guide has [a chapter](crate::guide::testing) on slow clients, time, and unit tests.

mod client;
mod context;
mod driver;
mod hub;
mod server;
mod transcript;
mod waiting;
mod wire;

pub use client::TestClient;
pub use context::{TestContext, TestContextBuilder, TestMember};
pub use hub::{HubTestClient, TestHub};
pub use server::{ClientBuilder, Refused, TestServer, TestServerBuilder};
pub use transcript::Closed;
