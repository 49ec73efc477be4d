//! Several nodes over real brokers: what clients see while a broker is killed, frozen or loses everything, and while a node
//! is killed, frozen or replaced.
//!
//! Each test runs over NATS and over Redis; both keep the log in files that are written before they answer, unless a test
//! says otherwise. Real clients over real sockets. A node that is killed or frozen is a process of its own, the example
//! `fanout`. `NODE_CLIENTS` (8 for each node), `NODE_MESSAGES` (250 of each of 8 publishers) and `NODE_PAUSE` (4 ms between
//! two messages of a publisher, so that no client is too slow) set the size of the flood.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::net::SocketAddr;
use std::num::NonZeroUsize;
use std::sync::atomic::AtomicUsize;
use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures_util::future::join_all;
use shardcast::backplane::nats::{NatsBackplane, NatsConfig, Storage};
use shardcast::backplane::redis::{RedisBackplane, RedisConfig};
use shardcast::backplane::{BackplaneConfig, BackplaneError, BackplaneState, OutagePolicy};
use shardcast::client::{ClientState, ReconnectPolicy};
use shardcast::{ConnectionId, Engine, Hub, HubClient, PublishError, RawCodec, WsHubConfig};
use testkit_broker::{Kind, Server, pause, resume};
use testkit_hub::node::config;
use testkit_hub::program::{Running, fanout};
use testkit_hub::recorder::{assert_contains, assert_once_and_in_order, assert_same};
use testkit_hub::{Client, CommandHub, Node, Recorder, SharedLog, eventually, logged, within_timeout};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::sleep;

const PUBLISHERS: usize = 8;

/// The hub to which messages are broadcast in the example `fanout`.
const HUB: &str = "fanout::All";

fn setting(name: &str, default: usize) -> usize {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

fn text(text: &str) -> String {
    text.to_owned()
}

/// What a broker keeps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Keeps {
    Everything,
    /// The last records.
    Little,
    /// Nothing over a restart.
    Nothing,
}

struct Broker {
    server: Server,
    keeps: Keeps,
}

impl Broker {
    async fn start(kind: Kind, keeps: Keeps) -> Self {
        let mut broker = Self::prepare(kind, keeps);
        broker.server.run().await;
        broker
    }

    fn prepare(kind: Kind, keeps: Keeps) -> Self {
        let is_forgetful = keeps == Keeps::Nothing && kind == Kind::Redis;
        let kind = if is_forgetful { Kind::ForgetfulRedis } else { kind };
        Self { server: Server::prepare(kind), keeps }
    }

    fn storage(&self) -> Storage {
        if self.keeps == Keeps::Nothing { Storage::Memory } else { Storage::File }
    }
}

impl SharedLog for Broker {
    fn join(&self, engine: &Engine, config: BackplaneConfig) {
        let (url, is_little) = (self.server.url(), self.keeps == Keeps::Little);
        if url.starts_with("nats:") {
            let max_bytes = if is_little { 100_000 } else { 64 << 20 };
            let nats = NatsConfig { storage: self.storage(), max_bytes, ..NatsConfig::default() };
            let connect = move || {
                let (url, nats) = (url.clone(), nats.clone());
                async move { NatsBackplane::connect(&url, nats).await }
            };
            engine.backplane(connect, config).unwrap();
        } else {
            let records_max = NonZeroUsize::new(if is_little { 20 } else { 100_000 }).unwrap();
            let connect = move || {
                let url = url.clone();
                async move {
                    RedisBackplane::connect(&url, RedisConfig { records_max, ..RedisConfig::default() }).await
                }
            };
            engine.backplane(connect, config).unwrap();
        }
    }
}

/// A node of this process, whose clients may lag far behind without being ended.
async fn node(broker: &Broker, config: BackplaneConfig) -> Node {
    let hub = WsHubConfig {
        overflow_frames: 1 << 20,
        overflow_bytes: 1 << 30,
        heartbeat_interval: None,
        stall_timeout: None,
        ..WsHubConfig::default()
    };
    Node::start_named(broker, 2, config, HUB, hub).await
}

