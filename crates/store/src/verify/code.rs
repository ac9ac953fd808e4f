//! The codes of findings: what is wrong, how bad it is, and what to do. They are a promise to scripts: a number keeps its
//! meaning for good. `docs/operating/pools.md` tells of each.

use serde::Serialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// Nothing is lost: of two copies one is gone, or something is to be known.
    Warning,
    /// Something is lost, or contradicts itself.
    Error,
}

macro_rules! codes {
    ($($name:ident = $code:literal, $severity:ident, $fix:literal;)*) => {
        /// What can be found.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Code { $($name),* }

        impl Code {
            pub const ALL: &[Code] = &[$(Code::$name),*];

            /// As it is printed.
            pub fn text(self) -> &'static str {
                match self { $(Code::$name => $code),* }
            }
            pub fn severity(self) -> Severity {
                match self { $(Code::$name => Severity::$severity),* }
            }
            /// What to do about it.
            pub fn fix(self) -> &'static str {
                match self { $(Code::$name => $fix),* }
            }
        }
    };
}

const _: () = assert!(Code::ALL.len() == 29);

codes! {
    SuperblockCopy = "V001", Warning, "nothing: the next start of blockd writes it anew; replace the disk if it comes back";
    Superblock = "V002", Error, "make sure that this is the right disk; if it is, the pool is lost with it: make it anew, and its replicas are copied from the other servers";
    SuperblocksDiffer = "V003", Error, "something wrote an old copy over a part of the disk: do not use it; make the pool anew, and its replicas are copied from the other servers";
    Size = "V004", Error, "give the disk or file the size that it had; what lay beyond its end is lost";
    AnchorCopy = "V010", Warning, "nothing: a crash can leave it so, and the next start writes it anew; replace the disk if it comes back";
    Anchor = "V011", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew";
    CatalogCopy = "V020", Warning, "nothing: a crash can leave it so, and the next start writes it anew; replace the disk if it comes back";
    Catalog = "V021", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew";
    TableCopy = "V030", Warning, "nothing: a crash can leave it so, and the next start writes it anew; replace the disk if it comes back";
    Table = "V031", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew";
    Journal = "V040", Error, "the disk lost what it had promised to keep, and blockd refuses this pool: replace the disk, make the pool anew";
    JournalSlot = "V041", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew, and report a bug";
    ExtentBeyond = "V050", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew, and report a bug";
    ExtentTwice = "V051", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew, and report a bug";
    UnitTwice = "V052", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew, and report a bug";
    LeafTwice = "V053", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew, and report a bug";
    SpaceLeaked = "V054", Warning, "nothing is lost but space; report a bug";
    VolumeWithoutLayer = "V060", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew, and report a bug";
    LayerChain = "V061", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew, and report a bug";
    Marks = "V062", Error, "blockd refuses this pool: save what no other server has with `pollux pool rescue`, then make it anew, and report a bug";
    Leaf = "V070", Error, "`pollux volume scrub` copies these blocks from another server";
    Placeless = "V071", Error, "`pollux volume scrub` copies these blocks from another server; report a bug";
    ChecksumLost = "V072", Error, "`pollux volume scrub` copies these blocks from another server";
    Data = "V080", Error, "`pollux volume scrub` copies these blocks from another server; replace the disk if there are more each time";
    DataUnreadable = "V081", Error, "`pollux volume scrub` copies these blocks from another server; replace the disk";
    DiskMissing = "V090", Error, "attach it, or name it too";
    DiskForeign = "V091", Error, "leave it out: it is a copy of another disk, of another pool, or no longer a part of this one";
    DiskOld = "V092", Error, "put the real disk back: this is its image of an earlier day";
    ColumnTwice = "V093", Warning, "nothing: it was on its way from one to the other, and the next start finishes that";
}
