//! `pollux`, the operator's command. Everything is in the library, so that tests reach it.

use std::process::ExitCode;

fn main() -> ExitCode {
    pollux_cli::main()
}
