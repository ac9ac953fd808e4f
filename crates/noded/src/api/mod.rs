//! The REST API and the calls of other nodes, on one port.

mod disks;
mod groups;
mod images;
mod kept;
mod master_key;
mod peer;
mod routes;
mod snapshots;
pub mod tasks;
pub mod view;

pub use images::clear_spool;
pub use routes::{Api, router};

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use pollux_api::{ApiError, ErrorCode};

/// An error as it is answered.
pub struct Refused(pub ApiError);

impl IntoResponse for Refused {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.0.code.http_status()).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        (status, Json(self.0)).into_response()
    }
}

impl From<ApiError> for Refused {
    fn from(error: ApiError) -> Refused {
        Refused(error)
    }
}

impl From<axum::extract::rejection::JsonRejection> for Refused {
    fn from(rejection: axum::extract::rejection::JsonRejection) -> Refused {
        let code = match rejection.status() {
            StatusCode::PAYLOAD_TOO_LARGE => ErrorCode::TooMuch,
            _ => ErrorCode::Invalid,
        };
        Refused(ApiError::new(code, rejection.body_text()))
    }
}

impl From<axum::extract::rejection::QueryRejection> for Refused {
    fn from(rejection: axum::extract::rejection::QueryRejection) -> Refused {
        Refused(ApiError::new(ErrorCode::Invalid, rejection.body_text()))
    }
}
