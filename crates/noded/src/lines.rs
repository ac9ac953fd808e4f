//! A connection to a daemon of the same node: JSON, one value a line, over a unix socket.
//!
//! It connects again and again for as long as the process lives. What is to be sent while there is no connection is
//! dropped: whoever sends is told of every new connection and says everything anew.

use serde::Serialize;
use serde::de::DeserializeOwned;
use std::path::Path;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;
use tokio::sync::mpsc;
use zeroize::Zeroize;

/// Pause between two attempts. Not noticed by people, and next to nothing in CPU time.
const CONNECT_PAUSE: Duration = Duration::from_millis(300);
/// A line is at most so long: the largest is an order with thousands of exports.
const LINE_BYTES_MAX: u64 = 16 << 20;
/// A daemon that does not take a line for this long hangs: the connection is given up.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// What becomes of the connection.
pub enum LineEvent<R> {
    Up,
    Line(R),
    Down,
}

/// Runs the connection. `on_event` is waited for, so that a busy receiver slows the daemon and not the other way round.
pub async fn run<S, R, F>(path: &Path, mut to_send: mpsc::Receiver<S>, mut on_event: impl FnMut(LineEvent<R>) -> F)
where
    S: Serialize,
    R: DeserializeOwned + Send + 'static,
    F: Future<Output = ()>,
{
    let mut told = false;
    loop {
        let stream = match UnixStream::connect(path).await {
            Ok(stream) => stream,
            Err(error) => {
                if !told {
                    tracing::warn!("{} is not reached: {error}", path.display());
                    told = true;
                }
                tokio::time::sleep(CONNECT_PAUSE).await;
                continue;
            }
        };
        told = false;
        tracing::info!("connected to {}", path.display());
        // What was meant for the connection before.
        while to_send.try_recv().is_ok() {}
        on_event(LineEvent::Up).await;
        let (reader, mut writer) = stream.into_split();
        let (lines_out, mut lines) = mpsc::channel(16);
        let read = tokio::spawn(read_lines(reader, lines_out));
        let reason = loop {
            tokio::select! {
                line = lines.recv() => match line {
                    Some(Ok(line)) => on_event(LineEvent::Line(line)).await,
                    Some(Err(reason)) => break reason,
                    None => break "it was closed".to_string(),
                },
                value = to_send.recv() => {
                    let Some(value) = value else { return };
                    let mut line = serde_json::to_vec(&value).expect("what is sent always becomes JSON");
                    line.push(b'\n');
                    let written = tokio::time::timeout(WRITE_TIMEOUT, writer.write_all(&line)).await;
                    // It may hold a key.
                    line.zeroize();
                    match written {
                        Ok(Ok(())) => {}
                        Ok(Err(error)) => break error.to_string(),
                        Err(_) => break "it takes nothing".to_string(),
                    }
                }
            }
        };
        read.abort();
        tracing::warn!("the connection to {} is lost: {reason}", path.display());
        on_event(LineEvent::Down).await;
        tokio::time::sleep(CONNECT_PAUSE).await;
    }
}

async fn read_lines<R: DeserializeOwned>(reader: OwnedReadHalf, lines: mpsc::Sender<Result<R, String>>) {
    let mut reader = BufReader::new(reader);
    let mut line = Vec::new();
    loop {
        line.clear();
        let read = (&mut reader).take(LINE_BYTES_MAX).read_until(b'\n', &mut line).await;
        let value = match read {
            Ok(0) => return,
            Ok(_) if line.last() != Some(&b'\n') => Err("a line is not ended or too long".to_string()),
            Ok(_) => serde_json::from_slice(&line).map_err(|error| format!("a line makes no sense: {error}")),
            Err(error) => Err(error.to_string()),
        };
        let ends = value.is_err();
        if lines.send(value).await.is_err() || ends {
            return;
        }
    }
}
