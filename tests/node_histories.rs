//! Random histories of hubs on several nodes: one order, each message once, whatever happens to the log that they share.
//!
//! Clients on real sockets, over the log in memory with all its faults: acknowledgements that are late, reordered or lost,
//! appends that fail, outages, lost records, a node that joins late and one that leaves. The seed determines what is drawn,
//! but not how threads interleave. `HISTORIES` sets their number (8 of each kind), `HISTORIES_FROM` the first seed (0).

#![allow(clippy::unwrap_used, reason = "a test")]

use std::time::Duration;

use fastrand::Rng;
use futures_util::future::join_all;
use shardcast::backplane::memory::{Faults, MemoryLog};
use shardcast::backplane::{BackplaneConfig, BackplaneError, BackplaneState, OutagePolicy};
use shardcast::{Hub, PublishError};
use testkit_hub::node::config;
use testkit_hub::recorder::{assert_contains, assert_once_and_in_order, assert_same};
use testkit_hub::{CommandHub, Node, Recorder};
use tokio::time::{sleep, timeout};

const NODES: usize = 3;
/// On each node.
const CLIENTS: usize = 2;
const PUBLISHERS: usize = 2;
const MESSAGES: usize = 15;

/// A test that does not end fails with its seed.
const DEADLINE: Duration = Duration::from_secs(50);

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

async fn pause(random: &mut Rng, below_millis: u64) {
    sleep(Duration::from_millis(random.u64(..below_millis))).await;
}

/// A node with clients that record what they receive.
struct Recorded {
    node: Node,
    clients: Vec<Recorder>,
}

impl Recorded {
    async fn start(log: &MemoryLog, shards: usize, config: BackplaneConfig) -> Self {
        let node = Node::start(log, shards, config).await;
        let mut clients = Vec::new();
        for _ in 0..CLIENTS {
            clients.push(Recorder::start(node.connect().await.0));
        }
        Self { node, clients }
    }

    fn texts(&self) -> Vec<Vec<String>> {
        self.clients.iter().map(Recorder::texts).collect()
    }
}

/// Publishes messages one after the other, until its node has left. Returns those that were accepted.
async fn publisher(name: String, hub: Hub<CommandHub>, mut random: Rng) -> Vec<String> {
    let mut accepted = Vec::new();
    for number in 0..MESSAGES {
        pause(&mut random, 5).await;
        let text = format!("{name} {number}");
        let published = if random.u8(..4) == 0 {
            hub.to_all().deliver(&text).await.map(drop)
        } else {
            hub.to_all().publish(&text).await
        };
        match published {
            Ok(()) => accepted.push(text),
            Err(PublishError::Backplane(BackplaneError::Unavailable)) => {}
            Err(_) => break,
        }
    }
    accepted
}

/// What happens to the log, for ever.
async fn chaos(log: MemoryLog, mut random: Rng, loses: bool) {
    loop {
        pause(&mut random, 60).await;
        match random.u8(..4) {
            0 => {
                log.set_outage(true);
                pause(&mut random, 120).await;
                log.set_outage(false);
            }
            1 if loses => log.lose(random.usize(..5)),
            2 if loses => log.truncate(random.usize(..5)),
            _ => {}
        }
    }
}

/// What each client has received, and what each publisher was told is accepted.
struct Outcome {
    /// Of clients that were connected from the beginning to the end, by their nodes.
    stayed: Vec<Vec<Vec<String>>>,
    /// Of those whose node has left.
    left: Vec<Vec<String>>,
    /// Of those whose node has joined late.
    late: Vec<Vec<String>>,
    /// By the numbers of nodes.
    accepted: Vec<Vec<String>>,
    /// How often each node that stayed has missed something.
    gaps: Vec<u64>,
}

