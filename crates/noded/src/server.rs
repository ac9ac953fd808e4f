//! HTTP/1.1 over TLS on a port that anybody may send anything to.
//!
//! Nobody can hold the server up: handshakes, headers and the number of connections are bounded, and whatever is not TLS
//! or not HTTP ends its own connection only.

use crate::link_keys::Caller;
use anyhow::{Context, Result};
use axum::{Extension, Router};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

/// Time for the TLS handshake: a slow machine under software emulation needs some hundred milliseconds.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Time for the headers of a request, also for the next one on a kept connection.
const HEADER_TIMEOUT: Duration = Duration::from_secs(60);
/// Connections at once. Far above what nodes, UIs and commands of one cluster open; a connection costs some 50 KiB.
const CONNECTIONS_MAX: usize = 512;
/// Pause after a failed accept, such as for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(200);

/// Takes the address; fails in words for people, such as when it is in use.
pub async fn listen(address: SocketAddr) -> Result<TcpListener> {
    TcpListener::bind(address).await.with_context(|| format!("cannot listen on {address}"))
}

/// Serves until the task is dropped.
pub async fn serve(listener: TcpListener, acceptor: TlsAcceptor, router: Router) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let place = places.clone().acquire_owned().await.expect("the semaphore is never closed");
        match listener.accept().await {
            Ok((stream, _)) => {
                let (acceptor, router) = (acceptor.clone(), router.clone());
                tokio::spawn(async move {
                    serve_connection(stream, acceptor, router).await;
                    drop(place);
                });
            }
            Err(error) => {
                tracing::warn!("cannot accept a connection: {error}");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

async fn serve_connection(stream: TcpStream, acceptor: TlsAcceptor, router: Router) {
    // Answers are small: they must not wait for each other's acknowledgement.
    let _ = stream.set_nodelay(true);
    let Ok(Ok(stream)) = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await else {
        return;
    };
    // A node that has shown its certificate can agree on keys over this connection.
    let router = match Caller::of(stream.get_ref().1) {
        Some(caller) => router.layer(Extension(caller)),
        None => router,
    };
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .max_headers(64)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    if let Err(error) = connection.await {
        tracing::debug!("a connection ended: {error}");
    }
}
