//! The hub handler: implements the engine's handler trait with a hub's methods.
//!
//! One for each connection, owned by its shard. Decodes a message, calls the hub and polls the
//! returned future at once; if that is pending, the connection is busy until the future's waker
//! makes the shard resume it. A method's future may end the connection by its output, so that the
//! end follows everything that the method has sent. Knows hubs, codecs and the engine's handler
//! trait. Does not know sockets or frames.

use std::any::{Any, TypeId};
use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::HashMap;
use std::future::Future;
use std::hint::black_box;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context as TaskContext, Poll, Waker};
use std::time::SystemTime;

use shardcast_engine::{
    CloseCode, CloseReason, ConnectionConfig, Context, DropNotice, Handler, MakeHandler, Message, User,
};
use tokio::runtime::Handle;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::codec::{CodecError, Decode, RawCodec, RawMessage};
use crate::context::{Caller, MessageContext};
use crate::first_message::{Accepted, Check};
use crate::hub::{Dropped, Hub, HubContext, Refusal, RunOn, WsHub};
use crate::presence::{Metadata, MetadataError};

/// The result of a hub's method: an error ends the connection for that reason.
type Outcome = Result<(), Box<CloseReason>>;

type Task = Pin<Box<dyn Future<Output = Outcome> + Send>>;

pub(crate) struct HubHandler<H: WsHub> {
    /// None while the handler is being dropped, and before it was made from the first message.
    hub: Option<Arc<H>>,
    caller: Arc<Caller<H::OutMessage>>,
    /// The method that is pending on the shard.
    task: Option<Task>,
    /// None where none of it is needed, because every idle connection has a handler.
    overrides: Option<Box<Overrides<H>>>,
}

/// What most handlers do not need.
struct Overrides<H: WsHub> {
    /// The runtime that the connection was served from: the hub's methods use its timers, sockets and tasks. None if
    /// the shard's thread has entered it already.
    runtime: Option<Handle>,
    /// The method that is running on the runtime.
    running: Option<JoinHandle<Outcome>>,
    /// The runtime has shut down, which was logged.
    is_runtime_gone: bool,
    _done: DoneSignal,
    /// For a hub that is made from the first message.
    first: Option<First<H>>,
}

struct First<H: WsHub> {
    /// None once it was called.
    check: Option<Check<H>>,
    config: Arc<ConnectionConfig>,
    /// What the check has accepted.
    made: Arc<OnceLock<Made<H>>>,
}

/// The hub, and the caller with its user.
type Made<H> = (Arc<H>, Arc<Caller<<H as WsHub>::OutMessage>>);

/// What handles a connection.
pub(crate) enum Instance<H> {
    Hub(H),
    /// Made from the client's first message.
    FirstMessage(Check<H>),
}

/// Dropped with the handler, which notifies `serve_hub` that the connection and its methods have ended.
pub(crate) type DoneSignal = Option<oneshot::Sender<()>>;

/// Puts the closure that is freed on the shard into another size class than the handler that it makes. Otherwise the
/// allocator reuses its memory for the long-lived handler: handlers end up scattered among handshake allocations, and
/// that memory is never returned to the system.
#[derive(Default)]
struct AllocationPad {
    _bytes: [u64; 10],
}

thread_local! {
    /// One value of each stateless hub on this shard.
    static STATELESS: RefCell<HashMap<TypeId, Arc<dyn Any + Send + Sync>>> = RefCell::default();
}

/// The hub as its methods borrow it. Of a type without fields all connections of a shard share a value: they could not
/// tell theirs from another, and each would cost 32 bytes. Not all connections of the engine, because shards would
/// contend for its count.
fn share<H: WsHub>(hub: H) -> Arc<H> {
    if size_of::<H>() > 0 || std::mem::needs_drop::<H>() {
        return Arc::new(hub);
    }
    let shared = STATELESS
        .with_borrow_mut(|hubs| hubs.entry(TypeId::of::<H>()).or_insert_with(|| Arc::new(hub)).clone());
    shared.downcast().expect("it is filed under its type")
}

