//! Whatever arrives: `head.rs` refuses it, or tiny_http reads it as the same single request.
//!
//! ```sh
//! mkdir -p fuzz/corpus/head
//! cargo +nightly fuzz run head fuzz/corpus/head fuzz/seeds/head -- -dict=fuzz/head.dict \
//!     -max_len=20000 -rss_limit_mb=512 -malloc_limit_mb=64 -max_total_time=600
//! ```
#![no_main]

use std::sync::LazyLock;

use libfuzzer_sys::fuzz_target;

#[path = "../oracle.rs"]
mod oracle;

static ORACLE: LazyLock<oracle::Oracle> = LazyLock::new(oracle::Oracle::new);

fuzz_target!(|buffer: &[u8]| {
    ORACLE.judge(buffer);
});
