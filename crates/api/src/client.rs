//! A small blocking client of the REST API.
//!
//! It is given the addresses of one or more nodes and uses the first that answers; a request that changes something is
//! tried at another node only when it certainly never reached the first. Every call is bounded in time.

use crate::error::{ApiError, ErrorCode};
use crate::request::{
    Accepted, AddDisk, AddReplica, CloneSnapshot, ConfirmDown, CreateSnapshot, CreateVm, CreateVolume, ExportVolume,
    LetGoDisk, MoveReplica, Promote, ResizeVolume, ScrubVolume, SetLag, SetMode,
};
use crate::resource::{
    ConfirmToken, Event, Group, Image, Kept, MasterKeys, Node, Pool, PoolVerification, PromoteToken, Snapshot,
    SnapshotDiff, Status, Task, TaskState, Vm, Volume, Witness,
};
use serde::Serialize;
use serde::de::DeserializeOwned;
use std::io::Read;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use ureq::http::{self, Response, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};
use ureq::{Agent, AsSendBody, Body};

/// Time for TCP and TLS with one address. Short: the next address is tried after it.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Time for an answer. Longer than a node takes to refuse for want of a quorum.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// Time for the answer to an upload, from its last byte: the image is looked at and its volume committed.
const UPLOAD_ANSWER_TIMEOUT: Duration = Duration::from_secs(120);
/// How long one question for a task may be held by the node: it is asked again until the caller's own time is over.
const TASK_WAIT_MS: u64 = 10_000;
/// Largest JSON answer that is read; a thousand VMs with their events are far below.
const ANSWER_BYTES_MAX: u64 = 64 << 20;
/// A request is redirected once, to the node that has the console or task; twice when that moved meanwhile.
const REDIRECTS_MAX: usize = 3;

/// Why a call gave no result.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// The node refused, with advice.
    #[error("{0}")]
    Refused(ApiError),
    /// No node could be reached.
    #[error("no node answers: {0}")]
    Unreachable(String),
    /// The request was sent and the connection lost before the answer: it may or may not have been carried out.
    #[error("the connection was lost before the answer came: {0}")]
    Lost(String),
    #[error("no answer in time from {0}")]
    TimedOut(String),
    #[error("the answer makes no sense: {0}")]
    BadAnswer(String),
    /// Wrong address, CA file or token text.
    #[error("{0}")]
    Config(String),
}

impl ClientError {
    /// Exit code of the command (see `ErrorCode::exit_code`).
    pub fn exit_code(&self) -> u8 {
        match self {
            ClientError::Refused(error) => error.code.exit_code(),
            ClientError::Config(_) => 2,
            ClientError::Unreachable(_) | ClientError::Lost(_) | ClientError::TimedOut(_) => 6,
            ClientError::BadAnswer(_) => 1,
        }
    }
    /// What to do about it.
    pub fn hint(&self) -> Option<String> {
        match self {
            ClientError::Refused(error) => error.hint.clone(),
            ClientError::Unreachable(_) => Some("Is `noded` running there, and is this its address?".into()),
            ClientError::Lost(_) | ClientError::TimedOut(_) => {
                Some("Look with `pollux status` and `pollux event list` whether it was carried out.".into())
            }
            ClientError::BadAnswer(_) => Some("Are both sides of the same version?".into()),
            ClientError::Config(_) => None,
        }
    }
}

/// A connection to a cluster: any of its nodes.
pub struct Client {
    agent: Agent,
    servers: Vec<String>,
    authorization: String,
    /// The server that answered last; tried first.
    preferred: AtomicUsize,
}

