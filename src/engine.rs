//! The engine as an application sees it: started from a config, with several hubs.
//!
//! A thin handle over the engine crate's. Does not know connections.

use std::sync::{Arc, OnceLock};
use std::time::Duration;

use shardcast_engine::{
    ConfigError, ConnectionConfig, EngineConfig, EngineState, InvalidCloseCode, Metrics, Namespace, Shutdown,
    ShutdownReport, StartError,
};
use tokio::runtime;
use tokio::sync::watch;

use crate::backplane::{
    Backplane, BackplaneConfig, BackplaneMetrics, BackplaneStartError, BackplaneState, Cluster, Error, NodeId,
};
use crate::hub::{Hub, WsHub};

/// A running engine: its shards own the connections of all its hubs.
///
/// Cloneable. Hubs keep it alive; when the last handle to it and to its hubs is dropped, it closes its connections
/// with 1001 and ends its threads. That drop waits for them for up to a second, so do not let it happen on a thread
/// whose runtime they need. Like [`shutdown`](Self::shutdown), it does not wait for stuck shards; on one of the
/// engine's own threads it does not wait at all.
///
/// ```no_run
/// # use shardcast::{Engine, EngineConfig, WsHub, WsHubConfig, HubContext, JsonCodec};
/// # struct Chat;
/// # impl WsHub for Chat {
/// #     type Codec = JsonCodec; type InMessage = (); type OutMessage = ();
/// #     async fn on_message(&self, _: (), _: HubContext<Self>) {}
/// # }
/// let engine = Engine::start(EngineConfig::default())?; // one shard per allowed CPU, pinned
/// let chat = engine.hub::<Chat>(WsHubConfig::default())?; // cloneable; lives in the router's state
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug, Clone)]
pub struct Engine {
    inner: shardcast_engine::Engine,
    /// The runtime that the shards' threads have entered.
    runtime: Option<runtime::Id>,
    sockets: Sockets,
    /// The share in a log of several nodes, once there is one.
    cluster: Arc<OnceLock<Cluster>>,
}

/// The connections of [`ws`](crate::ws) that are no clients of a hub, and their settings unless they have their own.
#[derive(Debug, Clone)]
pub(crate) struct Sockets {
    pub(crate) namespace: Namespace,
    pub(crate) config: Arc<ConnectionConfig>,
}

/// As Axum's sockets: 64 MiB in a message, 16 MiB in a frame, no pings.
pub(crate) fn socket_config() -> ConnectionConfig {
    ConnectionConfig {
        max_message_bytes: 64 << 20,
        max_frame_bytes: 16 << 20,
        max_fragments: 1 << 20,
        heartbeat_interval: None,
        ..ConnectionConfig::default()
    }
}

impl Engine {
    /// Starts the shards. Within a tokio runtime their threads enter it once; for connections that are served from
    /// another runtime they enter that for each call.
    ///
    /// # Errors
    /// A setting out of range, by name; a system that gives no threads or file descriptors.
    pub fn start(config: EngineConfig) -> Result<Self, StartError> {
        let runtime = runtime::Handle::try_current().ok();
        let id = runtime.as_ref().map(runtime::Handle::id);
        let mut sockets = socket_config();
        sockets.max_message_bytes = sockets.max_message_bytes.min(config.unfinished_bytes_max);
        let inner = shardcast_engine::Engine::start_within(config, move |shard| {
            let _entered = runtime.as_ref().map(runtime::Handle::enter);
            shard();
        })?;
        Ok(Self::new(inner, id, sockets))
    }

    /// An engine without threads, whose shards take their turns within the current runtime, and its shards.
    #[cfg(feature = "testing")]
    pub(crate) fn driven(
        config: EngineConfig,
        clock: fn() -> std::time::Instant,
    ) -> Result<(Self, Vec<shardcast_engine::Shard>), StartError> {
        let runtime = runtime::Handle::current().id();
        let mut sockets = socket_config();
        sockets.max_message_bytes = sockets.max_message_bytes.min(config.unfinished_bytes_max);
        let (inner, shards) = shardcast_engine::Engine::driven_by(config, clock)?;
        Ok((Self::new(inner, Some(runtime), sockets), shards))
    }

