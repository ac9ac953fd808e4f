//! Snapshots of VMs, volumes and groups, what is made of them, and the sizes of volumes.

use super::Refused;
use super::groups::group_id;
use super::routes::{Api, In, Shown, Taken, number, shown};
use super::tasks::Goal;
use super::view;
use axum::extract::rejection::{JsonRejection, QueryRejection};
use axum::extract::{OriginalUri, Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use pollux_api as resource;
use pollux_api::{ApiError, ErrorCode};
use pollux_base::unit::BLOCK_BYTES;
use pollux_base::{ByteCount, ExtentIndex, GroupId, NodeId, SnapshotId, VmId, VolumeId};
use pollux_cluster::Change;
use serde::Deserialize;
use std::sync::Arc;

pub fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/vms/{vm}/snapshot", post(snapshot_vm))
        .route("/v1/volumes/{volume}/snapshot", post(snapshot_volume))
        .route("/v1/groups/{group}/snapshot", post(snapshot_group))
        .route("/v1/volumes/{volume}/clone", post(clone_volume))
        .route("/v1/volumes/{volume}/resize", post(resize_volume))
        .route("/v1/snapshots", get(snapshots))
        .route("/v1/snapshots/{snapshot}", get(snapshot).delete(delete_snapshot))
        .route("/v1/snapshots/{snapshot}/rollback", post(roll_back))
        .route("/v1/snapshots/{snapshot}/clone", post(clone_vm))
        .route("/v1/snapshots/{snapshot}/diff", get(diff))
}

async fn snapshot_id(api: &Api, name: String) -> Result<SnapshotId, Refused> {
    api.id("snapshot", name, |cluster, name| {
        let state = cluster.state();
        let named = state.snapshot_named(name).map(|(id, _)| id);
        named.or_else(|| number(name).map(SnapshotId).filter(|id| state.snapshots.contains_key(id)))
    })
    .await
}

async fn snapshot_vm(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::CreateSnapshot>, JsonRejection>,
) -> Taken {
    let id = api.vm_id(name.clone()).await?;
    let group = api.look(move |cluster, _| cluster.state().vms.get(&id).map(|vm| vm.group)).await?;
    take_snapshot(&api, name, group, body).await
}

async fn snapshot_volume(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::CreateSnapshot>, JsonRejection>,
) -> Taken {
    let id = api.volume_id(name.clone()).await?;
    let volume = api.look(move |cluster, _| cluster.state().volumes.get(&id).cloned()).await?;
    if let Some(snapshot) = volume.as_ref().and_then(|volume| volume.snapshot) {
        return Err(Refused(ApiError::new(ErrorCode::Conflict, format!("`{name}` is of {snapshot} already"))));
    }
    take_snapshot(&api, name, volume.map(|volume| volume.group), body).await
}

/// `None`: what it is of was deleted meanwhile.
async fn take_snapshot(
    api: &Api,
    of: String,
    group: Option<GroupId>,
    body: Result<Json<resource::CreateSnapshot>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let gone = || Refused(ApiError::new(ErrorCode::NotFound, format!("`{of}` was deleted meanwhile")));
    let change = Change::CreateSnapshot { group: group.ok_or_else(gone)?, name: request.name.clone() };
    let name = format!("{of}@{}", request.name);
    api.create("snapshot create", &name, change, |id| Goal::SnapshotTaken(SnapshotId(id))).await
}

async fn snapshots(State(api): In) -> Shown<Vec<resource::Snapshot>> {
    Ok(Json(api.look(|cluster, _| view::snapshots(cluster)).await?))
}

async fn snapshot(State(api): In, Path(name): Path<String>) -> Shown<resource::Snapshot> {
    let id = snapshot_id(&api, name).await?;
    shown(api.look(move |cluster, _| view::snapshot(cluster, id)).await?)
}

async fn delete_snapshot(State(api): In, Path(name): Path<String>) -> Taken {
    let snapshot = snapshot_id(&api, name.clone()).await?;
    let goal = Goal::SnapshotGone(snapshot);
    api.change("snapshot delete", &name, Change::DeleteSnapshot { snapshot }, goal).await
}

