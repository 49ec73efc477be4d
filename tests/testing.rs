//! The test kit: what it promises to the tests of applications.
#![cfg(feature = "testing")]
#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::future::Future;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::ops::ControlFlow;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use axum::Router;
use axum::extract::{ConnectInfo, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use futures_util::FutureExt as _;
use serde::{Deserialize, Serialize};
use serde_json::json;
use shardcast::auth::{Denied, Token};
use shardcast::testing::{TestContext, TestHub, TestServer};
use shardcast::{
    BroadcastPolicy, CloseCode, CloseReason, Dropped, Engine, EngineConfig, Hub, HubContext, JsonCodec,
    PresenceChange, PresenceKind, Rate, RawCodec, RawMessage, Refusal, RunOn, WebSocketUpgrade, WsHub,
    WsHubConfig,
};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};

const SECOND: Duration = Duration::from_secs(1);

/// What a hub has seen.
#[derive(Debug, Clone, PartialEq)]
enum Seen {
    Dropped(u64),
    Ended(CloseReason),
}

/// `all T`, `join G`, `group G T`, `late T` (a second later), `end CODE REASON`, `expire SECONDS`; anything else is sent
/// back.
#[derive(Clone)]
struct Recorder(UnboundedSender<Seen>);

impl Recorder {
    fn new() -> (Self, UnboundedReceiver<Seen>) {
        let (sender, seen) = unbounded_channel();
        (Self(sender), seen)
    }
}

impl WsHub for Recorder {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        if ctx.user().is_some_and(|user| &**user == "mallory") {
            return Err(Refusal::new(CloseCode::POLICY_VIOLATION, "not you"));
        }
        Ok(())
    }

    async fn on_message(&self, message: String, ctx: HubContext<Self>) {
        let (verb, rest) = message.split_once(' ').unwrap_or((&message, ""));
        let two = || rest.split_once(' ').unwrap();
        match verb {
            "all" => ctx.broadcast(rest.to_owned()).await,
            "join" => ctx.add_to_group(rest).await,
            "group" => ctx.broadcast_group(two().0, two().1.to_owned()).await,
            "late" => {
                tokio::time::sleep(SECOND).await;
                ctx.unicast(rest.to_owned()).await;
            }
            "end" => ctx.disconnect(CloseCode(two().0.parse().unwrap()), two().1.to_owned()).await,
            "expire" => {
                let seconds = Duration::from_secs(rest.parse().unwrap());
                ctx.expires_at(SystemTime::now() + seconds).await;
            }
            _ => ctx.unicast(message).await,
        }
    }

    async fn on_dropped(&self, _: HubContext<Self>, dropped: Dropped) {
        let _ = self.0.send(Seen::Dropped(dropped.messages));
    }

    async fn on_expired(&self, ctx: HubContext<Self>) -> ControlFlow<()> {
        ctx.unicast("expired".to_owned()).await;
        ControlFlow::Break(())
    }

    async fn on_disconnected(&self, _: HubContext<Self>, reason: CloseReason) {
        let _ = self.0.send(Seen::Ended(reason));
    }

    async fn on_presence(clients: &shardcast::Clients<String>, change: PresenceChange) {
        if change.group.is_none() {
            let verb = if change.kind == PresenceKind::Joined { "joined" } else { "left" };
            let _ = clients.to_all().publish(&format!("{} {verb}", change.user)).await;
        }
    }
}

async fn over_sockets(config: WsHubConfig) -> (TestHub<Recorder>, UnboundedReceiver<Seen>) {
    let (recorder, seen) = Recorder::new();
    (TestHub::start(config, move || recorder.clone()).await, seen)
}

async fn in_memory(config: WsHubConfig) -> (TestHub<Recorder>, UnboundedReceiver<Seen>) {
    let (recorder, seen) = Recorder::new();
    (TestHub::in_memory(config, move || recorder.clone()).await, seen)
}

/// The text of the panic of an assertion, which must fail.
async fn failure(assertion: impl Future<Output = ()>) -> String {
    let panic = AssertUnwindSafe(assertion).catch_unwind().await.expect_err("the assertion must fail");
    *panic.downcast::<String>().unwrap()
}

// ---- servers

