//! The chat page in a real browser: the README's first command, as a user sees it.
//!
//! Headless Chromium, driven over WebDriver. The rest of the suite speaks the protocol itself; only a browser shows that
//! a browser agrees with us about upgrades, close codes and reconnects. No step sleeps for a time that should be long
//! enough: each polls what the page shows until it is as expected, or fails with what was shown last. Where something
//! must *not* happen, a later event that does proves it.
//!
//! A missing Chromium is a failure, never a skip: `ci/install-browser` installs it.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fantoccini::key::Key;
use fantoccini::wd::{Capabilities, WindowHandle};
use fantoccini::{Client, ClientBuilder, Locator};
use futures_util::{SinkExt, StreamExt};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
#[cfg(feature = "client")]
use shardcast::client::{ClientState, ReconnectPolicy};
use testkit_hub::program::Running;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{Mutex, MutexGuard, watch};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

/// Fails a test whose step does not come to an end.
async fn within_timeout<F: Future>(future: F) -> F::Output {
    tokio::time::timeout(TEST_TIMEOUT, future).await.expect("the step takes too long")
}

/// How long a step may take on a busy machine before it counts as never.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_EVERY: Duration = Duration::from_millis(25);

// What the page shows, as scripts that return it.
const STATE: &str = "return document.querySelector('#status').dataset.state";
const MEMBERS: &str = "return [...document.querySelectorAll('#members li')].map(m => m.dataset.name).sort()";
const SAID: &str = "return [...document.querySelectorAll('#messages li[data-kind=said]')]
    .map(line => [line.dataset.name, line.querySelector('.text').textContent])";
const MEMBER_COUNT: &str = "return document.querySelectorAll('#members li').length";
const LAST_SAID: &str =
    "return [...document.querySelectorAll('#messages li[data-kind=said] .text')].pop()?.textContent";
const NOTICES: &str = "return [...document.querySelectorAll('#messages li[data-kind=notice] .text')]
    .map(text => text.textContent)";

#[tokio::test]
async fn two_tabs_in_one_room_talk_and_another_room_does_not_receive_it() {
    let server = Server::start(0).await;
    let browser = Browser::start().await;
    let ada = browser.tab(&server.url).await;
    let bob = browser.tab(&server.url).await;
    let cyd = browser.tab(&server.url).await;

    ada.enter("Ada", "lobby").await;
    cyd.enter("Cyd", "garden").await;
    bob.enter("Bob", "lobby").await;
    for tab in [&ada, &bob] {
        tab.shows(MEMBERS, json!(["Ada", "Bob"])).await;
    }
    ada.shows(NOTICES, json!(["You joined as Ada", "Bob joined"])).await;
    bob.shows(NOTICES, json!(["You joined as Bob"])).await;

    let markup = "<img src=x onerror=document.body.remove()> is text";
    ada.say("hello, Bob").await;
    bob.shows(SAID, json!([["Ada", "hello, Bob"]])).await;
    bob.say(markup).await;
    for tab in [&ada, &bob] {
        tab.shows(SAID, json!([["Ada", "hello, Bob"], ["Bob", markup]])).await;
    }
    let times = "return [...document.querySelectorAll('#messages time')]
        .every(time => /^\\d\\d:\\d\\d$/.test(time.textContent) && /\\d{4}/.test(time.title))";
    ada.shows(times, json!(true)).await;

    bob.click("#leave").await;
    ada.shows(MEMBERS, json!(["Ada"])).await;
    ada.shows(NOTICES, json!(["You joined as Ada", "Bob joined", "Bob left"])).await;

    // Whatever had leaked into the garden would be above this message.
    cyd.say("am I alone?").await;
    cyd.shows(SAID, json!([["Cyd", "am I alone?"]])).await;
    cyd.shows(NOTICES, json!(["You joined as Cyd"])).await;
    cyd.shows(MEMBERS, json!(["Cyd"])).await;
}

