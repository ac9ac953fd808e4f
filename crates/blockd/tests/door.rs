//! What `blockd` says to wrong use and to strangers: clear words and exit codes, nothing lost, no panic.

mod site;

use pollux_base::Report;
use pollux_base::{ClusterId, Order};
use site::{Node, Outcome, PATIENCE, Site, exports, group, qemu_io};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::process::Output;

fn errors(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[test]
fn a_pool_is_not_formatted_over_what_is_there() -> Outcome {
    let site = Site::new()?;
    let output = site.blockd(1, &["format"])?;
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("--size"), "{}", errors(&output));
    for (size, code) in [("0", 2), ("1", 2), ("99999999999T", 2), ("much", 2)] {
        let output = site.blockd(1, &["format", "--size", size])?;
        assert_eq!(output.status.code(), Some(code), "{size}: {}", errors(&output));
        assert!(!site.configs[&1].pool.path.exists(), "a refused size leaves nothing behind");
    }
    assert!(site.blockd(1, &["format", "--size", "512M"])?.status.success());
    assert!(site.blockd(1, &["check"])?.status.success());
    let before = std::fs::read(&site.configs[&1].pool.path)?;
    let output = site.blockd(1, &["format"])?;
    assert_eq!(output.status.code(), Some(5));
    assert!(errors(&output).contains("is not empty"), "{}", errors(&output));
    let output = site.blockd(1, &["format", "--force-overwrite", &"0".repeat(32)])?;
    assert_eq!(output.status.code(), Some(5));
    assert!(std::fs::read(&site.configs[&1].pool.path)? == before, "a refused format changes nothing");
    let pool = site.configs[&1].pool.pool.to_string();
    assert!(site.blockd(1, &["format", "--force-overwrite", &pool])?.status.success());
    Ok(())
}

#[test]
fn a_foreign_pool_is_refused_and_left_alone() -> Outcome {
    let mut site = Site::formatted()?;
    site.configs.get_mut(&1).expect("there is node 1").cluster = ClusterId(0xbad);
    let before = std::fs::read(&site.configs[&1].pool.path)?;
    let output = site.blockd(1, &["check"])?;
    assert_eq!(output.status.code(), Some(5));
    assert!(errors(&output).contains("belongs to cluster"), "{}", errors(&output));
    let mut node = site.start(1)?;
    node.order(&Order::ReportAll)?;
    node.wait_for("a pool that failed", |report| matches!(report, Report::PoolFailed { .. }))?;
    assert_eq!(node.terminate()?, Some(0));
    assert!(std::fs::read(&site.configs[&1].pool.path)? == before, "a refused pool is not touched");
    Ok(())
}

#[test]
fn a_second_daemon_on_the_same_pool_is_refused() -> Outcome {
    let site = Site::formatted()?;
    let first = site.start(1)?;
    let output = site.blockd(1, &[])?;
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("is in use: mounted, a part of a pool, or open elsewhere"), "{}", errors(&output));
    assert_eq!(first.terminate()?, Some(0));
    assert!(!site.configs[&1].data_socket().exists(), "a clean end leaves no sockets");
    Ok(())
}

#[test]
fn a_port_in_use_is_said_so() -> Outcome {
    let site = Site::formatted()?;
    let taken = TcpListener::bind(site.configs[&1].nodes[0].nbd[0])?;
    let output = site.blockd(1, &[])?;
    assert_eq!(output.status.code(), Some(2));
    let said = errors(&output);
    assert!(said.contains("in use by another program") && said.contains(&taken.local_addr()?.to_string()), "{said}");
    Ok(())
}

#[test]
fn a_missing_or_wrong_configuration_is_said_so() -> Outcome {
    let site = Site::new()?;
    let output = site.blockd(1, &[])?;
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("does not exist"), "{}", errors(&output));
    std::fs::write(site.dir.path().join("bad.json"), "{\"clutser\": 1}")?;
    let bad = site.dir.path().join("bad.json");
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_blockd")).arg("--config").arg(bad).output()?;
    assert_eq!(output.status.code(), Some(2));
    assert!(errors(&output).contains("clutser"), "{}", errors(&output));
    Ok(())
}

/// One node that serves alone.
fn alone(site: &Site) -> Outcome<Node> {
    let mut node = site.start(1)?;
    node.order(&group(1, 1, &[1]))?;
    node.order(&exports())?;
    node.wait_until_serving(1)?;
    Ok(node)
}

fn garbage() -> Vec<Vec<u8>> {
    let noise = (0..100_000u64).map(|at| (at.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u8);
    vec![
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        noise.collect(),
        vec![0; 100_000],
        vec![0xff; 100_000],
        b"{\"order\":\"group\"}\n".to_vec(),
        [b"\0\0\0\x03IHAVEOPT".as_slice(), &[0xff; 64]].concat(),
        b"x".to_vec(),
        Vec::new(),
    ]
}

/// Says it, and reads until the other side has had enough or says nothing more.
fn say(mut stream: impl Read + Write, bytes: &[u8]) {
    // The other side may hang up in the middle: that is the right answer.
    let _ = stream.write_all(bytes);
    let mut reply = [0; 4096];
    let _ = stream.read(&mut reply);
}

#[test]
fn garbage_on_every_port_ends_only_its_own_connection() -> Outcome {
    let site = Site::formatted()?;
    let mut node = alone(&site)?;
    qemu_io(&node.uri(), &["write -P 5 0 1M", "flush"])?;
    let own = node.config.own().ok_or("the configuration names the node")?.clone();
    for bytes in garbage() {
        for address in [own.nbd[0], own.replication[0]] {
            let stream = TcpStream::connect(address)?;
            stream.set_read_timeout(Some(std::time::Duration::from_millis(100)))?;
            say(stream, &bytes);
        }
        for path in [node.config.nbd_socket(), node.config.data_socket()] {
            let stream = UnixStream::connect(path)?;
            stream.set_read_timeout(Some(std::time::Duration::from_millis(100)))?;
            say(stream, &bytes);
        }
        assert!(node.is_alive(), "garbage has ended the daemon:\n{}", node.log());
    }
    // A line that is no order is answered with an error, then the connection ends.
    let mut control = UnixStream::connect(node.config.data_socket())?;
    control.set_read_timeout(Some(PATIENCE))?;
    control.write_all(b"nonsense\n")?;
    let mut reply = String::new();
    control.read_to_string(&mut reply)?;
    assert!(reply.contains("not an order"), "{reply}");
    qemu_io(&node.uri(), &["read -P 5 0 1M"])?;
    assert_eq!(node.terminate()?, Some(0));
    Ok(())
}

#[test]
fn an_idle_daemon_does_not_poll() -> Outcome {
    let site = Site::formatted()?;
    let node = alone(&site)?;
    qemu_io(&node.uri(), &["write -P 5 0 1M", "flush"])?;
    let cpu_ticks = || -> Outcome<u64> {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", node.pid()))?;
        let fields: Vec<&str> = stat.rsplit(") ").next().unwrap_or_default().split(' ').collect();
        Ok(fields[11].parse::<u64>()? + fields[12].parse::<u64>()?)
    };
    // Extents cool for a while after a write.
    std::thread::sleep(std::time::Duration::from_secs(1));
    let before = cpu_ticks()?;
    std::thread::sleep(std::time::Duration::from_secs(2));
    let spent = cpu_ticks()? - before;
    // A tick is 10 ms: 1 % of two seconds are two of them.
    assert!(spent <= 2, "an idle daemon has used {} ms of 2 s", spent * 10);
    Ok(())
}