    fn new(inner: shardcast_engine::Engine, runtime: Option<runtime::Id>, sockets: ConnectionConfig) -> Self {
        let namespace = inner.namespace_named("shardcast::ws");
        let sockets = Sockets { namespace, config: Arc::new(sockets) };
        Self { inner, runtime, sockets, cluster: Arc::default() }
    }

    /// A new hub, with clients and groups of its own. `config` is a [`WsHubConfig`](crate::WsHubConfig) for its
    /// connections.
    ///
    /// With a [backplane](Self::backplane) it is one hub with those of the same name on other nodes. The name is that of
    /// the type `H`, with its path; see [`hub_named`](Self::hub_named) for another.
    ///
    /// # Errors
    /// A setting out of range, by name.
    pub fn hub<H: WsHub>(&self, config: impl Into<Arc<ConnectionConfig>>) -> Result<Hub<H>, ConfigError> {
        self.hub_named(std::any::type_name::<H>(), config)
    }

    /// A new hub under a name of one's choice, for nodes that run different programs, or different releases of one in
    /// which the type was moved. If an engine has several hubs of one name, the first ones of all nodes belong together,
    /// the second ones, and so on. Without a [backplane](Self::backplane) the name means nothing.
    ///
    /// # Errors
    /// A setting out of range, by name.
    pub fn hub_named<H: WsHub>(
        &self,
        name: &str,
        config: impl Into<Arc<ConnectionConfig>>,
    ) -> Result<Hub<H>, ConfigError> {
        let (inner, config) = (self.inner.clone(), config.into());
        match self.cluster.get() {
            None => Hub::new(inner, self.runtime, config),
            Some(cluster) => Hub::on_all_nodes(inner, self.runtime, config, cluster, name),
        }
    }

    /// Makes this process a node: hubs that are made from now on share their messages with those of all nodes whose
    /// engines have a backplane on the same log. Everything that means several clients then means those of all nodes, and
    /// ids of connections are unique over all nodes; [`on_this_node`](crate::Target::on_this_node) has the former meaning.
    /// [The guide](crate::guide::nodes) says what else is different.
    ///
    /// `connect` connects to the broker, and is called again until that succeeds. This method returns at once. While the
    /// broker cannot be reached, which is logged as a warning, the node is alone; what publishers get meanwhile is set by
    /// [`BackplaneConfig::outage`]. If the broker refuses, or its address is no address, that is logged as an error, and
    /// the node stays alone ([`BackplaneState::Failed`]). The node takes part by tasks on the current runtime, until the
    /// engine has ended.
    ///
    /// ```no_run
    /// # #[cfg(feature = "redis")]
    /// # fn example(engine: shardcast::Engine) -> Result<(), Box<dyn std::error::Error>> {
    /// use shardcast::backplane::{BackplaneConfig, redis::{RedisBackplane, RedisConfig}};
    ///
    /// let connect = || RedisBackplane::connect("redis://localhost", RedisConfig::default());
    /// engine.backplane(connect, BackplaneConfig::default())?;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`BackplaneStartError`]: a setting out of range, no tokio runtime, an engine that has a backplane already.
    pub fn backplane<B, F>(
        &self,
        connect: impl FnMut() -> F + Send + 'static,
        config: BackplaneConfig,
    ) -> Result<(), BackplaneStartError>
    where
        B: Backplane,
        F: Future<Output = Result<B, Error>> + Send,
    {
        config.validate()?;
        if runtime::Handle::try_current().is_err() {
            return Err(BackplaneStartError::NoRuntime);
        }
        let mut is_new = false;
        self.cluster.get_or_init(|| {
            is_new = true;
            let ended = self.inner.ended();
            Cluster::start(connect, config, async move {
                let _ = ended.await;
            })
        });
        if is_new { Ok(()) } else { Err(BackplaneStartError::AlreadySet) }
    }

    /// Whether this node can reach the broker of its backplane, to look at and to wait for; none without a backplane. For
    /// a readiness endpoint, beside [`state`](Self::state).
    pub fn backplane_state(&self) -> Option<watch::Receiver<BackplaneState>> {
        self.cluster.get().map(|cluster| cluster.state())
    }

    /// What this node has counted of its backplane; none without one.
    pub fn backplane_metrics(&self) -> Option<BackplaneMetrics> {
        self.cluster.get().map(|cluster| cluster.metrics())
    }

    /// This node's id; none without a backplane.
    pub fn node(&self) -> Option<NodeId> {
        self.cluster.get().map(|cluster| cluster.node())
    }

