//! Calls of the other nodes. Only who holds the cluster's secret gets this far.

use super::routes::Api;
use crate::link_keys::{Caller, LinkKeyCall};
use crate::log::network::LogCall;
use crate::peers::{Answer, Envelope, Refusal, SECRET_HEADER};
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::StatusCode;
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use axum::{Extension, Json};
use pollux_cluster::{Entry, PeerHello};
use std::sync::Arc;

/// Refuses who does not know the secret, before the body is read.
pub async fn check_secret(State(api): State<Arc<Api>>, request: Request<Body>, next: Next) -> Response {
    let given = request.headers().get(SECRET_HEADER).map_or(&[][..], |value| value.as_bytes());
    // blake3::Hash compares in constant time.
    if blake3::hash(given) == api.peer_secret {
        next.run(request).await
    } else {
        StatusCode::UNAUTHORIZED.into_response()
    }
}

pub async fn on_log(
    State(api): State<Arc<Api>>,
    Json(call): Json<Envelope<LogCall>>,
) -> Json<Answer<serde_json::Value>> {
    answer(api.log.serve(call).await)
}

pub async fn on_propose(State(api): State<Arc<Api>>, Json(call): Json<Envelope<Entry>>) -> Json<Answer<()>> {
    answer(api.log.take_proposal(call))
}

pub async fn on_hello(State(api): State<Arc<Api>>, Json(call): Json<Envelope<PeerHello>>) -> Json<Answer<PeerHello>> {
    answer(api.gate.check_address(&call).map(|()| {
        if call.from == call.body.node {
            api.heard.on_hello(call.body);
        }
        api.core.hello().borrow().clone()
    }))
}

pub async fn on_link_key(
    State(api): State<Arc<Api>>,
    caller: Option<Extension<Caller>>,
    Json(call): Json<Envelope<LinkKeyCall>>,
) -> Json<Answer<()>> {
    let checked = api.gate.check_address(&call);
    answer(checked.and_then(|()| api.link_keys.on_call(call.from, call.body, caller.map(|Extension(caller)| caller))))
}

fn answer<T>(result: Result<T, Refusal>) -> Json<Answer<T>> {
    Json(match result {
        Ok(done) => Answer::Done(done),
        Err(refusal) => Answer::Refused(refusal),
    })
}
