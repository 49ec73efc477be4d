//! The engine of programs that name none: for `serve_hub` and the sockets of `ws`.
//!
//! One for the process, started with its defaults when it is first needed, and never ended. Does not know hubs.

use std::sync::OnceLock;

use shardcast_engine::EngineConfig;

use crate::engine::Engine;

static ENGINE: OnceLock<Option<Engine>> = OnceLock::new();

/// None if the system did not let it start, which was logged.
pub(crate) fn default_engine() -> Option<&'static Engine> {
    let start = || match Engine::start(EngineConfig::default()) {
        Ok(engine) => Some(engine),
        Err(error) => {
            tracing::error!(error = &error as &dyn std::error::Error, "the engine did not start");
            None
        }
    };
    ENGINE.get_or_init(start).as_ref()
}
