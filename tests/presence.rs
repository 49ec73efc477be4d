//! Users and presence over real sockets: the tutorial's rooms, tabs, reloads, limits.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::collections::VecDeque;
use std::time::Duration;

use axum::Router;
use axum::extract::{Path, Query, State};
use axum::routing::any;
use serde::{Deserialize, Serialize};
use shardcast::{
    Clients, CloseCode, Engine, Hub, HubContext, JsonCodec, PresenceChange, PresenceEvent, PresenceKind,
    Refusal, Serve, Stateful, StatefulHub, USER_NAME_BYTES_MAX, UserLimit, WebSocketUpgrade, WsHub,
    WsHubConfig,
};
use testkit_hub::{Client, Server, engine, eventually, within_timeout};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

/// A second passes on a busy machine before a page has reloaded.
const GRACE: Duration = Duration::from_secs(20);

// ---- the tutorial's rooms

/// A connection in a room.
struct Rooms {
    room: String,
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Said {
    System { content: String },
    Message { username: String, content: String },
    Here { users: Vec<shardcast::Present> },
}

impl WsHub for Rooms {
    type Codec = JsonCodec;
    type InMessage = String;
    type OutMessage = Said;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.add_to_group(&self.room).await;
        let users = ctx.clients().presence(&self.room).await.unwrap_or_default();
        ctx.unicast(Said::Here { users }).await;
        Ok(())
    }

    async fn on_message(&self, content: String, ctx: HubContext<Self>) {
        let username = ctx.user().map(ToString::to_string).unwrap_or_default();
        match content.strip_prefix("/status ") {
            Some(status) => ctx.set_metadata(status).await,
            None => ctx.broadcast_group(&self.room, Said::Message { username, content }).await,
        }
    }

    async fn on_presence(clients: &Clients<Said>, change: PresenceChange) {
        let Some(room) = &change.group else { return };
        let verb = if change.kind == PresenceKind::Joined { "joined" } else { "left" };
        let content = format!("{} {verb} the room", change.user);
        assert_ne!(&*change.user, "panic", "on request");
        let _ = clients.to_group(room).publish(&Said::System { content }).await;
    }
}

async fn enter(
    ws: WebSocketUpgrade,
    Path((room, user)): Path<(String, String)>,
    State(rooms): State<Hub<Rooms>>,
) -> Serve<Rooms> {
    ws.serve(&rooms, Rooms { room }).user(user).metadata("new")
}

struct Chat {
    hub: Hub<Rooms>,
    server: Server,
    /// Keeps the shards running.
    _engine: Engine,
}

impl Chat {
    async fn start(config: WsHubConfig) -> Self {
        let engine = engine(2);
        let hub = engine.hub::<Rooms>(config).unwrap();
        let app = Router::new().route("/ws/{room}/{user}", any(enter)).with_state(hub.clone());
        Self { hub, server: Server::start(app).await, _engine: engine }
    }

    /// Connects, and returns the users that the client is shown.
    async fn enter(&self, room: &str, user: &str) -> (Tab, serde_json::Value) {
        let client = Client::connect(self.server.url(&format!("/ws/{room}/{user}"))).await;
        let (mut tab, mut early) = (Tab { client, early: VecDeque::new() }, VecDeque::new());
        // What is sent to the room may come first.
        loop {
            let text = tab.next().await;
            let said: serde_json::Value = serde_json::from_str(&text).unwrap();
            if said["type"] == "here" {
                tab.early = early;
                return (tab, said["users"].clone());
            }
            early.push_back(text);
        }
    }
}

/// One page of a user.
struct Tab {
    client: Client,
    /// What it has received before the list of users.
    early: VecDeque<String>,
}

impl Tab {
    async fn next(&mut self) -> String {
        match self.early.pop_front() {
            Some(text) => text,
            None => self.client.recv_text().await,
        }
    }

