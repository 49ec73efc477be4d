//! The client that comes back: what it waits for, what it queues meanwhile, and what it says about it.
//!
//! Where the network does not matter, the connection is in memory and time is paused, so that delays of hours are exact
//! and take no time. The rest runs against real servers on loopback.
#![cfg(feature = "client")]
#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering::SeqCst},
    },
    time::{Duration, SystemTime},
};

use axum::{Router, extract::State, routing::get};
use futures_util::{SinkExt as _, StreamExt as _};
use http::HeaderMap;
use shardcast::{
    Engine, Hub, HubClient, HubContext, RawCodec, WebSocketUpgrade, WsHub, WsHubConfig,
    client::{ClientClose, ClientError, ClientState, HubClientBuilder, ReconnectPolicy, SendError, WhenFull},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream, duplex},
    net::{TcpListener, TcpStream},
    sync::mpsc,
    task::JoinHandle,
    time::Instant,
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{Message, protocol::CloseFrame},
};

type Client = HubClient<String, String, RawCodec>;
type Builder = HubClientBuilder<String, String, RawCodec>;

const HOUR: Duration = Duration::from_secs(60 * 60);

/// Awaits what has to come, however busy the machine.
async fn within_timeout<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(Duration::from_secs(60), future).await.expect("it has to come")
}

/// Longer than any delay. With paused time it fails at once.
async fn in_a_day<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(24 * HOUR, future).await.expect("it has to come")
}

fn builder(url: &str) -> Builder {
    HubClient::builder(url).with_in_message::<String>().with_out_message::<String>().with_codec::<RawCodec>()
}

/// Comes back soon, so that tests on real time are short.
fn soon() -> ReconnectPolicy {
    ReconnectPolicy::new()
        .with_initial_delay(Duration::from_millis(10))
        .with_delay_max(Duration::from_millis(50))
}

fn state_log(client: &mut Client) -> mpsc::UnboundedReceiver<ClientState> {
    let (sender, receiver) = mpsc::unbounded_channel();
    client.on_state(move |state| drop(sender.send(state)));
    receiver
}

fn closes(client: &mut Client) -> mpsc::UnboundedReceiver<ClientClose> {
    let (sender, receiver) = mpsc::unbounded_channel();
    client.on_close(move |close| sender.send(close).unwrap());
    receiver
}

async fn reaches(client: &Client, is_wanted: impl FnMut(&ClientState) -> bool) -> ClientState {
    // Longer than any delay; with paused time it fails at once.
    tokio::time::timeout(24 * HOUR, client.states().wait_for(is_wanted))
        .await
        .expect("another state")
        .unwrap()
}

fn is_reconnecting(state: &ClientState) -> bool {
    matches!(state, ClientState::Reconnecting { .. })
}

fn is_closed(state: &ClientState) -> bool {
    matches!(state, ClientState::Closed(_))
}

/// The states' names, and the attempts' numbers.
fn names(states: &mut mpsc::UnboundedReceiver<ClientState>) -> Vec<String> {
    std::iter::from_fn(|| states.try_recv().ok())
        .map(|state| match state {
            ClientState::Connecting => "connecting".to_owned(),
            ClientState::Open => "open".to_owned(),
            ClientState::Reconnecting { attempt, .. } => format!("reconnecting {attempt}"),
            ClientState::Closed(_) => "closed".to_owned(),
            state => format!("{state:?}"),
        })
        .collect()
}

// ---- in memory, with paused time

/// What a server in memory does with one attempt to connect.
#[derive(Clone)]
enum Script {
    /// The connector fails.
    Unreachable,
    /// Answers the handshake with this.
    Refuse(String),
    /// Accepts, reads this many messages and closes with this code, or without a Close for 1006.
    Close { after: usize, code: u16 },
    /// Accepts, and reads until the client closes.
    Serve,
}

/// A server in memory: its scripts, one for each attempt, and what happened when.
#[derive(Clone)]
struct Server(Arc<Inner>);

struct Inner {
    started: Instant,
    scripts: Mutex<VecDeque<Script>>,
    attempts: Mutex<Vec<Duration>>,
    received: Mutex<Vec<String>>,
}

impl Server {
    fn new(scripts: impl IntoIterator<Item = Script>) -> Self {
        Self(Arc::new(Inner {
            started: Instant::now(),
            scripts: Mutex::new(scripts.into_iter().collect()),
            attempts: Mutex::default(),
            received: Mutex::default(),
        }))
    }

