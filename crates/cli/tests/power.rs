//! A power cut leaves nothing behind: neither what runs nor what is just being started. Needs root and control groups
//! version 2; where they are missing a lab is refused, so there is nothing to promise.

use pollux_cli::lab::{cgroup, network, process};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

/// A control group of this test's own, removed with everything in it.
struct Group(PathBuf);

impl Group {
    fn new(name: &str) -> Option<Group> {
        let path = cgroup::mount_point().ok()?.join(format!("pollux-test-{name}-{}", std::process::id()));
        cgroup::create(&path.join("daemons")).ok()?;
        Some(Group(path))
    }
    fn start(&self, script: &str) -> Child {
        Command::new(env!("CARGO_BIN_EXE_pollux"))
            .args(["lab", "exec", "--cgroup"])
            .arg(self.0.join("daemons"))
            .args(["--", "sh", "-c", script])
            .stdout(Stdio::null())
            .spawn()
            .expect("pollux runs")
    }
    fn wait_for_processes(&self, count: usize) {
        // Bounded by the test runner; a machine that never starts them fails there.
        while cgroup::processes_below(&self.0).len() < count {
            std::thread::yield_now();
        }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        let _ = cgroup::clear(&self.0);
        let _ = cgroup::remove(&self.0);
    }
}

#[test]
fn a_power_cut_ends_everything_of_a_node_also_what_is_being_forked() {
    let Some(group) = Group::new("cut") else { return };
    let mut quiet = group.start("sleep 1000 & sleep 1000");
    let mut busy = group.start("while :; do sleep 1000 & sleep 0.001; done");
    group.wait_for_processes(20);
    cgroup::clear(&group.0).expect("everything ends");
    assert!(cgroup::is_empty(&group.0) && cgroup::processes_below(&group.0).is_empty());
    for child in [&mut quiet, &mut busy] {
        assert!(!child.wait().expect("it ended").success());
    }
    cgroup::clear(&group.0).expect("a second cut of the same power is no error");
}

#[test]
fn a_program_is_in_its_nodes_group_from_its_first_instruction() {
    let Some(group) = Group::new("first") else { return };
    let mut child = group.start("grep -q pollux-test-first /proc/self/cgroup");
    assert!(child.wait().expect("it ends").success());
}

#[test]
fn what_can_not_be_entered_is_told_and_nothing_is_run() {
    if cgroup::mount_point().is_err() || network::namespace_file("plx-none").exists() {
        return;
    }
    let failure = process::exec(&PathBuf::from("/nonexistent/group"), None, &["true".into()]);
    assert!(failure.error.contains("/nonexistent/group"), "{failure}");
}
