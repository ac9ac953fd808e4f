//! A volume in memory behind the NBD front end: what clients see is what the protocol machine says, without a core or a
//! disk behind it.

#![allow(dead_code, reason = "each test program uses a part of it")]

use pollux_base::unit::{BLOCK_BYTES, BlockCount, BlockRange};
use pollux_base::{ByteCount, Data, Op, Reply, VolumeId};
use pollux_blockd::Turn;
use pollux_blockd::clients::Clients;
use pollux_blockd::ticket::Ticket;
use pollux_frontend::nbd::{Pem, Reach, TlsServer};
use pollux_frontend::{Export, Exports, Place};
use pollux_host::clock;
use pollux_host::link::{listen_tcp, listen_unix};
use pollux_host::reactor::{Done, Reactor};
use pollux_replica::Input;
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use std::collections::BTreeMap;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

pub type Outcome<T = ()> = Result<T, Box<dyn std::error::Error>>;
pub const SIZE: u64 = 64 << 20;

/// A volume in memory.
#[derive(Default)]
struct Memory {
    blocks: BTreeMap<u64, Data>,
}

impl Memory {
    fn answer(&mut self, op: Op) -> Reply {
        match op {
            Op::Read { range } => {
                let mut bytes = Vec::new();
                for block in blocks(range) {
                    match self.blocks.get(&block) {
                        Some(data) => bytes.extend_from_slice(data.as_slice()),
                        None => bytes.resize(bytes.len() + BLOCK_BYTES as usize, 0),
                    }
                }
                Reply::Data(Data::copy_of(&bytes))
            }
            Op::Write { range, data, .. } => {
                for (index, block) in blocks(range).enumerate() {
                    let start = index * BLOCK_BYTES as usize;
                    self.blocks.insert(block, data.slice(start..start + BLOCK_BYTES as usize));
                }
                Reply::Done
            }
            Op::Patch { block, offset, data, .. } => {
                let old = self.blocks.get(&block.0).map(|old| old.as_slice().to_vec());
                let mut whole = old.unwrap_or_else(|| vec![0; BLOCK_BYTES as usize]);
                whole[offset..offset + data.len()].copy_from_slice(data.as_slice());
                self.blocks.insert(block.0, Data::copy_of(&whole));
                Reply::Done
            }
            Op::Zero { range, .. } => {
                blocks(range).for_each(|block| drop(self.blocks.remove(&block)));
                Reply::Done
            }
            Op::Flush => Reply::Done,
            Op::Status { range } => {
                let run = |block| {
                    let range = BlockRange::new(pollux_base::BlockIndex(block), BlockCount(1));
                    (range, self.blocks.contains_key(&block))
                };
                Reply::Status(blocks(range).map(run).collect())
            }
        }
    }
}

fn blocks(range: BlockRange) -> std::ops::Range<u64> {
    range.start.0..range.end().0
}

/// Serves a volume `disk` until dropped: on a unix socket, and over TLS on a loopback address.
pub struct Server {
    dir: tempfile::TempDir,
    port: u16,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    pub fn start() -> Outcome<Server> {
        let dir = tempfile::tempdir()?;
        let socket = listen_unix(&dir.path().join("nbd.sock"))?;
        // Taken and let go, so that nobody else is likely to have it.
        let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let tcp = listen_tcp(address)?;
        let tls = certificates(dir.path())?;
        let stop = Arc::new(AtomicBool::new(false));
        let is_over = stop.clone();
        let serve = move || {
            let mut clients = Clients::default();
            clients.listen(socket, "local".to_owned(), Reach::Local);
            clients.listen(tcp, "network".to_owned(), Reach::Network(Some(tls)));
            let (volume, size) = (VolumeId(1), ByteCount(SIZE));
            let export = Export { volume, size, is_read_only: false, is_public: true, place: Place::Here };
            let exports = Exports::complete(BTreeMap::from([("disk".to_owned(), export)]));
            let mut reactor = Reactor::new().expect("io_uring works here");
            let mut memory = Memory::default();
            let (mut events, mut inputs) = (Vec::new(), Vec::new());
            while !is_over.load(Ordering::Relaxed) {
                let mut turn = Turn { now: clock::now(), reactor: &mut reactor, inputs: &mut inputs };
                loop {
                    for input in std::mem::take(turn.inputs) {
                        if let Input::Request(request) = input {
                            let reply = memory.answer(request.op);
                            clients.on_reply(&mut turn, request.id, reply, &exports);
                        }
                    }
                    clients.flush(&mut turn, &exports);
                    if turn.inputs.is_empty() {
                        break;
                    }
                }
                reactor.wait(Some(Duration::from_millis(50)), &mut events).expect("waiting works");
                let mut turn = Turn { now: clock::now(), reactor: &mut reactor, inputs: &mut inputs };
                for event in events.drain(..) {
                    match (Ticket::of(event.token), event.done) {
                        (Ticket::ClientAccept(id), Done::Accepted(result)) => {
                            clients.on_accepted(&mut turn, id, result)
                        }
                        (Ticket::ClientReceive(id), Done::Received(buffer, result)) => {
                            clients.on_received(&mut turn, id, buffer, result, &exports);
                        }
                        (Ticket::ClientSend(id), Done::Sent(result)) => {
                            clients.on_sent(&mut turn, id, result, &exports);
                        }
                        (ticket, _) => panic!("nothing else was begun: {ticket:?}"),
                    }
                }
            }
        };
        Ok(Server { dir, port: address.port(), stop, thread: Some(std::thread::spawn(serve)) })
    }

