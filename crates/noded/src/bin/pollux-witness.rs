//! `pollux-witness`: decides which side of a cluster goes on alone.

use anyhow::{Context, Result};
use clap::Parser;
use pollux_noded::witness::{http, registers::Registers, tokens::Tokens};
use pollux_noded::{logging, server, tls};
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;

/// The register outside the nodes that decides who goes on alone.
#[derive(Parser)]
#[command(version)]
struct Args {
    /// JSON file with `listen`, `state`, `certificate`, `key` and `tokens`, instead of the flags.
    #[arg(long, conflicts_with_all = ["listen", "state", "certificate", "key", "tokens"])]
    config: Option<PathBuf>,
    /// Address and port to listen on.
    #[arg(long, required_unless_present = "config")]
    listen: Option<SocketAddr>,
    /// File that holds the registers; made when it is not there.
    #[arg(long, required_unless_present = "config")]
    state: Option<PathBuf>,
    /// PEM file.
    #[arg(long, alias = "cert", required_unless_present = "config")]
    certificate: Option<PathBuf>,
    /// PEM file.
    #[arg(long, required_unless_present = "config")]
    key: Option<PathBuf>,
    /// One line `CLUSTER TOKEN` per cluster.
    #[arg(long, required_unless_present = "config")]
    tokens: Option<PathBuf>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Config {
    listen: SocketAddr,
    state: PathBuf,
    certificate: PathBuf,
    key: PathBuf,
    tokens: PathBuf,
}

fn main() -> ExitCode {
    logging::start();
    match run(Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("Error: {error:#}");
            ExitCode::from(2)
        }
    }
}

fn run(args: Args) -> Result<()> {
    let config = match args {
        Args { config: Some(path), .. } => {
            let text = std::fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
            serde_json::from_slice(&text).with_context(|| format!("{} makes no sense", path.display()))?
        }
        Args {
            listen: Some(listen),
            state: Some(state),
            certificate: Some(certificate),
            key: Some(key),
            tokens: Some(tokens),
            ..
        } => Config { listen, state, certificate, key, tokens },
        _ => unreachable!("clap asks for all flags without --config"),
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = server::listen(config.listen).await?;
        let acceptor = tls::acceptor(&config.certificate, &config.key)?;
        let tokens = Tokens::open(&config.tokens).map_err(anyhow::Error::msg)?;
        let registers = Registers::open(&config.state)?;
        tracing::info!(listen = %config.listen, registers = registers.len(), "witness is ready");
        server::serve(listener, acceptor, http::router(registers, tokens)).await;
        Ok(())
    })
}
