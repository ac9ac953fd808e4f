//! `pollux image`.

use super::wait::WaitArgs;
use crate::context::from_client;
use crate::failure::{Failure, Outcome};
use crate::output::Output;
use crate::table;
use pollux_api::Client;
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How often an upload says how far it is.
const UPLOAD_PROGRESS: Duration = Duration::from_secs(2);

#[derive(Clone, Debug, clap::Subcommand)]
pub enum ImageCommand {
    /// Import a disk image in any format that qemu-img reads
    Import {
        file: PathBuf,
        /// Its name; the file's name without ending if not given
        #[arg(long)]
        name: Option<String>,
        /// Its format, such as raw or qcow2; found out if not given
        #[arg(long)]
        format: Option<String>,
        /// Encrypt what is stored of it; a VM made from it is encrypted if it is asked for
        #[arg(long)]
        encrypted: bool,
        #[command(flatten)]
        wait: WaitArgs,
    },
    /// List the images
    List,
    /// Show one image
    Show { image: String },
    /// Delete an image; VMs made from it keep their disks
    Delete {
        image: String,
        #[command(flatten)]
        wait: WaitArgs,
    },
}

pub fn run(command: ImageCommand, client: &Client, output: &Output) -> Outcome {
    match command {
        ImageCommand::Import { file, name, format, encrypted, wait } => {
            let name = name.or_else(|| file.file_stem()?.to_str().map(String::from));
            let name = name.ok_or_else(|| Failure::usage("the file's name is no name").hint("give one with --name"))?;
            let mut bytes = Upload::open(&file, *output)?;
            let taken = client.upload_image(&name, format.as_deref(), encrypted, &mut bytes);
            wait.finish(client, output, taken, &format!("image {name} is ready"))
        }
        ImageCommand::List => output.show(&client.images().map_err(from_client)?, |images| table::images(images)),
        ImageCommand::Show { image } => output.show(&client.image(&image).map_err(from_client)?, table::image),
        ImageCommand::Delete { image, wait } => {
            output.confirm(&format!("This deletes image {image} for good."))?;
            wait.finish(client, output, client.delete_image(&image), &format!("image {image} is deleted"))
        }
    }
}

/// A file on its way up, with progress.
struct Upload {
    file: File,
    total: u64,
    sent: u64,
    told: Instant,
    output: Output,
}

impl Upload {
    fn open(path: &Path, output: Output) -> Outcome<Upload> {
        let unreadable = |error: std::io::Error| {
            Failure::usage(format!("cannot read {}: {error}", path.display())).hint("name a disk image file")
        };
        let file = File::open(path).map_err(unreadable)?;
        let meta = file.metadata().map_err(unreadable)?;
        if meta.is_dir() || meta.is_file() && meta.len() == 0 {
            return Err(Failure::usage(format!(
                "{} is {}",
                path.display(),
                if meta.is_dir() { "a directory" } else { "empty" }
            ))
            .hint("name a disk image file"));
        }
        Ok(Upload { file, total: meta.len(), sent: 0, told: Instant::now(), output })
    }
}

impl Read for Upload {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.sent += count as u64;
        if self.told.elapsed() >= UPLOAD_PROGRESS && self.total > 0 {
            self.told = Instant::now();
            self.output.progress(&format!("  uploaded {} %", self.sent * 100 / self.total));
        }
        Ok(count)
    }
}
