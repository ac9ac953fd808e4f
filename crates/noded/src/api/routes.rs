//! Routes and handlers: each parses its request, asks the core, and shows what it says.

use super::tasks::{Goal, Tasks};
use super::view::{self, Frame};
use super::{Refused, images, peer};
use crate::core::{Core, unix_ms};
use crate::greet::Heard;
use crate::link_keys::LinkKeys;
use crate::log::engine::Log;
use crate::peers::{CALL_BYTES_MAX, Gate};
use crate::witness_client::WitnessClient;
use axum::body::{Body, Bytes};
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{DefaultBodyLimit, OriginalUri, Path, Query, Request, State};
use axum::http::{HeaderValue, StatusCode};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use http_body_util::channel::Channel;
use pollux_api as resource;
use pollux_api::{Accepted, ApiError, ErrorCode, TaskState};
use pollux_base::config::NodeConfig;
use pollux_base::{ByteCount, ImageId, NodeId, SealedKey, VmId, VolumeId};
use pollux_cluster::entry::{Subject, VmSpec, Wanted};
use pollux_cluster::requests::DISKS_MAX;
use pollux_cluster::{Answer, Change, Cluster};
use pollux_seal::Keyring;
use pollux_vm::Vms;
use serde::Deserialize;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::Semaphore;

/// A request in JSON is at most so long; the largest has some dozen disks.
const JSON_BYTES_MAX: usize = 256 << 10;
/// Longest wait for a task in one request.
const WAIT_MS_MAX: u64 = 30_000;
/// Events given if nothing is said.
const EVENTS_LIMIT: usize = 1000;
/// Uploads at once: each may take a disk's whole speed.
const UPLOADS_MAX: usize = 4;
/// Console output that is given of the past.
const CONSOLE_HISTORY_BYTES: u64 = 256 << 10;
/// A console's reader is looked after so often: whether its VM has moved to another node.
const CONSOLE_LOOK: Duration = Duration::from_secs(2);
/// What is typed in one request.
const TYPED_BYTES_MAX: usize = 64 << 10;

/// What handlers need.
pub struct Api {
    pub config: Arc<NodeConfig>,
    pub core: Core,
    pub log: Log,
    pub gate: Arc<Gate>,
    pub heard: Arc<Heard>,
    pub link_keys: Arc<LinkKeys>,
    pub vms: Vms,
    pub witness: Option<Arc<WitnessClient>>,
    pub keyring: Arc<Keyring>,
    pub tasks: Tasks,
    pub token: blake3::Hash,
    pub peer_secret: blake3::Hash,
    pub uploads: Arc<Semaphore>,
    pub spooled: AtomicU64,
}

impl Api {
    pub fn uploads() -> Arc<Semaphore> {
        Arc::new(Semaphore::new(UPLOADS_MAX))
    }

    pub fn next_spool(&self) -> u64 {
        self.spooled.fetch_add(1, Ordering::Relaxed)
    }

    fn frame(&self) -> Frame {
        Frame {
            node: self.config.node,
            cluster: self.config.cluster.to_string(),
            cluster_name: self.config.cluster_name.clone(),
            leader: self.log.leader(),
            voters: self.log.voters(),
            witness: self.witness.as_ref().map(|witness| (witness.address.to_string(), witness.last())),
            unix_ms: unix_ms(),
        }
    }