#[tokio::test]
async fn whoever_enters_sees_the_last_messages_and_a_new_name_is_announced() {
    let server = Server::start(0).await;
    let browser = Browser::start().await;
    let ada = browser.tab(&server.url).await;
    ada.enter("Ada", "lobby").await;
    ada.say("one").await;
    ada.say("two").await;
    ada.shows(SAID, json!([["Ada", "one"], ["Ada", "two"]])).await;

    let bob = browser.tab(&server.url).await;
    bob.enter("Bob", "lobby").await;
    bob.shows(SAID, json!([["Ada", "one"], ["Ada", "two"]])).await;
    bob.click("#start-rename").await;
    bob.write("#new-name", &format!("Robert{}", char::from(Key::Enter))).await;
    bob.shows(NOTICES, json!(["You joined as Bob", "You are Robert now"])).await;
    ada.shows(NOTICES, json!(["You joined as Ada", "Bob joined", "Bob is Robert now"])).await;
    for tab in [&ada, &bob] {
        tab.shows(MEMBERS, json!(["Ada", "Robert"])).await;
    }
    bob.say("three").await;
    ada.shows(SAID, json!([["Ada", "one"], ["Ada", "two"], ["Robert", "three"]])).await;

    // A reload keeps the name, shows the messages, and is neither a leave nor a join.
    bob.look().await;
    browser.client.refresh().await.expect("the page loads again");
    bob.shows(SAID, json!([["Ada", "one"], ["Ada", "two"], ["Robert", "three"]])).await;
    bob.shows(NOTICES, json!(["You joined as Robert"])).await;
    bob.say("four").await;
    ada.shows(LAST_SAID, json!("four")).await;
    ada.shows(NOTICES, json!(["You joined as Ada", "Bob joined", "Bob is Robert now"])).await;
}

#[tokio::test]
async fn the_panel_shows_all_rooms_with_their_users_and_what_became_of_the_last_message() {
    let server = Server::start(0).await;
    let mut cyd = Raw::enter(&server, "name=Cyd&room=garden").await;
    cyd.welcome().await;
    let browser = Browser::start().await;
    let bob = browser.tab(&server.url).await;
    bob.enter("Bob", "lobby").await;
    let ada = browser.tab(&server.url).await;
    ada.enter("Ada", "lobby").await;
    let rooms = "return [...document.querySelectorAll('#rooms a')]
        .map(room => [room.dataset.room, room.querySelector('.hint')?.textContent])";
    ada.shows(rooms, json!([["garden", "1"], ["lobby", "2"]])).await;
    ada.say("hello").await;
    ada.shows("return document.querySelector('#reached').textContent", json!("2 of 2")).await;
    ada.shows("return document.querySelector('#dropped').textContent", json!("0")).await;
    ada.shows("return document.querySelector('#connections').textContent", json!("3")).await;
    let round_trip = "return /^[0-9.]+ ms$/.test(document.querySelector('#round-trip').textContent)";
    ada.shows(round_trip, json!(true)).await;
}

#[tokio::test]
async fn the_page_reconnects_by_itself_when_the_server_restarts() {
    let server = Server::start(0).await;
    let browser = Browser::start().await;
    let ada = browser.tab(&server.url).await;
    let bob = browser.tab(&server.url).await;
    ada.enter("Ada", "lobby").await;
    bob.enter("Bob", "lobby").await;
    ada.say("before").await;
    bob.shows(SAID, json!([["Ada", "before"]])).await;

    ada.write("#text", "begun before, ").await;

    let port = server.port();
    server.kill().await;
    for tab in [&ada, &bob] {
        tab.shows("return document.querySelector('#problem').hidden", json!(false)).await;
    }
    ada.press("#text", "ended while away").await;

    let _server = Server::start(port).await;
    for tab in [&ada, &bob] {
        tab.shows(STATE, json!("connected")).await;
        tab.shows(MEMBERS, json!(["Ada", "Bob"])).await;
    }
    ada.shows("return document.querySelector('#text').value", json!("begun before, ended while away")).await;
    ada.click("#send").await;
    bob.shows(SAID, json!([["Ada", "before"], ["Ada", "begun before, ended while away"]])).await;
    bob.say("welcome back").await;
    ada.shows(
        SAID,
        json!([["Ada", "before"], ["Ada", "begun before, ended while away"], ["Bob", "welcome back"]]),
    )
    .await;
}

#[tokio::test]
async fn the_page_shows_its_node_and_comes_back_on_another_when_its_node_restarts() {
    let mut cluster = Running::start("cluster", &["--port", "0"]);
    let mut pids = HashMap::new();
    let url = loop {
        let line = within_timeout(cluster.lines.next_line()).await.expect("text").expect("it goes on");
        if let Some((pid, node)) =
            line.split_once(", process ").and_then(|(_, rest)| rest.split_once(", id "))
        {
            pids.insert(node.to_owned(), pid.to_owned());
        } else if let Some(rest) = line.strip_prefix("open ") {
            break rest.split(' ').next().expect("a URL").to_owned();
        }
    };
    let browser = Browser::start().await;
    let ada = browser.tab(&url).await;
    ada.enter("Ada", "lobby").await;
    ada.say("before").await;
    ada.shows(SAID, json!([["Ada", "before"]])).await;
    let node = ada.client.execute("return document.querySelector('#status').dataset.node", Vec::new()).await;
    let node = node.expect("the script runs").as_str().expect("a text").to_owned();
    let status = "return document.querySelector('#status').textContent";
    ada.shows(status, json!(format!("Connected to node {}", &node[..4]))).await;

    let told = Command::new("kill").args(["-TERM", &pids[&node]]).status().await.expect("there is a kill");
    assert!(told.success());
    let is_elsewhere = format!(
        "const {{ state, node }} = document.querySelector('#status').dataset;
         return state === 'connected' && node !== '{node}'"
    );
    ada.shows(&is_elsewhere, json!(true)).await;
    ada.say("after").await;
    ada.shows(SAID, json!([["Ada", "before"], ["Ada", "after"]])).await;
    let notices = ["You joined as Ada", "Messages of the meantime may be missing.", "You are back"];
    ada.shows(NOTICES, json!(notices)).await;
}

