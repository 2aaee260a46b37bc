//! Arrays of any type and layout in memory of their own, with guard bytes around and between the elements.

use crossent::array::{Array, DType, Out};
use half::{bf16, f16};

/// How an array lies in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    C,
    Fortran,
    /// Every axis runs backwards.
    Reversed,
    /// C order with room after each run of the last axis.
    RowGaps,
    /// Every second element in each axis.
    Gaps,
    /// The first axis is the fastest, the others keep their order: classes and rows interleaved for three axes.
    Rolled,
    /// The other byte order (to read only).
    Swapped,
    /// One byte off the alignment (to read only).
    Misaligned,
}

/// Layouts that can be read.
pub const READABLE: [Layout; 8] =
    [Layout::C, Layout::Fortran, Layout::Reversed, Layout::RowGaps, Layout::Gaps, Layout::Rolled, Layout::Swapped, Layout::Misaligned];
/// Layouts that can also be written.
pub const WRITABLE: [Layout; 6] = [Layout::C, Layout::Fortran, Layout::Reversed, Layout::RowGaps, Layout::Gaps, Layout::Rolled];

pub const FLOATS: [DType; 4] = [DType::F32, DType::F64, DType::F16, DType::Bf16];
pub const INTS: [DType; 8] = [DType::I64, DType::I32, DType::I16, DType::I8, DType::U8, DType::U16, DType::U32, DType::U64];

const GUARD: u8 = 0xA5;

#[derive(Clone)]
pub struct Tensor {
    // Words, so that the start is aligned for every type.
    memory: Vec<u64>,
    start: usize,
    pub dtype: DType,
    swapped: bool,
    pub shape: Vec<usize>,
    strides: Vec<isize>,
}

impl Tensor {
    /// The numbers `values` (C order), each rounded to `dtype`.
    pub fn floats(dtype: DType, layout: Layout, shape: &[usize], values: &[f64]) -> Self {
        let mut tensor = Self::empty(dtype, layout, shape);
        assert_eq!(values.len(), tensor.len());
        for (i, &x) in values.iter().enumerate() {
            tensor.put(i, encode(dtype, x));
        }
        tensor
    }

    /// Integers of any type.
    pub fn ints(dtype: DType, layout: Layout, shape: &[usize], values: &[i128]) -> Self {
        let mut tensor = Self::empty(dtype, layout, shape);
        assert_eq!(values.len(), tensor.len());
        for (i, &x) in values.iter().enumerate() {
            // Two's complement: the low bytes are the same for every width and sign.
            tensor.put(i, x as u64);
        }
        tensor
    }

