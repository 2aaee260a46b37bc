//! Scratch memory, one set per thread, kept between calls.

use std::cell::Cell;
use std::ops::{Deref, DerefMut};

use half::{bf16, f16};

use crate::array::{Array, DType, Element, Float, FromNumber, HalfRows, Offsets, Out, Rows, RowsMut, Span};
use crate::kernels::finish::Tile;
use crate::kernels::state::{Reference, Summand};
use crate::simd::Level;

use super::by_rows::{Results, To, narrow};
use super::plan::Path;
use super::source::line_of;
use super::strip::Strip;

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
    /// Of long rows, where they cannot be kept in the result.
    pub(super) exponentials: Buffer<T>,
    /// States of columns.
    pub(super) running: Buffer<T>,
    pub(super) sums: Buffer<f64>,
}

thread_local! {
    pub(super) static SCRATCH: Cell<Option<Box<Scratch>>> = const { Cell::new(None) };
}

/// Float types with scratch buffers.
pub(super) trait Work: Summand + FromNumber {
    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>);
    /// See [`Strip::fill`]: elements that are computed in another type are a matter of the caller's.
    fn fill(
        strip: &Strip,
        array: &Array,
        operand: usize,
        path: Path,
        classes: (usize, usize),
        tile: (&mut [Self], usize),
        offsets: &mut [Offsets; 3],
        flat: &mut Buffer<Self>,
    );
    /// See [`Strip::empty`].
    fn empty(
        strip: &Strip,
        out: &Out,
        classes: (usize, usize),
        tile: (&[Self], usize),
        offsets: &mut [Offsets; 3],
        flat: &mut Buffer<Self>,
    );
    /// See [`Results::emit`].
    fn emit(results: Results, src: Rows<Self>, half: Option<HalfRows>, t: Span<Self>, references: &[Reference], to: To<Self>);
    /// Sets elements of rows of results: row, class and value.
    fn set(to: To<Self>, values: impl Iterator<Item = (usize, usize, f64)>);
    /// See [`super::by_rows::narrow`].
    fn narrow(level: Level, x: Span<Self>, by: Span<Self>, to: To<Self>);
    /// See [`super::source::line`]; false for types that are not computed in this one.
    fn line(level: Level, array: &Array, offset: isize, backwards: bool, next: isize, dst: &mut [Self]) -> bool;
}
impl Work for f32 {
    fn emit(results: Results, src: Rows<f32>, half: Option<HalfRows>, t: Span<f32>, references: &[Reference], to: To<f32>) {
        match (to, to.dtype()) {
            (To::Scratch(dst), _) => results.emit(src, half, t, references, dst),
            (_, DType::F16) => results.emit(src, half, t, references, to.rows::<f16>()),
            (_, DType::Bf16) => results.emit(src, half, t, references, to.rows::<bf16>()),
            _ => results.emit(src, half, t, references, to.rows::<f32>()),
        }
    }

    fn set(to: To<f32>, values: impl Iterator<Item = (usize, usize, f64)>) {
        match to.dtype() {
            DType::F16 => set_of(to.rows::<f16>(), values),
            DType::Bf16 => set_of(to.rows::<bf16>(), values),
            _ => set_of(to.rows::<f32>(), values),
        }
    }

    fn narrow(level: Level, x: Span<f32>, by: Span<f32>, to: To<f32>) {
        match to.dtype() {
            DType::F16 => narrow(level, x, by, to.rows::<f16>().row(0)),
            DType::Bf16 => narrow(level, x, by, to.rows::<bf16>().row(0)),
            _ => narrow(level, x, by, to.rows::<f32>().row(0)),
        }
    }

    fn fill(
        strip: &Strip,
        array: &Array,
        operand: usize,
        path: Path,
        classes: (usize, usize),
        tile: (&mut [f32], usize),
        offsets: &mut [Offsets; 3],
        flat: &mut Buffer<f32>,
    ) {
        match array.dtype() {
            DType::F16 => strip.fill_of::<f16, f32>(array, operand, path, classes, tile, offsets, flat),
            DType::Bf16 => strip.fill_of::<bf16, f32>(array, operand, path, classes, tile, offsets, flat),
            _ => strip.fill_of::<f32, f32>(array, operand, path, classes, tile, offsets, flat),
        }
    }

    fn empty(strip: &Strip, out: &Out, classes: (usize, usize), tile: (&[f32], usize), offsets: &mut [Offsets; 3], flat: &mut Buffer<f32>) {
        match out.array().dtype() {
            DType::F16 => strip.empty_of::<f16, f32>(out, classes, tile, offsets, flat),
            DType::Bf16 => strip.empty_of::<bf16, f32>(out, classes, tile, offsets, flat),
            _ => strip.empty_of::<f32, f32>(out, classes, tile, offsets, flat),
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
    fn emit(results: Results, src: Rows<f64>, half: Option<HalfRows>, t: Span<f64>, references: &[Reference], to: To<f64>) {
        let dst = if let To::Scratch(dst) = to { dst } else { to.rows() };
        results.emit(src, half, t, references, dst);
    }

    fn set(to: To<f64>, values: impl Iterator<Item = (usize, usize, f64)>) {
        set_of(to.rows::<f64>(), values);
    }

    fn narrow(level: Level, x: Span<f64>, by: Span<f64>, to: To<f64>) {
        narrow(level, x, by, to.rows::<f64>().row(0));
    }

    fn fill(
        strip: &Strip,
        array: &Array,
        operand: usize,
        path: Path,
        classes: (usize, usize),
        tile: (&mut [f64], usize),
        offsets: &mut [Offsets; 3],
        flat: &mut Buffer<f64>,
    ) {
        strip.fill_of::<f64, f64>(array, operand, path, classes, tile, offsets, flat);
    }

    fn empty(strip: &Strip, out: &Out, classes: (usize, usize), tile: (&[f64], usize), offsets: &mut [Offsets; 3], flat: &mut Buffer<f64>) {
        strip.empty_of::<f64, f64>(out, classes, tile, offsets, flat);
    }

    fn line(level: Level, array: &Array, offset: isize, backwards: bool, next: isize, dst: &mut [f64]) -> bool {
        array.dtype() == DType::F64 && line_of::<f64, f64>(level, array, offset, backwards, next, dst)
    }

    fn buffers(scratch: &mut Scratch) -> (&mut Tile, &mut Buffers<Self>, &mut Vec<Reference>) {
        (&mut scratch.tile, &mut scratch.double, &mut scratch.references)
    }
}

fn set_of<E: Element>(rows: RowsMut<E>, values: impl Iterator<Item = (usize, usize, f64)>) {
    values.for_each(|(row, class, value)| rows.set(row, class, E::from_f64(value)));
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
