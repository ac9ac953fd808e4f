//! `blockd verify`, `rescue` and `take-old-image` on real files.

mod site;

use pollux_base::Report;
use pollux_base::order::Order;
use pollux_base::record::GroupNames;
use site::{GROUP, Outcome, Site, VOLUME, exports, group, qemu_io, rot};
use std::process::Output;

fn said(output: &Output) -> String {
    format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr))
}

/// A pool that was written to and is not in use.
fn used(site: &mut Site, value: u8) -> Outcome {
    let mut node = site.start(1)?;
    node.order(&group(1, 1, &[1]))?;
    let names = GroupNames {
        owner: "web1".into(),
        volumes: [(VOLUME, "vm/web1/disk0".into())].into(),
        ..GroupNames::default()
    };
    node.order(&Order::Names { group: GROUP, names })?;
    node.order(&exports())?;
    node.wait_until_serving(1)?;
    qemu_io(&node.uri(), &[&format!("write -P {value} 0 1M"), &format!("write -P {value} 4M 64k"), "flush"])?;
    assert_eq!(node.terminate()?, Some(0));
    Ok(())
}

#[test]
fn a_pool_is_verified_and_its_volumes_are_rescued_without_being_touched() -> Outcome {
    let mut site = Site::new()?;
    assert!(site.blockd(1, &["format", "--size", "128M"])?.status.success());
    used(&mut site, 7)?;
    let pool = site.configs[&1].pool.path.clone();
    let before = std::fs::read(&pool)?;

    let clean = site.blockd(1, &["verify", "--data"])?;
    assert_eq!((clean.status.code(), said(&clean).contains("clean")), (Some(0), true), "{}", said(&clean));
    let path = pool.display().to_string();
    let listed = site.blockd(1, &["rescue", &path])?;
    assert!(listed.status.success() && said(&listed).contains("v7 `vm/web1/disk0`: 64 MiB"), "{}", said(&listed));
    assert!(said(&listed).contains("group g1 `web1`: in sync"), "{}", said(&listed));
    let to = pool.with_file_name("rescued");
    let to_text = to.display().to_string();
    let exported = site.blockd(1, &["rescue", "--export", "vm/web1/disk0", "--to", &to_text])?;
    assert!(exported.status.success(), "{}", said(&exported));
    let content = std::fs::read(&to)?;
    assert!(
        content[..1 << 20].iter().all(|byte| *byte == 7) && content[1 << 20..4 << 20].iter().all(|byte| *byte == 0)
    );
    assert!(content[4 << 20..(4 << 20) + 65536].iter().all(|byte| *byte == 7));
    // Over what is there nothing is written.
    let again = site.blockd(1, &["rescue", "--export", "v7", "--to", &to_text])?;
    assert_eq!(again.status.code(), Some(2), "{}", said(&again));
    assert!(std::fs::read(&pool)? == before, "the disk is as it was");

    // One superblock is damaged: a warning. Both anchors: it is refused, and its content can be had.
    rot(&pool, 100)?;
    let warned = site.blockd(1, &["verify", "--json"])?;
    let json: serde_json::Value = serde_json::from_slice(&warned.stdout)?;
    assert_eq!((warned.status.code(), &json["findings"][0]["code"]), (Some(1), &"V001".into()), "{json}");
    for anchor in [4096, (1 << 20) + 4096] {
        rot(&pool, anchor + 100)?;
    }
    assert_eq!(site.blockd(1, &["check"])?.status.code(), Some(5));
    let found = site.blockd(1, &["verify"])?;
    assert!(found.status.code() == Some(1) && said(&found).contains("V011  error"), "{}", said(&found));
    std::fs::remove_file(&to)?;
    assert!(site.blockd(1, &["rescue", "--export", "7", "--to", &to_text])?.status.success());
    assert!(std::fs::read(&to)? == content);

    let unknown = site.blockd(1, &["rescue", "--export", "web2", "--to", &to_text])?;
    assert!(unknown.status.code() == Some(2) && said(&unknown).contains("no volume `web2`"), "{}", said(&unknown));
    let missing = site.blockd(1, &["verify", "/nowhere"])?;
    assert_eq!(missing.status.code(), Some(2), "{}", said(&missing));
    Ok(())
}

#[test]
fn a_pool_in_use_is_not_looked_at_from_outside() -> Outcome {
    let site = Site::new()?;
    assert!(site.blockd(1, &["format", "--size", "128M"])?.status.success());
    let mut node = site.start(1)?;
    node.order(&group(1, 1, &[1]))?;
    node.wait_until_serving(1)?;
    let refused = site.blockd(1, &["verify"])?;
    assert!(refused.status.code() == Some(2) && said(&refused).contains("is in use"), "{}", said(&refused));
    assert_eq!(node.terminate()?, Some(0));
    Ok(())
}

#[test]
fn an_image_of_the_whole_pool_is_refused_until_a_human_takes_it() -> Outcome {
    let mut site = Site::new()?;
    assert!(site.blockd(1, &["format", "--size", "128M"])?.status.success());
    used(&mut site, 1)?;
    let pool = site.configs[&1].pool.path.clone();
    let image = pool.with_file_name("image");
    std::fs::copy(&pool, &image)?;
    used(&mut site, 2)?;
    std::fs::copy(&image, &pool)?;

    let refused = site.blockd(1, &["check"])?;
    assert_eq!(refused.status.code(), Some(5), "{}", said(&refused));
    assert!(said(&refused).contains("image of an earlier day") && said(&refused).contains("take-old-image"));
    // As often as it is started.
    for _ in 0..3 {
        let mut node = site.start(1)?;
        node.order(&Order::ReportAll)?;
        node.wait_for("a pool that failed", |report| matches!(report, Report::PoolFailed { .. }))?;
        assert_eq!(node.terminate()?, Some(0));
    }
    assert!(std::fs::read(&pool)? == std::fs::read(&image)?, "it was not touched");

    let id = site.configs[&1].pool.pool.to_string();
    let other = site.blockd(1, &["take-old-image", "00000000000000000000000000000001"])?;
    assert_eq!(other.status.code(), Some(5), "{}", said(&other));
    let taken = site.blockd(1, &["take-old-image", &id])?;
    assert!(taken.status.success(), "{}", said(&taken));
    assert!(site.blockd(1, &["check"])?.status.success());
    let listed = site.blockd(1, &["rescue"])?;
    assert!(said(&listed).contains("never in sync"), "{}", said(&listed));
    Ok(())
}
