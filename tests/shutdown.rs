//! The end of an engine with real clients: what still arrives, what each client is told, and that the report adds up.
//!
//! What an engine leaves behind when it is dropped is counted in `no_leak.rs`, which has a process of its own for that.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::process::Stdio;
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::any;
use futures_util::{SinkExt as _, poll};
use serde_json::{Value, json};
use shardcast::{
    CloseCode, CloseReason, EngineState, HubContext, PublishError, RawCodec, RunOn, Shutdown, ShutdownReport,
    TryPublishError, WebSocketUpgrade, WsHub, WsHubConfig,
};
use testkit::time::{DAY, ms};
use testkit_hub::program::{Running, fanout};
use testkit_hub::recording_hub::{number_of, numbered};
use testkit_hub::{
    Client, CommandHub, HubFixture, RawClient, Transport, command_app, connect, engine, eventually,
    on_each_transport, within_timeout,
};
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::Command;
use tokio::runtime::Handle;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::{self, Message};

/// Long enough for everything on any machine; nothing waits for all of it.
const LONG: Duration = Duration::from_secs(30);
const SHORT: Duration = Duration::from_millis(500);
const MESSAGE_BYTES: usize = 2000;

type Heard = (Vec<String>, Option<(u16, String)>);

fn at_once(within: Duration) -> Shutdown {
    Shutdown { close_window: Duration::ZERO, ..Shutdown::within(within) }
}

/// Flushed, cut off, left over.
fn counts(report: &ShutdownReport) -> [u64; 3] {
    [report.flushed, report.cut_off, report.left_over]
}

fn reads_to_the_end(peer: Client) -> JoinHandle<Heard> {
    tokio::spawn(peer.rest())
}

fn gone() -> CloseReason {
    CloseReason::Shutdown { code: CloseCode::GOING_AWAY }
}

on_each_transport!(
    workers = 2,
    what_was_accepted_before_a_shutdown_arrives_everywhere_and_the_report_adds_up
);
async fn what_was_accepted_before_a_shutdown_arrives_everywhere_and_the_report_adds_up(transport: Transport) {
    const CLIENTS: usize = 12;
    const PUBLISHERS: usize = 3;
    const EACH: usize = 500;
    let mut fixture = HubFixture::open(transport, 3, WsHubConfig::default()).await;
    let mut readers = Vec::new();
    for _ in 0..CLIENTS {
        readers.push(reads_to_the_end(fixture.connect().await.0));
    }
    // The end comes when the last of it has been accepted, and much of it is still on its way.
    let publishers: Vec<_> = (0..PUBLISHERS)
        .map(|publisher| {
            let clients = fixture.hub.clients().clone();
            tokio::spawn(async move {
                for count in 0..EACH {
                    clients.to_all().publish(&format!("{count} {publisher}")).await.unwrap();
                }
            })
        })
        .collect();
    for publisher in publishers {
        within_timeout(publisher).await.unwrap();
    }
    let report = within_timeout(fixture.engine.shutdown(Duration::from_secs(10))).await;
    assert_eq!(counts(&report), [CLIENTS as u64, 0, 0]);
    assert_eq!((fixture.engine.connection_count(), fixture.hub.len(), fixture.hub.group_count()), (0, 0, 0));
    let mut first = None;
    for reader in readers {
        let (heard, close) = within_timeout(reader).await.unwrap();
        assert_eq!(close, Some((1001, String::new())));
        for publisher in 0..PUBLISHERS {
            let own = heard.iter().filter(|text| text.ends_with(&format!(" {publisher}")));
            assert!(own.map(|text| number_of(text)).eq(0..EACH), "of {publisher}, without gaps");
        }
        assert!(*first.get_or_insert_with(|| heard.clone()) == heard, "in one order");
    }
    for _ in 0..CLIENTS {
        assert_eq!(fixture.ended().await.1, gone());
    }
    assert_eq!(fixture.others_ended(), []);
    // Nothing more is taken, and asking again tells the same.
    assert!(matches!(fixture.hub.to_all().try_publish(&"late".to_owned()), Err(TryPublishError::Closed(_))));
    let refused = fixture.hub.to_all().deliver(&"late".to_owned()).await;
    assert!(matches!(refused, Err(PublishError::Closed)), "{refused:?}");
    assert_eq!(within_timeout(fixture.engine.shutdown(LONG)).await, report);
}

