//! A volume offered to someone: NBD.