    /// Looks at the core.
    pub(super) async fn look<T: Send + 'static>(
        &self,
        look: impl FnOnce(&Cluster, &Frame) -> T + Send + 'static,
    ) -> Result<T, Refused> {
        let frame = self.frame();
        Ok(self.core.ask(move |cluster| look(cluster, &frame)).await?)
    }

    pub(super) async fn id<T: Send + 'static>(
        &self,
        kind: &'static str,
        name: String,
        find: impl FnOnce(&Cluster, &str) -> Option<T> + Send + 'static,
    ) -> Result<T, Refused> {
        let shown = name.clone();
        let found = self.core.ask(move |cluster| find(cluster, &name)).await?;
        found.ok_or_else(|| {
            Refused(
                ApiError::new(ErrorCode::NotFound, format!("there is no {kind} `{shown}`"))
                    .with_hint(format!("`pollux {kind} list` shows what there is.")),
            )
        })
    }
    pub(super) async fn node_id(&self, name: String) -> Result<NodeId, Refused> {
        self.id("node", name, |cluster, name| {
            let state = cluster.state();
            state.node_named(name).or_else(|| number(name).map(NodeId).filter(|id| state.nodes.contains_key(id)))
        })
        .await
    }
    pub(super) async fn vm_id(&self, name: String) -> Result<VmId, Refused> {
        self.id("vm", name, |cluster, name| {
            let state = cluster.state();
            let named = state.vm_named(name).map(|(id, _)| id);
            named.or_else(|| number(name).map(VmId).filter(|id| state.vms.contains_key(id)))
        })
        .await
    }
    pub(super) async fn volume_id(&self, name: String) -> Result<VolumeId, Refused> {
        self.id("volume", name, |cluster, name| {
            let state = cluster.state();
            let named = state.volume_named(name).map(|(id, _)| id);
            named.or_else(|| number(name).map(VolumeId).filter(|id| state.volumes.contains_key(id)))
        })
        .await
    }
    async fn image_id(&self, name: String) -> Result<ImageId, Refused> {
        self.id("image", name, |cluster, name| {
            let state = cluster.state();
            let named = state.image_named(name).map(|(id, _)| id);
            named.or_else(|| number(name).map(ImageId).filter(|id| state.images.contains_key(id)))
        })
        .await
    }

    /// Has a change committed, and a task that watches its goal.
    pub(super) async fn change(&self, action: &str, subject: &str, change: Change, goal: Goal) -> Taken {
        self.core.change(change).await?;
        self.done(action, subject, goal)
    }

    /// The same for a creation.
    pub(super) async fn create(
        &self,
        action: &str,
        name: &str,
        change: Change,
        goal: impl FnOnce(u64) -> Goal,
    ) -> Taken {
        let Answer::Created { id } = self.core.change(change).await? else {
            return Err(Refused(ApiError::new(ErrorCode::Internal, "what was created has no id")));
        };
        let task = self.tasks.watch(action, name, Some(id), goal(id))?;
        Ok(accepted(task, Some(id)))
    }

    /// A task for what is done already.
    pub(super) fn done(&self, action: &str, subject: &str, goal: Goal) -> Taken {
        let task = self.tasks.watch(action, subject, None, goal)?;
        Ok(accepted(task, None))
    }

    /// New keys for so many volumes that are to be encrypted at rest, sealed as the cluster's keys are.
    pub(super) async fn make_keys(&self, count: usize) -> Result<Vec<SealedKey>, ApiError> {
        let refused = |text: String, hint: &str| Err(ApiError::new(ErrorCode::Conflict, text).with_hint(hint));
        let master = match self.core.ask(Cluster::master_for_new_keys).await? {
            Some(id) if self.keyring.present().is_some() => match self.keyring.get(id) {
                Some(master) => master,
                None => {
                    return refused(
                        format!("keys are sealed under the master key {id}, which this node has not"),
                        "Put its file here as `master_key_file` and restart `noded`; `pollux master-key show` tells more.",
                    );
                }
            },
            _ => {
                return refused(
                    "this node has no master key, without which nothing can be encrypted".into(),
                    "Make one of 32 random bytes, put it on every node, and name it there as `master_key_file`; keep a copy.",
                );
            }
        };
        let keys = (0..count).map(|_| master.make_key()).collect::<anyhow::Result<_>>();
        keys.map_err(|error| ApiError::new(ErrorCode::Internal, format!("no key could be made: {error:#}")))
    }

    pub(super) async fn make_key_if(&self, is_encrypted: bool) -> Result<Option<SealedKey>, ApiError> {
        Ok(if is_encrypted { self.make_keys(1).await?.pop() } else { None })
    }

    /// Sends the client to another node.
    pub(super) fn redirect(&self, node: NodeId, uri: &axum::http::Uri) -> Result<Response, Refused> {
        let address = self.config.nodes.iter().find(|other| other.node == node).and_then(|other| other.api.first());
        let location = address.and_then(|address| HeaderValue::try_from(format!("https://{address}{uri}")).ok());
        let Some(location) = location else {
            return Err(Refused(ApiError::new(ErrorCode::Internal, format!("{node} has no address"))));
        };
        Ok((StatusCode::TEMPORARY_REDIRECT, [("location", location)]).into_response())
    }
}

