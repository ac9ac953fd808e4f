//! The witness on the wire: `GET` and `POST /v1/registers/{cluster}` with the cluster's bearer token.

use super::registers::{RegisterError, Registers, Swap};
use super::tokens::Tokens;
use axum::extract::{DefaultBodyLimit, Path, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use axum::{Json, Router};
use pollux_api::{ApiError, ErrorCode};
use pollux_base::ClusterId;
use pollux_cluster::seam::Register;
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};

/// A swap is some hundred bytes.
const BODY_BYTES_MAX: usize = 16 << 10;

/// The body of a `POST`.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SwapRequest {
    /// `None`: make the register if there is none.
    pub expect: Option<Register>,
    pub set: Register,
}

struct Witness {
    registers: Mutex<Registers>,
    tokens: Mutex<Tokens>,
}

pub fn router(registers: Registers, tokens: Tokens) -> Router {
    let witness = Arc::new(Witness { registers: Mutex::new(registers), tokens: Mutex::new(tokens) });
    Router::new()
        .route("/v1/registers/{cluster}", get(on_get).post(on_swap))
        .layer(DefaultBodyLimit::max(BODY_BYTES_MAX))
        .with_state(witness)
}

async fn on_get(
    State(witness): State<Arc<Witness>>,
    Path(cluster): Path<String>,
    headers: HeaderMap,
) -> Result<Json<Register>, Refused> {
    let cluster = witness.cluster(&cluster, &headers)?;
    blocking(move || {
        let registers = witness.registers.lock().map_err(|_| broken())?;
        let held = registers.get(cluster).map_err(refused)?;
        held.map(Json).ok_or_else(|| Refused(unknown()))
    })
    .await
}

async fn on_swap(
    State(witness): State<Arc<Witness>>,
    Path(cluster): Path<String>,
    headers: HeaderMap,
    Json(request): Json<SwapRequest>,
) -> Result<Json<Swap>, Refused> {
    let cluster = witness.cluster(&cluster, &headers)?;
    blocking(move || {
        let mut registers = witness.registers.lock().map_err(|_| broken())?;
        let swap = registers.swap(cluster, request.expect, request.set).map_err(refused)?;
        match swap {
            Swap::Swapped(register) => tracing::info!(%cluster, ?register, "swapped"),
            Swap::Holds(register) => tracing::info!(%cluster, ?register, asked = ?request.set, "refused a swap"),
        }
        Ok(Json(swap))
    })
    .await
}

/// File operations wait for the disk: not in the task that serves others.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Refused> + Send + 'static) -> Result<T, Refused> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|_| Err(broken()))
}

impl Witness {
    /// The cluster that is named, if the token may speak for it. Whether an unknown cluster or a wrong token was the
    /// reason of a refusal is not told.
    fn cluster(&self, text: &str, headers: &HeaderMap) -> Result<ClusterId, Refused> {
        let token = headers.get("authorization").and_then(|value| value.to_str().ok()?.strip_prefix("Bearer "));
        let cluster = text.parse::<ClusterId>().ok();
        if let (Some(cluster), Some(token)) = (cluster, token)
            && self.tokens.lock().map_err(|_| broken())?.allow(cluster, token)
        {
            return Ok(cluster);
        }
        Err(Refused(
            ApiError::new(ErrorCode::Unauthorized, "this token may not speak for this cluster")
                .with_hint("Compare the node's witness token with the witness' token file."),
        ))
    }
}

/// An error as it is answered.
pub struct Refused(ApiError);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = match self.0.code {
            ErrorCode::NoQuorum => StatusCode::SERVICE_UNAVAILABLE,
            code => StatusCode::from_u16(code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR),
        };
        (status, Json(self.0)).into_response()
    }
}

fn unknown() -> ApiError {
    ApiError::new(ErrorCode::NotFound, "this witness has no register for this cluster")
        .with_hint("It is made by `noded init`. If there was one, the witness has lost its state file.")
}

fn broken() -> Refused {
    Refused(ApiError::new(ErrorCode::NoQuorum, "the witness failed in an earlier request and must be restarted"))
}

fn refused(error: RegisterError) -> Refused {
    let code = match &error {
        RegisterError::EpochGoesBack { .. } => ErrorCode::Invalid,
        RegisterError::Full => ErrorCode::TooMuch,
        // 503: the swap was not made, or it is not known; ask again.
        _ => ErrorCode::NoQuorum,
    };
    if code == ErrorCode::NoQuorum {
        tracing::error!("{error}");
    }
    Refused(ApiError::new(code, error.to_string()))
}
