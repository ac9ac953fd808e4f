//! The one shape of an error on the API, and what each kind means to HTTP and to a shell.

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Why a request was not carried out, with advice.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{error}")]
pub struct ApiError {
    /// One sentence for people.
    pub error: String,
    /// What to do about it.
    pub hint: Option<String>,
    pub code: ErrorCode,
}

/// The kinds of refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// The request makes no sense as it is.
    Invalid,
    /// No or a wrong token.
    Unauthorized,
    NotFound,
    Conflict,
    /// It would endanger data or run something twice.
    Unsafe,
    /// Nobody may decide at present.
    NoQuorum,
    /// The state asked for was not reached in time; the request itself still stands.
    TimedOut,
    /// Too many requests at once, or too large a body.
    TooMuch,
    /// A fault of ours, or a part of the node that does not answer.
    Internal,
}

impl ErrorCode {
    /// Status of the HTTP answer.
    pub fn http_status(self) -> u16 {
        match self {
            ErrorCode::Invalid => 400,
            ErrorCode::Unauthorized => 401,
            ErrorCode::Unsafe => 403,
            ErrorCode::NotFound => 404,
            ErrorCode::TimedOut => 408,
            ErrorCode::Conflict => 409,
            ErrorCode::TooMuch => 413,
            ErrorCode::Internal => 500,
            ErrorCode::NoQuorum => 503,
        }
    }

    /// Exit code of the command: 2 usage, 3 not found, 4 conflict, 5 refused for safety, 6 timed out; 1 for the rest.
    pub fn exit_code(self) -> u8 {
        match self {
            ErrorCode::Invalid => 2,
            ErrorCode::NotFound => 3,
            ErrorCode::Conflict => 4,
            ErrorCode::Unauthorized | ErrorCode::Unsafe | ErrorCode::NoQuorum => 5,
            ErrorCode::TimedOut => 6,
            ErrorCode::TooMuch | ErrorCode::Internal => 1,
        }
    }
}

impl ApiError {
    pub fn new(code: ErrorCode, error: impl Into<String>) -> ApiError {
        ApiError { error: error.into(), hint: None, code }
    }
    pub fn with_hint(mut self, hint: impl Into<String>) -> ApiError {
        self.hint = Some(hint.into());
        self
    }
}
