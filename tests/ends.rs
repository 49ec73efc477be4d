//! How connections end over real sockets: each reason, what the peer is told, whether it may come back; and who is let in.
//!
//! Ends by the engine's shutdown stand in `shutdown.rs`, refused handshakes in `upgrade.rs`, a full house in `hub.rs`.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::net::Ipv4Addr;
use std::time::{Duration, Instant};

use shardcast::{
    BroadcastPolicy, CloseCode, CloseReason, ConnectionId, Engine, EngineConfig, FrameError, PublishError,
    Shutdown, ShutdownReport, WsHubConfig,
};
use testkit::frames::{BINARY, CLOSE, FIN, PING, PONG, TEXT, client_frame, client_text, close_code};
use testkit::time::{DAY, ms};
use testkit_hub::recording_hub::numbered;
use testkit_hub::{
    Client, HubFixture, Server, Transport, command_app, connect, eventually, on_each_transport,
    within_timeout,
};
use tokio::io::AsyncWriteExt as _;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite;

// ---- each reason

/// What brings a connection to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    SaysGoodbye,
    LeavesThePage,
    SaysNoCode,
    Vanishes,
    Resets,
    SendsNonsense,
    SendsTheWrongKind,
    FallsSilent,
    SaysNothing,
    GrowsOld,
    LetsTooMuchWait,
    LetsTooMuchBeDropped,
    AnswersLate,
    KeepsTooMuch,
    Floods,
    IsSentAway,
    IsAskedToReturn,
    MakesTheHandlerPanic,
    SeesTheEngineStop,
}

fn application(code: u16) -> CloseReason {
    CloseReason::Application { code: CloseCode(code), text: "so it is".into() }
}

fn peer(code: Option<u16>) -> CloseReason {
    CloseReason::Peer { code: code.map(CloseCode), text: "".into() }
}

/// For each way: the reason that the hub is told, the code that the peer reads (1005 is a Close without one), and whether
/// the peer is invited to return.
fn ends() -> Vec<(Way, CloseReason, Option<u16>, bool)> {
    use CloseReason::{
        BacklogLimit, ControlFlood, Disconnected, HandlerPanicked, HighRtt, IdleTimeout, MaxDuration,
        PongTimeout, Protocol, SlowConsumer, TooManyDrops, Transport, WrongKind,
    };
    vec![
        (Way::SaysGoodbye, peer(Some(1000)), Some(1000), false),
        (Way::LeavesThePage, peer(Some(1001)), Some(1001), true),
        (Way::SaysNoCode, peer(None), Some(1005), true),
        (Way::Vanishes, Disconnected, None, true),
        (Way::Resets, Transport(std::io::ErrorKind::ConnectionReset), None, true),
        (Way::SendsNonsense, Protocol(FrameError::Unmasked), Some(1002), false),
        (Way::SendsTheWrongKind, WrongKind, Some(1003), false),
        (Way::FallsSilent, PongTimeout, Some(1011), true),
        (Way::SaysNothing, IdleTimeout, Some(1001), true),
        (Way::GrowsOld, MaxDuration, Some(1012), true),
        (Way::LetsTooMuchWait, SlowConsumer, Some(1013), true),
        (Way::LetsTooMuchBeDropped, TooManyDrops, Some(1013), true),
        (Way::AnswersLate, HighRtt, Some(1013), true),
        (Way::KeepsTooMuch, BacklogLimit, Some(1013), true),
        (Way::Floods, ControlFlood, Some(1008), false),
        (Way::IsSentAway, application(4000), Some(4000), false),
        (Way::IsAskedToReturn, application(1013), Some(1013), true),
        (Way::MakesTheHandlerPanic, HandlerPanicked, Some(1011), true),
        (Way::SeesTheEngineStop, CloseReason::Shutdown { code: CloseCode(1012) }, Some(1012), true),
    ]
}

