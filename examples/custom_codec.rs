//! A custom codec: MessagePack by `rmp-serde`, for a hub and its client.
//!
//! `cargo run --release --example custom_codec --features client`

#![allow(clippy::print_stdout)]

use axum::Router;
use axum::extract::State;
use axum::routing::get;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shardcast::{
    CodecError, Decode, Encode, Engine, EngineConfig, Hub, HubClient, HubContext, MessageKind,
    WebSocketUpgrade, WsHub, WsHubConfig, deserialize_bounded,
};

/// MessagePack in binary messages, for every serde type.
struct MessagePack;

impl<T: Serialize> Encode<T> for MessagePack {
    fn encode(value: &T, payload: &mut Vec<u8>) -> Result<MessageKind, CodecError> {
        rmp_serde::encode::write_named(payload, value).map_err(CodecError::encode)?;
        Ok(MessageKind::Binary)
    }
}

impl<T: DeserializeOwned> Decode<T> for MessagePack {
    fn decode(kind: MessageKind, payload: &[u8]) -> Result<T, CodecError> {
        CodecError::require(kind, MessageKind::Binary)?;
        let mut deserializer = rmp_serde::Deserializer::new(payload);
        // The limit of `rmp-serde` (1,024 levels) applies to sequences and maps, not to enums.
        let value = deserialize_bounded(&mut deserializer)?;
        match deserializer.into_inner() {
            [] => Ok(value),
            rest => Err(CodecError::TrailingBytes { count: rest.len() }),
        }
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Reading {
    sensor: u32,
    celsius: f32,
}

struct Sensors;

impl WsHub for Sensors {
    type Codec = MessagePack;
    type InMessage = Reading;
    type OutMessage = Reading;

    async fn on_message(&self, reading: Reading, ctx: HubContext<Self>) {
        ctx.broadcast(reading).await;
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let engine = Engine::start(EngineConfig::default())?;
    let sensors = engine.hub::<Sensors>(WsHubConfig::default())?;
    let serve = async |ws: WebSocketUpgrade, State(sensors): State<Hub<Sensors>>| ws.serve(&sensors, Sensors);
    let app = Router::new().route("/ws", get(serve)).with_state(sensors);
    let listener = shardcast::listen("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    tokio::spawn(async move { axum::serve(listener, app).await });

    let mut client = HubClient::builder(format!("ws://{address}/ws"))
        .with_in_message::<Reading>()
        .with_out_message::<Reading>()
        .with_codec::<MessagePack>()
        .build();
    client.connect().await?;
    client.send(Reading { sensor: 7, celsius: 21.5 })?;
    if let Some(reading) = client.recv().await {
        println!("{:?}", reading?);
    }
    client.disconnect().await;
    Ok(())
}
