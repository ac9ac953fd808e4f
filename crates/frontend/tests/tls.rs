//! The NBD machine over TLS, against a client made of the TLS library's other half.

use pollux_base::unit::{BlockCount, BlockIndex, BlockRange};
use pollux_base::{ByteCount, Data, Instant, Op, Reply, VolumeId};
use pollux_frontend::nbd::{Connection, End, Input, Output, Pem, Reach, TlsServer};
use pollux_frontend::{Export, Exports, Place};
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore};
use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::sync::Arc;

const START: Instant = Instant(0);
const ACK: [u8; 8] = [0, 0, 0, 1, 0, 0, 0, 0];
const TLS_REQUIRED: [u8; 4] = [0x80, 0, 0, 5];

struct Authority(CertifiedIssuer<'static, KeyPair>);

impl Authority {
    fn new() -> Authority {
        let mut params = CertificateParams::new(Vec::new()).expect("no names are right names");
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let key = KeyPair::generate().expect("a key");
        Authority(CertifiedIssuer::self_signed(params, key).expect("an authority"))
    }

    /// Certificate and key, as PEM.
    fn issue(&self) -> (String, String) {
        let params = CertificateParams::new(vec!["node".to_owned()]).expect("a right name");
        let key = KeyPair::generate().expect("a key");
        (params.signed_by(&key, &self.0).expect("a certificate").pem(), key.serialize_pem())
    }

    fn server(&self, asks_clients: bool) -> TlsServer {
        let (certificate, key) = self.issue();
        let ca = self.0.pem();
        let pem = Pem { ca: ca.as_bytes(), certificate: certificate.as_bytes(), key: key.as_bytes() };
        TlsServer::new(&pem, asks_clients).expect("right files")
    }

    /// A client that trusts this authority and shows that certificate.
    fn client(&self, shown: Option<&(String, String)>) -> ClientConnection {
        let mut roots = RootCertStore::empty();
        let ca = CertificateDer::from_pem_slice(self.0.pem().as_bytes()).expect("PEM");
        roots.add(ca).expect("an authority");
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .expect("versions")
            .with_root_certificates(roots);
        let config = match shown {
            None => builder.with_no_client_auth(),
            Some((certificate, key)) => {
                let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).expect("PEM");
                let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).expect("PEM");
                builder.with_client_auth_cert(vec![certificate], key).expect("they fit")
            }
        };
        ClientConnection::new(Arc::new(config), ServerName::try_from("node").expect("a name")).expect("a client")
    }
}

