//! Everything that a client receives, read by a task, and what must be true of that.
//!
//! Messages are called `publisher number`, and each publisher's numbers grow. The ids of connections that a
//! [`CommandHub`](crate::CommandHub) sends are left out.

use std::collections::{HashMap, HashSet};

use futures_util::StreamExt as _;
use shardcast::ConnectionId;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::Message;

use crate::client::Client;
use crate::wait::within_timeout;

/// Reads what a client receives.
#[derive(Debug)]
pub struct Recorder {
    texts: watch::Receiver<Vec<String>>,
    task: JoinHandle<Option<u16>>,
}

impl Recorder {
    /// Reads from now on, to the end of the stream.
    pub fn start(mut client: Client) -> Self {
        let (sender, texts) = watch::channel(Vec::new());
        let task = tokio::spawn(async move {
            while let Some(Ok(message)) = client.socket.next().await {
                match message {
                    Message::Text(text) if text.parse::<ConnectionId>().is_err() => {
                        sender.send_modify(|texts: &mut Vec<String>| texts.push(text.to_string()));
                    }
                    Message::Close(frame) => return Some(frame.map_or(1005, |frame| frame.code.into())),
                    _ => {}
                }
            }
            None
        });
        Self { texts, task }
    }

    /// What has been received so far.
    pub fn texts(&self) -> Vec<String> {
        self.texts.borrow().clone()
    }

    /// Waits until this text has been received.
    pub async fn has(&self, text: &str) {
        let (mut texts, mut looked_at) = (self.texts.clone(), 0);
        let received = texts.wait_for(|texts| {
            let is_there = texts[looked_at..].iter().any(|received| received == text);
            looked_at = texts.len();
            is_there
        });
        assert!(within_timeout(received).await.is_ok(), "the stream has ended without {text:?}");
    }

    /// Waits for the end of the stream: the code of the Close frame; none without one.
    pub async fn end(&mut self) -> Option<u16> {
        within_timeout(&mut self.task).await.unwrap()
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Nothing was received twice, and the messages of each publisher in its order.
pub fn assert_once_and_in_order(texts: &[String], whose: &str) {
    let mut last: HashMap<&str, u64> = HashMap::new();
    for (index, text) in texts.iter().enumerate() {
        let Some((publisher, number)) = text.rsplit_once(' ') else { continue };
        let number = number.parse().unwrap();
        let before = last.insert(publisher, number);
        assert!(
            before.is_none_or(|before| before < number),
            "{whose}: {text:?}, which is number {index}, came after {before:?}: twice, or in another order"
        );
    }
}

/// All of `expected` was received.
pub fn assert_contains(texts: &[String], expected: &[String], whose: &str) {
    let received: HashSet<_> = texts.iter().collect();
    let missing: Vec<_> = expected.iter().filter(|text| !received.contains(text)).collect();
    assert!(missing.is_empty(), "{whose}: {} of {} are missing: {missing:?}", missing.len(), expected.len());
}

/// The texts are these, without their difference printed in full.
pub fn assert_same(texts: &[String], expected: &[String], whose: &str) {
    let differs = texts.iter().zip(expected).position(|(text, expected)| text != expected);
    if let Some(at) = differs {
        let around = |texts: &[String]| texts[at.saturating_sub(3)..texts.len().min(at + 3)].to_vec();
        panic!("{whose}: number {at} differs: {:?} and not {:?}", around(texts), around(expected));
    }
    assert_eq!(texts.len(), expected.len(), "{whose}: so many messages");
}