    /// The next announcement.
    async fn announcement(&mut self) -> String {
        let said: serde_json::Value = serde_json::from_str(&self.next().await).unwrap();
        assert_eq!(said["type"], "system", "{said}");
        said["content"].as_str().unwrap().to_owned()
    }

    async fn say(&mut self, text: &str) {
        self.client.send_text(serde_json::to_string(text).unwrap()).await;
    }

    /// Reads until a message contains the text.
    async fn hear(&mut self, text: &str) {
        while !self.next().await.contains(text) {}
    }
}

fn config(grace: Duration, limit: Option<UserLimit>) -> WsHubConfig {
    WsHubConfig { presence_grace: grace, max_connections_per_user: limit, ..WsHubConfig::default() }
}

#[tokio::test]
async fn a_room_is_told_once_that_a_user_has_joined_and_left() {
    let chat = Chat::start(config(Duration::ZERO, None)).await;
    let (mut bob, _) = chat.enter("den", "bob").await;
    assert_eq!(bob.announcement().await, "bob joined the room");
    let (first, _) = chat.enter("den", "ada").await;
    assert_eq!(bob.announcement().await, "ada joined the room");
    let (mut second, users) = chat.enter("den", "ada").await;
    let mut users: Vec<_> = users.as_array().unwrap().iter().collect();
    users.sort_by_key(|user| user["user"].as_str());
    assert_eq!((users[0]["user"].as_str(), users[0]["connections"].as_u64()), (Some("ada"), Some(2)));
    assert_eq!((users[1]["user"].as_str(), users[1]["metadata"].as_str()), (Some("bob"), Some("new")));
    assert!(users[0]["since"].as_u64().unwrap() > 1_700_000_000_000, "milliseconds since 1970");
    let (_elsewhere, _) = chat.enter("attic", "ada").await;
    drop(first);
    eventually(1, || chat.hub.group_len("den") - 1).await;
    second.say("still here").await;
    let text = bob.next().await;
    assert!(text.contains("still here"), "nothing was announced of one of two tabs: {text}");
    drop(second);
    assert_eq!(bob.announcement().await, "ada left the room");
    let groups = chat.hub.groups();
    let den = groups.iter().find(|group| &*group.name == "den").unwrap();
    assert_eq!((groups.len(), den.connections, den.users), (2, 1, 1));
}

#[tokio::test]
async fn a_page_that_is_reloaded_has_neither_left_nor_joined() {
    let chat = Chat::start(config(GRACE, None)).await;
    let (mut bob, _) = chat.enter("den", "bob").await;
    assert_eq!(bob.announcement().await, "bob joined the room");
    let (mut ada, _) = chat.enter("den", "ada").await;
    assert_eq!(bob.announcement().await, "ada joined the room");
    for round in 0..3 {
        drop(ada);
        eventually(1, || chat.hub.group_len("den")).await;
        assert_eq!(chat.hub.presence_len("den"), 2, "ada may come back");
        (ada, _) = chat.enter("den", "ada").await;
        ada.say(&format!("back {round}")).await;
        let text = bob.next().await;
        assert!(text.contains(&format!("back {round}")), "{text}");
    }
    assert_eq!(chat.hub.presence_len("den"), 2);
}

#[tokio::test]
async fn metadata_can_change_while_a_user_is_present() {
    let chat = Chat::start(config(Duration::ZERO, None)).await;
    let (mut ada, users) = chat.enter("den", "ada").await;
    assert_eq!(users[0]["metadata"], "new");
    ada.say("/status away").await;
    within_timeout(async {
        loop {
            let present = chat.hub.presence("den").await.unwrap();
            if present[0].metadata.as_ref().unwrap().get::<String>().unwrap() == "away" {
                return;
            }
        }
    })
    .await;
    assert_eq!(
        chat.hub.clients().presence_of_all().await.unwrap()[0].metadata.as_ref().unwrap().as_json(),
        "\"away\""
    );
}

