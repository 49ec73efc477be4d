//! Slow, dead and hostile peers over real sockets, plain and TLS: what they get, what the hub is told, what the others notice.
//!
//! Each policy is shown on a peer that has stopped reading and on one that reads in sips. What time has to do with it
//! is decided in `engine/tests/slow_clients.rs`, where time can be driven; here a time only has to pass, never in time.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::io::ErrorKind;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::any;
use shardcast::{
    BroadcastPolicy, CloseReason, ConnectionId, DropCause, Dropped, HubContext, RawCodec, Receipt, Refusal,
    WebSocketUpgrade, WsHub, WsHubConfig,
};
use socket2::SockRef;
use testkit::frames::{CLOSE, FIN, PING, PONG, TEXT, client_frame, client_text};
use testkit::sender::DROP_AT_ONCE;
use testkit::time::{DAY, ms};
use testkit_hub::recording_hub::{number_of, numbered};
use testkit_hub::{
    Client, CommandHub, HubFixture, OnRuntime, RawClient, Server, TEST_TIMEOUT, Transport, command_app,
    connect, engine, eventually, on_each_transport, within_timeout,
};
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, Semaphore};
use tokio::task::{JoinHandle, JoinSet};

const MESSAGE_BYTES: usize = 2000;
const OUTBOX_FRAMES: usize = 8;
/// More rounds than anything takes.
const MANY: usize = 100_000;

const DROP: BroadcastPolicy = BroadcastPolicy::DropMessage { timeout: ms(2) };
/// Ends nobody here: who drops so often has other worries.
const DROP_LONG: BroadcastPolicy = BroadcastPolicy::DropConnection { timeout: ms(2), max_drops: 1_000_000 };
const HIGH_RTT: BroadcastPolicy = BroadcastPolicy::DropOnHighRtt { max_rtt: ms(1000), rtt_samples: 1 };

/// Small outboxes, and nobody is asked whether he lives.
fn narrow(policy: BroadcastPolicy) -> WsHubConfig {
    WsHubConfig { policy, outbox_frames: OUTBOX_FRAMES, heartbeat_interval: None, ..WsHubConfig::default() }
}

/// Pings often, and waits for ever for the answer unless told otherwise.
fn beating(policy: BroadcastPolicy) -> WsHubConfig {
    WsHubConfig { policy, heartbeat_interval: Some(ms(50)), pong_timeout: DAY, ..WsHubConfig::default() }
}

// ---- stalled, and reading in sips

