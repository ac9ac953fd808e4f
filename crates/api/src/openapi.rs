//! The contract as OpenAPI 3.1, made from `ENDPOINTS` and the types.

use crate::endpoint::{Body, ENDPOINTS};
use crate::{error, request, resource};
use serde_json::{Map, Value, json};
use std::collections::BTreeMap;
use utoipa::ToSchema;

/// The whole document. The same each time, so that a client can compare it with the one it was made for.
pub fn document() -> Value {
    let mut paths = Map::new();
    for endpoint in ENDPOINTS {
        let mut parameters: Vec<Value> = path_parameters(endpoint.path)
            .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
            .collect();
        parameters.extend(endpoint.query.iter().map(|(name, meaning)| {
            json!({
                "name": name, "in": "query", "required": meaning.starts_with("Needed"), "description": meaning,
                "schema": { "type": "string" }
            })
        }));
        let mut answer = json!({ "description": "Carried out, or taken." });
        if let Some(content) = content(endpoint.gives) {
            answer["content"] = content;
        }
        let status = if endpoint.gives == Body::One("Accepted") { "202" } else { "200" };
        let mut operation = json!({
            "summary": endpoint.summary,
            "responses": {
                status: answer,
                "default": { "description": "Refused.", "content": content(Body::One("ApiError")) }
            }
        });
        if !parameters.is_empty() {
            operation["parameters"] = Value::Array(parameters);
        }
        if let Some(content) = content(endpoint.takes) {
            operation["requestBody"] = json!({ "required": true, "content": content });
        }
        if endpoint.path == "/v1/openapi.json" {
            operation["security"] = json!([]);
        }
        let item = paths.entry(endpoint.path).or_insert_with(|| json!({}));
        item[endpoint.method.to_lowercase()] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": { "title": "Pollux", "version": "v1", "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" } },
        "security": [{ "token": [] }],
        "paths": paths,
        "components": {
            "securitySchemes": { "token": { "type": "http", "scheme": "bearer" } },
            "schemas": schemas(),
        }
    })
}

/// The document as text, as it is served and as `openapi.json` holds it.
pub fn text() -> String {
    let mut text = serde_json::to_string_pretty(&document()).expect("a JSON value always becomes text");
    text.push('\n');
    text
}

fn path_parameters(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}'))
}

fn content(body: Body) -> Option<Value> {
    let reference = |name: &str| json!({ "$ref": format!("#/components/schemas/{name}") });
    match body {
        Body::Nothing => None,
        Body::One(name) => Some(json!({ "application/json": { "schema": reference(name) } })),
        Body::Many(name) => {
            Some(json!({ "application/json": { "schema": { "type": "array", "items": reference(name) } } }))
        }
        Body::Json => Some(json!({ "application/json": { "schema": { "type": "object" } } })),
        Body::Bytes => Some(json!({ "application/octet-stream": {} })),
    }
}

fn schemas() -> BTreeMap<String, Value> {
    let mut schemas = Vec::new();
    fn add<T: ToSchema>(schemas: &mut Vec<(String, utoipa::openapi::RefOr<utoipa::openapi::Schema>)>) {
        T::schemas(schemas);
        schemas.push((T::name().into_owned(), T::schema()));
    }
    add::<resource::Status>(&mut schemas);
    add::<resource::Volume>(&mut schemas);
    add::<resource::Pool>(&mut schemas);
    add::<resource::Kept>(&mut schemas);
    add::<resource::PoolVerification>(&mut schemas);
    add::<resource::PoolFinding>(&mut schemas);
    add::<resource::Snapshot>(&mut schemas);
    add::<resource::SnapshotDiff>(&mut schemas);
    add::<resource::VolumeDiff>(&mut schemas);
    add::<resource::ByteRange>(&mut schemas);
    add::<resource::Image>(&mut schemas);
    add::<resource::MasterKeys>(&mut schemas);
    add::<resource::Event>(&mut schemas);
    add::<resource::Task>(&mut schemas);
    add::<resource::ConfirmToken>(&mut schemas);
    add::<request::CreateVm>(&mut schemas);
    add::<request::CreateVolume>(&mut schemas);
    add::<request::ExportVolume>(&mut schemas);
    add::<request::ScrubVolume>(&mut schemas);
    add::<resource::PromoteToken>(&mut schemas);
    add::<request::SetMode>(&mut schemas);
    add::<request::SetLag>(&mut schemas);
    add::<request::AddReplica>(&mut schemas);
    add::<request::MoveReplica>(&mut schemas);
    add::<request::AddDisk>(&mut schemas);
    add::<request::LetGoDisk>(&mut schemas);
    add::<request::Promote>(&mut schemas);
    add::<request::CreateSnapshot>(&mut schemas);
    add::<request::CloneSnapshot>(&mut schemas);
    add::<request::ResizeVolume>(&mut schemas);
    add::<request::ConfirmDown>(&mut schemas);
    add::<request::Accepted>(&mut schemas);
    add::<error::ApiError>(&mut schemas);
    schemas
        .into_iter()
        .map(|(name, schema)| (name, serde_json::to_value(schema).expect("a schema always becomes JSON")))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/openapi.json");

    /// The contract changes knowingly only: read the difference, then set POLLUX_GOLDEN=write and run this test again.
    #[test]
    fn the_golden_copy_is_what_is_served() {
        if std::env::var("POLLUX_GOLDEN").is_ok_and(|value| value == "write") {
            std::fs::write(GOLDEN, text()).unwrap();
        }
        let golden = std::fs::read_to_string(GOLDEN).unwrap_or_default();
        assert!(golden == text(), "openapi.json differs from the code; POLLUX_GOLDEN=write writes it anew");
    }

    #[test]
    fn every_type_that_is_referred_to_is_described() {
        let document = document();
        let text = text();
        for part in text.split("#/components/schemas/").skip(1) {
            let name = part.split('"').next().unwrap();
            assert!(document["components"]["schemas"][name].is_object(), "{name} is not described");
        }
    }
}
