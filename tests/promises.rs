//! The promises of the design, end to end: several shards, dozens of clients, publishers inside and outside.
//!
//! Everything goes through hubs and over real sockets, while clients connect and disconnect. A test decides by what
//! clients have received, not by when. Promise 4, which is about time, stands with the engine's tests where time can be
//! driven; here `a_stalled_client_…` shows that it holds through a hub.

#![allow(clippy::unwrap_used)] // Helpers of tests are tests, which clippy cannot see.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::extract::Path;
use axum::routing::any;
use shardcast::{
    CloseCode, CloseReason, ConnectionId, DisconnectRequest, Hub, HubContext, RawCodec, Refusal,
    WebSocketUpgrade, WsHub, WsHubConfig,
};
use testkit_hub::{
    Client, CommandHub, OnRuntime, Server, Transport, command_app, connect, connect_amid, engine, eventually,
    on_each_transport, within_timeout, yield_twice,
};
use tokio::io::AsyncWriteExt as _;
use tokio::sync::mpsc::{UnboundedSender, unbounded_channel};
use tokio::sync::{Barrier, Semaphore, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio_tungstenite::tungstenite::Message;

const SHARDS: usize = 3;

fn command_hub(shards: usize) -> Hub<CommandHub> {
    engine(shards).hub::<CommandHub>(WsHubConfig::default()).unwrap()
}

/// Reads in the background up to `last`, then leaves.
fn until(mut peer: Client, last: &str) -> JoinHandle<Vec<String>> {
    let last = last.to_owned();
    tokio::spawn(async move {
        let mut heard = Vec::new();
        loop {
            let text = peer.recv_text().await;
            if text == last {
                break;
            }
            heard.push(text);
        }
        peer.leave().await;
        heard
    })
}

/// Whether `part` can be made of `whole` by leaving out.
fn is_subsequence(part: &[String], whole: &[String]) -> bool {
    let mut whole = whole.iter();
    part.iter().all(|text| whole.any(|other| other == text))
}

on_each_transport!(workers = 2, promise_1_all_connections_see_one_order_whichever_shards_they_are_on);
async fn promise_1_all_connections_see_one_order_whichever_shards_they_are_on(transport: Transport) {
    const EACH: usize = 150;
    let hub = command_hub(SHARDS);
    let server = Server::start_over(transport, command_app(hub.clone())).await;
    let url = server.url("/ws");
    // Everybody is in "all"; a third each in "red", "blue" and both.
    let mut readers = Vec::new();
    for index in 0..18 {
        let (peer, id) = connect(&url).await;
        let groups = [vec!["red"], vec!["blue"], vec!["red", "blue"]][index % 3].clone();
        for group in &groups {
            hub.join(id, group).await.unwrap();
        }
        readers.push((groups, until(peer, "done")));
    }

    let mut publishers = JoinSet::new();
    for publisher in 0..4 {
        let hub = hub.clone();
        publishers.spawn(async move {
            for count in 0..EACH {
                let text = |target| format!("task {publisher} {count} {target}");
                within_timeout(hub.to_all().publish(&text("all"))).await.unwrap();
                within_timeout(hub.to_group("red").publish(&text("red"))).await.unwrap();
                within_timeout(hub.to_groups(&["blue", "red"]).publish(&text("both"))).await.unwrap();
            }
        });
    }
    for publisher in 0..4 {
        let (mut peer, ..) = connect_amid(&url).await;
        publishers.spawn(async move {
            for count in 0..EACH {
                peer.send_text(format!("all handler {publisher} {count} all")).await;
                peer.send_text(format!("group blue handler {publisher} {count} blue")).await;
                // Reads, so that it does not only write.
                peer.recv_text().await;
            }
            peer.send_text("me finished").await;
            while peer.recv_text().await != "finished" {}
            peer.leave().await;
        });
    }
    // And guests that see a part of it.
    let mut guests = JoinSet::new();
    for guest in 0..12 {
        let url = url.clone();
        guests.spawn(async move {
            let (mut peer, _, mut heard) = connect_amid(&url).await;
            for _ in 0..20 + 10 * guest {
                heard.push(peer.recv_text().await);
            }
            heard.extend(peer.leave().await);
            heard
        });
    }
    while let Some(guest) = within_timeout(publishers.join_next()).await {
        guest.unwrap();
    }
    // Guests that came late still wait for something to hear.
    let guests = {
        let (stop, mut stopped) = oneshot::channel::<()>();
        let hub = hub.clone();
        let filler = tokio::spawn(async move {
            let mut count = 0;
            while stopped.try_recv().is_err() {
                hub.to_all().publish(&format!("filler {count}")).await.unwrap();
                count += 1;
                tokio::task::yield_now().await;
            }
        });
        let mut heard = Vec::new();
        while let Some(guest) = within_timeout(guests.join_next()).await {
            heard.push(guest.unwrap());
        }
        stop.send(()).unwrap();
        within_timeout(filler).await.unwrap();
        heard
    };
    hub.to_all().publish(&"done".to_owned()).await.unwrap();

    let mut by_groups: HashMap<Vec<&str>, Vec<String>> = HashMap::new();
    for (groups, reader) in readers {
        let heard = within_timeout(reader).await.unwrap();
        let first = by_groups.entry(groups.clone()).or_insert_with(|| heard.clone());
        assert!(*first == heard, "two members of {groups:?} disagree");
    }
    let [red, blue, both] =
        [vec!["red"], vec!["blue"], vec!["red", "blue"]].map(|groups| &by_groups[&groups]);
    for target in ["all", "red", "blue", "both"] {
        let count = both.iter().filter(|text| text.ends_with(&format!(" {target}"))).count();
        let expected = if target == "all" { 8 } else { 4 } * EACH;
        assert_eq!(count, expected, "{target}: everything arrived, nothing twice");
    }
    // Members of both groups see everything: theirs is the one order.
    assert!(is_subsequence(red, both) && is_subsequence(blue, both));
    let to_all: Vec<_> =
        both.iter().filter(|text| text.ends_with("all") || text.starts_with("filler")).cloned().collect();
    for heard in &guests {
        assert!(
            to_all.windows(heard.len()).any(|window| window == heard),
            "a guest sees one piece of it, without gaps"
        );
    }
}

/// Does a fixed sequence of deeds for each message.
struct Actor;

impl WsHub for Actor {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        CommandHub.on_connected(ctx).await
    }

    async fn on_message(&self, name: String, ctx: HubContext<Self>) {
        ctx.broadcast(format!("{name} 1 all")).await;
        ctx.unicast(format!("{name} 2 me")).await;
        ctx.add_to_group("stage").await;
        ctx.broadcast_group("stage", format!("{name} 3 stage")).await;
        ctx.unicast(format!("{name} 4 me")).await;
        ctx.broadcast(format!("{name} 5 all")).await;
        ctx.remove_from_group("stage").await;
        ctx.broadcast_group("stage", format!("{name} 6 stage")).await;
        ctx.unicast(format!("{name} 7 me")).await;
    }
}

