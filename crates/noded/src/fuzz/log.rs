//! A log of arbitrary entries, as they come from peers.

use pollux_base::record::{LagBound, Mode};
use pollux_base::{ByteCount, Epoch, Generation, GroupId, Incarnation, NodeId, Stamp, VmId, VolumeId};
use pollux_cluster::entry::{NodeSpec, VmPhase, VmSpec, Wanted};
use pollux_cluster::{Change, Entry, State};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;

/// Entries as JSON, one a line. Whatever they say, the state that they make keeps its invariants and survives its way through a
/// snapshot.
pub fn run(bytes: &[u8]) {
    let mut state = State::default();
    for (index, line) in (1..).zip(bytes.split(|byte| *byte == b'\n')) {
        let Ok(entry) = serde_json::from_slice::<Entry>(line) else { continue };
        again(&entry);
        let answer = state.apply(index, &entry);
        state.check();
        if let Err(refusal) = answer {
            assert!(!format!("{refusal:?}").is_empty());
        }
        for group in state.groups.keys() {
            let spec = state.group_spec(*group).expect("it was just there");
            assert!(spec.lineage.contains(spec.record.stamp) && spec.replicas.contains(&spec.record.primary));
        }
    }
    again(&state);
}

fn again<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) {
    let text = serde_json::to_vec(value).expect("plain data is always written as JSON");
    assert_eq!(serde_json::from_slice::<T>(&text).ok().as_ref(), Some(value));
}

pub fn seeds() -> Vec<Vec<u8>> {
    let spec = |name: &str| NodeSpec {
        name: name.into(),
        api: vec!["192.0.2.1:7000".into()],
        replication: Vec::new(),
        nbd: None,
        power: None,
        memory_bytes: 8 << 30,
    };
    let nodes: BTreeMap<NodeId, NodeSpec> = (1..4).map(NodeId).zip(["a", "b", "c"].map(spec)).collect();
    let vm = VmSpec {
        name: "web1".into(),
        cpus: 1,
        memory: ByteCount(1 << 30),
        image: None,
        disks: vec![ByteCount(1 << 30)],
        mac: String::new(),
    };
    let (group, first) = (GroupId(1), Stamp { epoch: Epoch(1), generation: Generation(1) });
    let alone = BTreeSet::from([NodeId(1)]);
    let init = Change::Init { name: "lab".into(), nodes, witness: true };
    let size = ByteCount(1 << 30);
    let volume = Change::CreateVolume { name: "disk".into(), size, node: NodeId(1), key: None };
    let reason = "lost".to_owned();
    let set = Change::SetGroup { group, expect: first, primary: NodeId(1), in_sync: alone, reason };
    let stories = [
        vec![init.clone(), volume.clone(), set, Change::SetLag { group, lag: LagBound::default() }],
        vec![
            init.clone(),
            volume.clone(),
            Change::AddReplica { group, node: NodeId(3), mode: Mode::Async },
            Change::SetMode { group, nodes: BTreeSet::from([NodeId(2)]), mode: Mode::Memory },
            Change::MoveReplica { group, from: NodeId(2), to: NodeId(3) },
            Change::CancelMove { group },
            Change::ScrubGroup { group, expect: None },
            Change::ScrubEvery { group, days: 3 },
            Change::ExportVolume { volume: VolumeId(1), exported: true },
            Change::DeleteVolume { volume: VolumeId(1) },
        ],
        vec![
            init.clone(),
            Change::CreateVm { spec: vm, node: NodeId(2), keys: Vec::new() },
            Change::WantVm { vm: VmId(1), wanted: Wanted::Running },
            Change::VmFilled { vm: VmId(1) },
            Change::DeleteVm { vm: VmId(1) },
        ],
        vec![
            init,
            Change::CreateImage { name: "debian".into(), size, node: NodeId(1), key: None },
            Change::Awake { node: NodeId(1), run: 9 },
            Change::VmPhase {
                vm: VmId(1),
                expect: Incarnation(0),
                incarnation: Incarnation(1),
                node: NodeId(1),
                phase: VmPhase::Starting,
                reason: String::new(),
            },
        ],
    ];
    let line = |change| {
        let entry = Entry { by: NodeId(1), unix_ms: 1_795_356_000_000, request: None, change };
        serde_json::to_string(&entry).expect("plain data is always written as JSON") + "\n"
    };
    stories.map(|story| story.into_iter().map(line).collect::<String>().into_bytes()).into()
}
