//! Sizes as people write them: `10G`, `256M`, `1GiB`, `4096`. Units are powers of 1024, with or without `iB` or `B`.

use pollux_base::unit::VOLUME_BYTES_MAX;

/// A size in bytes; for clap.
pub fn parse(text: &str) -> Result<u64, String> {
    let wanted = "a size is a number with K, M, G or T, such as 10G or 256M";
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(wanted.into());
    }
    let shift = match unit.trim().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" | "kb" | "kib" => 10,
        "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(wanted.into()),
    };
    let too_large = || format!("the largest size is {}", show(VOLUME_BYTES_MAX));
    let number: u64 = number.parse().map_err(|_| too_large())?;
    let bytes = number.checked_mul(1 << shift).ok_or_else(too_large)?;
    match bytes {
        0 => Err("a size must be more than zero".into()),
        bytes if bytes > VOLUME_BYTES_MAX => Err(too_large()),
        bytes => Ok(bytes),
    }
}

/// A size for people: the largest unit that leaves at least one, with one decimal where that says more.
pub fn show(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut unit = 0;
    let mut value = bytes as f64;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if value.fract() == 0.0 { format!("{value} {}", units[unit]) } else { format!("{value:.1} {}", units[unit]) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in
            [("4096", 4096), ("256M", 256 << 20), ("10G", 10 << 30), ("1GiB", 1 << 30), ("2 tb", 2 << 40), ("8k", 8192)]
        {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn a_size_that_is_none_zero_or_absurd_is_refused_with_a_reason() {
        for text in
            ["", "G", "-1G", "1.5G", "10 apples", "0", "0G", "99999999999999999999", "2000T", "18446744073709551615T"]
        {
            assert!(parse(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_shown_in_the_unit_that_fits() {
        assert_eq!(show(0), "0 B");
        assert_eq!(show(4 << 30), "4 GiB");
        assert_eq!(show(1536 << 20), "1.5 GiB");
    }
}
