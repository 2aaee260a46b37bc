//! The array boundary: strided views of memory that somebody else owns, and the bounds-checked spans that kernels read and write.
//!
//! `unsafe` lives here and in [`crate::simd`] only. Whoever makes an [`Array`] or [`Out`] from a pointer promises, once, that every
//! element its shape and strides reach is valid memory for `'a`; everything behind that promise is checked.

use core::marker::PhantomData;

use half::{bf16, f16};
use smallvec::SmallVec;

use crate::simd::{Isa, Vector};

/// Bytes of a cache line, and of the largest vector: what stores past the caches are aligned to.
pub const STREAM_ALIGN: usize = 64;

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
        if self.dtype != DType::Bool || stride != 1 || step != 1 {
            return self.read(offset, stride, n, dst, step);
        }
        self.check(offset, stride, n);
        let dst = &mut dst[..n];
        // SAFETY: n adjacent bytes of the extent, checked above; `dst` has as many and is exclusively borrowed.
        unsafe { core::ptr::copy_nonoverlapping(self.ptr.offset(offset), dst.as_mut_ptr(), n) }
    }

    /// Reads class indices: those equal to `ignore` become `none`. Gives the position of the first that is not below `limit`, and whether any is ignored.
    #[inline(always)]
    pub(crate) fn read_classes(
        &self,
        offset: isize,
        stride: isize,
        n: usize,
        limit: usize,
        ignore: Option<i64>,
        none: i64,
        dst: &mut [i64],
        step: usize,
    ) -> (Option<usize>, bool) {
        self.check(offset, stride, n);
        if n == 0 {
            return (None, false);
        }
        assert!((n - 1) * step < dst.len());
        // SAFETY: in the extent, checked above.
        let ptr = unsafe { self.ptr.offset(offset) };
        macro_rules! copy {
            ($type:ty) => {
                // The usual case apart, for constant strides.
                if stride == size_of::<$type>() as isize && step == 1 {
                    copy!($type, size_of::<$type>() as isize, 1)
                } else {
                    copy!($type, stride, step)
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
                    let class = if outside { i64::MIN } else { x as i64 };
                    dst[i * $step] = if ignored { none } else { class };
                }
                (bad, any)
            }};
        }
        let (bad, any) = match self.dtype {
            DType::I8 => copy!(i8),
            DType::I16 => copy!(i16),
            DType::I32 => copy!(i32),
            DType::I64 => copy!(i64),
            DType::U8 => copy!(u8),
            DType::U16 => copy!(u16),
            DType::U32 => copy!(u32),
            DType::U64 => copy!(u64),
            _ => return (Some(0), false),
        };
        (if bad { (0..n).find(|&i| dst[i * step] == i64::MIN) } else { None }, any)
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

/// To single precision such that a second rounding, to a half type, gives what one rounding would: truncated, the last bit set when inexact.
/// (The conversions from float64 of the crate `half` look at the upper 32 bits only, which moves numbers just above a tie.)
#[inline(always)]
fn round_to_odd(x: f64) -> f32 {
    let nearest = x as f32;
    let back = f64::from(nearest);
    if back == x || x.is_nan() {
        return nearest;
    }
    // One step towards zero where rounding went away from it; infinity steps to the largest finite number.
    let bits = if back.abs() > x.abs() { nearest.to_bits() - 1 } else { nearest.to_bits() };
    f32::from_bits(bits | 1)
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

/// A float type of logits and gradients.
pub trait Element: Copy + Send + Sync + 'static {
    /// What it is computed in.
    type Acc: Float;
    /// Its tag.
    const DTYPE: DType;
    /// From a double, rounded once.
    fn from_f64(x: f64) -> Self;
    /// Widened exactly.
    fn to_acc(self) -> Self::Acc;
    /// From the type it is computed in, rounded once.
    fn from_acc(x: Self::Acc) -> Self;
    /// Loads one vector's worth, widened.
    /// # Safety
    /// `src` is valid for reads of `LANES` elements.
    unsafe fn load<S: Isa>(isa: S, src: *const Self) -> Vf<S, Self::Acc>;
    /// Stores one vector's worth, rounded once.
    /// # Safety
    /// `dst` is valid for writes of `LANES` elements.
    unsafe fn store<S: Isa>(isa: S, v: Vf<S, Self::Acc>, dst: *mut Self);
    /// Stores one vector's worth past the caches where there is a way, rounded once.
    /// # Safety
    /// As for [`Element::store`], and `dst` is aligned to [`STREAM_ALIGN`] bytes or a vector's worth further.
    #[inline(always)]
    unsafe fn stream<S: Isa>(isa: S, v: Vf<S, Self::Acc>, dst: *mut Self) {
        // SAFETY: the caller's promise includes this one.
        unsafe { Self::store(isa, v, dst) }
    }
    /// Loads `n` elements, the other lanes are `fill`.
    /// # Safety
    /// `src` is valid for reads of `n` elements, `n <= LANES`.
    unsafe fn load_partial<S: Isa>(isa: S, src: *const Self, n: usize, fill: Self) -> Vf<S, Self::Acc>;
    /// Stores the first `n` lanes, rounded once.
    /// # Safety
    /// `dst` is valid for writes of `n` elements, `n <= LANES`.
    unsafe fn store_partial<S: Isa>(isa: S, v: Vf<S, Self::Acc>, dst: *mut Self, n: usize);
}

