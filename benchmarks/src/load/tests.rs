//! Whole runs against a small server that can be told to commit one fault: each fault must be found, and nothing else
//! must be taken for one.

use std::{
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpListener, TcpStream},
    sync::{Arc, Mutex},
    thread,
    time::Duration,
};

use super::{Options, TimedRun, report::Report, traffic};
use crate::{
    frame::{self, Opcode},
    handshake,
};

#[derive(Clone, Copy, Debug, Eq, PartialEq)]
enum Fault {
    None,
    /// The newest connection does not get the message.
    Lose,
    /// The newest connection gets it twice.
    Repeat,
    /// The newest connection gets it after the next one.
    Swap,
    /// All connections get it, not only those of its group.
    Leak,
    /// All connections are closed with this code after the message.
    Close(u16),
    /// The newest connection is closed before the message, the others after it.
    CloseUnevenly,
}

/// The message with the fault, counted from the server's start: later than the probes.
const FAULTY_MESSAGE: u64 = 60;

#[derive(Debug)]
struct Member {
    path: String,
    stream: TcpStream,
    /// Sent after the next message.
    held: Vec<u8>,
}

#[derive(Debug)]
struct Server {
    fault: Fault,
    members: Vec<Member>,
    messages: u64,
    is_closed: bool,
}

/// Serves until the process ends, with a thread for each connection.
fn serve(fault: Fault) -> SocketAddr {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let address = listener.local_addr().unwrap();
    let server = Server { fault, members: Vec::new(), messages: 0, is_closed: false };
    let server = Arc::new(Mutex::new(server));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let server = Arc::clone(&server);
            thread::spawn(move || serve_connection(stream, &server));
        }
    });
    address
}

fn serve_connection(mut stream: TcpStream, server: &Mutex<Server>) -> Option<()> {
    let mut bytes = Vec::new();
    let head = loop {
        match handshake::head_bytes(&bytes).ok()? {
            Some(head) => break head,
            None => read_more(&mut stream, &mut bytes)?,
        }
    };
    let request = handshake::parse_request(&bytes[..head]).ok()?;
    bytes.drain(..head);
    stream.write_all(&handshake::response(&request.accept)).ok()?;
    let member = Member { path: request.path.clone(), stream: stream.try_clone().ok()?, held: Vec::new() };
    server.lock().unwrap().members.push(member);
    loop {
        while let Some(frame) = frame::parse(&bytes).ok()? {
            let mut payload = bytes[frame.payload.clone()].to_vec();
            bytes.drain(..frame.payload.end);
            frame::apply_mask(frame.mask?, &mut payload);
            if frame.opcode == Opcode::Close {
                return None;
            }
            server.lock().unwrap().publish(&request.path, &payload);
        }
        read_more(&mut stream, &mut bytes)?;
    }
}

fn read_more(stream: &mut TcpStream, bytes: &mut Vec<u8>) -> Option<()> {
    let mut chunk = [0; 4096];
    let read = stream.read(&mut chunk).ok().filter(|&read| read > 0)?;
    bytes.extend_from_slice(&chunk[..read]);
    Some(())
}

impl Server {
    fn publish(&mut self, path: &str, payload: &[u8]) {
        if self.is_closed {
            return;
        }
        let fault = if self.messages == FAULTY_MESSAGE { self.fault } else { Fault::None };
        self.messages += 1;
        let message = framed(Opcode::Text, payload);
        let newest = self.members.iter().rposition(|member| member.path == path);
        for (index, member) in self.members.iter_mut().enumerate() {
            if member.path != path && fault != Fault::Leak {
                continue;
            }
            let mut out = match fault {
                Fault::Lose if Some(index) == newest => Vec::new(),
                Fault::Repeat if Some(index) == newest => message.repeat(2),
                Fault::Swap if Some(index) == newest => {
                    member.held.clone_from(&message);
                    continue;
                }
                Fault::CloseUnevenly if Some(index) == newest => close_frame(1001),
                Fault::CloseUnevenly => [&message[..], &close_frame(1001)].concat(),
                Fault::Close(code) => [&message[..], &close_frame(code)].concat(),
                _ => message.clone(),
            };
            out.append(&mut member.held);
            // A client that has ended is noticed by its own thread.
            let _ = member.stream.write_all(&out);
        }
        if matches!(fault, Fault::Close(_) | Fault::CloseUnevenly) {
            self.is_closed = true;
            for member in self.members.drain(..) {
                let _ = member.stream.shutdown(Shutdown::Write);
            }
        }
    }
}

fn framed(opcode: Opcode, payload: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    frame::write(&mut out, opcode, None, payload);
    out
}

fn close_frame(code: u16) -> Vec<u8> {
    framed(Opcode::Close, &code.to_be_bytes())
}

/// Twelve connections to a server with this fault.
fn options(fault: Fault, arguments: &str) -> Options {
    let url = format!("ws://{}/{{group}}", serve(fault));
    let arguments = format!("--url={url} --connections=12 --warmup=0 {arguments}");
    let options = Options::parse(arguments.split_whitespace().map(str::to_owned)).unwrap();
    options.check().unwrap();
    options
}

fn run(fault: Fault, arguments: &str) -> Report {
    let options = options(fault, arguments);
    let report = traffic::measure(&options, &options.url.parse().unwrap(), None).unwrap();
    assert!(serde_json::from_str::<Report>(&serde_json::to_string(&report).unwrap()).is_ok());
    report
}

