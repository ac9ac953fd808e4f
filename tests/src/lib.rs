//! Tests with real daemons, real processes and real QEMU.