#[tokio::test]
async fn a_refused_page_says_why_and_does_not_come_back_until_asked() {
    let url = serve_page_and_close_with(&[
        (1001, "we restart"),
        (1008, "too much at once"),
        (4000, "you are banned"),
        (4999, "the last of them"),
    ])
    .await;
    let browser = Browser::start().await;
    let ada = browser.tab(&url).await;

    // The page's timers stand still until the test lets one run, so that what it plans can be seen.
    ada.shows(
        "window.planned = new Map();
         window.setTimeout = (run) => { const id = Math.random(); planned.set(id, run); return id; };
         window.clearTimeout = (id) => planned.delete(id);
         return true",
        json!(true),
    )
    .await;
    let plans = "return window.planned.size";
    let why = "return document.querySelector('#problem-text').textContent";

    ada.ask_in("Ada", "lobby").await;
    ada.shows(STATE, json!("waiting")).await;
    ada.shows(plans, json!(1)).await;
    ada.shows("[...planned.values()][0](); return true", json!(true)).await;

    for (code, reason) in [(1008, "too much at once"), (4000, "you are banned"), (4999, "the last of them")] {
        ada.shows(why, json!(format!("The server refused: {reason} ({code})"))).await;
        ada.shows(STATE, json!("refused")).await;
        ada.shows(plans, json!(0)).await;
        ada.click("#retry").await;
    }
}

#[tokio::test]
async fn a_tab_whose_connection_failed_gets_what_was_said_meanwhile_and_nobody_sees_a_leave_and_a_join() {
    let server = Server::start(0).await;
    let proxy = Proxy::to(server.port()).await;
    let browser = Browser::start().await;
    let ada = browser.tab(&proxy.url).await;
    let bob = browser.tab(&server.url).await;
    ada.enter("Ada", "lobby").await;
    bob.enter("Bob", "lobby").await;
    ada.shows(MEMBERS, json!(["Ada", "Bob"])).await;
    ada.say("before").await;
    bob.shows(SAID, json!([["Ada", "before"]])).await;

    let mut said = vec![json!(["Ada", "before"])];
    // First the server sees the end, then only the tab does: the old connection stays open at the server.
    for (failure, number) in [(Failure::OnBothSides, 1), (Failure::AtTheBrowser, 2)] {
        // The tab does not reconnect before it is told to.
        ada.shows("window.later = setTimeout; window.setTimeout = () => 0; return true", json!(true)).await;
        proxy.fail(failure);
        ada.shows(STATE, json!("waiting")).await;
        let meanwhile = format!("said meanwhile {number}");
        bob.say(&meanwhile).await;
        bob.shows(LAST_SAID, json!(meanwhile)).await;
        ada.shows("window.setTimeout = later; dispatchEvent(new Event('online')); return true", json!(true))
            .await;
        ada.shows(STATE, json!("connected")).await;
        let back = format!("I am back {number}");
        ada.say(&back).await;
        said.extend([json!(["Bob", meanwhile]), json!(["Ada", back])]);
        for tab in [&ada, &bob] {
            tab.shows(SAID, json!(said)).await;
            tab.shows(MEMBERS, json!(["Ada", "Bob"])).await;
        }
    }
    ada.shows(NOTICES, json!(["You joined as Ada", "Bob joined", "You are back", "You are back"])).await;
    bob.shows(NOTICES, json!(["You joined as Bob"])).await;
}

