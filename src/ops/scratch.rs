//! Scratch memory, one set per thread, kept between calls.

use std::cell::Cell;

use half::{bf16, f16};

use crate::array::{Array, DType, Float, FromNumber, Offsets};
use crate::kernels::finish::Tile;
use crate::kernels::state::{Reference, Summand};
use crate::simd::Level;

use super::source::line_of;

/// Scratch of one thread, kept between calls.
#[derive(Default)]
pub(super) struct Scratch {
    pub(super) tile: Tile,
    pub(super) single: Buffers<f32>,
    pub(super) double: Buffers<f64>,
    pub(super) references: Vec<Reference>,
    /// Where the rows of a tile begin, in the arrays and in scratch.
    pub(super) offsets: [Offsets; 3],
}

#[derive(Default)]
pub(super) struct Buffers<T> {
    pub(super) x: Vec<T>,
    pub(super) dense: Vec<T>,
    pub(super) shared: Vec<T>,
    pub(super) block: Vec<T>,
    /// What a softcap did to the logits.
    pub(super) slope: Vec<T>,
    /// Of long rows, where they cannot be kept in the result.
    pub(super) exponentials: Vec<T>,
}

thread_local! {
    pub(super) static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Float types with scratch buffers.
pub(super) trait Work: Summand + FromNumber {
    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>);
    /// See [`super::source::line`]; false for types that are not computed in this one.
    fn line(level: Level, array: &Array, offset: isize, backwards: bool, next: isize, dst: &mut [Self]) -> bool;
}
impl Work for f32 {
    fn line(level: Level, array: &Array, offset: isize, backwards: bool, next: isize, dst: &mut [f32]) -> bool {
        match array.dtype() {
            DType::F16 => line_of::<f16, f32>(level, array, offset, backwards, next, dst),
            DType::Bf16 => line_of::<bf16, f32>(level, array, offset, backwards, next, dst),
            DType::F32 => line_of::<f32, f32>(level, array, offset, backwards, next, dst),
            _ => false,
        }
    }

    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>) {
        (&mut scratch.tile, &mut scratch.single, &mut scratch.references)
    }
}
impl Work for f64 {
    fn line(level: Level, array: &Array, offset: isize, backwards: bool, next: isize, dst: &mut [f64]) -> bool {
        array.dtype() == DType::F64 && line_of::<f64, f64>(level, array, offset, backwards, next, dst)
    }

    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>) {
        (&mut scratch.tile, &mut scratch.double, &mut scratch.references)
    }
}

/// Room for `len` numbers, to be overwritten, from the start of a cache line on: vectors that lie in two lines cost two accesses.
pub(super) fn room<T: Float>(buffer: &mut Vec<T>, len: usize) -> &mut [T] {
    const LINE: usize = 64;
    let spare = LINE / size_of::<T>();
    if buffer.len() < len + spare {
        buffer.resize(len + spare, T::ZERO);
    }
    let start = buffer.as_ptr().align_offset(LINE).min(spare);
    &mut buffer[start..start + len]
}
