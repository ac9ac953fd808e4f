//! Licences of everything we are built from, against the list in `deny.toml`.
//!
//! An expression such as `(MIT OR Apache-2.0) AND Unicode-3.0` is fine when the listed licences alone satisfy it.

use crate::check::Metadata;
use crate::root;
use anyhow::{Context, Result};
use std::collections::BTreeSet;

/// Packages whose licence is not satisfied by the list.
pub fn faults(metadata: &Metadata) -> Result<Vec<String>> {
    let text = std::fs::read_to_string(root().join("deny.toml")).context("read deny.toml")?;
    let allowed = allowed(&text).context("deny.toml: no list `allow` in [licenses]")?;
    let mut faults = Vec::new();
    for package in &metadata.packages {
        let expression = package.license.as_deref().unwrap_or("");
        if !satisfied(expression, &allowed) {
            faults.push(format!("{} {}: licence `{expression}` is not allowed", package.name, package.version));
        }
    }
    Ok(faults)
}

/// The strings of `allow = [...]` in `[licenses]`.
fn allowed(text: &str) -> Option<BTreeSet<String>> {
    let section = text.split_once("[licenses]")?.1;
    let list = section.split_once("allow = [")?.1.split_once(']')?.0;
    Some(list.split('"').skip(1).step_by(2).map(str::to_owned).collect())
}

/// Whether the allowed licences satisfy the SPDX expression. What cannot be read is not satisfied.
fn satisfied(expression: &str, allowed: &BTreeSet<String>) -> bool {
    let spaced = expression.replace('(', " ( ").replace(')', " ) ").replace('/', " OR ");
    let words: Vec<&str> = spaced.split_whitespace().collect();
    let mut parser = Parser { words: &words, at: 0, allowed };
    let result = parser.any();
    result && parser.at == words.len()
}

/// `any` is alternatives of `all`, `all` is `one` joined by AND, `one` is a licence or an `any` in parentheses.
struct Parser<'a> {
    words: &'a [&'a str],
    at: usize,
    allowed: &'a BTreeSet<String>,
}

impl Parser<'_> {
    fn take(&mut self, word: &str) -> bool {
        let found = self.words.get(self.at) == Some(&word);
        self.at += usize::from(found);
        found
    }
    fn any(&mut self) -> bool {
        let mut result = self.all();
        while self.take("OR") {
            result |= self.all();
        }
        result
    }
    fn all(&mut self) -> bool {
        let mut result = self.one();
        while self.take("AND") {
            result &= self.one();
        }
        result
    }
    fn one(&mut self) -> bool {
        if self.take("(") {
            let result = self.any();
            return self.take(")") && result;
        }
        let Some(name) = self.words.get(self.at) else { return false };
        self.at += 1;
        let mut name = (*name).to_owned();
        if self.take("WITH")
            && let Some(exception) = self.words.get(self.at)
        {
            self.at += 1;
            name = format!("{name} WITH {exception}");
        }
        self.allowed.contains(&name)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_expression_is_fine_only_when_listed_licences_satisfy_it() {
        let list = allowed("[licenses]\nallow = [\n  \"MIT\",\n  \"ISC\",\n]\n").expect("a list");
        for fine in ["MIT", "MIT OR GPL-3.0", "GPL-3.0/MIT", "MIT AND ISC", "(GPL-3.0 OR MIT) AND ISC"] {
            assert!(satisfied(fine, &list), "{fine}");
        }
        for wrong in ["", "GPL-3.0", "MIT AND GPL-3.0", "(MIT OR ISC) AND GPL-3.0", "MIT WITH x", "(MIT", "MIT ISC"] {
            assert!(!satisfied(wrong, &list), "{wrong}");
        }
    }
}
