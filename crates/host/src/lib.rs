//! The machine: io_uring disks and sockets, clock, cgroups, watchdog, power switches.

pub mod clock;
pub mod disk;
pub mod link;
pub mod power;
pub mod priority;
pub mod reactor;
pub mod reading;
mod ring;