/// A slow peer and three that read, on two shards; each message reaches the three before the next is sent. The slow one
/// reads at most `bytes` bytes from its kernel for each message. In the end it reads everything that is left.
async fn a_slow_peer_among_others(transport: Transport, policy: BroadcastPolicy, bytes: usize) {
    const ROUNDS: usize = 120;
    const OTHERS: usize = 3;
    let mut fixture = HubFixture::open(transport, 2, narrow(policy)).await;
    let (mut slow, slow_id) = fixture.connect_raw().await;
    let mut others = Vec::new();
    for _ in 0..OTHERS {
        let (peer, id) = fixture.connect().await;
        fixture.hub.join(id, "others").await.unwrap();
        others.push(peer);
    }
    let drops =
        matches!(policy, BroadcastPolicy::DropMessage { .. } | BroadcastPolicy::DropConnection { .. });
    let (mut receipts, mut unfinished) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        let message = numbered(round, MESSAGE_BYTES);
        if drops {
            // Who wants a receipt waits for the slow one's time to be over; the others get the message meanwhile.
            let target = fixture.hub.to_all();
            let both = async { tokio::join!(target.deliver(&message), all_hear(&mut others, &message)).0 };
            receipts.push(within_timeout(both).await.unwrap());
        } else {
            // Its receipt may take until the slow one reads; the next one's ticket may not come before this one's.
            let (hub, to_all) = (fixture.hub.clone(), message.clone());
            let sending = tokio::spawn(async move { hub.to_all().deliver(&to_all).await.unwrap() });
            all_hear(&mut others, &message).await;
            unfinished.push(sending);
            // Who does not publish to the slow one is not held up by it.
            let aside = format!("aside {round}");
            within_timeout(fixture.hub.to_group("others").publish(&aside.clone())).await.unwrap();
            all_hear(&mut others, &aside).await;
        }
        slow.read_at_most(bytes);
    }

    // What the connection has counted is what the receipts say and what the hub was told.
    let counted = fixture.counted(slow_id).await;
    let dropped = counted.tally.dropped.total();
    assert_eq!(counted.tally.offered, ROUNDS as u64 + 1, "with its id");
    assert_eq!(
        counted.tally.offered,
        counted.tally.written + dropped + counted.tally.pending(),
        "{counted:?}"
    );
    assert_eq!(counted.tally.discarded, 0);
    if drops {
        assert!(
            counted.tally.pending() <= OUTBOX_FRAMES as u64 && dropped > 10,
            "a test of something: {counted:?}"
        );
        let sum = |count: fn(&Receipt) -> u64| receipts.iter().map(count).sum::<u64>();
        assert_eq!(sum(|receipt| receipt.dropped.timeout), counted.tally.dropped.timeout);
        assert_eq!(sum(|receipt| receipt.dropped.overflow), counted.tally.dropped.overflow);
        assert_eq!(sum(|receipt| receipt.disconnected), 0);
    } else {
        assert!(
            counted.tally.pending() > OUTBOX_FRAMES as u64 && dropped == 0,
            "a test of something: {counted:?}"
        );
        assert!(!unfinished.last().unwrap().is_finished(), "who awaits the slow one waits");
    }
    eventually(dropped, || fixture.recorder.drops(slow_id)).await;

    // Now it reads: whole frames, in order, exactly those that the receipts do not call dropped.
    let last = numbered(ROUNDS, 10);
    if policy == HIGH_RTT {
        within_timeout(fixture.hub.to_all().publish(&last)).await.unwrap(); // nobody waits under this policy
    } else {
        fixture.hub.to(slow_id).try_publish(&last).unwrap();
    }
    let mut heard = Vec::new();
    while heard.last() != Some(&ROUNDS) {
        heard.push(number_of(&slow.recv_text().await));
    }
    for sending in unfinished {
        receipts.push(within_timeout(sending).await.unwrap());
    }
    let arrived = |receipt: &Receipt| receipt.dropped.total() == 0;
    let taken = (0..ROUNDS).filter(|round| arrived(&receipts[*round]));
    assert_eq!(heard, taken.chain([ROUNDS]).collect::<Vec<_>>());
    for receipt in &receipts {
        assert_eq!(receipt.recipients, OTHERS as u64 + 1);
        assert_eq!(receipt.accepted(), OTHERS as u64 + u64::from(arrived(receipt)), "{receipt:?}");
        assert!(receipt.delayed <= 1 && (arrived(receipt) || receipt.delayed == 1), "{receipt:?}");
    }
    let counted = fixture.counted(slow_id).await;
    assert_eq!((counted.tally.written, counted.tally.pending()), (counted.tally.offered - dropped, 0));
    assert_eq!(fixture.recorder.drops(slow_id), dropped, "none was told twice");
    assert_eq!(fixture.others_ended(), []);
}

async fn all_hear(peers: &mut [Client], text: &str) {
    for peer in peers {
        peer.recv_texts(&[text]).await;
    }
}

on_each_transport!(workers = 2, under_block_who_reads_gets_all_at_once_and_a_stalled_peer_all_in_the_end);
async fn under_block_who_reads_gets_all_at_once_and_a_stalled_peer_all_in_the_end(transport: Transport) {
    a_slow_peer_among_others(transport, BroadcastPolicy::Block, 0).await;
}

on_each_transport!(
    workers = 2,
    under_drop_message_who_reads_gets_all_and_each_loss_of_a_stalled_peer_is_told
);
async fn under_drop_message_who_reads_gets_all_and_each_loss_of_a_stalled_peer_is_told(transport: Transport) {
    a_slow_peer_among_others(transport, DROP, 0).await;
    a_slow_peer_among_others(transport, DROP_AT_ONCE, 0).await;
}

on_each_transport!(
    workers = 2,
    under_drop_connection_who_reads_gets_all_and_each_loss_of_a_stalled_peer_is_told
);
async fn under_drop_connection_who_reads_gets_all_and_each_loss_of_a_stalled_peer_is_told(
    transport: Transport,
) {
    a_slow_peer_among_others(transport, DROP_LONG, 0).await;
}

on_each_transport!(
    workers = 2,
    under_drop_on_high_rtt_who_reads_gets_all_at_once_and_a_stalled_peer_all_in_the_end
);
async fn under_drop_on_high_rtt_who_reads_gets_all_at_once_and_a_stalled_peer_all_in_the_end(
    transport: Transport,
) {
    a_slow_peer_among_others(transport, HIGH_RTT, 0).await;
}

