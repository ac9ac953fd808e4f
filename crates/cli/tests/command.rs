//! The command as a shell sees it: exit codes, two-line errors, nothing on standard output that is not an answer.

use std::process::{Command, Output};

fn pollux(words: &[&str]) -> Output {
    let home = tempfile::tempdir().expect("a directory");
    Command::new(env!("CARGO_BIN_EXE_pollux"))
        .args(words)
        .env_clear()
        .env("HOME", home.path())
        .stdin(std::process::Stdio::null())
        .output()
        .expect("pollux runs")
}

fn fails(words: &[&str], code: i32, says: &str) {
    let output = pollux(words);
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert_eq!(output.status.code(), Some(code), "{words:?}: {stderr}");
    assert!(output.stdout.is_empty(), "{words:?} printed an answer");
    assert!(stderr.contains(says), "{words:?}: {stderr}");
    let lines: Vec<&str> = stderr.lines().filter(|line| !line.starts_with("task ")).collect();
    assert!(lines[0].starts_with("Error: ") && lines.len() <= 2, "{words:?}: {stderr}");
    assert!(lines.len() < 2 || lines[1].starts_with("Hint: "), "{words:?}: {stderr}");
}

/// A context that leads nowhere: nothing listens on that port of loopback, or whatever does speaks no TLS.
const NOWHERE: [&str; 6] = ["--server", "https://127.0.0.1:1", "--ca", "CA", "--token-file", "TOKEN"];

fn with_context(words: &[&str], then: impl FnOnce(&[&str])) {
    let dir = tempfile::tempdir().expect("a directory");
    let (ca, token) = (dir.path().join("ca.pem"), dir.path().join("token"));
    let key = rcgen::generate_simple_self_signed(vec!["a".to_string()]).expect("a certificate");
    std::fs::write(&ca, key.cert.pem()).expect("write");
    std::fs::write(&token, "secret\n").expect("write");
    let mut all: Vec<String> = NOWHERE.map(String::from).to_vec();
    all[3] = ca.display().to_string();
    all[5] = token.display().to_string();
    all.extend(words.iter().map(|word| word.to_string()));
    let all: Vec<&str> = all.iter().map(String::as_str).collect();
    then(&all);
}

#[test]
fn what_makes_no_sense_is_a_usage_error_with_a_hint() {
    fails(&["volume", "create", "v", "--size", "10 apples"], 2, "such as 10G");
    fails(&["volume", "create", "v", "--size", "0"], 2, "more than zero");
    fails(&["volume", "create", "v", "--size", "9999999T"], 2, "largest size");
    fails(&["vm", "create", "web1", "--disk", "1G", "--cpus", "0"], 2, "cpus");
    fails(&["vm", "create", "web1"], 2, "--disk");
    fails(&["vm", "explode"], 2, "explode");
    fails(&["lab", "up", "--nodes", "1"], 2, "nodes");
    fails(&["-o", "xml", "status"], 2, "xml");
    fails(&["vm", "delete", "web1", "--watch"], 2, "--watch");
}

#[test]
fn without_knowing_the_cluster_or_its_keys_nothing_is_tried() {
    // A lab on this machine would be found.
    if pollux_cli::context::lab_context_file().exists() {
        return;
    }
    fails(&["status"], 2, "which cluster is meant");
    fails(
        &["--server", "https://127.0.0.1:1", "--ca", "/nonexistent", "--token-file", "/nonexistent", "status"],
        2,
        "/nonexistent",
    );
}

#[test]
fn a_cluster_that_is_not_reached_is_a_time_out_and_named() {
    with_context(&["status"], |words| fails(words, 6, "127.0.0.1:1"));
    with_context(&["-o", "json", "vm", "list"], |words| fails(words, 6, "127.0.0.1:1"));
}

#[test]
fn destructive_verbs_do_nothing_without_a_terminal_and_without_yes() {
    with_context(&["vm", "delete", "web1"], |words| fails(words, 2, "--yes"));
    with_context(&["vm", "stop", "web1"], |words| fails(words, 2, "--yes"));
    with_context(&["volume", "delete", "v"], |words| fails(words, 2, "--yes"));
    with_context(&["image", "delete", "i"], |words| fails(words, 2, "--yes"));
    with_context(&["api", "DELETE", "/v1/vms/web1"], |words| fails(words, 2, "--yes"));
    // Confirmed, it gets as far as the cluster.
    with_context(&["vm", "delete", "web1", "--yes"], |words| fails(words, 6, "127.0.0.1:1"));
}

#[test]
fn an_image_that_can_not_be_one_is_refused_before_anything_is_sent() {
    with_context(&["image", "import", "/nonexistent.qcow2"], |words| fails(words, 2, "/nonexistent.qcow2"));
    with_context(&["image", "import", "/"], |words| fails(words, 2, "--name"));
    with_context(&["image", "import", "/", "--name", "x"], |words| fails(words, 2, "a directory"));
    with_context(&["image", "import", "/dev/null", "--name", "x"], |words| fails(words, 6, "127.0.0.1:1"));
}

#[test]
fn help_and_version_are_answers() {
    for words in [&["--help"][..], &["vm", "--help"], &["lab", "up", "--help"], &["--version"]] {
        let output = pollux(words);
        assert!(output.status.success() && !output.stdout.is_empty(), "{words:?}");
    }
}
