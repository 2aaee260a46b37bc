//! A race on purpose, for `tools/tsan.sh`: a sanitizer that does not report it sees nothing. No part of `cargo test`.

use core::cell::UnsafeCell;
use std::time::Duration;

use crossent::threads::for_each;

struct Shared(UnsafeCell<u64>);

// SAFETY: not safe at all, which is what this is for.
unsafe impl Sync for Shared {}

impl Shared {
    fn add(&self) {
        // SAFETY: as above.
        unsafe { *self.0.get() += 1 }
    }
}

#[test]
fn two_threads_add_to_one_number() {
    let shared = Shared(UnsafeCell::new(0));
    for_each(2, 20, &|_| {
        shared.add();
        // Until the other one has started as well.
        std::thread::sleep(Duration::from_millis(5));
    });
}
