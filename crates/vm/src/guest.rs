//! What a VM is to QEMU, parsed at the door.

use pollux_base::{ByteCount, Incarnation, VmId};
use serde::{Deserialize, Serialize};

/// QEMU's own limit for the machine that we use.
const CPUS_MAX: u32 = 255;
/// Less than this and QEMU's firmware does not start.
const MEMORY_MIN: ByteCount = ByteCount(16 << 20);
/// virtio-blk has 20 bytes for the serial number by which a guest finds its disk; also bounds PCI slots in use.
const DISKS_MAX: usize = 16;

/// One run of one VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Guest {
    pub vm: VmId,
    pub incarnation: Incarnation,
    pub name: String,
    pub cpus: u32,
    pub memory: ByteCount,
    /// `52:54:00:12:34:56`. Not used when the node has no bridge.
    pub mac: String,
    /// NBD export names, in the order of the guest's disks; it boots from the first.
    pub disks: Vec<String>,
}

/// Why QEMU could not run such a guest.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum InvalidGuest {
    #[error("a VM has 1 to {CPUS_MAX} CPUs, not {0}")]
    Cpus(u32),
    #[error("a VM has at least {MEMORY_MIN} bytes of memory, not {0}")]
    Memory(ByteCount),
    #[error("`{0}` is not a unicast MAC address such as 52:54:00:12:34:56")]
    Mac(String),
    #[error("a VM has at most {DISKS_MAX} disks, not {0}")]
    Disks(usize),
    #[error("the export name `{0}` is empty, too long or has control characters")]
    Export(String),
}

impl Guest {
    /// Whether QEMU can run it.
    pub fn check(&self) -> Result<(), InvalidGuest> {
        if !(1..=CPUS_MAX).contains(&self.cpus) {
            return Err(InvalidGuest::Cpus(self.cpus));
        }
        if self.memory < MEMORY_MIN {
            return Err(InvalidGuest::Memory(self.memory));
        }
        if !is_unicast_mac(&self.mac) {
            return Err(InvalidGuest::Mac(self.mac.clone()));
        }
        if self.disks.len() > DISKS_MAX {
            return Err(InvalidGuest::Disks(self.disks.len()));
        }
        // 4096 bytes is the protocol's limit for an export name.
        match self.disks.iter().find(|name| name.is_empty() || name.len() > 4096 || name.contains(char::is_control)) {
            Some(name) => Err(InvalidGuest::Export(name.clone())),
            None => Ok(()),
        }
    }
}

fn is_unicast_mac(text: &str) -> bool {
    let bytes: Vec<&str> = text.split(':').collect();
    bytes.len() == 6
        && bytes.iter().all(|byte| byte.len() == 2 && byte.bytes().all(|digit| digit.is_ascii_hexdigit()))
        && u8::from_str_radix(bytes[0], 16).is_ok_and(|first| first & 1 == 0)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn guest() -> Guest {
        Guest {
            vm: VmId(7),
            incarnation: Incarnation(3),
            name: "web1".into(),
            cpus: 2,
            memory: ByteCount(256 << 20),
            mac: "52:54:00:00:00:0a".into(),
            disks: vec!["v12".into(), "v13".into()],
        }
    }

    #[test]
    fn what_qemu_can_not_run_is_refused_with_the_limit() {
        assert_eq!(guest().check(), Ok(()));
        assert_eq!(Guest { cpus: 0, ..guest() }.check(), Err(InvalidGuest::Cpus(0)));
        assert_eq!(Guest { memory: ByteCount(1), ..guest() }.check(), Err(InvalidGuest::Memory(ByteCount(1))));
        for mac in ["", "52:54:00:00:00", "53:54:00:00:00:0a", "52:54:00:00:00:0g", "52:54:00:00:00:+a"] {
            assert_eq!(Guest { mac: mac.into(), ..guest() }.check(), Err(InvalidGuest::Mac(mac.into())));
        }
        assert_eq!(Guest { disks: vec!["v1".into(); 17], ..guest() }.check(), Err(InvalidGuest::Disks(17)));
        assert!(Guest { disks: vec!["a\nb".into()], ..guest() }.check().is_err());
    }
}
