//! Pools of several disks, as files: made, used, and refused when they are not what they were.

mod site;

use pollux_base::Report;
use pollux_base::order::Order;
use site::{Outcome, Site, exports, group, qemu_io};
use std::process::Output;

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_pool_of_three_disks_is_made_used_and_missed() -> Outcome {
    let mut site = Site::new()?;
    let config = site.configs.get_mut(&1).expect("there is node 1");
    let more = ["second", "third"].map(|name| config.pool.path.with_file_name(name));
    config.pool.more = more.to_vec();
    assert!(site.blockd(1, &["format", "--size", "256M"])?.status.success());
    let checked = site.blockd(1, &["check"])?;
    assert!(checked.status.success(), "{}", errors(&checked));
    let again = site.blockd(1, &["format"])?;
    assert_eq!(again.status.code(), Some(5), "{}", errors(&again));

    let mut node = site.start(1)?;
    node.order(&group(1, 1, &[1]))?;
    node.order(&exports())?;
    node.wait_until_serving(1)?;
    // Extents of 4 MiB, so on each disk.
    qemu_io(&node.uri(), &["write -P 7 0 24M", "flush", "write -P 9 8190k 8k", "read -P 9 8190k 8k"])?;
    assert_eq!(node.terminate()?, Some(0));
    let used = |path: &std::path::Path| -> std::io::Result<u64> {
        use std::os::unix::fs::MetadataExt;
        Ok(std::fs::metadata(path)?.blocks() * 512)
    };
    for path in site.configs[&1].pool.disks() {
        assert!(used(path)? > 12 << 20, "{}: {} bytes", path.display(), used(path)?);
    }
    let mut node = site.start(1)?;
    node.order(&group(1, 1, &[1]))?;
    node.order(&exports())?;
    node.wait_until_serving(1)?;
    qemu_io(&node.uri(), &["read -P 7 0 8190k", "read -P 9 8190k 8k", "read -P 7 8198k 8M"])?;
    assert_eq!(node.terminate()?, Some(0));

    // One is gone: nothing is made up in its place.
    let away = more[1].with_file_name("away");
    std::fs::rename(&more[1], &away)?;
    let output = site.blockd(1, &["check"])?;
    assert_eq!(output.status.code(), Some(5), "{}", errors(&output));
    assert!(errors(&output).contains("is missing") && errors(&output).contains("third"), "{}", errors(&output));
    let mut node = site.start(1)?;
    node.order(&Order::ReportAll)?;
    node.wait_for("a pool that failed", |report| matches!(report, Report::PoolFailed { .. }))?;
    assert_eq!(node.terminate()?, Some(0));

    // A copy of another disk is not it.
    std::fs::copy(&more[0], &more[1])?;
    let output = site.blockd(1, &["check"])?;
    assert!(errors(&output).contains("one of them is a copy"), "{}", errors(&output));
    std::fs::remove_file(&more[1])?;

    // An image of it from an earlier day is not either.
    std::fs::rename(&away, &more[1])?;
    std::fs::copy(&more[1], &away)?;
    for _ in 0..2 {
        assert!(site.blockd(1, &["check"])?.status.success());
    }
    std::fs::copy(&away, &more[1])?;
    let output = site.blockd(1, &["check"])?;
    assert_eq!(output.status.code(), Some(5));
    assert!(errors(&output).contains("image of an earlier day"), "{}", errors(&output));
    Ok(())
}
