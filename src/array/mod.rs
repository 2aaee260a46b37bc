//! The array boundary: strided views of memory that somebody else owns, and the bounds-checked spans that kernels read and write.
//!
//! `unsafe` lives here and in [`crate::simd`] only. Whoever makes an [`Array`] or [`Out`] from a pointer promises, once, that every
//! element its shape and strides reach is valid memory for `'a`; everything behind that promise is checked.

use core::marker::PhantomData;

use half::{bf16, f16};
use smallvec::SmallVec;

mod element;
mod span;
mod tile;

pub use element::{Element, Float, Vf, lanes};
pub use span::{Flags, Half, STREAM_ALIGN, Span, SpanMut};
pub use tile::{Columns, ColumnsMut, HalfRows, Offsets, Rows, RowsMut};

use element::round_to_odd;

/// Lengths or strides, one per axis.
pub type Dims<T> = SmallVec<[T; 4]>;

/// Element types the core reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum DType {
    F16,
    Bf16,
    F32,
    F64,
    I8,
    I16,
    I32,
    I64,
    U8,
    U16,
    U32,
    U64,
    Bool,
}

impl DType {
    /// Bytes per element.
    pub const fn size(self) -> usize {
        match self {
            Self::I8 | Self::U8 | Self::Bool => 1,
            Self::F16 | Self::Bf16 | Self::I16 | Self::U16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }

    /// Whether it is one of the four float types.
    pub const fn is_float(self) -> bool {
        matches!(self, Self::F16 | Self::Bf16 | Self::F32 | Self::F64)
    }

    /// The type of row results (losses, logsumexp) for logits of this type.
    #[must_use]
    pub const fn row_dtype(self) -> Self {
        match self {
            Self::F64 => Self::F64,
            _ => Self::F32,
        }
    }
}

/// A strided array to read. Strides are in bytes and may be negative or zero; nothing need be aligned.
#[derive(Debug)]
pub struct Array<'a> {
    pub(crate) ptr: *mut u8,
    pub(crate) dtype: DType,
    pub(crate) swapped: bool,
    pub(crate) shape: Dims<usize>,
    pub(crate) strides: Dims<isize>,
    /// Lowest and one past the highest byte offset that shape and strides reach.
    extent: (isize, isize),
    life: PhantomData<&'a ()>,
}

impl Clone for Array<'_> {
    fn clone(&self) -> Self {
        // Lengths and strides as memory: `SmallVec` clones number by number.
        Self { shape: Dims::from_slice(&self.shape), strides: Dims::from_slice(&self.strides), ..*self }
    }
}

// SAFETY: an Array is a pointer to memory that stays readable for 'a; reading it from several threads is what `new` is promised for.
unsafe impl Send for Array<'_> {}
// SAFETY: as above; no method mutates through a shared Array.
unsafe impl Sync for Array<'_> {}

/// A strided array to write: an [`Array`] whose elements are also writable, native-endian and distinct.
#[derive(Clone, Debug)]
pub struct Out<'a>(pub(crate) Array<'a>);

impl<'a> Array<'a> {
    /// A view of `shape` at `ptr`.
    ///
    /// # Safety
    /// - The bytes from the lowest to the highest that `shape` and `strides` (bytes) reach are valid for reads for `'a`.
    /// - Other threads may write to it meanwhile only in ways that leave every bit pattern valid (all of [`DType`] is; `Bool` is read as a byte).
    pub unsafe fn new(ptr: *const u8, dtype: DType, swapped: bool, shape: &[usize], strides: &[isize]) -> Self {
        assert_eq!(shape.len(), strides.len());
        let mut extent = (0, if shape.contains(&0) { 0 } else { dtype.size() as isize });
        if extent.1 > 0 {
            for (&len, &stride) in shape.iter().zip(strides) {
                let reach = (len as isize - 1) * stride;
                extent = (extent.0 + reach.min(0), extent.1 + reach.max(0));
            }
        }
        Self {
            ptr: ptr.cast_mut(),
            dtype,
            swapped,
            shape: Dims::from_slice(shape),
            strides: Dims::from_slice(strides),
            extent,
            life: PhantomData,
        }
    }

    /// A C-ordered view of a slice; panics when the lengths differ.
    pub fn from_slice<E: Element>(data: &'a [E], shape: &[usize]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>());
        // SAFETY: the slice is borrowed for 'a and C order reaches exactly its elements.
        unsafe { Self::new(data.as_ptr().cast(), E::DTYPE, false, shape, &c_strides(shape, size_of::<E>())) }
    }

