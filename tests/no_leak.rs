//! What an engine leaves behind when it has ended: nothing.
//!
//! One test in a process of its own, because it counts the process's threads and file descriptors, which tests beside
//! it would take and give back as they like.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.
#![cfg(target_os = "linux")] // where `/proc` can be asked

use std::sync::{Arc, Weak};
use std::time::Duration;

use futures_util::poll;
use shardcast::{Engine, EngineConfig, Shutdown, WsHubConfig};
use testkit_hub::recording_hub::Recorder;
use testkit_hub::{HubFixture, RawClient, Transport, eventually, within_timeout};

const ENGINES: usize = 50;

/// Threads and file descriptors of this process.
fn in_use() -> (usize, usize) {
    let count = |folder| std::fs::read_dir(folder).unwrap().count();
    (count("/proc/self/task"), count("/proc/self/fd"))
}

/// An engine with connections of all kinds, ended in one of several ways; gives back what is dropped with its last hub.
async fn one_engine(round: usize) -> Weak<Recorder> {
    // Pinned shards hold a claim on their CPUs.
    let pinned = Engine::start(EngineConfig { shards: Some(3), ..EngineConfig::default() }).unwrap();
    within_timeout(tokio::task::spawn_blocking(move || drop(pinned))).await.unwrap();
    let transport = if (round / 2).is_multiple_of(2) { Transport::Plain } else { Transport::Tls };
    let fixture = HubFixture::open(transport, 2, WsHubConfig::default()).await;
    let mut peers = Vec::new();
    let mut raws: Vec<RawClient> = Vec::new();
    for number in 0..3 {
        let (peer, id) = fixture.connect().await;
        fixture.hub.join(id, &format!("group {number}")).await.unwrap();
        peers.push(tokio::spawn(peer.rest()));
        raws.push(fixture.connect_raw().await.0);
    }
    within_timeout(fixture.hub.to_all().publish(&"hello".to_owned())).await.unwrap();
    raws.pop().unwrap().reset();
    if round % 10 == 9 {
        // A handler that never ends by itself, and peers that do not answer.
        raws[0].send(&testkit::frames::client_text("wait")).await;
        eventually(1, || fixture.engine.metrics().tally.received).await;
    } else {
        raws.clear();
    }
    let (engine, clients, recorder) =
        (fixture.engine.clone(), fixture.hub.clients().clone(), Arc::downgrade(&fixture.recorder));
    let shutdown = Shutdown { close_window: Duration::ZERO, ..Shutdown::within(Duration::from_secs(1)) };
    match round % 3 {
        0 => drop(within_timeout(engine.shutdown_with(shutdown)).await.unwrap()),
        1 => {
            let _ = poll!(Box::pin(engine.shutdown_with(shutdown))); // begun, and not waited for
        }
        _ => {}
    }
    within_timeout(fixture.close()).await;
    within_timeout(tokio::task::spawn_blocking(move || drop(engine))).await.unwrap();
    for peer in peers {
        let (heard, close) = within_timeout(peer).await.unwrap();
        assert_eq!((heard, close), (vec!["hello".to_owned()], Some((1001, String::new()))));
    }
    assert_eq!((clients.len(), clients.group_count()), (0, 0), "round {round}");
    recorder
}

#[test]
fn engines_that_have_ended_leave_no_thread_no_descriptor_no_group_and_no_hub() {
    // Threads for what blocks are let go at once, else they would be counted.
    let mut runtime = tokio::runtime::Builder::new_multi_thread();
    let runtime = runtime.worker_threads(2).thread_keep_alive(Duration::from_millis(1)).enable_all().build();
    runtime.unwrap().block_on(async {
        let before = in_use();
        for round in 0..ENGINES {
            let recorder = one_engine(round).await;
            eventually(0, || recorder.strong_count()).await;
        }
        eventually(before, in_use).await;
    });
}
