//! How messages are published: what a call does at once, what is encoded once, and what an error gives back.
//!
//! Over real sockets. Order, receipts and slow clients are in other files.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::cell::Cell;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::routing::any;
use serde::{Serialize, Serializer};
use shardcast::{
    BroadcastPolicy, Engine, EngineConfig, Hub, HubContext, JsonCodec, PublishError, Refusal,
    TryPublishError, WebSocketUpgrade, WsHub, WsHubConfig,
};
use testkit_hub::{Client, CommandHub, Server, command_app, connect, engine, within_timeout};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// A message that counts how often it is encoded. It can be sent to another thread, but not shared between two.
struct Counted {
    text: Cell<&'static str>,
    encodings: Arc<AtomicUsize>,
}

impl Counted {
    fn new(text: &'static str) -> Self {
        Self { text: Cell::new(text), encodings: Arc::default() }
    }

    fn encodings(&self) -> usize {
        self.encodings.load(Relaxed)
    }
}

impl Serialize for Counted {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.encodings.fetch_add(1, Relaxed);
        serializer.serialize_str(self.text.get())
    }
}

/// Greets, and on `1` keeps its shard until the test lets go of it.
struct Counting {
    held: UnboundedSender<()>,
    /// Closed when the test lets go.
    hold: Arc<Mutex<mpsc::Receiver<()>>>,
}

impl WsHub for Counting {
    type Codec = JsonCodec;
    type InMessage = u32;
    type OutMessage = Counted;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.add_to_group("a").await;
        ctx.unicast(Counted::new("hello")).await;
        Ok(())
    }

    async fn on_message(&self, _: u32, _: HubContext<Self>) {
        self.held.send(()).unwrap();
        self.hold.lock().unwrap().recv().unwrap_err();
    }
}

struct Running {
    hub: Hub<Counting>,
    _server: Server,
    peer: Client,
    hold: mpsc::Sender<()>,
    held: UnboundedReceiver<()>,
}