pub(super) fn number(text: &str) -> Option<u64> {
    text.parse().ok()
}

fn accepted(task: String, id: Option<u64>) -> (StatusCode, Json<Accepted>) {
    (StatusCode::ACCEPTED, Json(Accepted { task, id }))
}

pub(super) type Taken = Result<(StatusCode, Json<Accepted>), Refused>;
pub(super) type Shown<T> = Result<Json<T>, Refused>;
pub(super) type In = State<Arc<Api>>;

pub fn router(api: Arc<Api>) -> Router {
    let peers = Router::new()
        .route("/peer/v1/log", post(peer::on_log))
        .route("/peer/v1/propose", post(peer::on_propose))
        .route("/peer/v1/hello", post(peer::on_hello))
        .route(crate::link_keys::PATH, post(peer::on_link_key))
        .layer(DefaultBodyLimit::max(CALL_BYTES_MAX))
        .layer(from_fn_with_state(api.clone(), peer::check_secret));
    let clients = Router::new()
        .route("/v1/status", get(status))
        .route("/v1/nodes", get(nodes))
        .route("/v1/nodes/{node}", get(node))
        .route("/v1/nodes/{node}/confirm-token", get(confirm_token))
        .route("/v1/nodes/{node}/confirm-down", post(confirm_down))
        .route("/v1/vms", get(vms).post(create_vm))
        .route("/v1/vms/{vm}", get(vm).delete(delete_vm))
        .route("/v1/vms/{vm}/start", post(start_vm))
        .route("/v1/vms/{vm}/shutdown", post(shutdown_vm))
        .route("/v1/vms/{vm}/stop", post(stop_vm))
        .route("/v1/vms/{vm}/why", get(why_vm))
        .route("/v1/vms/{vm}/console", get(read_console).post(type_at_console))
        .route("/v1/volumes", get(volumes).post(create_volume))
        .route("/v1/volumes/{volume}", get(volume).delete(delete_volume))
        .route("/v1/volumes/{volume}/export", post(export_volume))
        .route("/v1/volumes/{volume}/scrub", post(scrub_volume))
        .route("/v1/images", get(images_list).post(upload_image))
        .route("/v1/images/{image}", get(image).delete(delete_image))
        .route("/v1/groups", get(groups))
        .merge(super::disks::routes())
        .merge(super::groups::routes())
        .merge(super::kept::routes())
        .merge(super::master_key::routes())
        .merge(super::snapshots::routes())
        .route("/v1/pools", get(pools))
        .route("/v1/pools/{node}", get(pool))
        .route("/v1/events", get(events))
        .route("/v1/tasks", get(tasks))
        .route("/v1/tasks/{task}", get(task))
        .route("/v1/witness", get(witness))
        .layer(DefaultBodyLimit::max(JSON_BYTES_MAX))
        .layer(from_fn_with_state(api.clone(), check_token));
    Router::new()
        .route("/v1/openapi.json", get(openapi))
        .merge(clients)
        .merge(peers)
        .fallback(unknown)
        .method_not_allowed_fallback(unknown)
        .with_state(api)
}

async fn check_token(State(api): In, request: Request<Body>, next: Next) -> Response {
    let given = request.headers().get("authorization").and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
    // blake3::Hash compares in constant time.
    if given.is_some_and(|token| blake3::hash(token) == api.token) {
        return next.run(request).await;
    }
    let error = ApiError::new(ErrorCode::Unauthorized, "the token is missing or wrong")
        .with_hint("Give the cluster's token with --token-file or POLLUX_TOKEN_FILE.");
    let mut response = Refused(error).into_response();
    response.headers_mut().insert("www-authenticate", HeaderValue::from_static("Bearer"));
    response
}

async fn unknown(OriginalUri(uri): OriginalUri) -> Refused {
    Refused(
        ApiError::new(ErrorCode::NotFound, format!("there is no such request: {}", uri.path()))
            .with_hint("`/v1/openapi.json` lists all."),
    )
}

async fn openapi() -> Response {
    ([("content-type", "application/json")], resource::openapi::text()).into_response()
}

async fn status(State(api): In) -> Shown<resource::Status> {
    Ok(Json(api.look(view::status).await?))
}

