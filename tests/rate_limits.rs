//! Rate limits of hubs, over real sockets: what a hub is told, what users share, and how often an address may upgrade.
//!
//! That limits are kept to the message is shown by the engine's own tests, with a clock of their own. Here the real
//! clock runs, so rates are chosen that no machine is too slow or too fast for.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::net::Ipv4Addr;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::any;
use shardcast::{
    CloseCode, CloseReason, Engine, EngineConfig, Hub, HubContext, OverLimit, Rate, RateLimit, RawCodec,
    Serve, SharedRateLimit, Stateful, StatefulHub, WebSocketUpgrade, WsHub, WsHubConfig,
};
use testkit_hub::{Client, Server, command_app, connect, engine, eventually, within_timeout};
use tokio::sync::mpsc;

const HOUR: Duration = Duration::from_secs(3600);

/// Answers each message, and tells its client how many were dropped.
struct Strict;

impl WsHub for Strict {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&self, message: String, ctx: HubContext<Self>) {
        ctx.unicast(message).await;
    }

    async fn on_rate_limited(&self, ctx: HubContext<Self>, messages: u64) {
        ctx.unicast(format!("dropped {messages}")).await;
    }
}

/// Counts what was dropped, and reports it at the end.
struct Counter {
    handled: u64,
    dropped: u64,
    report: mpsc::UnboundedSender<(u64, u64, CloseReason)>,
}

impl StatefulHub for Counter {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&mut self, _: String, _: HubContext<Stateful<Self>>) {
        self.handled += 1;
    }

    async fn on_rate_limited(&mut self, _: HubContext<Stateful<Self>>, messages: u64) {
        self.dropped += messages;
    }

    async fn on_disconnected(&mut self, _: HubContext<Stateful<Self>>, reason: CloseReason) {
        self.report.send((self.handled, self.dropped, reason)).unwrap();
    }
}

fn limited(messages: Rate, over_limit: OverLimit) -> WsHubConfig {
    let rate_limit = RateLimit { messages: Some(messages), over_limit, ..RateLimit::default() };
    WsHubConfig { rate_limit, ..WsHubConfig::default() }
}

#[tokio::test]
async fn a_hub_is_told_how_many_messages_of_its_client_were_dropped() {
    let engine = engine(1);
    let hub = engine.hub::<Strict>(limited(Rate::new(3, HOUR), OverLimit::Drop)).unwrap();
    let app = Router::new()
        .route(
            "/ws",
            any(async |ws: WebSocketUpgrade, State(hub): State<Hub<Strict>>| ws.serve(&hub, Strict)),
        )
        .with_state(hub);
    let server = Server::start(app).await;
    let mut client = Client::connect(server.url("/ws")).await;
    for number in 0..100 {
        client.send_text(number.to_string()).await;
    }
    client.recv_texts(&["0", "1", "2"]).await;
    let told: u64 = client.recv_text().await.strip_prefix("dropped ").unwrap().parse().unwrap();
    assert!((1..=97).contains(&told), "{told}");
    client.send_close(1000).await;
    let counted = || engine.metrics().tally;
    eventually((97, 3), || (counted().rate_dropped, counted().received)).await;
}

#[tokio::test]
async fn connections_of_a_user_have_one_limit_on_whichever_shards_they_are() {
    let mut config = limited(Rate::per_second(1_000_000), OverLimit::Drop);
    config.rate_limit.user_messages = Some(Rate::new(10, HOUR));
    let engine = engine(2);
    let hub = engine.hub::<Stateful<Counter>>(config).unwrap();
    ten_for_each_user(move |ws, user, counter| ws.serve(&hub, counter).user(user)).await;
}

#[tokio::test]
async fn connections_that_are_given_one_limit_share_it() {
    let engine = engine(2);
    let hub = engine.hub::<Stateful<Counter>>(limited(Rate::per_second(1_000_000), OverLimit::Drop)).unwrap();
    let limits =
        ["ada", "bob"].map(|user| (user, SharedRateLimit::new(Some(Rate::new(10, HOUR)), None).unwrap()));
    ten_for_each_user(move |ws, user, counter| {
        let (_, limit) = limits.iter().find(|(name, _)| *name == user).unwrap();
        ws.serve(&hub, counter).shared_rate_limit(limit)
    })
    .await;
}

