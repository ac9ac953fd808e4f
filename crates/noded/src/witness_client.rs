//! Questions to the witness: HTTPS, one connection each, short bounds. It is asked only at transitions.

use crate::witness::http::SwapRequest;
use crate::witness::registers::Swap;
use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use pollux_api::ApiError;
use pollux_base::{ClusterId, Epoch};
use pollux_cluster::{Register, WitnessAnswer};
use rustls::pki_types::ServerName;
use std::net::SocketAddr;
use std::sync::Mutex;
use std::time::Duration;
use tokio::net::TcpStream;
use tokio_rustls::TlsConnector;

/// Time for one attempt, TLS included. A swap waits for the witness' disk; the grant is wanted within a second.
const ATTEMPT_TIMEOUT: Duration = Duration::from_millis(700);
/// A swap may be asked twice without harm.
const ATTEMPTS: u32 = 3;
/// Pause between two attempts.
const ATTEMPT_PAUSE: Duration = Duration::from_millis(100);
/// An answer is some hundred bytes.
const ANSWER_BYTES_MAX: usize = 64 << 10;

/// What a register looks like that the witness does not have.
const NOT_SEEN: Register = Register { epoch: Epoch(0), alone: None };

pub struct WitnessClient {
    pub address: SocketAddr,
    path: String,
    authorization: String,
    connector: TlsConnector,
    /// What it held when last asked; for people.
    last: Mutex<Option<Register>>,
}

/// Why an attempt gave no answer.
enum Failure {
    /// Another attempt may help.
    Passing(String),
    Refused(String),
}

impl WitnessClient {
    pub fn new(address: SocketAddr, cluster: ClusterId, token: &str, connector: TlsConnector) -> WitnessClient {
        WitnessClient {
            address,
            path: format!("/v1/registers/{cluster}"),
            authorization: format!("Bearer {token}"),
            connector,
            last: Mutex::new(None),
        }
    }

    /// What the register held when last asked.
    pub fn last(&self) -> Option<Register> {
        *self.last.lock().expect("nothing panics while holding this lock")
    }

    /// Reads the register, or swaps it.
    pub async fn ask(&self, expect: Register, set: Option<Register>) -> Result<WitnessAnswer, String> {
        let mut reason = String::new();
        for attempt in 0..ATTEMPTS {
            if attempt > 0 {
                tokio::time::sleep(ATTEMPT_PAUSE).await;
            }
            let answer = tokio::time::timeout(ATTEMPT_TIMEOUT, self.attempt(expect, set)).await;
            match answer.unwrap_or_else(|_| Err(Failure::Passing(format!("no answer within {ATTEMPT_TIMEOUT:?}")))) {
                Ok(answer) => {
                    let (WitnessAnswer::Swapped(register) | WitnessAnswer::Holds(register)) = answer;
                    *self.last.lock().expect("nothing panics while holding this lock") = Some(register);
                    return Ok(answer);
                }
                Err(Failure::Refused(refusal)) => return Err(refusal),
                Err(Failure::Passing(passing)) => reason = passing,
            }
        }
        Err(format!("{}: {reason}", self.address))
    }

    async fn attempt(&self, expect: Register, set: Option<Register>) -> Result<WitnessAnswer, Failure> {
        let (method, body) = match set {
            None => (Method::GET, Bytes::new()),
            Some(set) => {
                let expect = Some(expect).filter(|expect| *expect != NOT_SEEN);
                let body = serde_json::to_vec(&SwapRequest { expect, set });
                (Method::POST, Bytes::from(body.map_err(|error| Failure::Refused(error.to_string()))?))
            }
        };
        let (status, bytes) = self.send(method, body).await.map_err(|error| Failure::Passing(error.to_string()))?;
        let nonsense = |error: serde_json::Error| Failure::Refused(format!("the answer makes no sense: {error}"));
        if status.is_success() {
            return if set.is_none() {
                serde_json::from_slice(&bytes).map(WitnessAnswer::Holds).map_err(nonsense)
            } else {
                Ok(match serde_json::from_slice(&bytes).map_err(nonsense)? {
                    Swap::Swapped(register) => WitnessAnswer::Swapped(register),
                    Swap::Holds(register) => WitnessAnswer::Holds(register.unwrap_or(NOT_SEEN)),
                })
            };
        }
        if status == StatusCode::NOT_FOUND && set.is_none() {
            return Ok(WitnessAnswer::Holds(NOT_SEEN));
        }
        let reason =
            serde_json::from_slice::<ApiError>(&bytes).map_or_else(|_| status.to_string(), |error| error.error);
        if status.is_server_error() { Err(Failure::Passing(reason)) } else { Err(Failure::Refused(reason)) }
    }

    async fn send(&self, method: Method, body: Bytes) -> anyhow::Result<(StatusCode, Bytes)> {
        let stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let stream = self.connector.connect(ServerName::from(self.address.ip()), stream).await?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
        let connection = tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(&self.path)
            .header("host", "witness")
            .header("content-type", "application/json")
            .header("authorization", &self.authorization)
            .body(Full::new(body))?;
        let response = sender.send_request(request).await?;
        let status = response.status();
        let body = Limited::new(response.into_body(), ANSWER_BYTES_MAX).collect().await;
        let bytes = body.map_err(|error| anyhow::anyhow!("{error}"))?.to_bytes();
        connection.abort();
        Ok((status, bytes))
    }
}
