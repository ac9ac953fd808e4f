//! The serial console of a VM: raw both ways on a terminal, a plain stream elsewhere.
//!
//! The output follows the VM: when its run ends because its node died, the stream is opened again until the VM runs
//! somewhere or is no longer wanted to. Ctrl-] leaves.

use crate::context::from_client;
use crate::failure::{Code, Doing, Failure, Outcome};
use nix::sys::termios::{SetArg, Termios, cfmakeraw, tcgetattr, tcsetattr};
use pollux_api::{Client, Wanted};
use std::io::{IsTerminal, Read, Write};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

/// Ctrl-], as with telnet and virsh: no shell or editor wants it.
const LEAVE: u8 = 0x1d;
/// Between two attempts to find a VM that is on its way to another node.
const REOPEN: Duration = Duration::from_millis(500);

pub fn run(client: &Arc<Client>, vm: &str) -> Outcome {
    // Asked before the terminal changes, so that a wrong name is an ordinary error.
    let output = client.console_output(vm).map_err(from_client)?;
    if !(std::io::stdin().is_terminal() && std::io::stdout().is_terminal()) {
        return follow(client, vm, output);
    }
    eprintln!("Console of {vm}. Ctrl-] leaves.");
    let raw = RawTerminal::enter()?;
    let (ended, end) = channel();
    let typing = (ended.clone(), client.clone(), vm.to_string());
    std::thread::spawn(move || typing.0.send(type_into(&typing.1, &typing.2)));
    let showing = (ended, client.clone(), vm.to_string());
    std::thread::spawn(move || showing.0.send(follow(&showing.1, &showing.2, output)));
    // Whichever ends first ends the console. The other may be inside a read; it ends with the process.
    let result = end.recv().unwrap_or(Ok(()));
    drop(raw);
    eprintln!();
    result
}

/// Shows what the guest prints, over all its runs.
fn follow(client: &Client, vm: &str, mut output: impl Read) -> Outcome {
    copy(&mut output)?;
    loop {
        std::thread::sleep(REOPEN);
        match client.vm(vm) {
            Ok(seen) if seen.wanted == Wanted::Stopped => return Ok(()),
            Ok(_) => {}
            Err(error) => {
                let failure = from_client(error);
                if failure.code == Code::NotFound {
                    return Err(failure);
                }
            }
        }
        if let Ok(mut output) = client.console_output(vm) {
            copy(&mut output)?;
        }
    }
}

/// Until the stream ends, for whatever reason; only our own output failing is a failure.
fn copy(output: &mut impl Read) -> Outcome {
    let mut stdout = std::io::stdout();
    let mut buffer = [0; 4096];
    loop {
        match output.read(&mut buffer) {
            Ok(0) | Err(_) => return Ok(()),
            Ok(count) => stdout.write_all(&buffer[..count]).and_then(|()| stdout.flush()).doing("cannot print")?,
        }
    }
}

/// Sends what is typed until Ctrl-].
fn type_into(client: &Client, vm: &str) -> Outcome {
    let mut stdin = std::io::stdin();
    let mut buffer = [0; 256];
    loop {
        let count = stdin.read(&mut buffer).doing("cannot read the terminal")?;
        let typed = &buffer[..count];
        let upto = typed.iter().position(|byte| *byte == LEAVE).unwrap_or(count);
        if upto > 0 {
            // A key pressed while the VM moves is lost, as with any console.
            let _ = client.console_input(vm, &typed[..upto]);
        }
        if upto < count || count == 0 {
            return Ok(());
        }
    }
}

/// A terminal that passes every key through, until dropped.
struct RawTerminal {
    before: Termios,
}

impl RawTerminal {
    fn enter() -> Outcome<RawTerminal> {
        let failed = |error| Failure::other(format!("cannot use the terminal: {error}"));
        let before = tcgetattr(std::io::stdin()).map_err(failed)?;
        let mut raw = before.clone();
        cfmakeraw(&mut raw);
        tcsetattr(std::io::stdin(), SetArg::TCSANOW, &raw).map_err(failed)?;
        Ok(RawTerminal { before })
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        let _ = tcsetattr(std::io::stdin(), SetArg::TCSANOW, &self.before);
    }
}