async fn nodes(State(api): In) -> Shown<Vec<resource::Node>> {
    Ok(Json(api.look(view::nodes).await?))
}

async fn node(State(api): In, Path(name): Path<String>) -> Shown<resource::Node> {
    let id = api.node_id(name).await?;
    shown(api.look(move |cluster, frame| view::node(cluster, frame, id)).await?)
}

async fn confirm_token(State(api): In, Path(name): Path<String>) -> Shown<resource::ConfirmToken> {
    let id = api.node_id(name).await?;
    let token = api.look(move |cluster, _| {
        let node = cluster.state().node_name(id);
        cluster.confirm_token(id).map(|token| resource::ConfirmToken {
            text: format!(
                "By this you say that {node} is off and stays off until it is reachable again. If it still runs, its guests \
                 run twice. Writes that only {node} holds are lost."
            ),
            node,
            token,
        })
    });
    let refused = || {
        ApiError::new(
            ErrorCode::Conflict,
            "there is nothing to confirm: the node is not missing, or is known to be down",
        )
    };
    token.await?.map(Json).ok_or_else(|| Refused(refused()))
}

async fn confirm_down(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::ConfirmDown>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let id = api.node_id(name.clone()).await?;
    api.core.confirm_down(id, request.token).await?;
    let task = api.tasks.watch("node confirm-down", &name, None, Goal::NodeDown(id))?;
    Ok(accepted(task, None))
}

async fn vms(State(api): In) -> Shown<Vec<resource::Vm>> {
    Ok(Json(api.look(|cluster, _| view::vms(cluster)).await?))
}

async fn vm(State(api): In, Path(name): Path<String>) -> Shown<resource::Vm> {
    let id = api.vm_id(name).await?;
    shown(api.look(move |cluster, _| view::vm(cluster, id)).await?)
}

async fn create_vm(State(api): In, body: Result<Json<resource::CreateVm>, JsonRejection>) -> Taken {
    let Json(request) = body?;
    let image = match request.image {
        Some(image) => Some(api.image_id(image).await?),
        None => None,
    };
    let spec = VmSpec {
        name: request.name.clone(),
        cpus: request.cpus,
        memory: ByteCount(request.memory_bytes),
        image,
        disks: request.disk_bytes.into_iter().map(ByteCount).collect(),
        mac: String::new(),
    };
    // Node 0: the core chooses.
    let keys = if request.encrypted { api.make_keys(spec.disks.len().min(DISKS_MAX)).await? } else { Vec::new() };
    let change = Change::CreateVm { spec, node: NodeId(0), keys };
    api.create("vm create", &request.name, change, |id| Goal::VmReady(VmId(id))).await
}

async fn delete_vm(State(api): In, Path(name): Path<String>) -> Taken {
    let vm = api.vm_id(name.clone()).await?;
    api.change("vm delete", &name, Change::DeleteVm { vm }, Goal::VmGone(vm)).await
}

async fn start_vm(State(api): In, Path(name): Path<String>) -> Taken {
    let vm = api.vm_id(name.clone()).await?;
    let change = Change::WantVm { vm, wanted: Wanted::Running };
    api.change("vm start", &name, change, Goal::VmRunning(vm)).await
}

async fn shutdown_vm(State(api): In, Path(name): Path<String>) -> Taken {
    let vm = api.vm_id(name.clone()).await?;
    let change = Change::WantVm { vm, wanted: Wanted::Stopped };
    api.change("vm shutdown", &name, change, Goal::VmStopped(vm)).await
}

async fn stop_vm(State(api): In, Path(name): Path<String>) -> Taken {
    let vm = api.vm_id(name.clone()).await?;
    let change = Change::WantVm { vm, wanted: Wanted::Off };
    api.change("vm stop", &name, change, Goal::VmStopped(vm)).await
}

async fn why_vm(State(api): In, Path(name): Path<String>) -> Shown<Vec<resource::Event>> {
    let id = api.vm_id(name).await?;
    let events = api.look(move |cluster, _| {
        // What befell its disks and the node it runs on is part of its story.
        let mut subjects = vec![Subject::Vm(id), Subject::Cluster];
        if let Some(vm) = cluster.state().vms.get(&id) {
            subjects.push(Subject::Group(vm.group));
            subjects.extend(cluster.state().nodes.keys().map(|node| Subject::Node(*node)));
        }
        view::events(cluster, Some(&subjects), 0, EVENTS_LIMIT)
    });
    Ok(Json(events.await?))
}

