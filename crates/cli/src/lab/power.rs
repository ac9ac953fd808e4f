//! A node's power switch: the subset of Redfish (DSP0266) with which a node is fenced, over plain HTTP.
//!
//! `GET /redfish/v1/Systems/{id}` tells the UUID and the power state, `POST .../Actions/ComputerSystem.Reset` takes
//! `ForceOff` and `On`. The switch does not decide: it passes commands to whoever holds the machine, and says `Off` only
//! when that one says so. Whatever else is sent is answered with an error or dropped; nothing stays waiting for long.

use serde_json::{Value, json};
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// A real request is a few hundred bytes.
const REQUEST_BYTES_MAX: usize = 8 * 1024;
/// A peer sends its request at once; one that does not is dropped.
const REQUEST_TIME: Duration = Duration::from_secs(3);
/// Each other node asks over one connection at a time; more than these are garbage, and wait in the backlog.
const CONNECTIONS_MAX: usize = 16;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerState {
    On,
    Off,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reset {
    On,
    ForceOff,
}

/// The machine behind the switch.
pub trait Machine: Send + Sync {
    /// `None`: the machine's keeper does not answer.
    fn power_state(&self) -> Option<PowerState>;
    /// Whether the command was taken.
    fn reset(&self, reset: Reset) -> bool;
}

/// Who the switch says it is.
#[derive(Clone, Debug)]
pub struct Identity {
    pub system: String,
    pub uuid: String,
}

/// Serves on `listener` until the process ends.
pub fn serve(listener: TcpListener, identity: Identity, machine: Arc<dyn Machine>) {
    let identity = Arc::new(identity);
    let open = Arc::new(AtomicUsize::new(0));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(stream) = stream else {
                // Out of file descriptors, most likely: do not spin.
                std::thread::sleep(Duration::from_millis(100));
                continue;
            };
            if open.fetch_add(1, Ordering::SeqCst) >= CONNECTIONS_MAX {
                open.fetch_sub(1, Ordering::SeqCst);
                continue;
            }
            let (identity, machine, open) = (identity.clone(), machine.clone(), open.clone());
            std::thread::spawn(move || {
                converse(stream, &identity, machine.as_ref());
                open.fetch_sub(1, Ordering::SeqCst);
            });
        }
    });
}

/// One request, one answer; a client that stops in the middle gets none.
fn converse(mut stream: TcpStream, identity: &Identity, machine: &dyn Machine) {
    let response = match read_request(&mut stream) {
        Ok(Some(request)) => respond(&request, identity, machine),
        Ok(None) => return,
        Err(refusal) => refusal,
    };
    let _ = stream.set_write_timeout(Some(REQUEST_TIME));
    let _ = stream.write_all(&response.bytes());
}

#[derive(Debug, PartialEq, Eq)]
struct Request {
    method: String,
    path: String,
    body: Vec<u8>,
}

#[derive(Debug, PartialEq)]
struct Response {
    status: u16,
    body: Option<Value>,
}

impl Response {
    fn refuse(status: u16, message: &str) -> Response {
        Response { status, body: Some(json!({"error": {"code": "Base.1.0.GeneralError", "message": message}})) }
    }
    fn bytes(&self) -> Vec<u8> {
        let reason = match self.status {
            200 => "OK",
            204 => "No Content",
            400 => "Bad Request",
            404 => "Not Found",
            405 => "Method Not Allowed",
            413 => "Content Too Large",
            _ => "Service Unavailable",
        };
        let body = self.body.as_ref().map(Value::to_string).unwrap_or_default();
        let head = format!("HTTP/1.1 {} {reason}\r\nOData-Version: 4.0\r\nConnection: close\r\n", self.status);
        let kind = if self.status == 204 {
            String::new()
        } else {
            format!("Content-Type: application/json\r\nContent-Length: {}\r\n", body.len())
        };
        format!("{head}{kind}\r\n{body}").into_bytes()
    }
}

