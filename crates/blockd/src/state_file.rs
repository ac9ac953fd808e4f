//! Small files in the node's state directory.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

/// Replaces the file, durably: whoever reads it finds all of the old one or all of the new one.
pub fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(Path::new("."));
    std::fs::create_dir_all(dir)?;
    let new = path.with_extension("new");
    let mut file = File::create(&new)?;
    file.write_all(content)?;
    file.sync_all()?;
    std::fs::rename(&new, path)?;
    File::open(dir)?.sync_all()
}