/// A type that is computed in: `f32` or `f64`.
pub trait Float: Element<Acc = Self> + PartialOrd + core::fmt::Debug {
    /// Its vectors.
    type V<S: Isa>: Vector<Isa = S, Elem = Self>;
    /// Zero.
    const ZERO: Self;
    /// One.
    const ONE: Self;
    /// Negative infinity.
    const NEG_INF: Self;
    /// The largest finite number.
    const MAX: Self;
    /// Widened exactly.
    fn to_f64(self) -> f64;
    /// The `n` halves from `i` on, widened, the other lanes −inf. Halves are computed in `f32`: other types give anything.
    fn load_half<S: Isa>(isa: S, half: Half, i: usize, n: usize) -> Vf<S, Self>;
}

/// A run of halves of either type.
#[derive(Clone, Copy)]
pub enum Half<'a> {
    /// IEEE half precision.
    F16(Span<'a, f16>),
    /// bfloat16.
    Bf16(Span<'a, bf16>),
}

impl Half<'_> {
    /// Number of elements.
    #[inline(always)]
    pub fn len(self) -> usize {
        match self {
            Self::F16(span) => span.len(),
            Self::Bf16(span) => span.len(),
        }
    }
    /// Whether it is empty.
    #[inline(always)]
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }
    /// As [`Span::part`].
    #[must_use]
    #[inline(always)]
    pub fn part(self, start: usize, len: usize) -> Self {
        match self {
            Self::F16(span) => Self::F16(span.part(start, len)),
            Self::Bf16(span) => Self::Bf16(span.part(start, len)),
        }
    }
}

/// Rows of halves of either type, see [`Rows`].
#[derive(Clone, Copy)]
#[allow(missing_docs)]
pub enum HalfRows<'a> {
    F16(Rows<'a, f16>),
    Bf16(Rows<'a, bf16>),
}

impl<'a> HalfRows<'a> {
    /// A single row.
    #[inline(always)]
    pub fn single(row: Half<'a>) -> Self {
        match row {
            Half::F16(span) => Self::F16(Rows::single(span)),
            Half::Bf16(span) => Self::Bf16(Rows::single(span)),
        }
    }
    /// Row `r`.
    #[inline(always)]
    pub fn row(self, r: usize) -> Half<'a> {
        match self {
            Self::F16(rows) => Half::F16(rows.row(r)),
            Self::Bf16(rows) => Half::Bf16(rows.row(r)),
        }
    }
    /// As [`Rows::address`].
    #[inline(always)]
    pub fn address(self, r: usize) -> *const u8 {
        match self {
            Self::F16(rows) => rows.address(r),
            Self::Bf16(rows) => rows.address(r),
        }
    }
}

/// The vector of `T` in the instruction set `S`.
pub type Vf<S, T> = <T as Float>::V<S>;

impl Element for f32 {
    type Acc = Self;
    const DTYPE: DType = DType::F32;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x as Self
    }
    #[inline(always)]
    fn to_acc(self) -> Self {
        self
    }
    #[inline(always)]
    fn from_acc(x: Self) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load<S: Isa>(isa: S, src: *const Self) -> S::F32 {
        // SAFETY: the caller's promise is the same.
        unsafe { S::F32::load(isa, src) }
    }
    #[inline(always)]
    unsafe fn store<S: Isa>(_isa: S, v: S::F32, dst: *mut Self) {
        // SAFETY: the caller's promise is the same.
        unsafe { v.store(dst) }
    }
    #[inline(always)]
    unsafe fn stream<S: Isa>(_isa: S, v: S::F32, dst: *mut Self) {
        // SAFETY: the caller's promise is the same: no vector is larger than the alignment.
        unsafe { v.stream(dst) }
    }
    #[inline(always)]
    unsafe fn load_partial<S: Isa>(isa: S, src: *const Self, n: usize, fill: Self) -> S::F32 {
        // SAFETY: the caller's promise is the same.
        unsafe { S::F32::load_partial(isa, src, n, fill) }
    }
    #[inline(always)]
    unsafe fn store_partial<S: Isa>(_isa: S, v: S::F32, dst: *mut Self, n: usize) {
        // SAFETY: the caller's promise is the same.
        unsafe { v.store_partial(dst, n) }
    }
}

