//! A node: an engine that shares a log with others, with a hub behind a server on a real socket.

use std::future::ready;
use std::time::Duration;

use shardcast::backplane::memory::MemoryLog;
use shardcast::backplane::{BackplaneConfig, BackplaneState, OutagePolicy};
use shardcast::{ConnectionId, Engine, Hub, Shutdown, WsHubConfig};

use crate::client::Client;
use crate::command_hub::{CommandHub, command_app, connect};
use crate::server::{Server, engine};
use crate::wait::within_timeout;

/// A log that engines can share.
pub trait SharedLog {
    /// Makes an engine one of its nodes.
    fn join(&self, engine: &Engine, config: BackplaneConfig);
}

impl SharedLog for MemoryLog {
    fn join(&self, engine: &Engine, config: BackplaneConfig) {
        let log = self.clone();
        engine.backplane(move || ready(Ok(log.backplane())), config).unwrap();
    }
}

/// Settings of a node that tells the others often that it is alive.
pub fn config(outage: OutagePolicy) -> BackplaneConfig {
    BackplaneConfig {
        outage,
        heartbeat_interval: Duration::from_millis(100),
        node_timeout: Duration::from_secs(2),
        ..BackplaneConfig::default()
    }
}

/// What a process with an engine would be.
#[derive(Debug)]
pub struct Node {
    /// The engine.
    pub engine: Engine,
    /// Its hub.
    pub hub: Hub<CommandHub>,
    /// The hub's server, at the path `/ws`.
    pub server: Server,
}

impl Node {
    /// Starts one with so many shards.
    pub async fn start(log: &impl SharedLog, shards: usize, config: BackplaneConfig) -> Self {
        let name = std::any::type_name::<CommandHub>();
        Self::start_named(log, shards, config, name, WsHubConfig::default()).await
    }

    /// Starts one whose hub has this name and these settings.
    pub async fn start_named(
        log: &impl SharedLog,
        shards: usize,
        config: BackplaneConfig,
        name: &str,
        hub: WsHubConfig,
    ) -> Self {
        let engine = engine(shards);
        log.join(&engine, config);
        let hub = engine.hub_named::<CommandHub>(name, hub).unwrap();
        let server = Server::start(command_app(hub.clone())).await;
        Self { engine, hub, server }
    }

    /// Starts so many, which know each other. The first has one shard, the next one two.
    pub async fn start_all(log: &impl SharedLog, count: usize) -> Vec<Self> {
        let mut nodes = Vec::new();
        for number in 0..count {
            nodes.push(Self::start(log, 1 + number, config(OutagePolicy::Wait)).await);
        }
        for node in &nodes {
            node.knows(count).await;
        }
        nodes
    }

    /// Connects a client.
    pub async fn connect(&self) -> (Client, ConnectionId) {
        connect(&self.server.url("/ws")).await
    }

    /// Waits until it has this state.
    pub async fn is(&self, state: BackplaneState) {
        let mut now = self.engine.backplane_state().unwrap();
        within_timeout(now.wait_for(|now| *now == state)).await.unwrap();
    }

    /// Waits until it knows so many nodes, itself included.
    pub async fn knows(&self, count: usize) {
        let mut known = self.engine.nodes().unwrap();
        within_timeout(known.wait_for(|known| known.len() == count)).await.unwrap();
    }

    /// Shuts it down gracefully; its clients are told all at once.
    pub async fn shut_down(&self) {
        let shutdown = Shutdown { close_window: Duration::ZERO, ..Shutdown::within(Duration::from_secs(30)) };
        let report = within_timeout(self.engine.shutdown_with(shutdown)).await.unwrap();
        assert_eq!(report.cut_off, 0, "{report:?}");
    }

    /// Publishes a text until that is accepted, each time with another number; returns the last one. What was published here
    /// before, and may still be on its way, precedes it everywhere.
    pub async fn publish_last(&self, name: &str) -> String {
        for number in 0.. {
            let text = format!("{name} {number}");
            if within_timeout(self.hub.to_all().publish(&text)).await.is_ok() {
                return text;
            }
        }
        unreachable!("numbers do not end")
    }

    /// How often it has missed messages of others.
    pub fn gaps(&self) -> u64 {
        self.engine.backplane_metrics().unwrap().gaps
    }
}
