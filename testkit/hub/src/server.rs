//! A server on a real socket, and an engine for it.

use std::future::pending;
use std::net::SocketAddr;

use axum::Router;
use shardcast::{Engine, EngineConfig};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;

use crate::transport::Transport;
use crate::wait::within_timeout;

/// An engine whose threads are not pinned, because other tests run on the same machine.
pub fn engine(shards: usize) -> Engine {
    let io_uring = testkit::uses_io_uring();
    Engine::start(EngineConfig { shards: Some(shards), pin: false, io_uring, ..EngineConfig::default() })
        .unwrap()
}

/// Where a server listens, and what it talks over: a [`Server`], or an address for TCP.
#[derive(Debug, Clone, Copy)]
pub struct Endpoint {
    pub(crate) transport: Transport,
    pub(crate) address: SocketAddr,
}

impl From<&Server> for Endpoint {
    fn from(server: &Server) -> Self {
        Self { transport: server.transport, address: server.address }
    }
}

impl From<SocketAddr> for Endpoint {
    fn from(address: SocketAddr) -> Self {
        Self { transport: Transport::Plain, address }
    }
}

/// An application on a free port, until this is dropped. Connections that were upgraded stay open.
#[derive(Debug)]
pub struct Server {
    /// Where it listens.
    pub address: SocketAddr,
    /// What it talks over.
    pub transport: Transport,
    task: JoinHandle<()>,
}

impl Server {
    /// Starts it over TCP.
    pub async fn start(app: Router) -> Self {
        Self::start_over(Transport::Plain, app).await
    }

    /// Starts it.
    pub async fn start_over(transport: Transport, app: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Self { address, transport, task: tokio::spawn(transport.serve(listener, app, pending())) }
    }

    /// Starts an application that wants to know the addresses of its clients, over TCP.
    pub async fn start_with_addresses(app: Router) -> Self {
        Self::start_with_addresses_over(Transport::Plain, app).await
    }

    /// Starts an application that wants to know the addresses of its clients.
    pub async fn start_with_addresses_over(transport: Transport, app: Router) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Self { address, transport, task: tokio::spawn(transport.serve_with_addresses(listener, app)) }
    }

    /// The URL of a WebSocket at this path.
    pub fn url(&self, path: &str) -> String {
        format!("{}://{}{path}", self.transport.scheme(), self.address)
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
