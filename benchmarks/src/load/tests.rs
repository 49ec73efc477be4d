//! Whole runs against a small server that can be told to break one promise: each fault must be found, and nothing
//! else be taken for one.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
};

use clap::Parser;

use super::{Bout, Options, report::Report, storm, traffic};
use crate::{
    frame::{self, Opcode},
    handshake,
};

/// What the server does wrong, or at least unasked.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Whim {
    None,
    /// The newest connection does not get the message.
    Lose,
    /// It gets it twice.
    Repeat,
    /// It gets it after the next one.
    Swap,
    /// A group's message goes to everybody.
    Leak,
    /// Everybody is ended with this code after the message.
    End(u16),
    /// The newest is ended before the message, and the others after it.
    EndUnevenly,
    /// Nobody answers a close frame.
    Rude,
    /// Who joins after the first thirteen gets nothing.
    Ignore,
}

/// The message that the whim is about, counted from the server's start: well after the probes.
const OCCASION: u64 = 60;

#[derive(Debug)]
struct Peer {
    path: String,
    stream: TcpStream,
    held: Option<Vec<u8>>,
    ignored: bool,
}

#[derive(Debug, Default)]
struct Hall {
    peers: Vec<Peer>,
    joined: usize,
    messages: u64,
    ended: bool,
}

/// Serves until the process ends; a thread for each connection.
fn serve(whim: Whim) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let hall = Arc::new(Mutex::new(Hall::default()));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let hall = Arc::clone(&hall);
            thread::spawn(move || attend(stream, &hall, whim));
        }
    });
    address
}

fn attend(mut stream: TcpStream, hall: &Mutex<Hall>, whim: Whim) -> Option<()> {
    let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
    let head = loop {
        if let Some(head) = handshake::head_bytes(&bytes).ok()? {
            break head;
        }
        let read = stream.read(&mut chunk).ok().filter(|&read| read > 0)?;
        bytes.extend_from_slice(&chunk[..read]);
    };
    let request = handshake::parse_request(&bytes[..head]).ok()?;
    bytes.drain(..head);
    stream.write_all(&handshake::response(&request.accept)).ok()?;
    let path = request.path;
    hall.lock().unwrap().join(&path, stream.try_clone().ok()?, whim);
    loop {
        while let Some(frame) = frame::parse(&bytes).ok()? {
            let mut payload = bytes[frame.payload.clone()].to_vec();
            bytes.drain(..frame.payload.end);
            frame::apply_mask(frame.mask?, &mut payload);
            if frame.opcode == Opcode::Close {
                let mut hall = hall.lock().unwrap();
                let this = stream.peer_addr().ok()?;
                hall.peers.retain(|peer| peer.stream.peer_addr().is_ok_and(|other| other != this));
                if whim != Whim::Rude {
                    let _ = stream.write_all(&framed(Opcode::Close, &payload));
                }
                let _ = stream.shutdown(std::net::Shutdown::Both);
                return None;
            }
            hall.lock().unwrap().publish(&path, &payload, whim);
        }
        let read = stream.read(&mut chunk).ok().filter(|&read| read > 0)?;
        bytes.extend_from_slice(&chunk[..read]);
    }
}

impl Hall {
    fn join(&mut self, path: &str, stream: TcpStream, whim: Whim) {
        self.joined += 1;
        let ignored = whim == Whim::Ignore && self.joined > 13;
        self.peers.push(Peer { path: path.to_owned(), stream, held: None, ignored });
    }

    fn publish(&mut self, path: &str, payload: &[u8], whim: Whim) {
        if self.ended {
            return;
        }
        let whim = if self.messages == OCCASION { whim } else { Whim::None };
        self.messages += 1;
        let message = framed(Opcode::Text, payload);
        let newest = self.peers.iter().rposition(|peer| peer.path == path);
        for (index, peer) in self.peers.iter_mut().enumerate() {
            if peer.ignored || (peer.path != path && whim != Whim::Leak) {
                continue;
            }
            let mut out = match whim {
                Whim::Lose if Some(index) == newest => Vec::new(),
                Whim::Repeat if Some(index) == newest => message.repeat(2),
                Whim::Swap if Some(index) == newest => {
                    peer.held = Some(message.clone());
                    continue;
                }
                Whim::EndUnevenly if Some(index) == newest => framed(Opcode::Close, &1001_u16.to_be_bytes()),
                Whim::EndUnevenly => [&message[..], &framed(Opcode::Close, &1001_u16.to_be_bytes())].concat(),
                Whim::End(code) => [&message[..], &framed(Opcode::Close, &code.to_be_bytes())].concat(),
                _ => message.clone(),
            };
            out.extend(peer.held.take().unwrap_or_default());
            // One that has been killed is found by its own thread.
            let _ = peer.stream.write_all(&out);
        }
        if matches!(whim, Whim::End(_) | Whim::EndUnevenly) {
            self.ended = true;
            for peer in self.peers.drain(..) {
                let _ = peer.stream.shutdown(std::net::Shutdown::Write);
            }
        }
    }
}

