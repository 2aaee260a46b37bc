//! Stable log-softmax, NLL and cross-entropy with gradients, in one pass, for the CPU.
//!
//! `ARCHITECTURE.md` draws the layers; the public entry points are in [`ops`].

pub mod array;
pub mod kernels;
#[cfg(feature = "python")]
mod memory;
pub mod ops;
mod place;
#[cfg(feature = "python")]
mod python;
pub mod simd;
pub mod threads;
pub mod tunables;
