//! Which cluster the command speaks with: addresses, certificate authority, token.
//!
//! Looked for in this order, each part by itself: flags, `POLLUX_*` variables, `~/.config/pollux/context.json`, the
//! context of a lab that runs on this machine.

use crate::failure::{Doing, Failure, Outcome};
use crate::lab::site::RUN;
use pollux_api::{Client, ClientError};
use serde::{Deserialize, Serialize};
use std::fs;
use std::path::{Path, PathBuf};

/// A context file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Context {
    /// Such as `https://192.0.2.1:7443`; the next is tried when one does not answer.
    pub servers: Vec<String>,
    /// PEM file of the cluster's authority.
    pub ca: PathBuf,
    /// File with the API token.
    pub token_file: PathBuf,
}

#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Which cluster")]
pub struct ContextArgs {
    /// Address of a node, such as https://192.0.2.1:7443; may be given several times, or separated by commas
    #[arg(
        long,
        global = true,
        env = "POLLUX_SERVER",
        value_delimiter = ',',
        value_name = "URL",
        hide_env_values = true
    )]
    pub server: Vec<String>,
    /// The cluster's certificate authority (PEM)
    #[arg(long, global = true, env = "POLLUX_CA", value_name = "FILE", hide_env_values = true)]
    pub ca: Option<PathBuf>,
    /// File that holds the API token
    #[arg(long, global = true, env = "POLLUX_TOKEN_FILE", value_name = "FILE", hide_env_values = true)]
    pub token_file: Option<PathBuf>,
}

impl ContextArgs {
    pub fn client(&self) -> Outcome<Client> {
        let found = self.resolve(&context_files())?;
        client_of(&found)
    }

    /// The cluster's certificate authority, once `client` has found which cluster is meant.
    pub fn ca_file(&self) -> PathBuf {
        self.resolve(&context_files()).map(|found| found.ca).unwrap_or_default()
    }

    fn resolve(&self, files: &[PathBuf]) -> Outcome<Context> {
        let mut context = Context {
            servers: self.server.clone(),
            ca: self.ca.clone().unwrap_or_default(),
            token_file: self.token_file.clone().unwrap_or_default(),
        };
        if !is_complete(&context)
            && let Some(file) = files.iter().find(|file| file.exists())
        {
            let kept = read(file)?;
            if context.servers.is_empty() {
                context.servers = kept.servers;
            }
            if context.ca.as_os_str().is_empty() {
                context.ca = kept.ca;
            }
            if context.token_file.as_os_str().is_empty() {
                context.token_file = kept.token_file;
            }
        }
        if is_complete(&context) {
            return Ok(context);
        }
        Err(Failure::usage("it is not known which cluster is meant: a server, its CA or a token file is missing").hint(
            "give --server, --ca and --token-file, or set POLLUX_SERVER, POLLUX_CA and POLLUX_TOKEN_FILE, or write \
                   ~/.config/pollux/context.json, or start a lab with `pollux lab up`",
        ))
    }
}

/// A client for what a context names.
pub fn client_of(context: &Context) -> Outcome<Client> {
    let readable = |path: &Path| {
        fs::read(path).map_err(|error| {
            Failure::usage(format!("cannot read {}: {error}", path.display()))
                .hint("check --ca and --token-file, and whether you may read the files")
        })
    };
    let ca = readable(&context.ca)?;
    let token = String::from_utf8_lossy(&readable(&context.token_file)?).trim().to_string();
    Client::new(context.servers.clone(), &ca, &token).map_err(from_client)
}

pub fn read(file: &Path) -> Outcome<Context> {
    let text = fs::read_to_string(file).doing(format!("cannot read {}", file.display()))?;
    serde_json::from_str(&text).map_err(|error| {
        Failure::usage(format!("{} is not a context: {error}", file.display()))
            .hint("it holds `servers` (a list of URLs), `ca` and `token_file`, as JSON")
    })
}

/// The context of a lab on this machine.
pub fn lab_context_file() -> PathBuf {
    Path::new(RUN).join("context.json")
}

fn context_files() -> Vec<PathBuf> {
    let config = std::env::var_os("XDG_CONFIG_HOME").map(PathBuf::from);
    let config = config.or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".config")));
    config.map(|dir| dir.join("pollux/context.json")).into_iter().chain([lab_context_file()]).collect()
}

fn is_complete(context: &Context) -> bool {
    !(context.servers.is_empty() || context.ca.as_os_str().is_empty() || context.token_file.as_os_str().is_empty())
}

/// What the client says, as a failure of the command.
pub fn from_client(error: ClientError) -> Failure {
    use crate::failure::Code;
    let code = match error.exit_code() {
        2 => Code::Usage,
        3 => Code::NotFound,
        4 => Code::Conflict,
        5 => Code::Unsafe,
        6 => Code::TimedOut,
        _ => Code::Other,
    };
    let failure = Failure::new(code, &error);
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::failure::Code;

    #[test]
    fn flags_win_over_a_context_file_part_by_part() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("context.json");
        let kept = Context { servers: vec!["https://a:1".into()], ca: "/ca".into(), token_file: "/token".into() };
        fs::write(&file, serde_json::to_vec(&kept).expect("JSON")).expect("write");
        let args = ContextArgs { server: vec!["https://b:1".into()], ca: None, token_file: None };
        let found = args.resolve(&[dir.path().join("none"), file.clone()]).expect("complete");
        assert_eq!(found, Context { servers: vec!["https://b:1".into()], ..kept });
    }

    #[test]
    fn without_any_context_the_hint_says_where_one_may_come_from() {
        let failure = ContextArgs::default().resolve(&[]).expect_err("nothing is known");
        assert_eq!(failure.code, Code::Usage);
        assert!(failure.hint.is_some_and(|hint| hint.contains("lab up")));
    }

    #[test]
    fn a_broken_context_file_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let file = dir.path().join("context.json");
        fs::write(&file, "{").expect("write");
        let failure = ContextArgs::default().resolve(std::slice::from_ref(&file)).expect_err("broken");
        assert!(failure.error.contains("context.json"), "{failure}");
    }
}
