//! What the handle and the client's task share: settings, callbacks, the two queues and the state.
//!
//! Also the two things that both do: an attempt to connect, and the attempts of the reconnect policy one after the other.
//! Does not know codecs.

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use futures_util::FutureExt as _;
use tokio::time::{sleep, timeout};

use super::{
    builder::Config,
    callback::Callbacks,
    error::{ClientClose, ClientError},
    inbox::{Inbox, Messages},
    queue::Queue,
    reconnect::{Attempt, Attempts},
    state::{ClientState, StateSender},
    transport::{self, BoxIo, Opened},
};

pub(super) struct Core<R> {
    pub(super) config: Config,
    pub(super) callbacks: Callbacks<R>,
    pub(super) queue: Arc<Queue>,
    pub(super) inbox: Arc<Inbox<R>>,
    pub(super) states: StateSender,
}

impl<R> Core<R> {
    pub(super) fn new(config: Config) -> (Arc<Self>, Messages<R>) {
        let (inbox, messages) = Inbox::new(config.inbox_messages, config.message_bytes_max);
        let queue = Arc::new(Queue::new(config.queue));
        let (callbacks, states) = (Callbacks::default(), StateSender::new());
        (Arc::new(Self { config, callbacks, queue, inbox, states }), messages)
    }

    /// Enters a state and calls the callback.
    pub(super) fn enter(&self, state: ClientState) {
        self.states.set(state.clone());
        self.report(state);
    }

    pub(super) fn enter_open(&self, opened: &Opened) {
        self.states.opened(opened.protocol.clone());
        self.report(ClientState::Open);
    }

    fn report(&self, state: ClientState) {
        if catch_unwind(AssertUnwindSafe(|| self.callbacks.state.call(state))).is_err() {
            tracing::error!("the callback `on_state` panicked");
        }
    }

    /// Enters `Closed`; nothing can be sent any more, and what is queued is discarded. The number of these messages.
    pub(super) fn close(&self, close: &ClientClose) {
        self.queue.discard();
        self.enter(ClientState::Closed(close.clone()));
        self.inbox.close();
    }

    /// One attempt to connect.
    pub(super) async fn open(&self, stream: Option<BoxIo>) -> Result<Opened, ClientError> {
        self.enter(ClientState::Connecting);
        // The application's connector and function for headers run in it.
        let opening = AssertUnwindSafe(transport::open(&self.config, stream)).catch_unwind();
        match timeout(self.config.connect_timeout, opening).await {
            Ok(Ok(opened)) => opened,
            Ok(Err(_)) => Err(ClientError::invalid("the connector or the function for headers panicked")),
            Err(_) => Err(ClientError::TimedOut),
        }
    }

    /// Attempts to connect, beginning with `attempt` because of `cause`, until the connection is open, the application
    /// has closed the queue, or the policy allows no further attempt.
    pub(super) async fn reopen(
        &self,
        attempts: &mut Attempts,
        mut attempt: Attempt,
        mut cause: ClientClose,
    ) -> Result<Opened, ClientClose> {
        let reopening = async {
            loop {
                tracing::debug!(attempt = attempt.number, delay = ?attempt.delay, %cause, "the client reconnects");
                self.enter(ClientState::Reconnecting {
                    attempt: attempt.number,
                    next_attempt_in: attempt.delay,
                    cause,
                });
                sleep(attempt.delay).await;
                match self.open(None).await {
                    Ok(opened) => return Ok(opened),
                    Err(error) => cause = ClientClose::ConnectFailed { attempts: attempts.made(), error },
                }
                match attempts.next(&cause) {
                    Some(next) => attempt = next,
                    None => return Err(cause),
                }
            }
        };
        tokio::select! {
            biased;
            () = self.queue.closed() => Err(ClientClose::Abandoned { unsent: self.queue.discard() }),
            reopened = reopening => reopened,
        }
    }
}
