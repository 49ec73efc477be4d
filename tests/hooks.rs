//! What a hub's hooks can do: refuse a client, keep one whose message cannot be decoded, and change the hub.
//!
//! Over real sockets. When a client is among all is in `opening.rs`, the compatible hooks are in `seed.rs`.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::ops::ControlFlow;

use axum::Router;
use axum::extract::Query;
use axum::routing::any;
use serde::Deserialize;
use shardcast::{
    CloseCode, CloseReason, CodecError, ConnectionId, Hub, HubContext, JsonCodec, RawCodec, Refusal,
    Stateful, StatefulHub, WebSocketUpgrade, WsHub, WsHubConfig,
};
use testkit_hub::{Client, OnRuntime, Server, engine, within_timeout, yield_twice};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

type Ends = UnboundedSender<(ConnectionId, CloseReason)>;

/// Greets every client, and refuses one that comes with a code.
struct Strict {
    code: Option<u16>,
    panics: bool,
    ends: Ends,
}

impl WsHub for Strict {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.add_to_group("seen").await;
        ctx.unicast("hello".to_owned()).await;
        assert!(!self.panics);
        match self.code {
            Some(code) => Err(Refusal::new(CloseCode(code), format!("no: {code}"))),
            None => Ok(()),
        }
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.broadcast(text).await;
    }

    async fn on_disconnected(&self, ctx: HubContext<Self>, reason: CloseReason) {
        assert_eq!(ctx.clients().group_len("seen"), 0);
        self.ends.send((ctx.id(), reason)).unwrap();
    }
}

#[derive(Deserialize)]
struct Asked {
    code: Option<u16>,
    #[serde(default)]
    panics: bool,
}

async fn strict<H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Strict>>()
-> (Hub<H>, Server, UnboundedReceiver<(ConnectionId, CloseReason)>) {
    let hub = engine(1).hub::<H>(WsHubConfig::default()).unwrap();
    let (ends, ended) = unbounded_channel();
    let serving = hub.clone();
    let serve = async move |ws: WebSocketUpgrade, Query(Asked { code, panics }): Query<Asked>| {
        ws.serve(&serving, Strict { code, panics, ends: ends.clone() })
    };
    let server = Server::start(Router::new().route("/ws", any(serve))).await;
    (hub, server, ended)
}

#[tokio::test]
async fn a_refused_client_gets_its_code_and_reason_after_its_greeting_and_its_end_is_told_once() {
    a_refusal_is_told_once::<Strict>().await;
    a_refusal_is_told_once::<OnRuntime<Strict>>().await;
}

async fn a_refusal_is_told_once<
    H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Strict>,
>() {
    let (hub, server, mut ended) = strict::<H>().await;
    let refused = Client::connect(server.url("/ws?code=4001")).await;
    let (texts, close) = refused.rest().await;
    assert_eq!((texts, close), (vec!["hello".to_owned()], Some((4001, "no: 4001".to_owned()))));
    let text = "no: 4001".into();
    let (id, reason) = within_timeout(ended.recv()).await.unwrap();
    assert_eq!(reason, CloseReason::Application { code: CloseCode(4001), text });
    assert_eq!(within_timeout(hub.to(id).deliver(&"late".to_owned())).await.unwrap().recipients, 0);

    // The next one's end is the next that is told.
    let mut served = Client::connect(server.url("/ws")).await;
    served.recv_texts(&["hello"]).await;
    served.leave().await;
    let (next, reason) = within_timeout(ended.recv()).await.unwrap();
    assert!(next != id && matches!(reason, CloseReason::Peer { .. }), "{reason:?}");
}

#[tokio::test]
async fn a_refusal_with_a_code_that_cannot_be_sent_is_a_1011() {
    let (_hub, server, mut ended) = strict::<Strict>().await;
    let refused = Client::connect(server.url("/ws?code=1006")).await;
    assert_eq!(refused.rest().await.1, Some((1011, "no: 1006".to_owned())));
    assert!(within_timeout(ended.recv()).await.is_some());
}

#[tokio::test]
async fn a_panic_in_on_connected_ends_the_connection_and_its_end_is_told() {
    a_panic_in_on_connected_is_told::<Strict>().await;
    a_panic_in_on_connected_is_told::<OnRuntime<Strict>>().await;
}

async fn a_panic_in_on_connected_is_told<
    H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Strict>,