fn exports() -> Exports {
    let export = |volume, is_public| Export {
        volume: VolumeId(volume),
        size: ByteCount(1 << 30),
        is_read_only: false,
        is_public,
        place: Place::Here,
    };
    Exports::complete(BTreeMap::from([("disk".to_owned(), export(1, true)), ("secret".to_owned(), export(2, false))]))
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [b"IHAVEOPT".as_slice(), &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn go(name: &str) -> Vec<u8> {
    option(7, &[&(name.len() as u32).to_be_bytes(), name.as_bytes(), &[0, 0]].concat())
}

struct Pair {
    connection: Connection,
    tls: Option<ClientConnection>,
    /// What the server said over TLS.
    said: Vec<u8>,
}

impl Pair {
    fn new(server: TlsServer) -> Pair {
        let mut pair =
            Pair { connection: Connection::new(START, Reach::Network(Some(server))), tls: None, said: Vec::new() };
        pair.receive();
        pair.send(&3u32.to_be_bytes());
        pair
    }

    fn handle(&mut self, input: Input<'_>) {
        self.connection.handle(START, input, &exports());
    }

    /// As it is, or over TLS once that is up. In pieces that nobody thought of.
    fn send(&mut self, bytes: &[u8]) {
        match &mut self.tls {
            None => self.handle(Input::Bytes(bytes)),
            Some(tls) => {
                // Fails when the server has told why it does not go on.
                let _ = tls.writer().write_all(bytes);
                self.turn();
            }
        }
    }

    fn raw(&mut self) -> Vec<u8> {
        let mut bytes = Vec::new();
        loop {
            let segments = self.connection.take_segments();
            if segments.is_empty() {
                return bytes;
            }
            segments.iter().for_each(|segment| bytes.extend_from_slice(segment.as_slice()));
            self.handle(Input::Sent);
        }
    }

    /// Carries bytes of TLS both ways until there are none.
    fn turn(&mut self) {
        loop {
            let mut wire = Vec::new();
            let tls = self.tls.as_mut().expect("called once TLS is up");
            while tls.wants_write() {
                tls.write_tls(&mut wire).expect("memory");
            }
            for piece in wire.chunks(777) {
                self.handle(Input::Bytes(piece));
            }
            let answer = self.raw();
            if wire.is_empty() && answer.is_empty() {
                return;
            }
            let tls = self.tls.as_mut().expect("as before");
            let mut answer = answer.as_slice();
            while !answer.is_empty() {
                tls.read_tls(&mut answer).expect("memory");
                // What the client thinks of it is looked at by its state.
                let _ = tls.process_new_packets();
                // The end of what is there looks like an error to this library.
                let _ = tls.reader().read_to_end(&mut self.said);
            }
        }
    }

    fn receive(&mut self) -> Vec<u8> {
        if self.tls.is_none() {
            return self.raw();
        }
        self.turn();
        std::mem::take(&mut self.said)
    }

    fn start_tls(&mut self, client: ClientConnection) {
        self.send(&option(5, &[]));
        assert!(self.receive().ends_with(&ACK));
        self.tls = Some(client);
        self.turn();
    }

    fn end(&mut self) -> Option<End> {
        match self.connection.poll() {
            Some(Output::End(end)) => Some(end),
            _ => None,
        }
    }
}

#[test]
fn nothing_is_told_before_tls_and_everything_works_after_it() {
    let authority = Authority::new();
    let mut pair = Pair::new(authority.server(false));
    for early in [go("disk"), option(3, &[]), option(8, &[]), option(99, &[])] {
        pair.send(&early);
        assert_eq!(pair.receive()[12..16], TLS_REQUIRED);
    }
    pair.start_tls(authority.client(None));
    pair.send(&option(5, &[]));
    assert_eq!(pair.receive()[12..16], [0x80, 0, 0, 3], "twice is once too often");
    pair.send(&go("disk"));
    assert!(pair.receive().ends_with(&ACK));
    // Larger than what is encrypted at a time.
    let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
    request.extend([0, 0, 0, 0]);
    request.extend(7u64.to_be_bytes());
    request.extend(0u64.to_be_bytes());
    request.extend((3u32 << 20).to_be_bytes());
    pair.send(&request);
    let Some(Output::Request { slot, op, .. }) = pair.connection.poll() else { panic!("a read was sent") };
    assert_eq!(op, Op::Read { range: BlockRange::new(BlockIndex(0), BlockCount(768)) });
    let bytes: Vec<u8> = (0..3u32 << 20).map(|at| (at % 251) as u8).collect();
    pair.handle(Input::Reply(slot, Reply::Data(Data::copy_of(&bytes))));
    let said = pair.receive();
    assert!(said[16..] == bytes);
    // Goodbye is said within TLS, too.
    let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
    request.extend([0, 0, 0, 2]);
    request.extend([0; 20]);
    pair.send(&request);
    pair.receive();
    assert_eq!(pair.end(), Some(End::Finished));
}

#[test]
fn a_client_from_outside_sees_only_what_is_public() {
    let authority = Authority::new();
    let mut pair = Pair::new(authority.server(false));
    pair.start_tls(authority.client(None));
    pair.send(&option(3, &[]));
    let list = String::from_utf8_lossy(&pair.receive()).into_owned();
    assert!(list.contains("disk") && !list.contains("secret"));
    pair.send(&go("secret"));
    assert_eq!(pair.receive()[12..16], [0x80, 0, 0, 6]);
}

#[test]
fn only_clients_with_a_certificate_of_the_cluster_are_taken_where_that_is_asked_for() {
    let (authority, stranger) = (Authority::new(), Authority::new());
    let (own, foreign) = (authority.issue(), stranger.issue());
    for (shown, is_taken) in [(Some(&own), true), (Some(&foreign), false), (None, false)] {
        let mut pair = Pair::new(authority.server(true));
        pair.start_tls(authority.client(shown));
        pair.send(&go("disk"));
        let said = pair.receive();
        assert_eq!(said.ends_with(&ACK), is_taken);
        let end = pair.end();
        assert_eq!(matches!(end, Some(End::Tls(_))), !is_taken, "{end:?}");
    }
}

#[test]
fn what_was_slipped_in_before_tls_does_not_count_after_it() {
    let authority = Authority::new();
    // An attacker on the way appends an option in the clear: it is taken for the start of TLS, and that fails.
    let mut pair = Pair::new(authority.server(false));
    pair.send(&[option(5, &[]), go("disk")].concat());
    assert!(matches!(pair.end(), None | Some(End::Tls(_))));
    pair.receive();
    assert!(matches!(pair.end(), Some(End::Tls(_))));
}

#[test]
fn noise_in_place_of_tls_ends_the_connection() {
    let authority = Authority::new();
    let noise: Vec<u8> = (0..100_000u32).map(|at| (at.wrapping_mul(0x9e37_79b9) >> 13) as u8).collect();
    for bytes in [noise.as_slice(), &[0; 1000], b"GET / HTTP/1.1\r\n\r\n", &[0x16, 3, 1, 0xff, 0xff, 1]] {
        let mut pair = Pair::new(authority.server(false));
        pair.send(&option(5, &[]));
        pair.receive();
        pair.handle(Input::Bytes(bytes));
        pair.raw();
        let end = pair.end();
        if end.is_none() {
            // It may have looked like the start of a record: the rest is not waited for without end.
            let deadline = pair.connection.deadline().expect("a handshake has an end");
            pair.connection.handle(deadline, Input::Tick, &exports());
            assert_eq!(pair.end(), Some(End::Slow));
        }
    }
}

#[test]
fn files_that_are_no_certificates_are_said_so() {
    let authority = Authority::new();
    let (certificate, key) = authority.issue();
    let (ca, other) = (authority.0.pem(), authority.issue().1);
    for (ca, certificate, key, wanted) in [
        ("", certificate.as_str(), key.as_str(), "CA"),
        (ca.as_str(), "", key.as_str(), "the certificate"),
        (ca.as_str(), certificate.as_str(), "", "the key"),
        (ca.as_str(), certificate.as_str(), other.as_str(), "certificate and key"),
    ] {
        let pem = Pem { ca: ca.as_bytes(), certificate: certificate.as_bytes(), key: key.as_bytes() };
        let said = TlsServer::new(&pem, true).err().map(|cause| cause.to_string()).unwrap_or_default();
        assert!(said.contains(wanted), "{said}");
    }
}
