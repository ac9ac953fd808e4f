//! What encryption at rest costs for a block of 4 KiB, one way and the other, checksum apart:
//! `cargo run --release -p pollux-replica --example cipher_cost`.

#![allow(
    clippy::disallowed_methods,
    clippy::disallowed_types,
    reason = "it measures; the core in it is handed its input"
)]

use pollux_base::{BlockIndex, Data, KeyId, VolumeSecret};
use pollux_replica::cipher::Cipher;
use std::time::Instant;

const BLOCKS: u64 = 400_000;
/// What a large request has.
const AT_ONCE: usize = 16;

fn main() {
    let secret = VolumeSecret::new(std::array::from_fn(|at| at as u8));
    let cipher = Cipher::new(KeyId::of(&secret), &secret).expect("its own name");
    let mut data = Data::copy_of(&vec![7; AT_ONCE * 4096]);
    let tell = |what: &str, started: Instant| {
        let seconds = started.elapsed().as_secs_f64();
        let (ns, rate) = (seconds * 1e9 / BLOCKS as f64, BLOCKS as f64 * 4096.0 / seconds / 1e9);
        println!("{what}: {ns:.0} ns per block, {rate:.2} GB/s");
    };
    for _ in 0..3 {
        let started = Instant::now();
        for start in (0..BLOCKS).step_by(AT_ONCE) {
            data = cipher.encrypt(BlockIndex(start), &data);
        }
        tell("encrypt", started);
        let started = Instant::now();
        for start in (0..BLOCKS).step_by(AT_ONCE) {
            data = cipher.decrypt(BlockIndex(start), &data);
        }
        tell("decrypt", started);
    }
}
