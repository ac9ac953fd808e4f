//! The REST contract: types, endpoints, OpenAPI, client.
//!
//! `noded` serves it, `pollux` and the web UI speak it. One table (`endpoint::ENDPOINTS`) owns the list of what can be
//! asked; the OpenAPI text is made from it and from the types, and `openapi.json` beside this crate is its golden copy.
//! Names, sizes and states are the words of `docs/GLOSSARY.md`; a status word is never shown before it is true.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod client;
pub mod endpoint;
pub mod error;
pub mod openapi;
pub mod request;
pub mod resource;

pub use client::{Client, ClientError};
pub use error::{ApiError, ErrorCode};
pub use request::*;
pub use resource::*;
