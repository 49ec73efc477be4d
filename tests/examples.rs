//! Every example, started as a program of its own and used once.
//!
//! What the documents show must work as shown. What `fanout` does on SIGTERM is in `shutdown.rs`.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::collections::{BTreeSet, HashMap};
use std::process::Output;

use serde_json::{Value, json};
use testkit::frames::{BINARY, FIN, client_frame};
use testkit_hub::program::{Running, fanout, program};
use testkit_hub::{Client, within_timeout};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;

/// Runs it to its end.
async fn run(name: &str, arguments: &[&str]) -> Output {
    within_timeout(program(name).args(arguments).output()).await.unwrap()
}

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn hello_prints_the_hubs_answer() {
    let output = run("hello", &[]).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout), "Ok(\"hello world\")\n");
}

#[tokio::test]
async fn custom_codec_prints_what_came_back_in_message_pack() {
    let output = run("custom_codec", &[]).await;
    assert!(output.status.success(), "{output:?}");
    assert_eq!(text(&output.stdout), "Reading { sensor: 7, celsius: 21.5 }\n");
}

#[tokio::test]
async fn engine_echo_sends_every_message_back() {
    let mut echo = Running::start("engine_echo", &["--port", "0"]);
    let url = echo.wait_for_line("listening on ").await;
    let (mut ada, mut bob) =
        (Client::connect(format!("{url}/")).await, Client::connect(format!("{url}/")).await);
    for message in [Message::text("hello"), Message::text("žluťoučký"), Message::binary(vec![0xff, 0])] {
        ada.send(message.clone()).await;
        assert_eq!(ada.recv().await, Some(message));
    }
    bob.send_text("not Ada's").await;
    bob.recv_texts(&["not Ada's"]).await;
    assert_eq!(ada.leave().await, Vec::<String>::new());
    let output = run("engine_echo", &["--prot", "0"]).await;
    assert!(!output.status.success());
    assert!(text(&output.stderr).contains("usage: engine_echo [--port P]"), "{output:?}");
}

// ---- chat

/// A member of a room, who has received the welcome.
struct Member {
    client: Client,
    user: Value,
    welcome: Value,
}

impl Member {
    async fn enter(url: &str, name: &str, room: &str) -> Self {
        let client = Client::connect(format!("{url}/ws?name={name}&room={room}")).await;
        let mut member = Self { client, user: Value::Null, welcome: Value::Null };
        // Its own join is announced to it, too, before the welcome or after it.
        let mut joined = Value::Null;
        while member.welcome.is_null() || joined.is_null() {
            let message: Value = serde_json::from_str(&member.client.recv_text().await).unwrap();
            let is_welcome = message["type"] == "welcome";
            *(if is_welcome { &mut member.welcome } else { &mut joined }) = message;
        }
        member.user = member.welcome["user"].clone();
        assert_eq!([&joined["type"], &joined["user"]], [&json!("joined"), &member.user]);
        member
    }

    async fn say(&mut self, text: &str) {
        self.client.send_text(json!({ "type": "say", "text": text }).to_string()).await;
    }

    /// The next message, which must be of this type; without its type, and its time, which is checked.
    async fn recv(&mut self, kind: &str) -> Value {
        let mut message: Value = serde_json::from_str(&self.client.recv_text().await).unwrap();
        let fields = message.as_object_mut().unwrap();
        assert_eq!(fields.remove("type").unwrap(), kind, "{fields:?}");
        if let Some(at) = fields.remove("at") {
            assert!(at.as_u64().unwrap() > 1_600_000_000_000, "milliseconds since 1970: {at}");
        }
        message
    }
}

