//! QEMU: spec to argv, QMP session, guest life.
//!
//! `Vms` runs this node's virtual machines, one QEMU process each, and tells what becomes of them. It decides nothing:
//! whether a VM may run here, and under which incarnation, is the cluster's business. What it promises:
//!
//! * A QEMU outlives this process and is found again (`Vms::open`), because whatever is needed for that lies in the run
//!   directory before QEMU is executed (`rundir`).
//! * `Event::Ended` is said only when the process is gone: not when its end was asked for, not when it stopped answering.
//! * A guest that shut itself down is told from a QEMU that died, even if nobody was there to see it: QEMU stays, with
//!   the guest's shutdown as its state, until we have read it.
//! * The guest never sees trouble of its disks, only pauses (`argv`).
//! * Every word with QEMU has a time-out (`qmp`).
//!
//! It must not know: volumes, groups, generations, the log, how an export comes to be served.

mod accelerator;
mod argv;
mod console;
mod guest;
mod life;
mod process;
pub mod qmp;
mod ready;
mod rundir;
mod tap;
mod vms;

pub use accelerator::{Chosen, Engine};
pub use console::{Console, ConsoleInput};
pub use guest::{Guest, InvalidGuest};
pub use vms::Vms;

use pollux_base::config::{Accelerator, NodeConfig};
use pollux_base::{Incarnation, VmId};
use std::path::PathBuf;

/// What all guests of a node have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Settings {
    /// Gone after a reboot. Holds a folder per VM and the result of the accelerator's probe.
    pub vm_dir: PathBuf,
    /// Where this node serves the guests' disks by NBD.
    pub nbd_socket: PathBuf,
    /// QEMUs are put into this cgroup, which is made if it is not there.
    pub guest_cgroup: Option<PathBuf>,
    /// Guests get a network card on this bridge.
    pub bridge: Option<String>,
    pub accelerator: Accelerator,
}

impl Settings {
    /// As the node's configuration says.
    pub fn of(config: &NodeConfig) -> Settings {
        Settings {
            vm_dir: config.vm_dir(),
            nbd_socket: config.nbd_socket(),
            guest_cgroup: config.guest_cgroup.clone(),
            bridge: config.bridge.clone(),
            accelerator: config.accelerator,
        }
    }
}

/// What became of a VM. For one incarnation: `Running`, then any number of `Stalled` and `Running`, then `Ended`; or
/// just one of `StartFailed` and `Ended`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// QEMU runs and was told to go on; also for those found again, and in answer to a `start` of what runs already.
    Running { vm: VmId, incarnation: Incarnation },
    /// A disk failed in a way that waiting has not mended, so QEMU paused the guest. It is tried again by and by, and
    /// `Running` follows when it goes on.
    Stalled { vm: VmId, incarnation: Incarnation, detail: String },
    /// QEMU is gone. `by_guest`: the guest shut itself down.
    Ended { vm: VmId, incarnation: Incarnation, by_guest: bool, detail: String },
    /// Nothing runs and nothing is left behind.
    StartFailed { vm: VmId, incarnation: Incarnation, reason: String },
}