impl Float for f32 {
    type V<S: Isa> = S::F32;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INF: Self = Self::NEG_INFINITY;
    const MAX: Self = Self::MAX;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        f64::from(self)
    }
    #[inline(always)]
    fn load_half<S: Isa>(isa: S, half: Half, i: usize, n: usize) -> S::F32 {
        let whole = n == S::F32::LANES;
        match half {
            Half::F16(span) if whole => span.load(isa, i),
            Half::Bf16(span) if whole => span.load(isa, i),
            Half::F16(span) => span.load_partial(isa, i, n, f16::NEG_INFINITY),
            Half::Bf16(span) => span.load_partial(isa, i, n, bf16::NEG_INFINITY),
        }
    }
}

impl Element for f64 {
    type Acc = Self;
    const DTYPE: DType = DType::F64;
    #[inline(always)]
    fn from_f64(x: f64) -> Self {
        x
    }
    #[inline(always)]
    fn to_acc(self) -> Self {
        self
    }
    #[inline(always)]
    fn from_acc(x: Self) -> Self {
        x
    }
    #[inline(always)]
    unsafe fn load<S: Isa>(isa: S, src: *const Self) -> S::F64 {
        // SAFETY: the caller's promise is the same.
        unsafe { S::F64::load(isa, src) }
    }
    #[inline(always)]
    unsafe fn store<S: Isa>(_isa: S, v: S::F64, dst: *mut Self) {
        // SAFETY: the caller's promise is the same.
        unsafe { v.store(dst) }
    }
    #[inline(always)]
    unsafe fn stream<S: Isa>(_isa: S, v: S::F64, dst: *mut Self) {
        // SAFETY: the caller's promise is the same: no vector is larger than the alignment.
        unsafe { v.stream(dst) }
    }
    #[inline(always)]
    unsafe fn load_partial<S: Isa>(isa: S, src: *const Self, n: usize, fill: Self) -> S::F64 {
        // SAFETY: the caller's promise is the same.
        unsafe { S::F64::load_partial(isa, src, n, fill) }
    }
    #[inline(always)]
    unsafe fn store_partial<S: Isa>(_isa: S, v: S::F64, dst: *mut Self, n: usize) {
        // SAFETY: the caller's promise is the same.
        unsafe { v.store_partial(dst, n) }
    }
}

impl Float for f64 {
    type V<S: Isa> = S::F64;
    const ZERO: Self = 0.0;
    const ONE: Self = 1.0;
    const NEG_INF: Self = Self::NEG_INFINITY;
    const MAX: Self = Self::MAX;
    #[inline(always)]
    fn to_f64(self) -> f64 {
        self
    }
    #[inline(always)]
    fn load_half<S: Isa>(isa: S, _half: Half, _i: usize, _n: usize) -> S::F64 {
        S::F64::splat(isa, 0.0)
    }
}

macro_rules! half_element {
    ($type:ty, $dtype:ident, $load:ident, $store:ident) => {
        impl Element for $type {
            type Acc = f32;
            const DTYPE: DType = DType::$dtype;
            #[inline(always)]
            fn from_f64(x: f64) -> Self {
                <$type>::from_f32(round_to_odd(x))
            }
            #[inline(always)]
            fn to_acc(self) -> f32 {
                self.to_f32()
            }
            #[inline(always)]
            fn from_acc(x: f32) -> Self {
                <$type>::from_f32(x)
            }
            #[inline(always)]
            unsafe fn load<S: Isa>(isa: S, src: *const Self) -> S::F32 {
                // SAFETY: the type is a transparent u16; otherwise the caller's promise is the same.
                unsafe { isa.$load(src.cast()) }
            }
            #[inline(always)]
            unsafe fn store<S: Isa>(isa: S, v: S::F32, dst: *mut Self) {
                // SAFETY: the type is a transparent u16; otherwise the caller's promise is the same.
                unsafe { isa.$store(v, dst.cast()) }
            }
            #[inline(always)]
            unsafe fn stream<S: Isa>(isa: S, v: S::F32, dst: *mut Self) {
                let mut whole = [<$type>::ZERO; 16];
                // SAFETY: the copy has room for every lane; otherwise the caller's promise is the same.
                unsafe {
                    isa.$store(v, whole.as_mut_ptr().cast());
                    isa.stream_halves(whole.as_ptr().cast(), dst.cast());
                }
            }
            #[inline(always)]
            unsafe fn load_partial<S: Isa>(isa: S, src: *const Self, n: usize, fill: Self) -> S::F32 {
                let mut whole = [fill; 16];
                // SAFETY: n <= LANES <= 16 elements are readable, and the copy has 16.
                unsafe {
                    core::ptr::copy_nonoverlapping(src, whole.as_mut_ptr(), n);
                    isa.$load(whole.as_ptr().cast())
                }
            }
            #[inline(always)]
            unsafe fn store_partial<S: Isa>(isa: S, v: S::F32, dst: *mut Self, n: usize) {
                let mut whole = [<$type>::ZERO; 16];
                // SAFETY: the copy has room for every lane; n <= LANES elements are writable.
                unsafe {
                    isa.$store(v, whole.as_mut_ptr().cast());
                    core::ptr::copy_nonoverlapping(whole.as_ptr(), dst, n);
                }
            }
        }
    };
}
half_element!(f16, F16, load_f16, store_f16);
half_element!(bf16, Bf16, load_bf16, store_bf16);