on_each_transport!(workers = 2, a_peer_that_reads_in_sips_gets_whole_frames_in_order_under_each_policy);
async fn a_peer_that_reads_in_sips_gets_whole_frames_in_order_under_each_policy(transport: Transport) {
    // Odd, so that it stops in the middle of frames and of headers.
    for policy in [BroadcastPolicy::Block, DROP, DROP_AT_ONCE, DROP_LONG, HIGH_RTT] {
        a_slow_peer_among_others(transport, policy, 701).await;
    }
}

on_each_transport!(workers = 2, under_drop_connection_too_many_drops_end_a_stalled_peer_once_and_nobody_else);
async fn under_drop_connection_too_many_drops_end_a_stalled_peer_once_and_nobody_else(transport: Transport) {
    const MAX_DROPS: u32 = 5;
    for timeout in [Duration::ZERO, ms(1)] {
        let policy = BroadcastPolicy::DropConnection { timeout, max_drops: MAX_DROPS };
        let mut fixture = HubFixture::open(transport, 2, narrow(policy)).await;
        let (mut stalled, stalled_id) = fixture.connect_raw().await;
        let (mut other, other_id) = fixture.connect().await;
        for id in [stalled_id, other_id] {
            fixture.hub.join(id, "both").await.unwrap();
        }
        fixture.hub.join(stalled_id, "alone").await.unwrap();
        let (mut rounds, mut losses) = (0, 0);
        while fixture.hub.len() == 2 {
            assert!(rounds < MANY, "nobody ends it");
            let message = numbered(rounds, MESSAGE_BYTES);
            let target = fixture.hub.to_group("both");
            let hearing = all_hear(std::slice::from_mut(&mut other), &message);
            let both = async { tokio::join!(target.deliver(&message), hearing).0 };
            let receipt = within_timeout(both).await.unwrap();
            losses += receipt.dropped.total();
            rounds += 1;
        }
        assert_eq!(losses, u64::from(MAX_DROPS), "each loss in a row counts, none before");
        assert_eq!(fixture.ended().await, (stalled_id, CloseReason::TooManyDrops));
        assert_eq!(fixture.recorder.drops(stalled_id), losses, "the hub was told before the end");
        let left = (fixture.hub.group_len("both"), fixture.hub.group_len("alone"), fixture.hub.group_count());
        assert_eq!(left, (1, 0, 1));
        // What the kernel had is whole and in one piece, then it is told why.
        let (texts, code) = stalled.rest().await;
        assert_eq!(code, Some(1013));
        assert!(texts.iter().map(|text| number_of(text)).eq(0..texts.len()));
        let (own, written) = (texts.len() as u64 + 1, rounds as u64 + 1);
        drop(stalled);
        eventually(1, || fixture.engine.connection_count()).await;
        eventually((own + written, losses, 1, 0), || {
            let all = fixture.engine.metrics();
            (all.tally.written, all.tally.dropped.total(), all.ended_slow, all.tally.pending())
        })
        .await;
        let all = fixture.engine.metrics();
        assert!(all.tally.discarded >= OUTBOX_FRAMES as u64 - 1, "{all:?}");
        assert_eq!(all.tally.offered, all.tally.written + losses + all.tally.discarded, "{all:?}");
        other.send_text("me still here").await;
        other.recv_texts(&["still here"]).await;
        assert_eq!(fixture.others_ended(), []);
    }
}

// ---- round trips and silence

on_each_transport!(
    workers = 2,
    under_drop_on_high_rtt_a_peer_that_answers_late_is_ended_and_one_that_answers_is_not
);
async fn under_drop_on_high_rtt_a_peer_that_answers_late_is_ended_and_one_that_answers_is_not(
    transport: Transport,
) {
    let mut fixture = HubFixture::open(transport, 1, beating(HIGH_RTT)).await;
    let (mut prompt, prompt_id) = fixture.connect_raw().await;
    let (mut late, late_id) = fixture.connect_raw().await;
    let nonce = prompt.is_pinged().await;
    prompt.send(&client_frame(FIN | PONG, &nonce)).await;
    prompt.send(&client_text("me answered")).await;
    assert_eq!(prompt.recv_text().await, "answered");
    let nonce = late.is_pinged().await;
    tokio::time::sleep(ms(1100)).await; // this has to pass
    assert_eq!(fixture.hub.len(), 2, "no answer is no slow answer");
    late.send(&client_frame(FIN | PONG, &nonce)).await;
    assert_eq!(fixture.ended().await, (late_id, CloseReason::HighRtt));
    assert_eq!(late.close_code().await, Some(1013));
    drop(late);
    eventually(1, || fixture.engine.connection_count()).await;
    assert_eq!(fixture.engine.metrics().ended_slow, 1);
    assert!(fixture.counted(prompt_id).await.rtt.last.is_some());
    assert_eq!(fixture.others_ended(), []);
}

