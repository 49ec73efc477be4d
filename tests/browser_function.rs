//! The function `connect` of the guide's page "coming from", which stands for a client library, in a real browser.
//!
//! The function is taken from the guide, so that what is shown is what is tested. Headless Chromium opens a page with it
//! and posts what happens there. A Chromium that is missing is a failure: `ci/install-browser` installs it.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::response::Html;
use axum::routing::{any, get, post};
use serde::{Deserialize, Serialize};
use shardcast::auth::{Denied, Token};
use shardcast::{
    CloseCode, Hub, HubContext, JsonCodec, Refusal, Serve, WebSocketUpgrade, WsHub, WsHubConfig,
};
use testkit_hub::{Server, engine, eventually, within_timeout};
use tokio::sync::mpsc;

/// What the page does with the function.
const SCRIPT: &str = r#"
    const report = (text) => fetch("/report", { method: "POST", body: text });
    const outcome = (promise) => promise.then(({ sum }) => `sum ${sum}`, ({ message }) => `failed: ${message}`);
    const socket = connect(`ws://${location.host}/ws`, {
      token: async () => "token-of-the-page",
      handlers: { hello: ({ name }) => report(`hello ${name}`) },
      onOpen: async () => report(await outcome(socket.ask({ type: "add", a: 1, b: 2 }))),
      onState: async (state, why) => {
        if (state === "open") return;
        const sent = socket.send({ type: "add", id: 0, a: 1, b: 2 });
        await report(`${state}, ${why}, sent ${sent}, ${await outcome(socket.ask({ type: "add", a: 1, b: 2 }))}`);
      },
    });
"#;

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum FromClient {
    Add { id: u64, a: u64, b: u64 },
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ToClient {
    Hello { name: String },
    Sum { id: u64, sum: u64 },
}

struct Adder {
    name: String,
}

impl WsHub for Adder {
    type Codec = JsonCodec;
    type InMessage = FromClient;
    type OutMessage = ToClient;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.unicast(ToClient::Hello { name: self.name.clone() }).await;
        Ok(())
    }

    async fn on_message(&self, FromClient::Add { id, a, b }: FromClient, ctx: HubContext<Self>) {
        ctx.unicast(ToClient::Sum { id, sum: a + b }).await;
    }
}

type App = State<(Hub<Adder>, mpsc::UnboundedSender<String>)>;

async fn connect(ws: WebSocketUpgrade, token: Token, State((hub, _)): App) -> Result<Serve<Adder>, Denied> {
    let name = token.as_str().strip_prefix("token-of-").ok_or(Denied::unauthorized("forged"))?;
    Ok(ws.serve(&hub, Adder { name: name.to_owned() }))
}

async fn report(State((_, reports)): App, text: String) {
    let _ = reports.send(text); // fails when the test has ended
}

/// The function, as the guide shows it.
fn function() -> &'static str {
    let page = include_str!("../src/guide/coming_from.md");
    page.split_once("```js\n").unwrap().1.split_once("```").unwrap().0
}

/// A browser with one page. Ends when dropped, and is removed with all that it leaves.
struct Browser {
    process: Child,
    profile: PathBuf,
}

impl Browser {
    fn open(url: &str) -> Self {
        let profile = std::env::temp_dir().join(format!("browser_function-{}", std::process::id()));
        let process = Command::new("chromium")
            // Root has no sandbox, and the only page is ours. Nothing outside is asked for.
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"])
            .args(["--no-first-run", "--disable-background-networking", "--disable-component-update"])
            .args(["--remote-debugging-port=0", &format!("--user-data-dir={}", profile.display()), url])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap_or_else(|error| panic!("Chromium does not start ({error}): run ci/install-browser"));
        Self { process, profile }
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        // Its other processes notice that a little later, and may still write.
        for _ in 0..100 {
            let _ = std::fs::remove_dir_all(&self.profile);
            if !self.profile.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[tokio::test]
async fn the_guides_function_for_browsers_asks_reconnects_and_obeys_a_final_close_code() {
    let hub = engine(1).hub::<Adder>(WsHubConfig::default()).unwrap();
    let (sender, mut reports) = mpsc::unbounded_channel();
    let page = format!("<!doctype html><title>page</title><script>{}{SCRIPT}</script>", function());
    let app = Router::new()
        .route("/", get(|| async { Html(page) }))
        .route("/ws", any(connect))
        .route("/report", post(report))
        .with_state((hub.clone(), sender));
    let server = Server::start(app).await;

    let _browser = Browser::open(&format!("http://{}/", server.address));

    let mut reported = async |expected: &[&str]| {
        let mut lines = Vec::new();
        for _ in expected {
            lines.push(within_timeout(reports.recv()).await.unwrap());
        }
        lines.sort(); // posts may overtake each other
        assert_eq!(lines, expected);
    };
    reported(&["hello the-page", "sum 3"]).await;

    // It comes back by itself, and says what it has to say on each connection.
    hub.to_all().disconnect(CloseCode::SERVICE_RESTART, "restart").await.unwrap();
    let back = "reconnecting, 1012 restart, sent false, failed: not connected";
    reported(&["hello the-page", back, "sum 3"]).await;

    // It does not after a code of the application: that is final.
    hub.to_all().disconnect(CloseCode(4001), "bye").await.unwrap();
    reported(&["closed, 4001 bye, sent false, failed: not connected"]).await;
    eventually(0, || hub.len()).await;
}
