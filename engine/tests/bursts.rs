//! Bursts: whatever is published at once, and to whichever groups, a client that takes what is written to it loses
//! nothing and lets nobody wait.
//!
//! Random groups, sizes of outboxes, bursts and policies, on one shard or two. Publications to single clients are no
//! part of it: they do not go through the log.

#![allow(clippy::unwrap_used, reason = "a test")]

use proptest::prelude::*;
use shardcast_engine::{Address, ConnectionConfig, EngineConfig, Payload, Policy, Publication, Receipt};
use testkit::sender::{DROP_AT_ONCE, Sender};
use testkit::time::ms;
use testkit::{Client, Received, Rig, Task, at_once};

const GROUPS: usize = 6;

/// What is published between two turns: to which group (all clients, if there is none of that number), how often, and
/// how.
#[derive(Debug, Clone)]
struct Burst {
    group: usize,
    messages: usize,
    policy: Policy,
    turns: usize,
}

fn bursts() -> impl Strategy<Value = Vec<Burst>> {
    let policy = prop_oneof![
        Just(DROP_AT_ONCE),
        Just(Policy::Block),
        Just(Policy::DropConnection { timeout: ms(1), max_drops: 1 }),
    ];
    let burst = (0..GROUPS + 2, 1usize..120, policy, 0usize..3)
        .prop_map(|(group, messages, policy, turns)| Burst { group, messages, policy, turns });
    prop::collection::vec(burst, 1..25)
}

/// Reads what has arrived: the numbers of the messages.
fn numbers(client: &mut Client) -> Vec<usize> {
    let number = |received| match received {
        Received::Data(text) => text.parse().unwrap(),
        other => panic!("{other:?}"),
    };
    client.peer.receive().into_iter().map(number).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(24) })]

    #[test]
    fn a_client_that_keeps_up_never_overflows(
        shards in 1usize..3,
        outbox_frames in 4usize..100,
        members in prop::collection::vec(prop::collection::btree_set(0..GROUPS, 0..4), 1..300),
        bursts in bursts(),
    ) {
        let engine = EngineConfig { shards: Some(shards), ..EngineConfig::default() };
        let config = ConnectionConfig { outbox_frames, heartbeat_interval: None, ..ConnectionConfig::default() };
        let mut rig = Rig::with(engine, config);
        rig.send_buffer = 1 << 20; // a client that keeps up
        let mut clients = rig.connect_many(members.len());
        for (client, groups) in clients.iter().zip(&members) {
            for group in groups {
                at_once(rig.everyone.join(client.id(), &group.to_string())).unwrap();
            }
        }
        rig.settle();
        let mut expected = vec![Vec::new(); clients.len()];
        let mut arrived = expected.clone();
        let mut waiting: Vec<Task<'static, Receipt>> = Vec::new();
        let mut number = 0;
        for Burst { group, messages, policy, turns } in bursts {
            let sender = Sender::new(&rig.everyone, Some(policy));
            for _ in 0..messages {
                let to: Address = match group < GROUPS {
                    true => Address::Group(group.to_string().into()),
                    false => Address::Everyone,
                };
                let delivery = sender.deliver(Publication::message(to, Payload::text(&number.to_string())));
                let mut task = Task::new(async move { delivery.await.unwrap() });
                if task.poll().is_none() {
                    waiting.push(task);
                }
                for (expected, _) in expected.iter_mut().zip(&members).filter(|(_, groups)| {
                    group >= GROUPS || groups.contains(&group)
                }) {
                    expected.push(number);
                }
                number += 1;
            }
            for _ in 0..turns {
                rig.turn();
                for (client, arrived) in clients.iter_mut().zip(&mut arrived) {
                    arrived.extend(numbers(client));
                }
            }
        }
        while !waiting.is_empty() {
            rig.turn();
            for (client, arrived) in clients.iter_mut().zip(&mut arrived) {
                arrived.extend(numbers(client));
            }
            let mut receipts = Vec::new();
            waiting.retain_mut(|task| task.poll().map(|receipt| receipts.push(receipt)).is_none());
            for receipt in receipts {
                prop_assert_eq!((receipt.delayed, receipt.dropped.total()), (0, 0), "{:?}", receipt);
            }
        }
        rig.settle();
        for (client, arrived) in clients.iter_mut().zip(&mut arrived) {
            arrived.extend(numbers(client));
        }
        prop_assert_eq!(arrived, expected);
    }
}
