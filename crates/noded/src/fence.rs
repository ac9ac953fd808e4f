//! Switching a node off and reading back that it is off.

use crate::core::Core;
use pollux_base::NodeId;
use pollux_base::config::PowerConfig;
use pollux_cluster::Input;
use std::time::Duration;
use tokio::task::JoinHandle;

/// Attempts per question of the core, which asks again: a switch that is busy for a moment must not cost the seconds
/// until then.
const ATTEMPTS: u32 = 3;
const ATTEMPT_PAUSE: Duration = Duration::from_millis(300);

/// Fences the node and tells the core what came of it.
pub fn start(node: NodeId, power: PowerConfig, core: Core) -> JoinHandle<()> {
    tokio::spawn(async move {
        let mut result = Err("not tried".to_string());
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(ATTEMPT_PAUSE).await;
            }
            let power = power.clone();
            let tried = tokio::task::spawn_blocking(move || pollux_host::power::fence(&power)).await;
            result = tried.map_err(|error| error.to_string()).and_then(|done| done.map_err(|error| error.to_string()));
            match &result {
                Ok(()) => {
                    tracing::info!(%node, "is off: switched and read back");
                    break;
                }
                Err(reason) => tracing::warn!(%node, "was not fenced: {reason}"),
            }
        }
        let _ = core.inputs.send(Input::Fence { node, result }).await;
    })
}
