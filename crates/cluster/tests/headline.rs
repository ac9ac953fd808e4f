//! Golden texts: the first line of everything, in each situation, and what mends it.

use pollux_base::pool::PoolReport;
use pollux_base::{ByteCount, Epoch, Incarnation, NodeId, VmId};
use pollux_cluster::entry::{Holder, NodePhase, NodeSpec, Proof, VmPhase, VmSpec, Wanted};
use pollux_cluster::headline::headline;
use pollux_cluster::{Change, Entry, Sight, State};
use std::collections::BTreeSet;

const A: NodeId = NodeId(1);
const B: NodeId = NodeId(2);
const UNIX_MS: u64 = 1_795_356_120_000;

struct Case {
    state: State,
    sight: Sight,
}

impl Case {
    /// Two nodes with a witness, all well; VM `web1` of 1 GiB runs on `a`.
    fn new() -> Case {
        let sight = Sight {
            log_works: true,
            witness: Some(Ok(())),
            register_is_right: true,
            peers_heard: [(B, true)].into(),
            pools: Default::default(),
            paths: Default::default(),
            is_encrypted: true,
            guard: true,
            data_plane: true,
            isolated: None,
            isolated_fix: None,
        };
        let mut case = Case { state: State::default(), sight };
        let spec = |name: &str| NodeSpec {
            name: name.into(),
            api: vec![],
            replication: vec![],
            nbd: None,
            power: None,
            memory_bytes: 4 << 30,
        };
        let nodes = [(A, spec("a")), (B, spec("b"))].into();
        case.apply(Change::Init { name: "lab".into(), nodes, witness: true });
        case.vm("web1", 1, A);
        case
    }

    fn apply(&mut self, change: Change) {
        let index = self.state.applied + 1;
        let entry = Entry { by: A, unix_ms: UNIX_MS, request: None, change };
        self.state.apply(index, &entry).expect("applies");
    }

    fn vm(&mut self, name: &str, gib: u64, node: NodeId) {
        let spec = VmSpec {
            name: name.into(),
            cpus: 1,
            memory: ByteCount(gib << 30),
            image: None,
            disks: vec![ByteCount(4096)],
            mac: String::new(),
        };
        self.apply(Change::CreateVm { spec, node, keys: Vec::new() });
        let vm = self.state.vm_named(name).map(|(id, _)| id).expect("created");
        self.apply(Change::WantVm { vm, wanted: Wanted::Running });
        self.phase(vm, 0, 1, node, VmPhase::Starting);
        self.phase(vm, 1, 1, node, VmPhase::Running);
    }

    fn phase(&mut self, vm: VmId, expect: u64, incarnation: u64, node: NodeId, phase: VmPhase) {
        let (expect, incarnation) = (Incarnation(expect), Incarnation(incarnation));
        self.apply(Change::VmPhase { vm, expect, incarnation, node, phase, reason: "test".into() });
    }

    fn tells(&self, text: &str, fix: Option<&str>) {
        let told = headline(&self.state, &self.sight);
        assert_eq!((told.text.as_str(), told.fix.as_deref()), (text, fix));
    }
}

#[test]
fn all_well() {
    let mut case = Case::new();
    case.tells("protected: yes; restart within 15 s; 1 of 1 VMs fit on `b`", None);
    case.vm("web2", 1, B);
    case.tells("protected: yes; restart within 15 s; 1 of 1 VMs fit on `b`, 1 of 1 VMs fit on `a`", None);
}

#[test]
fn not_formed_yet() {
    let mut case = Case::new();
    case.state = State::default();
    case.sight.isolated = Some("the cluster is being formed: waits for `b`".into());
    case.tells("unprotected: the cluster is being formed: waits for `b`", Some("start pollux on every node"));
}