/// Reads one request within its size and time. `None`: the other side went away.
fn read_request(stream: &mut TcpStream) -> Result<Option<Request>, Response> {
    let deadline = Instant::now() + REQUEST_TIME;
    let mut bytes = Vec::new();
    let mut chunk = [0; 1024];
    loop {
        if let Some(request) = parse(&bytes)? {
            return Ok(Some(request));
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() || stream.set_read_timeout(Some(left)).is_err() {
            return Ok(None);
        }
        match stream.read(&mut chunk) {
            Ok(0) | Err(_) => return Ok(None),
            Ok(count) => bytes.extend_from_slice(&chunk[..count]),
        }
    }
}

/// A request once it is whole; `None` while more must come.
fn parse(bytes: &[u8]) -> Result<Option<Request>, Response> {
    let refuse = |message| Err(Response::refuse(400, message));
    let Some(head_end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") else {
        if bytes.len() > REQUEST_BYTES_MAX {
            return Err(Response::refuse(413, "the request is too long"));
        }
        // Garbage is refused as soon as it is known, not when the time is over.
        return if bytes.first().is_some_and(|byte| !byte.is_ascii_uppercase()) {
            refuse("not HTTP")
        } else {
            Ok(None)
        };
    };
    let Ok(head) = std::str::from_utf8(&bytes[..head_end]) else { return refuse("not HTTP") };
    let mut lines = head.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(path), Some(version), None) = (words.next(), words.next(), words.next(), words.next())
    else {
        return refuse("not HTTP");
    };
    if !version.starts_with("HTTP/1.") || !path.starts_with('/') {
        return refuse("not HTTP/1.x");
    }
    let mut length = 0;
    for line in lines {
        let Some((name, value)) = line.split_once(':') else { return refuse("not a header") };
        if name.eq_ignore_ascii_case("content-length") {
            let Ok(number) = value.trim().parse::<usize>() else { return refuse("not a length") };
            length = number;
        }
        if name.eq_ignore_ascii_case("transfer-encoding") {
            return refuse("a body must come with its length");
        }
    }
    if length > REQUEST_BYTES_MAX || head_end > REQUEST_BYTES_MAX {
        return Err(Response::refuse(413, "the request is too long"));
    }
    let body = &bytes[head_end + 4..];
    if body.len() < length {
        return Ok(None);
    }
    Ok(Some(Request { method: method.into(), path: path.into(), body: body[..length].to_vec() }))
}

fn respond(request: &Request, identity: &Identity, machine: &dyn Machine) -> Response {
    let systems = "/redfish/v1/Systems";
    let own = format!("{systems}/{}", identity.system);
    let action = format!("{own}/Actions/ComputerSystem.Reset");
    let path = request.path.split('?').next().unwrap_or_default().trim_end_matches('/');
    let ok = |body| Response { status: 200, body: Some(body) };
    match (request.method.as_str(), path) {
        ("GET", "/redfish/v1") => {
            ok(json!({"@odata.id": "/redfish/v1", "RedfishVersion": "1.6.0", "Systems": {"@odata.id": systems}}))
        }
        ("GET", path) if path == systems => {
            ok(json!({"@odata.id": systems, "Members@odata.count": 1, "Members": [{"@odata.id": own}]}))
        }
        ("GET", path) if path == own => match machine.power_state() {
            Some(state) => ok(json!({
                "@odata.id": own,
                "@odata.type": "#ComputerSystem.v1_10_0.ComputerSystem",
                "Id": identity.system,
                "Name": identity.system,
                "UUID": identity.uuid,
                "PowerState": match state { PowerState::On => "On", PowerState::Off => "Off" },
                "Actions": {"#ComputerSystem.Reset": {
                    "target": action,
                    "ResetType@Redfish.AllowableValues": ["On", "ForceOff"],
                }},
            })),
            None => Response::refuse(503, "the machine's keeper does not answer"),
        },
        ("POST", path) if path == action => {
            let body: Value = serde_json::from_slice(&request.body).unwrap_or_default();
            let reset = match body["ResetType"].as_str() {
                Some("ForceOff") => Reset::ForceOff,
                Some("On") => Reset::On,
                _ => return Response::refuse(400, "ResetType must be On or ForceOff"),
            };
            match machine.reset(reset) {
                true => Response { status: 204, body: None },
                false => Response::refuse(503, "the machine's keeper does not answer"),
            }
        }
        (_, path) if path == own || path == action || path == systems => {
            Response::refuse(405, "this method is not known here")
        }
        _ => Response::refuse(404, "no such resource"),
    }
}

