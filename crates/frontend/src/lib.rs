//! A volume offered to someone: NBD.
//!
//! Front ends translate; they do not decide. They are pure: bytes of a client in, requests out; replies in, bytes out.
//! While a group is frozen the requests are just held by the data plane, and a client sees a pause.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod export;
#[doc(hidden)]
pub mod fuzz;
pub mod nbd;

pub use export::{Export, Exports, Found, Place};