    /// A builder for a client of this server.
    fn client(&self) -> Builder {
        let server = self.clone();
        builder("ws://in.memory/ws").with_connector(move || {
            let server = server.clone();
            async move { server.connect() }
        })
    }

    fn connect(&self) -> io::Result<DuplexStream> {
        self.0.attempts.lock().unwrap().push(self.0.started.elapsed());
        let script = { self.0.scripts.lock().unwrap().pop_front() }.expect("no further attempt");
        if matches!(script, Script::Unreachable) {
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        let (near, far) = duplex(64 * 1024);
        let server = self.clone();
        tokio::spawn(async move { server.serve(far, script).await });
        Ok(near)
    }

    async fn serve(&self, mut stream: DuplexStream, script: Script) {
        let (after, code) = match script {
            Script::Unreachable => return,
            Script::Refuse(response) => {
                read_head(&mut stream).await;
                stream.write_all(response.as_bytes()).await.unwrap();
                return;
            }
            Script::Close { after, code } => (after, code),
            Script::Serve => (usize::MAX, 0),
        };
        let mut peer = tokio_tungstenite::accept_async(stream).await.unwrap();
        for _ in 0..after {
            match peer.next().await {
                Some(Ok(Message::Text(text))) => self.0.received.lock().unwrap().push(text.to_string()),
                Some(Ok(_)) => {}
                _ => return,
            }
        }
        if code != 1006 {
            peer.close(Some(CloseFrame { code: code.into(), reason: "".into() })).await.unwrap();
            while let Some(Ok(_)) = peer.next().await {}
        }
    }

    fn attempts(&self) -> Vec<Duration> {
        self.0.attempts.lock().unwrap().clone()
    }

    fn received(&self) -> Vec<String> {
        self.0.received.lock().unwrap().clone()
    }
}

async fn read_head(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.unwrap());
    }
    String::from_utf8(head).unwrap()
}

fn refusal(status: u16, headers: &str) -> Script {
    Script::Refuse(format!("HTTP/1.1 {status} No\r\n{headers}content-length: 0\r\n\r\n"))
}