async fn snapshot_group(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::CreateSnapshot>, JsonRejection>,
) -> Taken {
    let id = group_id(&api, name.clone()).await?;
    take_snapshot(&api, name, Some(id), body).await
}

async fn roll_back(State(api): In, Path(name): Path<String>) -> Taken {
    let snapshot = snapshot_id(&api, name.clone()).await?;
    api.change("snapshot rollback", &name, Change::RollBack { snapshot }, Goal::Committed).await
}

async fn clone_vm(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::CloneSnapshot>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let snapshot = snapshot_id(&api, name).await?;
    let change = Change::CloneVm { snapshot, name: request.name.clone() };
    api.create("vm clone", &request.name, change, |id| Goal::VmCloned(VmId(id))).await
}

async fn clone_volume(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::CloneSnapshot>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let of = api.volume_id(name).await?;
    let change = Change::CloneVolume { of, name: request.name.clone() };
    api.create("volume clone", &request.name, change, |id| Goal::VolumeCloned(VolumeId(id))).await
}

async fn resize_volume(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::ResizeVolume>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let volume = api.volume_id(name.clone()).await?;
    let change = Change::ResizeVolume { volume, size: ByteCount(request.size_bytes) };
    api.change("volume resize", &name, change, Goal::Committed).await
}

/// The other snapshot.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct DiffQuery {
    to: String,
}

/// Ranges in one answer: some ten megabytes of JSON.
const RANGES_MAX: usize = 200_000;

/// What is compared, and where.
struct Compared {
    group: GroupId,
    node: NodeId,
    /// Name of each volume, and its two snapshots.
    volumes: Vec<(String, VolumeId, VolumeId)>,
}

fn compared(state: &pollux_cluster::State, here: NodeId, one: SnapshotId, two: SnapshotId) -> Option<Compared> {
    let id = state.snapshots.get(&one)?.group;
    let group = state.groups.get(&id)?;
    let (one, two) = (group.snapshots.each.get(&one)?, group.snapshots.each.get(&two)?);
    let volumes = one.volumes.iter().filter_map(|(first, frozen)| {
        let (second, _) = two.volumes.iter().find(|(_, other)| other.of == frozen.of)?;
        Some((state.volumes.get(&frozen.of)?.name.clone(), *first, *second))
    });
    let record = &group.record;
    let node = if record.in_sync.contains(&here) { here } else { *record.in_sync.first()? };
    Some(Compared { group: id, node, volumes: volumes.collect() })
}

async fn diff(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path(from): Path<String>,
    query: Result<Query<DiffQuery>, QueryRejection>,
) -> Result<Response, Refused> {
    let Query(DiffQuery { to }) = query?;
    let (one, two) = (snapshot_id(&api, from.clone()).await?, snapshot_id(&api, to.clone()).await?);
    let found = api.look(move |cluster, frame| compared(cluster.state(), frame.node, one, two)).await?;
    let Some(found) = found else {
        let text = format!("`{from}` and `{to}` are not of the same VM or volume");
        return Err(Refused(ApiError::new(ErrorCode::Conflict, text)));
    };
    if found.node != api.config.node {
        return api.redirect(found.node, &uri);
    }
    let (mut volumes, mut count) = (Vec::new(), 0);
    for (volume, one, two) in found.volumes {
        let (mut ranges, mut next) = (Vec::new(), Some(ExtentIndex(0)));
        while let Some(from) = next {
            let page = api.core.compare(found.group, one, two, from).await?;
            count += page.runs.len();
            if count > RANGES_MAX {
                let text = format!("they differ in more than {RANGES_MAX} ranges");
                return Err(Refused(ApiError::new(ErrorCode::Conflict, text)));
            }
            ranges.extend(page.runs.iter().map(|run| resource::ByteRange {
                offset_bytes: run.start.0 * BLOCK_BYTES,
                length_bytes: run.count.0 * BLOCK_BYTES,
            }));
            next = page.next;
        }
        volumes.push(resource::VolumeDiff { volume, ranges });
    }
    Ok(Json(resource::SnapshotDiff { from, to, volumes }).into_response())
}