/// A node of its own process.
async fn process(broker: &Broker) -> (Running, SocketAddr) {
    let query = if broker.storage() == Storage::File { "?storage=file" } else { "" };
    let url = format!("{}{query}", broker.server.url());
    fanout(&["--no-pin", "--shards", "1", "--backplane", &url]).await
}

async fn recorders(node: &Node, count: usize) -> Vec<Recorder> {
    let mut recorders = Vec::new();
    for _ in 0..count {
        recorders.push(Recorder::start(node.connect().await.0));
    }
    recorders
}

/// How far the publishers are.
#[derive(Debug, Default)]
struct Progress {
    answered: usize,
    unavailable: usize,
}

/// Publishes messages one after the other, where it is told to; another place than before as soon as the first has left.
/// Returns those that were accepted.
async fn publisher(
    name: String,
    count: usize,
    mut place: watch::Receiver<Hub<CommandHub>>,
    progress: watch::Sender<Progress>,
) -> Vec<String> {
    let pause = Duration::from_millis(setting("NODE_PAUSE", 4) as u64);
    let mut accepted = Vec::new();
    for number in 0..count {
        let text = format!("{name} {number}");
        let hub = place.borrow_and_update().clone();
        let published = hub.to_all().publish(&text).await;
        progress.send_modify(|progress| {
            progress.answered += 1;
            let is_unavailable =
                matches!(&published, Err(PublishError::Backplane(BackplaneError::Unavailable)));
            progress.unavailable += usize::from(is_unavailable);
        });
        match published {
            Ok(()) => accepted.push(text),
            Err(PublishError::Backplane(BackplaneError::Unavailable)) => {}
            Err(_) => within_timeout(place.changed()).await.unwrap(), // it has left
        }
        sleep(pause).await;
    }
    accepted
}

/// Publishers that are under way.
struct Flood {
    publishers: Vec<tokio::task::JoinHandle<Vec<String>>>,
    progress: watch::Receiver<Progress>,
}

impl Flood {
    /// One after the other publishes at the next place.
    fn start(count: usize, places: &[&watch::Sender<Hub<CommandHub>>]) -> Self {
        let (progress, seen) = watch::channel(Progress::default());
        let publishers = (0..PUBLISHERS).zip(places.iter().cycle()).map(|(number, place)| {
            tokio::spawn(publisher(format!("p{number}"), count, place.subscribe(), progress.clone()))
        });
        Self { publishers: publishers.collect(), progress: seen }
    }

    async fn is(&mut self, reached: impl FnMut(&Progress) -> bool) {
        within_timeout(self.progress.wait_for(reached)).await.unwrap();
    }

    /// Waits for all of them: what was accepted.
    async fn end(mut self) -> Vec<String> {
        while within_timeout(self.progress.changed()).await.is_ok() {} // the last one has ended
        let accepted = join_all(self.publishers).await;
        accepted.into_iter().flat_map(Result::unwrap).collect()
    }
}

/// A `HubClient` that reconnects to where it is told: its texts on each of its connections, and how often it was told that
/// one is lost.
struct Reconnecting {
    _client: HubClient<String, String, RawCodec>,
    texts: Arc<Mutex<Vec<Vec<String>>>>,
    interruptions: Arc<AtomicUsize>,
}

impl Reconnecting {
    async fn start(place: watch::Receiver<SocketAddr>) -> Self {
        let mut client = HubClient::builder("ws://node/ws")
            .with_codec::<RawCodec>()
            .with_in_message::<String>()
            .with_out_message::<String>()
            .with_connector(move || TcpStream::connect(*place.borrow()))
            .with_reconnect(ReconnectPolicy::new())
            .build();
        let texts = Arc::new(Mutex::new(Vec::<Vec<String>>::new()));
        let interruptions = Arc::new(AtomicUsize::new(0));
        let (received, interrupted) = (texts.clone(), interruptions.clone());
        client.on_message(move |text: String| {
            let mut connections = received.lock().unwrap();
            match connections.last_mut() {
                Some(last) if text.parse::<ConnectionId>().is_err() => last.push(text),
                _ => connections.push(Vec::new()), // the first one of each connection is its id
            }
        });
        client.on_state(move |state| {
            let is_lost = matches!(state, ClientState::Reconnecting { attempt: 1, .. });
            interrupted.fetch_add(is_lost.into(), Relaxed);
        });
        client.connect().await.unwrap();
        Self { _client: client, texts, interruptions }
    }