/// A hub whose peers must answer within_timeout, and a neighbour of theirs on the same shard, at another hub that is patient.
async fn impatient(transport: Transport, pong_timeout: Duration) -> (HubFixture, Server, Client) {
    let config = WsHubConfig {
        pong_timeout,
        close_timeout: ms(100),
        outbox_frames: OUTBOX_FRAMES,
        ..beating(BroadcastPolicy::Block)
    };
    let fixture = HubFixture::open(transport, 1, config).await;
    let neighbours =
        Server::start_over(transport, command_app(fixture.engine.hub(WsHubConfig::default()).unwrap())).await;
    let (neighbour, _) = connect(&neighbours.url("/ws")).await;
    (fixture, neighbours, neighbour)
}

on_each_transport!(a_peer_that_has_fallen_silent_is_noticed_and_told_1011);
async fn a_peer_that_has_fallen_silent_is_noticed_and_told_1011(transport: Transport) {
    let (mut fixture, _neighbours, mut neighbour) = impatient(transport, ms(100)).await;
    let (mut silent, id) = fixture.connect_raw().await;
    assert_eq!(fixture.ended().await, (id, CloseReason::PongTimeout));
    assert_eq!((fixture.hub.len(), fixture.hub.group_count()), (0, 0));
    silent.is_pinged().await;
    assert_eq!(
        silent.frame().await,
        Some((CLOSE, [&1011u16.to_be_bytes()[..], b"no pong in time"].concat()))
    );
    assert_eq!(silent.frame().await, None);
    eventually(1, || fixture.engine.connection_count()).await;
    neighbour.send_text("undisturbed").await;
    neighbour.recv_texts(&["undisturbed"]).await;
    assert_eq!(fixture.others_ended(), []);
}

on_each_transport!(a_peer_that_has_fallen_silent_is_noticed_although_its_handler_is_busy);
async fn a_peer_that_has_fallen_silent_is_noticed_although_its_handler_is_busy(transport: Transport) {
    let (mut fixture, _neighbours, mut neighbour) = impatient(transport, ms(100)).await;
    let (mut silent, id) = fixture.connect_raw().await;
    silent.send(&client_text("wait")).await;
    // It leaves the hub, though its handler is still at it and is told later.
    eventually(0, || fixture.hub.len()).await;
    assert_eq!(silent.close_code().await, Some(1011));
    neighbour.send_text("undisturbed").await;
    neighbour.recv_texts(&["undisturbed"]).await;
    assert_eq!(fixture.others_ended(), [], "its handler is not interrupted");
    assert_eq!(fixture.engine.connection_count(), 2, "so something of it is still there");
    fixture.recorder.permits.add_permits(1);
    assert_eq!(fixture.ended().await, (id, CloseReason::PongTimeout));
    eventually(1, || fixture.engine.connection_count()).await;
    assert_eq!(fixture.others_ended(), []);
}

on_each_transport!(a_peer_that_has_fallen_silent_is_noticed_although_its_outbox_is_full);
async fn a_peer_that_has_fallen_silent_is_noticed_although_its_outbox_is_full(transport: Transport) {
    let (mut fixture, _neighbours, mut neighbour) = impatient(transport, ms(100)).await;
    let (_silent, id) = fixture.connect_raw().await;
    for round in 0..60 {
        fixture.hub.to_all().try_publish(&numbered(round, MESSAGE_BYTES)).unwrap();
    }
    let waiting = {
        let hub = fixture.hub.clone();
        tokio::spawn(async move { hub.to_all().deliver(&numbered(60, MESSAGE_BYTES)).await.unwrap() })
    };
    assert_eq!(fixture.ended().await, (id, CloseReason::PongTimeout));
    let receipt = within_timeout(waiting).await.unwrap();
    assert_eq!(
        (receipt.recipients, receipt.delayed, receipt.disconnected),
        (1, 1, 1),
        "who waited for it goes on"
    );
    // It does not even read the Close, and is dropped after its time.
    eventually(1, || fixture.engine.connection_count()).await;
    eventually((62 + 1, 0), || {
        let all = fixture.engine.metrics();
        (all.tally.written + all.tally.discarded, all.tally.pending())
    })
    .await;
    neighbour.send_text("undisturbed").await;
    neighbour.recv_texts(&["undisturbed"]).await;
    assert_eq!(fixture.others_ended(), []);
}

