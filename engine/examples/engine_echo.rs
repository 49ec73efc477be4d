//! An echo server on the engine alone: no Axum, no async, no runtime.
//!
//! A thread accepts connections and does the HTTP handshake; from then on a shard owns
//! the socket. `cargo run -p shardcast-engine --example engine_echo`, then talk to
//! `ws://127.0.0.1:3001/` with any WebSocket client. `--port P` takes another port (0: any).

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::error::Error;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll, Wake, Waker};
use std::time::Duration;

use shardcast_engine::{
    Address, CloseReason, ConnectionConfig, Context, Encoding, Engine, EngineConfig, Handler, MakeHandler,
    Message, MessageKind, Namespace, NewConnection, Payload, Publication, accept_key,
};

/// Sends every message back as it came.
struct Echo {
    everyone: Namespace,
}

impl Handler for Echo {
    fn on_message(&mut self, message: Message<'_>, context: &mut Context<'_>) -> Poll<()> {
        let frame = match (message.kind, std::str::from_utf8(message.payload)) {
            (MessageKind::Text, Ok(text)) => Payload::text(text),
            _ => Payload::binary(message.payload),
        };
        if self.everyone.try_publish(Publication::message(Address::Connection(context.id()), frame)).is_err()
        {
            // Its mailbox is full. A real handler would answer `Pending` and try again.
            context.close(CloseReason::SlowConsumer);
        }
        Poll::Ready(())
    }
}

fn main() -> Result<(), Box<dyn Error>> {
    let mut arguments = std::env::args().skip(1);
    let port = match (arguments.next().as_deref(), arguments.next()) {
        (None, _) => 3001,
        (Some("--port"), Some(port)) => port.parse()?,
        _ => return Err("usage: engine_echo [--port P]".into()),
    };
    let engine = Engine::start(EngineConfig::default())?;
    let everyone = engine.namespace();
    let config = Arc::new(ConnectionConfig::default());
    let listener = TcpListener::bind(("127.0.0.1", port))?;
    println!("listening on ws://{}", listener.local_addr()?);
    for stream in listener.incoming() {
        let (engine, everyone, config) = (engine.clone(), everyone.clone(), config.clone());
        std::thread::spawn(move || {
            if let Err(error) = welcome(stream?, &engine, &everyone, config) {
                eprintln!("a connection was refused: {error}");
            }
            Ok::<_, std::io::Error>(())
        });
    }
    Ok(())
}

fn welcome(
    mut stream: TcpStream,
    engine: &Engine,
    everyone: &Namespace,
    config: Arc<ConnectionConfig>,
) -> Result<(), Box<dyn Error>> {
    stream.set_read_timeout(Some(Duration::from_secs(5)))?;
    let Some(permit) = engine.admit(Some(stream.peer_addr()?.ip())) else {
        stream
            .write_all(b"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 5\r\nContent-Length: 0\r\n\r\n")?;
        return Err("connection limit reached".into());
    };
    let mut request = Vec::new();
    let head = loop {
        let mut chunk = [0; 1024];
        match stream.read(&mut chunk)? {
            0 => return Err("the peer went away".into()),
            _ if request.len() > 16_384 => return Err("the request is too long".into()),
            count => request.extend_from_slice(&chunk[..count]),
        }
        if let Some(end) = request.windows(4).position(|window| window == b"\r\n\r\n") {
            break end + 4;
        }
    };
    let mut headers = [httparse::EMPTY_HEADER; 64];
    let mut parsed = httparse::Request::new(&mut headers);
    parsed.parse(&request[..head])?;
    let header = |name: &str| {
        let found = parsed.headers.iter().find(|header| header.name.eq_ignore_ascii_case(name));
        found.map(|header| header.value)
    };
    let is_upgrade = header("upgrade").is_some_and(|value| value.eq_ignore_ascii_case(b"websocket"));
    let (true, Some(b"13"), Some(key)) =
        (is_upgrade, header("sec-websocket-version"), header("sec-websocket-key"))
    else {
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")?;
        return Err("not a WebSocket handshake".into());
    };
    write!(
        stream,
        "HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Accept: {}\r\n\r\n",
        accept_key(key),
    )?;
    let received = request[head..].to_vec().into();
    let echo = Echo { everyone: everyone.clone() };
    let handler: MakeHandler = Box::new(|_| Box::new(echo));
    let connection = NewConnection {
        socket: stream.into(),
        received,
        handler,
        config,
        encoding: Encoding::PLAIN,
        permit,
        rate_limit: None,
        user: None,
        first_message: None,
        expires_at: None,
    };
    block_on(everyone.adopt(connection))?;
    Ok(())
}

/// Waits for a future on this thread; handing over a connection waits only while its shard's mailbox is full.
fn block_on<F: Future>(future: F) -> F::Output {
    struct Unpark(std::thread::Thread);
    impl Wake for Unpark {
        fn wake(self: Arc<Self>) {
            self.0.unpark();
        }
    }
    let waker = Waker::from(Arc::new(Unpark(std::thread::current())));
    let mut context = TaskContext::from_waker(&waker);
    let mut future = pin!(future);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => std::thread::park(),
        }
    }
}
