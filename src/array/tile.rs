//! Several runs: adjacent columns, and rows anywhere in an array.

use core::marker::PhantomData;

use half::{bf16, f16};

use crate::simd::{Isa, Vector};

use super::element::{Element, Float, Vf};
use super::span::{Half, Span, SpanMut};

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
pub struct ColumnsMut<'a, E>(pub(super) Columns<'a, E>);

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
        assert!(j < self.width);
        self.load_some(isa, c, (j, <Vf<S, E::Acc> as Vector>::LANES.min(self.width - j)))
    }

    /// `N` classes from `c` on of the `n` columns from `j` on, to be loaded whole: a copy where there are less, in which the others are `fill`.
    #[inline(always)]
    pub fn window<'s, S: Isa, const N: usize>(self, (c, j, n): (usize, usize, usize), copy: &'s mut [[E; 16]; N], fill: E) -> Columns<'s, E>
    where
        'a: 's,
    {
        let lanes = <Vf<S, E::Acc> as Vector>::LANES;
        assert!(c < self.classes && n <= lanes && j <= self.width && n <= self.width - j);
        // SAFETY: in bounds.
        let first = unsafe { self.ptr.offset(c as isize * self.stride).add(j) };
        let classes = N.min(self.classes - c);
        if n == lanes && classes == N {
            return Columns { ptr: first, stride: self.stride, classes: N, width: lanes, life: PhantomData };
        }
        for (u, copy) in copy.iter_mut().enumerate() {
            copy.fill(fill);
            if u < classes {
                // SAFETY: in bounds; valid for reads; a vector has at most 16 lanes.
                unsafe { core::ptr::copy_nonoverlapping(first.offset(u as isize * self.stride), copy.as_mut_ptr(), n) };
            }
        }
        Columns { ptr: copy.as_ptr().cast(), stride: 16, classes: N, width: lanes, life: PhantomData }
    }

    /// Class `c` of the `n` columns from `j` on.
    #[inline(always)]
    pub fn load_some<S: Isa>(self, isa: S, c: usize, (j, n): (usize, usize)) -> Vf<S, E::Acc> {
        let lanes = <Vf<S, E::Acc> as Vector>::LANES;
        assert!(c < self.classes && n <= lanes && j <= self.width && n <= self.width - j);
        // SAFETY: in bounds; valid for reads.
        unsafe {
            let ptr = self.ptr.offset(c as isize * self.stride).add(j);
            if n == lanes { E::load(isa, ptr) } else { E::load_partial(isa, ptr, n, E::from_f64(0.0)) }
        }
    }

    /// Four vectors of class `c` from column `j` on.
    #[inline(always)]
    pub fn load_four<S: Isa>(self, isa: S, c: usize, j: usize) -> [Vf<S, E::Acc>; 4] {
        let lanes = <Vf<S, E::Acc> as Vector>::LANES;
        assert!(c < self.classes && j + 4 * lanes <= self.width);
        // SAFETY: in bounds; valid for reads.
        unsafe {
            let ptr = self.ptr.offset(c as isize * self.stride).add(j);
            [E::load(isa, ptr), E::load(isa, ptr.add(lanes)), E::load(isa, ptr.add(2 * lanes)), E::load(isa, ptr.add(3 * lanes))]
        }
    }

    /// Columns before the first that begins on a boundary of the vectors, if it does so in every class: otherwise none.
    #[inline(always)]
    pub fn lead<S: Isa>(self) -> usize {
        let vector = <Vf<S, E::Acc> as Vector>::LANES * size_of::<E>();
        if !(self.stride.unsigned_abs() * size_of::<E>()).is_multiple_of(vector) {
            return 0;
        }
        (self.ptr as usize).wrapping_neg() % vector / size_of::<E>()
    }

    /// Bytes.
    #[inline(always)]
    pub fn stride(self) -> isize {
        self.stride * size_of::<E>() as isize
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
        // Of the line before what is asked for begins in, the columns before have read a part, unless that is where it begins.
        for line in (0..self.width * size_of::<E>()).step_by(64) {
            isa.prefetch(class.wrapping_add(line + 63));
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

    /// Stores class `c` of the `n` columns from `j` on, rounded once; past the caches, with `stream`, where that is a whole aligned vector of the type.
    #[inline(always)]
    pub fn put<S: Isa>(self, isa: S, c: usize, (j, n): (usize, usize), stream: bool, v: Vf<S, E::Acc>) {
        let to = self.0;
        let lanes = <Vf<S, E::Acc> as Vector>::LANES;
        assert!(c < to.classes && n <= lanes && j <= to.width && n <= to.width - j);
        // SAFETY: in bounds; valid for writes; what is written past the caches is aligned.
        unsafe {
            let ptr = to.ptr.cast_mut().offset(c as isize * to.stride).add(j);
            if n < lanes {
                E::store_partial(isa, v, ptr, n);
            } else if stream && E::DTYPE == E::Acc::DTYPE && (ptr as usize).is_multiple_of(lanes * size_of::<E>()) {
                E::stream(isa, v, ptr);
            } else {
                E::store(isa, v, ptr);
            }
        }
    }

    /// The same of four vectors.
    #[inline(always)]
    pub fn put_four<S: Isa>(self, isa: S, c: usize, j: usize, stream: bool, v: [Vf<S, E::Acc>; 4]) {
        let to = self.0;
        let lanes = <Vf<S, E::Acc> as Vector>::LANES;
        assert!(c < to.classes && j + 4 * lanes <= to.width);
        // SAFETY: in bounds; valid for writes; what is written past the caches is aligned.
        unsafe {
            let ptr = to.ptr.cast_mut().offset(c as isize * to.stride).add(j);
            if stream && E::DTYPE == E::Acc::DTYPE && (ptr as usize).is_multiple_of(lanes * size_of::<E>()) {
                E::stream(isa, v[0], ptr);
                E::stream(isa, v[1], ptr.add(lanes));
                E::stream(isa, v[2], ptr.add(2 * lanes));
                E::stream(isa, v[3], ptr.add(3 * lanes));
            } else {
                E::store(isa, v[0], ptr);
                E::store(isa, v[1], ptr.add(lanes));
                E::store(isa, v[2], ptr.add(2 * lanes));
                E::store(isa, v[3], ptr.add(3 * lanes));
            }
        }
    }

    /// Stores class `c` of the columns from `j` on, rounded once; `stream` as in [`ColumnsMut::put`].
    #[inline(always)]
    pub fn store<S: Isa>(self, isa: S, c: usize, j: usize, stream: bool, v: Vf<S, E::Acc>) {
        assert!(j < self.0.width);
        self.put(isa, c, (j, <Vf<S, E::Acc> as Vector>::LANES.min(self.0.width - j)), stream, v);
    }
}

/// Where rows begin, in bytes from a common base.
#[derive(Debug, Default)]
pub struct Offsets {
    pub(super) list: Vec<isize>,
    /// The lowest and the highest of them.
    pub(super) ends: (isize, isize),
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

    /// Number of rows.
    pub fn count(&self) -> usize {
        self.list.len()
    }

    /// Where row `r` is.
    pub fn at(&self, r: usize) -> isize {
        self.list[r]
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
    pub(super) base: *mut u8,
    pub(super) offsets: &'a [isize],
    pub(super) len: usize,
    pub(super) life: PhantomData<&'a E>,
}

/// [`Rows`] to read and write.
#[derive(Clone, Copy)]
pub struct RowsMut<'a, E>(pub(super) Rows<'a, E>);

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

    /// All rows as one, if each begins where the one before ends.
    #[inline(always)]
    pub fn line(self) -> Option<Span<'a, E>> {
        let (first, size) = (*self.offsets.first()?, (self.len * size_of::<E>()) as isize);
        let adjacent = self.offsets.iter().enumerate().all(|(r, &offset)| offset == first + r as isize * size);
        // SAFETY: as of one row; together they are a run.
        adjacent.then(|| unsafe { Span::new(self.base.wrapping_offset(first).cast::<E>(), self.offsets.len() * self.len) })
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

/// Rows that are yet to come; they need not be there.
#[derive(Debug)]
pub struct Following {
    at: *const u8,
    step: isize,
    lines: usize,
}

impl Following {
    /// Asks for some more of them.
    #[inline(always)]
    pub fn ask<S: Isa>(&mut self, isa: S) {
        for _ in 0..self.lines {
            isa.prefetch(self.at);
            self.at = self.at.wrapping_offset(self.step);
        }
    }
}

impl<T: Float> Rows<'_, T> {
    /// The rows that follow, if they follow at the stride of the first two, `count` at a time.
    #[inline(always)]
    pub fn following(self, count: usize) -> Following {
        let [first, second, ..] = self.offsets[..] else { return Following { at: self.base, step: 0, lines: 0 } };
        let stride = second - first;
        let at = self.base.wrapping_offset(first + self.offsets.len() as isize * stride);
        // Every line of adjacent rows, the first one of rows far apart.
        let adjacent = stride.unsigned_abs() <= (self.len * size_of::<T>()).max(64);
        let step = if adjacent { 64 } else { stride.unsigned_abs() };
        let lines = (count * stride.unsigned_abs()).div_ceil(step);
        Following { at, step: if stride < 0 { -(step as isize) } else { step as isize }, lines }
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

    /// As [`Rows::line`].
    #[inline(always)]
    pub fn line(self) -> Option<SpanMut<'a, E>> {
        self.0.line().map(SpanMut)
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
