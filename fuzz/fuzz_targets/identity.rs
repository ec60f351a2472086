#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdtrack_fuzz::identity::run(data));
