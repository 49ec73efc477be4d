//! What reaches a client before its hub's `on_connected` has returned, over real sockets.
//!
//! Nothing that is for all: so nobody hears secrets ahead of the greeting, and who is turned away hears none at all.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::sync::Arc;

use axum::Router;
use axum::extract::Query;
use axum::routing::any;
use serde::Deserialize;
use shardcast::{CloseCode, Hub, HubContext, RawCodec, Refusal, WebSocketUpgrade, WsHub, WsHubConfig};
use testkit_hub::{Client, OnRuntime, Server, Transport, engine, on_each_transport, within_timeout};
use tokio::sync::Semaphore;
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

/// Joins a group, looks the client up for as long as the test wants, then greets it or turns it away.
struct Doorman {
    turns_away: bool,
    opening: UnboundedSender<()>,
    looked_up: Arc<Semaphore>,
}

impl WsHub for Doorman {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.add_to_group("early").await;
        self.opening.send(()).unwrap();
        self.looked_up.acquire().await.unwrap().forget();
        if self.turns_away {
            return Err(Refusal::new(CloseCode(4001), "not you"));
        }
        ctx.unicast("welcome".to_owned()).await;
        Ok(())
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.broadcast(text).await;
    }
}

#[derive(Deserialize)]
struct Asked {
    turns_away: bool,
}

struct Door<H: WsHub> {
    hub: Hub<H>,
    server: Server,
    opening: UnboundedReceiver<()>,
    looked_up: Arc<Semaphore>,
}

impl<H> Door<H>
where
    H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Doorman>,
{
    async fn open(transport: Transport) -> Self {
        let hub = engine(2).hub::<H>(WsHubConfig::default()).unwrap();
        let (opening, is_opening) = unbounded_channel();
        let looked_up = Arc::new(Semaphore::new(0));
        let (served, semaphore) = (hub.clone(), looked_up.clone());
        let serve = async move |ws: WebSocketUpgrade, Query(Asked { turns_away }): Query<Asked>| {
            ws.serve(&served, Doorman { turns_away, opening: opening.clone(), looked_up: semaphore.clone() })
        };
        let server = Server::start_over(transport, Router::new().route("/ws", any(serve))).await;
        Self { hub, server, opening: is_opening, looked_up }
    }

    /// A client that is being looked up.
    async fn connect(&mut self, turns_away: bool) -> Client {
        let peer = Client::connect(self.server.url(&format!("/ws?turns_away={turns_away}"))).await;
        within_timeout(self.opening.recv()).await.unwrap();
        peer
    }

    async fn tell(&self, text: &str) -> u64 {
        within_timeout(self.hub.to_all().deliver(&text.to_owned())).await.unwrap().recipients
    }
}

on_each_transport!(nothing_that_is_for_all_reaches_a_client_before_its_on_connected_has_returned);
async fn nothing_that_is_for_all_reaches_a_client_before_its_on_connected_has_returned(transport: Transport) {
    nothing_comes_early::<Doorman>(transport).await;
    nothing_comes_early::<OnRuntime<Doorman>>(transport).await;
}

async fn nothing_comes_early<
    H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Doorman>,
>(
    transport: Transport,
) {
    let mut door = Door::<H>::open(transport).await;
    let mut ada = door.connect(false).await;
    assert_eq!(door.tell("a secret").await, 0);
    // It is a member of what it has joined.
    let receipt =
        within_timeout(door.hub.to_group("early").deliver(&"to the group".to_owned())).await.unwrap();
    assert_eq!(receipt.recipients, 1);
    door.looked_up.add_permits(1);
    // What it says is handled when it is among all.
    ada.send_text("hello all").await;
    ada.recv_texts(&["to the group", "welcome", "hello all"]).await;
    let mut bob = door.connect(false).await;
    assert_eq!(door.tell("only for Ada").await, 1);
    door.looked_up.add_permits(1);
    bob.send_text("hello Ada").await;
    bob.recv_texts(&["welcome", "hello Ada"]).await;
    ada.recv_texts(&["only for Ada", "hello Ada"]).await;
}

on_each_transport!(a_client_that_on_connected_refuses_receives_its_close_and_nothing_else);
async fn a_client_that_on_connected_refuses_receives_its_close_and_nothing_else(transport: Transport) {
    a_refused_client_receives_its_close::<Doorman>(transport).await;
    a_refused_client_receives_its_close::<OnRuntime<Doorman>>(transport).await;
}

async fn a_refused_client_receives_its_close<
    H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Doorman>,
>(
    transport: Transport,
) {
    let mut door = Door::<H>::open(transport).await;
    let eve = door.connect(true).await;
    assert_eq!(door.tell("a secret").await, 0);
    door.looked_up.add_permits(1);
    let rest = tokio::spawn(eve.closed());
    while !rest.is_finished() {
        assert_eq!(door.tell("another secret").await, 0);
        tokio::task::yield_now().await; // nobody is there, so nothing is waited for
    }
    assert_eq!(within_timeout(rest).await.unwrap(), (4001, "not you".to_owned()));
}
/// Tells all that it has come, on another thread, once it has been polled twice.
struct Crier;

impl WsHub for Crier {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        tokio::task::yield_now().await;
        let clients = ctx.clients().clone();
        let tell = move || clients.to_all().try_publish(&"somebody has come".to_owned()).unwrap();
        std::thread::spawn(tell).join().unwrap();
        Ok(())
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.broadcast(text).await;
    }
}

on_each_transport!(what_on_connected_has_others_tell_all_does_not_reach_its_own_client);
async fn what_on_connected_has_others_tell_all_does_not_reach_its_own_client(transport: Transport) {
    what_others_tell_all_is_not_received::<Crier>(transport).await;
    what_others_tell_all_is_not_received::<OnRuntime<Crier>>(transport).await;
}

async fn what_others_tell_all_is_not_received<
    H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Crier>,
>(
    transport: Transport,
) {
    let hub = engine(1).hub::<H>(WsHubConfig::default()).unwrap();
    let serve = async move |ws: WebSocketUpgrade| ws.serve(&hub, Crier);
    let server = Server::start_over(transport, Router::new().route("/ws", any(serve))).await;
    let mut ada = Client::connect(server.url("/ws")).await;
    ada.send_text("hello").await;
    ada.recv_texts(&["hello"]).await;
    let mut bob = Client::connect(server.url("/ws")).await;
    ada.recv_texts(&["somebody has come"]).await;
    bob.send_text("hello Ada").await;
    bob.recv_texts(&["hello Ada"]).await;
    ada.recv_texts(&["hello Ada"]).await;
}