impl<H: WsHub> HubHandler<H> {
    /// Makes the handler when the connection has an id. `done` is dropped when `on_disconnected` has returned.
    pub(crate) fn maker(
        handle: &Hub<H>,
        instance: Instance<H>,
        runtime: Handle,
        done: DoneSignal,
        user: Option<Arc<str>>,
    ) -> MakeHandler {
        let clients = handle.clients().clone();
        let runtime = (handle.runtime() != Some(runtime.id())).then_some(runtime);
        let (hub, check) = match instance {
            Instance::Hub(hub) => (Some(hub), None),
            Instance::FirstMessage(check) => (None, Some(check)),
        };
        let config = handle.config().clone();
        let first = check.map(|check| First { check: Some(check), config, made: Arc::default() });
        let has_overrides =
            runtime.is_some() || H::RUN_ON != RunOn::Shard || done.is_some() || first.is_some();
        let overrides = has_overrides.then(|| {
            Box::new(Overrides { runtime, running: None, is_runtime_gone: false, _done: done, first })
        });
        let pad = AllocationPad::default();
        Box::new(move |id| {
            let _pad = pad;
            let (hub, caller) = (hub.map(share), Arc::new(Caller::new(clients, id, user)));
            Box::new(Self { hub, caller, task: None, overrides })
        })
    }

    /// The hub; none before it was made from the first message.
    fn hub(&mut self) -> Option<Arc<H>> {
        if self.hub.is_none() {
            let first = self.overrides.as_mut()?.first.as_mut()?;
            let (hub, caller) = first.made.get()?;
            (self.hub, self.caller) = (Some(hub.clone()), caller.clone());
        }
        self.hub.clone()
    }

    /// Makes the hub from the first message, and greets the client.
    fn open_by(&mut self, check: Check<H>, first: RawMessage, context: &mut Context<'_>) -> Poll<()> {
        let Some(First { config, made, .. }) =
            self.overrides.as_ref().and_then(|overrides| overrides.first.as_ref())
        else {
            return Poll::Ready(());
        };
        let (config, made, caller) = (config.clone(), made.clone(), self.caller.clone());
        let position = context.position();
        let opening = async move {
            let refuse = |refusal: Refusal| Box::new(refusal.into_close_reason());
            let Accepted { hub, user, metadata, expires_at } = check(first).await.map_err(refuse)?;
            let (hub, caller) = (Arc::new(hub), Arc::new(caller.with_user(user.clone())));
            identify(&caller, user, metadata, expires_at, &config).await.map_err(refuse)?;
            // From here on the hub is notified of the end, because `on_connected` is called.
            let _ = made.set((hub.clone(), caller.clone()));
            hub.on_connected(MessageContext::new(caller, position)).await.map_err(refuse)
        };
        self.begin(opening, context)
    }

    fn context(&self, context: &Context<'_>) -> HubContext<H> {
        MessageContext::new(self.caller.clone(), context.position())
    }

    fn runtime(&self) -> Option<&Handle> {
        self.overrides.as_ref()?.runtime.as_ref()
    }

    /// Starts a method and polls it as far as it gets now.
    fn begin(
        &mut self,
        future: impl Future<Output = Outcome> + Send + 'static,
        context: &mut Context<'_>,
    ) -> Poll<()> {
        match self.start(future) {
            Poll::Ready(outcome) => finish(outcome, context),
            Poll::Pending => self.go_on(context),
        }
    }

    /// Starts a method; ready if it is done already, all of it on this thread.
    fn start(&mut self, future: impl Future<Output = Outcome> + Send + 'static) -> Poll<Outcome> {
        if let Some(overrides) = self.overrides.as_mut().filter(|_| H::RUN_ON == RunOn::Runtime) {
            overrides.running = Some(match &overrides.runtime {
                Some(runtime) => runtime.spawn(future),
                None => tokio::spawn(future),
            });
            return Poll::Pending;
        }
        let mut task: Task = Box::pin(future);
        let _entered = self.runtime().map(Handle::enter);
        // Most are ready at once and never use their waker, so the first poll goes without one. A future
        // that is pending is polled again with a real one, which replaces the first: that is the contract.
        let polled = task.as_mut().poll(&mut TaskContext::from_waker(Waker::noop()));
        self.task = polled.is_pending().then_some(task);
        polled
    }

    fn go_on(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(running) = self.overrides.as_mut().and_then(|overrides| overrides.running.take()) {
            return self.wait_for(running, context);
        }
        // Taken, so that a future that panics is not polled again.
        let Some(mut task) = self.task.take() else { return Poll::Ready(()) };
        let _entered = self.runtime().map(Handle::enter);
        match task.as_mut().poll(&mut TaskContext::from_waker(&context.waker())) {
            Poll::Ready(outcome) => finish(outcome, context),
            Poll::Pending => {
                self.task = Some(task);
                Poll::Pending
            }
        }
    }

