//! Whatever arrives: `head.rs` refuses it, or tiny_http reads it as the same single request.
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

#[path = "../oracle.rs"]
mod oracle;

static ORACLE: LazyLock<oracle::Oracle> = LazyLock::new(oracle::Oracle::new);

fuzz_target!(|buffer: &[u8]| {
    let _ = ORACLE.judge(buffer);
});