on_each_transport!(a_peer_that_sends_and_never_reads_is_given_up_and_its_neighbours_go_on);
async fn a_peer_that_sends_and_never_reads_is_given_up_and_its_neighbours_go_on(transport: Transport) {
    let config = WsHubConfig {
        outbox_frames: 1,
        outbox_bytes: 1024,
        heartbeat_interval: Some(ms(100)),
        pong_timeout: ms(1000),
        ..WsHubConfig::default()
    };
    let mut fixture = HubFixture::open(transport, 1, config).await;
    // Its pings are answered where nobody listens to it meanwhile.
    let (mut neighbour, _) = fixture.connect().await;
    let (mut flooder, id) = fixture.connect_raw().await;
    let flood = client_text(&format!("all {}", "x".repeat(1000))).repeat(100);
    let flooding = tokio::spawn(async move {
        let mut at = 0;
        loop {
            // Whatever it sends, and for as long as it is taken.
            match flooder.stream.try_send(&flood[at..]) {
                Ok(count) => at = (at + count) % flood.len(),
                Err(error) if error.kind() == ErrorKind::WouldBlock => tokio::time::sleep(ms(5)).await,
                Err(_) => return,
            }
        }
    });
    for text in ["one", "two", "three"] {
        neighbour.send_text(format!("all {text}")).await;
        while neighbour.recv_text().await != text {}
    }
    // It answers its pings as long as it listens.
    let listening = tokio::spawn(async move {
        loop {
            neighbour.recv_text().await;
        }
    });
    assert_eq!(fixture.ended().await, (id, CloseReason::PongTimeout));
    within_timeout(flooding).await.unwrap();
    listening.abort();
}

on_each_transport!(pongs_that_answer_nothing_keep_no_peer_alive);
async fn pongs_that_answer_nothing_keep_no_peer_alive(transport: Transport) {
    // Such that no pause of a busy machine is as long: it is the wrong words that must not count.
    let (mut fixture, _neighbours, _neighbour) = impatient(transport, ms(1000)).await;
    let (mut liar, id) = fixture.connect_raw().await;
    let mut nonce = liar.is_pinged().await;
    nonce[0] ^= 1;
    // It talks all the time, and would live if its words counted.
    let began = Instant::now();
    while fixture.hub.len() == 1 {
        for payload in [&nonce[..], b"", &[0; 8], &[0xff; 8], &nonce[..7]] {
            let _ = liar.stream.try_send(&client_frame(FIN | PONG, payload)); // it may be disconnected already
        }
        assert!(began.elapsed() < TEST_TIMEOUT, "it lives on lies");
        tokio::time::sleep(ms(50)).await;
    }
    assert_eq!(fixture.ended().await, (id, CloseReason::PongTimeout));
    assert_eq!(liar.close_code().await, Some(1011));
}

on_each_transport!(pongs_that_answer_nothing_count_for_no_round_trip);
async fn pongs_that_answer_nothing_count_for_no_round_trip(transport: Transport) {
    let fixture = HubFixture::open(transport, 1, beating(BroadcastPolicy::Block)).await;
    let (mut raw, id) = fixture.connect_raw().await;
    let echo = async |raw: &mut RawClient| {
        raw.send(&client_text("so far")).await;
        assert_eq!(raw.recv_text().await, "so far", "and all before it was read, too");
    };
    let nonce = raw.is_pinged().await;
    let mut other = nonce.clone();
    other[7] ^= 1;
    for payload in [&other[..], b"", &nonce[..7], &[&nonce[..], b"x"].concat()] {
        raw.send(&client_frame(FIN | PONG, payload)).await;
    }
    echo(&mut raw).await;
    assert_eq!(fixture.counted(id).await.rtt.last, None, "wrong ones do not count");
    raw.send(&client_frame(FIN | PONG, &nonce)).await;
    echo(&mut raw).await;
    let rtt = fixture.counted(id).await.rtt;
    assert!(rtt.last.is_some() && rtt.average == rtt.last);
    for _ in 0..10 {
        raw.send(&client_frame(FIN | PONG, &nonce)).await;
    }
    echo(&mut raw).await;
    assert_eq!(fixture.counted(id).await.rtt, rtt, "the same answer once more does not count");
}

// ---- resets

