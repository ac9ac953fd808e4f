//! A node's power switch by Redfish (DMTF DSP0266), the subset that fencing needs: who is it, is it on, switch it.
//!
//! * Nothing is switched before the system has told the UUID that is expected of it: a switch of another machine would
//!   make us kill that one and believe ours dead.
//! * `Ok` of `fence` is proof: the switch was read and said `Off`. What it answered to the command proves nothing, and
//!   neither does silence.
//! * A machine that is off is fenced; whether the switch calls a second `ForceOff` an error does not matter.
//!
//! Blocking; every call is bounded. Over https the switch's certificate is not checked: those of service processors are
//! self-signed, and the configuration names none. The management network is trusted as with plain http.

use pollux_base::config::PowerConfig;
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::{Duration, Instant};
use ureq::Agent;
use ureq::tls::TlsConfig;

/// One question, from name to the last byte. A switch on the management network answers within some 100 ms; a slow one
/// must leave time for another attempt within the 5 s promised for a takeover.
const CALL_TIMEOUT: Duration = Duration::from_secs(2);
/// A machine is off within this time after the command or the attempt has failed; then it is asked anew.
const OFF_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two readings of the state.
const READ_PAUSE: Duration = Duration::from_millis(100);
/// A system's description has some tens of kilobytes at most.
const ANSWER_BYTES_MAX: u64 = 1 << 20;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerState {
    On,
    Off,
    /// On its way between the two, or in a state of the vendor's: not off.
    Other,
}

/// What a switch tells of its machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub uuid: String,
    pub power: PowerState,
}

/// Why a machine could not be proven to be in the wanted state.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PowerError {
    #[error("the power switch at {url} does not answer: {reason}")]
    Unreachable { url: String, reason: String },
    #[error("the power switch at {url} belongs to machine {actual}, not to {expected}; nothing was switched")]
    WrongMachine { url: String, expected: String, actual: String },
    #[error("the power switch at {url} answered {status}: {message}")]
    Refused { url: String, status: u16, message: String },
    #[error("the power switch at {url} answered what is no Redfish: {reason}")]
    Nonsense { url: String, reason: String },
    #[error("the machine was not {wanted} {} s after the command", .waited.as_secs())]
    NotYet { wanted: &'static str, waited: Duration },
}

impl PowerError {
    /// What a person could do.
    pub fn hint(&self) -> &'static str {
        match self {
            PowerError::Unreachable { .. } => "check the switch's address and the management network",
            PowerError::WrongMachine { .. } => "correct the switch's address, system or UUID in the configuration",
            PowerError::Refused { .. } | PowerError::Nonsense { .. } => {
                "check the address and the system's id at the switch"
            }
            PowerError::NotYet { .. } => "look at the machine: its switch takes commands but has no effect",
        }
    }
}

/// Who the switch says it is, unchecked, and whether its machine is on.
pub fn identify(config: &PowerConfig) -> Result<Identity, PowerError> {
    Switch::new(config).identify()
}

/// Whether the machine is on; only if it is the right one.
pub fn power_state(config: &PowerConfig) -> Result<PowerState, PowerError> {
    Switch::new(config).power_state()
}

/// Switches the machine off and reads back that it is.
pub fn fence(config: &PowerConfig) -> Result<(), PowerError> {
    Switch::new(config).bring_to("off", PowerState::Off, "ForceOff", OFF_TIMEOUT)
}

/// Switches the machine on and reads back that it is.
pub fn on(config: &PowerConfig) -> Result<(), PowerError> {
    Switch::new(config).bring_to("on", PowerState::On, "On", OFF_TIMEOUT)
}

struct Switch<'a> {
    config: &'a PowerConfig,
    url: String,
    agent: Agent,
}