#[tokio::test]
async fn all_tabs_of_a_user_are_reached_and_ended_by_the_name() {
    let chat = Chat::start(config(Duration::ZERO, None)).await;
    let (mut bob, _) = chat.enter("den", "bob").await;
    let mut tabs = [chat.enter("den", "ada").await.0, chat.enter("attic", "ada").await.0];
    eventually(2, || chat.hub.user_len("ada")).await;
    let receipt = chat.hub.to_user("ada").deliver(&Said::System { content: "for ada".into() }).await.unwrap();
    assert_eq!(receipt.accepted(), 2);
    let receipt = chat.hub.to_users(&["ada", "bob"]).deliver(&Said::System { content: "both".into() }).await;
    assert_eq!(receipt.unwrap().accepted(), 3);
    assert_eq!(chat.hub.to_user("ada").members().await.unwrap().len(), 2);
    assert_eq!(chat.hub.to_user("ada").metrics().await.unwrap().connections, 2);
    chat.hub.to_user("ada").disconnect(CloseCode(4001), "banned").await.unwrap();
    for tab in &mut tabs {
        while let Some(message) = tab.client.recv().await {
            if let Message::Close(frame) = message {
                assert_eq!(frame.map(|frame| u16::from(frame.code)), Some(4001));
                break;
            }
        }
    }
    eventually(0, || chat.hub.user_len("ada")).await;
    bob.say("alone").await;
    eventually(vec![("bob".into(), 1)], || chat.hub.users()).await;
}

#[tokio::test]
async fn a_hook_that_panics_is_called_for_the_next_change() {
    let chat = Chat::start(config(Duration::ZERO, None)).await;
    let (mut bob, _) = chat.enter("den", "bob").await;
    assert_eq!(bob.announcement().await, "bob joined the room");
    let (_panics, _) = chat.enter("den", "panic").await;
    let (_ada, _) = chat.enter("den", "ada").await;
    assert_eq!(bob.announcement().await, "ada joined the room");
}

// ---- limits