    /// Nothing but guard bytes.
    pub fn empty(dtype: DType, layout: Layout, shape: &[usize]) -> Self {
        let size = dtype.size() as isize;
        let axes = shape.len();
        // Axes from the fastest to the slowest.
        let order: Vec<usize> = match layout {
            Layout::Fortran => (0..axes).collect(),
            Layout::Rolled if axes > 1 => [vec![0], (1..axes).rev().collect()].concat(),
            _ => (0..axes).rev().collect(),
        };
        let mut strides = vec![0isize; axes];
        let mut step = if layout == Layout::Gaps { 2 * size } else { size };
        for (i, &axis) in order.iter().enumerate() {
            strides[axis] = step;
            step *= shape[axis].max(1) as isize;
            match layout {
                Layout::RowGaps if i == 0 => step += 3 * size,
                Layout::Gaps => step += 2 * size,
                _ => {}
            }
        }
        let guard = 64;
        let bytes = step as usize + 2 * guard + 8;
        let mut start = guard + usize::from(layout == Layout::Misaligned);
        if layout == Layout::Reversed {
            for (stride, &len) in strides.iter_mut().zip(shape) {
                start += len.saturating_sub(1) * *stride as usize;
                *stride = -*stride;
            }
        }
        let memory = vec![u64::from_ne_bytes([GUARD; 8]); bytes.div_ceil(8)];
        Self { memory, start, dtype, swapped: layout == Layout::Swapped, shape: shape.to_vec(), strides }
    }

    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: every u64 is eight bytes.
        unsafe { core::slice::from_raw_parts(self.memory.as_ptr().cast(), self.memory.len() * 8) }
    }

    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: every u64 is eight bytes, and all bytes make a u64.
        unsafe { core::slice::from_raw_parts_mut(self.memory.as_mut_ptr().cast(), self.memory.len() * 8) }
    }

    /// Where element `i` (C order) begins.
    fn offset(&self, i: usize) -> usize {
        let (mut rest, mut offset) = (i, self.start as isize);
        for (&len, &stride) in self.shape.iter().zip(&self.strides).rev() {
            offset += (rest % len) as isize * stride;
            rest /= len;
        }
        offset as usize
    }

    fn put(&mut self, i: usize, bits: u64) {
        let (offset, size, swapped) = (self.offset(i), self.dtype.size(), self.swapped);
        let dst = &mut self.bytes_mut()[offset..offset + size];
        dst.copy_from_slice(&bits.to_le_bytes()[..size]);
        if swapped != cfg!(target_endian = "big") {
            dst.reverse();
        }
    }

    fn raw(&self, i: usize) -> u64 {
        let (offset, size) = (self.offset(i), self.dtype.size());
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(&self.bytes()[offset..offset + size]);
        if self.swapped != cfg!(target_endian = "big") {
            bytes[..size].reverse();
        }
        u64::from_le_bytes(bytes)
    }

    /// The elements in C order, widened exactly.
    pub fn values(&self) -> Vec<f64> {
        (0..self.len()).map(|i| decode(self.dtype, self.raw(i))).collect()
    }

    /// The elements' bits in C order.
    pub fn bits(&self) -> Vec<u64> {
        (0..self.len()).map(|i| self.raw(i)).collect()
    }

    /// All of the memory, guards included.
    pub fn memory(&self) -> &[u64] {
        &self.memory
    }

    pub fn array(&self) -> Array<'_> {
        // SAFETY: the layout keeps every element inside `memory`, which stays borrowed.
        unsafe { Array::new(self.bytes().as_ptr().add(self.start), self.dtype, self.swapped, &self.shape, &self.strides) }
    }

    /// `n` entries of the first axis, from `start` on.
    pub fn part(&self, start: usize, n: usize) -> Array<'_> {
        assert!(start + n <= self.shape[0]);
        let mut shape = self.shape.clone();
        shape[0] = n;
        let offset = self.start as isize + start as isize * self.strides[0];
        // SAFETY: fewer of the elements of `array`.
        unsafe { Array::new(self.bytes().as_ptr().offset(offset), self.dtype, self.swapped, &shape, &self.strides) }
    }

    /// The same memory with an axis of length `len` and stride 0 put before `axis`.
    pub fn broadcast(&self, axis: usize, len: usize) -> Array<'_> {
        let (mut shape, mut strides) = (self.shape.clone(), self.strides.clone());
        shape.insert(axis, len);
        strides.insert(axis, 0);
        // SAFETY: as in `array`; stride 0 reaches nothing else.
        unsafe { Array::new(self.bytes().as_ptr().add(self.start), self.dtype, self.swapped, &shape, &strides) }
    }

    pub fn out(&mut self) -> Out<'_> {
        let (start, dtype, shape, strides) = (self.start, self.dtype, self.shape.clone(), self.strides.clone());
        assert!(!self.swapped && start.is_multiple_of(dtype.size()), "not a layout to write");
        // SAFETY: inside `memory`, which is exclusively borrowed; aligned; distinct elements are disjoint in every layout.
        unsafe { Out::new(self.bytes_mut().as_mut_ptr().add(start), dtype, &shape, &strides) }
    }

    /// Panics if a byte that belongs to no element was written.
    pub fn check_guards(&self) {
        let mut outside = vec![true; self.memory.len() * 8];
        for i in 0..self.len() {
            let offset = self.offset(i);
            outside[offset..offset + self.dtype.size()].fill(false);
        }
        let written = self.bytes().iter().zip(outside).position(|(&byte, outside)| outside && byte != GUARD);
        assert_eq!(written, None, "a byte outside the elements was written (elements begin at byte {})", self.start);
    }
}

fn encode(dtype: DType, x: f64) -> u64 {
    match dtype {
        DType::F16 => f16::from_f64(x).to_bits().into(),
        DType::Bf16 => bf16::from_f64(x).to_bits().into(),
        DType::F32 => (x as f32).to_bits().into(),
        DType::F64 => x.to_bits(),
        _ => x as i128 as u64,
    }
}

fn decode(dtype: DType, bits: u64) -> f64 {
    match dtype {
        DType::F16 => f16::from_bits(bits as u16).to_f64(),
        DType::Bf16 => bf16::from_bits(bits as u16).to_f64(),
        DType::F32 => f64::from(f32::from_bits(bits as u32)),
        DType::F64 => f64::from_bits(bits),
        DType::I8 => f64::from(bits as i8),
        DType::I16 => f64::from(bits as i16),
        DType::I32 => f64::from(bits as i32),
        DType::I64 => (bits as i64) as f64,
        _ => bits as f64,
    }
}

/// The distance between neighbouring numbers of `dtype` at `x`; at least that of its smallest numbers.
pub fn ulp(dtype: DType, x: f64) -> f64 {
    let (digits, smallest) = match dtype {
        DType::F16 => (10, -24),
        DType::Bf16 => (7, -133),
        DType::F32 => (23, -149),
        _ => (52, -1074),
    };
    if x == 0.0 {
        return 2f64.powi(smallest);
    }
    let exponent = ((x.abs().to_bits() >> 52) as i32 - 1023).max(-1022);
    2f64.powi((exponent - digits).max(smallest))
}
