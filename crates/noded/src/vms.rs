//! The node's VMs: what the core wants is passed to `pollux_vm`, what becomes of them is passed back.

use crate::core::Core;
use crate::fill::Copy;
use pollux_base::VmId;
use pollux_cluster::{Input, VmCommand, VmEvent};
use pollux_vm::{Event, Guest, Vms};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

/// Runs until the process ends. QEMUs outlive it.
pub async fn run(vms: Vms, mut events: mpsc::Receiver<Event>, mut commands: mpsc::Receiver<VmCommand>, core: Core) {
    let running = vms.running().into_iter().collect();
    tell(&core, VmEvent::Found { running }).await;
    loop {
        tokio::select! {
            event = events.recv() => match event {
                Some(event) => on_event(event, &core).await,
                None => return,
            },
            command = commands.recv() => match command {
                Some(command) => on_command(&vms, command).await,
                None => return,
            },
        }
    }
}

async fn on_command(vms: &Vms, command: VmCommand) {
    match command {
        VmCommand::Start { vm, incarnation, spec, volumes } => {
            let disks = volumes.into_iter().map(|(_, export)| export).collect();
            let (name, cpus, memory, mac) = (spec.name, spec.cpus, spec.memory, spec.mac);
            vms.start(Guest { vm, incarnation, name, cpus, memory, mac, disks }).await;
        }
        VmCommand::Shutdown { vm } => {
            vms.shutdown(vm);
        }
        VmCommand::Stop { vm } => {
            vms.stop(vm);
        }
    }
}

async fn on_event(event: Event, core: &Core) {
    match event {
        Event::Running { vm, incarnation } => {
            tracing::info!(%vm, %incarnation, "runs");
            tell(core, VmEvent::Running { vm, incarnation }).await;
        }
        Event::Stalled { vm, incarnation, detail } => {
            tracing::warn!(%vm, %incarnation, "is paused by trouble of its disk: {detail}");
        }
        Event::Ended { vm, incarnation, by_guest, detail } => {
            tracing::info!(%vm, %incarnation, by_guest, "has ended: {detail}");
            tell(core, VmEvent::Ended { vm, incarnation, by_guest, detail }).await;
        }
        Event::StartFailed { vm, incarnation, reason } => {
            tracing::warn!(%vm, %incarnation, "was not started: {reason}");
            tell(core, VmEvent::StartFailed { vm, incarnation, reason }).await;
        }
    }
}

/// Copies an image into a VM's first disk.
pub fn start_fill(vm: VmId, copy: Copy, core: Core) -> JoinHandle<()> {
    tokio::spawn(async move {
        tracing::info!(%vm, ?copy, "copies its image");
        let result = copy.run().await;
        if let Err(reason) = &result {
            tracing::warn!(%vm, "its image was not copied: {reason}");
        }
        tell(&core, VmEvent::Filled { vm, result }).await;
    })
}

async fn tell(core: &Core, event: VmEvent) {
    // The core is gone only when the process ends.
    let _ = core.inputs.send(Input::Vm(event)).await;
}
