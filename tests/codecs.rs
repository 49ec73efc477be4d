//! A stranger's bytes against a hub's decoder: they cost their sender's connection, and nothing else.
//!
//! A stack that overflows ends the process, so what could do it runs in a process of its own: this test's binary,
//! started once more.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::marker::PhantomData;

use axum::Router;
use axum::extract::State;
use axum::routing::any;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shardcast::{
    BinaryCodec, CodecError, Decode, DisconnectRequest, Encode, Hub, HubContext, JsonCodec, MessageKind,
    RawCodec, WebSocketUpgrade, WsHub, WsHubConfig, deserialize_bounded,
};
use testkit_hub::{Client, Server, engine, within_timeout};
use tokio::process::Command;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio_tungstenite::tungstenite::Message;

#[derive(Debug, Serialize, Deserialize)]
enum Tree {
    Leaf,
    Node(Box<Tree>),
}

impl Tree {
    fn depth(&self) -> usize {
        match self {
            Tree::Leaf => 0,
            Tree::Node(below) => 1 + below.depth(),
        }
    }
}

/// MessagePack, as in the example `custom_codec`.
struct MessagePack;

impl<T: DeserializeOwned> Decode<T> for MessagePack {
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<T, CodecError> {
        CodecError::require(kind, MessageKind::Binary)?;
        deserialize_bounded(&mut rmp_serde::Deserializer::new(payload))
    }
}

impl<T: Serialize> Encode<T> for MessagePack {
    fn encode(value: &T, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        rmp_serde::encode::write(payload, value).map_err(CodecError::encode)?;
        Ok(MessageKind::Binary)
    }
}

/// Answers a tree with its depth.
struct Trees<C> {
    codec: PhantomData<fn() -> C>,
}

impl<C: Decode<Tree> + Encode<usize>> WsHub for Trees<C> {
    type Codec = C;
    type InMessage = Tree;
    type OutMessage = usize;

    async fn on_message(&self, tree: Tree, ctx: HubContext<Self>) {
        ctx.unicast(tree.depth()).await;
    }
}

/// A hub on a shard as an application has it, not on a thread of the test's own; its URL.
async fn forest<C: Decode<Tree> + Encode<usize>>() -> (shardcast::Engine, Server) {
    let engine = engine(1);
    let hub = engine.hub::<Trees<C>>(WsHubConfig::default()).unwrap();
    let serve = async |ws: WebSocketUpgrade, State(hub): State<Hub<Trees<C>>>| {
        ws.serve(&hub, Trees { codec: PhantomData })
    };
    let server = Server::start(Router::new().route("/ws", any(serve)).with_state(hub)).await;
    (engine, server)
}

/// Sends the deepest tree that may be, and one of 20,000 levels. A bystander on the same shard goes on.
async fn a_deep_message_ends_its_connection<C: Decode<Tree> + Encode<usize>>(nested: fn(usize) -> Message) {
    let (_engine, server) = forest::<C>().await;
    let mut bystander = Client::connect(server.url("/ws")).await;
    let mut wrongdoer = Client::connect(server.url("/ws")).await;
    wrongdoer.send(nested(127)).await;
    assert!(matches!(wrongdoer.recv().await, Some(Message::Text(_) | Message::Binary(_))));
    wrongdoer.send(nested(20_000)).await;
    assert_eq!(wrongdoer.closed().await, (1007, "undecodable message".to_owned()));
    bystander.send(nested(1)).await;
    assert!(matches!(bystander.recv().await, Some(Message::Text(_) | Message::Binary(_))));
}

const CHILD: &str = "SHARDCAST_TEST_CHILD";

/// Runs the test of this name in a process of its own, and there what it does.
async fn apart(name: &str, what: impl Future<Output = ()>) {
    if std::env::var_os(CHILD).is_some() {
        return what.await;
    }
    let mut child = Command::new(std::env::current_exe().unwrap());
    let output = within_timeout(
        child.args([name, "--exact", "--nocapture"]).env(CHILD, "1").kill_on_drop(true).output(),
    );
    let output = output.await.unwrap();
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && stdout.contains("1 passed"), "the process ended: {output:?}");
}

#[tokio::test]
async fn postcard_that_nests_without_end_ends_its_connection_and_not_the_process() {
    let nested = |levels| Message::binary([vec![1; levels], vec![0]].concat());
    apart(
        "postcard_that_nests_without_end_ends_its_connection_and_not_the_process",
        a_deep_message_ends_its_connection::<BinaryCodec>(nested),
    )
    .await;
}

#[tokio::test]
async fn json_that_nests_without_end_ends_its_connection_and_not_the_process() {
    // serde_json's own limit is one level less: its enum begins with an object.
    let nested = |levels: usize| {
        let levels = levels.min(5000);
        Message::text(format!("{}\"Leaf\"{}", "{\"Node\":".repeat(levels), "}".repeat(levels)))
    };
    apart(
        "json_that_nests_without_end_ends_its_connection_and_not_the_process",
        a_deep_message_ends_its_connection::<JsonCodec>(nested),
    )
    .await;
}

#[tokio::test]
async fn message_pack_that_nests_without_end_ends_its_connection_and_not_the_process() {
    let nested = |levels| {
        let mut payload = [0x81, 1].repeat(levels); // a map of one: variant 1 and what is in it
        payload.push(0); // variant 0
        Message::binary(payload)
    };
    apart(
        "message_pack_that_nests_without_end_ends_its_connection_and_not_the_process",
        a_deep_message_ends_its_connection::<MessagePack>(nested),
    )
    .await;
}

/// A decoder with a fault of its own.
struct Panics;

impl Decode<String> for Panics {
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<String, CodecError> {
        assert_ne!(payload, b"boo", "a panic that this test expects");
        RawCodec::decode(kind, payload)
    }
}

impl Encode<String> for Panics {
    fn encode(value: &String, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        RawCodec::encode(value, payload)
    }
}

struct Echo {
    ends: UnboundedSender<String>,
}

impl WsHub for Echo {
    type Codec = Panics;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.unicast(text).await;
    }

    async fn on_disconnect(&self, request: DisconnectRequest) {
        self.ends.send(format!("{:?}", request.reason)).unwrap();
    }
}

#[tokio::test]
async fn a_decoder_that_panics_ends_that_connection_only_with_1011() {
    let engine = engine(1);
    let hub = engine.hub::<Echo>(WsHubConfig::default()).unwrap();
    let (ends, mut ended) = unbounded_channel();
    let serve = async move |ws: WebSocketUpgrade, State(hub): State<Hub<Echo>>| {
        ws.serve(&hub, Echo { ends: ends.clone() })
    };
    let server = Server::start(Router::new().route("/ws", any(serve)).with_state(hub.clone())).await;
    let mut bystander = Client::connect(server.url("/ws")).await;
    let mut wrongdoer = Client::connect(server.url("/ws")).await;
    wrongdoer.send_text("fine").await;
    wrongdoer.recv_texts(&["fine"]).await;
    wrongdoer.send_text("boo").await;
    assert_eq!(wrongdoer.closed().await.0, 1011);
    assert_eq!(within_timeout(ended.recv()).await.unwrap(), "HandlerPanicked");
    bystander.send_text("still here").await;
    bystander.recv_texts(&["still here"]).await;
    assert_eq!(hub.len(), 1);
}
