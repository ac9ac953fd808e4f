//! Switching a node off and reading back that it is off.

use crate::core::Core;
use pollux_base::NodeId;
use pollux_base::config::PowerConfig;
use pollux_cluster::Input;
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// A switch that is busy for a moment is tried again without asking the core, which would wait for seconds. No attempt
/// begins later than this, so that the core is answered in time.
const ATTEMPTS_UNTIL: Duration = Duration::from_secs(3);
const ATTEMPT_PAUSE: Duration = Duration::from_millis(300);

/// Fences the node and tells the core what came of it.
pub fn start(node: NodeId, power: PowerConfig, core: Core) -> JoinHandle<()> {
    tokio::spawn(async move {
        let begun = Instant::now();
        let result = loop {
            let power = power.clone();
            let tried = tokio::task::spawn_blocking(move || pollux_host::power::fence(&power)).await;
            let result =
                tried.map_err(|error| error.to_string()).and_then(|done| done.map_err(|error| error.to_string()));
            match &result {
                Ok(()) => tracing::info!(%node, "is off: switched and read back"),
                Err(reason) => tracing::warn!(%node, "was not fenced: {reason}"),
            }
            if result.is_ok() || begun.elapsed() > ATTEMPTS_UNTIL {
                break result;
            }
            tokio::time::sleep(ATTEMPT_PAUSE).await;
        };
        let _ = core.inputs.send(Input::Fence { node, result }).await;
    })
}
