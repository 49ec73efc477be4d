//! TCP to a host with several addresses, after RFC 8305 ("Happy Eyeballs").
//!
//! Addresses of both families take turns, in the order in which the system's resolver prefers them. An attempt that does
//! not succeed within 250 ms is not given up, but the next one starts beside it; one that fails starts the next at once.
//! The first connection wins, and the other attempts are dropped. Unlike in the RFC, both families are looked up
//! together, because the system's resolver does. Does not know URLs, TLS or WebSockets.

use std::{future::Future, io, net::SocketAddr, time::Duration};

use futures_util::{StreamExt as _, stream::FuturesUnordered};
use tokio::{
    net::{TcpStream, lookup_host},
    time::sleep,
};

/// RFC 8305, section 8: the recommended "Connection Attempt Delay".
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);

/// Connects to one of the `addresses`, or to the host if there are none. The caller must limit the time.
pub(super) async fn connect(host: &str, port: u16, addresses: &[SocketAddr]) -> io::Result<TcpStream> {
    let addresses = match addresses {
        [] => lookup_host((host, port)).await?.collect(),
        addresses => addresses.to_vec(),
    };
    let stream = race(interleave(addresses), TcpStream::connect).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// Families in turns, beginning with that of the first address; the order within a family stays.
fn interleave(addresses: Vec<SocketAddr>) -> Vec<SocketAddr> {
    let count = addresses.len();
    let is_v6_first = addresses.first().is_some_and(SocketAddr::is_ipv6);
    let (first, second): (Vec<_>, Vec<_>) =
        addresses.into_iter().partition(|address| address.is_ipv6() == is_v6_first);
    let (mut first, mut second) = (first.into_iter(), second.into_iter());
    let mut interleaved = Vec::with_capacity(count);
    while interleaved.len() < count {
        interleaved.extend(first.next());
        interleaved.extend(second.next());
    }
    interleaved
}

async fn race<T, F>(addresses: Vec<SocketAddr>, connect: impl Fn(SocketAddr) -> F) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    let mut waiting = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    let mut failures = Vec::new();
    loop {
        match waiting.next() {
            Some(address) => {
                let attempt = connect(address);
                attempts.push(async move { (address, attempt.await) });
            }
            None if attempts.is_empty() => return Err(failure(failures)),
            None => {}
        }
        tokio::select! {
            biased;
            Some((address, result)) = attempts.next() => match result {
                Ok(stream) => return Ok(stream),
                Err(error) => failures.push((address, error)),
            },
            () = sleep(ATTEMPT_DELAY), if waiting.len() > 0 => {}
        }
    }
}

/// One error for all: the only one as it is, several with their addresses and the kind of the last.
fn failure(mut failures: Vec<(SocketAddr, io::Error)>) -> io::Error {
    let Some((_, last)) = failures.last() else {
        return io::Error::new(io::ErrorKind::NotFound, "the host has no address");
    };
    let kind = last.kind();
    if failures.len() == 1
        && let Some((_, only)) = failures.pop()
    {
        return only;
    }
    let each: Vec<String> = failures.iter().map(|(address, error)| format!("{address}: {error}")).collect();
    io::Error::new(kind, each.join("; "))
}

#[cfg(test)]
mod tests {
    use std::{cell::RefCell, rc::Rc};

    use tokio::time::Instant;

    use super::*;

    fn addresses(list: &[&str]) -> Vec<SocketAddr> {
        list.iter().map(|address| address.parse().unwrap()).collect()
    }

    #[test]
    fn families_take_turns_in_the_order_of_the_resolver() {
        for (given, expected) in [
            (
                &["[::1]:1", "[::2]:1", "[::3]:1", "1.1.1.1:1", "1.1.1.2:1"][..],
                &["[::1]:1", "1.1.1.1:1", "[::2]:1", "1.1.1.2:1", "[::3]:1"][..],
            ),
            (&["1.1.1.1:1", "1.1.1.2:1", "[::1]:1"], &["1.1.1.1:1", "[::1]:1", "1.1.1.2:1"]),
            (&["1.1.1.1:1"], &["1.1.1.1:1"]),
            (&[], &[]),
        ] {
            assert_eq!(interleave(addresses(given)), addresses(expected));
        }
    }

    /// When an attempt was started and dropped, in milliseconds since the start.
    type Log = Rc<RefCell<Vec<(String, u128)>>>;

    /// Attempts by port: 1 never ends, 2 fails at once, 3 succeeds at once, 4 succeeds after 100 ms.
    async fn race_of(ports: &[u16]) -> (io::Result<u16>, Vec<(String, u128)>) {
        struct OnDrop(Box<dyn Fn()>);
        impl Drop for OnDrop {
            fn drop(&mut self) {
                (self.0)();
            }
        }

        let log = Log::default();
        let started = Instant::now();
        let note = {
            let log = Rc::clone(&log);
            move |what: String| log.borrow_mut().push((what, started.elapsed().as_millis()))
        };
        let addresses = ports.iter().map(|port| SocketAddr::from(([127, 0, 0, 1], *port))).collect();
        let race = race(addresses, |address| {
            let note = note.clone();
            note(format!("start {}", address.port()));
            async move {
                let _on_drop = OnDrop(Box::new(move || note(format!("end {}", address.port()))));
                match address.port() {
                    1 => std::future::pending().await,
                    2 => Err(io::Error::from(io::ErrorKind::ConnectionRefused)),
                    3 => Ok(3),
                    port => {
                        sleep(Duration::from_millis(100)).await;
                        Ok(port)
                    }
                }
            }
        });
        let result = tokio::time::timeout(Duration::from_secs(60), race).await.expect("an end");
        let log = log.borrow().clone();
        (result, log)
    }

    fn expected(log: &[(&str, u128)]) -> Vec<(String, u128)> {
        log.iter().map(|(what, at)| ((*what).to_owned(), *at)).collect()
    }

    #[tokio::test(start_paused = true)]
    async fn an_address_that_does_not_answer_delays_the_next_by_250_ms_and_is_dropped() {
        let (result, log) = race_of(&[1, 3, 3]).await;
        assert_eq!(result.unwrap(), 3);
        assert_eq!(log, expected(&[("start 1", 0), ("start 3", 250), ("end 3", 250), ("end 1", 250)]));
    }

    #[tokio::test(start_paused = true)]
    async fn an_attempt_that_is_late_goes_on_beside_the_next_and_may_win() {
        let (result, log) = race_of(&[1, 4, 1]).await;
        assert_eq!(result.unwrap(), 4);
        assert_eq!(log[..3], expected(&[("start 1", 0), ("start 4", 250), ("end 4", 350)]));
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_starts_the_next_attempt_at_once() {
        let (result, log) = race_of(&[2, 2, 3]).await;
        assert_eq!(result.unwrap(), 3);
        assert!(log.iter().all(|(_, at)| *at == 0), "{log:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn when_all_attempts_fail_the_error_names_each_address() {
        let (result, _) = race_of(&[2, 2]).await;
        let error = result.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(error.to_string(), "127.0.0.1:2: connection refused; 127.0.0.1:2: connection refused");
        assert_eq!(race_of(&[2]).await.0.unwrap_err().to_string(), "connection refused");
        assert_eq!(race_of(&[]).await.0.unwrap_err().kind(), io::ErrorKind::NotFound);
    }
}