/// A run of elements to read. Every access is checked against its length; the checks fold into the loop conditions of the kernels.
///
/// Spans are cells, not slices: the memory may also be written through a [`SpanMut`] (work in place), so no reference to it exists.
#[derive(Clone, Copy)]
pub struct Span<'a, E> {
    ptr: *const E,
    len: usize,
    life: PhantomData<&'a ()>,
}

/// A run of elements to read and write, see [`Span`].
#[derive(Clone, Copy)]
pub struct SpanMut<'a, E>(Span<'a, E>);

impl<'a, E: Element> Span<'a, E> {
    /// # Safety
    /// `ptr` is aligned and valid for reads of `len` elements for `'a`.
    #[inline(always)]
    pub unsafe fn new(ptr: *const E, len: usize) -> Self {
        Self { ptr, len, life: PhantomData }
    }

    /// The elements of a slice.
    #[inline(always)]
    pub fn of(slice: &'a [E]) -> Self {
        Self { ptr: slice.as_ptr(), len: slice.len(), life: PhantomData }
    }

    /// Number of elements.
    #[inline(always)]
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether it is empty.
    #[inline(always)]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// `len` elements from `start`; panics when they are not there.
    #[must_use]
    #[inline(always)]
    pub fn part(self, start: usize, len: usize) -> Self {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: the part lies inside, checked above.
        unsafe { Self::new(self.ptr.add(start), len) }
    }

    /// Where element `i` is, or would be.
    #[inline(always)]
    pub fn address(self, i: usize) -> *const u8 {
        self.ptr.wrapping_add(i).cast()
    }

    /// Element `i`.
    #[inline(always)]
    pub fn get(self, i: usize) -> E {
        assert!(i < self.len);
        // SAFETY: in bounds; the span is valid for reads.
        unsafe { self.ptr.add(i).read() }
    }

    /// A vector from element `i` on.
    #[inline(always)]
    pub fn load<S: Isa>(self, isa: S, i: usize) -> Vf<S, E::Acc> {
        let lanes = <Vf<S, E::Acc> as Vector>::LANES;
        assert!(i + lanes <= self.len);
        // SAFETY: in bounds; the span is valid for reads.
        unsafe { E::load(isa, self.ptr.add(i)) }
    }

    /// The `n` elements from `i` on, the other lanes `fill`.
    #[inline(always)]
    pub fn load_partial<S: Isa>(self, isa: S, i: usize, n: usize, fill: E) -> Vf<S, E::Acc> {
        assert!(n <= <Vf<S, E::Acc> as Vector>::LANES && i <= self.len && n <= self.len - i);
        // SAFETY: in bounds; the span is valid for reads.
        unsafe { E::load_partial(isa, self.ptr.add(i), n, fill) }
    }
}

impl<'a, E: Element> SpanMut<'a, E> {
    /// # Safety
    /// `ptr` is aligned and valid for reads and writes of `len` elements for `'a`.
    #[inline(always)]
    pub unsafe fn new(ptr: *mut E, len: usize) -> Self {
        // SAFETY: passed on.
        Self(unsafe { Span::new(ptr, len) })
    }

    /// The elements of a slice.
    #[inline(always)]
    pub fn of(slice: &'a mut [E]) -> Self {
        // SAFETY: the slice is exclusively borrowed for 'a.
        unsafe { Self::new(slice.as_mut_ptr(), slice.len()) }
    }

