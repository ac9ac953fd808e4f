//! Logs go to stderr, where the service manager collects them. `POLLUX_LOG` sets what is told, such as `debug`.

use tracing_subscriber::EnvFilter;

/// Told by default: our transitions, and what is wrong elsewhere. The log's engine tells much that is no news here.
const DEFAULT: &str = "info,openraft=error";

pub fn start() {
    let filter = EnvFilter::try_from_env("POLLUX_LOG").unwrap_or_else(|_| EnvFilter::new(DEFAULT));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(false).init();
}
