//! Scratch memory, one set per thread, kept between calls.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use half::{bf16, f16};

use crate::array::{Array, DType, Element, Float, FromNumber, Offsets};
use crate::kernels::finish::Tile;
use crate::kernels::state::{Reference, Summand};
use crate::simd::Level;

use super::bent::Bent;
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
    pub(super) x: Buffer<T>,
    pub(super) dense: Buffer<T>,
    pub(super) shared: Buffer<T>,
    pub(super) block: Buffer<T>,
    /// What a softcap did to the logits.
    pub(super) slope: Buffer<T>,
    pub(super) bent: Bent<T>,
    /// Of long rows, where they cannot be kept in the result.
    pub(super) exponentials: Buffer<T>,
    /// States of columns.
    pub(super) running: Buffer<T>,
    pub(super) sums: Buffer<f64>,
}

thread_local! {
    pub(super) static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// What depends on the type of elements that are computed in `T`.
pub(super) trait OfType<T> {
    fn run<E: Element<Acc = T>>(self);
}

/// Float types with scratch buffers.
pub(super) trait Work: Summand + FromNumber {
    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>);
    /// Runs what depends on the type of the elements, of those that are computed in this one.
    fn of_type(dtype: DType, work: impl OfType<Self>);
    /// See [`super::source::line`]; false for types that are not computed in this one.
    fn line(level: Level, array: &Array, offset: isize, backwards: bool, next: isize, dst: &mut [Self]) -> bool;
}
impl Work for f32 {
    fn of_type(dtype: DType, work: impl OfType<f32>) {
        match dtype {
            DType::F16 => work.run::<f16>(),
            DType::Bf16 => work.run::<bf16>(),
            _ => work.run::<f32>(),
        }
    }

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
    fn of_type(_dtype: DType, work: impl OfType<f64>) {
        work.run::<f64>();
    }

    fn line(level: Level, array: &Array, offset: isize, backwards: bool, next: isize, dst: &mut [f64]) -> bool {
        array.dtype() == DType::F64 && line_of::<f64, f64>(level, array, offset, backwards, next, dst)
    }

    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>) {
        (&mut scratch.tile, &mut scratch.double, &mut scratch.references)
    }
}

/// Numbers from the start of a cache line on: vectors that lie in two lines cost two accesses.
pub(super) struct Buffer<T>(Vec<T>);

impl<T> Default for Buffer<T> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<T> Buffer<T> {
    /// Numbers in a line.
    const LINE: usize = 64 / size_of::<T>();

    fn start(&self) -> usize {
        self.0.as_ptr().align_offset(64).min(Self::LINE).min(self.0.len())
    }
}

impl<T> Deref for Buffer<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        &self.0[self.start()..]
    }
}

impl<T> DerefMut for Buffer<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let start = self.start();
        &mut self.0[start..]
    }
}

/// Room for `len` numbers, to be overwritten.
pub(super) fn room<T: Float>(buffer: &mut Buffer<T>, len: usize) -> &mut [T] {
    if buffer.0.len() < len + Buffer::<T>::LINE {
        buffer.0.resize(len + Buffer::<T>::LINE, T::ZERO);
    }
    &mut buffer[..len]
}