fn config(way: Way) -> WsHubConfig {
    let calm = WsHubConfig { heartbeat_interval: None, ..WsHubConfig::default() };
    let beating = WsHubConfig { heartbeat_interval: Some(ms(50)), pong_timeout: DAY, ..calm.clone() };
    let narrow = WsHubConfig { outbox_frames: 4, overflow_frames: 4, ..calm.clone() };
    let (timeout, max_drops) = (Duration::ZERO, 3);
    match way {
        Way::FallsSilent => WsHubConfig { pong_timeout: ms(50), ..beating },
        Way::SaysNothing => WsHubConfig { idle_timeout: Some(ms(100)), ..calm },
        Way::GrowsOld => WsHubConfig { max_connection_duration: Some(ms(100)), ..calm },
        Way::LetsTooMuchWait => narrow,
        Way::LetsTooMuchBeDropped => {
            WsHubConfig { policy: BroadcastPolicy::DropConnection { timeout, max_drops }, ..narrow }
        }
        Way::AnswersLate => {
            let policy = BroadcastPolicy::DropOnHighRtt { max_rtt: ms(1), rtt_samples: 1 };
            WsHubConfig { policy, ..beating }
        }
        Way::Floods => WsHubConfig { control_frames_per_second: 1, ..calm },
        _ => calm,
    }
}

on_each_transport!(workers = 2, each_way_to_end_has_its_reason_its_close_code_and_its_word_on_coming_back);
async fn each_way_to_end_has_its_reason_its_close_code_and_its_word_on_coming_back(transport: Transport) {
    for (way, expected, expected_code, should_reconnect) in ends() {
        let engine = EngineConfig { shards: Some(1), backlog_bytes_max: 1 << 20, ..EngineConfig::default() };
        let mut fixture = HubFixture::open_on(transport, engine, config(way)).await;
        let (mut raw, id) = fixture.connect_raw().await;
        let mut shutdown: Option<JoinHandle<ShutdownReport>> = None;
        match way {
            Way::SaysGoodbye => raw.send(&client_frame(FIN | CLOSE, &1000u16.to_be_bytes())).await,
            Way::LeavesThePage => raw.send(&client_frame(FIN | CLOSE, &1001u16.to_be_bytes())).await,
            Way::SaysNoCode => raw.send(&client_frame(FIN | CLOSE, b"")).await,
            Way::SendsNonsense => raw.send(b"\x81\x01x").await,
            Way::SendsTheWrongKind => raw.send(&client_frame(FIN | BINARY, b"x")).await,
            Way::Floods => raw.send(&client_frame(FIN | PING, b"").repeat(4)).await,
            Way::MakesTheHandlerPanic => raw.send(&client_text("panic as told")).await,
            Way::FallsSilent | Way::SaysNothing | Way::GrowsOld => {}
            Way::LetsTooMuchWait | Way::LetsTooMuchBeDropped | Way::KeepsTooMuch => {
                let mut number = 0;
                while !fixture.hub.is_empty() {
                    assert!(number < 10_000, "{way:?}: nobody ends it");
                    let bytes = if way == Way::KeepsTooMuch { 50_000 } else { 2000 };
                    fixture.hub.to_all().try_publish(&numbered(number, bytes)).unwrap();
                    within_timeout(fixture.hub.connection_metrics(id)).await.unwrap();
                    number += 1;
                }
            }
            Way::AnswersLate => {
                let nonce = raw.is_pinged().await;
                tokio::time::sleep(ms(5)).await; // this has to pass
                raw.send(&client_frame(FIN | PONG, &nonce)).await;
            }
            Way::IsSentAway => fixture.hub.disconnect(id, CloseCode(4000), "so it is").await.unwrap(),
            Way::IsAskedToReturn => fixture.hub.disconnect(id, CloseCode(1013), "so it is").await.unwrap(),
            Way::SeesTheEngineStop => {
                let engine = fixture.engine.clone();
                let end = Shutdown { code: CloseCode(1012), ..Shutdown::within(ms(1000)) };
                shutdown = Some(tokio::spawn(async move { engine.shutdown_with(end).await.unwrap() }));
            }
            Way::Vanishes | Way::Resets => {}
        }
        let code = match way {
            Way::Vanishes => {
                drop(raw);
                None
            }
            Way::Resets => {
                raw.reset();
                None
            }
            _ => {
                let code = raw.rest().await.1;
                drop(raw); // else it would be waited for
                code
            }
        };
        assert_eq!(code, expected_code, "{way:?}");
        let (ended, reason) = fixture.ended().await;
        assert_eq!((ended, &reason), (id, &expected), "{way:?}");
        assert_eq!(reason.should_reconnect(), should_reconnect, "{way:?}");
        eventually((0, 0, 0), || {
            (fixture.hub.len(), fixture.hub.group_count(), fixture.engine.connection_count())
        })
        .await;
        assert_eq!(fixture.others_ended(), [], "{way:?}: once");
        if let Some(shutdown) = shutdown {
            within_timeout(shutdown).await.unwrap();
        }
    }
}

