//! The client's task: its connections one after the other, until one has ended for good.
//!
//! One task per client, from the first open connection on. It decides with the reconnect policy whether the client comes
//! back, and reports the final reason. Every wait has a timeout, and no panic in a callback prevents the report. Does not
//! know messages.

use std::{
    convert::Infallible,
    future::pending,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use tokio::{sync::oneshot, time::Instant};

use super::{connection, core::Core, error::ClientClose, reconnect::Attempts, transport::Opened};
use crate::codec::Decode;

pub(super) async fn run<R, C>(
    core: Arc<Core<R>>,
    mut opened: Opened,
    mut attempts: Attempts,
    report: oneshot::Sender<ClientClose>,
) where
    R: Send + 'static,
    C: Decode<R>,
{
    let (close, ended) = loop {
        let opened_at = Instant::now();
        let mut ended = connection::run::<R, C>(opened, &core).await;
        attempts.was_open(opened_at.elapsed());
        // A closed queue: the application has disconnected, and a connection that broke meanwhile stays closed.
        let attempt = if core.queue.is_open() { attempts.next(&ended.close) } else { None };
        let Some(attempt) = attempt else {
            core.close(&ended.close);
            ended.send_close(&core.config).await;
            break (ended.close.clone(), Some(ended));
        };
        let cause = ended.close.clone();
        let leave = async {
            ended.send_close(&core.config).await;
            ended.hang_up(&core.config).await;
            pending::<Infallible>().await
        };
        let reopened = tokio::select! {
            biased;
            // First, so that the state changes at once.
            reopened = core.reopen(&mut attempts, attempt, cause) => reopened,
            never = leave => match never {},
        };
        match reopened {
            Ok(next) => {
                core.enter_open(&next);
                opened = next;
            }
            Err(close) => {
                core.close(&close);
                break (close, None);
            }
        }
    };
    if catch_unwind(AssertUnwindSafe(|| core.callbacks.close.call(close.clone()))).is_err() {
        tracing::error!(%close, "the callback `on_close` panicked");
    }
    let _ = report.send(close);
    if let Some(ended) = ended {
        ended.hang_up(&core.config).await;
    }
}
