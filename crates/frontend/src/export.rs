//! What is offered, and where.

use pollux_base::{ByteCount, VolumeId};
use std::collections::BTreeMap;

/// A volume offered under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    pub volume: VolumeId,
    /// A multiple of a block.
    pub size: ByteCount,
    pub place: Place,
}

/// Where clients are taken for an export. Only one node at a time takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Here,
    /// Text for a human: who serves it, and at which address, as far as known.
    Elsewhere(String),
}

/// All exports by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exports {
    names: BTreeMap<String, Export>,
}

impl Exports {
    pub fn new(names: BTreeMap<String, Export>) -> Exports {
        Exports { names }
    }

    /// The export of this name, if clients are taken here; else a text for a human that says why not.
    pub fn find(&self, name: &str) -> Result<&Export, String> {
        match self.names.get(name) {
            None => Err(format!("no export is named `{name}`")),
            Some(export) => match &export.place {
                Place::Here => Ok(export),
                Place::Elsewhere(hint) => Err(format!("export `{name}` is not served by this node: {hint}")),
            },
        }
    }

    /// Names for which clients are taken here.
    pub fn here(&self) -> impl Iterator<Item = &str> {
        self.names.iter().filter(|(_, export)| export.place == Place::Here).map(|(name, _)| name.as_str())
    }
}