#[test]
fn nobody_but_a_human_can_decide() {
    let mut case = Case::new();
    case.sight.isolated = Some("`a` is silent and there is no witness".into());
    case.tells("unprotected: `a` is silent and there is no witness", Some("pollux node list"));
    let fix = "make sure that `a` is off, then: pollux node confirm-down a";
    case.sight.isolated_fix = Some(fix.into());
    case.tells("unprotected: `a` is silent and there is no witness", Some(fix));
}

#[test]
fn the_witness_is_gone() {
    let mut case = Case::new();
    case.sight.witness = Some(Err((UNIX_MS, "connection refused".into())));
    let text = "unprotected: witness not reachable since 14:02 UTC: connection refused";
    case.tells(text, Some("pollux witness test"));
}

#[test]
fn there_is_no_witness() {
    let mut case = Case::new();
    case.state.witness = false;
    let text = "unprotected: there is no witness: when a node dies, a human must confirm it";
    case.tells(text, Some("pollux witness add ADDRESS"));
}

#[test]
fn the_peer_is_silent() {
    let mut case = Case::new();
    case.sight.peers_heard.insert(B, false);
    case.tells("unprotected: `b` is not heard", Some("pollux node show b"));
}

#[test]
fn alone() {
    let mut case = Case::new();
    let holder = Holder::Alone { node: A };
    case.apply(Change::RaiseEpoch { expect: Epoch(1), epoch: Epoch(2), holder, proof: Proof::Witness });
    case.apply(Change::NodePhase { node: B, epoch: Epoch(2), phase: NodePhase::Lost, proof: None });
    let text = "unprotected: `a` goes on alone since 14:02 UTC, `b` is out";
    case.tells(text, Some("power the other node on; it joins by itself"));
}

#[test]
fn the_guard_or_the_data_plane_is_gone() {
    let mut case = Case::new();
    case.sight.data_plane = false;
    case.tells("unprotected: the data plane of this node does not work", Some("systemctl restart blockd"));
    case.sight.guard = false;
    case.tells("unprotected: the guard of this node does not run", Some("systemctl restart pollux-guard"));
}

#[test]
fn only_one_good_copy() {
    let mut case = Case::new();
    let (group, stamp) = case.state.groups.iter().next().map(|(id, group)| (*id, group.record.stamp)).expect("one");
    let in_sync = BTreeSet::from([A]);
    case.apply(Change::SetGroup { group, expect: stamp, primary: A, in_sync, reason: "test".into() });
    case.tells("degraded: VM `web1` has its only good copy on `a`", Some("pollux volume list --watch"));
}

#[test]
fn no_room_on_the_other() {
    let mut case = Case::new();
    case.vm("big", 3, B);
    case.vm("mid", 2, A);
    let text =
        "degraded: if `a` dies, 1 of 2 VMs fit on `b`: it has 1 GiB of memory free; `mid` (needs 2 GiB) stays down";
    case.tells(text, Some("pollux vm list"));
}

fn pool(free: u64, growth: u64, is_full: bool) -> PoolReport {
    PoolReport {
        size_bytes: 100 << 30,
        free_bytes: free << 30,
        growth_bytes_per_s: growth,
        is_full,
        ..PoolReport::default()
    }
}

#[test]
fn a_pool_runs_out_of_space() {
    let mut case = Case::new();
    case.sight.pools = [(A, pool(50, 0, false)), (B, pool(15, 0, false))].into();
    case.tells("protected: yes; restart within 15 s; 1 of 1 VMs fit on `b`", None);
    case.sight.pools = [(A, pool(50, 0, false)), (B, pool(5, 1 << 20, false))].into();
    let text = "degraded: 5 GiB of 100 GiB are free in the pool on `b`, at the present rate for 85 minutes";
    case.tells(text, Some("pollux pool show b"));
    case.sight.pools = [(A, pool(0, 0, true))].into();
    let text = "degraded: the pool on `a` is full (0 B of 100 GiB free): writes wait for space";
    case.tells(text, Some("pollux pool show a"));
}
