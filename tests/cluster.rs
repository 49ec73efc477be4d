//! The example `cluster`: two nodes of the chat, a broker and a load balancer, as one program.
//!
//! Real processes, each on a port that is free. What hubs promise over nodes is tested in `nodes.rs`, and the brokers in
//! `backplane/tests/conformance`; here it is what a user of the chat sees when nodes come and go. A broker that is not
//! installed is a failure: `ci/install-brokers` installs it.

#![allow(clippy::unwrap_used, reason = "a test")]

use std::collections::BTreeSet;

use serde_json::{Value, json};
use testkit_hub::program::{Running, program};
use testkit_hub::{Client, eventually, within_timeout};
use tokio::process::Command;

/// A node, as the program announces it.
#[derive(Debug, Clone)]
struct Node {
    pid: String,
    id: String,
}

/// The program, which has said that both nodes are ready.
struct Cluster {
    program: Running,
    /// The balancer's.
    address: String,
    broker_pid: String,
    nodes: [Node; 2],
}

impl Cluster {
    async fn start(broker: &str) -> Self {
        let mut program = Running::start("cluster", &["--port", "0", "--broker", broker]);
        let broker_pid = program.wait_for_line("broker: process ").await;
        // Either may be the first.
        let mut nodes = [None, None];
        while nodes.iter().any(Option::is_none) {
            let (number, node) = announced(&program.wait_for_line("node ").await);
            if let Some(node) = node {
                nodes[number - 1] = Some(node);
            }
        }
        let line = program.wait_for_line("open http://").await;
        let (address, _) = line.split_once(' ').unwrap();
        Self { address: address.to_owned(), program, broker_pid, nodes: nodes.map(Option::unwrap) }
    }

    /// A node that is started again, when it is ready.
    async fn started_again(&mut self, number: usize) -> Node {
        let mut started = None;
        loop {
            let line = self.program.wait_for_line(&format!("node {number}: ")).await;
            if line == "ready" {
                return started.expect("it has not ended");
            }
            started = announced(&format!("{number}: {line}")).1.or(started);
        }
    }

    async fn pids_are_gone(&self) {
        for pid in self.nodes.iter().map(|node| &node.pid).chain([&self.broker_pid]) {
            eventually(true, || {
                // One that nobody has waited for is a zombie.
                let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
                stat.is_empty() || stat.contains(") Z ")
            })
            .await;
        }
    }
}

/// The number of a node, and what it is if the line is about its start.
fn announced(line: &str) -> (usize, Option<Node>) {
    let (number, rest) = line.split_once(": ").unwrap();
    let node = rest.split_once(", process ").and_then(|(_, rest)| rest.split_once(", id "));
    let node = node.map(|(pid, id)| Node { pid: pid.to_owned(), id: id.to_owned() });
    (number.parse().unwrap(), node)
}

async fn kill(signal: &str, pid: &str) {
    assert!(Command::new("kill").args([signal, pid]).status().await.unwrap().success());
}

/// A member of the room, who has been welcomed.
struct Member {
    client: Client,
    node: String,
    user: Value,
    /// Names of those who are present, as far as it was told.
    present: BTreeSet<String>,
    joined: Vec<String>,
    left: Vec<String>,
}

impl Member {
    async fn enter(address: &str, name: &str) -> Self {
        let client =
            Client::connect(format!("ws://{address}/ws?name={name}&room=lobby&token=of-{name}")).await;
        let (node, user, present) = (String::new(), Value::Null, BTreeSet::new());
        let mut member = Self { client, node, user, present, joined: Vec::new(), left: Vec::new() };
        let welcome = member.recv("welcome").await;
        let members = welcome["members"].as_array().unwrap().iter();
        member.present.extend(members.map(|member| member["metadata"]["name"].as_str().unwrap().to_owned()));
        member.user = welcome["user"].clone();
        member.node = welcome["node"].as_str().unwrap().to_owned();
        member
    }

    async fn say(&mut self, text: &str) {
        self.client.send_text(json!({ "type": "say", "text": text }).to_string()).await;
    }

    /// The next message of this type.
    async fn recv(&mut self, kind: &str) -> Value {
        loop {
            let message: Value = serde_json::from_str(&self.client.recv_text().await).unwrap();
            let name = || message["name"].as_str().unwrap().to_owned();
            match message["type"].as_str().unwrap() {
                "joined" => {
                    self.present.insert(name());
                    self.joined.push(name());
                }
                "left" => {
                    self.present.remove(&name());
                    self.left.push(name());
                }
                _ => {}
            }
            if message["type"] == kind {
                return message;
            }
            assert_ne!(message["type"], "refused", "{message}");
        }
    }

    /// The next messages of the room.
    async fn hear(&mut self, count: usize) -> Vec<String> {
        let mut heard = Vec::new();
        while heard.len() < count {
            heard.push(self.recv("said").await["text"].as_str().unwrap().to_owned());
        }
        heard
    }
}