fn framed(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    frame::write(&mut out, opcode, None, payload);
    out
}

#[derive(Debug, Parser)]
#[command(args_override_self = true)]
struct Cli {
    #[command(flatten)]
    options: Options,
}

fn options(whim: Whim, arguments: &str) -> Options {
    let url = format!("--url=ws://{}/{{group}}", serve(whim));
    let fixed = ["load", &url, "--connections=12", "--warmup=0"];
    let options = Cli::parse_from(fixed.into_iter().chain(arguments.split_whitespace())).options;
    options.check().unwrap();
    options
}

fn run(whim: Whim, arguments: &str) -> Report {
    let options = options(whim, arguments);
    let report = traffic::measure(&options, &options.url.parse().unwrap(), None).unwrap();
    assert!(serde_json::from_str::<Report>(&serde_json::to_string(&report).unwrap()).is_ok());
    report
}

/// A closed loop that takes the server past its occasion in any time, and an open loop likewise.
const SHORT: &str = "--seconds=0.5";

#[test]
fn a_server_without_whims_is_faultless_in_every_kind_of_run() {
    for arguments in [
        "--in-flight=4",
        "--in-flight=4 --groups=3",
        "--rate=500 --stalled=2 --slow=2",
        "--rate=500 --kill=5",
        "--rate=500 --groups=2 --churn=60",
        "--mode=fanout --in-flight=2 --lossy",
        "--in-flight=4 --spin",
        "--rate=500 --kill=5 --spin",
    ] {
        let report = run(Whim::None, &format!("{SHORT} {arguments}"));
        let traffic = report.traffic.as_ref().unwrap();
        assert!(report.is_faultless() && traffic.received > 2 * OCCASION, "{arguments}: {report}");
    }
}

#[test]
fn a_loss_a_repetition_a_swap_and_a_leak_are_faults() {
    let faults = |whim, arguments: &str| {
        let report = run(whim, &format!("{SHORT} --rate=500 {arguments}"));
        let traffic = report.traffic.as_ref().unwrap();
        let lost = traffic.expected - traffic.received;
        assert!(!report.is_faultless(), "{whim:?}: {report}");
        (lost, traffic.duplicates, traffic.order_violations, traffic.strays)
    };
    // Where the one that lost it is the first to see the next, the others seem out of order as well.
    let loss = faults(Whim::Lose, "");
    assert_eq!((loss.0, loss.1, loss.3), (1, 0, 0), "{loss:?}");
    assert_eq!(faults(Whim::Repeat, ""), (0, 1, 0, 0));
    // The first to see it decides who is right: the newest, or the others of its group.
    let swap = faults(Whim::Swap, "--groups=2");
    assert!(swap.2 > 0 && (swap.0, swap.1, swap.3) == (0, 0, 0), "{swap:?}");
    // What has landed already in its own group is taken for a repetition.
    let leak = faults(Whim::Leak, "--groups=2");
    assert!(leak.1 + leak.3 == 6 && (leak.0, leak.2) == (0, 0), "{leak:?}");
    assert_eq!(faults(Whim::Repeat, "--lossy"), (0, 1, 0, 0));
}

#[test]
fn a_loss_is_no_fault_where_losses_are_allowed_and_a_closed_loop_goes_on() {
    let report = run(Whim::Lose, "--seconds=1.5 --in-flight=1 --lossy");
    let traffic = report.traffic.as_ref().unwrap();
    assert!(report.is_faultless(), "{report}");
    assert_eq!(traffic.expected - traffic.received, 1);
    assert!(traffic.received > 12 * (OCCASION + 2), "it stood still at the loss: {report}");
}

#[test]
fn an_end_is_orderly_when_all_have_seen_the_same_and_were_told_so() {
    for (whim, told, orderly) in [
        (Whim::End(1001), "1001", true),
        (Whim::End(1012), "1012", true),
        (Whim::End(1011), "1011", false),
        (Whim::EndUnevenly, "1001", false),
    ] {
        let report = run(whim, "--seconds=20 --rate=500 --expect-end");
        assert_eq!(report.ends.as_ref().unwrap()[told], 12, "{report}");
        assert_eq!(report.is_faultless(), orderly, "{whim:?}: {report}");
    }
    let report = run(Whim::End(1001), "--seconds=20 --rate=500 --expect-end --stalled=1 --slow=2");
    assert_eq!((report.ends.as_ref().unwrap()["1001"], report.slow.as_ref().unwrap().disconnected), (9, 3));
    assert!(report.is_faultless(), "the slow ones are not waited for: {report}");
    assert!(!run(Whim::None, "--seconds=0.2 --expect-end").is_faultless(), "nobody was ended");
}

#[test]
fn an_end_that_nobody_expected_is_a_fault() {
    let report = run(Whim::End(1001), "--seconds=20 --rate=500");
    assert_eq!(report.disconnections, 12);
    assert!(!report.is_faultless());
}

