//! The session: a hub's methods behind the engine's handler.
//!
//! One for each connection, living on its shard. Decodes a message, calls the hub, polls
//! what that returns at once; only if it is pending does the connection stop reading,
//! and the waker brings the shard back to it. Knows hubs, codecs and the engine's handler
//! trait. Does not know sockets or frames.

use std::borrow::Cow;
use std::future::Future;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Waker};

use shardcast_engine::{CloseCode, CloseReason, Context, Flow, Handler, MakeHandler, Message};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::codec::{CodecError, Decode};
use crate::config::RunOn;
use crate::context::{MessageContext, Peer};
use crate::hub::{ConnectionRequest, DisconnectRequest, Hub, HubContext, WsHub};

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Drops that a hub is told of before its shard's other connections have their turn.
const DROPS_PER_TURN: u32 = 1000;

pub(crate) struct Session<H: WsHub> {
    /// None once it is being dropped.
    hub: Option<Arc<H>>,
    peer: Arc<Peer<H::OutMessage>>,
    /// What the handler is busy with, on its shard.
    task: Option<Task>,
    /// None where nothing of it is needed: there is one of these for each idle connection.
    special: Option<Box<Special>>,
}

/// What most sessions do without.
struct Special {
    /// The runtime of whoever served the connection: the hub's methods use its timers, sockets and tasks.
    /// None if the shard's thread has entered it already.
    runtime: Option<Handle>,
    run_on: RunOn,
    /// What the handler is busy with, on the runtime.
    running: Option<JoinHandle<()>>,
    /// Nothing can run there any more, which was logged.
    is_runtime_gone: bool,
    _over: Over,
}

/// Dropped with the session, which tells `serve_hub` that all is over.
pub(crate) type Over = Option<oneshot::Sender<()>>;

/// Makes what is freed on the shard larger than what is made there to stay. The allocator would give the one's memory
/// to the other, and every session would lie among what its handshake has left, which then cannot be given back.
#[derive(Default)]
struct Apart {
    _bytes: [u64; 10],
}

/// Ends this turn of the task, and asks for another. Pending twice: the first poll of a turn goes without a waker
/// (see [`Session::start`]), and would not end it.
#[derive(Default)]
struct GiveWay {
    polls: u8,
}

impl Future for GiveWay {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut TaskContext<'_>) -> Poll<()> {
        if self.polls == 2 {
            return Poll::Ready(());
        }
        self.polls += 1;
        context.waker().wake_by_ref();
        Poll::Pending
    }
}

impl<H: WsHub> Session<H> {
    /// What makes the session, once the connection has an id. `over` is dropped when `on_disconnect` is over.
    pub(crate) fn maker(handle: &Hub<H>, hub: H, runtime: Handle, over: Over) -> MakeHandler {
        let (clients, run_on) = (handle.clients().clone(), handle.run_on());
        let runtime = (handle.runtime() != Some(runtime.id())).then_some(runtime);
        let is_special = runtime.is_some() || run_on != RunOn::Shard || over.is_some();
        let special = is_special.then(|| {
            Box::new(Special { runtime, run_on, running: None, is_runtime_gone: false, _over: over })
        });
        let apart = Apart::default();
        Box::new(move |id| {
            let _apart = apart;
            let (hub, peer) = (Some(Arc::new(hub)), Arc::new(Peer::new(clients, id)));
            Box::new(Self { hub, peer, task: None, special })
        })
    }

    fn hub(&self) -> Arc<H> {
        self.hub.clone().expect("it is taken by the drop only")
    }

    fn context(&self, context: &Context<'_>) -> HubContext<H> {
        MessageContext::new(self.peer.clone(), context.position())
    }

    fn runtime(&self) -> Option<&Handle> {
        self.special.as_ref()?.runtime.as_ref()
    }

    /// Begins something, and goes on with it as far as it goes at once.
    fn begin(
        &mut self,
        future: impl Future<Output = ()> + Send + 'static,
        context: &mut Context<'_>,
    ) -> Flow {
        if self.start(future) { Flow::Ready } else { self.go_on(context) }
    }

    /// Begins something; true if it is over already, all of it done on this thread.
    fn start(&mut self, future: impl Future<Output = ()> + Send + 'static) -> bool {
        if let Some(special) = self.special.as_mut().filter(|special| special.run_on == RunOn::Runtime) {
            special.running = Some(match &special.runtime {
                Some(runtime) => runtime.spawn(future),
                None => tokio::spawn(future),
            });
            return false;
        }
        let mut task: Task = Box::pin(future);
        let _entered = self.runtime().map(Handle::enter);
        // Most are ready at once and never use their waker, so the first poll goes without one. A future
        // that is pending is polled again with a real one, which replaces the first: that is the contract.
        let is_over = task.as_mut().poll(&mut TaskContext::from_waker(Waker::noop())).is_ready();
        self.task = (!is_over).then_some(task);
        is_over
    }