#[tokio::test]
async fn two_clients_of_a_balancer_are_on_two_nodes_and_a_node_is_restarted_under_them() {
    let mut cluster = Cluster::start("nats").await;
    let mut ada = Member::enter(&cluster.address, "Ada").await;
    let mut bob = Member::enter(&cluster.address, "Bob").await;
    let position = |node: &str| cluster.nodes.iter().position(|known| known.id == node).unwrap();
    let (of_ada, of_bob) = (position(&ada.node), position(&bob.node));
    assert_ne!(of_ada, of_bob);

    // Both speak at the same time, and see one order.
    for number in 0..10 {
        ada.say(&format!("ada {number}")).await;
        bob.say(&format!("bob {number}")).await;
    }
    let (heard, heard_by_bob) = (ada.hear(20).await, bob.hear(20).await);
    assert_eq!(heard, heard_by_bob);
    for name in ["ada", "bob"] {
        let own = heard.iter().filter(|text| text.starts_with(name));
        assert!(own.eq(&(0..10).map(|number| format!("{name} {number}")).collect::<Vec<_>>()), "{heard:?}");
    }

    kill("-TERM", &cluster.nodes[of_ada].pid).await;
    cluster.program.wait_for_line(&format!("node {}: not ready", of_ada + 1)).await;
    for name in ["Cyd", "Dan"] {
        assert_ne!(Member::enter(&cluster.address, name).await.node, ada.node, "it gets no new clients");
    }
    assert_eq!(ada.client.rest().await.1, Some((1012, String::new())));
    let user = ada.user;
    let mut ada = Member::enter(&cluster.address, "Ada").await;
    assert_ne!(ada.node, cluster.nodes[of_ada].id);
    assert_eq!(ada.user, user, "on each node");
    ada.say("I am back").await;
    assert_eq!([bob.hear(1).await, ada.hear(1).await], [["I am back"], ["I am back"]]);

    let again = cluster.started_again(of_ada + 1).await;
    assert!(again.id != cluster.nodes[of_ada].id && again.pid != cluster.nodes[of_ada].pid, "{again:?}");
    let mut late = Member::enter(&cluster.address, "Late").await;
    if late.node != again.id {
        late = Member::enter(&cluster.address, "Later").await;
    }
    assert_eq!(late.node, again.id, "the balancer takes turns");
    late.say("hello from the new node").await;
    assert_eq!(bob.hear(1).await, ["hello from the new node"]);
    // For the others Ada has been there all the time.
    while !bob.present.contains("Ada") {
        bob.recv("joined").await;
    }
    assert!(bob.joined.iter().filter(|name| *name == "Ada").count() <= 1, "{:?}", bob.joined);
    assert!(!bob.left.contains(&"Ada".to_owned()), "{:?}", bob.left);

    cluster.nodes[of_ada] = again;
    kill("-INT", &cluster.program.process.id().unwrap().to_string()).await;
    assert_eq!(bob.client.rest().await.1, Some((1001, String::new())));
    assert!(within_timeout(cluster.program.process.wait()).await.unwrap().success());
    cluster.pids_are_gone().await;
}

#[tokio::test]
async fn a_node_and_a_broker_that_crash_are_started_again_and_no_process_outlives_a_cluster_that_is_killed() {
    let mut cluster = Cluster::start("redis").await;
    let mut ada = Member::enter(&cluster.address, "Ada").await;
    let mut bob = Member::enter(&cluster.address, "Bob").await;
    assert_ne!(ada.node, bob.node);

    let of_ada = cluster.nodes.iter().position(|node| node.id == ada.node).unwrap();
    kill("-KILL", &cluster.nodes[of_ada].pid).await;
    while ada.client.recv().await.is_some() {}
    // A process that dies may close its clients' sockets before the one on which it listens.
    cluster.program.wait_for_line(&format!("node {}: ended", of_ada + 1)).await;
    let mut ada = Member::enter(&cluster.address, "Ada").await;
    assert_ne!(ada.node, cluster.nodes[of_ada].id);
    cluster.nodes[of_ada] = cluster.started_again(of_ada + 1).await;

    kill("-KILL", &cluster.broker_pid).await;
    let again = cluster.program.wait_for_line("broker: process ").await;
    assert_ne!(again, cluster.broker_pid);
    cluster.broker_pid = again;
    ada.say("over a restart of the broker").await;
    assert_eq!(bob.hear(1).await, ["over a restart of the broker"]);

    cluster.program.process.kill().await.unwrap();
    cluster.pids_are_gone().await;
}

#[tokio::test]
async fn a_cluster_says_what_it_needs() {
    let usage = "usage: cluster [--port P] [--broker nats|redis]";
    for (arguments, says) in [
        (&["--port"][..], usage),
        (&["--port", "many"], usage),
        (&["--broker", "rabbit"], usage),
        (&["--nonsense"], usage),
        (&["node", "--backplane"], "--backplane needs a value"),
        (&["node", "--backplane", "rabbit://localhost"], "is not a backplane: nats://host:port or redis://"),
    ] {
        let output = within_timeout(program("cluster").args(arguments).output()).await.unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success() && stderr.contains(says), "{arguments:?}: {stderr}");
    }
    // Found on the PATH, and in /usr/sbin, where Debian has nats-server.
    let output = program("cluster").args(["--broker", "redis"]).env("PATH", "/nowhere").output();
    let stderr = String::from_utf8(within_timeout(output).await.unwrap().stderr).unwrap();
    let says = "redis-server is not installed: run `sudo ci/install-brokers`, or `sudo apt-get install redis-server`";
    assert!(stderr.contains(says), "{stderr}");
}
