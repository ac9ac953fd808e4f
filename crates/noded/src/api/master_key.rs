//! The master key, by name: what is shown of it, and its exchange. Only here are keys sealed anew: what that needs, both master
//! keys, is in this process and in no message.

use super::Refused;
use super::routes::{Api, In, Shown, Taken};
use super::tasks::Goal;
use axum::extract::State;
use axum::routing::{get, post};
use axum::{Json, Router};
use pollux_api as resource;
use pollux_api::{ApiError, ErrorCode};
use pollux_base::{KeyId, SealedKey};
use pollux_cluster::master_key::NodeMasters;
use pollux_cluster::{Change, Cluster};
use pollux_seal::Keyring;
use std::collections::BTreeMap;
use std::sync::Arc;

/// What an operator does with the successor's file, in the words of the messages.
const BESIDE: &str = "beside the other as its `master_key_file` with `.new` at the end";

pub fn routes() -> Router<Arc<Api>> {
    Router::new().route("/v1/master-key", get(show)).route("/v1/master-key/rotate", post(rotate))
}

async fn show(State(api): In) -> Shown<resource::MasterKeys> {
    Ok(Json(api.look(|cluster, _| view(cluster)).await?))
}

/// Seals anew, some keys at a time, until nothing is left. If it ends before, asking again goes on.
async fn rotate(State(api): In) -> Taken {
    let master = loop {
        let next = api.core.ask(Cluster::to_seal_anew).await?;
        let next = next.map_err(|refusal| ApiError::new(ErrorCode::Conflict, refusal.to_string()).with_hint(hint()))?;
        if next.is_done {
            break next.master;
        }
        check_file(&api, next.master)?;
        let keys = seal(&api, &next.keys, next.master).await?;
        api.core.change(Change::SealKeys { expect: next.expect, master: next.master, keys }).await?;
    };
    api.done("master-key rotate", &master.to_string(), Goal::KeysSealed(master))
}

fn hint() -> String {
    format!("Make a new one of 32 random bytes, put it on every node {BESIDE}, and restart `noded` there.")
}

/// Not under what only this process remembers.
fn check_file(api: &Api, master: KeyId) -> Result<(), Refused> {
    let keyring = Keyring::read(api.config.master_key_file.as_deref(), api.config.cluster);
    let why = match keyring {
        Ok(keyring) if keyring.get(master).is_some() => return Ok(()),
        Ok(_) => "its file is not there any more".to_owned(),
        Err(error) => format!("{error:#}"),
    };
    let text = format!("nothing is sealed under the master key {master}, which this node had when it started: {why}");
    Err(Refused(ApiError::new(ErrorCode::Conflict, text).with_hint("Put the file back, or restart `noded` here.")))
}

async fn seal(api: &Api, keys: &[SealedKey], master: KeyId) -> Result<Vec<SealedKey>, Refused> {
    let mut anew = Vec::new();
    for sealed in keys {
        match api.keyring.seal_anew(sealed, master) {
            Ok(sealed) => anew.push(sealed),
            Err(why) => {
                let key = sealed.key;
                let volumes = api.core.ask(move |cluster| volumes_of(cluster, key)).await?;
                let text = format!("the key of `{}` can not be sealed anew here: {why}", volumes.join("`, `"));
                return Err(Refused(ApiError::new(ErrorCode::Conflict, text).with_hint(
                    "Ask a node that has both master keys: `pollux master-key show` says which, `--server` chooses it.",
                )));
            }
        }
    }
    Ok(anew)
}

/// Names of what is encrypted with this key, those of snapshots apart.
fn volumes_of(cluster: &Cluster, key: KeyId) -> Vec<String> {
    let volumes = cluster.state().volumes.values();
    let own = volumes.filter(|volume| volume.key == Some(key) && volume.snapshot.is_none());
    let mut names: Vec<String> = own.map(|volume| volume.name.clone()).collect();
    names.sort();
    names
}

