//! Faults that Pollux does not promise to survive, put in on purpose: a simulator that does not notice them would not
//! notice a bug either. They sit at the seams of the world (what is carried, what is answered), never inside a core.

use pollux_replica::wire::{Frame, Message};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sabotage {
    /// A write is acknowledged to the guest before any replica has it.
    AckEarly,
    /// Disks say that they flushed, and did not.
    DiskLies,
    /// A replica that joins does not tell which of its extents may differ.
    CandidatesForgotten,
    /// Blocks that differ are not reported.
    DifferencesIgnored,
    /// A replica that finds bad blocks in a scrub does not say so.
    ScrubIsBlind,
    /// A takeover does not wait for the end of the lease, as if the old primary were proven dead.
    LeaseIgnored,
    /// The witness says yes to everybody.
    WitnessGrantsBoth,
    /// The guard's signals reach nobody.
    GuardDoesNotKill,
    /// What follows to a trailing replica arrives as zeros now and then.
    TrailForgets,
    /// A replica that is asked for a snapshot says that it has it, and does not.
    SnapshotSkipped,
    /// Data planes are not told that a volume is encrypted.
    KeysForgotten,
}

pub const ALL: [Sabotage; 11] = [
    Sabotage::AckEarly,
    Sabotage::DiskLies,
    Sabotage::CandidatesForgotten,
    Sabotage::DifferencesIgnored,
    Sabotage::ScrubIsBlind,
    Sabotage::LeaseIgnored,
    Sabotage::WitnessGrantsBoth,
    Sabotage::GuardDoesNotKill,
    Sabotage::TrailForgets,
    Sabotage::SnapshotSkipped,
    Sabotage::KeysForgotten,
];

impl Sabotage {
    /// Changes a frame on its way.
    pub fn alter(self, frame: &mut Frame) {
        match self {
            Sabotage::CandidatesForgotten => {
                if let Message::Join { extents, .. } = &mut frame.message {
                    extents.clear();
                }
            }
            Sabotage::DifferencesIgnored => {
                if let Message::Differs { runs, .. } = &mut frame.message {
                    runs.clear();
                }
            }
            Sabotage::ScrubIsBlind => {
                if let Message::Verified { bad, .. } = &mut frame.message {
                    bad.clear();
                }
            }
            Sabotage::TrailForgets => {
                if let Message::Trail { point, .. } = &frame.message
                    && point.position % 7 == 3
                {
                    frame.data = None;
                    frame.checksums.clear();
                }
            }
            Sabotage::SnapshotSkipped => {
                if let Message::Snapshot { group, stamp, sequence, .. } = frame.message {
                    frame.message = Message::Flush { group, stamp, sequence };
                }
            }
            Sabotage::AckEarly
            | Sabotage::DiskLies
            | Sabotage::LeaseIgnored
            | Sabotage::WitnessGrantsBoth
            | Sabotage::KeysForgotten
            | Sabotage::GuardDoesNotKill => {}
        }
    }
}