on_each_transport!(workers = 2, promise_2_what_one_publisher_does_in_sequence_everyone_sees_in_that_sequence);
async fn promise_2_what_one_publisher_does_in_sequence_everyone_sees_in_that_sequence(transport: Transport) {
    const ROUNDS: usize = 100;
    let engine = engine(SHARDS);
    let hub = engine.hub::<Actor>(WsHubConfig::default()).unwrap();
    let serve = {
        let hub = hub.clone();
        async move |ws: WebSocketUpgrade| ws.serve(&hub, Actor)
    };
    let server = Server::start_over(transport, Router::new().route("/ws", any(serve))).await;
    let mut audience = Vec::new();
    for _ in 0..6 {
        let (peer, id) = connect(&server.url("/ws")).await;
        hub.join(id, "stage").await.unwrap();
        audience.push(until(peer, "done"));
    }
    // Actors act by their own handlers, puppets by tasks elsewhere, all at the same time.
    let mut on_stage = Vec::new();
    let mut acting = JoinSet::new();
    for actor in 0..5 {
        let (mut peer, ..) = connect_amid(&server.url("/ws")).await;
        let name = format!("actor{actor}");
        for round in 0..ROUNDS {
            // Written before anything is read: small enough for the kernel.
            peer.send_text(format!("{name} {round}")).await;
        }
        let last = format!("{name} {} 7 me", ROUNDS - 1);
        on_stage.push((name, until(peer, &last), last));
    }
    for puppet in 0..5 {
        let (peer, id, _) = connect_amid(&server.url("/ws")).await;
        let (hub, name) = (hub.clone(), format!("puppet{puppet}"));
        let last = format!("{name} {} 7 me", ROUNDS - 1);
        on_stage.push((name.clone(), until(peer, &last), last));
        acting.spawn(async move {
            for round in 0..ROUNDS {
                let name = format!("{name} {round}");
                hub.to_all().publish(&format!("{name} 1 all")).await.unwrap();
                hub.to(id).publish(&format!("{name} 2 me")).await.unwrap();
                hub.join(id, "stage").await.unwrap();
                hub.to_group("stage").publish(&format!("{name} 3 stage")).await.unwrap();
                hub.to(id).publish(&format!("{name} 4 me")).await.unwrap();
                hub.to_all().publish(&format!("{name} 5 all")).await.unwrap();
                hub.leave(id, "stage").await.unwrap();
                hub.to_group("stage").publish(&format!("{name} 6 stage")).await.unwrap();
                hub.to(id).publish(&format!("{name} 7 me")).await.unwrap();
            }
        });
    }
    while let Some(puppet) = within_timeout(acting.join_next()).await {
        puppet.unwrap();
    }
    let names: Vec<String> = on_stage.iter().map(|(name, ..)| name.clone()).collect();
    let of = |heard: &[String], name: &str| -> Vec<String> {
        heard.iter().filter(|text| text.starts_with(&format!("{name} "))).cloned().collect()
    };
    let script = |name: &str, deeds: &[&str]| -> Vec<String> {
        (0..ROUNDS)
            .flat_map(|round| deeds.iter().map(move |deed| format!("{round} {deed}")))
            .map(|line| format!("{name} {line}"))
            .collect()
    };
    for (name, reader, last) in on_stage {
        let mut heard = within_timeout(reader).await.unwrap();
        heard.push(last);
        // Itself sees what it did while a member, and not what came after it had left.
        let own = ["1 all", "2 me", "3 stage", "4 me", "5 all", "7 me"];
        assert_eq!(of(&heard, &name), script(&name, &own));
    }
    // Each has seen its last deed.
    hub.to_all().publish(&"done".to_owned()).await.unwrap();
    for member in audience {
        let heard = within_timeout(member).await.unwrap();
        for name in &names {
            assert_eq!(of(&heard, name), script(name, &["1 all", "3 stage", "5 all", "6 stage"]));
        }
    }
}