on_each_transport!(pongs_are_signs_of_life_for_the_idle_timeout);
async fn pongs_are_signs_of_life_for_the_idle_timeout(transport: Transport) {
    let (idle, longer) = (ms(1500), ms(2000));
    let config = WsHubConfig { heartbeat_interval: None, idle_timeout: Some(idle), ..WsHubConfig::default() };
    let mut fixture = HubFixture::open(transport, 1, config).await;
    let (mut raw, id) = fixture.connect_raw().await;
    let began = Instant::now();
    while began.elapsed() < longer {
        raw.send(&client_frame(FIN | PONG, b"still here")).await;
        tokio::time::sleep(ms(50)).await;
    }
    assert_eq!((fixture.hub.len(), fixture.others_ended()), (1, vec![]));
    assert_eq!(fixture.ended().await, (id, CloseReason::IdleTimeout));
    assert_eq!(raw.close_code().await, Some(1001));
}

// ---- clients that end while a method is pending, or end only their side

on_each_transport!(a_pending_method_keeps_neither_pong_nor_close_from_its_client);
async fn a_pending_method_keeps_neither_pong_nor_close_from_its_client(transport: Transport) {
    let mut fixture =
        HubFixture::open(transport, 1, WsHubConfig { heartbeat_interval: None, ..WsHubConfig::default() })
            .await;
    let (mut raw, id) = fixture.connect_raw().await;
    raw.send(&[client_text("wait"), client_frame(FIN | PING, b"x")].concat()).await;
    assert_eq!(raw.recv().await, (PONG, b"x".to_vec()));
    raw.send(&[client_text("all I leave"), client_frame(FIN | CLOSE, &1000u16.to_be_bytes())].concat()).await;
    assert_eq!(raw.close_code().await, Some(1000));
    eventually(0, || fixture.hub.len()).await;
    // What it said before is handled, then it is told the end.
    let (mut witness, _) = fixture.connect().await;
    assert_eq!(fixture.others_ended(), []);
    fixture.recorder.permits.add_permits(1);
    witness.recv_texts(&["waited", "I leave"]).await;
    assert_eq!(fixture.ended().await, (id, peer(Some(1000))));
}

on_each_transport!(the_close_of_a_slow_client_is_answered_in_time_whatever_its_backlog);
async fn the_close_of_a_slow_client_is_answered_in_time_whatever_its_backlog(transport: Transport) {
    const MESSAGES: usize = 32;
    const BYTES: usize = 256 << 10;
    let config = WsHubConfig { heartbeat_interval: None, outbox_bytes: 16 << 20, ..WsHubConfig::default() };
    let mut fixture = HubFixture::open(transport, 1, config).await;
    let (mut raw, id) = fixture.connect_raw().await;
    for _ in 0..MESSAGES {
        fixture.hub.to(id).try_publish(&"x".repeat(BYTES)).unwrap();
    }
    raw.send(&client_frame(FIN | CLOSE, &1000u16.to_be_bytes())).await;
    assert_eq!(fixture.ended().await, (id, peer(Some(1000))));
    let mut heard = 0;
    let reading = async {
        loop {
            raw.read_at_most(8 << 10);
            match raw.frame_if_any() {
                Some((TEXT, text)) if text.len() == BYTES => heard += 1,
                Some((CLOSE, payload)) => break close_code(&payload),
                Some(other) => panic!("{other:?}"),
                None => tokio::time::sleep(ms(5)).await,
            }
        }
    };
    assert_eq!(within_timeout(reading).await, Some(1000));
    assert!(heard < MESSAGES, "the rest is not waited for");
}