/// Reads numbers in the background until `last`; gives back those from the first on.
fn until_number(mut peer: Client, last: usize) -> JoinHandle<(Vec<usize>, Client)> {
    tokio::spawn(async move {
        let mut heard = Vec::new();
        while heard.last() != Some(&last) {
            heard.push(number_of(&peer.recv_text().await));
        }
        (heard, peer)
    })
}

on_each_transport!(workers = 2, peers_that_reset_in_the_middle_of_a_broadcast_end_once_and_disturb_nobody);
async fn peers_that_reset_in_the_middle_of_a_broadcast_end_once_and_disturb_nobody(transport: Transport) {
    const RUDE: usize = 8;
    const LAST: usize = usize::MAX;
    let mut fixture = HubFixture::open(transport, 2, WsHubConfig::default()).await;
    let mut readers = Vec::new();
    for _ in 0..4 {
        let (peer, id) = fixture.connect().await;
        fixture.hub.join(id, "stayers").await.unwrap();
        readers.push(until_number(peer, LAST));
    }
    let mut rude = Vec::new();
    for number in 0..RUDE {
        let (raw, id) = fixture.connect_raw().await;
        fixture.hub.join(id, "goers").await.unwrap();
        fixture.hub.join(id, &format!("alone {number}")).await.unwrap();
        rude.push((raw, id));
    }
    let mut ids: Vec<ConnectionId> = rude.iter().map(|(_, id)| *id).collect();
    // All of them at once, each in the middle of something: some have read a part, some nothing.
    let mut resets = JoinSet::new();
    for (number, (mut raw, _)) in rude.into_iter().enumerate() {
        resets.spawn(async move {
            if number % 2 == 0 {
                for round in 0..=number * 5 {
                    assert_eq!(number_of(&raw.recv_text().await), round);
                }
                raw.read_at_most(100);
            }
            raw.reset();
        });
    }
    let mut round = 0;
    while !resets.is_empty() || fixture.hub.len() > 4 {
        assert!(round < MANY, "nobody notices");
        within_timeout(fixture.hub.to_all().publish(&numbered(round, MESSAGE_BYTES))).await.unwrap();
        round += 1;
        while let Some(reset) = resets.try_join_next() {
            reset.unwrap();
        }
    }
    within_timeout(fixture.hub.to_all().publish(&numbered(LAST, 30))).await.unwrap();
    for reader in readers {
        let (heard, _peer) = within_timeout(reader).await.unwrap();
        assert!(heard.iter().copied().eq((0..round).chain([LAST])), "everything, in order");
    }
    for _ in 0..RUDE {
        let (id, reason) = fixture.ended().await;
        let place = ids.iter().position(|other| *other == id).expect("it has not ended before");
        ids.remove(place);
        assert!(matches!(reason, CloseReason::Transport(_) | CloseReason::Disconnected), "{reason:?}");
    }
    eventually(0, || fixture.hub.group_len("goers")).await;
}

// ---- floods

on_each_transport!(a_flood_of_pings_is_answered_up_to_the_limit_and_ends_with_1008);
async fn a_flood_of_pings_is_answered_up_to_the_limit_and_ends_with_1008(transport: Transport) {
    const LIMIT: usize = 20;
    let config = WsHubConfig {
        control_frames_per_second: LIMIT as u16,
        heartbeat_interval: None,
        ..WsHubConfig::default()
    };
    let mut fixture = HubFixture::open(transport, 1, config).await;
    let (mut other, _) = fixture.connect().await;
    let (mut modest, _) = fixture.connect_raw().await;
    modest.send(&client_frame(FIN | PING, b"ping").repeat(LIMIT)).await;
    for _ in 0..LIMIT {
        assert_eq!(modest.frame().await, Some((PONG, b"ping".to_vec())));
    }
    // Small enough to be read at once, so that it all falls into one second.
    for opcode in [PING, PONG] {
        let (mut flooder, id) = fixture.connect_raw().await;
        flooder.send(&client_frame(FIN | opcode, b"ping").repeat(LIMIT * 3)).await;
        let answered = if opcode == PING { LIMIT } else { 0 };
        for _ in 0..answered {
            assert_eq!(flooder.frame().await, Some((PONG, b"ping".to_vec())));
        }
        assert_eq!(flooder.close_code().await, Some(1008));
        assert_eq!(fixture.ended().await, (id, CloseReason::ControlFlood));
    }
    modest.send(&client_text("me still here")).await;
    assert_eq!(modest.recv().await, (TEXT, b"still here".to_vec()));
    other.send_text("me still here").await;
    other.recv_texts(&["still here"]).await;
    assert_eq!(fixture.others_ended(), []);
}