impl<'a> Switch<'a> {
    fn new(config: &'a PowerConfig) -> Switch<'a> {
        let tls = TlsConfig::builder()
            .unversioned_rustls_crypto_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
            .disable_verification(true)
            .build();
        let agent = Agent::config_builder()
            .timeout_global(Some(CALL_TIMEOUT))
            .http_status_as_error(false)
            // A redirect or a proxy would have us believe another machine.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .proxy(None)
            .tls_config(tls)
            .build()
            .new_agent();
        let url = format!("{}/redfish/v1/Systems/{}", config.url.trim_end_matches('/'), config.system);
        Switch { config, url, agent }
    }

    fn identify(&self) -> Result<Identity, PowerError> {
        let response = self.agent.get(&self.url).call().map_err(|error| self.unreachable(&error))?;
        let system = self.read(response)?;
        let nonsense = |reason: &str| PowerError::Nonsense { url: self.url.clone(), reason: reason.into() };
        Ok(Identity {
            uuid: system["UUID"].as_str().ok_or_else(|| nonsense("a system without UUID"))?.into(),
            power: match system["PowerState"].as_str().ok_or_else(|| nonsense("a system without PowerState"))? {
                "On" => PowerState::On,
                "Off" => PowerState::Off,
                _ => PowerState::Other,
            },
        })
    }

    fn power_state(&self) -> Result<PowerState, PowerError> {
        let identity = self.identify()?;
        if identity.uuid.eq_ignore_ascii_case(&self.config.uuid) {
            return Ok(identity.power);
        }
        let (url, expected, actual) = (self.url.clone(), self.config.uuid.clone(), identity.uuid);
        Err(PowerError::WrongMachine { url, expected, actual })
    }

    fn bring_to(
        &self,
        name: &'static str,
        wanted: PowerState,
        reset: &str,
        within: Duration,
    ) -> Result<(), PowerError> {
        if self.power_state()? == wanted {
            return Ok(());
        }
        let commanded = self.reset(reset);
        let began = Instant::now();
        loop {
            let state = self.power_state();
            match &state {
                Ok(state) if *state == wanted => return Ok(()),
                Err(PowerError::WrongMachine { .. }) => return state.map(|_| ()),
                // A switch may be busy while it switches.
                Ok(_) | Err(_) => {}
            }
            // A command that was refused or lost is for the caller to give again.
            commanded.clone()?;
            if began.elapsed() >= within {
                return Err(state.err().unwrap_or(PowerError::NotYet { wanted: name, waited: within }));
            }
            std::thread::sleep(READ_PAUSE);
        }
    }

    fn reset(&self, kind: &str) -> Result<(), PowerError> {
        let url = format!("{}/Actions/ComputerSystem.Reset", self.url);
        let body = json!({ "ResetType": kind }).to_string();
        let request = self.agent.post(&url).header("content-type", "application/json");
        let response = request.send(body).map_err(|error| self.unreachable(&error))?;
        if response.status().is_success() {
            return Ok(());
        }
        self.read(response).map(|_| ())
    }

    /// The answer as JSON; an error if its status is one.
    fn read(&self, mut response: ureq::http::Response<ureq::Body>) -> Result<Value, PowerError> {
        let status = response.status();
        let text = response.body_mut().with_config().limit(ANSWER_BYTES_MAX).read_to_string();
        let text = text.map_err(|error| self.unreachable(&error))?;
        let json: Result<Value, _> = serde_json::from_str(&text);
        if !status.is_success() {
            // DSP0266, 8.6: errors say what they mean in error.message.
            let message = json.ok().and_then(|json| Some(json["error"]["message"].as_str()?.to_string()));
            let message = message.or_else(|| status.canonical_reason().map(String::from)).unwrap_or_default();
            return Err(PowerError::Refused { url: self.url.clone(), status: status.as_u16(), message });
        }
        json.map_err(|error| PowerError::Nonsense { url: self.url.clone(), reason: error.to_string() })
    }

    fn unreachable(&self, error: &ureq::Error) -> PowerError {
        PowerError::Unreachable { url: self.url.clone(), reason: error.to_string() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::sync::Mutex;

    const UUID: &str = "6f6c6c75-7801-4001-8001-706f6c6c7578";

    /// A switch with its machine, and how it misbehaves.
    #[derive(Clone, Copy, Debug)]
    struct Toy {
        uuid: &'static str,
        is_on: bool,
        /// Readings after a command until it shows.
        delay: u32,
        refuses: bool,
        is_stuck: bool,
        commands: u32,
    }

    const GOOD: Toy = Toy { uuid: UUID, is_on: true, delay: 0, refuses: false, is_stuck: false, commands: 0 };

    fn serve(toy: Toy) -> (PowerConfig, Arc<Mutex<Toy>>) {
        let listener = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let url = format!("http://{}/", listener.local_addr().expect("bound"));
        let toy = Arc::new(Mutex::new(toy));
        let shared = toy.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                answer(stream.expect("loopback"), &shared);
            }
        });
        (PowerConfig { url, system: "a".into(), uuid: UUID.to_uppercase() }, toy)
    }