    /// The same elements, to read.
    #[inline(always)]
    pub fn read(self) -> Span<'a, E> {
        self.0
    }

    /// `len` elements from `start`; panics when they are not there.
    #[must_use]
    #[inline(always)]
    pub fn part(self, start: usize, len: usize) -> Self {
        Self(self.0.part(start, len))
    }

    /// Sets element `i`.
    #[inline(always)]
    pub fn set(self, i: usize, x: E) {
        assert!(i < self.0.len);
        // SAFETY: in bounds; the span is valid for writes.
        unsafe { self.0.ptr.cast_mut().add(i).write(x) }
    }

    /// Sets every element.
    pub fn fill(self, x: E) {
        for i in 0..self.0.len {
            self.set(i, x);
        }
    }

    /// Stores a vector at element `i`, rounded once.
    #[inline(always)]
    pub fn store<S: Isa>(self, isa: S, i: usize, v: Vf<S, E::Acc>) {
        let lanes = <Vf<S, E::Acc> as Vector>::LANES;
        assert!(i + lanes <= self.0.len);
        // SAFETY: in bounds; the span is valid for writes.
        unsafe { E::store(isa, v, self.0.ptr.cast_mut().add(i)) }
    }

    /// How many elements stand before the first that [`SpanMut::stream`] takes.
    #[inline(always)]
    pub fn lead(self) -> usize {
        let past = self.0.ptr as usize % STREAM_ALIGN;
        (STREAM_ALIGN - past) % STREAM_ALIGN / size_of::<E>()
    }

    /// Stores a vector past the caches at element `i`, which is a number of vectors after [`SpanMut::lead`]; rounded once. [`Isa::fence`] comes after.
    #[inline(always)]
    pub fn stream<S: Isa>(self, isa: S, i: usize, v: Vf<S, E::Acc>) {
        let lanes = <Vf<S, E::Acc> as Vector>::LANES;
        assert!(i + lanes <= self.0.len);
        // SAFETY: in bounds; the span is valid for writes.
        let dst = unsafe { self.0.ptr.cast_mut().add(i) };
        assert!((dst as usize).is_multiple_of(STREAM_ALIGN.min(lanes * size_of::<E>())));
        // SAFETY: valid for writes as before, aligned as checked.
        unsafe { E::stream(isa, v, dst) }
    }

    /// Stores the first `n` lanes at element `i`, rounded once.
    #[inline(always)]
    pub fn store_partial<S: Isa>(self, isa: S, i: usize, n: usize, v: Vf<S, E::Acc>) {
        assert!(n <= <Vf<S, E::Acc> as Vector>::LANES && i <= self.0.len && n <= self.0.len - i);
        // SAFETY: in bounds; the span is valid for writes.
        unsafe { E::store_partial(isa, v, self.0.ptr.cast_mut().add(i), n) }
    }
}

/// A matrix of adjacent columns: class `c` of column `j` stands `c * stride + j` elements from the start.
#[derive(Clone, Copy)]
pub struct Columns<'a, E> {
    ptr: *const E,
    stride: isize,
    classes: usize,
    width: usize,
    life: PhantomData<&'a ()>,
}

/// [`Columns`] to read and write.
#[derive(Clone, Copy)]
pub struct ColumnsMut<'a, E>(Columns<'a, E>);

impl<'a, E: Element> Columns<'a, E> {
    /// # Safety
    /// `ptr` is aligned, and for every class the `width` elements from `ptr + c * stride` are valid for reads for `'a`.
    #[inline(always)]
    pub unsafe fn new(ptr: *const E, stride: isize, classes: usize, width: usize) -> Self {
        Self { ptr, stride, classes, width, life: PhantomData }
    }

    /// `classes` rows of `stride` elements in a slice, of which `width` are columns.
    #[inline(always)]
    pub fn of(slice: &'a [E], stride: usize, classes: usize, width: usize) -> Self {
        assert!(width <= stride && (classes == 0 || classes * stride <= slice.len()));
        Self { ptr: slice.as_ptr(), stride: stride as isize, classes, width, life: PhantomData }
    }

    /// Number of classes.
    #[inline(always)]
    pub fn classes(self) -> usize {
        self.classes
    }

    /// Number of columns.
    #[inline(always)]
    pub fn width(self) -> usize {
        self.width
    }

    /// Class `c` of the columns from `j` on.
    #[inline(always)]
    pub fn load<S: Isa>(self, isa: S, c: usize, j: usize) -> Vf<S, E::Acc> {
        assert!(c < self.classes && j < self.width);
        let left = self.width - j;
        // SAFETY: in bounds; valid for reads.
        unsafe {
            let ptr = self.ptr.offset(c as isize * self.stride).add(j);
            if left >= <Vf<S, E::Acc> as Vector>::LANES { E::load(isa, ptr) } else { E::load_partial(isa, ptr, left, E::from_f64(0.0)) }
        }
    }

    /// The same where the columns are known to fill the vector.
    #[inline(always)]
    pub fn load_whole<S: Isa>(self, isa: S, c: usize, j: usize) -> Vf<S, E::Acc> {
        assert!(c < self.classes && j + <Vf<S, E::Acc> as Vector>::LANES <= self.width);
        // SAFETY: in bounds; valid for reads.
        unsafe { E::load(isa, self.ptr.offset(c as isize * self.stride).add(j)) }
    }

