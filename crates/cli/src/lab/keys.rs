//! The lab's secrets: a certificate authority of its own, a certificate per node and for the witness, tokens.

use super::site::{Network, Site, witness_address};
use crate::failure::{Doing, Outcome};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose,
};
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

/// Random bytes from the kernel.
pub fn random<const N: usize>() -> Outcome<[u8; N]> {
    let mut bytes = [0; N];
    fs::File::open("/dev/urandom")
        .and_then(|mut file| file.read_exact(&mut bytes))
        .doing("cannot read /dev/urandom")?;
    Ok(bytes)
}

pub fn random_id() -> Outcome<u128> {
    Ok(u128::from_le_bytes(random()?))
}

/// A UUID of random bits (RFC 9562, version 4).
pub fn random_uuid() -> Outcome<String> {
    let bits = random_id()? & !(0xf << 76) & !(0x3 << 62) | (0x4 << 76) | (0x2 << 62);
    let hex = format!("{bits:032x}");
    Ok(format!("{}-{}-{}-{}-{}", &hex[..8], &hex[8..12], &hex[12..16], &hex[16..20], &hex[20..]))
}

/// Makes every key of the site. Those of an earlier lab are replaced.
pub fn make(site: &Site) -> Outcome {
    let mut builder = fs::DirBuilder::new();
    builder.recursive(true).mode(0o700);
    builder.create(site.keys()).doing(format!("cannot create {}", site.keys().display()))?;

    let authority = authority(site)?;
    write_secret(&site.ca_file(), authority.pem().as_bytes())?;
    certificate(site, &authority, "witness", vec![witness_address().ip().to_string()])?;
    for node in &site.nodes {
        let addresses = [Network::Mgmt, Network::Storage].map(|network| node.address(network).to_string());
        certificate(site, &authority, &node.name, addresses.to_vec())?;
    }
    client_certificate(site, &authority)?;
    write_secret(&site.token_file(), hex(&random::<24>()?).as_bytes())?;
    let witness_token = hex(&random::<24>()?);
    write_secret(&site.witness_token_file(), witness_token.as_bytes())?;
    write_secret(&site.witness_clusters_file(), format!("{} {witness_token}\n", site.cluster).as_bytes())?;
    write_secret(&site.keys().join("cluster.secret"), &random::<32>()?)?;
    write_secret(&site.keys().join("master.key"), &random::<32>()?)
}

fn authority(site: &Site) -> Outcome<CertifiedIssuer<'static, KeyPair>> {
    let mut params = CertificateParams::new(Vec::new()).doing("cannot make the lab's authority")?;
    params.distinguished_name.push(DnType::CommonName, format!("Pollux lab {}", site.cluster));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let key = KeyPair::generate().doing("cannot make a key")?;
    CertifiedIssuer::self_signed(params, key).doing("cannot make the lab's authority")
}

fn certificate(site: &Site, authority: &CertifiedIssuer<'_, KeyPair>, owner: &str, mut names: Vec<String>) -> Outcome {
    let what = || format!("cannot make the certificate of {owner}");
    names.extend([owner.to_string(), "localhost".into(), "127.0.0.1".into()]);
    let mut params = CertificateParams::new(names).doing(what())?;
    params.distinguished_name.push(DnType::CommonName, owner);
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    let key = KeyPair::generate().doing(what())?;
    let signed = params.signed_by(&key, authority).doing(what())?;
    let (certificate_file, key_file) = site.certificate_files(owner);
    write_secret(&certificate_file, signed.pem().as_bytes())?;
    write_secret(&key_file, key.serialize_pem().as_bytes())
}

/// What NBD clients from outside show, laid out as QEMU and libnbd look for it.
fn client_certificate(site: &Site, authority: &CertifiedIssuer<'_, KeyPair>) -> Outcome {
    certificate(site, authority, "client", Vec::new())?;
    let (certificate, key) = site.certificate_files("client");
    let dir = site.nbd_client_dir();
    fs::create_dir_all(&dir).doing(format!("cannot create {}", dir.display()))?;
    for (file, name) in [(site.ca_file(), "ca-cert.pem"), (certificate, "client-cert.pem"), (key, "client-key.pem")] {
        fs::copy(&file, dir.join(name)).doing(format!("cannot copy {}", file.display()))?;
    }
    Ok(())
}

/// Writes a file that only root reads.
pub fn write_secret(path: &Path, bytes: &[u8]) -> Outcome {
    let open = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    open.and_then(|mut file| file.write_all(bytes)).doing(format!("cannot write {}", path.display()))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_uuid_looks_like_one_and_is_not_used_twice() {
        let uuid = random_uuid().expect("random bytes");
        assert_eq!(uuid.len(), 36);
        assert_eq!(uuid.as_bytes()[14], b'4');
        assert!(matches!(uuid.as_bytes()[19], b'8' | b'9' | b'a' | b'b'), "{uuid}");
        assert_ne!(uuid, random_uuid().expect("random bytes"));
    }
}