impl Client {
    /// `servers`: such as `https://192.0.2.1:7443`. `ca_pem`: the CA's certificate; no other is trusted.
    pub fn new(servers: Vec<String>, ca_pem: &[u8], token: &str) -> Result<Client, ClientError> {
        if servers.is_empty() {
            return Err(ClientError::Config("no address of a node is given".into()));
        }
        for server in &servers {
            let uri: Uri =
                server.parse().map_err(|error| ClientError::Config(format!("`{server}` is no address: {error}")))?;
            if uri.scheme_str() != Some("https") || uri.host().is_none() {
                return Err(ClientError::Config(format!("`{server}` is no https address")));
            }
        }
        let mut roots = Vec::new();
        for item in parse_pem(ca_pem) {
            match item {
                Ok(PemItem::Certificate(certificate)) => roots.push(certificate),
                Ok(_) => {}
                Err(error) => return Err(ClientError::Config(format!("the CA file is unreadable: {error}"))),
            }
        }
        if roots.is_empty() {
            return Err(ClientError::Config("the CA file holds no certificate".into()));
        }
        let token = token.trim();
        if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(ClientError::Config("the token is empty or not plain text".into()));
        }
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::Specific(Arc::new(roots)))
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .build();
        let agent = Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .proxy(None)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent("pollux")
            .timeout_connect(Some(CONNECT_TIMEOUT))
            .timeout_recv_response(Some(ANSWER_TIMEOUT))
            .build()
            .new_agent();
        Ok(Client { agent, servers, authorization: format!("Bearer {token}"), preferred: AtomicUsize::new(0) })
    }

    pub fn status(&self) -> Result<Status, ClientError> {
        self.get("/v1/status")
    }
    pub fn nodes(&self) -> Result<Vec<Node>, ClientError> {
        self.get("/v1/nodes")
    }
    pub fn node(&self, node: &str) -> Result<Node, ClientError> {
        self.get(&format!("/v1/nodes/{}", escape(node)))
    }
    pub fn pools(&self) -> Result<Vec<Pool>, ClientError> {
        self.get("/v1/pools")
    }
    pub fn pool(&self, node: &str) -> Result<Pool, ClientError> {
        self.get(&format!("/v1/pools/{}", escape(node)))
    }
    pub fn kept(&self) -> Result<Vec<Kept>, ClientError> {
        self.get("/v1/kept")
    }
    pub fn kept_one(&self, node: &str, kept: &str) -> Result<Kept, ClientError> {
        self.get(&format!("/v1/pools/{}/kept/{}", escape(node), escape(kept)))
    }
    pub fn export_kept(&self, node: &str, kept: &str, exported: bool) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/pools/{}/kept/{}/export", escape(node), escape(kept)), &ExportVolume { exported })
    }
    pub fn delete_kept(&self, node: &str, kept: &str) -> Result<Accepted, ClientError> {
        self.delete(&format!("/v1/pools/{}/kept/{}", escape(node), escape(kept)))
    }
    pub fn verify_pool(&self, node: &str) -> Result<Accepted, ClientError> {
        self.post_empty(&format!("/v1/pools/{}/verify", escape(node)))
    }
    pub fn pool_verification(&self, node: &str) -> Result<PoolVerification, ClientError> {
        self.get(&format!("/v1/pools/{}/verify", escape(node)))
    }
    pub fn add_disk(&self, node: &str, request: &AddDisk) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/pools/{}/disks", escape(node)), request)
    }
    pub fn drain_disk(&self, node: &str, disk: &str) -> Result<Accepted, ClientError> {
        self.post_empty(&format!("/v1/pools/{}/disks/{}/drain", escape(node), escape(disk)))
    }
    pub fn undrain_disk(&self, node: &str, disk: &str) -> Result<Accepted, ClientError> {
        self.post_empty(&format!("/v1/pools/{}/disks/{}/undrain", escape(node), escape(disk)))
    }
    pub fn remove_disk(&self, node: &str, disk: &str) -> Result<Accepted, ClientError> {
        self.delete(&format!("/v1/pools/{}/disks/{}", escape(node), escape(disk)))
    }
    pub fn let_go_disk(&self, node: &str, disk: &str, accept_loss: bool) -> Result<Accepted, ClientError> {
        let path = format!("/v1/pools/{}/disks/{}/let-go", escape(node), escape(disk));
        self.post(&path, &LetGoDisk { accept_loss })
    }
    pub fn confirm_token(&self, node: &str) -> Result<ConfirmToken, ClientError> {
        self.get(&format!("/v1/nodes/{}/confirm-token", escape(node)))
    }
    pub fn confirm_down(&self, node: &str, token: &str) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/nodes/{}/confirm-down", escape(node)), &ConfirmDown { token: token.into() })
    }
    pub fn vms(&self) -> Result<Vec<Vm>, ClientError> {
        self.get("/v1/vms")
    }
    pub fn vm(&self, vm: &str) -> Result<Vm, ClientError> {
        self.get(&format!("/v1/vms/{}", escape(vm)))
    }
    pub fn create_vm(&self, request: &CreateVm) -> Result<Accepted, ClientError> {
        self.post("/v1/vms", request)
    }
    pub fn delete_vm(&self, vm: &str) -> Result<Accepted, ClientError> {
        self.delete(&format!("/v1/vms/{}", escape(vm)))
    }
    pub fn start_vm(&self, vm: &str) -> Result<Accepted, ClientError> {
        self.post_empty(&format!("/v1/vms/{}/start", escape(vm)))
    }
    pub fn shutdown_vm(&self, vm: &str) -> Result<Accepted, ClientError> {
        self.post_empty(&format!("/v1/vms/{}/shutdown", escape(vm)))
    }
    pub fn stop_vm(&self, vm: &str) -> Result<Accepted, ClientError> {
        self.post_empty(&format!("/v1/vms/{}/stop", escape(vm)))
    }
    pub fn why_vm(&self, vm: &str) -> Result<Vec<Event>, ClientError> {
        self.get(&format!("/v1/vms/{}/why", escape(vm)))
    }
    pub fn volumes(&self) -> Result<Vec<Volume>, ClientError> {
        self.get("/v1/volumes")
    }
    pub fn volume(&self, volume: &str) -> Result<Volume, ClientError> {
        self.get(&format!("/v1/volumes/{}", escape(volume)))
    }
    pub fn create_volume(&self, request: &CreateVolume) -> Result<Accepted, ClientError> {
        self.post("/v1/volumes", request)
    }
    pub fn delete_volume(&self, volume: &str) -> Result<Accepted, ClientError> {
        self.delete(&format!("/v1/volumes/{}", escape(volume)))
    }
    /// The addresses are in `Volume::uris` once the task is done.
    pub fn export_volume(&self, volume: &str, exported: bool) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/volumes/{}/export", escape(volume)), &ExportVolume { exported })
    }
    /// A scrub now; or, with `every_days`, how often it is made by itself.
    pub fn scrub_volume(&self, volume: &str, every_days: Option<u32>) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/volumes/{}/scrub", escape(volume)), &ScrubVolume { every_days })
    }
    pub fn snapshot_vm(&self, vm: &str, name: &str) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/vms/{}/snapshot", escape(vm)), &CreateSnapshot { name: name.into() })
    }
    pub fn snapshot_volume(&self, volume: &str, name: &str) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/volumes/{}/snapshot", escape(volume)), &CreateSnapshot { name: name.into() })
    }
    pub fn snapshot_group(&self, group: &str, name: &str) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/groups/{}/snapshot", escape(group)), &CreateSnapshot { name: name.into() })
    }
    /// `snapshot`: a volume of a snapshot.
    pub fn clone_volume(&self, snapshot: &str, name: &str) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/volumes/{}/clone", escape(snapshot)), &CloneSnapshot { name: name.into() })
    }
    pub fn clone_vm(&self, snapshot: &str, name: &str) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/snapshots/{}/clone", escape(snapshot)), &CloneSnapshot { name: name.into() })
    }
    pub fn roll_back(&self, snapshot: &str) -> Result<Accepted, ClientError> {
        self.post_empty(&format!("/v1/snapshots/{}/rollback", escape(snapshot)))
    }
    pub fn resize_volume(&self, volume: &str, size_bytes: u64) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/volumes/{}/resize", escape(volume)), &ResizeVolume { size_bytes })
    }
    pub fn snapshots(&self) -> Result<Vec<Snapshot>, ClientError> {
        self.get("/v1/snapshots")
    }
    pub fn snapshot(&self, snapshot: &str) -> Result<Snapshot, ClientError> {
        self.get(&format!("/v1/snapshots/{}", escape(snapshot)))
    }
    pub fn diff_snapshots(&self, from: &str, to: &str) -> Result<SnapshotDiff, ClientError> {
        self.get(&format!("/v1/snapshots/{}/diff?to={}", escape(from), escape(to)))
    }
    pub fn delete_snapshot(&self, snapshot: &str) -> Result<Accepted, ClientError> {
        self.delete(&format!("/v1/snapshots/{}", escape(snapshot)))
    }
    pub fn images(&self) -> Result<Vec<Image>, ClientError> {
        self.get("/v1/images")
    }
    pub fn image(&self, image: &str) -> Result<Image, ClientError> {
        self.get(&format!("/v1/images/{}", escape(image)))
    }
    pub fn delete_image(&self, image: &str) -> Result<Accepted, ClientError> {
        self.delete(&format!("/v1/images/{}", escape(image)))
    }
    pub fn group(&self, group: &str) -> Result<Group, ClientError> {
        self.get(&format!("/v1/groups/{}", escape(group)))
    }
    pub fn set_mode(&self, group: &str, request: &SetMode) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/groups/{}/mode", escape(group)), request)
    }
    pub fn set_lag(&self, group: &str, request: &SetLag) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/groups/{}/lag", escape(group)), request)
    }
    pub fn add_replica(&self, group: &str, request: &AddReplica) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/groups/{}/replicas", escape(group)), request)
    }
    pub fn remove_replica(&self, group: &str, node: &str) -> Result<Accepted, ClientError> {
        self.delete(&format!("/v1/groups/{}/replicas/{}", escape(group), escape(node)))
    }
    pub fn move_replica(&self, group: &str, request: &MoveReplica) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/groups/{}/move", escape(group)), request)
    }
    pub fn cancel_move(&self, group: &str) -> Result<Accepted, ClientError> {
        self.post_empty(&format!("/v1/groups/{}/cancel-move", escape(group)))
    }
    pub fn promote_token(&self, group: &str) -> Result<PromoteToken, ClientError> {
        self.get(&format!("/v1/groups/{}/promote-token", escape(group)))
    }
    pub fn promote(&self, group: &str, token: &str) -> Result<Accepted, ClientError> {
        self.post(&format!("/v1/groups/{}/promote", escape(group)), &Promote { token: token.into() })
    }
    pub fn groups(&self) -> Result<Vec<Group>, ClientError> {
        self.get("/v1/groups")
    }
    /// Events after `since`, oldest first; at most the newest `limit`.
    pub fn events(&self, since: u64, limit: u32) -> Result<Vec<Event>, ClientError> {
        self.get(&format!("/v1/events?since={since}&limit={limit}"))
    }
    pub fn tasks(&self) -> Result<Vec<Task>, ClientError> {
        self.get("/v1/tasks")
    }
    pub fn task(&self, task: &str) -> Result<Task, ClientError> {
        self.get(&format!("/v1/tasks/{}", escape(task)))
    }
    pub fn master_keys(&self) -> Result<MasterKeys, ClientError> {
        self.get("/v1/master-key")
    }
    pub fn rotate_master_key(&self) -> Result<Accepted, ClientError> {
        self.post_empty("/v1/master-key/rotate")
    }
    pub fn witness(&self) -> Result<Option<Witness>, ClientError> {
        self.get("/v1/witness")
    }
    /// Any `GET`, for `pollux api`.
    pub fn get_raw(&self, path: &str) -> Result<serde_json::Value, ClientError> {
        self.get(path)
    }
    /// Any request with or without a JSON body, for `pollux api`.
    pub fn send_raw(
        &self,
        method: &str,
        path: &str,
        body: Option<&serde_json::Value>,
    ) -> Result<serde_json::Value, ClientError> {
        let body = body.map(|value| value.to_string().into_bytes());
        self.json(self.request(method, path, ANSWER_TIMEOUT, body)?)
    }

    /// Waits until the task has ended, calling `progress` with each state seen. A task that failed is an error, also one
    /// that has not ended after `timeout`: then the request still stands.
    pub fn wait_task(
        &self,
        task: &str,
        timeout: Duration,
        mut progress: impl FnMut(&Task),
    ) -> Result<Task, ClientError> {
        let until = Instant::now() + timeout;
        loop {
            let left_ms = until.saturating_duration_since(Instant::now()).as_millis() as u64;
            let path = format!("/v1/tasks/{}?wait_ms={}", escape(task), left_ms.min(TASK_WAIT_MS));
            let seen: Task = self.get(&path)?;
            progress(&seen);
            match seen.state {
                TaskState::Done => return Ok(seen),
                TaskState::Failed => {
                    let fallback = ApiError::new(ErrorCode::Internal, seen.detail.clone());
                    return Err(ClientError::Refused(seen.error.unwrap_or(fallback)));
                }
                TaskState::Running if left_ms == 0 => {
                    let text = format!("{} of `{}` is not done yet: {}", seen.action, seen.subject, seen.detail);
                    return Err(ClientError::Refused(
                        ApiError::new(ErrorCode::TimedOut, text)
                            .with_hint(format!("It goes on. Watch it with `pollux task show {task}`.")),
                    ));
                }
                TaskState::Running => {}
            }
        }
    }

    /// Uploads an image; `format` as qemu-img names it, found out when not given. Ends when the bytes are there and look
    /// like an image; the task ends when it can be used.
    pub fn upload_image(
        &self,
        name: &str,
        format: Option<&str>,
        encrypted: bool,
        bytes: &mut dyn Read,
    ) -> Result<Accepted, ClientError> {
        let mut path = format!("/v1/images?name={}", escape(name));
        if let Some(format) = format {
            path.push_str(&format!("&format={}", escape(format)));
        }
        if encrypted {
            path.push_str("&encrypted=true");
        }
        // The bytes can be read only once, so the upload goes to a server that was just seen to answer.
        self.status()?;
        let server = &self.servers[self.preferred.load(Ordering::Relaxed)];
        let request = self.builder("POST", server, &path).header("content-type", "application/octet-stream");
        // Asked first, so that a refusal does not cost the way of the whole image.
        let request = request.header("expect", "100-continue").body(ureq::SendBody::from_reader(bytes));
        let request = request.map_err(|error| ClientError::Config(error.to_string()))?;
        let request = self.agent.configure_request(request).timeout_recv_response(Some(UPLOAD_ANSWER_TIMEOUT)).build();
        let response = self.agent.run(request).map_err(|error| transport_error(server, &error))?;
        self.json(response)
    }

    /// The serial console's output: what was kept of the past, then what follows. Ends when the VM's run ends. A read
    /// blocks until there is something.
    pub fn console_output(&self, vm: &str) -> Result<impl Read + Send + use<>, ClientError> {
        let path = format!("/v1/vms/{}/console", escape(vm));
        let mut response = self.request("GET", &path, ANSWER_TIMEOUT, None)?;
        if !response.status().is_success() {
            return Err(refusal(&mut response));
        }
        Ok(response.into_body().into_with_config().limit(u64::MAX).reader())
    }

    /// Types into the serial console.
    pub fn console_input(&self, vm: &str, bytes: &[u8]) -> Result<(), ClientError> {
        let path = format!("/v1/vms/{}/console", escape(vm));
        let mut response = self.request("POST", &path, ANSWER_TIMEOUT, Some(bytes.to_vec()))?;
        if response.status().is_success() { Ok(()) } else { Err(refusal(&mut response)) }
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(self.request("GET", path, ANSWER_TIMEOUT, None)?)
    }
    fn delete<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(self.request("DELETE", path, ANSWER_TIMEOUT, None)?)
    }
    fn post_empty<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.json(self.request("POST", path, ANSWER_TIMEOUT, Some(Vec::new()))?)
    }
    fn post<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|error| ClientError::Config(error.to_string()))?;
        self.json(self.request("POST", path, ANSWER_TIMEOUT, Some(body))?)
    }

    fn builder(&self, method: &str, server: &str, path: &str) -> http::request::Builder {
        http::Request::builder()
            .method(method)
            .uri(format!("{}{path}", server.trim_end_matches('/')))
            .header("authorization", &self.authorization)
    }

    /// Asks one server after the other, beginning with the one that answered last.
    fn request(
        &self,
        method: &str,
        path: &str,
        timeout: Duration,
        body: Option<Vec<u8>>,
    ) -> Result<Response<Body>, ClientError> {
        let first = self.preferred.load(Ordering::Relaxed);
        let mut failures = Vec::new();
        for turn in 0..self.servers.len() {
            let index = (first + turn) % self.servers.len();
            match self.request_at(&self.servers[index], method, path, timeout, body.as_deref()) {
                Ok(response) => {
                    self.preferred.store(index, Ordering::Relaxed);
                    return Ok(response);
                }
                Err(ClientError::Unreachable(reason)) => failures.push(reason),
                Err(ClientError::Lost(reason) | ClientError::TimedOut(reason)) if method == "GET" => {
                    failures.push(reason);
                }
                Err(error) => return Err(error),
            }
        }
        Err(ClientError::Unreachable(failures.join("; ")))
    }

    fn request_at(
        &self,
        server: &str,
        method: &str,
        path: &str,
        timeout: Duration,
        body: Option<&[u8]>,
    ) -> Result<Response<Body>, ClientError> {
        let mut server = server.to_string();
        for _ in 0..REDIRECTS_MAX {
            let builder = self.builder(method, &server, path);
            let response = match body {
                Some(bytes) => {
                    let kind = if path.ends_with("/console") { "application/octet-stream" } else { "application/json" };
                    self.run(builder.header("content-type", kind).body(bytes), &server, timeout)
                }
                None => self.run(builder.body(()), &server, timeout),
            }?;
            if response.status().as_u16() != 307 {
                return Ok(response);
            }
            let location = response.headers().get("location").and_then(|value| value.to_str().ok());
            let target = location.and_then(|text| text.parse::<Uri>().ok());
            let authority = target.as_ref().filter(|uri| uri.scheme_str() == Some("https")).and_then(Uri::authority);
            // The same token and path, at another node of the same cluster: its certificate must be of the same CA.
            server = match authority {
                Some(authority) => format!("https://{authority}"),
                None => return Err(ClientError::BadAnswer("a redirect without an https address".into())),
            };
        }
        Err(ClientError::BadAnswer("redirected again and again".into()))
    }

    fn run<S: AsSendBody>(
        &self,
        request: Result<http::Request<S>, http::Error>,
        server: &str,
        timeout: Duration,
    ) -> Result<Response<Body>, ClientError> {
        let request = request.map_err(|error| ClientError::Config(error.to_string()))?;
        let request = self.agent.configure_request(request).timeout_recv_response(Some(timeout)).build();
        self.agent.run(request).map_err(|error| transport_error(server, &error))
    }

    fn json<T: DeserializeOwned>(&self, mut response: Response<Body>) -> Result<T, ClientError> {
        if !response.status().is_success() {
            return Err(refusal(&mut response));
        }
        let bytes = response
            .body_mut()
            .with_config()
            .limit(ANSWER_BYTES_MAX)
            .read_to_vec()
            .map_err(|error| ClientError::Lost(error.to_string()))?;
        serde_json::from_slice(&bytes).map_err(|error| ClientError::BadAnswer(error.to_string()))
    }
}

