//! Joins the other nodes by a broker that is named by its URL: for examples with an option `--backplane`.
//!
//! `nats://host:port` or `redis://host:port`, each with `?storage=file` if the broker must keep the log over a restart, which
//! for Redis is a matter of its own configuration. Needs the feature `backplane`.

use std::error::Error;

use shardcast::Engine;

/// Without the feature: says how to build with it.
#[cfg(not(feature = "backplane"))]
pub(crate) fn join(_: &Engine, _: &str) -> Result<(), Box<dyn Error>> {
    Err("--backplane needs a build with the feature backplane: add `--features backplane`".into())
}

/// Makes the engine a node, before its hubs are made.
#[cfg(feature = "backplane")]
pub(crate) fn join(engine: &Engine, url: &str) -> Result<(), Box<dyn Error>> {
    use shardcast::backplane::BackplaneConfig;
    use shardcast::backplane::nats::{NatsBackplane, NatsConfig, Storage};
    use shardcast::backplane::redis::{RedisBackplane, RedisConfig};

    let (address, query) = url.split_once('?').unwrap_or((url, ""));
    let storage = match query {
        "" => Storage::Memory,
        "storage=file" => Storage::File,
        _ => return Err(format!("`{query}` is not an option of a backplane: `storage=file` is").into()),
    };
    let address = address.to_owned();
    let config = BackplaneConfig::default();
    if address.starts_with("nats://") {
        let connect = move || {
            let address = address.clone();
            async move { NatsBackplane::connect(&address, NatsConfig { storage, ..NatsConfig::default() }).await }
        };
        engine.backplane(connect, config)?;
    } else if address.starts_with("redis://") {
        let connect = move || {
            let address = address.clone();
            async move { RedisBackplane::connect(&address, RedisConfig::default()).await }
        };
        engine.backplane(connect, config)?;
    } else {
        return Err(format!("`{url}` is not a backplane: nats://host:port or redis://host:port is").into());
    }
    Ok(())
}