    fn go_on(&mut self, context: &mut Context<'_>) -> Flow {
        if let Some(running) = self.special.as_mut().and_then(|special| special.running.take()) {
            return self.wait_for(running, context);
        }
        // Taken, so that a future that panics is not polled again.
        let Some(mut task) = self.task.take() else { return Flow::Ready };
        let _entered = self.runtime().map(Handle::enter);
        if task.as_mut().poll(&mut TaskContext::from_waker(&context.waker())).is_ready() {
            return Flow::Ready;
        }
        self.task = Some(task);
        Flow::Pending
    }

    fn wait_for(&mut self, mut running: JoinHandle<()>, context: &mut Context<'_>) -> Flow {
        let Some(special) = &mut self.special else { return Flow::Ready };
        match Pin::new(&mut running).poll(&mut TaskContext::from_waker(&context.waker())) {
            Poll::Pending => {
                special.running = Some(running);
                return Flow::Pending;
            }
            Poll::Ready(Ok(())) => {}
            Poll::Ready(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Cancelled, because the runtime has shut down: nobody else does that. No method of this connection can run
            // any more, so its client is told instead of being left without answers.
            Poll::Ready(Err(_)) if !std::mem::replace(&mut special.is_runtime_gone, true) => {
                tracing::error!(
                    id = %context.id(),
                    hub = std::any::type_name::<H>(),
                    "a hub's runtime has shut down before its engine: the connection ends without `on_disconnect`; \
                     shut the engine down first"
                );
                let text = Cow::Borrowed("the server's runtime has ended");
                context.close(CloseReason::Application { code: CloseCode::INTERNAL_ERROR, text });
            }
            Poll::Ready(Err(_)) => {}
        }
        Flow::Ready
    }
}

impl<H: WsHub> Handler for Session<H> {
    fn on_open(&mut self, context: &mut Context<'_>) -> Flow {
        let (hub, call, id) = (self.hub(), self.context(context), self.peer.id());
        let opening = async move {
            // A name of its own: the peer's would stay for as long as the connection.
            let connection_id = id.to_string().into();
            hub.on_connect(ConnectionRequest { connection_id, id }).await;
            hub.on_open(call).await;
        };
        if self.start(opening) {
            return Flow::Ready;
        }
        // Another thread may have published on its behalf, which the shard does not see. After `Pending` the shard lets the
        // connection enter behind everything that was published.
        if self.go_on(context) == Flow::Ready {
            context.waker().wake();
        }
        Flow::Pending
    }

    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Flow {
        match <H::Codec as Decode<H::InMessage>>::decode(message.kind, message.payload) {
            Ok(message) => {
                let (hub, call) = (self.hub(), self.context(context));
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

    fn on_drop(&mut self, frames: u32, context: &mut Context<'_>) -> Flow {
        let (hub, connection_id) = (self.hub(), self.peer.connection_id().clone());
        let telling = async move {
            for told in 0..frames {
                if told > 0 && told % DROPS_PER_TURN == 0 {
                    GiveWay::default().await;
                }
                hub.on_message_drop(connection_id.clone()).await;
            }
        };
        self.begin(telling, context)
    }

    fn on_resume(&mut self, context: &mut Context<'_>) -> Flow {
        self.go_on(context)
    }

    fn on_close(&mut self, reason: &CloseReason, context: &mut Context<'_>) -> Flow {
        let (hub, connection_id) = (self.hub(), self.peer.connection_id().clone());
        let parting = DisconnectRequest { connection_id, id: self.peer.id(), reason: reason.clone() };
        self.begin(async move { hub.on_disconnect(parting).await }, context)
    }
}

impl<H: WsHub> Drop for Session<H> {
    /// A hub may clean up with its runtime, and a panic at that must not take the shard's other connections along.
    fn drop(&mut self) {
        let _entered = self.runtime().map(Handle::enter);
        let (task, hub) = (self.task.take(), self.hub.take());
        let drop_both = || {
            drop(task);
            drop(hub);
        };
        if catch_unwind(AssertUnwindSafe(drop_both)).is_err() {
            tracing::error!(id = %self.peer.id(), "a hub panicked when it was dropped");
        }
    }
}