#[tokio::test]
async fn two_users_of_one_name_are_told_apart_and_stay_themselves_over_a_restart() {
    let server = Server::start(0).await;
    let browser = Browser::start().await;
    let first = browser.tab(&server.url).await;
    let second = browser.tab(&server.url).await;
    first.enter("Ada", "lobby").await;
    second.enter("Ada", "lobby").await;
    let own =
        "return [...document.querySelectorAll('#messages li[data-own] .text')].map(text => text.textContent)";
    let labels = "return new Set([...document.querySelectorAll('#members li > span:nth-child(2)')]
        .map(label => label.textContent).filter(label => /^Ada ·[0-9a-f]{4}$/.test(label))).size";
    for tab in [&first, &second] {
        tab.shows(MEMBERS, json!(["Ada", "Ada"])).await;
        tab.shows(labels, json!(2)).await;
    }
    first.say("I am the first").await;
    second.shows(SAID, json!([["Ada", "I am the first"]])).await;
    second.shows(own, json!([])).await;

    let port = server.port();
    server.kill().await;
    for tab in [&first, &second] {
        tab.shows("return document.querySelector('#problem').hidden", json!(false)).await;
    }
    let _server = Server::start(port).await;
    for tab in [&second, &first] {
        tab.shows(STATE, json!("connected")).await;
        tab.shows(MEMBERS, json!(["Ada", "Ada"])).await;
    }
    second.say("I am the second").await;
    first.say("and I the first").await;
    first.shows(own, json!(["I am the first", "and I the first"])).await;
    second.shows(own, json!(["I am the second"])).await;
}

/// One of the thousand clients, in one of twenty rooms.
#[cfg(feature = "client")]
struct RoomClient {
    client: shardcast::HubClient<Value, Value>,
    messages: shardcast::client::Messages<Value>,
}

#[cfg(feature = "client")]
impl RoomClient {
    async fn enter(url: &str, number: usize) -> Self {
        let url = format!("{url}?room=room{}&name=client{number}&token=token{number}", number % 20);
        let mut client = shardcast::HubClient::builder(url)
            .with_in_message::<Value>()
            .with_out_message::<Value>()
            .with_reconnect(ReconnectPolicy::new())
            .build();
        client.connect().await.expect("the chat listens");
        let mut messages = client.take_messages().expect("not taken yet");
        welcome(&mut messages).await;
        Self { client, messages }
    }

    /// Sends three messages while there is no server, and returns when the new server has answered them.
    async fn reconnect(mut self) -> (Self, Instant) {
        let mut states = self.client.states();
        let away = states.wait_for(|state| matches!(state, ClientState::Reconnecting { .. }));
        within_timeout(away).await.expect("it reconnects");
        for text in ["one", "two", "three"] {
            self.client.send(json!({ "type": "say", "text": text })).expect("there is room in its queue");
        }
        let user = welcome(&mut self.messages).await["user"].clone();
        let back = Instant::now();
        let mut own = Vec::new();
        let mut answers = 0;
        while answers < 3 {
            let message = within_timeout(self.messages.recv()).await.expect("open").expect("JSON");
            if message["type"] == "said" && message["user"] == user {
                own.push(message["text"].clone());
            }
            answers += usize::from(message["type"] == "sent");
        }
        assert_eq!(own, ["one", "two", "three"], "each once, and in order");
        (self, back)
    }
}

#[cfg(feature = "client")]
async fn welcome(messages: &mut shardcast::client::Messages<Value>) -> Value {
    loop {
        let message = within_timeout(messages.recv()).await.expect("open").expect("JSON");
        if message["type"] == "welcome" {
            return message;
        }
    }
}

/// With `--nocapture` it prints when the clients were back.
#[cfg(feature = "client")]
#[allow(clippy::print_stdout)]
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_a_thousand_clients_and_a_browser_are_back_in_their_rooms_with_what_they_queued() {
    let mut server = Server::start(0).await;
    let browser = Browser::start().await;
    let ada = browser.tab(&server.url).await;
    ada.enter("Ada", "room7").await;
    let url = format!("{}/ws", server.url.replace("http:", "ws:"));
    let mut clients = Vec::new();
    for number in 0..1_000 {
        clients.push(RoomClient::enter(&url, number).await);
    }
    ada.shows(MEMBER_COUNT, json!(51)).await;

    let returns: Vec<_> = clients.into_iter().map(|client| tokio::spawn(client.reconnect())).collect();
    let port = server.port();
    server.terminate().await;
    ada.shows("return document.querySelector('#problem').hidden", json!(false)).await;
    let server = Server::start(port).await;
    let listens = Instant::now();
    let mut returned = Vec::new();
    for back in returns {
        returned.push(back.await.expect("it is back"));
    }
    ada.shows(STATE, json!("connected")).await;
    ada.shows(MEMBER_COUNT, json!(51)).await;

    let mut raw = Raw::enter(&server, "name=Observer&room=empty").await;
    raw.welcome().await;
    raw.say(json!({ "type": "look" })).await;
    let overview = loop {
        let message = raw.next().await;
        if message["type"] == "overview" {
            break message;
        }
    };
    assert_eq!(overview["connections"], 1_002);
    let rooms = overview["rooms"].as_array().expect("a list");
    let users: Vec<_> = rooms.iter().map(|room| room["users"].as_u64().unwrap_or_default()).collect();
    assert_eq!(users, [&[51][..], &[50; 19]].concat(), "{rooms:?}");

    let mut times: Vec<_> =
        returned.iter().map(|(_, back)| back.saturating_duration_since(listens)).collect();
    times.sort();
    println!("back after {:?}, half of them after {:?}, all after {:?}", times[0], times[500], times[999]);
}