on_each_transport!(workers = 2, what_is_accepted_while_a_shutdown_begins_arrives_everywhere);
/// Whenever the end comes between the calls of those who publish: what they are told `Ok` for is heard by all.
async fn what_is_accepted_while_a_shutdown_begins_arrives_everywhere(transport: Transport) {
    const ROUNDS: u64 = 20;
    const PUBLISHERS: usize = 8;
    for round in 0..ROUNDS {
        let fixture = HubFixture::open(transport, 2, WsHubConfig::default()).await;
        let mut readers = Vec::new();
        for _ in 0..4 {
            readers.push(reads_to_the_end(fixture.connect().await.0));
        }
        let publish = || {
            let clients = fixture.hub.clients().clone();
            std::thread::spawn(move || {
                let mut accepted = 0;
                loop {
                    match clients.to_all().try_publish(&String::new()) {
                        Ok(()) => accepted += 1,
                        Err(TryPublishError::Full(_)) => std::thread::yield_now(),
                        Err(_) => return accepted,
                    }
                }
            })
        };
        let publishers: Vec<_> = std::iter::repeat_with(publish).take(PUBLISHERS).collect();
        // At another moment in each round.
        eventually(true, || fixture.engine.metrics().publications > round * 50).await;
        within_timeout(fixture.engine.shutdown_with(at_once(LONG))).await.unwrap();
        let accepted: usize = publishers.into_iter().map(|publisher| publisher.join().unwrap()).sum();
        for reader in readers {
            let (heard, close) = within_timeout(reader).await.unwrap();
            assert_eq!((heard.len(), close.map(|close| close.0)), (accepted, Some(1001)), "round {round}");
        }
    }
}

on_each_transport!(a_shutdown_waits_for_a_busy_handler_refuses_new_clients_and_reads_no_more);
async fn a_shutdown_waits_for_a_busy_handler_refuses_new_clients_and_reads_no_more(transport: Transport) {
    let mut fixture = HubFixture::open(transport, 2, WsHubConfig::default()).await;
    let (mut busy, busy_id) = fixture.connect().await;
    let (mut other, other_id) = fixture.connect().await;
    busy.send_text("wait").await;
    eventually(1, || fixture.engine.metrics().tally.received).await;
    let engine = fixture.engine.clone();
    let ending = Shutdown { code: CloseCode::SERVICE_RESTART, ..at_once(LONG) };
    let mut shutdown = Box::pin(engine.shutdown_with(ending));
    assert!(poll!(&mut shutdown).is_pending());
    let refused = within_timeout(Client::try_connect(fixture.server.url("/ws"), &[])).await.err().unwrap();
    let tungstenite::Error::Http(response) = refused else { panic!("{refused:?}") };
    assert_eq!(response.status(), 503);
    assert!(response.headers().contains_key("retry-after"));
    // When a shard has answered twice, a turn is over in which it has learnt of the end.
    for id in [busy_id, other_id] {
        fixture.counted(id).await;
        fixture.counted(id).await;
    }
    other.send_text("all unheard").await;
    busy.send_text("all unheard").await;
    within_timeout(fixture.hub.to_all().publish(&"still taken".to_owned())).await.unwrap();
    other.recv_texts(&["still taken"]).await;
    assert!(poll!(&mut shutdown).is_pending());
    assert_eq!(fixture.others_ended(), []);

    let readers = [busy, other].map(reads_to_the_end);
    fixture.recorder.permits.add_permits(1);
    assert_eq!(counts(&within_timeout(shutdown).await.unwrap()), [2, 0, 0]);
    for (reader, heard_before) in readers.into_iter().zip([0, 1]) {
        let (heard, close) = within_timeout(reader).await.unwrap();
        assert_eq!(heard, ["still taken", "waited"][heard_before..], "what the busy one sent at last, too");
        assert_eq!(close, Some((1012, String::new())));
    }
    for _ in 0..2 {
        let reason = CloseReason::Shutdown { code: CloseCode::SERVICE_RESTART };
        assert_eq!(fixture.ended().await.1, reason);
    }
    assert_eq!((fixture.engine.metrics().tally.received, fixture.engine.connection_count()), (1, 0));
}