on_each_transport!(
    workers = 2,
    promise_3_the_next_publication_after_a_join_reaches_it_and_earlier_ones_do_not
);
async fn promise_3_the_next_publication_after_a_join_reaches_it_and_earlier_ones_do_not(
    transport: Transport,
) {
    const ROUNDS: usize = 200;
    let hub = command_hub(SHARDS);
    let server = Server::start_over(transport, command_app(hub.clone())).await;
    let (other, other_id) = connect(&server.url("/ws")).await;
    hub.join(other_id, "room").await.unwrap();
    let other = until(other, "done");

    // Others publish to the room all the time and make the shards busy.
    let stop = Arc::new(AtomicBool::new(false));
    let mut noise = JoinSet::new();
    for _ in 0..2 {
        let (hub, stop) = (hub.clone(), stop.clone());
        noise.spawn(async move {
            while !stop.load(SeqCst) {
                hub.to_group("room").publish(&"noise".to_owned()).await.unwrap();
                tokio::task::yield_now().await;
            }
        });
    }
    // The publisher is another task than the one that joins.
    let mut members = Vec::new();
    for member in 0..4 {
        let (peer, id) = connect(&server.url("/ws")).await;
        members.push((member, until(peer, "done")));
        let hub = hub.clone();
        noise.spawn(async move {
            for round in 0..ROUNDS {
                let elsewhere = async |when: &'static str| {
                    let (hub, text) = (hub.clone(), format!("{member} {round} {when}"));
                    let publish = async move { hub.to_group("room").publish(&text).await.unwrap() };
                    within_timeout(tokio::spawn(publish)).await.unwrap();
                };
                elsewhere("before").await;
                hub.join(id, "room").await.unwrap();
                elsewhere("joined").await;
                hub.leave(id, "room").await.unwrap();
                elsewhere("left").await;
            }
        });
    }
    let mut joiners_left = 4;
    while joiners_left > 0 {
        within_timeout(noise.join_next()).await.unwrap().unwrap();
        joiners_left -= 1;
    }
    stop.store(true, SeqCst);
    while let Some(noisy) = within_timeout(noise.join_next()).await {
        noisy.unwrap();
    }
    hub.to_all().publish(&"done".to_owned()).await.unwrap();
    for (member, reader) in members {
        let heard = within_timeout(reader).await.unwrap();
        let own: Vec<_> = heard.into_iter().filter(|text| text.starts_with(&format!("{member} "))).collect();
        let expected: Vec<_> = (0..ROUNDS).map(|round| format!("{member} {round} joined")).collect();
        assert_eq!(own, expected, "its own three publications: the one while it was a member, no other");
    }
    let heard = within_timeout(other).await.unwrap();
    assert_eq!(heard.iter().filter(|text| *text != "noise").count(), 4 * 3 * ROUNDS);
}