async fn close_frame(client: &mut Client) -> CloseFrame {
    loop {
        match client.recv().await {
            Some(Message::Close(Some(frame))) => return frame,
            Some(Message::Text(_)) => {}
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn one_connection_too_many_is_refused_with_the_reason() {
    let chat = Chat::start(config(GRACE, Some(UserLimit::OldestStays(2)))).await;
    let (mut first, _) = chat.enter("den", "ada").await;
    let _second = chat.enter("den", "ada").await;
    let _other = chat.enter("den", "bob").await;
    let mut third = Client::connect(chat.server.url("/ws/den/ada")).await;
    let frame = close_frame(&mut third).await;
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (1008, "too many connections of this user"));
    assert_eq!(chat.hub.user_len("ada"), 2);
    first.say("still connected").await;
    first.hear("still connected").await;
}

#[tokio::test]
async fn the_oldest_connection_is_replaced_and_not_invited_to_return() {
    let chat = Chat::start(config(GRACE, Some(UserLimit::NewestWins(1)))).await;
    let (mut first, _) = chat.enter("den", "ada").await;
    let (mut second, _) = chat.enter("den", "ada").await;
    let frame = close_frame(&mut first.client).await;
    assert_eq!((u16::from(frame.code), frame.reason.as_str()), (1008, "replaced by a newer connection"));
    assert!(!CloseCode(1008).should_reconnect());
    eventually(1, || chat.hub.user_len("ada")).await;
    second.say("the newest").await;
    second.hear("the newest").await;
    let receipt = chat.hub.to_user("ada").deliver(&Said::System { content: "one".into() }).await.unwrap();
    assert_eq!(receipt.accepted(), 1);
}

#[tokio::test]
async fn a_name_that_is_too_long_is_refused_before_the_upgrade() {
    let chat = Chat::start(config(GRACE, None)).await;
    let name = "a".repeat(USER_NAME_BYTES_MAX + 1);
    let refused = Client::try_connect(chat.server.url(&format!("/ws/den/{name}")), &[]).await.unwrap_err();
    assert!(refused.to_string().contains("400"), "{refused}");
    assert_eq!((chat.hub.len(), chat.hub.clients().user_count()), (0, 0));
}

// ---- streams, and other forms

#[derive(Deserialize)]
struct Visitor {
    user: Option<String>,
}

/// Counts what it was sent, and has no use for presence.
#[derive(Default)]
struct Counter {
    count: usize,
}

impl StatefulHub for Counter {
    type Codec = JsonCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_message(&mut self, group: String, ctx: HubContext<Stateful<Self>>) {
        self.count += 1;
        ctx.add_to_group(&group).await;
        ctx.unicast(format!("{} {:?}", self.count, ctx.user())).await;
    }
}

async fn open(
    ws: WebSocketUpgrade,
    Query(visitor): Query<Visitor>,
    State(hub): State<Hub<Stateful<Counter>>>,
) -> axum::response::Response {
    ws.on_upgrade(move |socket| async move {
        let served = match visitor.user {
            Some(user) => hub.serve_as(socket, Counter::default(), user).await,
            None => hub.serve(socket, Counter::default()).await,
        };
        served.unwrap();
    })
}

async fn next(changes: &mut shardcast::PresenceChanges) -> (Option<String>, String, PresenceKind) {
    match within_timeout(changes.next()).await {
        Some(PresenceEvent::Change(change)) => {
            (change.group.map(|group| group.to_string()), change.user.to_string(), change.kind)
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_task_follows_the_changes_of_a_hub_until_it_ends() {
    let engine = engine(2);
    let hub = engine.hub::<Stateful<Counter>>(config(Duration::ZERO, None)).unwrap();
    let mut changes = hub.presence_changes();
    let server = Server::start(Router::new().route("/ws", any(open)).with_state(hub.clone())).await;
    let mut nobody = Client::connect(server.url("/ws")).await;
    nobody.send_text("\"room\"").await;
    assert_eq!(nobody.recv_text().await, "\"1 None\"");
    let mut ada = Client::connect(server.url("/ws?user=ada")).await;
    assert_eq!(next(&mut changes).await, (None, "ada".into(), PresenceKind::Joined));
    ada.send_text("\"room\"").await;
    assert_eq!(next(&mut changes).await, (Some("room".into()), "ada".into(), PresenceKind::Joined));
    assert_eq!(ada.recv_text().await, "\"1 Some(\\\"ada\\\")\"");
    drop(ada);
    let mut left = [next(&mut changes).await, next(&mut changes).await];
    left.sort();
    assert_eq!(left[0], (None, "ada".into(), PresenceKind::Left));
    assert_eq!(left[1], (Some("room".into()), "ada".into(), PresenceKind::Left));
    drop(nobody);
    eventually(0, || hub.len()).await;
    server.stop().await;
    drop(hub);
    drop(engine);
    assert_eq!(within_timeout(changes.next()).await, None, "nothing keeps the hub");
}

#[tokio::test]
async fn a_stream_that_is_not_read_says_how_many_changes_it_has_lost() {
    let engine = engine(1);
    let hub = engine.hub::<Stateful<Counter>>(config(Duration::ZERO, None)).unwrap();
    let (mut slow, mut quick) = (hub.presence_changes(), hub.presence_changes());
    let server = Server::start(Router::new().route("/ws", any(open)).with_state(hub.clone())).await;
    let mut ada = Client::connect(server.url("/ws?user=ada")).await;
    next(&mut quick).await;
    let count = 1200;
    for group in 0..count {
        ada.send_text(format!("\"{group}\"")).await;
        ada.recv_text().await;
        assert_eq!(next(&mut quick).await.0, Some(group.to_string()));
    }
    let gap = within_timeout(slow.next()).await.unwrap();
    let PresenceEvent::Gap { missed } = gap else { panic!("{gap:?}") };
    assert_eq!(missed, count + 1 - 1024);
    assert_eq!(next(&mut slow).await.0, Some((missed - 1).to_string()), "the oldest that is kept");
}