    /// The element type.
    pub fn dtype(&self) -> DType {
        self.dtype
    }
    /// Lengths of the axes.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }
    /// Strides in bytes.
    pub fn strides(&self) -> &[isize] {
        &self.strides
    }
    /// Number of elements.
    pub fn size(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether both begin at the same address.
    pub(crate) fn starts_as(&self, other: &Array) -> bool {
        core::ptr::eq(self.ptr, other.ptr)
    }

    /// Whether native vectors can read it: native byte order, aligned, strides of whole elements.
    pub(crate) fn is_plain(&self) -> bool {
        let size = self.dtype.size();
        !self.swapped
            && (self.ptr as usize).is_multiple_of(size)
            && self.shape.iter().zip(&self.strides).all(|(&len, &stride)| len <= 1 || stride % size as isize == 0)
    }

    /// Where a byte offset is, inside or not.
    #[inline(always)]
    pub fn address(&self, offset: isize) -> *const u8 {
        self.ptr.wrapping_offset(offset)
    }

    /// Panics unless `n` elements `stride` bytes apart from `offset` on lie inside.
    #[inline(always)]
    fn check(&self, offset: isize, stride: isize, n: usize) {
        let last = offset + (n as isize - 1) * stride;
        let (low, high) = if stride < 0 { (last, offset) } else { (offset, last) };
        assert!(n == 0 || (low >= self.extent.0 && high + self.dtype.size() as isize <= self.extent.1), "run outside the array");
    }

    /// `len` adjacent elements at a byte offset; panics when they are not there, not of type `E` or not plain.
    #[inline(always)]
    pub(crate) fn span<E: Element>(&self, offset: isize, len: usize) -> Span<'a, E> {
        assert!(E::DTYPE == self.dtype && self.is_plain());
        self.check(offset, size_of::<E>() as isize, len);
        // SAFETY: in the extent, which is readable; aligned, as the array is plain and offsets are sums of its strides.
        unsafe { Span::new(self.ptr.offset(offset).cast::<E>(), len) }
    }