fn app(engine: &Engine) -> Router {
    async fn connect(
        ws: WebSocketUpgrade,
        token: Token,
        ConnectInfo(address): ConnectInfo<SocketAddr>,
        State(hub): State<Hub<Recorder>>,
    ) -> Result<Response, Denied> {
        if token.as_str() != "right" {
            return Err(Denied::unauthorized("the token is wrong"));
        }
        let ws = ws.protocols(["chat.v2", "chat.v1"]);
        Ok(ws.serve(&hub, Recorder::new().0).user(address.ip().to_string()).into_response())
    }
    let hub = engine.hub::<Recorder>(WsHubConfig::default()).unwrap();
    let count = async |State(hub): State<Hub<Recorder>>| hub.len().to_string();
    Router::new().route("/ws", any(connect)).route("/count", get(count)).with_state(hub)
}

async fn uses_the_whole_application(server: TestServer) {
    let refused = server.client("/ws").try_connect().await.unwrap_err();
    assert_eq!(refused.status, 401);
    let refused = server.client("/ws").query("token", "wrong & long").try_connect().await.unwrap_err();
    assert_eq!(
        (refused.status.as_u16(), refused.body.contains("the token is wrong")),
        (401, true),
        "{refused}"
    );

    let by_query = server.client("/ws").query("token", "right");
    let mut ada = by_query.protocol("chat.v1").protocol("chat.v0").connect().await;
    assert_eq!(ada.protocol().unwrap(), "chat.v1");
    let address = IpAddr::from(Ipv4Addr::new(127, 0, 0, 9));
    let by_header = server.client("/ws").header("authorization", "Bearer right");
    let mut bob = by_header.from_address(address).connect().await;
    ada.expect_where(|text| *text == RawMessage::from("127.0.0.9 joined")).await;
    bob.send("all hello");
    ada.expect("hello").await;
    bob.expect_where(|text| *text == RawMessage::from("hello")).await;

    server.until("both are connected", || server.engine().connection_count() == 2).await;
    let response = server.request(http::Request::get("/count").body("".into()).unwrap()).await;
    assert_eq!((response.status().as_u16(), &response.body()[..]), (200, &b"2"[..]));
}

#[tokio::test]
async fn routes_extractors_and_authentication_are_the_applications_own_over_sockets() {
    let server = TestServer::start(app).await;
    assert!(server.url("/ws").starts_with("ws://127.0.0.1:"));
    uses_the_whole_application(server).await;
}