on_each_transport!(the_answer_arrives_though_the_client_has_ended_its_side);
async fn the_answer_arrives_though_the_client_has_ended_its_side(transport: Transport) {
    let mut fixture = HubFixture::open(transport, 1, WsHubConfig::default()).await;
    for (said, heard) in [("hello", "hello"), ("wait", "waited")] {
        let (mut raw, id) = fixture.connect_raw().await;
        raw.send(&client_text(said)).await;
        within_timeout(raw.stream.shutdown()).await.unwrap();
        fixture.recorder.permits.add_permits(usize::from(said == "wait"));
        assert_eq!(raw.rest().await, (vec![heard.to_owned()], None));
        assert_eq!(fixture.ended().await, (id, CloseReason::Disconnected));
    }
}

// ---- ends by the application

on_each_transport!(a_close_code_that_cannot_be_sent_is_an_error_and_ends_nobody);
async fn a_close_code_that_cannot_be_sent_is_an_error_and_ends_nobody(transport: Transport) {
    let mut fixture = HubFixture::open(transport, 1, WsHubConfig::default()).await;
    let (mut peer, id) = fixture.connect().await;
    for code in [0, 999, 1004, 1005, 1006, 1015, 2999, 5000, 65_535].map(CloseCode) {
        let refused = fixture.hub.disconnect(id, code, "upstream gone").await;
        assert!(matches!(refused, Err(PublishError::InvalidCloseCode(_))), "{code}: {refused:?}");
        let refused = fixture.engine.shutdown_with(Shutdown { code, ..Shutdown::within(ms(1000)) }).await;
        assert!(refused.is_err(), "{code}");
    }
    peer.send_text("me still here").await;
    peer.recv_texts(&["still here"]).await;
    assert_eq!(fixture.others_ended(), []);
}

async fn recv_texts_then_close(peer: Client, texts: &[&str], code: u16, reason: &str) {
    assert_eq!(
        peer.rest().await,
        (texts.iter().map(|text| (*text).to_owned()).collect(), Some((code, reason.to_owned())))
    );
}