async fn read_console(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path(name): Path<String>,
) -> Result<Response, Refused> {
    let id = api.vm_id(name).await?;
    let node = vm_node(&api.core, id).await?;
    if node != api.config.node {
        return api.redirect(node, &uri);
    }
    let mut console = api.vms.console(id, CONSOLE_HISTORY_BYTES).map_err(|error| {
        ApiError::new(ErrorCode::Conflict, format!("there is no console: {error}"))
            .with_hint("Was the VM ever started?")
    })?;
    let (mut sender, body) = Channel::<Bytes, std::io::Error>::new(4);
    let core = api.core.clone();
    tokio::spawn(async move {
        loop {
            match tokio::time::timeout(CONSOLE_LOOK, console.next()).await {
                Ok(Ok(bytes)) => {
                    if sender.send_data(bytes.into()).await.is_err() {
                        return;
                    }
                }
                Ok(Err(error)) => return sender.abort(error),
                // Nothing was said for a while. If the VM lives elsewhere now, its console does too.
                Err(_) => {
                    // An empty piece only finds out whether anybody still reads.
                    let gone = sender.send_data(Bytes::new()).await.is_err();
                    if gone || vm_node(&core, id).await.ok() != Some(node) {
                        return;
                    }
                }
            }
        }
    });
    Ok(([("content-type", "application/octet-stream")], Body::new(body)).into_response())
}

async fn type_at_console(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path(name): Path<String>,
    body: Body,
) -> Result<Response, Refused> {
    let id = api.vm_id(name).await?;
    let node = vm_node(&api.core, id).await?;
    if node != api.config.node {
        return api.redirect(node, &uri);
    }
    let too_much = |_| ApiError::new(ErrorCode::TooMuch, "too much is typed at once");
    let typed = axum::body::to_bytes(body, TYPED_BYTES_MAX).await.map_err(too_much)?;
    let refused = |error: std::io::Error| {
        ApiError::new(ErrorCode::Conflict, format!("the console does not take it: {error}"))
            .with_hint("Does the VM run?")
    };
    let mut input = api.vms.console_input(id).await.map_err(refused)?;
    input.send(&typed).await.map_err(refused)?;
    Ok(StatusCode::OK.into_response())
}

async fn vm_node(core: &Core, id: VmId) -> Result<NodeId, ApiError> {
    let node = core.ask(move |cluster| cluster.state().vms.get(&id).map(|vm| vm.node)).await?;
    node.ok_or_else(|| ApiError::new(ErrorCode::NotFound, "the VM was deleted meanwhile"))
}

async fn volumes(State(api): In) -> Shown<Vec<resource::Volume>> {
    let config = api.config.clone();
    Ok(Json(api.look(move |cluster, _| view::volumes(cluster, &config)).await?))
}

async fn volume(State(api): In, Path(name): Path<String>) -> Shown<resource::Volume> {
    let id = api.volume_id(name).await?;
    let config = api.config.clone();
    shown(api.look(move |cluster, _| view::volume(cluster, &config, id)).await?)
}

async fn create_volume(State(api): In, body: Result<Json<resource::CreateVolume>, JsonRejection>) -> Taken {
    let Json(request) = body?;
    let size = ByteCount(request.size_bytes);
    let key = api.make_key_if(request.encrypted).await?;
    let change = Change::CreateVolume { name: request.name.clone(), size, node: NodeId(0), key };
    api.create("volume create", &request.name, change, |_| Goal::Committed).await
}

async fn delete_volume(State(api): In, Path(name): Path<String>) -> Taken {
    let volume = api.volume_id(name.clone()).await?;
    api.change("volume delete", &name, Change::DeleteVolume { volume }, Goal::VolumeGone(volume)).await
}

async fn export_volume(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::ExportVolume>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let volume = api.volume_id(name.clone()).await?;
    let change = Change::ExportVolume { volume, exported: request.exported };
    api.change("volume export", &name, change, Goal::Committed).await
}

