//! Copies between volumes, and from uploaded images into volumes, with qemu-img over NBD.
//!
//! A volume is written through this node's own `blockd`, like a guest would: mirrored from the first byte. It is read
//! there too if this node serves it, else from the node that does.

use pollux_base::ByteCount;
use pollux_base::config::{NbdTls, NodeConfig};
use pollux_cluster::State;
use serde::Deserialize;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Command;

/// Looking at an image reads its header: more time means a file made to keep us busy.
const INFO_TIMEOUT: Duration = Duration::from_secs(20);
/// A copy that takes longer hangs: at 10 MB/s this is 400 GB.
const COPY_TIMEOUT: Duration = Duration::from_secs(12 * 3600);
/// Formats that hold all their data in the one file. Others, such as a VMDK descriptor, may name any file of this node.
const FORMATS: [&str; 5] = ["raw", "qcow2", "vdi", "vpc", "vhdx"];

/// A copy to make.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Copy {
    from: String,
    /// Certificates, where another node is asked over TLS.
    tls: Option<PathBuf>,
    to: String,
}

impl Copy {
    /// From one exported volume into another, which this node serves.
    pub fn of(config: &NodeConfig, state: &State, from: &str, to: &str) -> Copy {
        let server = state
            .volume_named(from)
            .and_then(|(_, volume)| state.groups.get(&volume.group))
            .map_or(config.node, |group| group.record.primary);
        let to = local_uri(config, to);
        let address = config.nodes.iter().find(|node| node.node == server).and_then(|node| node.nbd.first());
        match address {
            Some(address) if server != config.node => {
                let tls = (config.nbd_tls != NbdTls::Plain).then(|| config.nbd_tls_dir());
                Copy { from: remote(address, from, tls.is_some()), tls, to }
            }
            _ => Copy { from: local_uri(config, from), tls: None, to },
        }
    }

    pub async fn run(&self) -> Result<(), String> {
        let tls = self.tls.as_ref().map(|dir| format!("tls-creds-x509,id=tls,endpoint=client,dir={}", dir.display()));
        let mut arguments = vec!["-f", "raw"];
        if let Some(tls) = &tls {
            arguments.extend(["--object", tls]);
        }
        arguments.extend([self.from.as_str(), &self.to]);
        convert(&arguments).await
    }
}

/// Copies an uploaded file into a volume that this node serves.
pub async fn copy_file(config: &NodeConfig, file: &Path, format: &str, to: &str) -> Result<(), String> {
    let Some(file) = file.to_str() else { return Err("the spool's path is not text".into()) };
    convert(&["-f", format, file, &local_uri(config, to)]).await
}

/// `-n`: into what is there already.
async fn convert(arguments: &[&str]) -> Result<(), String> {
    let mut command = Command::new("qemu-img");
    command.args(["convert", "-n", "-O", "raw"]).args(arguments);
    output(command, COPY_TIMEOUT).await.map(|_| ())
}

/// Where this node's own processes reach a volume.
fn local_uri(config: &NodeConfig, export: &str) -> String {
    let socket = config.nbd_socket();
    format!("nbd+unix:///{}?socket={}", escape(export), escape(&socket.to_string_lossy()))
}

/// Where this node reaches a volume of another. QEMU knows no URI that says TLS.
fn remote(address: &SocketAddr, export: &str, is_tls: bool) -> String {
    if !is_tls {
        return format!("nbd://{address}/{}", escape(export));
    }
    let server =
        serde_json::json!({ "type": "inet", "host": address.ip().to_string(), "port": address.port().to_string() });
    let file = serde_json::json!({ "driver": "nbd", "server": server, "export": export, "tls-creds": "tls" });
    // With the format in it, because `-f raw` beside it names the outermost driver.
    format!("json:{}", serde_json::json!({ "driver": "raw", "file": file }))
}

/// Lays out this node's certificates as QEMU looks for them.
pub fn lay_out_certificates(config: &NodeConfig) -> std::io::Result<()> {
    let dir = config.nbd_tls_dir();
    std::fs::create_dir_all(&dir)?;
    let files = &config.tls;
    for (name, file) in
        [("ca-cert.pem", &files.ca), ("client-cert.pem", &files.certificate), ("client-key.pem", &files.key)]
    {
        let link = dir.join(name);
        match std::fs::remove_file(&link) {
            Err(cause) if cause.kind() != std::io::ErrorKind::NotFound => return Err(cause),
            _ => std::os::unix::fs::symlink(std::path::absolute(file)?, link)?,
        }
    }
    Ok(())
}

