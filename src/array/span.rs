//! Runs of elements: every access is checked.

use core::marker::PhantomData;

use half::{bf16, f16};

use crate::simd::{Isa, Vector};

use super::element::{Element, Vf};

/// Bytes of a cache line, and of the largest vector: what stores past the caches are aligned to.
pub const STREAM_ALIGN: usize = 64;

/// A run of elements to read. Every access is checked against its length; the checks fold into the loop conditions of the kernels.
///
/// Spans are cells, not slices: the memory may also be written through a [`SpanMut`] (work in place), so no reference to it exists.
#[derive(Clone, Copy)]
pub struct Span<'a, E> {
    pub(super) ptr: *const E,
    pub(super) len: usize,
    life: PhantomData<&'a ()>,
}

/// A run of elements to read and write, see [`Span`].
#[derive(Clone, Copy)]
pub struct SpanMut<'a, E>(pub(super) Span<'a, E>);

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

    /// Run `k` of `size` elements each; panics when it is not there. In a loop over all `len / size` of them the check is gone.
    #[must_use]
    #[inline(always)]
    pub fn nth(self, k: usize, size: usize) -> Self {
        assert!(k < self.len / size);
        // SAFETY: (k + 1)·size is at most the length, checked above.
        unsafe { Self::new(self.ptr.add(k * size), size) }
    }

    /// The same elements, none of which is read before there is `v`: see [`Vector::before`].
    #[must_use]
    #[inline(always)]
    pub fn after<V: Vector>(self, v: &mut V) -> Self {
        let ptr;
        (*v, ptr) = v.before(self.ptr);
        Self { ptr, ..self }
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

    /// As [`Span::nth`].
    #[must_use]
    #[inline(always)]
    pub fn nth(self, k: usize, size: usize) -> Self {
        Self(self.0.nth(k, size))
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

/// A run of truth values, one byte each, of which 0 is False; a cell as [`Span`] is.
#[derive(Clone, Copy)]
pub struct Flags<'a> {
    ptr: *const u8,
    len: usize,
    life: PhantomData<&'a ()>,
}

impl<'a> Flags<'a> {
    /// # Safety
    /// `ptr` is valid for reads of `len` bytes for `'a`.
    #[inline(always)]
    pub unsafe fn new(ptr: *const u8, len: usize) -> Self {
        Self { ptr, len, life: PhantomData }
    }

    /// The bytes of a slice.
    #[inline(always)]
    pub fn of(slice: &'a [u8]) -> Self {
        Self { ptr: slice.as_ptr(), len: slice.len(), life: PhantomData }
    }

    /// As [`Span::part`].
    #[must_use]
    #[inline(always)]
    pub fn part(self, start: usize, len: usize) -> Self {
        assert!(start <= self.len && len <= self.len - start);
        // SAFETY: the part lies inside, checked above.
        unsafe { Self::new(self.ptr.add(start), len) }
    }

    /// As [`Span::nth`].
    #[must_use]
    #[inline(always)]
    pub fn nth(self, k: usize, size: usize) -> Self {
        assert!(k < self.len / size);
        // SAFETY: (k + 1)·size is at most the length, checked above.
        unsafe { Self::new(self.ptr.add(k * size), size) }
    }

    /// Where value `i` is, or would be.
    #[inline(always)]
    pub fn address(self, i: usize) -> *const u8 {
        self.ptr.wrapping_add(i)
    }

    /// The values from `i` on, as many as a vector has lanes.
    #[inline(always)]
    pub fn load<V: Vector>(self, isa: V::Isa, i: usize) -> V::Mask {
        assert!(i + V::LANES <= self.len);
        // SAFETY: in bounds; the run is valid for reads.
        unsafe { V::flags(isa, self.ptr.add(i)) }
    }

    /// The `n` values from `i` on, the other lanes False.
    #[inline(always)]
    pub fn load_partial<V: Vector>(self, isa: V::Isa, i: usize, n: usize) -> V::Mask {
        assert!(n <= V::LANES && i <= self.len && n <= self.len - i);
        let mut bytes = [0; STREAM_ALIGN];
        for (lane, byte) in bytes[..n].iter_mut().enumerate() {
            // SAFETY: in bounds; the run is valid for reads.
            *byte = unsafe { self.ptr.add(i + lane).read() };
        }
        // SAFETY: there are as many bytes as the largest vector has.
        unsafe { V::flags(isa, bytes.as_ptr()) }
    }
}

/// A run of halves of either type.
#[derive(Clone, Copy)]
pub enum Half<'a> {
    /// IEEE half precision.
    F16(Span<'a, f16>),
    /// bfloat16.
    Bf16(Span<'a, bf16>),
}

impl<'a> Half<'a> {
    /// The elements, if they are of that type.
    #[inline(always)]
    pub fn of<E: Element>(self) -> Option<Span<'a, E>> {
        let (ptr, dtype) = match self {
            Self::F16(span) => (span.ptr.cast::<E>(), f16::DTYPE),
            Self::Bf16(span) => (span.ptr.cast::<E>(), bf16::DTYPE),
        };
        // SAFETY: a run of the same type.
        (E::DTYPE == dtype).then(|| unsafe { Span::new(ptr, self.len()) })
    }
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
    /// Where it begins.
    #[inline(always)]
    pub fn address(self) -> *const u8 {
        match self {
            Self::F16(span) => span.address(0),
            Self::Bf16(span) => span.address(0),
        }
    }
    /// As [`Span::nth`].
    #[must_use]
    #[inline(always)]
    pub fn nth(self, k: usize, size: usize) -> Self {
        match self {
            Self::F16(span) => Self::F16(span.nth(k, size)),
            Self::Bf16(span) => Self::Bf16(span.nth(k, size)),
        }
    }
}