on_each_transport!(workers = 2, a_flood_of_messages_waits_in_the_floods_own_kernel_while_its_handler_is_busy);
async fn a_flood_of_messages_waits_in_the_floods_own_kernel_while_its_handler_is_busy(transport: Transport) {
    const ATTEMPTS_IN_VAIN: usize = 50;
    let mut fixture =
        HubFixture::open(transport, 1, WsHubConfig { heartbeat_interval: None, ..WsHubConfig::default() })
            .await;
    let (mut other, _) = fixture.connect().await;
    let mut flooder = RawClient::connect(&fixture.server).await;
    let id: ConnectionId = flooder.recv_text().await.parse().unwrap();
    SockRef::from(flooder.stream.tcp()).set_send_buffer_size(16 << 10).unwrap();
    flooder.send(&client_text("wait")).await;
    // Until nothing more goes out, although its shard has had turn after turn, as the other one shows.
    let batch = client_text("me 12345678").repeat(1000);
    let (mut sent, mut in_vain) = (0, 0);
    while in_vain < ATTEMPTS_IN_VAIN {
        match flooder.stream.try_send(&batch[sent % batch.len()..]) {
            Ok(count) => (sent, in_vain) = (sent + count, 0),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                in_vain += 1;
                other.send_text("me served").await;
                other.recv_texts(&["served"]).await;
            }
            Err(error) => panic!("{error}"),
        }
        assert!(sent < 16 << 20, "everything is read, although nothing is handled");
    }
    assert_eq!(fixture.counted(id).await.tally.received, 1, "the one that its handler is at");
    fixture.recorder.permits.add_permits(1);
    assert_eq!(flooder.recv_text().await, "waited");
    other.recv_texts(&["waited"]).await;
    // All that was sent is handled, in whole messages, none twice.
    let message_bytes = client_text("me 12345678").len();
    for _ in 0..sent / message_bytes {
        assert_eq!(flooder.recv_text().await, "12345678");
    }
    let missing = sent.next_multiple_of(message_bytes) - sent;
    flooder.send(&batch[message_bytes - missing..message_bytes]).await;
    if missing > 0 {
        assert_eq!(flooder.recv_text().await, "12345678");
    }
    flooder.send(&client_text("me over")).await;
    assert_eq!(flooder.recv_text().await, "over");
    other.send_text("me served").await;
    other.recv_texts(&["served"]).await;
    assert_eq!(fixture.others_ended(), []);
}

// ---- many drops

/// Counts what it is told of drops. `wait` waits for a permit; `watch` waits for the first drop, and says how many
/// there were when it had its turn.
struct Teller(Arc<Told>);

struct Told {
    drops: AtomicU64,
    first: Notify,
    permits: Semaphore,
    /// One permit for each method that has begun to wait.
    begun: Semaphore,
}

impl WsHub for Teller {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        CommandHub.on_connected(ctx).await
    }

    async fn on_message(&self, message: String, ctx: HubContext<Self>) {
        self.0.begun.add_permits(1);
        if message == "wait" {
            self.0.permits.acquire().await.unwrap().forget();
        } else {
            self.0.first.notified().await;
            ctx.unicast(self.0.drops.load(Relaxed).to_string()).await;
        }
    }

    async fn on_message_drop(&self, _: Arc<str>) {
        if self.0.drops.fetch_add(1, Relaxed) == 0 {
            self.0.first.notify_one();
        }
    }
}

on_each_transport!(however_many_drops_a_hub_is_told_of_the_shard_s_others_have_their_turn_meanwhile);
async fn however_many_drops_a_hub_is_told_of_the_shard_s_others_have_their_turn_meanwhile(
    transport: Transport,
) {
    others_have_their_turn_between_drops::<Teller>(transport).await;
    others_have_their_turn_between_drops::<OnRuntime<Teller>>(transport).await;
}

async fn others_have_their_turn_between_drops<
    H: WsHub<Codec = RawCodec, InMessage = String, OutMessage = String> + From<Teller>,