>() {
    let (_hub, server, mut ended) = strict::<H>().await;
    let peer = Client::connect(server.url("/ws?panics=true")).await;
    assert_eq!(peer.rest().await.1.unwrap().0, 1011);
    assert_eq!(within_timeout(ended.recv()).await.unwrap().1, CloseReason::HandlerPanicked);
}

/// Answers what it cannot decode, up to a limit, and says what it has counted when the client leaves.
struct Lenient {
    undecodable: u32,
    sum: u32,
    results: UnboundedSender<(u32, u32, CloseReason)>,
}

impl StatefulHub for Lenient {
    type Codec = JsonCodec;
    type InMessage = u32;
    type OutMessage = String;

    async fn on_message(&mut self, number: u32, ctx: HubContext<Stateful<Self>>) {
        yield_twice().await;
        self.sum += number;
        assert_ne!(number, 13, "a panic");
        ctx.unicast(format!("sum {}", self.sum)).await;
    }

    async fn on_undecodable(
        &mut self,
        ctx: HubContext<Stateful<Self>>,
        error: CodecError,
    ) -> ControlFlow<()> {
        self.undecodable += 1;
        ctx.unicast(error.to_string()).await;
        if self.undecodable == 3 { ControlFlow::Break(()) } else { ControlFlow::Continue(()) }
    }

    async fn on_disconnected(&mut self, _: HubContext<Stateful<Self>>, reason: CloseReason) {
        self.results.send((self.sum, self.undecodable, reason)).unwrap();
    }
}

async fn lenient<H: WsHub + From<Stateful<Lenient>>>() -> (Server, UnboundedReceiver<(u32, u32, CloseReason)>)
{
    let hub = engine(1).hub::<H>(WsHubConfig::default()).unwrap();
    let (results, ended) = unbounded_channel();
    let serve = async move |ws: WebSocketUpgrade| {
        let hub_of_client = Lenient { undecodable: 0, sum: 0, results: results.clone() };
        ws.serve(&hub, Stateful::from(hub_of_client))
    };
    (Server::start(Router::new().route("/ws", any(serve))).await, ended)
}

#[tokio::test]
async fn a_hub_may_answer_what_it_cannot_decode_and_keep_the_client() {
    a_hub_answers_what_it_cannot_decode::<Stateful<Lenient>>().await;
    a_hub_answers_what_it_cannot_decode::<OnRuntime<Stateful<Lenient>>>().await;
}

async fn a_hub_answers_what_it_cannot_decode<H: WsHub + From<Stateful<Lenient>>>() {
    let (server, mut ended) = lenient::<H>().await;
    let mut peer = Client::connect(server.url("/ws")).await;
    for text in ["one", "1", "two", "2", "three", "3"] {
        peer.send_text(text).await;
    }
    let refused = r#""the payload cannot be decoded""#;
    peer.recv_texts(&[refused, r#""sum 1""#, refused, r#""sum 3""#, refused]).await;
    assert_eq!(peer.closed().await.0, 1007);
    assert_eq!(within_timeout(ended.recv()).await.unwrap(), (3, 3, CloseReason::Undecodable));
}

#[tokio::test]
async fn a_stateful_hub_changes_without_a_mutex_and_its_state_survives_a_panic() {
    state_changes_and_survives_a_panic::<Stateful<Lenient>>().await;
    state_changes_and_survives_a_panic::<OnRuntime<Stateful<Lenient>>>().await;
}

async fn state_changes_and_survives_a_panic<H: WsHub + From<Stateful<Lenient>>>() {
    let (server, mut ended) = lenient::<H>().await;
    let mut peer = Client::connect(server.url("/ws")).await;
    for number in ["1", "2", "3"] {
        peer.send_text(number).await;
    }
    peer.recv_texts(&[r#""sum 1""#, r#""sum 3""#, r#""sum 6""#]).await;
    peer.send_text("13").await;
    assert_eq!(peer.closed().await.0, 1011);
    assert_eq!(within_timeout(ended.recv()).await.unwrap(), (19, 0, CloseReason::HandlerPanicked));
    // Another client has a state of its own, and the end of the first was told once.
    let mut peer = Client::connect(server.url("/ws")).await;
    peer.send_text("5").await;
    peer.recv_texts(&[r#""sum 5""#]).await;
    peer.leave().await;
    let (sum, _, reason) = within_timeout(ended.recv()).await.unwrap();
    assert!(sum == 5 && matches!(reason, CloseReason::Peer { .. }), "{sum} {reason:?}");
}
