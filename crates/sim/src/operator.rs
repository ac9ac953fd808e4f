//! The person at the API: makes the VMs, wants them running (or for a while not), and asks again until it is so.

use crate::node::Process;
use crate::world::{Event, World};
use pollux_base::{ByteCount, NodeId};
use pollux_cluster::entry::{VmSpec, Wanted};
use pollux_cluster::{Answer, Change, Input, Refusal};
use std::time::Duration;

const LOOKS_EVERY: Duration = Duration::from_millis(400);

pub struct Operator {
    /// Whether each VM is to run.
    pub wanted: Vec<bool>,
}

impl Operator {
    pub fn new(vms: usize) -> Operator {
        Operator { wanted: vec![true; vms] }
    }
}

pub fn vm_name(index: usize) -> String {
    format!("vm{index}")
}

impl World {
    pub fn on_operator(&mut self) {
        self.at(LOOKS_EVERY, Event::Operator);
        // It talks to one node, whichever answers.
        let answers = |node: &NodeId| {
            let found = &self.nodes[node];
            found.is_active(Process::Noded) && found.noded.as_ref().is_some_and(|n| n.core.state().is_initialised())
        };
        let ids: Vec<NodeId> = self.ids().into_iter().filter(answers).collect();
        if ids.is_empty() {
            return;
        }
        let id = ids[self.luck.below(ids.len() as u64) as usize];
        // Nobody makes a VM before the cluster is complete.
        let incomplete = self.records.is_empty()
            && !self.ids().iter().all(|a| self.peers(*a).iter().all(|b| self.is_linked(*a, *b)));
        if incomplete {
            return;
        }
        self.operate_snapshots(id);
        self.operate_copies(id);
        for index in 0..self.settings.vms.len() {
            let Some(noded) = &self.nodes[&id].noded else { return };
            let wanted = if self.operator.wanted[index] { Wanted::Running } else { Wanted::Stopped };
            let change = match noded.core.state().vm_named(&vm_name(index)) {
                None => Change::CreateVm {
                    spec: VmSpec {
                        name: vm_name(index),
                        cpus: 1,
                        memory: ByteCount(256 << 20),
                        image: None,
                        disks: self.settings.vms[index].iter().map(|size| ByteCount(*size)).collect(),
                        mac: String::new(),
                    },
                    node: NodeId(0),
                    keys: self.keys_of_vm(index),
                },
                Some((vm, found)) if found.wanted != wanted => Change::WantVm { vm, wanted },
                Some(_) => continue,
            };
            let (request, unix_ms) = (self.number(), self.unix_ms(id));
            self.tell_core(id, Duration::ZERO, Input::Request { request, unix_ms, change: Box::new(change) });
        }
    }

    /// The answer is only written down: the operator looks at what is, not at what was said.
    pub fn on_api_answer(&mut self, id: NodeId, request: u64, result: Result<Answer, Refusal>) {
        self.trace.line(self.now, || format!("{id} answers request {request}: {result:?}"));
    }
}
