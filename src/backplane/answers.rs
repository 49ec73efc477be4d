//! Answers of other nodes to the questions of this one: receipts, groups.
//!
//! One task for each node, which receives everything that it is told and passes it to whoever has asked. Nodes are told
//! outside of the log, without order and at best effort: whoever asks waits for a bounded time. Does not know what the
//! questions are.

use std::collections::HashMap;

use shardcast_backplane::{Backplane, Inbox, NodeId};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};

use super::BackplaneError;
use super::entry::{Answer, AnswerContent};
use super::ingest::RETRY;

/// A question that was asked, by its number.
#[derive(Debug)]
pub(super) struct Question {
    number: u64,
    asker: mpsc::UnboundedSender<(NodeId, AnswerContent)>,
}

/// The answers to a question. While it is kept, the question is open.
#[derive(Debug)]
pub(crate) struct Expected(mpsc::UnboundedReceiver<(NodeId, AnswerContent)>);

impl Question {
    pub(super) fn new(number: u64) -> (Self, Expected) {
        let (asker, answers) = mpsc::unbounded_channel(); // bounded by the nodes, which answer once
        (Self { number, asker }, Expected(answers))
    }
}

impl Expected {
    /// The next answer. None when this node has left.
    pub(super) async fn next(&mut self) -> Option<(NodeId, AnswerContent)> {
        self.0.recv().await
    }

    /// Passes the answers of these nodes to `take`, which returns whether that was the node's last one, until it was for
    /// each.
    ///
    /// # Errors
    /// [`BackplaneError::Unavailable`] when the time is over, [`BackplaneError::Left`].
    pub(super) async fn of_each(
        &mut self,
        nodes: &[NodeId],
        deadline: Instant,
        mut take: impl FnMut(NodeId, AnswerContent) -> bool,
    ) -> Result<(), BackplaneError> {
        let mut missing = nodes.to_vec();
        while !missing.is_empty() {
            let answer = timeout_at(deadline, self.next()).await.map_err(|_| BackplaneError::Unavailable)?;
            let (node, content) = answer.ok_or(BackplaneError::Left)?;
            if missing.contains(&node) && take(node, content) {
                missing.retain(|missing| *missing != node);
            }
        }
        Ok(())
    }
}

/// Passes answers on until all handles to the node's cluster have been dropped.
pub(super) async fn pass_on<B: Backplane>(
    backplane: B,
    node: NodeId,
    mut questions: mpsc::UnboundedReceiver<Question>,
) {
    let mut open: HashMap<u64, mpsc::UnboundedSender<(NodeId, AnswerContent)>> = HashMap::new();
    let mut open_max = 64; // above it, those whose askers have gone are removed
    let mut inbox = loop {
        match backplane.listen(node).await {
            Ok(inbox) => break inbox,
            Err(error) => tracing::debug!(%error, "this node cannot be told anything yet: trying again"),
        }
        // Questions wait in their channel meanwhile; whoever asks waits for a bounded time.
        tokio::select! {
            () = sleep(RETRY) => {}
            () = async { while !questions.is_closed() { sleep(RETRY).await } } => return,
        }
    };
    loop {
        tokio::select! {
            biased;
            question = questions.recv() => {
                let Some(Question { number, asker }) = question else { return };
                open.insert(number, asker);
                if open.len() > open_max {
                    open.retain(|_, asker| !asker.is_closed());
                    open_max = 64.max(2 * open.len());
                }
            }
            message = inbox.next() => {
                let Some(message) = message else { return };
                match Answer::decode(&message) {
                    Ok(Answer { question, node, content }) => {
                        let sent = open.get(&question).map(|asker| asker.send((NodeId::from_bits(node), content)));
                        if matches!(sent, Some(Err(_))) {
                            open.remove(&question);
                        }
                    }
                    Err(error) => tracing::debug!(%error, "what another node has told cannot be read"),
                }
            }
        }
    }
}
