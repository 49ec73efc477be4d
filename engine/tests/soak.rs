//! Threads for as long as asked: small logs and mailboxes, shards that fall asleep, publishers that wait.
#![allow(clippy::unwrap_used, unused, reason = "a test")]
mod fixture;
use fixture::{Client, Heard, Peer, block_on, client_frame, newcomer};
use shardcast_engine::*;
use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::sync::{Arc, Mutex, mpsc};
use std::time::{Duration, Instant};

fn draw(state: &mut u64, below: u64) -> u64 {
    *state = state.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    (mixed ^ (mixed >> 31)) % below
}

fn live(seed: u64) -> u64 {
    let mut chance = seed.wrapping_mul(77_777_777);
    let of = |chance: &mut u64, among: &[usize]| among[draw(chance, among.len() as u64) as usize];
    let config = EngineConfig {
        shards: Some(1 + draw(&mut chance, 4) as usize),
        pin: false,
        log_capacity: of(&mut chance, &[2, 4, 16, 64]),
        mailbox_capacity: of(&mut chance, &[1, 2, 8, 64]),
        coalesce: Duration::from_millis(of(&mut chance, &[0, 0, 1]) as u64),
        read_buffer_bytes: 1024,
        ..EngineConfig::default()
    };
    let engine = Engine::start(config).unwrap();
    let everyone = engine.namespace();
    let peers = 2 + draw(&mut chance, 6) as usize;
    let mut clients = Vec::new();
    for _ in 0..peers {
        let config = Arc::new(ConnectionConfig {
            outbox_frames: of(&mut chance, &[1, 2, 8, 64, 1024]),
            ..ConnectionConfig::default()
        });
        let (newcomer, client) = newcomer(&engine, &config, 4096);
        block_on(everyone.adopt(newcomer)).unwrap();
        clients.push(client);
    }
    // Known once all are open.
    let _ = block_on(everyone.send(To::Everyone, &[], Frame::text("hello"))).unwrap();
    let ids: Vec<_> = clients.iter().map(Client::id).collect();
    let publishers = 1 + draw(&mut chance, 4);
    let each = 60;
    let seeds: Vec<_> = (0..publishers).map(|_| draw(&mut chance, u64::MAX)).collect();
    let (heard, expected): (Vec<_>, Vec<_>) = std::thread::scope(|scope| {
        let readers: Vec<_> = clients
            .into_iter()
            .enumerate()
            .map(|(at, client)| {
                let mut state = seed ^ at as u64;
                scope.spawn(move || {
                    let mut peer = client.peer;
                    let (mut data, mut ends) = (Vec::new(), 0);
                    while ends < publishers {
                        if draw(&mut state, 40) == 0 {
                            std::thread::sleep(Duration::from_micros(draw(&mut state, 2000)));
                        }
                        match peer.wait() {
                            Heard::Data(text) if text == "end" => ends += 1,
                            Heard::Data(text) if text == "hello" => {}
                            Heard::Data(text) => data.push(text.trim_end_matches('.').to_owned()),
                            Heard::Ping(nonce) => {
                                let _ =
                                    std::io::Write::write_all(&mut peer.stream, &client_frame(0x8A, &nonce));
                            }
                            other => panic!("{other:?}"),
                        }
                    }
                    data
                })
            })
            .collect();
        let writers: Vec<_> = seeds
            .into_iter()
            .enumerate()
            .map(|(number, mut state)| {
                let (everyone, ids) = (everyone.clone(), ids.clone());
                scope.spawn(move || {
                    let group = format!("group {number}");
                    let mut members = vec![false; ids.len()];
                    let mut expected: Vec<Vec<String>> = vec![Vec::new(); ids.len()];
                    for count in 0..each {
                        if draw(&mut state, 12) == 0 {
                            std::thread::sleep(Duration::from_micros(draw(&mut state, 3000)));
                        }
                        let bytes = [0, 100, 2000, 9000][draw(&mut state, 4) as usize];
                        let name = format!("{number}:{count}");
                        let frame = Frame::text(&format!("{name}{}", ".".repeat(bytes)));
                        let one = draw(&mut state, ids.len() as u64) as usize;
                        let awaits = draw(&mut state, 3) == 0;
                        let to = match draw(&mut state, 10) {
                            0..=2 => {
                                block_on(everyone.join(ids[one], &group)).unwrap();
                                members[one] = true;
                                continue;
                            }
                            3 => {
                                block_on(everyone.leave(ids[one], &group)).unwrap();
                                members[one] = false;
                                continue;
                            }
                            4 | 5 => {
                                expected.iter_mut().for_each(|one| one.push(name.clone()));
                                To::Everyone
                            }
                            6 => {
                                expected[one].push(name.clone());
                                To::Connection(ids[one])
                            }
                            _ => {
                                for (at, expected) in expected.iter_mut().enumerate() {
                                    if members[at] {
                                        expected.push(name.clone());
                                    }
                                }
                                To::Group(&group)
                            }
                        };
                        if awaits {
                            let receipt = block_on(everyone.send(to, &[], frame)).unwrap();
                            let targets =
                                expected.iter().filter(|one| one.last() == Some(&name)).count() as u64;
                            assert_eq!((receipt.targets, receipt.taken()), (targets, targets), "{name}");
                        } else {
                            block_on(everyone.publish(to, &[], frame)).unwrap();
                        }
                    }
                    block_on(everyone.publish(To::Everyone, &[], Frame::text("end"))).unwrap();
                    expected
                })
            })
            .collect();
        let expected = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        (readers.into_iter().map(|reader| reader.join().unwrap()).collect::<Vec<_>>(), expected)
    });
    let expected: Vec<Vec<Vec<String>>> = expected;
    // To everyone: one order for all.
    let to_all: Vec<&String> =
        heard[0].iter().filter(|name| heard.iter().all(|one| one.contains(name))).collect();
    for (at, heard) in heard.iter().enumerate() {
        let common: Vec<&String> = heard.iter().filter(|name| to_all.contains(name)).collect();
        assert_eq!(common, to_all, "one order");
        for (number, expected) in expected.iter().enumerate() {
            let from: Vec<&String> =
                heard.iter().filter(|name| name.starts_with(&format!("{number}:"))).collect();
            assert!(
                from.iter().map(|name| name.as_str()).eq(expected[at].iter().map(String::as_str)),
                "peer {at} publisher {number}: {from:?} {:?}",
                expected[at]
            );
        }
    }
    heard.iter().map(|heard| heard.len() as u64).sum()
}

#[test]
fn soak() {
    let seconds: u64 = std::env::var("SOAK_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(10);
    let began = Instant::now();
    let (mut seed, mut all) =
        (std::env::var("SOAK_FROM").ok().and_then(|text| text.parse().ok()).unwrap_or(0), 0);
    let first = seed;
    while began.elapsed() < Duration::from_secs(seconds) {
        let (tell, told) = mpsc::channel();
        std::thread::spawn(move || tell.send(live(seed)));
        match told.recv_timeout(Duration::from_secs(60)) {
            Ok(count) => all += count,
            Err(error) => panic!("seed {seed}: {error}"),
        }
        seed += 1;
    }
    println!("{} engines, {all} messages in {:?}", seed - first, began.elapsed());
}
