//! DAEMON: the data plane of one node.
