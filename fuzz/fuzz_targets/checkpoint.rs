#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| walnut_fuzz::checkpoint(data));
