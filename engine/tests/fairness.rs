//! Clients that send as fast as they can share their shard evenly.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::io::Write;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::Relaxed;
use std::task::Context as TaskContext;
use std::task::Poll;

use shardcast_engine::{
    Address, ConnectionConfig, Context, EngineConfig, Handler, Message, Namespace, Payload, Publication,
    PublishError,
};
use testkit::client::new_connection_with;
use testkit::frames::client_frame;
use testkit::{RawClient, Rig, at_once};

const CLIENTS: usize = 4;

type Sending = Pin<Box<dyn Future<Output = Result<(), PublishError>> + Send>>;

/// Publishes each message that it receives, and waits until it has been accepted.
struct Publisher {
    everyone: Namespace,
    to_all: bool,
    handled: Arc<AtomicU64>,
    sending: Option<Sending>,
}

impl Handler for Publisher {
    fn on_message(&mut self, _: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        self.handled.fetch_add(1, Relaxed);
        let (everyone, to_all, id) = (self.everyone.clone(), self.to_all, context.id());
        self.sending = Some(Box::pin(async move {
            let to = if to_all { Address::Everyone } else { Address::Connection(id) };
            everyone.publish(Publication::message(&to, Payload::text("x"))).await
        }));
        self.on_resume(context)
    }

    fn on_resume(&mut self, context: &mut Context<'_>) -> Poll<()> {
        let Some(sending) = &mut self.sending else { return Poll::Ready(()) };
        if sending.as_mut().poll(&mut TaskContext::from_waker(&context.waker())).is_pending() {
            return Poll::Pending;
        }
        self.sending = None;
        Poll::Ready(())
    }
}

#[test]
fn clients_that_send_as_fast_as_they_can_share_a_shard_evenly() {
    for (log_capacity, mailbox_capacity, to_all) in
        [(4096, 4096, false), (64, 64, false), (64, 64, true), (4096, 4096, true)]
    {
        let engine =
            EngineConfig { shards: Some(1), log_capacity, mailbox_capacity, ..EngineConfig::default() };
        let mut rig = Rig::with(engine, ConnectionConfig::default());
        let mut flooders: Vec<(RawClient, Arc<AtomicU64>)> = Vec::new();
        for _ in 0..CLIENTS {
            let handled = Arc::new(AtomicU64::new(0));
            let publisher =
                Publisher { everyone: rig.everyone.clone(), to_all, handled: handled.clone(), sending: None };
            let config = rig.config.clone();
            let (new_connection, peer) =
                new_connection_with(&rig.engine, &config, 1 << 16, Box::new(|_| Box::new(publisher)));
            at_once(rig.everyone.adopt(new_connection)).unwrap();
            rig.settle();
            flooders.push((peer, handled));
        }
        let flood = client_frame(0x81, b"x").repeat(2000);
        let mut at = [0; CLIENTS];
        for _ in 0..400 {
            for ((peer, _), at) in flooders.iter_mut().zip(&mut at) {
                peer.stream.set_nonblocking(true).unwrap();
                while let Ok(count) = peer.stream.write(&flood[*at..]) {
                    *at = (*at + count) % flood.len();
                }
                let _ = peer.receive();
            }
            rig.turn();
        }
        let handled: Vec<u64> = flooders.iter().map(|(_, handled)| handled.load(Relaxed)).collect();
        let (least, most) = (handled.iter().min().unwrap(), handled.iter().max().unwrap());
        assert!(*least > 0 && most <= &(2 * least), "{handled:?} to all: {to_all}, capacity {log_capacity}");
    }
}
