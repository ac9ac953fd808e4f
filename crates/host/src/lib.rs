//! The machine: io_uring disks and sockets, clock, cgroups, watchdog, power switches.