    /// The nodes that are alive, this one included, in the order of their ids, to look at and to wait for; none without a
    /// backplane. A node is known from its first entry in the log until it leaves or has been silent for
    /// [`node_timeout`](BackplaneConfig::node_timeout).
    pub fn nodes(&self) -> Option<watch::Receiver<Arc<[NodeId]>>> {
        self.cluster.get().map(|cluster| cluster.nodes())
    }

    pub(crate) fn inner(&self) -> &shardcast_engine::Engine {
        &self.inner
    }

    pub(crate) fn sockets(&self) -> &Sockets {
        &self.sockets
    }

    /// Ends the engine in order, within the given time: refuses upgrades (503), reads no more messages, lets hubs'
    /// methods finish, writes out everything that was published, closes the connections with 1001 spread over a
    /// quarter of the time, ends the threads, and says how that went. For 1012 and other windows, see
    /// [`shutdown_with`](Self::shutdown_with).
    ///
    /// The time is kept whatever the methods do: one that computes or waits on its shard until then leaves the shard
    /// stuck, which is reported ([`ShutdownReport::stuck`]) and logged as an error 200 ms later; at the latest it is a
    /// second. The shard's thread keeps running until the method returns, or the process ends.
    ///
    /// End the engine first, then axum within a bound: axum does not know upgraded sockets, and its graceful shutdown
    /// waits for ever for a request that was half sent. [The guide](crate::guide::shutdown) has the program.
    pub async fn shutdown(&self, within: Duration) -> ShutdownReport {
        self.inner.shutdown(Shutdown::within(within)).await.expect("1001 may be sent")
    }

    /// Like [`shutdown`](Self::shutdown), with a close code and a window of one's choice.
    ///
    /// # Errors
    /// A close code that may not be sent, such as 1006; nothing has happened then.
    pub async fn shutdown_with(&self, shutdown: Shutdown) -> Result<ShutdownReport, InvalidCloseCode> {
        self.inner.shutdown(shutdown).await
    }

    /// What the engine is doing: running, or ended by itself ([`EngineState::Failed`]), for instance.
    ///
    /// For a readiness endpoint, which tells a load balancer to send no more clients:
    ///
    /// ```
    /// # use axum::{extract::State, http::StatusCode};
    /// # use shardcast::{Engine, EngineState};
    /// async fn ready(State(engine): State<Engine>) -> StatusCode {
    ///     match engine.state() {
    ///         EngineState::Running => StatusCode::OK,
    ///         _ => StatusCode::SERVICE_UNAVAILABLE,
    ///     }
    /// }
    /// # let _: axum::Router<Engine> = axum::Router::new().route("/ready", axum::routing::get(ready));
    /// ```
    pub fn state(&self) -> EngineState {
        self.inner.state()
    }

    /// Whether the engine ends or has ended, for whatever reason: upgrades are refused (503).
    pub fn is_stopping(&self) -> bool {
        self.inner.is_stopping()
    }

    /// Waits until the engine has ended, for whatever reason: [`EngineState::Ended`] or [`EngineState::Failed`]. Does
    /// not end it, nor keep it alive. A service may end itself with its engine, so that it is started anew:
    ///
    /// ```no_run
    /// # use shardcast::{Engine, EngineState};
    /// # async fn example(engine: Engine) {
    /// let ended = engine.ended();
    /// tokio::spawn(async move {
    ///     if ended.await == EngineState::Failed {
    ///         std::process::exit(1);
    ///     }
    /// });
    /// # }
    /// ```
    pub fn ended(&self) -> impl Future<Output = EngineState> + Send + use<> {
        self.inner.ended()
    }

    /// The number of shards.
    pub fn shard_count(&self) -> usize {
        self.inner.shard_count()
    }

    /// How many connections all hubs have, those on their way to their shard included.
    pub fn connection_count(&self) -> usize {
        self.inner.connection_count()
    }

    /// What all shards have counted together, as of their last turns.
    pub fn metrics(&self) -> Metrics {
        self.inner.metrics()
    }

    /// What each shard has counted, as of its last turn; [`lag_micros`](Metrics::lag_micros) and
    /// [`blocked`](Metrics::blocked) as of now, also for a shard that is blocked.
    pub fn shard_metrics(&self) -> Vec<Metrics> {
        self.inner.shard_metrics()
    }
}