#[test]
fn a_server_without_faults_is_faultless_in_every_kind_of_run() {
    for arguments in [
        "--in-flight=4",
        "--in-flight=4 --groups=3",
        "--rate=500 --stalled=2 --slow=2",
        "--rate=500 --groups=2 --spin",
        "--mode=fanout --in-flight=2 --lossy",
        "--in-flight=4 --spin",
    ] {
        let report = run(Fault::None, &format!("--seconds=0.5 {arguments}"));
        let traffic = report.traffic.as_ref().unwrap();
        assert!(report.is_faultless() && traffic.received > 2 * FAULTY_MESSAGE, "{arguments}: {report}");
        assert!(report.handshakes.is_some_and(|handshakes| handshakes.per_second > 0.0));
    }
}

#[test]
fn a_loss_a_repetition_a_swap_and_a_leak_are_faults() {
    let faults = |fault, arguments: &str| {
        let report = run(fault, &format!("--seconds=0.5 --rate=500 {arguments}"));
        let traffic = report.traffic.as_ref().unwrap();
        let lost = traffic.expected - traffic.received;
        assert!(!report.is_faultless(), "{fault:?}: {report}");
        (lost, traffic.duplicates, traffic.order_violations, traffic.strays)
    };
    // Where the connection that lost it is the first to see the next, the others seem out of order as well.
    let loss = faults(Fault::Lose, "");
    assert_eq!((loss.0, loss.1, loss.3), (1, 0, 0), "{loss:?}");
    assert_eq!(faults(Fault::Repeat, ""), (0, 1, 0, 0));
    // The first to see it sets the order: the newest, or the others of its group.
    let swap = faults(Fault::Swap, "--groups=2");
    assert!(swap.2 > 0 && (swap.0, swap.1, swap.3) == (0, 0, 0), "{swap:?}");
    // In the other group it is a duplicate if it has landed in its own before, else a stray.
    let leak = faults(Fault::Leak, "--groups=2");
    assert!(leak.1 + leak.3 == 6 && (leak.0, leak.2) == (0, 0), "{leak:?}");
    assert_eq!(faults(Fault::Repeat, "--lossy"), (0, 1, 0, 0));
}

#[test]
fn a_loss_is_no_fault_where_losses_are_allowed_and_a_closed_loop_continues() {
    let report = run(Fault::Lose, "--seconds=1.5 --in-flight=1 --lossy");
    let traffic = report.traffic.as_ref().unwrap();
    assert!(report.is_faultless(), "{report}");
    assert_eq!(traffic.expected - traffic.received, 1);
    assert!(traffic.received > 12 * (FAULTY_MESSAGE + 2), "the loop stopped at the loss: {report}");
}

#[test]
fn a_shutdown_is_orderly_when_all_have_received_the_same_and_a_close_frame_that_says_so() {
    for (fault, code, is_orderly) in [
        (Fault::Close(1001), "1001", true),
        (Fault::Close(1012), "1012", true),
        (Fault::Close(1011), "1011", false),
        (Fault::CloseUnevenly, "1001", false),
    ] {
        let report = run(fault, "--seconds=20 --rate=500 --expect-end");
        assert_eq!(report.ends.as_ref().unwrap()[code], 12, "{report}");
        assert_eq!(report.is_faultless(), is_orderly, "{fault:?}: {report}");
    }
    let report = run(Fault::Close(1001), "--seconds=20 --rate=500 --expect-end --stalled=1 --slow=2");
    assert_eq!((report.ends.as_ref().unwrap()["1001"], report.slow.as_ref().unwrap().disconnected), (9, 3));
    assert!(report.is_faultless(), "slow readers are not waited for: {report}");
    assert!(!run(Fault::None, "--seconds=0.2 --expect-end").is_faultless(), "no connection was closed");
}

#[test]
fn a_shutdown_that_is_not_expected_is_a_fault() {
    let report = run(Fault::Close(1001), "--seconds=20 --rate=500");
    assert_eq!(report.disconnections, 12);
    assert!(!report.is_faultless());
}

#[test]
fn timed_runs_take_turns_and_each_is_checked_separately() {
    // The servers are threads of this process; their CPU time is not looked at.
    let pid = std::process::id();
    let open = |fault| TimedRun::open(&options(fault, &format!("--in-flight=4 --server-pid={pid}"))).unwrap();
    let (mut faultless, mut repeating, mut losing) =
        (open(Fault::None), open(Fault::Repeat), open(Fault::Lose));
    let slice = Duration::from_millis(5);
    faultless.warm_up(slice).unwrap();
    // Each slice has at least as many messages as are in flight, so the faulty one is sent however slow the machine is.
    for _ in 0..=FAULTY_MESSAGE / 4 {
        for run in [&mut faultless, &mut repeating] {
            run.slice(slice).unwrap();
        }
    }
    let faultless = faultless.finish().unwrap();
    let traffic = faultless.traffic.as_ref().unwrap();
    assert!(faultless.is_faultless() && traffic.received > 12 * FAULTY_MESSAGE, "{faultless}");
    let measured = traffic.deliveries_per_second * traffic.seconds;
    assert!(measured > 0.0 && measured < traffic.received as f64, "the warm-up is not measured: {faultless}");
    assert!(!repeating.finish().unwrap().is_faultless());
    for _ in 0..=FAULTY_MESSAGE / 4 {
        if !losing.is_stuck() {
            losing.slice(slice).unwrap();
        }
    }
    assert!(losing.is_stuck());
    let losing = losing.finish().unwrap();
    let traffic = losing.traffic.as_ref().unwrap();
    assert!(!losing.is_faultless() && traffic.expected - traffic.received == 1, "{losing}");
}