    fn texts(&self) -> Vec<Vec<String>> {
        self.texts.lock().unwrap().clone()
    }

    async fn has(&self, text: &str) {
        eventually(true, || self.texts().iter().flatten().any(|received| received == text)).await;
    }
}

async fn every_client_has_every_message_once_in_one_order_while_the_broker_is_killed_and_a_node_is_replaced(
    kind: Kind,
) {
    let (clients, messages) = (setting("NODE_CLIENTS", 8), setting("NODE_MESSAGES", 250));
    let mut broker = Broker::start(kind, Keeps::Everything).await;
    let hasty = BackplaneConfig { publish_timeout: Duration::from_millis(200), ..config(OutagePolicy::Wait) };
    let patient = BackplaneConfig { publish_timeout: Duration::from_secs(60), ..hasty.clone() };
    let (staying, leaving) = (node(&broker, hasty).await, node(&broker, patient.clone()).await);
    staying.knows(2).await;
    leaving.knows(2).await;
    let stayed = recorders(&staying, clients).await;
    let mut left = recorders(&leaving, clients).await;
    let place = watch::Sender::new(leaving.server.address);
    let reconnecting = Reconnecting::start(place.subscribe()).await;
    let (one, other) = (watch::Sender::new(staying.hub.clone()), watch::Sender::new(leaving.hub.clone()));
    let mut flood = Flood::start(messages, &[&one, &other]);

    flood.is(|progress| progress.answered >= messages * PUBLISHERS / 4).await;
    broker.server.kill();
    staying.is(BackplaneState::Disconnected).await;
    flood.is(|progress| progress.unavailable > 0).await;
    leaving.shut_down().await;
    for recorder in &mut left {
        assert_eq!(recorder.end().await, Some(1001), "it is told that it must reconnect");
    }
    let replacing = node(&broker, patient).await;
    place.send_replace(replacing.server.address);
    let reconnected = recorders(&replacing, clients).await;
    other.send_replace(replacing.hub.clone());
    broker.server.run().await;
    replacing.is(BackplaneState::Connected).await;
    let accepted = flood.end().await;
    eventually(2, || reconnecting.texts().len()).await;
    let ends = [staying.publish_last("end of one").await, replacing.publish_last("end of other").await];

    for recorder in stayed.iter().chain(&reconnected) {
        for end in &ends {
            recorder.has(end).await;
        }
    }
    let all = stayed[0].texts();
    assert_once_and_in_order(&all, "a client that stayed");
    assert_contains(&all, &accepted, "a client that stayed");
    for recorder in &stayed {
        assert_same(&recorder.texts(), &all, "another client that stayed");
    }
    // What was accepted before its node left, and everything since it is back.
    for (before, after) in left.iter().zip(&reconnected) {
        let (before, after) = (before.texts(), after.texts());
        assert!(before.len() + after.len() <= all.len(), "nothing twice");
        assert_same(&before, &all[..before.len()], "a client before its node left");
        assert_same(&after, &all[all.len() - after.len()..], "a client that has reconnected");
    }
    assert!(left[0].texts().len() >= messages * PUBLISHERS / 8, "it was connected for a while");
    // One that reconnects by itself is told that there is a gap.
    reconnecting.has(&ends[1]).await;
    let [before, after] = reconnecting.texts().try_into().expect("it has reconnected once");
    assert_eq!(reconnecting.interruptions.load(Relaxed), 1);
    assert!(before.len() + after.len() <= all.len(), "nothing twice");
    assert_same(&before, &left[0].texts(), "another client of the node that left");
    assert_same(&after, &all[all.len() - after.len()..], "a client that reconnects by itself");
    assert_eq!((staying.gaps(), replacing.gaps()), (0, 0), "nothing was lost");
}