on_each_transport!(workers = 2, promise_4_a_stalled_client_delays_only_who_publishes_to_it);
async fn promise_4_a_stalled_client_delays_only_who_publishes_to_it(transport: Transport) {
    // One shard, so that they share everything.
    let engine = engine(1);
    let config = WsHubConfig { outbox_frames: 8, outbox_bytes: 64 << 10, ..WsHubConfig::default() };
    let hub = engine.hub::<CommandHub>(config).unwrap();
    let server = Server::start_over(transport, command_app(hub.clone())).await;
    let (stalled, stalled_id) = connect(&server.url("/ws")).await;
    let (mut ada, ada_id) = connect(&server.url("/ws")).await;
    let (mut bob, bob_id) = connect(&server.url("/ws")).await;
    for id in [ada_id, bob_id] {
        hub.join(id, "others").await.unwrap();
    }
    // It does not read; whoever publishes to it waits in the end.
    let big = "x".repeat(8 << 10);
    let publish = {
        let (hub, big) = (hub.clone(), big.clone());
        async move {
            loop {
                hub.to(stalled_id).publish(&big.clone()).await.unwrap();
            }
        }
    };
    let waiting = tokio::spawn(publish);
    let inspect = async || within_timeout(hub.connection_metrics(stalled_id)).await.unwrap().unwrap();
    while inspect().await.tally.pending() < 3 {
        tokio::task::yield_now().await;
    }
    // A handler waits for it, too: that of Bob, who therefore is not read, but hears.
    bob.send_text("all for everybody").await;
    ada.recv_texts(&["for everybody"]).await;
    bob.recv_texts(&["for everybody"]).await;
    for round in 0..200 {
        let text = format!("round {round}");
        within_timeout(hub.to_group("others").publish(&text.clone())).await.unwrap();
        ada.send_text(format!("me {text}, too")).await;
        ada.recv_texts(&[&text, &format!("{text}, too")]).await;
        bob.recv_texts(&[&text]).await;
    }
    assert!(!waiting.is_finished());
    let metrics = inspect().await;
    assert!(metrics.tally.pending() >= 3 && metrics.tally.discarded == 0, "{metrics:?}");
    waiting.abort();
    // When it goes, Bob goes on.
    bob.send_text("me free again").await;
    drop(stalled);
    bob.recv_texts(&["free again"]).await;
    eventually(2, || hub.len()).await;
}