#[test]
fn the_killed_are_counted_and_the_survivors_timed() {
    let kill = run(Whim::None, "--seconds=0.5 --rate=500 --kill=5").kill.unwrap();
    assert_eq!(kill.killed, 5);
    assert!(kill.max_gap_ms.is_some_and(|gap| gap > 0.0));
}

#[test]
fn as_many_join_as_leave_and_a_farewell_without_an_answer_is_a_failure() {
    let churn = run(Whim::None, "--seconds=1 --rate=500 --senders=2 --churn=30").churn.unwrap();
    assert!(churn.joined > 0 && churn.joined == churn.left, "{churn:?}");
    assert_eq!((churn.failed, churn.deaf, churn.handshake.is_some()), (0, 0, true));
    let rude = run(Whim::Rude, "--seconds=0.5 --rate=500 --senders=2 --churn=30");
    assert!(rude.churn.as_ref().unwrap().failed > 0 && !rude.is_faultless());
}

#[test]
fn a_newcomer_that_hears_nothing_while_its_group_does_is_deaf() {
    // One joins in time and is heard of; those after it are not.
    let report = run(Whim::Ignore, "--seconds=7 --rate=100 --senders=8 --churn=1");
    let churn = report.churn.as_ref().unwrap();
    assert!(churn.deaf > 0 && churn.deaf < churn.joined && churn.failed == 0, "{churn:?}");
    assert!(!report.is_faultless());
}

#[test]
fn bouts_take_turns_and_each_is_judged_by_itself() {
    // The server's threads are this process's; what they cost is of no interest.
    let pid = std::process::id();
    let bout = |whim| Bout::open(&options(whim, &format!("--in-flight=4 --server-pid={pid}"))).unwrap();
    let (mut calm, mut repeating, mut losing) = (bout(Whim::None), bout(Whim::Repeat), bout(Whim::Lose));
    let slice = std::time::Duration::from_millis(5);
    calm.warm_up(slice).unwrap();
    // Each slice has at least as many messages as are in flight, so the occasion comes in any time.
    for _ in 0..=OCCASION / 4 {
        for side in [&mut calm, &mut repeating] {
            side.slice(slice).unwrap();
        }
    }
    let calm = calm.end().unwrap();
    let traffic = calm.traffic.as_ref().unwrap();
    assert!(calm.is_faultless() && traffic.received > 12 * OCCASION, "{calm}");
    let measured = traffic.deliveries_per_second * traffic.seconds;
    assert!(measured > 0.0 && measured < traffic.received as f64, "warming up is not measured: {calm}");
    assert!(!repeating.end().unwrap().is_faultless());
    for _ in 0..=OCCASION / 4 {
        if !losing.is_stuck() {
            losing.slice(slice).unwrap();
        }
    }
    assert!(losing.is_stuck());
    let losing = losing.end().unwrap();
    let traffic = losing.traffic.as_ref().unwrap();
    assert!(!losing.is_faultless() && traffic.expected - traffic.received == 1, "{losing}");
}

#[test]
fn what_does_not_go_together_is_refused() {
    let refused = |arguments: &str| {
        let fixed = ["load", "--url=ws://127.0.0.1:1/{group}", "--connections=12"];
        let options = Cli::parse_from(fixed.into_iter().chain(arguments.split_whitespace())).options;
        options.check().is_err()
    };
    for arguments in [
        "--connections=0",
        "--groups=13",
        "--groups=0",
        "--groups=2 --url=ws://127.0.0.1:1/ws",
        "--mode=echo --stalled=1",
        "--mode=echo --groups=2",
        "--mode=idle",
        "--stalled=6 --slow=6",
        "--slow=1 --slow-rate=0",
        "--senders=8 --kill=5",
        "--senders=12 --churn=1",
        "--churn=0",
        "--expect-end --kill=1",
        "--expect-end --churn=1",
    ] {
        assert!(refused(arguments), "{arguments}");
    }
    for arguments in ["", "--groups=12", "--stalled=5 --slow=6", "--rate=9 --kill=11", "--rate=9 --churn=1"] {
        assert!(!refused(arguments), "{arguments}");
    }
}

#[test]
fn a_storm_opens_and_closes_everybody_and_tells_failures_by_cause() {
    let storm = |whim| {
        let options = options(whim, "--mode=storm --at-once=5 --seconds=0.1");
        let report = storm::measure(&options, &options.url.parse().unwrap(), None).unwrap();
        (report.is_faultless(), report.storm.unwrap())
    };
    let (faultless, calm) = storm(Whim::None);
    assert!(faultless && calm.opened == 12 * calm.rounds && calm.handshake.is_some(), "{calm:?}");
    let (faultless, rude) = storm(Whim::Rude);
    assert!(!faultless && rude.failures.values().sum::<u64>() == rude.opened, "{rude:?}");
}