on_each_transport!(a_handler_that_is_busy_for_longer_than_a_shutdown_may_take_is_left_over);
async fn a_handler_that_is_busy_for_longer_than_a_shutdown_may_take_is_left_over(transport: Transport) {
    let mut fixture = HubFixture::open(transport, 2, WsHubConfig::default()).await;
    let (mut busy, _) = fixture.connect().await;
    let (other, other_id) = fixture.connect().await;
    busy.send_text("wait").await;
    eventually(1, || fixture.engine.metrics().tally.received).await;
    let readers = [busy, other].map(reads_to_the_end);
    let began = Instant::now();
    let report = within_timeout(fixture.engine.shutdown(SHORT)).await;
    assert!(began.elapsed() >= SHORT, "it had all the time there was");
    assert_eq!(counts(&report), [2, 0, 1], "its client has had all that was its own");
    for reader in readers {
        assert_eq!(within_timeout(reader).await.unwrap(), (vec![], Some((1001, String::new()))));
    }
    assert_eq!(fixture.ended().await, (other_id, gone()));
    assert_eq!(fixture.others_ended(), [], "the busy one was dropped without a word");
    assert_eq!(fixture.engine.connection_count(), 0);
}

/// Somebody who does not read, somebody who does, and many messages for both.
async fn stalled_and_reading(
    transport: Transport,
    messages: usize,
) -> (HubFixture, RawClient, JoinHandle<Heard>) {
    let fixture =
        HubFixture::open(transport, 1, WsHubConfig { heartbeat_interval: None, ..WsHubConfig::default() })
            .await;
    let (stalled, _) = fixture.connect_raw().await;
    let reader = reads_to_the_end(fixture.connect().await.0);
    for number in 0..messages {
        within_timeout(fixture.hub.to_all().publish(&numbered(number, MESSAGE_BYTES))).await.unwrap();
    }
    (fixture, stalled, reader)
}

on_each_transport!(a_stalled_client_is_cut_off_when_the_time_is_over_and_holds_up_nobody_else);
async fn a_stalled_client_is_cut_off_when_the_time_is_over_and_holds_up_nobody_else(transport: Transport) {
    const MESSAGES: usize = 200;
    let (mut fixture, mut stalled, reader) = stalled_and_reading(transport, MESSAGES).await;
    let report = within_timeout(fixture.engine.shutdown(SHORT)).await;
    assert_eq!(counts(&report), [1, 1, 0]);
    let (heard, close) = within_timeout(reader).await.unwrap();
    assert!(heard.iter().map(|text| number_of(text)).eq(0..MESSAGES));
    assert_eq!(close, Some((1001, String::new())));
    // What its kernel had is in one piece, and there is no Close behind what is missing.
    let (heard, code) = stalled.rest_if_cut_off().await;
    assert!(heard.len() < MESSAGES && heard.iter().map(|text| number_of(text)).eq(0..heard.len()));
    assert_eq!(code, None);
    for _ in 0..2 {
        assert_eq!(fixture.ended().await.1, gone(), "for the hub both have ended in order");
    }
    assert_eq!(fixture.engine.connection_count(), 0);
}

