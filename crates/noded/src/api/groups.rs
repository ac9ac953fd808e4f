//! Groups: their replicas, modes and lags.

use super::Refused;
use super::routes::{Api, In, Shown, Taken, number, shown};
use super::tasks::Goal;
use super::view;
use axum::extract::rejection::JsonRejection;
use axum::extract::{Path, State};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use pollux_api as resource;
use pollux_api::{ApiError, ErrorCode};
use pollux_base::record::{AtBound, LagBound, Mode};
use pollux_base::{ByteCount, GroupId, Stamp};
use pollux_cluster::Change;
use std::collections::BTreeSet;
use std::sync::Arc;

pub fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/groups/{group}", get(group))
        .route("/v1/groups/{group}/mode", post(set_mode))
        .route("/v1/groups/{group}/lag", post(set_lag))
        .route("/v1/groups/{group}/replicas", post(add_replica))
        .route("/v1/groups/{group}/replicas/{node}", delete(remove_replica))
        .route("/v1/groups/{group}/move", post(move_replica))
        .route("/v1/groups/{group}/cancel-move", post(cancel_move))
        .route("/v1/groups/{group}/promote-token", get(promote_token))
        .route("/v1/groups/{group}/promote", post(promote))
}

/// By the name of the VM, volume or image that it belongs to, or by id.
pub(super) async fn group_id(api: &Api, name: String) -> Result<GroupId, Refused> {
    api.id("group", name, |cluster, name| {
        let state = cluster.state();
        let named = state.groups.iter().find(|(_, group)| state.group_name(group) == name).map(|(id, _)| *id);
        named.or_else(|| number(name).map(GroupId).filter(|id| state.groups.contains_key(id)))
    })
    .await
}

fn mode(mode: resource::Mode) -> Mode {
    match mode {
        resource::Mode::Sync => Mode::Sync,
        resource::Mode::Memory => Mode::Memory,
        resource::Mode::Async => Mode::Async,
    }
}

async fn group(State(api): In, Path(name): Path<String>) -> Shown<resource::Group> {
    let id = group_id(&api, name).await?;
    shown(api.look(move |cluster, frame| view::group(cluster, frame.node, id)).await?)
}

async fn set_mode(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::SetMode>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let group = group_id(&api, name.clone()).await?;
    let nodes = match request.node {
        Some(node) => BTreeSet::from([api.node_id(node).await?]),
        None => {
            let synced = api.look(move |cluster, _| {
                let found = cluster.state().groups.get(&group);
                let replicas = found
                    .into_iter()
                    .flat_map(|found| found.replicas.iter().copied().filter(|node| found.mode(*node) != Mode::Async));
                replicas.collect::<BTreeSet<_>>()
            });
            synced.await?
        }
    };
    let change = Change::SetMode { group, nodes, mode: mode(request.mode) };
    api.change("group mode", &name, change, Goal::Committed).await
}

async fn set_lag(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::SetLag>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let group = group_id(&api, name.clone()).await?;
    let at_bound = match request.at_bound {
        resource::AtBound::Slow => AtBound::Slow,
        resource::AtBound::Drop => AtBound::Drop,
    };
    let lag = LagBound { bytes: ByteCount(request.bytes), ms: request.seconds.saturating_mul(1000), at_bound };
    api.change("group lag", &name, Change::SetLag { group, lag }, Goal::Committed).await
}

async fn add_replica(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::AddReplica>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let group = group_id(&api, name.clone()).await?;
    let node = api.node_id(request.node).await?;
    let change = Change::AddReplica { group, node, mode: mode(request.mode) };
    api.change("group add-replica", &name, change, Goal::ReplicaIsThere(group, node)).await
}

async fn remove_replica(State(api): In, Path((name, node)): Path<(String, String)>) -> Taken {
    let group = group_id(&api, name.clone()).await?;
    let node = api.node_id(node).await?;
    let change = Change::RemoveReplica { group, node };
    api.change("group remove-replica", &name, change, Goal::Committed).await
}

async fn move_replica(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::MoveReplica>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let group = group_id(&api, name.clone()).await?;
    let (from, to) = (api.node_id(request.from).await?, api.node_id(request.to).await?);
    let change = Change::MoveReplica { group, from, to };
    api.change("group move", &name, change, Goal::ReplicaMoved(group, from, to)).await
}

async fn cancel_move(State(api): In, Path(name): Path<String>) -> Taken {
    let group = group_id(&api, name.clone()).await?;
    api.change("group cancel-move", &name, Change::CancelMove { group }, Goal::Committed).await
}

async fn promote_token(State(api): In, Path(name): Path<String>) -> Shown<resource::PromoteToken> {
    let id = group_id(&api, name).await?;
    let token = api.look(move |cluster, frame| {
        let state = cluster.state();
        let found = state.groups.get(&id)?;
        let (group, node) = (state.group_name(found), state.node_name(frame.node));
        let text = match found.record.in_sync.contains(&frame.node) {
            true => format!(
                "By this {node} goes on with what is left of {group}: what was on its disk that failed gives errors until it is \
                 written again, and what only others have of it is overwritten when they return."
            ),
            false => format!(
                "By this {node} goes on with a state of {group} that lacks what was acknowledged last: what was known when \
                 its primary was last heard is in the token, and whatever came after that is lost too. Replicas that \
                 hold it are kept apart when they return."
            ),
        };
        cluster.promote_token(id).map(|token| resource::PromoteToken { text, group, node, token })
    });
    token.await?.map(Json).ok_or_else(|| {
        let error = ApiError::new(
            ErrorCode::Conflict,
            "this node has no replica that trails, or lost a disk, and could be promoted",
        );
        Refused(error.with_hint("Ask the node that carries it: `pollux group show` says which, `--server` chooses it."))
    })
}

async fn promote(
    State(api): In,
    Path(name): Path<String>,
    body: Result<Json<resource::Promote>, JsonRejection>,
) -> Taken {
    let Json(request) = body?;
    let group = group_id(&api, name.clone()).await?;
    let node = api.config.node;
    let change = Change::PromoteReplica { group, node, at: Stamp::default(), token: request.token };
    api.change("group promote", &name, change, Goal::Committed).await
}
