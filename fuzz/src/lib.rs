//! Calls of the core made of arbitrary bytes: shapes, layouts, types, labels, options. Each ends in one of the documented errors, having written
//! nothing, or in results that plain float64 loops confirm; never in a panic, nor in a byte outside the arrays.

pub mod by_products;
pub mod common;
pub mod losses;
#[allow(dead_code)]
#[path = "../../tests/ops/tensor.rs"]
pub mod tensor;
pub mod transforms;