async fn while_the_broker_is_frozen_publishers_get_what_the_policy_says_and_nothing_is_lost_or_doubled(
    kind: Kind,
) {
    let broker = Broker::start(kind, Keeps::Everything).await;
    let with = |outage, publish_timeout| BackplaneConfig { publish_timeout, ..config(outage) };
    let (short, long) = (Duration::from_millis(100), Duration::from_secs(60));
    let patient = node(&broker, with(OutagePolicy::Wait, long)).await;
    let hasty = node(&broker, with(OutagePolicy::Wait, short)).await;
    let failing = node(&broker, with(OutagePolicy::Fail, long)).await;
    let alone = node(&broker, with(OutagePolicy::ThisNode, long)).await;
    let nodes = [&patient, &hasty, &failing, &alone];
    let mut clients = Vec::new();
    for node in nodes {
        node.is(BackplaneState::Connected).await;
        node.knows(4).await;
        clients.extend(recorders(node, 1).await);
    }
    patient.hub.to_all().publish(&text("before 0")).await.unwrap();
    broker.server.pause();
    let waiting = [&patient, &alone].map(|node| {
        let (hub, name) =
            (node.hub.clone(), if node.engine.node() == alone.engine.node() { "alone" } else { "patient" });
        tokio::spawn(async move { hub.to_all().publish(&format!("{name} 0")).await })
    });
    let unavailable = |result: Result<(), PublishError>| {
        assert!(matches!(result, Err(PublishError::Backplane(BackplaneError::Unavailable))), "{result:?}");
    };
    for number in 0..3 {
        unavailable(within_timeout(hasty.hub.to_all().publish(&format!("hasty {number}"))).await);
    }
    // That the broker is frozen is noticed by its silence.
    unavailable(within_timeout(failing.hub.to_all().publish(&text("failing 0"))).await);
    for node in nodes {
        node.is(BackplaneState::Disconnected).await;
    }
    unavailable(within_timeout(failing.hub.to_all().publish(&text("failing 1"))).await);
    within_timeout(alone.hub.to_all().publish(&text("near 0"))).await.unwrap();
    clients[3].has("near 0").await;
    assert!(waiting.iter().all(|waiting| !waiting.is_finished()), "what was under way waits");

    broker.server.resume();
    for waiting in waiting {
        within_timeout(waiting).await.unwrap().unwrap();
    }
    for node in nodes {
        node.is(BackplaneState::Connected).await;
    }
    for (number, node) in nodes.iter().enumerate() {
        let end = node.publish_last(&format!("end of {number}")).await;
        for client in &clients {
            client.has(&end).await;
        }
    }
    let all = clients[0].texts();
    assert_once_and_in_order(&all, "a client");
    assert_contains(&all, &["before 0", "patient 0", "alone 0"].map(text), "a client");
    assert!(!all.contains(&text("failing 1")), "it was refused before it was sent");
    for (client, node) in clients.iter().zip(nodes) {
        let mut seen = client.texts();
        seen.retain(|text| text != "near 0");
        assert_same(&seen, &all, "a client of another node");
        assert_eq!(node.gaps(), 0);
    }
}