on_each_transport!(whoever_is_meant_is_disconnected_with_exactly_code_and_reason_and_nobody_else);
async fn whoever_is_meant_is_disconnected_with_exactly_code_and_reason_and_nobody_else(transport: Transport) {
    let mut fixture = HubFixture::open(transport, 2, WsHubConfig::default()).await;
    let mut peers = Vec::new();
    let mut ids: Vec<ConnectionId> = Vec::new();
    for number in 0..8 {
        let (peer, id) = fixture.connect().await;
        for (group, members) in [("red", 0..3), ("blue", 3..5), ("green", 4..6)] {
            if members.contains(&number) {
                fixture.hub.join(id, group).await.unwrap();
            }
        }
        peers.push(peer);
        ids.push(id);
    }
    let [red, spared, red_too, blue, both, green, other, last] =
        <[Client; 8]>::try_from(peers).unwrap_or_else(|_| unreachable!());
    let mut all_ended = Vec::new();

    // A group but one; what was sent before arrives, what is sent after does not.
    fixture.hub.to_all().publish(&"one".to_owned()).await.unwrap();
    let but_one = [ids[1]];
    fixture.hub.to_group("red").except(&but_one).disconnect(CloseCode(4001), "red is over").await.unwrap();
    fixture.hub.to_all().publish(&"two".to_owned()).await.unwrap();
    for peer in [red, red_too] {
        recv_texts_then_close(peer, &["one"], 4001, "red is over").await;
    }
    all_ended.extend([fixture.ended().await, fixture.ended().await]);
    assert_eq!((fixture.hub.len(), fixture.hub.group_len("red")), (6, 1));

    // Several groups, whose common member ends once.
    fixture.hub.to_groups(&["blue", "green"]).disconnect(CloseCode::NORMAL, "").await.unwrap();
    for peer in [blue, both, green] {
        recv_texts_then_close(peer, &["one", "two"], 1000, "").await;
        all_ended.push(fixture.ended().await);
    }
    assert_eq!((fixture.hub.len(), fixture.hub.group_count()), (3, 1));

    // Everyone but one; then that one alone.
    let but_last = [ids[7]];
    fixture
        .hub
        .to_all()
        .except(&but_last)
        .disconnect(CloseCode::SERVICE_RESTART, "back at six")
        .await
        .unwrap();
    fixture.hub.to_all().publish(&"three".to_owned()).await.unwrap();
    for peer in [spared, other] {
        recv_texts_then_close(peer, &["one", "two"], 1012, "back at six").await;
        all_ended.push(fixture.ended().await);
    }
    assert_eq!(fixture.hub.len(), 1);
    fixture.hub.disconnect(ids[7], CloseCode(3000), "žluťoučký").await.unwrap();
    recv_texts_then_close(last, &["one", "two", "three"], 3000, "žluťoučký").await;
    all_ended.push(fixture.ended().await);

    // Nobody is there: nothing happens, and nothing fails.
    fixture.hub.to_all().disconnect(CloseCode::NORMAL, "nobody").await.unwrap();
    fixture.hub.to_group("red").disconnect(CloseCode::NORMAL, "nobody").await.unwrap();
    let codes = [4001, 1012, 4001, 1000, 1000, 1000, 1012, 3000];
    for (id, code) in ids.iter().zip(codes) {
        let reasons: Vec<_> = all_ended.iter().filter(|(ended, _)| ended == id).collect();
        assert!(
            matches!(&reasons[..], [(_, CloseReason::Application { code: had, .. })] if had.0 == code),
            "{reasons:?}"
        );
    }
    eventually((0, 0, 0), || {
        (fixture.hub.len(), fixture.hub.group_count(), fixture.engine.connection_count())
    })
    .await;
    assert_eq!(fixture.others_ended(), []);
}

// ---- the door

on_each_transport!(an_address_with_all_its_places_taken_gets_503_others_come_in_and_so_does_it_after_a_leave);
async fn an_address_with_all_its_places_taken_gets_503_others_come_in_and_so_does_it_after_a_leave(
    transport: Transport,
) {
    let (here, there) = (Ipv4Addr::new(127, 0, 0, 1), Ipv4Addr::new(127, 0, 0, 2));
    let config = EngineConfig {
        shards: Some(2),
        pin: false,
        max_connections_per_address: Some(2),
        ..EngineConfig::default()
    };
    let engine = Engine::start(config).unwrap();
    let server = Server::start_with_addresses_over(
        transport,
        command_app(engine.hub(WsHubConfig::default()).unwrap()),
    )
    .await;
    let (first, _) = connect(&server.url("/ws")).await;
    let (mut second, _) = connect(&server.url("/ws")).await;
    let refused = async |from| {
        let error = within_timeout(Client::try_connect_from(from, &server)).await.err().unwrap();
        let tungstenite::Error::Http(response) = error else { panic!("{error:?}") };
        assert_eq!(response.status(), 503);
        let retry_after: u64 = response.headers()["retry-after"].to_str().unwrap().parse().unwrap();
        assert!((2..=8).contains(&retry_after), "{retry_after}");
        assert!(
            response.body().as_deref().is_some_and(|body| body.starts_with(b"connection limit reached")),
            "{response:?}"
        );
    };
    refused(here).await;
    refused(here).await;
    let (mut stranger, _) = within_timeout(Client::try_connect_from(there, &server)).await.unwrap();
    stranger.recv_text().await;
    assert_eq!(engine.connection_count(), 3);
    first.leave().await;
    eventually(2, || engine.connection_count()).await;
    let (_third, _) = connect(&server.url("/ws")).await;
    refused(here).await;
    second.send_text("all still here").await;
    second.recv_texts(&["still here"]).await;
    stranger.recv_texts(&["still here"]).await;
}
