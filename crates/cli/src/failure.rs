//! What the operator is told when something does not work: two lines and an exit code.
//!
//! Every failure of the command ends as a `Failure`. Its first line says what is wrong, its second what to do about it.

use std::fmt;

/// Exit codes, as `docs` and `--help` promise them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Code {
    /// Something outside the table: the server is not reached, a program failed.
    Other = 1,
    Usage = 2,
    NotFound = 3,
    Conflict = 4,
    Unsafe = 5,
    TimedOut = 6,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    pub code: Code,
    pub error: String,
    pub hint: Option<String>,
}

pub type Outcome<T = ()> = Result<T, Failure>;

impl Failure {
    pub fn new(code: Code, error: impl fmt::Display) -> Failure {
        Failure { code, error: one_line(&error.to_string()), hint: None }
    }
    pub fn other(error: impl fmt::Display) -> Failure {
        Failure::new(Code::Other, error)
    }
    pub fn usage(error: impl fmt::Display) -> Failure {
        Failure::new(Code::Usage, error)
    }
    /// The same with advice.
    pub fn hint(mut self, hint: impl fmt::Display) -> Failure {
        self.hint = Some(one_line(&hint.to_string()));
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Error: {}", self.error)?;
        match &self.hint {
            Some(hint) => write!(f, "\nHint: {hint}"),
            None => Ok(()),
        }
    }
}

impl std::error::Error for Failure {}

/// Says what was being done when something failed, and keeps the cause.
pub trait Doing<T> {
    fn doing(self, what: impl fmt::Display) -> Outcome<T>;
}

impl<T, E: fmt::Display> Doing<T> for Result<T, E> {
    fn doing(self, what: impl fmt::Display) -> Outcome<T> {
        self.map_err(|error| Failure::other(format!("{what}: {error}")))
    }
}

/// Errors are two lines, whatever a server or a program wrote.
fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_two_lines_even_if_its_cause_is_many() {
        let failure = Failure::other("first\nsecond\r\n").hint("do\nthis");
        assert_eq!(failure.to_string(), "Error: first second\nHint: do this");
    }
}
