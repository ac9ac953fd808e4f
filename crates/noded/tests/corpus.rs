//! No input that a fuzzer ever found breaks a promise again.

#[path = "../../../fuzz/replay.rs"]
mod replay;

#[test]
fn every_input_of_the_corpus_finds_the_parsers_at_peace() {
    replay::all(pollux_noded::fuzz::TARGETS);
}