async fn a_node_that_is_killed_delays_nobody_and_is_no_longer_asked(kind: Kind) {
    let broker = Broker::start(kind, Keeps::Everything).await;
    let config = BackplaneConfig {
        node_timeout: Duration::from_secs(5), // five heartbeats of the process
        answer_timeout: Duration::from_secs(5),
        ..config(OutagePolicy::Wait)
    };
    let (here, there) = (node(&broker, config.clone()).await, node(&broker, config).await);
    let (mut killed, address) = process(&broker).await;
    here.knows(3).await;
    there.knows(3).await;
    let (mut near, _) = here.connect().await;
    let (mut far, _) = there.connect().await;
    let mut its_client = Client::connect(format!("ws://{address}/ws")).await;
    let tick = r#"{"t":1,"p":"to all"}"#;
    its_client.send_text(tick).await;
    for client in [&mut near, &mut far, &mut its_client] {
        client.recv_texts(&[tick]).await;
    }
    let receipt = within_timeout(here.hub.to_all().deliver(&text("1"))).await.unwrap();
    assert_eq!((receipt.recipients, receipt.nodes_asked, receipt.nodes_answered), (3, 3, 3));
    its_client.recv_texts(&["1"]).await;

    killed.process.kill().await.unwrap();
    assert_eq!(its_client.recv().await, None);
    within_timeout(there.hub.to_all().publish(&text("2"))).await.unwrap();
    for client in [&mut near, &mut far] {
        client.recv_texts(&["1", "2"]).await;
    }
    // It counts as alive for a while, and does not answer.
    let receipt = within_timeout(here.hub.to_all().deliver(&text("3"))).await.unwrap();
    assert_eq!((receipt.recipients, receipt.nodes_answered), (2, 2));
    here.knows(2).await;
    there.knows(2).await;
    let receipt = within_timeout(here.hub.to_all().deliver(&text("4"))).await.unwrap();
    assert_eq!((receipt.recipients, receipt.nodes_asked, receipt.nodes_answered), (2, 2, 2));
    for client in [&mut near, &mut far] {
        client.recv_texts(&["3", "4"]).await;
    }
}

async fn a_node_that_was_frozen_beyond_retention_reports_a_gap_and_goes_on_in_the_same_order(kind: Kind) {
    let broker = Broker::start(kind, Keeps::Little).await;
    let config = BackplaneConfig { node_timeout: Duration::from_secs(5), ..config(OutagePolicy::Wait) };
    let here = node(&broker, config).await;
    let (mut frozen, address) = process(&broker).await;
    here.knows(2).await;
    let near = Recorder::start(here.connect().await.0);
    let far = Client::connect(format!("ws://{address}/ws")).await;
    let far = Recorder::start(far);
    // The process serves its client when that receives.
    for number in 0.. {
        here.hub.to_all().publish(&format!("before {number}")).await.unwrap();
        if !far.texts().is_empty() {
            break;
        }
    }
    let id = frozen.process.id().unwrap();
    pause(id);
    let long = "x".repeat(4000);
    for number in 0..600 {
        // Each in a record of its own.
        within_timeout(here.hub.to_all().publish(&format!("{long} {number}"))).await.unwrap();
    }
    here.knows(1).await;
    resume(id);
    assert_eq!(frozen.wait_for_line("missed ").await, "Retention");
    here.knows(2).await;
    for number in 0..50 {
        within_timeout(here.hub.to_all().publish(&format!("after {number}"))).await.unwrap();
    }
    near.has("after 49").await;
    far.has("after 49").await;
    let (all, seen) = (near.texts(), far.texts());
    assert_once_and_in_order(&all, "a client of the node that went on");
    assert!(seen.len() < all.len(), "something was missed");
    let expected: Vec<_> = all.iter().filter(|text| seen.contains(text)).cloned().collect();
    assert_same(&seen, &expected, "a client of the node that was frozen");
    let since: Vec<_> = (0..50).map(|number| format!("after {number}")).collect();
    assert_contains(&seen, &since, "a client of the node that was frozen");
    assert_eq!(here.gaps(), 0);
}