    /// Asks for what lies `ahead` bytes behind all columns of class `c`, which need not be there.
    #[inline(always)]
    pub fn prefetch<S: Isa>(self, isa: S, c: usize, ahead: isize) {
        let class = self.ptr.wrapping_offset(c as isize * self.stride).cast::<u8>().wrapping_offset(ahead);
        for line in (0..self.width * size_of::<E>()).step_by(64) {
            isa.prefetch(class.wrapping_add(line));
        }
    }

    /// Class `c` of column `j`.
    #[inline(always)]
    pub fn get(self, c: usize, j: usize) -> E {
        assert!(c < self.classes && j < self.width);
        // SAFETY: in bounds; valid for reads.
        unsafe { self.ptr.offset(c as isize * self.stride).add(j).read() }
    }

    /// The same columns with the classes in the opposite order.
    #[must_use]
    #[inline(always)]
    pub fn reversed(self) -> Self {
        // SAFETY: the last class exists, unless there is none.
        let ptr = unsafe { self.ptr.offset(self.classes.saturating_sub(1) as isize * self.stride) };
        Self { ptr, stride: -self.stride, ..self }
    }

    /// `n` classes from `c` on.
    #[must_use]
    #[inline(always)]
    pub fn part(self, c: usize, n: usize) -> Self {
        assert!(c <= self.classes && n <= self.classes - c);
        if n == 0 {
            return Self { classes: 0, ..self };
        }
        // SAFETY: class c exists, so its address lies in the same allocation.
        Self { ptr: unsafe { self.ptr.offset(c as isize * self.stride) }, classes: n, ..self }
    }
}

impl<'a, E: Element> ColumnsMut<'a, E> {
    /// # Safety
    /// As for [`Columns::new`], and valid for writes.
    #[inline(always)]
    pub unsafe fn new(ptr: *mut E, stride: isize, classes: usize, width: usize) -> Self {
        // SAFETY: passed on.
        Self(unsafe { Columns::new(ptr, stride, classes, width) })
    }

    /// `classes` rows of `stride` elements in a slice, of which `width` are columns.
    #[inline(always)]
    pub fn of(slice: &'a mut [E], stride: usize, classes: usize, width: usize) -> Self {
        assert!(width <= stride && (classes == 0 || classes * stride <= slice.len()));
        Self(Columns { ptr: slice.as_mut_ptr(), stride: stride as isize, classes, width, life: PhantomData })
    }

    /// The same columns, to read.
    #[inline(always)]
    pub fn read(self) -> Columns<'a, E> {
        self.0
    }

    /// As [`Columns::reversed`].
    #[must_use]
    #[inline(always)]
    pub fn reversed(self) -> Self {
        Self(self.0.reversed())
    }

    /// As [`Columns::part`].
    #[must_use]
    #[inline(always)]
    pub fn part(self, c: usize, n: usize) -> Self {
        Self(self.0.part(c, n))
    }

    /// Sets class `c` of column `j`.
    #[inline(always)]
    pub fn set(self, c: usize, j: usize, x: E) {
        assert!(c < self.0.classes && j < self.0.width);
        // SAFETY: in bounds; valid for writes.
        unsafe { self.0.ptr.cast_mut().offset(c as isize * self.0.stride).add(j).write(x) }
    }

    /// Stores class `c` of the columns from `j` on, rounded once, where the columns are known to fill the vector.
    #[inline(always)]
    pub fn store_whole<S: Isa>(self, isa: S, c: usize, j: usize, v: Vf<S, E::Acc>) {
        assert!(c < self.0.classes && j + <Vf<S, E::Acc> as Vector>::LANES <= self.0.width);
        // SAFETY: in bounds; valid for writes.
        unsafe { E::store(isa, v, self.0.ptr.cast_mut().offset(c as isize * self.0.stride).add(j)) }
    }

    /// As [`ColumnsMut::store`], past the caches where whole aligned vectors of the type allow it.
    #[inline(always)]
    pub fn stream<S: Isa>(self, isa: S, c: usize, j: usize, v: Vf<S, E::Acc>) {
        let to = self.0;
        assert!(c < to.classes && j < to.width);
        let lanes = <Vf<S, E::Acc> as Vector>::LANES;
        let ptr = to.ptr.cast_mut().wrapping_offset(c as isize * to.stride).wrapping_add(j);
        if E::DTYPE == E::Acc::DTYPE && to.width - j >= lanes && (ptr as usize).is_multiple_of(lanes * size_of::<E>()) {
            // SAFETY: in bounds and aligned; valid for writes; the element is the lane type.
            unsafe { v.stream(ptr.cast()) }
        } else {
            self.store(isa, c, j, v);
        }
    }

    /// Stores class `c` of the columns from `j` on, rounded once.
    #[inline(always)]
    pub fn store<S: Isa>(self, isa: S, c: usize, j: usize, v: Vf<S, E::Acc>) {
        let to = self.0;
        assert!(c < to.classes && j < to.width);
        let left = to.width - j;
        // SAFETY: in bounds; valid for writes.
        unsafe {
            let ptr = to.ptr.cast_mut().offset(c as isize * to.stride).add(j);
            if left >= <Vf<S, E::Acc> as Vector>::LANES { E::store(isa, v, ptr) } else { E::store_partial(isa, v, ptr, left) }
        }
    }
}

