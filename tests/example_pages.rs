//! The pages of the examples in a real browser: they connect, draw what they receive, and log no error.
//!
//! Headless Chromium over WebDriver, as in `chat_page.rs`. Each step polls what the page shows until it is so, or fails
//! with what was shown last. If Chromium is missing, the tests fail: `ci/install-browser` installs it.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::io::{self, BufRead as _, Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use fantoccini::wd::Capabilities;
use fantoccini::{Client, ClientBuilder, Locator};
use hyper_util::client::legacy::connect::HttpConnector;
use serde_json::{Value, json};
use testkit_hub::program::Running;
use testkit_hub::{TEST_TIMEOUT, within_timeout};
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};

/// How many different colours there are on the canvas.
const COLOURS: &str = "const canvas = document.querySelector('canvas');
    const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
    return new Set(new Uint32Array(pixels.buffer)).size > 3";

#[tokio::test]
async fn the_ticker_page_draws_prices_of_as_many_symbols_as_are_chosen() {
    let (_program, url) = start("ticker").await;
    let page = Page::open(&url).await;
    page.shows("return document.body.dataset.state", json!("connected")).await;
    page.shows("return Number(document.body.dataset.received) > 20", json!(true)).await;
    page.shows(COLOURS, json!(true)).await;
    let height = "return document.querySelector('canvas').clientHeight";
    let before = page.run(height).await.as_u64().unwrap();
    page.click("label:has([value='500'])").await;
    page.shows(&format!("{height} > {}", before * 4), json!(true)).await;
    page.shows("return Number(document.body.dataset.received) > 1000", json!(true)).await;
    page.has_logged_no_error().await;
}

