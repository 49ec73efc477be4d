//! The session: a hub's methods behind the engine's handler.
//!
//! One for each connection, living on its shard. Decodes a message, calls the hub, polls
//! what that returns at once; only if it is pending does the connection stop reading,
//! and the waker brings the shard back to it. Knows hubs, codecs and the engine's handler
//! trait. Does not know sockets or frames.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Waker};

use shardcast_engine::{CloseReason, Context, Flow, Handler, Message};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::clients::Clients;
use crate::codec::{CodecError, Decode};
use crate::config::RunOn;
use crate::context::{MessageContext, Peer};
use crate::hub::{ConnectionRequest, DisconnectRequest, Hub, WsHub};

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

pub(crate) struct Session<H: WsHub> {
    hub: Arc<H>,
    /// The runtime of whoever served the connection: the hub's methods use its timers, sockets and tasks.
    runtime: Handle,
    run_on: RunOn,
    stage: Stage<H>,
    /// What the handler is busy with.
    task: Option<Task>,
    /// Dropped with the session, which tells `serve_hub` that all is over.
    _over: Option<oneshot::Sender<()>>,
}

enum Stage<H: WsHub> {
    Fresh(Clients<H::OutMessage, H::Codec>),
    Open(Arc<Peer<H::OutMessage, H::Codec>>),
}

impl<H: WsHub> Session<H> {
    pub(crate) fn new(handle: &Hub<H>, hub: H, runtime: Handle) -> Self {
        let stage = Stage::Fresh(handle.clients().clone());
        Self { hub: Arc::new(hub), runtime, run_on: handle.run_on(), stage, task: None, _over: None }
    }

    /// The receiver learns when `on_disconnect` is over.
    pub(crate) fn notify_over(&mut self) -> oneshot::Receiver<()> {
        let (sender, receiver) = oneshot::channel();
        self._over = Some(sender);
        receiver
    }

    fn peer(&mut self, context: &Context<'_>) -> Arc<Peer<H::OutMessage, H::Codec>> {
        let clients = match &self.stage {
            Stage::Open(peer) => return peer.clone(),
            Stage::Fresh(clients) => clients.clone(),
        };
        let id = context.id();
        let peer = Arc::new(Peer { clients, id, connection_id: id.to_string().into() });
        self.stage = Stage::Open(peer.clone());
        peer
    }

    /// Begins something, and goes on with it as far as it goes at once.
    fn begin(
        &mut self,
        future: impl Future<Output = ()> + Send + 'static,
        context: &mut Context<'_>,
    ) -> Flow {
        self.task = Some(match self.run_on {
            RunOn::Shard => Box::pin(future),
            RunOn::Runtime => {
                let task = self.runtime.spawn(future);
                Box::pin(async move {
                    match task.await {
                        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
                        // Cancelled: the runtime is shutting down.
                        _ => {}
                    }
                })
            }
        });
        self.go_on(context)
    }

    fn go_on(&mut self, context: &mut Context<'_>) -> Flow {
        // Taken, so that a future that panics is not polled again.
        let Some(mut task) = self.task.take() else { return Flow::Ready };
        let _entered = self.runtime.enter();
        // Most are ready at once and never use their waker, so the first poll goes without one. A future
        // that is pending is polled again with a real one, which replaces the first: that is the contract.
        if task.as_mut().poll(&mut TaskContext::from_waker(Waker::noop())).is_ready() {
            return Flow::Ready;
        }
        if task.as_mut().poll(&mut TaskContext::from_waker(&context.waker())).is_ready() {
            return Flow::Ready;
        }
        self.task = Some(task);
        Flow::Pending
    }
}

impl<H: WsHub> Handler for Session<H> {
    fn on_open(&mut self, context: &mut Context<'_>) -> Flow {
        let peer = self.peer(context);
        let hub = self.hub.clone();
        let opening = async move {
            hub.on_connect(ConnectionRequest { connection_id: peer.connection_id.clone(), id: peer.id })
                .await;
            hub.on_open(MessageContext::new(peer)).await;
        };
        self.begin(opening, context)
    }

    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Flow {
        match <H::Codec as Decode<H::InMessage>>::decode(message.kind, message.payload) {
            Ok(message) => {
                let call = MessageContext::new(self.peer(context));
                let hub = self.hub.clone();
                self.begin(async move { hub.on_message(message, call).await }, context)
            }
            Err(error) => {
                tracing::debug!(id = %context.id(), error = &error as &dyn std::error::Error, "undecodable message");
                context.close(match error {
                    CodecError::WrongKind { .. } => CloseReason::WrongKind,
                    _ => CloseReason::Undecodable,
                });
                Flow::Ready
            }
        }
    }

    fn on_resume(&mut self, context: &mut Context<'_>) -> Flow {
        self.go_on(context)
    }

    fn on_close(&mut self, reason: &CloseReason, context: &mut Context<'_>) -> Flow {
        let peer = self.peer(context);
        let hub = self.hub.clone();
        let (connection_id, reason) = (peer.connection_id.clone(), reason.clone());
        let parting = DisconnectRequest { connection_id, id: peer.id, reason };
        self.begin(async move { hub.on_disconnect(parting).await }, context)
    }
}
