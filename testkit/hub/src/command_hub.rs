//! A hub that does what its clients ask for.

use std::ops::ControlFlow;

use axum::Router;
use axum::extract::State;
use axum::routing::any;
use shardcast::{
    CloseCode, CloseReason, CodecError, ConnectionId, Dropped, Hub, HubContext, RawCodec, Refusal, RunOn,
    WebSocketUpgrade, WsHub,
};

use crate::client::Client;

/// A hub that does what its clients ask for, and sends each its id when it connects.
///
/// `all T`, `me T`, `except ID,ID T`, `join G`, `leave G`, `group G T`, `group-except G ID,ID T`, `groups G,G T`,
/// `end CODE REASON`, `panic T`; anything else is sent back to its sender.
#[derive(Debug)]
pub struct CommandHub;

impl WsHub for CommandHub {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.unicast(ctx.connection_id().to_string()).await;
        Ok(())
    }

    async fn on_message(&self, message: String, ctx: HubContext<Self>) {
        let (verb, rest) = message.split_once(' ').unwrap_or((&message, ""));
        let two = || rest.split_once(' ').unwrap_or((rest, ""));
        match verb {
            "all" => ctx.broadcast(rest.to_owned()).await,
            "me" => ctx.unicast(rest.to_owned()).await,
            "except" => {
                let (ids, text) = two();
                ctx.broadcast_except(&ids.split(',').collect::<Vec<_>>(), text.to_owned()).await;
            }
            "join" => ctx.add_to_group(rest).await,
            "leave" => ctx.remove_from_group(rest).await,
            "group" => {
                let (group, text) = two();
                ctx.broadcast_group(group, text.to_owned()).await;
            }
            "group-except" => {
                let (group, (ids, text)) =
                    rest.split_once(' ').map(|(g, r)| (g, r.split_once(' ').unwrap())).unwrap();
                let ids: Vec<_> = ids.split(',').collect();
                ctx.broadcast_group_except(group, &ids, text.to_owned()).await;
            }
            "groups" => {
                let (groups, text) = two();
                ctx.broadcast_groups(&groups.split(',').collect::<Vec<_>>(), text.to_owned()).await;
            }
            "end" => {
                let (code, reason) = two();
                ctx.disconnect(CloseCode(code.parse().unwrap()), reason.to_owned()).await;
            }
            "panic" => panic!("{rest}"),
            _ => ctx.unicast(message).await,
        }
    }
}

/// A hub whose methods run on the runtime instead of on the shards.
#[derive(Debug)]
pub struct OnRuntime<H>(H);

impl<H> From<H> for OnRuntime<H> {
    fn from(hub: H) -> Self {
        Self(hub)
    }
}

impl<H: WsHub> WsHub for OnRuntime<H> {
    type Codec = H::Codec;
    type InMessage = H::InMessage;
    type OutMessage = H::OutMessage;
    const RUN_ON: RunOn = RunOn::Runtime;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        self.0.on_connected(ctx).await
    }

    async fn on_message(&self, message: H::InMessage, ctx: HubContext<Self>) {
        self.0.on_message(message, ctx).await;
    }

    async fn on_undecodable(&self, ctx: HubContext<Self>, error: CodecError) -> ControlFlow<()> {
        self.0.on_undecodable(ctx, error).await
    }

    async fn on_dropped(&self, ctx: HubContext<Self>, dropped: Dropped) {
        self.0.on_dropped(ctx, dropped).await;
    }

    async fn on_disconnected(&self, ctx: HubContext<Self>, reason: CloseReason) {
        self.0.on_disconnected(ctx, reason).await;
    }
}

/// An application that serves a [`CommandHub`] at the path `/ws`.
pub fn command_app(hub: Hub<CommandHub>) -> Router {
    let serve = async |ws: WebSocketUpgrade, State(hub): State<Hub<CommandHub>>| ws.serve(&hub, CommandHub);
    Router::new().route("/ws", any(serve)).with_state(hub)
}

/// Connects to a [`CommandHub`] to whose clients nothing is sent; returns the id of the connection, too.
pub async fn connect(url: &str) -> (Client, ConnectionId) {
    let (client, id, received) = connect_amid(url).await;
    assert!(received.is_empty(), "{received:?}");
    (client, id)
}

/// Connects to a [`CommandHub`] while something is sent to its clients; returns also what was received before the id.
pub async fn connect_amid(url: &str) -> (Client, ConnectionId, Vec<String>) {
    let mut client = Client::connect(url).await;
    let mut received = Vec::new();
    loop {
        let text = client.recv_text().await;
        match text.parse() {
            Ok(id) => return (client, id, received),
            Err(_) => received.push(text),
        }
    }
}
