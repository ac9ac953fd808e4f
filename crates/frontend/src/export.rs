//! What is offered, and where.

use pollux_base::{ByteCount, VolumeId};
use std::collections::BTreeMap;

/// A volume offered under a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Export {
    pub volume: VolumeId,
    /// A multiple of a block.
    pub size: ByteCount,
    /// Changes are refused, and clients told so in the handshake.
    pub is_read_only: bool,
    pub place: Place,
}

/// Where clients are taken for an export. Only one node at a time takes them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    Here,
    /// Nothing speaks against this node, but it may not take clients yet: they wait a little in their handshake, because
    /// a client that is refused comes back only after a pause of its own, and a longer one each time.
    Soon,
    /// Text for a human: who serves it, and at which address, as far as known.
    Elsewhere(String),
}

/// All exports by name.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Exports {
    names: BTreeMap<String, Export>,
    /// Whether a name that is not here is known not to exist. Just after a start nothing is known yet.
    is_complete: bool,
}

/// What is known of a name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found<'a> {
    Here(&'a Export),
    /// Worth waiting for; the text is for a client that has waited long enough.
    Soon(String),
    No(String),
}

impl Exports {
    /// These, and no others.
    pub fn complete(names: BTreeMap<String, Export>) -> Exports {
        Exports { names, is_complete: true }
    }

    pub fn find(&self, name: &str) -> Found<'_> {
        match self.names.get(name) {
            Some(export) => match &export.place {
                Place::Here => Found::Here(export),
                Place::Soon => Found::Soon(format!("export `{name}` is not served yet")),
                Place::Elsewhere(hint) => Found::No(format!("export `{name}` is not served by this node: {hint}")),
            },
            None if self.is_complete => Found::No(format!("no export is named `{name}`")),
            None => Found::Soon(format!("this node has not been told yet whether there is an export `{name}`")),
        }
    }

    /// Names for which clients are taken here.
    pub fn here(&self) -> impl Iterator<Item = &str> {
        self.names.iter().filter(|(_, export)| export.place == Place::Here).map(|(name, _)| name.as_str())
    }
}