#[tokio::test]
async fn the_game_page_plays_by_the_keyboard_and_shows_why_a_player_was_kicked() {
    const PLAYERS: &str =
        "return [...document.querySelectorAll('#players li')].map(player => player.dataset.name)";
    let (_program, url) = start("game").await;
    let socket = url.replace("http", "ws");
    let mut ada = testkit_hub::Client::connect(format!("{socket}/ws?name=Ada")).await;
    ada.recv_text().await; // she is the owner
    let page = Page::open(&format!("{url}/?name=Bob")).await;
    page.shows(PLAYERS, json!(["Ada", "Bob"])).await;
    page.shows(COLOURS, json!(true)).await;
    page.run("dispatchEvent(new KeyboardEvent('keydown', { key: 'ArrowRight' }))").await;
    within_timeout(async {
        loop {
            let state: Value = serde_json::from_str(&ada.recv_text().await).unwrap();
            if state["players"][1][1]["x"].as_i64() > Some(50) {
                break;
            }
        }
    })
    .await;
    ada.send_text(r#"{"type":"kick","name":"Bob"}"#).await;
    page.shows("return document.body.dataset.state", json!("refused")).await;
    let status = "return document.querySelector('#status').textContent";
    page.shows(status, json!("Disconnected: kicked by the owner")).await;
    page.click("#watch").await;
    page.shows(PLAYERS, json!(["Ada"])).await;
    page.has_logged_no_error().await;
}

/// An example, and where its page is.
async fn start(name: &str) -> (Running, String) {
    let mut program = Running::start(name, &["--port", "0"]);
    let url = program.wait_for_line("listening on ").await;
    (program, url)
}

/// A page in a browser of its own.
struct Page {
    client: Client,
    driver: Driver,
}

/// The browser's driver. Dropping it ends the browser, too.
struct Driver {
    _process: Child,
    address: SocketAddr,
    /// Kept open: the driver would end with its next line otherwise.
    _lines: Lines<BufReader<ChildStdout>>,
    /// Where the browser keeps its profile and sockets.
    files: PathBuf,
    session: String,
}

impl Page {
    async fn open(url: &str) -> Self {
        let mut driver = Driver::start().await;
        let arguments = [
            "--headless",
            "--no-sandbox", // root has none; the only pages that it opens are ours
            "--disable-gpu",
            "--disable-dev-shm-usage",
            "--disable-quic",
            "--no-first-run",
            "--disable-background-networking",
            "--disable-component-update",
            "--disable-sync",
        ];
        let mut capabilities = Capabilities::new();
        capabilities.insert("goog:chromeOptions".to_owned(), json!({ "args": arguments }));
        capabilities.insert("goog:loggingPrefs".to_owned(), json!({ "browser": "ALL" }));
        let client = ClientBuilder::new(HttpConnector::new())
            .capabilities(capabilities)
            .connect(&format!("http://{}", driver.address))
            .await
            .unwrap_or_else(|error| panic!("Chromium does not start ({error}): run ci/install-browser"));
        driver.session = client.session_id().await.unwrap().unwrap();
        within_timeout(client.goto(url)).await.unwrap();
        Self { client, driver }
    }

    async fn run(&self, script: &str) -> Value {
        within_timeout(self.client.execute(script, Vec::new())).await.unwrap()
    }

    /// Waits until `script` returns `expected`.
    async fn shows(&self, script: &str, expected: Value) {
        let deadline = Instant::now() + TEST_TIMEOUT;
        loop {
            let shown = self.run(script).await;
            if shown == expected {
                return;
            }
            assert!(Instant::now() < deadline, "{script}\n   shows {shown}\ninstead of {expected}");
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
    }

    async fn click(&self, selector: &str) {
        within_timeout(self.client.find(Locator::Css(selector))).await.unwrap().click().await.unwrap();
    }

    /// What its policy (CSP) forbids is an error, too.
    async fn has_logged_no_error(&self) {
        let path = format!("/session/{}/se/log", self.driver.session);
        let driver = self.driver.address;
        let log =
            tokio::task::spawn_blocking(move || request(driver, "POST", &path, r#"{"type":"browser"}"#));
        let log = within_timeout(log).await.unwrap().unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&log).unwrap()["value"], json!([]));
    }
}

impl Driver {
    async fn start() -> Self {
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let nth = COUNT.fetch_add(1, Relaxed);
        // Under the system's folder and not the target's: a socket's path must be short.
        let files = std::env::temp_dir().join(format!("example_pages-{}-{nth}", std::process::id()));
        std::fs::create_dir_all(&files).unwrap();
        let mut process = Command::new("chromedriver")
            .arg("--port=0")
            .env("TMPDIR", &files)
            .stdout(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("chromedriver does not start ({error}): run ci/install-browser"));
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let port = loop {
            let line = within_timeout(lines.next_line()).await.unwrap().unwrap();
            if let Some((_, port)) = line.split_once("started successfully on port ") {
                break port.trim_end_matches('.').parse().unwrap();
            }
        };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        Self { _process: process, address, _lines: lines, files, session: String::new() }
    }
}

impl Drop for Driver {
    /// Asks the driver to end its Chromium, and waits for that: killing the driver alone would leave the browser.
    fn drop(&mut self) {
        let _ = request(self.address, "DELETE", &format!("/session/{}", self.session), "");
        let _ = std::fs::remove_dir_all(&self.files);
    }
}

/// A request to the driver; the body of its response. For what the client library has no command for. The driver keeps
/// the connection open.
fn request(driver: SocketAddr, method: &str, path: &str, body: &str) -> io::Result<Vec<u8>> {
    let mut stream = std::net::TcpStream::connect(driver)?;
    stream.set_read_timeout(Some(TEST_TIMEOUT))?;
    let length = body.len();
    write!(stream, "{method} {path} HTTP/1.1\r\nhost: {driver}\r\ncontent-length: {length}\r\n\r\n{body}")?;
    let mut reader = io::BufReader::new(stream);
    let (mut line, mut length) = (String::new(), 0);
    while line != "\r\n" {
        line.clear();
        if reader.read_line(&mut line)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length:") {
            length = value.trim().parse().map_err(io::Error::other)?;
        }
    }
    let mut body = vec![0; length];
    reader.read_exact(&mut body)?;
    Ok(body)
}