    fn answer(mut stream: TcpStream, toy: &Mutex<Toy>) {
        let mut request = Vec::new();
        let mut chunk = [0; 1024];
        let whole = |request: &[u8]| {
            let text = String::from_utf8_lossy(request).to_string();
            match text.split_once("\r\n\r\n") {
                Some((head, body)) => head.starts_with("GET") || body.ends_with('}'),
                None => false,
            }
        };
        while !whole(&request) {
            match stream.read(&mut chunk) {
                Ok(0) | Err(_) => return,
                Ok(count) => request.extend_from_slice(&chunk[..count]),
            }
        }
        let request = String::from_utf8_lossy(&request).to_string();
        let mut toy = toy.lock().expect("no test panics holding it");
        let (status, body) = if request.starts_with("GET /redfish/v1/Systems/a ") {
            if toy.commands > 0 && !toy.is_stuck {
                match toy.delay {
                    0 => toy.is_on = false,
                    _ => toy.delay -= 1,
                }
            }
            let state = if toy.is_on { "On" } else { "Off" };
            ("200 OK", json!({ "UUID": toy.uuid, "PowerState": state }).to_string())
        } else if request.starts_with("POST /redfish/v1/Systems/a/Actions/ComputerSystem.Reset ") {
            assert!(request.ends_with(r#"{"ResetType":"ForceOff"}"#), "{request}");
            if toy.refuses {
                ("409 Conflict", r#"{"error": {"code": "x", "message": "not in this state"}}"#.into())
            } else {
                toy.commands += 1;
                ("204 No Content", String::new())
            }
        } else {
            ("404 Not Found", "<html>".into())
        };
        let length =
            if status.starts_with("204") { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let _ = write!(stream, "HTTP/1.1 {status}\r\nConnection: close\r\n{length}\r\n{body}");
    }

    #[test]
    fn off_is_proven_by_reading_it_back() {
        let (config, toy) = serve(Toy { delay: 3, ..GOOD });
        assert_eq!(power_state(&config), Ok(PowerState::On));
        assert_eq!(fence(&config), Ok(()));
        assert!(!toy.lock().expect("whole").is_on, "success was said when the machine was off and not before");

        let (config, _toy) = serve(Toy { is_stuck: true, ..GOOD });
        let stuck = Switch::new(&config).bring_to("off", PowerState::Off, "ForceOff", Duration::from_millis(250));
        assert!(matches!(stuck, Err(PowerError::NotYet { wanted: "off", .. })), "{stuck:?}");
    }

    #[test]
    fn off_on_a_machine_that_is_off_is_success() {
        let (config, toy) = serve(Toy { is_on: false, refuses: true, ..GOOD });
        assert_eq!(fence(&config), Ok(()));
        assert_eq!(toy.lock().expect("whole").commands, 0);
    }

    #[test]
    fn the_switch_of_another_machine_is_never_used() {
        let (config, toy) = serve(Toy { uuid: "another", ..GOOD });
        let refused = fence(&config);
        assert!(matches!(&refused, Err(PowerError::WrongMachine { actual, .. }) if actual == "another"), "{refused:?}");
        assert_eq!(toy.lock().expect("whole").commands, 0);
        let (config, toy) = serve(Toy { uuid: "another", is_on: false, ..GOOD });
        assert!(fence(&config).is_err(), "that another machine is off proves nothing");
        assert_eq!(toy.lock().expect("whole").commands, 0);
    }

    #[test]
    fn a_refused_command_on_a_machine_that_stays_on_is_no_proof() {
        let (config, _toy) = serve(Toy { refuses: true, ..GOOD });
        match fence(&config) {
            Err(PowerError::Refused { status: 409, message, .. }) => assert_eq!(message, "not in this state"),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn silence_and_nonsense_are_errors_within_the_time() {
        let mute = TcpListener::bind("127.0.0.1:0").expect("loopback is there");
        let url = format!("http://{}", mute.local_addr().expect("bound"));
        let config = PowerConfig { url, system: "a".into(), uuid: UUID.into() };
        let began = Instant::now();
        assert!(matches!(fence(&config), Err(PowerError::Unreachable { .. })));
        assert!(began.elapsed() < CALL_TIMEOUT * 3);

        let (config, _toy) = serve(GOOD);
        let lost = PowerConfig { system: "unknown".into(), ..config };
        assert!(matches!(fence(&lost), Err(PowerError::Refused { status: 404, .. })));
        let unparsable = PowerConfig { url: "not a url".into(), ..lost };
        assert!(matches!(fence(&unparsable), Err(PowerError::Unreachable { .. })));
    }
}
