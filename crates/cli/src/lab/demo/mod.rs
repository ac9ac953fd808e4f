//! The main job, shown end to end.

use crate::failure::Outcome;
use std::path::PathBuf;

#[derive(Debug, clap::Args)]
pub struct DemoArgs {
    /// The guest's image
    #[arg(long, value_name = "FILE")]
    image: PathBuf,
    /// Write figures and time line to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Leave the lab running
    #[arg(long)]
    keep: bool,
}

pub fn run(_arguments: &DemoArgs) -> Outcome {
    Ok(())
}
