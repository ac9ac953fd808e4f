//! The format on disk does not change by accident: pools of earlier days open, and formatting gives the same bytes.
//!
//! A fixture lists what is not zero, 32 bytes a line: offset on the disk and bytes, both hexadecimal. With POLLUX_BLESS
//! set the fixtures are written anew; that is right only together with a new format version.

mod common;

use common::*;
use pollux_base::{Data, GroupId, VolumeId};
use pollux_store::StoreOp;
use pollux_store::faulty_disk::FaultyDisk;
use std::fmt::Write;

const ROW: usize = 32;

fn to_text(disk: &FaultyDisk) -> String {
    let mut text = String::new();
    for (number, block) in disk.blocks() {
        for (row, bytes) in block.chunks_exact(ROW).enumerate().filter(|(_, bytes)| bytes.iter().any(|b| *b != 0)) {
            write!(text, "{:08x} ", number as usize * BLOCK + row * ROW).expect("a string takes all");
            bytes.iter().for_each(|byte| write!(text, "{byte:02x}").expect("a string takes all"));
            text.push('\n');
        }
    }
    text
}

fn from_text(text: &str) -> FaultyDisk {
    let mut disk = FaultyDisk::new(SIZE, 1);
    for line in text.lines() {
        let (offset, bytes) = line.split_once(' ').expect("offset and bytes");
        let offset = u64::from_str_radix(offset, 16).expect("a hexadecimal offset");
        let start = offset - offset % BLOCK as u64;
        let mut block = disk.read_now(start, BLOCK);
        for (at, pair) in bytes.as_bytes().chunks_exact(2).enumerate() {
            let pair = std::str::from_utf8(pair).expect("hexadecimal digits");
            block[(offset - start) as usize + at] = u8::from_str_radix(pair, 16).expect("hexadecimal digits");
        }
        disk.write_now(start, &block);
    }
    disk
}

#[allow(clippy::disallowed_methods)]
fn fixture(name: &str, make: impl FnOnce() -> FaultyDisk) -> String {
    let path = format!("{}/tests/fixtures/{name}.txt", env!("CARGO_MANIFEST_DIR"));
    if std::env::var_os("POLLUX_BLESS").is_some() {
        std::fs::write(&path, to_text(&make())).expect("the fixture can be written");
    }
    std::fs::read_to_string(&path).expect("the fixture is there")
}

/// A block that is easy on the eye: a number, then zeros.
fn numbered(numbers: &[u8]) -> Data {
    let block = |number: &u8| std::iter::once(*number).chain(std::iter::repeat_n(0, BLOCK - 1));
    Data::copy_of(&numbers.iter().flat_map(block).collect::<Vec<u8>>())
}

/// Every kind of block and of record that version 5 knows, mid-flight: the process died.
fn version_5() -> FaultyDisk {
    let mut rig = Rig::fresh();
    rig.done(StoreOp::PutNote { group: GROUP, note: Some(b"stamp".to_vec()) });
    rig.done(StoreOp::Create { volume: VolumeId(2), group: GroupId(2), size: pollux_base::ByteCount(8 << 20) });
    rig.heat(&[0, 1, 2], 3);
    rig.done(write_op(VOLUME, 0, numbered(&[1, 2, 3, 4])));
    rig.done(write_op(VOLUME, 1024, numbered(&[5, 6, 7])));
    rig.done(write_op(VOLUME, 2048, numbered(&[8])));
    rig.zero(2048, 1024);
    rig.cool(&[0, 2]);
    rig.zero(1025, 1);
    // A crash, so that masks are restated.
    rig.disk.kill(1);
    let mut rig = rig.reopen();
    rig.heat(&[0, 3], 4);
    rig.done(write_op(VOLUME, 1, numbered(&[9])));
    rig.done(write_op(VOLUME, 1023, numbered(&[10])));
    rig.done(write_op(VOLUME, 3072, numbered(&[11])));
    rig.disk
}

#[test]
fn formatting_gives_the_bytes_it_always_gave() {
    assert_eq!(fixture("formatted-v5", formatted), to_text(&formatted()));
}

#[test]
fn a_formatted_pool_of_version_5_opens() {
    let disk = from_text(&fixture("formatted-v5", formatted));
    let rig = Rig::open(disk).expect("it opens");
    assert_eq!((rig.store.volumes().count(), rig.store.free().0), (0, 12 << 22));
}

#[test]
fn a_pool_of_version_5_in_the_middle_of_its_life_opens_with_all_it_held() {
    let disk = from_text(&fixture("used-v5", version_5));
    let mut rig = Rig::open(disk).expect("it opens");
    let volumes: Vec<_> = rig.store.volumes().map(|(volume, group, size)| (volume.0, group.0, size.0)).collect();
    assert_eq!(volumes, [(1, 1, 32 << 20), (2, 2, 8 << 20)]);
    assert_eq!(rig.store.notes().collect::<Vec<_>>(), [(GROUP, &b"stamp"[..])]);
    assert_eq!(rig.store.hot(VOLUME), [x(0), x(1), x(3)]);
    assert_eq!(rig.store.allocated(VOLUME), [x(0), x(1), x(2), x(3)]);
    assert_eq!(rig.store.changed_since(VOLUME, gen_(2)), [x(0), x(1), x(2), x(3)]);
    let mut first_bytes = |start, count| match rig.read_of(VOLUME, start, count) {
        Ok(pollux_store::StoreReply::Read { data, .. }) => {
            data.as_slice().chunks_exact(BLOCK).map(|block| block[0]).collect::<Vec<u8>>()
        }
        other => panic!("{other:?}"),
    };
    assert_eq!(first_bytes(0, 5), [1, 9, 3, 4, 0]);
    assert_eq!(first_bytes(1022, 6), [0, 10, 5, 0, 7, 0]);
    assert_eq!(first_bytes(2048, 2), [0, 0]);
    assert_eq!(first_bytes(3071, 3), [0, 11, 0]);
}