/// The error that a node answered with.
fn refusal(response: &mut Response<Body>) -> ClientError {
    let status = response.status();
    match response.body_mut().with_config().limit(1 << 20).read_json::<ApiError>() {
        Ok(error) => ClientError::Refused(error),
        Err(_) => ClientError::BadAnswer(format!("HTTP status {status} without a reason")),
    }
}

fn transport_error(server: &str, error: &ureq::Error) -> ClientError {
    let text = format!("{server}: {error}");
    match error {
        ureq::Error::HostNotFound
        | ureq::Error::ConnectionFailed
        | ureq::Error::Tls(_)
        | ureq::Error::Rustls(_)
        | ureq::Error::Timeout(ureq::Timeout::Connect | ureq::Timeout::Resolve) => ClientError::Unreachable(text),
        ureq::Error::Io(io) => match io.kind() {
            std::io::ErrorKind::ConnectionRefused
            | std::io::ErrorKind::HostUnreachable
            | std::io::ErrorKind::NetworkUnreachable
            | std::io::ErrorKind::AddrNotAvailable
            // A certificate that is not trusted comes as invalid data, before anything was asked.
            | std::io::ErrorKind::InvalidData => ClientError::Unreachable(text),
            _ => ClientError::Lost(text),
        },
        ureq::Error::Timeout(_) => ClientError::TimedOut(text),
        ureq::Error::BadUri(_) | ureq::Error::Http(_) => ClientError::Config(text),
        _ => ClientError::Lost(text),
    }
}

/// Percent-encodes what is not plain in a path part or query value.
fn escape(text: &str) -> String {
    let mut escaped = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            escaped.push(char::from(byte));
        } else {
            escaped.push_str(&format!("%{byte:02X}"));
        }
    }
    escaped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_cannot_leave_their_part_of_the_path() {
        assert_eq!(escape("web1"), "web1");
        assert_eq!(escape("../a b?c"), "..%2Fa%20b%3Fc");
    }

    #[test]
    fn wrong_settings_are_refused_before_anything_is_sent() {
        for (servers, ca, token) in [
            (vec![], "", "t"),
            (vec!["http://127.0.0.1:1".to_string()], "", "t"),
            (vec!["https://127.0.0.1:1".to_string()], "no certificate", "t"),
        ] {
            let refused = Client::new(servers, ca.as_bytes(), token);
            assert!(matches!(refused, Err(ClientError::Config(_))));
        }
    }
}