fn view(cluster: &Cluster) -> resource::MasterKeys {
    let state = cluster.state();
    let (nodes, counts) = (cluster.masters(), state.keys_by_master());
    let name = |id: Option<KeyId>| id.map(|id| id.to_string());
    let shown = nodes.iter().map(|(id, said)| resource::NodeMasterKeys {
        node: state.node_name(*id),
        heard: said.is_some(),
        master_key: name(said.and_then(|said| said.present)),
        successor: name(said.and_then(|said| said.successor)),
    });
    let mut volumes: BTreeMap<KeyId, Vec<String>> = BTreeMap::new();
    for volume in state.volumes.values().filter(|volume| volume.snapshot.is_none()) {
        if let Some(sealed) = volume.key.and_then(|key| state.keys.get(&key)) {
            volumes.entry(sealed.master).or_default().push(volume.name.clone());
        }
    }
    let sealed = volumes.into_iter().map(|(master, mut volumes)| {
        volumes.sort();
        resource::SealedUnder { master_key: master.to_string(), volumes }
    });
    let said: BTreeMap<String, Option<NodeMasters>> =
        nodes.iter().map(|(id, said)| (state.node_name(*id), *said)).collect();
    resource::MasterKeys {
        master_key: name(cluster.master_for_new_keys()),
        nodes: shown.collect(),
        sealed: sealed.collect(),
        hint: advice(&said, cluster.master_for_new_keys(), &counts),
    }
}

/// What is to be done next, if anything: pure.
fn advice(
    nodes: &BTreeMap<String, Option<NodeMasters>>,
    chosen: Option<KeyId>,
    sealed: &BTreeMap<KeyId, usize>,
) -> Option<String> {
    let lacking = |master: KeyId| -> Vec<&str> {
        let lacks = |said: &Option<NodeMasters>| said.is_none_or(|said| !said.has(master));
        nodes.iter().filter(|(_, said)| lacks(said)).map(|(name, _)| name.as_str()).collect()
    };
    // A successor that was not chosen yet is to come; one that was is in its place soon.
    let successors = nodes.values().flatten().filter_map(|said| said.successor);
    if let Some(next) = successors.clone().find(|next| Some(*next) != chosen) {
        let lacking = lacking(next);
        return Some(match lacking.as_slice() {
            [] => "every node has the successor: pollux master-key rotate".into(),
            some => format!("put {next} {BESIDE} and restart noded, on: {}", some.join(", ")),
        });
    }
    let chosen = chosen?;
    if sealed.keys().any(|master| *master != chosen) {
        return Some("not all keys are sealed under the master key of new ones: pollux master-key rotate".into());
    }
    let lacking = lacking(chosen);
    if !sealed.is_empty() && !lacking.is_empty() {
        let lacking = lacking.join(", ");
        return Some(format!("without the master key {chosen}, or not heard: {lacking}"));
    }
    let untidy = |said: &Option<NodeMasters>| said.is_some_and(|said| said.successor == Some(chosen));
    let untidy: Vec<&str> = nodes.iter().filter(|(_, said)| untidy(said)).map(|(name, _)| name.as_str()).collect();
    let is_tidy = untidy.is_empty();
    (!is_tidy).then(|| {
        format!(
            "all keys are sealed under the successor: rename its file to `master_key_file` and restart noded, on: {}",
            untidy.join(", ")
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const OLD: KeyId = KeyId(1);
    const NEW: KeyId = KeyId(2);

    fn masters(present: KeyId, successor: Option<KeyId>) -> Option<NodeMasters> {
        Some(NodeMasters { present: Some(present), successor })
    }

    fn advice_for(
        a: Option<NodeMasters>,
        b: Option<NodeMasters>,
        chosen: KeyId,
        sealed: &[(KeyId, usize)],
    ) -> Option<String> {
        let nodes = [("a".to_owned(), a), ("b".to_owned(), b)].into();
        advice(&nodes, Some(chosen), &sealed.iter().copied().collect())
    }

    #[test]
    fn at_each_step_of_an_exchange_the_next_one_is_advised() {
        let (old, both, new) = (masters(OLD, None), masters(OLD, Some(NEW)), masters(NEW, None));
        let is = |advice: Option<String>, text: &str| {
            let advice = advice.expect(text);
            assert!(advice.contains(text), "{advice}");
        };
        assert_eq!(advice_for(old, old, OLD, &[(OLD, 3)]), None, "all is well");
        is(advice_for(both, old, OLD, &[(OLD, 3)]), "restart noded, on: b");
        is(advice_for(both, None, OLD, &[(OLD, 3)]), "restart noded, on: b");
        is(advice_for(both, both, OLD, &[(OLD, 3)]), "every node has the successor: pollux master-key rotate");
        is(advice_for(both, both, NEW, &[(OLD, 1), (NEW, 2)]), "not all keys are sealed");
        is(advice_for(both, new, NEW, &[(NEW, 3)]), "restart noded, on: a");
        assert_eq!(advice_for(new, new, NEW, &[(NEW, 3)]), None, "done");
        is(advice_for(new, old, NEW, &[(NEW, 3)]), "or not heard: b");
        is(advice_for(new, None, NEW, &[(NEW, 3)]), "or not heard: b");
    }
}
