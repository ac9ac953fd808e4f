//! The disks of a node's pool. That node itself is asked: others are redirected to it.

use super::Refused;
use super::routes::{Api, In};
use super::tasks::Goal;
use axum::extract::rejection::JsonRejection;
use axum::extract::{OriginalUri, Path, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, post};
use axum::{Json, Router};
use pollux_api as resource;
use pollux_api::{Accepted, ApiError, ErrorCode};
use pollux_base::order::DiskCommand;
use pollux_base::pool::DiskReport;
use pollux_base::{DiskId, NodeId};
use std::sync::Arc;

/// Fewer digits of an id are not taken for one.
const ID_DIGITS_MIN: usize = 4;

pub fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/pools/{node}/verify", get(verification).post(verify))
        .route("/v1/pools/{node}/disks", post(add))
        .route("/v1/pools/{node}/disks/{disk}", delete(remove))
        .route("/v1/pools/{node}/disks/{disk}/drain", post(drain))
        .route("/v1/pools/{node}/disks/{disk}/undrain", post(undrain))
        .route("/v1/pools/{node}/disks/{disk}/let-go", post(let_go))
}

type Answered = Result<Response, Refused>;

/// What is asked of which disk; none joins.
struct Asked<'a> {
    action: &'a str,
    uri: &'a Uri,
    node: String,
    accepts_loss: bool,
}

impl Asked<'_> {
    /// Has it done by this node's data plane, or redirects to the node that is meant.
    async fn of_disk(self, api: &Api, disk: String, command: impl FnOnce(DiskId) -> DiskCommand) -> Answered {
        let node = api.node_id(self.node.clone()).await?;
        if node != api.config.node {
            return api.redirect(node, self.uri);
        }
        let disk = find(api, node, &self.node, disk).await?;
        let command = command(disk);
        let goal = match command {
            DiskCommand::Drain { .. } => Goal::DiskDrained(node, disk),
            _ => Goal::Committed,
        };
        self.run(api, command, &disk.to_string(), goal).await
    }

    async fn run(self, api: &Api, command: DiskCommand, subject: &str, goal: Goal) -> Answered {
        api.core.change_disks(command, self.accepts_loss).await?;
        let task = api.tasks.watch(self.action, subject, None, goal)?;
        Ok((StatusCode::ACCEPTED, Json(Accepted { task, id: None })).into_response())
    }
}

/// By its path, its id, or the first digits of it.
async fn find(api: &Api, node: NodeId, name: &str, given: String) -> Result<DiskId, Refused> {
    let wanted = given.clone();
    let disks: Vec<DiskReport> =
        api.look(move |cluster, _| cluster.pools().remove(&node).map(|pool| pool.disks).unwrap_or_default()).await?;
    let is_it = |disk: &&DiskReport| {
        disk.path == wanted || (wanted.len() >= ID_DIGITS_MIN && disk.disk.to_string().starts_with(&wanted))
    };
    let found: Vec<&DiskReport> = disks.iter().filter(is_it).collect();
    let error = match found.as_slice() {
        [only] => return Ok(only.disk),
        [] => ApiError::new(ErrorCode::NotFound, format!("there is no disk `{given}` in the pool on {name}")),
        several => {
            let text = format!("`{given}` may be any of {} disks in the pool on {name}", several.len());
            ApiError::new(ErrorCode::Conflict, text)
        }
    };
    Err(Refused(error.with_hint(format!("`pollux pool show {name}` shows what there is."))))
}

async fn add(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path(name): Path<String>,
    body: Result<Json<resource::AddDisk>, JsonRejection>,
) -> Answered {
    let Json(request) = body?;
    let node = api.node_id(name.clone()).await?;
    if node != api.config.node {
        return api.redirect(node, &uri);
    }
    let command = DiskCommand::Add { path: request.path.clone().into(), may_overwrite: request.overwrite };
    let asked = Asked { action: "pool add-disk", uri: &uri, node: name, accepts_loss: false };
    asked.run(&api, command, &request.path, Goal::Committed).await
}

async fn verify(State(api): In, OriginalUri(uri): OriginalUri, Path(name): Path<String>) -> Answered {
    let node = api.node_id(name.clone()).await?;
    if node != api.config.node {
        return api.redirect(node, &uri);
    }
    let id = api.core.verify().await?;
    let task = api.tasks.watch("pool verify", &name, None, Goal::PoolVerified(id))?;
    Ok((StatusCode::ACCEPTED, Json(Accepted { task, id: None })).into_response())
}

async fn verification(State(api): In, OriginalUri(uri): OriginalUri, Path(name): Path<String>) -> Answered {
    let node = api.node_id(name.clone()).await?;
    if node != api.config.node {
        return api.redirect(node, &uri);
    }
    let found = api.look(move |cluster, _| super::view::verification(cluster, node)).await?;
    let none = || {
        let text = format!("the pool on {name} was not verified since its node or its data plane was started");
        ApiError::new(ErrorCode::NotFound, text).with_hint(format!("`pollux pool verify --node {name}` does it."))
    };
    Ok(Json(found.ok_or_else(|| Refused(none()))?).into_response())
}

async fn drain(State(api): In, OriginalUri(uri): OriginalUri, Path((node, disk)): Path<(String, String)>) -> Answered {
    let asked = Asked { action: "pool drain-disk", uri: &uri, node, accepts_loss: false };
    asked.of_disk(&api, disk, |disk| DiskCommand::Drain { disk }).await
}

async fn undrain(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path((node, disk)): Path<(String, String)>,
) -> Answered {
    let asked = Asked { action: "pool undrain-disk", uri: &uri, node, accepts_loss: false };
    asked.of_disk(&api, disk, |disk| DiskCommand::Undrain { disk }).await
}

async fn remove(State(api): In, OriginalUri(uri): OriginalUri, Path((node, disk)): Path<(String, String)>) -> Answered {
    let asked = Asked { action: "pool remove-disk", uri: &uri, node, accepts_loss: false };
    asked.of_disk(&api, disk, |disk| DiskCommand::Remove { disk }).await
}

async fn let_go(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path((node, disk)): Path<(String, String)>,
    body: Result<Json<resource::LetGoDisk>, JsonRejection>,
) -> Answered {
    let Json(request) = body?;
    let asked = Asked { action: "pool remove-disk", uri: &uri, node, accepts_loss: request.accept_loss };
    asked.of_disk(&api, disk, |disk| DiskCommand::LetGo { disk }).await
}
