//! Presence over several nodes: hubs of several engines in one process, over a log in memory.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeMap;
use std::future::ready;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, State};
use axum::routing::any;
use shardcast::backplane::memory::{Faults, MemoryLog};
use shardcast::backplane::{BackplaneConfig, BackplaneState};
use shardcast::{
    Clients, Engine, Hub, HubContext, PresenceChange, PresenceEvent, PresenceKind, RawCodec, Refusal, Serve,
    WebSocketUpgrade, WsHub, WsHubConfig,
};
use testkit_hub::{Client, Server, engine, eventually, within_timeout};

/// Everybody is in one room, and the room is told who comes and goes.
struct Room;

impl WsHub for Room {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.add_to_group("room").await;
        Ok(())
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        ctx.broadcast(text).await;
    }

    async fn on_presence(clients: &Clients<String>, change: PresenceChange) {
        if change.group.is_some() {
            let verb = if change.kind == PresenceKind::Joined { "joined" } else { "left" };
            clients.to_group("room").publish(&format!("{} {verb}", change.user)).await.unwrap();
        }
    }
}

async fn enter(ws: WebSocketUpgrade, Path(user): Path<String>, State(hub): State<Hub<Room>>) -> Serve<Room> {
    match &*user {
        "nobody" => ws.serve(&hub, Room),
        _ => ws.serve(&hub, Room).user(user).metadata("here"),
    }
}

struct Node {
    engine: Engine,
    hub: Hub<Room>,
    server: Server,
}

impl Node {
    async fn start(log: &MemoryLog, absent_users_timeout: Duration) -> Self {
        let (engine, log) = (engine(1), log.clone());
        let config = BackplaneConfig {
            heartbeat_interval: Duration::from_millis(100),
            node_timeout: Duration::from_secs(1),
            absent_users_timeout,
            ..BackplaneConfig::default()
        };
        engine.backplane(move || ready(Ok(log.backplane())), config).unwrap();
        let config = WsHubConfig { presence_grace: Duration::ZERO, ..WsHubConfig::default() };
        let hub = engine.hub::<Room>(config).unwrap();
        let app = Router::new().route("/{user}", any(enter)).with_state(hub.clone());
        let server = Server::start(app).await;
        Self { engine, hub, server }
    }

    /// Two nodes, which know each other, with a client each that is in the room and no user.
    async fn start_two(log: &MemoryLog, absent_users_timeout: Duration) -> ([Self; 2], [Client; 2]) {
        let nodes =
            [Self::start(log, absent_users_timeout).await, Self::start(log, absent_users_timeout).await];
        for node in &nodes {
            node.knows(2).await;
        }
        let listeners = [nodes[0].connect("nobody").await, nodes[1].connect("nobody").await];
        for node in &nodes {
            eventually(1, || node.hub.this_node().group_len("room")).await;
        }
        (nodes, listeners)
    }

    async fn connect(&self, user: &str) -> Client {
        Client::connect(self.server.url(&format!("/{user}"))).await
    }

    async fn knows(&self, nodes: usize) {
        let mut known = self.engine.nodes().unwrap();
        within_timeout(known.wait_for(|known| known.len() == nodes)).await.unwrap();
    }

    /// The users in the room, each with the number of connections here and nodes elsewhere.
    async fn present(&self) -> BTreeMap<String, usize> {
        let present = self.hub.presence("room").await.unwrap();
        present.into_iter().map(|present| (present.user.to_string(), present.connections)).collect()
    }