#[tokio::test]
async fn on_a_phone_what_is_touched_is_high_enough_and_a_room_s_name_follows_its_sign() {
    let server = Server::start(0).await;
    let browser = Browser::start().await;
    let ada = browser.tab(&server.url).await;
    ada.look().await;
    browser.client.set_window_size(400, 800).await.expect("the window can be as small as a phone");
    ada.enter("Ada", "lobby").await;
    ada.click("#panel-toggle").await;
    let heights =
        "return [...document.querySelectorAll('#rooms a, #switch input, #switch button, #actions button')]
        .filter(touched => touched.offsetHeight < 40).map(touched => touched.outerHTML)";
    ada.shows(heights, json!([])).await;
    ada.shows("return getComputedStyle(document.querySelector('#rooms a')).display", json!("flex")).await;
    // At the lower end of the panel, and not drawn up to the rooms.
    ada.shows("return getComputedStyle(document.querySelector('#actions')).display", json!("flex")).await;
}

// ---- without a browser

#[tokio::test]
async fn a_token_makes_connections_one_user_and_nobody_learns_it() {
    let server = Server::start(0).await;
    let mut bob = Raw::enter(&server, "name=Bob&room=lobby").await;
    let welcome = bob.welcome().await;
    assert_eq!(welcome["members"].as_array().map(Vec::len), Some(1));
    let mut first = Raw::enter(&server, "name=Ada&room=lobby&token=of-ada").await;
    let ada = first.welcome().await["user"].clone();
    let joined = bob.next_but("joined", &welcome["user"]).await;
    assert_eq!((&joined["type"], &joined["user"], &joined["name"]), (&json!("joined"), &ada, &json!("Ada")));

    // The same token is the same user, under whichever name; none is a user of its own.
    let mut second = Raw::enter(&server, "name=Eve&room=lobby&token=of-ada").await;
    assert_eq!(second.welcome().await["user"], ada);
    let mut nobody = Raw::enter(&server, "name=Ada&room=lobby").await;
    assert_ne!(nobody.welcome().await["user"], ada);
    let joined = bob.next().await;
    assert_eq!(joined["type"], "joined");
    assert_ne!(joined["user"], ada, "it was there already");

    first.leave().await;
    second.say(json!({ "type": "say", "text": "still here" })).await;
    let said = bob.next().await;
    assert_eq!((&said["type"], &said["user"], &said["text"]), (&json!("said"), &ada, &json!("still here")));
    assert!(!said.to_string().contains("of-ada") && !joined.to_string().contains("of-ada"));
}

#[tokio::test]
async fn the_history_ends_where_the_messages_begin_and_has_the_last_fifty() {
    let server = Server::start(0).await;
    let mut ada = Raw::enter(&server, "name=Ada&room=lobby").await;
    ada.welcome().await;
    let speak = tokio::spawn(async move {
        // At most ten a second after a burst of twenty: the server reads the others later.
        for number in 0..60 {
            ada.say(json!({ "type": "say", "text": number.to_string() })).await;
        }
        ada
    });
    let mut members = Vec::new();
    for number in 0..10 {
        let mut member = Raw::enter(&server, &format!("name=Member{number}&room=lobby")).await;
        let welcome = member.welcome().await;
        let history = welcome["history"].as_array().expect("a list").clone();
        members.push((member, history, welcome["is_cut"] == json!(true)));
    }
    let number_of = |said: &Value| said["text"].as_str().and_then(|text| text.parse::<u64>().ok());
    for (mut member, history, _) in members {
        let mut numbers: Vec<_> = history.iter().filter_map(number_of).collect();
        while numbers.last() != Some(&59) {
            let message = member.next().await;
            if message["type"] == "said" {
                numbers.extend(number_of(&message));
            }
        }
        assert!(numbers.iter().copied().eq(0..60), "each once and in order: {numbers:?}");
    }
    let _ada = speak.await.expect("it has spoken");
    let mut late = Raw::enter(&server, "name=Late&room=lobby").await;
    let welcome = late.welcome().await;
    let numbers: Vec<_> =
        welcome["history"].as_array().expect("a list").iter().filter_map(number_of).collect();
    assert!(numbers.iter().copied().eq(10..60), "the last fifty: {numbers:?}");
    assert_eq!(welcome["is_cut"], true);
}

