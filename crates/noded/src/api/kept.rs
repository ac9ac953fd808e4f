//! What nodes keep of replicas that were overwritten. All nodes' are listed; the node itself is asked to offer or delete it.

use super::Refused;
use super::routes::{Api, In, shown};
use super::tasks::Goal;
use super::view::uris;
use axum::extract::rejection::JsonRejection;
use axum::extract::{OriginalUri, Path, State};
use axum::http::{StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use pollux_api as resource;
use pollux_api::{Accepted, ApiError, ErrorCode, KeptReason};
use pollux_base::config::NodeConfig;
use pollux_base::pool::KeptReport;
use pollux_base::{Kept, NodeId};
use pollux_cluster::{Cluster, KeptCommand};
use std::sync::Arc;

pub fn routes() -> Router<Arc<Api>> {
    Router::new()
        .route("/v1/kept", get(list))
        .route("/v1/pools/{node}/kept/{kept}", get(one).delete(delete))
        .route("/v1/pools/{node}/kept/{kept}/export", post(export))
}

/// Everything that is kept on any node, as far as it is heard of.
fn all(cluster: &Cluster, config: &NodeConfig) -> Vec<resource::Kept> {
    let pools = cluster.pools();
    let each = pools.iter().flat_map(|(node, pool)| pool.kept.iter().map(|known| (*node, known)));
    each.filter_map(|(node, known)| view(cluster, config, node, known)).collect()
}

fn view(cluster: &Cluster, config: &NodeConfig, node: NodeId, known: &KeptReport) -> Option<resource::Kept> {
    let (kept, state) = (Kept::in_volume(known.volume)?, cluster.state());
    let volume = state.volumes.get(&kept.of()).map_or_else(|| kept.of().to_string(), |volume| volume.name.clone());
    // Whether it is offered only its own node knows.
    let exported = node == config.node && cluster.is_kept_exported(kept);
    let name = Cluster::kept_export_name(kept);
    Some(resource::Kept {
        kept: kept.to_string(),
        node: state.node_name(node),
        volume,
        group: known.group.0,
        reason: match kept {
            Kept::BeforeResync { .. } => KeptReason::BeforeResync,
            Kept::Evidence { .. } => KeptReason::Evidence,
        },
        size_bytes: known.size_bytes,
        uris: if exported { uris(config, &[node], &name) } else { Vec::new() },
    })
}

fn parse(text: &str) -> Result<Kept, Refused> {
    text.parse().map_err(|error| {
        let error = ApiError::new(ErrorCode::NotFound, format!("`{text}` names nothing that is kept: {error}"));
        Refused(error.with_hint("`pollux kept list` shows what there is."))
    })
}

async fn list(State(api): In) -> Result<Json<Vec<resource::Kept>>, Refused> {
    let config = api.config.clone();
    Ok(Json(api.look(move |cluster, _| all(cluster, &config)).await?))
}

async fn one(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path((name, text)): Path<(String, String)>,
) -> Result<Response, Refused> {
    let kept = parse(&text)?;
    let node = api.node_id(name.clone()).await?;
    if node != api.config.node {
        return api.redirect(node, &uri);
    }
    let config = api.config.clone();
    let found = api.look(move |cluster, _| {
        let pool = cluster.pools().remove(&node)?;
        let known = pool.kept.iter().find(|known| known.volume == kept.volume())?;
        view(cluster, &config, node, known)
    });
    let none = || {
        Refused(
            ApiError::new(ErrorCode::NotFound, format!("{name} does not keep {kept}"))
                .with_hint("`pollux kept list` shows what there is."),
        )
    };
    Ok(shown(Some(found.await?.ok_or_else(none)?))?.into_response())
}

async fn run(api: &Api, uri: &Uri, name: &str, action: &str, command: KeptCommand) -> Result<Response, Refused> {
    let (KeptCommand::Export { kept, .. } | KeptCommand::Delete { kept }) = command;
    let node = api.node_id(name.to_owned()).await?;
    if node != api.config.node {
        return api.redirect(node, uri);
    }
    api.core.change_kept(command).await?;
    let task = api.tasks.watch(action, &kept.to_string(), None, Goal::Committed)?;
    Ok((StatusCode::ACCEPTED, Json(Accepted { task, id: None })).into_response())
}

async fn export(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path((name, text)): Path<(String, String)>,
    body: Result<Json<resource::ExportVolume>, JsonRejection>,
) -> Result<Response, Refused> {
    let Json(request) = body?;
    let command = KeptCommand::Export { kept: parse(&text)?, exported: request.exported };
    run(&api, &uri, &name, "kept export", command).await
}

async fn delete(
    State(api): In,
    OriginalUri(uri): OriginalUri,
    Path((name, text)): Path<(String, String)>,
) -> Result<Response, Refused> {
    run(&api, &uri, &name, "kept delete", KeptCommand::Delete { kept: parse(&text)? }).await
}
