//! Several nodes: hubs of several engines in one process, over a log in memory that has a broker's faults.
//!
//! Real clients over real sockets. The brokers themselves are tested in `backplane/tests/conformance`, and with hubs in
//! `node_brokers.rs`.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;
use std::future::ready;
use std::sync::Mutex;
use std::time::Duration;

use shardcast::backplane::memory::{Faults, MemoryLog};
use shardcast::backplane::{
    BackplaneConfig, BackplaneError, BackplaneStartError, BackplaneState, MissedCause, MissedMessages,
    OutagePolicy,
};
use shardcast::{
    BroadcastPolicy, Clients, CloseCode, Engine, HubContext, PublishError, RawCodec, Stateful, StatefulHub,
    TryPublishError, WsHubConfig,
};
use testkit_hub::node::config;
use testkit_hub::{
    CommandHub, Node, RawClient, Server, SharedLog as _, command_app, connect, engine, eventually,
    within_timeout,
};

/// An engine that shares this log.
fn join(log: &MemoryLog, shards: usize, config: BackplaneConfig) -> Engine {
    let engine = engine(shards);
    log.join(&engine, config);
    engine
}

fn text(text: &str) -> String {
    text.to_owned()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_of_all_nodes_see_one_order_whoever_publishes_and_whatever_the_broker_does() {
    const MESSAGES: usize = 200;
    let faults = Faults {
        seed: 7,
        acknowledged_within: Duration::from_millis(3),
        read_within: Duration::from_millis(2),
        unknown: 0.1,
        failed: 0.1,
    };
    let log = MemoryLog::new();
    let nodes = Node::start_all(&log, 3).await;
    log.set_faults(faults);
    let mut clients = Vec::new();
    for node in nodes.iter().chain(&nodes) {
        clients.push(node.connect().await.0);
    }
    let publishing = nodes.iter().enumerate().map(async |(number, node)| {
        for count in 0..MESSAGES {
            node.hub.to_all().publish(&format!("{number} {count}")).await.unwrap();
        }
    });
    within_timeout(futures_util::future::join_all(publishing)).await;
    let mut sequences = Vec::new();
    for client in &mut clients {
        let mut sequence = Vec::new();
        for _ in 0..MESSAGES * nodes.len() {
            sequence.push(client.recv_text().await);
        }
        sequences.push(sequence);
    }
    for sequence in &sequences {
        assert_eq!(*sequence, sequences[0], "one order");
    }
    for number in 0..nodes.len() {
        let of_one = sequences[0].iter().filter(|text| text.starts_with(&format!("{number} ")));
        let expected = (0..MESSAGES).map(|count| format!("{number} {count}"));
        assert!(of_one.cloned().eq(expected), "each message of a publisher once, in its order");
    }
}

#[tokio::test]
async fn what_one_task_awaits_in_sequence_arrives_in_that_sequence_on_every_node() {
    let log = MemoryLog::new();
    let nodes = Node::start_all(&log, 2).await;
    let (here, there) = (&nodes[0], &nodes[1]);
    let (mut near, near_id) = here.connect().await;
    let (mut far, far_id) = there.connect().await;
    for round in 0..20 {
        here.hub.to_all().publish(&format!("all {round}")).await.unwrap();
        here.hub.to(near_id).publish(&format!("near {round}")).await.unwrap();
        here.hub.to(far_id).publish(&format!("far {round}")).await.unwrap();
        here.hub.join(far_id, "group").await.unwrap();
        here.hub.to_group("group").publish(&format!("group {round}")).await.unwrap();
        here.hub.leave(far_id, "group").await.unwrap();
        here.hub.to_group("group").publish(&text("nobody")).await.unwrap();
    }
    here.hub.to_all().publish(&text("end")).await.unwrap();
    for round in 0..20 {
        near.recv_texts(&[&format!("all {round}"), &format!("near {round}")]).await;
        far.recv_texts(&[&format!("all {round}"), &format!("far {round}"), &format!("group {round}")]).await;
    }
    near.recv_texts(&["end"]).await;
    far.recv_texts(&["end"]).await;
}

#[tokio::test]
async fn every_target_means_the_clients_of_all_nodes() {
    let log = MemoryLog::new();
    let nodes = Node::start_all(&log, 2).await;
    let (mut ada, ada_id) = nodes[0].connect().await;
    let (mut bob, bob_id) = nodes[1].connect().await;
    assert_eq!((ada_id.node(), bob_id.node()), (nodes[0].engine.node(), nodes[1].engine.node()));
    assert_ne!(ada_id.node(), bob_id.node());
    ada.send_text("join a").await;
    bob.send_text("join b").await;
    bob.send_text("me joined").await;
    bob.recv_texts(&["joined"]).await;
    // Each by a client, on its own node.
    ada.send_text("all 1").await;
    ada.send_text(format!("except {ada_id} 2")).await;
    ada.send_text("group b 3").await;
    ada.send_text("groups a,b 4").await;
    ada.send_text(format!("group-except b {bob_id} never")).await;
    ada.send_text("all 5").await;
    ada.recv_texts(&["1", "4", "5"]).await;
    bob.recv_texts(&["1", "2", "3", "4", "5"]).await;
    let hub = &nodes[0].hub;
    hub.to_all().on_this_node().publish(&text("near")).await.unwrap();
    hub.to_all().try_publish(&text("tried")).unwrap();
    ada.recv_texts(&["near", "tried"]).await;
    bob.recv_texts(&["tried"]).await;
    assert_eq!(hub.groups_of(bob_id).await.unwrap().unwrap(), [std::sync::Arc::<str>::from("b")]);
    let members: BTreeSet<_> = hub.to_all().members().await.unwrap().into_iter().collect();
    assert_eq!(members, BTreeSet::from([ada_id, bob_id]));
    assert_eq!(hub.to_all().on_this_node().members().await.unwrap(), [ada_id]);
    assert_eq!(hub.to_group("b").members().await.unwrap(), [bob_id]);
    hub.disconnect(bob_id, CloseCode(4000), "from afar").await.unwrap();
    assert_eq!(bob.closed().await, (4000, text("from afar")));
    eventually(0, || nodes[1].engine.metrics().connections).await; // no longer closing either
    assert_eq!(hub.groups_of(bob_id).await.unwrap(), None);
    hub.to(bob_id).publish(&text("to nobody")).await.unwrap();
    hub.to_all().disconnect(CloseCode(4001), "all").await.unwrap();
    assert_eq!(ada.closed().await, (4001, text("all")));
}

#[tokio::test]
async fn a_receipt_counts_the_clients_of_all_nodes_and_says_which_did_not_answer() {
    let log = MemoryLog::new();
    let mut nodes = Node::start_all(&log, 3).await;
    let mut clients = Vec::new();
    for node in nodes.iter().chain(&nodes[1..]) {
        clients.push(node.connect().await);
    }
    let receipt = within_timeout(nodes[0].hub.to_all().deliver(&text("1"))).await.unwrap();
    assert_eq!((receipt.recipients, receipt.accepted()), (5, 5));
    assert_eq!((receipt.nodes_asked, receipt.nodes_answered), (3, 3));
    let to_one = within_timeout(nodes[0].hub.to(clients[1].1).deliver(&text("2"))).await.unwrap();
    assert_eq!((to_one.recipients, to_one.nodes_answered), (1, 3));
    let here = nodes[0].hub.to_all().on_this_node().deliver(&text("3")).await.unwrap();
    assert_eq!((here.recipients, here.nodes_asked, here.nodes_answered), (1, 1, 1));
    // A node that leaves is not asked any more.
    let Node { engine, .. } = nodes.remove(2);
    let _ = engine.shutdown(Duration::from_secs(1)).await;
    let mut known = nodes[0].engine.nodes().unwrap();
    within_timeout(known.wait_for(|known| known.len() == 2)).await.unwrap();
    let receipt = within_timeout(nodes[0].hub.to_all().deliver(&text("4"))).await.unwrap();
    assert_eq!((receipt.recipients, receipt.nodes_asked, receipt.nodes_answered), (3, 2, 2));
}

#[tokio::test]
async fn a_receipt_is_not_waited_for_longer_than_is_set() {
    let log = MemoryLog::new();
    let config = BackplaneConfig { answer_timeout: Duration::from_millis(50), ..config(OutagePolicy::Wait) };
    let here = Node::start(&log, 1, config).await;
    // It reads and answers nothing, but was alive a moment ago.
    let there = shardcast_backplane::ClusterLog::join(
        log.backplane(),
        shardcast::backplane::NodeId::from_bits(7),
        shardcast::backplane::Start::Tail,
        shardcast_backplane::ClusterLogConfig::default(),
    );
    let (there, mut entries) = there.await.unwrap();
    tokio::spawn(async move { while entries.next().await.is_ok() {} });
    there.append("of another release".into()).await.unwrap();
    let mut known = here.engine.nodes().unwrap();
    within_timeout(known.wait_for(|known| known.len() == 2)).await.unwrap();
    let (mut client, _) = here.connect().await;
    let receipt = within_timeout(here.hub.to_all().deliver(&text("1"))).await.unwrap();
    assert_eq!((receipt.recipients, receipt.nodes_asked, receipt.nodes_answered), (1, 2, 1));
    client.recv_texts(&["1"]).await;
    assert_eq!(here.engine.backplane_metrics().unwrap().skipped, 1);
}

#[tokio::test]
async fn while_the_broker_is_away_publishers_get_what_the_policy_says() {
    let log = MemoryLog::new();
    let patient = Node::start(&log, 1, config(OutagePolicy::Wait)).await;
    let timeout = Duration::from_millis(20);
    let hasty =
        Node::start(&log, 1, BackplaneConfig { publish_timeout: timeout, ..config(OutagePolicy::Wait) })
            .await;
    let failing = Node::start(&log, 1, config(OutagePolicy::Fail)).await;
    let alone = Node::start(&log, 1, config(OutagePolicy::ThisNode)).await;
    let nodes = [&patient, &hasty, &failing, &alone];
    let mut clients = Vec::new();
    for node in nodes {
        node.is(BackplaneState::Connected).await;
        clients.push(node.connect().await.0);
    }
    log.set_outage(true);
    for node in nodes {
        node.is(BackplaneState::Disconnected).await;
    }
    let waiting = tokio::spawn({
        let hub = patient.hub.clone();
        async move { hub.to_all().publish(&text("patient")).await }
    });
    let late = hasty.hub.to_all().publish(&text("hasty")).await;
    assert!(matches!(late, Err(PublishError::Backplane(BackplaneError::Unavailable))), "{late:?}");
    let failed = failing.hub.to_all().publish(&text("failing")).await;
    assert!(matches!(failed, Err(PublishError::Backplane(BackplaneError::Unavailable))), "{failed:?}");
    let failed = failing.hub.to_all().try_publish(&text("failing"));
    assert!(matches!(failed, Err(TryPublishError::Backplane(BackplaneError::Unavailable))), "{failed:?}");
    alone.hub.to_all().publish(&text("alone 1")).await.unwrap();
    alone.hub.to_all().try_publish(&text("alone 2")).unwrap();
    clients[3].recv_texts(&["alone 1", "alone 2"]).await;
    assert!(!waiting.is_finished());
    log.set_outage(false);
    within_timeout(waiting).await.unwrap().unwrap();
    for node in nodes {
        node.is(BackplaneState::Connected).await;
    }
    failing.hub.to_all().publish(&text("end")).await.unwrap();
    for client in &mut clients {
        // What had timed out was delivered all the same, in some order.
        let mut received = BTreeSet::new();
        for _ in 0..3 {
            received.insert(client.recv_text().await);
        }
        assert_eq!(received, BTreeSet::from([text("patient"), text("hasty"), text("end")]));
    }
}

#[tokio::test]
async fn a_node_that_starts_without_its_broker_takes_part_when_there_is_one() {
    let log = MemoryLog::new();
    log.set_outage(true);
    let here = Node::start(&log, 1, config(OutagePolicy::ThisNode)).await;
    let there = Node::start(&log, 1, config(OutagePolicy::Wait)).await;
    let (mut near, _) = here.connect().await;
    let (mut far, _) = there.connect().await;
    assert_eq!(*here.engine.backplane_state().unwrap().borrow(), BackplaneState::Joining);
    here.hub.to_all().publish(&text("alone")).await.unwrap();
    near.recv_texts(&["alone"]).await;
    let waiting = tokio::spawn({
        let hub = there.hub.clone();
        async move { hub.to_all().publish(&text("waited")).await }
    });
    log.set_outage(false);
    here.is(BackplaneState::Connected).await;
    there.is(BackplaneState::Connected).await;
    within_timeout(waiting).await.unwrap().unwrap();
    far.recv_texts(&["waited"]).await;
    here.hub.to_all().publish(&text("together")).await.unwrap();
    far.recv_texts(&["together"]).await;
}

#[tokio::test]
async fn an_exact_join_has_a_place_in_the_order_of_all_nodes() {
    let log = MemoryLog::new();
    let nodes = Node::start_all(&log, 2).await;
    let (mut client, id) = nodes[0].connect().await;
    // Read by this node late: later than the call below begins.
    log.set_faults(Faults { seed: 3, read_within: Duration::from_millis(20), ..Faults::default() });
    for round in 0..10 {
        nodes[1].hub.to_group("group").publish(&text("before")).await.unwrap();
        within_timeout(nodes[0].hub.join_exactly(id, "group")).await.unwrap();
        nodes[1].hub.to_group("group").publish(&format!("after {round}")).await.unwrap();
        client.recv_texts(&[&format!("after {round}")]).await;
        nodes[0].hub.leave(id, "group").await.unwrap();
    }
}

/// Tells what it has missed. Stateful, which passes everything on.
struct Missing;

static MISSED: Mutex<Vec<MissedCause>> = Mutex::new(Vec::new());

impl StatefulHub for Missing {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&mut self, _: String, _: HubContext<Stateful<Self>>) {}

    async fn on_gap(_: &Clients<String>, missed: MissedMessages) {
        MISSED.lock().unwrap().push(missed.cause);
    }
}

