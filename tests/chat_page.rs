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
use futures_util::SinkExt;
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::{TcpListener, TcpStream};
use tokio::process::{Child, ChildStdout, Command};
use tokio::sync::{Mutex, MutexGuard};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::CloseFrame;

/// How long a step may take on a busy machine before it counts as never.
const PATIENCE: Duration = Duration::from_secs(30);
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
    let found = tokio::time::timeout(PATIENCE, async {
        while let Some(line) = lines.next_line().await.expect("its output is text") {
            if let Some((_, rest)) = line.split_once(prefix) {
                return rest.trim().to_owned();
            }
        }
        panic!("it ended without saying {prefix:?}");
    });
    let found = found.await.unwrap_or_else(|_| panic!("it did not say {prefix:?} within {PATIENCE:?}"));
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
        let deadline = Instant::now() + PATIENCE;
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