on_each_transport!(
    workers = 2,
    as_many_clients_as_a_shutdown_reports_flushed_have_got_everything_and_their_close
);
async fn as_many_clients_as_a_shutdown_reports_flushed_have_got_everything_and_their_close(
    transport: Transport,
) {
    const EACH: usize = 8;
    const MESSAGES: usize = 20;
    const BYTES: usize = 4096; // in all twice what the kernels keep
    // On a runtime that ends with the engine, as that of a process does.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let config = WsHubConfig { heartbeat_interval: None, ..WsHubConfig::default() };
    let fixture = runtime.spawn(async move { HubFixture::open(transport, 1, config).await });
    let fixture = within_timeout(fixture).await.unwrap();
    let (mut readers, mut slow, mut stalled) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..EACH {
        for clients in [&mut readers, &mut slow, &mut stalled] {
            clients.push(fixture.connect_raw().await.0);
        }
    }
    for number in 0..MESSAGES {
        fixture.hub.to_all().try_publish(&numbered(number, BYTES)).unwrap();
    }
    for reader in &mut readers {
        for number in 0..MESSAGES {
            assert_eq!(number_of(&reader.recv_text().await), number);
        }
    }
    let engine = fixture.engine.clone();
    let shutdown = tokio::spawn(async move { engine.shutdown(ms(2000)).await });
    let mut ends: Vec<JoinHandle<bool>> = readers
        .into_iter()
        .map(|mut reader| tokio::spawn(async move { reader.rest().await == (vec![], Some(1001)) }))
        .collect();
    // From 10 to 80 KiB/s: some get all of it within the time.
    while !shutdown.is_finished() {
        slow.iter_mut().zip(1..).for_each(|(client, number)| client.read_at_most(250 * number));
        tokio::time::sleep(ms(25)).await;
    }
    let report = within_timeout(shutdown).await.unwrap();
    runtime.shutdown_background();
    for mut client in slow.into_iter().chain(stalled) {
        ends.push(tokio::spawn(async move {
            let (heard, code) = client.rest_if_cut_off().await;
            heard.len() == MESSAGES && code == Some(1001)
        }));
    }
    let mut complete = 0;
    for end in ends {
        complete += u64::from(within_timeout(end).await.unwrap());
    }
    assert_eq!((report.flushed + report.cut_off, report.left_over), (3 * EACH as u64, 0));
    assert!(report.cut_off >= EACH as u64, "who has not read is not flushed: {report:?}");
    assert!(report.flushed >= EACH as u64, "who has read is: {report:?}");
    assert!(report.flushed <= complete, "{complete} have got everything: {report:?}");
}

on_each_transport!(who_is_cut_off_by_a_shutdown_is_counted_by_receipts_and_counters);
async fn who_is_cut_off_by_a_shutdown_is_counted_by_receipts_and_counters(transport: Transport) {
    let config = WsHubConfig { heartbeat_interval: None, outbox_frames: 8, ..WsHubConfig::default() };
    let fixture = HubFixture::open(transport, 1, config).await;
    let (_stalled, id) = fixture.connect_raw().await;
    fixture.hub.join(id, "room").await.unwrap();
    for number in 0..100 {
        fixture.hub.to_all().try_publish(&numbered(number, MESSAGE_BYTES)).unwrap();
    }
    let hub = fixture.hub.clone();
    let sending = tokio::spawn(async move { hub.to_all().deliver(&"last".to_owned()).await.unwrap() });
    eventually(101, || fixture.engine.metrics().publications).await;
    let report = within_timeout(fixture.engine.shutdown_with(at_once(SHORT))).await.unwrap();
    assert_eq!(counts(&report), [0, 1, 0]);
    let receipt = within_timeout(sending).await.unwrap();
    assert_eq!((receipt.recipients, receipt.accepted(), receipt.disconnected), (1, 0, 1));
    let after = fixture.engine.metrics();
    assert_eq!((after.connections, after.tally.pending(), after.pending_bytes, after.ended), (0, 0, 0, 1));
    assert_eq!(
        (after.tally.written + after.tally.discarded, after.tally.discarded > 0),
        (after.tally.offered, true),
        "{after:?}"
    );
    assert_eq!((fixture.hub.len(), fixture.hub.group_count()), (0, 0));
}

on_each_transport!(a_slow_client_that_reads_within_the_time_of_a_shutdown_gets_everything);
async fn a_slow_client_that_reads_within_the_time_of_a_shutdown_gets_everything(transport: Transport) {
    const MESSAGES: usize = 200;
    let (fixture, mut slow, reader) = stalled_and_reading(transport, MESSAGES).await;
    let engine = fixture.engine.clone();
    let shutdown = tokio::spawn(async move { counts(&engine.shutdown_with(at_once(LONG)).await.unwrap()) });
    // The other one's end does not wait for it.
    assert_eq!(within_timeout(reader).await.unwrap().0.len(), MESSAGES);
    let (heard, code) = slow.rest().await;
    assert!(heard.iter().map(|text| number_of(text)).eq(0..MESSAGES));
    assert_eq!(code, Some(1001));
    drop(slow);
    assert_eq!(within_timeout(shutdown).await.unwrap(), [2, 0, 0]);
}