#[tokio::test]
async fn a_hub_is_told_of_what_its_node_has_missed_and_nothing_arrives_twice() {
    let log = MemoryLog::new();
    let here = Node::start(&log, 1, config(OutagePolicy::Wait)).await;
    let _missing = here.engine.hub::<Stateful<Missing>>(WsHubConfig::default()).unwrap();
    let there = Node::start(&log, 1, config(OutagePolicy::Wait)).await;
    here.is(BackplaneState::Connected).await;
    there.is(BackplaneState::Connected).await;
    let (mut client, _) = here.connect().await;
    there.hub.to_all().publish(&text("1")).await.unwrap();
    client.recv_texts(&["1"]).await;
    log.lose(1000);
    eventually(vec![MissedCause::BrokerLoss], || MISSED.lock().unwrap().clone()).await;
    there.hub.to_all().publish(&text("2")).await.unwrap();
    client.recv_texts(&["2"]).await;
    assert_eq!(here.engine.backplane_metrics().unwrap().gaps, 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_has_stopped_reading_delays_the_publishers_of_its_own_node_only() {
    let log = MemoryLog::new();
    let nodes = Node::start_all(&log, 2).await;
    let (stalled, reading) = (&nodes[0], &nodes[1]);
    let _silent = RawClient::connect_narrow(&stalled.server).await; // it never reads
    let (mut client, _) = reading.connect().await;
    let (mut neighbour, neighbour_id) = stalled.connect().await;
    eventually(2, || stalled.hub.this_node().len()).await;
    let big = "x".repeat(60_000);
    // Until nothing more has room in the outbox of the client that does not read.
    while stalled.engine.metrics().pending_bytes < WsHubConfig::default().outbox_bytes as u64 {
        within_timeout(reading.hub.to_all().publish(&big)).await.unwrap();
        assert_eq!(client.recv_text().await.len(), big.len());
        assert_eq!(neighbour.recv_text().await.len(), big.len());
    }
    let one = stalled.hub.to_all().policy(BroadcastPolicy::Block).unwrap();
    let mut blocked = Box::pin(one.publish(&big));
    // Its own node's publisher waits, but the message has left for the other one.
    tokio::select! {
        biased;
        result = &mut blocked => panic!("{result:?}, although its client does not read"),
        received = client.recv_text() => assert_eq!(received.len(), big.len()),
    }
    assert_eq!(neighbour.recv_text().await.len(), big.len());
    within_timeout(reading.hub.to(neighbour_id).publish(&text("read on"))).await.unwrap();
    neighbour.recv_texts(&["read on"]).await;
}

#[tokio::test]
async fn hubs_of_one_type_belong_together_by_their_order_and_names() {
    let log = MemoryLog::new();
    let engines = [join(&log, 1, config(OutagePolicy::Wait)), join(&log, 1, config(OutagePolicy::Wait))];
    let mut servers = Vec::new();
    for engine in &engines {
        for name in ["a", "b", "a"] {
            let hub = engine.hub_named::<CommandHub>(name, WsHubConfig::default()).unwrap();
            servers.push(Server::start(command_app(hub)).await);
        }
    }
    let mut clients = Vec::new();
    for server in &servers {
        clients.push(connect(&server.url("/ws")).await.0);
    }
    for (number, client) in clients.iter_mut().take(3).enumerate() {
        client.send_text(format!("all {number}")).await;
    }
    for (index, client) in clients.iter_mut().enumerate() {
        client.recv_texts(&[&(index % 3).to_string()]).await;
    }
}

#[tokio::test]
async fn an_engine_has_one_backplane_whose_settings_are_in_range() {
    let (log, engine) = (MemoryLog::new(), engine(1));
    let connect = move || {
        let log = log.clone();
        async move { Ok(log.backplane()) }
    };
    let wrong = BackplaneConfig { node_timeout: Duration::from_secs(2), ..BackplaneConfig::default() };
    match engine.backplane(connect.clone(), wrong) {
        Err(BackplaneStartError::Config(error)) => assert_eq!(error.field, "node_timeout"),
        other => panic!("{other:?}"),
    }
    assert!(engine.node().is_none() && engine.backplane_metrics().is_none());
    engine.backplane(connect.clone(), BackplaneConfig::default()).unwrap();
    let again = engine.backplane(connect, BackplaneConfig::default());
    assert!(matches!(again, Err(BackplaneStartError::AlreadySet)), "{again:?}");
    let (outside, log) = (self::engine(1), MemoryLog::new());
    let started = std::thread::spawn(move || {
        outside
            .backplane(move || ready(Ok(log.backplane())), BackplaneConfig::default())
            .map_err(|error| error.to_string())
    });
    assert!(started.join().unwrap().is_err_and(|error| error.contains("tokio")));
}