    fn wait_for(&mut self, mut running: JoinHandle<Outcome>, context: &mut Context<'_>) -> Poll<()> {
        let Some(overrides) = &mut self.overrides else { return Poll::Ready(()) };
        match Pin::new(&mut running).poll(&mut TaskContext::from_waker(&context.waker())) {
            Poll::Pending => {
                overrides.running = Some(running);
                return Poll::Pending;
            }
            Poll::Ready(Ok(outcome)) => return finish(outcome, context),
            Poll::Ready(Err(error)) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
            // Cancelled, because the runtime has shut down: nothing else cancels it. No method of this connection can
            // run any more, so the connection ends instead of leaving its client without answers.
            Poll::Ready(Err(_)) if !std::mem::replace(&mut overrides.is_runtime_gone, true) => {
                tracing::error!(
                    id = %context.id(),
                    hub = std::any::type_name::<H>(),
                    "a hub's runtime has shut down before its engine: the connection ends without `on_disconnected`; \
                     shut the engine down first"
                );
                let text = Cow::Borrowed("the server's runtime has ended");
                context.close(CloseReason::Application { code: CloseCode::INTERNAL_ERROR, text });
            }
            Poll::Ready(Err(_)) => {}
        }
        Poll::Ready(())
    }
}

fn finish(outcome: Outcome, context: &mut Context<'_>) -> Poll<()> {
    if let Err(reason) = outcome {
        context.close(*reason);
    }
    Poll::Ready(())
}

/// Tells the engine who the client is.
async fn identify<M>(
    caller: &Caller<M>,
    user: Option<Arc<str>>,
    metadata: Option<Result<Metadata, MetadataError>>,
    expires_at: Option<SystemTime>,
    config: &ConnectionConfig,
) -> Result<(), Refusal> {
    let (clients, id) = (caller.clients(), caller.id());
    if let Some(name) = user {
        let user = match metadata.transpose() {
            Ok(Some(metadata)) => User::new(name).with_metadata(metadata.into_bytes()),
            Ok(None) => User::new(name),
            Err(error) => {
                tracing::error!(%id, error = &error as &dyn std::error::Error, "metadata cannot be kept (1011)");
                return Err(Refusal::new(CloseCode::INTERNAL_ERROR, "metadata cannot be kept"));
            }
        };
        if let Err(error) = clients.namespace().identify(caller.local_id(), user, config).await {
            return Err(Refusal::new(CloseCode::POLICY_VIOLATION, error.to_string()));
        }
    }
    if let Some(at) = expires_at
        && let Err(error) = clients.expire_at(id, Some(at)).await
    {
        return Err(Refusal::new(CloseCode::TRY_AGAIN_LATER, error.to_string()));
    }
    Ok(())
}

impl<H: WsHub> Handler for HubHandler<H> {
    fn on_open(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(hub) = self.hub() else { return Poll::Ready(()) };
        let call = self.context(context);
        let connecting = async move {
            hub.on_connected(call).await.map_err(|refusal| Box::new(refusal.into_close_reason()))
        };
        if let Poll::Ready(outcome) = self.start(connecting) {
            return finish(outcome, context);
        }
        // Another thread may have published on its behalf, which the shard cannot know. After `Pending` the shard
        // adds the connection to everyone after everything that was published until then.
        if self.go_on(context) == Poll::Ready(()) {
            context.waker().wake();
        }
        Poll::Pending
    }

