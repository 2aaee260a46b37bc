//! Tells the crate what built it, for `crossent.show_config()`.

use std::env;
use std::process::Command;

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    println!("cargo::rerun-if-env-changed=RUSTC");
    let target = env::var("TARGET").unwrap_or_default();
    println!("cargo::rustc-env=CROSSENT_TARGET={target}");
    let rustc = env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    // A version that cannot be asked for is left out: it is information, not a condition.
    if let Some(output) = Command::new(rustc).arg("--version").output().ok().filter(|output| output.status.success()) {
        println!("cargo::rustc-env=CROSSENT_RUSTC={}", String::from_utf8_lossy(&output.stdout).trim());
    }
}