/// Where rows begin, in bytes from a common base.
#[derive(Debug, Default)]
pub struct Offsets {
    list: Vec<isize>,
    /// The lowest and the highest of them.
    ends: (isize, isize),
    /// The stride and the number of rows that follow it, if that is how the list came about.
    run: Option<(isize, usize)>,
}

impl Offsets {
    /// `rows` rows at one stride; the last one is repeated until there are `count`.
    pub fn run(&mut self, stride: isize, rows: usize, count: usize) -> &Self {
        if self.run != Some((stride, rows)) || self.list.len() != count.max(rows) {
            self.set((0..count.max(rows)).map(|i| i.min(rows.saturating_sub(1)) as isize * stride));
            self.run = Some((stride, rows));
        }
        self
    }

    /// Any rows.
    pub fn set(&mut self, rows: impl Iterator<Item = isize>) -> &Self {
        self.run = None;
        self.list.clear();
        self.list.extend(rows);
        self.ends = self.list.iter().fold((isize::MAX, isize::MIN), |(low, high), &offset| (low.min(offset), high.max(offset)));
        self
    }
}

/// Rows of a few adjacent elements, anywhere in an array: what tiles are transposed from.
#[derive(Clone, Copy)]
pub struct Rows<'a, E> {
    base: *mut u8,
    offsets: &'a [isize],
    len: usize,
    life: PhantomData<&'a E>,
}

/// [`Rows`] to read and write.
#[derive(Clone, Copy)]
pub struct RowsMut<'a, E>(Rows<'a, E>);

impl<'a, E: Element> Rows<'a, E> {
    /// A single row.
    #[inline(always)]
    pub fn single(row: Span<'a, E>) -> Self {
        Self { base: row.ptr.cast_mut().cast(), offsets: &[0], len: row.len, life: PhantomData }
    }

    /// Row `r`.
    #[inline(always)]
    pub fn row(self, r: usize) -> Span<'a, E> {
        assert!(r < self.offsets.len());
        // SAFETY: whoever made the rows checked every offset; they are multiples of the element's size from an aligned start.
        unsafe { Span::new(self.base.wrapping_offset(self.offsets[r]).cast::<E>(), self.len) }
    }

    /// Number of rows.
    #[inline(always)]
    pub fn count(self) -> usize {
        self.offsets.len()
    }

    /// Elements per row.
    #[inline(always)]
    pub fn len(self) -> usize {
        self.len
    }

    /// Whether the rows have no elements.
    #[inline(always)]
    pub fn is_empty(self) -> bool {
        self.len == 0
    }

    /// Where row `r` begins, or would if the rows went on as the first two do.
    #[inline(always)]
    pub fn address(self, r: usize) -> *const u8 {
        let last = self.offsets.len().saturating_sub(1);
        let stride = if let [first, second, ..] = self.offsets { second - first } else { 0 };
        let offset = self.offsets.get(r.min(last)).copied().unwrap_or(0) + r.saturating_sub(last) as isize * stride;
        self.base.wrapping_offset(offset).cast_const()
    }

    /// Element `c` of row `r`.
    #[inline(always)]
    pub fn get(self, r: usize, c: usize) -> E {
        assert!(r < self.offsets.len() && c < self.len);
        // SAFETY: in bounds; whoever made the rows checked every offset.
        unsafe { self.base.wrapping_offset(self.offsets[r]).cast::<E>().add(c).read_unaligned() }
    }
}