#[tokio::test(start_paused = true)]
async fn without_a_policy_a_client_does_not_come_back() {
    let server = Server::new([Script::Close { after: 0, code: 1012 }]);
    let mut client = server.client().build();
    client.connect().await.unwrap();
    reaches(&client, is_closed).await;
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByServer { code: 1012, .. })));
    assert_eq!(server.attempts().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn close_codes_say_whether_a_client_comes_back() {
    for code in [1001, 1006, 1011, 1012, 1013] {
        let server = Server::new([Script::Close { after: 0, code }, Script::Serve]);
        let mut client = server.client().with_reconnect(ReconnectPolicy::new()).build();
        let (mut states, mut closes) = (state_log(&mut client), closes(&mut client));
        client.connect().await.unwrap();
        let ClientState::Reconnecting { attempt: 1, cause, .. } = reaches(&client, is_reconnecting).await
        else {
            panic!("{code}: not the first attempt");
        };
        match cause {
            ClientClose::Lost(_) => assert_eq!(code, 1006),
            ClientClose::ByServer { code: reported, .. } => assert_eq!(reported, code),
            cause => panic!("{code}: {cause:?}"),
        }
        reaches(&client, |state| matches!(state, ClientState::Open)).await;
        assert!(client.is_connected());
        assert!(closes.try_recv().is_err(), "{code}: an interruption is no end");
        assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
        assert!(matches!(closes.try_recv(), Ok(ClientClose::ByClient)));
        assert_eq!(
            names(&mut states),
            ["connecting", "open", "reconnecting 1", "connecting", "open", "closed"],
            "{code}"
        );
    }
    for code in [1000, 1002, 1003, 1007, 1008, 1009, 3000, 4000, 4001] {
        let server = Server::new([Script::Close { after: 0, code }]);
        let mut client = server.client().with_reconnect(ReconnectPolicy::new()).build();
        let mut closes = closes(&mut client);
        client.connect().await.unwrap();
        let close = in_a_day(closes.recv()).await.unwrap();
        assert!(
            matches!(close, ClientClose::ByServer { code: reported, .. } if reported == code),
            "{close:?}"
        );
        assert!(matches!(client.state(), ClientState::Closed(ClientClose::ByServer { .. })), "{code}");
        assert!(!client.is_connected());
        assert!(matches!(client.send("late".into()), Err(SendError::NotConnected(_))));
    }
}

#[tokio::test(start_paused = true)]
async fn a_condition_of_ones_own_decides_about_every_end() {
    let server = Server::new([
        Script::Close { after: 0, code: 4000 },
        refusal(404, ""),
        Script::Close { after: 0, code: 1012 },
    ]);
    let policy = ReconnectPolicy::new().with_condition(|close| match close {
        ClientClose::ByServer { code, .. } => *code == 4000,
        ClientClose::ConnectFailed { error: ClientError::Refused(response), .. } => response.status() == 404,
        _ => false,
    });
    let mut client = server.client().with_reconnect(policy).build();
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    assert!(matches!(in_a_day(closes.recv()).await, Some(ClientClose::ByServer { code: 1012, .. })));
    assert_eq!(server.attempts().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn delays_grow_and_an_unreachable_server_is_given_up_after_the_last_attempt() {
    const ATTEMPTS: u32 = 12;
    let scripts = std::iter::once(Script::Close { after: 0, code: 1006 })
        .chain(std::iter::repeat_n(Script::Unreachable, ATTEMPTS as usize));
    let server = Server::new(scripts);
    let mut client =
        server.client().with_reconnect(ReconnectPolicy::new().with_attempts_max(ATTEMPTS)).build();
    let (mut states, mut closes) = (state_log(&mut client), closes(&mut client));
    client.connect().await.unwrap();
    let close = in_a_day(closes.recv()).await.unwrap();
    assert!(
        matches!(
            &close,
            ClientClose::ConnectFailed { attempts: ATTEMPTS, error: ClientError::Unreachable(_) }
        ),
        "{close:?}"
    );
    assert_eq!(
        close.to_string(),
        "not connected: the server cannot be reached: connection refused (failed attempts to reconnect: 12)"
    );
    let mut waited = Vec::new();
    while let Ok(state) = states.try_recv() {
        if let ClientState::Reconnecting { attempt, next_attempt_in, .. } = state {
            waited.push(next_attempt_in);
            let ceiling = Duration::from_secs(2_u64.pow(attempt).min(10));
            assert!(next_attempt_in <= ceiling, "attempt {attempt}: {next_attempt_in:?}");
        }
    }
    assert_eq!(waited.len(), ATTEMPTS as usize);
    // tokio's timers are exact to a millisecond.
    for (waited, between) in waited.iter().zip(server.attempts().windows(2)) {
        let between = between[1] - between[0];
        assert!(
            between >= *waited && between <= *waited + Duration::from_millis(2),
            "{waited:?} {between:?}"
        );
    }
    // Nine draws from up to 10 s: all below 1 s in one of 10^9 runs.
    assert!(waited.iter().any(|waited| *waited > Duration::from_secs(1)), "{waited:?}");
    assert!(closes.try_recv().is_err(), "reported twice");
    assert!(client.disconnect().await.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_server_that_closes_every_connection_at_once_is_not_reconnected_without_end() {
    let close = Script::Close { after: 0, code: 1013 };
    let server = Server::new(std::iter::repeat_n(close, 4));
    let mut client = server.client().with_reconnect(ReconnectPolicy::new().with_attempts_max(3)).build();
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    assert!(matches!(in_a_day(closes.recv()).await, Some(ClientClose::ByServer { code: 1013, .. })));
    assert_eq!(server.attempts().len(), 4);
}

#[tokio::test(start_paused = true)]
async fn attempts_start_anew_after_a_connection_that_was_open_for_the_reset_time() {
    let scripts = [1, 2, 3, 4].map(|_| Script::Close { after: 1, code: 1012 });
    let server = Server::new(scripts.into_iter().chain([Script::Serve]));
    let mut client = server.client().with_reconnect(ReconnectPolicy::new().with_attempts_max(1)).build();
    let mut states = state_log(&mut client);
    client.connect().await.unwrap();
    for _ in 0..4 {
        reaches(&client, |state| matches!(state, ClientState::Open)).await;
        tokio::time::sleep(Duration::from_secs(11)).await;
        client.send("end it".into()).unwrap();
        reaches(&client, is_reconnecting).await;
    }
    reaches(&client, |state| matches!(state, ClientState::Open)).await;
    let attempts: Vec<String> =
        names(&mut states).into_iter().filter(|name| name.starts_with("reconnecting")).collect();
    assert_eq!(attempts, ["reconnecting 1"; 4]);
}

#[tokio::test(start_paused = true)]
async fn retry_after_is_waited_for_in_seconds_and_as_a_date() {
    // A date is of the system's clock, which is not paused: an hour that has begun.
    let date = httpdate(SystemTime::now() + HOUR);
    for (status, retry_after, least) in
        [(503, "3600".to_owned(), HOUR), (429, "3600".to_owned(), HOUR), (503, date, HOUR * 9 / 10)]
    {
        let server =
            Server::new([refusal(status, &format!("retry-after: {retry_after}\r\n")), Script::Serve]);
        let policy = ReconnectPolicy::new().with_first_connect(true);
        let mut client = server.client().with_reconnect(policy).build();
        client.connect().await.unwrap();
        let waited = server.attempts()[1];
        assert!(waited >= least && waited <= HOUR + Duration::from_secs(3), "{retry_after}: {waited:?}");
    }
}

/// A date of HTTP, by the system's own `date` in reverse: days since 1970 to a calendar.
fn httpdate(time: SystemTime) -> String {
    let seconds = time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let (days, second) = (seconds / 86_400, seconds % 86_400);
    // The civil calendar from days, by H. Hinnant.
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let weekday = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"][(days % 7) as usize];
    let month = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]
        [(month - 1) as usize];
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{weekday}, {day:02} {month} {year} {hour:02}:{minute:02}:{second:02} GMT")
}

#[tokio::test(start_paused = true)]
async fn a_refusal_for_good_is_not_tried_again_at_first_or_later() {
    for status in [400, 401, 403, 404] {
        let server = Server::new([refusal(status, "retry-after: 1\r\n")]);
        let policy = ReconnectPolicy::new().with_first_connect(true);
        let mut client = server.client().with_reconnect(policy.clone()).build();
        let mut closes = closes(&mut client);
        let error = client.connect().await.unwrap_err();
        assert!(matches!(&error, ClientError::Refused(response) if response.status() == status), "{error:?}");
        assert!(matches!(
            client.state(),
            ClientState::Closed(ClientClose::ConnectFailed { attempts: 0, .. })
        ));
        assert!(matches!(client.send("x".into()), Err(SendError::NotConnected(_))));
        assert!(closes.try_recv().is_err(), "`connect` reports it");

        let server = Server::new([Script::Close { after: 0, code: 1012 }, refusal(status, "")]);
        let mut client = server.client().with_reconnect(policy).build();
        client.connect().await.unwrap();
        let ClientState::Closed(close) = reaches(&client, is_closed).await else { unreachable!() };
        assert!(matches!(close, ClientClose::ConnectFailed { attempts: 1, .. }), "{close:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn the_first_connect_is_retried_only_if_asked_and_messages_can_be_queued_meanwhile() {
    let server = Server::new([Script::Unreachable]);
    let mut client = server.client().with_reconnect(ReconnectPolicy::new()).build();
    assert!(matches!(client.connect().await, Err(ClientError::Unreachable(_))));

    let server = Server::new([Script::Unreachable, refusal(502, ""), Script::Serve]);
    let policy = ReconnectPolicy::new().with_first_connect(true);
    let mut client = server.client().with_reconnect(policy).build();
    let (sender, mut states) = (client.sender(), state_log(&mut client));
    assert!(matches!(sender.send("too early".into()), Err(SendError::NotConnected(_))));
    let queued = tokio::spawn(async move {
        while !is_reconnecting(&states.recv().await.unwrap()) {}
        assert!(!sender.is_connected());
        sender.send("early".into()).unwrap();
    });
    client.connect().await.unwrap();
    queued.await.unwrap();
    client.send("later".into()).unwrap();
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
    assert_eq!(server.received(), ["early", "later"]);
    assert_eq!(server.attempts().len(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_connect_that_is_dropped_leaves_a_client_that_can_connect() {
    let server = Server::new([Script::Unreachable, Script::Serve]);
    let policy =
        ReconnectPolicy::new().with_first_connect(true).with_initial_delay(HOUR).with_delay_max(HOUR);
    let mut client = server.client().with_reconnect(policy).build();
    {
        let states = client.states();
        let mut states = std::pin::pin!(async move {
            let mut states = states;
            states.wait_for(is_reconnecting).await
        });
        tokio::select! {
            _ = client.connect() => panic!("there was no server"),
            state = &mut states => drop(state.unwrap()),
        }
    }
    assert!(matches!(client.state(), ClientState::Closed(ClientClose::Abandoned { unsent: 0 })));
    assert!(matches!(client.send("x".into()), Err(SendError::NotConnected(_))));
    assert!(client.disconnect().await.is_none());
    client.connect().await.unwrap();
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
}

#[tokio::test(start_paused = true)]
async fn what_is_sent_while_away_arrives_once_in_order_and_after_what_on_open_says() {
    let server = Server::new([
        Script::Close { after: 2, code: 1012 },
        Script::Unreachable,
        refusal(503, ""),
        Script::Serve,
    ]);
    let mut client = server.client().with_reconnect(ReconnectPolicy::new()).build();
    let mut opened = 0;
    client.on_open(move || {
        opened += 1;
        [format!("join {opened}")]
    });
    client.connect().await.unwrap();
    client.send("before".into()).unwrap();
    reaches(&client, is_reconnecting).await;
    assert!(!client.is_connected());
    for number in 0..100 {
        client.send(number.to_string()).unwrap();
    }
    reaches(&client, |state| matches!(state, ClientState::Open)).await;
    client.send("after".into()).unwrap();
    assert!(matches!(client.disconnect().await, Some(ClientClose::ByClient)));
    let mut expected = vec!["join 1".to_owned(), "before".to_owned(), "join 2".to_owned()];
    expected.extend((0..100).map(|number: u32| number.to_string()));
    expected.push("after".to_owned());
    assert_eq!(server.received(), expected);
}

#[tokio::test(start_paused = true)]
async fn a_full_queue_returns_the_message_or_drops_the_oldest_as_it_was_set() {
    let texts = |range: std::ops::Range<u32>| range.map(|number| number.to_string()).collect::<Vec<_>>();
    for (when_full, arrives, dropped) in
        [(WhenFull::Refuse, texts(0..4), 0), (WhenFull::DropOldest, texts(6..10), 6)]
    {
        let server = Server::new([Script::Close { after: 0, code: 1012 }, Script::Serve]);
        let mut client = server
            .client()
            .with_reconnect(ReconnectPolicy::new())
            .with_queue_messages(100)
            .with_queue_bytes(4)
            .with_when_full(when_full)
            .build();
        client.connect().await.unwrap();
        reaches(&client, is_reconnecting).await;
        for text in texts(0..10) {
            match client.send(text.clone()) {
                Ok(()) => {}
                Err(SendError::Full(returned)) => assert_eq!(returned, text),
                Err(error) => panic!("{error:?}"),
            }
        }
        assert_eq!(client.dropped_messages(), dropped);
        reaches(&client, |state| matches!(state, ClientState::Open)).await;
        client.disconnect().await;
        assert_eq!(server.received(), arrives, "{when_full:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn disconnecting_or_dropping_a_client_that_is_away_ends_its_wait_and_counts_what_was_not_sent() {
    let policy = ReconnectPolicy::new().with_initial_delay(HOUR).with_delay_max(HOUR);
    for is_dropped in [false, true] {
        let server = Server::new([Script::Close { after: 0, code: 1012 }]);
        let mut client = server.client().with_reconnect(policy.clone()).build();
        let (mut closes, sender, mut states) = (closes(&mut client), client.sender(), client.states());
        client.connect().await.unwrap();
        reaches(&client, is_reconnecting).await;
        client.send("1".into()).unwrap();
        sender.send("2".into()).unwrap();
        assert!(matches!(client.connect().await, Err(ClientError::AlreadyConnected)));
        let started = Instant::now();
        if is_dropped {
            drop(client);
        } else {
            let close = client.disconnect().await;
            assert!(matches!(close, Some(ClientClose::Abandoned { unsent: 2 })), "{close:?}");
            drop(client);
        }
        assert!(matches!(in_a_day(closes.recv()).await, Some(ClientClose::Abandoned { unsent: 2 })));
        assert!(started.elapsed() < Duration::from_secs(1), "it waited for {:?}", started.elapsed());
        assert!(matches!(sender.send("3".into()), Err(SendError::NotConnected(_))));
        // The last state remains, and then there are no more.
        assert!(is_closed(&states.changed().await.unwrap()));
        assert!(states.changed().await.is_none());
    }
}

#[tokio::test(start_paused = true)]
async fn states_are_a_stream_that_ends_with_the_client() {
    let server = Server::new([Script::Close { after: 0, code: 1008 }]);
    let mut client = server.client().with_reconnect(ReconnectPolicy::new()).build();
    let mut states = client.states().into_stream();
    assert!(matches!(states.next().await, Some(ClientState::Idle)));
    client.on_state(|_| panic!("a panic that this test expects, and that harms nothing"));
    client.connect().await.unwrap();
    assert!(matches!(states.next().await, Some(ClientState::Open)));
    let Some(ClientState::Closed(close)) = states.next().await else { panic!("not closed") };
    assert_eq!(close.to_string(), "closed by the server with 1008");
    drop(client);
    assert!(states.next().await.is_none());
}

#[tokio::test(start_paused = true)]
async fn messages_flow_through_a_reconnect_and_end_when_the_client_is_closed() {
    let peers = Arc::new(Mutex::new(Vec::new()));
    let attempts = Arc::new(AtomicU32::new(0));
    let serve = {
        let (peers, attempts) = (Arc::clone(&peers), Arc::clone(&attempts));
        move || {
            let (near, far) = duplex(4096);
            let number = attempts.fetch_add(1, SeqCst);
            peers.lock().unwrap().push(tokio::spawn(async move {
                let mut peer = tokio_tungstenite::accept_async(far).await.unwrap();
                for text in ["a", "b"] {
                    peer.send(Message::text(format!("{text}{number}"))).await.unwrap();
                }
                let code = if number == 0 { 1012 } else { 1000 };
                peer.close(Some(CloseFrame { code: code.into(), reason: "".into() })).await.unwrap();
                while let Some(Ok(_)) = peer.next().await {}
            }));
            async { io::Result::Ok(near) }
        }
    };
    let mut client =
        builder("ws://in.memory/").with_connector(serve).with_reconnect(ReconnectPolicy::new()).build();
    client.connect().await.unwrap();
    let messages: Vec<String> = client.take_messages().unwrap().map(Result::unwrap).collect().await;
    assert_eq!(messages, ["a0", "b0", "a1", "b1"]);
    assert!(client.recv().await.is_none() && client.take_messages().is_none());
    assert!(matches!(client.state(), ClientState::Closed(ClientClose::ByServer { code: 1000, .. })));
}

#[tokio::test(start_paused = true)]
async fn headers_can_be_made_anew_for_each_attempt() {
    let heads = Arc::new(Mutex::new(Vec::new()));
    let connect = {
        let heads = Arc::clone(&heads);
        move || {
            let (near, mut far) = duplex(4096);
            let heads = Arc::clone(&heads);
            tokio::spawn(async move {
                let head = read_head(&mut far).await;
                heads.lock().unwrap().push(head);
                far.write_all(b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            });
            async { io::Result::Ok(near) }
        }
    };
    let made = AtomicU32::new(0);
    let make = move || {
        let number = made.fetch_add(1, SeqCst);
        async move {
            if number == 1 {
                return Err("the token server is not there".into());
            }
            let mut headers = HeaderMap::new();
            headers.insert("authorization", format!("Bearer {number}").parse().unwrap());
            headers.insert("cookie", format!("c={number}").parse().unwrap());
            Ok(headers)
        }
    };
    let policy = ReconnectPolicy::new().with_first_connect(true).with_attempts_max(2);
    let mut client = builder("ws://in.memory/")
        .with_connector(connect)
        .with_reconnect(policy)
        .with_cookie("a", "1")
        .with_cookie("b", "2")
        .with_fresh_headers(make)
        .build();
    client.connect().await.unwrap_err();
    let heads = heads.lock().unwrap();
    let [first, second] = &heads[..] else { panic!("{heads:?}") };
    for (head, number) in [(first, 0), (second, 2)] {
        assert!(head.contains(&format!("\r\nauthorization: Bearer {number}\r\n")), "{head}");
        assert!(head.contains(&format!("\r\ncookie: a=1; b=2; c={number}\r\n")), "{head}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_connector_that_panics_ends_the_client_with_a_reason() {
    let server = Server::new([Script::Close { after: 0, code: 1012 }]); // and panics
    let mut client = server.client().with_reconnect(ReconnectPolicy::new()).build();
    let mut closes = closes(&mut client);
    client.connect().await.unwrap();
    let close = in_a_day(closes.recv()).await.unwrap();
    let expected = "not connected: the request is invalid: the connector or the function for headers panicked \
                    (failed attempts to reconnect: 1)";
    assert_eq!(close.to_string(), expected);
    assert!(client.recv().await.is_none());
    let error = client.connect().await.unwrap_err();
    assert!(matches!(error, ClientError::InvalidRequest(_)), "{error:?}");
}

// ---- real sockets

async fn accept(listener: &TcpListener) -> WebSocketStream<TcpStream> {
    let (socket, _) = listener.accept().await.unwrap();
    tokio_tungstenite::accept_async(socket).await.unwrap()
}

async fn texts(peer: &mut WebSocketStream<TcpStream>, count: usize) -> Vec<String> {
    let mut texts = Vec::new();
    while texts.len() < count {
        match within_timeout(peer.next()).await.unwrap().unwrap() {
            Message::Text(text) => texts.push(text.to_string()),
            Message::Ping(_) => {}
            message => panic!("{message:?} after {texts:?}"),
        }
    }
    texts
}

#[tokio::test]
async fn a_server_that_is_stopped_and_started_again_on_its_port_is_found_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut client = builder(&format!("ws://{address}/")).with_reconnect(soon()).build();
    let mut states = state_log(&mut client);
    let (_, mut peer) = tokio::join!(async { client.connect().await.unwrap() }, accept(&listener));
    client.send("1".into()).unwrap();
    assert_eq!(texts(&mut peer, 1).await, ["1"]);
    drop((peer, listener));
    // A second attempt means that the first was refused by the kernel.
    within_timeout(async {
        while !matches!(states.recv().await.unwrap(), ClientState::Reconnecting { attempt: 2.., .. }) {}
    })
    .await;
    client.send("2".into()).unwrap();
    client.send("3".into()).unwrap();
    let listener = TcpListener::bind(address).await.unwrap();
    let mut peer = within_timeout(accept(&listener)).await;
    assert_eq!(texts(&mut peer, 2).await, ["2", "3"]);
    tokio::spawn(async move { while let Some(Ok(_)) = peer.next().await {} });
    assert!(matches!(within_timeout(client.disconnect()).await, Some(ClientClose::ByClient)));
}

/// Half open: the kernel accepts what the client writes, and nobody answers.
#[tokio::test]
async fn a_server_that_is_half_open_is_asked_by_a_ping_given_up_and_reconnected() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    let mut client = builder(&url)
        .with_reconnect(soon())
        .with_silence_timeout(Duration::from_millis(400))
        .with_ping_interval(Duration::from_millis(100))
        .build();
    let (_, peer) = tokio::join!(async { client.connect().await.unwrap() }, accept(&listener));
    let mut half_open = peer.into_inner();
    let ClientState::Reconnecting { cause, .. } = within_timeout(reaches(&client, is_reconnecting)).await
    else {
        unreachable!()
    };
    assert!(matches!(cause, ClientClose::Silent { .. }), "{cause:?}");
    let mut ping = [0; 2];
    within_timeout(half_open.read_exact(&mut ping)).await.unwrap();
    assert_eq!(ping, [0x89, 0x80], "a masked ping, empty");

    // The second one answers, for as many pings as would have been too many.
    let mut peer = within_timeout(accept(&listener)).await;
    let mut pings = 0;
    while pings < 12 {
        match within_timeout(peer.next()).await.unwrap().unwrap() {
            Message::Ping(_) => pings += 1,
            message => panic!("{message:?}"),
        }
    }
    tokio::spawn(async move { while let Some(Ok(_)) = peer.next().await {} });
    within_timeout(client.disconnect()).await;
}

#[tokio::test]
async fn a_ping_interval_that_cannot_work_is_refused() {
    let second = Duration::from_secs(1);
    for (interval, silence) in [(Duration::ZERO, None), (second, Some(second)), (second * 2, Some(second))] {
        let mut client =
            builder("ws://127.0.0.1:1/").with_ping_interval(interval).with_silence_timeout(silence).build();
        let error = client.connect().await.unwrap_err();
        assert!(matches!(error, ClientError::InvalidRequest(_)), "{error:?}");
    }
    let policy = ReconnectPolicy::new().with_initial_delay(Duration::ZERO).with_first_connect(true);
    let mut client = builder("ws://127.0.0.1:1/").with_reconnect(policy).build();
    assert!(matches!(client.connect().await, Err(ClientError::InvalidRequest(_))));
}

#[tokio::test]
async fn what_a_stalled_connection_did_not_accept_arrives_once_and_in_order_on_the_next() {
    const MESSAGES: u32 = 400;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    let mut client = builder(&url).with_reconnect(soon()).with_queue_messages(MESSAGES as usize).build();
    let (_, peer) = tokio::join!(async { client.connect().await.unwrap() }, accept(&listener));
    let padding = "x".repeat(50_000);
    for number in 0..MESSAGES {
        client.send(format!("{number} {padding}")).unwrap();
    }
    // The client writes until the sockets are full. An abortive close then loses what they hold.
    let first = peer.into_inner();
    within_timeout(first.readable()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(300)).await;
    first.set_zero_linger().unwrap();
    drop(first);
    let mut peer = within_timeout(accept(&listener)).await;
    let mut numbers: Vec<u32> = Vec::new();
    while numbers.last() != Some(&(MESSAGES - 1)) {
        let text = texts(&mut peer, 1).await.remove(0);
        numbers.push(text.split(' ').next().unwrap().parse().unwrap());
    }
    let lost = numbers[0];
    assert!(lost > 0, "the sockets held some of {MESSAGES}");
    assert_eq!(numbers, (lost..MESSAGES).collect::<Vec<u32>>(), "each once, in order, none missing");
    drop(client);
}

#[tokio::test]
async fn a_connection_that_breaks_while_the_client_disconnects_is_not_opened_again() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("ws://{}/", listener.local_addr().unwrap());
    let mut client =
        builder(&url).with_reconnect(soon()).with_disconnect_timeout(Duration::from_secs(60)).build();
    let mut states = state_log(&mut client);
    let (_, peer) = tokio::join!(async { client.connect().await.unwrap() }, accept(&listener));
    // More than the sockets hold, so that the Close is not written.
    for _ in 0..400 {
        client.send("x".repeat(50_000)).unwrap();
    }
    let peer = peer.into_inner();
    let (close, ()) = tokio::join!(within_timeout(client.disconnect()), async {
        peer.readable().await.unwrap();
        peer.set_zero_linger().unwrap();
        drop(peer);
    });
    assert!(matches!(close, Some(ClientClose::Lost(_))), "{close:?}");
    assert_eq!(names(&mut states), ["connecting", "open", "closed"]);
}

/// A hub with rooms, and what clients say in it: `join ROOM`, or anything else.
struct Rooms(mpsc::UnboundedSender<String>);

impl WsHub for Rooms {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        match text.strip_prefix("join ") {
            Some(room) => ctx.add_to_group(room).await,
            None => drop(self.0.send(text)),
        }
    }
}

async fn serve_rooms(
    listener: TcpListener,
    said: mpsc::UnboundedSender<String>,
) -> (Engine, Hub<Rooms>, JoinHandle<()>) {
    let engine = testkit_hub::engine(1);
    let hub = engine.hub::<Rooms>(WsHubConfig::default()).unwrap();
    let serve =
        async move |ws: WebSocketUpgrade, State(hub): State<Hub<Rooms>>| ws.serve(&hub, Rooms(said.clone()));
    let app = Router::new().route("/ws", get(serve)).with_state(hub.clone());
    (engine, hub, tokio::spawn(async move { axum::serve(listener, app).await.unwrap() }))
}

#[tokio::test]
async fn a_restart_of_the_hub_brings_every_client_back_into_its_room_with_what_it_queued() {
    const CLIENTS: usize = 100;
    const ROOMS: usize = 5;
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (say, mut said) = mpsc::unbounded_channel();
    let (engine, _, server) = serve_rooms(listener, say.clone()).await;
    let mut clients = Vec::new();
    for number in 0..CLIENTS {
        let policy = ReconnectPolicy::new().with_initial_delay(Duration::from_millis(100));
        let mut client = builder(&format!("ws://{address}/ws")).with_reconnect(policy).build();
        client.on_open(move || [format!("join {}", number % ROOMS)]);
        within_timeout(client.connect()).await.unwrap();
        client.send(format!("{number} first")).unwrap();
        clients.push(client);
    }
    for _ in 0..CLIENTS {
        assert!(within_timeout(said.recv()).await.unwrap().ends_with(" first"));
    }
    server.abort();
    let _ = server.await;
    within_timeout(engine.shutdown(Duration::from_secs(1))).await;
    for (number, client) in clients.iter().enumerate() {
        within_timeout(reaches(client, |state| !matches!(state, ClientState::Open))).await;
        for queued in 0..10 {
            client.send(format!("{number} {queued}")).unwrap();
        }
    }
    let listener = TcpListener::bind(address).await.unwrap();
    let (_engine, hub, _server) = serve_rooms(listener, say).await;
    let mut next = vec![0; CLIENTS];
    for _ in 0..10 * CLIENTS {
        let text = within_timeout(said.recv()).await.unwrap();
        let (client, queued) = text.split_once(' ').unwrap();
        let next = &mut next[client.parse::<usize>().unwrap()];
        assert_eq!(queued, next.to_string(), "client {client}");
        *next += 1;
    }
    for room in 0..ROOMS {
        let receipt = hub.to_group(&room.to_string()).deliver(&"welcome back".to_owned()).await.unwrap();
        assert_eq!(receipt.accepted(), (CLIENTS / ROOMS) as u64);
    }
    for client in &mut clients {
        assert_eq!(within_timeout(client.recv()).await.unwrap().unwrap(), "welcome back");
    }
    assert!(said.try_recv().is_err(), "something arrived twice");
}