async fn a_broker_that_loses_everything_costs_every_node_a_gap_and_what_follows_is_everywhere(kind: Kind) {
    let mut broker = Broker::start(kind, Keeps::Nothing).await;
    let patient = BackplaneConfig { publish_timeout: Duration::from_secs(60), ..config(OutagePolicy::Wait) };
    let nodes = [node(&broker, patient.clone()).await, node(&broker, patient).await];
    let mut clients = Vec::new();
    for node in &nodes {
        node.knows(2).await;
        clients.push(recorders(node, 2).await);
    }
    let places = [&nodes[0], &nodes[1]].map(|node| watch::Sender::new(node.hub.clone()));
    let mut flood = Flood::start(100, &[&places[0], &places[1]]);
    flood.is(|progress| progress.answered >= 100 * PUBLISHERS / 2).await;
    broker.server.kill();
    nodes[0].is(BackplaneState::Disconnected).await;
    broker.server.run().await;
    let accepted = flood.end().await;
    assert_eq!(accepted.len(), 100 * PUBLISHERS, "every publisher was patient");
    for node in &nodes {
        eventually(true, || node.gaps() > 0).await;
    }
    for number in 0..50 {
        let node = &nodes[number % 2];
        within_timeout(node.hub.to_all().publish(&format!("since {number}"))).await.unwrap();
    }
    let since: Vec<_> = (0..50).map(|number| format!("since {number}")).collect();
    for (node, clients) in clients.iter().enumerate() {
        // What is accepted has been read by the publisher's own node.
        let is_of_node =
            |text: &&String| text[1..].split(' ').next().unwrap().parse::<usize>().unwrap() % 2 == node;
        let own: Vec<_> = accepted.iter().filter(is_of_node).cloned().collect();
        for client in clients {
            client.has("since 49").await;
            let seen = client.texts();
            assert_once_and_in_order(&seen, "a client");
            assert_contains(&seen, &own, "a client of the publisher's node");
            assert_same(&seen[seen.len() - 50..], &since, "a client, since the gap");
        }
    }
}

async fn nodes_that_start_without_their_broker_say_so_and_take_part_as_soon_as_it_runs(kind: Kind) {
    let (_guard, count_of) = logged();
    let mut broker = Broker::prepare(kind, Keeps::Everything);
    let alone = node(&broker, config(OutagePolicy::ThisNode)).await;
    let patient = BackplaneConfig { publish_timeout: Duration::from_secs(60), ..config(OutagePolicy::Wait) };
    let patient = node(&broker, patient).await;
    let (mut near, _) = alone.connect().await;
    let (mut far, _) = patient.connect().await;
    eventually(2, || count_of("the backplane's broker cannot be reached")).await;
    within_timeout(alone.hub.to_all().publish(&text("alone"))).await.unwrap();
    near.recv_texts(&["alone"]).await;
    let waiting = tokio::spawn({
        let hub = patient.hub.clone();
        async move { hub.to_all().publish(&text("waited")).await }
    });
    broker.server.run().await;
    within_timeout(waiting).await.unwrap().unwrap();
    far.recv_texts(&["waited"]).await;
    alone.is(BackplaneState::Connected).await;
    patient.is(BackplaneState::Connected).await;
    within_timeout(alone.hub.to_all().publish(&text("together"))).await.unwrap();
    far.recv_texts(&["together"]).await;
}

/// Makes a test of each function for each broker.
macro_rules! on_each_broker {
    ($($test:ident,)*) => {
        on_each_broker! { nats Nats: $($test,)* }
        on_each_broker! { redis Redis: $($test,)* }
    };
    ($module:ident $kind:ident: $($test:ident,)*) => {
        mod $module {
            $(#[tokio::test]
            async fn $test() {
                super::$test(super::Kind::$kind).await;
            })*
        }
    };
}

on_each_broker! {
    every_client_has_every_message_once_in_one_order_while_the_broker_is_killed_and_a_node_is_replaced,
    while_the_broker_is_frozen_publishers_get_what_the_policy_says_and_nothing_is_lost_or_doubled,
    a_node_that_is_killed_delays_nobody_and_is_no_longer_asked,
    a_node_that_was_frozen_beyond_retention_reports_a_gap_and_goes_on_in_the_same_order,
    a_broker_that_loses_everything_costs_every_node_a_gap_and_what_follows_is_everywhere,
    nodes_that_start_without_their_broker_say_so_and_take_part_as_soon_as_it_runs,
}