#[tokio::test]
async fn sigterm_ends_the_chat_with_a_close_frame_although_a_request_is_half_sent() {
    let mut server = Server::start(0).await;
    let mut half = TcpStream::connect(("127.0.0.1", server.port())).await.expect("it listens");
    half.write_all(b"GET /ws?name=Eve HTT").await.expect("it reads");
    let mut ada = Raw::enter(&server, "name=Ada&room=lobby").await;
    ada.welcome().await;
    let terminated = server.terminate();
    let ((), close) = tokio::join!(terminated, ada.end());
    assert_eq!(close, (1012, String::new()));
    drop(half);
}

/// A client without a page: a socket and JSON.
struct Raw(WebSocketStream<TcpStream>);

impl Raw {
    async fn enter(server: &Server, query: &str) -> Self {
        let stream = TcpStream::connect(("127.0.0.1", server.port())).await.expect("the chat listens");
        let url = format!("ws://127.0.0.1:{}/ws?{query}", server.port());
        let (socket, _) = tokio_tungstenite::client_async(url, stream).await.expect("the chat upgrades");
        Self(socket)
    }

    async fn say(&mut self, message: Value) {
        self.0.send(Message::text(message.to_string())).await.expect("it goes out");
    }

    async fn message(&mut self) -> Message {
        loop {
            let message = tokio::time::timeout(TEST_TIMEOUT, self.0.next()).await.expect("it has to come");
            let message = message.expect("the connection goes on").expect("and breaks no rule");
            if !message.is_ping() {
                return message;
            }
        }
    }

    async fn next(&mut self) -> Value {
        let message = self.message().await;
        serde_json::from_str(message.to_text().expect("all is text")).expect("and JSON")
    }

    /// The welcome, which is the first message but for changes of presence.
    async fn welcome(&mut self) -> Value {
        loop {
            let message = self.next().await;
            if message["type"] == "welcome" {
                return message;
            }
            assert!(["joined", "left"].contains(&message["type"].as_str().expect("a type")), "{message}");
        }
    }

    /// The next message that is not of this type about this user.
    async fn next_but(&mut self, kind: &str, user: &Value) -> Value {
        loop {
            let message = self.next().await;
            if message["type"] != kind || message["user"] != *user {
                return message;
            }
        }
    }

    /// Reads on to the Close.
    async fn end(&mut self) -> (u16, String) {
        loop {
            if let Message::Close(frame) = self.message().await {
                return frame
                    .map_or((1005, String::new()), |frame| (frame.code.into(), frame.reason.to_string()));
            }
        }
    }

    async fn leave(&mut self) {
        self.0.close(None).await.expect("the Close goes out");
        self.end().await;
    }
}

/// What happens to the connections of a [`Proxy`].
#[derive(Debug, Clone, Copy, PartialEq)]
enum Failure {
    /// Both sides see the end.
    OnBothSides,
    /// The browser sees the end; the server does not, as when a network fails.
    AtTheBrowser,
}

/// A proxy between a browser and the server, whose connections fail when a test says so.
struct Proxy {
    url: String,
    failure: watch::Sender<Failure>,
}

impl Proxy {
    async fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let (failure, failures) = watch::channel(Failure::OnBothSides);
        tokio::spawn(async move {
            let mut kept_open = Vec::new();
            loop {
                let (mut browser, _) = listener.accept().await.expect("the browser can be accepted");
                let server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await;
                let mut server = server.expect("the chat listens");
                let mut failures = failures.clone();
                failures.mark_unchanged(); // a connection after a failure is not concerned
                kept_open.push(tokio::spawn(async move {
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut browser, &mut server) => None,
                        Ok(()) = failures.changed() => {
                            (*failures.borrow() == Failure::AtTheBrowser).then_some(server)
                        }
                    }
                }));
            }
        });
        Self { url, failure }
    }

    /// Ends every connection that is open now.
    fn fail(&self, failure: Failure) {
        self.failure.send_replace(failure);
    }
}

/// The chat example in a process of its own, killed when dropped.
struct Server {
    url: String,
    process: Child,
    _output: Lines<BufReader<ChildStdout>>,
}

