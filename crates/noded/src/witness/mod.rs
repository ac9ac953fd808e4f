//! `pollux-witness`: a tiny register per cluster, outside its nodes, that decides who goes on alone.
//!
//! It holds no guest data and is asked only at transitions. One file holds all registers; it is written anew, synced and
//! renamed *before* a swap is answered, so an answer once given stays true over a crash at any point.

pub mod http;
pub mod registers;
pub mod tokens;