#[tokio::test]
async fn chat_serves_its_page_and_members_of_one_room_talk() {
    let (_program, address) = listening("chat", &[]).await;
    assert_eq!(http(&address, "GET", "/").await, include_str!("../examples/chat/page.html"));

    let url = format!("ws://{address}");
    let mut ada = Member::enter(&url, "Ada", "lobby").await;
    assert_eq!(
        (&ada.welcome["history"], &ada.welcome["is_cut"], &ada.welcome["members"][0]["metadata"]),
        (&json!([]), &json!(false), &json!({ "name": "Ada" }))
    );
    let mut bob = Member::enter(&url, "Bob", "lobby").await;
    assert_eq!(bob.welcome["members"].as_array().unwrap().len(), 2);
    assert_eq!(ada.recv("joined").await, json!({ "user": bob.user, "name": "Bob" }));
    let mut elsewhere = Member::enter(&url, "Ada", "garden").await;
    assert_eq!(elsewhere.welcome["members"].as_array().unwrap().len(), 1);
    assert_ne!(elsewhere.user, ada.user);

    // Refused to Bob alone, who may go on.
    for refused in ["", " \n ", &"x".repeat(2001)] {
        bob.say(refused).await;
        assert_eq!(bob.recv("refused").await, json!({ "why": "a message must have 1 to 2000 characters" }));
    }
    let longest = "ž".repeat(2000);
    for text in ["hello", &longest] {
        bob.say(text).await;
        for member in [&mut ada, &mut bob] {
            let said = member.recv("said").await;
            assert_eq!([&said["name"], &said["text"]], ["Bob", text]);
        }
        assert_eq!(bob.recv("sent").await, json!({ "reached": 2, "dropped": 0 }));
    }
    bob.client.send_text(r#"{"type":"rename","name":" Robert "}"#.to_owned()).await;
    for member in [&mut ada, &mut bob] {
        let renamed = member.recv("renamed").await;
        assert_eq!([&renamed["was"], &renamed["name"]], ["Bob", "Robert"]);
    }
    bob.client.send_text(json!({ "type": "rename", "name": "x".repeat(33) }).to_string()).await;
    let why = "the names of user and room must have 1 to 32 characters";
    assert_eq!(bob.recv("refused").await, json!({ "why": why }));

    bob.client.send_text(r#"{"type":"look"}"#.to_owned()).await;
    let overview = bob.recv("overview").await;
    assert_eq!((&overview["connections"], &overview["dropped"]), (&json!(3), &json!(0)));
    let rooms = json!([
        { "name": "lobby", "connections": 2, "users": 2 },
        { "name": "garden", "connections": 1, "users": 1 },
    ]);
    assert_eq!(overview["rooms"], rooms, "the largest first");

    // Under the name of now: presence has it, too.
    let late = Member::enter(&url, "Late", "lobby").await;
    let names = late.welcome["members"].as_array().unwrap().iter().map(|member| &member["metadata"]["name"]);
    assert!(names.clone().any(|name| name == "Robert") && !names.clone().any(|name| name == "Bob"));
    let history = late.welcome["history"].as_array().unwrap().iter().map(|said| &said["text"]);
    assert!(history.eq(["hello", &longest]), "{}", late.welcome);

    drop(bob.client);
    assert_eq!(ada.recv("joined").await, json!({ "user": late.user, "name": "Late" }));
    assert_eq!(ada.recv("left").await, json!({ "user": bob.user, "name": "Robert" }));

    for (name, room) in [("", "lobby"), ("Ada", ""), (&*"x".repeat(33), "lobby"), ("%20", "lobby")] {
        let refused = Client::connect(format!("{url}/ws?name={name}&room={room}")).await;
        assert_eq!(refused.closed().await, (1008, why.to_owned()));
    }
    elsewhere.say("alone").await;
    assert_eq!(elsewhere.recv("said").await["text"], "alone");
}

#[tokio::test]
async fn the_chat_is_first_not_ready_and_serves_on_until_it_disconnects_its_members_for_a_restart() {
    let (mut program, address) = listening("chat", &["--pause", "3600"]).await;
    let url = format!("ws://{address}");
    let mut ada = Member::enter(&url, "Ada", "lobby").await;
    assert_eq!(status(&address, "/ready").await, 200);
    send_signal(&program, "-TERM").await;
    within_timeout(async { while status(&address, "/ready").await != 503 {} }).await;
    let mut bob = Member::enter(&url, "Bob", "lobby").await;
    ada.recv("joined").await;
    bob.say("still served").await;
    assert_eq!(ada.recv("said").await["text"], "still served");
    send_signal(&program, "-INT").await; // ends the pause
    assert_eq!(ada.client.closed().await, (1012, String::new()));
    program.wait_for_line("flushed ").await;
    assert!(within_timeout(program.process.wait()).await.unwrap().success());
}

// ---- fanout

#[tokio::test]
async fn fanout_serves_its_routes() {
    let (mut fanout, address) = fanout(&["--shards", "2", "--no-pin", "--policy", "block"]).await;
    let connect = async |path: &str| Client::connect(format!("ws://{address}{path}")).await;
    let tick = |t: u64| json!({ "t": t, "p": "padding" }).to_string();
    let heard = async |peer: &mut Client| serde_json::from_str::<Value>(&peer.recv_text().await).unwrap();
    let ticked = |t: u64| json!({ "t": t, "p": "padding" });

    let (mut first, mut second) = (connect("/ws").await, connect("/ws").await);
    for (t, peer) in [(1, &mut first), (2, &mut second)] {
        // A client counts from its adoption, which its own tick proves.
        peer.send_text(tick(t)).await;
        while heard(peer).await != ticked(t) {}
    }
    first.send_text(tick(3)).await;
    while heard(&mut second).await != ticked(3) {}

    let mut echo = connect("/echo").await;
    for t in [u64::MAX, 0] {
        echo.send_text(tick(t)).await;
        assert_eq!(heard(&mut echo).await, ticked(t));
    }

    let (mut red, mut red_too, mut blue) =
        (connect("/group/red").await, connect("/group/red").await, connect("/group/blue").await);
    for (t, peer) in [(1, &mut red), (2, &mut red_too), (4, &mut blue)] {
        peer.send_text(tick(t)).await;
        while heard(peer).await != ticked(t) {}
    }
    red.send_text(tick(3)).await;
    assert_eq!(heard(&mut red_too).await, ticked(3));
    blue.send_text(tick(5)).await;
    assert_eq!(heard(&mut blue).await, ticked(5), "and not what was said in red");

    for path in ["/raw", "/socket"] {
        let mut peer = connect(path).await;
        for message in
            [Message::text("as it came"), Message::binary(vec![0xff; 3]), Message::binary(vec![7; 2 << 20])]
        {
            peer.send(message.clone()).await;
            assert!(peer.recv().await == Some(message));
        }
    }
    assert_eq!(second.leave().await, Vec::<String>::new(), "nothing of echo, groups and raw");
    let more = tokio::time::timeout(std::time::Duration::ZERO, fanout.lines.next_line()).await;
    assert!(more.is_err(), "it logs nothing: {more:?}");
}

#[tokio::test]
async fn fanout_says_what_to_do_when_it_is_not_understood() {
    let usage = "usage: fanout [--port P] [--shards N] [--no-pin] [--trim] [--io-uring] [--coalesce MILLISECONDS] [--policy POLICY] \
         [--outbox N] [--rate-limit N] [--over-limit delay|drop|close] [--tls FILE [--bridge]] [--backplane URL], where POLICY is block,";
    for (arguments, says) in [
        (&["--policy", "nonsense"][..], "`nonsense` is not a policy"),
        (&["--policy"], usage),
        (&["--nonsense"], usage),
        (&["--port", "many"], usage),
        (&["--shards", "-1"], usage),
        (&["--coalesce", "soon"], usage),
        (&["--outbox", "none"], usage),
        (&["--rate-limit", "many"], usage),
        (&["--over-limit", "shrug"], usage),
        (&["--bridge"], usage),
        (&["--tls"], usage),
    ] {
        let output = run("fanout", arguments).await;
        assert!(!output.status.success(), "{arguments:?}: {output:?}");
        assert_eq!(text(&output.stdout), "", "{arguments:?}");
        let stderr = text(&output.stderr);
        assert!(stderr.contains(says), "{arguments:?}: {stderr}");
    }
    let output = run("fanout", &["--policy", "nonsense"]).await;
    assert!(text(&output.stderr).contains(usage), "{output:?}");
    let output = run("fanout", &["--shards", "0"]).await;
    let names_field_and_range = ["shards", "4096"].iter().all(|part| text(&output.stderr).contains(part));
    assert!(!output.status.success() && names_field_and_range, "{output:?}");
}

// ---- Authentication, presence, sockets

/// Starts an example on a free port; returns where it listens, without a scheme.
async fn listening(name: &str, arguments: &[&str]) -> (Running, String) {
    let mut program = Running::start(name, &[&["--port", "0"], arguments].concat());
    let line = program.wait_for_line("listening on ").await;
    let (_, address) = line.split_once("://").unwrap();
    (program, address.trim_end_matches("/ws").to_owned())
}

/// The body of a response that must be a 200.
async fn http(address: &str, method: &str, path: &str) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!(
        "{method} {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
    );
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    within_timeout(stream.read_to_string(&mut response)).await.unwrap();
    assert!(response.starts_with("HTTP/1.1 200 "), "{response}");
    response.split_once("\r\n\r\n").unwrap().1.to_owned()
}

#[tokio::test]
async fn auth_jwt_refuses_strangers_and_refreshes_tokens() {
    use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
    let (_program, address) = listening("auth_jwt", &["--token-seconds", "2"]).await;
    assert!(http(&address, "GET", "/").await.contains("new WebSocket"));
    let refused =
        tokio_tungstenite::connect_async(format!("ws://{address}/ws?token=forged")).await.unwrap_err();
    assert!(refused.to_string().contains("401"), "{refused}");
    let log_in =
        async || serde_json::from_str::<String>(&http(&address, "POST", "/login?name=ada").await).unwrap();

    let mut request = format!("ws://{address}/ws").into_client_request().unwrap();
    let protocols = format!("bearer, {}", log_in().await);
    request.headers_mut().insert("sec-websocket-protocol", protocols.parse().unwrap());
    let (client, response) = tokio_tungstenite::connect_async(request).await.unwrap();
    assert_eq!(response.headers()["sec-websocket-protocol"], "bearer");
    use futures_util::{SinkExt as _, StreamExt as _};
    let (mut sink, mut stream) = client.split();
    let mut recv = async || {
        let message = within_timeout(stream.next()).await.unwrap().unwrap();
        serde_json::from_str::<Value>(message.to_text().unwrap()).unwrap()
    };
    assert_eq!(recv().await, json!({ "type": "said", "by": "server", "text": "hello ada" }));
    assert_eq!(recv().await, json!({ "type": "refresh" }), "its token has expired");
    let answer = json!({ "type": "token", "token": log_in().await }).to_string();
    sink.send(Message::text(answer)).await.unwrap();
    sink.send(Message::text(json!({ "type": "say", "text": "still here" }).to_string())).await.unwrap();
    assert_eq!(recv().await, json!({ "type": "said", "by": "ada", "text": "still here" }));
    assert_eq!(recv().await, json!({ "type": "refresh" }), "the new one, too");
}

#[tokio::test]
async fn first_message_auth_serves_who_says_who_it_is() {
    let (_program, address) = listening("first_message_auth", &[]).await;
    let mut ada = Client::connect(format!("ws://{address}/ws")).await;
    ada.send_text("token-of-ada").await;
    ada.recv_texts(&["authenticated as ada"]).await;
    ada.send_text("hello").await;
    ada.recv_texts(&["ada: hello"]).await;
    let mut stranger = Client::connect(format!("ws://{address}/ws")).await;
    stranger.send_text("who am I?").await;
    let close = stranger.recv().await;
    assert!(
        matches!(&close, Some(Message::Close(Some(frame))) if u16::from(frame.code) == 1008),
        "{close:?}"
    );
}

#[tokio::test]
async fn presence_shows_each_user_once() {
    let (_program, address) = listening("presence", &[]).await;
    assert!(http(&address, "GET", "/").await.contains("new WebSocket"));
    let connect = async |user: &str| Client::connect(format!("ws://{address}/ws?user={user}")).await;
    async fn recv(client: &mut Client) -> Value {
        serde_json::from_str(&client.recv_text().await).unwrap()
    }
    // Whoever enters is listed and announced; which of the two comes first is not said.
    async fn entered(client: &mut Client, user: &str, here: &[&str]) {
        let (mut is_announced, mut is_listed) = (false, false);
        while !(is_announced && is_listed) {
            let message = recv(client).await;
            if message["type"] == "here" {
                let users = message["users"].as_array().unwrap().iter();
                let users: BTreeSet<_> = users.map(|user| user.as_str().unwrap()).collect();
                assert!(!is_listed && users.iter().eq(here), "{users:?}");
                is_listed = true;
            } else {
                assert_eq!((message, is_announced), (json!({ "type": "joined", "user": user }), false));
                is_announced = true;
            }
        }
    }
    let mut ada = connect("ada").await;
    entered(&mut ada, "ada", &["ada"]).await;
    let mut bob = connect("bob").await;
    entered(&mut bob, "bob", &["ada", "bob"]).await;
    assert_eq!(recv(&mut ada).await, json!({ "type": "joined", "user": "bob" }));
    let _second_tab = connect("bob").await;
    bob.send_text(r#"{"text":"hello"}"#).await;
    assert_eq!(
        recv(&mut ada).await,
        json!({ "type": "said", "user": "bob", "text": "hello" }),
        "no second join"
    );
}

#[tokio::test]
async fn admin_lists_sends_and_disconnects() {
    let (_program, address) = listening("admin", &[]).await;
    let url = format!("ws://{address}/ws?user=ada&room=red");
    let mut devices = [Client::connect(url.clone()).await, Client::connect(url).await];
    for device in &mut devices {
        device.send_text("ready").await;
    }
    // Both have joined when each has the message of the later one.
    assert_eq!(devices[1].recv_text().await, "ready");
    let rooms: Value = serde_json::from_str(&http(&address, "GET", "/rooms").await).unwrap();
    assert_eq!(rooms, json!([{ "name": "red", "connections": 2, "users": 1 }]));
    let present: Value = serde_json::from_str(&http(&address, "GET", "/rooms/red").await).unwrap();
    assert_eq!((&present[0]["user"], &present[0]["connections"]), (&json!("ada"), &json!(2)));
    let users: Value = serde_json::from_str(&http(&address, "GET", "/users").await).unwrap();
    assert_eq!(users, json!([["ada", 2]]));
    assert_eq!(http(&address, "POST", "/users/ada").await, "accepted by 2 of 2 devices\n");
    assert_eq!(http(&address, "POST", "/users/nobody").await, "accepted by 0 of 0 devices\n");
    assert_eq!(http(&address, "DELETE", "/users/ada").await, "2 devices are disconnected\n");
    for device in &mut devices {
        let close = loop {
            match device.recv().await {
                Some(Message::Text(_)) => {}
                close => break close,
            }
        };
        assert!(
            matches!(&close, Some(Message::Close(Some(frame))) if u16::from(frame.code) == 4001),
            "{close:?}"
        );
    }
}

#[tokio::test]
async fn flexible_route_serves_a_page_and_its_socket() {
    let (_program, address) = listening("flexible_route", &[]).await;
    assert!(http(&address, "GET", "/").await.contains("new WebSocket"));
    let mut client = Client::connect(format!("ws://{address}/")).await;
    client.send_text("hello").await;
    client.recv_texts(&["you said hello"]).await;
}

#[tokio::test]
async fn coming_from_axum_ws_broadcasts_before_and_after() {
    let (_program, address) = listening("coming_from_axum_ws", &[]).await;
    for path in ["before", "after"] {
        let url = format!("ws://{address}/{path}");
        let mut ada = Client::connect(url.clone()).await;
        ada.send_text("alone").await;
        ada.recv_texts(&["alone"]).await;
        let mut bob = Client::connect(url).await;
        bob.send_text("hello").await;
        ada.recv_texts(&["hello"]).await;
        bob.recv_texts(&["hello"]).await;
    }
}

// ---- Servers with a clock, TLS and signals of their own

/// Sends a process this signal.
async fn send_signal(program: &Running, signal: &str) {
    let process = program.process.id().unwrap().to_string();
    let told = tokio::process::Command::new("kill").args([signal, &process]).status().await.unwrap();
    assert!(told.success());
}

#[tokio::test]
async fn echo_sends_text_and_binary_back_and_ends_on_sigterm() {
    let (mut program, address) = listening("echo", &[]).await;
    assert!(http(&address, "GET", "/").await.contains("new WebSocket"));
    let mut client = Client::connect(format!("ws://{address}/ws")).await;
    for message in [Message::text("žluťoučký"), Message::binary(vec![0xff, 0])] {
        client.send(message.clone()).await;
        assert_eq!(client.recv().await, Some(message));
    }
    send_signal(&program, "-TERM").await;
    assert_eq!(client.closed().await.0, 1012);
    assert_eq!(program.wait_for_line("flushed ").await, "1, cut off 0, left over 0");
    assert!(within_timeout(program.process.wait()).await.unwrap().success());
}

/// A message of the ticker, as its page reads it.
#[derive(Debug, PartialEq)]
enum Tick {
    Symbols(Vec<String>),
    Subscribed(Vec<u64>),
    Price { symbol: u64, update: u64 },
    Lost(u64),
}

impl Tick {
    fn read(message: &[u8]) -> Self {
        let mut bytes = message.iter().copied();
        let tick = match Self::number(&mut bytes) {
            0 => {
                let names = (0..Self::number(&mut bytes)).map(|_| Self::text(&mut bytes)).collect();
                Self::Symbols(names)
            }
            1 => Self::Subscribed((0..Self::number(&mut bytes)).map(|_| Self::number(&mut bytes)).collect()),
            2 => {
                let (symbol, cents) = (Self::number(&mut bytes), Self::number(&mut bytes));
                assert!((100..=1_000_000).contains(&cents), "{cents}");
                Self::Price { symbol, update: Self::number(&mut bytes) }
            }
            3 => {
                // Of which symbol; not known when many were dropped.
                if Self::number(&mut bytes) == 1 {
                    Self::text(&mut bytes);
                }
                Self::Lost(Self::number(&mut bytes))
            }
            other => panic!("variant {other}"),
        };
        assert_eq!(bytes.next(), None, "{tick:?}");
        tick
    }

    fn number(bytes: &mut impl Iterator<Item = u8>) -> u64 {
        let mut value = 0;
        for shift in (0..).step_by(7) {
            let byte = bytes.next().unwrap();
            value |= u64::from(byte & 127) << shift;
            if byte < 128 {
                break;
            }
        }
        value
    }

    fn text(bytes: &mut impl Iterator<Item = u8>) -> String {
        let length = Self::number(bytes) as usize;
        String::from_utf8(bytes.take(length).collect()).unwrap()
    }
}

async fn tick(client: &mut Client) -> Tick {
    match client.recv().await {
        Some(Message::Binary(message)) => Tick::read(&message),
        other => panic!("{other:?}"),
    }
}

/// The list of symbols, all below 2¹⁴, that a client of the ticker sends.
fn subscription(symbols: impl ExactSizeIterator<Item = u16>) -> Vec<u8> {
    let varint = |number: u16| [number as u8 | 128, (number >> 7) as u8];
    let mut message = varint(symbols.len() as u16).to_vec();
    message.extend(symbols.flat_map(varint));
    message
}

#[tokio::test]
async fn ticker_sends_prices_of_the_chosen_symbols_and_of_no_others() {
    let (_program, address) = listening("ticker", &[]).await;
    assert!(http(&address, "GET", "/").await.contains("new WebSocket"));
    let mut client = Client::connect(format!("ws://{address}/ws")).await;
    let Tick::Symbols(names) = tick(&mut client).await else { panic!("first the names") };
    assert_eq!(names.iter().collect::<BTreeSet<_>>().len(), 500);
    let mut subscribed: Vec<u64> = (0..20).collect();
    let mut seen = BTreeSet::new();
    // A price may come before the list, but only one of its symbols.
    while seen.len() < 20 {
        match tick(&mut client).await {
            Tick::Price { symbol, .. } => _ = seen.insert(symbol),
            other => assert_eq!(other, Tick::Subscribed(subscribed.clone())),
        }
    }
    assert!(seen.iter().eq(&subscribed), "{seen:?}");

    client.send(Message::binary(subscription([3, 100, 499].into_iter()))).await;
    subscribed = vec![3, 100, 499];
    while tick(&mut client).await != Tick::Subscribed(subscribed.clone()) {}
    seen.clear();
    for _ in 0..30 {
        match tick(&mut client).await {
            Tick::Price { symbol, .. } => _ = seen.insert(symbol),
            other => panic!("{other:?}"),
        }
    }
    assert!(seen.iter().eq(&subscribed), "{seen:?}");
}

#[tokio::test]
async fn a_slow_client_of_the_ticker_loses_prices_and_is_told_and_the_others_lose_none() {
    let (_program, address) = listening("ticker", &[]).await;
    let mut fast = Client::connect(format!("ws://{address}/ws")).await;
    fast.send(Message::binary(subscription(0..500))).await;
    let mut slow =
        testkit_hub::RawClient::connect_narrow(address.parse::<std::net::SocketAddr>().unwrap()).await;
    slow.send(&client_frame(FIN | BINARY, &subscription(0..500))).await;

    // Several times what the kernel takes for the slow one, which reads a fifth of what it is sent. So a publisher that
    // waited for it would make this wait, too, until it is disconnected.
    let mut newest = HashMap::new();
    let (mut prices, mut bytes) = (0, 0);
    while bytes < 100_000 {
        let Some(Message::Binary(message)) = fast.recv().await else { panic!("disconnected") };
        bytes += message.len();
        match Tick::read(&message) {
            Tick::Price { symbol, update } => {
                let before = newest.insert(symbol, update);
                assert!(before.is_none_or(|before| before + 1 == update), "{symbol}: {before:?}, {update}");
                prices += 1;
                if prices % 100 == 0 {
                    slow.read_at_most(200);
                }
            }
            // Those of before were left for a moment.
            Tick::Subscribed(symbols) if symbols.len() == 500 => newest.clear(),
            Tick::Symbols(_) | Tick::Subscribed(_) => {}
            Tick::Lost(prices) => panic!("{prices} were lost"),
        }
    }

    // Now it reads: it has gaps, and is told of losses.
    let (mut newest, mut missed, mut lost) = (HashMap::new(), 0, 0);
    while lost == 0 || missed == 0 {
        let (opcode, message) = slow.recv().await;
        assert_eq!(opcode, BINARY, "it is not disconnected");
        match Tick::read(&message) {
            Tick::Price { symbol, update } => {
                missed += newest.insert(symbol, update).map_or(0, |before| update - before - 1);
            }
            Tick::Lost(prices) => lost += prices,
            Tick::Symbols(_) | Tick::Subscribed(_) => newest.clear(),
        }
    }
}

/// A state of the game in which this is true.
async fn state_where(client: &mut Client, mut is_so: impl FnMut(&Value) -> bool) -> Value {
    within_timeout(async {
        loop {
            let message: Value = serde_json::from_str(&client.recv_text().await).unwrap();
            if message["type"] == "state" && is_so(&message) {
                return message;
            }
        }
    })
    .await
}

/// The answer to something that the game refuses.
async fn refusal(client: &mut Client) -> String {
    within_timeout(async {
        loop {
            let message: Value = serde_json::from_str(&client.recv_text().await).unwrap();
            if message["type"] == "refused" {
                return message["why"].as_str().unwrap().to_owned();
            }
        }
    })
    .await
}

/// The code and reason with which the game disconnects a client.
async fn disconnected(client: &mut Client) -> (u16, String) {
    within_timeout(async {
        loop {
            match client.recv().await {
                Some(Message::Text(_)) => {}
                Some(Message::Close(Some(close))) => return (close.code.into(), close.reason.to_string()),
                other => panic!("{other:?}"),
            }
        }
    })
    .await
}

fn names(state: &Value) -> Vec<&str> {
    state["players"].as_array().unwrap().iter().map(|player| player[0].as_str().unwrap()).collect()
}

#[tokio::test]
async fn game_moves_players_shows_spectators_and_lets_the_owner_kick() {
    let (_program, address) = listening("game", &[]).await;
    assert!(http(&address, "GET", "/").await.contains("new WebSocket"));
    let connect = async |query: &str| Client::connect(format!("ws://{address}/ws{query}")).await;
    let mut ada = connect("?name=Ada").await;
    state_where(&mut ada, |state| names(state) == ["Ada"]).await;
    let mut bob = connect("?name=Bob").await;
    let mut spectator = connect("").await;
    for client in [&mut ada, &mut bob, &mut spectator] {
        state_where(client, |state| names(state) == ["Ada", "Bob"] && state["spectators"] == 1).await;
    }

    ada.send_text(r#"{"type":"steer","dx":1,"dy":9}"#).await;
    for client in [&mut ada, &mut bob, &mut spectator] {
        let state = state_where(client, |state| state["players"][0][1]["x"].as_i64().unwrap() > 50).await;
        let (ada, bob) = (&state["players"][0][1], &state["players"][1][1]);
        assert_eq!(ada["x"], ada["y"], "as fast along both axes");
        assert_eq!((&bob["x"], &bob["y"]), (&json!(0), &json!(0)), "he has not steered");
    }
    state_where(&mut spectator, |state| state["players"][0][1]["x"] == 1000).await;

    spectator.send_text(r#"{"type":"steer","dx":1,"dy":0}"#).await;
    assert_eq!(refusal(&mut spectator).await, "spectators may only watch");
    spectator.send_text(r#"{"type":"kick","name":"Bob"}"#).await;
    assert_eq!(refusal(&mut spectator).await, "spectators may only watch");
    bob.send_text(r#"{"type":"kick","name":"Ada"}"#).await;
    assert_eq!(refusal(&mut bob).await, "only the owner may kick");
    ada.send_text(r#"{"type":"kick","name":"Bob"}"#).await;
    assert_eq!(disconnected(&mut bob).await, (4003, "kicked by the owner".to_owned()));
    let mut states = 0..;
    let second = state_where(&mut connect("").await, |_| states.next() == Some(1)).await;
    assert_eq!(names(&second), ["Ada"], "at once, not only after the time in which he could come back");
    for client in [&mut ada, &mut spectator] {
        state_where(client, |state| names(state) == ["Ada"] && state["spectators"] == 1).await;
    }

    let mut second_tab = connect("?name=Ada").await;
    assert_eq!(disconnected(&mut ada).await.0, 1008, "the newest connection is the player");
    state_where(&mut second_tab, |state| names(state) == ["Ada"] && state["players"][0][1]["x"] == 1000)
        .await;
    let name = "x".repeat(17);
    let refused = disconnected(&mut connect(&format!("?name={name}")).await).await;
    assert_eq!(refused, (1008, "a name has 1 to 16 characters".to_owned()));
}

#[tokio::test]
async fn tls_serves_websockets_over_http_1_and_http_2_with_a_certificate_of_its_own_or_a_given_one() {
    use tokio_rustls::rustls::pki_types::{CertificateDer, pem::PemObject as _};
    let files = std::env::temp_dir().join(format!("shardcast-example-tls-{}", std::process::id()));
    std::fs::create_dir_all(&files).unwrap();
    let [certificate_file, key] = ["certificate.pem", "key.pem"].map(|name| files.join(name));
    let given = testkit_hub::tls::TlsPair::new(&[]);
    std::fs::write(&certificate_file, given.certificate_pem()).unwrap();
    std::fs::write(&key, given.key_pem()).unwrap();
    let arguments = ["--cert", certificate_file.to_str().unwrap(), "--key", key.to_str().unwrap()];
    for arguments in [&[][..], &arguments] {
        let mut program = Running::start("tls", &[&["--port", "0"], arguments].concat());
        let mut pem = if arguments.is_empty() { String::new() } else { given.certificate_pem() };
        let address = loop {
            let line = within_timeout(program.lines.next_line()).await.unwrap().unwrap();
            if let Some(address) = line.strip_prefix("listening on https://") {
                break address.to_owned();
            }
            assert!(arguments.is_empty(), "{line}");
            pem = pem + &line + "\n";
        };
        let certificate = CertificateDer::from_pem_slice(pem.as_bytes()).unwrap();
        let stream = async |protocol: &str| {
            let client = testkit_hub::tls::client_that_trusts(certificate.clone(), &[protocol]);
            let socket = TcpStream::connect(&address).await.unwrap();
            let stream = within_timeout(testkit_hub::tls::connect(client, socket)).await.unwrap();
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(protocol.as_bytes()));
            stream
        };
        let socket = tokio_tungstenite::client_async("wss://localhost/ws", stream("http/1.1").await);
        let mut one = Client { socket: within_timeout(socket).await.unwrap().0 };
        one.recv_texts(&["connected by HTTP/1.1"]).await;
        let mut connection = testkit_hub::http_2::http_2(stream("h2").await).await;
        let mut two = testkit_hub::http_2::connect_by_http_2(&mut connection).await;
        two.recv_texts(&["connected by HTTP/2.0"]).await;
        one.send_text("hello").await;
        one.recv_texts(&["hello"]).await;
        two.send_text("hello").await;
        two.recv_texts(&["hello"]).await;

        if !arguments.is_empty() {
            std::fs::write(&certificate_file, "no certificate").unwrap();
            send_signal(&program, "-HUP").await;
            program.wait_for_line("the old certificates remain in use").await;
            let renewed = testkit_hub::tls::TlsPair::new(&[]);
            std::fs::write(&certificate_file, renewed.certificate_pem()).unwrap();
            std::fs::write(&key, renewed.key_pem()).unwrap();
            send_signal(&program, "-HUP").await;
            program.wait_for_line("new certificates are in use").await;
            within_timeout(renewed.connect(TcpStream::connect(&address).await.unwrap())).await.unwrap();
            one.send_text("still here").await;
            one.recv_texts(&["still here"]).await;
        }
        send_signal(&program, "-TERM").await;
        assert_eq!((one.closed().await.0, two.closed().await.0), (1001, 1001));
        assert!(within_timeout(program.process.wait()).await.unwrap().success());
    }
    std::fs::remove_dir_all(&files).unwrap();
    let output = run("tls", &["--cert", "only.pem"]).await;
    assert!(text(&output.stderr).contains("--cert and --key belong together"), "{output:?}");
}

/// The status of a response.
async fn status(address: &str, path: &str) -> u16 {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut response = String::new();
    within_timeout(stream.read_to_string(&mut response)).await.unwrap();
    response.split(' ').nth(1).unwrap().parse().unwrap()
}

#[tokio::test]
async fn graceful_shutdown_is_first_not_ready_and_serves_on_until_the_pause_is_over() {
    let (mut program, address) = listening("graceful_shutdown", &["--pause", "3600"]).await;
    let connect = async || Client::connect(format!("ws://{address}/ws")).await;
    let mut ada = connect().await;
    assert_eq!((status(&address, "/readyz").await, status(&address, "/healthz").await), (200, 200));
    send_signal(&program, "-TERM").await;
    program.wait_for_line("not ready any more").await;
    assert_eq!((status(&address, "/readyz").await, status(&address, "/healthz").await), (503, 200));
    let mut bob = connect().await;
    for client in [&mut ada, &mut bob] {
        client.send_text("still served").await;
        client.recv_texts(&["still served"]).await;
    }
    send_signal(&program, "-INT").await;
    program.wait_for_line("a second signal").await;
    assert_eq!(within_timeout(program.process.wait()).await.unwrap().code(), Some(1));
}

#[tokio::test]
async fn graceful_shutdown_closes_its_clients_for_a_restart_and_reports() {
    let (mut program, address) = listening("graceful_shutdown", &["--pause", "0", "--spread", "0"]).await;
    let mut clients = Vec::new();
    for _ in 0..3 {
        let mut client = Client::connect(format!("ws://{address}/ws")).await;
        client.send_text("hello").await;
        client.recv_texts(&["hello"]).await;
        clients.push(client);
    }
    // Half a request, for which Axum alone would wait forever.
    let mut half = TcpStream::connect(&address).await.unwrap();
    half.write_all(b"GET /readyz HTTP/1.1\r\n").await.unwrap();
    send_signal(&program, "-TERM").await;
    for client in clients {
        assert_eq!(client.closed().await.0, 1012);
    }
    assert_eq!(program.wait_for_line("flushed ").await, "3, cut off 0, left over 0");
    assert_eq!(within_timeout(program.process.wait()).await.unwrap().code(), Some(0));
    let output = run("graceful_shutdown", &["--pause", "soon"]).await;
    assert!(!output.status.success() && text(&output.stderr).contains("--pause"), "{output:?}");
}
