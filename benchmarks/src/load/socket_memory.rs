//! The kernel's memory for the sockets of one port, as `ss` (iproute2) reports it.
//!
//! More exact than /proc/net/sockstat, and for the server's end only: what waits to be sent and to be read, with the
//! kernel's overhead. Runs a separate program, which takes time with many sockets: not while something is measured.

use std::process::{Command, Stdio};

/// Bytes for all connected sockets with the local port `port`; `None` where there is no `ss`.
pub(crate) fn memory_bytes(port: u16) -> Option<u64> {
    let output = Command::new("ss")
        .args(["-tmnHO", "state", "connected", &format!("sport = :{port}")])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .ok()?;
    output.status.success().then(|| String::from_utf8_lossy(&output.stdout).lines().filter_map(charged).sum())
}

/// What one socket is charged: r read queue, f reserve, w write queue, o options, bl backlog (ss(8)); t is part of w,
/// and rb, tb and d are limits and a count.
fn charged(line: &str) -> Option<u64> {
    let (_, rest) = line.split_once("skmem:(")?;
    let (fields, _) = rest.split_once(')')?;
    let number = |field: &str| {
        let digits = field.find(|sign: char| sign.is_ascii_digit())?;
        let (name, number) = field.split_at(digits);
        matches!(name, "r" | "f" | "w" | "o" | "bl").then(|| number.parse::<u64>().ok())?
    };
    Some(fields.split(',').filter_map(number).sum())
}

#[cfg(test)]
mod tests {
    use std::{
        io::Write,
        net::{TcpListener, TcpStream},
    };

    use super::*;

    #[test]
    fn memory_in_use_is_counted_and_limits_are_not() {
        let line =
            "ESTAB 0 0 127.0.0.1:1 127.0.0.1:2 skmem:(r1,rb1000,t20,tb1000,f300,w4000,o50000,bl600000,d7)";
        assert_eq!(charged(line), Some(654_301));
        assert_eq!(charged("ESTAB 0 0 127.0.0.1:1 127.0.0.1:2"), None);
    }

    #[test]
    fn unread_bytes_count_for_the_port_that_received_them() {
        let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let mut client = TcpStream::connect(address).unwrap();
        let _server = listener.accept().unwrap();
        client.write_all(&[0; 30_000]).unwrap();
        // A machine without `ss` reports nothing.
        if let Some(bytes) = memory_bytes(address.port()) {
            assert!((30_000..1_000_000).contains(&bytes), "{bytes}");
        }
    }
}
