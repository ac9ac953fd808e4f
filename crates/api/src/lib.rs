//! The REST contract: types, endpoints, OpenAPI, client.