>(
    transport: Transport,
) {
    const DROPS: u64 = 10_000;
    let engine = engine(1);
    let hub = engine.hub::<H>(narrow(DROP_AT_ONCE)).unwrap();
    let told = Arc::new(Told {
        drops: AtomicU64::new(0),
        first: Notify::new(),
        permits: Semaphore::new(0),
        begun: Semaphore::new(0),
    });
    let route = {
        let (hub, told) = (hub.clone(), told.clone());
        any(async move |ws: WebSocketUpgrade| ws.serve(&hub, Teller(told.clone())))
    };
    let server = Server::start_over(transport, Router::new().route("/ws", route)).await;
    let (mut watcher, _) = connect(&server.url("/ws")).await;
    let mut stalled = RawClient::connect_narrow(&server).await;
    let id: ConnectionId = stalled.recv_text().await.parse().unwrap();
    // It is told of no drop until its method is over.
    stalled.send(&client_text("wait")).await;
    watcher.send_text("watch").await;
    within_timeout(told.begun.acquire_many(2)).await.unwrap().forget();
    let dropped = async || {
        let counted = within_timeout(hub.connection_metrics(id)).await.unwrap().unwrap();
        counted.tally.dropped.timeout + counted.tally.dropped.overflow
    };
    while dropped().await < DROPS {
        for round in 0..1000 {
            let message = numbered(round, MESSAGE_BYTES);
            within_timeout(hub.to(id).policy(DROP_AT_ONCE).unwrap().publish(&message)).await.unwrap();
        }
    }
    assert_eq!(told.drops.load(Relaxed), 0);
    told.permits.add_permits(1);
    let until_its_turn: u64 = watcher.recv_text().await.parse().unwrap();
    // 1,000 in a turn, and whose turn is the first in a round is not told.
    assert!((1..=2000).contains(&until_its_turn), "{until_its_turn} on {:?}", H::RUN_ON);
    eventually(dropped().await, || told.drops.load(Relaxed)).await;
}

/// Records what it is told of drops. `wait` waits for a permit.
struct DropRecorder {
    dropped: UnboundedSender<Dropped>,
    permits: Arc<Semaphore>,
}

impl WsHub for DropRecorder {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.add_to_group("prices").await;
        CommandHub.on_connected(ctx).await
    }

    async fn on_message(&self, _: String, ctx: HubContext<Self>) {
        ctx.unicast("waiting".to_owned()).await;
        self.permits.acquire().await.unwrap().forget();
    }

    async fn on_dropped(&self, _: HubContext<Self>, dropped: Dropped) {
        self.dropped.send(dropped).unwrap();
    }
}

on_each_transport!(a_hub_is_told_what_was_dropped_by_cause_and_group_when_its_method_has_returned);
async fn a_hub_is_told_what_was_dropped_by_cause_and_group_when_its_method_has_returned(
    transport: Transport,
) {
    let hub = engine(1).hub::<DropRecorder>(narrow(DROP_AT_ONCE)).unwrap();
    let (dropped, mut told) = unbounded_channel();
    let permits = Arc::new(Semaphore::new(0));
    let route = {
        let (hub, permits) = (hub.clone(), permits.clone());
        let instance = move || DropRecorder { dropped: dropped.clone(), permits: permits.clone() };
        any(async move |ws: WebSocketUpgrade| ws.serve(&hub, instance()))
    };
    let server = Server::start_over(transport, Router::new().route("/ws", route)).await;
    let mut stalled = RawClient::connect_narrow(&server).await;
    let id: ConnectionId = stalled.recv_text().await.parse().unwrap();
    stalled.send(&client_text("wait")).await;
    assert_eq!(stalled.recv_text().await, "waiting");

    // To one and to a group, until the client has lost some of both.
    let lost =
        async || within_timeout(hub.connection_metrics(id)).await.unwrap().unwrap().tally.dropped.overflow;
    let message = numbered(0, MESSAGE_BYTES);
    let (mut alone, mut both) = (0, 0);
    for _ in 0..MANY {
        within_timeout(hub.to(id).policy(DROP_AT_ONCE).unwrap().publish(&message)).await.unwrap();
        alone = lost().await;
        if alone > 0 {
            break;
        }
    }
    for _ in 0..MANY {
        within_timeout(hub.to_group("prices").publish(&message)).await.unwrap();
        both = lost().await;
        if both > alone + 10 {
            break;
        }
    }
    assert!(alone > 0 && both > alone, "{alone} {both}");
    assert!(told.try_recv().is_err(), "told while a method was pending");

    permits.add_permits(1);
    let notices = [within_timeout(told.recv()).await.unwrap(), within_timeout(told.recv()).await.unwrap()];
    let seen = notices.map(|notice| (notice.messages, notice.cause, notice.group));
    let group = Some(Arc::from("prices"));
    assert_eq!(seen, [(alone, DropCause::Overflow, None), (both - alone, DropCause::Overflow, group)]);
}
