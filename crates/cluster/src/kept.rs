//! What this node keeps of replicas that were overwritten (W9, W10): offered to be read and deleted by a human's command. It lies in
//! this node's pool alone, so nothing of this is in the log; what is offered is withdrawn when this process ends.

use crate::core::Cluster;
use crate::seam::{Answer, Output, Refusal};
use pollux_base::order::Offer;
use pollux_base::{Kept, Order};

/// What a human asks of something that is kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum KeptCommand {
    /// To be read over NBD, by other machines, too; or no longer.
    Export {
        kept: Kept,
        exported: bool,
    },
    Delete {
        kept: Kept,
    },
}

impl Cluster {
    pub(crate) fn on_kept_command(&mut self, request: u64, command: KeptCommand) {
        let (KeptCommand::Export { kept, .. } | KeptCommand::Delete { kept }) = command;
        let pool = self.groups.pool.as_ref().filter(|_| self.groups.is_connected);
        let refusal = match pool {
            None => Some(Refusal::Conflict("this node's data plane does not run; ask again in a moment".into())),
            Some(pool) if !pool.kept.iter().any(|known| known.volume == kept.volume()) => {
                Some(Refusal::NotFound(format!("`{}` does not keep {kept}", self.name_of(self.me))))
            }
            Some(_) => None,
        };
        if let Some(refusal) = refusal {
            return self.output(Output::Answer { request, result: Err(refusal) });
        }
        match command {
            KeptCommand::Export { exported: true, .. } => drop(self.groups.kept_exports.insert(kept)),
            KeptCommand::Export { exported: false, .. } => drop(self.groups.kept_exports.remove(&kept)),
            KeptCommand::Delete { .. } => {
                self.groups.kept_exports.remove(&kept);
                let volume =
                    self.state.volumes.get(&kept.of()).map_or(String::new(), |known| format!(" of {}", known.name));
                let text = format!("{kept}{volume}, which `{}` kept, was deleted", self.name_of(self.me));
                self.ask_disks(request, text, Order::DropKept { id: request, volume: kept.volume() });
                return;
            }
        }
        self.output(Output::Answer { request, result: Ok(Answer::Done) });
    }

    pub fn is_kept_exported(&self, kept: Kept) -> bool {
        self.groups.kept_exports.contains(&kept)
    }

    /// The name under which it is offered.
    pub fn kept_export_name(kept: Kept) -> String {
        format!("kept/{kept}")
    }

    /// As far as it is still there.
    pub(crate) fn kept_offers(&self) -> impl Iterator<Item = (String, Offer)> {
        let pool = self.groups.pool.iter().flat_map(|pool| &pool.kept);
        let offered = pool.filter_map(|known| Kept::in_volume(known.volume));
        offered.filter(|kept| self.is_kept_exported(*kept)).map(|kept| {
            let offer = Offer { volume: kept.volume(), is_public: true, is_read_only: true };
            (Cluster::kept_export_name(kept), offer)
        })
    }
}
