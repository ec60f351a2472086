#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| nbdtrack_fuzz::session::run(data));