#[tokio::test]
async fn routes_extractors_and_authentication_are_the_applications_own_in_memory() {
    let engine = EngineConfig { shards: Some(2), ..EngineConfig::default() };
    let server = TestServer::builder().engine(engine).in_memory(app).await;
    assert_eq!(server.address(), None);
    uses_the_whole_application(server).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_router_with_an_engine_of_its_own_is_served_on_any_runtime() {
    let engine =
        Engine::start(EngineConfig { shards: Some(2), pin: false, ..EngineConfig::default() }).unwrap();
    let server = TestServer::start_router(app(&engine)).await;
    let mut client = server.client("/ws").query("token", "right").connect().await;
    client.send("hello");
    client.expect_where(|text| *text == RawMessage::from("hello")).await;
}

#[tokio::test]
async fn a_connection_limit_refuses_the_upgrade_with_its_status() {
    let engine = EngineConfig { shards: Some(1), max_connections: 1, ..EngineConfig::default() };
    let (recorder, _seen) = Recorder::new();
    let server = TestServer::builder().engine(engine);
    let hub =
        TestHub::<Recorder>::in_memory_on(server, WsHubConfig::default(), move || recorder.clone()).await;
    let _first = hub.connect().await;
    let refused = hub.client().try_connect().await.unwrap_err();
    assert_eq!(refused.status, 503);
    assert!(refused.headers.contains_key("retry-after"));
    let text = failure(async { drop(hub.connect().await) }).await;
    assert!(text.contains("tests/testing.rs") && text.contains("503"), "{text}");
}

// ---- time

/// Takes less of the system's time than passes in the test.
#[tokio::test]
async fn an_hour_of_heartbeats_passes_in_a_moment_and_only_when_the_test_says_so() {
    let (hub, mut seen) = in_memory(WsHubConfig::default()).await;
    let mut answers = hub.connect().await;
    let mut silent = hub.connect().await;
    silent.stall().await;
    let started = Instant::now();
    let pinged = hub.hub().metrics().await.unwrap();
    for _ in 0..50 {
        tokio::task::yield_now().await;
        hub.settle().await;
    }
    assert_eq!(hub.hub().len(), 2, "no time has passed");
    assert_eq!(pinged.connections, 2);

    hub.advance(9 * SECOND).await;
    assert_eq!(seen.try_recv().ok(), None, "no ping can have waited for 10 s");
    hub.advance(17 * SECOND).await;
    assert_eq!(seen.try_recv(), Ok(Seen::Ended(CloseReason::PongTimeout)));
    hub.advance(3600 * SECOND).await;
    assert_eq!(hub.hub().len(), 1, "who answers stays");
    answers.send("here");
    answers.expect("here").await;
    assert!(started.elapsed() < 600 * SECOND, "{:?}", started.elapsed());
}

#[tokio::test]
async fn time_in_memory_is_that_of_timers_in_the_application_too() {
    let (hub, _seen) = in_memory(WsHubConfig::default()).await;
    let mut client = hub.connect().await;
    client.send("late hello");
    client.expect_nothing().await;
    hub.advance(SECOND - Duration::from_millis(2)).await;
    client.expect_nothing().await;
    hub.advance(Duration::from_millis(4)).await;
    client.expect("hello").await;

    // A task that drifts if a timer fires late.
    let hub_of_task = hub.hub().clone();
    let ticker = tokio::spawn(async move {
        for tick in 0.. {
            tokio::time::sleep(SECOND).await;
            hub_of_task.to_all().publish(&tick.to_string()).await.unwrap();
        }
    });
    hub.advance(10 * SECOND + Duration::from_millis(15)).await;
    for tick in 0..10 {
        client.expect(tick.to_string()).await;
    }
    client.expect_nothing().await;
    ticker.abort();
}

#[tokio::test]
async fn expiry_rates_of_upgrades_and_presence_obey_the_tests_time() {
    let rate = Rate::new(1, 60 * SECOND);
    let engine =
        EngineConfig { shards: Some(1), max_upgrades_per_address: Some(rate), ..EngineConfig::default() };
    let (recorder, _seen) = Recorder::new();
    let server = TestServer::builder().engine(engine);
    let hub =
        TestHub::<Recorder>::in_memory_on(server, WsHubConfig::default(), move || recorder.clone()).await;
    let mut watcher = hub.connect().await;
    assert_eq!(hub.client().try_connect().await.unwrap_err().status, 429);
    hub.advance(60 * SECOND).await;
    let mut ada = hub.connect_as("ada").await;
    watcher.expect("ada joined").await;

    hub.advance(3600 * SECOND).await;
    ada.send("expire 120");
    hub.advance(118 * SECOND).await;
    assert_eq!(hub.hub().user_len("ada"), 1);
    hub.advance(4 * SECOND).await;
    assert_eq!(ada.expect_closed(CloseCode::POLICY_VIOLATION).await, "expired");
    watcher.expect_nothing().await;
    hub.advance(5 * SECOND).await;
    watcher.expect("ada left").await;
}

#[tokio::test]
async fn a_shutdown_in_memory_takes_its_time_and_says_how_it_went() {
    let (hub, mut seen) = in_memory(WsHubConfig::default()).await;
    hub.advance(3600 * SECOND).await;
    let mut client = hub.connect().await;
    let report = hub.shutdown(10 * SECOND).await;
    assert_eq!((report.flushed, report.cut_off), (1, 0));
    assert_eq!(client.closed().await.code, Some(CloseCode::GOING_AWAY));
    assert!(matches!(seen.try_recv(), Ok(Seen::Ended(CloseReason::Shutdown { .. }))));
    assert_eq!(hub.client().try_connect().await.unwrap_err().status, 503);
}

#[tokio::test]
async fn methods_on_the_runtime_and_threads_of_the_application_are_waited_for() {
    struct Slow;
    impl WsHub for Slow {
        type Codec = RawCodec;
        type InMessage = String;
        type OutMessage = String;
        const RUN_ON: RunOn = RunOn::Runtime;

        async fn on_message(&self, message: String, ctx: HubContext<Self>) {
            let computed = tokio::task::spawn_blocking(move || format!("computed {message}")).await;
            ctx.unicast(computed.unwrap()).await;
        }
    }
    let hub = TestHub::<Slow>::in_memory(WsHubConfig::default(), || Slow).await;
    let mut client = hub.connect().await;
    client.send("1");
    client.expect("computed 1").await;

    // The test itself may await the hub, and a thread may publish.
    let receipt = hub.hub().to_all().deliver(&"from the test".to_owned()).await.unwrap();
    assert_eq!(receipt.accepted(), 1);
    client.expect("from the test").await;
    let handle = hub.hub().clone();
    let thread = std::thread::spawn(move || handle.to_all().try_publish(&"from a thread".to_owned()).is_ok());
    client.expect("from a thread").await;
    assert!(thread.join().unwrap());
}

#[tokio::test]
async fn a_timer_that_the_test_awaits_itself_ends_too() {
    let (_hub, _seen) = in_memory(WsHubConfig::default()).await;
    tokio::time::sleep(3600 * SECOND).await;
}

// ---- clients that misbehave

/// A policy that drops what a client does not take within half a second.
fn drops() -> WsHubConfig {
    WsHubConfig {
        policy: BroadcastPolicy::DropMessage { timeout: Duration::from_millis(500) },
        outbox_frames: 4,
        ..WsHubConfig::default()
    }
}

async fn fill(hub: &Hub<Recorder>, messages: usize) {
    for number in 0..messages {
        hub.to_all().publish(&format!("{number:.<1000}")).await.unwrap();
    }
}

#[tokio::test]
async fn a_stalled_client_makes_the_policy_drop_and_gets_the_rest_when_it_resumes() {
    let (hub, mut seen) = in_memory(drops()).await;
    let mut slow = hub.connect().await;
    let mut quick = hub.connect().await;
    slow.stall().await;
    for _ in 0..10 {
        fill(hub.hub(), 10).await;
        hub.settle().await;
    }
    hub.advance(SECOND).await;
    assert_eq!(quick.take_received().len(), 100, "it is not delayed");
    let mut dropped = 0;
    while let Ok(event) = seen.try_recv() {
        match event {
            Seen::Dropped(messages) => dropped += messages,
            Seen::Ended(reason) => panic!("{reason}"),
        }
    }
    assert!((1..100).contains(&dropped), "small buffers are full soon: {dropped}");
    assert_eq!(slow.received(), [], "it reads nothing");
    slow.resume().await;
    hub.settle().await;
    assert_eq!(slow.take_received().len() as u64 + dropped, 100);
}

#[tokio::test]
async fn a_stalled_client_makes_the_policy_drop_over_sockets() {
    let (hub, mut seen) = over_sockets(drops()).await;
    let mut slow = hub.connect().await;
    hub.until("it is connected", || hub.hub().len() == 1).await;
    slow.send("ready");
    slow.expect("ready").await;
    slow.stall().await;
    let dropped = tokio::spawn(async move { seen.recv().await });
    while !dropped.is_finished() {
        fill(hub.hub(), 10).await;
        tokio::task::yield_now().await;
    }
    assert!(matches!(dropped.await.unwrap(), Some(Seen::Dropped(1..))));
    assert_eq!(slow.received().len(), 1, "it reads nothing");
    slow.resume().await;
    slow.send("still here");
    slow.expect_where(|text| text == "still here").await;
}

#[tokio::test]
async fn a_throttled_client_reads_so_many_bytes_in_a_second() {
    let config = WsHubConfig { stall_timeout: None, heartbeat_interval: None, ..WsHubConfig::default() };
    let (hub, _seen) = in_memory(config).await;
    let mut slow = hub.connect().await;
    slow.throttle(10_040).await; // ten messages with their headers
    fill(hub.hub(), 100).await;
    hub.advance(2 * SECOND).await;
    let received = slow.take_received().len();
    assert!((18..=21).contains(&received), "{received}");
    hub.advance(5 * SECOND).await;
    let received = received + slow.take_received().len();
    assert!((67..=71).contains(&received), "{received}");
    slow.throttle(0).await;
    hub.settle().await;
    assert_eq!(received + slow.take_received().len(), 100);
}

#[tokio::test]
async fn a_client_that_vanishes_is_noticed_by_the_heartbeat() {
    let (hub, mut seen) = in_memory(WsHubConfig::default()).await;
    let mut client = hub.connect().await;
    client.vanish().await;
    client.send("not sent");
    hub.advance(9 * SECOND).await;
    assert_eq!(seen.try_recv().ok(), None);
    hub.advance(17 * SECOND).await;
    assert_eq!(seen.try_recv(), Ok(Seen::Ended(CloseReason::PongTimeout)));
    assert_eq!(client.received(), []);
}

#[tokio::test]
async fn a_client_that_vanishes_over_sockets_is_noticed_too() {
    let config = WsHubConfig {
        heartbeat_interval: Some(Duration::from_millis(50)),
        pong_timeout: Duration::from_millis(200),
        ..WsHubConfig::default()
    };
    let (hub, mut seen) = over_sockets(config).await;
    let mut client = hub.connect().await;
    client.vanish().await;
    assert_eq!(seen.recv().await, Some(Seen::Ended(CloseReason::PongTimeout)));
}

#[tokio::test]
async fn a_reset_is_a_transport_error_over_sockets_and_an_end_in_memory() {
    let (hub, mut seen) = over_sockets(WsHubConfig::default()).await;
    let mut client = hub.connect().await;
    client.send("ready");
    client.expect("ready").await;
    client.reset().await;
    let reset = CloseReason::Transport(std::io::ErrorKind::ConnectionReset);
    assert_eq!(seen.recv().await, Some(Seen::Ended(reset)));
    assert_eq!(client.closed().await.code, None);

    let (hub, mut seen) = in_memory(WsHubConfig::default()).await;
    let mut client = hub.connect().await;
    client.reset().await;
    hub.settle().await;
    assert_eq!(seen.try_recv(), Ok(Seen::Ended(CloseReason::Disconnected)));
}

#[tokio::test]
async fn a_dropped_client_ends_without_a_close_frame_and_a_closed_one_with_its_own() {
    let (hub, mut seen) = in_memory(WsHubConfig::default()).await;
    drop(hub.connect().await);
    hub.settle().await;
    assert_eq!(seen.try_recv(), Ok(Seen::Ended(CloseReason::Disconnected)));

    let mut client = hub.connect().await;
    client.close(CloseCode(4001), "bye");
    assert_eq!(client.closed().await.code, Some(CloseCode(4001)));
    let reason = CloseReason::Peer { code: Some(CloseCode(4001)), text: "bye".into() };
    hub.settle().await;
    assert_eq!(seen.try_recv(), Ok(Seen::Ended(reason)));

    let mut client = hub.connect().await;
    client.send("all last words");
    client.send("end 4002 enough");
    let closed = client.closed().await;
    assert_eq!((closed.code, &*closed.reason), (Some(CloseCode(4002)), "enough"));
    client.expect("last words").await;
    let mut refused = hub.connect_as("mallory").await;
    assert_eq!(refused.expect_closed(CloseCode::POLICY_VIOLATION).await, "not you");
}

// ---- assertions

#[tokio::test]
async fn a_failed_assertion_says_where_it_stands_and_what_has_arrived() {
    for is_in_memory in [true, false] {
        let (recorder, _seen) = Recorder::new();
        let server = TestServer::builder().timeout(Duration::from_millis(300));
        let config = WsHubConfig::default();
        let hub: TestHub<Recorder> = match is_in_memory {
            true => TestHub::in_memory_on(server, config, move || recorder.clone()).await,
            false => TestHub::start_on(server, config, move || recorder.clone()).await,
        };
        let mut client = hub.connect().await;
        for text in ["one", "two", "three"] {
            client.send(text);
        }
        client.expect("one").await;

        let (text, line) = (failure(client.expect("2")).await, line!());
        assert!(text.contains(&format!("tests/testing.rs:{line}")), "{text}");
        assert!(text.contains(r#"the next message must be "2", and is "two""#), "{text}");
        assert!(text.contains(r#"1. text "one" (asserted before)"#), "{text}");
        assert!(text.contains(r#"2. text "two" (not yet asserted)"#), "{text}");

        let (text, line) =
            (failure(async { drop(client.expect_where(|text| text == "four").await) }).await, line!());
        assert!(text.contains(&format!("tests/testing.rs:{line}")), "{text}");
        assert!(text.contains("for which the condition holds"), "{text}");
        assert!(text.contains(r#"3. text "three" (not yet asserted)"#), "{text}");
        assert!(text.contains("its connection is open"), "{text}");

        let text = failure(client.expect("four")).await;
        assert!(text.contains(r#""four" must arrive within 300ms"#), "{text}");
        let text = failure(async { drop(client.closed().await) }).await;
        assert!(text.contains("the connection must end"), "{text}");
        client.send("five");
        hub.until("five arrives", || client.received().len() == 4).await;
        let text = failure(client.expect_nothing()).await;
        assert!(text.contains(r#"4. text "five" (not yet asserted)"#), "{text}");

        let (text, line) = (failure(hub.until("a third client", || hub.hub().len() == 3)).await, line!());
        assert!(text.contains(&format!("tests/testing.rs:{line}")), "{text}");
        assert!(
            text.contains("a third client") && text.contains("client 1 (/) has received 4 messages"),
            "{text}"
        );

        client.send("end 4000 enough");
        let text = failure(async { drop(client.expect_closed(CloseCode::NORMAL).await) }).await;
        assert!(text.contains(r#"closed with 4000: "enough""#), "{text}");
        let text = failure(async {
            drop(client.recv().await);
            drop(client.recv().await);
        });
        assert!(text.await.contains("must arrive before the end"));
    }
}

#[tokio::test]
async fn nothing_is_expected_of_a_client_that_cannot_receive() {
    let (hub, _seen) = in_memory(WsHubConfig::default()).await;
    let mut client = hub.connect().await;
    client.stall().await;
    assert!(failure(client.expect_nothing()).await.contains("told to stall"));
    client.resume().await;
    client.expect_nothing().await;
}

/// Everything that was published before has arrived when `expect_nothing` looks.
#[tokio::test]
async fn expecting_nothing_is_no_race_over_sockets() {
    let (hub, _seen) = over_sockets(WsHubConfig::default()).await;
    let mut client = hub.connect().await;
    client.send("ready");
    client.expect("ready").await;
    for _ in 0..20 {
        client.expect_nothing().await;
        hub.hub().to_all().publish(&"something".to_owned()).await.unwrap();
        assert!(failure(client.expect_nothing()).await.contains("something"));
        client.expect("something").await;
    }
}

#[tokio::test]
async fn what_only_one_form_can_do_says_so() {
    let (hub, _seen) = over_sockets(WsHubConfig::default()).await;
    assert!(failure(hub.advance(SECOND)).await.contains("start it with `in_memory`"));
    assert!(failure(hub.settle()).await.contains("start it with `in_memory`"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 1)]
#[should_panic(expected = "use `#[tokio::test]` without a flavor")]
async fn in_memory_needs_the_tests_own_thread() {
    let _ = in_memory(WsHubConfig::default()).await;
}

// ---- types

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Say {
    text: String,
    to: u32,
}

struct Typed;

impl WsHub for Typed {
    type Codec = JsonCodec;
    type InMessage = Say;
    type OutMessage = Say;

    async fn on_message(&self, say: Say, ctx: HubContext<Self>) {
        ctx.clients().join(ctx.id(), "all").await.unwrap();
        ctx.broadcast_group("all", Say { to: say.to + 1, ..say }).await;
    }
}

#[tokio::test]
async fn a_client_has_the_hubs_types_or_json_or_bytes() {
    let hub = TestHub::<Typed>::in_memory(WsHubConfig::default(), || Typed).await;
    let mut client = hub.connect().await;
    let say = |to| Say { text: "hello".to_owned(), to };
    client.send(say(1));
    client.expect(say(2)).await;
    client.send(say(2));
    assert_eq!(client.recv().await, say(3));
    client.send_json(&json!({ "to": 3, "text": "hello" }));
    client.expect_json(&json!({ "text": "hello", "to": 4 })).await;
    client.send_text(r#"{"text":"hello","to":4}"#);
    client.expect_text(r#"{"text":"hello","to":5}"#).await;
    client.send(say(5));
    assert_eq!(client.recv_json::<Say>().await, say(6));
    client.send_binary(serde_json::to_vec(&say(6)).unwrap());
    assert_eq!(client.recv_raw().await, RawMessage::from(r#"{"text":"hello","to":7}"#));
    client.send_text("no JSON");
    client.expect_closed(CloseCode::INVALID_PAYLOAD).await;

    let server = hub.server();
    let mut untyped = server.connect("/").await;
    untyped.send(r#"{"text":"x","to":1}"#);
    untyped.expect(r#"{"text":"x","to":2}"#).await;
    let mut typed = untyped.typed::<Typed>();
    typed.send(say(7));
    typed.expect(say(8)).await;
    typed.send_json(&json!({ "text": "", "to": 9 }));
    let mut other = typed.typed_as::<String, u32, JsonCodec>();
    let text = failure(async {
        let _: u32 = other.recv().await;
    })
    .await;
    assert!(text.contains("JsonCodec") && text.contains(r#"3. text "{\"text\":\"\",\"to\":10}""#), "{text}");
}

// ---- contexts

#[tokio::test]
async fn one_method_of_a_hub_is_called_with_a_context() {
    let (recorder, _seen) = Recorder::new();
    let mut test = TestContext::<Recorder>::new().await;
    let mut member = test.member_of(&["garden", "cellar"]).await;
    let mut stranger = test.member_of(&[]).await;

    recorder.on_message("join garden".to_owned(), test.context()).await;
    recorder.on_message("group garden hello".to_owned(), test.context()).await;
    test.caller.expect("hello").await;
    member.client.expect("hello").await;
    stranger.client.expect_nothing().await;
    assert_eq!(test.groups().await, ["garden"]);
    recorder.on_message("all of you".to_owned(), test.context()).await;
    stranger.client.expect("of you").await;
    test.hub().to(member.id).publish(&"for one".to_owned()).await.unwrap();
    member.client.expect("of you").await;
    member.client.expect("for one").await;

    recorder.on_message("end 4003 enough".to_owned(), test.context()).await;
    test.caller.expect("of you").await;
    assert_eq!(test.caller.expect_closed(CloseCode(4003)).await, "enough");
    assert_eq!(test.groups().await, [""; 0]);
}

#[tokio::test]
async fn a_context_has_a_user_and_metadata() {
    let (recorder, _seen) = Recorder::new();
    let test = TestContext::<Recorder>::builder().user("mallory").build().await;
    let refused = recorder.on_connected(test.context()).await.unwrap_err();
    assert_eq!(refused.reason(), "not you");

    let metadata = json!({ "picture": "ada.png" });
    let mut test = TestContext::<Recorder>::builder().user_with("ada", &metadata).build().await;
    assert_eq!(test.context().user().map(Arc::as_ref), Some("ada"));
    let mut bob = test.user_in("bob", &["garden"]).await;
    test.caller.expect("ada joined").await;
    test.caller.expect("bob joined").await;
    bob.client.expect("bob joined").await;
    recorder.on_message("join garden".to_owned(), test.context()).await;
    let mut present = test.hub().presence("garden").await.unwrap();
    present.sort_by(|a, b| a.user.cmp(&b.user));
    assert_eq!(present.iter().map(|present| &*present.user).collect::<Vec<_>>(), ["ada", "bob"]);
}

#[tokio::test]
async fn a_hub_has_users_with_metadata() {
    let (hub, _seen) = in_memory(WsHubConfig::default()).await;
    let _ada = hub.connect_with("ada", &json!({ "picture": "ä.png" })).await;
    let _bob = hub.connect_as("bób").await;
    let mut users: Vec<_> = hub.hub().users().iter().map(|(user, _)| user.to_string()).collect();
    users.sort();
    assert_eq!(users, ["ada", "bób"]);
    let present = hub.hub().clients().presence_of_all().await.unwrap();
    let ada = present.iter().find(|present| &*present.user == "ada").unwrap();
    let metadata: serde_json::Value = ada.metadata.as_ref().unwrap().get().unwrap();
    assert_eq!(metadata, json!({ "picture": "ä.png" }));
}

#[tokio::test]
async fn a_server_that_is_dropped_ends_its_clients_and_leaves_no_wait_without_a_bound() {
    let (hub, _seen) = in_memory(WsHubConfig::default()).await;
    let (mut client, mut silent) = (hub.connect().await, hub.connect().await);
    silent.stall().await;
    drop(hub);
    assert_eq!(client.closed().await.code, None);
    silent.timeout(Duration::from_millis(50));
    assert!(failure(async { drop(silent.closed().await) }).await.contains("the connection must end"));
}

#[test]
fn a_server_and_its_clients_may_be_moved_to_other_threads() {
    fn is_sent<T: Send + Sync>() {}
    is_sent::<TestServer>();
    is_sent::<TestHub<Recorder>>();
    is_sent::<shardcast::testing::TestClient>();
}
