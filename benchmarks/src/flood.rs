//! A client that sends at a steady rate whatever the server does: for what one client may do to the others.
//!
//! One connection and one thread, which sleeps between its writes. It reads what arrives and throws it away, except
//! pings. What the kernel does not take is not sent later, so the rate is at most what was asked for. Checks nothing.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use crate::{
    frame::{self, FrameError, Opcode},
    handshake::{self, HandshakeError},
    message::{FIRST_SEQ, MessageError, Template},
};

/// Time between two writes.
const SLICE: Duration = Duration::from_millis(5);

/// Sends at a steady rate over one connection, for a time.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// The server's port on this machine.
    #[arg(long, default_value_t = 9001)]
    port: u16,
    #[arg(long, default_value = "/echo")]
    path: String,
    /// Messages a second.
    #[arg(long)]
    rate: f64,
    /// How long to send, in seconds.
    #[arg(long)]
    seconds: f64,
    /// Bytes of a whole JSON message.
    #[arg(long, default_value_t = 64)]
    payload: usize,
}

/// Why a flood ended early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FloodError {
    #[error("the connection failed")]
    Io(#[from] io::Error),
    #[error("the handshake failed")]
    Handshake(#[from] HandshakeError),
    #[error(transparent)]
    Message(#[from] MessageError),
    #[error("the server sent something that is no frame")]
    Frame(#[from] FrameError),
}

/// Sends until the time is over or the server closes, and prints how many messages were sent.
pub(crate) fn run(options: &Options) -> Result<(), FloodError> {
    let template = Template::new(options.payload, ("", ""))?;
    let mut stream = TcpStream::connect(("127.0.0.1", options.port))?;
    stream.write_all(&handshake::request(&format!("127.0.0.1:{}", options.port), &options.path))?;
    let mut received = Vec::new();
    let head = loop {
        let mut chunk = [0; 4096];
        let count = stream.read(&mut chunk)?;
        if count == 0 {
            return Err(io::Error::from(ErrorKind::UnexpectedEof).into());
        }
        received.extend_from_slice(&chunk[..count]);
        if let Some(head) = handshake::head_bytes(&received)? {
            break head;
        }
    };
    handshake::check_response(&received[..head])?;
    received.drain(..head);
    stream.set_nonblocking(true)?;

    let (began, mut sent, mut unsent) = (Instant::now(), 0_u64, Vec::new());
    let mut is_open = true;
    while is_open && began.elapsed().as_secs_f64() < options.seconds {
        is_open = answer_pings(&mut stream, &mut received, &mut unsent)?;
        let due = (began.elapsed().as_secs_f64() * options.rate) as u64;
        // What the kernel does not take in one slice is sent before anything else; what was due meanwhile is left out.
        if unsent.is_empty() {
            let count = (due - sent.min(due)).min((SLICE.as_secs_f64() * options.rate).ceil() as u64 + 1);
            for _ in 0..count {
                template.write(&mut unsent, FIRST_SEQ + sent);
                sent += 1;
            }
        }
        match stream.write(&unsent) {
            Ok(count) => drop(unsent.drain(..count)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            Err(_) => is_open = false,
        }
        std::thread::sleep(SLICE);
    }
    println!("sent {sent} messages in {:.1} s; open at the end: {is_open}", began.elapsed().as_secs_f64());
    Ok(())
}

/// Reads everything that has arrived; false if the stream has ended.
fn answer_pings(
    stream: &mut TcpStream,
    received: &mut Vec<u8>,
    unsent: &mut Vec<u8>,
) -> Result<bool, FloodError> {
    let mut chunk = [0; 16 << 10];
    loop {
        match stream.read(&mut chunk) {
            Ok(0) => return Ok(false),
            Ok(count) => received.extend_from_slice(&chunk[..count]),
            Err(error) if error.kind() == ErrorKind::WouldBlock => break,
            Err(_) => return Ok(false),
        }
    }
    let mut start = 0;
    while let Some(frame) = frame::parse(&received[start..])? {
        if frame.opcode == Opcode::Ping {
            let payload = received[start + frame.payload.start..start + frame.payload.end].to_vec();
            frame::write(unsent, Opcode::Pong, Some([1, 2, 3, 4]), &payload);
        }
        start += frame.payload.end;
    }
    received.drain(..start);
    Ok(true)
}