    /// The same of either half type; nothing of others.
    pub(crate) fn half(&self, offset: isize, len: usize) -> Option<Half<'a>> {
        match self.dtype {
            DType::F16 => Some(Half::F16(self.span(offset, len))),
            DType::Bf16 => Some(Half::Bf16(self.span(offset, len))),
            _ => None,
        }
    }

    /// A run of adjacent truth values; nothing of other types.
    pub(crate) fn flags(&self, offset: isize, len: usize) -> Option<Flags<'a>> {
        if self.dtype != DType::Bool {
            return None;
        }
        self.check(offset, 1, len);
        // SAFETY: len adjacent bytes of the extent, checked above, which is valid for reads for 'a.
        Some(unsafe { Flags::new(self.ptr.offset(offset), len) })
    }

    /// As [`Array::rows`] of either half type; nothing of others.
    pub(crate) fn half_rows<'o>(&self, base: isize, offsets: &'o Offsets, len: usize) -> Option<HalfRows<'o>>
    where
        'a: 'o,
    {
        match self.dtype {
            DType::F16 => Some(HalfRows::F16(self.rows(base, offsets, len))),
            DType::Bf16 => Some(HalfRows::Bf16(self.rows(base, offsets, len))),
            _ => None,
        }
    }

    /// Columns at a byte offset whose classes are `stride` bytes apart; panics as [`Array::span`].
    #[inline(always)]
    pub(crate) fn columns<E: Element>(&self, offset: isize, stride: isize, classes: usize, width: usize) -> Columns<'a, E> {
        assert!(E::DTYPE == self.dtype && self.is_plain());
        self.check(offset, stride, classes);
        self.check(offset + (width as isize - 1) * size_of::<E>() as isize, stride, classes);
        // SAFETY: the first and the last column lie in the extent, so the others do; alignment as in `span`.
        unsafe { Columns::new(self.ptr.offset(offset).cast::<E>(), stride / size_of::<E>() as isize, classes, width) }
    }

    /// Rows of `len` adjacent elements each, where `offsets` says relative to a byte offset; panics as [`Array::span`].
    #[inline(always)]
    pub(crate) fn rows<'o, E: Element>(&self, base: isize, offsets: &'o Offsets, len: usize) -> Rows<'o, E>
    where
        'a: 'o,
    {
        assert!(E::DTYPE == self.dtype && self.is_plain());
        let (low, high) = offsets.ends;
        if !offsets.list.is_empty() {
            self.check(base + low, size_of::<E>() as isize, len);
            self.check(base + high, size_of::<E>() as isize, len);
        }
        // The lowest and the highest row lie in the extent, so the others do.
        Rows { base: self.ptr.wrapping_offset(base), offsets: &offsets.list, len, life: PhantomData }
    }

    /// Reads `n` elements `stride` bytes apart as `T` into `dst[0], dst[step], …`; any dtype, alignment and byte order.
    pub(crate) fn read<T: FromNumber>(&self, offset: isize, stride: isize, n: usize, dst: &mut [T], step: usize) {
        self.check(offset, stride, n);
        if n == 0 {
            return;
        }
        assert!((n - 1) * step < dst.len());
        // SAFETY: in the extent, checked above.
        let ptr = unsafe { self.ptr.offset(offset) };
        macro_rules! copy {
            ($bits:ty, |$x:ident| $value:expr) => {{
                for i in 0..n {
                    // SAFETY: element i of the run that was checked; unaligned reads take any address.
                    let raw = unsafe { ptr.offset(i as isize * stride).cast::<$bits>().read_unaligned() };
                    let $x = if self.swapped { raw.swap_bytes() } else { raw };
                    dst[i * step] = $value;
                }
            }};
        }
        match self.dtype {
            DType::F32 => copy!(u32, |x| T::number_f32(f32::from_bits(x))),
            DType::F64 => copy!(u64, |x| T::number_f64(f64::from_bits(x))),
            DType::F16 => copy!(u16, |x| T::number_f32(f16::from_bits(x).to_f32())),
            DType::Bf16 => copy!(u16, |x| T::number_f32(bf16::from_bits(x).to_f32())),
            DType::I8 => copy!(i8, |x| T::number_int(i128::from(x))),
            DType::I16 => copy!(i16, |x| T::number_int(i128::from(x))),
            DType::I32 => copy!(i32, |x| T::number_int(i128::from(x))),
            DType::I64 => copy!(i64, |x| T::number_int(i128::from(x))),
            DType::U8 => copy!(u8, |x| T::number_int(i128::from(x))),
            DType::U16 => copy!(u16, |x| T::number_int(i128::from(x))),
            DType::U32 => copy!(u32, |x| T::number_int(i128::from(x))),
            DType::U64 => copy!(u64, |x| T::number_int(i128::from(x))),
            DType::Bool => copy!(u8, |x| T::number_int(i128::from(x != 0))),
        }
    }

    /// Reads the truth values of a run of booleans: nonzero for True.
    pub(crate) fn read_flags(&self, offset: isize, stride: isize, n: usize, dst: &mut [u8], step: usize) {
        if self.dtype != DType::Bool || step != 1 || n == 0 {
            return self.read(offset, stride, n, dst, step);
        }
        self.check(offset, stride, n);
        let dst = &mut dst[..n];
        // SAFETY: n bytes of the extent, checked above; `dst` has as many and is exclusively borrowed.
        unsafe {
            let ptr = self.ptr.offset(offset);
            if stride == 1 {
                return core::ptr::copy_nonoverlapping(ptr, dst.as_mut_ptr(), n);
            }
            for (i, to) in dst.iter_mut().enumerate() {
                *to = *ptr.offset(i as isize * stride);
            }
        }
    }

    /// Reads class indices, each once: those equal to `ignore` become `none`, the lowest number. Gives one that is not below `limit` with its position,
    /// and whether any is ignored. `apart`: runs without gaps, of the usual types, have loops of their own.
    #[inline(always)]
    pub(crate) fn read_classes(
        &self,
        apart: bool,
        offset: isize,
        stride: isize,
        n: usize,
        limit: usize,
        ignore: Option<i64>,
        none: i64,
        dst: &mut [i64],
        step: usize,
    ) -> (Option<(usize, i128)>, bool) {
        self.check(offset, stride, n);
        if n == 0 {
            return (None, false);
        }
        assert!((n - 1) * step < dst.len());
        // SAFETY: in the extent, checked above.
        let ptr = unsafe { self.ptr.offset(offset) };
        macro_rules! copy {
            ($type:ty) => {
                copy!($type, stride, step)
            };
            // For constant strides, which vectors are made of.
            (usual $type:ty) => {
                if apart && stride == size_of::<$type>() as isize && step == 1 {
                    copy!($type, size_of::<$type>() as isize, 1)
                } else {
                    copy!($type)
                }
            };
            ($type:ty, $stride:expr, $step:expr) => {{
                // A mark that the type cannot hold marks nothing.
                let mark = ignore.and_then(|mark| <$type>::try_from(mark).ok());
                let (marks, mark) = (mark.is_some(), mark.unwrap_or_default());
                let (mut bad, mut any, dst) = (false, false, &mut dst[..(n - 1) * $step + 1]);
                for i in 0..n {
                    // SAFETY: element i of the run that was checked; unaligned reads take any address.
                    let raw = unsafe { ptr.offset(i as isize * $stride).cast::<$type>().read_unaligned() };
                    let x = if self.swapped { raw.swap_bytes() } else { raw };
                    let ignored = marks & (x == mark);
                    // Negative numbers become large ones.
                    let outside = !ignored & (x as i64 as u64 >= limit as u64);
                    bad |= outside;
                    any |= ignored;
                    dst[i * $step] = if ignored { none } else { x as i64 };
                }
                (bad, any)
            }};
        }
        let (bad, any) = match self.dtype {
            DType::I8 => copy!(i8),
            DType::I16 => copy!(usual i16),
            DType::I32 => copy!(usual i32),
            DType::I64 => copy!(usual i64),
            DType::U8 => copy!(usual u8),
            DType::U16 => copy!(u16),
            DType::U32 => copy!(u32),
            DType::U64 => copy!(u64),
            _ => return (Some((0, 0)), false),
        };
        let wrong = || {
            // One that is as low as `none` is found when there is no other; where it stood matters less than what it was.
            let outside = (0..n).find(|&i| dst[i * step] != none && dst[i * step] as u64 >= limit as u64);
            let at = outside.or_else(|| (0..n).find(|&i| dst[i * step] == none)).unwrap_or(0);
            let class = dst[at * step];
            (at, if self.dtype == DType::U64 { i128::from(class as u64) } else { i128::from(class) })
        };
        (bad.then(wrong), any)
    }

    /// The element at a byte offset.
    #[inline]
    pub(crate) fn get<T: FromNumber>(&self, offset: isize) -> T {
        let mut x = [T::number_int(0)];
        self.read(offset, 0, 1, &mut x, 1);
        x[0]
    }
}