on_each_transport!(
    workers = 2,
    promise_5_every_frame_offered_is_written_or_discarded_or_pending_and_those_written_arrive
);
async fn promise_5_every_frame_offered_is_written_or_discarded_or_pending_and_those_written_arrive(
    transport: Transport,
) {
    let engine = engine(SHARDS);
    let hub = engine.hub::<CommandHub>(WsHubConfig::default()).unwrap();
    let server = Server::start_over(transport, command_app(hub.clone())).await;
    let url = server.url("/ws");

    // Those who read to the end have received what was written to them.
    let mut polite = JoinSet::new();
    let start = Arc::new(Barrier::new(13));
    for index in 0..12 {
        let (url, start) = (url.clone(), start.clone());
        polite.spawn(async move {
            let (mut peer, id) = connect(&url).await;
            let mut heard = 1; // its id
            // Nobody talks before all are there.
            start.wait().await;
            for round in 0..50 {
                let own = format!("{index} {round}");
                peer.send_text(format!("all {own}")).await;
                heard += 1;
                while peer.recv_text().await != own {
                    heard += 1;
                }
            }
            (id, heard, peer)
        });
    }
    within_timeout(start.wait()).await;
    // Those who vanish have received a part.
    let mut rude = JoinSet::new();
    for _ in 0..8 {
        let url = url.clone();
        rude.spawn(async move {
            let (mut peer, ..) = connect_amid(&url).await;
            for _ in 0..5 {
                peer.send_text("all hello and goodbye").await;
                peer.recv_text().await;
            }
            // Without a word, and with something unread perhaps.
        });
    }
    while let Some(one) = within_timeout(rude.join_next()).await {
        one.unwrap();
    }
    let mut stayers = Vec::new();
    while let Some(one) = within_timeout(polite.join_next()).await {
        stayers.push(one.unwrap());
    }
    eventually(12, || hub.len()).await;
    // All has been published. Each one's own account agrees with what it has read, to the frame.
    let receipt = within_timeout(hub.to_all().deliver(&"last".to_owned())).await.unwrap();
    assert_eq!(receipt.recipients, 12);
    let mut written_to_stayers = 0;
    for (id, mut heard, mut peer) in stayers {
        while peer.recv_text().await != "last" {
            heard += 1;
        }
        heard += 1;
        let metrics = within_timeout(hub.connection_metrics(id)).await.unwrap().unwrap();
        assert_eq!((metrics.tally.written, metrics.tally.offered), (heard, heard), "{metrics:?}");
        assert_eq!((metrics.tally.pending(), metrics.tally.discarded), (0, 0));
        assert_eq!(peer.leave().await, Vec::<String>::new());
        written_to_stayers += heard;
    }
    eventually(0, || engine.connection_count()).await;
    // A shard publishes its counters behind its turn, one after the other: they add up once it rests.
    eventually((20, 20, 0, 0, 0), || {
        let metrics = engine.metrics();
        let missing = metrics.tally.offered.abs_diff(metrics.tally.written + metrics.tally.discarded);
        (metrics.adopted, metrics.ended, metrics.connections, metrics.tally.pending(), missing)
    })
    .await;
    let metrics = engine.metrics();
    // Eight times an id and at least what they waited for.
    assert!(metrics.tally.written >= written_to_stayers + 8 * 6, "{metrics:?}");
    assert!(metrics.tally.received >= 12 * 50, "{metrics:?}");
}

/// Handles slowly, now and then, and notices when it is called twice at a time.
struct Slow {
    busy: AtomicBool,
    handled: Mutex<Vec<usize>>,
}

impl WsHub for Slow {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;
    async fn on_message(&self, number: String, ctx: HubContext<Self>) {
        assert!(!self.busy.swap(true, SeqCst), "two calls at a time");
        let number: usize = number.parse().unwrap();
        match number % 7 {
            0 => tokio::time::sleep(Duration::from_millis(1)).await,
            3 => tokio::spawn(tokio::task::yield_now()).await.unwrap(),
            5 => yield_twice().await,
            _ => {}
        }
        self.handled.lock().unwrap().push(number);
        ctx.unicast(format!("{number}")).await;
        self.busy.store(false, SeqCst);
    }
}

async fn one_connections_messages_are_handled_in_order<H: WsHub + From<Slow>>(transport: Transport) {
    const MESSAGES: usize = 300;
    let engine = engine(2);
    let hub = engine.hub::<H>(WsHubConfig::default()).unwrap();
    let serve = async move |ws: WebSocketUpgrade| {
        ws.serve(&hub, Slow { busy: AtomicBool::new(false), handled: Mutex::default() })
    };
    let server = Server::start_over(transport, Router::new().route("/ws", any(serve))).await;
    let mut clients = JoinSet::new();
    for _ in 0..12 {
        let url = server.url("/ws");
        clients.spawn(async move {
            let mut peer = Client::connect(url).await;
            for number in 0..MESSAGES {
                peer.send_text(number.to_string()).await;
            }
            for number in 0..MESSAGES {
                assert_eq!(peer.recv_text().await, number.to_string());
            }
            assert_eq!(peer.leave().await, Vec::<String>::new());
        });
    }
    while let Some(client) = within_timeout(clients.join_next()).await {
        client.unwrap();
    }
    eventually(12, || engine.metrics().ended).await;
    assert_eq!(engine.metrics().ended_panic, 0);
}

on_each_transport!(workers = 2, promise_7_messages_are_handled_one_after_the_other_on_the_shard);
async fn promise_7_messages_are_handled_one_after_the_other_on_the_shard(transport: Transport) {
    one_connections_messages_are_handled_in_order::<Slow>(transport).await;
}

