//! One simulated server: its power, its clock, its disk, and the processes that run on it, each of which can die, be
//! stopped and be started alone.

use crate::guest::Guest;
use crate::log::{LogNode, Message};
use crate::outside::PowerSwitch;
use crate::time::{Clock, Time};
use pollux_base::{GroupId, NodeId, RequestId, Stamp, VmId, VolumeId};
use pollux_cluster::{Cluster, Entry, EpochRecord, PeerHello, State};
use pollux_guard::{Guard, Left};
use pollux_replica::DataPlane;
use pollux_replica::links::Links;
use pollux_store::faulty_disk::FaultyDisk;
use std::collections::{BTreeMap, BTreeSet};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Process {
    Guard,
    Blockd,
    Noded,
}

pub const PROCESSES: [Process; 3] = [Process::Guard, Process::Blockd, Process::Noded];

/// A core that runs. `life` tells this run of its process from every other.
pub struct Running<C> {
    pub life: u64,
    pub core: C,
    /// The timer that is set, if any.
    pub wake_at: Option<Time>,
}

impl<C> Running<C> {
    pub fn new(life: u64, core: C) -> Running<C> {
        Running { life, core, wake_at: None }
    }
}

/// The two cores of a data plane.
pub struct Blockd {
    pub plane: DataPlane,
    pub links: Links,
}

/// What is handed to a process.
#[derive(Clone, Debug)]
pub enum Input {
    Guard(pollux_guard::Input),
    Blockd(pollux_replica::Input),
    Links(pollux_replica::links::Input),
    Core(pollux_cluster::Input),
    Log(NodeId, Message<Entry>),
    Timer,
}

/// What `noded`'s shell knows of its connections.
#[derive(Default)]
pub struct Contacts {
    pub data: bool,
    pub guard: bool,
    /// Peers that are connected: when they were last heard.
    pub peers: BTreeMap<NodeId, Time>,
    pub told: Option<PeerHello>,
    /// Nodes that are being switched off; asked again meanwhile, nothing more is done.
    pub fencing: BTreeSet<NodeId>,
    pub tell_at: Time,
}

pub struct Node {
    pub id: NodeId,
    pub on: bool,
    /// Somebody holds the plug in his hand until then.
    pub off_until: Time,
    /// Number of this boot, as the kernel gives it.
    pub boot: u128,
    pub drift_ppm: i64,
    pub clock: Clock,
    /// How far its wall clock is off, in milliseconds.
    pub wall_skew_ms: i64,

    // Survives power cuts.
    /// Of the pool, as its data plane numbers them; those that it left out come last or are gone.
    pub disks: Vec<FaultyDisk>,
    pub log: LogNode<Entry>,
    pub record: Option<EpochRecord>,
    pub snapshot: Option<(u64, State)>,
    /// The disk failed, or is about to.
    pub disk_failed: bool,

    // Survives the death of processes.
    pub left: Option<Left>,
    pub guests: BTreeMap<VmId, Guest>,

    pub guard: Option<Running<Guard>>,
    pub blockd: Option<Running<Blockd>>,
    pub noded: Option<Running<Cluster>>,
    /// Processes that are stopped (SIGSTOP), with what waits for them.
    pub stopped: BTreeMap<Process, Vec<Input>>,
    pub contacts: Contacts,

    // What this run of the data plane said.
    pub served: BTreeSet<VolumeId>,
    pub serving: BTreeMap<GroupId, Stamp>,
    pub answering: BTreeMap<GroupId, Stamp>,
    /// Requests of guests that it has.
    pub attempts: BTreeMap<RequestId, (VmId, u64)>,

    pub switch: Option<PowerSwitch>,
}

impl Node {
    /// The present run of the process, if it runs.
    pub fn life(&self, process: Process) -> Option<u64> {
        match process {
            Process::Guard => self.guard.as_ref().map(|running| running.life),
            Process::Blockd => self.blockd.as_ref().map(|running| running.life),
            Process::Noded => self.noded.as_ref().map(|running| running.life),
        }
    }
    /// Whether the process runs and is not stopped.
    pub fn is_active(&self, process: Process) -> bool {
        self.life(process).is_some() && !self.stopped.contains_key(&process)
    }
}