async fn run(config: EngineConfig) -> Running {
    let engine = Engine::start(EngineConfig { shards: Some(1), pin: false, ..config }).unwrap();
    let hub = engine.hub::<Counting>(WsHubConfig::default()).unwrap();
    let (sender, held) = unbounded_channel();
    let (hold, let_go) = mpsc::channel();
    let let_go = Arc::new(Mutex::new(let_go));
    let serve = async move |ws: WebSocketUpgrade, State(hub): State<Hub<Counting>>| {
        ws.serve(&hub, Counting { held: sender, hold: let_go })
    };
    let server = Server::start(Router::new().route("/ws", any(serve)).with_state(hub.clone())).await;
    let mut peer = Client::connect(server.url("/ws")).await;
    peer.recv_texts(&[r#""hello""#]).await;
    while within_timeout(hub.to_all().deliver(&Counted::new("joined"))).await.unwrap().recipients == 0 {}
    peer.recv_texts(&[r#""joined""#]).await;
    Running { hub, _server: server, peer, hold, held }
}

#[tokio::test]
async fn a_call_encodes_at_once_and_sends_when_its_future_is_polled() {
    let Running { hub, mut peer, .. } = run(EngineConfig::default()).await;
    let message = Counted::new("as it was");
    let publishing = hub.to_all().publish(&message);
    assert_eq!(message.encodings(), 1);
    message.text.set("changed");
    let never_polled = (hub.to_all().publish(&message), hub.to_all().deliver(&message));
    drop(never_polled);
    within_timeout(publishing).await.unwrap();
    within_timeout(hub.to_all().publish(&Counted::new("done"))).await.unwrap();
    peer.recv_texts(&[r#""as it was""#, r#""done""#]).await;
}

#[tokio::test]
async fn a_message_that_threads_cannot_share_is_published_from_any_task() {
    let Running { hub, mut peer, .. } = run(EngineConfig::default()).await;
    let publishing = tokio::spawn(async move {
        let message = Counted::new("from a task");
        hub.to_all().publish(&message).await.unwrap();
        hub.to_group("a").deliver(&message).await.unwrap().recipients
    });
    assert_eq!(within_timeout(publishing).await.unwrap(), 1);
    peer.recv_texts(&[r#""from a task""#, r#""from a task""#]).await;
}

#[tokio::test]
async fn a_prepared_message_is_encoded_once_for_all_its_targets() {
    let Running { hub, mut peer, .. } = run(EngineConfig::default()).await;
    let message = Counted::new("goal");
    let prepared = hub.prepare(&message).unwrap();
    within_timeout(hub.to_all().publish_prepared(&prepared)).await.unwrap();
    assert_eq!(
        within_timeout(hub.to_group("a").deliver_prepared(&prepared.clone())).await.unwrap().recipients,
        1
    );
    hub.to_groups(&["a", "b"]).try_publish_prepared(&prepared).unwrap();
    peer.recv_texts(&[r#""goal""#; 3]).await;
    assert_eq!(message.encodings(), 1);
}

#[tokio::test]
async fn a_full_log_gives_the_message_back_encoded() {
    let config = EngineConfig { log_capacity: 2, ..EngineConfig::default() };
    let Running { hub, mut peer, hold, mut held, .. } = run(config).await;
    peer.send_text("1").await;
    within_timeout(held.recv()).await.unwrap();
    let mut accepted = 0;
    let (message, refused) = loop {
        let message = Counted::new("next");
        match hub.to_all().try_publish(&message) {
            Ok(()) => accepted += 1,
            Err(error) => break (message, error),
        }
    };
    assert!(refused.is_full() && !refused.is_closed(), "{refused:?}");
    let mut prepared = refused.into_inner().unwrap();
    drop(hold);
    while let Err(refused) = hub.to_all().try_publish_prepared(&prepared) {
        assert!(refused.is_full(), "{refused:?}");
        prepared = refused.into_inner().unwrap();
        tokio::task::yield_now().await;
    }
    peer.recv_texts(&vec![r#""next""#; accepted + 1]).await;
    assert_eq!(message.encodings(), 1, "a retry does not encode again");
}

#[tokio::test]
async fn an_engine_that_has_ended_says_so_and_gives_the_message_back() {
    let engine = engine(1);
    let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let prepared = hub.prepare(&"late".to_owned()).unwrap();
    within_timeout(engine.shutdown(Duration::from_secs(5))).await;
    let refused = hub.to_all().try_publish_prepared(&prepared).unwrap_err();
    assert!(refused.is_closed() && !refused.is_full(), "{refused:?}");
    assert!(refused.into_inner().is_some());
    let refused = within_timeout(hub.to_all().publish_prepared(&prepared)).await;
    assert!(matches!(refused, Err(PublishError::Closed)), "{refused:?}");
}

#[tokio::test]
async fn a_message_that_was_prepared_for_another_codec_reaches_nobody() {
    struct InJson;
    impl WsHub for InJson {
        type Codec = JsonCodec;
        type InMessage = String;
        type OutMessage = String;
        async fn on_message(&self, _: String, _: HubContext<Self>) {}
    }
    let engine = engine(1);
    let json = engine.hub::<InJson>(WsHubConfig::default()).unwrap();
    let [hub, same_codec] = [(); 2].map(|()| engine.hub::<CommandHub>(WsHubConfig::default()).unwrap());
    let server = Server::start(command_app(hub.clone())).await;
    let (mut peer, id) = connect(&server.url("/ws")).await;

    let prepared = json.prepare(&"in quotes".to_owned()).unwrap();
    let refused = hub.to(id).try_publish_prepared(&prepared).unwrap_err();
    assert!(matches!(refused, TryPublishError::Encode(_)), "{refused:?}");
    let refused = within_timeout(hub.to(id).publish_prepared(&prepared)).await;
    assert!(matches!(refused, Err(PublishError::Encode(_))), "{refused:?}");
    let refused = within_timeout(hub.to(id).deliver_prepared(&prepared)).await;
    assert!(matches!(refused, Err(PublishError::Encode(_))), "{refused:?}");
    assert_eq!(hub.encode_failures(), 3);

    let prepared = same_codec.prepare(&"understood".to_owned()).unwrap();
    within_timeout(hub.to(id).publish_prepared(&prepared)).await.unwrap();
    peer.recv_texts(&["understood"]).await;
}

#[tokio::test]
async fn a_policy_out_of_range_is_refused_where_it_is_given() {
    let hub = engine(1).hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let policy = BroadcastPolicy::DropMessage { timeout: Duration::from_secs(3601) };
    assert_eq!(hub.to_all().policy(policy).unwrap_err().field, "timeout");
}