    /// Waits until these are present.
    async fn shows(&self, users: &[(&str, usize)]) {
        let expected: BTreeMap<_, _> =
            users.iter().map(|(user, count)| ((*user).to_owned(), *count)).collect();
        within_timeout(async {
            while self.present().await != expected {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        })
        .await;
    }
}

/// What each listener receives until everything that has happened so far was announced.
async fn announced(hub: &Hub<Room>, listeners: &mut [Client]) -> Vec<String> {
    hub.to_all().publish(&"---".to_owned()).await.unwrap();
    let mut heard = Vec::new();
    for listener in listeners {
        let mut texts = Vec::new();
        loop {
            match listener.recv_text().await {
                text if text == "---" => break,
                text => texts.push(text),
            }
        }
        heard.push(texts);
    }
    assert!(heard.iter().all(|texts| *texts == heard[0]), "{heard:?}");
    heard.remove(0)
}

async fn hears(listeners: &mut [Client], text: &str) {
    for listener in listeners {
        listener.recv_texts(&[text]).await;
    }
}

#[tokio::test]
async fn a_user_joins_with_the_first_node_and_leaves_with_the_last_and_everybody_is_told_once() {
    let ([a, b], mut listeners) = Node::start_two(&MemoryLog::new(), Duration::ZERO).await;
    let on_a = a.connect("ada").await;
    hears(&mut listeners, "ada joined").await;
    let on_b = b.connect("ada").await;
    a.shows(&[("ada", 2)]).await;
    b.shows(&[("ada", 2)]).await;
    assert_eq!((a.hub.presence_len("room"), b.hub.presence_len("room")), (1, 1));
    assert!(announced(&a.hub, &mut listeners).await.is_empty(), "she was there");
    on_a.leave().await;
    a.shows(&[("ada", 1)]).await;
    b.shows(&[("ada", 1)]).await;
    assert!(announced(&b.hub, &mut listeners).await.is_empty(), "she is still there");
    on_b.leave().await;
    hears(&mut listeners, "ada left").await;
    a.shows(&[]).await;
    b.shows(&[]).await;
    assert!(announced(&a.hub, &mut listeners).await.is_empty());
}

#[tokio::test]
async fn a_node_that_begins_later_knows_who_is_present_and_announces_nobody_again() {
    let log = MemoryLog::new();
    let ([a, b], mut listeners) = Node::start_two(&log, Duration::ZERO).await;
    let _ada = a.connect("ada").await;
    hears(&mut listeners, "ada joined").await;
    let _bob = b.connect("bob").await;
    hears(&mut listeners, "bob joined").await;
    // It has a client of hers before it can hear of her.
    log.set_outage(true);
    let c = Node::start(&log, Duration::ZERO).await;
    let mut changes = c.hub.presence_changes();
    let _also_ada = c.connect("ada").await;
    eventually(1, || c.hub.this_node().group_len("room")).await;
    // The others' answers take their time.
    log.set_faults(Faults { seed: 1, read_within: Duration::from_millis(50), ..Faults::default() });
    log.set_outage(false);
    let mut state = c.engine.backplane_state().unwrap();
    within_timeout(state.wait_for(|state| *state == BackplaneState::Connected)).await.unwrap();
    let at_once = c.present().await;
    assert_eq!(
        at_once,
        BTreeMap::from([("ada".to_owned(), 2), ("bob".to_owned(), 1)]),
        "it waits for the others"
    );
    log.set_faults(Faults::default());
    a.shows(&[("ada", 2), ("bob", 1)]).await;
    assert!(announced(&c.hub, &mut listeners).await.is_empty(), "they were there");
    let mut users = Vec::new();
    while users.len() < 2 {
        match within_timeout(changes.next()).await {
            Some(PresenceEvent::Change(change)) if change.group.is_some() => {
                users.push(change.user.to_string())
            }
            Some(PresenceEvent::Change(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    users.sort();
    assert_eq!(users, ["ada", "bob"], "its streams are told of everybody once");
    let present = c.hub.presence("room").await.unwrap();
    assert!(
        present
            .iter()
            .all(|present| present.metadata.as_ref().is_some_and(|text| text.as_json() == "\"here\""))
    );
}

#[tokio::test]
async fn users_of_a_node_that_leaves_have_time_to_come_back_on_another_one() {
    let ([a, b], [listener_a, listener_b]) = Node::start_two(&MemoryLog::new(), Duration::from_secs(1)).await;
    let mut listeners = [listener_b];
    let _ada = a.connect("ada").await;
    hears(&mut listeners, "ada joined").await;
    let _bob = a.connect("bob").await;
    hears(&mut listeners, "bob joined").await;
    drop(listener_a);
    let _ = a.engine.shutdown(Duration::from_secs(1)).await;
    b.knows(1).await;
    b.shows(&[("ada", 1), ("bob", 1)]).await;
    let _ada = b.connect("ada").await;
    hears(&mut listeners, "bob left").await;
    b.shows(&[("ada", 1)]).await;
    assert!(announced(&b.hub, &mut listeners).await.is_empty(), "ada has neither left nor joined");
}

#[test]
fn users_of_a_node_that_dies_leave_once() {
    let runtime =
        || tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (surviving, dying, log) = (runtime(), runtime(), MemoryLog::new());
    let (a, b, mut listeners) = surviving.block_on(async {
        let ([a, b], listeners) = Node::start_two(&log, Duration::ZERO).await;
        (a, b, listeners)
    });
    let c = dying.block_on(Node::start(&log, Duration::ZERO));
    surviving.block_on(async {
        for node in [&a, &b, &c] {
            node.knows(3).await;
        }
        let _ada = c.connect("ada").await;
        hears(&mut listeners, "ada joined").await;
        dying.shutdown_background(); // with its tasks, without a word
        hears(&mut listeners, "ada left").await;
        for node in [&a, &b] {
            node.knows(2).await;
            node.shows(&[]).await;
        }
        assert!(announced(&a.hub, &mut listeners).await.is_empty(), "she has left once");
    });
}

#[test]
fn a_node_that_has_missed_a_part_of_the_log_asks_who_is_present() {
    let driven = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let (paused, log) =
        (tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap(), MemoryLog::new());
    let a = driven.block_on(Node::start(&log, Duration::ZERO));
    let b = paused.block_on(Node::start(&log, Duration::ZERO));
    let (mut listener, ada) = driven.block_on(async { (a.connect("nobody").await, a.connect("ada").await) });
    paused.block_on(b.shows(&[("ada", 1)]));
    // From here on it reads nothing.
    let _bob = driven.block_on(async {
        listener.recv_texts(&["ada joined"]).await;
        let bob = a.connect("bob").await;
        listener.recv_texts(&["bob joined"]).await;
        ada.leave().await;
        listener.recv_texts(&["ada left"]).await;
        bob
    });
    log.truncate(0);
    paused.block_on(async {
        b.shows(&[("bob", 1)]).await;
        assert_eq!(b.engine.backplane_metrics().unwrap().gaps, 1);
    });
}

#[tokio::test]
async fn presence_is_the_truth_again_after_the_broker_has_lost_a_part_of_the_log() {
    let log = MemoryLog::new();
    let ([a, b], mut listeners) = Node::start_two(&log, Duration::ZERO).await;
    let ada = a.connect("ada").await;
    hears(&mut listeners, "ada joined").await;
    log.set_outage(true);
    for node in [&a, &b] {
        let mut state = node.engine.backplane_state().unwrap();
        within_timeout(state.wait_for(|state| *state == BackplaneState::Disconnected)).await.unwrap();
    }
    let _bob = b.connect("bob").await;
    ada.leave().await;
    eventually(1, || a.hub.this_node().group_len("room")).await;
    log.lose(1000);
    log.set_outage(false);
    for node in [&a, &b] {
        node.shows(&[("bob", 1)]).await;
        eventually(1, || node.hub.presence_len("room")).await;
    }
    let mut told = announced(&a.hub, &mut listeners).await;
    told.sort();
    assert_eq!(told, ["ada left", "bob joined"]);
}

/// What a node counts: clients; groups with their members and users; users with their clients.
type Counted = (usize, Vec<(String, usize, usize)>, Vec<(String, usize)>);

fn counted(hub: &Hub<Room>) -> Counted {
    let groups =
        hub.groups().into_iter().map(|group| (group.name.to_string(), group.connections, group.users));
    let mut groups: Vec<_> = groups.collect();
    groups.sort();
    let mut users: Vec<_> = hub.users().into_iter().map(|(user, count)| (user.to_string(), count)).collect();
    users.sort();
    assert_eq!((hub.group_count(), hub.user_count()), (groups.len(), users.len()));
    (hub.len(), groups, users)
}

/// Everybody in the room, which has so many members, and the users with their clients.
fn in_room(clients: usize, users: &[(&str, usize)]) -> Counted {
    let by_user = users.iter().map(|(user, count)| ((*user).to_owned(), *count)).collect();
    (clients, vec![("room".to_owned(), clients, users.len())], by_user)
}

#[tokio::test]
async fn clients_groups_and_users_are_counted_over_all_nodes() {
    let log = MemoryLog::new();
    let ([a, b], _listeners) = Node::start_two(&log, Duration::ZERO).await;
    let (_ada, also_ada, bob) = (a.connect("ada").await, b.connect("ada").await, b.connect("bob").await);
    for node in [&a, &b] {
        eventually(in_room(5, &[("ada", 2), ("bob", 1)]), || counted(&node.hub)).await;
    }
    assert_eq!((a.hub.group_len("room"), a.hub.user_len("ada"), a.hub.user_len("bob")), (5, 2, 1));
    let here = a.hub.this_node();
    assert_eq!(
        (here.len(), here.group_len("room"), here.user_len("ada"), here.user_len("bob")),
        (2, 2, 1, 0)
    );
    let node = a.hub.to_all().members().await.unwrap();
    let of_bob = *node.iter().find(|id| id.node() == b.engine.node()).unwrap();
    a.hub.join(of_bob, "elsewhere").await.unwrap();
    eventually(1, || a.hub.group_len("elsewhere")).await;
    assert_eq!(a.hub.this_node().group_count(), 1);
    a.hub.leave(of_bob, "elsewhere").await.unwrap();
    bob.leave().await;
    also_ada.leave().await;
    for node in [&a, &b] {
        eventually(in_room(3, &[("ada", 1)]), || counted(&node.hub)).await;
    }
    // A node that begins later, and one that ends.
    let c = Node::start(&log, Duration::ZERO).await;
    let _cyd = c.connect("cyd").await;
    for node in [&a, &b, &c] {
        eventually(in_room(4, &[("ada", 1), ("cyd", 1)]), || counted(&node.hub)).await;
    }
    let _ = a.engine.shutdown(Duration::from_secs(1)).await;
    for node in [&b, &c] {
        eventually(in_room(2, &[("cyd", 1)]), || counted(&node.hub)).await;
    }
}

#[tokio::test]
async fn metadata_that_changes_is_shown_by_all_nodes() {
    let ([a, b], mut listeners) = Node::start_two(&MemoryLog::new(), Duration::ZERO).await;
    let _ada = a.connect("ada").await;
    hears(&mut listeners, "ada joined").await;
    let id = b.hub.to_user("ada").members().await.unwrap()[0];
    let shown = async |node: &Node| {
        let present = node.hub.presence("room").await.unwrap();
        present.first().map(|ada| ada.metadata.as_ref().unwrap().get::<String>().unwrap())
    };
    // By its own node, and by another one.
    for (by, text) in [(&a, "away"), (&b, "back")] {
        by.hub.set_metadata(id, text).await.unwrap();
        for node in [&a, &b] {
            within_timeout(async {
                while shown(node).await.as_deref() != Some(text) {
                    tokio::time::sleep(Duration::from_millis(5)).await;
                }
            })
            .await;
        }
    }
    assert!(announced(&a.hub, &mut listeners).await.is_empty(), "she has neither left nor joined");
}
