//! What an operator reads about slow or misbehaving clients that were ended: few lines, however many clients.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use shardcast_engine::{ConnectionConfig, EngineConfig, FrameError, OverLimit, Rate, RateLimit};
use testkit::{Client, Log, Rig};
use tracing::subscriber::DefaultGuard;

/// What this thread logs at `info` and above, for as long as the guard exists.
struct Listening {
    log: Log,
    _guard: DefaultGuard,
}

impl Listening {
    fn begin() -> Self {
        let log = Log::default();
        let writer = log.clone();
        let subscriber =
            tracing_subscriber::fmt().with_ansi(false).with_writer(move || writer.clone()).finish();
        Self { log, _guard: tracing::subscriber::set_default(subscriber) }
    }

    /// The lines so far that report ended clients.
    fn lines(&self) -> Vec<String> {
        self.log
            .text()
            .lines()
            .filter(|line| line.contains("clients were ended"))
            .map(str::to_owned)
            .collect()
    }
}

/// Ends them for too many control frames.
fn flood(rig: &mut Rig, clients: &mut [Client]) {
    for client in clients.iter_mut() {
        for _ in 0..4 {
            client.peer.send_frame(0x8A, b"unasked");
        }
    }
    rig.settle();
    assert!(clients.iter().all(|client| client.record().ends.len() == 1));
}

fn rig() -> Rig {
    let config = ConnectionConfig { control_frames_per_second: 3, ..ConnectionConfig::default() };
    Rig::with(EngineConfig { shards: Some(1), ..EngineConfig::default() }, config)
}

#[test]
fn many_clients_that_are_ended_at_once_are_one_line_and_later_ones_one_line_in_ten_seconds() {
    let log = Listening::begin();
    let mut rig = rig();
    let mut clients = rig.connect_many(60);
    rig.pass(Duration::from_secs(1));
    flood(&mut rig, &mut clients[..20]);
    rig.pass(Duration::from_millis(100));
    let lines = log.lines();
    assert_eq!(lines.len(), 1, "{lines:#?}");
    assert!(lines[0].contains(" INFO ") && lines[0].contains("flooding=20"), "{lines:#?}");
    // Others, over the next ten seconds, are reported together.
    for some in clients[20..].chunks_mut(10) {
        rig.pass(Duration::from_secs(2));
        flood(&mut rig, some);
        assert_eq!(log.lines().len(), 1);
    }
    rig.pass(Duration::from_secs(3));
    let lines = log.lines();
    assert_eq!(lines.len(), 2, "{lines:#?}");
    assert!(lines[1].contains("flooding=40"), "{lines:#?}");
    rig.pass(Duration::from_secs(60));
    assert_eq!(log.lines().len(), 2, "no client was ended since");
}

#[test]
fn a_client_that_leaves_or_breaks_the_protocol_leaves_no_line() {
    let log = Listening::begin();
    let mut rig = rig();
    let mut clients = rig.connect_many(2);
    clients[0].peer.close(1000);
    clients[1].peer.send_frame(0xF1, b"x");
    rig.settle();
    rig.pass(Duration::from_secs(20));
    let ends = clients[1].record().ends;
    assert!(
        matches!(ends[..], [shardcast_engine::CloseReason::Protocol(FrameError::ReservedBits)]),
        "{ends:?}"
    );
    assert_eq!(log.lines(), <[&str; 0]>::default());
}

#[test]
fn dropped_messages_of_many_clients_are_one_line_in_ten_seconds_with_their_number() {
    let log = Listening::begin();
    let rate_limit = RateLimit {
        messages: Some(Rate::per_second(1)),
        over_limit: OverLimit::Drop,
        ..RateLimit::default()
    };
    let mut rig = Rig::one(ConnectionConfig { rate_limit, ..ConnectionConfig::default() });
    let mut clients = rig.connect_many(20);
    rig.pass(Duration::from_secs(1));
    let mut flood = |rig: &mut Rig| {
        for client in &mut clients {
            (0..6).for_each(|_| client.peer.text("x"));
        }
        rig.settle();
    };
    let lines = || {
        let text = log.log.text();
        let about = text.lines().filter(|line| line.contains("messages were dropped"));
        about.map(str::to_owned).collect::<Vec<_>>()
    };
    flood(&mut rig);
    assert_eq!(lines().len(), 1, "{:#?}", lines());
    assert!(lines()[0].contains(" INFO ") && lines()[0].contains("dropped=100"), "{:#?}", lines());
    for _ in 0..3 {
        rig.pass(Duration::from_secs(2));
        flood(&mut rig);
    }
    assert_eq!(lines().len(), 1);
    rig.pass(Duration::from_secs(5));
    assert!(lines().len() == 2 && lines()[1].contains("dropped=300"), "{:#?}", lines());
}
