//! What the guest's writer says on its serial console: `found N` after a start, then `ack N` for each durable record.
//!
//! Pure. A line counts when its end is there: a guest that is killed in the middle of a number has not said it.

/// Longer lines are not the writer's; what is beyond is dropped.
const LINE_BYTES_MAX: usize = 512;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Said {
    /// Records 1..N were there and whole when the writer started.
    Found(u64),
    /// Record N is durable.
    Ack(u64),
    /// Record N was not what it should be.
    Damaged(u64),
}

/// Turns a stream of bytes into what was said.
#[derive(Debug, Default)]
pub struct Listener {
    line: Vec<u8>,
}

impl Listener {
    pub fn hear(&mut self, bytes: &[u8]) -> Vec<Said> {
        let mut said = Vec::new();
        for byte in bytes {
            if *byte == b'\n' {
                said.extend(parse(&self.line));
                self.line.clear();
            } else if self.line.len() < LINE_BYTES_MAX {
                self.line.push(*byte);
            }
        }
        said
    }
}

fn parse(line: &[u8]) -> Option<Said> {
    let text = std::str::from_utf8(line).ok()?.trim();
    let (word, number) = text.rsplit_once(' ')?;
    let number = number.parse().ok()?;
    match word {
        "found" => Some(Said::Found(number)),
        "ack" => Some(Said::Ack(number)),
        "damaged at" => Some(Said::Damaged(number)),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_said_is_heard_however_the_bytes_are_cut() {
        let text = b"kernel noise\r\nfound 7\r\nack 8\nack 9\r\n\xff\xfe\nack x\ndamaged at 10\n";
        let whole = Listener::default().hear(text);
        assert_eq!(whole, [Said::Found(7), Said::Ack(8), Said::Ack(9), Said::Damaged(10)]);
        let mut listener = Listener::default();
        let pieces: Vec<Said> = text.iter().flat_map(|byte| listener.hear(&[*byte])).collect();
        assert_eq!(pieces, whole);
    }

    #[test]
    fn a_number_cut_short_by_the_death_of_the_guest_is_not_taken_for_another() {
        assert!(Listener::default().hear(b"ack 81").is_empty());
    }

    #[test]
    fn a_console_without_any_line_end_takes_no_memory() {
        let mut listener = Listener::default();
        listener.hear(&[b'x'; 100_000]);
        assert!(listener.line.len() <= LINE_BYTES_MAX);
        assert_eq!(listener.hear(b"\nack 1\n"), [Said::Ack(1)]);
    }
}
