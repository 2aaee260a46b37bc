//! Sizes that decide which way the work goes. They change speed, never results.
//!
//! One table, made once per process from what the processor says of its caches; `show_config()` prints it, and `CROSSENT_TUNE="name=value,…"`
//! replaces entries for experiments.

use std::sync::OnceLock;

/// The table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tunables {
    /// Calls on fewer elements run on the calling thread.
    pub threads_from: usize,
    /// Results that, with what is read, take at least so many bytes are written past the caches where the arithmetic allows it.
    pub stream_from: usize,
    /// Results of more classes than a tile has, of at least so many bytes, whose rows are adjacent, are written past the caches: each class is another
    /// stretch of memory.
    pub stream_columns_from: usize,
    /// Results that, with what is read, take at least so many bytes are in no cache: their lines are asked for before they are written.
    pub ask_from: usize,
    /// Rows are finished in groups that take at most this together, so that the second cache still holds them when they are written.
    pub group_bytes: usize,
    /// Whether exponentials of long rows are computed again for results that are written past the caches, or kept in the result by ordinary stores:
    /// computed again never (0), with the widest vectors (1) or at every level (2).
    pub recompute: usize,
}

impl Tunables {
    /// Names and values, in the order of the table.
    pub fn entries(&self) -> [(&'static str, usize); 6] {
        [
            ("threads_from", self.threads_from),
            ("stream_from", self.stream_from),
            ("stream_columns_from", self.stream_columns_from),
            ("ask_from", self.ask_from),
            ("group_bytes", self.group_bytes),
            ("recompute", self.recompute),
        ]
    }

    fn entry(&mut self, name: &str) -> Option<&mut usize> {
        Some(match name {
            "threads_from" => &mut self.threads_from,
            "stream_from" => &mut self.stream_from,
            "stream_columns_from" => &mut self.stream_columns_from,
            "ask_from" => &mut self.ask_from,
            "group_bytes" => &mut self.group_bytes,
            "recompute" => &mut self.recompute,
            _ => return None,
        })
    }

    fn of_this_machine() -> Self {
        // The size of the last cache lies on virtual machines and is shared on all: what every core has of its own says more.
        let second = second_level_cache().unwrap_or(1 << 20);
        let threads = crate::threads::available();
        Self {
            threads_from: 1 << 16,
            stream_from: (32 << 20).max(4 * second * threads),
            stream_columns_from: 16 << 20,
            ask_from: 16 << 20,
            group_bytes: 64 << 10,
            // On one of AMD (Zen 4) worth 25 to 30 % with AVX-512; with AVX2 as much is lost on one thread as won on two.
            recompute: 1,
        }
    }

    fn with_environment(mut self, text: &str) -> Self {
        for (name, value) in text.split(',').filter_map(|pair| pair.split_once('=')) {
            if let (Some(entry), Ok(value)) = (self.entry(name.trim()), value.trim().parse()) {
                *entry = value;
            }
        }
        self
    }
}

/// The table of this process.
pub fn tunables() -> &'static Tunables {
    static TABLE: OnceLock<Tunables> = OnceLock::new();
    TABLE.get_or_init(|| {
        let table = Tunables::of_this_machine();
        std::env::var("CROSSENT_TUNE").map_or(table, |text| table.with_environment(&text))
    })
}

/// Bytes of the second-level cache of one core.
fn second_level_cache() -> Option<usize> {
    let text = std::fs::read_to_string("/sys/devices/system/cpu/cpu0/cache/index2/size").ok()?;
    let text = text.trim();
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let scale = match unit {
        "" => 1,
        "K" => 1 << 10,
        "M" => 1 << 20,
        _ => return None,
    };
    number.parse::<usize>().ok()?.checked_mul(scale)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_environment_replaces_entries_and_nothing_else() {
        let table = Tunables { threads_from: 1, stream_from: 2, stream_columns_from: 6, ask_from: 5, group_bytes: 3, recompute: 4 };
        assert_eq!(table.with_environment("stream_from=7, group_bytes = 9"), Tunables { stream_from: 7, group_bytes: 9, ..table });
        assert_eq!(table.with_environment("stream_from=x,unknown=1,,="), table);
        let mut copy = table;
        for (name, value) in table.entries() {
            assert_eq!(copy.entry(name).copied(), Some(value));
        }
    }

    #[test]
    fn this_machine_has_sensible_sizes() {
        let table = Tunables::of_this_machine();
        assert!(table.stream_from >= 32 << 20 && table.threads_from > 0 && table.group_bytes >= 4096);
    }
}
