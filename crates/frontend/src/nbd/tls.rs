//! TLS of a connection (NBD's STARTTLS), as bytes in and bytes out.
//!
//! The one place of the front end where randomness and a wall clock are: the TLS library's own, for keys and for the
//! validity of certificates. Nothing is decided by them but whether a client is let in.

use pollux_base::Segment;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{NoServerSessionStorage, WebPkiClientVerifier};
use rustls::{RootCertStore, ServerConfig, ServerConnection};
use std::io::{Read, Write};
use std::sync::Arc;

/// Who the server is, and which clients it takes.
#[derive(Clone)]
pub struct TlsServer {
    config: Arc<ServerConfig>,
}

/// The contents of PEM files.
pub struct Pem<'a> {
    pub ca: &'a [u8],
    pub certificate: &'a [u8],
    pub key: &'a [u8],
}

/// Why there is no TLS.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    #[error("the CA certificate: {0}")]
    Ca(String),
    #[error("the certificate: {0}")]
    Certificate(String),
    #[error("the key: {0}")]
    Key(String),
    #[error("certificate and key: {0}")]
    Pair(rustls::Error),
}

impl TlsServer {
    /// `asks_clients`: only clients with a certificate of this CA are taken.
    pub fn new(pem: &Pem<'_>, asks_clients: bool) -> Result<TlsServer, TlsError> {
        let chain = certificates(pem.certificate).map_err(TlsError::Certificate)?;
        let key = PrivateKeyDer::from_pem_slice(pem.key).map_err(|cause| TlsError::Key(cause.to_string()))?;
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let builder = ServerConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Pair)?;
        let builder = if asks_clients {
            let mut roots = RootCertStore::empty();
            for certificate in certificates(pem.ca).map_err(TlsError::Ca)? {
                roots.add(certificate).map_err(|cause| TlsError::Ca(cause.to_string()))?;
            }
            let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
            builder.with_client_cert_verifier(verifier.map_err(|cause| TlsError::Ca(cause.to_string()))?)
        } else {
            builder.with_no_client_auth()
        };
        let mut config = builder.with_single_cert(chain, key).map_err(TlsError::Pair)?;
        // Clients stay for days: nothing is gained by remembering their sessions.
        config.session_storage = Arc::new(NoServerSessionStorage {});
        config.send_tls13_tickets = 0;
        Ok(TlsServer { config: Arc::new(config) })
    }
}

fn certificates(pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found {
        Ok(found) if found.is_empty() => Err("the file holds none".to_owned()),
        Ok(found) => Ok(found),
        Err(cause) => Err(cause.to_string()),
    }
}

/// One client's session.
pub struct Session {
    tls: ServerConnection,
    /// For the client's socket.
    out: Vec<u8>,
    is_closed: bool,
}

impl Session {
    /// `plain`: what is to be sent before the first byte of TLS.
    pub fn new(server: &TlsServer, plain: &[Segment]) -> Result<Session, rustls::Error> {
        let mut tls = ServerConnection::new(server.config.clone())?;
        // Bounded by the outbox, of which only so much is encrypted as is sent next.
        tls.set_buffer_limit(None);
        let out = plain.iter().flat_map(Segment::as_slice).copied().collect();
        Ok(Session { tls, out, is_closed: false })
    }

    /// Takes bytes of the client and appends what they say to `said`. `Ok(false)`: the client has ended the session.
    /// After an error the alert that tells it is among what is to be sent.
    pub fn receive(&mut self, mut bytes: &[u8], said: &mut Vec<u8>) -> Result<bool, String> {
        while !bytes.is_empty() {
            // Its own buffer is emptied in each round, so it can only refuse what is no TLS.
            let taken = self.tls.read_tls(&mut bytes).map_err(|cause| cause.to_string())?;
            let state = self.tls.process_new_packets();
            let outcome = state.map_err(|cause| cause.to_string()).and_then(|state| {
                let start = said.len();
                said.resize(start + state.plaintext_bytes_to_read(), 0);
                self.tls.reader().read_exact(&mut said[start..]).map_err(|cause| cause.to_string())?;
                Ok(!state.peer_has_closed())
            });
            self.collect();
            if !outcome? || taken == 0 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    pub fn send(&mut self, segments: &[Segment]) {
        for segment in segments {
            self.tls.writer().write_all(segment.as_slice()).expect("writing to memory without a limit");
        }
        self.collect();
    }

    /// Says goodbye, once.
    pub fn close(&mut self) {
        if !self.is_closed {
            self.is_closed = true;
            self.tls.send_close_notify();
            self.collect();
        }
    }

    /// Whether bytes wait for the client's socket.
    pub fn has_output(&self) -> bool {
        !self.out.is_empty()
    }

    pub fn take_output(&mut self) -> Vec<u8> {
        std::mem::take(&mut self.out)
    }

    fn collect(&mut self) {
        while self.tls.wants_write() {
            self.tls.write_tls(&mut self.out).expect("writing to memory");
        }
    }
}