async fn history(seed: u64, loses: bool) -> Outcome {
    let mut random = Rng::with_seed(seed);
    let millis = |random: &mut Rng, of: [u64; 3]| Duration::from_millis(of[random.usize(..3)]);
    let rate = |random: &mut Rng| [0.0, 0.1, 0.25][random.usize(..3)];
    let faults = Faults {
        seed,
        acknowledged_within: millis(&mut random, [0, 1, 10]),
        read_within: millis(&mut random, [0, 1, 5]),
        unknown: rate(&mut random),
        failed: rate(&mut random),
    };
    let config = BackplaneConfig {
        publish_timeout: millis(&mut random, [20, 100, 60_000]),
        answer_timeout: Duration::from_millis(50),
        ..config(OutagePolicy::Wait)
    };
    let log = MemoryLog::new();
    let mut nodes = Vec::new();
    for number in 0..NODES {
        nodes.push(Recorded::start(&log, 1 + number % 2, config.clone()).await);
    }
    for recorded in &nodes {
        recorded.node.knows(NODES).await;
    }
    log.set_faults(faults);
    let publishers = nodes.iter().enumerate().map(|(number, recorded)| {
        let of_node: Vec<_> = (0..PUBLISHERS)
            .map(|publisher| (format!("{number}.{publisher}"), recorded.node.hub.clone(), random.fork()))
            .collect();
        tokio::spawn(async move {
            let published = of_node.into_iter().map(|(name, hub, random)| publisher(name, hub, random));
            join_all(published).await.concat()
        })
    });
    let publishers: Vec<_> = publishers.collect();
    let chaos = tokio::spawn(chaos(log.clone(), random.fork(), loses));
    let join_late = async {
        let mut random = random.fork();
        pause(&mut random, 100).await;
        let late = Recorded::start(&log, 1, config.clone()).await;
        let accepted = publisher("late".to_owned(), late.node.hub.clone(), random).await;
        (late, accepted)
    };
    let mut leaving = nodes.pop().unwrap();
    let leave = async {
        let mut random = Rng::with_seed(!seed);
        pause(&mut random, 150).await;
        leaving.node.shut_down().await;
        for client in &mut leaving.clients {
            assert_eq!(client.end().await, Some(1001));
        }
    };
    let ((late, accepted_late), ()) = tokio::join!(join_late, leave);
    let mut accepted = Vec::new();
    for publisher in publishers {
        accepted.push(publisher.await.unwrap());
    }
    accepted.push(accepted_late);
    chaos.abort();
    let _ = chaos.await;
    log.set_outage(false);
    log.set_faults(Faults::default());
    nodes.push(late);
    for recorded in &nodes {
        recorded.node.is(BackplaneState::Connected).await; // outages may have kept it from joining
    }
    for (number, last) in nodes.iter().enumerate() {
        let end = last.node.publish_last(&format!("end of {number}")).await;
        for client in nodes.iter().flat_map(|recorded| &recorded.clients) {
            client.has(&end).await;
        }
    }
    let late = nodes.pop().unwrap();
    let outcome = Outcome {
        stayed: nodes.iter().map(Recorded::texts).collect(),
        left: leaving.texts(),
        late: late.texts(),
        accepted,
        gaps: nodes.iter().map(|recorded| recorded.node.gaps()).collect(),
    };
    nodes.push(late);
    join_all(nodes.iter().map(|recorded| recorded.node.shut_down())).await;
    outcome
}

/// Runs histories with their seeds, which are named if one does not end.
async fn each_history(loses: bool, mut check: impl FnMut(&str, Outcome)) {
    let first = setting("HISTORIES_FROM", 0);
    for seed in first..first + setting("HISTORIES", 8) {
        let name = format!("HISTORIES_FROM={seed}");
        match timeout(DEADLINE, history(seed, loses)).await {
            Ok(outcome) => check(&name, outcome),
            Err(_) => panic!("{name}: it does not end"),
        }
    }
}

#[tokio::test]
async fn every_client_has_every_message_once_in_one_order_whoever_joins_and_leaves_and_whatever_fails() {
    each_history(false, |seed, Outcome { stayed, left, late, accepted, gaps }| {
        let all = &stayed[0][0];
        assert_once_and_in_order(all, seed);
        assert_contains(all, &accepted.concat(), seed);
        for texts in stayed.iter().flatten() {
            assert_same(texts, all, seed);
        }
        for texts in &left {
            assert!(texts.len() <= all.len(), "{seed}");
            assert_same(texts, &all[..texts.len()], seed);
        }
        for texts in &late {
            assert!(texts.len() <= all.len(), "{seed}");
            assert_same(texts, &all[all.len() - texts.len()..], seed);
        }
        assert_eq!(gaps, [0, 0], "{seed}");
    })
    .await;
}

#[tokio::test]
async fn a_log_that_loses_records_costs_no_client_a_message_of_its_own_node_and_doubles_none() {
    let mut gaps_in_all = 0;
    each_history(true, |seed, Outcome { stayed, left, late, accepted, gaps }| {
        for texts in stayed.iter().flatten().chain(&left).chain(&late) {
            assert_once_and_in_order(texts, seed);
        }
        for (node, clients) in stayed.iter().enumerate() {
            for texts in clients {
                assert_contains(texts, &accepted[node], seed);
                if gaps[node] == 0 {
                    assert_contains(texts, &accepted.concat(), seed);
                }
            }
        }
        gaps_in_all += gaps.iter().sum::<u64>();
    })
    .await;
    assert!(gaps_in_all > 0, "the histories lose something");
}