on_each_transport!(workers = 2, promise_7_messages_are_handled_one_after_the_other_on_the_runtime);
async fn promise_7_messages_are_handled_one_after_the_other_on_the_runtime(transport: Transport) {
    one_connections_messages_are_handled_in_order::<OnRuntime<Slow>>(transport).await;
}

/// Handles a message for each permit.
struct Gate {
    permits: Arc<Semaphore>,
    handled: Arc<AtomicUsize>,
}

impl WsHub for Gate {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;
    async fn on_message(&self, _: String, _: HubContext<Self>) {
        self.permits.acquire().await.unwrap().forget();
        self.handled.fetch_add(1, SeqCst);
    }
}

on_each_transport!(workers = 2, promise_7_a_pending_handler_stops_the_reading_and_the_sender_feels_it);
async fn promise_7_a_pending_handler_stops_the_reading_and_the_sender_feels_it(transport: Transport) {
    const MESSAGES: usize = 2000;
    const BYTES: usize = 50_000; // in all 100 MB, far beyond what kernels keep
    let engine = engine(1);
    let hub = engine.hub::<Gate>(WsHubConfig::default()).unwrap();
    let (permits, handled) = (Arc::new(Semaphore::new(0)), Arc::new(AtomicUsize::new(0)));
    let serve = {
        let gate = (permits.clone(), handled.clone());
        async move |ws: WebSocketUpgrade| ws.serve(&hub, Gate { permits: gate.0, handled: gate.1 })
    };
    let server = Server::start_over(transport, Router::new().route("/ws", any(serve))).await;
    let peer = Client::connect(server.url("/ws")).await;
    let sent = Arc::new(AtomicUsize::new(0));
    let sending = {
        let (mut peer, sent) = (peer, sent.clone());
        tokio::spawn(async move {
            let text = "x".repeat(BYTES);
            for _ in 0..MESSAGES {
                peer.send_text(text.as_str()).await;
                sent.fetch_add(1, SeqCst);
            }
            peer
        })
    };
    // Until the sender has stood still for long: it cannot be proven sooner that it stands.
    let (mut last, mut still) = (usize::MAX, 0);
    while still < 100 {
        tokio::time::sleep(Duration::from_millis(2)).await;
        let now = sent.load(SeqCst);
        assert!(now < MESSAGES, "everything was read, although nothing is handled");
        still = if now == last && now > 0 { still + 1 } else { 0 };
        last = now;
    }
    assert_eq!(handled.load(SeqCst), 0);
    // One is with the handler, the others are not read.
    eventually(1, || engine.metrics().tally.received).await;
    permits.add_permits(MESSAGES);
    let peer = within_timeout(sending).await.unwrap();
    eventually(MESSAGES, || handled.load(SeqCst)).await;
    peer.leave().await;
}

/// Reports its end, and panics if told to.
struct Mortal {
    ends: UnboundedSender<(ConnectionId, CloseReason)>,
}

impl WsHub for Mortal {
    type Codec = RawCodec;
    type InMessage = String;
    type OutMessage = String;

    async fn on_connected(&self, ctx: HubContext<Self>) -> Result<(), Refusal> {
        ctx.add_to_group("mortals").await;
        ctx.add_to_group(&format!("alone {}", ctx.id())).await;
        ctx.unicast(ctx.id().to_string()).await;
        Ok(())
    }

    async fn on_message(&self, text: String, ctx: HubContext<Self>) {
        match text.as_str() {
            "panic" => panic!("told to"),
            "end" => ctx.disconnect(CloseCode(4000), "asked for").await,
            // Still busy when its connection ends.
            "sleep" => tokio::time::sleep(Duration::from_millis(5)).await,
            _ => ctx.broadcast_group("mortals", text).await,
        }
    }

    async fn on_disconnect(&self, request: DisconnectRequest) {
        yield_twice().await;
        self.ends.send((request.id, request.reason)).unwrap();
    }
}