on_each_transport!(a_method_that_holds_its_shard_is_left_behind_and_the_shutdown_keeps_its_time);
async fn a_method_that_holds_its_shard_is_left_behind_and_the_shutdown_keeps_its_time(transport: Transport) {
    let fixture = HubFixture::open(transport, 2, WsHubConfig::default()).await;
    let (mut stuck, id) = fixture.connect().await;
    let reader = reads_to_the_end(fixture.connect().await.0);
    stuck.send_text("hold").await;
    eventually(1, || fixture.recorder.holds()).await;
    let report = within_timeout(fixture.engine.shutdown(SHORT)).await;
    assert_eq!((counts(&report), report.stuck), ([1, 1, 0], vec![id.shard()]));
    assert_eq!(within_timeout(reader).await.unwrap(), (vec![], Some((1001, String::new()))));
    assert_eq!(fixture.engine.state(), EngineState::Ended);
    fixture.recorder.let_go();
    eventually(0, || fixture.engine.connection_count()).await;
}

const CHILD: &str = "SHARDCAST_TEST_CHILD";

/// What the test below starts as another process: a server of two shards, whose methods hold them for ever.
#[tokio::test]
#[allow(clippy::print_stdout)] // how it talks to the test
async fn a_child_of_these_tests() {
    struct Endless;
    impl WsHub for Endless {
        type Codec = RawCodec;
        type InMessage = String;
        type OutMessage = String;

        async fn on_message(&self, message: String, ctx: HubContext<Self>) {
            println!("\nholds {message}");
            if message == "sleep" {
                std::thread::sleep(DAY);
            } else {
                // Its own shard is among those that this waits for.
                let _ = Handle::current().block_on(ctx.clients().to_all().deliver(&message));
            }
        }
    }
    if std::env::var_os(CHILD).is_none() {
        return;
    }
    let engine = engine(2);
    let hub = engine.hub::<Endless>(WsHubConfig::default()).unwrap();
    let serve = async move |ws: WebSocketUpgrade| ws.serve(&hub, Endless);
    let app = Router::new().route("/ws", any(serve));
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut terminated = signal(SignalKind::terminate()).unwrap();
    println!("\nlistens {}", listener.local_addr().unwrap());
    let signal = async move {
        terminated.recv().await;
        let report = engine.shutdown(SHORT).await;
        println!("\nstuck {:?}", report.stuck);
    };
    axum::serve(listener, app).with_graceful_shutdown(signal).await.unwrap();
}

#[tokio::test] // over TCP alone: threads that are held do not know what their clients talk over
async fn a_process_whose_methods_hold_all_shards_ends_on_sigterm() {
    let mut child = Command::new(std::env::current_exe().unwrap());
    let child = child.args(["--exact", "--nocapture", "a_child_of_these_tests"]).env(CHILD, "1");
    let mut process = child.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let lines = BufReader::new(process.stdout.take().unwrap()).lines();
    let mut child = Running { process, lines };
    let address = child.wait_for_line("listens ").await;
    let mut clients = Vec::new();
    for message in ["sleep", "wait for the own shard"] {
        let mut client = Client::connect(format!("ws://{address}/ws")).await;
        client.send_text(message).await;
        assert_eq!(child.wait_for_line("holds ").await, message);
        clients.push(client);
    }
    let process = child.process.id().unwrap().to_string();
    assert!(within_timeout(Command::new("kill").args(["-TERM", &process]).status()).await.unwrap().success());
    assert_eq!(child.wait_for_line("stuck ").await, "[0, 1]");
    assert!(within_timeout(child.process.wait()).await.unwrap().success());
}

