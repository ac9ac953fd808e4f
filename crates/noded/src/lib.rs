//! DAEMON: the control plane of one node; and pollux-witness.
