//! Logs go to stderr, where the service manager collects them. `POLLUX_LOG` sets what is told, such as `debug`.

use tracing_subscriber::EnvFilter;

/// Told by default: our transitions. The log's engine repeats with each attempt that a node is not reached, which
/// `greet` tells once; when it can not go on, `log::engine` says so.
const DEFAULT: &str = "info,openraft=off";

pub fn start() {
    let filter = EnvFilter::try_from_env("POLLUX_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}
