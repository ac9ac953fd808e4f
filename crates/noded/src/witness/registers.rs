//! The registers and their file.
//!
//! What is in memory is what is on disk: a swap that can not be made durable changes nothing and says so. A register
//! comes into being only when asked for by name of nothing (`expect: None`), never by a swap: a lost file must not look
//! like a fresh cluster that anyone may take.

use pollux_base::ClusterId;
use pollux_base::checksum::crc32c;
use pollux_cluster::seam::Register;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// First word of the file.
const MAGIC: &str = "pollux-witness";
/// Version of the file's form.
const VERSION: u32 = 1;
/// Registers that one witness holds: keeps the file, written whole at each transition, below about 2 MiB.
const REGISTERS_MAX: usize = 20_000;

/// What became of a swap.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Swap {
    /// Made, or made before by the same question.
    Swapped(Register),
    /// The register holds something else (`None`: it does not exist).
    Holds(Option<Register>),
}

/// Why the registers could not be opened or changed.
#[derive(Debug, thiserror::Error)]
pub enum RegisterError {
    #[error("the state file {0} is in use by another witness")]
    InUse(PathBuf),
    #[error(
        "the state file {path} is damaged: {reason}; it is left untouched. Put back a copy, or move it away and register the clusters anew"
    )]
    Damaged { path: PathBuf, reason: String },
    #[error("the state file {path} can not be used: {error}")]
    Io { path: PathBuf, error: io::Error },
    #[error("an epoch can not go back: from {from} to {to}")]
    EpochGoesBack { from: u64, to: u64 },
    #[error("this witness holds no more than {REGISTERS_MAX} registers")]
    Full,
    /// The file may or may not hold the last swap; only a restart, which reads it, tells.
    #[error("an earlier write failed half-way; the witness must be restarted")]
    Unsure,
}

/// All registers of this witness.
#[derive(Debug)]
pub struct Registers {
    path: PathBuf,
    values: BTreeMap<ClusterId, Register>,
    /// A rename was made but could not be made durable: nothing is answered from memory any more.
    unsure: bool,
    /// Held for as long as the registers are open.
    _lock: File,
}

impl Registers {
    /// Opens the file, or begins with none when there is no file yet.
    pub fn open(path: &Path) -> Result<Registers, RegisterError> {
        let io_error = |error| RegisterError::Io { path: path.into(), error };
        let lock = File::options()
            .create(true)
            .truncate(false)
            .write(true)
            .open(path.with_extension("lock"))
            .map_err(io_error)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(fs::TryLockError::WouldBlock) => return Err(RegisterError::InUse(path.into())),
            Err(fs::TryLockError::Error(error)) => return Err(io_error(error)),
        }
        let values = match fs::read(path) {
            Ok(bytes) => {
                decode(&bytes).map_err(|reason| RegisterError::Damaged { path: path.into(), reason: reason.into() })?
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => BTreeMap::new(),
            Err(error) => return Err(io_error(error)),
        };
        let registers = Registers { path: path.into(), values, unsure: false, _lock: lock };
        // Proves at start, not at the first emergency, that the file can be written.
        registers.write(&registers.values).map_err(|(error, _)| io_error(error))?;
        Ok(registers)
    }

    /// What the cluster's register holds.
    pub fn get(&self, cluster: ClusterId) -> Result<Option<Register>, RegisterError> {
        if self.unsure { Err(RegisterError::Unsure) } else { Ok(self.values.get(&cluster).copied()) }
    }

    /// Compare and swap. Durable before this returns `Swapped`.
    pub fn swap(&mut self, cluster: ClusterId, expect: Option<Register>, set: Register) -> Result<Swap, RegisterError> {
        let held = self.get(cluster)?;
        if held == Some(set) {
            return Ok(Swap::Swapped(set));
        }
        if held != expect {
            return Ok(Swap::Holds(held));
        }
        match held {
            Some(held) if set.epoch < held.epoch => {
                return Err(RegisterError::EpochGoesBack { from: held.epoch.0, to: set.epoch.0 });
            }
            None if self.values.len() >= REGISTERS_MAX => return Err(RegisterError::Full),
            _ => {}
        }
        let mut values = self.values.clone();
        values.insert(cluster, set);
        self.write(&values).map_err(|(error, unsure)| {
            self.unsure = unsure;
            RegisterError::Io { path: self.path.clone(), error }
        })?;
        self.values = values;
        Ok(Swap::Swapped(set))
    }

    /// How many clusters are registered.
    pub fn len(&self) -> usize {
        self.values.len()
    }
    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.values.is_empty()
    }

    /// Replaces the file. The error says whether the new file may be in place all the same.
    fn write(&self, values: &BTreeMap<ClusterId, Register>) -> Result<(), (io::Error, bool)> {
        let sure = |error| (error, false);
        let temporary = self.path.with_extension("new");
        let mut file = File::create(&temporary).map_err(sure)?;
        file.write_all(&encode(values)).and_then(|()| file.sync_all()).map_err(sure)?;
        fs::rename(&temporary, &self.path).map_err(sure)?;
        let directory = self.path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|directory| directory.sync_all()).map_err(|error| (error, true))
    }
}

/// One line `pollux-witness 1 CRC32C`, then the registers as JSON; the checksum is of the JSON.
pub(crate) fn encode(values: &BTreeMap<ClusterId, Register>) -> Vec<u8> {
    let body = serde_json::to_vec_pretty(values).expect("registers always become JSON");
    let mut bytes = format!("{MAGIC} {VERSION} {:08x}\n", crc32c(&body)).into_bytes();
    bytes.extend_from_slice(&body);
    bytes
}

