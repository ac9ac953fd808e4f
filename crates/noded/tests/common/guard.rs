//! Guards that are played by a test.

use super::Site;
use pollux_base::guard::{GuardCommand, GuardView, Network, PeerView};
use pollux_base::{Epoch, NodeId};
use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// What the guards have in common: which node is not heard, since when, and which epoch each one names.
#[derive(Default)]
pub struct Sky {
    pub silent_since: BTreeMap<NodeId, Instant>,
    pub epochs: BTreeMap<NodeId, Epoch>,
}

/// Plays the guard of a node: hears the peer unless the sky says otherwise, and gives up its lease when it is told to.
pub fn play_guard(site: &Site, node: usize, sky: Arc<Mutex<Sky>>) {
    let peer = NodeId(2 - node as u64);
    // A guard outlives its noded and keeps what it was told.
    let newest: Arc<Mutex<Option<GuardCommand>>> = Arc::default();
    serve(&site.config(node).guard_socket(), move |mut stream| {
        let commands = BufReader::new(stream.try_clone().expect("a second handle"));
        let (told, named) = (newest.clone(), sky.clone());
        std::thread::spawn(move || {
            for line in commands.lines().map_while(Result::ok) {
                let command: GuardCommand = serde_json::from_str(&line).expect("noded speaks sense");
                let (GuardCommand::Members { epoch, .. }
                | GuardCommand::Alone { epoch }
                | GuardCommand::Surrender { epoch }) = command;
                named.lock().expect("no panic").epochs.insert(NodeId(node as u64 + 1), epoch);
                *told.lock().expect("no panic") = Some(command);
            }
        });
        loop {
            let (silent, epoch) = {
                let sky = sky.lock().expect("no panic");
                (sky.silent_since.get(&peer).map(Instant::elapsed), sky.epochs.get(&peer).copied())
            };
            let command = newest.lock().expect("no panic").clone();
            let view = GuardView {
                peers: vec![PeerView {
                    node: peer,
                    heard_ms: Some(silent.map_or(10, |silent| silent.as_millis() as u64)),
                    networks: if silent.is_some() { vec![] } else { vec![Network(0), Network(1)] },
                    epoch: epoch.unwrap_or_default(),
                }],
                lease_held: !matches!(command, None | Some(GuardCommand::Surrender { .. })),
                kills: 0,
                command,
            };
            if writeln!(stream, "{}", serde_json::to_string(&view).expect("JSON")).is_err() {
                return;
            }
            std::thread::sleep(Duration::from_millis(150));
        }
    });
}

/// Plays each connection that is made to the socket.
pub fn serve(path: &Path, play: impl Fn(UnixStream) + Send + Clone + 'static) {
    std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
    let listener = UnixListener::bind(path).expect("a socket");
    std::thread::spawn(move || {
        for stream in listener.incoming().map_while(Result::ok) {
            let play = play.clone();
            std::thread::spawn(move || play(stream));
        }
    });
}
