//! What a client can make `blockd` hold is bounded, and nobody keeps others out.

mod site;

use pollux_base::Order;
use site::{Node, Outcome, PATIENCE, Site, exports, group, qemu_io};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

/// One node that serves alone.
fn alone(site: &Site) -> Outcome<Node> {
    let mut node = site.start(1)?;
    node.order(&group(1, 1, &[1]))?;
    node.order(&exports())?;
    node.wait_until_serving(1)?;
    Ok(node)
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

/// Client flags, and GO to the volume.
fn hello() -> Vec<u8> {
    let go = [&4u32.to_be_bytes(), b"disk".as_slice(), &[0, 0]].concat();
    [3u32.to_be_bytes().to_vec(), option(7, &go)].concat()
}

fn request(command: u16, offset: u64, len: u32) -> Vec<u8> {
    let mut bytes = 0x2560_9513u32.to_be_bytes().to_vec();
    bytes.extend([0, 0]);
    bytes.extend(command.to_be_bytes());
    bytes.extend(7u64.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    bytes
}

fn memory_of(node: &Node) -> Outcome<u64> {
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid()))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).ok_or("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).ok_or("no number")?.parse::<u64>()? << 10)
}

#[test]
fn a_client_that_does_not_read_its_replies_cannot_grow_the_daemon() -> Outcome {
    let site = Site::formatted()?;
    let node = alone(&site)?;
    qemu_io(&node.uri(), &["write -P 5 0 32M", "flush"])?;
    let mut stream = UnixStream::connect(node.config.nbd_socket())?;
    stream.set_write_timeout(Some(Duration::from_secs(1)))?;
    stream.write_all(&hello())?;
    // 4 GiB of replies are asked for; the client's own socket fills up long before.
    let reads: Vec<u8> = (0..128).flat_map(|_| request(0, 0, 32 << 20)).collect();
    let _ = stream.write_all(&reads);
    let before = Instant::now();
    let mut most = 0;
    while before.elapsed() < Duration::from_secs(1) {
        most = most.max(memory_of(&node)?);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(most < 256 << 20, "{most} bytes are held for a client that does not read");
    // It is in nobody's way, and gets all of it once it reads.
    qemu_io(&node.uri(), &["read -P 5 0 1M"])?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut left: u64 = 3 * (32 << 20);
    let mut buffer = vec![0; 1 << 20];
    while left > 0 {
        let len = stream.read(&mut buffer)?;
        assert!(len > 0, "the connection has ended");
        left = left.saturating_sub(len as u64);
    }
    assert_eq!(node.terminate()?, Some(0));
    Ok(())
}

#[test]
fn whoever_fills_the_networks_door_keeps_out_no_guest_of_this_node() -> Outcome {
    let site = Site::formatted()?;
    let node = alone(&site)?;
    let address = node.config.own().ok_or("the configuration names the node")?.nbd[0];
    let mut idle = Vec::new();
    for _ in 0..150 {
        idle.push(TcpStream::connect(address)?);
    }
    // Of the idle ones only so many are greeted; the others wait outside.
    let mut greeted = 0;
    for stream in &mut idle {
        stream.set_read_timeout(Some(Duration::from_millis(20)))?;
        greeted += usize::from(stream.read(&mut [0; 18]).is_ok_and(|len| len > 0));
    }
    assert!((1..=65).contains(&greeted), "{greeted} strangers are served at once");
    qemu_io(&node.uri(), &["write -P 5 0 1M", "read -P 5 0 1M"])?;
    drop(idle);
    qemu_io(&node.tcp_uri(), &["read -P 5 0 1M"])?;
    assert_eq!(node.terminate()?, Some(0));
    Ok(())
}

/// What clients may do wrong, and whether their connection ends by it. None harms another.
#[test]
fn malformed_clients_are_refused_and_never_hang_or_harm_anything() -> Outcome {
    let site = Site::formatted()?;
    let mut node = alone(&site)?;
    qemu_io(&node.uri(), &["write -P 5 0 1M", "flush"])?;
    let flags = |flags: u32| flags.to_be_bytes().to_vec();
    let said = |parts: &[Vec<u8>]| parts.concat();
    let long = [b"IHAVEOPT".as_slice(), &7u32.to_be_bytes(), &u32::MAX.to_be_bytes()].concat();
    let name_beyond = [&100u32.to_be_bytes(), b"disk".as_slice(), &[0, 0]].concat();
    let many_infos = [&4u32.to_be_bytes(), b"disk".as_slice(), &[0xff, 0xff]].concat();
    let many_queries = [&4u32.to_be_bytes(), b"disk".as_slice(), &u32::MAX.to_be_bytes()].concat();
    let (ends, goes_on) = (true, false);
    let table: Vec<(&str, Vec<u8>, bool)> = vec![
        ("unknown client flags", flags(0xffff_ffff), ends),
        ("an option without its magic number", said(&[flags(3), vec![0; 16]]), ends),
        ("an option of 4 GiB", said(&[flags(3), long]), ends),
        ("a name longer than its option", said(&[flags(3), option(7, &name_beyond)]), goes_on),
        ("more kinds of information than there are", said(&[flags(3), option(7, &many_infos)]), goes_on),
        ("4 billion queries", said(&[flags(3), option(8, &[]), option(10, &many_queries)]), goes_on),
        ("queries before structured replies", said(&[flags(3), option(10, &many_queries)]), goes_on),
        ("LIST with data", said(&[flags(3), option(3, &[0; 9])]), goes_on),
        ("an unknown option", said(&[flags(3), option(0x7fff_ffff, &[1; 100])]), goes_on),
        ("a name that is no text", said(&[flags(3), option(1, &[0xff; 8])]), ends),
        ("an export that is not there", said(&[flags(3), option(1, b"nothing")]), ends),
        ("ABORT", said(&[flags(3), option(2, &[])]), ends),
        ("no request", said(&[hello(), vec![0; 28]]), ends),
        ("a write of 4 GiB", said(&[hello(), request(1, 0, u32::MAX)]), ends),
        ("a write beyond the end", said(&[hello(), request(1, u64::MAX - 5, 4), vec![1; 4]]), goes_on),
        ("a read beyond the end", said(&[hello(), request(0, u64::MAX, u32::MAX)]), goes_on),
        ("an unknown command", said(&[hello(), request(0xffff, 0, 0)]), goes_on),
        ("a status that was not agreed on", said(&[hello(), request(7, 0, 4096)]), goes_on),
        ("goodbye", said(&[hello(), request(2, 0, 0)]), ends),
    ];
    for (what, bytes, ends) in table {
        let mut stream = UnixStream::connect(node.config.nbd_socket())?;
        stream.set_read_timeout(Some(if ends { PATIENCE } else { Duration::from_millis(150) }))?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        // Whoever hangs up in the middle has answered.
        let _ = stream.write_all(&bytes);
        let mut answer = Vec::new();
        let ended = match stream.read_to_end(&mut answer) {
            Ok(_) => true,
            Err(cause) => matches!(cause.kind(), std::io::ErrorKind::ConnectionReset | std::io::ErrorKind::BrokenPipe),
        };
        assert_eq!(ended, ends, "{what}: {answer:?}");
        assert!(ends || !answer.is_empty(), "{what} gets no answer");
        assert!(node.is_alive(), "{what} has ended the daemon:\n{}", node.log());
    }
    qemu_io(&node.uri(), &["read -P 5 0 1M"])?;
    assert_eq!(node.terminate()?, Some(0));
    Ok(())
}

#[test]
fn a_grown_volume_is_seen_by_clients_that_connect_after_it() -> Outcome {
    let site = Site::formatted()?;
    let mut node = alone(&site)?;
    qemu_io(&node.uri(), &["write -P 5 0 1M", "flush"])?;
    let mut earlier = UnixStream::connect(node.config.nbd_socket())?;
    earlier.write_all(&hello())?;
    let Order::Group(mut spec) = group(1, 1, &[1]) else { return Err("a group's order".into()) };
    spec.volumes.values_mut().for_each(|size| size.0 *= 2);
    let grown = spec.volumes.values().map(|size| size.0).sum::<u64>();
    node.order(&Order::Group(spec))?;
    node.wait_until_serving(1)?;
    let start = Instant::now();
    while site::run("nbdinfo", &["--size", &node.uri()])?.trim() != grown.to_string() {
        assert!(start.elapsed() < PATIENCE, "the new size is not told");
    }
    let end = format!("write -P 6 {} 1M", grown - (1 << 20));
    qemu_io(&node.uri(), &[&end, "read -P 5 0 1M"])?;
    // The earlier one goes on with what it agreed on.
    earlier.write_all(&request(3, 0, 0))?;
    earlier.set_read_timeout(Some(PATIENCE))?;
    let mut said = Vec::new();
    while !said.ends_with(&7u64.to_be_bytes()) {
        let mut byte = [0];
        earlier.read_exact(&mut byte)?;
        said.push(byte[0]);
    }
    assert_eq!(node.terminate()?, Some(0));
    Ok(())
}
