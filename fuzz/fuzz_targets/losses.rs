//! See the library of this crate.
#![no_main]

libfuzzer_sys::fuzz_target!(|case: crossent_fuzz::losses::Loss| case.check());