impl Server {
    /// Starts `examples/chat`, which stands beside this test's own folder. Port 0 takes any.
    async fn start(port: u16) -> Self {
        let mut program = std::env::current_exe().expect("a test knows where it is");
        program.pop();
        program.pop();
        program.push(format!("examples/chat{}", std::env::consts::EXE_SUFFIX));
        assert!(
            program.exists(),
            "{} is missing: `cargo test` builds it, `cargo test --test chat_page` does not; \
             run `cargo build --example chat` first, in the same profile",
            program.display(),
        );
        let mut process = Command::new(&program)
            .args(["--port", &port.to_string()])
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("the chat example starts");
        let (url, output) = first_line_after(&mut process, "listening on ").await;
        Self { url, process, _output: output }
    }

    fn port(&self) -> u16 {
        let (_, port) = self.url.rsplit_once(':').expect("the address has a port");
        port.trim_end_matches('/').parse().expect("the port is a number")
    }

    /// Asks the process to shut down; returns when it has ended.
    async fn terminate(&mut self) {
        let process = self.process.id().expect("it runs").to_string();
        let sent = Command::new("kill").args(["-TERM", &process]).status().await.expect("there is a kill");
        assert!(sent.success());
        let ended = within_timeout(self.process.wait()).await;
        assert!(ended.expect("it was started").success());
    }

    /// Returns when the process has ended, and no longer holds the port.
    async fn kill(mut self) {
        self.process.kill().await.expect("the chat example can be killed");
    }
}

/// Waits for the line of `process` which contains `prefix`; returns what follows it.
async fn first_line_after(process: &mut Child, prefix: &str) -> (String, Lines<BufReader<ChildStdout>>) {
    let stdout = process.stdout.take().expect("its output is piped");
    let mut lines = BufReader::new(stdout).lines();
    let found = tokio::time::timeout(TEST_TIMEOUT, async {
        while let Some(line) = lines.next_line().await.expect("its output is text") {
            if let Some((_, rest)) = line.split_once(prefix) {
                return rest.trim().to_owned();
            }
        }
        panic!("it ended without saying {prefix:?}");
    });
    let found = found.await.unwrap_or_else(|_| panic!("it did not say {prefix:?} within {TEST_TIMEOUT:?}"));
    // The lines are kept with the process: with its pipe closed it would die of its next line.
    (found, lines)
}

/// One Chromium with its driver; both end when dropped.
struct Browser {
    client: Client,
    session: String,
    driver_address: SocketAddr,
    _driver: Child,
    _driver_output: Lines<BufReader<ChildStdout>>,
    _scratch: Scratch,
    _turn: MutexGuard<'static, ()>,
}

/// Where the browser keeps its profile and sockets; removed with all that it leaves there.
/// Under the system's folder and not the target's: a socket's path must be short.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let folder = std::env::temp_dir().join(format!("chat_page-{}", std::process::id()));
        std::fs::create_dir_all(&folder).expect("the system's temporary folder takes one more");
        Self(folder)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

/// One browser at a time: three at once on two cores only make each other late.
static TURN: Mutex<()> = Mutex::const_new(());

impl Browser {
    async fn start() -> Self {
        let turn = TURN.lock().await;
        let scratch = Scratch::new();
        let mut driver = Command::new("chromedriver")
            .arg("--port=0")
            .env("TMPDIR", &scratch.0)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("chromedriver does not start ({error}): run ci/install-browser"));
        let (port, driver_output) = first_line_after(&mut driver, "started successfully on port ").await;
        let port = port.trim_end_matches('.').parse().expect("chromedriver names its port");
        let driver_address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));

        let mut capabilities = Capabilities::new();
        capabilities.insert(
            "goog:chromeOptions".to_owned(),
            json!({ "args": [
                "--headless",
                "--no-sandbox", // root has none; the only pages it opens are ours
                "--disable-gpu",
                "--disable-dev-shm-usage",
                // It looks for nothing outside: no network is needed, and none may make it late.
                "--disable-quic",
                "--no-first-run",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ] }),
        );
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(capabilities)
            .connect(&format!("http://{driver_address}"))
            .await
            .unwrap_or_else(|error| panic!("Chromium does not start ({error}): run ci/install-browser"));
        let session = client.session_id().await.expect("the session is open").expect("it has an id");
        Self {
            client,
            session,
            driver_address,
            _driver: driver,
            _driver_output: driver_output,
            _scratch: scratch,
            _turn: turn,
        }
    }

    /// Opens `url` in a new tab.
    async fn tab(&self, url: &str) -> Tab<'_> {
        let window = self.client.new_window(true).await.expect("a tab opens").handle;
        let tab = Tab { client: &self.client, window };
        tab.look().await;
        self.client.goto(url).await.expect("the page loads");
        tab
    }
}

