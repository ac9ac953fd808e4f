//! What is measured: the rows of the table.

/// One kind of load.
#[derive(Clone, Copy)]
pub struct Work {
    pub name: &'static str,
    pub is_write: bool,
    pub is_random: bool,
    pub block_bytes: usize,
    /// Requests under way.
    pub depth: usize,
    /// Each write is followed by a flush, and counts when that is done.
    pub flushes_each: bool,
    /// The part of the volume that is touched.
    pub span_bytes: u64,
}

impl Work {
    const fn random(name: &'static str, is_write: bool, depth: usize) -> Work {
        Work { name, is_write, is_random: true, block_bytes: 4096, depth, flushes_each: false, span_bytes: 0 }
    }

    const fn stream(name: &'static str, is_write: bool) -> Work {
        let block_bytes = 1 << 20;
        Work { name, is_write, is_random: false, block_bytes, depth: 4, flushes_each: false, span_bytes: 0 }
    }

    /// The same on so many bytes of the volume.
    pub fn on(self, span_bytes: u64) -> Work {
        Work { span_bytes, ..self }
    }

    pub fn is_stream(&self) -> bool {
        self.block_bytes > 4096
    }
}

pub const STEADY_WRITE: Work = Work::random("4k randwrite qd32", true, 32);
/// Touches every block once, so that nothing is measured on space that was never written.
pub const FILL: Work = Work::stream("fill", true);

/// A write that is flushed, and all before it.
pub const ONE_FLUSH: Work = Work { flushes_each: true, ..Work::random("4k randwrite qd1 flush each", true, 1) };

/// What is done at every server, side by side.
pub const COMPARED: [Work; 7] = [
    STEADY_WRITE,
    Work::random("4k randwrite qd1", true, 1),
    ONE_FLUSH,
    Work::random("4k randread qd32", false, 32),
    Work::random("4k randread qd1", false, 1),
    Work::stream("1m write qd4", true),
    Work::stream("1m read qd4", false),
];
