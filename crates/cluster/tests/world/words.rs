//! What a core does, as a line that people read in a transcript.

use super::name;
use pollux_cluster::{Change, Output, Register, VmCommand};

/// Outputs that change something durable or visible, as one line.
pub fn weighty(output: &Output) -> Option<String> {
    let register = |register: &Register| match register.alone {
        None => format!("({}, both)", register.epoch.0),
        Some(node) => format!("({}, {})", register.epoch.0, name(node)),
    };
    Some(match output {
        Output::AskWitness { expect, set: Some(set), .. } => {
            format!("asks the witness {} -> {}", register(expect), register(set))
        }
        Output::AskWitness { set: None, .. } => return None,
        Output::SaveEpoch(record) => format!(
            "saves epoch {}{}{}",
            record.epoch.0,
            if record.alone { " alone" } else { "" },
            record.gave_up.map_or(String::new(), |epoch| format!(", gave up for {}", epoch.0))
        ),
        Output::ForceAlone { epoch } => format!("forces the log, epoch {}", epoch.0),
        Output::GiveUpLog { from, epoch } => format!("gives up its log to {}, epoch {}", name(*from), epoch.0),
        Output::TakeIn { node } => format!("takes in {}", name(*node)),
        Output::Fence { node, .. } => format!("switches {} off", name(*node)),
        Output::Guard(command) => format!("guard: {}", guard_text(command)),
        Output::Vm(VmCommand::Start { vm, incarnation, .. }) => format!("starts {vm} {incarnation:?}"),
        Output::Vm(VmCommand::Shutdown { vm }) => format!("shuts {vm} down"),
        Output::Vm(VmCommand::Stop { vm }) => format!("ends {vm}"),
        Output::Propose(entry) => match &entry.change {
            Change::RaiseEpoch { epoch, holder, .. } => format!("proposes epoch {} {holder:?}", epoch.0),
            Change::NodePhase { node, phase, proof, .. } => {
                let proof = proof.as_ref().map_or(String::new(), |proof| format!(" ({})", proof.text()));
                format!("proposes {} {phase:?}{proof}", name(*node))
            }
            Change::VmPhase { vm, incarnation, node, phase, reason, .. } => {
                format!("proposes {vm} {} on {} {incarnation:?}: {reason}", phase.name(), name(*node))
            }
            Change::SetGroup { group, primary, in_sync, .. } => {
                let set: Vec<&str> = in_sync.iter().map(|node| name(*node)).collect();
                format!("proposes {group} primary {} in sync {}", name(*primary), set.join("+"))
            }
            Change::WantVm { vm, wanted } => format!("proposes {vm} wanted {}", wanted.name()),
            _ => return None,
        },
        Output::InitLog { .. } | Output::Answer { .. } | Output::Data(_) | Output::OpenKey(_) | Output::Fill { .. } => {
            return None;
        }
    })
}

fn guard_text(command: &pollux_base::guard::GuardCommand) -> String {
    use pollux_base::guard::GuardCommand::*;
    match command {
        Members { epoch, .. } => format!("members of epoch {}", epoch.0),
        Alone { epoch } => format!("alone under epoch {}", epoch.0),
        Surrender { epoch } => format!("surrender to epoch {}", epoch.0),
    }
}