async fn scrub_volume(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::ScrubVolume>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let volume = api.volume_id(name.clone()).await?;
    let group = api.look(move |cluster, _| cluster.state().volumes.get(&volume).map(|found| found.group)).await?;
    let group = group.ok_or_else(|| ApiError::new(ErrorCode::NotFound, "it was deleted meanwhile"))?;
    if let Some(days) = request.every_days {
        return api.change("volume scrub", &name, Change::ScrubEvery { group, days }, Goal::Committed).await;
    }
    let Answer::Created { id } = api.core.change(Change::ScrubGroup { group, expect: None }).await? else {
        return Err(Refused(ApiError::new(ErrorCode::Internal, "the scrub has no number")));
    };
    let task = api.tasks.watch("volume scrub", &name, None, Goal::Scrubbed(group, id))?;
    Ok(accepted(task, None))
}

async fn images_list(State(api): In) -> Shown<Vec<resource::Image>> {
    Ok(Json(api.look(|cluster, _| view::images(cluster)).await?))
}

/// Query of an upload.
#[derive(Clone, Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageQuery {
    pub name: String,
    pub format: Option<String>,
    #[serde(default)]
    pub encrypted: bool,
}

async fn upload_image(State(api): In, query: Result<Query<ImageQuery>, QueryRejection>, body: Body) -> Taken {
    let Query(query) = query?;
    let taken = images::upload(api, query, body).await?;
    Ok((StatusCode::ACCEPTED, Json(taken)))
}

async fn image(State(api): In, Path(name): Path<String>) -> Shown<resource::Image> {
    let id = api.image_id(name).await?;
    shown(api.look(move |cluster, _| view::image(cluster, id)).await?)
}

async fn delete_image(State(api): In, Path(name): Path<String>) -> Taken {
    let image = api.image_id(name.clone()).await?;
    api.change("image delete", &name, Change::DeleteImage { image }, Goal::ImageGone(image)).await
}

async fn groups(State(api): In) -> Shown<Vec<resource::Group>> {
    Ok(Json(api.look(view::groups).await?))
}

async fn pools(State(api): In) -> Shown<Vec<resource::Pool>> {
    Ok(Json(api.look(|cluster, _| view::pools(cluster)).await?))
}

async fn pool(State(api): In, Path(name): Path<String>) -> Shown<resource::Pool> {
    let id = api.node_id(name).await?;
    shown(api.look(move |cluster, _| view::pool(cluster, id)).await?)
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct EventsQuery {
    since: Option<u64>,
    limit: Option<usize>,
}

async fn events(State(api): In, query: Result<Query<EventsQuery>, QueryRejection>) -> Shown<Vec<resource::Event>> {
    let Query(query) = query?;
    let (since, limit) = (query.since.unwrap_or(0), query.limit.unwrap_or(EVENTS_LIMIT));
    Ok(Json(api.look(move |cluster, _| view::events(cluster, None, since, limit)).await?))
}

async fn tasks(State(api): In) -> Json<Vec<resource::Task>> {
    Json(api.tasks.list())
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WaitQuery {
    wait_ms: Option<u64>,
}

async fn task(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path(name): Path<String>,
    query: Result<Query<WaitQuery>, QueryRejection>,
) -> Result<Response, Refused> {
    let Query(query) = query?;
    let mut task = match api.tasks.find(&name) {
        Ok(task) => task,
        Err(Some(node)) if api.config.peers().any(|peer| peer.node == node) => return api.redirect(node, &uri),
        Err(_) => {
            let error = ApiError::new(ErrorCode::NotFound, format!("there is no task `{name}`"));
            return Err(Refused(
                error.with_hint("A node forgets its tasks when it restarts; `pollux event list` tells more."),
            ));
        }
    };
    let wait = Duration::from_millis(query.wait_ms.unwrap_or(0).min(WAIT_MS_MAX));
    let _ = tokio::time::timeout(wait, task.wait_for(|task| task.state != TaskState::Running)).await;
    let task = task.borrow().clone();
    Ok(Json(task).into_response())
}

async fn witness(State(api): In) -> Shown<Option<resource::Witness>> {
    Ok(Json(api.look(view::witness).await?))
}

pub(super) fn shown<T>(found: Option<T>) -> Shown<T> {
    found.map(Json).ok_or_else(|| Refused(ApiError::new(ErrorCode::NotFound, "it was deleted meanwhile")))
}