impl Drop for Browser {
    /// Asks the driver to end its Chromium, and waits for it: killing the driver alone would leave
    /// the browser and its profile behind. Blocks, as a drop must; a driver that does not answer is
    /// killed all the same.
    fn drop(&mut self) {
        let Ok(mut driver) = std::net::TcpStream::connect(self.driver_address) else { return };
        let _ = driver.set_read_timeout(Some(Duration::from_secs(10)));
        let ask = format!(
            "DELETE /session/{} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n\r\n",
            self.session, self.driver_address
        );
        if driver.write_all(ask.as_bytes()).is_ok() {
            let _ = driver.read(&mut [0; 512]); // the answer comes when Chromium has gone
        }
    }
}

/// One guest: a tab, and what a person does and sees in it.
struct Tab<'a> {
    client: &'a Client,
    window: WindowHandle,
}

impl Tab<'_> {
    async fn look(&self) {
        self.client.switch_to_window(self.window.clone()).await.expect("the tab is open");
    }

    /// Waits until `script` returns `expected`.
    async fn shows(&self, script: &str, expected: Value) {
        self.look().await;
        let deadline = Instant::now() + TEST_TIMEOUT;
        loop {
            let shown = self.client.execute(script, Vec::new()).await.expect("the script runs");
            if shown == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{script}\n   shows {shown}\ninstead of {expected}");
            tokio::time::sleep(POLL_EVERY).await;
        }
    }

    async fn click(&self, selector: &str) {
        self.look().await;
        let element = self.client.find(Locator::Css(selector)).await.expect("the element is there");
        element.click().await.expect("the element can be clicked");
    }

    /// Presses `keys`, one after the other, at the end of what stands in the field.
    async fn press(&self, selector: &str, keys: &str) {
        self.look().await;
        let field = self.client.find(Locator::Css(selector)).await.expect("the field is there");
        field.send_keys(keys).await.expect("the field takes text");
    }

    /// Puts `text` in place of what stands in the field.
    async fn write(&self, selector: &str, text: &str) {
        self.look().await;
        let field = self.client.find(Locator::Css(selector)).await.expect("the field is there");
        field.clear().await.expect("the field can be cleared");
        self.press(selector, text).await;
    }

    async fn ask_in(&self, name: &str, room: &str) {
        self.write("#name", name).await;
        self.write("#room", room).await;
        self.click("#enter").await;
    }

    async fn enter(&self, name: &str, room: &str) {
        self.ask_in(name, room).await;
        self.shows(STATE, json!("connected")).await;
    }

    /// By keyboard alone: the text, then Enter.
    async fn say(&self, text: &str) {
        self.write("#text", &format!("{text}{}", char::from(Key::Enter))).await;
    }
}

/// A server which knows the page, and closes its n-th WebSocket with the n-th of `closings`.
async fn serve_page_and_close_with(closings: &'static [(u16, &'static str)]) -> String {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
    let url = format!("http://{}", listener.local_addr().expect("it is bound"));
    tokio::spawn(async move {
        let upgrades = Arc::new(AtomicUsize::new(0));
        loop {
            let (stream, _) = listener.accept().await.expect("guests can be accepted");
            let upgrades = Arc::clone(&upgrades);
            // Each on its own: a browser opens spare connections on which nothing ever comes.
            tokio::spawn(async move {
                if !asks_for_socket(&stream).await {
                    serve_page(stream).await;
                } else if let Some(&(code, reason)) = closings.get(upgrades.fetch_add(1, Relaxed)) {
                    close_with(stream, code, reason).await;
                }
            });
        }
    });
    url
}

async fn asks_for_socket(stream: &TcpStream) -> bool {
    const REQUEST: &[u8] = b"GET /ws?";
    let mut start = [0; REQUEST.len()];
    loop {
        match stream.peek(&mut start).await {
            Ok(read) if read == start.len() => return start == REQUEST,
            Ok(read) if read > 0 => tokio::task::yield_now().await,
            _ => return false,
        }
    }
}

async fn serve_page(mut stream: TcpStream) {
    let page = include_str!("../examples/chat/page.html");
    let mut request = [0; 4096];
    let _ = stream.read(&mut request).await;
    let head = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nConnection: close\r\n";
    let answer = format!("{head}Content-Length: {}\r\n\r\n{page}", page.len());
    let _ = stream.write_all(answer.as_bytes()).await;
}

async fn close_with(stream: TcpStream, code: u16, reason: &'static str) {
    let mut socket = tokio_tungstenite::accept_async(stream).await.expect("the page upgrades");
    let close = CloseFrame { code: code.into(), reason: reason.into() };
    socket.send(Message::Close(Some(close))).await.expect("the close goes out");
    let _ = socket.get_mut().shutdown().await;
}