impl<T: Float> Rows<'_, T> {
    /// Asks for `count` rows from `r` on of those that follow, if they follow at the stride of the first two.
    #[inline(always)]
    pub fn prefetch<S: Isa>(self, isa: S, r: usize, count: usize) {
        let [first, second, ..] = self.offsets[..] else { return };
        let stride = second - first;
        let mut at = self.base.wrapping_offset(first + (r + self.offsets.len()) as isize * stride);
        // Every line of adjacent rows, the first one of rows far apart.
        let step = stride.abs().max(64);
        for _ in 0..(count as isize * stride.abs()).unsigned_abs().div_ceil(step.unsigned_abs()) {
            isa.prefetch(at);
            at = at.wrapping_offset(if stride < 0 { -step } else { step });
        }
    }

    /// Elements `c..c + 4` of the rows from `r` on: lane i of vector j is element c + j of row r + i.
    #[inline(always)]
    pub fn load4<S: Isa>(self, isa: S, r: usize, c: usize) -> [Vf<S, T>; 4] {
        assert!(r + <Vf<S, T> as Vector>::LANES <= self.offsets.len() && c + 4 <= self.len);
        // SAFETY: in bounds; whoever made the rows checked every offset.
        unsafe { <Vf<S, T> as Vector>::load4(isa, self.base.cast::<T>().wrapping_add(c).cast(), self.offsets.as_ptr().add(r)) }
    }
}

impl<'a, E: Element> RowsMut<'a, E> {
    /// A single row.
    #[inline(always)]
    pub fn single(row: SpanMut<'a, E>) -> Self {
        Self(Rows::single(row.0))
    }

    /// Row `r`.
    #[inline(always)]
    pub fn row(self, r: usize) -> SpanMut<'a, E> {
        SpanMut(self.0.row(r))
    }

    /// Number of rows.
    #[inline(always)]
    pub fn count(self) -> usize {
        self.0.count()
    }

    /// Sets element `c` of row `r`.
    #[inline(always)]
    pub fn set(self, r: usize, c: usize, x: E) {
        assert!(r < self.0.offsets.len() && c < self.0.len);
        // SAFETY: in bounds; whoever made the rows checked every offset, and they are writable.
        unsafe { self.0.base.wrapping_offset(self.0.offsets[r]).cast::<E>().add(c).write_unaligned(x) }
    }
}

impl<'a, E: Element> RowsMut<'a, E> {
    /// The same rows, to read.
    #[inline(always)]
    pub fn read(self) -> Rows<'a, E> {
        self.0
    }
}

impl<'a, T: Float> RowsMut<'a, T> {
    /// Rows `offsets` bytes into a slice; panics when they are not there.
    #[inline(always)]
    pub fn of(slice: &'a mut [T], offsets: &'a Offsets, len: usize) -> Self {
        let (low, high) = offsets.ends;
        assert!(offsets.list.is_empty() || low >= 0 && high as usize + len * size_of::<T>() <= size_of_val(slice));
        Self(Rows { base: slice.as_mut_ptr().cast(), offsets: &offsets.list, len, life: PhantomData })
    }

    /// The inverse of [`Rows::load4`].
    #[inline(always)]
    pub fn store4<S: Isa>(self, _isa: S, r: usize, c: usize, v: [Vf<S, T>; 4]) {
        let rows = self.0;
        assert!(r + <Vf<S, T> as Vector>::LANES <= rows.offsets.len() && c + 4 <= rows.len);
        // SAFETY: in bounds; whoever made the rows checked every offset, and they are writable.
        unsafe { <Vf<S, T> as Vector>::store4(v, rows.base.cast::<T>().wrapping_add(c).cast(), rows.offsets.as_ptr().add(r)) }
    }
}

/// The lanes of a vector, in order; the rest of the array is zero.
#[inline(always)]
pub fn lanes<S: Isa, T: Float>(v: Vf<S, T>) -> [T; 16] {
    const { assert!(<Vf<S, T> as Vector>::LANES <= 16) };
    let mut out = [T::ZERO; 16];
    // SAFETY: a vector has at most 16 lanes, checked above.
    unsafe { v.store(out.as_mut_ptr()) };
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Both sides of every tie between two neighbours, further apart than float64 resolves and less than float32 does.
    fn ties_are_kept_apart<E: Element<Acc = f32>>(from_bits: impl Fn(u16) -> E, infinity: u16) {
        for bits in 0..infinity - 1 {
            let (low, high) = (f64::from(from_bits(bits).to_acc()), f64::from(from_bits(bits + 1).to_acc()));
            let tie = f64::midpoint(low, high);
            let even = if bits % 2 == 0 { low } else { high };
            for (x, expected) in [(tie.next_down(), low), (tie, even), (tie.next_up(), high), (low, low)] {
                for sign in [1.0, -1.0] {
                    assert_eq!(f64::from(E::from_f64(sign * x).to_acc()), sign * expected, "{x:e} from {low:e} and {high:e}");
                }
            }
        }
        assert_eq!(E::from_f64(1e300).to_acc(), f32::INFINITY);
        assert!(E::from_f64(f64::NAN).to_acc().is_nan());
    }

    #[test]
    fn float64_is_rounded_once_to_half_types() {
        ties_are_kept_apart(f16::from_bits, f16::INFINITY.to_bits());
        ties_are_kept_apart(bf16::from_bits, bf16::INFINITY.to_bits());
    }
}