/// What any number of an array can be read as.
pub trait FromNumber: Copy {
    /// From single precision.
    fn number_f32(x: f32) -> Self;
    /// From double precision.
    fn number_f64(x: f64) -> Self;
    /// From an integer.
    fn number_int(x: i128) -> Self;
}

macro_rules! from_number {
    ($($type:ty)*) => {$(
        impl FromNumber for $type {
            #[inline(always)]
            fn number_f32(x: f32) -> Self {
                x as Self
            }
            #[inline(always)]
            fn number_f64(x: f64) -> Self {
                x as Self
            }
            #[inline(always)]
            fn number_int(x: i128) -> Self {
                x as Self
            }
        }
    )*};
}
from_number!(u8 f32 f64 i128);

impl<'a> Out<'a> {
    /// A writable view.
    ///
    /// # Safety
    /// - As for [`Array::new`], and valid for writes for `'a`.
    /// - Aligned to the element, native-endian, and no two indices reach the same byte.
    /// - Nothing else that the same call reads overlaps it, unless it is the very same array (pointer, shape, strides, type): in place.
    pub unsafe fn new(ptr: *mut u8, dtype: DType, shape: &[usize], strides: &[isize]) -> Self {
        // SAFETY: passed on.
        Self(unsafe { Array::new(ptr, dtype, false, shape, strides) })
    }

    /// A C-ordered view of a slice; panics when the lengths differ.
    pub fn from_slice<E: Element>(data: &'a mut [E], shape: &[usize]) -> Self {
        assert_eq!(data.len(), shape.iter().product::<usize>());
        // SAFETY: the slice is exclusively borrowed for 'a and C order reaches exactly its elements, each once.
        unsafe { Self::new(data.as_mut_ptr().cast(), E::DTYPE, shape, &c_strides(shape, size_of::<E>())) }
    }

