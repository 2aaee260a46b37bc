//! Shapes and strides: which axes are classes, which are rows, and how memory allows them to be read.

use smallvec::SmallVec;

use crate::array::{Array, Dims};

/// One of something for each operand of a call, without a heap allocation.
pub type Operands<T> = SmallVec<[T; 6]>;

/// A set of axes with one stride per operand, adjacent axes merged where every operand allows it.
#[derive(Clone, Debug)]
pub struct Axes {
    /// Lengths, outermost first; never 1.
    pub lens: Dims<usize>,
    /// Strides in bytes, `strides[operand][axis]`.
    pub strides: Operands<Dims<isize>>,
    /// Product of the lengths.
    pub size: usize,
}

impl Axes {
    /// The axes `chosen` of operands that all have the shape `shape`.
    pub fn new(shape: &[usize], operands: &[&[isize]], chosen: impl Iterator<Item = usize>) -> Self {
        let mut lens = Dims::new();
        let mut strides: Operands<Dims<isize>> = operands.iter().map(|_| Dims::new()).collect();
        let mut size = 1;
        for axis in chosen {
            let len = shape[axis];
            size *= len;
            if len == 1 {
                continue;
            }
            let merges = !lens.is_empty()
                && operands.iter().zip(&strides).all(|(operand, have)| have[have.len() - 1] == operand[axis] * len as isize);
            if merges {
                let last = lens.len() - 1;
                lens[last] *= len;
                for (operand, have) in operands.iter().zip(&mut strides) {
                    have[last] = operand[axis];
                }
            } else {
                lens.push(len);
                for (operand, have) in operands.iter().zip(&mut strides) {
                    have.push(operand[axis]);
                }
            }
        }
        Self { lens, strides, size }
    }

    /// Byte offset of position `index` (C order over these axes) in an operand.
    #[inline]
    pub fn offset(&self, operand: usize, mut index: usize) -> isize {
        let strides = &self.strides[operand];
        if let [stride] = strides[..] {
            return index as isize * stride;
        }
        let mut offset = 0;
        for (&len, &stride) in self.lens.iter().zip(strides).rev() {
            offset += (index % len) as isize * stride;
            index /= len;
        }
        offset
    }

    /// Length of the innermost axis, 1 without axes.
    pub fn inner_len(&self) -> usize {
        self.lens.last().copied().unwrap_or(1)
    }

    /// Stride of the innermost axis in an operand, 0 without axes.
    pub fn inner_stride(&self, operand: usize) -> isize {
        self.strides[operand].last().copied().unwrap_or(0)
    }

    /// Whether one stride reaches every position.
    pub fn is_line(&self) -> bool {
        self.lens.len() <= 1
    }

    /// Calls `run(offset, stride, start, n)` for the runs of constant stride that make up positions `start..start + n`.
    pub fn runs(&self, operand: usize, start: usize, n: usize, mut run: impl FnMut(isize, isize, usize, usize)) {
        let (inner, stride) = (self.inner_len(), self.inner_stride(operand));
        let mut at = start;
        while at < start + n {
            let count = (inner - at % inner).min(start + n - at);
            run(self.offset(operand, at), stride, at - start, count);
            at += count;
        }
    }
}

/// Strides of an array over `shape` with the axes `missing` inserted as zeros.
pub fn with_axes(strides: &[isize], ndim: usize, missing: &[usize]) -> Dims<isize> {
    let mut rest = strides.iter();
    (0..ndim).map(|axis| if missing.contains(&axis) { 0 } else { rest.next().copied().unwrap_or(0) }).collect()
}

/// How rows are read or written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Path {
    /// Classes adjacent.
    Rows,
    /// Rows adjacent, classes at one stride.
    Columns,
    /// Anything else: copied in blocks.
    Gathered,
}

/// Whether the classes of `array` are adjacent, or its rows, or neither.
pub fn path(array: &Array, operand: usize, classes: &Axes, rows: &Axes) -> Path {
    let size = array.dtype().size() as isize;
    if !array.is_plain() {
        Path::Gathered
    } else if classes.is_line() && (classes.size == 1 || classes.inner_stride(operand) == size) {
        Path::Rows
    } else if classes.is_line() && rows.inner_stride(operand) == size {
        Path::Columns
    } else {
        Path::Gathered
    }
}

/// The same for tiles, into which classes may also be read backwards. A class axis of length 1 is adjacent and strided at once.
pub fn tile_path(array: &Array, operand: usize, classes: &Axes, rows: &Axes) -> Path {
    let size = array.dtype().size() as isize;
    let adjacent = rows.inner_stride(operand) == size;
    if !array.is_plain() || !classes.is_line() {
        Path::Gathered
    } else if adjacent && (classes.size <= 1 || classes.inner_stride(operand).abs() != size) {
        Path::Columns
    } else if classes.size <= 1 || classes.inner_stride(operand).abs() == size {
        Path::Rows
    } else {
        Path::Gathered
    }
}
