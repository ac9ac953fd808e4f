//! Takeovers as anyone can read them: each file in `transcripts/` is a script, a line `---`, and what the nodes did. Lines
//! are seconds since the begin or the last `from here`, node, and act. `UPDATE_TRANSCRIPTS=1` writes the second half anew; the change is
//! then reviewed as text.

#![allow(clippy::disallowed_methods, clippy::disallowed_types)]

mod world;

use pollux_base::NodeId;
use pollux_cluster::Input;
use std::path::Path;
use std::time::Duration;
use world::{A, B, World};

fn node(word: &str) -> NodeId {
    match word {
        "a" => A,
        "b" => B,
        other => panic!("`{other}` is no node"),
    }
}

fn play(script: &str) -> String {
    let mut world = World::with_vm(true, true, A);
    let mut trace = String::new();
    for line in script.lines().filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["no", "power", "switch"] => world = World::with_vm(true, false, A),
            ["crash", name] => world.crash(node(name)),
            ["boot", name] => world.boot(node(name)),
            ["restart", "noded", name] => {
                world.stop_noded(node(name));
                world.start_noded(node(name));
            }
            ["cut"] => world.cut = true,
            ["heal"] => world.cut = false,
            ["cut", "witness", name] => drop(world.witness_cut.insert(node(name))),
            ["heal", "witness", name] => drop(world.witness_cut.remove(&node(name))),
            ["wait", seconds] => world.run(Duration::from_secs(seconds.parse().expect("seconds"))),
            ["until", "web1", "on", name] => {
                let name = node(name);
                world.run_until(line, |world| world.runs_on("web1") == Some(name));
                world.run(Duration::from_millis(500));
            }
            ["until", "settled"] => world.run_until(line, World::is_settled),
            ["confirm", name, "down", "at", by] => {
                let (name, by) = (node(name), node(by));
                let token = world.core(by).confirm_token(name).expect("a token");
                world.give(by, Input::ConfirmDown { request: 1_000_000, node: name, token });
            }
            ["headline", name] => {
                let text = world.core(node(name)).headline().text;
                world.trace.push(format!("        {name}: \"{text}\""));
            }
            ["from", "here"] => {
                trace += &(world.trace.join("\n") + "\n\n");
                world.forget();
            }
            other => panic!("not understood: {other:?}"),
        }
    }
    trace + &world.trace.join("\n") + "\n"
}

#[test]
fn takeovers_go_as_written() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/transcripts");
    let mut paths: Vec<_> =
        std::fs::read_dir(&folder).expect("the folder").map(|entry| entry.expect("an entry").path()).collect();
    paths.sort();
    assert!(paths.len() >= 6, "transcripts are missing");
    for path in paths {
        let text = std::fs::read_to_string(&path).expect("readable");
        let (script, expected) = text.split_once("---\n").expect("a line of three dashes");
        let trace = play(script);
        if std::env::var_os("UPDATE_TRANSCRIPTS").is_some() {
            std::fs::write(&path, format!("{script}---\n{trace}")).expect("writable");
        } else {
            assert_eq!(trace, expected, "{} went otherwise", path.display());
        }
    }
}