    pub fn uri(&self) -> String {
        format!("nbd+unix:///disk?socket={}", self.dir.path().join("nbd.sock").display())
    }

    /// For libnbd and all that build on it. `folder`: where the client's certificates are.
    pub fn tls_uri(&self, folder: &str) -> String {
        format!("nbds://127.0.0.1:{}/disk?tls-certificates={}", self.port, self.path(folder).display())
    }

    /// For those that find the certificates by themselves.
    pub fn default_tls_uri(&self) -> String {
        format!("nbds://127.0.0.1:{}/disk", self.port)
    }

    /// For QEMU's tools, which know no URI that says TLS.
    pub fn qemu_tls(&self, folder: &str) -> [String; 4] {
        let dir = self.path(folder);
        [
            "--object".to_owned(),
            format!("tls-creds-x509,id=tls,endpoint=client,dir={}", dir.display()),
            "--image-opts".to_owned(),
            format!("driver=nbd,host=127.0.0.1,port={},export=disk,tls-creds=tls", self.port),
        ]
    }

    pub fn plain_tcp_uri(&self) -> String {
        format!("nbd://127.0.0.1:{}/disk", self.port)
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let ended = self.thread.take().map(JoinHandle::join);
        if !std::thread::panicking() {
            assert!(matches!(ended, Some(Ok(()))), "the server has panicked");
        }
    }
}

/// A CA, a certificate of it for the server, and folders as clients want them: `client` with a certificate of the same
/// CA, and as libnbd finds it below `home`; `nobody` without one.
fn certificates(dir: &Path) -> Outcome<TlsServer> {
    let mut params = CertificateParams::new(Vec::new())?;
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.distinguished_name.push(DnType::CommonName, "test");
    let authority = CertifiedIssuer::self_signed(params, KeyPair::generate()?)?;
    let issue = |name: &str| -> Outcome<(String, String)> {
        let mut params = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()])?;
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        params.use_authority_key_identifier_extension = true;
        let key = KeyPair::generate()?;
        Ok((params.signed_by(&key, &authority)?.pem(), key.serialize_pem()))
    };
    // Read by another user, too.
    std::fs::set_permissions(dir, std::fs::Permissions::from_mode(0o755))?;
    let (own, own_key) = issue("client")?;
    for folder in ["client", "home/.pki/libnbd", "nobody"].map(|folder| dir.join(folder)) {
        std::fs::create_dir_all(&folder)?;
        std::fs::write(folder.join("ca-cert.pem"), authority.pem())?;
        if !folder.ends_with("nobody") {
            std::fs::write(folder.join("client-cert.pem"), &own)?;
            std::fs::write(folder.join("client-key.pem"), &own_key)?;
        }
    }
    let (certificate, key) = issue("server")?;
    let ca = authority.pem();
    Ok(TlsServer::new(&Pem { ca: ca.as_bytes(), certificate: certificate.as_bytes(), key: key.as_bytes() }, true)?)
}

/// Runs a program that must succeed, and gives what it printed.
pub fn run(program: &str, arguments: &[&str]) -> Outcome<String> {
    let output = Command::new(program).args(arguments).output().map_err(|cause| format!("{program}: {cause}"))?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {}\n{text}{errors}", output.status);
    Ok(text)
}

pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary paths are UTF-8")
}
