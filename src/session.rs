//! The session: a hub's methods behind the engine's handler.
//!
//! One for each connection, living on its shard. Decodes a message, calls the hub, polls
//! what that returns at once; only if it is pending does the connection stop reading,
//! and the waker brings the shard back to it. Knows hubs, codecs and the engine's handler
//! trait. Does not know sockets or frames.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context as TaskContext, Waker};

use shardcast_engine::{CloseReason, ConnectionId, Context, Flow, Handler, MakeHandler, Message};
use tokio::runtime::Handle;
use tokio::sync::oneshot;

use crate::clients::Clients;
use crate::codec::{CodecError, Decode};
use crate::config::RunOn;
use crate::context::{MessageContext, Peer};
use crate::hub::{ConnectionRequest, DisconnectRequest, Hub, WsHub};

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

pub(crate) struct Session<H: WsHub> {
    seat: Arc<Seat<H>>,
    /// The runtime of whoever served the connection: the hub's methods use its timers, sockets and tasks.
    /// None if the shard's thread has entered it already.
    runtime: Option<Handle>,
    run_on: RunOn,
    /// What the handler is busy with.
    task: Option<Task>,
    _over: Over,
}

/// Dropped with the session, which tells `serve_hub` that all is over. Boxed, because most sessions have none.
pub(crate) type Over = Option<Box<oneshot::Sender<()>>>;

/// What the hub's methods borrow while they run.
struct Seat<H: WsHub> {
    hub: H,
    clients: Clients<H::OutMessage, H::Codec>,
    id: ConnectionId,
    /// Made when it is first asked for: many hubs never do.
    connection_id: OnceLock<Arc<str>>,
}

impl<H: WsHub> Peer<H::OutMessage, H::Codec> for Seat<H> {
    fn clients(&self) -> &Clients<H::OutMessage, H::Codec> {
        &self.clients
    }

    fn id(&self) -> ConnectionId {
        self.id
    }

    fn connection_id(&self) -> &Arc<str> {
        self.connection_id.get_or_init(|| self.id.to_string().into())
    }
}

impl<H: WsHub> Session<H> {
    /// What makes the session, once the connection has an id. `over` is dropped when `on_disconnect` is over.
    pub(crate) fn maker(handle: &Hub<H>, hub: H, runtime: Handle, over: Over) -> MakeHandler {
        let (clients, run_on) = (handle.clients().clone(), handle.run_on());
        let runtime = (handle.runtime() != Some(runtime.id())).then_some(runtime);
        Box::new(move |id| {
            let seat = Arc::new(Seat { hub, clients, id, connection_id: OnceLock::new() });
            Box::new(Self { seat, runtime, run_on, task: None, _over: over })
        })
    }

    fn context(&self) -> MessageContext<H::OutMessage, H::Codec> {
        MessageContext::new(self.seat.clone())
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
                let task = match &self.runtime {
                    Some(runtime) => runtime.spawn(future),
                    None => tokio::spawn(future),
                };
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
        let _entered = self.runtime.as_ref().map(Handle::enter);
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
        let (seat, call) = (self.seat.clone(), self.context());
        let opening = async move {
            // A name of its own: the one in the seat would stay for as long as the connection.
            let connection_id = seat.id.to_string().into();
            seat.hub.on_connect(ConnectionRequest { connection_id, id: seat.id }).await;
            seat.hub.on_open(call).await;
        };
        self.begin(opening, context)
    }

    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Flow {
        match <H::Codec as Decode<H::InMessage>>::decode(message.kind, message.payload) {
            Ok(message) => {
                let (seat, call) = (self.seat.clone(), self.context());
                self.begin(async move { seat.hub.on_message(message, call).await }, context)
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
        let (seat, reason) = (self.seat.clone(), reason.clone());
        let connection_id = seat.connection_id().clone();
        let parting = DisconnectRequest { connection_id, id: seat.id, reason };
        self.begin(async move { seat.hub.on_disconnect(parting).await }, context)
    }
}