/// Four connections of each of two users send a hundred messages, of which ten are handled.
async fn ten_for_each_user(
    serve: impl Fn(WebSocketUpgrade, String, Counter) -> Serve<Stateful<Counter>> + Clone + Send + Sync + 'static,
) {
    let (report, mut reports) = mpsc::unbounded_channel();
    let serve = async move |ws: WebSocketUpgrade, Path(user): Path<String>| -> Serve<Stateful<Counter>> {
        serve(ws, user, Counter { handled: 0, dropped: 0, report: report.clone() })
    };
    let server = Server::start(Router::new().route("/ws/{user}", any(serve))).await;
    let mut totals = Vec::new();
    for user in ["ada", "bob"] {
        let mut clients = Vec::new();
        for _ in 0..4 {
            clients.push(Client::connect(server.url(&format!("/ws/{user}"))).await);
        }
        for client in &mut clients {
            for _ in 0..25 {
                client.send_text("x").await;
            }
            client.send_close(1000).await;
        }
        let mut total = (0, 0);
        for _ in &clients {
            let (handled, dropped, reason) = within_timeout(reports.recv()).await.unwrap();
            assert!(matches!(reason, CloseReason::Peer { code: Some(CloseCode::NORMAL), .. }), "{reason:?}");
            total = (total.0 + handled, total.1 + dropped);
        }
        totals.push(total);
    }
    assert_eq!(totals, [(10, 90), (10, 90)], "handled and dropped, for each user");
}

#[tokio::test]
async fn a_client_that_exceeds_a_strict_limit_is_told_why_it_is_closed() {
    let engine = engine(1);
    let hub = engine.hub::<Strict>(limited(Rate::new(2, HOUR), OverLimit::Close)).unwrap();
    let app = Router::new().route("/ws", any(async move |ws: WebSocketUpgrade| ws.serve(&hub, Strict)));
    let server = Server::start(app).await;
    let mut client = Client::connect(server.url("/ws")).await;
    for _ in 0..3 {
        client.send_text("x").await;
    }
    client.recv_texts(&["x", "x"]).await;
    assert_eq!(client.closed().await, (1008, "rate limit exceeded".to_owned()));
    eventually(1, || engine.metrics().ended_rate_limited).await;
}

fn limits_upgrades() -> Engine {
    let config = EngineConfig {
        shards: Some(1),
        pin: false,
        max_upgrades_per_address: Some(Rate::new(3, HOUR)),
        ..EngineConfig::default()
    };
    Engine::start(config).unwrap()
}

#[tokio::test]
async fn an_address_that_upgrades_too_often_gets_429_and_when_it_may_again() {
    let engine = limits_upgrades();
    let server = Server::start_with_addresses(command_app(engine.hub(WsHubConfig::default()).unwrap())).await;
    for _ in 0..3 {
        let (client, _) = connect(&server.url("/ws")).await;
        client.leave().await; // it is the upgrades that count, not the connections
    }
    for _ in 0..2 {
        let here = Ipv4Addr::new(127, 0, 0, 1);
        let error = within_timeout(Client::try_connect_from(here, server.address)).await.err().unwrap();
        let tokio_tungstenite::tungstenite::Error::Http(response) = error else { panic!("{error:?}") };
        assert_eq!(response.status(), 429);
        let retry_after: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((1000..=1200).contains(&retry_after), "{retry_after} of 1200 s");
        let body = response.body().as_deref().unwrap_or_default();
        assert!(body.starts_with(b"too many connections from this address"), "{response:?}");
    }
    let there = Ipv4Addr::new(127, 0, 0, 2);
    within_timeout(Client::try_connect_from(there, server.address)).await.unwrap();
    eventually(0, || engine.connection_count()).await;
}

#[tokio::test]
async fn an_address_that_is_known_only_after_the_upgrade_is_limited_by_a_close_frame() {
    let engine = limits_upgrades();
    let server = Server::start(command_app(engine.hub(WsHubConfig::default()).unwrap())).await;
    for _ in 0..3 {
        connect(&server.url("/ws")).await;
    }
    let (code, reason) = Client::connect(server.url("/ws")).await.closed().await;
    assert_eq!((code, &*reason), (1013, "too many connections from this address in a short time"));
}