/// Percent-encodes what has a meaning in a URI; the parts of a name stay apart.
pub fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~/".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

/// What an uploaded file is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageFile {
    pub format: String,
    /// As the guest sees it.
    pub size: ByteCount,
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct Info {
    format: String,
    virtual_size: u64,
    backing_filename: Option<String>,
    format_specific: Option<serde_json::Value>,
}

/// Looks at an uploaded file; refuses what is not an image that stands for itself.
pub async fn look_at(file: &Path, format: Option<&str>) -> Result<ImageFile, String> {
    if let Some(format) = format.filter(|format| !FORMATS.contains(format)) {
        return Err(format!("the format `{format}` is not taken; these are: {}", FORMATS.join(", ")));
    }
    let mut command = Command::new("qemu-img");
    command.args(["info", "--output=json"]);
    if let Some(format) = format {
        command.args(["-f", format]);
    }
    command.arg(file);
    let text = output(command, INFO_TIMEOUT).await?;
    accept(&text)
}

fn accept(text: &[u8]) -> Result<ImageFile, String> {
    let info: Info = serde_json::from_slice(text).map_err(|error| format!("qemu-img makes no sense: {error}"))?;
    if !FORMATS.contains(&info.format.as_str()) {
        return Err(format!("the format `{}` is not taken; these are: {}", info.format, FORMATS.join(", ")));
    }
    let data_file = info.format_specific.as_ref().and_then(|specific| specific.pointer("/data/data-file"));
    if info.backing_filename.is_some() || data_file.is_some() {
        return Err("the image needs another file; make it whole with `qemu-img convert`".into());
    }
    if info.virtual_size == 0 {
        return Err("the image is empty".into());
    }
    Ok(ImageFile { format: info.format, size: ByteCount(info.virtual_size) })
}

/// Runs a program to its end; its last words are the error. It is killed when nobody waits for it any more.
async fn output(mut command: Command, timeout: Duration) -> Result<Vec<u8>, String> {
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    let child = command.spawn().map_err(|error| format!("qemu-img can not be run: {error}"))?;
    let output = tokio::time::timeout(timeout, child.wait_with_output()).await;
    let output = output.map_err(|_| format!("qemu-img took longer than {timeout:?}"))?;
    let output = output.map_err(|error| format!("qemu-img: {error}"))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let words = String::from_utf8_lossy(&output.stderr);
    let words = words.trim().trim_start_matches("qemu-img: ");
    Err(if words.is_empty() { format!("qemu-img ended with {}", output.status) } else { words.to_string() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_that_names_other_files_is_refused() {
        let whole = br#"{"format":"qcow2","virtual-size":1048576,"format-specific":{"type":"qcow2","data":{}}}"#;
        assert_eq!(accept(whole), Ok(ImageFile { format: "qcow2".into(), size: ByteCount(1 << 20) }));
        for text in [
            r#"{"format":"qcow2","virtual-size":1048576,"backing-filename":"/etc/shadow"}"#,
            r#"{"format":"qcow2","virtual-size":1,"format-specific":{"data":{"data-file":"/etc/shadow"}}}"#,
            r#"{"format":"vmdk","virtual-size":1048576}"#,
            r#"{"format":"raw","virtual-size":0}"#,
            "no json",
        ] {
            assert!(accept(text.as_bytes()).is_err(), "{text}");
        }
    }

    /// QEMU itself says whether it takes the words: what it misses is only the certificates.
    #[test]
    fn qemu_understands_where_another_nodes_volume_is() {
        let free = std::net::TcpListener::bind("127.0.0.1:0").and_then(|listener| listener.local_addr());
        let from = remote(&free.expect("a free port"), "image/debian 12", true);
        let folder = tempfile::tempdir().expect("a folder");
        let output = std::process::Command::new("qemu-img")
            .args(["convert", "-n", "-O", "raw", "-f", "raw", "--object"])
            .arg("secret,id=other,data=x")
            .args([from.as_str(), "/dev/null"])
            .current_dir(folder.path())
            .output()
            .expect("qemu-img runs");
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(said.contains("No TLS credentials with id 'tls'"), "{said}");
    }

    #[test]
    fn names_stay_whole_in_an_address() {
        assert_eq!(escape("vm/web 1/disk0?x"), "vm/web%201/disk0%3Fx");
    }
}