    fn prefetch(&self) {
        // The counts of references are next to what they are for, and the first thing that a call changes.
        black_box((self.hub.as_ref().map(Arc::strong_count), Arc::strong_count(&self.caller)));
    }

    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        let first = self.overrides.as_mut().and_then(|overrides| overrides.first.as_mut());
        if let Some(check) = first.and_then(|first| first.check.take()) {
            return match <RawCodec as Decode<RawMessage>>::decode(message.kind, message.payload) {
                Ok(first) => self.open_by(check, first, context),
                Err(_) => Poll::Ready(()), // a raw message is whatever arrives
            };
        }
        let Some(hub) = self.hub() else { return Poll::Ready(()) };
        let call = self.context(context);
        match <H::Codec as Decode<H::InMessage>>::decode(message.kind, message.payload) {
            Ok(message) => {
                let handling = async move {
                    hub.on_message(message, call).await;
                    Ok(())
                };
                self.begin(handling, context)
            }
            Err(error) => {
                let reason = match error {
                    CodecError::WrongKind { .. } => CloseReason::WrongKind,
                    _ => CloseReason::Undecodable,
                };
                let asking = async move {
                    match hub.on_undecodable(call, error).await {
                        ControlFlow::Continue(()) => Ok(()),
                        ControlFlow::Break(()) => Err(Box::new(reason)),
                    }
                };
                self.begin(asking, context)
            }
        }
    }

    fn on_drop(&mut self, notice: &DropNotice, context: &mut Context<'_>) -> Poll<()> {
        let Some(hub) = self.hub() else { return Poll::Ready(()) };
        let call = self.context(context);
        let dropped = Dropped { messages: notice.frames, cause: notice.cause, group: notice.group.clone() };
        let telling = async move {
            hub.on_dropped(call, dropped).await;
            Ok(())
        };
        self.begin(telling, context)
    }

    fn on_rate_limited(&mut self, messages: u64, context: &mut Context<'_>) -> Poll<()> {
        let Some(hub) = self.hub() else { return Poll::Ready(()) };
        let call = self.context(context);
        let telling = async move {
            hub.on_rate_limited(call, messages).await;
            Ok(())
        };
        self.begin(telling, context)
    }

    fn on_expired(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(hub) = self.hub() else { return Poll::Ready(()) };
        let call = self.context(context);
        let asking = async move {
            match hub.on_expired(call).await {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(Box::new(CloseReason::Expired)),
            }
        };
        self.begin(asking, context)
    }

    fn on_resume(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.go_on(context)
    }

    fn on_close(&mut self, reason: &CloseReason, context: &mut Context<'_>) -> Poll<()> {
        let Some(hub) = self.hub() else { return Poll::Ready(()) };
        let (call, reason) = (self.context(context), reason.clone());
        let parting = async move {
            hub.on_disconnected(call, reason).await;
            Ok(())
        };
        self.begin(parting, context)
    }
}

impl<H: WsHub> Drop for HubHandler<H> {
    /// A hub may clean up with its runtime, and a panic in that must not end the shard's other connections.
    fn drop(&mut self) {
        let _entered = self.runtime().map(Handle::enter);
        let (task, hub) = (self.task.take(), self.hub.take());
        let drop_both = || {
            drop(task);
            drop(hub);
        };
        if catch_unwind(AssertUnwindSafe(drop_both)).is_err() {
            tracing::error!(id = %self.caller.id(), "a hub panicked when it was dropped");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use super::*;
    use crate::codec::RawCodec;

    struct Silent;
    struct Other;
    struct Numbered(u8);
    struct Dropping;

    thread_local! {
        static DROPPED: Cell<u32> = const { Cell::new(0) };
    }

    impl Drop for Dropping {
        fn drop(&mut self) {
            DROPPED.set(DROPPED.get() + 1);
        }
    }

    macro_rules! silent_hubs {
        ($($hub:ident)+) => { $(
            impl WsHub for $hub {
                type Codec = RawCodec;
                type InMessage = String;
                type OutMessage = String;

                async fn on_message(&self, _: String, _: HubContext<Self>) {}
            }
        )+ };
    }
    silent_hubs! { Silent Other Numbered Dropping }

    #[test]
    fn an_idle_connection_costs_64_bytes_here_and_its_hub() {
        assert_eq!(size_of::<HubHandler<Silent>>(), 40);
        assert_eq!(size_of::<Caller<String>>(), 24);
        assert_eq!(size_of::<Task>() + size_of::<Outcome>(), 24, "a method's outcome is one word");
    }

    #[test]
    fn connections_of_a_hub_without_fields_share_its_value_on_a_shard() {
        let (one, other) = (share(Silent), share(Silent));
        assert!(Arc::ptr_eq(&one, &other));
        let elsewhere = std::thread::spawn(|| share(Silent)).join().expect("it does not panic");
        assert!(!Arc::ptr_eq(&one, &elsewhere), "shards must not contend for one count");
        let _of_another_type: Arc<Other> = share(Other);
    }

    #[test]
    fn a_hub_that_connections_could_tell_apart_is_not_shared() {
        let (one, other) = (share(Numbered(1)), share(Numbered(2)));
        assert_eq!((one.0, other.0), (1, 2));
        let drops = || share(Dropping);
        assert!(!Arc::ptr_eq(&drops(), &drops()));
        let before = DROPPED.get();
        drop((drops(), drops()));
        assert_eq!(DROPPED.get(), before + 2, "each with its connection");
    }
}
