//! The chat page in a real browser: the README's first command, as a guest sees it.
//!
//! Headless Chromium, driven over WebDriver. The rest of the suite speaks the protocol itself; only
//! a browser shows that a browser agrees with us about upgrades, close codes and reconnects.
//! Nothing here sleeps for luck: each step polls what the page shows until it is so, or fails with
//! what was shown last. Where something must *not* happen, a later event that does proves it.
//!
//! Chromium that is not there is a failure, never a skip: `ci/install-browser` installs it.

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
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{Mutex, MutexGuard, mpsc, watch};
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

/// How long a step may take on a busy machine before it counts as never.
const TEST_TIMEOUT: Duration = Duration::from_secs(30);
const POLL_EVERY: Duration = Duration::from_millis(25);

// What the page shows, as scripts that return it.
const STATE: &str = "return document.querySelector('#status').dataset.state";
const MEMBERS: &str = "return [...document.querySelectorAll('#members li')].map(m => m.dataset.name).sort()";
const SAID: &str = "return [...document.querySelectorAll('#messages li[data-kind=said]')]
    .map(line => [line.dataset.name, line.querySelector('.text').textContent])";
const NOTICES: &str = "return [...document.querySelectorAll('#messages li[data-kind=notice] .text')]
    .map(text => text.textContent)";

#[tokio::test]
async fn two_tabs_in_one_room_talk_and_another_room_does_not_hear_them() {
    let server = Server::start(0).await;
    let browser = Browser::start().await;
    let ada = browser.tab(&server.url).await;
    let bob = browser.tab(&server.url).await;
    let cyd = browser.tab(&server.url).await;

    ada.enter("Ada", "lobby").await;
    cyd.enter("Cyd", "garden").await;
    bob.enter("Bob", "lobby").await;
    for guest in [&ada, &bob] {
        guest.shows(MEMBERS, json!(["Ada", "Bob"])).await;
    }
    ada.shows(NOTICES, json!(["You joined as Ada", "Bob joined"])).await;
    bob.shows(NOTICES, json!(["You joined as Bob"])).await;

    let markup = "<img src=x onerror=document.body.remove()> is text";
    ada.say("hello, Bob").await;
    bob.shows(SAID, json!([["Ada", "hello, Bob"]])).await;
    bob.say(markup).await;
    for guest in [&ada, &bob] {
        guest.shows(SAID, json!([["Ada", "hello, Bob"], ["Bob", markup]])).await;
    }
    let times = "return [...document.querySelectorAll('#messages time')]
        .every(time => /^\\d\\d:\\d\\d$/.test(time.textContent) && /\\d{4}/.test(time.title))";
    ada.shows(times, json!(true)).await;

    bob.click("#leave").await;
    ada.shows(MEMBERS, json!(["Ada"])).await;
    ada.shows(NOTICES, json!(["You joined as Ada", "Bob joined", "Bob left"])).await;

    // Whatever had leaked into the garden would stand before this line.
    cyd.say("am I alone?").await;
    cyd.shows(SAID, json!([["Cyd", "am I alone?"]])).await;
    cyd.shows(NOTICES, json!(["You joined as Cyd"])).await;
    cyd.shows(MEMBERS, json!(["Cyd"])).await;
}

