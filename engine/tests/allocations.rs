//! What a delivery allocates: nothing, however many connections a publication reaches; and what a reply allocates: its
//! payload.
//!
//! A counting allocator and an engine that is driven by hand, in a process of their own. Where nothing is sent by a client,
//! the clients are sinks, so nothing ever stays queued.

#![allow(clippy::unwrap_used, clippy::print_stdout, reason = "a test, which tells its numbers")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::sync::Arc;
use std::task::Poll;

use shardcast_engine::{
    Address, ConnectionConfig, Context, Handler, Message, MessageKind, Namespace, NewConnection, Payload,
    Publication, Socket,
};
use testkit::time::DAY;
use testkit::{Rig, at_once};

struct Counting;

thread_local! {
    /// Each test has a thread of its own.
    static ALLOCATIONS: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is handed on to the system's allocator; counting does not allocate.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.set(ALLOCATIONS.get() + 1);
        // SAFETY: the caller keeps the contract of `GlobalAlloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: as above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

struct Silent;

impl Handler for Silent {
    fn on_message(&mut self, _: Message<'_>, _: &mut Context<'_>) -> Poll<()> {
        Poll::Ready(())
    }
}

const PUBLICATIONS: usize = 100;

fn with_sinks(count: usize) -> Rig {
    let config =
        ConnectionConfig { heartbeat_interval: None, pong_timeout: DAY, ..ConnectionConfig::default() };
    let mut rig = Rig::with(
        shardcast_engine::EngineConfig { shards: Some(1), ..shardcast_engine::EngineConfig::default() },
        config,
    );
    for _ in 0..count {
        let new_connection = NewConnection {
            socket: Socket::sink(),
            received: Default::default(),
            handler: Box::new(|_| Box::new(Silent)),
            config: Arc::clone(&rig.config),
            encoding: shardcast_engine::Encoding::PLAIN,
            permit: rig.engine.admit(None).unwrap(),
            rate_limit: None,
            user: None,
            first_message: None,
            expires_at: None,
        };
        at_once(rig.everyone.adopt(new_connection)).unwrap();
        rig.settle();
    }
    rig
}

/// Allocations of publishing and delivering, once all buffers have reached their size.
fn allocations(rig: &mut Rig, at_a_time: usize) -> usize {
    let frame = Payload::text("what everybody gets");
    let publish = |rig: &mut Rig| {
        for _ in 0..PUBLICATIONS / at_a_time {
            for _ in 0..at_a_time {
                rig.everyone.try_publish(Publication::message(Address::Everyone, frame.clone())).unwrap();
            }
            while rig.shards.iter().any(shardcast_engine::Shard::has_work) {
                rig.turn();
            }
        }
    };
    publish(rig);
    let before = ALLOCATIONS.get();
    publish(rig);
    ALLOCATIONS.get() - before
}

#[test]
fn a_delivery_allocates_nothing_while_nothing_is_queued() {
    let (mut few, mut many) = (with_sinks(1), with_sinks(1000));
    for at_a_time in [1, 10] {
        let (for_one, for_many) = (allocations(&mut few, at_a_time), allocations(&mut many, at_a_time));
        println!(
            "{PUBLICATIONS} publications, {at_a_time} at a time: {for_one} allocations for 1, {for_many} for 1000"
        );
        assert_eq!(for_one, for_many, "{at_a_time} at a time");
        assert!(for_one <= 8 * PUBLICATIONS, "{for_one}");
    }
    let books = many.engine.metrics();
    assert_eq!(
        (books.tally.offered, books.tally.written),
        (4000 * PUBLICATIONS as u64, 4000 * PUBLICATIONS as u64)
    );
}

/// Returns what it receives.
struct Echo(Namespace);

impl Handler for Echo {
    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        let payload = Payload::build(message.payload.len(), |bytes| {
            bytes.extend_from_slice(message.payload);
            Ok::<_, std::convert::Infallible>(MessageKind::Text)
        });
        let Ok(payload) = payload;
        self.0.try_publish(Publication::message(context.id(), payload)).unwrap();
        Poll::Ready(())
    }
}

#[test]
fn a_reply_allocates_its_payload_and_nothing_else() {
    const CLIENTS: usize = 40;
    let mut rig = Rig::new(1);
    let mut clients: Vec<_> = (0..CLIENTS)
        .map(|_| {
            let echo = Echo(rig.everyone.clone());
            rig.connect_handler(Box::new(|_| Box::new(echo)))
        })
        .collect();
    let mut allocated = 0;
    for round in 0..4 {
        clients.iter_mut().for_each(|client| client.text("what comes back"));
        let before = ALLOCATIONS.get();
        rig.turn();
        rig.turn();
        allocated = ALLOCATIONS.get() - before;
        println!("round {round}: {allocated} allocations for {CLIENTS} replies");
        assert!(clients.iter_mut().all(|client| client.receive_data() == ["what comes back"]));
    }
    // In the first round buffers get their size.
    assert_eq!(allocated, CLIENTS);
}
