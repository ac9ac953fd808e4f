//! QEMU: spec to argv, QMP session, guest life.
