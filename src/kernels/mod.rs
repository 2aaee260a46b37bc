//! One row or one tile of columns at a time: no threads, no allocation, no Python, any instruction set, any element.

#![forbid(unsafe_code)]

pub mod bend;
pub mod columns;
pub mod copy;
pub mod divergence;
pub mod emit;
pub mod few;
pub mod finish;
pub mod input;
pub mod math;
pub mod real;
pub mod rows;
pub mod scan;
pub mod short;
pub mod state;
pub mod sweep;
pub mod tanh;