#[tokio::test]
async fn the_page_comes_back_by_itself_when_the_server_restarts() {
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
    for guest in [&ada, &bob] {
        guest.shows("return document.querySelector('#trouble').hidden", json!(false)).await;
    }
    ada.press("#text", "ended while away").await;

    let _server = Server::start(port).await;
    for guest in [&ada, &bob] {
        guest.shows(STATE, json!("connected")).await;
        guest.shows(MEMBERS, json!(["Ada", "Bob"])).await;
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
    let why = "return document.querySelector('#trouble-why').textContent";

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
async fn a_tab_whose_connection_was_cut_comes_back_as_itself_and_nobody_is_told() {
    let server = Server::start(0).await;
    let mut line = CutLine::to(server.port()).await;
    let browser = Browser::start().await;
    let ada = browser.tab(&line.url).await;
    let bob = browser.tab(&server.url).await;
    ada.enter("Ada", "lobby").await;
    bob.enter("Bob", "lobby").await;
    ada.shows(MEMBERS, json!(["Ada", "Bob"])).await;
    ada.say("before").await;
    bob.shows(SAID, json!([["Ada", "before"]])).await;

    // The tab sees its connection end, the server does not.
    line.cut();
    let welcomed =
        json!(["You joined as Ada", "Bob joined", "You are back. What was said meanwhile is not shown."]);
    ada.shows(NOTICES, welcomed.clone()).await;
    ada.shows(STATE, json!("connected")).await;
    ada.say("after").await;
    bob.shows(SAID, json!([["Ada", "before"], ["Ada", "after"]])).await;
    for guest in [&ada, &bob] {
        guest.shows(MEMBERS, json!(["Ada", "Bob"])).await;
    }
    bob.shows(NOTICES, json!(["You joined as Bob"])).await;

    // The server has ended the old connection, and even that tells nobody anything.
    let ended = tokio::time::timeout(
        TEST_TIMEOUT,
        line.a_ghost_hears(
            |bytes| matches!(bytes, [0x88, _, high, low] if u16::from_be_bytes([*high, *low]) == 4001),
        ),
    );
    ended.await.expect("the server closes the old connection with 4001");
    bob.say("so?").await;
    ada.shows(SAID, json!([["Ada", "before"], ["Ada", "after"], ["Bob", "so?"]])).await;
    ada.shows(NOTICES, welcomed).await;
    bob.shows(NOTICES, json!(["You joined as Bob"])).await;
    bob.shows(MEMBERS, json!(["Ada", "Bob"])).await;
}

#[tokio::test]
async fn two_guests_of_one_name_keep_their_names_over_a_restart_and_a_reload() {
    let server = Server::start(0).await;
    let browser = Browser::start().await;
    let first = browser.tab(&server.url).await;
    let second = browser.tab(&server.url).await;
    first.enter("Ada", "lobby").await;
    second.enter("Ada", "lobby").await;
    second.shows(NOTICES, json!(["The name Ada is taken here; you joined as Ada (2)"])).await;
    let is = "return document.querySelector('#members li[data-you]')?.dataset.name";

    let port = server.port();
    server.kill().await;
    for guest in [&first, &second] {
        guest.shows(STATE, json!("waiting")).await;
        // Neither comes back before it is told to.
        guest.shows("window.setTimeout = () => 0; return true", json!(true)).await;
    }
    // Whoever is still waiting for an earlier timer finds nobody, and plans no other.
    for guest in [&first, &second] {
        guest.shows("dispatchEvent(new Event('online')); return true", json!(true)).await;
        guest.shows(STATE, json!("waiting")).await;
    }
    let server = Server::start(port).await;
    // In the other order: the second could have the first one's name now.
    for (guest, name) in [(&second, "Ada (2)"), (&first, "Ada")] {
        guest.shows("dispatchEvent(new Event('online')); return true", json!(true)).await;
        guest.shows(STATE, json!("connected")).await;
        guest.shows(is, json!(name)).await;
    }
    second.look().await;
    browser.client.refresh().await.expect("the page loads again");
    second.shows(STATE, json!("connected")).await;
    second.shows(is, json!("Ada (2)")).await;

    // Where the name is somebody else's by now, the page says so.
    server.kill().await;
    first.shows(STATE, json!("waiting")).await;
    let server = Server::start(port).await;
    let mut other = Raw::enter(&server, "name=Ada&room=lobby").await;
    other.hears("Ada").await;
    first.shows("dispatchEvent(new Event('online')); return true", json!(true)).await;
    first.shows(STATE, json!("connected")).await;
    let notices =
        "return [...document.querySelectorAll('#messages li[data-kind=notice] .text')].pop().textContent
        .replace(/\\(\\d\\)/g, '(n)')";
    let now = "You are back as Ada (n): somebody else is Ada here now. What was said meanwhile is not shown.";
    first.shows(notices, json!(now)).await;
}

#[tokio::test]
async fn a_tab_that_was_taken_over_says_so_and_does_not_come_back_by_itself() {
    let server = Server::start(0).await;
    let browser = Browser::start().await;
    let ada = browser.tab(&server.url).await;
    ada.enter("Ada", "lobby").await;
    ada.shows("window.setTimeout = () => { document.title = 'planned' }; return true", json!(true)).await;
    ada.look().await;
    let token = ada.client.execute("return sessionStorage['shardcast-chat.token']", Vec::new()).await;
    let token = token.expect("the script runs").as_str().expect("there is a token").replace('"', "");
    let mut copy = Raw::enter(&server, &format!("name=Ada&room=lobby&token={token}")).await;
    copy.hears("Ada").await;
    ada.shows(STATE, json!("refused")).await;
    let why = "return document.querySelector('#trouble-why').textContent";
    ada.shows(why, json!("You are in this room on another page now.")).await;
    ada.shows("return document.title.includes('planned')", json!(false)).await;
    ada.click("#retry").await;
    ada.shows(STATE, json!("connected")).await;
    assert_eq!(copy.end().await, (4001, "you have connected again on another connection".to_owned()));
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
        "return [...document.querySelectorAll('#rooms a, #switch input, #switch button, #doings button')]
        .filter(touched => touched.offsetHeight < 40).map(touched => touched.outerHTML)";
    ada.shows(heights, json!([])).await;
    ada.shows("return getComputedStyle(document.querySelector('#rooms a')).display", json!("block")).await;
    // At the lower end of the panel, and not drawn up to the rooms.
    ada.shows("return getComputedStyle(document.querySelector('#doings')).display", json!("flex")).await;
}

// ---- without a browser

#[tokio::test]
async fn a_token_takes_over_its_own_connection_with_no_notice_and_only_its_own() {
    let server = Server::start(0).await;
    let mut bob = Raw::enter(&server, "name=Bob&room=lobby").await;
    bob.hears("Bob").await;
    let mut ghost = Raw::enter(&server, "name=Ada&room=lobby&token=of-ada").await;
    ghost.hears("Ada").await;
    assert_eq!(bob.next().await["type"], "joined");

    // No token is nobody's, another token is somebody else's, and the same token in another room too.
    let mut nobody = Raw::enter(&server, "name=Ada&room=lobby").await;
    nobody.hears("Ada (2)").await;
    let mut namesake = Raw::enter(&server, "name=Ada&room=lobby&token=of-another").await;
    namesake.hears("Ada (3)").await;
    let mut elsewhere = Raw::enter(&server, "name=Ada&room=garden&token=of-ada").await;
    elsewhere.hears("Ada").await;
    for _ in 0..2 {
        assert_eq!(bob.next().await["type"], "joined");
    }

    // Under whichever name it comes back.
    for wished in ["Ada", "Eve"] {
        let mut back = Raw::enter(&server, &format!("name={wished}&room=lobby&token=of-ada")).await;
        let welcome = back.next().await;
        assert_eq!(welcome["you"], "Ada");
        assert_eq!(welcome["members"], json!(["Bob", "Ada", "Ada (2)", "Ada (3)"]));
        assert_eq!(ghost.end().await, (4001, "you have connected again on another connection".to_owned()));
        // It can talk, and is heard under its name; nothing was said of coming or going before.
        back.say(json!({ "type": "say", "text": wished })).await;
        let said = bob.next().await;
        assert_eq!([&said["type"], &said["name"], &said["text"]], ["said", "Ada", wished]);
        back.say(json!({ "type": "who" })).await;
        while back.next().await["type"] != "members" {}
        ghost = back;
    }
    // When it leaves at last, that is said once.
    ghost.leave().await;
    let left = bob.next().await;
    assert_eq!([&left["type"], &left["name"]], ["left", "Ada"]);
    assert_eq!(left["members"], json!(["Bob", "Ada (2)", "Ada (3)"]));

    let mut long = Raw::enter(&server, &format!("name=Ada&room=lobby&token={}", "x".repeat(65))).await;
    assert_eq!(long.end().await, (1008, "a token must have at most 64 bytes".to_owned()));
}

#[tokio::test]
async fn the_name_that_was_given_may_be_wished_for_again() {
    let server = Server::start(0).await;
    let longest = "x".repeat(32);
    let mut first = Raw::enter(&server, &format!("name={longest}&room=lobby")).await;
    first.hears(&longest).await;
    let mut second = Raw::enter(&server, &format!("name={longest}&room=lobby")).await;
    let given = format!("{} (2)", "x".repeat(28));
    second.hears(&given).await;
    second.leave().await;
    assert_eq!(first.next().await["type"], "joined");
    assert_eq!(first.next().await["type"], "left");
    let mut again = Raw::enter(&server, &format!("name={}&room=lobby", given.replace(' ', "%20"))).await;
    again.hears(&given).await;
}

#[tokio::test]
async fn sigterm_ends_the_chat_with_a_close_frame_although_a_request_is_half_sent() {
    let mut server = Server::start(0).await;
    let mut half = TcpStream::connect(("127.0.0.1", server.port())).await.expect("it listens");
    half.write_all(b"GET /ws?name=Eve HTT").await.expect("it reads");
    let mut ada = Raw::enter(&server, "name=Ada&room=lobby").await;
    ada.hears("Ada").await;
    let process = server.process.id().expect("it runs").to_string();
    let told = Command::new("kill").args(["-TERM", &process]).status().await.expect("there is a kill");
    assert!(told.success());
    assert_eq!(ada.end().await, (1001, String::new()));
    let ended =
        tokio::time::timeout(TEST_TIMEOUT, server.process.wait()).await.expect("it does not wait for ever");
    assert!(ended.expect("it was started").success());
    drop(half);
}

/// A guest without a page: a socket and JSON.
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

    /// The welcome, under this name.
    async fn hears(&mut self, name: &str) {
        let welcome = self.next().await;
        assert_eq!([&welcome["type"], &welcome["you"]], ["welcome", name]);
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

/// A line between a browser and the server that can be cut on the browser's side alone, as when a network dies.
struct CutLine {
    url: String,
    cut: watch::Sender<()>,
    /// Connections that the server still believes in.
    ghosts: mpsc::UnboundedReceiver<TcpStream>,
}

impl CutLine {
    async fn to(port: u16) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a port is free");
        let url = format!("http://{}", listener.local_addr().expect("it is bound"));
        let (cut, is_cut) = watch::channel(());
        let (ghost, ghosts) = mpsc::unbounded_channel();
        tokio::spawn(async move {
            loop {
                let (mut browser, _) = listener.accept().await.expect("the browser can be accepted");
                let server = TcpStream::connect((Ipv4Addr::LOCALHOST, port)).await;
                let mut server = server.expect("the chat listens");
                let (mut is_cut, ghost) = (is_cut.clone(), ghost.clone());
                is_cut.mark_unchanged(); // whoever comes after a cut is on a new line
                tokio::spawn(async move {
                    tokio::select! {
                        _ = tokio::io::copy_bidirectional(&mut browser, &mut server) => {}
                        Ok(()) = is_cut.changed() => drop(ghost.send(server)),
                    }
                });
            }
        });
        Self { url, cut, ghosts }
    }

    /// Cuts every connection that is there now.
    fn cut(&self) {
        self.cut.send_replace(());
    }

    /// Waits until four bytes that the server sends to one that was cut are what `is_it` looks for.
    async fn a_ghost_hears(&mut self, is_it: impl Fn(&[u8]) -> bool) {
        let mut ghosts = Vec::new();
        loop {
            while let Ok(server) = self.ghosts.try_recv() {
                ghosts.push((server, Vec::new()));
            }
            for (server, heard) in &mut ghosts {
                let _ = tokio::time::timeout(POLL_EVERY, server.read_buf(heard)).await;
                if heard.windows(4).any(&is_it) {
                    return;
                }
            }
            tokio::time::sleep(POLL_EVERY).await;
        }
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

    /// Returns when the process is gone, and with it its hold on the port.
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