/// Listens where a node's switch is; the error names the address.
pub fn listen(address: SocketAddr) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).map_err(|error| std::io::Error::new(error.kind(), format!("{address}: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    struct Toy(Mutex<PowerState>);
    impl Machine for Toy {
        fn power_state(&self) -> Option<PowerState> {
            Some(*self.0.lock().expect("no test panics holding it"))
        }
        fn reset(&self, reset: Reset) -> bool {
            *self.0.lock().expect("no test panics holding it") = match reset {
                Reset::On => PowerState::On,
                Reset::ForceOff => PowerState::Off,
            };
            true
        }
    }

    fn identity() -> Identity {
        Identity { system: "node-a".into(), uuid: "123".into() }
    }

    fn ask(machine: &Toy, text: &str) -> Response {
        match parse(text.as_bytes()) {
            Ok(Some(request)) => respond(&request, &identity(), machine),
            Ok(None) => panic!("{text:?} is not whole"),
            Err(refusal) => refusal,
        }
    }

    fn post(body: &str) -> String {
        let path = "/redfish/v1/Systems/node-a/Actions/ComputerSystem.Reset";
        format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len())
    }

    #[test]
    fn switching_off_is_read_back_and_off_on_a_machine_that_is_off_is_success() {
        let machine = Toy(Mutex::new(PowerState::On));
        let get = "GET /redfish/v1/Systems/node-a HTTP/1.1\r\n\r\n";
        let body = ask(&machine, get).body.expect("a system");
        assert_eq!((body["PowerState"].as_str(), body["UUID"].as_str()), (Some("On"), Some("123")));
        for _ in 0..2 {
            assert_eq!(ask(&machine, &post(r#"{"ResetType":"ForceOff"}"#)).status, 204);
            assert_eq!(ask(&machine, get).body.expect("a system")["PowerState"], "Off");
        }
        assert_eq!(ask(&machine, &post(r#"{"ResetType":"On"}"#)).status, 204);
        assert_eq!(ask(&machine, get).body.expect("a system")["PowerState"], "On");
    }

    #[test]
    fn another_machines_name_and_unknown_resets_change_nothing() {
        let machine = Toy(Mutex::new(PowerState::On));
        assert_eq!(ask(&machine, "GET /redfish/v1/Systems/node-b HTTP/1.1\r\n\r\n").status, 404);
        assert_eq!(ask(&machine, "DELETE /redfish/v1/Systems/node-a HTTP/1.1\r\n\r\n").status, 405);
        for body in ["", "{}", "[]", "ForceOff", r#"{"ResetType":7}"#, r#"{"ResetType":"Nmi"}"#] {
            assert_eq!(ask(&machine, &post(body)).status, 400, "{body}");
        }
        assert_eq!(machine.power_state(), Some(PowerState::On));
    }

    #[test]
    fn garbage_is_refused_and_never_waited_for_without_bound() {
        for garbage in [
            b"\x16\x03\x01\x02\x00".as_slice(),
            b"{}\r\n",
            b"GET\r\n\r\n",
            b"GET / SMTP\r\n\r\n",
            b"\xff\xfe\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: -1\r\n\r\n",
            b"POST / HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n",
            b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n",
            &[b'A'; REQUEST_BYTES_MAX + 1],
        ] {
            assert!(parse(garbage).is_err(), "{:?}", String::from_utf8_lossy(&garbage[..garbage.len().min(40)]));
        }
        assert_eq!(parse(b"GET /redfish/v1 HTT"), Ok(None), "half a request may still become one");
    }

    #[test]
    fn a_connection_that_says_nothing_or_rubbish_does_not_hinder_the_next() {
        let listener = listen("127.0.0.1:0".parse().expect("an address")).expect("a port");
        let address = listener.local_addr().expect("bound");
        serve(listener, identity(), Arc::new(Toy(Mutex::new(PowerState::On))));
        let silent = TcpStream::connect(address).expect("connect");
        let mut rubbish = TcpStream::connect(address).expect("connect");
        rubbish.write_all(&[0; 64]).expect("write");
        let mut client = TcpStream::connect(address).expect("connect");
        client.write_all(b"GET /redfish/v1/Systems/node-a HTTP/1.1\r\nHost: x\r\n\r\n").expect("write");
        let mut text = String::new();
        client.read_to_string(&mut text).expect("an answer");
        assert!(text.starts_with("HTTP/1.1 200 OK\r\n") && text.contains(r#""PowerState":"On""#), "{text}");
        drop(silent);
    }
}