pub(crate) fn decode(bytes: &[u8]) -> Result<BTreeMap<ClusterId, Register>, &'static str> {
    let end = bytes.iter().position(|byte| *byte == b'\n').ok_or("it has no first line")?;
    let (head, body) = (&bytes[..end], &bytes[end + 1..]);
    let head = std::str::from_utf8(head).map_err(|_| "its first line is not text")?;
    let mut words = head.split(' ');
    if words.next() != Some(MAGIC) {
        return Err("it is no state file of a witness");
    }
    if words.next() != Some("1") {
        return Err("its version is not known to this program");
    }
    let checksum = words.next().and_then(|word| u32::from_str_radix(word, 16).ok());
    if checksum != Some(crc32c(body)) {
        return Err("its checksum does not fit");
    }
    serde_json::from_slice(body).map_err(|_| "its registers make no sense")
}

#[cfg(test)]
mod tests {
    use super::*;
    use pollux_base::{Epoch, NodeId};

    const CLUSTER: ClusterId = ClusterId(7);

    fn both(epoch: u64) -> Register {
        Register { epoch: Epoch(epoch), alone: None }
    }
    fn alone(epoch: u64, node: u64) -> Register {
        Register { epoch: Epoch(epoch), alone: Some(NodeId(node)) }
    }

    fn registered(path: &Path) -> Registers {
        let mut registers = Registers::open(path).unwrap();
        assert_eq!(registers.swap(CLUSTER, None, both(1)).unwrap(), Swap::Swapped(both(1)));
        registers
    }

    #[test]
    fn one_side_wins_and_may_ask_again() {
        let folder = tempfile::tempdir().unwrap();
        let mut registers = registered(&folder.path().join("state"));
        let first = registers.swap(CLUSTER, Some(both(1)), alone(2, 1)).unwrap();
        assert_eq!(first, Swap::Swapped(alone(2, 1)));
        let again = registers.swap(CLUSTER, Some(both(1)), alone(2, 1)).unwrap();
        assert_eq!(again, Swap::Swapped(alone(2, 1)));
        let other = registers.swap(CLUSTER, Some(both(1)), alone(2, 2)).unwrap();
        assert_eq!(other, Swap::Holds(Some(alone(2, 1))));
    }

    #[test]
    fn a_swap_is_there_after_a_restart() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let mut registers = registered(&path);
        registers.swap(CLUSTER, Some(both(1)), alone(2, 1)).unwrap();
        drop(registers);
        assert_eq!(Registers::open(&path).unwrap().get(CLUSTER).unwrap(), Some(alone(2, 1)));
    }

    /// A lost state file must not let a side take a cluster that it can not prove to hold.
    #[test]
    fn an_unknown_cluster_is_not_made_by_a_swap() {
        let folder = tempfile::tempdir().unwrap();
        let mut registers = Registers::open(&folder.path().join("state")).unwrap();
        let swap = registers.swap(CLUSTER, Some(both(1)), alone(2, 1)).unwrap();
        assert_eq!(swap, Swap::Holds(None));
    }

    #[test]
    fn an_epoch_never_goes_back() {
        let folder = tempfile::tempdir().unwrap();
        let mut registers = registered(&folder.path().join("state"));
        registers.swap(CLUSTER, Some(both(1)), alone(5, 1)).unwrap();
        let refused = registers.swap(CLUSTER, Some(alone(5, 1)), both(4));
        assert!(matches!(refused, Err(RegisterError::EpochGoesBack { from: 5, to: 4 })));
    }

    #[test]
    fn a_damaged_file_is_refused_and_left_untouched() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        drop(registered(&path));
        let good = fs::read(&path).unwrap();
        let mut flipped = good.clone();
        *flipped.last_mut().unwrap() ^= 1;
        for bad in [flipped, good[..good.len() / 2].to_vec(), vec![], b"something else\n".to_vec(), vec![0xff; 64]] {
            fs::write(&path, &bad).unwrap();
            let refused = Registers::open(&path);
            assert!(matches!(refused, Err(RegisterError::Damaged { .. })), "{refused:?}");
            assert_eq!(fs::read(&path).unwrap(), bad);
        }
    }

    #[test]
    fn two_witnesses_never_share_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let _first = registered(&path);
        assert!(matches!(Registers::open(&path), Err(RegisterError::InUse(_))));
    }

    #[test]
    fn a_swap_that_can_not_be_written_changes_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("state");
        let mut registers = registered(&path);
        // A folder in the place of the temporary file: it can not be created.
        fs::create_dir(path.with_extension("new")).unwrap();
        let failed = registers.swap(CLUSTER, Some(both(1)), alone(2, 1));
        assert!(matches!(failed, Err(RegisterError::Io { .. })));
        assert_eq!(registers.get(CLUSTER).unwrap(), Some(both(1)));
        fs::remove_dir(path.with_extension("new")).unwrap();
        assert_eq!(registers.swap(CLUSTER, Some(both(1)), alone(2, 2)).unwrap(), Swap::Swapped(alone(2, 2)));
    }

    /// The form of the file is fixed: a newer program must read what an older one wrote.
    #[test]
    fn the_form_of_the_file_is_fixed() {
        let text = "pollux-witness 1 ";
        let bytes = encode(&BTreeMap::from([(CLUSTER, alone(2, 1))]));
        assert!(bytes.starts_with(text.as_bytes()));
        let body = &bytes[bytes.iter().position(|byte| *byte == b'\n').unwrap() + 1..];
        let expected = "{\n  \"00000000000000000000000000000007\": {\n    \"epoch\": 2,\n    \"alone\": 1\n  }\n}";
        assert_eq!(std::str::from_utf8(body).unwrap(), expected);
        assert_eq!(decode(&bytes).unwrap(), BTreeMap::from([(CLUSTER, alone(2, 1))]));
    }
}