on_each_transport!(
    workers = 2,
    promise_8_each_connection_ends_once_with_one_reason_and_leaves_nothing_behind
);
async fn promise_8_each_connection_ends_once_with_one_reason_and_leaves_nothing_behind(transport: Transport) {
    const WAYS: [&str; 7] = ["goodbye", "vanish", "panic", "end", "outside", "protocol", "busy"];
    const EACH: usize = 6;
    let engine = engine(SHARDS);
    let hub = engine.hub::<Mortal>(WsHubConfig::default()).unwrap();
    let (ends, mut ended) = unbounded_channel();
    let serve = {
        let hub = hub.clone();
        async move |ws: WebSocketUpgrade, Path(_): Path<String>| ws.serve(&hub, Mortal { ends })
    };
    let server = Server::start_over(transport, Router::new().route("/{way}", any(serve))).await;

    // Something is on its way to them at all times.
    let stop = Arc::new(AtomicBool::new(false));
    let publishing = {
        let (hub, stop) = (hub.clone(), stop.clone());
        tokio::spawn(async move {
            while !stop.load(SeqCst) {
                hub.to_group("mortals").publish(&"on its way".to_owned()).await.unwrap();
                tokio::task::yield_now().await;
            }
        })
    };
    let mut lives = JoinSet::new();
    for way in WAYS.into_iter().cycle().take(WAYS.len() * EACH) {
        let (url, hub) = (server.url(&format!("/{way}")), hub.clone());
        lives.spawn(async move {
            let mut peer = Client::connect(url).await;
            // Being in the group comes first, so others' messages may come before it.
            let id: ConnectionId = loop {
                if let Ok(id) = peer.recv_text().await.parse() {
                    break id;
                }
            };
            peer.send_text("hello").await;
            while peer.recv_text().await != "hello" {}
            let code = match way {
                "goodbye" => {
                    peer.send_close(4123).await;
                    peer.rest().await.1
                }
                "vanish" => {
                    drop(peer);
                    None
                }
                "panic" | "end" => {
                    peer.send_text(way).await;
                    peer.rest().await.1
                }
                "outside" => {
                    // By two at the same time: the first one counts.
                    let (first, second) = tokio::join!(
                        hub.disconnect(id, CloseCode(4001), "one of two"),
                        hub.disconnect(id, CloseCode(4001), "one of two"),
                    );
                    first.and(second).unwrap();
                    peer.rest().await.1
                }
                "protocol" => {
                    // An unmasked frame, past tungstenite.
                    let stream = peer.socket.get_mut();
                    within_timeout(stream.write_all(b"\x81\x01x")).await.unwrap();
                    within_timeout(stream.flush()).await.unwrap();
                    peer.rest().await.1
                }
                "busy" => {
                    peer.send_text("sleep").await;
                    peer.send(Message::text("unheard")).await;
                    drop(peer);
                    None
                }
                _ => unreachable!(),
            };
            (way, id, code.map(|(code, _)| code))
        });
    }
    let mut told = HashMap::new();
    for _ in 0..WAYS.len() * EACH {
        let (id, reason) = within_timeout(ended.recv()).await.unwrap();
        assert!(told.insert(id, reason).is_none(), "{id} ended twice");
    }
    while let Some(life) = within_timeout(lives.join_next()).await {
        let (way, id, code) = life.unwrap();
        let reason = told.remove(&id).unwrap();
        let (expected_code, is_expected) = match way {
            "goodbye" => {
                (Some(4123), matches!(&reason, CloseReason::Peer { code: Some(CloseCode(4123)), .. }))
            }
            "panic" => (Some(1011), matches!(&reason, CloseReason::HandlerPanicked)),
            "end" | "outside" => {
                let code = if way == "end" { 4000 } else { 4001 };
                (Some(code), matches!(&reason, CloseReason::Application { code: had, .. } if had.0 == code))
            }
            "protocol" => (Some(1002), matches!(&reason, CloseReason::Protocol(_))),
            // Which of the two depends on whether something was unread when the socket went.
            _ => (None, matches!(&reason, CloseReason::Disconnected | CloseReason::Transport(_))),
        };
        assert!(is_expected, "{way}: {reason:?}");
        assert_eq!(code, expected_code, "{way}");
    }
    stop.store(true, SeqCst);
    within_timeout(publishing).await.unwrap();
    eventually((0, 0, 0), || (hub.len(), hub.group_count(), engine.connection_count())).await;
    let all = (WAYS.len() * EACH) as u64;
    eventually((all, all, 0, 6, 6, 0), || {
        let metrics = engine.metrics();
        let (panicked, broken) = (metrics.ended_panic, metrics.ended_protocol);
        (metrics.adopted, metrics.ended, metrics.connections, panicked, broken, metrics.tally.pending())
    })
    .await;
    assert!(ended.try_recv().is_err(), "nobody ends twice");
}
