//! Authentication by JSON Web Tokens: checked before the upgrade, refreshed over the connection, expired in time.
//!
//! `cargo run --release --example auth_jwt --features jwt`, then open the address that it prints. The page logs in (anybody may, this is
//! an example), opens a WebSocket with the token as a subprotocol, which is in no URL and no log, and sends a new token
//! when the hub asks for one. Tokens live for a minute; `--token-seconds N` changes that, `--port P` the port.

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::io::Read as _;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::extract::{Query, State};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::{any, get, post};
use axum::{Json, Router};
use jsonwebtoken::{Algorithm, DecodingKey, EncodingKey, Header, Validation};
use serde::{Deserialize, Serialize};
use shardcast::auth::{Denied, Token};
use shardcast::{
    CloseCode, Engine, EngineConfig, Hub, HubContext, JsonCodec, Refusal, Stateful, StatefulHub,
    WebSocketUpgrade, WsHubConfig,
};

/// What a token says.
#[derive(Serialize, Deserialize)]
struct Claims {
    /// The user.
    sub: String,
    /// When it expires, in seconds since 1970.
    exp: u64,
}

impl Claims {
    fn expires_at(&self) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(self.exp)
    }
}

/// Makes and checks tokens.
struct Tokens {
    encoding: EncodingKey,
    decoding: DecodingKey,
    life: Duration,
}

impl Tokens {
    fn make(&self, user: &str) -> Result<String, Denied> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let claims = Claims { sub: user.to_owned(), exp: (now + self.life).as_secs() };
        jsonwebtoken::encode(&Header::default(), &claims, &self.encoding).map_err(Denied::forbidden)
    }

    fn verify(&self, token: &str) -> Result<Claims, jsonwebtoken::errors::Error> {
        let mut validation = Validation::new(Algorithm::HS256);
        validation.leeway = 0;
        Ok(jsonwebtoken::decode(token, &self.decoding, &validation)?.claims)
    }
}

#[derive(Deserialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum FromClient {
    Say {
        text: String,
    },
    /// The answer to `refresh`.
    Token {
        token: String,
    },
}

#[derive(Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
enum ToClient {
    Said {
        by: String,
        text: String,
    },
    /// The token expires: send a new one within 10 s.
    Refresh,
}

struct Chat {
    user: String,
    tokens: Arc<Tokens>,
    /// It was asked for a new token, and has not sent one.
    is_asked: bool,
}

impl StatefulHub for Chat {
    type Codec = JsonCodec;
    type InMessage = FromClient;
    type OutMessage = ToClient;

    async fn on_message(&mut self, message: FromClient, ctx: HubContext<Stateful<Self>>) {
        match message {
            FromClient::Say { text } => ctx.broadcast(ToClient::Said { by: self.user.clone(), text }).await,
            FromClient::Token { token } => match self.tokens.verify(&token) {
                Ok(claims) if claims.sub == self.user => {
                    self.is_asked = false;
                    ctx.expires_at(claims.expires_at()).await;
                }
                _ => ctx.disconnect(CloseCode::POLICY_VIOLATION, "that token is not valid for you").await,
            },
        }
    }

    async fn on_expired(&mut self, ctx: HubContext<Stateful<Self>>) -> ControlFlow<()> {
        if std::mem::replace(&mut self.is_asked, true) {
            return ControlFlow::Break(()); // there was no answer
        }
        ctx.unicast(ToClient::Refresh).await;
        ctx.expires_at(SystemTime::now() + Duration::from_secs(10)).await;
        ControlFlow::Continue(())
    }

    async fn on_connected(&mut self, ctx: HubContext<Stateful<Self>>) -> Result<(), Refusal> {
        ctx.unicast(ToClient::Said { by: "server".into(), text: format!("hello {}", self.user) }).await;
        Ok(())
    }
}

#[derive(Clone)]
struct App {
    hub: Hub<Stateful<Chat>>,
    tokens: Arc<Tokens>,
}

/// Refused with 401 and the reason before the upgrade, so that a stranger costs no connection.
async fn connect(ws: WebSocketUpgrade, token: Token, State(app): State<App>) -> Result<Response, Denied> {
    let claims = app.tokens.verify(token.as_str()).map_err(Denied::unauthorized)?;
    let expires_at = claims.expires_at();
    let chat = Chat { user: claims.sub.clone(), tokens: app.tokens, is_asked: false };
    Ok(ws.serve(&app.hub, chat).user(claims.sub).expires_at(expires_at).into_response())
}

#[derive(Deserialize)]
struct Login {
    name: String,
}

async fn log_in(State(app): State<App>, Query(login): Query<Login>) -> Result<Json<String>, Denied> {
    app.tokens.make(&login.name).map(Json)
}

const PAGE: &str = r#"<!doctype html><meta charset="utf-8"><title>auth_jwt</title>
<form><input name="text" placeholder="say something" autofocus></form><pre></pre>
<script>
  const name = new URLSearchParams(location.search).get("name") ?? prompt("your name") ?? "ada";
  const logIn = async () => (await fetch(`/login?name=${encodeURIComponent(name)}`, { method: "POST" })).json();
  logIn().then((token) => {
    const socket = new WebSocket(`ws://${location.host}/ws`, ["bearer", token]);
    const show = (line) => document.querySelector("pre").append(line + "\n");
    socket.onmessage = async ({ data }) => {
      const message = JSON.parse(data);
      if (message.type === "said") show(`${message.by}: ${message.text}`);
      if (message.type === "refresh") socket.send(JSON.stringify({ type: "token", token: await logIn() }));
    };
    socket.onclose = ({ code, reason }) => show(`closed: ${code} ${reason}`);
    document.querySelector("form").onsubmit = ({ target }) => {
      socket.send(JSON.stringify({ type: "say", text: target.text.value }));
      target.reset();
      return false;
    };
  });
</script>"#;

fn argument(name: &str, default: u64) -> Result<u64, Box<dyn Error>> {
    let mut arguments = std::env::args().skip_while(|argument| argument != name);
    let value = arguments.nth(1);
    value.map_or(Ok(default), |value| {
        value.parse().map_err(|_| format!("{name} needs a number, not {value:?}").into())
    })
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    // Drawn at each start: tokens do not survive a restart. A real service has its secret from its configuration.
    let mut secret = [0; 32];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut secret)?;
    let life = Duration::from_secs(argument("--token-seconds", 60)?);
    let (encoding, decoding) = (EncodingKey::from_secret(&secret), DecodingKey::from_secret(&secret));
    let tokens = Arc::new(Tokens { encoding, decoding, life });
    let engine = Engine::start(EngineConfig::default())?;
    let hub = engine.hub(WsHubConfig::default())?;
    let app = Router::new()
        .route("/", get(|| async { Html(PAGE) }))
        .route("/login", post(log_in))
        .route("/ws", any(connect))
        .with_state(App { hub, tokens });
    let listener = shardcast::listen(("127.0.0.1", argument("--port", 3000)? as u16)).await?;
    println!("listening on http://{}", listener.local_addr()?);
    axum::serve(listener, app).await?;
    Ok(())
}