on_each_transport!(a_shutdown_with_a_code_that_may_not_be_sent_is_refused_and_nobody_hears_of_it);
async fn a_shutdown_with_a_code_that_may_not_be_sent_is_refused_and_nobody_hears_of_it(transport: Transport) {
    let fixture = HubFixture::open(transport, 1, WsHubConfig::default()).await;
    let (mut peer, _) = fixture.connect().await;
    for code in [0, 1005, 1006, 5000].map(CloseCode) {
        let error = within_timeout(fixture.engine.shutdown_with(Shutdown { code, ..at_once(LONG) }))
            .await
            .unwrap_err();
        assert!(error.to_string().contains(&format!("close code {code} may not be sent")), "{error}");
    }
    assert!(!fixture.engine.is_stopping());
    fixture.hub.to_all().publish(&"all is well".to_owned()).await.unwrap();
    peer.recv_texts(&["all is well"]).await;
}

/// What is told to a client whose hub's runtime was shut down, when it says something or is waiting for an answer.
async fn told_without_a_runtime(transport: Transport, waits: bool) -> Option<(u16, String)> {
    struct Pending;
    impl WsHub for Pending {
        type Codec = RawCodec;
        type InMessage = String;
        type OutMessage = String;
        const RUN_ON: RunOn = RunOn::Runtime;

        async fn on_message(&self, _: String, _: HubContext<Self>) {
            std::future::pending().await
        }
    }
    let engine = engine(1);
    let hub = engine.hub::<Pending>(WsHubConfig::default()).unwrap();
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let serving = hub.clone();
    let app = Router::new().route("/ws", any(async move |ws: WebSocketUpgrade| ws.serve(&serving, Pending)));
    let address = runtime.spawn(async move {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        tokio::spawn(transport.serve(listener, app, std::future::pending()));
        address
    });
    let mut peer =
        Client::connect(format!("{}://{}/ws", transport.scheme(), within_timeout(address).await.unwrap()))
            .await;
    // A client is among all when `on_connected` has returned, which takes some time on a runtime.
    while within_timeout(hub.to_all().deliver(&"welcome".to_owned())).await.unwrap().recipients == 0 {
        tokio::task::yield_now().await;
    }
    peer.recv_texts(&["welcome"]).await;
    if waits {
        peer.send_text("wait").await;
        eventually(1, || engine.metrics().tally.received).await;
    }
    runtime.shutdown_background();
    if !waits {
        peer.send_text("too late").await;
    }
    let (heard, close) = within_timeout(peer.rest()).await;
    assert_eq!(heard, Vec::<String>::new());
    within_timeout(engine.shutdown(LONG)).await;
    close
}

on_each_transport!(a_client_whose_hub_has_lost_its_runtime_is_told_1011);
async fn a_client_whose_hub_has_lost_its_runtime_is_told_1011(transport: Transport) {
    for waits in [false, true] {
        let told = told_without_a_runtime(transport, waits).await;
        assert_eq!(told, Some((1011, "the server's runtime has ended".to_owned())), "waits: {waits}");
    }
}

on_each_transport!(within_axums_graceful_shutdown_it_ends_the_clients_and_serve_returns);
async fn within_axums_graceful_shutdown_it_ends_the_clients_and_serve_returns(transport: Transport) {
    let engine = engine(2);
    let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let (stop, stopped) = oneshot::channel::<()>();
    let (tell, told) = oneshot::channel();
    let (app, ending) = (command_app(hub.clone()), engine.clone());
    let serving = tokio::spawn(async move {
        let signal = async move {
            stopped.await.unwrap();
            tell.send(ending.shutdown(Duration::from_secs(4)).await).unwrap();
        };
        transport.serve(listener, app, signal).await;
    });
    let mut readers = Vec::new();
    for _ in 0..5 {
        readers.push(reads_to_the_end(connect(&format!("{}://{address}/ws", transport.scheme())).await.0));
    }
    hub.to_all().publish(&"last words".to_owned()).await.unwrap();
    stop.send(()).unwrap();
    for reader in readers {
        let (heard, close) = within_timeout(reader).await.unwrap();
        assert_eq!((heard, close), (vec!["last words".to_owned()], Some((1001, String::new()))));
    }
    within_timeout(serving).await.unwrap();
    assert_eq!(counts(&within_timeout(told).await.unwrap()), [5, 0, 0]);
    assert!(TcpStream::connect(address).await.is_err(), "nobody listens any more");
}