    /// The same C-ordered slice to read and to write, for work in place.
    pub fn in_place<E: Element>(data: &'a mut [E], shape: &[usize]) -> (Array<'a>, Self) {
        let out = Self::from_slice(data, shape);
        (out.0.clone(), out)
    }

    /// The view for reading.
    pub fn array(&self) -> &Array<'a> {
        &self.0
    }

    /// As [`Array::span`].
    #[inline(always)]
    pub(crate) fn span<E: Element>(&self, offset: isize, len: usize) -> SpanMut<'a, E> {
        SpanMut(self.0.span(offset, len))
    }

    /// As [`Array::columns`].
    #[inline(always)]
    pub(crate) fn columns<E: Element>(&self, offset: isize, stride: isize, classes: usize, width: usize) -> ColumnsMut<'a, E> {
        ColumnsMut(self.0.columns(offset, stride, classes, width))
    }

    /// As [`Array::rows`].
    #[inline(always)]
    pub(crate) fn rows<'o, E: Element>(&self, base: isize, offsets: &'o Offsets, len: usize) -> RowsMut<'o, E>
    where
        'a: 'o,
    {
        RowsMut(self.0.rows(base, offsets, len))
    }

    /// Writes `src[0], src[step], …` to `n` elements `stride` bytes apart, rounded once.
    #[allow(clippy::cast_ptr_alignment)] // an Out is aligned, as `new` was promised
    pub(crate) fn write<T: Float>(&self, offset: isize, stride: isize, n: usize, src: &[T], step: usize) {
        self.0.check(offset, stride, n);
        if n == 0 {
            return;
        }
        assert!((n - 1) * step < src.len());
        macro_rules! copy {
            ($type:ty, $convert:expr) => {
                for i in 0..n {
                    // SAFETY: element i of the run that was checked, which is writable and aligned.
                    unsafe { self.0.ptr.offset(offset + i as isize * stride).cast::<$type>().write($convert(src[i * step])) }
                }
            };
        }
        match self.0.dtype {
            DType::F32 => copy!(f32, |x: T| x.to_f64() as f32),
            DType::F64 => copy!(f64, |x: T| x.to_f64()),
            DType::F16 => copy!(f16, |x: T| f16::from_f32(round_to_odd(x.to_f64()))),
            DType::Bf16 => copy!(bf16, |x: T| bf16::from_f32(round_to_odd(x.to_f64()))),
            _ => unreachable!("results are floats"),
        }
    }

    /// Sets one element, rounded once.
    #[inline]
    pub(crate) fn set(&self, offset: isize, x: f64) {
        self.write(offset, 0, 1, &[x], 1);
    }

    /// Sets one element of an int64 or boolean result.
    #[inline]
    #[allow(clippy::cast_ptr_alignment)] // an Out is aligned, as `new` was promised
    pub(crate) fn set_int(&self, offset: isize, x: i64) {
        self.0.check(offset, 0, 1);
        // SAFETY: in the extent, checked above; writable and aligned.
        unsafe {
            match self.0.dtype {
                DType::I64 => self.0.ptr.offset(offset).cast::<i64>().write(x),
                DType::Bool => self.0.ptr.offset(offset).write(u8::from(x != 0)),
                _ => unreachable!("whole numbers go to int64 and bool"),
            }
        }
    }

    /// Writes `n` zeros `stride` bytes apart.
    pub(crate) fn zero(&self, offset: isize, stride: isize, n: usize) {
        self.0.check(offset, stride, n);
        let size = self.0.dtype.size();
        for i in 0..if stride == size as isize { n.min(1) } else { n } {
            let bytes = if stride == size as isize { n * size } else { size };
            // SAFETY: inside the run that was checked; zero bytes are 0.0 in every float type.
            unsafe { self.0.ptr.offset(offset + i as isize * stride).write_bytes(0, bytes) }
        }
    }
}

/// C-order strides in bytes.
pub fn c_strides(shape: &[usize], itemsize: usize) -> Dims<isize> {
    let mut strides: Dims<isize> = shape.iter().map(|_| 0).collect();
    let mut step = itemsize as isize;
    for (stride, &len) in strides.iter_mut().zip(shape).rev() {
        *stride = step;
        step *= len.max(1) as isize;
    }
    strides
}
