//! A server on a real socket, and an engine for it.

use std::net::SocketAddr;

use axum::Router;
use shardcast::{Engine, EngineConfig};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::wait::within_timeout;

/// An engine whose threads are not pinned, because other tests run on the same machine.
pub fn engine(shards: usize) -> Engine {
    Engine::start(EngineConfig { shards: Some(shards), pin: false, ..EngineConfig::default() }).unwrap()
}

/// An application on a free port, until this is dropped. Connections that were upgraded stay open.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    task: JoinHandle<()>,
}

impl Server {
    /// Starts it.
    pub async fn start(app: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Self { address, task: tokio::spawn(async move { axum::serve(listener, app).await.unwrap() }) }
    }

    /// Starts an application that wants to know the addresses of its clients.
    pub async fn start_with_addresses(app: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let app = app.into_make_service_with_connect_info::<SocketAddr>();
        Self { address, task: tokio::spawn(async move { axum::serve(listener, app).await.unwrap() }) }
    }

    /// The URL of a WebSocket at this path.
    pub fn url(&self, path: &str) -> String {
        format!("ws://{}{path}", self.address)
    }

    /// Ends it and drops what its routes keep.
    pub async fn stop(mut self) {
        self.task.abort();
        let _ = within_timeout(&mut self.task).await;
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}