/// One of the clients of `fanout`: says its next tick when it has heard its last, and writes down what it hears from the
/// start sign on, to the end.
async fn talk(
    mut peer: Client,
    name: usize,
    talks: bool,
    mut warm: Option<oneshot::Sender<()>>,
) -> (Vec<Value>, u16) {
    const WARM: u64 = 30;
    let name = name.to_string();
    let tick = |t: u64| Message::text(json!({ "t": t, "p": name }).to_string());
    let (mut heard, mut has_begun) = (Vec::new(), false);
    loop {
        let text = match peer.recv().await {
            Some(Message::Text(text)) => text,
            Some(Message::Close(Some(close))) => return (heard, close.code.into()),
            other => panic!("{other:?}"),
        };
        let message: Value = serde_json::from_str(&text).unwrap();
        let is_start = message["p"] == "start";
        has_begun |= is_start;
        let is_own = message["p"].as_str() == Some(&name);
        let said = message["t"].as_u64().unwrap();
        if has_begun {
            heard.push(message);
        }
        if talks && has_begun && (is_start || is_own) {
            if said == WARM
                && let Some(warm) = warm.take()
            {
                warm.send(()).unwrap();
            }
            // What is said to a server that ends is not heard, which is not its fault.
            let _ = within_timeout(peer.socket.send(tick(said + 1))).await;
        }
    }
}

// Over TCP alone: the program has no TLS, and the same without a process is tested above over both.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fanout_ends_in_order_on_sigterm_with_a_report_and_all_that_was_accepted_arrives() {
    const CLIENTS: usize = 50;
    const TALKERS: usize = 8;
    let (mut fanout, address) = fanout(&["--shards", "2", "--no-pin"]).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        // A client counts from its adoption, which its own tick proves.
        let mut peer = Client::connect(format!("ws://{address}/ws")).await;
        let hello = json!({ "t": clients.len(), "p": "hello" }).to_string();
        peer.send_text(hello.clone()).await;
        while serde_json::from_str::<Value>(&peer.recv_text().await).unwrap()
            != serde_json::from_str::<Value>(&hello).unwrap()
        {}
        clients.push(peer);
    }
    clients[0].send_text(json!({ "t": 0, "p": "start" }).to_string()).await;
    let (mut talking, mut warming) = (Vec::new(), Vec::new());
    for (name, peer) in clients.into_iter().enumerate() {
        let (warm, is_warm) = oneshot::channel();
        let talks = name < TALKERS;
        warming.extend(talks.then_some(is_warm));
        talking.push(tokio::spawn(talk(peer, name, talks, talks.then_some(warm))));
    }
    for is_warm in warming {
        within_timeout(is_warm).await.unwrap();
    }
    let process = fanout.process.id().unwrap().to_string();
    assert!(within_timeout(Command::new("kill").args(["-TERM", &process]).status()).await.unwrap().success());

    let mut ends = Vec::new();
    for client in talking {
        ends.push(within_timeout(client).await.unwrap());
    }
    let everything = &ends[0].0;
    for (heard, code) in &ends {
        assert_eq!(*code, 1001);
        assert!(heard == everything, "{} and {} messages", heard.len(), everything.len());
    }
    for talker in 0..TALKERS {
        let name = talker.to_string();
        let own = everything.iter().filter(|tick| tick["p"].as_str() == Some(&name));
        let own: Vec<u64> = own.map(|tick| tick["t"].as_u64().unwrap()).collect();
        assert!(own.len() >= 30 && own.iter().copied().eq(1..=own.len() as u64), "without gaps: {own:?}");
    }
    assert_eq!(fanout.wait_for_line("flushed ").await, format!("{CLIENTS}, cut off 0, left over 0"));
    assert!(within_timeout(fanout.process.wait()).await.unwrap().success());
    assert_eq!(within_timeout(fanout.lines.next_line()).await.unwrap(), None);
}
